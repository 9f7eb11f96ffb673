"""Products with the output head's weight for a few tokens alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Linear = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]  # as ``nn.functional.linear``


def _candidate_logits(head: Any, hidden: Tensor, candidates: Tensor) -> Tensor:
    """[n, 1, C] of hidden states [n, 1, h], each row with its own candidates."""
    n, width = candidates.shape
    rows = head.weight.index_select(0, candidates.flatten()).view(n, width, -1)
    logits = torch.bmm(hidden, rows.transpose(1, 2))
    bias = getattr(head, "bias", None)
    return logits if bias is None else logits + bias[candidates][:, None]


def _some_logits(head: Any, hidden: Tensor, candidates: Tensor | None, first: int, linear: Linear) -> Tensor:
    """[n, 1, first + C]: of the first token ids, whose rows lie side by side, and of each row's own candidates."""
    found = []
    if first:
        bias = getattr(head, "bias", None)
        found.append(linear(hidden, head.weight[:first], None if bias is None else bias[:first]))
    if candidates is not None and candidates.shape[1]:
        found.append(_candidate_logits(head, hidden, candidates))
    return found[0] if len(found) == 1 else torch.cat(found, dim=-1)
