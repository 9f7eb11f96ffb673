"""The thresholds that calibration tests: fixed before it looks at a document, or its promise would not hold.

They are the quantiles of scores on the *fitting* documents, which the stopper's file holds (``fit`` notes them) or
other traces give. Where there are none, as for a rule, it is a grid of round numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch

from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.strategies.base import Stopper
from lm_eval_adainfer.traces.documents import TracedDocuments
from lm_eval_adainfer.traces.margins import asked, margins

KEY = "score_quantiles"  # in a stopper's info
NEVER = float(np.finfo(np.float32).max)  # as a threshold of unbounded margins: it never stops
_QUANTILES = 64  # of the documents' greatest scores, and of all scores
_MOST = 2000  # decisions whose scores are noted while fitting


def require_threshold(stopper: Stopper) -> None:
    """Raise AdaInferError where a strategy has no threshold to choose."""
    if not isinstance(stopper.parameters().get("threshold"), float):
        raise AdaInferError(
            f"stopper: {stopper.kind} has no threshold to choose; give a stopper file or a rule like gap:0.8"
        )


def grid(stopper: Stopper) -> tuple[np.ndarray, str]:
    """[G] thresholds from never stopping to ever looser, and what they are.

    Raises:
        AdaInferError: Where the strategy has no threshold, or its file holds no scores that it could have noted.
    """
    require_threshold(stopper)
    noted = stopper.info.get(KEY)
    if noted is None:
        return _round(stopper), "round numbers"
    is_list = isinstance(noted, list) and all(isinstance(x, (int, float)) and np.isfinite(x) for x in noted)
    if not is_list or not noted:
        raise AdaInferError(f"stopper: the {KEY} of its file are {noted!r:.60}; fit it again")
    return _descending(stopper, np.array(noted, dtype=float)), "scores of the documents it was fitted on"


def grid_of(stopper: Stopper, traces: Sequence[TracedDocuments], check_layers: object = None) -> np.ndarray:
    """[G] thresholds from never stopping to ever looser, from scores on other documents than the calibration ones.

    Args:
        stopper: The strategy; its own threshold does not matter.
        traces: The documents.
        check_layers: As in a run.
    """
    require_threshold(stopper)
    free = _bare(stopper)
    scores = [
        t.together(margins(free, t.meta, t.arrays, asked(free, t.meta, check_layers=check_layers))) for t in traces
    ]
    return _descending(stopper, _quantiles(np.concatenate(scores)))


def of_examples(stopper: Stopper, x: np.ndarray, blocks: Sequence[int]) -> list[float]:
    """What ``fit`` notes: quantiles of the scores of the decisions that a strategy was fitted on.

    Args:
        stopper: The strategy.
        x: [decisions, blocks, features].
        blocks: Their numbers.
    """
    free = _bare(stopper)
    values = torch.from_numpy(x[:: -(-len(x) // _MOST)]).float()
    memory = torch.zeros(len(values), stopper.memory) if stopper.memory else None
    scores = [free.margin(k, values[:, i], memory).double().numpy() for i, k in enumerate(blocks)]
    return _quantiles(np.stack(scores, axis=1)).tolist()


def _bare(stopper: Stopper) -> Stopper:
    """The strategy with margins that are bare scores."""
    free = copy.copy(stopper)
    free.threshold = 0.0  # type: ignore[attr-defined]
    return free


def _quantiles(scores: np.ndarray) -> np.ndarray:
    """Of [decisions, blocks]: at the greatest scores decisions begin to stop, at all of them they stop sooner."""
    told = scores[np.isfinite(scores).any(axis=1)]
    shares = np.linspace(0, 1, _QUANTILES)
    if not len(told):
        return np.zeros(1)
    is_known = np.isfinite(told)
    greatest = np.where(is_known, told, -np.inf).max(axis=1)
    return np.unique(np.concatenate([np.quantile(values, shares) for values in (greatest, told[is_known])]))


def _descending(stopper: Stopper, scores: np.ndarray) -> np.ndarray:
    if stopper.kind == "svm":
        return np.array([NEVER, *np.unique(scores[scores < NEVER])[::-1]])
    # in float32's numbers, so that a stopper that computes in float32 compares with the same threshold
    looser = np.unique(scores.astype(np.float32).astype(float))[::-1]
    return np.array([1.0, *looser[(looser >= 0) & (looser < 1)]])


def _round(stopper: Stopper) -> np.ndarray:
    if stopper.kind == "svm":  # the margin is at 1, most examples are between -2 and 3
        return np.array([NEVER, *np.round(np.linspace(4, -2, 241), 3)])
    close = 1 - np.geomspace(1e-4, 0.1, 60, endpoint=False)  # probabilities and gaps crowd near 1
    return np.concatenate([[1.0], close, np.linspace(0.9, 0, 91)]).astype(np.float32).astype(float)
