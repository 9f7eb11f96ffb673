"""A threshold with a guarantee: Learn-then-Test (arXiv 2110.01052), as CALM uses it (arXiv 2207.07061, section 4).

The loss of a document is 0 or 1 (``TracedDocuments.losses``), so the risk of a threshold is a share of documents. Its
p-value against "the risk exceeds ``max_drop``" is an exact binomial tail. Thresholds are tested in a fixed order that
does not depend on the calibration documents, from never stopping to ever looser ones, each at level 1 - confidence,
and testing ends at the first that is not rejected (fixed-sequence testing): with at least the stated confidence *no*
threshold that passed has a greater risk. ``docs/guarantee.md`` says what that promises and what it does not.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binom

from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.readers.base import HEAD, Reader
from lm_eval_adainfer.strategies.base import Stopper
from lm_eval_adainfer.strategies.features import needs_recorded
from lm_eval_adainfer.traces.documents import TracedDocuments, exits, read
from lm_eval_adainfer.traces.file import require_finite
from lm_eval_adainfer.traces.margins import asked, margins
from lm_eval_adainfer.traces.splits import overlap

LOSSES = ("gold", "agreement")
NEVER = float(np.finfo(np.float32).max)  # as a threshold of unbounded margins: it never stops


@dataclass
class Calibration:
    """What testing came to; losses and depths are *simulated* from traces.

    Attributes:
        threshold: The loosest that passed.
        stops: Whether any threshold that stops a document passed.
        documents: n, calibration documents.
        losses: How many of them lose at ``threshold``.
        pruning: Mean of 1 - exit block / L over their decisions there.
        needed: How many documents would let the first threshold that stops at all pass, at its observed share of
            losses; None where that share is not below ``max_drop``. Given where ``stops`` is false.
        overlap: How many of the documents were used in fitting; None where the stopper does not tell.
        first_token_only: Whether some task has one continuation, of which its trace knows the first token alone.
        promise: What goes into the stopper file.
    """

    threshold: float
    stops: bool
    documents: int
    losses: int
    pruning: float
    needed: int | None
    overlap: int | None
    first_token_only: bool
    promise: dict[str, Any]


def p_values(losses: np.ndarray | int, documents: int, max_drop: float) -> np.ndarray:
    """P(Binomial(n, max_drop) <= losses): super-uniform where the risk exceeds ``max_drop`` (2110.01052, section 2)."""
    return np.asarray(binom.cdf(losses, documents, max_drop))


def passed(losses: np.ndarray, documents: int, max_drop: float, confidence: float) -> int:
    """How many thresholds pass, in the order of testing, before the first that does not.

    Args:
        losses: [G], lost documents at each threshold.
        documents: n.
        max_drop: The greatest risk, alpha.
        confidence: 1 - delta.
    """
    rejected = p_values(losses, documents, max_drop) <= 1 - confidence
    return len(rejected) if rejected.all() else int(rejected.argmin())


def documents_needed(max_drop: float, confidence: float, share: float = 0.0) -> int | None:
    """The fewest documents that let a threshold pass which loses this share of them; None where none do.

    With no loss at all that is ceil(log(1 - confidence) / log(1 - max_drop)): 299 for 1% and 95%.
    """
    least = math.ceil(math.log(1 - confidence) / math.log(1 - max_drop))
    if share == 0:
        return least
    low, high = least, 2 * least
    while p_values(math.ceil(share * high), high, max_drop) > 1 - confidence:
        low, high = high, 2 * high
        if share >= max_drop or high > 10**9:
            return None
    while high - low > 1:  # up to rounding of the losses, more documents are always better
        middle = (low + high) // 2
        fits = p_values(math.ceil(share * middle), middle, max_drop) <= 1 - confidence
        low, high = (low, middle) if fits else (middle, high)
    return high


def grid(stopper: Stopper) -> np.ndarray:
    """[G] thresholds from never stopping to always: fixed beforehand, or the guarantee would not hold.

    Raises:
        AdaInferError: Where the strategy has no threshold.
    """
    if not isinstance(stopper.parameters().get("threshold"), float):
        raise AdaInferError(
            f"stopper: {stopper.kind} has no threshold to choose; give a stopper file or a rule like gap:0.8"
        )
    if stopper.kind == "svm":  # the margin is at 1, most examples are between -2 and 3
        return np.array([NEVER, *np.round(np.linspace(4, -2, 241), 3)])
    close = 1 - np.geomspace(1e-4, 0.1, 60, endpoint=False)  # probabilities and gaps crowd near 1
    # in float32's numbers, so that a stopper that computes in float32 compares with the same threshold
    return np.concatenate([[1.0], close, np.linspace(0.9, 0, 91)]).astype(np.float32).astype(float)


def calibrate(
    files: Sequence[Path],
    stopper: Stopper,
    max_drop: float = 0.01,
    confidence: float = 0.95,
    loss: str = "gold",
    check_layers: Any = None,
    reader: Reader = HEAD,
) -> tuple[Stopper, Calibration]:
    """Choose a stopper's threshold so that the promise holds.

    Args:
        files: Trace files of one model; their documents must not have been used in fitting.
        stopper: Its own threshold does not matter.
        max_drop: The greatest risk that is allowed.
        confidence: With what probability, over draws of the calibration documents.
        loss: ``gold`` or ``agreement`` (``TracedDocuments.losses``).
        check_layers: As in a run; the promise holds for runs with the same. None as ``margins.asked``'s.
        reader: Under which it is asked.

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
    thresholds = grid(stopper)
    free = copy.copy(stopper)
    free.threshold = 0.0  # type: ignore[attr-defined]  # margins become bare scores
    parts, n_blocks, blocks = _read(files, free, loss, check_layers, reader)
    left = [part.exits(thresholds) for part in parts]
    depths: np.ndarray = np.concatenate(left, axis=1)  # [G, decisions]
    lost = np.concatenate([part.losses(of, loss) for part, of in zip(parts, left, strict=True)], axis=1)  # [G, n]
    n, losses = lost.shape[1], lost.sum(axis=1)
    count = passed(losses, n, max_drop, confidence)
    at = max(count - 1, 0)
    stopping = np.any(depths < n_blocks, axis=1)
    first = int(stopping.argmax()) if stopping.any() else 0
    stops = bool(count and stopping[at])
    views = [part.documents for part in parts]
    metas = [view.meta for view in views]
    used = {f"{view.meta['task']}/{view.meta['split']}": np.unique(view.doc_ids).tolist() for view in views}
    shared = [overlap(stopper.seen, view.meta["task"], view.meta["split"], view.doc_ids) for view in views]
    promise = {
        "max_drop": max_drop,
        "confidence": confidence,
        "loss": loss,
        "documents": n,
        "losses": int(losses[at]),
        "tasks": sorted({meta["task"] for meta in metas}),
        "num_fewshot": sorted({meta["num_fewshot"] for meta in metas}),
        "reader": reader.name,
        "check_layers": _said(check_layers, blocks, reader),
        "documents_sha256": hashlib.sha256(json.dumps(used, sort_keys=True).encode()).hexdigest()[:16],
        "thresholds": [float(thresholds[at]), float(thresholds[0])],  # the promise holds for every one between
        "stops": stops,
    }
    chosen = copy.copy(stopper)
    chosen.threshold = float(thresholds[at])  # type: ignore[attr-defined]
    chosen.info, chosen.reader = {**stopper.info, "promise": promise}, reader
    if reader.runs_tokens:
        chosen.info["check_layers"] = blocks
    for key in ("model", "n_blocks", "head_hash"):
        chosen.info.setdefault(key, metas[0][key])
    return chosen, Calibration(
        threshold=float(thresholds[at]),
        stops=stops,
        documents=n,
        losses=int(losses[at]),
        pruning=float(1 - depths[at].mean() / n_blocks),
        needed=None if stops else documents_needed(max_drop, confidence, float(losses[first] / n)),
        overlap=sum(shared) if stopper.seen else None,
        first_token_only=any(view.first_token_only for view in views),
        promise=promise,
    )


