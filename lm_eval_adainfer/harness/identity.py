"""What a model's answers depend on, in 16 hex digits: the fingerprint of answers, caches and runs.

The rule is that whatever reaches tokens, logits or texts is in it, as it is when the fingerprint is asked for, and
that what only changes batches (``batch_size``, ``prefix_cache``) is not. A refusal too many costs a second cache; an
answer of another model would be a wrong number.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from lm_eval_adainfer import releases
from lm_eval_adainfer.structure import private
from lm_eval_adainfer.structure.hashes import _short, modules_hash

# of a tokenizer, what is no part of its backend
_TOKENIZER = (
    "bos_token", "eos_token", "pad_token", "unk_token", "add_bos_token", "add_eos_token", "all_special_ids",
    "clean_up_tokenization_spaces", "split_special_tokens", "spaces_between_special_tokens",
)  # fmt: skip


def fingerprint(lm: Any) -> str:
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
        "attention": str(private.attention_of(model.config)),
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
        "enable_thinking": str(releases.thinks(lm)),
        "generation_config": generation_settings(model),
        "stopper": lm.stopper.describe(),
        **lm.reader.describe(),
        "schedule": lm.schedule.describe(),
        "log_features": lm.options.log_features,
        "generation": lm.generation,
        **(
            {
                "kv_policy": lm.options.kv_policy,
                "shortlist": lm.options.shortlist,
                **({"screen": lm.options.screen} if lm.options.screen else {}),
                **({"token_stopper": lm.token_stopper.describe()} if lm.reader.runs_tokens else {}),
                **({"token_reader": lm.token_reader.name} if lm.reader.runs_tokens else {}),
            }
            if lm.generation == "early"
            else {}
        ),
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
    unread = (private.NAME_OR_PATH, "transformers_version")
    return {key: value for key, value in config.to_dict().items() if key not in unread}


def _truncation(lm: Any) -> list[str]:
    """Where the tokenizer itself cuts a prompt; nothing where it is not asked to."""
    if not lm.truncation:
        return []
    return [str(getattr(lm.tokenizer, name, None)) for name in ("model_max_length", "truncation_side")]


# ------------------------------------------------------------------ the model


