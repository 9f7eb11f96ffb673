"""The paper's figures as CSV, Markdown and PNG: accuracy per block (Figure 1) and features per block (3 and 4)."""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval_adainfer import container
from lm_eval_adainfer.output import per_block, rendering, tables
from lm_eval_adainfer.traces.documents import TracedDocuments

_logger = logging.getLogger(__name__)


def write(study: str, name: str, title: str, traces: Sequence[TracedDocuments], output: Path) -> list[Path]:
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
    rows = per_block.accuracy_rows(traces) if study == "accuracy" else per_block.feature_rows(traces)
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
    container.write_atomically(files[-1], _picture(study, name, title, traces))
    return files


def _markdown(study: str, title: str, rows: Sequence[dict[str, Any]]) -> str:
    """A line per task and shots, a column per block."""
    panels = ["acc"] if study == "accuracy" else list(dict.fromkeys(row["feature"] for row in rows))
    blocks = sorted({row["block"] for row in rows})
    lines = [f"# {title}", "", f"*{tables.LABEL}*"]
    for panel in panels:
        what = "acc, if all documents left after the block" if study == "accuracy" else f"{panel}, mean"
        lines_of = _values(study, rows, panel)
        cells = [[label, *(f"{of[k]:.2f}" if k in of else "" for k in blocks)] for label, of in lines_of.items()]
        lines += ["", *rendering.markdown(rendering.Table([what, *map(str, blocks)], cells))]
    return "\n".join(lines) + "\n"


def _values(study: str, rows: Sequence[dict[str, Any]], panel: str) -> dict[str, dict[int, float]]:
    """Label -> block -> value; accuracy falls back on top1_acc where a task has no other."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        if study == "features" and row["feature"] != panel:
            continue
        value = row["mean"] if study == "features" else row["acc"] if row["acc"] is not None else row["top1_acc"]
        if value is not None:
            reader = f", {row['reader']}" if "reader" in row else ""
            found.setdefault(f"{row['task']}, {row['shots']} shots{reader}", {})[row["block"]] = value
    return found


def _picture(study: str, name: str, title: str, traces: Sequence[TracedDocuments]) -> bytes:
    """PNG, drawn as the report's."""
    from lm_eval_adainfer.output import figures

    with figures.style():
        if study == "accuracy":
            figure = figures.accuracy(per_block.accuracy_panels(traces, figures.PANELS))
        else:
            figure = figures.features(per_block.feature_lines(traces))
        width = int(12 * figure.get_figwidth())  # characters of this size; what is longer would be cut off
        figure.suptitle("\n".join(textwrap.wrap(f"{title} ({tables.LABEL})", width)), fontsize=9)
        return figures.files(figure, name)[f"{name}.png"]
