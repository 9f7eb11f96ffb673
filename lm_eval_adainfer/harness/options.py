"""The arguments of the model type: read in one place, before anything is loaded.

They are declared by the signature of ``AdaInferLM``, which is what ``--model_args`` and people's scripts meet; whoever
needs the list of keys derives it from there (:func:`arguments.known`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.generation.policies import KV_POLICIES
from lm_eval_adainfer.readers import specs as readers
from lm_eval_adainfer.readers.base import Reader
from lm_eval_adainfer.strategies import specs
from lm_eval_adainfer.strategies.base import Stopper

SHORTLIST = 64  # candidates of head_check=shortlist
SCREEN = 4096  # first token ids of head_check=screen


@dataclass(frozen=True)
class Options:
    """What the arguments say; ``AdaInferLM`` explains each.

    Attributes:
        stopper: The strategy.
        log_features: Whether samples hold features.
        generation: ``early`` or ``dense``.
        kv_policy: A key of ``KV_POLICIES``.
        shortlist: Candidates per token of ``head_check=shortlist``; else 0.
        screen: First token ids of ``head_check=screen``; else 0.
        prefix_cache: Tokens of a prefix at most; 0 for none.
        pilot: Documents of a task that are also answered dense.
        reader: How blocks are read.
        token_stopper: The strategy for new tokens, where the reader reads prompts.
    """

    stopper: Stopper
    log_features: bool
    generation: str
    kv_policy: str
    shortlist: int
    screen: int
    prefix_cache: int
    pilot: int
    reader: Reader
    token_stopper: Stopper

    @classmethod
    def read(
        cls,
        stopper: Any,
        log_features: Any,
        generation: Any,
        kv_policy: Any,
        head_check: Any,
        prefix_cache: Any,
        pilot: Any,
        reader: Any = None,
        token_stopper: Any = None,
    ) -> Options:
        """The arguments as they come from a command line or a script.

        Raises:
            AdaInferError: On the first that makes no sense.
        """
        strategy, logs = specs.parse(stopper), _flag("log_features", log_features)
        if generation not in ("dense", "early"):
            raise AdaInferError(f"generation: {generation!r} is neither dense nor early")
        if kv_policy is not None and kv_policy not in KV_POLICIES:
            raise AdaInferError(f"kv_policy: {kv_policy!r} is neither {' nor '.join(KV_POLICIES)}")
        candidates, screen = _head_check(head_check)
        if not str(prefix_cache).isdecimal():
            raise AdaInferError(f"prefix_cache: {prefix_cache!r} is no number of tokens; give 0 or more")
        if not str(pilot).isdecimal():
            raise AdaInferError(f"pilot: {pilot!r} is no number of documents; give 0 or more")
        found = readers.resolve(reader, strategy.reader)
        policy = kv_policy or ("propagate" if found.runs_tokens else "recompute")
        if found.runs_tokens and KV_POLICIES[policy].exact:
            raise AdaInferError(
                f"kv_policy: {policy} promises the dense model's cache, which a prompt that leaves under "
                f"reader={found.name} does not have; leave it out, or give propagate"
            )
        tokens = _token_stopper(token_stopper, found)
        return cls(strategy, logs, generation, policy, candidates, screen, int(prefix_cache), int(pilot), found, tokens)


def check_stock(options: Mapping[str, Any]) -> None:
    """Refuse values of HFLM's own arguments that it would only trip over later, or that don't go with early exit.

    Raises:
        AdaInferError: On the first.
    """
    size = options.get("batch_size", 1)
    name, colon, sections = str(size).partition(":")
    number = sections if name == "auto" and colon else "1" if name == "auto" or size is None else str(size)
    if not (number.isdecimal() and int(number) > 0):
        raise AdaInferError(f"batch_size: {size!r} is neither a number of 1 or more nor auto nor auto:4")
    length = options.get("max_length")
    if length is not None and not (str(length).isdecimal() and int(length) > 0):
        raise AdaInferError(f"max_length: {length!r} is no number of 1 or more")
    for name in ("dtype", "softmax_dtype", "mixed_precision_dtype"):
        value = options.get(name)
        dtype = getattr(torch, value, None) if isinstance(value, str) else value
        if value in (None, "auto"):
            continue
        if not isinstance(dtype, torch.dtype):
            raise AdaInferError(f"{name}: {value!r} is no dtype of torch; give float32, bfloat16 or float16, say")
        if not dtype.is_floating_point or dtype.itemsize < 2:
            raise AdaInferError(f"{name}: no forward can be computed in {value}; give float32, bfloat16 or float16")
    if options.get("backend") == "seq2seq":
        raise AdaInferError("backend: seq2seq is not supported; adainfer needs a decoder-only model")
    if options.get("tp_plan") is not None:
        raise AdaInferError(
            f"tp_plan: {options['tp_plan']!r} is not supported; split the model with parallelize=True, or the "
            "documents among processes with accelerate launch"
        )


def _token_stopper(spec: Any, reader: Reader) -> Stopper:
    if spec is not None and not reader.runs_tokens:
        raise AdaInferError(
            f"token_stopper: it goes with reader=copy or sim, where stopper= decides about the prompt alone; with "
            f"reader={reader.kind} give stopper=, which decides about new tokens, too"
        )
    found = specs.parse(spec)
    if found.removes_blocks:
        raise AdaInferError(f"token_stopper: {found.kind} takes blocks out of the model; give it as stopper=")
    if found.reader is not None and found.reader.runs_tokens:
        raise AdaInferError(
            f"token_stopper: its file names the reader {found.reader.name}, which reads prompts; a new token is alone, "
            "so give a stopper that was fitted under head or tuned"
        )
    return found


def _head_check(head_check: Any) -> tuple[int, int]:
    """Candidates per token of ``shortlist``, first token ids of ``screen``; 0 where it is another one."""
    name, colon, number = str(head_check).strip().partition(":")
    if name == "exact" and not colon:
        return 0, 0
    if not colon or (number.isdecimal() and int(number) >= 2):
        if name == "shortlist":
            return int(number) if colon else SHORTLIST, 0
        if name == "screen":
            return 0, int(number) if colon else SCREEN
    raise AdaInferError(
        f"head_check: {head_check!r} is none of exact, shortlist, shortlist:N with N candidates, screen, and screen:N "
        "with the N first token ids, 2 or more"
    )


def _flag(argument: str, value: Any) -> bool:
    text = str(value).strip().lower()
    if text in ("true", "1", "yes"):
        return True
    if text in ("false", "0", "no", "none", ""):
        return False
    raise AdaInferError(f"{argument}: {value!r} is neither True nor False")
