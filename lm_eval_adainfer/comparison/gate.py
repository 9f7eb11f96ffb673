"""The verdict of a regression gate: pass, fail or inconclusive, with error rates that hold.

- *pass*: the exact test rejects "the pool dropped by ``max_drop`` or more" at 5%, and "by far more than that" at 0.1%:
  by two points more, or three times ``max_drop`` where that is larger. The second part matters only where answers flip
  so often that the first alone would let one in a hundred drops of that size through.
- *fail*: a drop of more than ``max_drop`` is established, with at most 5% error over everything that can fail: 4% for
  the pool and 1% for the tasks, shared by Holm's method; all 5% for the pool of a run of one task.
- *inconclusive*: neither.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lm_eval_adainfer.comparison import statistics
from lm_eval_adainfer.comparison.compare import reach, row
from lm_eval_adainfer.comparison.matching import Pairs
from lm_eval_adainfer.errors import AdaInferError

PASS, FAIL, INCONCLUSIVE = "pass", "fail", "inconclusive"
ERROR = 0.05  # of passing, and of failing, wrongly
POOL_SHARE = 0.8  # of the error of failing; the rest is the guards'
FAR, FAR_TIMES, FAR_ERROR = 0.02, 3, 0.001  # a drop far above the limit must practically never pass


@dataclass(frozen=True)
class Guard:
    """One task's own test."""

    task: str
    metric: str
    documents: int
    drop: float
    lower: float  # two-sided 95% interval, to look at
    upper: float
    p_holm: float  # of "dropped by max_drop or less"
    failed: bool


@dataclass(frozen=True)
class Verdict:
    """What the gate says and why."""

    status: str
    reasons: list[str]
    dropped: bool  # the pool's drop is established to be above max_drop
    within: bool  # it is established to be at most max_drop
    pool: str
    metric: str
    max_drop: float
    documents: int
    baseline: float
    candidate: float
    drop: float
    lower: float  # one-sided bound at lower_level
    upper: float  # one-sided bound at upper_level
    lower_level: float
    upper_level: float
    discordant: int | None  # None where the metric is no right-or-wrong
    documents_needed: int | None
    pruning_ratio: float | None
    min_pruning: float | None
    guards: list[Guard]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def judge(
    pairs: Sequence[Pairs],
    pool: Sequence[str],
    max_drop: float,
    min_pruning: float | None = None,
    name: str = "all documents",
) -> Verdict:
    """Judge a candidate.

    Args:
        pairs: All tasks; each has a guard.
        pool: The tasks whose documents are pooled.
        max_drop: The largest drop that is allowed, in the metric's unit: one point of accuracy is 0.01.
        min_pruning: The least mean ``pruning_ratio`` of the pool.
        name: Of the pool.

    Raises:
        AdaInferError: On limits that make no sense for these runs.
    """
    pooled = [p for p in pairs if p.task in set(pool)]
    drops = np.concatenate([p.drops for p in pooled])
    unit = max(_reach(p) for p in pooled)
    if not math.isfinite(max_drop) or max_drop < 0 or (max_drop >= 1 and unit <= 1):
        raise AdaInferError(f"max-drop: {max_drop:g} is no share from 0 to below 1; one point of accuracy is 0.01")
    if min_pruning is not None and not 0 <= min_pruning < 1:
        raise AdaInferError(f"min-pruning: {min_pruning:g} is no share from 0 to below 1; 15% is 0.15")
    seen = row(name, "pooled", pooled)
    if min_pruning is not None and seen.pruning_ratio is None:
        raise AdaInferError("min-pruning: the candidate logged no pruning_ratio; give a run of --model adainfer")

    lower_level = 1 - ERROR * (POOL_SHARE if len(pairs) > 1 else 1)
    binary = all(p.binary for p in pooled)
    lower, upper = _bounds(drops, binary, unit, lower_level, max_drop)
    guards = _guards(pairs, max_drop) if len(pairs) > 1 else []
    far = max(max_drop + FAR * unit, FAR_TIMES * max_drop)
    within = _p_above(drops, binary, unit, max_drop) <= ERROR and _p_above(drops, binary, unit, far) <= FAR_ERROR

    dropped = _p_below(drops, binary, unit, max_drop) <= 1 - lower_level + 1e-12

    reasons = []
    if dropped:
        sure = f"by at least {lower:.4f} ({lower_level:.0%} one-sided)"
        reasons.append(f"{name} dropped by more than {max_drop:g}: {sure}")
    for guard in guards:
        if guard.failed:
            seen_there = f"seen are {guard.drop:.4f} (Holm's p {guard.p_holm:.2g})"
            reasons.append(f"task {guard.task} dropped by more than {max_drop:g}: {seen_there}")
    if min_pruning is not None and seen.pruning_ratio is not None and seen.pruning_ratio < min_pruning - 1e-12:
        reasons.append(f"pruning_ratio is {seen.pruning_ratio:.4f}, under {min_pruning:g}")
    status = FAIL if reasons else PASS if within else INCONCLUSIVE
    needed = None
    if status == PASS:
        reasons.append(f"{name} dropped by at most {upper:.4f} (95% one-sided), allowed are {max_drop:g}")
    elif status == INCONCLUSIVE:
        needed = _needed(drops, max_drop, far)
        reasons.append(_advice(name, lower, upper, max_drop, far, needed))
    return Verdict(
        status=status,
        reasons=reasons,
        dropped=dropped,
        within=within,
        pool=name,
        metric=seen.metric,
        max_drop=max_drop,
        documents=len(drops),
        baseline=seen.baseline,
        candidate=seen.candidate,
        drop=float(drops.mean()),
        lower=lower,
        upper=upper,
        lower_level=lower_level,
        upper_level=1 - ERROR,
        discordant=int(np.count_nonzero(drops)) if binary else None,
        documents_needed=needed,
        pruning_ratio=seen.pruning_ratio,
        min_pruning=min_pruning,
        guards=guards,
    )


