"""What traces say block by block: accuracy (the paper's Figure 1) and features (Figures 3 and 4), as CSV and PNG."""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lm_eval_adainfer import container
from lm_eval_adainfer.output import tables
from lm_eval_adainfer.traces.replay import Trace

_logger = logging.getLogger(__name__)


def accuracy(traces: Sequence[Trace]) -> list[dict[str, Any]]:
    """A row per trace and block: ``acc``, ``top1_acc`` and agreement if every document left there."""
    rows = []
    for trace in traces:
        answers = trace.answers
        for k in range(1, trace.n_blocks + 1):
            rows.append(
                {
                    "task": trace.meta["task"],
                    "shots": trace.meta["num_fewshot"],
                    "block": k,
                    "documents": len(answers),
                    "acc": _mean(trace.right[:, k - 1]),
                    "top1_acc": _mean(trace.top1[:, k - 1]),
                    "agreement": float((answers[:, k - 1] == answers[:, -1]).mean()),
                }
            )
    return rows


def features(traces: Sequence[Trace]) -> list[dict[str, Any]]:
    """A row per trace, block and recorded feature: mean and quartiles over the decisions."""
    rows = []
    for trace in traces:
        for k in range(1, trace.n_blocks + 1):
            for i, name in enumerate(trace.meta["features"]):
                values = trace.arrays["features"][:, k - 1, i].astype(float)
                low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
                rows.append(
                    {
                        "task": trace.meta["task"],
                        "shots": trace.meta["num_fewshot"],
                        "block": k,
                        "feature": name,
                        "mean": float(values.mean()),
                        "quartile1": float(low),
                        "median": float(middle),
                        "quartile3": float(high),
                    }
                )
    return rows


def _mean(values: np.ndarray) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None


def write(study: str, name: str, title: str, traces: Sequence[Trace], output: Path) -> list[Path]:
    """Write a study's CSV and Markdown, and its PNG where matplotlib is installed.

    Args:
        study: ``accuracy`` or ``features``.
        name: Of the files.
        title: Of the picture.
        traces: Of one model.
        output: The folder.

    Returns:
        The files.
    """
    rows = accuracy(traces) if study == "accuracy" else features(traces)
    files = [output / f"{name}.csv", output / f"{name}.md"]
    container.write_atomically(files[0], tables.to_csv(rows).encode())
    container.write_atomically(files[1], _markdown(study, title, rows).encode())
    try:
        import matplotlib
    except ImportError:
        _logger.info("no picture without matplotlib: pip install 'lm-eval-adainfer[report]'")
        return files
    matplotlib.use("Agg")
    files.append(output / f"{name}.png")
    panels = ["acc"] if study == "accuracy" else list(traces[0].meta["features"])
    container.write_atomically(files[-1], _picture(study, title, rows, panels))
    return files


def _lines(study: str, rows: Sequence[dict[str, Any]], panel: str) -> dict[str, tuple[list[int], list[float]]]:
    """Label -> blocks and values; accuracy falls back on top1_acc where a task has no other."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    for row in rows:
        if study == "features" and row["feature"] != panel:
            continue
        value = row["mean"] if study == "features" else row["acc"] if row["acc"] is not None else row["top1_acc"]
        if value is None:
            continue
        blocks, values = found.setdefault(f"{row['task']}, {row['shots']} shots", ([], []))
        blocks.append(row["block"])
        values.append(value)
    return found


def _markdown(study: str, title: str, rows: Sequence[dict[str, Any]]) -> str:
    """A line per task and shots, a column per block."""
    panels = ["acc"] if study == "accuracy" else list(dict.fromkeys(row["feature"] for row in rows))
    blocks = sorted({row["block"] for row in rows})
    lines = [f"# {title}", "", f"*{tables.LABEL}*"]
    for panel in panels:
        what = "acc, if all documents left after the block" if study == "accuracy" else f"{panel}, mean"
        lines += ["", f"| {what} | " + " | ".join(map(str, blocks)) + " |", "|---|" + "---:|" * len(blocks)]
        for label, (_, values) in _lines(study, rows, panel).items():
            lines.append(f"| {label} | " + " | ".join(f"{value:.2f}" for value in values) + " |")
    return "\n".join(lines) + "\n"


def _picture(study: str, title: str, rows: Sequence[dict[str, Any]], panels: Sequence[str]) -> bytes:
    """PNG: a panel per feature, a line per task and shots."""
    from matplotlib.figure import Figure

    across = min(3, len(panels))
    down = -(-len(panels) // across)
    figure = Figure(figsize=(5.2 * across, 3.6 * down + 0.8), layout="constrained")
    for i, panel in enumerate(panels):
        axes = figure.add_subplot(down, across, i + 1)
        lines = _lines(study, rows, panel)
        for n, (label, (blocks, values)) in enumerate(lines.items()):
            axes.plot(blocks, values, marker="o", markersize=2.5, linewidth=1.2, label=label, color=f"C{n % 10}",
                      linestyle=("-", "--", ":")[n // 10 % 3])  # fmt: skip
        axes.set(xlabel="block", ylabel="accuracy" if study == "accuracy" else panel)
        axes.grid(alpha=0.3)
        if i == 0 and lines:
            axes.legend(fontsize=6)
    figure.suptitle(f"{title} ({tables.LABEL})", fontsize=9)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=120)
    return out.getvalue()
