"""Prompts that leave early: a reader that lets tokens go on decides how deep a prompt goes before new tokens follow.

Where a prompt leaves after a block, later blocks keep the keys and values that the reader has made there: copies of
what its tokens are (CALM's state copy, for the prompt), and those of the tokens that ran on. New tokens find these in
their cache, which is therefore not the dense model's. What prompts share is run once, and copied once where they leave.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lm_eval_adainfer.generation.state import DecoderState
from lm_eval_adainfer.prefill.documents import Row
from lm_eval_adainfer.prefill.forward import padded
from lm_eval_adainfer.prefill.prefixes import Continued, Pair, begun
from lm_eval_adainfer.prefill.reading import Reading, Spot, copies, tokens_that_run
from lm_eval_adainfer.strategies import features
from lm_eval_adainfer.strategies.asking import Carried, ask
from lm_eval_adainfer.strategies.base import Schedule, Stopper
from lm_eval_adainfer.structure.state import BlockState
from lm_eval_adainfer.structure.storing import Storing


class PromptExits:
    """Decides how deep prompts go.

    Args:
        stopper: Says after a block whether a prompt leaves.
        schedule: After which blocks it is asked.
        reading: The reader, made ready for the model.
        storing: What blocks have to compute for their keys and values.

    Attributes:
        checked: Blocks after which prompts may leave.
    """

    def __init__(self, stopper: Stopper, schedule: Schedule, reading: Reading, storing: Storing):
        self.stopper, self.checked, self.reading, self.storing = stopper, frozenset(schedule.blocks), reading, storing

    @torch.no_grad()
    def run(self, state: DecoderState) -> Tensor:
        """Run the prompts of the rows that have joined, each as deep as it goes, and fill the cache.

        Args:
            state: The decoder's. These rows have the same prefix, which keeps its states after ``checked``, or none.

        Returns:
            [rows, V] float32 logits of each row's first new token.
        """
        return _Run(self, state).logits()


class _Run:
    """The prompts of some rows on their way.

    Attributes:
        places: The rows' places.
        skip: Tokens of every row that a prefix runs.
        flow: The rows that have not left.
        found: Per row that has left, its logits [V]; or, where no check has computed these, its state [h] for the head.
    """

    def __init__(self, exits: PromptExits, state: DecoderState):
        self.exits, self.state, self.places = exits, state, list(state.joined)
        prompts = [state.slots[place, state.pad[place] : state.prompt_end[place]].tolist() for place in self.places]
        self.rows = [Row(prompt, 1) for prompt in prompts]
        self.prefix = state.prefixes[self.places[0]]
        self.skip = 0 if self.prefix is None else self.prefix.width
        self.continued: Continued | None = None
        self.results = [state.results[state.rows[place]] for place in self.places]
        self.anatomy, self.stopper = state.anatomy, exits.stopper
        self.needs_head = features.needs_head(self.stopper.features)
        self.flow = list(range(len(prompts)))
        self.carried = Carried(self.stopper.carries)
        self.states: dict[int, Tensor] = {}
        self.known: dict[int, Tensor] = {}

    def logits(self) -> Tensor:
        """Run them all; [rows, V] float32 logits where each has left."""
        own: dict[int, Pair] = {}
        ids = padded(self.anatomy, [row.tokens[self.skip :] for row in self.rows])
        parts = features.needed_parts(self.stopper.features)
        forward, self.continued = begun(self.anatomy, ids, parts, self.prefix, own)
        while self.flow:
            after = forward.advance()
            self.state.ran_prompts(after.block, [self.places[r] for r in self.flow])
            tokens = [range(self.skip, len(self.rows[r].tokens)) for r in self.flow]
            self._write(own, self.flow, range(len(tokens)), tokens, [0] * len(tokens))
            own.clear()
            leaving = self._leaving(after)
            stay = [n for n in range(len(self.flow)) if n not in leaving]
            if stay and leaving:
                forward.keep(torch.tensor(stay, dtype=torch.long))
            self.flow = [self.flow[n] for n in stay]
        state, device = self.state, self.state.device
        state.fill(self.places)
        if self.states:  # the head's weights are read once for all of them
            read = self.anatomy.logits(torch.stack([x.to(device) for x in self.states.values()]))
            self.known.update(zip(self.states, read, strict=True))
            for r in self.states:
                self.results[r].head_rows += 1
        return torch.stack([self.known[r].to(device) for r in range(len(self.rows))]).float()

    def _leaving(self, after: BlockState) -> set[int]:
        """The rows in flow that leave after a block, by their places; what they say is kept and the cache filled."""
        k, last = after.block, [self.rows[r].decision - self.skip for r in self.flow]
        if k == self.anatomy.n_blocks:
            for n, r in enumerate(self.flow):
                self._leave(r, k, state=after.hidden[n, last[n]])
            return set(range(len(self.flow)))
        if k not in self.exits.checked:
            return set()
        store: dict[int, Pair] = {}
        leaving = asked = list(range(len(self.flow)))
        read = logits = None
        if self.stopper.features:
            if self.needs_head:
                read = self._read(after, asked, store)
                logits = self.anatomy.logits(read)
                for r in self.flow:
                    self.results[r].head_rows += 1
            device = after.hidden.device
            points = torch.tensor(asked, device=device), torch.tensor(last, device=device)
            kept = self.carried.of(self.flow, device)
            stops = ask(self.stopper, self.anatomy, after, points, kept, logits).stops
            self.carried.keep(self.flow, kept)
            for r in self.flow:
                self.results[r].reading += self.stopper.flops
            leaving = [n for n in asked if stops[n]]
        if not leaving:
            return set()
        if read is None:
            read, asked = self._read(after, leaving, store), leaving
        places = [asked.index(n) for n in leaving]
        for n, i in zip(leaving, places, strict=True):
            self._leave(self.flow[n], k, *((read[i],) if logits is None else (None, logits[i])))
        self._fill(after, leaving, asked, places, store)
        return set(leaving)

    def _leave(self, r: int, k: int, state: Tensor | None = None, logits: Tensor | None = None) -> None:
        self.results[r].layers.append(k)
        self.results[r].prompt_exit = k
        if state is not None:
            self.states[r] = state
        if logits is not None:
            self.known[r] = logits

    def _read(self, after: BlockState, places: Sequence[int], store: dict[int, Pair]) -> Tensor:
        for n in places:
            r = self.flow[n]
            self.results[r].reads.append((after.block, len(self.rows[r].tokens), 1))
        return self.exits.reading.read(after.block, after.hidden, self.continued, self._spots(places), store)

    def _spots(self, places: Sequence[int]) -> list[Spot]:
        return [Spot(n, self.rows[self.flow[n]], self.skip) for n in places]

    def _fill(
        self, after: BlockState, leaving: Sequence[int], asked: Sequence[int], places: Sequence[int], store: dict
    ) -> None:
        """Fill the cache's later blocks for rows that leave after a block.

        Args:
            after: The block's.
            leaving: The rows, by their places in the flow.
            asked: Those that were read, too.
            places: Where the leaving ones are among these.
            store: What the later blocks have stored for those that were read.
        """
        reader, gone = self.exits.reading.reader, [self.flow[n] for n in leaving]
        whole = [range(len(self.rows[r].tokens)) for r in gone]
        if reader.kind == "copy":
            away = [max(0, len(self.rows[self.flow[n]].tokens) - reader.window) for n in asked]
            self._write(store, gone, places, whole, [max(away) - away[i] for i in places])
            return
        # what did not run on has no keys and values in later blocks but copies
        spots = self._spots(leaving)
        for copied in copies(self.anatomy, self.exits.storing, after.block, after.hidden, self.continued, spots):
            starts = [max(map(len, whole)) - len(tokens) for tokens in whole]
            self._write(copied, gone, range(len(gone)), whole, starts)
        self._write(store, gone, places, [tokens_that_run(reader, self.rows[r]) for r in gone], [0] * len(gone))
        for r in gone:
            self.results[r].copied_prompt = len(self.rows[r].tokens)

    def _write(
        self,
        stored: dict[int, Pair],
        rows: Sequence[int],
        places: Iterable[int],
        tokens: Sequence[Sequence[int]],
        starts: Sequence[int],
    ) -> None:
        """Write keys and values into the cache.

        Args:
            stored: By layer: [n, heads, slots, d].
            rows: The rows.
            places: Where each row is among the n.
            tokens: Which of each row's tokens they are of.
            starts: Per row, the slot of the first of these.
        """
        for layer, pair in stored.items():
            for r, i, some, start in zip(rows, places, tokens, starts, strict=True):
                slots = torch.tensor(some) + self.state.pad[self.places[r]]
                found = tuple(x[i, :, start : start + len(some)] for x in pair)
                self.state.cache.put(layer, self.places[r], slots, found)
