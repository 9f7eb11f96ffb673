"""Tokens that rows have in common (few-shot examples, a system prompt, the context of several choices): run once.

A *prefix* is a few token rows that other rows continue, possibly itself a continuation of another prefix. It is run
block by block, no deeper than the rows that continue it, and these read its keys and values.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache

from lm_eval_adainfer.prefill.attention import Apart, in_front
from lm_eval_adainfer.prefill.forward import Forward
from lm_eval_adainfer.structure.anatomy import Anatomy
from lm_eval_adainfer.structure.arguments import BatchRule
from lm_eval_adainfer.structure.storing import Stored, Storing

Pair = tuple[Tensor, Tensor]  # keys and values, [rows, heads, slots, d]
_KEPT = 4  # blocks after which a prefix's copies stay for later batches


class Source(Protocol):
    """Keys and values that rows continue, padding in front."""

    @property
    def width(self) -> int:
        """Slots."""

    @property
    def stored(self) -> Mapping[int, Pair]:
        """By layer, those that are at hand."""


class ContinuedCache(DynamicCache):
    """Keys and values of rows behind those of the prefix rows that they continue.

    Args:
        source: What they continue; None for rows that continue nothing.
        owner: [rows], the row of the source that each continues; None where it has one row, or one for each.
        store: Where to put what attention reads, by layer; None to forget it.
        leaves: Leave a block once its keys and values are in ``store``.
        alone: Store the rows' own alone.
    """

    def __init__(
        self,
        source: Source | None,
        owner: Tensor | None = None,
        store: dict[int, Pair] | None = None,
        leaves: bool = False,
        alone: bool = False,
    ) -> None:
        super().__init__()
        self.source, self.owner, self.store = source, owner, store
        self.leaves, self.alone = leaves, alone
        self.own: dict[int, Pair] | None = None  # where to put the rows' own, by layer
        self.slots: Tensor | None = None  # [rows, slots], an order that puts the padding in front; None: as it is
        self.apart: Apart | None = None  # set where the prefix's need not be put in front of every row's

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many tokens the model may take for cached."""
        return 0 if self.source is None else self.source.width

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """The slot of the first query."""
        return self.get_seq_length()

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:  # type: ignore[override]
        """(keys, offset)."""
        return self.get_seq_length() + query_length, 0

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """The prefix's in front of the new ones."""
        found = (key_states, value_states)
        if self.own is not None:
            self.own[layer_idx] = found
        if self.source is not None and not self.alone:
            stored = self.source.stored[layer_idx]
            if self.apart is not None:
                return self.apart.hand_out(stored, found)
            found = tuple(map(self._behind, stored, found))  # type: ignore[assignment]
        if self.store is not None:
            self.store[layer_idx] = found
        if self.leaves:
            raise Stored
        return found

    def _behind(self, old: Tensor, new: Tensor) -> Tensor:
        if self.owner is not None and old.shape[0] > 1:
            old = old.index_select(0, self.owner.to(old.device))
        whole = in_front(old, new)
        if self.slots is None:
            return whole
        index = self.slots.to(whole.device)[:, None, :, None].expand(-1, whole.shape[1], -1, whole.shape[-1])
        return whole.gather(2, index)


