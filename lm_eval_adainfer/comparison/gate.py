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
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from lm_eval_adainfer import statistics
from lm_eval_adainfer.comparison.compare import reach, row, weights_of
from lm_eval_adainfer.comparison.matching import Pairs, main_kind
from lm_eval_adainfer.comparison.selection import listing
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
    flops_saved: float | None  # 1 - mean flops_ratio_total
    min_flops_saved: float | None
    guards: list[Guard]
    unit: str = ""  # of all drops and of max_drop, where it isn't the metric's own
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def judge(
    pairs: Sequence[Pairs],
    pool: Sequence[str],
    max_drop: float,
    min_pruning: float | None = None,
    min_flops_saved: float | None = None,
    name: str = "all documents",
) -> Verdict:
    """Judge a candidate.

    Args:
        pairs: All tasks; each has a guard, except those that are on another scale than the pool.
        pool: The tasks whose documents are pooled.
        max_drop: The largest drop that is allowed, in the metric's unit: one point of accuracy is 0.01. For
            perplexities it is in nats (``Verdict.unit``).
        min_pruning: The least mean ``pruning_ratio`` of the pool.
        min_flops_saved: The least that 1 minus its mean ``flops_ratio_total`` may be.
        name: Of the pool.

    Raises:
        AdaInferError: On limits that make no sense for these runs.
    """
    members = [p for p in pairs if p.task in set(pool)]
    if not members:
        raise AdaInferError(f"group: {name} has no task that can be compared document by document; give another")
    pooled, notes = main_kind(members)[0], []
    if others := [p for p in pairs if p.kind != pooled[0].kind]:
        pairs = [p for p in pairs if p.kind == pooled[0].kind]
        notes.append(
            f"not judged: {listing(f'{p.task} ({p.metric})' for p in others)}, on another scale than --max-drop is "
            "held against; check these by themselves with --tasks"
        )
    found, unit = _Drops.of(pooled), pooled[0].unit
    if unit and not (math.isfinite(max_drop) and max_drop >= 0):
        raise AdaInferError(f"max-drop: {max_drop:g} is no number from 0, in {unit}")
    if not unit and (not math.isfinite(max_drop) or max_drop < 0 or (max_drop >= 1 and found.reach <= 1)):
        raise AdaInferError(f"max-drop: {max_drop:g} is no share from 0 to below 1; one point of accuracy is 0.01")
    if unit:
        nats = max_drop * (math.log(2) if unit.startswith("bits") else 1)
        factor = f"{math.exp(nats):.4g}" if nats < 700 else "any number"
        notes.append(f"--max-drop is in {unit} here: {max_drop:g} allows perplexity to rise by a factor of {factor}")
    seen = row(name, "pooled", pooled)
    flops_saved = None if seen.flops_ratio_total is None else 1 - seen.flops_ratio_total
    _require_share("min-pruning", min_pruning, seen.pruning_ratio, "pruning_ratio")
    _require_share("min-flops-saved", min_flops_saved, flops_saved, "flops_ratio_total")

    lower_level = 1 - ERROR * (POOL_SHARE if len(pairs) > 1 else 1)
    lower, upper = found.bounds(lower_level, max_drop)
    guards = _guards(pairs, max_drop) if len(pairs) > 1 else []
    far = max(max_drop + FAR * found.reach, FAR_TIMES * max_drop)
    within = found.p_above(max_drop) <= ERROR and found.p_above(far) <= FAR_ERROR
    dropped = found.p_below(max_drop) <= 1 - lower_level + 1e-12
    limit = f"{max_drop:g} {unit}".rstrip()

    reasons = []
    if dropped:
        sure = f"by at least {lower:.4f} ({lower_level:.0%} one-sided)"
        reasons.append(f"{name} dropped by more than {limit}: {sure}")
    for guard in guards:
        if guard.failed:
            seen_there = f"seen are {guard.drop:.4f} (Holm's p {guard.p_holm:.2g})"
            reasons.append(f"task {guard.task} dropped by more than {limit}: {seen_there}")
    if too_little(seen.pruning_ratio, min_pruning):
        reasons.append(f"pruning_ratio is {seen.pruning_ratio:.4f}, under {min_pruning:g}")
    if too_little(flops_saved, min_flops_saved):
        reasons.append(f"flops saved are {flops_saved:.4f}, under {min_flops_saved:g}")
    status = FAIL if reasons else PASS if within else INCONCLUSIVE
    needed = None
    if status == PASS:
        reasons.append(f"{name} dropped by at most {upper:.4f} (95% one-sided), allowed are {limit}")
    elif status == INCONCLUSIVE:
        needed = found.needed(max_drop, far)
        reasons.append(_advice(name, lower, upper, max_drop, far, needed, unit))
    return Verdict(
        status=status,
        reasons=reasons,
        dropped=dropped,
        within=within,
        pool=name,
        metric=seen.metric,
        max_drop=max_drop,
        documents=len(found.drops),
        baseline=seen.baseline,
        candidate=seen.candidate,
        drop=found.mean,
        lower=lower,
        upper=upper,
        lower_level=lower_level,
        upper_level=1 - ERROR,
        discordant=int(np.count_nonzero(found.drops)) if found.binary else None,
        documents_needed=needed,
        pruning_ratio=seen.pruning_ratio,
        min_pruning=min_pruning,
        flops_saved=flops_saved,
        min_flops_saved=min_flops_saved,
        guards=guards,
        unit=unit,
        notes=notes,
    )


