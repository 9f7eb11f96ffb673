"""Products with the output head's weight: for few rows, and for a few tokens alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Linear = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]  # as ``nn.functional.linear``

_FEW_ROWS = 64  # rows of a product with the head that MKL is slow for
_PIECE = 512  # rows of the head's weight in one piece of such a product


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


def _is_slow_with_few_rows(head: Any, n: int) -> bool:
    """Whether :func:`few_rows_linear` pays: MKL's float32 product with a wide weight and few rows is what is slow."""
    return (
        type(head) is nn.Linear
        and "forward" not in head.__dict__  # accelerate's, which may have to load the weight first
        and n <= _FEW_ROWS
        and torch.backends.mkl.is_available()
        and head.weight.device.type == "cpu"
        and head.weight.dtype == torch.float32
        and head.weight.is_contiguous()
    )


def few_rows_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` for few rows and a wide weight, as one batched product of narrow pieces.

    For one row MKL reads the weight with one thread, and for 2 to 64 rows it packs all of it first, which takes longer
    than the product (benchmarks/LOG.md). Pieces are shared out to the threads, and a packed one stays in the cache.

    Args:
        x: [n, ..., h].
        weight: [V, h], contiguous.
        bias: [V].

    Returns:
        [n, ..., V].
    """
    rows = x.reshape(-1, x.shape[-1])
    n, (width, h) = len(rows), weight.shape
    count = width // _PIECE
    whole = count * _PIECE
    pieces = weight[:whole].view(count, _PIECE, h)
    found = rows.new_empty(n, width)
    into = found[:, :whole].view(n, count, _PIECE)
    if n <= 4:
        into.copy_(torch.bmm(pieces, rows.T.expand(count, h, n)).permute(2, 0, 1))
    else:
        into.copy_(torch.bmm(rows.expand(count, n, h), pieces.transpose(1, 2)).transpose(0, 1))
    found[:, whole:] = nn.functional.linear(rows, weight[whole:])
    if bias is not None:
        found += bias
    return found.view(*x.shape[:-1], width)
