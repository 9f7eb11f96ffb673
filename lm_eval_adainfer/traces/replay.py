"""What any strategy would have done on traced documents, in seconds: every number made here is *simulated*.

A document leaves after the first asked block at which the strategy says stop at each of its decisions
(``docs/numbers.md``, "One decision per document"), and its answer is read off the trace there. In generated text every
token is a decision of its own and there is no gold answer: exits and agreement only.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.readers import specs as readers
from lm_eval_adainfer.strategies import specs
from lm_eval_adainfer.strategies.base import Stopper
from lm_eval_adainfer.strategies.fitted import warn_if_foreign
from lm_eval_adainfer.strategies.rules import FixedStopper, GapStopper
from lm_eval_adainfer.traces import clustering, documents, views
from lm_eval_adainfer.traces.documents import ORACLES, TracedDocuments
from lm_eval_adainfer.traces.evaluation import evaluate
from lm_eval_adainfer.traces.file import require_finite
from lm_eval_adainfer.traces.margins import asked, margins
from lm_eval_adainfer.traces.splits import overlap

SWEEP_POINTS = 20
THESE = "these documents"  # what a threshold of a sweep was picked on
_logger = logging.getLogger(__name__)


def load(files: Sequence[str | Path], split: str | None = None) -> list[TracedDocuments]:
    """Read traces of one model.

    Args:
        files: Trace files.
        split: Only those of this split.

    Raises:
        AdaInferError: On damaged or empty traces, NaN features or scores, traces of two models, the same task at the
            same shots twice, or where none is of the split.
    """
    traces: list[TracedDocuments] = []
    seen: dict[tuple[str, int, str], Path] = {}
    for trace in documents.read(files):
        _require_numbers(trace)
        if trace.setting in seen:
            raise AdaInferError(
                f"traces: {seen[trace.setting]} and {trace.path} are both of {trace.name}; give one of them"
            )
        seen[trace.setting] = trace.path
        if split is None or trace.meta["split"] == split:
            traces.append(trace)
    if not traces:
        raise AdaInferError(f"split: none of these {len(files)} traces is of split {split}; give another, or leave out")
    return traces


def _require_numbers(trace: TracedDocuments) -> None:
    require_finite(trace.path, trace.arrays["features"][:, trace.at], trace.meta["features"])
    trace.require_scores()


def parse(spec: Any, n_blocks: int) -> Stopper | str:
    """A strategy: whatever ``stopper=`` takes, an oracle's name, or ``shortgpt:lastN``.

    Skipping the last N blocks is leaving after block L - N, so that one needs no run of its own.

    Raises:
        AdaInferError: Where it is unknown, or can't be replayed.
    """
    text = str(spec).strip() if not isinstance(spec, Stopper) else ""
    if text in ORACLES:
        return text
    if text.startswith("oracle"):
        raise AdaInferError(f"stopper: {text!r} is no oracle; there are {' and '.join(ORACLES)}")
    if text.startswith("shortgpt:"):
        last = text.removeprefix("shortgpt:last")
        if not last.isdecimal() or not 1 <= int(last) < n_blocks:
            raise AdaInferError(
                f"stopper: {text!r} can't be replayed: dropping blocks in between changes what later ones say; "
                f"shortgpt:lastN can, for N from 1 to {n_blocks - 1}"
            )
        return FixedStopper(n_blocks - int(last))
    stopper = specs.parse(spec)
    if stopper.kind == "shortgpt" and not isinstance(stopper, FixedStopper):  # it changes the model, so it needs a run
        raise AdaInferError(
            f"stopper: {spec} can't be replayed: dropping blocks in between changes what later ones say; run it"
        )
    return stopper


def document_margins(
    strategy: Stopper | str, trace: TracedDocuments, min_layer: Any = 1, check_layers: Any = None
) -> np.ndarray:
    """[D, L] margins of whole documents (the least of their decisions'; positive: stop), NaN where none is asked.

    Args:
        strategy: A :class:`Stopper` or an oracle's name.
        trace: The documents.
        min_layer: As the model's argument.
        check_layers: As ``margins.asked``'s.
    """
    found = np.full((len(trace.doc_ids), trace.n_blocks), np.nan)
    if isinstance(strategy, str):
        # it may stop after any block
        at = [k - 1 for k in asked(GapStopper(), trace.meta, min_layer, check_layers)]
        found[:, at] = trace.oracle(strategy)[:, at]
        return found
    blocks = asked(strategy, trace.meta, min_layer, check_layers)
    return trace.together(margins(strategy, trace.meta, trace.arrays, blocks))


def groups(traces: Sequence[TracedDocuments]) -> Iterator[tuple[str, str, str, list[TracedDocuments]]]:
    """(task, shots, split, traces) of every row: each trace, each task over its shots, everything pooled.

    Documents and generated tokens are never pooled with each other, nor is one split with another.
    """
    for task, split in dict.fromkeys((t.meta["task"], t.meta["split"]) for t in traces):
        mine = [t for t in traces if (t.meta["task"], t.meta["split"]) == (task, split)]
        mine.sort(key=lambda t: t.meta["num_fewshot"])
        for trace in mine:
            yield task, str(trace.meta["num_fewshot"]), split, [trace]
        if len(mine) > 1:
            yield task, "/".join(str(t.meta["num_fewshot"]) for t in mine), split, mine
    for split, generated in dict.fromkeys((t.meta["split"], t.generated) for t in traces):
        pool = [t for t in traces if (t.meta["split"], t.generated) == (split, generated)]
        if len({t.meta["task"] for t in pool}) > 1:
            shots = "/".join(map(str, sorted({t.meta["num_fewshot"] for t in pool})))
            yield "pooled" + (" (generated tokens)" if generated else ""), shots, split, pool


def replay(
    traces: Sequence[TracedDocuments],
    stoppers: Sequence[Any],
    min_layer: Any = 1,
    check_layers: Any = None,
    sweep: bool = False,
    seed: int = 0,
    reader: Any = None,
    cluster: clustering.Wanted = (),
) -> list[dict[str, Any]]:
    """A row per group of traces and strategy; with ``sweep`` per threshold as well.

    Args:
        traces: Of one model.
        stoppers: What :func:`parse` takes.
        min_layer: As the model's argument.
        check_layers: As ``margins.asked``'s.
        sweep: Move each strategy's threshold over the quantiles of its margins.
        seed: Of the bootstrap.
        reader: What ``reader=`` takes, for all strategies; None for each file's own, else the head.
        cluster: Tasks and fields (``clusters.parse``) that say which documents belong together.

    Returns:
        Rows: ``task``, ``shots``, ``split``, ``stopper``, ``reader`` (where one is not the head), with ``sweep``
        ``threshold`` and ``picked_on`` (``THESE``, or None where the threshold is the strategy's own), and
        :func:`evaluate`'s.

    Raises:
        AdaInferError: On a strategy that is unknown, does not fit the traces or has no threshold to sweep, and on a
            reader that is not the strategy's or was not recorded.
    """
    rows = []
    under: dict[str, list[TracedDocuments]] = {}
    n_blocks = traces[0].n_blocks
    clustering.require_known(cluster, [t.meta["task"] for t in traces])
    together = clustering.of_documents(traces, cluster)
    belongs = None if together is None else {t.setting: of for t, of in zip(traces, together, strict=True)}
    for spec in stoppers:
        strategy = parse(spec, n_blocks)
        name = spec.kind if isinstance(spec, Stopper) else str(spec).strip()
        if isinstance(strategy, Stopper):
            warn(strategy, traces)
        if sweep and (isinstance(strategy, str) or not strategy.features):
            raise AdaInferError(f"sweep: {name} has no threshold to move; give gap, svm or another stopper that has")
        said_by = readers.resolve(reader, strategy.reader if isinstance(strategy, Stopper) else None).name
        if said_by not in under:
            under[said_by] = [trace.under(said_by) for trace in traces]
            for trace in under[said_by]:
                views.require_same_blocks(trace.path, trace.meta, traces[0].meta, said_by)
                _require_numbers(trace)
        found = {t.setting: document_margins(strategy, t, min_layer, check_layers) for t in under[said_by]}
        thresholds = _quantiles(found.values()) if sweep else [0.0]
        for threshold in thresholds:
            own: dict[str, Any] = {}
            if sweep:
                picked = THESE if threshold else None
                own = {"threshold": threshold + getattr(strategy, "threshold", 0.0), "picked_on": picked}
            for task, shots, split, members in groups(under[said_by]):
                said = [found[t.setting] for t in members]
                clusters = None if belongs is None else [belongs[t.setting] for t in members]
                numbers = evaluate(members, said, threshold, seed, clusters)
                where = {"task": task, "shots": shots, "split": split}
                rows.append({**where, "stopper": name, "reader": said_by, **own, **numbers})
    if set(under) <= {views.HEAD}:
        rows = [{key: value for key, value in row.items() if key != "reader"} for row in rows]
    order = {group[:3]: i for i, group in enumerate(groups(traces))}
    return sorted(rows, key=lambda row: order[row["task"], row["shots"], row["split"]])


def notes(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Sentences that go with :func:`replay`'s rows, about what their intervals hold for."""
    found = []
    if any(row.get("picked_on") for row in rows):
        found.append(
            f"thresholds picked on {THESE}: one that looks good here looks better than it is, and its intervals do not "
            "hold; choose it on calibration documents (adainfer calibrate) and report on others"
        )
    if any(row["tasks"] > 1 for row in rows):
        found.append(
            "pooled rows weigh documents, so that a task weighs by their number; intervals are over documents within "
            "tasks"
        )
    if any("clusters" in row for row in rows):
        found.append("intervals are over whole clusters of documents that belong together")
    return found


def _quantiles(found: Any) -> list[float]:
    """Thresholds from the strictest (never) to the loosest (always), the strategy's own among them."""
    everything = np.concatenate([m[np.isfinite(m)] for m in found])  # where none has choices, none of the choices stops
    if len(everything) == 0:
        return [0.0]
    cuts = np.quantile(everything, np.linspace(1, 0, SWEEP_POINTS))
    below = everything.min() - 1e-6 * max(1.0, abs(everything.min()))
    return sorted({0.0, *map(float, cuts), float(below)}, reverse=True)


def warn(stopper: Stopper, traces: Sequence[TracedDocuments]) -> None:
    """Say so where a stopper was fitted on another model, or on the very split it is now tried on."""
    meta = traces[0].meta
    warn_if_foreign(stopper, meta["model"], meta["n_blocks"], meta["head_hash"])
    info = getattr(stopper, "info", None) or {}
    fitted = set(info.get("split", ()))
    same = sorted(
        {t.meta["task"] for t in traces if
         (t.meta["split"] in fitted or overlap(stopper.seen, t.meta["task"], t.meta["split"], t.doc_ids)) and
         all(t.meta[key] == info.get(key) for key in ("n_blocks", "head_hash"))} & set(info.get("tasks", ()))
    )  # fmt: skip
    if same:
        _logger.warning(
            "stopper: it was fitted on this split of %s; replay documents that it has not seen (adainfer trace --split "
            "test)",
            ", ".join(same),
        )
