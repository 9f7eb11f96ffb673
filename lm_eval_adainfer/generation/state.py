"""What a decoder keeps from token to token: the rows' tokens, what every block has filled, and the KV cache.

A row has a *place*. When a text is finished, the row in the last place takes over its place, so that the places in use
are the first ones and nothing has to be picked out of the cache; a row that joins takes the next one. Rows are aligned
at their newest token, which is in the same *slot* of all places; what is in front of a row is padding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lm_eval_adainfer.generation.cache import SlotCache
from lm_eval_adainfer.generation.decoded import Decoded
from lm_eval_adainfer.generation.policies import KV_POLICIES
from lm_eval_adainfer.generation.screen import Screen
from lm_eval_adainfer.generation.tokens import Tokens
from lm_eval_adainfer.prefill.prefixes import Prefix
from lm_eval_adainfer.readers.base import HEAD, Reader
from lm_eval_adainfer.strategies import features
from lm_eval_adainfer.strategies.base import Schedule, Stopper
from lm_eval_adainfer.structure.anatomy import Anatomy
from lm_eval_adainfer.structure.windows import Windows


class DecoderState:
    """The rows between two steps, and how they are decoded.

    Args:
        anatomy: The model.
        stopper: Says after a block whether a new token leaves.
        schedule: After which blocks it is asked.
        windows: How the blocks' arguments follow a step (``probes.prepare``).
        places: Rows at once, at most.
        capacity: Slots: at least a row's prompt and text together.
        kv_policy: A key of ``policies.KV_POLICIES``.
        shortlist: Candidates per token for screening (``head_check=shortlist``); 0 for none.
        screen: First token ids for screening (``head_check=screen``); 0 for none. Without either the full vocabulary is
            read at every check.
        reader: How blocks are read at the newest tokens, each on its own; the cache holds states as they are.

    Attributes:
        checked: Blocks after which the stopper is asked.
        parts: The parts of a block whose output the stopper reads.
        deepest: The last block that any token can need.
        rows: By place, the rows being decoded, by their number; the next lists go by place, too.
        pad: Slots of padding in front of a row.
        prompt_end: One behind the last slot of a row's prompt.
        prefixes: What was run once for a row and others; its slots are the first behind the padding.
        slots: [places, capacity] token ids.
        length: How many slots have a token.
        known: ``known[k - 1][place]`` is the first slot that block k has not filled; the prefix counts as filled.
        joined: The places of the rows that have joined and have no token yet.
        pending: [places, capacity, h], of every token the output of its deepest block; None until one leaves early.
        results: What was decoded, for every row that ever joined.
        screen: What screens read of the head; None where nothing is screened so.
        copied: Tokens x blocks of prefixes that were copied.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        stopper: Stopper,
        schedule: Schedule,
        windows: Windows,
        places: int,
        capacity: int,
        kv_policy: str = "recompute",
        shortlist: int = 0,
        screen: int = 0,
        reader: Reader = HEAD,
    ):
        self.anatomy, self.stopper, self.checked = anatomy, stopper, frozenset(schedule.blocks)
        self.reader = reader
        self.windows, self.policy = windows, KV_POLICIES[kv_policy]()
        reads_head = features.needs_head(stopper.features)
        self.shortlist = min(shortlist, anatomy.vocab_size) if reads_head else 0
        self.screen = Screen(screen) if reads_head and 0 < screen < anatomy.vocab_size else None
        self.parts = features.needed_parts(stopper.features) if self.checked else []
        # a strategy that asks nothing stops every token at its one block; deeper ones are never needed
        self.deepest = schedule.blocks[0] if schedule.blocks and not stopper.features else anatomy.n_blocks
        self.device = anatomy.input_device
        self.places, self.capacity = places, capacity
        self.length = 0
        self.rows: list[int] = []
        self.pad: list[int] = []
        self.prompt_end: list[int] = []
        self.prefixes: list[Prefix | None] = []
        self.joined: list[int] = []
        self.slots = torch.zeros(places, capacity, dtype=torch.long)
        self.known: list[list[int]] = [[] for _ in range(anatomy.n_blocks)]
        self._without_prefix: list[set[int]] = [set() for _ in range(anatomy.n_blocks)]  # places, per block
        self.pending: Tensor | None = None
        self.cache = SlotCache(places, capacity)
        self.results: list[Decoded] = []
        self.copied = 0

    @property
    def free(self) -> int:
        """How many rows can join."""
        return self.places - len(self.rows)

    def own_start(self, place: int) -> int:
        """The first slot of a row behind its prefix."""
        prefix = self.prefixes[place]
        return self.pad[place] + (0 if prefix is None else prefix.width)

    def text(self, place: int) -> Tensor:
        """[n] token ids of a row that is stepped, prompt and new tokens."""
        return self.slots[place, self.pad[place] : self.length - bool(self.joined)]

    # ------------------------------------------------------------------ rows come and go

    def join(self, prompts: Sequence[Sequence[int]], prefix: Prefix | None = None) -> list[int]:
        """Take in rows; their prompts still have to be run (``prefill``), and get a token each (:meth:`append`).

        Args:
            prompts: Token ids, no more of them than places are :attr:`free`.
            prefix: What all of them begin with, of one row, shorter than each.

        Returns:
            The rows' numbers.
        """
        longest = max(map(len, prompts)) + 1  # and room for a token
        if not self.rows:
            self.length = longest
        elif longest > self.length:
            self._shift(longest - self.length)
        new = range(len(self.results), len(self.results) + len(prompts))
        n = self.anatomy.n_blocks
        for row, prompt in zip(new, prompts, strict=True):
            place, pad = len(self.rows), self.length - 1 - len(prompt)
            self.rows.append(row)
            self.joined.append(place)
            self.pad.append(pad)
            self.prompt_end.append(self.length - 1)
            self.prefixes.append(prefix)
            self.slots[place, pad : self.length - 1] = torch.tensor(list(prompt), dtype=torch.long)
            for known, without in zip(self.known, self._without_prefix, strict=True):
                known.append(self.own_start(place))
                if prefix is not None:
                    without.add(place)
            self.results.append(Decoded(block_tokens=[0] * n, pairs=[0] * n, stored_tokens=[0] * n))
        return list(new)

    def append(self, tokens: Sequence[int], finished: Sequence[bool]) -> None:
        """Add a token to each row that was stepped: those that joined, or else all; finished rows leave."""
        places = self.joined or list(range(len(self.rows)))
        if not self.joined:
            if self.length == self.capacity:
                self._shift(-min(self.pad))
            self.length += 1
        for place, token in zip(places, tokens, strict=True):
            self.results[self.rows[place]].tokens.append(token)
            self.slots[place, self.length - 1] = token
        self.joined = []
        for place in sorted((p for p, done in zip(places, finished, strict=True) if done), reverse=True):
            self._leave(place)

    def _leave(self, place: int) -> None:
        """The row in the last place takes over this one."""
        last = len(self.rows) - 1
        if self.screen is not None:
            self.screen.forget(self.rows[place])
        by_place: list[list] = [self.rows, self.pad, self.prompt_end, self.prefixes, *self.known]
        for values in by_place:
            values[place] = values[last]
            values.pop()
        for without in self._without_prefix:
            without.discard(place)
            if last in without:
                without.remove(last)
                without.add(place)
        if place != last:
            self.slots[place] = self.slots[last]
            if self.pending is not None:
                self.pending[place] = self.pending[last]
            self.cache.move(last, place, self.length)

    def _shift(self, by: int) -> None:
        """Move all rows by some slots, to the right or (negative) to the left."""
        if by == 0 or not 0 <= self.length + by <= self.capacity:
            raise RuntimeError("the slots of a decoder are too few for its rows")
        low, high = max(0, -by), self.length
        for whole, dim in [(self.slots, 1), *([] if self.pending is None else [(self.pending, 1)]), *self.cache.all()]:
            part = whole.narrow(dim, low, high - low).clone()
            whole.narrow(dim, low + by, high - low).copy_(part)
        self.length += by
        for values in (self.pad, self.prompt_end, *self.known):
            values[:] = [slot + by for slot in values]

    # ------------------------------------------------------------------ what blocks fill

    def without_prefix(self, k: int, places: Sequence[int]) -> list[int]:
        """Of some places, those whose prefix's keys and values of block k are not in the cache yet."""
        missing = self._without_prefix[k - 1]
        return [place for place in places if place in missing] if missing else []

    def take_prefix(self, k: int, places: Sequence[int]) -> None:
        """Copy their prefix's keys and values of block k, and count as if each row had run it for itself."""
        for place in places:
            prefix = self.prefixes[place]
            assert prefix is not None
            prefix.require(k)
            layer = list(prefix.stored)[k - 1]  # every block stores one pair
            slots = slice(self.pad[place], self.pad[place] + prefix.width)
            self.cache.put(layer, place, slots, tuple(x[0] for x in prefix.stored[layer]))
            self._without_prefix[k - 1].discard(place)
            result = self.results[self.rows[place]]
            self.copied += prefix.width
            result.block_tokens[k - 1] += prefix.width
            result.pairs[k - 1] += prefix.width * (prefix.width + 1) // 2

    def ran_prompts(self, k: int, places: Sequence[int]) -> None:
        """Block k has run the prompts of these places behind their prefix, whose keys and values are copied now."""
        self.take_prefix(k, self.without_prefix(k, places))
        for place in places:
            start, end, result = self.own_start(place), self.prompt_end[place], self.results[self.rows[place]]
            own, skipped = end - start, start - self.pad[place]
            result.block_tokens[k - 1] += own
            result.pairs[k - 1] += own * skipped + own * (own + 1) // 2
            self.known[k - 1][place] = end

    def fill(self, places: Sequence[int]) -> None:
        """All blocks have keys and values of these places' prompts now, whatever has put them there."""
        for known, without in zip(self.known, self._without_prefix, strict=True):
            for place in places:
                known[place] = self.prompt_end[place]
                without.discard(place)

    def keep(self, tokens: Tokens, hidden: Tensor) -> None:
        """Remember the states ([n, h]) of tokens that leave, for deeper blocks to fill in later."""
        self.keep_at(tokens.row, tokens.slot, hidden)

    def keep_at(self, places: Tensor, slots: Tensor, hidden: Tensor) -> None:
        """The same, of tokens by place and slot ([n] each)."""
        if self.deepest < self.anatomy.n_blocks:  # nobody will ever go deeper
            return
        if self.pending is None:
            self.pending = hidden.new_zeros(self.places, self.capacity, hidden.shape[-1])
        device = self.pending.device
        self.pending[places.to(device), slots.to(device)] = hidden.to(device)

    def kept(self, tokens: Tokens, device: torch.device) -> Tensor:
        """[n, h] states of tokens that left."""
        assert self.pending is not None
        where = self.pending.device
        return self.pending[tokens.row.to(where), tokens.slot.to(where)].to(device)
