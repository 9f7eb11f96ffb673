"""What traces say block by block: accuracy (the paper's Figure 1), features (Figures 3 and 4), and the oracle."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.output.figures import Line
from lm_eval_adainfer.statistics import wilson
from lm_eval_adainfer.traces import recording


@dataclass(frozen=True)
class Trace:
    """One trace file."""

    name: str  # the task's
    task: str  # that, without what all of them begin with
    shots: int
    n_blocks: int
    features: dict[str, np.ndarray]  # name -> [decisions, blocks]
    top1: np.ndarray  # [decisions with a gold answer, blocks], whether the top token is the gold answer's first
    right: np.ndarray | None  # likewise, whether the gold choice has the best score; None where there are no choices

    @property
    def label(self) -> str:
        """Task and shots."""
        return f"{self.task}, {self.shots} shots"


def load(folder: str) -> list[Trace]:
    """All traces of a folder.

    Raises:
        AdaInferError: Where there are none, or they are not of one model.
    """
    place = Path(folder)
    files = [place] if place.is_file() else sorted(place.glob("*.trace")) if place.is_dir() else []
    if not files:
        raise AdaInferError(f"traces: {folder} holds no .trace files; make some with adainfer trace")
    read = [(file, *recording.read(file)) for file in files]
    for file, meta, _ in read:
        recording.require_one_model(file, meta, read[0][1])
    found = [_checked(*one) for one in read]
    names = [t.task for t in found]
    first, last = min(names), max(names)
    alike = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), 0)
    prefix = first[: first.rfind("_", 0, alike) + 1]  # adainfer_demo_fact, adainfer_demo_topic: fact, topic
    return [replace(t, task=t.task[len(prefix) :]) for t in found]


def _checked(file: Path, meta: dict[str, Any], arrays: dict[str, np.ndarray]) -> Trace:
    try:
        return _trace(file, meta, arrays)
    except (TypeError, ValueError, IndexError, KeyError, AttributeError) as error:  # arrays of other shapes or kinds
        if isinstance(error, AdaInferError):
            raise
        raise AdaInferError(f"traces: {file} is no trace that adainfer wrote ({error}); make it again") from None


def _trace(file: Path, meta: dict[str, Any], arrays: dict[str, np.ndarray]) -> Trace:
    features, top, gold_token = (arrays[name] for name in ("features", "top_token", "gold_token"))
    names = meta["features"]
    if features.ndim != 3 or top.shape != features.shape[:2] or len(names) != features.shape[2] or not len(top):
        raise AdaInferError(f"traces: {file} holds arrays that don't fit each other; make it again with adainfer trace")
    known = gold_token >= 0
    right = None
    scores, gold = arrays.get("scores"), arrays.get("gold")
    # columns are choices only where all choices share the context
    choices = scores.shape[2] if scores is not None and scores.ndim == 3 else 0
    if scores is not None and gold is not None and choices > 1 and gold.max() < choices:
        chosen = np.where(np.isnan(scores), -np.inf, scores).argmax(axis=2)
        right = (chosen == gold[:, None])[gold >= 0]
    return Trace(
        name=str(meta["task"]),
        task=str(meta["task"]),
        shots=int(meta["num_fewshot"]),
        n_blocks=top.shape[1],
        features={str(name): features[:, :, i] for i, name in enumerate(names)},
        top1=(top == gold_token[:, None])[known],
        right=right if right is not None and len(right) else None,
    )


def accuracy_lines(traces: list[Trace]) -> list[Line]:
    """Accuracy in percent after every block: among the choices where there are some, else of the first token."""
    found = []
    for i, trace in enumerate(traces):
        hits = trace.right if trace.right is not None else trace.top1
        if len(hits):
            kind = "" if trace.right is not None else ", first token"
            share, lower, upper = wilson(hits)
            found.append(Line(trace.label + kind, 100 * share, 100 * lower, 100 * upper, trace.right is None, i))
    return found


def feature_lines(traces: list[Trace]) -> dict[str, list[Line]]:
    """Mean of every feature after every block, per task."""
    found: dict[str, list[Line]] = {}
    for i, trace in enumerate(traces):
        for name, values in trace.features.items():
            mean = values.mean(axis=0, dtype=float)
            spread = 1.96 * values.std(axis=0, dtype=float) / np.sqrt(len(values))
            found.setdefault(name, []).append(Line(trace.label, mean, mean - spread, mean + spread, False, i))
    return found


def with_mean(lines: list[Line]) -> list[Line]:
    """The lines, faint, and their mean with a 95% interval over them: for more lines than can be told apart."""
    values = np.stack([line.values for line in lines])
    mean, spread = values.mean(axis=0), 1.96 * values.std(axis=0, ddof=1) / np.sqrt(len(values))
    return [
        *(replace(line, label="one trace each", lower=None, upper=None, faint=True) for line in lines),
        Line("mean over traces", mean, mean - spread, mean + spread),
    ]


def oracle(traces: list[Trace]) -> tuple[float, float, float, float] | None:
    """Simulated: exit after the first block that answers right, else after the last.

    Returns:
        Mean exit block over L, accuracy and its 95% interval; None without gold answers. No stopper can do better.
    """
    hits = [t.right if t.right is not None else t.top1 for t in traces]
    hits = [h for h in hits if len(h)]
    if not hits:
        return None
    joined = np.concatenate(hits)
    ever = np.asarray(joined.any(axis=1))
    exit_block = np.where(ever, joined.argmax(axis=1) + 1, joined.shape[1])
    mean, lower, upper = wilson(ever[:, None])
    return float(exit_block.mean() / joined.shape[1]), float(mean[0]), float(lower[0]), float(upper[0])
