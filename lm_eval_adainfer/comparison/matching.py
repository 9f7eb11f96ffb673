"""Which documents of two runs are the same, and the refusal where the runs did not do the same thing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lm_eval_adainfer.comparison.runs import Run, Task
from lm_eval_adainfer.comparison.samples import Document
from lm_eval_adainfer.errors import AdaInferError


@dataclass(frozen=True)
class Pairs:
    """One task's documents in two runs, in one order."""

    task: str
    metric: str
    lower_is_better: bool
    baseline: np.ndarray  # [documents], the metric
    candidate: np.ndarray
    documents: list[tuple[Document, Document]]

    @property
    def drops(self) -> np.ndarray:
        """Per document, what the candidate lost (in a metric that should be low: what it gained)."""
        return (self.candidate - self.baseline) if self.lower_is_better else (self.baseline - self.candidate)

    @property
    def binary(self) -> bool:
        """Whether documents are right or wrong."""
        return bool(np.isin(self.baseline, (0, 1)).all() and np.isin(self.candidate, (0, 1)).all())


def match(baseline: Run, candidate: Run, metric: str | None = None, other_prompts: bool = False) -> list[Pairs]:
    """Pair the documents of all tasks.

    Args:
        baseline: The first run.
        candidate: The second.
        metric: For all tasks; by default each task's own (see ``Task.metric``).
        other_prompts: Accept that the same documents were asked with other prompts.

    Raises:
        AdaInferError: Where tasks, versions, shots, filters, documents or prompts differ.
    """
    what = f"{candidate.label} can't be compared with {baseline.label}"
    first, second = set(baseline.tasks), set(candidate.tasks)
    if first != second:
        only = sorted(first ^ second)
        owner = baseline if only[0] in first else candidate
        raise AdaInferError(
            f"{what}: {len(only)} of the tasks are in one of them only ({only[0]} in {owner.label}); run the same tasks"
        )
    return [_pair(baseline.tasks[t], candidate.tasks[t], what, metric, other_prompts) for t in baseline.tasks]


def _pair(first: Task, second: Task, what: str, metric: str | None, other_prompts: bool) -> Pairs:
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
    name = first.metric(metric)
    second.metric(name)
    return Pairs(
        task=first.name,
        metric=name,
        lower_is_better=name in first.lower_is_better,
        baseline=np.array([a.metrics[name] for a, _ in documents]),
        candidate=np.array([b.metrics[name] for _, b in documents]),
        documents=documents,
    )
