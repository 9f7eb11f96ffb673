"""How the tokens that a block has to run are laid out: packed without padding, or padded rows.

Rows miss different numbers of tokens. *Packed*, all tokens are one sequence [1, n, h], so that linear maps see no
padding; only attention is computed row by row, by wrapping transformers' attention interface. *Padded*, rows are
windows [rows, width, h] that end at the newest token, which any family's attention understands, alibi and all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import AttentionInterface

from lm_eval_adainfer.generation.cache import Call, PackedCall, PaddedCall
from lm_eval_adainfer.generation.tokens import Tokens
from lm_eval_adainfer.structure.windows import Windows

_CALL_BYTES = 2**18  # of keys and values, whose copying takes about as long as another call of attention

Kept = Callable[[Tokens, torch.device], Tensor]


class _Layout:
    """What both layouts share.

    Args:
        windows: How the blocks' arguments follow a step.
        n_rows: The decoder's rows.
        length: Slots up to and with the newest.
    """

    def __init__(self, windows: Windows, n_rows: int, length: int):
        self.windows, self.n_rows, self.length = windows, n_rows, length
        self.base = 0
        self.paused = False  # while blocks are called for what is no part of the step
        self.shaped: Tensor = torch.empty(0)  # the current block's input, for the shape of its parts
        # for what is run, and for what is only stored: the tokens, and what was cut for them
        self._cuts: list[tuple[Tokens, dict[tuple[Any, ...], tuple[Tensor, Any]]]] = []

    def covers(self, base: int) -> None:
        """A forward over the slots from ``base`` on begins."""
        self.base = base
        self._cuts = []

    @contextmanager
    def active(self) -> Iterator[None]:
        """Whatever has to be in place during a forward."""
        yield

    def cutter(self, k: int, tokens: Tokens, original: Tensor, hidden: Tensor) -> Callable[[str, Tensor], Tensor]:
        """Cuts an argument of block k to what these tokens need; the hidden states are given."""
        cuts = next((found for some, found in self._cuts if some is tokens), None)
        if cuts is None:
            cuts = {}
            self._cuts = [*self._cuts[-1:], (tokens, cuts)]

        def cut(path: str, value: Tensor) -> Tensor:
            if value is original:
                return hidden
            dims, factor = self.windows.queries.get((k, path), ()), self.windows.rows.factors.get((k, path), -1)
            key = (id(value), dims, factor)
            if key not in cuts:  # blocks share most arguments: cut each once, until the tokens change
                # the whole is kept too, so that its id stays its own
                cuts[key] = (value, self._cut(k, path, value, dims, factor, tokens))
            return cuts[key][1]

        return cut

    def _cut(self, k: int, path: str, value: Tensor, dims: tuple[int, ...], factor: int, tokens: Tokens) -> Tensor:
        raise NotImplementedError


class Packed(_Layout):
    """[1, n, h], row after row; attention alone is computed row by row."""

    def __init__(self, windows: Windows, n_rows: int, length: int):
        super().__init__(windows, n_rows, length)
        self._tokens: Tokens | None = None
        self._groups: list[tuple[slice | Tensor, Tensor, Tensor | None]] = []
        self._masks: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def covers(self, base: int) -> None:
        """A forward over the slots from ``base`` on begins."""
        super().covers(base)
        self._tokens, self._groups = None, []  # their places in the window, which is another one now
        self._masks.clear()

    def fits(self, tokens: Tokens) -> bool:
        """Whether the forward's arguments are right as they are."""
        return self.n_rows == 1 and tokens.n == self.length - self.base

    def call(self, tokens: Tokens, store_only: bool = False) -> Call:
        """What the cache has to write."""
        if tokens is not self._tokens and not store_only:  # a block that only stores is left before its attention
            self._tokens = tokens
            self._groups, self._masks = [], {}
        return PackedCall(self.n_rows, self.length - store_only, store_only, tokens.row, tokens.slot)

    def laid_out(self, tokens: Tokens, states: Tensor) -> Tensor:
        """States [n, h] in this layout."""
        return self._shaped(states)

    def assemble(self, hidden: Tensor, flowing: Tokens | None, tokens: Tokens, kept: Kept) -> Tensor:
        """What a block gets: from what flows (of the embeddings for the first block), and from what was kept."""
        device = hidden.device
        if flowing is None:  # the first block
            flat = hidden.flatten(0, 1)
            index = tokens.row * hidden.shape[1] + tokens.slot - self.base
            return self._shaped(flat[index.to(device)])
        # both are sorted by row and slot, so what flows is found by searching
        stride = self.length
        here, want = flowing.row * stride + flowing.slot, tokens.row * stride + tokens.slot
        place = torch.searchsorted(here, want).clamp(max=len(here) - 1)
        found = here[place] == want
        new = hidden[0, place.to(device)]
        if not bool(found.all()):
            new = torch.where(found[:, None].to(device), new, kept(tokens, device))
        return self._shaped(new)

    def _shaped(self, states: Tensor) -> Tensor:
        self.shaped = states[None]
        return self.shaped

    def newest(self, hidden: Tensor, tokens: Tokens) -> Tensor:
        """[rows, h] at the newest tokens."""
        return hidden[0] if tokens.single else hidden[0, tokens.last.to(hidden.device)]

    def states(self, hidden: Tensor, tokens: Tokens, some: Tokens) -> Tensor:
        """[n, h] of some of the rows' tokens."""
        rows = set(some.rows)
        return hidden[0, tokens.places([r in rows for r in tokens.rows]).to(hidden.device)]

    def select(self, hidden: Tensor, tokens: Tokens, stay: Sequence[bool]) -> Tensor:
        """The hidden states of the rows that stay."""
        return self._shaped(hidden[0, tokens.places(stay).to(hidden.device)])

    def _cut(self, k: int, path: str, value: Tensor, dims: tuple[int, ...], factor: int, tokens: Tokens) -> Tensor:
        if dims == (1,):  # [rows or 1, window, ...]: one entry a token
            row = tokens.row if factor == 1 else torch.zeros_like(tokens.row)
            return value[row.to(value.device), (tokens.slot - self.base).to(value.device)][None]
        return value  # masks are cut when attention is computed

    @contextmanager
    def active(self) -> Iterator[None]:
        """Compute attention row by row."""
        before = AttentionInterface.get_interface

        def get_interface(interface: Any, implementation: str, default: Callable) -> Callable:
            real = before(interface, implementation, default)
            if self.paused:
                return real
            return lambda module, q, k, v, mask, **kwargs: self._attend(real, module, q, k, v, mask, kwargs)

        AttentionInterface.get_interface = get_interface  # type: ignore
        try:
            yield
        finally:
            AttentionInterface.get_interface = before  # type: ignore[method-assign]

    def _attend(
        self, real: Callable, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, more: dict
    ) -> tuple[Tensor, None]:
        """Packed queries [1, heads, n, d] against the rows' keys [rows, heads, slots, d]."""
        assert self._tokens is not None
        if not self._groups:
            self._groups = self._grouped(self._tokens, query.device, 2 * key[:1].nbytes)
        flat = query[0].transpose(0, 1)
        parts = []
        for number, (rows, index, keep) in enumerate(self._groups):
            q = flat[index].transpose(1, 2)
            out, _ = real(module, q, key[rows], value[rows], self._mask(mask, number), **more)
            parts.append(out.flatten(0, 1) if keep is None else out[keep])
        out = parts[0]
        if len(parts) > 1:
            out = torch.cat(parts)[self._order.to(out.device)]
        return out[None], None

    def _grouped(
        self, tokens: Tokens, device: torch.device, row_bytes: int
    ) -> list[tuple[slice | Tensor, Tensor, Tensor | None]]:
        """(rows, [rows, width] token indices, which of these are no padding or None for all).

        Rows with one token are a group, and those with more another, right-aligned; neighbours among them are groups of
        their own where a call for each takes less time than to pick their keys and values out of the others'.
        """
        begins = [0]
        for count in tokens.counts:
            begins.append(begins[-1] + count)
        groups: list[tuple[slice | Tensor, Tensor, Tensor | None]] = []
        order, self._group_tokens = list[int](), []
        found = []
        for wide in (False, True):
            some = [i for i, count in enumerate(tokens.counts) if (count > 1) == wide]
            if some:
                runs = _neighbours(some, tokens.rows)
                found += runs if (len(runs) - 1) * _CALL_BYTES <= len(some) * row_bytes else [some]
        for some in found:
            width = max(tokens.counts[i] for i in some)
            index = torch.tensor([[max(begins[i], begins[i + 1] - width + j) for j in range(width)] for i in some])
            keep = None
            if any(tokens.counts[i] != width for i in some):
                lengths = torch.tensor([tokens.counts[i] for i in some])
                keep = (torch.arange(width)[None] >= width - lengths[:, None]).to(device)
            rows = torch.tensor([tokens.rows[i] for i in some])
            first, last = tokens.rows[some[0]], tokens.rows[some[-1]]
            adjoining = last - first == len(some) - 1
            groups.append((slice(first, last + 1) if adjoining else rows.to(device), index.to(device), keep))
            self._group_tokens.append((rows, tokens.slot[index] - self.base))
            order += [x for i in some for x in range(begins[i], begins[i + 1])]
        self._order = torch.tensor(order).argsort()
        return groups

    def _mask(self, mask: Tensor | None, number: int) -> Tensor | None:
        """[rows, heads or 1, width, slots] of a group's tokens, from the window's."""
        if mask is None:
            return None
        key = (id(mask), number)
        if key not in self._masks:
            rows, slots = (x.to(mask.device) for x in self._group_tokens[number])
            rows = rows if mask.shape[0] > 1 else torch.zeros_like(rows)
            self._masks[key] = (mask, mask[rows[:, None], :, slots].transpose(1, 2))
        return self._masks[key][1]


