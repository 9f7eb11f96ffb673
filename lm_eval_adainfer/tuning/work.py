"""What documents of a trace cost where they leave early: blocks, reading and checks, counted; exits are *simulated*.

The costs are those of ``fitting.check_layers``, document by document: multiplications of the linear maps of the blocks
that a prompt runs, of what the reader runs at every check, of the head's rows and of the stopper. Attention's pairs and
the tokens of longer answers are left out on both sides of a ratio.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lm_eval_adainfer.fitting.check_layers import reading
from lm_eval_adainfer.readers.base import Reader
from lm_eval_adainfer.strategies import features
from lm_eval_adainfer.strategies.base import Stopper
from lm_eval_adainfer.traces.documents import TracedDocuments


@dataclass(frozen=True)
class Work:
    """Of D documents of a model of L blocks, in multiplications.

    Attributes:
        blocks: [D, L + 1], blocks 1..k.
        ask: [D, L], asking after block k.
        head: [D], the head's rows that give the answer.
        check_is_head: Whether a check reads the whole head, so that the one at the exit is the answer's.
    """

    blocks: np.ndarray
    ask: np.ndarray
    head: np.ndarray
    check_is_head: bool

    @classmethod
    def of(cls, views: Sequence[TracedDocuments], reader: Reader, stopper: Stopper) -> Work:
        """The work of the documents of some traces, one after the other, where a stopper is asked under a reader."""
        is_head = features.needs_head(stopper.features)
        parts = [_of(view, reader, stopper, is_head) for view in views]
        blocks, ask, head = (np.concatenate(found) for found in zip(*parts, strict=True))
        return cls(blocks, ask, head, is_head)

    @property
    def dense(self) -> np.ndarray:
        """[D]."""
        return self.blocks[:, -1] + self.head

    def at(self, exit_layer: np.ndarray, asked: Sequence[int]) -> np.ndarray:
        """[D], the work of documents that leave after these blocks ([D], L: nowhere), asked after some blocks."""
        n_blocks = self.ask.shape[1]
        cost = np.take_along_axis(self.blocks, exit_layer[:, None], axis=1)[:, 0]
        for k in asked:
            cost = cost + np.where(exit_layer >= k, self.ask[:, k - 1], 0.0)
        return cost + np.where((exit_layer < n_blocks) & self.check_is_head, 0.0, self.head)

    def ratio(self, exit_layer: np.ndarray, asked: Sequence[int]) -> float:
        """The work of all documents over that of the dense model."""
        return float(self.at(exit_layer, asked).sum() / self.dense.sum())


def _of(
    view: TracedDocuments, reader: Reader, stopper: Stopper, is_head: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    meta, arrays = view.meta, view.arrays
    tokens = arrays["prompt_tokens"].astype(float)
    weights = np.concatenate([[0.0], np.cumsum(meta["block_weights"], dtype=float)])
    head = float(meta["hidden_size"] * meta["vocab_size"])
    check = np.full(len(tokens), head if is_head else 0.0)
    if features.needs_choices(stopper.features) and not is_head:
        check = meta["hidden_size"] * (arrays["request"] >= 0).sum(axis=1).astype(float)
    ask = reading(reader, meta, tokens) + check[:, None] + stopper.flops / 2
    blocks = tokens[:, None] * weights
    count = len(view.doc_ids)
    summed = np.zeros((count, blocks.shape[1])), np.zeros((count, ask.shape[1]))
    for into, values in zip(summed, (blocks, ask), strict=True):
        np.add.at(into, view.owner, values)
    return *summed, head * np.bincount(view.owner, minlength=count).astype(float)
