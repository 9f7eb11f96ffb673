"""What a model's answers depend on, in 16 hex digits: the fingerprint of answers, caches and runs.

The rule is that whatever reaches tokens, logits or texts is in it, as it is when the fingerprint is asked for, and
that what only changes batches (``batch_size``, ``prefix_cache``) is not. A refusal too many costs a second cache; an
answer of another model would be a wrong number.
"""

from __future__ import annotations

import dis
import functools
import hashlib
import inspect
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from lm_eval_adainfer.harness.model import AdaInferLM

_ROW = 2**16  # 32-bit words to a sum
_BYTES_AT_ONCE = {"cpu": 2**22}
_MOST_BYTES = 2**26
# libraries whose hooks are part of how a model is run, and not of what it computes
_LIBRARIES = ("transformers", "accelerate", "peft", "lm_eval_adainfer")
_ADAPTER = ("scaling", "_active_adapter", "_disable_adapters", "merged_adapters")  # peft's, beside the weights
# of a tokenizer, what is no part of its backend
_TOKENIZER = (
    "bos_token", "eos_token", "pad_token", "unk_token", "add_bos_token", "add_eos_token", "all_special_ids",
    "clean_up_tokenization_spaces", "split_special_tokens", "spaces_between_special_tokens",
)  # fmt: skip


def fingerprint(lm: AdaInferLM) -> str:
    """16 hex digits of whatever changes an answer of ``lm``, as it is now.

    All weights and buffers are read, by which a model that was trained further is told from what it was: about a
    second for 6 GB on one CPU core, and what reading the memory takes on a GPU. Offloaded weights are read once only.
    The tokenizer is written out, which takes up to a second for 256,000 tokens.
    """
    model = lm.model
    identity = {
        "class": f"{type(lm).__module__}.{type(lm).__qualname__}",
        "model": lm._model_name(),
        "weights": lm.anatomy.weights_hash(model),
        "modules": modules_hash(model),
        "config": _config(model.config),
        "attention": str(getattr(model.config, "_attn_implementation", None)),
        "softmax_dtype": str(lm.softmax_dtype),
        "n_blocks": lm.n_blocks,
        "dtype": str(lm._dtype()),
        "autocast": str(lm.mixed_precision_dtype),
        "tokenizer": tokenizer_hash(lm.tokenizer),
        "max_length": lm.max_length,
        "max_gen_toks": lm.max_gen_toks,
        "truncation": _truncation(lm),
        "add_bos_token": str(lm.add_bos_token),
        "prefix_token_id": lm.prefix_token_id,
        "think_end_token": repr(lm.think_end_token),
        "enable_thinking": str(lm.enable_thinking),
        "generation_config": generation_settings(model),
        "stopper": lm.stopper.describe(),
        "schedule": lm.schedule.describe(),
        "log_features": lm._log_features,
        "generation": lm.generation,
        **({"kv_policy": lm.kv_policy, "shortlist": lm.shortlist} if lm.generation == "early" else {}),
    }
    return _short(identity)


def tokenizer_hash(tokenizer: Any) -> str:
    """16 hex digits of what makes tokens of a text and a text of tokens.

    Padding and truncation are left out: every call sets them in the backend, so they would change while a model runs.
    """
    state: dict[str, Any] = {"class": type(tokenizer).__qualname__}
    state |= {name: repr(getattr(tokenizer, name, None)) for name in _TOKENIZER}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        written = json.loads(backend.to_str())
        state["backend"] = {key: value for key, value in written.items() if key not in ("padding", "truncation")}
    else:  # one in Python has no common form; these are what such tokenizers are made of
        pieces: Any = getattr(tokenizer, "sp_model", None)
        state["vocabulary"] = tokenizer.get_vocab()
        state["added"] = repr(sorted(getattr(tokenizer, "added_tokens_decoder", {}).items()))
        state["merges"] = repr(sorted(getattr(tokenizer, "bpe_ranks", {}).items()))
        if hasattr(pieces, "serialized_model_proto"):
            state["pieces"] = hashlib.sha256(pieces.serialized_model_proto()).hexdigest()
    return _short(state)


def generation_settings(model: Any) -> dict[str, Any]:
    """What ``generate`` takes from the model's own generation config; HFLM always asks for a cache itself."""
    settings = getattr(model, "generation_config", None)
    found = {} if settings is None else settings.to_dict()
    unread = ("use_cache", "transformers_version")
    return {key: value for key, value in found.items() if key[0] != "_" and key not in unread}


def _config(config: Any) -> dict[str, Any]:
    """A model's config without where it was read, and by which release."""
    unread = ("_name_or_path", "transformers_version")
    return {key: value for key, value in config.to_dict().items() if key not in unread}


def _truncation(lm: AdaInferLM) -> list[str]:
    """Where the tokenizer itself cuts a prompt; nothing where it is not asked to."""
    if not lm.truncation:
        return []
    return [str(getattr(lm.tokenizer, name, None)) for name in ("model_max_length", "truncation_side")]


