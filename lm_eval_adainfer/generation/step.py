"""One step of decoding: the model's own forward runs the newest token of every row, as deep as each goes.

The forward runs over the window of slots that some block still misses, so that it makes masks and rotary embeddings for
all of them; the hooks cut what a block gets to what it needs. Where deep blocks miss much more than shallow ones (a
prompt that nobody took there yet), they get a second forward, and only if a row comes so far: else every step would
pay for masks of the whole prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lm_eval_adainfer.generation.decisions import Decisions
from lm_eval_adainfer.generation.decoded import count_run, count_stored
from lm_eval_adainfer.generation.layouts import LAYOUTS
from lm_eval_adainfer.generation.state import DecoderState
from lm_eval_adainfer.generation.tokens import Tokens
from lm_eval_adainfer.structure.arguments import hidden_of, walk, with_hidden
from lm_eval_adainfer.structure.calls import AllRowsLeft, bypassed, explicit_masks, part_output
from lm_eval_adainfer.structure.hooks import without_hooks
from lm_eval_adainfer.structure.storing import Stored

_SLACK = 64  # slots that a deeper block may miss before it gets a forward of its own, with masks of its own


class _NextWindow(Exception):  # noqa: N818 - control flow
    """Leaves the model's forward before a block that misses more than this forward's masks cover."""


class Step:
    """The newest token of every row of a decoder.

    Attributes:
        tokens: What the current block runs; None before the first block.
        first: The first block of the current forward.
        end: One behind the last block of the current forward.
    """

    def __init__(self, decoder: DecoderState):
        self.decoder, self.anatomy, self.length = decoder, decoder.anatomy, decoder.length
        self.decisions = Decisions(decoder, range(len(decoder.rows)))
        self.layout = LAYOUTS[decoder.windows.layout](decoder.windows, len(decoder.rows), self.length)
        self.tokens: Tokens | None = None
        # of the last block: the rows in flow, what each misses, and what comes of it
        self._last_split: tuple[list[int], list[int], tuple[Tokens, Tokens | None]] | None = None
        self._stored: tuple[Tokens, Tensor] | None = None  # what the last block stored, and that laid out
        self.first, self.end = 1, 0
        self._carried: Tensor | None = None  # hidden states on their way from one forward to the next
        self._aside = False  # while a block is called for something else: its keys and values alone, or a prefix

    def run(self) -> Tensor:
        """All forwards of this step; returns [rows, V] float32 logits of each row at its exit block."""
        self.first, last = 1, False
        while not last:
            self.end, base = self._reach()
            last = self.end > self.anatomy.n_blocks
            try:
                self._forward(base)
            except _NextWindow:
                self.first = self.end
            except AllRowsLeft:
                break
        return self.decisions.logits()

    def _reach(self) -> tuple[int, int]:
        """One behind the last block of the next forward, and the first slot of its window.

        Only rows that are still in flow count: one that always leaves early misses everything in the deep blocks.
        """
        known, flow, n_blocks = self.decoder.known, self.decisions.flow, self.anatomy.n_blocks
        base = min(known[self.first - 1][row] for row in flow)
        for k in range(self.first + 1, self.decoder.deepest + 1):
            missing = min(known[k - 1][row] for row in flow)
            if base - missing > _SLACK:
                return k, base
            base = min(base, missing)
        return n_blocks + 1, base

    def _forward(self, base: int) -> None:
        decoder, anatomy, length = self.decoder, self.anatomy, self.length
        decoder.cache.base = base
        self.layout.covers(base)
        given: dict[str, Any] = {}
        slot, pad = torch.arange(length), torch.tensor(decoder.pad)
        if any(decoder.pad):
            given["attention_mask"] = (slot[None] >= pad[:, None]).long().to(decoder.device)
        if anatomy.takes_position_ids:
            given["position_ids"] = (slot[None, base:] - pad[:, None]).clamp(min=0).to(decoder.device)
        passed = anatomy.blocks[: self.first - 1]
        masks = explicit_masks(length - 1 - base > 0)  # a single query needs no causal mask
        with masks, self.layout.active(), without_hooks(passed), bypassed(anatomy, passed):
            anatomy.model(
                input_ids=decoder.slots[: len(decoder.rows), base:length].to(decoder.device),
                **anatomy.with_cache(decoder.cache),
                **given,
            )

    def pre_hook(self, k: int, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Before block k: give it what flows and what it misses, and cut its arguments to that."""
        if k < self.first or self._aside:
            return None
        decoder, decisions, layout = self.decoder, self.decisions, self.layout
        original = args[0] if args else kwargs["hidden_states"]
        if k == self.end:
            self._carried = original
            raise _NextWindow
        hidden = original if self._carried is None else self._carried.to(original.device)
        self._carried = None
        if lacking := decoder.without_prefix(k, decisions.flow):
            with self._doing_else():
                decoder.take_prefix(k, lacking)
        tokens, stored = self._split(k)
        if stored is not None:
            self._store(k, stored, args, kwargs, original)
        if self.tokens is None or (tokens is not self.tokens and tokens != self.tokens):
            hidden = layout.assemble(hidden, self.tokens, tokens, decoder.kept)
            self.tokens = tokens
        tokens = self.tokens
        decoder.cache.call = layout.call(tokens)
        if decoder.parts or "cos_hidden" in decoder.stopper.features:
            decisions.before = layout.newest(hidden, tokens)
        if hidden is original and layout.fits(tokens):
            return None
        new_args, new_kwargs = walk([list(args), kwargs], layout.cutter(k, tokens, original, hidden))
        return tuple(new_args), new_kwargs

    def _split(self, k: int) -> tuple[Tokens, Tokens | None]:
        """What block k runs and what it only stores; blocks that miss the same get the same objects."""
        decoder, flow, known = self.decoder, self.decisions.flow, self.decoder.known[k - 1]
        missing = [known[row] for row in flow]
        if self._last_split is None or self._last_split[:2] != (flow, missing):
            # the last prompt token is the first that decides: what lies behind it may have left, what lies before can't
            first_exits = [decoder.prompt_end[row] - 1 for row in flow]
            found = decoder.policy.split(flow, missing, first_exits, self.length - 1)
            self._last_split = (flow, missing, found)
        return self._last_split[2]

    def _store(self, k: int, stored: Tokens, args: tuple, kwargs: dict, original: Tensor) -> None:
        """Project the kept states of these tokens into block k's keys and values, and leave the block there."""
        decoder, layout = self.decoder, self.layout
        shaped = layout.shaped
        if self._stored is not None and stored is self._stored[0] and self._stored[1].device == original.device:
            hidden = self._stored[1]  # the same states in one block after the other
        else:
            hidden = layout.laid_out(stored, decoder.kept(stored, original.device))
            self._stored = stored, hidden
        decoder.cache.call = layout.call(stored, store_only=True)
        new_args, new_kwargs = walk([list(args), kwargs], layout.cutter(k, stored, original, hidden))
        self._aside = True  # this call's hooks are other people's alone
        try:
            self.anatomy.blocks[k - 1](*new_args, **new_kwargs)
        except Stored:
            pass
        else:
            raise RuntimeError("a block ran on after its keys and values were stored")
        finally:
            self._aside, layout.shaped = False, shaped
        count_stored(self.decisions.results, k, stored)

    @contextmanager
    def _doing_else(self) -> Iterator[None]:
        """While blocks are called for what is no part of this step."""
        self._aside = self.layout.paused = True
        try:
            yield
        finally:
            self._aside = self.layout.paused = False

    def part_hook(self, which: str, output: Any) -> None:
        """After the attention or feed-forward part of a block."""
        if self.tokens is not None and not self._aside:
            output = part_output(output, self.layout.shaped)
            self.decisions.parts[which] = self.layout.newest(output, self.tokens)

    def post_hook(self, k: int, output: Any) -> Any:
        """After block k: it now knows every slot of the rows in flow; those whose token leaves go."""
        if k < self.first or self._aside:
            return None
        decoder, decisions, layout, tokens = self.decoder, self.decisions, self.layout, self.tokens
        assert tokens is not None
        hidden, known = hidden_of(output), decoder.known[k - 1]
        count_run(decisions.results, decoder.pad, k, tokens)
        for row in tokens.rows:
            known[row] = self.length
        last = k == self.anatomy.n_blocks
        leaves: list[int] = []
        if last or k in decoder.checked:
            leaves = decisions.leaving(k, layout.newest(hidden, tokens))
        decisions.end_block()
        if not leaves:
            return None
        stay = [True] * len(tokens.rows)
        for n in leaves:
            stay[n] = False
        if not last:
            gone = tokens.of([not stays for stays in stay])
            decoder.keep(gone, layout.states(hidden, tokens, gone))
        if not any(stay):
            raise AllRowsLeft
        hidden = layout.select(hidden, tokens, stay)
        self.tokens = tokens.of(stay)
        decisions.go_on(stay, hidden.device)
        return with_hidden(output, hidden)
