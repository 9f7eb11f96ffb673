"""Runs as lm-eval 0.4.13 writes them, made without a model."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

DATE = "2026-11-24T01-49-39.243184"


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def sample(task: str, i: int, right: float, *, shots=0, prompt=None, exit_layer=None, metric="acc", n_blocks=12):
    """A sample of two choices; the right one is the first."""
    doc = {"question": f"{task} question {i}"}
    prompt = prompt or f"{shots} shots. Q: {task} question {i}\nA:"
    chosen = [["-0.5", "True"], ["-1.5", "False"]] if right else [["-1.5", "False"], ["-0.5", "True"]]
    exits = {}
    if exit_layer is not None:
        exits = {"exit_layer": exit_layer, "pruning_ratio": 1 - exit_layer / n_blocks,
                 "flops_ratio": exit_layer / n_blocks, "flops_ratio_total": exit_layer / n_blocks}  # fmt: skip
    return {
        "doc_id": i,
        "doc": doc,
        "target": "yes",
        "arguments": {f"gen_args_{j}": {"arg_0": prompt, "arg_1": word} for j, word in enumerate((" yes", " no"))},
        "resps": [[r] for r in chosen],
        "filtered_resps": chosen,
        "filter": "none",
        "metrics": [metric, *exits],
        "doc_hash": sha(json.dumps(doc, indent=2, ensure_ascii=False)),
        "prompt_hash": sha(prompt),
        "target_hash": sha("yes"),
        metric: right,
        **exits,
    }


def write(folder: Path, tasks: dict[str, list], *, shots=0, version=1.0, groups=None, kind="hf", stopper=None,
          date=DATE, seconds="10.0", model="m", **sample_options) -> Path:
    """A run; ``tasks`` maps names to documents' scores, or to finished samples."""  # fmt: skip
    place = Path(folder) / model
    place.mkdir(parents=True, exist_ok=True)
    rows = {}
    for task, values in tasks.items():
        samples = [
            v if isinstance(v, dict) else sample(task, i, v, shots=shots, **sample_options) for i, v in enumerate(values)
        ]
        rows[task] = samples
        with (place / f"samples_{task}_{date}.jsonl").open("w") as file:
            file.writelines(json.dumps(s) + "\n" for s in samples)
    config = {"model": kind, "model_args": {"pretrained": model}}
    if stopper is not None:
        config["model_args"]["stopper"] = stopper
        config["adainfer"] = {
            "stopper": {"kind": stopper.split(":")[0]}, "n_blocks": 12, "seconds_in_model_measured": float(seconds) / 2,
        }  # fmt: skip
    results = {
        "results": {task: {"alias": task} for task in tasks},
        "group_subtasks": groups or {},
        "configs": {task: {"task": task, "num_fewshot": shots} for task in tasks},
        "versions": dict.fromkeys(tasks, version),
        "n-shot": dict.fromkeys(tasks, shots),
        "higher_is_better": {task: {"acc": True} for task in tasks},
        "n-samples": {task: {"original": len(s), "effective": len(s)} for task, s in rows.items()},
        "config": config,
        "total_evaluation_time_seconds": seconds,
    }
    (place / f"results_{date}.json").write_text(json.dumps(results))
    return Path(folder)


def flips(n: int, lost: int, won: int, right: int | None = None) -> tuple[list[int], list[int]]:
    """Scores of a baseline and a candidate with so many discordant documents."""
    both = (n - lost - won) // 2 if right is None else right
    first = [1] * lost + [0] * won + [1] * both + [0] * (n - lost - won - both)
    second = [0] * lost + [1] * won + [1] * both + [0] * (n - lost - won - both)
    return first, second
