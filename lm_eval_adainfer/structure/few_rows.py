"""Linear maps of few rows on a CPU in float32, for which MKL's own product is slow, as batched products of pieces.

For one row MKL reads a weight with one thread, and with about half of what that thread could read; for 2 to 64 rows it
packs all of the weight first, which takes longer than the product where the weight is wide (benchmarks/LOG.md). Pieces
of a weight are shared out to the threads, and a packed one stays in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lm_eval_adainfer.structure.hooks import replaced_forward

_WIDE_ROWS = 128  # rows of a product with the head that MKL is slow for
_WIDE_PIECE = 512  # rows of the head's weight in one piece of such a product
_ROWS = {False: 4, True: 128}  # rows of a product with a block's weight that MKL is slow for: one thread, or several
_PIECE = 64  # rows of such a weight in one piece
_NARROW = 6  # rows up to which the weight goes first
_WORTH = 2**16  # numbers in a weight; with fewer, calls are what takes the time


def plain(module: Any) -> bool:
    """Whether a module is a linear map that MKL computes in float32, and nobody has put something in its place."""
    return (
        type(module) is nn.Linear
        and "forward" not in module.__dict__  # accelerate's, which may have to load the weight first
        and torch.backends.mkl.is_available()
        and module.weight.device.type == "cpu"
        and module.weight.dtype == torch.float32
        and module.weight.is_contiguous()
    )


def wide_is_slow(head: Any, n: int) -> bool:
    """Whether :func:`few_rows_linear` pays for n rows of an output head."""
    # under autocast a linear map gives another dtype, and rounds what it adds its bias to
    return n <= _WIDE_ROWS and plain(head) and not torch.is_autocast_enabled("cpu")


def few_rows_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` for few rows and a wide weight, as one batched product of narrow pieces.

    Args:
        x: [n, ..., h].
        weight: [V, h], contiguous.
        bias: [V].

    Returns:
        [n, ..., V].
    """
    rows = x.reshape(-1, x.shape[-1])
    n, (width, h) = len(rows), weight.shape
    count = width // _WIDE_PIECE
    whole = count * _WIDE_PIECE
    pieces = weight[:whole].view(count, _WIDE_PIECE, h)
    found = rows.new_empty(n, width)
    into = found[:, :whole].view(n, count, _WIDE_PIECE)
    into.copy_(_batched(rows, pieces))
    found[:, whole:] = nn.functional.linear(rows, weight[whole:])
    if bias is not None:
        found += bias
    return found.view(*x.shape[:-1], width)


def _batched(rows: Tensor, pieces: Tensor) -> Tensor:
    """[n, count, width], rows [n, h] times pieces [count, width, h]."""
    (n, h), count = rows.shape, len(pieces)
    if n <= _NARROW:
        return torch.bmm(pieces, rows.T.expand(count, h, n)).permute(2, 0, 1)
    return torch.bmm(rows.expand(count, n, h), pieces.transpose(1, 2)).transpose(0, 1)


@contextmanager
def quick(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Let the plain linear maps among these modules, and in them, compute few rows in pieces, for a while.

    Other calls of theirs are as they were.
    """
    with ExitStack() as stack:
        found: dict[int, Any] = {id(m): m for module in modules for m in module.modules() if _pays(m)}
        for linear in found.values():
            stack.enter_context(replaced_forward(linear, _in_pieces(linear, _ROWS[torch.get_num_threads() > 1])))
        yield


def _pays(module: Any) -> bool:
    return plain(module) and module.weight.numel() >= _WORTH and module.out_features % _PIECE == 0


def _in_pieces(linear: nn.Linear, most: int) -> Callable[[Tensor], Tensor]:
    width, size = linear.weight.shape
    count = width // _PIECE
    pieces, bias = linear.weight.detach().view(count, _PIECE, size), linear.bias

    def forward(x: Tensor) -> Tensor:
        n = x.numel() // size
        if not 0 < n <= most or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return nn.functional.linear(x, linear.weight, bias)
        rows = x.reshape(n, size)
        # contiguous as a linear map's: there are kernels that don't look at strides
        found = _batched(rows, pieces).contiguous().view(n, width)
        return (found if bias is None else found + bias).view(*x.shape[:-1], width)

    return forward
