"""After which blocks to ask and from which score on to stop, so that least work is done at a share of losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lm_eval_adainfer.tuning.work import Work

THRESHOLDS = 40  # that are tried, quantiles of the scores
MOST_BLOCKS = 6  # that are chosen; a seventh has never paid


@dataclass(frozen=True)
class Choice:
    """What was chosen and what it comes to; *simulated*.

    Attributes:
        blocks: After which blocks it is asked, in order; none where nothing pays.
        threshold: Stop where the score exceeds it.
        exit_layer: [D].
        cost: The work over that of the dense model.
        lost: The share of documents that lose their answer.
    """

    blocks: tuple[int, ...]
    threshold: float
    exit_layer: np.ndarray
    cost: float
    lost: float


def search(
    scores: np.ndarray, lost: np.ndarray, work: Work, most_lost: float, thresholds: Sequence[float] | None = None
) -> Choice:
    """Choose threshold and blocks; for every threshold, blocks greedily, always the one that saves most.

    Args:
        scores: [D, L], what a stopper says after every block; NaN where it can't be asked.
        lost: [D, L], 1 where a document that leaves after a block loses its answer.
        work: Of these documents.
        most_lost: The greatest share of lost documents that is allowed.
        thresholds: That are tried; by default quantiles of the scores.
    """
    n, n_blocks = scores.shape
    possible = [k for k in range(1, n_blocks) if not np.isnan(scores[:, k - 1]).all()]
    best = Choice((), np.inf, np.full(n, n_blocks), 1.0, 0.0)
    for threshold in _thresholds(scores[:, [k - 1 for k in possible]]) if thresholds is None else thresholds:
        stops = scores > threshold  # NaN never does
        found = _blocks(stops, lost, work, most_lost, possible, float(threshold))
        if found.cost < best.cost - 1e-12:
            best = found
    return best


def left(scores: np.ndarray, blocks: Sequence[int], threshold: float) -> np.ndarray:
    """[D], where documents leave that are asked after these blocks; L for those that never do."""
    exit_layer = np.full(len(scores), scores.shape[1])
    for k in sorted(blocks, reverse=True):
        exit_layer[scores[:, k - 1] > threshold] = k
    return exit_layer


def share_lost(lost: np.ndarray, exit_layer: np.ndarray) -> float:
    """The share of documents ([D, L] losses) that lose their answer at these exits."""
    return float(lost[np.arange(len(lost)), exit_layer - 1].mean())


def _thresholds(scores: np.ndarray) -> list[float]:
    """Quantiles, from the strictest to the loosest."""
    known = scores[np.isfinite(scores)]
    if not len(known):
        return []
    found = np.unique(np.quantile(known, np.linspace(0, 1, THRESHOLDS), method="lower"))
    return [float(t) for t in found[::-1]]


def _blocks(
    stops: np.ndarray, lost: np.ndarray, work: Work, most_lost: float, possible: Sequence[int], threshold: float
) -> Choice:
    n, n_blocks = stops.shape
    chosen: tuple[int, ...] = ()
    best = Choice((), threshold, np.full(n, n_blocks), 1.0, 0.0)
    while len(chosen) < MOST_BLOCKS:
        trials = []
        for k in possible:
            if k in chosen:
                continue
            asked = tuple(sorted((*chosen, k)))
            exit_layer = np.where(stops[:, k - 1], np.minimum(best.exit_layer, k), best.exit_layer)
            share = share_lost(lost, exit_layer)
            if share <= most_lost:
                trials.append(Choice(asked, threshold, exit_layer, work.ratio(exit_layer, asked), share))
        trial = min(trials, key=lambda t: (t.cost, t.blocks), default=None)
        if trial is None or trial.cost >= best.cost - 1e-12:
            break
        best, chosen = trial, trial.blocks
    return best
