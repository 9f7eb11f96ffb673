"""The prompts of rows that join: run together, each as deep as its first new token goes.

They go through the early-exit prefill (``prefill.forward``), and behind every block their keys and values are put into
the decoder's cache. What a prompt shares with others (``DecoderState.prefixes``) was run once, and is copied. Where a
prompt leaves early, its tokens' states wait for a later token of its row that goes deeper, like those of any token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lm_eval_adainfer.generation.decisions import Decisions
from lm_eval_adainfer.generation.state import DecoderState
from lm_eval_adainfer.prefill.forward import padded
from lm_eval_adainfer.prefill.prefixes import Pair, begun
from lm_eval_adainfer.structure.state import BlockState


def run(state: DecoderState) -> Tensor:
    """Run the prompts of the rows that have joined; they have the same prefix, or none.

    Returns:
        [joined, V] float32 logits of each row's first new token.
    """
    return _Prompts(state).logits()


class _Prompts:
    """The prompts of some rows on their way.

    Attributes:
        places: The rows' places.
        starts: Per row, the first slot that is run here.
        lengths: Per row, how many tokens are run here.
        decisions: Which of them go on; those in flow are numbered as in ``places``.
    """

    def __init__(self, state: DecoderState):
        self.state, self.anatomy = state, state.anatomy
        self.places = list(state.joined)
        self.starts = [state.own_start(place) for place in self.places]
        self.lengths = [state.prompt_end[p] - s for p, s in zip(self.places, self.starts, strict=True)]
        self.decisions = Decisions(state, self.places)

    def logits(self) -> Tensor:
        """Run them all."""
        state, own = self.state, dict[int, Pair]()
        ids = padded(self.anatomy, [
            state.slots[p, s : s + n].tolist() for p, s, n in zip(self.places, self.starts, self.lengths, strict=True)
        ])  # fmt: skip
        forward, _ = begun(self.anatomy, ids, state.parts, state.prefixes[self.places[0]], own)
        flow = self.decisions.flow
        while flow:
            after = forward.advance()
            self._store(after.block, flow, own)
            own.clear()
            leaves = self._leaving(after, flow)
            stay = [i for i in range(len(flow)) if i not in leaves]
            if stay and leaves:
                forward.keep(torch.tensor(stay, dtype=torch.long))
            flow = [flow[i] for i in stay]
        return self.decisions.logits()

    def _store(self, k: int, flow: Sequence[int], own: dict[int, Pair]) -> None:
        """Put what block k has stored into the cache, and count it."""
        state, places = self.state, [self.places[n] for n in flow]
        for layer, pair in own.items():
            for i, n in enumerate(flow):
                start, length = self.starts[n], self.lengths[n]
                found = tuple(x[i, :, :length] for x in pair)
                state.cache.put(layer, self.places[n], slice(start, start + length), found)
        state.ran_prompts(k, places)

    def _leaving(self, after: BlockState, flow: Sequence[int]) -> list[int]:
        """The rows in flow that leave after a block, by their place among them."""
        state, decisions, k = self.state, self.decisions, after.block
        last = k == self.anatomy.n_blocks
        index = torch.arange(len(flow)), torch.tensor([self.lengths[n] - 1 for n in flow])
        if state.parts or "cos_hidden" in state.stopper.features:
            decisions.before = _newest(after.before, index)
            decisions.parts = {which: _newest(x, index) for which, x in after.parts.items()}
        leaves = decisions.leaving(k, _newest(after.hidden, index)) if last or k in state.checked else []
        decisions.end_block()
        if not leaves:
            return leaves
        if not last:
            for i in leaves:
                length, start = self.lengths[flow[i]], self.starts[flow[i]]
                slots = torch.arange(start, start + length)
                state.keep_at(torch.full_like(slots, self.places[flow[i]]), slots, after.hidden[i, :length])
        gone = set(leaves)
        decisions.go_on([i not in gone for i in range(len(flow))], after.hidden.device)
        return leaves


def _newest(hidden: Tensor, index: tuple[Tensor, Tensor]) -> Tensor:
    """[flow, h] of [flow, S, h] at the last tokens."""
    rows, tokens = (x.to(hidden.device) for x in index)
    return hidden[rows, tokens]
