"""How many calibration documents may lose their answer without a promise failing, and how many documents it needs."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from lm_eval_adainfer.fitting.risk import NET, Risk

CANDIDATES = 3  # that are calibrated, at most; the error is divided among them
_MOST_DOCUMENTS = 2**24


class Allowance:
    """What calibration documents will allow a candidate, by the test that they are put to (``fitting.risk``).

    Args:
        documents: The number of calibration documents.
        max_drop: That is promised.
        confidence: Of the promise.
        loss: Of ``fitting.risk.LOSSES``.
        candidates: How many may be put to the test, each at that confidence.
    """

    def __init__(
        self, documents: int, max_drop: float, confidence: float, loss: str = "gold", candidates: int = 1
    ):
        self.documents, self.max_drop, self.confidence = documents, max_drop, confidence
        self.candidates = candidates
        self._risk = Risk(max_drop, loss in NET)
        self._most: dict[int, int] = {}

    @classmethod
    def divided(
        cls, documents: int, max_drop: float, confidence: float, loss: str, most: int = CANDIDATES
    ) -> Allowance:
        """The error divided among as many candidates, ``most`` at most, as leave room for one lost document each."""
        count = min(most, tried(documents, max_drop, confidence, loss))
        return cls(documents, max_drop, 1 - (1 - confidence) / count, loss, count)

    @property
    def can_promise(self) -> bool:
        """Whether a candidate could pass that changes nothing."""
        return self.most_lost() >= 0

    def most_lost(self, won: int = 0) -> int:
        """How many documents may lose their answer where so many others win theirs; -1: not even none."""
        if not self._risk.net:
            won = 0
        if won not in self._most:
            low, high = -1, self.documents + 1  # low passes, or is none
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if self._passes(middle, won) else (low, middle)
            self._most[won] = low
        return self._most[won]

    @property
    def share(self) -> float:
        """The share of documents that may be lost where none is won; the drop itself where nothing can be promised."""
        return self.most_lost() / self.documents if self.can_promise else self.max_drop

    def allows(self, lost: np.ndarray, won: np.ndarray) -> np.ndarray:
        """Whether so many calibration documents may lose and win; real numbers where they are shares of others.

        Where no promise can be made at all, the drop itself is the limit.

        Args:
            lost: Numbers of documents, of any shape.
            won: Equally many.
        """
        lost, won = np.asarray(lost, dtype=float), np.asarray(won, dtype=float)
        if not self.can_promise:
            return lost - won <= self.max_drop * self.documents + 1e-9
        whole = np.floor(won + 1e-9).astype(int)
        known, where = np.unique(whole, return_inverse=True)
        most = np.array([self.most_lost(int(n)) for n in known])[where].reshape(whole.shape)
        return lost <= most + 1e-9

    def _passes(self, lost: int, won: int) -> bool:
        return lost + won <= self.documents and self._risk.p_of(lost, won, self.documents) <= 1 - self.confidence


@lru_cache(maxsize=64)
def documents_for(lost: int, max_drop: float, confidence: float, loss: str = "gold") -> int:
    """The fewest calibration documents of which so many may lose their answer, and none win, with the promise kept."""
    risk = Risk(max_drop, loss in NET)
    low, high = lost, max(2 * lost, 16)
    while high < _MOST_DOCUMENTS and risk.p_of(lost, 0, high) > 1 - confidence:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if risk.p_of(lost, 0, middle) <= 1 - confidence else (middle, high)
    return high


def tried(documents: int, max_drop: float, confidence: float, loss: str = "gold") -> int:
    """How many candidates may divide the error among them: as many as leave room for one lost document each."""
    for count in range(CANDIDATES, 1, -1):
        if documents_for(1, max_drop, 1 - (1 - confidence) / count, loss) <= documents:
            return count
    return 1
