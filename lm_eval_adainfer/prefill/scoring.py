"""Log-probabilities of continuations, from logits at scored positions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lm_eval_adainfer.prefill.documents import Row

CHUNK_ELEMENTS = 2**25  # logits held at once when scoring many positions (128 MiB in float32)


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
            answer.top1 = top[n] == token
