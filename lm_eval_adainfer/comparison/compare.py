"""Two runs side by side: per task, per group and pooled, paired by document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np

from lm_eval_adainfer import statistics
from lm_eval_adainfer.comparison.evidence import MCNEMAR, Evidence
from lm_eval_adainfer.comparison.matching import Pairs, match, pools
from lm_eval_adainfer.comparison.runs import Run
from lm_eval_adainfer.comparison.samples import Document
from lm_eval_adainfer.comparison.selection import listing
from lm_eval_adainfer.errors import AdaInferError

POOLED = "all documents"
EXIT = ("exit_layer", "pruning_ratio", "flops_ratio", "flops_ratio_total")


@dataclass(frozen=True)
class Row:
    """One task, group or the pool."""

    name: str
    kind: str  # task, group or pooled
    metric: str
    unit: str  # of what is compared in the metric's place, nats per document, say; empty for the metric itself
    lower_is_better: bool
    documents: int
    baseline: float
    candidate: float
    difference: float  # candidate minus baseline
    lower: float  # of the difference, 95%
    upper: float
    p: float
    test: str
    only_baseline_right: int | None
    only_candidate_right: int | None
    agreement: float | None  # share of documents with the same answer
    exit_layer: float | None  # of the candidate; the rest too
    pruning_ratio: float | None
    flops_ratio: float | None
    flops_ratio_total: float | None
    method: str = ""  # of the interval: exact, Gaffke, resampled or Student's t (comparison/evidence.py)
    equal_weight: str = ""  # what weighs the same: documents, tasks, or words or bytes
    clusters: int | None = None  # how many, where documents belong together
    p_mid: float | None = None  # McNemar's mid-p, where the test is McNemar's
    p_holm: float | None = None  # p, adjusted over the tasks by Holm's method; of tasks only
    exit_layer_lower: float | None = None  # 95%, Student's t over documents, or clusters; the rest too
    exit_layer_upper: float | None = None
    pruning_ratio_lower: float | None = None
    pruning_ratio_upper: float | None = None
    exit_layer_var: float | None = None  # population variance over documents
    exit_layer_var_stderr: float | None = None
    exit_layer_difference: float | None = None  # candidate minus baseline, paired, where both logged it
    exit_layer_difference_lower: float | None = None
    exit_layer_difference_upper: float | None = None
    pruning_ratio_difference: float | None = None
    pruning_ratio_difference_lower: float | None = None
    pruning_ratio_difference_upper: float | None = None


@dataclass(frozen=True)
class Comparison:
    """A candidate against the baseline, or against another candidate."""

    baseline: str
    candidate: str
    rows: list[Row]
    seconds: dict[str, tuple[float, float]]  # measured; kind -> baseline, candidate
    notes: list[str]
    between_candidates: bool = False  # what stands for the baseline is another candidate

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        found = asdict(self)
        found["seconds_measured"] = {
            kind: {"baseline": a, "candidate": b, "speed_up": a / b} for kind, (a, b) in found.pop("seconds").items()
        }
        return found


def compare(
    baseline: Run, candidate: Run, metric: str | None = None, other_prompts: bool = False, seed: int = 0
) -> Comparison:
    """Compare two runs of the same documents.

    Args:
        baseline: The first run.
        candidate: The second.
        metric: For all tasks; by default each task's own.
        other_prompts: Accept that prompts differ.
        seed: Of permutation tests.

    Raises:
        AdaInferError: Where the runs did not do the same thing.
    """
    said: list[str] = []
    pairs = match(baseline, candidate, metric, other_prompts, said)
    by_task = {p.task: p for p in pairs}
    rows = [row(p.task, "task", [p], seed) for p in pairs]
    rows = [replace(r, p_holm=p) for r, p in zip(rows, statistics.holm([r.p for r in rows]), strict=True)]
    for name, tasks in baseline.groups.items():
        members = [by_task[t] for t in tasks if t in by_task]
        if members:
            alike, *others = pools(members)
            rows.append(row(name, "group", alike, seed, alike[0].metric in weighs_tasks(baseline, candidate, name)))
            if others:
                said.append(f"the row of {name} leaves out {_named(others)}, which are another metric")
    for i, alike in enumerate(apart := pools(pairs)):
        if len(alike) > 1:
            rows.append(row(POOLED if i == 0 else f"{POOLED} of {alike[0].metric}", "pooled", alike, seed))
        if i == 0 and len(alike) > 1 and apart[1:]:
            said.append(f"{POOLED} leave out {_named(apart[1:])}, which are another metric")
    seconds = {}
    for kind, a, b in (
        ("in the model", baseline.seconds_in_model, candidate.seconds_in_model),
        ("in all, loading included", baseline.seconds_total, candidate.seconds_total),
    ):
        if a and b:
            seconds[kind] = (a, b)
    notes = [*(f"{run.label}: {note}" for run in (baseline, candidate) for note in run.notes), *said]
    return Comparison(baseline.label, candidate.label, rows, seconds, notes)


def compare_all(
    runs: Sequence[Run], metric: str | None = None, other_prompts: bool = False, seed: int = 0
) -> list[Comparison]:
    """Compare runs with the first of them; of several candidates, every two with each other besides.

    Args:
        runs: The baseline and the candidates.
        metric: For all tasks; by default each task's own.
        other_prompts: Accept that prompts differ.
        seed: Of permutation tests.

    Raises:
        AdaInferError: Where the runs did not do the same thing.
    """
    baseline, *candidates = runs
    found = [compare(baseline, run, metric, other_prompts, seed) for run in candidates]
    for first, second in combinations(candidates, 2):
        found.append(replace(compare(first, second, metric, other_prompts, seed), between_candidates=True, notes=[]))
    return found


def weighs_tasks(baseline: Run, candidate: Run, group: str) -> frozenset[str]:
    """The metrics in which the group's tasks weigh the same, as either run's results show."""
    return frozenset().union(*(run.by_task.get(group, ()) for run in (baseline, candidate)))


def group_of_all(baseline: Run, candidate: Run) -> str | None:
    """The group that is all that was compared and lets its tasks weigh the same; None where there is no such group."""
    return next(
        (
            name
            for name, tasks in baseline.held_groups.items()
            if set(tasks) == set(baseline.tasks) and len(tasks) > 1 and weighs_tasks(baseline, candidate, name)
        ),
        None,
    )


def pool_of(run: Run, group: str | None) -> list[str]:
    """The tasks of a group, of a task, or all.

    Raises:
        AdaInferError: On a name that the run does not have.
    """
    if group is None:
        return list(run.tasks)
    if group in run.tasks:
        return [group]
    if group in run.groups:
        return run.groups[group]
    known = ", ".join([*run.groups, *run.tasks][:6])
    raise AdaInferError(f"group: {group!r} is no group or task of {run.label}; it has {known}")


def _named(pools: Sequence[Sequence[Pairs]]) -> str:
    return listing(f"{p.task} ({p.metric})" for pairs in pools for p in pairs)


def row(name: str, kind: str, pairs: Sequence[Pairs], seed: int = 0, by_task: bool = False) -> Row:
    """The paired statistics of some tasks' documents together; with ``by_task`` the tasks weigh the same."""
    baseline, candidate = (np.concatenate([getattr(p, side) for p in pairs]) for side in ("baseline", "candidate"))
    lower_is_better, unit = pairs[0].lower_is_better, pairs[0].unit
    evidence = Evidence.of(pairs, by_task, seed)
    gains = evidence if lower_is_better else evidence.mirrored  # candidate minus baseline
    found, weights = gains.interval(), evidence.weights
    p_value, test = evidence.p_of_no_change()
    flips = evidence.flips if all(p.binary for p in pairs) else None
    documents = [pair for p in pairs for pair in p.documents]
    return Row(
        name=name,
        kind=kind,
        metric="/".join(dict.fromkeys(p.metric for p in pairs)),
        unit=unit,
        lower_is_better=lower_is_better,
        documents=len(baseline),
        baseline=float(np.average(baseline, weights=weights)),
        candidate=float(np.average(candidate, weights=weights)),
        difference=found.drop,
        lower=found.lower,
        upper=found.upper,
        p=p_value,
        test=test,
        only_baseline_right=flips[0] if flips else None,
        only_candidate_right=flips[1] if flips else None,
        agreement=_agreement(documents),
        **{key: _mean([b for _, b in documents], key) for key in EXIT},
        method=evidence.method,
        equal_weight=evidence.equal,
        clusters=evidence.clustered,
        p_mid=statistics.mcnemar_mid_p(*evidence.flips) if test == MCNEMAR else None,
        **_exits(documents, evidence.clusters),
    )


