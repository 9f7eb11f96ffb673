"""The tables of ``benchmarks.stoppers``: medians over draws of training documents, with the lowest and the highest."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np

from lm_eval_adainfer.output import rendering


def report(found: dict[str, Any], how: str) -> str:
    """The Markdown file; ``how`` says how it was measured."""
    explained = (
        f"Figures are medians over {len(found['draws'])} draws (lowest to highest). `acc` is the task's own, its "
        "change in percentage points against the dense answers; the interval (95%, over test documents) is of the mean "
        "over draws. Pruned: 1 - exit block / L. Saved: of the counted work of the linear maps, reading and checks "
        "included; `copy:1` runs one token through all blocks, so pruning tells little of it. The last column is "
        "against the paper's SVM of the same draw. What was drawn, and the chosen blocks, are in the JSON file."
    )
    lines = [
        f"# Stoppers: `{found['model']}`, {found['n_blocks']} blocks, {found['shots']} shots, *simulated*",
        "",
        how,
        "",
        *textwrap.wrap(explained, 120),
        "",
        "Recorded after: "
        + "; ".join(f"`{name}` {', '.join(map(str, blocks))}" for name, blocks in found["readers"].items())
        + ".",
        "",
        *tasks_table(found),
    ]
    titles = {
        "calibrated": "One threshold for all tasks, chosen on calibration documents: at most 1% of them lost",
        "own": "Thresholds as they stand (SVM: 0; gap: 0.8; others: 0.95), asked after all recorded blocks",
    }
    for how, title in titles.items():
        rows = [one for one in found["rows"] if one["threshold"] == how]
        lines += ["", f"## {title}", "", *contestants_table(rows)]
        if how == "calibrated":
            lines += ["", "Per task, `acc` change / saved, medians over draws:", "", *per_task_table(found, rows)]
    return "\n".join(lines) + "\n"


def tasks_table(found: dict[str, Any]) -> list[str]:
    cells = [
        [task, str(of["train"] // 2), str(of["calibrate"]), str(of["test"]), f"{of['acc_dense']:.3f}"]
        for task, of in found["tasks"].items()
    ]
    headings = ["task", "fitted on, per draw", "threshold chosen on", "reported on", "dense acc"]
    left_out = ", ".join(found["not_above_chance"])
    note = ["", f"Left out, since the dense model is not above chance there: {left_out}."] if left_out else []
    return [*rendering.markdown(rendering.Table(headings, cells)), *note]


def contestants_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    headings = ["reader, stopper", "acc change", "95% over documents", "worst task", "pruned, %", "saved, %",
                "saved more than the paper's SVM, points"]  # fmt: skip
    cells = []
    for one in rows:
        low, high = one["acc_change_interval"]
        cells.append(
            [one["contestant"], spread_of(one["acc_change"], "+"), f"{low:+.1f} to {high:+.1f}",
             spread_of(one["worst_task"], "+"), spread_of(one["pruned"]), spread_of(one["saved"]),
             spread_of(one["saved_more"], "+")]
        )  # fmt: skip
    return rendering.markdown(rendering.Table(headings, cells))


def per_task_table(found: dict[str, Any], rows: Sequence[dict[str, Any]]) -> list[str]:
    cells = []
    for one in rows:
        change, saved = (np.median(one["per_task"][name], axis=0) for name in ("change", "saved"))
        cells.append([one["contestant"], *(f"{c:+.1f} / {s:.0f}%" for c, s in zip(change, saved, strict=True))])
    names = [task.removeprefix("adainfer_").removeprefix("word_").removeprefix("demo_") for task in found["tasks"]]
    return rendering.markdown(rendering.Table(["reader, stopper", *names], cells))


def spread_of(values: Sequence[float], sign: str = "") -> str:
    low, middle, high = (format(v + 0.0, f"{sign}.1f") for v in np.quantile(values, [0, 0.5, 1]))
    return middle if low == high else f"{middle} ({low} to {high})"