def _neighbours(some: Sequence[int], rows: Sequence[int]) -> list[list[int]]:
    """Indices into ``rows`` (which ascend), those of adjoining rows together."""
    found: list[list[int]] = []
    for i in some:
        if found and rows[i] == rows[found[-1][-1]] + 1:
            found[-1].append(i)
        else:
            found.append([i])
    return found


class Padded(_Layout):
    """[rows, width, h]: windows that end at the newest token; a mask says which slots of a row are written."""

    def fits(self, tokens: Tokens) -> bool:
        """Whether the forward's arguments are right as they are."""
        return len(tokens.rows) == self.n_rows and self._width(tokens) == self.length - self.base

    def _end(self, tokens: Tokens) -> int:
        return tokens.newest_slot + tokens.with_newest

    def _width(self, tokens: Tokens) -> int:
        return self._end(tokens) - min(min(tokens.starts), tokens.newest_slot)

    def _rows(self, tokens: Tokens, device: torch.device) -> Tensor | None:
        return None if len(tokens.rows) == self.n_rows else torch.tensor(tokens.rows, device=device)

    def _valid(self, tokens: Tokens) -> Tensor | None:
        """[rows, width], which slots of the window are among the tokens; None for all."""
        width = self._width(tokens)
        if tokens.n == width * len(tokens.rows):
            return None
        slot = torch.arange(self._end(tokens) - width, self._end(tokens))[None]
        starts, ends = torch.tensor(tokens.starts)[:, None], torch.tensor(tokens.ends)[:, None]
        inside = (slot >= starts) & (slot < ends)
        return inside | (slot == tokens.newest_slot) if tokens.with_newest else inside

    def call(self, tokens: Tokens, store_only: bool = False) -> Call:
        """What the cache has to write."""
        valid = self._valid(tokens)
        return PaddedCall(self.n_rows, self._end(tokens), store_only, self._rows(tokens, torch.device("cpu")), valid)

    def laid_out(self, tokens: Tokens, states: Tensor) -> Tensor:
        """States [n, h] in this layout, zeros elsewhere."""
        new = states.new_zeros(len(tokens.rows), self._width(tokens), states.shape[-1])
        valid = self._valid(tokens)
        if valid is None:
            new = states.reshape(new.shape)
        else:
            new[valid.to(new.device)] = states
        self.shaped = new
        return new

    def assemble(self, hidden: Tensor, flowing: Tokens | None, tokens: Tokens, kept: Kept) -> Tensor:
        """What a block gets: from what flows (of the embeddings for the first block), and from what was kept."""
        width = self._width(tokens)
        if flowing is None:  # the first block
            self.shaped = hidden[:, -width:]
            return self.shaped
        if all(
            s >= f and e <= g
            for s, f, e, g in zip(tokens.starts, flowing.starts, tokens.ends, flowing.ends, strict=True)
        ):
            self.shaped = hidden[:, -width:]
            return self.shaped
        new = self.laid_out(tokens, kept(tokens, hidden.device)).clone()
        overlap = min(width, hidden.shape[1])
        valid = self._valid(flowing)
        tail, newer = new[:, -overlap:], hidden[:, -overlap:]
        tail.copy_(newer if valid is None else torch.where(valid[:, -overlap:, None].to(hidden.device), newer, tail))
        self.shaped = new
        return new

    def newest(self, hidden: Tensor, tokens: Tokens) -> Tensor:
        """[rows, h] at the newest tokens."""
        return hidden[:, -1]

    def states(self, hidden: Tensor, tokens: Tokens, some: Tokens) -> Tensor:
        """[n, h] of some of the rows' tokens."""
        rows = set(some.rows)
        hidden = hidden[[i for i, r in enumerate(tokens.rows) if r in rows], -self._width(some) :]
        valid = self._valid(some)
        return hidden.flatten(0, 1) if valid is None else hidden[valid.to(hidden.device)]

    def select(self, hidden: Tensor, tokens: Tokens, stay: Sequence[bool]) -> Tensor:
        """The hidden states of the rows that stay."""
        self.shaped = hidden[[i for i, s in enumerate(stay) if s], -self._width(tokens.of(stay)) :]
        return self.shaped

    def _cut(self, k: int, path: str, value: Tensor, dims: tuple[int, ...], factor: int, tokens: Tokens) -> Tensor:
        width, behind = self._width(tokens), self.length - self._end(tokens)
        for dim in dims:
            if value.shape[dim] != width:
                value = value.narrow(dim, value.shape[dim] - width - behind, width)
        rows = self._rows(tokens, value.device)
        return value if rows is None else self.windows.rows.cut(k, path, value, rows, self.n_rows)


LAYOUTS: dict[str, Any] = {"packed": Packed, "padded": Padded}
