"""Dense answers from the pass that gives the early ones: rows of documents that have left run on to its end.

A document that leaves is scored where it leaves, by the reader, and asked no more; its rows stay in their batch and are
scored once more after the last block. What that adds to the early side's own work is counted apart, so that both sides
keep the counts that runs of their own would have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from lm_eval_adainfer.prefill.documents import Answer, Document, Row
from lm_eval_adainfer.prefill.scoring import score_positions
from lm_eval_adainfer.structure.anatomy import Anatomy
from lm_eval_adainfer.structure.state import BlockState


@dataclass
class Work:
    """What was run, counted.

    Attributes:
        tokens: Tokens of all rows, each counted once.
        block_tokens: Block executions x tokens.
        block_calls: Block executions of batches.
        head_rows: Head rows computed.
        copied_tokens: Block executions x tokens that computed keys and values alone.
    """

    tokens: int = 0
    block_tokens: int = 0
    block_calls: int = 0
    head_rows: int = 0
    copied_tokens: int = 0


class InFlow(NamedTuple):
    """A row in flow.

    Attributes:
        document: Whose it is.
        row: The row.
        place: Its batch, its number among the batch's rows, and where it decides there.
        has_left: Whether its document left after an earlier block.
        length: Tokens of it that go through a block.
    """

    document: Document
    row: Row
    place: tuple[int, int, int]
    has_left: bool
    length: int


class DenseToo:
    """The dense answers of documents that an engine runs with early exit (``Engine.dense``).

    Args:
        anatomy: The model.
        softmax_dtype: As the engine's.

    Attributes:
        own: What a run without exits would come to by itself.
        more: What ran for the dense answers alone, on top of the early side's work.
    """

    def __init__(self, anatomy: Anatomy, softmax_dtype: torch.dtype | None = None):
        self.anatomy, self.softmax_dtype = anatomy, softmax_dtype
        self.own, self.more = Work(), Work()
        self._rows: dict[Row, Row] = {}  # a row to the one that holds its dense answers

    def after_block(self, states: Sequence[BlockState], flow: Sequence[InFlow]) -> None:
        """Count a block, and score all rows after the last one.

        Args:
            states: The batches' after it; rows that leave there have been scored by the engine.
            flow: Their rows, batch by batch.
        """
        run, going = sum(x.length for x in flow), {x.place[0] for x in flow if not x.has_left}
        self.own.block_tokens += run
        self.own.block_calls += len(states)
        self.more.block_tokens += sum(x.length for x in flow if x.has_left)
        self.more.block_calls += len(states) - len(going)
        if states[0].block < self.anatomy.n_blocks:
            return
        points = []
        for _, row, place, has_left, _ in flow:
            answers = [Answer(a.request, a.continuation) if has_left else a for a in row.answers]
            twin = self._rows[row] = Row(row.tokens, row.scored, row.context, answers, row.choices)
            self.own.tokens += len(row.tokens)
            self.own.head_rows += row.scored
            if has_left:  # the others' early answers are their dense ones
                self.more.head_rows += row.scored
                points += [(*place[:2], place[2] + j, twin, j) for j in range(row.scored)]
        score_positions(self.anatomy, states, points, self.softmax_dtype)

    def prefixes(self, executed: int, wanted: int, idle: int) -> None:
        """Count what ran of prefixes during a pass.

        Args:
            executed: Block executions x tokens, all that there were.
            wanted: Those that the early side alone would have needed.
            idle: Copies of tokens that it would not have made.
        """
        self.own.block_tokens += executed
        self.more.block_tokens += executed - wanted
        self.more.copied_tokens += idle

    def take(self, document: Document) -> Document:
        """A document that has been run, as if it had been run without exits; it is forgotten here."""
        rows = [self._rows.pop(row) for row in document.rows]
        head_rows = sum(row.scored for row in rows)
        return Document(rows, document.deciders, self.anatomy.n_blocks, head_rows)
