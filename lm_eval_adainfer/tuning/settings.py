"""What a user asks of ``adainfer tune``, and the small arithmetic of how many documents a promise needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from scipy.stats import binom

from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.tuning import probe

CANDIDATES = 3  # that are calibrated, at most; the error is divided among them
LOSSES = ("gold", "agreement")
_MOST_DOCUMENTS = 2**24


@dataclass(frozen=True)
class Settings:
    """What is asked for.

    Attributes:
        max_drop: The share of documents that may lose their answer.
        confidence: With what probability that is promised.
        loss: ``gold``: the dense answer was right and the early one is not. ``agreement``: they differ.
        documents: Of each of the three splits, all tasks together.
        budget: Minutes that tracing may take, about; None for no bound.
        readers: That are probed besides the head.
        num_fewshot: Shots; None for the tasks' own.
        seed: Of drawn documents, folds and fits.
        fewshot_seed: Of the shots, as ``lm_eval``'s.

    Raises:
        AdaInferError: On the first that makes no sense.
    """

    max_drop: float = 0.01
    confidence: float = 0.95
    loss: str = "gold"
    documents: int = 500
    budget: float | None = None
    readers: Sequence[str] = probe.READERS
    num_fewshot: int | None = None
    seed: int = 0
    fewshot_seed: int = 1234

    def __post_init__(self) -> None:
        for name, usual in (("max_drop", 0.01), ("confidence", 0.95)):
            if not 0 < getattr(self, name) < 1:
                raise AdaInferError(f"{name}: {getattr(self, name):g} is not between 0 and 1; give {usual}, say")
        if self.loss not in LOSSES:
            raise AdaInferError(f"loss: {self.loss!r} is none of {', '.join(LOSSES)}")
        if self.documents < 10:
            raise AdaInferError(f"documents: {self.documents} are too few to fit anything on; give 10 or more")
        if self.budget is not None and not self.budget > 0:
            raise AdaInferError(f"budget: {self.budget:g} minutes are none; give 10, say")

    def described(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return {**asdict(self), "readers": list(self.readers)}


def documents_for(losses: int, max_drop: float, confidence: float) -> int:
    """The fewest calibration documents of which so many may lose their answer without the promise failing."""
    low, high = losses, _MOST_DOCUMENTS
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _passes(losses, middle, max_drop, confidence) else (middle, high)
    return high


def most_losses(documents: int, max_drop: float, confidence: float) -> int:
    """How many of so many calibration documents may lose their answer without the promise failing; -1: not even 0."""
    found = -1
    while found + 1 < documents and _passes(found + 1, documents, max_drop, confidence):
        found += 1
    return found


def tried(documents: int, max_drop: float, confidence: float) -> int:
    """How many candidates may divide the error among them: as many as leave room for one lost document each."""
    for count in range(CANDIDATES, 1, -1):
        if documents_for(1, max_drop, 1 - (1 - confidence) / count) <= documents:
            return count
    return 1


def most_each(held: Sequence[int], wanted: int) -> int:
    """At most how many documents of each task make so many together, where tasks hold so many."""
    most = -(-wanted // len(held))
    while most < max(held) and sum(min(most, n) for n in held) < wanted:
        most += 1
    return most


def _passes(losses: int, documents: int, max_drop: float, confidence: float) -> bool:
    return bool(binom.cdf(losses, documents, max_drop) <= 1 - confidence)
