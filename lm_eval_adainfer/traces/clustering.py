"""Which traced documents belong together: what ``adainfer trace`` records of it, and how it is read back.

A trace holds no documents, so the field that names a document's passage is read while tracing (``--cluster``, or the
field of a task that is known to repeat passages), and a number stands for what it holds: the array ``cluster``. Its
meta says which field that was.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from lm_eval_adainfer.clusters import Key, passage_field
from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.traces.documents import TracedDocuments

Wanted = tuple[tuple[str, str], ...]  # tasks and fields, of ``clusters.parse``


def field_of(wanted: Wanted, task: str) -> str | None:
    """The field that was named for a task: by its own name, else by a glob, else for all; None where none was."""
    fitting = [(name, field) for name, field in wanted if not name or fnmatchcase(task, name)]
    best = max(fitting, key=lambda found: (found[0] == task, bool(found[0])), default=None)
    return None if best is None else best[1]


def of_task(wanted: Wanted, task: str) -> Wanted:
    """What was named for one task alone."""
    field = field_of(wanted, task)
    return () if field is None else ((task, field),)


def numbers(docs: Sequence[Any], task: str, wanted: Wanted = ()) -> tuple[str | None, list[int]]:
    """The field that tells a task's documents' clusters, and a number for each document that stands for what it holds.

    Args:
        docs: The documents.
        task: Their task.
        wanted: What was named; where nothing was for this task, the field of a task that is known to repeat passages.

    Returns:
        The field, None where there is none to take (then no numbers).

    Raises:
        AdaInferError: Where a field was named that a document does not have.
    """
    named = field_of(wanted, task)
    field = named or passage_field(task)
    if field is None:
        return None, []
    key = Key(field)
    try:
        return field, [_number(key.of(doc, f"a document of {task}")) for doc in docs]
    except AdaInferError:
        if named:
            raise
        return None, []


def _number(name: str) -> int:
    """Of 63 bits: two of a million names are equal with a probability of 1e-7."""
    return int(name[:16], 16) >> 1


def of_documents(traces: Sequence[TracedDocuments], wanted: Wanted) -> list[np.ndarray] | None:
    """Per trace, [D] numbers that are equal where documents belong together, over all of these traces.

    A passage that several tasks ask about is one cluster; a document of a task for which no field was named stands for
    itself, at all shots.

    Args:
        traces: The documents.
        wanted: Tasks and fields.

    Returns:
        None where nothing was named.

    Raises:
        AdaInferError: Where a field was named that a trace did not record.
    """
    if not wanted:
        return None
    known: dict[Any, int] = {}
    found = []
    for trace in traces:
        field = field_of(wanted, trace.meta["task"])
        if field is None:
            keys: list[Any] = [(trace.meta["task"], trace.meta["split"], i) for i in trace.doc_ids.tolist()]
        else:
            keys = recorded(trace, field).tolist()
        found.append(np.array([known.setdefault(key, len(known)) for key in keys], dtype=np.int64))
    return found


def recorded(trace: TracedDocuments, field: str) -> np.ndarray:
    """[D], what a trace recorded of a field.

    Raises:
        AdaInferError: Where it recorded none, or another.
    """
    there = trace.meta.get("cluster") if "cluster" in trace.arrays else None
    if there != field:
        holds = f"tells documents apart by {there!r}" if there else "does not tell which documents belong together"
        raise AdaInferError(
            f"cluster: {trace.path} {holds}, not by {field!r}; trace again with --cluster {trace.meta['task']}={field}"
        )
    return trace.arrays["cluster"][trace.first]


def require_known(wanted: Wanted, tasks: Iterable[str]) -> None:
    """Raise AdaInferError where a field was named for a task that is not there."""
    there = sorted(set(tasks))
    for name, _ in wanted:
        if name and not any(fnmatchcase(task, name) for task in there):
            raise AdaInferError(f"cluster: {name!r} is none of the tasks ({', '.join(there):.200})")


def repeated(traces: Sequence[TracedDocuments], wanted: Wanted) -> str | None:
    """A sentence about tasks that repeat passages while nothing was said of that; None where there is none."""
    found: Mapping[str, str] = {
        trace.meta["task"]: sentence
        for trace in traces
        if field_of(wanted, trace.meta["task"]) is None and (sentence := _repeats(trace)) is not None
    }
    if not found:
        return None
    shown = "; ".join(list(found.values())[:2]) + (f"; and {len(found) - 2} more" if len(found) > 2 else "")
    return f"documents about one passage are not independent, and what is said here takes them for that: {shown}"


def _repeats(trace: TracedDocuments) -> str | None:
    task = trace.meta["task"]
    if "cluster" in trace.arrays:
        field, numbers = trace.meta.get("cluster"), trace.arrays["cluster"][trace.first]
        documents, passages = len(np.unique(trace.doc_ids)), len(np.unique(numbers))
        if passages == documents:
            return None
        return f"{task} ({documents} documents, {passages} of {field}): give --cluster {task}={field}"
    field = passage_field(task)
    if field is None:
        return None
    return f"{task} repeats passages, and its trace does not tell which: trace again with --cluster {task}={field}"
