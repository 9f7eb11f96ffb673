"""Running both sides of a check in one job, through lm-eval's own ``simple_evaluate``."""

from __future__ import annotations

import inspect
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from lm_eval_adainfer import paths
from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.harness.asking import Asking, key_values

_FIRST, _MORE = 64, 0.25  # documents of the first part, and of each further one, as a share of those before


def run_both(
    model_args: str,
    tasks: str,
    output: Path,
    stock_baseline: bool = False,
    include_path: str | None = None,
    baseline: str | None = None,
    asked: Asking | None = None,
    **options: Any,
) -> tuple[str, str]:
    """Evaluate the baseline and the candidate.

    Args:
        model_args: Of the candidate.
        tasks: Names, separated by commas.
        output: The folder; the runs go into ``baseline`` and ``candidate``.
        stock_baseline: Whether the baseline is ``--model hf`` instead of ``stopper=none``.
        include_path: A folder of further task YAMLs.
        baseline: A run that is there already, to use instead.
        asked: Chat template, system instruction and the like; by default none.
        **options: Of ``simple_evaluate``: num_fewshot, limit, batch_size, device.

    Returns:
        Where the two runs lie.

    Raises:
        AdaInferError: On unknown tasks, and on arguments with which no model can be made.
    """
    from lm_eval_adainfer.harness.loading import load_tasks, task_manager
    from lm_eval_adainfer.harness.model import DEMO

    names = [name for name in tasks.split(",") if name]
    asked = asked or Asking()
    candidate_args = key_values(model_args)
    manager = task_manager(candidate_args, include_path, asked.metadata)
    load_tasks(manager, names)  # names what is unknown before a model is loaded
    options |= {
        "apply_chat_template": asked.apply_chat_template,
        "system_instruction": asked.system_instruction,
        "fewshot_as_multiturn": asked.fewshot_as_multiturn,
        "gen_kwargs": dict(asked.gen_kwargs) if asked.gen_kwargs else None,
    }
    if stock_baseline:
        dense = {key: value for key, value in candidate_args.items() if key not in _ours()}
        if dense.get("pretrained", DEMO) == DEMO:
            dense["pretrained"] = str(paths.demo_model())
    else:
        dense = {**candidate_args, "stopper": "none"}
    if baseline is None:
        baseline = str(output / "baseline")
        _evaluate("hf" if stock_baseline else "adainfer", dense, names, baseline, manager, options)
    _evaluate("adainfer", candidate_args, names, str(output / "candidate"), manager, options)
    return baseline, str(output / "candidate")


