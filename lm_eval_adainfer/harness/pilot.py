"""The pilot: a few documents of every task are also answered dense, so that a run which destroys answers says so.

The documents are drawn by a fixed hash, and answered without exits in batches of their own before the run. When the
run's own answers are there, both are put side by side, in the record and, where too few agree, in a warning. Nothing
of it enters a statistic, a total, a sample or a cache (docs/numbers.md, "Pilot").
"""

from __future__ import annotations

import copy
import json
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from lm_eval.utils import handle_non_serializable
from scipy import stats

from lm_eval_adainfer import releases
from lm_eval_adainfer.harness import asides, private
from lm_eval_adainfer.tasks.qa import stable_hash

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

eval_logger = logging.getLogger(__name__)

DOCUMENTS = 16  # of a task
_KINDS = ("loglikelihood", "generate_until")  # of requests; the tokens of a rolling text are compared with nothing
_RATE, _TOO_FEW = 0.9, 11  # of 16: a stopper that keeps 90% of the answers keeps so few once in 60 pilots


class Pilots(Protocol):
    """What the pilot needs of a model."""

    rank: int
    world_size: int
    generation: str
    stopper_name: str
    reader: Any
    schedule: Any
    token_schedule: Any
    options: Any

    def dense_aside(self) -> AbstractContextManager[dict[str, Any]]:
        """Answers are dense for a while; what they cost is added to the dictionary at the end."""


class Pilot:
    """The documents of one process in one evaluation that are also answered dense.

    Args:
        model: The model.
        tasks: The evaluation's, by name.
    """

    def __init__(self, model: Pilots, tasks: Mapping[str, Any]):
        self.model, self.tasks = model, tasks
        share, rest = divmod(model.options.pilot, model.world_size)
        self._share = (share + (model.rank < rest)) if model.schedule.blocks or model.token_schedule.blocks else 0
        self._drawn: dict[str, list[list[Instance]]] = {}  # task -> documents -> their requests
        self._dense: dict[int, list[Any]] = defaultdict(list)  # id of a request -> its dense answers
        self._cost: dict[str, Any] = {}

    @contextmanager
    def before_the_run(self) -> Iterator[None]:
        """Answer the documents as soon as the last task has built its requests, just before the run begins."""
        if not self._share:
            yield
            return
        waiting = set(self.tasks)

        def built(name: str) -> None:
            waiting.discard(name)
            if not waiting:
                self._answer()

        with ExitStack() as stack:
            for name, task in self.tasks.items():
                stack.enter_context(_afterwards(task, "build_all_requests", partial(built, name)))
            yield

    def _answer(self) -> None:
        """Draw this process's share of documents, and answer them dense."""
        for name, task in self.tasks.items():
            kinds = {i.request_type for i in task.instances}
            if kinds <= set(_KINDS) and (self.model.generation == "early" or "generate_until" not in kinds):
                self._drawn[name] = drawn(task.instances, self._share)
        asked = [i for documents in self._drawn.values() for document in documents for i in document]
        with asides.dense(self.model) as self._cost:
            for kind in _KINDS:
                repeated = [i for i in asked if i.request_type == kind for _ in range(i.repeats or 1)]
                if repeated:
                    answers = getattr(self.model, kind)(repeated, disable_tqdm=True)
                    for instance, answer in zip(repeated, answers, strict=True):
                        self._dense[id(instance)].append(answer)

    def found(self) -> dict[str, Any]:
        """This process's part of the record; to be asked for when the run has given its own answers."""
        tasks = {}
        for name, documents in self._drawn.items():
            instances = [i for document in documents for i in document]
            dense = judged(self.tasks[name], documents, [self._dense[id(i)] for i in instances])
            early = judged(self.tasks[name], documents, [i.resps[: i.repeats] for i in instances])
            scores = [(m, a, b) for (_, m, a), (_, n, b) in zip(dense, early, strict=True) if m and m == n]
            metric = scores[0][0] if scores else None
            tasks[name] = {
                "documents": len(documents),
                "kept": sum(a == b for (a, *_), (b, *_) in zip(dense, early, strict=True)),
                "metric": metric,
                "scored": sum(m == metric for m, *_ in scores),
                "dense": sum(a for m, a, _ in scores if m == metric),
                "early": sum(b for m, _, b in scores if m == metric),
            }
        return {"tasks": tasks, "cost": self._cost}


