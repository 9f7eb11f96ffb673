"""The table of all sides: accuracy and its change, what really ran, time, memory, and what each can't do."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval_adainfer.output import rendering
from lm_eval_adainfer.statistics import tango_interval

CANT = [
    [
        "stock hf",
        "Answers every request of lm-eval, on every device; what the others are measured by.",
        "Skips nothing; computes the logits of all tokens of a prompt, of which it reads the last ones.",
    ],
    [
        "economize 0.3.2, CALM",
        '"A token exits once a confidence measure exceeds a threshold"; one of many techniques of a package that '
        "decodes speculatively without loss, trains, quantises and prunes. Has its own lm-eval model.",
        '"The prompt runs every layer": the first token of a choice is scored dense, so choices of one token gain '
        "nothing. Each choice is a request of its own, and runs its prompt again. The tokens of a choice may leave "
        "after different blocks. Its calibration is of the consistency of generated text, not of a task's accuracy.",
    ],
    [
        "tide-inference 0.2.1",
        '"Make any LLM faster by skipping layers tokens don\'t need"; its routers are fitted once, without labels, and '
        "have CUDA kernels.",
        'Its forward and its `generate` run "all layers" ("post-hoc early exit"), so nothing is skipped; what it logs '
        'is an "equivalent speedup". The first new token of `generate` is the dense one. No lm-eval model. With '
        "transformers 5 it norms the last hidden state twice, which changes answers although no token leaves.",
    ],
    [
        "LayerSkip's way",
        "One depth for all documents, in models that were trained to be read at every depth; in generation the rest of "
        "the model verifies, so that its text is the whole model's.",
        "No depth for each document. Its recipe is training: a model that was not trained for it is not readable "
        "early. Not a package; its `eval.py` scores choices with the whole model, one prompt at a time.",
    ],
    [
        "ShortGPT",
        "Removes blocks once: weights and memory are saved, and whatever serves the model afterwards stays as it was.",
        "The same blocks for every document; nothing tells whether a task suffers, and nothing is promised.",
    ],
    [
        "this package",
        "Decides for each document after which block its choices are scored, within lm-eval; has readers for models "
        "whose early blocks the head can't read; a tuned threshold with a promise on the tasks that it was tuned for.",
        "No speculative decoding without loss, no training, no pruned model to serve elsewhere: all weights stay in "
        "memory. Has to be tuned for a model and its tasks, and saves little where the last blocks are needed, as in "
        "so small a model. With the paper's reading it may destroy answers where blocks aren't readable.",
    ],
]


def change(dense: Sequence[int], early: Sequence[int]) -> str:
    """Percentage points of accuracy won, with Tango's 95% interval for matched pairs."""
    lost = sum(a > b for a, b in zip(dense, early, strict=True))
    won = sum(a < b for a, b in zip(dense, early, strict=True))
    found = tango_interval(lost, won, len(dense))
    return f"{-100 * found.drop:+.1f} ({-100 * found.upper:+.1f} to {-100 * found.lower:+.1f})"


