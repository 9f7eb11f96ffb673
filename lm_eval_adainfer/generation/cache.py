"""The KV cache by slot: a call of a block writes what its rows miss, and reads all keys and values of theirs.

Rows are left-padded, so that a row's token and its neighbours' are in the same *slot*. A block writes the slots that
it has run for a row and no others; what it may read is up to the model's own mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from lm_eval_adainfer.structure.storing import Stored


@dataclass
class Call:
    """What one call of a block writes.

    Attributes:
        n_rows: How many places are in use.
        end: One behind the last slot that it may read.
        store_only: Leave the block once its keys and values are stored.
    """

    n_rows: int
    end: int
    store_only: bool

    def write(self, whole: Tensor, new: Tensor) -> Tensor:
        """Write keys (or values) into [rows, heads, capacity, d]; what attention reads."""
        raise NotImplementedError


@dataclass
class PackedCall(Call):
    """New ones are [1, heads, n, d]: n tokens, each of a row and a slot."""

    row: Tensor
    slot: Tensor

    def write(self, whole: Tensor, new: Tensor) -> Tensor:
        """All rows' keys up to the newest slot."""
        whole[self.row.to(whole.device), :, self.slot.to(whole.device)] = new[0].transpose(0, 1)
        return whole[: self.n_rows, :, : self.end]


@dataclass
class PaddedCall(Call):
    """New ones are [rows, heads, width, d]: windows before ``end``, of which ``valid`` (None: all) is written."""

    rows: Tensor | None
    valid: Tensor | None

    def write(self, whole: Tensor, new: Tensor) -> Tensor:
        """The keys of the rows in flow up to the newest slot."""
        start, valid = self.end - new.shape[-2], self.valid
        part = whole[: self.n_rows] if self.rows is None else whole[self.rows.to(whole.device)]
        window = part[:, :, start : self.end]
        window.copy_(new if valid is None else torch.where(valid[:, None, :, None].to(new.device), new, window))
        if self.rows is not None:
            whole[self.rows.to(whole.device), :, start : self.end] = window
        return part[:, :, : self.end]


class SlotCache(DynamicCache):
    """Keys and values by slot, per block and row; a call writes what its rows miss.

    It tells the model that ``base`` tokens are cached, so that the model makes masks and rotary embeddings for every
    slot that some block still misses.

    Args:
        places: Rows at once, at most.
        capacity: Slots of each.
    """

    def __init__(self, places: int, capacity: int) -> None:
        super().__init__()
        self.base = 0
        self.places, self.capacity = places, capacity
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.call: Call | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many tokens the model may take for cached."""
        return self.base

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """The slot of the first query."""
        return self.base

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:  # type: ignore[override]
        """(keys, offset)."""
        return self.base + query_length, 0

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Write the slots that the rows in flow miss, and return all keys and values up to the newest slot."""
        call = self.call
        assert call is not None
        found = []
        for store, new in ((self.keys, key_states), (self.values, value_states)):
            found.append(call.write(self._made(store, layer_idx, new[0]), new))
        if call.store_only:
            raise Stored
        return tuple(found)

    def _made(self, store: dict[int, Tensor], layer: int, like: Tensor) -> Tensor:
        """[places, heads, capacity, d] of a layer, for keys or values like these ([heads, n, d])."""
        if layer not in store:
            store[layer] = like.new_zeros(self.places, like.shape[0], self.capacity, like.shape[-1])
        return store[layer]

    def put(self, layer: int, place: int, slots: slice | Tensor, pair: tuple[Tensor, ...]) -> None:
        """Write one row's keys and values ([heads, n, d]) into some slots of a layer."""
        for store, new in zip((self.keys, self.values), pair, strict=True):
            whole = self._made(store, layer, new)
            where = slots.to(whole.device) if isinstance(slots, Tensor) else slots
            whole[place, :, where] = new.to(whole.device)

    def all(self) -> list[tuple[Tensor, int]]:
        """Every layer's keys and values, and which of their dimensions are the slots."""
        return [(whole, 2) for store in (self.keys, self.values) for whole in store.values()]

    def move(self, place: int, to: int, length: int) -> None:
        """A row takes another place, with its slots up to a length."""
        for whole, _ in self.all():
            whole[to, :, :length] = whole[place, :, :length]
