"""A bound of a mean drop that holds at every number of documents at once, so that one may look and stop at any time.

Capital is bet on the hypothesis "the mean drop is ``limit`` or more". A bet of size b turns it by 1 + b (limit - x)
with every document's drop x. Where the hypothesis is true no bet gains on average, so capital ever reaches 1 / error
with a probability of at most that error (Ville's inequality), whenever one stops: Waudby-Smith & Ramdas, "Estimating
means of bounded random variables by betting", JRSS B 86, 2024. That is proven for all drops between -reach and reach of
documents that come in random order. The capital is split over a few bets once and for all, and their sum counts; so
nothing has to be tuned, and a bet that was right is at most 1 / (number of bets) of the capital behind.
"""

from __future__ import annotations

import numpy as np

# in parts of what can't go bankrupt: large ones are right where few documents flip, small ones where many do
_BETS = np.array([0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.6, 0.9])
_PRECISION = 1e-5


def betting_p(drops: np.ndarray, limit: float, reach: float = 1.0) -> float:
    """P of "the true drop is ``limit`` or more", valid whenever one stops; it never rises as documents are added.

    Args:
        drops: [documents], in the random order in which they came.
        limit: The drop.
        reach: The largest drop that a document can show; its smallest is -reach.
    """
    if limit <= -reach or not len(drops):
        return 1.0
    if limit >= reach:
        return 0.0 if limit > reach else 1.0
    logs = np.full(1, -np.inf)
    best, before = 0.0, np.zeros(len(_BETS))
    bets = _BETS / (reach - limit)
    for start in range(0, len(drops), 100_000):
        part = np.log1p(np.outer(bets, limit - drops[start : start + 100_000]))
        logs = np.cumsum(part, axis=1) + before[:, None]
        before = logs[:, -1]
        best = max(best, float(np.max(np.logaddexp.reduce(logs, axis=0) - np.log(len(_BETS)))))
    return float(np.exp(-best))


def betting_bound(
    drops: np.ndarray, level: float, upper: bool, reach: float = 1.0, at: float | None = None
) -> float:
    """One-sided confidence bound of the drop, valid whenever one stops: where :func:`betting_p` reaches 1 - ``level``.

    Args:
        drops: [documents], in the random order in which they came.
        level: Of confidence, one-sided.
        upper: Which side.
        reach: The largest drop that a document can show.
        at: A drop on whose right side the bound must lie, so that a bound that is shown and a test made there agree.
    """
    if not upper:
        return -betting_bound(-drops, level, True, reach, None if at is None else -at)
    low, high = float(-reach), float(reach)  # at low it is not rejected, at high it is
    if at is not None and low < at < high:
        low, high = (low, at) if betting_p(drops, at, reach) <= 1 - level else (at, high)
    while high - low > _PRECISION * reach:
        middle = (low + high) / 2
        low, high = (low, middle) if betting_p(drops, middle, reach) <= 1 - level else (middle, high)
    return high
