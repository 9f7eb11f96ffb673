"""A dense pass over documents that an observer watches: what every block would have said."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from lm_eval_adainfer.prefill.documents import Document, Row
from lm_eval_adainfer.prefill.forward import Forward, padded
from lm_eval_adainfer.prefill.reading import Reading, Spot
from lm_eval_adainfer.prefill.scoring import score_positions
from lm_eval_adainfer.readers.base import Reader
from lm_eval_adainfer.structure.anatomy import Anatomy
from lm_eval_adainfer.structure.state import BlockState

# (reader, [(row in flow, j)]) -> [n, h]: what norm and head read under a reader after the block that is being observed,
# at the j-th of a row's scored positions (0 is the decision's)
Read = Callable[[Reader, Sequence[tuple[int, int]]], Tensor]


class Observer(Protocol):
    """What watches documents on their way through all blocks (``traces.recording.Recorder``).

    Attributes:
        parts: Which parts' outputs of a block it reads: of ``"attn"``, ``"mlp"``.
        readings: By name, the readers that it reads with and that let tokens go on, made ready for the model.
    """

    parts: Sequence[str]
    readings: Mapping[str, Reading]

    def after_block(self, state: BlockState, flow: Sequence[tuple[Document, Row]], read: Read) -> None:
        """See a block's state and whose rows these are, in order; after block L the rows' answers are there.

        ``read`` gives what norm and head read under any reader.
        """

    def finished(self, documents: Sequence[Document]) -> None:
        """Learn that these documents have been through all blocks."""


@torch.no_grad()
def run_observed(
    anatomy: Anatomy,
    documents: Sequence[Document],
    rows_at_once: int,
    observer: Observer,
    softmax_dtype: torch.dtype | None,
) -> None:
    """Run documents dense; a dense pass needs no common decision, so their rows go in pieces of any documents.

    Args:
        anatomy: The model.
        documents: Their answers and exit blocks (L) are filled in.
        rows_at_once: Rows of a piece.
        observer: It is called after every block.
        softmax_dtype: As ``scoring.score_points``'.
    """
    for document in documents:
        document.exit_layer = anatomy.n_blocks
    rows = [(document, row) for document in documents for row in document.rows]
    for start in range(0, len(rows), rows_at_once):
        flow = rows[start : start + rows_at_once]
        mine = [row for _, row in flow]
        forward = Forward(anatomy, padded(anatomy, [row.tokens for row in mine]), observer.parts)
        for k in range(1, anatomy.n_blocks + 1):
            state = forward.advance()
            if k == anatomy.n_blocks:
                points = [(0, r, row.decision + j, row, j) for r, row in enumerate(mine) for j in range(row.scored)]
                score_positions(anatomy, [state], points, softmax_dtype)
            observer.after_block(state, flow, partial(_read, observer.readings, state, mine))
    observer.finished(documents)


def _read(
    readings: Mapping[str, Reading],
    state: BlockState,
    rows: Sequence[Row],
    reader: Reader,
    places: Sequence[tuple[int, int]],
) -> Tensor:
    """A ``Read`` of rows that are run whole; it is given all scored positions of a row, or the decision's."""
    if reader.runs_tokens:
        positions = Counter(r for r, _ in places)
        spots = [Spot(r, rows[r], 0, n) for r, n in positions.items()]
        return readings[reader.name].read(state.block, state.hidden, None, spots)
    at = torch.tensor([(r, rows[r].decision + j) for r, j in places], device=state.hidden.device)
    return reader.translate(state.block, state.hidden[at[:, 0], at[:, 1]])
