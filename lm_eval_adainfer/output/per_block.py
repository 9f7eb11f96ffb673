"""What traces say block by block, as data: accuracy (the paper's Figure 1), features (Figures 3 and 4), the oracle.

Nothing here draws, so that the numbers can be had without matplotlib. Accuracy is a document's, whatever its number of
contexts (``TracedDocuments``); all of it is *simulated*.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.statistics import wilson
from lm_eval_adainfer.traces import documents
from lm_eval_adainfer.traces.documents import TracedDocuments
from lm_eval_adainfer.traces.file import without_choices
from lm_eval_adainfer.traces.views import HEAD, readers_of


@dataclass(frozen=True)
class Line:
    """A quantity after every block (NaN where it is not known), with a 95% interval, if it has one."""

    label: str
    values: np.ndarray  # [blocks]
    lower: np.ndarray | None
    upper: np.ndarray | None
    dashed: bool = False
    colour: int = 0
    faint: bool = False


def load(folder: str) -> list[TracedDocuments]:
    """All traces of a folder, or the one file.

    Raises:
        AdaInferError: Where there are none, or they are not of one model.
    """
    place = Path(folder)
    files = [place] if place.is_file() else sorted(place.glob("*.trace")) if place.is_dir() else []
    if not files:
        raise AdaInferError(f"traces: {folder} holds no .trace files; make some with adainfer trace")
    found = documents.read(files)
    for trace in found:
        trace.require_scores()
    return found


def labels(traces: Sequence[TracedDocuments]) -> list[str]:
    """Task and shots of every trace, without what all tasks' names begin with."""
    names = [trace.meta["task"] for trace in traces]
    first, last = min(names, default=""), max(names, default="")
    alike = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), 0)
    start = first.rfind("_", 0, alike) + 1  # adainfer_demo_fact, adainfer_demo_topic: fact, topic
    return [f"{trace.meta['task'][start:]}, {trace.meta['num_fewshot']} shots" for trace in traces]


def accuracy_rows(traces: Sequence[TracedDocuments]) -> list[dict[str, Any]]:
    """A row per trace and block: ``acc``, ``top1_acc`` and agreement if every document left there.

    Where some trace has several readers, it is a row per reader, too, and says which.
    """
    rows = []
    several = len(readers(traces)) > 1
    for view in (view for trace in traces for view in _views(trace)):
        answers = view.answers
        for k in view.blocks:
            rows.append(
                {
                    "task": view.meta["task"],
                    "shots": view.meta["num_fewshot"],
                    **({"reader": view.reader} if several else {}),
                    "block": k,
                    "documents": len(answers),
                    "acc": _mean(view.right[:, k - 1]),
                    "top1_acc": _mean(view.top1[:, k - 1]),
                    "agreement": float((answers[:, k - 1] == answers[:, -1]).mean()),
                }
            )
    return rows


def readers(traces: Sequence[TracedDocuments]) -> list[str]:
    """The names of the readers that some trace was recorded under; the head is the first."""
    return list(dict.fromkeys([HEAD, *(name for trace in traces for name in readers_of(trace.meta))]))


def _views(trace: TracedDocuments) -> list[TracedDocuments]:
    """The trace under each of its readers."""
    found = [trace.under(name) for name in readers_of(trace.meta)]
    for view in found:
        view.require_scores()
    return found


def _mean(values: np.ndarray) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None


def feature_rows(traces: Sequence[TracedDocuments]) -> list[dict[str, Any]]:
    """A row per trace, block and recorded feature: mean and quartiles over the decisions that have it.

    Where some trace has several readers, it is a row per reader, too, of the features that depend on the reader.
    """
    rows = []
    several = len(readers(traces)) > 1
    for trace in traces:
        for view, name, values in _features(trace):
            for k in view.blocks if len(values) else []:
                low, middle, high = np.quantile(values[:, k - 1], [0.25, 0.5, 0.75])
                rows.append(
                    {
                        "task": trace.meta["task"],
                        "shots": trace.meta["num_fewshot"],
                        **({"reader": view.reader} if several else {}),
                        "block": k,
                        "feature": name,
                        "mean": float(values[:, k - 1].mean()),
                        "quartile1": float(low),
                        "median": float(middle),
                        "quartile3": float(high),
                    }
                )
    return rows


