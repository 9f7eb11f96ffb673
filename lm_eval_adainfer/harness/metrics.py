"""Exit statistics beside the task's own metrics: in the table, the JSON, the samples and the group rows.

lm-eval has no hook for this. When an AdaInferLM is built, ``lm_eval.evaluator.evaluate`` is given other code; for our
model, and for it alone, each task *instance* gets its own ``process_results``, ``aggregation`` and so on for the
length of the call. The metrics are defined in ``docs/numbers.md``.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import FunctionType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from lm_eval.api.metrics import mean
from lm_eval.config.group import AggMetricConfig

from lm_eval_adainfer import releases, statistics
from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.harness import pilot, private, promise, seen
from lm_eval_adainfer.harness.gold import right_requests
from lm_eval_adainfer.records import ExitRecord

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.instance import Instance


# metric -> higher is better; each is a mean over documents (lm-eval's own mean, which brings a standard error)
MEANS = {
    "exit_layer": False,
    "pruning_ratio": True,
    "flops_ratio": False,
    "flops_ratio_total": False,
    "layers_run": False,
}
VARIANCE = "exit_layer_var"
TOP1 = "top1_acc"
PROMPT = "prompt_exit_layer"  # of texts under a reader that decides how deep the prompt goes
_STOCK = "_adainfer_stock_evaluate"  # in the module of ``evaluate``


class ReportsExits(Protocol):
    """What the metrics need of a model: ``reports_exits`` is true, and answers carry exit records."""

    reports_exits: bool
    stopper: Any
    reader: Any
    generation: str
    rank: int
    run_totals: dict[str, Any]
    pilot_record: dict[str, Any] | None
    promise_record: dict[str, Any] | None
    seen_record: dict[str, Any] | None

    @property
    def fingerprint(self) -> str:
        """Of the model and the stopper, as they are now."""

    def resolve_auto(self, tasks: dict[str, Any], how: Mapping[str, Any]) -> None:
        """Find the stopper, where the tasks decide which."""

    def totals(self) -> dict[str, Any]:
        """This process's totals since the model was built."""

    def identified(self) -> AbstractContextManager[None]:
        """For the length of a run the fingerprint stays what it is."""

    def without_cache(self) -> AbstractContextManager[None]:
        """For the length of a run no cache of answers is written."""


def install() -> None:
    """Let lm-eval's ``evaluate`` gather exit statistics, whoever has imported it, and whenever.

    Scripts may hold the function under any name before a model is built, so the function itself is given other code
    (in 0.4.13 it is a plain function of ``lm_eval.evaluator``). The code that it had is kept beside it.
    """
    from lm_eval import evaluator

    function: Any = inspect.unwrap(evaluator.evaluate)  # below whatever others have put around it
    if function.__code__ is _stand_in.__code__:
        return
    stock: Any = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    stock.__kwdefaults__ = function.__kwdefaults__
    function.__globals__[_STOCK] = stock
    function.__signature__ = inspect.signature(stock)  # that of the new code would tell nobody anything
    function.__code__ = _stand_in.__code__


def _stand_in(*args: Any, **kwargs: Any) -> Any:
    """What ``evaluate`` runs now; its globals are those of lm-eval's module, so it names all that it needs."""
    from lm_eval_adainfer.harness.metrics import evaluate_with_exit_statistics

    return evaluate_with_exit_statistics(_adainfer_stock_evaluate, *args, **kwargs)  # type: ignore[name-defined] # noqa: F821


