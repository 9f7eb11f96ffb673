"""What a user asks of ``adainfer tune``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.fitting.risk import LOSSES
from lm_eval_adainfer.tuning import probe


@dataclass(frozen=True)
class Settings:
    """What is asked for.

    Attributes:
        max_drop: The loss that is allowed, as a share of the documents.
        confidence: With what probability that is promised.
        loss: ``accuracy``: how far accuracy falls. ``gold``: documents whose dense answer was right and whose early one
            is not. ``agreement``: those whose answers differ.
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
    loss: str = "accuracy"
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
