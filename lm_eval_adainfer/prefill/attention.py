"""Attention of many rows that continue one prefix row, without a copy of its keys and values for each of them.

Softmax attention over two sets of keys is the mean of the two attentions, weighted by the sums of exponentials that
they were divided by. So all rows' queries attend to the prefix's keys as one long row, without a mask, and to their
own keys causally; the weights come from the log-sums that the kernel returns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lm_eval_adainfer.structure.private import CPU_ATTENTION, attention_functions_restored


class Apart:
    """What blocks read of one prefix row, kept apart from the rows' own keys and values.

    A block's attention asks its cache for keys and then calls an attention function with them. Here the cache hands
    out the rows' own keys alone, and the function, in place of transformers' ``sdpa``, knows the prefix's.
    """

    def __init__(self) -> None:
        self._pending: tuple[Tensor, ...] | None = None  # prefix keys and values, and the rows' own as handed out
        self._mask: Tensor | None = None  # the last one that was looked at
        self._causal = False  # whether it lets every query see the prefix, and its own row up to itself

    def hand_out(self, prefix: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The rows' own keys and values ([n, heads, S, d]); the prefix's ([1, heads, P, d]) are kept for attention."""
        self._pending = (*prefix, *own)
        return own

    @contextmanager
    def used(self) -> Iterator[None]:
        """While a block runs.

        Raises:
            RuntimeError: Where the block's attention is none that this knows; :func:`prefixes.usable` has ruled that
                out for a model.
        """
        usual = ALL_ATTENTION_FUNCTIONS["sdpa"]
        with attention_functions_restored():
            ALL_ATTENTION_FUNCTIONS["sdpa"] = partial(self._attend, usual)
            try:
                yield
                if self._pending is not None:
                    raise RuntimeError("a block's attention is not sdpa's")
            finally:
                self._pending = None

    def _attend(
        self,
        usual: Callable,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **given: Any,
    ) -> Any:
        """[n, S, heads, d], as transformers' ``sdpa`` returns it."""
        if self._pending is None:
            return usual(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **given)
        prefix_key, prefix_value, own_key, own_value = self._pending
        if key is not own_key or value is not own_value:
            raise RuntimeError("a block changes the keys that its cache hands out")
        self._pending = None
        plain = key.shape[-1] == value.shape[-1] == query.shape[-1] and not dropout
        plain = plain and given.get("position_bias") is None and given.get("softcap") is None
        if plain and self._is_causal(attention_mask, prefix_key.shape[2], query.shape[2]):
            return merged(query, key, value, prefix_key, prefix_value, scaling).transpose(1, 2).contiguous(), None
        key, value = in_front(prefix_key, key), in_front(prefix_value, value)
        return usual(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **given)

    def _is_causal(self, mask: Tensor | None, shared: int, own: int) -> bool:
        """Whether the mask is no more than causal (no sliding window, no bias)."""
        if mask is None or mask.dtype != torch.bool or mask.shape[-2:] != (own, shared + own):
            return False
        if self._mask is not mask:
            causal = torch.ones(own, shared + own, dtype=torch.bool).tril(shared)
            self._mask, self._causal = mask, bool((mask == causal).all())
        return self._causal


def in_front(old: Tensor, new: Tensor) -> Tensor:
    """[n, heads, P + S, d] of keys (or values) [n or 1, heads, P, d] and those behind them, [n, heads, S, d]."""
    return torch.cat([old.to(new.device).expand(len(new), -1, -1, -1), new], dim=-2)


def merged(
    query: Tensor, key: Tensor, value: Tensor, prefix_key: Tensor, prefix_value: Tensor, scale: float | None
) -> Tensor:
    """Causal attention of rows to one prefix row and to themselves.

    Args:
        query: [n, H, S, d].
        key: [n, G, S, d], each of the G read by H / G neighbouring heads of the queries; ``value`` alike.
        value: As ``key``.
        prefix_key: [1, G, P, d]; ``prefix_value`` alike.
        prefix_value: As ``prefix_key``.
        scale: Of the products; None for 1 / sqrt(d).

    Returns:
        [n, H, S, d].
    """
    n, heads, length, d = query.shape
    groups = key.shape[1]
    per = heads // groups
    asking = query.reshape(n, groups, per, length, d).transpose(0, 1).reshape(1, groups, n * per * length, d)
    far, far_sum = CPU_ATTENTION(asking, prefix_key, prefix_value, scale=scale)
    far = far.reshape(groups, n, per, length, d).transpose(0, 1).reshape(n, heads, length, d)
    far_sum = far_sum.reshape(groups, n, per, length).transpose(0, 1).reshape(n, heads, length)
    if per > 1:
        key, value = key.repeat_interleave(per, dim=1), value.repeat_interleave(per, dim=1)
    near, near_sum = CPU_ATTENTION(query, key, value, is_causal=True, scale=scale)
    weight = torch.sigmoid(far_sum - near_sum)[..., None]
    return torch.lerp(near.float(), far.float(), weight).to(query.dtype)
