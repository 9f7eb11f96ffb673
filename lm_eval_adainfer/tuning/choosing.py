"""From fitting and calibration documents to one calibrated stopper: the choice that ``adainfer tune``'s promise covers.

How many may be lost, which contestants become candidates, what calibrating them comes to, and which of those that
passed is taken, if it is worth it: what saves next to nothing is not. Nothing here traces or looks at test documents,
so ``python -m benchmarks.promises`` can repeat it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.fitting.calibration import Calibration, calibrate
from lm_eval_adainfer.readers.base import Reader
from lm_eval_adainfer.strategies.base import Stopper
from lm_eval_adainfer.traces import documents
from lm_eval_adainfer.traces.documents import TracedDocuments
from lm_eval_adainfer.tuning.allowance import Allowance
from lm_eval_adainfer.tuning.contestants import Contestant, Fitter, contestants, scores
from lm_eval_adainfer.tuning.search import left
from lm_eval_adainfer.tuning.settings import Settings
from lm_eval_adainfer.tuning.work import Work

WORTH = 0.01  # of the dense work: what a candidate must be expected to save, and save on calibration documents


def allowed(count: int, settings: Settings) -> Allowance:
    """What so many calibration documents will allow."""
    return Allowance.divided(count, settings.max_drop, settings.confidence, settings.loss)


@dataclass(frozen=True)
class Calibrated:
    """A candidate whose threshold passed.

    Attributes:
        contestant: The candidate.
        stopper: With the threshold and the promise.
        came: What calibrating came to.
    """

    contestant: Contestant
    stopper: Stopper
    came: Calibration


def candidates(
    fitter: Fitter, readers: Sequence[Reader], allowance: Allowance, settings: Settings
) -> tuple[list[Contestant], list[Contestant], dict[str, str]]:
    """All contestants, those of them that are worth calibrating, fitted on all documents, and why others can't be."""
    rivals, without = contestants(fitter, readers, settings.loss, allowance)
    chosen: list[Contestant] = []
    for rival in rivals:
        if rival.expected >= WORTH and len(chosen) < allowance.candidates:
            try:  # that every fold but one could be fitted on says little of all, of which others are held out
                rival.stopper = fitter.fitted(rival.kind, rival.reader)
                chosen.append(rival)
            except AdaInferError as error:
                without[rival.name] = str(error)
    return [rival for rival in rivals if rival.name not in without], chosen, without


def calibrated(
    chosen: Sequence[Contestant], files: Sequence[Path], allowance: Allowance, settings: Settings
) -> tuple[Calibrated | None, list[dict[str, Any]]]:
    """Of the candidates that passed the one that saves most on fitting documents, and all that was found.

    One that saves less than ``WORTH`` of the calibration documents' work is not taken. Which is taken may depend on
    these documents, since the error is divided among the candidates.

    Args:
        chosen: The candidates.
        files: The calibration documents' traces.
        allowance: Among how many candidates the error is divided.
        settings: What is asked for.
    """
    found: list[tuple[float, int, Calibrated]] = []
    told = []
    views = documents.read(files)
    for candidate in chosen:
        blocks = "+".join(map(str, candidate.choice.blocks))
        assert candidate.stopper is not None, "candidates() fits them"
        stopper, came = calibrate(
            files,
            candidate.stopper,
            max_drop=settings.max_drop,
            confidence=allowance.confidence,
            loss=settings.loss,
            check_layers=blocks,
            reader=candidate.reader,
        )
        stopper.info["promise"]["together_confidence"] = settings.confidence
        exit_layer = left(candidate.scores, candidate.choice.blocks, came.threshold)
        cost = candidate.work.ratio(exit_layer, candidate.choice.blocks)
        saved = _saved(candidate, stopper, came.threshold, views) if came.stops else None
        told.append(
            {
                "name": candidate.name,
                "check_layers": blocks,
                "threshold": came.threshold,
                "stops": came.stops,
                "documents": came.documents,
                "losses": came.losses,
                "wins": came.wins,
                "needed": came.needed,
                "confidence": allowance.confidence,
                "saved_on_fitting": 1 - cost,
                "saved_on_calibration": saved,
            }
        )
        if saved is not None and saved >= WORTH:
            found.append((cost, len(found), Calibrated(candidate, stopper, came)))
    return (min(found, key=lambda one: one[:2])[2] if found else None), told


def _saved(candidate: Contestant, stopper: Stopper, threshold: float, views: Sequence[TracedDocuments]) -> float:
    """The share of these documents' dense work that a calibrated candidate saves."""
    seen, blocks = [view.under(candidate.reader.name) for view in views], candidate.choice.blocks
    exits = np.concatenate([left(scores(stopper, view), blocks, threshold) for view in seen])
    return 1 - Work.of(seen, candidate.reader, stopper).ratio(exits, blocks)
