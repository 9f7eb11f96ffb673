"""A dense pass over documents that an observer watches: what every block would have said."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from lm_eval_adainfer.prefill.documents import Document, Row
from lm_eval_adainfer.prefill.forward import padded, run_blocks
from lm_eval_adainfer.prefill.scoring import score_positions
from lm_eval_adainfer.structure.anatomy import Anatomy
from lm_eval_adainfer.structure.state import BlockState


class Observer(Protocol):
    """What watches documents on their way through all blocks (``traces.recording.Recorder``).

    Attributes:
        parts: Which parts' outputs of a block it reads: of ``"attn"``, ``"mlp"``.
    """

    parts: Sequence[str]

    def after_block(self, state: BlockState, flow: Sequence[tuple[Document, Row]]) -> None:
        """See a block's state and whose rows these are, in order; after block L the rows' answers are there."""

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

        def after_block(state: BlockState, flow: Sequence[tuple[Document, Row]] = flow) -> Tensor | None:
            is_last = state.block == anatomy.n_blocks
            if is_last:
                score_all(anatomy, state, [row for _, row in flow], softmax_dtype)
            observer.after_block(state, flow)
            return torch.empty(0, dtype=torch.long) if is_last else None

        run_blocks(anatomy, padded(anatomy, [row.tokens for _, row in flow]), after_block, observer.parts)
    observer.finished(documents)


def score_all(anatomy: Anatomy, state: BlockState, rows: Sequence[Row], softmax_dtype: torch.dtype | None) -> None:
    """Score all positions of rows that were run whole, as this block has them."""
    points = [(0, r, row.decision + j, row, j) for r, row in enumerate(rows) for j in range(row.scored)]
    score_positions(anatomy, [state], points, softmax_dtype)
