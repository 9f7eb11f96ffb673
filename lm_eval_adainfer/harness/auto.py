"""``stopper=auto``: the stopper that was tuned for this model, these tasks and these shots, among files in a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval_adainfer.harness.asking import Asking
from lm_eval_adainfer.harness.identity import tokenizer_hash
from lm_eval_adainfer.readers.base import Reader


def described(
    lm: Any, asked: Asking, shots: Mapping[str, int], reader: Reader, blocks: Sequence[int]
) -> dict[str, Any]:
    """What a tuned stopper's file says about what it was tuned for, JSON-serialisable.

    Args:
        lm: The ``AdaInferLM``.
        asked: How documents are asked.
        shots: Task to number of shots.
        reader: Under which it is asked.
        blocks: After which it is asked.
    """
    return {**model(lm), **how(lm, asked), "shots": dict(shots), "reader": reader.name, "check_layers": list(blocks)}


def model(lm: Any) -> dict[str, Any]:
    """What has to be the same of the model."""
    return {
        "n_blocks": lm.anatomy.n_blocks,
        "head_hash": lm.anatomy.head_hash(),
        "weights_hash": lm.anatomy.weights_hash(),
        "tokenizer_hash": tokenizer_hash(lm.tokenizer),
    }


def how(lm: Any, asked: Asking) -> dict[str, Any]:
    """What has to be the same of how documents are asked, besides their shots."""
    found = asked.identity(lm, "multiple_choice")
    return {key: found[key] for key in ("chat_template", "system_instruction", "fewshot_as_multiturn")}
