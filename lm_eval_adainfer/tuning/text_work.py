"""What generated texts cost where prompts or tokens leave early, counted from traces; exits are *simulated*.

As in ``work.py``: multiplications of the blocks' linear maps, of reading, of the head's rows and of the stopper, with
attention's pairs left out on both sides of a ratio.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from lm_eval_adainfer.readers.base import Reader
from lm_eval_adainfer.strategies.base import Stopper
from lm_eval_adainfer.traces.documents import TracedDocuments
from lm_eval_adainfer.tuning.work import Work


def with_new_tokens(
    work: Work,
    views: Sequence[TracedDocuments],
    reader: Reader,
    new: Mapping[tuple[str, int], int],
    stored: Sequence[float],
) -> Work:
    """The work of prompts with that of their texts, whose tokens run all blocks.

    Args:
        work: Of these documents' prompts, and of the head's row that gives the first new token.
        views: The documents.
        reader: Under which prompts leave. Under ``sim`` the keys and values of a prompt's tokens are made where it
            leaves; under ``copy`` that is reading.
        new: (task, document) to its number of new tokens.
        stored: Per block, the weights that make keys and values.
    """
    counts = np.concatenate([[new[view.meta["task"], i] for i in view.doc_ids.tolist()] for view in views])
    prompt = np.concatenate([view.prompt_tokens for view in views])
    meta = views[0].meta
    each = float(sum(meta["block_weights"]) + meta["hidden_size"] * meta["vocab_size"])
    blocks = work.blocks + ((counts - 1) * each)[:, None]
    if reader.kind == "sim":
        behind = np.append(np.cumsum(np.array(stored, dtype=float)[::-1])[::-1], 0.0)  # of blocks k+1..L
        blocks = blocks + prompt[:, None] * behind
    return replace(work, blocks=blocks)


@dataclass(frozen=True)
class TokenWork(Work):
    """Of D new tokens, text after text and in order, each of which leaves on its own.

    A block runs a token if that token, or with ``kv_policy=recompute`` a later one of its text, gets there. With
    ``propagate`` the block only makes the token's keys and values for later ones. The prompt is run as deep as its
    text's deepest token.

    Attributes:
        text: [D], the text of each, from 0.
        prompt: [texts], tokens of each prompt.
        filling: [L + 1], what blocks 1..k come to for a token that left before.
    """

    text: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=int))
    prompt: np.ndarray = field(default_factory=lambda: np.zeros(0))
    filling: np.ndarray = field(default_factory=lambda: np.zeros(0))

    @classmethod
    def of_tokens(
        cls,
        views: Sequence[TracedDocuments],
        reader: Reader,
        stopper: Stopper,
        stored: Sequence[float] | None,
    ) -> TokenWork:
        """The work of the new tokens of some traces.

        Args:
            views: The traces.
            reader: Under which the stopper is asked; one that reads every token on its own.
            stopper: The stopper.
            stored: Per block, the weights that make keys and values (``propagate``); None: a block is run
                (``recompute``).
        """
        plain = Work.of(views, reader, stopper)
        weights = np.concatenate([[0.0], np.cumsum(views[0].meta["block_weights"], dtype=float)])
        text = texts_of(views)
        first = np.concatenate([view.arrays["position"] for view in views]) == 0
        prompt = np.concatenate([view.arrays["prompt_tokens"] for view in views])[first].astype(float)
        filling = weights if stored is None else np.concatenate([[0.0], np.cumsum(stored, dtype=float)])
        blocks = np.tile(weights, (len(text), 1))
        return cls(blocks, plain.ask, plain.head, plain.check_is_head, text, prompt, filling)

    @property
    def dense(self) -> np.ndarray:
        """[D]; a prompt's work is its text's first token's."""
        found = self.blocks[:, -1] + self.head
        found[self._first] += (self.prompt - 1) * self.blocks[0, -1]
        return found

    def at(self, exit_layer: np.ndarray, asked: Sequence[int]) -> np.ndarray:
        """[D], the work of tokens that leave after these blocks ([D]), asked after some blocks."""
        found, deepest = super().at(exit_layer, asked), self._deepest(exit_layer)
        found += self.filling[deepest] - self.filling[exit_layer]
        found[self._first] += (self.prompt - 1) * self.blocks[0][deepest[self._first]]
        return found

    @property
    def _first(self) -> np.ndarray:
        return np.flatnonzero(np.diff(self.text, prepend=-1))

    def _deepest(self, exit_layer: np.ndarray) -> np.ndarray:
        """[D], how deep the text goes from each token on."""
        steps = (self.text.max() - self.text) * (self.ask.shape[1] + 1)  # a text is not touched by those behind it
        return np.maximum.accumulate((exit_layer + steps)[::-1])[::-1] - steps


def texts_of(views: Sequence[TracedDocuments]) -> np.ndarray:
    """[D], the text of every token of some traces, numbered in order from 0."""
    return np.cumsum(np.concatenate([view.arrays["position"] for view in views]) == 0) - 1