class Prefix:
    """Token rows that others continue, run no deeper than these need.

    Args:
        anatomy: The model.
        rows: P lists of token ids; where ``parent`` is given, what follows it.
        rule: How the blocks' arguments follow the batch where a cache is used (``slots.Windows.rows``).
        parent: A prefix of one row that all of these continue.
        stays: Keep every block's keys and values, for later batches; else the current block's alone.
        asked: Blocks after which hidden states are kept for readers that let tokens go on from there (``reading``).

    Attributes:
        after: Block -> [rows, longest, h], the hidden states kept.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        rows: Sequence[Sequence[int]],
        rule: BatchRule,
        parent: Prefix | None = None,
        stays: bool = True,
        asked: Collection[int] = (),
    ):
        self.anatomy, self.rows, self.rule, self.parent, self.stays = anatomy, rows, rule, parent, stays
        self.shared: int = 0 if parent is None else parent.lengths[0]  # tokens that the parent has of every row
        self.longest = max(map(len, rows))
        self.width = self.shared + self.longest
        self.lengths: list[int] = [self.shared + len(row) for row in rows]  # of whole rows, in tokens
        self.depth = 0
        self.executed = 0  # block executions x tokens
        self.stored: dict[int, Pair] = {}
        self.asked = frozenset(asked)
        self.after: dict[int, Tensor] = {}
        self.copied = 0  # block executions for keys and values alone x tokens
        self.idle = 0  # tokens of rows that only documents which have left continue, where these run on (``dense_too``)
        self.idle_copies = 0  # as ``copied``, of those
        self._wanted = 0  # how deep a prefix that stays has been wanted
        self._copies: dict[int, Copies] = {}
        self._forward: Forward | None = None
        self._kept = list(range(len(rows)))  # of those that stay no longer than the batch: the rows still needed

    @property
    def ragged(self) -> bool:
        """Whether rows differ in length, so that shorter ones have padding in front."""
        return min(self.lengths) < self.width

    def mask(self, width: int) -> Tensor:
        """[P, width], 0 at the padding in front of the rows still needed, 1 elsewhere."""
        pads = torch.tensor([self.width - self.lengths[r] for r in self._kept])
        return (torch.arange(width)[None] >= pads[:, None]).long()

    def require(self, k: int) -> None:
        """Run the blocks up to k that were not run yet."""
        while self.depth < k:
            if self.parent is not None:
                self.parent.require(self.depth + 1)
            if self._forward is None:
                self._cache = ContinuedCache(self.parent, store=self.stored)
                self._forward = self.begun(self._cache)
            if not self.stays:
                self.stored.clear()
                self._forget()
            self.depth += 1
            self._forward.advance()
            if self.depth in self.asked:
                self.after[self.depth] = self._forward.hidden.clone()
            self.executed += self.tokens
            if self.depth == self.anatomy.n_blocks:
                self._forward = None

    def wanted(self, k: int, rows: Collection[int]) -> int:
        """Count block k for what continues some of its rows; it may run more than is wanted (``dense_too``).

        Returns:
            The tokens that it has to run for them, the parent's too, without those that were wanted before.
        """
        found = 0 if self.parent is None else self.parent.wanted(k, (0,))
        if not self.stays:
            own = sum(len(self.rows[r]) for r in rows)
            self.idle = self.tokens - own
            return found + own
        found += self.tokens if k > self._wanted else 0
        self._wanted = max(self._wanted, k)
        return found

    def copies(self, k: int, storing: Storing) -> Copies:
        """What later blocks would store of these tokens if they went no further than block k, one of ``asked``."""
        if k not in self._copies:
            if len(self.asked) > _KEPT:  # all of them would be many times the memory of the prefix itself
                self._copies.clear()
            self._copies[k] = Copies(self, k, storing)
        return self._copies[k]

    def length(self, place: int) -> int:
        """Tokens of a whole row, by its place among those still needed."""
        return self.lengths[self._kept[place]]

    @property
    def tokens(self) -> int:
        """Tokens of the rows still needed, without the parent's."""
        return sum(len(self.rows[r]) for r in self._kept)

    def _forget(self) -> None:
        self.after.clear()
        self._copies.clear()

    def keep(self, rows: list[int]) -> None:
        """Forget all but some (by their place among those left) of the rows; only where nothing stays."""
        self._forget()
        index = torch.tensor(rows, dtype=torch.long)
        self._kept = [self._kept[r] for r in rows]
        for layer, pair in self.stored.items():
            self.stored[layer] = (pair[0][index.to(pair[0].device)], pair[1][index.to(pair[1].device)])
        if self._forward is not None:
            self._forward.keep(index)
        if self._cache.slots is not None:
            self._cache.slots = self._cache.slots[index]

    def begun(self, cache: ContinuedCache) -> Forward:
        """The rows still needed, before the first block, with a cache that continues the parent."""
        rows, lengths = [self.rows[r] for r in self._kept], [self.lengths[r] for r in self._kept]
        anatomy, ids = self.anatomy, torch.zeros(len(rows), self.longest, dtype=torch.long)
        for r, row in enumerate(rows):
            ids[r, self.longest - len(row) :] = torch.tensor(row, dtype=torch.long)
        given = anatomy.with_cache(cache)
        if self.ragged:
            given["attention_mask"] = self.mask(self.width).to(anatomy.input_device)
        pads = torch.tensor([self.width - n for n in lengths])[:, None]
        positions = torch.arange(self.shared, self.width)[None] - pads
        if self.shared and self.ragged:
            # slots are padding, parent, own tokens; what is there are the parent and the padded tokens
            slot = torch.arange(self.width)[None] - pads
            own = torch.arange(self.width)[None].expand_as(slot)
            cache.slots = torch.where(slot < self.shared, slot.clamp(min=0), own)
        if anatomy.takes_position_ids:
            given["position_ids"] = positions.clamp(min=0).to(anatomy.input_device)
        return Forward(anatomy, ids.to(anatomy.input_device), rule=self.rule, given=given, masks=self.shared > 0)


