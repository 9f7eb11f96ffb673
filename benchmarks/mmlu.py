"""A whole few-shot run, stock ``hf`` against ``adainfer``: ``python -m benchmarks.mmlu --pretrained DIR --limit 20``.

Both answer the same requests of the same tasks in turn; what is timed is ``loglikelihood``, tokenisation included, not
the loading of model and data. *Measured*; medians.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from benchmarks.models import alternately, cell, over
from lm_eval_adainfer.harness.model import AdaInferLM


def main() -> None:
    """Print a table, and how far the answers differ."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mmlu", description=__doc__)
    parser.add_argument("--pretrained", required=True)
    parser.add_argument("--tasks", default="mmlu", help="separated by commas")
    parser.add_argument("--num_fewshot", type=int, default=5)
    parser.add_argument("--limit", type=int, default=20, help="documents per task")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--stopper", default="gap:0.8", help="of the early run")
    parser.add_argument("--sides", default="none,unshared,early", help="which are timed beside stock hf (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()

    requests, tasks = [], TaskManager().load(options.tasks.split(","))["tasks"]
    for task in tasks.values():
        task.set_config("num_fewshot", options.num_fewshot)
        task.set_fewshot_seed(seed=1234)
        task.build_all_requests(limit=options.limit, rank=0, world_size=1)
        requests += task.instances
    given = {"pretrained": options.pretrained, "dtype": options.dtype, "device": options.device,
             "batch_size": options.batch_size}  # fmt: skip
    sides = {"none": {}, "unshared": {"prefix_cache": 0}, "early": {"stopper": options.stopper}}
    if unknown := [name for name in options.sides.split(",") if name not in sides]:
        parser.error(f"sides: {unknown[0]!r} is none of {', '.join(sides)}")
    models = {"stock hf": HFLM(**given)}
    for name in options.sides.split(","):
        shown = ",".join(f"{key}={value}" for key, value in {"stopper": "none", **sides[name]}.items())
        models[shown] = AdaInferLM(**given, **sides[name])
    answers: dict[str, list] = {}

    def side(name: str):
        def act() -> None:
            answers[name] = models[name].loglikelihood(requests, disable_tqdm=True)

        return act

    found = alternately({name: side(name) for name in models}, options.repeats)
    lm = list(models.values())[1]
    whole, ran = lm.engine.tokens * lm.n_blocks, lm.engine.block_tokens
    stock = answers["stock hf"]
    threads = torch.get_num_threads()
    print(f"{len(tasks)} tasks, {len(requests)} requests, {options.num_fewshot} shots, {threads} threads\n")
    print("| | seconds (measured) | stock hf / this | largest difference of a logprob | greedy flags that differ |")
    print("|---|---|---|---|---|")
    for name in models:
        seconds = statistics.median(f[name] for f in found)
        ratio = cell(over(found, "stock hf", name))
        apart = max(abs(a[0] - b[0]) for a, b in zip(stock, answers[name], strict=True))
        flags = sum(a[1] != b[1] for a, b in zip(stock, answers[name], strict=True))
        print(f"| {name} | {seconds:.1f} | {ratio} | {apart:.1e} | {flags} |")
    print(f"\n{list(models)[1]} ran {ran / whole:.3f} of the tokens x blocks of whole prompts (counted)")


if __name__ == "__main__":
    main()