def run_until(
    decided: Callable[[str, str, dict[tuple[str, int], int], Sequence[tuple[str, int]]], bool],
    model_args: str,
    tasks: str,
    output: Path,
    include_path: str | None = None,
    asked: Asking | None = None,
    limit: int | None = None,
    batch_size: str | int | None = None,
    device: str | None = None,
    seed: int = 0,
    **options: Any,
) -> tuple[str, str, dict[tuple[str, int], int]]:
    """Evaluate both sides on more and more documents, in a seeded random order over all tasks, until they can tell.

    Both models are loaded, and both answer each part of the documents before the next one is begun.

    Args:
        decided: Told where the two runs of the documents so far lie, all documents' places in the order, and which were
            used; whether that is enough.
        model_args: Of the candidate.
        tasks: Names, separated by commas.
        output: The folder; the runs go into ``baseline`` and ``candidate``.
        include_path: A folder of further task YAMLs.
        asked: Chat template, system instruction and the like; by default none.
        limit: Documents per task, at most.
        batch_size: As lm-eval's.
        device: As lm-eval's.
        seed: Of the order.
        **options: Of ``simple_evaluate``: num_fewshot.

    Returns:
        Where the two runs lie, and the places of all documents in the order.

    Raises:
        AdaInferError: On unknown tasks, on groups whose tasks weigh the same, and on arguments with which no model can
            be made.
    """
    from lm_eval_adainfer.harness.loading import load_model, load_tasks, task_manager

    asked, candidate_args = asked or Asking(), key_values(model_args)
    manager = task_manager(candidate_args, include_path, asked.metadata)
    names = [name for name in tasks.split(",") if name]
    loaded = load_tasks(manager, names)
    groups = manager.load(manager.match_tasks(names)).get("groups", {})
    for name, group in groups.items():
        if any(not config.weight_by_size for config in group.aggregate_metric_list or ()) and len(loaded) > 1:
            raise AdaInferError(f"stop-early: the tasks of {name} weigh the same, which it can't judge; leave it out")
    sizes = {name: len(task.eval_docs) for name, task in loaded.items()}
    every = [(name, i) for name, size in sizes.items() for i in range(min(size, limit or size))]
    order = [every[i] for i in np.random.default_rng(seed).permutation(len(every))]
    places = {document: place for place, document in enumerate(order)}
    settings = {
        "apply_chat_template": asked.apply_chat_template,
        "system_instruction": asked.system_instruction,
        "fewshot_as_multiturn": asked.fewshot_as_multiturn,
        "gen_kwargs": dict(asked.gen_kwargs) if asked.gen_kwargs else None,
        "batch_size": batch_size,
        "device": device,
        **options,
    }
    more = {} if batch_size is None else {"batch_size": batch_size}
    candidate_args = {"pilot": 0, **candidate_args}  # all documents are answered dense, too
    sides = {
        side: Parts(
            load_model(json.dumps(its_args), device, **more),
            its_args,
            {name: [task.task_name for task in group.get_all_tasks()] for name, group in groups.items()},
            sizes,
        )
        for side, its_args in (("baseline", {**candidate_args, "stopper": "none"}), ("candidate", candidate_args))
    }
    done = 0
    while True:
        part = order[done : done + max(_FIRST, int(_MORE * done))]
        chosen: dict[str, list[int]] = {}
        for name, i in sorted(part):
            chosen.setdefault(name, []).append(i)
        for side in sides.values():
            side.add(chosen, manager, settings)
        done += len(part)
        with tempfile.TemporaryDirectory() as temporary:
            for name, side in sides.items():
                side.write(Path(temporary) / name)
            enough = decided(f"{temporary}/baseline", f"{temporary}/candidate", places, order[:done])
        if enough or done == len(order):
            for name, side in sides.items():
                side.write(output / name)
            return str(output / "baseline"), str(output / "candidate"), places