def evaluate_with_exit_statistics(
    evaluate: Callable[..., Any], lm: Any, task_dict: Any, *args: Any, **kwargs: Any
) -> Any:
    """As lm-eval's ``evaluate``; where the model is ours, its exit statistics are among the results."""
    model = getattr(lm, "lm", lm)  # --use_cache hands in a CachingLM
    if not getattr(model, "reports_exits", False):
        return evaluate(lm, task_dict, *args, **kwargs)
    if "tasks" in task_dict:
        tasks, groups = task_dict["tasks"], task_dict.get("groups", {})
    else:
        groups, tasks = private.groups_and_tasks(task_dict)
    bound = inspect.signature(evaluate).bind(lm, task_dict, *args, **kwargs)
    own, how = releases.by_own_name(tasks), releases.asked_by_own_name(tasks, bound.arguments)
    model.resolve_auto(own, how)
    before, model.run_totals = model.totals(), {}  # one model object may be evaluated several times
    model.pilot_record, dense = None, pilot.Pilot(model, tasks)
    model.promise_record = promise.check(model, own, how)
    model.seen_record = seen.check(model, own, how)
    members = {name: releases.members(group, tasks) for name, group in groups.items()}
    with ExitStack() as stack:
        if model is lm:  # a cache that an earlier run was given is not this one's
            stack.enter_context(model.without_cache())
        stack.enter_context(model.identified())
        reads_prompts = model.reader.runs_tokens and model.generation == "early"
        for name, task in tasks.items():
            stack.enter_context(releases.requests_named(task, name))
        watches = {name: stack.enter_context(_watched(task, model)) for name, task in tasks.items()}
        for name, group in groups.items():
            stack.enter_context(_group_metrics(group, [tasks[member] for member in members[name]], reads_prompts))
        stack.enter_context(dense.before_the_run())
        releases.choose_documents(tasks, bound.arguments)
        results = evaluate(*bound.args, **bound.kwargs)
    spent = {name: value - before[name] for name, value in model.totals().items()}
    documents_here = {name: watch.documents for name, watch in watches.items()}
    gathered = releases.gathered(model, (documents_here, spent, dense.found()))
    if gathered is not None and model.rank == 0:
        documents = {name: _merge([part[0][name] for part in gathered]) for name in watches}
        model.run_totals = _add_up([part[1] for part in gathered])
        pilots = [part[2] for part in gathered]
        model.pilot_record = pilot.record(pilots)
        pilot.warn(pilots, members, model)
        if results is not None:
            _finish(results, documents, members)
    return results


class _Watch:
    """One task's documents during one ``evaluate``, and what their exit records said."""

    def __init__(self, task: Any, model: ReportsExits):
        self.task, self.fingerprint = task, model.fingerprint
        self.dropped_blocks = list(model.stopper.dropped_blocks)
        self.documents: dict[int, dict[str, Any]] = {}
        self._requests: dict[int, list[Instance]] | None = None

    def instances(self, doc_id: int) -> list[Instance]:
        """A document's instances, in the order of their requests."""
        if self._requests is None:
            found: dict[int, list[Instance]] = defaultdict(list)
            for instance in self.task.instances:
                found[instance.doc_id].append(instance)
            self._requests = {k: sorted(v, key=lambda i: i.idx) for k, v in found.items()}
        return self._requests[doc_id]

    def numbers(self, doc_id: int, true_id: int) -> dict[str, float]:
        """A document's exit statistics, from its responses (filters build new strings)."""
        instances = self.instances(doc_id)
        kinds: dict[str, list[ExitRecord]] = defaultdict(list)
        for i in instances:  # lm-eval pads processes to equal numbers of requests; what it asked twice it appends
            kinds[i.request_type] += [self._record_of(response) for response in i.resps[: i.repeats]]
        layers = {t.exit_layer for t in kinds["loglikelihood"]}
        if len(layers) > 1:
            raise AdaInferError(
                f"use_cache: answers of document {doc_id} of task {instances[0].task_name} were scored after "
                f"different blocks ({', '.join(f'{x:g}' for x in sorted(layers))}); run it without --use_cache"
            )
        # every kind of request decides for itself, and counts once, however many of its requests there are
        means = [{name: mean([getattr(t, name) for t in ts]) for name in MEANS} for ts in kinds.values() if ts]
        values = {name: mean([one[name] for one in means]) for name in MEANS}
        records = [t for ts in kinds.values() for t in ts]
        features = [t.features for t in records if t.features is not None]
        generated = [t.layers for t in records if t.layers is not None]
        self.documents[true_id] = {
            "exit_layer": values["exit_layer"],
            **({"adainfer_features": features[0]} if features else {}),
            **({"dropped_blocks": self.dropped_blocks} if self.dropped_blocks else {}),
            **({"exit_layers": generated} if generated else {}),
        }
        prompts = [t.prompt_exit_layer for t in records if t.prompt_exit_layer is not None]
        if prompts and len(prompts) == len(records):
            values[PROMPT] = mean(prompts)
        if (top1 := self._top1(instances[0].doc, instances)) is not None:
            values[TOP1] = top1
        return values

    def _record_of(self, response: Any) -> ExitRecord:
        record = getattr(response, "exit_record", None)
        if not isinstance(record, ExitRecord) or record.fingerprint != self.fingerprint:
            raise AdaInferError(
                "use_cache: it returned an answer that this model and stopper did not give; give another path"
            )
        return record

    def _top1(self, doc: Any, instances: Sequence[Instance]) -> float | None:
        """Whether the full vocabulary's top token is the gold answer's first token; None where there is no gold."""
        flags = [getattr(i.resps[0], "top1", None) for i in instances]
        if any(flag is None for flag in flags):
            return None
        if self.task.OUTPUT_TYPE == "loglikelihood" and len(flags) == 1:
            return float(bool(flags[0]))
        if self.task.OUTPUT_TYPE != "multiple_choice" or releases.chooses_contexts(self.task):
            return None
        golds = right_requests(self.task, doc)
        return float(any(flags[g] for g in golds if 0 <= g < len(flags))) if golds else None


