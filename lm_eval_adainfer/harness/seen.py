"""How many of the documents that a run evaluates its stopper was fitted or calibrated on.

Where a task has a training split there are none. Elsewhere fitting and calibration documents are evaluation documents,
drawn by a hash (``docs/numbers.md``), and a run over all of them is partly about documents that the stopper knows.
Stopper files list these; what they hold is counted when an evaluation begins, said once, and put into its record.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

eval_logger = logging.getLogger(__name__)

_SHOWN = 4  # tasks that the sentence names


def check(lm: Any, tasks: Mapping[str, Any], how: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the record of a run says about known documents; where there are some, rank 0 warns.

    Args:
        lm: The ``AdaInferLM``.
        tasks: The evaluation's, by name.
        how: The arguments of lm-eval's ``evaluate``, by name.

    Returns:
        ``documents_seen``: task to the number of its evaluated documents that the stopper was fitted or calibrated on.
        None where the stopper does not tell, as rules that nothing was fitted or calibrated for.
    """
    stopper = lm.stopper
    if not stopper.seen and not stopper.calibrated:
        return None
    evaluated = {name: _evaluated(task, name, how) for name, task in tasks.items()}
    found = {
        name: len(evaluated[name] & (_known(stopper.seen, name, task) | _known(stopper.calibrated, name, task)))
        for name, task in tasks.items()
    }
    some = [f"{found[name]} of {len(evaluated[name])} of {name}" for name in found if found[name]]
    if some and lm.rank == 0:
        listed = ", ".join(some[:_SHOWN]) + (f" and {len(some) - _SHOWN} more tasks" if len(some) > _SHOWN else "")
        eval_logger.warning(
            "stopper: it was fitted or calibrated on documents that this run evaluates (%s), so the results are not of "
            "fresh documents alone; adainfer trace --split test and adainfer replay keep to those",
            listed,
        )
    return {"documents_seen": found}


def _evaluated(task: Any, name: str, how: Mapping[str, Any]) -> set[int]:
    """The places in ``task.eval_docs`` that lm-eval goes through."""
    n = len(task.eval_docs)
    if chosen := (how.get("samples") or {}).get(name):
        return set(chosen)
    limit = how.get("limit")
    if not limit:
        return set(range(n))
    return set(range(min(n, math.ceil(n * limit) if limit < 1 else int(limit))))


def _known(listed: Mapping[str, Any], name: str, task: Any) -> set[int]:
    """The places in ``task.eval_docs`` that a file lists under ``"task/split"``; it may hold anything."""
    splits = ("test",) if task.has_training_docs() else ("train", "calibrate", "test")
    found: set[int] = set()
    for split in splits:
        places = listed.get(f"{name}/{split}")
        found |= {i for i in places if type(i) is int} if isinstance(places, list) else set()
    return found