def _exits(documents: list[tuple[Document, Document]], clusters: np.ndarray | None) -> dict[str, float | None]:
    """What there is beside the means of the candidate's exits: intervals, the variance, the paired differences."""
    found: dict[str, float | None] = {}
    for key in ("exit_layer", "pruning_ratio"):
        first, second = (_values([pair[side] for pair in documents], key) for side in (0, 1))
        if second is None:
            continue
        found[f"{key}_lower"], found[f"{key}_upper"] = _ends(second, clusters)
        if key == "exit_layer":
            found["exit_layer_var"] = float(np.var(second))
            found["exit_layer_var_stderr"] = statistics.variance_error(second, clusters)
        if first is not None:
            found[f"{key}_difference"] = float(np.mean(second - first))
            ends = _ends(second - first, clusters)
            found[f"{key}_difference_lower"], found[f"{key}_difference_upper"] = ends
    return found


def _ends(values: np.ndarray, clusters: np.ndarray | None) -> tuple[float | None, float | None]:
    lower, upper = statistics.mean_interval(values, clusters)
    return (lower, upper) if np.isfinite(lower) else (None, None)


def _agreement(documents: list[tuple[Document, Document]]) -> float | None:
    known = [(a.answer, b.answer) for a, b in documents if a.answer is not None and b.answer is not None]
    return sum(a == b for a, b in known) / len(known) if known and len(known) == len(documents) else None


def _mean(documents: list[Document], key: str) -> float | None:
    values = _values(documents, key)
    return None if values is None else float(np.mean(values))


def _values(documents: list[Document], key: str) -> np.ndarray | None:
    """Of every document; None where one has no such number."""
    values = [d.metrics[key] for d in documents if key in d.metrics]
    return np.array(values) if values and len(values) == len(documents) else None