@contextmanager
def _watched(task: Any, model: ReportsExits) -> Iterator[_Watch]:
    """Give this task instance our statistics, and take them away afterwards."""
    watch = _Watch(task, model)
    with releases.with_numbers(task, watch.numbers, {**MEANS, VARIANCE: False, TOP1: True, PROMPT: False}):
        yield watch


@contextmanager
def _group_metrics(group: Group, members: Sequence[Any], reads_prompts: bool) -> Iterator[None]:
    """Let a group that aggregates anything aggregate our means too, weighted by documents."""
    before = group.aggregate_metric_list
    if not before:
        yield
        return
    top1 = all(
        (task.OUTPUT_TYPE == "multiple_choice"
        and not releases.chooses_contexts(task))
        or task.OUTPUT_TYPE == "loglikelihood"
        for task in members
    )
    texts = reads_prompts and bool(members) and all(task.OUTPUT_TYPE == "generate_until" for task in members)
    names = [*MEANS, *([TOP1] if top1 and members else []), *([PROMPT] if texts else [])]
    extra = [
        AggMetricConfig(metric=name, aggregation="mean", weight_by_size=True, filter_list=None)
        for name in names
        if name not in {config.metric for config in before}
    ]
    group.aggregate_metric_list = [*before, *extra]
    try:
        yield
    finally:
        group.aggregate_metric_list = before


def _merge(parts: Sequence[dict[int, dict[str, Any]]]) -> dict[int, dict[str, Any]]:
    return {doc_id: details for part in parts for doc_id, details in part.items()}


def _add_up(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Totals over processes; they work side by side, so of the seconds the longest count."""
    return {name: (max if name.startswith("seconds") else sum)(part[name] for part in parts) for name in parts[0]} | (
        {"processes": len(parts)} if len(parts) > 1 else {}
    )


def _finish(
    results: dict[str, Any], documents: dict[str, dict[int, dict[str, Any]]], members: Mapping[str, Sequence[str]]
) -> None:
    """Add what is no mean over documents: the variance, for tasks and groups, and the samples' details."""
    layers = {name: [d["exit_layer"] for d in found.values()] for name, found in documents.items()}
    tasks = {name: row for name, row in results.get("results", {}).items() if name in layers}
    for section in ("results", "groups"):
        for name, row in results.get(section, {}).items():
            for key in [key for key in row if key.startswith("exit_layer,")]:
                suffix = key.partition(",")[2]
                # lm-eval's group row under a filter is over the members that have this filter, so its variance is too
                own = [name] if name in tasks else [t for t in members.get(name, []) if key in tasks.get(t, {})]
                found = [x for task in own for x in layers[task]]
                if not found:
                    continue
                row[f"{VARIANCE},{suffix}"] = population_variance(found)
                error = statistics.variance_error(np.array(found))
                row[f"{VARIANCE}_stderr,{suffix}"] = "N/A" if error is None else error
    for name, samples in results.get("samples", {}).items():
        for sample in samples:
            details = documents.get(name, {}).get(sample["doc_id"], {})
            sample.update({key: value for key, value in details.items() if key != "exit_layer"})


def population_variance(values: Sequence[float]) -> float:
    """The paper's Var: mean squared distance from the mean."""
    centre = sum(values) / len(values)
    return sum((x - centre) ** 2 for x in values) / len(values)
