"""The verdict of a regression gate: pass, fail or inconclusive, with error rates that hold.

- *pass*: the pool's test (``comparison/evidence.py``) rejects "it dropped by ``max_drop`` or more" at 5%, and "by far
  more than that" at 0.5%: by two points more, or three times ``max_drop`` where that is larger. The second part matters
  only where answers flip so often that the first alone would let one in a hundred drops of that size through.
- *fail*: a drop of more than ``max_drop`` is established, with at most 5% error over everything that can fail: 4% for
  the pool and 1% for the tasks, shared by Holm's method; all 5% for the pool of a run of one task.
- *inconclusive*: neither.

Tasks of unlike metrics are no pool: a mean over accuracies and F1 is no accuracy. Each metric has a pool of its own; to
pass, all must (each at 5%), and they share the error of failing.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from lm_eval_adainfer import statistics
from lm_eval_adainfer.comparison.compare import POOLED, group_of_all, pool_of, row, weighs_tasks
from lm_eval_adainfer.comparison.evidence import APPROXIMATE, BETTING, EXACT, TASKS, Evidence
from lm_eval_adainfer.comparison.matching import Pairs, main_kind, pools
from lm_eval_adainfer.comparison.runs import Run
from lm_eval_adainfer.comparison.selection import listing
from lm_eval_adainfer.errors import AdaInferError

PASS, FAIL, INCONCLUSIVE = "pass", "fail", "inconclusive"
ERROR = 0.05  # of passing, and of failing, wrongly
POOL_SHARE = 0.8  # of the error of failing; the rest is the guards'
FAR, FAR_TIMES, FAR_ERROR = 0.02, 3, 0.005  # a drop far above the limit must practically never pass


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
    sees: float | None  # the least true drop that this guard would reveal with 80% probability; None where none is


@dataclass(frozen=True)
class Pool:
    """The test of the pool of one metric."""

    name: str
    metric: str
    documents: int
    baseline: float
    candidate: float
    drop: float
    lower: float  # one-sided bound at Verdict.lower_level
    upper: float  # one-sided bound at Verdict.upper_level
    dropped: bool  # its drop is established to be above max_drop
    within: bool  # it is established to be at most max_drop
    discordant: int | None  # None where the metric is no right-or-wrong
    method: str  # exact, Gaffke, resampled or Student's t (comparison/evidence.py)
    equal_weight: str  # what weighs the same: documents, tasks, or words or bytes
    clusters: int | None  # how many, where documents belong together
    far: float  # a drop that must practically never pass
    documents_needed: int | None  # to settle it, where it is neither


@dataclass(frozen=True)
class Verdict:
    """What the gate says and why; where there are pools of several metrics, its numbers are of the first."""

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
    pools: list[Pool] = field(default_factory=list)

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
    by_task: Collection[str] = (),
    places: Mapping[tuple[str, int], int] | None = None,
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
        by_task: Metrics in which the pool's tasks weigh the same, whatever their sizes.
        places: Task and document to its place in the random order in which documents came, where they were added until
            they could tell; all error rates then hold over everything that was looked at.

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
    unit, most = pooled[0].unit, max((p.most or math.inf) for p in pooled)
    if unit and not (math.isfinite(max_drop) and max_drop >= 0):
        raise AdaInferError(f"max-drop: {max_drop:g} is no number from 0, in {unit}")
    if not unit and (not math.isfinite(max_drop) or max_drop < 0 or (max_drop >= 1 and most <= 1)):
        raise AdaInferError(f"max-drop: {max_drop:g} is no share from 0 to below 1; one point of accuracy is 0.01")
    if unit:
        nats = max_drop * (math.log(2) if unit.startswith("bits") else 1)
        factor = f"{math.exp(nats):.4g}" if nats < 700 else "any number"
        notes.append(f"--max-drop is in {unit} here: {max_drop:g} allows perplexity to rise by a factor of {factor}")
    seen = row(name, "pooled", pooled)
    flops_saved = None if seen.flops_ratio_total is None else 1 - seen.flops_ratio_total
    _require_share("min-pruning", min_pruning, seen.pruning_ratio, "pruning_ratio")
    _require_share("min-flops-saved", min_flops_saved, flops_saved, "flops_ratio_total")

    apart = pools(pooled)
    lower_level = 1 - ERROR * (POOL_SHARE if len(pairs) > 1 else 1) / len(apart)
    found = [
        _pool(
            name if len(apart) == 1 else f"{name} ({p[0].metric})",
            p,
            max_drop,
            lower_level,
            p[0].metric in by_task,
            places,
        )
        for p in apart
    ]
    guards = _guards(pairs, max_drop, places) if len(pairs) > 1 else []
    limit = f"{max_drop:g} {unit}".rstrip()
    notes += _caveats(found)

    reasons = []
    for pool_ in found:
        if pool_.dropped:
            sure = f"by at least {pool_.lower:.4f} ({percent(lower_level)} one-sided)"
            reasons.append(f"{pool_.name} dropped by more than {limit}: {sure}")
    for guard in guards:
        if guard.failed:
            seen_there = f"seen are {guard.drop:.4f} (Holm's p {guard.p_holm:.2g})"
            reasons.append(f"task {guard.task} dropped by more than {limit}: {seen_there}")
    if too_little(seen.pruning_ratio, min_pruning):
        reasons.append(f"pruning_ratio is {seen.pruning_ratio:.4f}, under {min_pruning:g}")
    if too_little(flops_saved, min_flops_saved):
        reasons.append(f"flops saved are {flops_saved:.4f}, under {min_flops_saved:g}")
    status = FAIL if reasons else PASS if all(p.within for p in found) else INCONCLUSIVE
    if status == PASS:
        reasons += [f"{p.name} dropped by at most {p.upper:.4f} (95% one-sided), allowed are {limit}" for p in found]
    elif status == INCONCLUSIVE:
        reasons += [_advice(p, max_drop, unit) for p in found if not p.within]
    first = found[0]
    open_ = [p.documents_needed for p in found if not p.within]
    return Verdict(
        status=status,
        reasons=reasons,
        dropped=any(p.dropped for p in found),
        within=all(p.within for p in found),
        pool=name,
        metric=first.metric,
        max_drop=max_drop,
        documents=first.documents,
        baseline=first.baseline,
        candidate=first.candidate,
        drop=first.drop,
        lower=first.lower,
        upper=first.upper,
        lower_level=lower_level,
        upper_level=1 - ERROR,
        discordant=first.discordant,
        documents_needed=None if status != INCONCLUSIVE or None in open_ else max(n for n in open_ if n is not None),
        pruning_ratio=seen.pruning_ratio,
        min_pruning=min_pruning,
        flops_saved=flops_saved,
        min_flops_saved=min_flops_saved,
        guards=guards,
        unit=unit,
        notes=notes,
        pools=found,
    )


def judge_runs(
    baseline: Run,
    candidate: Run,
    pairs: Sequence[Pairs],
    max_drop: float,
    min_pruning: float | None = None,
    min_flops_saved: float | None = None,
    group: str | None = None,
    places: Mapping[tuple[str, int], int] | None = None,
) -> Verdict:
    """:func:`judge` two whole runs, or a group of them, whose tasks weigh as they do in the group's own score.

    Args:
        baseline: The run.
        candidate: The run.
        pairs: Their documents, matched.
        max_drop: As for :func:`judge`, as what follows.
        min_pruning: The least mean ``pruning_ratio``.
        min_flops_saved: The least saving.
        group: The group or task that is the pool; None for all documents.
        places: The order in which documents came.

    Raises:
        AdaInferError: As :func:`judge`'s, and on a group that the runs don't have.
    """
    group = group or group_of_all(baseline, candidate)
    return judge(
        pairs,
        pool_of(baseline, group),
        max_drop,
        min_pruning,
        min_flops_saved,
        group or POOLED,
        by_task=weighs_tasks(baseline, candidate, group) if group else (),
        places=places,
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


def _pool(
    name: str,
    pairs: Sequence[Pairs],
    max_drop: float,
    lower_level: float,
    by_task: bool,
    places: Mapping[tuple[str, int], int] | None,
) -> Pool:
    evidence = Evidence.of(pairs, by_task, places=places)
    baseline, candidate = (np.concatenate([getattr(p, side) for p in pairs]) for side in ("baseline", "candidate"))
    far = max(max_drop + FAR * evidence.reach, FAR_TIMES * max_drop)
    within = evidence.p_above(max_drop) <= ERROR and evidence.p_above(far) <= FAR_ERROR
    dropped = evidence.p_below(max_drop) <= 1 - lower_level + 1e-12
    return Pool(
        name=name,
        metric=pairs[0].metric,
        documents=len(evidence.drops),
        baseline=float(np.average(baseline, weights=evidence.weights)),
        candidate=float(np.average(candidate, weights=evidence.weights)),
        drop=evidence.mean,
        lower=evidence.bound(lower_level, False, max_drop),
        upper=evidence.bound(1 - ERROR, True, max_drop),
        dropped=dropped,
        within=within,
        discordant=int(np.count_nonzero(evidence.drops)) if all(p.binary for p in pairs) else None,
        method=evidence.method,
        equal_weight=evidence.equal,
        clusters=evidence.clustered,
        far=far,
        documents_needed=(
            None if within or dropped else evidence.needed(max_drop, ERROR, far, FAR_ERROR, 1 - lower_level)
        ),
    )


def _caveats(found: Sequence[Pool]) -> list[str]:
    """What the reader must know of how the pools are bounded."""
    notes = []
    for pool_ in found:
        if pool_.method in APPROXIMATE:
            notes.append(
                f"the bounds of {pool_.name} are approximate ({pool_.method}): nothing limits what a document can lose "
                f"in {pool_.metric}"
            )
        if pool_.equal_weight == TASKS:
            notes.append(f"the tasks of {pool_.name} weigh the same, whatever their sizes, as in its own score")
    return notes


def percent(level: float) -> str:
    """A level of confidence, 96% or 98.7%."""
    return f"{100 * level:.3g}%"


def _guards(
    pairs: Sequence[Pairs], max_drop: float, places: Mapping[tuple[str, int], int] | None
) -> list[Guard]:
    by_task = [Evidence.of([p], places=places) for p in pairs]
    found = []
    for pair, own, p_holm in zip(pairs, by_task, statistics.holm([d.p_below(max_drop) for d in by_task]), strict=True):
        interval, n = own.interval(), len(own.drops)
        failed = p_holm <= ERROR * (1 - POOL_SHARE)
        sees = own.sees(max_drop, ERROR * (1 - POOL_SHARE) / len(pairs))  # alone among tasks that did not drop
        found.append(
            Guard(pair.task, pair.metric, n, interval.drop, interval.lower, interval.upper, p_holm, failed, sees)
        )
    return found


def _advice(pool: Pool, max_drop: float, unit: str = "") -> str:
    name, needed, far = pool.name, pool.documents_needed, pool.far
    text = f"{name} dropped by {pool.lower:.4f} to {pool.upper:.4f} {unit}".rstrip()
    text += f", and {max_drop:g} lies in between"
    if pool.upper <= max_drop:
        text = f"answers of {name} flip so often that a drop of {far:g} can't be ruled out well enough"
        if pool.method != EXACT:
            what = "clusters" if pool.clusters is not None else "documents"
            text = f"{what} of {name} differ so much that a drop of {far:g} {unit}".rstrip()
            text += " can't be ruled out well enough"
    if pool.method == BETTING:
        return f"{text}; all documents were used"
    if needed is None:
        return f"{text}; the drop seen is so near the limit that no number of documents would settle it"
    at = "at the discordance seen" if pool.clusters is None else "in clusters like these"
    return f"{text}; {at}, about {needed:,} documents would settle it (with 80% probability)"
