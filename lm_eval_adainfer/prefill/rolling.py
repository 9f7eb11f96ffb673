"""Rows whose scored tokens each leave at a block of their own (``loglikelihood_rolling``)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lm_eval_adainfer.prefill.documents import Row
from lm_eval_adainfer.prefill.scoring import positions_at_once, score_points
from lm_eval_adainfer.readers.base import HEAD, Reader
from lm_eval_adainfer.strategies.asking import Carried, ask
from lm_eval_adainfer.strategies.base import Stopper
from lm_eval_adainfer.structure.anatomy import Anatomy
from lm_eval_adainfer.structure.state import BlockState

_Point = tuple[int, int, Row, int]  # number of the row, position in it, the row, index among its scored positions


class TokenExits:
    """A batch of rows on its way through the blocks; :meth:`after_block` is for ``forward.run_blocks``.

    Args:
        anatomy: The model.
        stopper: Says after a block which tokens stop.
        checked: After which blocks it is asked.
        softmax_dtype: As ``scoring.score_points``'.
        rows: The rows, run whole.
        reader: How blocks are read, position by position.

    Attributes:
        exits: Per row, the exit block of every scored position.
        head_rows: Head rows computed.
        block_tokens: Block executions x tokens.
        block_calls: Block executions.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        stopper: Stopper,
        checked: frozenset[int],
        softmax_dtype: torch.dtype | None,
        rows: Sequence[Row],
        reader: Reader = HEAD,
    ):
        self.anatomy, self.stopper, self.checked, self.softmax_dtype = anatomy, stopper, checked, softmax_dtype
        self.rows, self.reader = rows, reader
        self.exits = [[anatomy.n_blocks] * row.scored for row in rows]
        self.head_rows = self.block_tokens = self.block_calls = 0
        self._flow = list(range(len(rows)))
        self._points: list[_Point] = [
            (r, row.decision + j, row, j) for r, row in enumerate(rows) for j in range(row.scored)
        ]
        self._carried = Carried(stopper.carries)

    def after_block(self, state: BlockState) -> Tensor | None:
        """Score the tokens that stop; the rows that still have others go on."""
        self.block_calls += 1
        self.block_tokens += sum(len(self.rows[r].tokens) for r in self._flow)
        if state.block not in self.checked and state.block < self.anatomy.n_blocks:
            return None
        place = {r: n for n, r in enumerate(self._flow)}
        size = positions_at_once(self.anatomy)
        chunks = [self._points[start : start + size] for start in range(0, len(self._points), size)]
        self._points = [point for chunk in chunks for point in self._score_stopping(state, chunk, place)]
        going = {point[0] for point in self._points}
        keep = [n for n, r in enumerate(self._flow) if r in going]
        self._flow = [self._flow[n] for n in keep]
        return torch.tensor(keep, dtype=torch.long)

    def _score_stopping(self, state: BlockState, points: Sequence[_Point], place: dict[int, int]) -> list[_Point]:
        """Score those of these tokens that stop here; the others are given back."""
        device, k = state.hidden.device, state.block
        rows = torch.tensor([place[r] for r, *_ in points], device=device)
        positions = torch.tensor([position for _, position, *_ in points], device=device)
        if k < self.anatomy.n_blocks:
            keys = [(r, j) for r, _, _, j in points]
            carried = self._carried.of(keys, device)
            stops, logits = ask(self.stopper, self.anatomy, state, (rows, positions), carried, reader=self.reader)
            self._carried.keep(keys, carried)
        else:
            stops, logits = [True] * len(points), self.anatomy.logits(state.hidden[rows, positions])
        done = [n for n, stop in enumerate(stops) if stop]
        self.head_rows += len(done) if logits is None else len(points)
        if done:
            if logits is None:
                of_done = self.anatomy.logits(self.reader.translate(k, state.hidden[rows[done], positions[done]]))
            else:
                of_done = logits[done]
            score_points(of_done, [points[n][2:] for n in done], self.softmax_dtype)
        for r, _, _, j in (points[n] for n in done):
            self.exits[r][j] = k
        return [point for point, stop in zip(points, stops, strict=True) if not stop]
