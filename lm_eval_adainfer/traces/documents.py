"""A trace seen as documents: what each would have answered after every block, and what an exit there costs it.

The rules are those of real runs (``docs/numbers.md``, "One decision per document"). A document of several contexts
stops where the strategy says stop at all of them, and its answer is the choice of greatest log-probability. Tasks of
one continuation are right where greedy decoding gives the whole gold answer (``acc``); their answer is the top token
together with whether that is so, since a trace does not hold what else greedy decoding would give. In generated text
every new token leaves on its own, and there is no gold answer. Everything computed from these is *simulated*.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.traces import views
from lm_eval_adainfer.traces.file import read_of_one_model

ORACLES = ("oracle:stable", "oracle:first")


@dataclass
class TracedDocuments:
    """The documents of one trace file under one reader, of N decisions, L blocks and D documents.

    In generated text a token leaves on its own, so there each of the D "documents" is a token of a text. After blocks
    that were not recorded under the reader (``views``) nobody knows the answer: it is -1, and right is NaN.

    Attributes:
        path: The file, for messages.
        meta: The file's.
        arrays: The file's.
        doc_ids: [D], a document's index in its split; in generated text that of a token's text.
        owner: [N], the document that each of the file's decisions belongs to.
        first: [D], the first decision of every document.

    Raises:
        AdaInferError: Where the trace holds no decision or lacks an array.
    """

    path: Path
    meta: dict[str, Any]
    arrays: dict[str, np.ndarray]
    doc_ids: np.ndarray = field(init=False)
    owner: np.ndarray = field(init=False)
    first: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        n = len(self.arrays["top_token"])
        if n == 0:
            raise AdaInferError(
                f"traces: {self.path} is empty: it has no decision; trace documents that have a context"
            )
        needed = ["doc_id", *(["request", "scores", "gold"] if self.has_choices else [])]
        if missing := [name for name in needed if name not in self.arrays]:
            raise AdaInferError(f"traces: {self.path} is incomplete: it has no array {missing[0]}; trace again")
        if self.generated:
            self.doc_ids, self.first = self.arrays["doc_id"], np.arange(n)
            self.owner = self.first
        else:
            found = np.unique(self.arrays["doc_id"], return_index=True, return_inverse=True)
            self.doc_ids, self.first, self.owner = found

    @property
    def n_blocks(self) -> int:
        """L."""
        return self.meta["n_blocks"]

    @property
    def reader(self) -> str:
        """The name of the reader."""
        return views.reader_of(self.meta)

    @property
    def blocks(self) -> list[int]:
        """The recorded blocks, in order; L is the last."""
        return views.recorded_blocks(self.meta)

    @cached_property
    def at(self) -> np.ndarray:
        """The places of the recorded blocks on axes of L."""
        return np.array(self.blocks) - 1

    def under(self, reader: str) -> TracedDocuments:
        """The same documents under another recorded reader.

        Raises:
            AdaInferError: Where it was not recorded.
        """
        if reader == self.reader:
            return self
        return TracedDocuments(self.path, *views.under(self.path, self.meta, self.arrays, reader))

    @property
    def generated(self) -> bool:
        """Whether these are the tokens of generated texts."""
        return self.meta["output_type"] == "generate_until"

    @property
    def has_choices(self) -> bool:
        """Whether an answer is one of several choices."""
        return self.meta["output_type"] == "multiple_choice"

    @property
    def first_token_only(self) -> bool:
        """Whether there is one continuation, of which a trace of older make knows the first token alone."""
        return not self.has_choices and not self.generated and "greedy" not in self.arrays

    @property
    def setting(self) -> tuple[str, int, str]:
        """Task, shots, split."""
        return self.meta["task"], self.meta["num_fewshot"], self.meta["split"]

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.meta['task']} at {self.meta['num_fewshot']} shots, split {self.meta['split']}"

    @cached_property
    def scores(self) -> np.ndarray:
        """[D, L, R], log-probability of request r of the document after every block; -inf where there is none."""
        request, scores = self.arrays["request"], self.arrays["scores"]
        found = np.full((len(self.doc_ids), self.n_blocks, max(1, int(request.max(initial=0)) + 1)), -np.inf)
        for column in range(request.shape[1]):
            has = request[:, column] >= 0
            found[self.owner[has], :, request[has, column]] = scores[has, :, column]
        return found

    @cached_property
    def answers(self) -> np.ndarray:
        """[D, L], what would be answered after every block, as a number that is equal where the answers are.

        Raises:
            AdaInferError: As :meth:`require_scores`.
        """
        self.require_scores()
        found = np.full((len(self.doc_ids), self.n_blocks), -1)
        if self.has_choices:
            found[:, self.at] = self.scores[:, self.at].argmax(axis=-1)  # the first of equals, as lm-eval takes it
            return found
        top = self.arrays["top_token"].astype(np.int64)
        if "greedy" in self.arrays and not self.generated:
            top = 2 * top + self.arrays["greedy"][:, :, 0]
        found[:, self.at] = top[self.first][:, self.at]
        return found

    def require_scores(self) -> None:
        """Raise AdaInferError where the score of a request is NaN: then nobody knows what would be answered."""
        scores, request = self.arrays.get("scores"), self.arrays.get("request")
        if scores is None or request is None:
            return
        if np.isnan(scores[:, self.at].transpose(0, 2, 1)[request >= 0]).any():
            raise AdaInferError(f"traces: {self.path} holds NaN scores; trace in a dtype that does not overflow")

    @cached_property
    def gold(self) -> np.ndarray:
        """[D], the (first) right choice, or the first token of the one right answer; -1 where there is none."""
        if self.generated:
            return np.full(len(self.doc_ids), -1)
        return self.arrays["gold" if self.has_choices else "gold_token"][self.first]

    @cached_property
    def right(self) -> np.ndarray:
        """[D, L] float, whether the task's ``acc`` would count the answer; NaN where nothing tells."""
        unknown = np.full(self.answers.shape, np.nan)
        if self.generated or self.first_token_only:
            return unknown
        if not self.has_choices:
            return self._known(self.arrays["greedy"][self.first, :, 0].astype(float))
        request = self.arrays["request"]
        flags = self.arrays["right"] > 0 if "right" in self.arrays else request == self.arrays["gold"][:, None]
        good = np.zeros((len(self.doc_ids), self.scores.shape[-1]), dtype=bool)  # a task may have several right choices
        rows, columns = np.nonzero(flags & (request >= 0))
        good[self.owner[rows], request[rows, columns]] = True
        return self._known(np.take_along_axis(good, self.answers, axis=1).astype(float)) if good.any() else unknown

    @cached_property
    def top1(self) -> np.ndarray:
        """[D, L] float, whether the top token is the gold answer's first; NaN where nothing tells."""
        gold, unknown = self.arrays["gold_token"], np.full(self.answers.shape, np.nan)
        several = len(self.owner) != len(self.doc_ids)  # choices that are contexts share one continuation
        if self.generated or several:
            return unknown
        found = (self.arrays["top_token"] == gold[:, None]).astype(float)
        found[gold < 0] = np.nan
        return self._known(found[self.first])

    def _known(self, values: np.ndarray) -> np.ndarray:
        """[D, L] floats, NaN after blocks that were not recorded."""
        found = np.full_like(values, np.nan)
        found[:, self.at] = values[:, self.at]
        return found

    @property
    def hits(self) -> np.ndarray:
        """[D, L] float: ``right``, or ``top1`` where the trace knows no more than the first token."""
        return self.top1 if self.first_token_only else self.right

    @cached_property
    def prompt_tokens(self) -> np.ndarray:
        """[D], mean over the document's decisions."""
        return np.bincount(self.owner, self.arrays["prompt_tokens"]) / np.bincount(self.owner)

    def together(self, margins: np.ndarray) -> np.ndarray:
        """[D, L]: of the decisions' margins ([N, L]) the least; NaN where a decision is not asked."""
        found = np.full((len(self.doc_ids), margins.shape[1]), np.inf)
        np.minimum.at(found, self.owner, margins)
        return found

    def oracle(self, name: str) -> np.ndarray:
        """[D, L], 1 where the oracle (one of ``ORACLES``) stops, -1 elsewhere; it knows the recorded blocks."""
        if name == "oracle:stable":
            return np.where(self.stable, 1.0, -1.0)
        found = np.full(self.answers.shape, -1.0)
        found[:, self.at] = np.where(self.answers[:, self.at] == self.answers[:, -1:], 1.0, -1.0)
        return found

    @cached_property
    def stable(self) -> np.ndarray:
        """[D, L] bool: whether the answer after a recorded block is the last's, and so are all recorded after it."""
        found = np.zeros(self.answers.shape, dtype=bool)
        found[:, self.at] = stable(self.answers[:, self.at])
        return found

    def losses(self, kind: str, exit_layer: Sequence[int] | np.ndarray) -> np.ndarray:
        """Losses of whole documents or texts: 0 and 1, in the order of ``np.unique(doc_ids)``.

        Args:
            kind: ``gold``: 1 where the dense answer was right and the one at the exit is not. ``accuracy``: that, and
                -1 where the one at the exit is right and the dense answer was not. ``agreement``: 1 where they differ;
                a generated text differs where any of its tokens does.
            exit_layer: [D].
        """
        exit_layer = np.asarray(exit_layer)
        values = self.answers if kind == "agreement" else self.hits > 0  # unknown is not right
        dense, early = values[:, -1], at_exit(values, exit_layer)
        if kind == "accuracy":
            lost = dense.astype(int) - early.astype(int)
        else:
            lost = dense & ~early if kind == "gold" else dense != early
        _, text = np.unique(self.doc_ids, return_inverse=True)
        return np.bincount(text, weights=lost).clip(max=1)


def read(files: Sequence[str | Path], reader: str = views.HEAD) -> list[TracedDocuments]:
    """The documents of trace files of one model, under a reader.

    Raises:
        AdaInferError: On a file that is damaged, empty or incomplete, of another model than the first, or without the
            reader.
    """
    return [TracedDocuments(*found) for found in read_of_one_model(files, reader)]


def stable(answers: np.ndarray) -> np.ndarray:
    """[D, L] bool: whether the answer after a block is the last block's and so are all after it."""
    same = answers == answers[:, -1:]
    return np.logical_and.accumulate(same[:, ::-1], axis=1)[:, ::-1]


def exits(margins: np.ndarray, threshold: float = 0.0) -> np.ndarray:
    """[D] ints from 1: the first block whose margin exceeds the threshold (NaN, not asked, never does), else L."""
    stops = margins > threshold
    stops[:, -1] = True
    return stops.argmax(1) + 1


def at_exit(values: np.ndarray, exit_layer: np.ndarray) -> np.ndarray:
    """[D], of values after every block ([D, L]) those after these blocks."""
    return values[np.arange(len(values)), exit_layer - 1]
