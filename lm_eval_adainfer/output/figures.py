"""The report's pictures: matplotlib, Okabe and Ito's colours, with intervals wherever a number is an estimate.

Every picture is drawn once. Files get a white ground; inside the page the ink takes the page's text colour, so that
the same picture is right in light and dark.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lm_eval_adainfer.output import marks, per_block
from lm_eval_adainfer.output.marks import Mark
from lm_eval_adainfer.output.per_block import Line

_INK, _FAINT = "#1b1f24", "#8a8f96"
_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: small, searchable, in the page's font
    "text.parse_math": False,  # names come from files
    "font.family": ["DejaVu Sans"],
    "font.size": 10,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": _FAINT,
    "grid.alpha": 0.35,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}
PANELS = 12  # beyond so many tasks a panel each is too small to read
LINES = 8  # that can be told apart in one panel; beyond, a map of colours, or faint lines and their mean


@dataclass(frozen=True)
class Point:
    """A run in the frontier: shares of the dense run's compute, and accuracy with its interval."""

    label: str
    compute: float
    accuracy: float
    lower: float
    upper: float
    mark: Mark
    simulated: bool = False


def style() -> Any:
    """The style, as a context."""
    return matplotlib.rc_context(_STYLE)


def short(text: str, length: int = 26) -> str:
    """A name that fits beside an axis, without characters that can't be drawn."""
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= length else f"{text[: length - 1]}…"


def frontier(points: Sequence[Point], metric: str, share: bool = True, lower_is_better: bool = False) -> Figure:
    """Accuracy against counted compute; a dashed line joins the runs that no other beats in both.

    Args:
        points: The runs.
        metric: For the axis.
        share: Whether it is a share, shown in percent.
        lower_is_better: Whether the lower of two scores is the better.
    """
    sign, scale = (-1 if lower_is_better else 1), (100 if share else 1)
    figure = Figure(figsize=(5.8, 4.2), layout="constrained")
    axes = figure.subplots()
    measured = sorted((p for p in points if not p.simulated), key=lambda p: (p.compute, -sign * p.accuracy))
    best: list[Point] = []
    for point in measured:
        if not best or sign * point.accuracy > sign * best[-1].accuracy:
            best.append(point)
    if len(best) > 1:
        axes.plot([100 * p.compute for p in best], [scale * p.accuracy for p in best], "--", color=_FAINT, lw=1.2,
                  label="frontier", zorder=1)  # fmt: skip
    for p in points:
        x, y = 100 * p.compute, scale * p.accuracy
        axes.errorbar(
            x, y, yerr=[[scale * max(0.0, p.accuracy - p.lower)], [scale * max(0.0, p.upper - p.accuracy)]],
            fmt="*" if p.simulated else p.mark.marker, ms=12 if p.simulated else 7, capsize=3, color=p.mark.colour,
            label=short(p.label, 44), mfc="none" if p.simulated else p.mark.colour,
        )  # fmt: skip
    axes.set_xlim(0, max(105.0, 105 * max(p.compute for p in points)))
    axes.set_xlabel("compute, counted FLOPs (% of the dense run)")
    axes.set_ylabel(f"{short(metric, 44)}{' (%)' if share else ''}, with 95% interval")
    figure.legend(loc="outside lower center", ncols=2 if len(points) < 9 else 3, fontsize=9)
    return figure