def _guards(pairs: Sequence[Pairs], max_drop: float) -> list[Guard]:
    raw = [_p_below(p.drops, p.binary, _reach(p), max_drop) for p in pairs]
    found = []
    for pair, p_holm in zip(pairs, statistics.holm(raw), strict=True):
        drops, n = pair.drops, len(pair.drops)
        if pair.binary:
            interval = statistics.tango_interval(int((drops > 0).sum()), int((drops < 0).sum()), n)
        else:
            interval = statistics.t_interval(drops, reach=_reach(pair))
        failed = p_holm <= ERROR * (1 - POOL_SHARE)
        found.append(
            Guard(pair.task, pair.metric, n, interval.drop, interval.lower, interval.upper, p_holm, failed)
        )
    return found


def _reach(pair: Pairs) -> float:
    return reach(pair.baseline, pair.candidate)


def _p_above(drops: np.ndarray, binary: bool, unit: float, limit: float) -> float:
    """P of "the true drop is ``limit`` or more"."""
    if binary:
        return statistics.exact_p(int((drops > 0).sum()), int((drops < 0).sum()), len(drops), limit)
    return statistics.t_p(drops, limit, unit)


def _p_below(drops: np.ndarray, binary: bool, unit: float, limit: float) -> float:
    return _p_above(-drops, binary, unit, -limit)


def _bounds(drops: np.ndarray, binary: bool, unit: float, lower_level: float, at: float) -> tuple[float, float]:
    if not binary:
        return (
            statistics.t_interval(drops, 2 * lower_level - 1, unit).lower,
            statistics.t_interval(drops, 1 - 2 * ERROR, unit).upper,
        )
    lost, won, n = int((drops > 0).sum()), int((drops < 0).sum()), len(drops)
    return (
        statistics.exact_bound(lost, won, n, lower_level, False, at),
        statistics.exact_bound(lost, won, n, 1 - ERROR, True, at),
    )


def _needed(drops: np.ndarray, max_drop: float, far: float) -> int | None:
    seen = len(drops), float(drops.mean()), float(drops.var())
    needed = statistics.documents_needed(*seen, max_drop, ERROR)
    if seen[1] >= max_drop or needed is None:
        return needed
    also = statistics.documents_needed(*seen, far, FAR_ERROR)
    return None if also is None else max(needed, also)


def _advice(name: str, lower: float, upper: float, max_drop: float, far: float, needed: int | None) -> str:
    text = f"{name} dropped by {lower:.4f} to {upper:.4f}, and {max_drop:g} lies in between"
    if upper <= max_drop:
        text = f"answers of {name} flip so often that a drop of {far:g} can't be ruled out well enough"
    if needed is None:
        return f"{text}; the drop seen is so near the limit that no number of documents would settle it"
    return f"{text}; at the discordance seen, about {needed:,} documents would settle it (with 80% probability)"
