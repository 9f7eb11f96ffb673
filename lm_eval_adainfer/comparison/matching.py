"""Which documents of two runs are the same, and the refusal where the runs did not do the same thing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from lm_eval_adainfer.clusters import hint
from lm_eval_adainfer.comparison.runs import EXIT_METRICS, PREFERRED, Run, Task
from lm_eval_adainfer.comparison.samples import Document
from lm_eval_adainfer.comparison.scales import OWN_AGGREGATION, most
from lm_eval_adainfer.errors import AdaInferError


@dataclass(frozen=True)
class Pairs:
    """One task's documents in two runs, in one order.

    Attributes:
        task: The task's name.
        metric: The metric's name.
        lower_is_better: Whether a lower value is better.
        baseline: [documents], the metric, or what is compared in its place (``scales.Scale``).
        candidate: Likewise.
        documents: Those of both runs.
        weights: [documents], words or bytes where the metric is a ratio of sums; None where all weigh the same.
        unit: Of what is compared in the metric's place, nats per document, say; empty for the metric itself.
        clusters: [documents], equal where documents belong together; None where the user did not say.
    """

    task: str
    metric: str
    lower_is_better: bool
    baseline: np.ndarray
    candidate: np.ndarray
    documents: list[tuple[Document, Document]]
    weights: np.ndarray | None = None
    unit: str = ""
    clusters: np.ndarray | None = None

    @property
    def drops(self) -> np.ndarray:
        """Per document, what the candidate lost (in a metric that should be low: what it gained)."""
        return (self.candidate - self.baseline) if self.lower_is_better else (self.baseline - self.candidate)

    @property
    def binary(self) -> bool:
        """Whether documents are right or wrong."""
        return not self.unit and bool(np.isin(self.baseline, (0, 1)).all() and np.isin(self.candidate, (0, 1)).all())

    @property
    def most(self) -> float | None:
        """The most that a document can score, the least being 0; None where it is not bounded, or nothing says so."""
        return None if self.unit else most(self.metric, np.concatenate([self.baseline, self.candidate]))

    @property
    def kind(self) -> tuple[str, bool]:
        """What its drops may be held against one limit with: values in one unit of which the same way is better.

        Shares (from 0 to 1) go together, whatever the metric.
        """
        return ("" if self.most == 1 else self.unit or self.metric), self.lower_is_better


def main_kind(pairs: Sequence[Pairs]) -> tuple[list[Pairs], list[Pairs]]:
    """The tasks that share a scale, and the others: shares where there are some, else what the first task has."""
    kinds = [p.kind for p in pairs]
    kind = ("", False) if ("", False) in kinds else kinds[0]
    return [p for p in pairs if p.kind == kind], [p for p in pairs if p.kind != kind]


def pools(pairs: Sequence[Pairs]) -> list[list[Pairs]]:
    """The tasks whose documents can be pooled: those of one scale and one metric, the main scale's first.

    A mean over accuracies and F1 is no accuracy, though both are shares.
    """
    found, rest = list[list[Pairs]](), list(pairs)
    while rest:
        alike, _ = main_kind(rest)
        found.append([p for p in alike if p.metric == alike[0].metric])
        rest = [p for p in rest if p.kind != alike[0].kind or p.metric != alike[0].metric]
    return found


def match(
    baseline: Run,
    candidate: Run,
    metric: str | None = None,
    other_prompts: bool = False,
    notes: list[str] | None = None,
) -> list[Pairs]:
    """Pair the documents of all tasks.

    Args:
        baseline: The first run.
        candidate: The second.
        metric: For all tasks; by default the one named for each task, else acc, exact_match or its first.
        other_prompts: Accept that the same documents were asked with other prompts.
        notes: Takes a sentence for every task that is compared in another unit, or not at all.

    Raises:
        AdaInferError: Where tasks, versions, shots, filters, documents or prompts differ, or where no task has a
            metric whose documents can be compared.
    """
    found, first_reason = [], None
    notes = [] if notes is None else notes
    for first, second, documents in documents_of(baseline, candidate, other_prompts):
        name = metric or first.wanted or second.wanted or default_metric(first, second)
        reasons = "; ".join(f"{m} {reason}" for m, reason in {**second.apart, **first.apart}.items())
        if name is None:
            reasons = reasons or "its samples hold no number per document"
            notes.append(f"task {first.name} is kept apart and not compared: {reasons}")
            first_reason = first_reason or reasons
            continue
        if reasons and not (metric or first.wanted or second.wanted):
            notes.append(f"of task {first.name}, {name} is compared, and not what can't be paired: {reasons}")
        found.append(_pair(first, second, documents, name, notes))
    if repeated := _repeated(baseline, found):
        notes.append(hint(repeated))
    if not found:
        raise AdaInferError(
            f"metric: no task can be compared document by document (corpus metrics can't be paired): {first_reason}"
        )
    return found


def _repeated(run: Run, pairs: Sequence[Pairs]) -> dict[str, tuple[int, int]]:
    """Tasks that ask several questions about one passage, of which the user said nothing; documents and passages."""
    return {
        p.task: (len(p.documents), passages)
        for p in pairs
        if (passages := run.tasks[p.task].passages) and passages < len(p.documents)
    }


def documents_of(
    baseline: Run, candidate: Run, other_prompts: bool = False
) -> list[tuple[Task, Task, list[tuple[Document, Document]]]]:
    """Both runs' tasks and their documents in pairs.

    Raises:
        AdaInferError: Where tasks, versions, shots, filters, documents or prompts differ.
    """
    what = f"{candidate.label} can't be compared with {baseline.label}"
    first, second = set(baseline.tasks), set(candidate.tasks)
    if first != second:
        only = sorted(first ^ second)
        owner = baseline if only[0] in first else candidate
        raise AdaInferError(
            f"{what}: {len(only)} of the tasks are in one of them only ({only[0]} in {owner.label}); run the same "
            "tasks, or select them with --tasks or --exclude"
        )
    both = [(baseline.tasks[t], candidate.tasks[t]) for t in baseline.tasks]
    return [(a, b, _matched(a, b, what, other_prompts)) for a, b in both]


def _matched(first: Task, second: Task, what: str, other_prompts: bool) -> list[tuple[Document, Document]]:
    for kind, a, b in (
        ("version", first.version, second.version),
        ("number of shots", first.shots, second.shots),
        ("filter", first.filter, second.filter),
    ):
        if a != b:
            raise AdaInferError(f"{what}: task {first.name} has another {kind} ({a} and {b}); run both alike")
    missing = sorted(set(first.documents) ^ set(second.documents))
    if missing:
        raise AdaInferError(
            f"{what}: task {first.name} has {len(first.documents)} and {len(second.documents)} documents, and "
            f"{len(missing)} are in one of them only (the first is {missing[0]}); run both with the same --limit"
        )
    documents = [(a, second.documents[i]) for i, a in sorted(first.documents.items())]
    for part, reason in (
        ("doc_hash", "is another text in each; run both on the same data"),
        ("prompt_hash", "was asked with another prompt (other few-shot examples, chat template or instruction); run "
                        "both alike, or pass --other-prompts"),
    ):  # fmt: skip
        if part == "prompt_hash" and other_prompts:
            continue
        differ = [a.doc_id for a, b in documents if getattr(a, part) != getattr(b, part)]
        if differ:
            raise AdaInferError(
                f"{what}: document {differ[0]} of task {first.name} (of {len(differ)} such) {reason}"
            )
    return documents


def default_metric(first: Task, second: Task) -> str | None:
    """The metric that is compared unless the user names one; None where no metric can be.

    Raises:
        AdaInferError: Where one run has no numbers of a metric of which the other has some: it may be damaged.
    """
    for task, other in ((first, second), (second, first)):
        for name, reason in task.apart.items():
            if name in other.scales and not reason.startswith(OWN_AGGREGATION):
                task.require(name)
    usable = [m for m in first.scales if m not in EXIT_METRICS and m not in second.apart]
    return next((m for m in (*PREFERRED, *usable) if m in usable), None)


def _pair(
    first: Task, second: Task, documents: list[tuple[Document, Document]], name: str, notes: list[str]
) -> Pairs:
    first.require(name)
    second.require(name)
    scale, other = first.scales[name], second.scales[name]
    if name in first.undirected:  # older results don't say which way is better
        scale = replace(scale, lower_is_better=other.lower_is_better)
    if name in second.undirected:
        other = replace(other, lower_is_better=scale.lower_is_better)
    if scale != other:
        raise AdaInferError(
            f"metric: {name} of task {first.name} is aggregated in another way in each run ({scale.aggregation} and "
            f"{other.aggregation}), or one takes higher and one lower for better; name another metric"
        )
    sides = [np.array([scale.value(pair[side], name) for pair in documents]) for side in (0, 1)]
    weights = None
    if scale.weighted:
        weights = np.array([scale.weight(a, name) for a, _ in documents])
        differ = [a.doc_id for (a, b), w in zip(documents, weights, strict=True) if scale.weight(b, name) != w]
        if differ:
            raise AdaInferError(
                f"metric: {name} of task {first.name} counts document {differ[0]} with another weight in each run; run "
                "both alike"
            )
    means = [float(np.average(values, weights=weights)) for values in sides]
    if scale.unit and scale.metric_of(means[0]) != means[0]:
        shown = " and ".join(f"{scale.metric_of(mean):.5g}" for mean in means)
        notes.append(f"{name} of task {first.name}, {shown}, is compared in {scale.unit} (lower is better)")
    elif scale.unit:
        notes.append(f"{name} of task {first.name} is compared as a ratio of sums over documents (lower is better)")
    elif name in first.undirected and name in second.undirected:
        notes.append(f"nothing says whether a higher {name} of task {first.name} is better; higher is taken for better")
    clusters = np.array([a.cluster for a, _ in documents]) if first.clustered else None
    return Pairs(
        task=first.name,
        metric=name,
        lower_is_better=scale.lower_is_better,
        baseline=sides[0],
        candidate=sides[1],
        documents=documents,
        weights=weights,
        unit=scale.unit,
        clusters=clusters,
    )
