"""Which tokens of which rows a block runs: per row a stretch of slots, and mostly the newest token."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor


class Tokens:
    """Some tokens of some rows: per row the slots start..end - 1 and, mostly, the newest one.

    Args:
        rows: The rows, in order.
        starts: Per row, the first slot.
        ends: Per row, one behind the last slot of the stretch.
        newest: The newest slot.
        with_newest: Whether it belongs to them.
    """

    def __init__(self, rows: list[int], starts: list[int], ends: list[int], newest: int, with_newest: bool = True):
        self.rows, self.starts, self.ends, self.newest_slot = rows, starts, ends, newest
        self.with_newest = with_newest
        self.counts = [max(0, e - s) + with_newest for s, e in zip(starts, ends, strict=True)]
        self.n = sum(self.counts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokens) and (self.rows, self.starts, self.ends) == (
            other.rows,
            other.starts,
            other.ends,
        )

    __hash__ = None  # type: ignore[assignment]

    @property
    def reached(self) -> list[int]:
        """Per row, the sum of slot + 1 over its tokens: its query-key pairs, padding included."""
        return [
            (max(0, e - s) * (s + e + 1)) // 2 + (self.newest_slot + 1) * self.with_newest
            for s, e in zip(self.starts, self.ends, strict=True)
        ]

    @cached_property
    def row(self) -> Tensor:
        """[n], each token's row."""
        return torch.repeat_interleave(torch.tensor(self.rows), torch.tensor(self.counts))

    @cached_property
    def slot(self) -> Tensor:
        """[n], each token's slot."""
        tail = [self.newest_slot] if self.with_newest else []
        slots = [x for s, e in zip(self.starts, self.ends, strict=True) for x in (*range(s, e), *tail)]
        return torch.tensor(slots, dtype=torch.long)

    @cached_property
    def last(self) -> Tensor:
        """[rows], where each row's newest token is among them."""
        return torch.tensor(self.counts).cumsum(0) - 1

    @property
    def single(self) -> bool:
        """Whether there is one token a row."""
        return self.n == len(self.rows)

    def of(self, chosen: Sequence[bool]) -> Tokens:
        """Those of some rows."""
        pick = [i for i, c in enumerate(chosen) if c]
        rows, starts, ends = ([x[i] for i in pick] for x in (self.rows, self.starts, self.ends))
        return Tokens(rows, starts, ends, self.newest_slot, self.with_newest)

    def places(self, chosen: Sequence[bool]) -> Tensor:
        """Where the tokens of the chosen rows are among them (an index, so that no device has to be waited for)."""
        return torch.repeat_interleave(torch.tensor(list(chosen)), torch.tensor(self.counts)).nonzero()[:, 0]