def histograms(title_of: dict[str, dict[str, np.ndarray]], n_blocks: int, mark_of: Mapping[str, Mark]) -> Figure:
    """Exit blocks per task; a heat map where there are many tasks.

    Args:
        title_of: Task -> run -> exit block per document.
        n_blocks: Of the model.
        mark_of: Run -> its mark.
    """
    if len(title_of) > PANELS:
        return _heat_map(title_of, n_blocks)
    columns = min(3, len(title_of))
    rows = math.ceil(len(title_of) / columns)
    figure = Figure(figsize=(1.6 + 1.55 * columns, 0.9 + 1.5 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    edges = np.arange(0.5, n_blocks + 1.5)
    labels = list(dict.fromkeys(run for runs in title_of.values() for run in runs))
    for axes, (task, runs) in zip(grid.flat, title_of.items(), strict=False):
        for run, layers in runs.items():
            mark = mark_of[run]
            share = 100 * np.histogram(layers, edges)[0] / len(layers)
            if len(labels) == 1:
                axes.bar(np.arange(1, n_blocks + 1), share, width=0.85, color=mark.colour)
            else:
                axes.stairs(share, edges, color=mark.colour, lw=1.8, ls=mark.dash, label=short(run))
            axes.axvline(layers.mean(), color=mark.colour, lw=1, ls=":")
        axes.set_title(short(task), fontsize=9)
        axes.set_xlim(0.4, n_blocks + 0.6)
        axes.locator_params(axis="x", integer=True)
    for axes in list(grid.flat)[len(title_of) :]:
        axes.set_axis_off()
    figure.supxlabel("exit block (dotted: mean)", fontsize=10)
    figure.supylabel("documents (%)", fontsize=10)
    if len(labels) > 1:
        handles, names = grid.flat[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper center", ncols=min(3, len(labels)), fontsize=9)
    return figure


def _heat_map(title_of: dict[str, dict[str, np.ndarray]], n_blocks: int) -> Figure:
    labels = list(dict.fromkeys(run for runs in title_of.values() for run in runs))
    height = 1.6 + 0.19 * len(title_of)
    figure = Figure(figsize=(3.6 + 3.2 * len(labels), height), layout="constrained")
    grid = figure.subplots(1, len(labels), squeeze=False, sharey=True)[0]
    edges = np.arange(0.5, n_blocks + 1.5)
    tasks = sorted(title_of, key=lambda t: np.mean([x.mean() for x in title_of[t].values()]))
    for axes, run in zip(grid, labels, strict=True):
        shares = [
            100 * np.histogram(title_of[t][run], edges)[0] / len(title_of[t][run])
            if run in title_of[t]
            else np.full(n_blocks, np.nan)
            for t in tasks
        ]
        drawn = axes.imshow(shares, aspect="auto", cmap="viridis", extent=(0.5, n_blocks + 0.5, len(tasks) - 0.5, -0.5),
                            vmin=0, interpolation="nearest")  # fmt: skip
        axes.set_title(short(run), fontsize=9)
        axes.set_yticks(range(len(tasks)), [short(t, 30) for t in tasks], fontsize=7)
        axes.set_xlabel("exit block")
        axes.grid(False)
        axes.locator_params(axis="x", integer=True)
        figure.colorbar(drawn, ax=axes, label="documents (%)", shrink=min(1.0, 3 / height))
    return figure


def accuracy(panels: Mapping[str, Sequence[Line]]) -> Figure:
    """Accuracy per task and block (the paper's Figure 1), or per task, reader and block (``accuracy_panels``)."""
    (lines, *others) = panels.values()
    return _accuracy_map(lines) if not others and len(lines) > LINES else _panels(panels, "accuracy (%)")


def features(lines_of: Mapping[str, Sequence[Line]]) -> Figure:
    """A panel per feature, over the blocks (the paper's Figures 3 and 4)."""
    many = any(len(lines) > LINES for lines in lines_of.values())
    shown = {name: per_block.with_mean(lines) if many else lines for name, lines in lines_of.items()}
    return _panels(shown, "mean (no unit)")


def _accuracy_map(lines: Sequence[Line]) -> Figure:
    """Accuracy per task and block as colours, where there are too many tasks for lines; the best on top."""
    ordered = sorted(lines, key=lambda line: -float(line.values[-1]))
    n_blocks, height = len(ordered[0].values), 1.4 + 0.19 * len(ordered)
    figure = Figure(figsize=(6.8, height), layout="constrained")
    axes = figure.subplots()
    drawn = axes.imshow(
        np.stack([line.values for line in ordered]), aspect="auto", cmap="viridis", vmin=0, vmax=100,
        extent=(0.5, n_blocks + 0.5, len(ordered) - 0.5, -0.5), interpolation="nearest",
    )  # fmt: skip
    axes.set_yticks(range(len(ordered)), [short(line.label, 36) for line in ordered], fontsize=7)
    axes.set_xlabel("block")
    axes.grid(False)
    axes.locator_params(axis="x", integer=True)
    figure.colorbar(drawn, ax=axes, label="accuracy (%)", shrink=min(1.0, 3 / height))
    return figure


def _panels(panels: Mapping[str, Sequence[Line]], unit: str) -> Figure:
    """One panel per quantity or task, one line per task or reader, over the known blocks; bands are 95% intervals."""
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(5.8, 3.9) if len(panels) == 1 else (6.2, 1.0 + 1.9 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True)
    handles: dict[str, Any] = {}
    for axes, (name, lines) in zip(grid.flat, panels.items(), strict=False):
        for line in lines:
            at = np.flatnonzero(~np.isnan(line.values))
            blocks, values = at + 1, line.values[at]
            mark = marks.of(line.colour)
            if line.faint:
                (handle,) = axes.plot(blocks, values, color=_FAINT, lw=0.8, alpha=0.6, zorder=1)
                handles.setdefault(line.label, handle)
                continue
            (handle,) = axes.plot(
                blocks, values, color=mark.colour, ls="--" if line.dashed else "-", lw=1.6, marker=mark.marker, ms=3.5,
            )  # fmt: skip
            if line.lower is not None and line.upper is not None:
                axes.fill_between(blocks, line.lower[at], line.upper[at], color=mark.colour, alpha=0.18, lw=0)
            handles.setdefault(short(line.label, 36), handle)
        if len(panels) > 1:
            axes.set_title(name, fontsize=10)
        axes.locator_params(axis="x", integer=True)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_axis_off()
    for axes in list(grid.flat)[max(0, len(panels) - columns) : len(panels)]:
        axes.set_xlabel("block")
        axes.tick_params(labelbottom=True)
    for axes in grid[:, 0]:
        axes.set_ylabel(unit)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2, fontsize=8)
    return figure


def speed(rows: Sequence[tuple[str, float, float]], mark_of: Mapping[str, Mark]) -> Figure:
    """Speed-ups: what the counted FLOPs would give, hollow, beside what the clock gave, filled.

    Args:
        rows: Run, predicted, measured.
        mark_of: Run -> its mark.
    """
    figure = Figure(figsize=(5.8, 1.4 + 0.4 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for y, (run, predicted, measured) in enumerate(rows):
        mark = mark_of[run]
        axes.plot([predicted, measured], [y, y], color=_FAINT, lw=1.5, zorder=1)
        axes.plot(predicted, y, mark.marker, ms=10, mfc="none", mew=2, color=mark.colour)
        axes.plot(measured, y, mark.marker, ms=7, color=mark.colour)
    axes.axvline(1, color=_INK, lw=1, ls=":")
    axes.set_yticks(range(len(rows)), [short(r[0], 32) for r in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, max(1.2, 1.1 * max(max(r[1:]) for r in rows)))
    axes.set_xlabel("speed-up over the baseline (times; dotted: as fast)")
    axes.grid(axis="y", visible=False)
    shown = {"predicted: 1 / FLOPs, counted": "none", "measured, once": _INK}
    handles = [Line2D([], [], ls="", marker="o", ms=8, mew=2, color=_INK, mfc=face) for face in shown.values()]
    figure.legend(handles, list(shown), loc="outside upper center", ncols=2, fontsize=9)
    return figure


def files(figure: Figure, name: str) -> dict[str, bytes]:
    """The picture as ``name.png`` and ``name.svg``, on white."""
    found = {}
    for form in ("png", "svg"):
        out = io.BytesIO()
        options: dict[str, Any] = {"metadata": {"Date": None}} if form == "svg" else {"dpi": 160}
        with matplotlib.rc_context({"svg.hashsalt": name}):
            figure.savefig(out, format=form, facecolor="white", **options)
        found[f"{name}.{form}"] = out.getvalue()
    return found


def inline(figure: Figure, name: str) -> str:
    """The picture as SVG for the page: no ground, ink in the text's colour, nothing that names an address."""
    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):  # so that ids of two pictures never meet
        figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    start, end = text.split(">", 1)
    start = re.sub(r' (width|height)="[^"]*"', "", start)  # the page sets the size
    return f"{start}>{end}".replace(_INK, "currentColor")
