"""Where releases of lm-eval differ, each difference found by looking at what is there: one adapter for all of them.

Two shapes are known: that of 0.4.13, where a task turns a document's responses into numbers (``process_results``,
``aggregation``), and that of the pre-release 0.5.0.dev1, where its ``scorers`` do, where a task's class depends on its
output type, and where a group's members are called ``group::task``. No other module asks which of them it has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from itertools import chain
from typing import Any

from lm_eval import utils
from lm_eval.api import task as _tasks
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean

_CLASSES = {  # of tasks by output type, where lm-eval has one for each
    "multiple_choice": "MultipleChoiceTask",
    "loglikelihood": "LoglikelihoodTask",
    "loglikelihood_rolling": "LoglikelihoodRollingTask",
    "generate_until": "GenerateTask",
}


# ------------------------------------------------------------------ what a task is
def class_for(cls: type, output_type: str) -> type:
    """The class with which to make a task of ``cls`` that has this output type.

    ``cls`` itself where one class of lm-eval's makes requests of all types; else ``cls`` before lm-eval's class of
    this type.
    """
    stock = getattr(_tasks, _CLASSES.get(output_type, ""), None)
    if stock is None or issubclass(cls, stock):
        return cls
    if issubclass(stock, cls):
        return stock
    return type(cls.__name__, (cls, stock), {"__module__": cls.__module__, "__qualname__": cls.__qualname__})


def compiles_templates() -> bool:
    """Whether lm-eval compiles a task's template once; else it does so anew for every document."""
    return not hasattr(utils, "env")


def value_of(doc: Mapping[str, Any], field: Any) -> Any:
    """A field of a document by its name, or a template rendered with it; None where there is no name."""
    if not field:
        return None
    if field in doc:
        return doc[field]
    if hasattr(utils, "apply_template"):
        return utils.apply_template(field, dict(doc))
    from lm_eval.config.templates import apply_template

    return apply_template(field, dict(doc))


def chooses_contexts(task: Any) -> bool:
    """Whether a task's choices are contexts, as Winogrande's."""
    return bool(getattr(task, "multiple_input", 0) or getattr(task.config, "multiple_inputs", False))


def target_of(task: Any, doc: Any) -> Any:
    """The target of a document; where 0.4.13 has contexts to choose from, ``doc_to_text`` tells the right one."""
    return task.doc_to_text(doc) if getattr(task, "multiple_input", 0) else task.doc_to_target(doc)


def matched(manager: Any, patterns: Sequence[str]) -> list[str]:
    """The tasks, groups and tags that a task manager knows by these names and globs.

    ``match_tasks`` of 0.5.0.dev1 gives back what fits nothing, too.
    """
    known = set(manager.all_tasks)
    return [name for name in manager.match_tasks(patterns) if name in known or name.partition("@")[0] in known]


def by_own_name(tasks: Mapping[str, Any]) -> dict[str, Any]:
    """Tasks by their own names, without that of a group in which they were asked for."""
    return {task.task_name: task for task in tasks.values()}