def rows(records: Mapping[str, Any], stock: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row per side, over all tasks."""
    found = []
    for record in records.values():
        for task, row in record["tasks"].items():
            same = stock["tasks"][task]
            if (row["requests"], row["documents"]) != (same["requests"], same["documents"]):
                raise SystemExit(f"{record['name']}: other prompts of {task} than stock hf had; run it again")
        found.append({"name": record["name"], **together(record, stock, list(record["tasks"]))})
    return found


def together(record: Mapping[str, Any], stock: Mapping[str, Any], tasks: Sequence[str]) -> dict[str, Any]:
    """The figures of some tasks taken together, every document weighing the same."""

    def summed(of: Mapping[str, Any], key: str) -> Any:
        return sum((of["tasks"][task][key] for task in tasks), type(of["tasks"][tasks[0]][key])())

    early, dense = summed(record, "right"), summed(stock, "right")
    return {
        "acc": statistics.mean(early),
        "change": "" if record is stock else change(dense, early),
        "differ": sum(a != b for a, b in zip(dense, early, strict=True)),
        "blocks": record["blocks"] * summed(record, "block_tokens") / summed(stock, "block_tokens"),
        "operations": summed(record, "operations") / summed(stock, "operations"),
        "time": summed(record, "seconds") / summed(record, "stock_seconds"),
        "memory": record["peak_growth_mib"],
        "said": record["said"],
    }


def markdown(records: Mapping[str, Any], failed: Mapping[str, str], weights: str, settings: Mapping[str, str]) -> str:
    """The Markdown file."""
    stock = records["stock"]
    options, versions = stock["options"], stock["versions"]
    tasks = {task: len(row["documents"]) for task, row in stock["tasks"].items()}
    whole = rows(records, stock)
    told = (
        f"{', '.join(f'`{task}` ({n} documents)' for task, n in tasks.items())}; {options['num_fewshot']} shots, "
        f"batches of {options['batch_size']}, float32, {stock['machine']}; torch {versions['torch']}, transformers "
        f"{versions['transformers']}, lm-eval {versions['lm_eval']}. {weights} Every side had the same documents with "
        "the same prompts, which is checked. Made by `python -m benchmarks.peers`."
    )
    meaning = (
        "Change: in percentage points against stock `hf`, with Tango's 95% interval for matched pairs. Differ: "
        "documents that turned right or wrong. Blocks: *counted* by hooks, tokens through blocks where stock `hf` "
        f"would be {stock['blocks']}; above that, prompts are run more than once. Operations: *counted* by torch's "
        "`FlopCounterMode` in matrix products and attention, head and checks included; stock `hf` is 1. Time: "
        "*measured* seconds of the processor (one thread), in turn with stock `hf` in the same process, "
        f"{options['timed']} documents of each task, {options['repeats']} rounds, medians; stock `hf` is 1. Memory: "
        "*measured* growth of the resident peak while answering, the model being loaded, in MiB."
    )
    cells = [
        [row["name"], f"{row['acc']:.3f}", row["change"] or "-", str(row["differ"]), f"{row['blocks']:.1f}",
         f"{row['operations']:.2f}", f"{row['time']:.2f}", rendering.number(row["memory"], ".0f", "-")]
        for row in whole
    ]  # fmt: skip
    heads = ["", "acc", "change, points", "differ", "blocks run", "operations", "time", "memory"]
    lines = ["# Beside what a user would pick instead", "", *wrapped(told), "", *wrapped(meaning), "",
             *rendering.markdown(rendering.Table(heads, cells))]  # fmt: skip
    for task in tasks:
        parts = [(record["name"], together(record, stock, [task])) for record in records.values()]
        cells = [
            [name, f"{part['acc']:.3f}", part["change"] or "-", f"{part['blocks']:.1f}", f"{part['operations']:.2f}",
             f"{part['time']:.2f}"]
            for name, part in parts
        ]  # fmt: skip
        table = rendering.Table(["", "acc", "change, points", "blocks run", "operations", "time"], cells)
        lines += ["", f"## `{task}`", "", *rendering.markdown(table)]
    lines += ["", "Settings, each side's own recommended ones:", ""]
    for side, text in settings.items():
        lines += listed(f"{records[side]['name']}: {text}.")
    said = [[row["name"], row["said"]] for row in whole if row["said"]]
    if said:
        lines += [
            "",
            "What they say of themselves:",
            "",
            *(line for name, text in said for line in listed(f"{name}: {text}.")),
        ]
    if failed:
        lines += [
            "",
            "What did not run:",
            "",
            *(line for name, why in failed.items() for line in listed(f"{name}: {why}")),
        ]
    table = rendering.Table(["", "what it does", "what it can't"], CANT, left=(0, 1, 2))
    lines += ["", "## What each can't do", "", "In quotation marks: its own words.", "", *rendering.markdown(table)]
    return "\n".join(lines) + "\n"


def wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 118, break_long_words=False, break_on_hyphens=False)


def listed(text: str) -> list[str]:
    first, *rest = wrapped(text)
    return [f"- {first}", *(f"  {line}" for line in rest)]
