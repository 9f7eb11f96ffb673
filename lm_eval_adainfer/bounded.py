"""Bounds of a mean drop whose documents are bounded, and perhaps in clusters or of unequal weight: Gaffke's bound.

What is independent is a *unit*: a document, or all documents of one passage. A unit brings a total (weight times drop,
summed) and a size (the weight, summed); the drop is the sum of totals over the sum of sizes. Gaffke's p of "the drop is
``drop`` or more" is the probability that the drop would be that large if units were weighted at random (by standard
exponential variables, as in the Bayesian bootstrap), beside one more unit, as large as the largest, that lost all it
could (Gaffke, "Three test statistics for a nonparametric one-sided hypothesis on the mean of a nonnegative variable",
Mathematical Methods of Statistics 14, 2005; Learned-Miller & Thomas, arXiv 1905.06208, 2019).

What is proven: where units of one size take two values, this is Clopper and Pearson's binomial bound. Beyond that it is
a conjecture of which no counterexample is known; ``tests/test_bounded.py`` enumerates three values and simulates
clusters, unequal sizes, weights, and sparse and rare losses, and none breaks the stated error. Betting bounds
(Waudby-Smith & Ramdas, JRSS B 86, 2024) are proven for all distributions and settle less; the tests hold one, to
compare.

Where no document differs, at K units the 95% bound is 1 - 0.05^(1/K) of what a unit can lose: nothing that holds for
any dependence within clusters could be smaller.
"""

from __future__ import annotations

from math import exp, pi

import numpy as np
from scipy import optimize

from lm_eval_adainfer.statistics import Interval

_STEP, _MOST_NODES, _NOTHING = 0.2, 20_000, 1e-13  # of the integral: see _tail
_PART = 2_000_000  # numbers held at once
_KINDS = 1000  # of units, beyond which those that nearly agree are taken together