@contextmanager
def _afterwards(task: Any, method: str, then: Callable[[], None]) -> Iterator[None]:
    """Let something happen after each call of a task instance's method."""
    before, stock = task.__dict__.get(method), getattr(task, method)

    def followed(*args: Any, **kwargs: Any) -> Any:
        found = stock(*args, **kwargs)
        then()
        return found

    setattr(task, method, followed)
    try:
        yield
    finally:
        delattr(task, method)
        if before is not None:
            setattr(task, method, before)


def drawn(instances: Sequence[Instance], most: int) -> list[list[Instance]]:
    """Documents drawn by a fixed hash of each, as their requests in lm-eval's order.

    Args:
        instances: Of one task.
        most: Documents to draw; all where there are fewer.
    """
    documents: dict[Any, list[Instance]] = defaultdict(list)
    for instance in instances:
        documents[instance.doc_id].append(instance)
    found = [sorted(requests, key=lambda i: i.idx) for requests in documents.values()]
    return sorted(found, key=lambda requests: _hash(requests[0].doc))[:most]


def _hash(doc: Any) -> int:
    return stable_hash("pilot", json.dumps(doc, sort_keys=True, default=handle_non_serializable))


def judged(
    task: Any, documents: Sequence[Sequence[Instance]], responses: Sequence[list[Any]]
) -> list[tuple[Any, str | None, float]]:
    """What a task makes of these responses, per document: the answer, a metric's name and its value.

    The metric is the first number of a single document that is better the higher, under the task's first filter; None
    where it has none.

    Args:
        task: The task; it is left as it is.
        documents: Their requests.
        responses: Per request.
    """
    answered = []
    for instance, given in zip([i for document in documents for i in document], responses, strict=True):
        answered.append(copy.copy(instance))
        answered[-1].resps, answered[-1].filtered_resps = given, {}
    if not answered:
        return []
    private.task_of(task, answered).apply_filters()
    first, better = next(iter(answered[0].filtered_resps)), task.higher_is_better()
    found, rest = [], iter(answered)
    for document in documents:
        requests = [next(rest) for _ in document]
        filtered = releases.filtered_by(task, requests, first)
        values = releases.scores(task, requests, first)
        metric = next((m for m, value in values.items() if better.get(m) and _is_number(value)), None)
        found.append((_answer_of(task, requests, filtered), metric, float(values[metric]) if metric else 0.0))
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, (bool, int, float, np.number, np.bool_))


def _answer_of(task: Any, requests: Sequence[Instance], filtered: Sequence[Any]) -> list[Any]:
    """What a document answers: its choice, and its texts.

    Where there is but one continuation: the vocabulary's top token in its first token's place, and whether greedy
    decoding gives all of it. Most documents of a hard task are not greedy either way, which alone would tell nothing.
    """
    scored = [f for i, f in zip(requests, filtered, strict=True) if i.request_type == "loglikelihood"]
    answer = [f for i, f in zip(requests, filtered, strict=True) if i.request_type == "generate_until"]
    if task.OUTPUT_TYPE == "multiple_choice" and hasattr(task, "doc_to_choice"):
        scored = scored[: len(task.doc_to_choice(requests[0].doc))]  # behind them, acc_mutual_info's
    if len(scored) == 1:
        answer += [getattr(scored[0], "top", None), bool(scored[0][1])]
    elif scored:
        answer.append(int(np.argmax([logprob for logprob, _ in scored])))
    return answer


