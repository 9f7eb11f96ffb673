"""Exact p-values about a finite set of documents, of which some were drawn without replacement.

The set has ``size`` documents, and n of them were drawn, every n of them equally likely. The set itself is fixed: only
the draw is random, so nothing has to be assumed about where the documents come from. The hypothesis is that more than
``share`` of the ``size`` documents lose (or, net of those that win, lose), the drawn ones among them.
"""

from __future__ import annotations

from functools import lru_cache
from math import floor

import numpy as np
from scipy import special, stats

from lm_eval_adainfer.statistics import GAMMA, fewest_wins, tango_z

_MOST = 64  # numbers of discordant documents that net_p looks at; where more are possible, evenly spaced ones


def fewest_above(share: float, size: int) -> int:
    """The fewest documents that are more than this share of ``size``."""
    return floor(share * size * (1 + 1e-12) + 1e-12) + 1


def gross_p(lost: np.ndarray | int, drawn: int, size: int, share: float) -> np.ndarray:
    """P of "more than ``share`` of the ``size`` documents lose", from the lost ones among those drawn.

    Proof. Let K of the ``size`` documents lose. The lost ones among the drawn are Hypergeometric(size, K, drawn), whose
    P(X <= lost) falls with K (one more losing document is drawn, or not). The hypothesis is K >= m, m the fewest that
    are more than the share, so its worst case is K = m, and p = P(Hypergeometric(size, m, drawn) <= lost). Where every
    document was drawn, p is 0 or 1.

    Args:
        lost: Lost documents among those drawn.
        drawn: n.
        size: Documents of the set, the drawn ones among them.
        share: The limit.
    """
    least = fewest_above(share, size)
    if least > size:
        return np.zeros(np.shape(lost))
    return np.asarray(stats.hypergeom.cdf(lost, size, least, drawn))


@lru_cache(maxsize=4096)
def net_p(lost: int, won: int, drawn: int, size: int, share: float) -> float:
    """P of "of the ``size`` documents, those that lose exceed those that win by more than ``share``".

    Proof. Let B of the ``size`` documents lose, C win, and D = B + C. Outcomes (b, c) among the drawn are ordered by
    Tango's statistic, and those at most as large as the one seen are the ones that speak against the hypothesis. Given
    D, the number b + c of drawn ones that flip is Hypergeometric(size, D, drawn) whatever B and C are, and given that
    number, c is Hypergeometric(D, C, b + c), which is the larger the larger C is. The ordering goes down with c at a
    given b + c, so P(such an outcome) grows with C; under B - C >= m the largest C is floor((D - m) / 2). The largest
    over the D that a 1 - 1e-6 confidence interval from b + c leaves, plus 1e-6, is a p-value (Berger & Boos, JASA 89,
    1994). All these D are looked at where they are at most 64, else evenly spaced ones, between which the probability
    hardly changes.

    Args:
        lost: b, lost documents among those drawn.
        won: c.
        drawn: n.
        size: Documents of the set, the drawn ones among them.
        share: The limit.
    """
    least = fewest_above(share, size)
    if drawn == size:
        return 1.0 if lost - won >= least else 0.0
    lowest, highest = _discordant(lost + won, drawn, size)
    lowest = max(lowest, least)
    if lowest > highest:
        return 2 * GAMMA
    first = lowest + (lowest - least) % 2  # where D - m is odd there is one losing document more than with D - 1
    step = 2 * max(1, -(-(highest - first) // (2 * _MOST)))
    candidates = {lowest, *range(first, highest + 1, step)}
    z = float(tango_z(lost, won, drawn, share)) + 1e-9
    fewest, worst = fewest_wins(np.arange(min(drawn, highest) + 1), drawn, share, z), 0.0
    ways = _log_choose(size, drawn)
    for flipping in sorted(candidates):
        wins = (flipping - least) // 2
        seen = np.arange(max(0, drawn + flipping - size), min(drawn, flipping) + 1)
        weight = np.exp(_log_choose(flipping, seen) + _log_choose(size - flipping, drawn - seen) - ways)
        seen, weight = seen[weight > 1e-13], weight[weight > 1e-13]
        worst = max(worst, float(weight @ _at_least(fewest[seen], flipping, wins, seen)))
    return min(1.0, worst + GAMMA)


def _at_least(fewest: np.ndarray, flipping: int, wins: int, seen: np.ndarray) -> np.ndarray:
    """[m], P(Hypergeometric(flipping, wins, seen) >= fewest) for each of m ``seen``; scipy's takes a loop for it."""
    k, n = np.arange(min(wins, int(seen.max())) + 1)[None, :], seen[:, None]
    possible = (k <= n) & (n - k <= flipping - wins)
    lose = np.where(possible, n - k, 0)
    chance = np.exp(_log_choose(wins, k) + _log_choose(flipping - wins, lose) - _log_choose(flipping, n))
    return np.where(possible & (k >= fewest[:, None]), chance, 0.0).sum(axis=1)


def _log_choose(n: int, k: np.ndarray | int) -> np.ndarray:
    k = np.asarray(k, dtype=float)
    return special.gammaln(n + 1) - special.gammaln(k + 1) - special.gammaln(n - k + 1)


def _discordant(seen: int, drawn: int, size: int) -> tuple[int, int]:
    """The numbers of documents of the set that may flip, at confidence 1 - GAMMA, where ``seen`` of the drawn do."""
    least, most = seen, size - drawn + seen
    low, high = least, most
    while low < high:  # the fewest of which so many are seen with a probability above GAMMA / 2
        middle = (low + high) // 2
        enough = stats.hypergeom.sf(seen - 1, size, middle, drawn) > GAMMA / 2
        low, high = (low, middle) if enough else (middle + 1, high)
    lowest, low, high = low, low, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if stats.hypergeom.cdf(seen, size, middle, drawn) > GAMMA / 2 else (low, middle - 1)
    return lowest, low
