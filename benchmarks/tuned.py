"""What a stopper saves of a run, *measured*: whole evaluations with it and with ``stopper=none``, taken alternately.

    python -m benchmarks.tuned --model_args pretrained=MODEL,dtype=float32 --stopper tuned/tuned.stopper \
        --check_layers 23 --tasks a,b --num_fewshot 5 --batch_size 8 --limit 100

Seconds are those in the model (``loglikelihood`` and ``generate_until``), prompts tokenised and batched included.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lm_eval
import torch

from benchmarks.models import over, seconds
from lm_eval_adainfer import container
from lm_eval_adainfer.harness import loading


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
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", "-o", type=Path, help="the JSON file (default: printed)")
    options = parser.parse_args(arguments)
    early = f"{options.model_args},stopper={options.stopper},pilot=0"
    if options.check_layers:
        early += f",check_layers={options.check_layers}"
    early += f",{options.more}" if options.more else ""
    sides = {"none": f"{options.model_args},stopper=none", "early": early}
    models = {name: loading.load_model(of, options.device, batch_size=options.batch_size) for name, of in sides.items()}
    manager, found = lm_eval.tasks.TaskManager(), {}

    def run(name: str) -> float:
        before = models[name].seconds
        found[name] = lm_eval.simple_evaluate(
            models[name], tasks=options.tasks.split(","), num_fewshot=options.num_fewshot, limit=options.limit,
            task_manager=manager, bootstrap_iters=0, log_samples=True,
        )  # fmt: skip
        return float(models[name].seconds - before)

    rounds, whole = [], []
    for _ in range(options.repeats + 1):  # the first warms up
        taken: dict[str, float] = {}
        whole.append({name: seconds(lambda name=name, taken=taken: taken.update({name: run(name)})) for name in sides})
        rounds.append(taken)
    rows = {}
    for task in found["none"]["results"]:
        both = {name: found[name]["results"][task] for name in sides}
        rows[task] = {
            "documents": found["none"]["n-samples"][task]["effective"] if task in found["none"]["n-samples"] else None,
            **{name: {key.partition(",")[0]: value for key, value in of.items() if _is_told(key, value)}
               for name, of in both.items()},
        }  # fmt: skip
    told: dict[str, Any] = {
        "measured": "seconds in the model, stopper=none over the stopper, taken alternately",
        "machine": f"{platform.processor() or 'CPU'}, {torch.get_num_threads()} threads",
        "speed": over(rounds[1:], "none", "early"),
        "speed of the whole evaluation": over(whole[1:], "none", "early"),
        "tasks": rows,
    }
    text = json.dumps(told, indent=1)
    print(text)
    if options.output:
        container.write_atomically(options.output, (text + "\n").encode())


def _is_told(key: str, value: object) -> bool:
    return isinstance(value, float) and "stderr" not in key


if __name__ == "__main__":
    main()
