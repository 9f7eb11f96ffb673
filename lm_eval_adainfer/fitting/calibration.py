"""A threshold with a guarantee: Learn-then-Test (arXiv 2110.01052), as CALM uses it (arXiv 2207.07061, section 4).

A document's loss (``TracedDocuments.losses``) is at most 1, and the risk of a threshold is its mean. ``risk.py`` has an
exact p-value of "the risk exceeds ``max_drop``" for every kind of promise. Thresholds are tested in a fixed order that
does not depend on the calibration documents (``grids.py``), from never stopping to ever looser ones, each at level
1 - confidence, and testing ends at the first that is not rejected (fixed-sequence testing): with at least the stated
confidence *no* threshold that passed has a greater risk. ``docs/guarantee.md`` says what that promises and what it does
not.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.fitting import grids
from lm_eval_adainfer.fitting.risk import LOSSES, NET, Risk
from lm_eval_adainfer.readers.base import HEAD, Reader
from lm_eval_adainfer.strategies.base import Stopper
from lm_eval_adainfer.strategies.features import needs_recorded
from lm_eval_adainfer.traces import clustering
from lm_eval_adainfer.traces.documents import TracedDocuments, exits, read
from lm_eval_adainfer.traces.file import ASKED, require_finite
from lm_eval_adainfer.traces.margins import asked, margins
from lm_eval_adainfer.traces.splits import overlap


@dataclass
class Calibration:
    """What testing came to; losses and depths are *simulated* from traces.

    Attributes:
        threshold: The loosest that passed.
        stops: Whether any threshold that stops a document passed.
        documents: n, calibration documents.
        losses: How many of them lose at ``threshold``.
        wins: How many of them win there, with a loss that is net.
        pruning: Mean of 1 - exit block / L over their decisions there.
        least: How many documents, or clusters, let a threshold pass at which nothing changes; None where none do.
        seen: How many of these there are.
        needed: How many documents would let the first threshold that stops at all pass, at its observed share of
            losses; None where none would. Given where ``stops`` is false.
        overlap: How many of the documents were used in fitting; None where the stopper does not tell.
        first_token_only: Whether some task has one continuation, of which its trace knows the first token alone.
        grid: What the thresholds are.
        repeated: A sentence about passages that were taken for independent documents; None where there are none.
        promise: What goes into the stopper file.
    """

    threshold: float
    stops: bool
    documents: int
    losses: int
    wins: int
    pruning: float
    least: int | None
    seen: int
    needed: int | None
    overlap: int | None
    first_token_only: bool
    grid: str
    repeated: str | None
    promise: dict[str, Any]


def calibrate(
    files: Sequence[Path],
    stopper: Stopper,
    max_drop: float = 0.01,
    confidence: float = 0.95,
    loss: str = "gold",
    check_layers: Any = None,
    reader: Reader = HEAD,
    min_layer: Any = 1,
    grid_from: Sequence[Path] = (),
    cluster: clustering.Wanted = (),
    test_size: int | None = None,
    promises: int = 1,
) -> tuple[Stopper, Calibration]:
    """Choose a stopper's threshold so that the promise holds.

    Args:
        files: Trace files of one model; their documents must not have been used in fitting.
        stopper: Its own threshold does not matter.
        max_drop: The greatest risk that is allowed.
        confidence: With what probability, over draws of the calibration documents.
        loss: Of ``risk.LOSSES`` (``TracedDocuments.losses``).
        check_layers: As in a run; the promise holds for runs with the same. None as ``margins.asked``'s.
        reader: Under which it is asked.
        min_layer: As in a run.
        grid_from: Traces of other documents, whose scores make the grid of thresholds; none for ``grids.grid``'s.
        cluster: Tasks and fields (``clusters.parse``) that say which documents belong together.
        test_size: The promise is about a set of so many documents, of which the calibration documents are a draw
            without replacement; None for all documents like them.
        promises: How many promises are to hold together: the error is divided by their number.

    Returns:
        A copy of the stopper with the threshold, the reader and the promise (``info["promise"]``), and what testing
        came to.

    Raises:
        AdaInferError: On arguments out of range or unusable traces.
    """
    for name, value, usual in (("max_drop", max_drop, 0.01), ("confidence", confidence, 0.95)):
        if not 0 < value < 1:
            raise AdaInferError(f"{name}: {value:g} is not between 0 and 1; give {usual}, say")
    if loss not in LOSSES:
        raise AdaInferError(f"loss: {loss!r} is none of {', '.join(LOSSES)}")
    if not files:
        raise AdaInferError("traces: none is given; make some with adainfer trace")
    thresholds, origin = grids.grid(stopper)
    parts = _read(files, _free(stopper), loss, check_layers, reader, min_layer)
    views, metas = [part.documents for part in parts], [part.documents.meta for part in parts]
    n_blocks = metas[0]["n_blocks"]
    if grid_from:
        thresholds, origin = _grid_of(grid_from, stopper, views, check_layers, reader), "scores of other traces"
    left = [part.exits(thresholds) for part in parts]
    depths: np.ndarray = np.concatenate(left, axis=1)  # [G, decisions]
    lost = np.concatenate([part.losses(of, loss) for part, of in zip(parts, left, strict=True)], axis=1)  # [G, n]
    n, level = lost.shape[1], (1 - confidence) / promises
    if test_size is not None and test_size < n:
        raise AdaInferError(
            f"test_size: the {n} calibration documents are no draw from {test_size}; give the number of all documents "
            "that the promise is about, these among them"
        )
    clusters = _clusters(views, cluster)
    risk = Risk(max_drop, loss in NET, clusters, test_size)
    count = risk.passed(lost, level)
    at = max(count - 1, 0)
    stopping = np.any(depths < n_blocks, axis=1)
    first = int(stopping.argmax()) if stopping.any() else 0
    stops = bool(count and stopping[at])
    at = at if stops else 0  # a file that is said never to stop never does, on other documents either
    used = {f"{view.meta['task']}/{view.meta['split']}": np.unique(view.doc_ids).tolist() for view in views}
    shared = [overlap(stopper.seen, view.meta["task"], view.meta["split"], view.doc_ids) for view in views]
    losses, wins = int((lost[at] > 0).sum()), int((lost[at] < 0).sum())
    blocks = parts[0].blocks
    promise = {
        "max_drop": max_drop,
        "confidence": confidence,
        "loss": loss,
        "documents": n,
        "losses": losses,
        **({"wins": wins} if risk.net else {}),
        **({"together_with": promises - 1} if promises > 1 else {}),  # others, at that confidence
        **({"test_size": test_size} if test_size is not None else {}),
        **({"clusters": len(np.unique(clusters))} if clusters is not None else {}),
        "tasks": sorted({meta["task"] for meta in metas}),
        "num_fewshot": sorted({meta["num_fewshot"] for meta in metas}),
        "shots": {meta["task"]: meta["num_fewshot"] for meta in metas},
        "fewshot_seed": sorted({meta["fewshot_seed"] for meta in metas if "fewshot_seed" in meta}),
        "generated": any(view.generated for view in views),
        "reader": reader.name,
        "min_layer": int(str(min_layer).strip()),
        "check_layers": _said(check_layers, blocks, reader),
        "checked_blocks": blocks,
        **{key: metas[0].get(key) for key in (*_MODEL, *ASKED)},
        "grid": origin,
        "documents_sha256": hashlib.sha256(json.dumps(used, sort_keys=True).encode()).hexdigest()[:16],
        "thresholds": [float(thresholds[at]), float(thresholds[0])],  # the promise holds for every one tested between
        "stops": stops,
    }
    chosen = copy.copy(stopper)
    chosen.threshold = float(thresholds[at])  # type: ignore[attr-defined]
    chosen.info, chosen.reader, chosen.calibrated = {**stopper.info, "promise": promise}, reader, used
    if reader.runs_tokens:
        chosen.info["check_layers"] = blocks
    for key in ("model", "n_blocks", "head_hash"):
        chosen.info.setdefault(key, metas[0][key])
    return chosen, Calibration(
        threshold=float(thresholds[at]),
        stops=stops,
        documents=n,
        losses=losses,
        wins=wins,
        pruning=float(1 - depths[at].mean() / n_blocks),
        least=risk.least(level),
        seen=n if clusters is None else len(np.unique(clusters)),
        needed=None if stops else risk.needed(lost[first], level),
        overlap=sum(shared) if stopper.seen else None,
        first_token_only=any(view.first_token_only for view in views),
        grid=origin,
        repeated=clustering.repeated(views, cluster),
        promise=promise,
    )


_MODEL = ("n_blocks", "head_hash", "dtype", "weights_hash")  # of traces; the promise is about this model as it computed


def _free(stopper: Stopper) -> Stopper:
    """The stopper with margins that are bare scores."""
    free = copy.copy(stopper)
    free.threshold = 0.0  # type: ignore[attr-defined]
    return free


def _said(check_layers: Any, blocks: Sequence[int], reader: Reader) -> str:
    """What a run has to say for the promise to hold."""
    if check_layers is not None:
        return str(check_layers)
    return "+".join(map(str, blocks)) if reader.runs_tokens else "all"


def _clusters(views: Sequence[TracedDocuments], wanted: clustering.Wanted) -> np.ndarray | None:
    """[documents], in the order of the losses; None where every document stands for itself."""
    clustering.require_known(wanted, [view.meta["task"] for view in views])
    found = clustering.of_documents(views, wanted)
    if found is None:
        return None
    firsts = [np.unique(view.doc_ids, return_index=True)[1] for view in views]
    names = np.concatenate([of[first] for of, first in zip(found, firsts, strict=True)])
    return names if len(np.unique(names)) < len(names) else None


def _grid_of(
    files: Sequence[Path], stopper: Stopper, views: Sequence[TracedDocuments], check_layers: Any, reader: Reader
) -> np.ndarray:
    others = read(files, reader.name)
    for view in views:
        for other in others:
            held = {f"{other.meta['task']}/{other.meta['split']}": other.doc_ids.tolist()}
            if shared := overlap(held, view.meta["task"], view.meta["split"], view.doc_ids):
                raise AdaInferError(
                    f"grid_from: {other.path} holds {shared} of the calibration documents of {view.meta['task']}, "
                    "which may not choose the thresholds that are tested on them; give fitting documents"
                )
    return grids.grid_of(stopper, others, check_layers)


@dataclass
class _Part:
    """A trace, as far as calibration needs it: its documents, their bare scores [D, L], the asked blocks."""

    documents: TracedDocuments
    scores: np.ndarray
    blocks: list[int]

    def exits(self, thresholds: np.ndarray) -> np.ndarray:
        """[G, D]."""
        return np.array([exits(self.scores, t) for t in thresholds])

    def losses(self, left: np.ndarray, loss: str) -> np.ndarray:
        """[G, documents], of [G, D] exits."""
        return np.array([self.documents.losses(loss, exit_layer) for exit_layer in left])


def _read(
    files: Sequence[Path], stopper: Stopper, loss: str, check_layers: Any, reader: Reader, min_layer: Any
) -> list[_Part]:
    parts: list[_Part] = []
    tried: set[tuple[str, str]] = set()
    used = needs_recorded(stopper.features)
    for found in read(files, reader.name):
        meta = found.meta
        if (meta["task"], meta["split"]) in tried:
            raise AdaInferError(
                f"traces: {found.path} is a second trace of {meta['task']}; give one, since a document must count once"
            )
        tried.add((meta["task"], meta["split"]))
        columns = [i for i, name in enumerate(meta["features"]) if name in used]
        names = [meta["features"][i] for i in columns]
        require_finite(found.path, found.arrays["features"][:, found.at][:, :, columns], names)
        if loss != "agreement" and (found.gold < 0).any():
            raise AdaInferError(f"loss: {found.path} has documents without a gold answer; give --loss agreement")
        blocks = asked(stopper, meta, min_layer, check_layers)
        parts.append(_Part(found, found.together(margins(stopper, meta, found.arrays, blocks)), list(blocks)))
    return parts
