"""Log-probabilities of continuations, from hidden states or logits at scored positions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lm_eval_adainfer.prefill.documents import Row
from lm_eval_adainfer.structure.anatomy import Anatomy
from lm_eval_adainfer.structure.state import BlockState

CHUNK_ELEMENTS = 2**25  # logits held at once when scoring many positions (128 MiB in float32)


def positions_at_once(anatomy: Anatomy) -> int:
    """How many positions' logits are held at once."""
    return max(1, CHUNK_ELEMENTS // anatomy.vocab_size)


def score_positions(
    anatomy: Anatomy,
    states: Sequence[BlockState],
    points: Sequence[tuple[int, int, int, Row, int]],
    softmax_dtype: torch.dtype | None,
) -> None:
    """Score positions after a block: the head's logits of all of them, so many at a time as memory allows.

    Args:
        anatomy: The model.
        states: Of the batches.
        points: (batch, row in flow, position, row, index among its scored positions), batch by batch.
        softmax_dtype: As :func:`score_points`'.
    """
    size = positions_at_once(anatomy)
    for start in range(0, len(points), size):
        chunk = points[start : start + size]
        hidden = BlockState.at(states, [p[:3] for p in chunk]).hidden[:, 0]
        score_points(anatomy.logits(hidden), [p[3:] for p in chunk], softmax_dtype)


def score_points(logits: Tensor, points: Sequence[tuple[Row, int]], softmax_dtype: torch.dtype | None) -> None:
    """Add the log-probabilities at some scored positions to their rows' answers.

    Args:
        logits: [n, V].
        points: n of (row, index among the row's scored positions).
        softmax_dtype: Of the log-softmax; None keeps the logits' dtype (as HFLM).
    """
    if not points:
        return
    logprobs = F.log_softmax(logits, dim=-1, dtype=softmax_dtype)
    pairs = [(n, a, a.continuation[j]) for n, (row, j) in enumerate(points) for a in row.answers]
    index = torch.tensor([[n, token] for n, _, token in pairs], device=logits.device)
    values = logprobs[index[:, 0], index[:, 1]].tolist()
    top = logits.argmax(dim=-1).tolist()
    for (n, answer, token), value in zip(pairs, values, strict=True):
        answer.logprob += value
        answer.is_greedy = answer.is_greedy and top[n] == token
        if points[n][1] == 0:
            answer.top, answer.top1 = top[n], top[n] == token
