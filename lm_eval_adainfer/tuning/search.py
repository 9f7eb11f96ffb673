"""After which blocks to ask and from which score on to stop, so that least work is done at a share of losses.

The threshold that is found on some documents is not the one that calibration on others ends at: where few losses are
allowed, one document with a high score decides. So choices are compared by what is left of them after calibration on
documents that are drawn, with replacement, from those at hand (:func:`expected`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from lm_eval_adainfer.tuning.allowance import Allowance
from lm_eval_adainfer.tuning.work import Work

THRESHOLDS = 40  # that are tried, quantiles of the scores
DRAWS = 200  # of calibration documents
MOST_BLOCKS = 6  # that are chosen; a seventh has never paid


@dataclass(frozen=True)
class Choice:
    """What was chosen and what it comes to; *simulated*.

    Attributes:
        blocks: After which blocks it is asked, in order; none where nothing pays.
        threshold: Stop where the score exceeds it.
        exit_layer: [D].
        cost: The work over that of the dense model.
        lost: The share of documents that lose their answer, less that of those that win one.
        expected: The mean work, over that of the dense model, at the thresholds that calibration would end at.
    """

    blocks: tuple[int, ...]
    threshold: float
    exit_layer: np.ndarray
    cost: float
    lost: float
    expected: float = 1.0


def search(
    scores: np.ndarray,
    lost: np.ndarray,
    work: Work,
    allowance: Allowance | None,
    thresholds: Sequence[float] | None = None,
    calibrates: bool = True,
    text: np.ndarray | None = None,
) -> Choice:
    """Choose threshold and blocks; for every threshold, blocks greedily, always the one that saves most.

    Of the blocks that are found so, those are taken of which most is expected to be left after calibration.

    Args:
        scores: [D, L], what a stopper says after every block; NaN where it can't be asked.
        lost: [D, L], 1 where a document that leaves after a block loses its answer, -1 where it wins one.
        work: Of these documents.
        allowance: What calibration documents will allow; None where no loss is allowed and nothing will be calibrated.
        thresholds: That are tried; by default quantiles of the scores.
        calibrates: Whether the threshold will be calibrated; else the blocks are taken that save most as they are.
        text: [D], where rows are tokens, the text of each, from 0; a text loses what its worst token loses.
    """
    n, n_blocks = scores.shape
    possible = [k for k in range(1, n_blocks) if not np.isnan(scores[:, k - 1]).all()]
    nothing = Choice((), np.inf, np.full(n, n_blocks), 1.0, 0.0)
    tried = _thresholds(scores[:, [k - 1 for k in possible]]) if thresholds is None else thresholds
    best: dict[tuple[int, ...], Choice] = {(): nothing}  # of every set of blocks
    for threshold in tried:
        stops = scores > threshold  # NaN never does
        found = _blocks(stops, lost, work, allowance, possible, float(threshold), text)
        if found.blocks and (found.blocks not in best or found.cost < best[found.blocks].cost - 1e-12):
            best[found.blocks] = found
    if allowance is None or not calibrates:
        return min(best.values(), key=lambda choice: (choice.cost, choice.blocks))
    choices = [
        replace(choice, expected=expected(scores, lost, work, allowance, choice.blocks, tried, text))
        for choice in best.values()
    ]
    return min(choices, key=lambda choice: (choice.expected, choice.cost, choice.blocks))


def expected(
    scores: np.ndarray,
    lost: np.ndarray,
    work: Work,
    allowance: Allowance,
    blocks: Sequence[int],
    thresholds: Sequence[float],
    text: np.ndarray | None = None,
) -> float:
    """The mean work, over that of the dense model, where the threshold is calibrated on drawn documents.

    Thresholds are tested from the strictest on, until the first at which more is lost than is allowed.

    Args:
        scores: As :func:`search`'s.
        lost: As :func:`search`'s.
        work: As :func:`search`'s.
        allowance: As :func:`search`'s.
        blocks: After which it is asked.
        thresholds: From the strictest on.
        text: As :func:`search`'s.
    """
    if not blocks or not len(thresholds):
        return 1.0
    exits = [left(scores, blocks, threshold) for threshold in thresholds]
    loses = np.array([lost_by(lost, of, text) for of in exits])  # [T, documents]
    n = loses.shape[1]
    costs = np.array([1.0, *(work.ratio(of, blocks) for of in exits)])
    draws = np.random.default_rng(0).multinomial(allowance.documents, np.full(n, 1 / n), DRAWS).T
    fails = ~allowance.allows((loses > 0) @ draws, (loses < 0) @ draws)  # [T, draws]
    passed = np.where(fails.any(axis=0), fails.argmax(axis=0), len(exits))
    return float(costs[passed].mean())


def left(scores: np.ndarray, blocks: Sequence[int], threshold: float) -> np.ndarray:
    """[D], where documents leave that are asked after these blocks; L for those that never do."""
    exit_layer = np.full(len(scores), scores.shape[1])
    for k in sorted(blocks, reverse=True):
        exit_layer[scores[:, k - 1] > threshold] = k
    return exit_layer


def lost_by(lost: np.ndarray, exit_layer: np.ndarray, text: np.ndarray | None = None) -> np.ndarray:
    """[documents], what each loses ([D, L] losses) at these exits; a text as much as its worst token."""
    found: np.ndarray = lost[np.arange(len(lost)), exit_layer - 1]
    if text is None:
        return found
    worst = np.zeros(int(text.max()) + 1)
    np.maximum.at(worst, text, found)
    return worst


def _is_allowed(at: np.ndarray, allowance: Allowance | None) -> bool:
    """Whether as many calibration documents may lose and win as these documents do, by their shares."""
    if allowance is None:
        return not (at > 0).any()
    n = allowance.documents
    return bool(allowance.allows(np.array(n * np.mean(at > 0)), np.array(n * np.mean(at < 0))))


def _thresholds(scores: np.ndarray) -> list[float]:
    """Quantiles, from the strictest to the loosest."""
    known = scores[np.isfinite(scores)]
    if not len(known):
        return []
    found = np.unique(np.quantile(known, np.linspace(0, 1, THRESHOLDS), method="lower"))
    return [float(t) for t in found[::-1]]


def _blocks(
    stops: np.ndarray,
    lost: np.ndarray,
    work: Work,
    allowance: Allowance | None,
    possible: Sequence[int],
    threshold: float,
    text: np.ndarray | None,
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
            at = lost_by(lost, exit_layer, text)
            if _is_allowed(at, allowance):
                trials.append(Choice(asked, threshold, exit_layer, work.ratio(exit_layer, asked), float(at.mean())))
        trial = min(trials, key=lambda t: (t.cost, t.blocks), default=None)
        if trial is None or trial.cost >= best.cost - 1e-12:
            break
        best, chosen = trial, trial.blocks
    return best
