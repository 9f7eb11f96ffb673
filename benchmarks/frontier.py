"""Accuracy against counted work, *simulated* on the test documents of a folder that ``adainfer tune`` has made.

    python -m benchmarks.frontier words -o benchmarks/results/smollm2/frontier

A line per reader: the rule ``gap`` at rising thresholds, asked after every block under ``head``, as in the paper, and
after the blocks that were chosen under the chosen reader. The point that ``adainfer tune`` recommends is marked.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lm_eval_adainfer import container
from lm_eval_adainfer.output import figures, marks
from lm_eval_adainfer.readers.specs import parse
from lm_eval_adainfer.statistics import wilson_interval
from lm_eval_adainfer.strategies import files as stopper_files
from lm_eval_adainfer.strategies.base import Stopper
from lm_eval_adainfer.strategies.rules import GapStopper
from lm_eval_adainfer.traces.documents import TracedDocuments, at_exit, read
from lm_eval_adainfer.traces.file import find
from lm_eval_adainfer.tuning.contestants import scores
from lm_eval_adainfer.tuning.search import left
from lm_eval_adainfer.tuning.tune import RESULT, STOPPER
from lm_eval_adainfer.tuning.work import Work

QUANTILES = 24  # thresholds of a line


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw it, and write its points."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.frontier", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="of adainfer tune, in which something is recommended")
    parser.add_argument("--tasks", help="of the folder's, separated by commas (default: all)")
    parser.add_argument("--title", default="", help="of the picture")
    parser.add_argument("--output", "-o", type=Path, required=True, help="SVG and JSON, without ending")
    options = parser.parse_args(arguments)
    found = points(options.folder, options.tasks.split(",") if options.tasks else None)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with figures.style():
        picture = figures.files(_picture(found, options.title), options.output.name)
    container.write_atomically(options.output.with_suffix(".svg"), picture[f"{options.output.name}.svg"])
    text = json.dumps(found, indent=1) + "\n"
    container.write_atomically(options.output.with_suffix(".json"), text.encode())


def points(folder: Path, tasks: Sequence[str] | None = None) -> dict[str, Any]:
    """What is drawn: shares of the dense run's work, and ``acc`` with its 95% interval."""
    tuned = json.loads((folder / RESULT).read_text())
    chosen = tuned["chosen"]
    traces = read([file for file in find([folder / "traces"]) if file.stem.endswith("_test")])
    traces = [trace for trace in traces if tasks is None or trace.meta["task"] in tasks]
    n_blocks = traces[0].n_blocks
    readers = {"head": tuple(range(1, n_blocks)), chosen["reader"]: tuple(chosen["check_layers"])}
    stopper = stopper_files.load(folder / STOPPER)
    lines = {reader: _points(traces, reader, GapStopper(0.5), blocks) for reader, blocks in readers.items()}
    return {
        "simulated": "from traces of the test documents",
        "tasks": [trace.meta["task"] for trace in traces],
        "documents": sum(len(trace.doc_ids) for trace in traces),
        "blocks": {reader: list(blocks) for reader, blocks in readers.items()},
        "dense": _points(traces, "head", GapStopper(1.0), (), [1.0])[0],
        "lines": lines,
        "recommended": {
            "name": f"recommended: {chosen['reader']}, {chosen['stopper']}",
            **_points(traces, chosen["reader"], stopper, readers[chosen["reader"]], [chosen["threshold"]])[0],
        },
    }


def _points(
    traces: Sequence[TracedDocuments],
    reader: str,
    stopper: Stopper,
    blocks: tuple[int, ...],
    thresholds: Sequence[float] | None = None,
) -> list[dict[str, float]]:
    """A point per threshold; by default at quantiles of what the stopper says after these blocks."""
    views = [trace.under(reader) for trace in traces]
    said, right = (np.concatenate(found) for found in ([scores(stopper, v) for v in views], [v.right for v in views]))
    work = Work.of(views, parse(reader), stopper)
    if thresholds is None:
        thresholds = np.unique(np.quantile(said[:, [k - 1 for k in blocks]], np.linspace(0, 1, QUANTILES))).tolist()
    return [_point(threshold, left(said, blocks, threshold), right, work, blocks) for threshold in thresholds]


def _point(
    threshold: float, exit_layer: np.ndarray, right: np.ndarray, work: Work, blocks: tuple[int, ...]
) -> dict[str, float]:
    got = at_exit(right, exit_layer)
    low, high = wilson_interval(np.array(got.mean()), len(got))
    return {
        "threshold": threshold,
        "work": work.ratio(exit_layer, blocks),
        "acc": float(got.mean()),
        "acc_low": float(low),
        "acc_high": float(high),
    }


def _picture(found: dict[str, Any], title: str) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.9), layout="constrained")
    axes = figure.subplots()
    mark_of = marks.of_all(found["lines"])
    for reader, line in found["lines"].items():
        x, y = ([100 * point[key] for point in line] for key in ("work", "acc"))
        low, high = ([100 * point[f"acc_{end}"] for point in line] for end in ("low", "high"))
        mark, blocks = mark_of[reader], found["blocks"][reader]
        asked = "every block" if len(blocks) > 8 else f"block{'s' * (len(blocks) > 1)} {'+'.join(map(str, blocks))}"
        axes.plot(x, y, mark.dash, color=mark.colour, marker=mark.marker, ms=4, label=f"{reader}, after {asked}")
        axes.fill_between(x, low, high, color=mark.colour, alpha=0.13, lw=0)
    for point, form, label in (
        (found["dense"], {"marker": "s", "color": marks.DENSE.colour, "ms": 8}, "dense"),
        (found["recommended"], {"marker": "*", "color": "black", "ms": 13}, found["recommended"]["name"]),
    ):
        x, y = 100 * point["work"], 100 * point["acc"]
        error = [[y - 100 * point["acc_low"]], [100 * point["acc_high"] - y]]
        axes.errorbar(x, y, yerr=error, capsize=3, ls="none", label=label, **form)
    axes.set_xlim(0, None)
    axes.set_ylim(0, None)
    axes.set_xlabel("counted work, reading and checks included (% of the dense run)")
    axes.set_ylabel("acc (%)")
    axes.set_title(title, fontsize=10)
    figure.legend(loc="outside lower center", ncols=2, fontsize=9)
    return figure


if __name__ == "__main__":
    main()
