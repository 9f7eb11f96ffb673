"""Runs of HELM (``helm-run``): what ``per_instance_stats.json`` says of every instance, and its text beside it.

A folder of a run is one task: its name is that of the run without the model. Stats are means over instances, and over
the times that HELM drew other training examples for one. Perturbed instances and what a request cost are left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lm_eval_adainfer.comparison.elsewhere import Translated, TranslatedTask, json_of, mean_of, numbered, sample_of
from lm_eval_adainfer.comparison.samples import finite
from lm_eval_adainfer.errors import AdaInferError

_STATS = "per_instance_stats.json"
_COST = re.compile(r"num_|max_prob|logprob|inference_|training_|batch_size|finish_reason_|prompt_truncated|.*_latency")
_HIGHER = re.compile(r"(quasi_|prefix_|quasi_prefix_)?exact_match|f1_score|rouge_|bleu_|.*accuracy|.*correct")
_MODEL = re.compile(r",?model(?:_deployment)?=([^,]*)")


def read(path: Path, argument: str) -> Translated | None:
    """The runs in a folder, all of one model; None where there are none.

    Args:
        path: The folder.
        argument: The user's argument, for messages.

    Raises:
        AdaInferError: On damaged files, and on runs of several models.
    """
    folders = sorted({file.parent for file in path.rglob(_STATS)}) if path.is_dir() else []
    if not folders:
        return None
    run, models = Translated(path, "helm", ""), set()
    for folder in folders:
        spec = json_of(folder / "run_spec.json", argument)
        name = spec.get("name") if isinstance(spec, dict) else None
        if not isinstance(name, str):
            raise AdaInferError(f"{argument}: {folder / 'run_spec.json'} names no run; run HELM again")
        models.add(", ".join(_MODEL.findall(name)) or "?")
        task = _MODEL.sub("", name).replace(":,", ":").strip(",:")
        if task in run.tasks and len(models) == 1:
            raise AdaInferError(f"{argument}: {path} holds {task} twice; give the folder of one suite")
        run.tasks[task] = _task(folder, spec, argument)
    if len(models) > 1:
        raise AdaInferError(
            f"{argument}: {path} holds runs of {len(models)} models ({', '.join(sorted(models))}); give the folders of "
            "one alone"
        )
    run.model = models.pop()
    return run


def _task(folder: Path, spec: Mapping[str, Any], argument: str) -> TranslatedTask:
    rows, file = json_of(folder / _STATS, argument), folder / _STATS
    if not isinstance(rows, list):
        raise AdaInferError(f"{argument}: {file} is no list of instances; run HELM again")
    trials: dict[str, list[dict[str, float | None]]] = {}
    for row in rows:
        if not isinstance(row, dict) or not isinstance(row.get("instance_id"), str):
            raise AdaInferError(f"{argument}: {file} holds an instance without an id; run HELM again")
        if not row.get("perturbation"):
            trials.setdefault(row["instance_id"], []).append(_stats(row.get("stats")))
    texts = _texts(folder, argument)
    task = TranslatedTask([])
    adapter = spec.get("adapter_spec")
    shots = adapter.get("max_train_instances") if isinstance(adapter, dict) else None
    task.shots = shots if isinstance(shots, int) and shots >= 0 else 0
    for name, number in numbered(list(trials)).items():
        metrics = mean_of(trials[name])
        task.better |= {m: True for m in metrics if _HIGHER.match(m)}
        question, right, answers = texts.get(name, (name, "", []))
        doc = {"id": name, "input": question, "right": right}
        task.samples.append(sample_of(number, doc, question, right, answers, metrics))
    return task


def _stats(stats: Any) -> dict[str, float | None]:
    """The means of one instance's stats, those that say how good an answer is first."""
    found: dict[str, float | None] = {}
    for stat in stats if isinstance(stats, list) else ():
        name = stat.get("name") if isinstance(stat, dict) else None
        if not isinstance(name, dict) or not isinstance(name.get("name"), str) or name.get("perturbation"):
            continue
        if not _COST.match(name["name"]):
            found[name["name"]] = finite(stat.get("mean"))
    return dict(sorted(found.items(), key=lambda item: not _HIGHER.match(item[0])))


def _texts(folder: Path, argument: str) -> dict[str, tuple[str, Any, list[str]]]:
    """Instance to its text, its right references and the model's answers; empty where HELM kept no requests."""
    file = folder / "scenario_state.json"
    state = json_of(file, argument) if file.is_file() else {}
    states = state.get("request_states") if isinstance(state, dict) else None
    found: dict[str, tuple[str, Any, list[str]]] = {}
    for one in states if isinstance(states, list) else ():
        instance = one.get("instance") if isinstance(one, dict) else None
        if not isinstance(instance, dict) or not isinstance(instance.get("id"), str) or instance.get("perturbation"):
            continue
        references = instance.get("references")
        right = [
            r.get("output", {}).get("text") for r in (references if isinstance(references, list) else [])
            if isinstance(r, dict) and isinstance(r.get("output"), dict) and "correct" in (r.get("tags") or ())
        ]  # fmt: skip
        question = instance.get("input")
        question = question.get("text") if isinstance(question, dict) else question
        entry = found.setdefault(instance["id"], (str(question), right, []))
        completions = one["result"].get("completions") if isinstance(one.get("result"), dict) else None
        if isinstance(completions, list) and completions and isinstance(completions[0], dict):
            entry[2].append(str(completions[0].get("text")))
    return found
