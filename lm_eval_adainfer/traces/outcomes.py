"""What a trace says about its documents: their answers after every block, and how clearly a stopper would stop there.

The rules are those of real runs (``docs/numbers.md``, "One decision per document"): a document of several contexts
stops where the strategy says stop at all of them, and its answer is the choice of greatest log-probability. Tasks of
one continuation answer with the top token, and are right where greedy decoding gives the whole gold answer (``acc``).
In generated text every new token is a decision of its own, and a document is its text. Everything computed from these
is *simulated*.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lm_eval_adainfer.errors import AdaInferError


@dataclass
class Outcomes:
    """D decisions of a trace's documents.

    Attributes:
        answer: [D, L], the answer after every block: a choice's number or a token.
        gold: [D], the gold one, -1 where there is none.
        document: [D], the index of the decision's document in its split.
        instance: [N], to which decision a trace's instance belongs.
        right: [D, L] bool, whether ``acc`` would count the answer.
        whole: False where a trace of older make knows no more of an answer than its first token.
    """

    answer: np.ndarray
    gold: np.ndarray
    document: np.ndarray
    instance: np.ndarray
    right: np.ndarray
    whole: bool = True

    def of_decisions(self, margins: np.ndarray) -> np.ndarray:
        """[D, L]: of the instances' margins ([N, L]) the least; NaN (not asked) becomes minus infinity."""
        found = np.full(self.answer.shape, np.inf)
        np.minimum.at(found, self.instance, np.where(np.isnan(margins), -np.inf, margins))
        return found


def outcomes(meta: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Outcomes:
    """The decisions of a trace.

    Raises:
        AdaInferError: Where it is empty, lacks an array, or a score is NaN.
    """
    top = arrays["top_token"]
    if len(top) == 0:
        raise AdaInferError(f"traces: the trace of {meta['task']} holds no document; trace some")
    needed = ["doc_id"] + ["request", "scores", "gold"] * (meta["output_type"] == "multiple_choice")
    if missing := [name for name in needed if name not in arrays]:
        raise AdaInferError(f"traces: the trace of {meta['task']} has no array {missing[0]}; make it again")
    if meta["output_type"] == "generate_until":
        unknown = np.full(len(top), -1)
        return Outcomes(top, unknown, arrays["doc_id"], np.arange(len(top)), np.zeros(top.shape, dtype=bool))
    documents, first, instance = np.unique(arrays["doc_id"], return_index=True, return_inverse=True)
    if meta["output_type"] != "multiple_choice":
        gold = arrays["gold_token"][first]
        whole = "greedy" in arrays
        right = arrays["greedy"][first, :, 0] > 0 if whole else top[first] == gold[:, None]
        return Outcomes(top[first], gold, documents, instance, right, whole)
    rows, columns = np.nonzero(arrays["request"] >= 0)
    scores = arrays["scores"][rows, :, columns]  # [requests, L]
    if np.isnan(scores).any():
        raise AdaInferError(f"traces: the trace of {meta['task']} holds NaN scores; trace again in float32")
    choices = np.full((len(documents), top.shape[1], arrays["request"].max() + 1), -np.inf)
    choices[instance[rows], :, arrays["request"][rows, columns]] = scores
    answer, gold = choices.argmax(-1), arrays["gold"][first]
    good = np.zeros(choices.shape[::2], dtype=bool)  # a task may have several right choices
    flags = arrays["right"] > 0 if "right" in arrays else arrays["request"] == arrays["gold"][:, None]
    good[instance[rows], arrays["request"][rows, columns]] = flags[rows, columns]
    return Outcomes(answer, gold, documents, instance, np.take_along_axis(good, answer, axis=1))


def stable(answer: np.ndarray) -> np.ndarray:
    """[D, L] bool: whether the answer after a block is the last block's and so are all after it."""
    same = answer == answer[:, -1:]
    return np.logical_and.accumulate(same[:, ::-1], axis=1)[:, ::-1]


def exits(margins: np.ndarray, threshold: float = 0.0) -> np.ndarray:
    """[D] ints from 1: the first block whose margin exceeds the threshold (NaN, not asked, never does), else L."""
    stops = margins > threshold
    stops[:, -1] = True
    return stops.argmax(1) + 1


def chosen(answer: np.ndarray, exit_layer: np.ndarray) -> np.ndarray:
    """[D], the answers after these blocks."""
    return answer[np.arange(len(answer)), exit_layer - 1]


def loss(found: Outcomes, kind: str, exit_layer: Sequence[int] | np.ndarray) -> np.ndarray:
    """[documents] of 0 and 1, in the order of ``np.unique(found.document)``.

    Args:
        found: A trace's.
        kind: ``gold``: 1 where the dense answer was right and the one at the exit is not. ``agreement``: 1 where they
            differ; a generated text differs where any of its tokens does.
        exit_layer: [D].
    """
    exit_layer = np.asarray(exit_layer)
    right, still = found.right[:, -1], chosen(found.right, exit_layer)
    same = (found.answer[:, -1] == chosen(found.answer, exit_layer)) & (right == still)
    lost = right & ~still if kind == "gold" else ~same
    _, of = np.unique(found.document, return_inverse=True)
    return np.bincount(of, weights=lost).clip(max=1)