def by_cluster(
    drops: np.ndarray, weights: np.ndarray | None = None, clusters: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The totals and the sizes of the independent units.

    Args:
        drops: [documents].
        weights: [documents], positive; None where all weigh 1.
        clusters: [documents], equal where documents belong together; None where each stands for itself.

    Returns:
        [units], the sums of weight times drop, and [units], the sums of weights.
    """
    weights = np.ones(len(drops)) if weights is None else np.asarray(weights, dtype=float)
    if clusters is None:
        return weights * drops, weights
    _, unit = np.unique(clusters, return_inverse=True)
    return np.bincount(unit, weights * drops), np.bincount(unit, weights)


def gaffke_p(totals: np.ndarray, sizes: np.ndarray, drop: float, reach: float = 1.0) -> float:
    """Gaffke's p of "the true drop is ``drop`` or more", small where the seen one is clearly smaller.

    The p of "``drop`` or less" is ``gaffke_p(-totals, sizes, -drop, reach)``.

    Args:
        totals: [units], from :func:`by_cluster`.
        sizes: [units].
        drop: The limit.
        reach: The largest drop a document can show; its smallest is -reach.
    """
    if drop <= -reach:
        return 1.0
    if drop > reach:
        return 0.0
    return _chance(*_distinct(totals, sizes), float(np.max(sizes)), drop, reach)


def gaffke_bound(
    totals: np.ndarray, sizes: np.ndarray, level: float, upper: bool, reach: float = 1.0, at: float | None = None
) -> float:
    """One-sided confidence bound of the drop: where :func:`gaffke_p` reaches 1 - ``level``.

    Args:
        totals: [units], from :func:`by_cluster`.
        sizes: [units].
        level: Of confidence, one-sided.
        upper: Which side.
        reach: The largest drop a document can show.
        at: A drop on whose right side the bound must lie, so that a bound that is shown and a test made there agree.
    """
    if not upper:
        return -gaffke_bound(-totals, sizes, level, True, reach, None if at is None else -at)
    distinct, largest = _distinct(totals, sizes), float(np.max(sizes))

    def excess(drop: float) -> float:
        return _chance(*distinct, largest, drop, reach) - (1 - level)

    low, high = -reach, reach
    if at is not None and low < at < high:
        low, high = (low, at) if excess(at) <= 0 else (at, high)
    if excess(high) > 0:
        return high
    if excess(low) <= 0:
        return low
    return float(optimize.brentq(excess, low, high, xtol=1e-7 * reach, rtol=1e-9))


def gaffke_interval(totals: np.ndarray, sizes: np.ndarray, level: float = 0.95, reach: float = 1.0) -> Interval:
    """The drop with both one-sided bounds, each with half of the error."""
    side = (1 + level) / 2
    lower, upper = (gaffke_bound(totals, sizes, side, up, reach) for up in (False, True))
    return Interval(float(np.sum(totals) / np.sum(sizes)), lower, upper)


def _distinct(totals: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each kind of unit and how many there are of it: most documents lose nothing, and so are alike."""
    scale = 1e-12 * max(float(np.max(sizes)), 1e-300)
    pairs = np.round(totals / scale) + 1j * np.round(sizes / scale)  # complex numbers sort faster than rows
    kinds, counts = np.unique(pairs, return_counts=True)
    return kinds.real * scale, kinds.imag * scale, counts.astype(float)


def _chance(
    totals: np.ndarray, sizes: np.ndarray, counts: np.ndarray, largest: float, drop: float, reach: float
) -> float:
    """P(the randomly weighted units, with one more that lost all, dropped by ``drop`` or more)."""
    excess = np.append(totals - drop * sizes, (reach - drop) * largest)
    counts = np.append(counts, 1.0)
    scale = float(np.max(np.abs(excess)))
    if scale == 0 or np.min(excess) >= -1e-12 * scale:
        return 1.0
    if np.max(excess) <= 1e-12 * scale:
        return 0.0
    z, counts = _merged(excess / scale, counts)
    if counts @ z <= 0:
        return min(1.0, _tail(z, counts))
    return max(0.0, 1 - _tail(-z, counts))


def _tail(z: np.ndarray, counts: np.ndarray) -> float:
    """P(sum of z times Gamma(counts) variables > 0), where the mean of that sum is at most 0.

    The inverse of the Laplace transform, prod (1 - s z)^-counts / s, along the vertical line through its saddle point
    s0 between 0 and 1 / max(z). There the trapezoid rule errs by exp(-2 pi / step) of the result, however small that
    is; the line ends where nothing more comes.
    """

    def slope(s: float) -> float:  # of the logarithm of the transform; increasing
        return float(counts @ (z / (1 - s * z))) - 1 / s

    pole = 1 / float(np.max(z))
    low, high = 1e-9 * pole, pole * (1 - 1e-12)
    while slope(low) > 0:
        low /= 1e3
    s0 = float(optimize.brentq(slope, low, high, xtol=1e-14 * pole, rtol=1e-12)) if slope(high) > 0 else high
    inverse = z / (1 - s0 * z)
    step = _STEP / np.sqrt(float(counts @ inverse**2) + 1 / s0**2)  # in parts of the peak's width
    at_saddle = -float(counts @ np.log1p(-s0 * z)) - np.log(s0)
    found, first, nodes = 0.5, 1, 32  # the node on the real axis counts half
    while first < _MOST_NODES:
        t = step * np.arange(first, first + nodes)
        size, angle = _log(t, inverse, counts)
        size, angle = size + 0.5 * np.log1p((t / s0) ** 2), angle + np.arctan(t / s0)
        parts = np.exp(-size)
        found += float(parts @ np.cos(angle))
        if float(np.max(parts)) * (first + nodes) < _NOTHING:
            break
        first, nodes = first + nodes, 2 * nodes
    return exp(min(at_saddle, 700.0)) * max(found, 0.0) * float(step) / pi


def _log(t: np.ndarray, inverse: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum over kinds of counts * log(1 - i t inverse): its real and its imaginary part."""
    rows, found = max(1, _PART // len(inverse)), []
    for start in range(0, len(t), rows):
        x = np.outer(t[start : start + rows], inverse)
        found.append((0.5 * (np.log1p(x * x) @ counts), -(np.arctan(x) @ counts)))
    return np.concatenate([size for size, _ in found]), np.concatenate([angle for _, angle in found])


def _merged(z: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fewer kinds: those within a fiftieth of a standard deviation become their mean, which costs 1e-4 of that."""
    if len(z) <= _KINDS:
        return z, counts
    centre = np.average(z, weights=counts)
    width = 0.02 * float(np.sqrt(np.average((z - centre) ** 2, weights=counts)))
    _, place = np.unique(np.floor((z - centre) / width), return_inverse=True)
    together = np.bincount(place, counts)
    return np.bincount(place, counts * z) / together, together
