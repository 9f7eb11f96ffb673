"""Which of a document's requests are right answers: one rule for the metrics of runs and for traces."""

from __future__ import annotations

from typing import Any

from lm_eval_adainfer import releases


def right_requests(task: Any, doc: Any) -> list[int]:
    """Indices of the right requests of a document: the only one, or the target(s) among the choices.

    Returns:
        The indices; -1 for a target that is not among the choices; empty where a task's target names no choice at all.
    """
    if task.OUTPUT_TYPE == "loglikelihood":
        return [0]
    target = releases.target_of(task, doc)
    found = []
    for one in target if isinstance(target, (list, tuple)) else [target]:
        if isinstance(one, str):
            choices = task.doc_to_choice(doc)
            one = choices.index(one) if one in choices else -1
        if isinstance(one, int):
            found.append(one)
    return found
