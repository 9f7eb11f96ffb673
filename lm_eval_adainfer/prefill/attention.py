"""Attention of many rows that continue one prefix row, without a copy of its keys and values for each of them.

Softmax attention over two sets of keys is the mean of the two attentions, weighted by the sums of exponentials that
they were divided by. So all rows' queries attend to the prefix's keys as one long row, without a mask, and to their
own keys causally; the weights come from the log-sums that the kernel returns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
        self._near: Tensor | None = None  # a mask of the rows' own keys, where it is not just causal

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
            found = merged(query, key, value, prefix_key, prefix_value, scaling, self._near)
            return found.transpose(1, 2).contiguous(), None
        key, value = self._in_front(prefix_key, key), self._in_front(prefix_value, value)
        return usual(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **given)

    def _in_front(self, prefix: Tensor, own: Tensor) -> Tensor:
        """The prefix's in front of every row's, in the order of the mask."""
        return in_front(prefix, own)

    def _is_causal(self, mask: Tensor | None, shared: int, own: int) -> bool:
        """Whether the mask is no more than causal (no sliding window, no bias)."""
        if mask is None or mask.dtype != torch.bool or mask.shape[-2:] != (own, shared + own):
            return False
        if self._mask is not mask:
            causal = torch.ones(own, shared + own, dtype=torch.bool).tril(shared)
            self._mask, self._causal = mask, bool((mask == causal).all())
        return self._causal


class ApartBehind(Apart):
    """What windows read of one prefix row, and of the tokens of their own row that stand between it and them.

    In the order of the mask padding is in front of the prefix, as the rows' own tokens differ in number; what is handed
    out has it in front of these.

    Args:
        shared: Tokens of the prefix.
        between: Per row, how many tokens stand between the prefix and the window.
        new: Tokens of a window.
    """

    def __init__(self, shared: int, between: Sequence[int], new: int):
        super().__init__()
        self.between: tuple[Tensor, Tensor] | None = None  # their keys and values [n, heads, most, d], padding in front
        most = max(between)
        pads, query = most - torch.tensor(between)[:, None, None], torch.arange(new)[None, :, None]
        slot = torch.arange(shared + most + new)[None, None]
        self._expected = ((slot >= pads) & (slot <= shared + most + query))[:, None]
        near = (slot[..., : most + new] >= pads) & (slot[..., : most + new] <= most + query)
        self._near = torch.zeros(near.shape).masked_fill(~near, -torch.inf)[:, None]
        self._order = torch.where(slot < pads + shared, (slot - pads).clamp(min=0), slot)[:, 0]

    def hand_out(self, prefix: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The rows' own keys and values, those between the prefix and the window in front."""
        if self.between is not None:
            own = torch.cat([self.between[0], own[0]], dim=2), torch.cat([self.between[1], own[1]], dim=2)
        return super().hand_out(prefix, own)

    def _is_causal(self, mask: Tensor | None, shared: int, own: int) -> bool:
        if mask is None or mask.dtype != torch.bool:
            return False
        if self._mask is not mask:
            expected = self._expected
            self._mask = mask
            self._causal = mask.shape[-2:] == expected.shape[-2:] and bool((mask == expected.to(mask.device)).all())
        return self._causal

    def _in_front(self, prefix: Tensor, own: Tensor) -> Tensor:
        whole = in_front(prefix, own)
        index = self._order.to(whole.device)[:, None, :, None].expand(-1, whole.shape[1], -1, whole.shape[-1])
        return whole.gather(2, index)


def in_front(old: Tensor, new: Tensor) -> Tensor:
    """[n, heads, P + S, d] of keys (or values) [n or 1, heads, P, d] and those behind them, [n, heads, S, d]."""
    return torch.cat([old.to(new.device).expand(len(new), -1, -1, -1), new], dim=-2)


def merged(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    scale: float | None,
    mask: Tensor | None = None,
) -> Tensor:
    """Causal attention of rows to one prefix row and to themselves.

    Args:
        query: [n, H, S, d].
        key: [n, G, K, d], each of the G read by H / G neighbouring heads of the queries; ``value`` alike.
        value: As ``key``.
        prefix_key: [1, G, P, d]; ``prefix_value`` alike.
        prefix_value: As ``prefix_key``.
        scale: Of the products; None for 1 / sqrt(d).
        mask: [n, 1, S, K], what is added to the products with the rows' own keys; None where these are as many as the
            queries, and a query sees those up to its own.

    Returns:
        [n, H, S, d].
    """
    n, heads, length, d = query.shape
    groups = key.shape[1]
    per = heads // groups
    asking = query.reshape(n, groups, per, length, d).transpose(0, 1).reshape(1, groups, n * per * length, d)
    far, far_sum = _attention(asking, prefix_key, prefix_value, scale=scale)
    far = far.reshape(groups, n, per, length, d).transpose(0, 1).reshape(n, heads, length, d)
    far_sum = far_sum.reshape(groups, n, per, length).transpose(0, 1).reshape(n, heads, length)
    if per > 1:
        key, value = key.repeat_interleave(per, dim=1), value.repeat_interleave(per, dim=1)
    own: dict[str, Any] = {"is_causal": True} if mask is None else {"attn_mask": mask.to(query.dtype)}
    near, near_sum = _attention(query, key, value, **own, scale=scale)
    weight = torch.sigmoid(far_sum - near_sum)[..., None]  # in float32 at least
    return torch.lerp(near.to(weight.dtype), far.to(weight.dtype), weight).to(query.dtype)


def _attention(*given: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """The kernel, which takes numbers of a head for neighbours in memory and reads others where they are not."""
    return CPU_ATTENTION(*(x if x.stride(-1) == 1 else x.contiguous() for x in given), **options)