# ------------------------------------------------------------------ the model
def modules_hash(model: Any) -> str:
    """16 hex digits of what modules compute with beside tensors.

    That is: their numbers and switches (an epsilon, a scale, whether dropout is on), which adapters act, the hooks
    that somebody has put on them (by their code and the numbers that they hold), and a forward of their own.
    """
    digest = hashlib.sha256()
    for path, module in model.named_modules():
        own = vars(module)
        state: dict[str, Any] = {key: repr(own[key]) for key in _ADAPTER if key in own}
        if not changes_by_itself(module):
            state |= {
                key: repr(value)
                for key, value in own.items()
                if type(value) in (bool, int, float) and key[0] != "_" and "cached" not in key
            }
        acting = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        if "forward" in own and not hasattr(module, "_hf_hook"):
            acting.append(own["forward"])
        state["acting"] = [found for act in acting if not _from_library(act) and (found := _callable(act))]
        digest.update(json.dumps([path, type(module).__qualname__, state], sort_keys=True).encode())
    return digest.hexdigest()[:16]


def changes_by_itself(module: Any) -> bool:
    """Whether a module's buffers follow the texts that it has seen: rotary embeddings that scale with the length."""
    kinds = str(getattr(module, "rope_type", ""))
    return "dynamic" in kinds or "longrope" in kinds


def _from_library(act: Any) -> bool:
    return str(getattr(act, "__module__", "")).split(".")[0] in _LIBRARIES


def _callable(act: Any) -> list[Any]:
    """A hook's code, and the tensors and floats that it holds; its counters and the like don't change what it does.

    Nothing where it neither looks at its arguments nor holds a number: then it only notes that it was called.
    """
    held: list[Any] = []
    while isinstance(act, functools.partial):
        held += [*act.args, *act.keywords.values()]
        act = act.func
    plain = hasattr(act, "__code__") or hasattr(act, "__func__")
    function: Any = act if plain else type(act).__call__
    owner = getattr(act, "__self__", act)
    function = getattr(function, "__func__", function)
    code = getattr(function, "__code__", None)
    held += [*(getattr(function, "__defaults__", None) or ()), *getattr(owner, "__dict__", {}).values()]
    for cell in getattr(function, "__closure__", None) or ():
        try:
            held.append(cell.cell_contents)
        except ValueError:  # it is not bound yet
            continue
    data = [tensor_hash(x) if isinstance(x, Tensor) else repr(x) for x in held if isinstance(x, (Tensor, float))]
    if not data and code is not None and not _reads_arguments(code, owned=function is not act):
        return []
    return [getattr(act, "__qualname__", type(act).__qualname__), list(_instructions(code)), data]


def _reads_arguments(code: Any, owned: bool) -> bool:
    """Whether code has any use for its parameters; of a method, those behind ``self``."""
    stars = sum(bool(code.co_flags & flag) for flag in (inspect.CO_VARARGS, inspect.CO_VARKEYWORDS))
    names = set(code.co_varnames[int(owned) : code.co_argcount + code.co_kwonlyargcount + stars])
    loaded = (step.argval for step in dis.get_instructions(code) if step.opname.startswith("LOAD_"))
    return any(names & set(value if isinstance(value, tuple) else (value,)) for value in loaded if _is_name(value))


def _is_name(value: Any) -> bool:
    """A constant that is loaded may be of any kind; variables have names, and some instructions load two."""
    return isinstance(value, str) or (isinstance(value, tuple) and all(isinstance(v, str) for v in value))


def _instructions(code: Any) -> Iterator[str]:
    """What a code object does, without where it was written."""
    if code is None:
        return
    yield code.co_code.hex()
    yield repr(code.co_names)
    for constant in code.co_consts:
        if hasattr(constant, "co_code"):
            yield from _instructions(constant)
        else:
            yield repr(constant)


def tensor_hash(tensor: Tensor) -> str:
    """32 hex digits of a tensor's shape, dtype and every bit of it, computed on the device where it lies.

    Each run of 2^16 words of 32 bits is summed, modulo 2^64, with fixed random multipliers of 64 bits. The sums do not
    depend on the device or on the order of addition. Two different runs have the same sum with a chance of 2^-32.
    """
    digest = hashlib.sha256(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
    octets = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    whole = octets.numel() // 4 * 4
    digest.update(octets[whole:].cpu().numpy().tobytes())
    octets = octets[:whole]
    words = (octets.clone() if octets.storage_offset() % 4 else octets).view(torch.int32)
    multipliers = _multipliers(str(tensor.device))
    rows = words.numel() // _ROW
    step = max(1, _BYTES_AT_ONCE.get(tensor.device.type, _MOST_BYTES) // (4 * _ROW))
    table = words[: rows * _ROW].view(rows, _ROW)
    sums = [(table[start : start + step] * multipliers).sum(1) for start in range(0, rows, step)]
    rest = words[rows * _ROW :]
    sums.append((rest * multipliers[: rest.numel()]).sum().reshape(1))
    digest.update(torch.cat(sums).cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


@functools.lru_cache(maxsize=16)
def _multipliers(device: str) -> Tensor:
    """[2^16] int64; numpy promises that this generator's raw stream never changes."""
    return torch.from_numpy(np.random.PCG64(0).random_raw(_ROW).view(np.int64)).to(device)


def _short(identity: Any) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:16]
