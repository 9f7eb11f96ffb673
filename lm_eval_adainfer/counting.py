"""Floating-point operations, counted as ``docs/numbers.md`` defines them."""

from __future__ import annotations

from itertools import accumulate
from typing import TypeVar

import numpy as np

from lm_eval_adainfer.readers.base import HEAD, Reader
from lm_eval_adainfer.strategies.base import Stopper
from lm_eval_adainfer.structure.anatomy import Anatomy


class FlopCounter:
    """Counts what a forward of ``anatomy`` with ``stopper`` really applies; padding is nobody's and not counted."""

    def __init__(self, anatomy: Anatomy, stopper: Stopper, reader: Reader = HEAD):
        self.n_blocks = anatomy.n_blocks
        self.n_whole = len(anatomy.whole_weights)  # L, dropped blocks included
        self._whole_weights, self._whole_widths = sum(anatomy.whole_weights), sum(anatomy.whole_widths)
        self._hidden = anatomy.block_hidden_size
        self._vocab = anatomy.vocab_size
        self._weights = [0, *accumulate(anatomy.block_weights)]
        self._widths = [0, *accumulate(anatomy.attention_width)]
        self._head_row = 2 * anatomy.vocab_size * anatomy.hidden_size
        self._head_width = anatomy.hidden_size
        self._stopper = stopper.flops
        self.reader = reader
        self.stored_weights: list[int] = []  # per block, of the maps that lead to its keys and values
        self.copied_weights: list[int] = []  # the same for ``copy``, which leaves out maps that these don't depend on

    def blocks(self, depth: int, tokens: int, pairs: int | None = None) -> float:
        """Blocks 1..depth over ``tokens`` tokens: 2 x weights x tokens + 4 x (query x key pairs) x heads' width.

        Args:
            depth: k.
            tokens: Tokens run.
            pairs: Query-key pairs; by default the causal ones of one sequence, tokens (tokens + 1) / 2.
        """
        if pairs is None:
            pairs = tokens * (tokens + 1) // 2
        return 2.0 * self._weights[depth] * tokens + 4.0 * pairs * self._widths[depth]

    def dense(self, tokens: int) -> float:
        """All L blocks of the whole model over one sequence of ``tokens`` tokens."""
        return 2.0 * self._whole_weights * tokens + 2.0 * tokens * (tokens + 1) * self._whole_widths

    def block(self, k: int, tokens: int, pairs: int) -> float:
        """Block k alone."""
        return self.blocks(k, tokens, pairs) - self.blocks(k - 1, tokens, pairs)

    def read(self, k: int, prompt: int, positions: int) -> float:
        """What a reader computes after block k for one row, head rows not included.

        Args:
            k: The block.
            prompt: Tokens of the prompt.
            positions: Positions that were read: the prompt's last and those behind it.
        """
        if not self.reader.runs_tokens:
            return float(self.reader.flops(k) * positions)
        run = self.run_on(prompt, positions)
        if self.reader.kind == "sim":
            return self.blocks(self.n_blocks, run) - self.blocks(k, run)
        away = prompt + positions - 1 - run  # tokens of which keys and values alone are made
        pairs = sum(range(away + 1, away + run + 1))
        whole = self.blocks(self.n_blocks, run, pairs) - self.blocks(k, run, pairs)
        return whole + self.copied(k, away)

    def copied(self, k: int, tokens: int) -> float:
        """Keys and values of all blocks behind k alone: 2 x the weights that they need x tokens."""
        return 2.0 * sum(self.copied_weights[k:]) * tokens

    def run_on(self, prompt: int, positions: int) -> int:
        """Tokens of a row that run through the later blocks when it is read at so many positions."""
        if not self.reader.runs_tokens:
            return 0
        return min(self.reader.width, prompt) + positions - 1

    def head(self, rows: int) -> float:
        """2Vh per head row."""
        return float(self._head_row * rows)

    def stored(self, k: int, tokens: int) -> float:
        """Keys and values of block k alone: 2 x the weights that lead to them x tokens."""
        return 2.0 * self.stored_weights[k - 1] * tokens if tokens else 0.0

    def screened(self, logits: int) -> float:
        """2h per logit that was computed for a candidate alone."""
        return 2.0 * self._head_width * logits

    def decisions(self, n: int) -> float:
        """N decisions of the stopper."""
        return float(self._stopper * n)

    def flops_ratio(self, layer: float, prompt_tokens: float) -> float:
        """The paper's Eq. 2, of the whole model."""
        return flops_ratio(layer, self.n_whole, self._hidden, prompt_tokens, self._vocab)


Number = TypeVar("Number", float, np.ndarray)


def flops_ratio(layer: Number, n_blocks: int, hidden: int, prompt_tokens: Number, vocab: int) -> Number:
    """The paper's Eq. 2: (2l(6h+s)+V) / (2L(6h+s)+V); it leaves out the per-block head checks."""
    per_block = 2 * (6 * hidden + prompt_tokens)
    return (layer * per_block + vocab) / (n_blocks * per_block + vocab)