def asked_by_own_name(tasks: Mapping[str, Any], how: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of an evaluation, its ``samples`` by the tasks' own names."""
    samples = how.get("samples") or {}
    return {**how, "samples": {task.task_name: samples[name] for name, task in tasks.items() if name in samples}}


def members(group: Any, tasks: Mapping[str, Any]) -> list[str]:
    """The names under which an evaluation has the tasks of a group."""
    names = {id(task): name for name, task in tasks.items()}
    return [names[id(task)] for task in group.get_all_tasks() if id(task) in names]


# ------------------------------------------------------------------ what an evaluation does
def gathered(lm: Any, value: Any) -> list[Any] | None:
    """An object of every process, on the main one; None on the others."""
    if hasattr(lm, "gather_object"):
        return lm.gather_object(value)
    from lm_eval.evaluator_utils import torch_gather_object

    return torch_gather_object(value, rank=lm.rank, world_size=lm.world_size)


def thinks(lm: Any) -> Any:
    """HFLM's ``enable_thinking``."""
    return lm.enable_thinking if hasattr(lm, "enable_thinking") else lm.chat_template_args.get("enable_thinking")


@contextmanager
def requests_named(task: Any, name: str) -> Iterator[None]:
    """For a while a task's requests bear the name under which an evaluation has it.

    Two groups may hold one task, and ask it in two ways.
    """
    build = task.build_all_requests

    def built(*args: Any, **kwargs: Any) -> Any:
        found = build(*args, **kwargs)
        for instance in task.instances:
            instance.task_name = name
        return found

    with _replaced(task, {"build_all_requests": built}) if name != task.task_name else nullcontext():
        yield


class _Numbers(list):
    """Document numbers in which every number is at its own place."""

    def __getitem__(self, n: Any) -> Any:
        return n


def choose_documents(tasks: Mapping[str, Any], how: dict[str, Any]) -> None:
    """Put the ``samples`` among the arguments of an evaluation as lm-eval's ``evaluate`` can use them.

    0.5.0.dev1 numbers requests by the true numbers of their documents, and then takes these for places in the list.
    """
    if how.get("samples") and any(hasattr(task, "scorers") for task in tasks.values()):
        how["samples"] = {name: _Numbers(numbers) for name, numbers in how["samples"].items()}


@contextmanager
def with_numbers(
    task: Any, of_document: Callable[[int, int], Mapping[str, float]], better: Mapping[str, bool]
) -> Iterator[None]:
    """For a while a task reports further numbers of every document, and their means.

    Args:
        task: The task instance; it is left as it was.
        of_document: Told the number that a document's requests have, and its number among all documents; returns the
            numbers by name.
        better: Whether higher is better, by name.
    """
    higher = task.higher_is_better
    ours: dict[str, Any] = {"higher_is_better": lambda: {**higher(), **better}}
    with ExitStack() as stack:
        if hasattr(task, "scorers"):
            ours["process_instances"] = _processed_once(task)
            for scorer in task.scorers:
                stack.enter_context(_replaced(scorer, _of_scorer(scorer, of_document, better)))
        else:
            ours |= _of_task(task, of_document, better)
        stack.enter_context(_replaced(task, ours))
        yield


def _of_task(task: Any, of_document: Callable[[int, int], Mapping[str, float]], better: Mapping[str, bool]) -> Any:
    """What a task gets that turns responses into numbers itself."""
    doc_iterator, process_results, aggregation = task.doc_iterator, task.process_results, task.aggregation
    current = [0, 0]

    def watched_iterator(*args: Any, **kwargs: Any) -> Iterator[Any]:
        chosen = kwargs.get("samples")  # lm-eval counts chosen documents anew, and logs the true number
        for doc_id, doc in doc_iterator(*args, **kwargs):
            current[:] = doc_id, chosen[doc_id] if chosen else doc_id
            yield doc_id, doc

    def watched_results(doc: Any, results: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {**process_results(doc, results, *args, **kwargs), **of_document(*current)}

    return {
        "doc_iterator": watched_iterator,
        "process_results": watched_results,
        "aggregation": lambda: {**aggregation(), **dict.fromkeys(better, mean)},
    }


def _of_scorer(scorer: Any, of_document: Callable[[int, int], Mapping[str, float]], better: Mapping[str, bool]) -> Any:
    """What a scorer gets: further numbers when its results are set, and their mean where it aggregates."""
    set_results, aggregate = scorer.set_results, scorer.aggregate

    def watched_results(scored: Mapping[int, Any]) -> None:
        set_results(
            {
                n: replace(one, scores={**one.scores, **{name: [x] for name, x in of_document(n, n).items()}})
                for n, one in scored.items()
            }
        )

    def with_means(reduced: Any, *args: Any, aggregation_overrides: Any = None, **kwargs: Any) -> Any:
        overrides = {**(aggregation_overrides or {}), **dict.fromkeys(better, mean)}
        return aggregate(reduced, *args, aggregation_overrides=overrides, **kwargs)

    return {"set_results": watched_results, "aggregate": with_means}


def _processed_once(task: Any) -> Callable[[], None]:
    """``process_instances``, told only what was asked for: what pads processes to equal requests is answered, too."""
    process_instances = task.process_instances

    def processed() -> None:
        for instance in task.instances:
            del instance.resps[instance.repeats or 1 :]
        process_instances()

    return processed


@contextmanager
def _replaced(thing: Any, attributes: Mapping[str, Any]) -> Iterator[None]:
    """An object's attributes are others for a while."""
    before = {name: thing.__dict__[name] for name in attributes if name in thing.__dict__}
    for name, value in attributes.items():
        setattr(thing, name, value)
    try:
        yield
    finally:
        for name in attributes:
            delattr(thing, name)
        for name, value in before.items():
            setattr(thing, name, value)


# ------------------------------------------------------------------ one document
def request(kind: str, doc: Any, arguments: tuple[Any, ...], idx: int, task: str, doc_id: int) -> Instance:
    """One request of a document, to be answered once.

    Args:
        kind: The model's method that answers it.
        doc: The document.
        arguments: What the method is asked.
        idx: The request's place among those of the document.
        task: The task's name.
        doc_id: The document's number.
    """
    if "target" in Instance.__dataclass_fields__:
        return Instance(kind, doc, arguments, task_name=task, doc_id=doc_id, idx=idx)
    return Instance(kind, doc, arguments, idx, (task, doc_id, 1))


def filtered_by(task: Any, instances: Sequence[Any], name: str) -> list[Any]:
    """The responses to requests under a filter: one per request, or a list where the filter leaves several."""
    found = [instance.filtered_resps[name] for instance in instances]
    if not hasattr(task, "scorers"):
        return found
    return [one[0] if len(one) == 1 else one for one in map(list, found)]


def scores(task: Any, instances: Sequence[Any], name: str) -> dict[str, Any]:
    """What a task makes of one document's filtered responses: its numbers by name.

    Args:
        task: The task.
        instances: The document's requests, filtered.
        name: The filter's.
    """
    doc, responses = instances[0].doc, [instance.filtered_resps[name] for instance in instances]
    if not hasattr(task, "scorers"):
        return task.process_results(doc, responses)
    scorer = next(scorer for scorer in task.scorers if scorer.name == name)
    number = instances[0].doc_id
    own = task.process_results(doc, list(chain.from_iterable(responses)))
    if own is None:
        scored = scorer.score_doc(number, list(instances))
    else:
        from lm_eval.scorers import ScoredDoc

        lists = {key: value if isinstance(value, list) else [value] for key, value in own.items()}
        scored = ScoredDoc(doc_id=number, reference=instances[0].target, scores=lists)
    return dict(scorer.reduce({number: scored})[number])