def too_little(found: float | None, least: float | None) -> bool:
    """Whether less than the least that is wanted was found; False where nothing is wanted, or known."""
    return found is not None and least is not None and found < least - 1e-12


def _require_share(option: str, least: float | None, found: float | None, metric: str) -> None:
    if least is None:
        return
    if not 0 <= least < 1:
        raise AdaInferError(f"{option}: {least:g} is no share from 0 to below 1; 15% is 0.15")
    if found is None:
        raise AdaInferError(f"{option}: the candidate logged no {metric}; give a run of --model adainfer")


@dataclass(frozen=True)
class _Drops:
    """What the documents of some tasks on one scale lost, and the tests that go with that scale."""

    drops: np.ndarray  # [documents]
    weights: np.ndarray | None  # [documents], in a ratio of sums
    binary: bool
    reach: float  # the largest drop that a document can show

    @classmethod
    def of(cls, pairs: Sequence[Pairs]) -> _Drops:
        """Of all their documents."""
        furthest = max(reach(p.baseline, p.candidate, p.unit) for p in pairs)
        drops = np.concatenate([p.drops for p in pairs])
        return cls(drops, weights_of(pairs), all(p.binary for p in pairs), furthest)

    @property
    def mean(self) -> float:
        """The drop seen."""
        return float(np.average(self.drops, weights=self.weights))

    @cached_property
    def draws(self) -> np.ndarray | None:
        """Of the bootstrap, sorted; None unless it is a ratio of sums."""
        return None if self.weights is None else statistics.ratio_draws(self.drops, self.weights, self.reach)

    @property
    def flips(self) -> tuple[int, int]:
        """Documents lost and won."""
        return int((self.drops > 0).sum()), int((self.drops < 0).sum())

    def p_above(self, limit: float) -> float:
        """P of "the true drop is ``limit`` or more"."""
        if self.binary:
            return statistics.exact_p(*self.flips, len(self.drops), limit)
        if self.draws is not None:
            return statistics.draws_p(self.draws, limit)
        return statistics.t_p(self.drops, limit, self.reach)

    def p_below(self, limit: float) -> float:
        """P of "the true drop is ``limit`` or less"."""
        if self.draws is not None:
            return statistics.draws_p(-self.draws, -limit)
        return _Drops(-self.drops, None, self.binary, self.reach).p_above(-limit)

    def bounds(self, lower_level: float, at: float) -> tuple[float, float]:
        """One-sided bounds, the upper at 95%; ``at`` is where a test is made that they must agree with."""
        if self.binary:
            lost, won = self.flips
            n = len(self.drops)
            return (
                statistics.exact_bound(lost, won, n, lower_level, False, at),
                statistics.exact_bound(lost, won, n, 1 - ERROR, True, at),
            )
        if self.draws is not None:
            return (
                statistics.draws_bound(self.draws, lower_level, False),
                statistics.draws_bound(self.draws, 1 - ERROR, True),
            )
        return (
            statistics.t_interval(self.drops, 2 * lower_level - 1, self.reach).lower,
            statistics.t_interval(self.drops, 1 - 2 * ERROR, self.reach).upper,
        )

    def interval(self) -> statistics.Interval:
        """Two-sided, 95%, to look at."""
        if self.binary:
            return statistics.tango_interval(*self.flips, len(self.drops))
        if self.draws is not None:
            bounds = (statistics.draws_bound(self.draws, 0.975, upper) for upper in (False, True))
            return statistics.Interval(self.mean, *bounds)
        return statistics.t_interval(self.drops, reach=self.reach)

    def needed(self, max_drop: float, far: float) -> int | None:
        """Documents that would settle it; None where no number would."""
        weights = np.ones(len(self.drops)) if self.weights is None else self.weights / self.weights.mean()
        seen = len(self.drops), self.mean, float(np.mean((weights * (self.drops - self.mean)) ** 2))
        needed = statistics.documents_needed(*seen, max_drop, ERROR)
        if self.mean >= max_drop or needed is None:
            return needed
        also = statistics.documents_needed(*seen, far, FAR_ERROR)
        return None if also is None else max(needed, also)


def _guards(pairs: Sequence[Pairs], max_drop: float) -> list[Guard]:
    by_task = [_Drops.of([p]) for p in pairs]
    found = []
    for pair, own, p_holm in zip(pairs, by_task, statistics.holm([d.p_below(max_drop) for d in by_task]), strict=True):
        interval, n = own.interval(), len(own.drops)
        failed = p_holm <= ERROR * (1 - POOL_SHARE)
        found.append(
            Guard(pair.task, pair.metric, n, interval.drop, interval.lower, interval.upper, p_holm, failed)
        )
    return found


def _advice(
    name: str, lower: float, upper: float, max_drop: float, far: float, needed: int | None, unit: str = ""
) -> str:
    text = f"{name} dropped by {lower:.4f} to {upper:.4f} {unit}".rstrip() + f", and {max_drop:g} lies in between"
    if upper <= max_drop:
        text = f"answers of {name} flip so often that a drop of {far:g} can't be ruled out well enough"
        if unit:
            text = f"documents of {name} differ so much that a drop of {far:g} {unit} can't be ruled out well enough"
    if needed is None:
        return f"{text}; the drop seen is so near the limit that no number of documents would settle it"
    return f"{text}; at the discordance seen, about {needed:,} documents would settle it (with 80% probability)"
