"""What a stopper saves and loses, *measured*: whole tasks with it and with ``stopper=none``, taken alternately.

    python -m benchmarks.tuned --model_args pretrained=MODEL,dtype=float32 --stopper tuned/tuned.stopper \
        --check_layers 23 --tasks a,b --num_fewshot 5 --batch_size 8 --limit 100 -o words

Seconds are those in the model (``loglikelihood`` and ``generate_until``), prompts tokenised and batched included.
"""

from __future__ import annotations

import argparse
import json
import platform
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.tasks import TaskManager

from benchmarks.models import over
from lm_eval_adainfer import container
from lm_eval_adainfer.harness import loading
from lm_eval_adainfer.statistics import tango_interval


def main(arguments: Sequence[str] | None = None) -> None:
    """Run it, and print what came of it, or write it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tuned", description=__doc__.split("\n")[0])
    parser.add_argument("--model_args", required=True, help="as lm_eval's, without a stopper")
    parser.add_argument("--stopper", required=True, help="a stopper file, or any stopper")
    parser.add_argument("--check_layers", help="as the model's")
    parser.add_argument("--more", default="", help="further model arguments of that side, as reader=copy")
    parser.add_argument("--tasks", required=True, help="separated by commas")
    parser.add_argument("--num_fewshot", type=int)
    parser.add_argument("--batch_size", default="8")
    parser.add_argument("--limit", type=int, help="documents of each task")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--metric", default="acc", help="of single documents, from 0 to 1")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--weights", default="", help="what the page says of the model")
    parser.add_argument("--command", default="", help="what the page says of how the stopper was made")
    parser.add_argument("--output", "-o", type=Path, help="JSON and Markdown, without ending (default: printed)")
    options = parser.parse_args(arguments)
    early = f"{options.model_args},stopper={options.stopper},pilot=0"
    if options.check_layers:
        early += f",check_layers={options.check_layers}"
    early += f",{options.more}" if options.more else ""
    sides = {"none": f"{options.model_args},stopper=none", "early": early}
    models = {name: loading.load_model(of, options.device, batch_size=options.batch_size) for name, of in sides.items()}
    manager, rows, every = TaskManager(), [], []
    for task in options.tasks.split(","):
        found: dict[str, dict[str, Any]] = {}

        def run(name: str, task: str = task, found: dict[str, dict[str, Any]] = found) -> float:
            before = models[name].seconds
            found[name] = lm_eval.simple_evaluate(
                models[name], tasks=[task], num_fewshot=options.num_fewshot, limit=options.limit,
                task_manager=manager, bootstrap_iters=0, log_samples=True,
            )  # fmt: skip
            return float(models[name].seconds - before)

        rounds = [{name: run(name) for name in sides} for _ in range(options.repeats + 1)][1:]  # the first warms up
        every.append(rounds)
        rows.append(_row(task, found, options.metric, over(rounds, "none", "early")))
    if len(rows) > 1:
        together = [{name: sum(of[i][name] for of in every) for name in sides} for i in range(options.repeats)]
        rows.append(_pooled(rows, over(together, "none", "early")))
    first = next(iter(models.values()))
    told: dict[str, Any] = {
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "weights": options.weights or first.anatomy.model.name_or_path,
        "n_blocks": first.n_blocks,
        "command": options.command,
        "stopper": options.stopper if not Path(options.stopper).exists() else Path(options.stopper).name,
        "check_layers": options.check_layers,
        "num_fewshot": options.num_fewshot,
        "batch_size": options.batch_size,
        "repeats": options.repeats,
        "metric": options.metric,
        "rows": rows,
    }
    print(page(told))
    if options.output:
        text = json.dumps(told, indent=1) + "\n"
        container.write_atomically(options.output.with_name(options.output.name + ".json"), text.encode())
        container.write_atomically(options.output.with_name(options.output.name + ".md"), page(told).encode())


def _row(task: str, found: dict[str, dict[str, Any]], metric: str, speed: dict[str, float]) -> dict[str, Any]:
    """Of one task."""
    right = {name: [sample[metric] for sample in of["samples"][task]] for name, of in found.items()}
    lost = sum(a > b for a, b in zip(right["none"], right["early"], strict=True))
    won = sum(a < b for a, b in zip(right["none"], right["early"], strict=True))
    early = {key.partition(",")[0]: value for key, value in found["early"]["results"][task].items()}
    work = {key: early[key] for key in ("exit_layer", "layers_run", "flops_ratio_total")}
    return _changes(task, len(right["none"]), sum(right["none"]), lost, won) | work | {"speed": speed}


def _pooled(rows: Sequence[dict[str, Any]], speed: dict[str, float]) -> dict[str, Any]:
    """Of all documents together."""
    n = sum(row["documents"] for row in rows)
    lost, won = (sum(row[key] for row in rows) for key in ("lost", "won"))
    right = sum(row["dense"] * row["documents"] for row in rows)
    work = {
        key: sum(row[key] * row["documents"] for row in rows) / n
        for key in ("exit_layer", "layers_run", "flops_ratio_total")
    }
    return _changes("pooled", n, right, lost, won) | work | {"speed": speed}


def _changes(task: str, n: int, right: float, lost: int, won: int) -> dict[str, Any]:
    interval = tango_interval(lost, won, n)  # of the drop
    return {
        "task": task,
        "documents": n,
        "dense": right / n,
        "early": (right - lost + won) / n,
        "lost": lost,
        "won": won,
        "change": (won - lost) / n,
        "change_low": -interval.upper,
        "change_high": -interval.lower,
    }


def page(told: dict[str, Any]) -> str:
    """Markdown."""
    rounds = told["repeats"]
    shots = "the tasks' own" if told["num_fewshot"] is None else told["num_fewshot"]
    lines = [
        "# Dense and early, side by side",
        "",
        *textwrap.wrap(
            f"{told['weights']}; {shots} shots, batches of "
            f"{told['batch_size']}, {told['machine']}. Stopper: {told['stopper']}"
            + (f", asked after {told['check_layers']}" if told["check_layers"] else "")
            + (f", made by `{told['command']}`" if told["command"] else "") + ". "
            f"Change of {told['metric']}, in percentage points, with Tango's 95% interval for matched pairs. Blocks "
            "and FLOPs are *counted* on the run, reading and checks included. Time saved is *measured*: seconds in the "
            f"model, `stopper=none` and the stopper taken alternately, median (lowest to highest) of {rounds} rounds.",
            118,
        ),
        "",
        f"| task | documents | dense | early | change, points | blocks run, of {told['n_blocks']} | FLOPs saved | "
        "time saved |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in told["rows"]:
        low, high = 100 * row["change_low"], 100 * row["change_high"]
        took = [1 - 1 / row["speed"][end] for end in ("median", "low", "high")]
        lines.append(
            f"| {row['task']} | {row['documents']} | {row['dense']:.3f} | {row['early']:.3f} | "
            f"{100 * row['change']:+.1f} ({low:+.1f} to {high:+.1f}) | {row['layers_run']:.1f} | "
            f"{1 - row['flops_ratio_total']:.1%} | {took[0]:.0%} ({took[1]:.0%} to {took[2]:.0%}) |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
