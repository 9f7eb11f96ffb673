"""What calibration documents say against "the risk of this threshold exceeds the limit": a p-value for every promise.

A document's loss is 0 or 1, or, where those that win are set against those that lose (``--loss accuracy``), from -1 to
1. What its p-value is:

===========================  ==========================================================================================
documents like these         gross: the exact binomial tail; net: the gate's exact paired test (``statistics.exact_p``)
a finite set (``size``)      exact, of a draw without replacement (``finite.py``)
clusters                     Gaffke's, of the clusters' totals (``bounded.py``)
===========================  ==========================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.stats import binom

from lm_eval_adainfer import bounded, finite, statistics
from lm_eval_adainfer.errors import AdaInferError

LOSSES = ("gold", "agreement", "accuracy")
NET = ("accuracy",)  # losses of which a document can also win back
_MOST = 10**6  # documents, beyond which nobody is told how many would be needed


@dataclass(frozen=True)
class Risk:
    """What is tested, the same for every threshold.

    Attributes:
        max_drop: The greatest risk that is allowed.
        net: Whether documents that win are set against those that lose.
        clusters: [documents], equal where documents belong together; None where each stands for itself.
        size: Documents of the finite set that is spoken about, the calibration documents among them; None where it is
            about all documents like them.

    Raises:
        AdaInferError: On both clusters and a finite set.
    """

    max_drop: float
    net: bool = False
    clusters: np.ndarray | None = None
    size: int | None = None

    def __post_init__(self) -> None:
        if self.clusters is not None and self.size is not None:
            raise AdaInferError(
                "test_size: documents in clusters are no draw of single documents from a finite set; give --cluster or "
                "--test-size"
            )

    @property
    def independent(self) -> str:
        """What is taken for independent."""
        return "documents" if self.clusters is None else "clusters"

    def p(self, losses: np.ndarray) -> float:
        """The p-value of "the risk exceeds ``max_drop``".

        Args:
            losses: [documents], 0 and 1, or -1, 0 and 1.
        """
        if self.clusters is not None:
            return bounded.gaffke_p(*bounded.by_cluster(losses, None, self.clusters), self.max_drop)
        return self.p_of(int(np.sum(losses > 0)), int(np.sum(losses < 0)), len(losses))

    def p_of(self, lost: int, won: int, documents: int) -> float:
        """The same from counts, where documents stand for themselves."""
        if self.size is not None and self.net:
            return finite.net_p(lost, won, documents, self.size, self.max_drop)
        if self.size is not None:
            return float(finite.gross_p(lost, documents, self.size, self.max_drop))
        if self.net:
            return statistics.exact_p(lost, won, documents, self.max_drop)
        return float(binom.cdf(lost, documents, self.max_drop))

    def passed(self, losses: np.ndarray, level: float) -> int:
        """How many thresholds pass, in the order of testing, before the first that does not.

        Args:
            losses: [G, documents], of each threshold.
            level: Of every test.
        """
        before: tuple[np.ndarray, float] | None = None
        for count, row in enumerate(losses):
            p = before[1] if before is not None and np.array_equal(before[0], row) else self.p(row)
            if p > level:
                return count
            before = row, p
        return len(losses)

    def least(self, level: float) -> int | None:
        """The fewest documents, or clusters of one size, that let a threshold pass at which nothing changes.

        None where none do.
        """
        if self.clusters is not None or (not self.net and self.size is None):
            return math.ceil(math.log(level) / math.log(1 - self.max_drop))
        return self._needed(0.0, 0.0, 1, level)

    def needed(self, losses: np.ndarray, level: float) -> int | None:
        """The fewest documents that let a threshold pass which loses, and wins, this share of them; None: none do.

        Clusters are taken several times over, so there it is a multiple of the documents seen.
        """
        n = len(losses)
        if self.clusters is not None:
            totals, sizes = bounded.by_cluster(losses, None, self.clusters)
            for times in range(1, 65):
                if bounded.gaffke_p(np.tile(totals, times), np.tile(sizes, times), self.max_drop) <= level:
                    return times * n
            return None
        return self._needed(float(np.mean(losses > 0)), float(np.mean(losses < 0)), n, level)

    def _needed(self, lost: float, won: float, seen: int, level: float) -> int | None:
        def passes(n: int) -> bool:
            return self.p_of(math.ceil(lost * n), math.floor(won * n), n) <= level

        most = _MOST if self.size is None else self.size
        if lost - won >= self.max_drop:
            return None
        high = next((n for n in _doubled(max(seen, 16), most) if passes(n)), None)
        if high is None:
            return None
        low = 0
        while high - low > 1:  # up to rounding of the losses, more documents are always better
            middle = (low + high) // 2
            low, high = (low, middle) if passes(middle) else (middle, high)
        return high


def _doubled(first: int, most: int) -> Iterator[int]:
    """A number, and its doubles up to ``most``, which ends them."""
    while first < most:
        yield first
        first *= 2
    yield most


def documents_needed(max_drop: float, confidence: float) -> int:
    """The fewest documents that let a threshold pass which loses none, for documents like them.

    That is ceil(log(1 - confidence) / log(1 - max_drop)): 299 for 1% and 95%.
    """
    found = Risk(max_drop).least(1 - confidence)
    assert found is not None
    return found
