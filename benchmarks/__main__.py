"""Measures ``--model adainfer`` against stock ``--model hf`` and against models physically cut to the exit's depth.

Times are ratios of two *measured* wall-clock times, taken alternately in one run; the median of several repeats is
reported with the lowest and the highest. Weights are random: speed does not depend on them. ``texts`` takes a real
model with ``--pretrained``, whose texts end by themselves.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import checks, decoding, decoding_checks, memory, mixed, prefill, readers, shared, texts
from benchmarks.models import SHAPES, about, make_model, table
from lm_eval_adainfer import container

KINDS = {
    "prefill": prefill, "checks": checks, "shared": shared, "memory": memory, "decoding": decoding,
    "decoding_checks": decoding_checks, "mixed": mixed, "readers": readers, "texts": texts,
}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmarks and write ``KIND-SHAPE-DTYPE-DEVICE`` as JSON and Markdown."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("kinds", nargs="*", default=list(KINDS), help=f"which: {', '.join(KINDS)} (default: all)")
    parser.add_argument("--shape", default="llama-16x512", choices=SHAPES)
    parser.add_argument("--pretrained", help="texts: a checkpoint's folder or name instead of a shape")
    parser.add_argument("--name", help="of the result file and the model in it (default: of the checkpoint)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--lengths", default="64,256", help="prompt tokens, separated by commas")
    parser.add_argument("--batch_sizes", default="1,8,16", help="separated by commas")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", "-o", default="benchmarks/results", help="folder for JSON and Markdown")
    options = parser.parse_args(arguments)
    for kind in options.kinds:
        if kind not in KINDS:
            parser.error(f"kinds: {kind!r} is none of {', '.join(KINDS)}")

    more = {}
    if options.pretrained is None:
        model = make_model(options.shape, getattr(torch, options.dtype), options.device)
    elif options.kinds != ["texts"]:
        parser.error("pretrained: only texts takes a checkpoint; the other kinds need a --shape")
    else:
        options.shape = options.name or Path(options.pretrained).name
        loaded = AutoModelForCausalLM.from_pretrained(options.pretrained, dtype=getattr(torch, options.dtype))
        model = loaded.to(options.device).eval()
        more["tokenizer"] = AutoTokenizer.from_pretrained(options.pretrained)
    lengths, batch_sizes = ([int(n) for n in text.split(",")] for text in (options.lengths, options.batch_sizes))
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    for kind in options.kinds:
        rows: list[dict] = []
        for row in KINDS[kind].measure(model, lengths, batch_sizes, options.repeats, **more):
            print(json.dumps(row), flush=True)
            rows.append(row)  # written as they come: a benchmark takes long and is interrupted
            write(kind, rows, options, model.config.num_hidden_layers, folder)


def write(kind: str, rows: list[dict], options: argparse.Namespace, n_blocks: int, folder: Path) -> None:
    """The rows so far, as JSON and Markdown."""
    times = f"*measured* ratios of wall-clock times, taken alternately, median of {options.repeats} (lowest-highest)"
    what = getattr(KINDS[kind], "WHAT", times)
    found = about(options.shape, options.dtype, options.device, options.repeats)
    record = {"kind": kind, "measured": what, **found, "rows": rows}
    name = f"{kind}-{options.shape}-{options.dtype}-{options.device.partition(':')[0]}"
    container.write_atomically(folder / f"{name}.json", (json.dumps(record, indent=1) + "\n").encode())
    head = (
        f"{kind}: {options.shape} ({n_blocks} blocks), {options.dtype}, {record['machine']}, torch {record['torch']}, "
        f"{record['date']}; {what}. Half depth is block {n_blocks // 2}."
    )
    container.write_atomically(folder / f"{name}.md", f"{head}\n\n{table(rows)}".encode())


if __name__ == "__main__":
    main()