def _features(trace: TracedDocuments) -> Iterator[tuple[TracedDocuments, str, np.ndarray]]:
    """The trace under each reader, a feature that depends on it, and its values, [decisions that have it, L]."""
    for reader in readers_of(trace.meta):
        view = trace.under(reader)
        for name in trace.meta["features" if reader == HEAD else "reader_features"]:
            values = view.arrays["features"][:, :, view.meta["features"].index(name)].astype(float)
            yield view, name, values[~without_choices(values[:, :, None], [name])]


def accuracy_lines(traces: Sequence[TracedDocuments]) -> list[Line]:
    """``acc`` in percent if every document left after the block, as the head reads it; a line per trace.

    It is that of the first token where a trace knows no more.
    """
    found = []
    for i, (trace, label) in enumerate(zip(traces, labels(traces), strict=True)):
        hits = _known_hits(trace)
        if len(hits):
            kind = ", first token" if trace.first_token_only else ""
            share, lower, upper = wilson(hits)
            found.append(Line(label + kind, 100 * share, 100 * lower, 100 * upper, trace.first_token_only, i))
    return found


def accuracy_panels(traces: Sequence[TracedDocuments], most: int) -> dict[str, list[Line]]:
    """:func:`accuracy_lines` in one panel; where some trace has several readers, a panel per trace, a line per reader.

    A reader has the same colour in all panels. Beyond ``most`` traces there is one panel of the means over them.
    """
    names = readers(traces)
    if len(names) == 1:
        return {"accuracy": accuracy_lines(traces)}
    panels: dict[str, list[Line]] = {}
    for trace, label in zip(traces, labels(traces), strict=True):
        for view in _views(trace):
            if len(hits := _known_hits(view)):
                found = np.full((3, view.n_blocks), np.nan)
                found[:, view.at] = 100 * np.stack(wilson(hits[:, view.at]))
                share, lower, upper = found
                line = Line(view.reader, share, lower, upper, view.first_token_only, names.index(view.reader))
                panels.setdefault(label, []).append(line)
    if len(panels) <= most:
        return panels or {"accuracy": []}
    means = []
    for colour, name in enumerate(names):
        mine = np.array([line.values for lines in panels.values() for line in lines if line.label == name])
        if not len(mine):
            continue
        known = (~np.isnan(mine)).sum(axis=0)
        mean = np.where(known > 0, np.nansum(mine, axis=0) / np.maximum(known, 1), np.nan)
        means.append(Line(name, mean, None, None, False, colour))
    return {f"accuracy, mean over {len(panels)} traces": means}


def feature_lines(traces: Sequence[TracedDocuments]) -> dict[str, list[Line]]:
    """Mean of every feature after every block over the decisions that have it, per trace.

    Other readers than the head have features of their own, under the feature's and the reader's name.
    """
    found: dict[str, list[Line]] = {}
    for i, (trace, label) in enumerate(zip(traces, labels(traces), strict=True)):
        for view, name, values in _features(trace):
            if not len(values):
                continue
            mean, spread = values.mean(axis=0), 1.96 * values.std(axis=0) / np.sqrt(len(values))
            of = name if view.reader == HEAD else f"{name}, {view.reader}"
            found.setdefault(of, []).append(Line(label, mean, mean - spread, mean + spread, False, i))
    return found


def with_mean(lines: Sequence[Line]) -> list[Line]:
    """The lines, faint, and their mean with a 95% interval over them: for more lines than can be told apart."""
    values = np.stack([line.values for line in lines])
    mean, spread = values.mean(axis=0), 1.96 * values.std(axis=0, ddof=1) / np.sqrt(len(values))
    return [
        *(replace(line, label="one trace each", lower=None, upper=None, faint=True) for line in lines),
        Line("mean over traces", mean, mean - spread, mean + spread),
    ]


def oracle(traces: Sequence[TracedDocuments]) -> tuple[float, float, float, float] | None:
    """Simulated: exit after the first block that answers right, else after the last.

    Returns:
        Mean exit block over L, accuracy and its 95% interval; None without gold answers. No stopper can do better.
    """
    hits = [found for found in map(_known_hits, traces) if len(found)]
    if not hits:
        return None
    joined = np.concatenate(hits)
    ever = np.asarray(joined.any(axis=1))
    exit_block = np.where(ever, joined.argmax(axis=1) + 1, joined.shape[1])
    mean, lower, upper = wilson(ever[:, None])
    return float(exit_block.mean() / joined.shape[1]), float(mean[0]), float(lower[0]), float(upper[0])


def _known_hits(trace: TracedDocuments) -> np.ndarray:
    """[documents of which it is known, L] bool, whether the answer after the block is right."""
    return trace.hits[~np.isnan(trace.hits[:, -1])] > 0