class Parts:
    """One side's evaluations of parts of the documents, and the run that they are together.

    Args:
        lm: The model.
        model_args: Its arguments, for the record.
        groups: Group to its tasks.
        sizes: Documents of each task.
    """

    def __init__(
        self, lm: Any, model_args: dict[str, Any], groups: dict[str, list[str]], sizes: dict[str, int]
    ) -> None:
        self.lm, self.model_args, self.groups, self.sizes = lm, model_args, groups, sizes
        self._parts: list[dict[str, Any]] = []
        self._samples: dict[str, list[dict[str, Any]]] = {}
        self._seconds = 0.0

    def add(self, chosen: dict[str, list[int]], manager: Any, settings: dict[str, Any]) -> None:
        """Evaluate some documents of some tasks."""
        began = time.perf_counter()
        with _one_sentence():
            found = evaluated(
                model=self.lm, tasks=list(chosen), task_manager=manager, log_samples=True, bootstrap_iters=0,
                samples=chosen, **settings,
            )  # fmt: skip
        self._seconds += time.perf_counter() - began
        for task, samples in found.pop("samples").items():
            self._samples.setdefault(task, []).extend(samples)
        self._parts.append(found)

    def write(self, folder: Path) -> None:
        """Write the run of all documents so far, as lm-eval would."""
        from lm_eval.loggers import EvaluationTracker

        whole = dict(self._parts[-1])
        for section in ("configs", "versions", "n-shot", "higher_is_better"):
            whole[section] = {task: value for part in self._parts for task, value in part.get(section, {}).items()}
        whole["n-samples"] = {  # under several filters a document has several samples
            task: {"original": self.sizes[task], "effective": len({s["doc_id"] for s in samples})}
            for task, samples in self._samples.items()
        }
        whole["group_subtasks"] = self.groups
        whole.pop("groups", None)
        whole["results"] = {task: self._scores(task) for task in self._samples}
        config = {**whole["config"], "model": "adainfer", "model_args": self.model_args}
        config["adainfer"] = _summed([part["config"].get("adainfer", {}) for part in self._parts])
        tracker = EvaluationTracker(output_path=str(folder))
        tracker.general_config_tracker.model_name_sanitized = "adainfer"
        tracker.general_config_tracker.start_time = time.perf_counter() - self._seconds
        tracker.save_results_aggregated(results={**whole, "config": config}, samples=self._samples)
        for task, samples in self._samples.items():
            tracker.save_results_samples(task_name=task, samples=sorted(samples, key=lambda s: s["doc_id"]))

    def _scores(self, task: str) -> dict[str, Any]:
        """The means over all parts, each weighing its documents; what is no mean is left out."""
        rows = [part["results"][task] for part in self._parts if task in part["results"]]
        counts = [part["results"][task]["sample_len"] for part in self._parts if task in part["results"]]
        means = {
            key: float(np.average([row[key] for row in rows], weights=counts))
            for key, value in rows[0].items()
            if isinstance(value, (int, float)) and "," in key and "_stderr," not in key and "_var," not in key
        }
        return {"alias": rows[0].get("alias", task), **means}


def _summed(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The record of the whole run: what was measured and counted is added up."""
    added = [key for key in records[-1] if key.endswith(("_measured", "_counted")) and "per_second" not in key]
    sums = {key: sum(r.get(key) or 0 for r in records) for key in added if isinstance(records[-1][key], (int, float))}
    return {**records[-1], **sums}


def evaluated(**options: Any) -> dict[str, Any]:
    """lm-eval's ``simple_evaluate``, of this process alone."""
    from lm_eval import simple_evaluate

    found: dict[str, Any] | None = simple_evaluate(**options)
    if found is None:
        raise AdaInferError("run: this process is not the main one; run adainfer check --run in a single process")
    return found


@contextmanager
def _one_sentence() -> Iterator[None]:
    """Transformers' and lm-eval's words for what went wrong, in one sentence."""
    try:
        yield
    except (AttributeError, OSError, TypeError, ValueError) as error:
        if isinstance(error, AdaInferError):
            raise
        raise AdaInferError(f"run: {str(error).splitlines()[0] if str(error) else repr(error)}") from error


def _ours() -> set[str]:
    """The model's arguments that stock ``hf`` does not have."""
    from lm_eval.models.huggingface import HFLM

    from lm_eval_adainfer.harness.model import AdaInferLM

    ours, stock = (inspect.signature(cls.__init__).parameters for cls in (AdaInferLM, HFLM))
    return set(ours) - set(stock)


def _evaluate(
    model: str, model_args: dict[str, Any], tasks: list[str], output: str, manager: Any, options: dict[str, Any]
) -> None:
    from lm_eval.loggers import EvaluationTracker

    tracker = EvaluationTracker(output_path=output)
    with _one_sentence():
        results = evaluated(
            model=model,
            model_args=model_args,
            tasks=tasks,
            task_manager=manager,
            log_samples=True,
            evaluation_tracker=tracker,
            bootstrap_iters=0,
            **options,
        )
    samples = results.pop("samples")
    tracker.save_results_aggregated(results=results, samples=samples)
    for task, found in samples.items():
        tracker.save_results_samples(task_name=task, samples=found)