# ------------------------------------------------------------------ what is said
def too_few(documents: int) -> int:
    """The most documents that may keep their answer where a warning is due; -1 where so few documents tell nothing.

    11 of 16. A stopper that keeps 90% of the answers comes to that with a probability of 1.7%; for other numbers of
    documents the bound is the largest with at most this probability.
    """
    error = stats.binom.cdf(_TOO_FEW, DOCUMENTS, _RATE)
    chances = stats.binom.cdf(np.arange(documents + 1), documents, _RATE)
    return int(np.count_nonzero(chances <= error * (1 + 1e-9))) - 1


def record(parts: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The pilot's entry in the record of a run, from the parts of all processes; None where there was none."""
    tasks = {}
    for name in dict.fromkeys(name for part in parts for name in part["tasks"]):
        pooled = _pooled([part["tasks"][name] for part in parts if name in part["tasks"]])
        if pooled["documents"]:
            tasks[name] = pooled
    costs = [part["cost"] for part in parts if part["cost"]]
    if not tasks:
        return None
    means = {
        name: {
            "documents": found["documents"],
            "kept": found["kept"],
            **({"metric": found["metric"], **_means(found)} if found["scored"] else {}),
        }
        for name, found in tasks.items()
    }
    total = {
        key: (max if key.startswith("seconds") else sum)(cost[key] for cost in costs)  # processes work side by side
        for key in costs[0]
    }
    return {"tasks": means, **total}


def _pooled(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Sums over processes or tasks; the metric is named only where it is everywhere the same."""
    metrics = {one["metric"] for one in found if one["scored"]}
    sums = {key: sum(one[key] for one in found) for key in ("documents", "kept", "scored", "dense", "early")}
    return {**sums, "metric": metrics.pop() if len(metrics) == 1 else "/".join(sorted(metrics)) or None}


def _means(found: Mapping[str, Any]) -> dict[str, float]:
    return {side: found[side] / found["scored"] for side in ("dense", "early")}


def warn(parts: Sequence[dict[str, Any]], members: Mapping[str, Sequence[str]], model: Pilots) -> None:
    """Warn of every task, or every group of tasks as a whole, in which too few documents keep their answer.

    Args:
        parts: What every process found.
        members: The names of the tasks of every group.
        model: The model.
    """
    tasks: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for part in parts:
        for name, found in part["tasks"].items():
            tasks[name].append(found)
    units: dict[str, list[str]] = defaultdict(list)
    for name in tasks:
        units[_unit(name, members)].append(name)
    for unit, names in units.items():
        found = _pooled([one for name in names for one in tasks[name]])
        if found["documents"] and found["kept"] <= too_few(found["documents"]):
            which = f"the {len(names)} tasks of {unit}" if len(names) > 1 else names[0]
            eval_logger.warning(_paragraph(which, found, model))


def _unit(task: str, members: Mapping[str, Sequence[str]]) -> str:
    """The largest group that a task belongs to; the task itself where it belongs to none."""
    return max((name for name in members if task in members[name]), key=lambda name: len(members[name]), default=task)


def _paragraph(which: str, found: Mapping[str, Any], model: Pilots) -> str:
    scores = ""
    if found["scored"]:
        means = _means(found)
        scores = (
            f" On these documents {found['metric']} is {means['early']:.3f} with early exit, and {means['dense']:.3f} "
            "when all blocks run."
        )
    other = "read the blocks in another way (reader=copy or reader=sim, docs/readers.md); "
    read = "" if model.reader.runs_tokens else other
    return (
        f"pilot: early exit changes the answers of {which}: {found['kept']} of {found['documents']} documents keep "
        f"their answer with stopper={model.stopper_name}, reader={model.reader.name}.{scores} The numbers of this run "
        f"are not the model's. What can be done: {read}look at what the blocks say (adainfer trace, adainfer replay); "
        "fit and calibrate a stopper on this model (docs/your-stopper.md); or run all blocks (stopper=none)."
    )
