"""Tokens that rows have in common (few-shot examples, a system prompt, the context of several choices): run once.

A *prefix* is a few token rows that other rows continue, possibly itself a continuation of another prefix. It is run
block by block, no deeper than the rows that continue it, and these read its keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from lm_eval_adainfer.prefill.attention import Apart, in_front
from lm_eval_adainfer.prefill.forward import Forward
from lm_eval_adainfer.structure.anatomy import Anatomy
from lm_eval_adainfer.structure.arguments import BatchRule


class _ContinuedCache(DynamicCache):
    """Keys and values of rows behind those of the prefix rows that they continue.

    Args:
        source: The prefix; None for rows that continue nothing.
        owner: [rows], the prefix row that each continues; None where it has one row.
        store: Where to put what attention reads, by layer; None to forget it.
    """

    def __init__(
        self,
        source: Prefix | None,
        owner: Tensor | None = None,
        store: dict[int, tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        super().__init__()
        self.source, self.owner, self.store = source, owner, store
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
        if self.source is not None:
            stored = self.source.stored[layer_idx]
            if self.apart is not None:
                return self.apart.hand_out(stored, found)
            found = tuple(map(self._behind, stored, found))  # type: ignore[assignment]
        if self.store is not None:
            self.store[layer_idx] = found
        return found

    def _behind(self, old: Tensor, new: Tensor) -> Tensor:
        if old.shape[0] > 1:
            assert self.owner is not None
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
    """

    def __init__(
        self,
        anatomy: Anatomy,
        rows: Sequence[Sequence[int]],
        rule: BatchRule,
        parent: Prefix | None = None,
        stays: bool = True,
    ):
        self.anatomy, self.rows, self.rule, self.parent, self.stays = anatomy, rows, rule, parent, stays
        self.shared: int = 0 if parent is None else parent.lengths[0]  # tokens that the parent has of every row
        self.longest = max(map(len, rows))
        self.width = self.shared + self.longest
        self.lengths: list[int] = [self.shared + len(row) for row in rows]  # of whole rows, in tokens
        self.depth = 0
        self.executed = 0  # block executions x tokens
        self.stored: dict[int, tuple[Tensor, Tensor]] = {}
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
                self._forward = self._begun()
            if not self.stays:
                self.stored.clear()
            self.depth += 1
            self._forward.advance()
            self.executed += sum(len(self.rows[r]) for r in self._kept)
            if self.depth == self.anatomy.n_blocks:
                self._forward = None

    def keep(self, rows: list[int]) -> None:
        """Forget all but some (by their place among those left) of the rows; only where nothing stays."""
        index = torch.tensor(rows, dtype=torch.long)
        self._kept = [self._kept[r] for r in rows]
        for layer, pair in self.stored.items():
            self.stored[layer] = (pair[0][index.to(pair[0].device)], pair[1][index.to(pair[1].device)])
        if self._forward is not None:
            self._forward.keep(index)
        if self._cache.slots is not None:
            self._cache.slots = self._cache.slots[index]

    def _begun(self) -> Forward:
        """These rows before the first block."""
        anatomy, ids = self.anatomy, torch.zeros(len(self.rows), self.longest, dtype=torch.long)
        for r, row in enumerate(self.rows):
            ids[r, self.longest - len(row) :] = torch.tensor(row, dtype=torch.long)
        self._cache = _ContinuedCache(self.parent, store=self.stored)
        given: dict[str, Any] = {"past_key_values": self._cache, "use_cache": True}
        if self.ragged:
            given["attention_mask"] = self.mask(self.width).to(anatomy.input_device)
        pads = torch.tensor([self.width - n for n in self.lengths])[:, None]
        positions = torch.arange(self.shared, self.width)[None] - pads
        if self.shared and self.ragged:
            # slots are padding, parent, own tokens; what is there are the parent and the padded tokens
            slot = torch.arange(self.width)[None] - pads
            own = torch.arange(self.width)[None].expand_as(slot)
            self._cache.slots = torch.where(slot < self.shared, slot.clamp(min=0), own)
        if anatomy.takes_position_ids:
            given["position_ids"] = positions.clamp(min=0).to(anatomy.input_device)
        return Forward(anatomy, ids.to(anatomy.input_device), rule=self.rule, given=given, masks=self.shared > 0)


class Continued:
    """Rows of one forward that continue a prefix: what :func:`forward.run_blocks` needs of it.

    Args:
        prefix: The prefix.
        owner: Per row, the prefix row that it continues.
    """

    def __init__(self, prefix: Prefix, owner: Sequence[int]):
        self.prefix, self.rule = prefix, prefix.rule
        self.cache = _ContinuedCache(prefix, torch.tensor(owner, dtype=torch.long))
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
        prefix, given = self.prefix, {"use_cache": True, "past_key_values": self.cache}
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


