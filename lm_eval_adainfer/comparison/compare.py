"""Two runs side by side: per task, per group and pooled, paired by document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lm_eval_adainfer import statistics
from lm_eval_adainfer.comparison.matching import Pairs, main_kind, match
from lm_eval_adainfer.comparison.runs import Run
from lm_eval_adainfer.comparison.samples import Document
from lm_eval_adainfer.comparison.selection import listing
from lm_eval_adainfer.errors import AdaInferError

POOLED = "all documents"
EXIT = ("exit_layer", "pruning_ratio", "flops_ratio", "flops_ratio_total")


@dataclass(frozen=True)
class Row:
    """One task, group or the pool; documents weigh the same, or by their words or bytes in a ratio of sums."""

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


@dataclass(frozen=True)
class Comparison:
    """A candidate against the baseline."""

    baseline: str
    candidate: str
    rows: list[Row]
    seconds: dict[str, tuple[float, float]]  # measured; kind -> baseline, candidate
    notes: list[str]

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
    for name, tasks in baseline.groups.items():
        members = [by_task[t] for t in tasks if t in by_task]
        if members:
            alike, others = main_kind(members)
            rows.append(row(name, "group", alike, seed))
            if others:
                said.append(f"the row of {name} leaves out {_named(others)}, which are on another scale")
    rest, first = pairs, True
    while rest:
        alike, rest = main_kind(rest)
        if len(alike) > 1:
            name = POOLED if first else f"{POOLED} of {'/'.join(dict.fromkeys(p.metric for p in alike))}"
            rows.append(row(name, "pooled", alike, seed))
        if first and rest and len(alike) > 1:
            said.append(f"{POOLED} leave out {_named(rest)}, which are on another scale")
        first = False
    seconds = {}
    for kind, a, b in (
        ("in the model", baseline.seconds_in_model, candidate.seconds_in_model),
        ("in all, loading included", baseline.seconds_total, candidate.seconds_total),
    ):
        if a and b:
            seconds[kind] = (a, b)
    notes = [*(f"{run.label}: {note}" for run in (baseline, candidate) for note in run.notes), *said]
    metrics = {p.metric for p in main_kind(pairs)[0]}
    if len(metrics) > 1:
        notes.append(f"the pool mixes the metrics {', '.join(sorted(metrics))}; --metric or --group keeps to one")
    return Comparison(baseline.label, candidate.label, rows, seconds, notes)


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


def _named(pairs: Sequence[Pairs]) -> str:
    return listing(f"{p.task} ({p.metric})" for p in pairs)


def row(name: str, kind: str, pairs: Sequence[Pairs], seed: int = 0) -> Row:
    """The paired statistics of some tasks' documents together."""
    baseline, candidate = (np.concatenate([getattr(p, side) for p in pairs]) for side in ("baseline", "candidate"))
    differences, n, weights = candidate - baseline, len(baseline), weights_of(pairs)
    lower_is_better, unit = pairs[0].lower_is_better, pairs[0].unit
    flips: tuple[int, int] | None = None
    if all(p.binary for p in pairs):
        up, down = int((differences > 0).sum()), int((differences < 0).sum())
        flips = (up, down) if lower_is_better else (down, up)
        found = statistics.tango_interval(up, down, n)
        p_value, test = statistics.mcnemar_p(*flips), "exact McNemar"
    else:
        furthest = reach(baseline, candidate, unit)
        if weights is None:
            found = statistics.t_interval(differences, reach=furthest)
        else:
            found = statistics.ratio_interval(differences, weights, reach=furthest, seed=seed)
        sums = differences if weights is None else differences * weights
        p_value, test = statistics.sign_flip_p(sums, seed), "sign-flip permutation"
    documents = [pair for p in pairs for pair in p.documents]
    return Row(
        name=name,
        kind=kind,
        metric="/".join(dict.fromkeys(p.metric for p in pairs)),
        unit=unit,
        lower_is_better=lower_is_better,
        documents=n,
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
    )


def reach(baseline: np.ndarray, candidate: np.ndarray, unit: str = "") -> float:
    """The largest difference a document can show: 1 for metrics between 0 and 1, else the range seen."""
    both = np.concatenate([baseline, candidate])
    if not unit and both.min() >= 0 and both.max() <= 1:
        return 1.0
    return float(both.max() - both.min()) or 1.0


def weights_of(pairs: Sequence[Pairs]) -> np.ndarray | None:
    """The documents' weights in a ratio of sums; None where all weigh the same."""
    found = [p.weights for p in pairs if p.weights is not None]
    return np.concatenate(found) if found else None


def _agreement(documents: list[tuple[Document, Document]]) -> float | None:
    known = [(a.answer, b.answer) for a, b in documents if a.answer is not None and b.answer is not None]
    return sum(a == b for a, b in known) / len(known) if known and len(known) == len(documents) else None


def _mean(documents: list[Document], key: str) -> float | None:
    values = [d.metrics[key] for d in documents if key in d.metrics]
    return sum(values) / len(values) if values and len(values) == len(documents) else None