def _said(check_layers: Any, blocks: Sequence[int], reader: Reader) -> str:
    """What a run has to say for the promise to hold."""
    if check_layers is not None:
        return str(check_layers)
    return "+".join(map(str, blocks)) if reader.runs_tokens else "all"


@dataclass
class _Part:
    """A trace, as far as calibration needs it: its documents and their bare scores [D, L]."""

    documents: TracedDocuments
    scores: np.ndarray

    def exits(self, thresholds: np.ndarray) -> np.ndarray:
        """[G, D]."""
        return np.array([exits(self.scores, t) for t in thresholds])

    def losses(self, left: np.ndarray, loss: str) -> np.ndarray:
        """[G, documents] of 0 and 1, of [G, D] exits."""
        return np.array([self.documents.losses(loss, exit_layer) for exit_layer in left])


def _read(
    files: Sequence[Path], stopper: Stopper, loss: str, check_layers: Any, reader: Reader
) -> tuple[list[_Part], int, list[int]]:
    parts: list[_Part] = []
    tried: set[tuple[str, str]] = set()
    used = needs_recorded(stopper.features)
    blocks: tuple[int, ...] = ()
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
        if loss == "gold" and (found.gold < 0).any():
            raise AdaInferError(f"loss: {found.path} has documents without a gold answer; give --loss agreement")
        blocks = asked(stopper, meta, check_layers=check_layers)
        parts.append(_Part(found, found.together(margins(stopper, meta, found.arrays, blocks))))
    return parts, parts[0].documents.n_blocks, list(blocks)
