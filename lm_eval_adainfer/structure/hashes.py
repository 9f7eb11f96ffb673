"""Hashes of a model's weights and modules: they tell models apart that answer differently."""

from __future__ import annotations

import dis
import functools
import hashlib
import inspect
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lm_eval_adainfer.structure import private
from lm_eval_adainfer.structure.weights import values_of

_ROW = 2**16  # 32-bit words to a sum
_BYTES_AT_ONCE = {"cpu": 2**22}
_MOST_BYTES = 2**26
_SIGNS = 2**16  # of one parameter
# libraries whose hooks are part of how a model is run, and not of what it computes
_LIBRARIES = ("transformers", "accelerate", "peft", "lm_eval_adainfer")


def modules_hash(model: Any) -> str:
    """16 hex digits of what modules compute with beside tensors.

    That is: their numbers and switches (an epsilon, a scale, whether dropout is on), which adapters act, the hooks
    that somebody has put on them (by their code and the numbers that they hold), and a forward of their own.
    """
    digest = hashlib.sha256()
    for path, module in model.named_modules():
        own = vars(module)
        state: dict[str, Any] = {key: repr(own[key]) for key in private.ADAPTER_STATE if key in own}
        if not changes_by_itself(module):
            state |= {
                key: repr(value)
                for key, value in own.items()
                if type(value) in (bool, int, float) and key[0] != "_" and "cached" not in key
            }
        acting = [hook for hooks in private.hooks_of(module) for hook in hooks.values()]
        if "forward" in own and private.offload_hook(module) is None:
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


def signs_hash(model: Any) -> str:
    """16 hex digits of the signs of a model's weights, which no rounding from one dtype to another changes.

    Of each parameter 2^16 signs are read at most, evenly spread: training that matters flips some of them.
    """
    digest = hashlib.sha256()
    for module in model.modules():
        for name in private.parameters_of(module):
            values = values_of(module, name)
            if values is not None and values.is_floating_point():
                digest.update(repr(tuple(values.shape)).encode())
                some = values.reshape(-1)[:: max(1, values.numel() // _SIGNS)]
                digest.update(np.packbits(torch.signbit(some).cpu().numpy()).tobytes())
    return digest.hexdigest()[:16]


@functools.lru_cache(maxsize=16)
def _multipliers(device: str) -> Tensor:
    """[2^16] int64; numpy promises that this generator's raw stream never changes."""
    return torch.from_numpy(np.random.PCG64(0).random_raw(_ROW).view(np.int64)).to(device)


def _short(identity: Any) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:16]