class Copies:
    """What blocks behind one block store of a prefix's tokens that go no further than it (CALM's state copy).

    Args:
        prefix: The prefix.
        block: k.
        storing: What blocks have to compute for that.

    Attributes:
        width: Slots; padding is in front.
        stored: By layer, the keys and values made so far; where the prefix does not stay, those made last.
    """

    def __init__(self, prefix: Prefix, block: int, storing: Storing):
        # the prefix keeps its copies: if they kept it, too, nothing would go before the garbage collector comes by
        self._prefix: Prefix = weakref.proxy(prefix)
        self._hidden, self._storing = prefix.after[block], storing
        self._parent = None if prefix.parent is None else prefix.parent.copies(block, storing)
        self.width = prefix.width
        self.stored: dict[int, Pair] = {}
        self._made: dict[int, Pair] = {}  # by block
        self._forward = prefix.begun(ContinuedCache(self._parent, store=self.stored, leaves=True))

    def of(self, k: int) -> Pair:
        """Block k's, the parent's in front; they are made now, unless they are there."""
        if k not in self._made:
            if self._parent is not None:
                self._parent.of(k)
            if not self._prefix.stays:
                self.stored.clear()
                self._made.clear()
            before = set(self.stored)
            self._forward.store(k, self._hidden, self._storing)
            (layer,) = set(self.stored) - before
            self._made[k] = self.stored[layer]
            self._prefix.copied += self._prefix.tokens - self._prefix.idle
            self._prefix.idle_copies += self._prefix.idle
        return self._made[k]


class Continued:
    """Rows of one forward that continue a prefix: what :func:`forward.run_blocks` needs of it.

    Args:
        prefix: The prefix.
        owner: Per row, the prefix row that it continues.
    """

    def __init__(self, prefix: Prefix, owner: Sequence[int]):
        self.prefix, self.rule = prefix, prefix.rule
        self.cache = ContinuedCache(prefix, torch.tensor(owner, dtype=torch.long))
        if prefix.rule.apart and len(prefix.rows) == 1:
            self.cache.apart = Apart()

    def require(self, k: int) -> None:
        """Run the prefix up to block k."""
        self.prefix.require(k)

    def reading(self) -> AbstractContextManager[None]:
        """While a block runs: it reads the prefix's keys and values."""
        return nullcontext() if self.cache.apart is None else self.cache.apart.used()

    def arguments(self, ids: Tensor) -> dict[str, Any]:
        """What the model is given besides the rows' own tokens [n, S]."""
        prefix, given = self.prefix, self.prefix.anatomy.with_cache(self.cache)
        owner, width = self.cache.owner, ids.shape[1]
        if prefix.ragged:
            given["attention_mask"] = prefix.mask(prefix.width + width)[owner].to(ids.device)
        if prefix.anatomy.takes_position_ids:
            starts = torch.tensor(prefix.lengths)[owner]
            given["position_ids"] = (starts[:, None] + torch.arange(width)).to(ids.device)
        return given

    def keep(self, rows: Tensor) -> None:
        """Some of the rows (by their place among those in flow) go on; what no row needs any more goes too."""
        assert self.cache.owner is not None
        self.cache.owner = self.cache.owner[rows.cpu()]
        if self.prefix.stays:
            return
        used, self.cache.owner = self.cache.owner.unique(return_inverse=True)
        if len(used) < len(self.prefix._kept):
            self.prefix.keep(used.tolist())


def begun(
    anatomy: Anatomy, ids: Tensor, parts: Sequence[str], prefix: Prefix | None, own: dict[int, Pair]
) -> tuple[Forward, Continued | None]:
    """Rows before the first block that continue the one row of a prefix, or nothing, and say what they store.

    Args:
        anatomy: The model.
        ids: [n, S], what follows the prefix, right-padded.
        parts: Which parts' outputs to keep.
        prefix: The prefix.
        own: Where blocks put the rows' own keys and values, by layer.

    Returns:
        The rows' forward, and how they continue the prefix.
    """
    if prefix is None:
        return Forward(anatomy, ids, parts, given=anatomy.with_cache(ContinuedCache(None, store=own))), None
    continued = Continued(prefix, [0] * len(ids))
    continued.cache.own = own
    return Forward(anatomy, ids, parts, prefix=continued), continued
