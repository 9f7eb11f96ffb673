"""Documents that are added, in a seeded random order, until both sides' answers can tell (``check --stop-early``)."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lm_eval_adainfer import releases
from lm_eval_adainfer.comparison.running import Made, evaluated, load_sides, settings_of
from lm_eval_adainfer.comparison.selection import Selection
from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.harness.asking import Asking, key_values

_FIRST, _MORE = 64, 0.25  # documents of the first part, and of each further one, as a share of those before


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
    exclude: Sequence[str] = (),
    **options: Any,
) -> Made:
    """Evaluate both sides on more and more documents, in a seeded random order over all tasks, until they can tell.

    Both sides answer each part of the documents before the next one is begun.

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
        exclude: Tasks, groups and globs that are left out.
        **options: Of ``simple_evaluate``: num_fewshot.

    Raises:
        AdaInferError: On unknown tasks, on groups whose tasks weigh the same, where no task is left, and on arguments
            with which no model can be made.
    """
    from lm_eval_adainfer.harness.loading import load_tasks, task_manager
    from lm_eval_adainfer.harness.one_pass import dense_args

    asked, candidate_args = asked or Asking(), key_values(model_args)
    names = [name for name in tasks.split(",") if name]
    manager = task_manager(candidate_args, include_path, asked.metadata, names)
    loaded = load_tasks(manager, names)
    groups = manager.load(releases.matched(manager, names)).get("groups", {})
    members = {name: [task.task_name for task in group.get_all_tasks()] for name, group in groups.items()}
    left_out = Selection(exclude=tuple(exclude))
    left_out.require_known([("--tasks", list(loaded), members)])
    chosen = left_out.choose(list(loaded), members, "--tasks")
    loaded = {name: loaded[name] for name in chosen}
    for name, group in groups.items():
        by_task = any(not config.weight_by_size for config in group.aggregate_metric_list or ())
        if by_task and sum(task in loaded for task in members[name]) > 1:
            raise AdaInferError(f"stop-early: the tasks of {name} weigh the same, which it can't judge; leave it out")
    sizes = {name: len(task.eval_docs) for name, task in loaded.items()}
    every = [(name, i) for name, size in sizes.items() for i in range(min(size, limit or size))]
    order = [every[i] for i in np.random.default_rng(seed).permutation(len(every))]
    places = {document: place for place, document in enumerate(order)}
    settings = {**settings_of(asked), "batch_size": batch_size, "device": device, **options}
    sides = load_sides(candidate_args, loaded, device, batch_size)
    about = {"seed": seed, "documents": len(every)}
    runs = {
        "candidate": Parts(sides.candidate, candidate_args, groups, sizes, about),  # its passes may answer for both
        "baseline": Parts(sides.baseline, dense_args(candidate_args), groups, sizes, about),
    }
    done = 0
    while True:
        part = order[done : done + max(_FIRST, int(_MORE * done))]
        asked_now: dict[str, list[int]] = {}
        for name, i in sorted(part):
            asked_now.setdefault(name, []).append(i)
        for run in runs.values():
            run.add(asked_now, manager, settings)
        if sides.passes is not None:
            sides.passes.forget()
        done += len(part)
        with tempfile.TemporaryDirectory() as temporary:
            for name, run in runs.items():
                run.write(Path(temporary) / name)
            enough = decided(f"{temporary}/baseline", f"{temporary}/candidate", places, order[:done])
        if enough or done == len(order):
            for name, run in runs.items():
                run.write(output / name)
            return Made(str(output / "baseline"), str(output / "candidate"), [sides.said], places)


class Parts:
    """One side's evaluations of parts of the documents, and the run that they are together.

    Args:
        lm: The model.
        model_args: Its arguments, for the record.
        groups: lm-eval's groups by name.
        sizes: Documents of each task.
        about: What the record says of the order, under ``stop_early``.
    """

    def __init__(
        self,
        lm: Any,
        model_args: dict[str, Any],
        groups: dict[str, Any],
        sizes: dict[str, int],
        about: dict[str, Any],
    ) -> None:
        self.lm, self.model_args, self.groups, self.sizes, self.about = lm, model_args, groups, sizes, about
        self._parts: list[dict[str, Any]] = []
        self._samples: dict[str, list[dict[str, Any]]] = {}
        self._seconds = 0.0

    def add(self, chosen: dict[str, list[int]], manager: Any, settings: dict[str, Any]) -> None:
        """Evaluate some documents of some tasks."""
        began = time.perf_counter()
        found = evaluated(model=self.lm, tasks=list(chosen), task_manager=manager, samples=chosen, **settings)
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
        whole["group_subtasks"] = {
            name: [task.task_name for task in group.get_all_tasks()] for name, group in self.groups.items()
        }
        tasks = {task: self._scores(task) for task in self._samples}
        whole["groups"] = {
            name: row for name, group in self.groups.items() if len(row := _group_scores(group, tasks)) > 2
        }
        whole["results"] = {**tasks, **whole["groups"]}
        config = {**whole["config"], "model": "adainfer", "model_args": self.model_args}
        config["adainfer"] = _summed([part["config"].get("adainfer", {}) for part in self._parts])
        config["adainfer"]["stop_early"] = self.about
        tracker = EvaluationTracker(output_path=str(folder))
        tracker.general_config_tracker.model_name_sanitized = "adainfer"
        tracker.general_config_tracker.start_time = time.perf_counter() - self._seconds
        tracker.save_results_aggregated(results={**whole, "config": config}, samples=self._samples)
        for task, samples in self._samples.items():
            tracker.save_results_samples(task_name=task, samples=sorted(samples, key=lambda s: s["doc_id"]))

    def _scores(self, task: str) -> dict[str, Any]:
        """The means over all parts, each weighing its documents; what is no mean is left out."""
        rows = [part["results"][task] for part in self._parts if task in part["results"]]
        means = _means(rows, list(rows[0]))
        return {"alias": rows[0].get("alias", task), "sample_len": sum(row["sample_len"] for row in rows), **means}


def _group_scores(group: Any, tasks: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A group's row as lm-eval makes it, without standard errors: means over documents of what all its tasks have."""
    from lm_eval_adainfer.harness import metrics

    rows = [tasks[task.task_name] for task in group.get_all_tasks() if task.task_name in tasks]
    wanted = [(config.metric, config.filter_list) for config in group.aggregate_metric_list or ()]
    ours = [(name, None) for name in (*metrics.MEANS, metrics.TOP1, metrics.PROMPT)] if wanted else []
    keys = [
        key
        for key in (rows[0] if rows else ())
        if all(key in row for row in rows)
        and any(key.partition(",")[0] == m and (fs is None or key.partition(",")[2] in fs) for m, fs in wanted + ours)
    ]
    size = sum(row["sample_len"] for row in rows)
    return {"alias": group.alias or group.name, "sample_len": size, **_means(rows, keys)}


def _means(rows: Sequence[dict[str, Any]], keys: Sequence[str]) -> dict[str, float]:
    """Of the scores among these keys, the means over rows that weigh their documents."""
    counts = [row["sample_len"] for row in rows]
    return {
        key: float(np.average([row[key] for row in rows], weights=counts))
        for key in keys
        if isinstance(rows[0][key], (int, float)) and "," in key and "_stderr," not in key and "_var," not in key
    }


def _summed(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The record of the whole run: what was measured and counted is added up."""
    added = [key for key in records[-1] if key.endswith(("_measured", "_counted")) and "per_second" not in key]
    sums = {key: sum(r.get(key) or 0 for r in records) for key in added if isinstance(records[-1][key], (int, float))}
    return {**records[-1], **sums}
