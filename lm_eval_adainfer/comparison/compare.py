"""Two runs side by side: per task, per group and pooled, paired by document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lm_eval_adainfer.comparison import statistics
from lm_eval_adainfer.comparison.matching import Pairs, match
from lm_eval_adainfer.comparison.runs import Run
from lm_eval_adainfer.comparison.samples import Document
from lm_eval_adainfer.errors import AdaInferError

POOLED = "all documents"
EXIT = ("exit_layer", "pruning_ratio", "flops_ratio", "flops_ratio_total")


@dataclass(frozen=True)
class Row:
    """One task, group or the pool; documents weigh the same."""

    name: str
    kind: str  # task, group or pooled
    metric: str
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
    pairs = match(baseline, candidate, metric, other_prompts)
    by_task = {p.task: p for p in pairs}
    groups = {name: [by_task[t] for t in tasks] for name, tasks in baseline.groups.items()}
    rows = [row(p.task, "task", [p], seed) for p in pairs]
    rows += [row(name, "group", found, seed) for name, found in groups.items()]
    if len(pairs) > 1:
        rows.append(row(POOLED, "pooled", pairs, seed))
    seconds = {}
    for kind, a, b in (
        ("in the model", baseline.seconds_in_model, candidate.seconds_in_model),
        ("in all, loading included", baseline.seconds_total, candidate.seconds_total),
    ):
        if a and b:
            seconds[kind] = (a, b)
    notes = [f"{run.label}: {note}" for run in (baseline, candidate) for note in run.notes]
    metrics = {p.metric for p in pairs}
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


def row(name: str, kind: str, pairs: Sequence[Pairs], seed: int = 0) -> Row:
    """The paired statistics of some tasks' documents together."""
    baseline, candidate = (np.concatenate([getattr(p, side) for p in pairs]) for side in ("baseline", "candidate"))
    differences, n = candidate - baseline, len(baseline)
    if all(p.binary for p in pairs):
        lost, won = int((differences < 0).sum()), int((differences > 0).sum())
        flips: tuple[int, int] | None = (lost, won)
        found = statistics.tango_interval(won, lost, n)
        p_value, test = statistics.mcnemar_p(lost, won), "exact McNemar"
    else:
        flips = None
        found = statistics.t_interval(differences, reach=reach(baseline, candidate))
        p_value, test = statistics.sign_flip_p(differences, seed), "sign-flip permutation"
    documents = [pair for p in pairs for pair in p.documents]
    return Row(
        name=name,
        kind=kind,
        metric="/".join(dict.fromkeys(p.metric for p in pairs)),
        documents=n,
        baseline=float(baseline.mean()),
        candidate=float(candidate.mean()),
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


def reach(baseline: np.ndarray, candidate: np.ndarray) -> float:
    """The largest difference a document can show: 1 for metrics between 0 and 1, else the range seen."""
    both = np.concatenate([baseline, candidate])
    return 1.0 if both.min() >= 0 and both.max() <= 1 else float(both.max() - both.min()) or 1.0


def _agreement(documents: list[tuple[Document, Document]]) -> float | None:
    known = [(a.answer, b.answer) for a, b in documents if a.answer is not None and b.answer is not None]
    return sum(a == b for a, b in known) / len(known) if known and len(known) == len(documents) else None


def _mean(documents: list[Document], key: str) -> float | None:
    values = [d.metrics[key] for d in documents if key in d.metrics]
    return sum(values) / len(values) if values and len(values) == len(documents) else None
