"""How a group's score comes from its tasks: their documents weigh the same, or the tasks do.

lm-eval 0.4.13 writes a group's score, but not its ``weight_by_size``. Both ways are tried on the scores of the group's
tasks, and the one that gives the group's is its own. (lm-eval takes the mean over all tasks below the group, through
nested groups, in both.)
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np


def tasks_weigh_the_same(
    results: Mapping[str, Any],
    groups: Mapping[str, Sequence[str]],
    sizes: Mapping[str, Any],
    notes: list[str],
    apart: Collection[str] = (),
) -> dict[str, frozenset[str]]:
    """The metrics in which the tasks of a group weigh the same, whatever their sizes (``weight_by_size: false``).

    Args:
        results: Of a results file: tasks and groups to their scores, ``METRIC,FILTER`` to number.
        groups: Group to its tasks, through nested groups.
        sizes: The ``n-samples`` of the file.
        notes: Takes a sentence for every group that is aggregated in neither way.
        apart: Metrics that say nothing of how a group is made, since they always weigh documents, or are no means.
    """
    found: dict[str, frozenset[str]] = {}
    for group, tasks in groups.items():
        ways = {
            key.partition(",")[0]: _way(key, value, tasks, results, sizes)
            for key, value in _scores(results.get(group)).items()
            if key.partition(",")[0] not in apart
        }
        if strange := sorted(metric for metric, way in ways.items() if way == "other"):
            notes.append(f"{group} makes its {strange[0]} in a way of its own; here its documents weigh the same")
        undecided = {metric for metric, way in ways.items() if way == "either"}
        by_task = {metric for metric, way in ways.items() if way == "tasks"}
        if by_task and "documents" not in ways.values():  # one metric's scores may happen to agree in both ways
            by_task |= undecided
        if by_task:
            found[group] = frozenset(by_task)
    return found


def _way(
    key: str, score: float, tasks: Sequence[str], results: Mapping[str, Any], sizes: Mapping[str, Any]
) -> str | None:
    """How the group's score was made: of "documents", of "tasks", of "either", or in an "other" way."""
    rows = {task: _scores(results.get(task)) for task in tasks}
    having = [(row[key], _size(task, results, sizes)) for task, row in rows.items() if key in row]
    if len(having) < 2 or any(size is None for _, size in having):
        return None
    values, weights = np.array([v for v, _ in having]), np.array([float(size or 0) for _, size in having])
    if not weights.sum() > 0 or not np.isfinite(values).all():
        return None
    of_tasks, of_documents = float(values.mean()), float(np.average(values, weights=weights))
    same = [math.isclose(score, mean, rel_tol=1e-9, abs_tol=1e-12) for mean in (of_tasks, of_documents)]
    if all(same):
        return "either"
    return "tasks" if same[0] else "documents" if same[1] else "other"


def _scores(row: Any) -> dict[str, float]:
    """METRIC,FILTER to number, without standard errors."""
    return {
        key: float(value)
        for key, value in (row.items() if isinstance(row, dict) else ())
        if isinstance(key, str) and "," in key and "_stderr," not in key and type(value) in (int, float)
    }


def _size(task: str, results: Mapping[str, Any], sizes: Mapping[str, Any]) -> float | None:
    size = results[task].get("sample_len")
    if size is None:
        held = sizes.get(task)
        size = held.get("effective") if isinstance(held, dict) else None
    return float(size) if type(size) in (int, float) and size >= 0 else None
