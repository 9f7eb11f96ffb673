"""The page of a recommendation: what is recommended, every contestant, and pictures.

All of it is *simulated*, but for calibration and test documents of tasks whose texts are generated.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from lm_eval_adainfer import container
from lm_eval_adainfer.output import marks, per_block, report
from lm_eval_adainfer.output.marks import Mark
from lm_eval_adainfer.statistics import wilson_interval
from lm_eval_adainfer.tuning.told import LOST
from lm_eval_adainfer.tuning.tune import Tuned


def write(tuned: Tuned, output: str | Path, command: str) -> Path | None:
    """Write ``index.html`` and its pictures.

    Args:
        tuned: What is told.
        output: The folder.
        command: That runs what is recommended.

    Returns:
        The page; None where the extra that draws is not installed.
    """
    if any(find_spec(name) is None for name in ("matplotlib", "jinja2")):
        return None
    folder, found = Path(output), tuned.found
    mark_of = reader_marks(tuned)
    pictures = [report.save_picture(folder, *one) for one in _figures(tuned, mark_of)]
    title = f"Early exit, tuned: {found['model']['model']}"
    text = report.render(
        "tune.html", title=title, found=found, command=command, pictures=pictures, lost=LOST, mark_of=mark_of
    )
    container.write_atomically(folder / "index.html", text.encode("utf-8", "replace"))
    return folder / "index.html"


def reader_marks(tuned: Tuned) -> dict[str, Mark]:
    """Every reader's colour and mark, which its contestants share; in the order in which the traces hold them."""
    probed = [one["reader"] for one in tuned.found["readers"]]
    return marks.of_all([*per_block.readers(tuned.fitting), *probed])


def _figures(tuned: Tuned, mark_of: dict[str, Mark]) -> list[tuple[str, str, str, Any]]:
    """Name, heading, caption and figure of everything that there is data for."""
    from lm_eval_adainfer.output import figures

    found = []
    with figures.style():
        if tuned.found.get("texts") and (points := _rungs(tuned.found, mark_of)):
            found.append(
                ("frontier", "Kept documents against work",
                 "Calibration documents, really generated at every threshold that was tested; work is counted, prompts "
                 "and new tokens together. What is recommended is marked in the legend.",
                 figures.frontier(points, "documents that lose nothing"))
            )  # fmt: skip
        if points := frontier_points(tuned.found, mark_of):
            found.append(
                ("frontier", "Accuracy against work",
                 "The most promising contestant of every reader on fitting documents, simulated, judged by "
                 "stoppers that had not seen the document; work is counted, reading and checks included. A dashed line "
                 "joins those that no other beats in both; what is recommended is marked in the legend.",
                 figures.frontier(points, "acc"))
            )  # fmt: skip
        panels = per_block.accuracy_panels(tuned.fitting, figures.PANELS)
        if any(panels.values()):
            found.append(
                ("accuracy_per_block", "Accuracy per block under each reader",
                 "Simulated on fitting documents: what each block would have answered, after the blocks that were "
                 "recorded. Bands: 95% intervals.",
                 figures.accuracy(panels))
            )  # fmt: skip
        if tuned.exits:
            name, reader = (tuned.found["chosen"][key] for key in ("name", "reader"))
            how = "Counted" if tuned.found.get("texts") else "Simulated"
            found.append(
                ("exit_layers", "Where documents leave", f"{how} on test documents, with what is recommended.",
                 figures.histograms({task: {name: exits} for task, exits in tuned.exits.items()},
                                    tuned.found["model"]["n_blocks"], {name: mark_of[reader]}))
            )  # fmt: skip
    return found


def _rungs(found: dict[str, Any], mark_of: dict[str, Mark]) -> list[Any]:
    """The dense model and every threshold that calibration documents were run at, of texts."""
    from lm_eval_adainfer.output.figures import Point

    points = [Point("stopper=none", 1.0, 1.0, 1.0, 1.0, marks.DENSE)]
    chosen = found.get("chosen", {})
    readers = {one["name"]: one["reader"] for one in found["contestants"]}
    for one in found.get("candidates", ()):
        reader = readers[one["name"]]
        for rung in one["rungs"]:
            kept = np.clip(1 - rung["lost"], 0.0, 1.0)
            low, high = (float(x) for x in wilson_interval(kept, one["documents"]))
            is_it = one["name"] == chosen.get("name") and rung["threshold"] == chosen["threshold"]
            label = f"{'recommended: ' if is_it else ''}{one['name']} {rung['threshold']:.4g}"
            points.append(Point(label, 1 - rung["saved"], float(kept), low, high, mark_of[reader]))
    return points if len(points) > 1 else []


def frontier_points(found: dict[str, Any], mark_of: dict[str, Mark]) -> list[Any]:
    """The dense model, and the recommended or most promising contestant of every reader.

    Args:
        found: What ``tune.json`` holds.
        mark_of: :func:`reader_marks`.

    Returns:
        ``figures.Point`` each; none where accuracy is not known.
    """
    from lm_eval_adainfer.output.figures import Point

    shown = [one for one in found["contestants"] if one["acc"] is not None]
    chosen = found.get("chosen", {}).get("name")
    best: dict[str, Any] = {}
    for one in sorted(shown, key=lambda one: one["name"] != chosen):
        best.setdefault(one["reader"], one)
    shown = [one for one in shown if one in best.values()]
    if not shown:
        return []
    dense = shown[0]["acc_dense"]
    points = [Point("stopper=none", 1.0, dense, dense, dense, marks.DENSE)]
    for one in shown:
        label = f"recommended: {one['name']}" if one["name"] == chosen else one["name"]
        mark = mark_of[one["reader"]]
        points.append(Point(label, 1 - one["saved"], one["acc"], one["acc_low"], one["acc_high"], mark))
    return points
