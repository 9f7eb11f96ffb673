"""Paired statistics: the same documents were answered twice, so documents are compared with themselves.

A *drop* is baseline minus candidate. For right-or-wrong metrics only discordant documents carry information: ``b``
that only the baseline got right, and ``c`` that only the candidate got right, of ``n``.

Intervals are Tango's (Statistics in Medicine 17, 1998): his score test, inverted, which stays right at few or no
discordant documents, where Wald's interval has width zero. As a gate its one-sided error can still exceed the nominal
level a little, so the gate asks :func:`exact_p`: the exact unconditional test that orders outcomes by Tango's
statistic and takes the worst discordance that the data leave possible (Berger & Boos, JASA 89, 1994).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, sqrt

import numpy as np
from scipy import optimize, special, stats

GAMMA = 1e-6  # error spent on the range of discordances that exact_p looks at
_GRID = 64  # discordances looked at there, about a sixth of its standard error apart
_PERMUTATIONS, _FEWER, _MANY = 9999, 999, 20_000  # fewer where more documents than _MANY differ: it takes seconds
_EXACT_FLIPS = 14  # up to so many differences all sign patterns are enumerated


@dataclass(frozen=True)
class Interval:
    """A drop and its confidence interval."""

    drop: float
    lower: float
    upper: float


def tango_z(b: np.ndarray | float, c: np.ndarray | float, n: float, drop: float) -> np.ndarray:
    """Tango's score statistic for a true drop of ``drop``; large where the seen drop is larger."""
    b, c = np.asarray(b, dtype=float), np.asarray(c, dtype=float)
    first = 2 * n * drop - (b + c) - (b - c) * drop
    # the restricted maximum-likelihood estimate of P(only the candidate is right); the root without cancellation
    root = np.sqrt(np.maximum(first**2 + 8 * n * c * drop * (1 - drop), 0))
    estimate = (root - first) / (4 * n)
    variance = n * (2 * estimate + drop * (1 - drop))
    distance = b - c - n * drop
    with np.errstate(divide="ignore", invalid="ignore"):
        z = distance / np.sqrt(np.maximum(variance, 0))
    certain = np.where(distance > 0, np.inf, -np.inf)
    return np.where(variance > 1e-12 * n, z, np.where(np.abs(distance) < 1e-9 * n, 0.0, certain))


def tango_bound(b: float, c: float, n: float, level: float, upper: bool) -> float:
    """One-sided confidence bound of the drop: where the score test at 1 - ``level`` stops rejecting."""
    z = float(stats.norm.ppf(level))
    seen, edge = (b - c) / n, 1.0 if upper else -1.0
    if abs(seen - edge) < 1e-15:
        return edge

    def excess(drop: float) -> float:
        return float(tango_z(b, c, n, drop)) + (z if upper else -z)

    inside = edge * (1 - 1e-12)
    if (excess(inside) > 0) == upper:  # not even the extreme is rejected
        return edge
    return float(optimize.brentq(excess, seen, inside, xtol=1e-12))


def tango_interval(b: float, c: float, n: float, level: float = 0.95) -> Interval:
    """The drop with Tango's two-sided interval; numbers of documents may be effective ones, so no whole numbers."""
    one_sided = (1 + level) / 2
    return Interval((b - c) / n, tango_bound(b, c, n, one_sided, False), tango_bound(b, c, n, one_sided, True))


def mcnemar_p(b: int, c: int) -> float:
    """Exact two-sided McNemar test: discordant documents are fair coins where nothing changed."""
    return float(stats.binomtest(b, b + c).pvalue) if b + c else 1.0


def mcnemar_mid_p(b: int, c: int) -> float:
    """Two-sided McNemar mid-p: of outcomes as likely as the one seen, only half count.

    It comes nearer to the nominal error than :func:`mcnemar_p`, which stays far below it where few documents differ.
    It is not exact (Fagerland, Lydersen & Laake, BMC Medical Research Methodology 13:91, 2013); by enumeration
    it stays within 5% where up to half of 10 to 4,000 documents differ (``tests/test_comparison_statistics.py``), and
    reaches 6.5% where nearly all of 50 do.
    """
    n, least = b + c, min(b, c)
    return float(min(1.0, 2 * stats.binom.cdf(least, n, 0.5) - stats.binom.pmf(least, n, 0.5))) if n else 1.0


def exact_p(b: int, c: int, n: int, drop: float) -> float:
    """Exact p of "the true drop is ``drop`` or more", small where the seen one is clearly smaller.

    The p of "``drop`` or less" is ``exact_p(c, b, n, -drop)``.
    """
    if abs(drop) >= 1:
        return 1.0 if drop <= -1 else GAMMA if b - c < n else 1.0
    lowest, highest = _clopper_pearson(b + c, n, GAMMA)
    lowest = max(lowest, drop)
    if lowest >= highest:  # so large a drop needs more discordant documents than could go with those seen
        return 2 * GAMMA
    z = float(tango_z(b, c, n, drop)) + 1e-9
    widest = 7 * sqrt(n * 0.25) + 10
    first, last = max(0, int(n * lowest - widest)), min(n, int(n * highest + widest))
    discordant = np.arange(first, last + 1)
    least = fewest_wins(discordant, n, drop, z)
    choose = special.gammaln(n + 1) - special.gammaln(discordant + 1) - special.gammaln(n - discordant + 1)
    worst = 0.0
    shares = np.linspace(lowest, highest, _GRID)
    if lowest < -drop < highest:  # the worst may be the corner where the least favourable drop changes
        shares = np.append(shares, -drop)
    for share in shares:
        reach = 7 * sqrt(n * share * (1 - share)) + 10
        part = slice(max(0, int(n * share - reach) - first), max(0, int(n * share + reach) + 1 - first))
        m, k = discordant[part], least[part]
        weight = np.exp(choose[part] + special.xlogy(m, share) + special.xlog1py(n - m, -share))
        # P(only the candidate is right), given that one is; where all documents that flip can't make up a drop as
        # low as a negative ``drop``, the least favourable is that all of them flip that way
        win = min((share - drop) / (2 * share), 1.0) if share > 0 else 0.5
        inside = (k >= 1) & (k <= m)
        tail = np.where(k < 1, 1.0, 0.0)
        tail[inside] = special.betainc(k[inside], m[inside] - k[inside] + 1, win)
        worst = max(worst, float(weight @ tail))
    return min(1.0, worst + GAMMA)


def fewest_wins(discordant: np.ndarray, n: int, drop: float, z: float) -> np.ndarray:
    """Per number of discordant documents the least ``c`` whose statistic is at most z (one more than all if none).

    Args:
        discordant: [m] ints, each b + c.
        n: Documents.
        drop: As :func:`tango_z`'s.
        z: The largest statistic that counts.
    """
    low, high = np.full(len(discordant), -1), discordant + 1  # low is too few, high is enough
    while np.any(high - low > 1):
        middle = np.clip((low + high) // 2, 0, discordant)
        enough = tango_z(discordant - middle, middle, n, drop) <= z
        open_ = high - low > 1
        high = np.where(open_ & enough, middle, high)
        low = np.where(open_ & ~enough, middle, low)
    return high


def _clopper_pearson(k: int, n: int, error: float) -> tuple[float, float]:
    return (
        float(special.betaincinv(k, n - k + 1, error / 2)) if k else 0.0,
        float(special.betaincinv(k + 1, n - k, 1 - error / 2)) if k < n else 1.0,
    )


def exact_bound(b: int, c: int, n: int, level: float, upper: bool, at: float | None = None) -> float:
    """One-sided bound of the drop from :func:`exact_p`.

    Args:
        b: Documents that only the baseline got right.
        c: Documents that only the candidate got right.
        n: Documents.
        level: Of confidence, one-sided.
        upper: Which side.
        at: A drop on whose right side the bound must lie, so that a bound that is shown and a test made there agree.
    """
    if not upper:
        return -exact_bound(c, b, n, level, True, None if at is None else -at)

    def rejected(drop: float) -> bool:
        return exact_p(b, c, n, drop) <= 1 - level

    start = tango_bound(b, c, n, level, True) if at is None else at
    low, high, step = max(start, -1.0), min(start, 1.0), max(0.25 / n, 0.02 * abs(start - (b - c) / n))
    if rejected(start):
        while low > -1 and rejected(low):
            low, high, step = max(-1.0, low - step), low, 2 * step
    else:
        while high < 1 and not rejected(high):
            low, high, step = high, min(1.0, high + step), 2 * step
    while high - low > 0.02 / n:
        middle = (low + high) / 2
        low, high = (low, middle) if rejected(middle) else (middle, high)
    return high


def t_interval(differences: np.ndarray, level: float = 0.95, reach: float = 1.0) -> Interval:
    """The drop of a metric that is no right-or-wrong: Student's t with two pseudo-documents, +reach and -reach.

    Without them the interval of 20 equal answers would have width zero. Bonett & Price (2012) do the same for
    discordant pairs; at hundreds of documents it makes no difference.
    """
    centre, error, freedom = _adjusted(differences, reach)
    half = float(stats.t.ppf((1 + level) / 2, freedom)) * error
    return Interval(float(np.mean(differences)), centre - half, centre + half)


def mean_interval(values: np.ndarray, clusters: np.ndarray | None = None, level: float = 0.95) -> tuple[float, float]:
    """Student's t interval of a mean over documents; approximate.

    Args:
        values: [documents].
        clusters: [documents], equal where documents belong together, whose deviations are then summed; None where each
            stands for itself.
        level: Of confidence, two-sided.

    Returns:
        Both ends; infinite where there is but one document, or one cluster.
    """
    centre, sums = float(np.mean(values)), _summed(values - np.mean(values), clusters)
    units = len(sums)
    if units < 2:
        return -np.inf, np.inf
    error = sqrt(units / (units - 1) * float(sums @ sums)) / len(values)
    half = float(stats.t.ppf((1 + level) / 2, units - 1)) * error
    return centre - half, centre + half


def variance_error(values: np.ndarray, clusters: np.ndarray | None = None) -> float | None:
    """Standard error of the population variance, sqrt((m4 - s^4) / n) by the delta method; approximate.

    Args:
        values: [documents].
        clusters: As in :func:`mean_interval`.

    Returns:
        The standard error; None where there is but one document, or one cluster.
    """
    squares = (values - np.mean(values)) ** 2
    sums = _summed(squares - np.mean(squares), clusters)
    return float(np.sqrt(sums @ sums)) / len(values) if len(sums) > 1 else None


def _summed(deviations: np.ndarray, clusters: np.ndarray | None) -> np.ndarray:
    if clusters is None:
        return deviations
    _, unit = np.unique(clusters, return_inverse=True)
    return np.bincount(unit, deviations)


def t_p(differences: np.ndarray, drop: float, reach: float = 1.0) -> float:
    """One-sided p of "the true mean difference is ``drop`` or more", by the same adjusted t."""
    centre, error, freedom = _adjusted(differences, reach)
    return float(stats.t.cdf((centre - drop) / error, freedom))


def _adjusted(differences: np.ndarray, reach: float) -> tuple[float, float, int]:
    x = np.concatenate([differences, [reach, -reach]])
    return float(np.mean(x)), float(np.std(x, ddof=1)) / sqrt(len(x)), len(x) - 1


def ratio_draws(differences: np.ndarray, weights: np.ndarray, reach: float = 1.0, seed: int = 0) -> np.ndarray:
    """Weighted means of a difference over resampled documents, sorted: the bootstrap of a ratio of sums.

    Perplexity per word, say, is a sum of log-probabilities over a sum of words, of which each document brings its
    part. As in :func:`t_interval`, two pseudo-documents, +reach and -reach, of average weight, keep the interval of few
    or equal documents from having no width.

    Args:
        differences: [documents], per unit of weight.
        weights: [documents].
        reach: The largest difference a document can show.
        seed: Of the draws; there are as many as :func:`sign_flip_p` has permutations.
    """
    x = np.concatenate([differences, [reach, -reach]])
    w = np.concatenate([weights, [weights.mean()] * 2])
    generator, n, draws = np.random.default_rng(seed), len(x), _draws(len(x))
    found = []
    block = max(1, 2_000_000 // n)
    for start in range(0, draws, block):
        chosen = generator.integers(0, n, size=(min(block, draws - start), n))
        found.append((x * w)[chosen].sum(1) / w[chosen].sum(1))
    return np.sort(np.concatenate(found))


def draws_bound(draws: np.ndarray, level: float, upper: bool) -> float:
    """One-sided bound from sorted draws: where :func:`draws_p` stops being at most 1 - ``level``."""
    if not upper:
        return -draws_bound(-draws[::-1], level, True)
    beyond = int((1 - level) * (len(draws) + 1) + 1e-9)  # p counts the value seen as one more draw
    return float(draws[len(draws) - max(beyond, 1)])


def draws_p(draws: np.ndarray, drop: float) -> float:
    """One-sided p of "the true mean is ``drop`` or more", small where few draws are that high."""
    return float((1 + np.count_nonzero(draws >= drop)) / (len(draws) + 1))


def ratio_interval(
    differences: np.ndarray, weights: np.ndarray, level: float = 0.95, reach: float = 1.0, seed: int = 0
) -> Interval:
    """The drop of a ratio of sums, with its interval from :func:`ratio_draws`."""
    draws, side = ratio_draws(differences, weights, reach, seed), (1 + level) / 2
    drop = float(np.average(differences, weights=weights))
    return Interval(drop, draws_bound(draws, side, False), draws_bound(draws, side, True))


def _draws(n: int) -> int:
    return _PERMUTATIONS if n <= _MANY else _FEWER


def wilson(hits: np.ndarray, level: float = 0.95) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Share of hits per column of ``[documents, columns]``, and Wilson's interval, which has a width at 0% and 100%."""
    share = hits.mean(axis=0)
    return share, *wilson_interval(share, len(hits), level)


def wilson_interval(share: np.ndarray, n: float, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's interval of shares of ``n`` documents, effective ones perhaps; NaN where ``n`` is 0."""
    if n == 0:
        return np.full_like(share, np.nan), np.full_like(share, np.nan)
    z = float(stats.norm.ppf((1 + level) / 2))
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    lower, upper = np.minimum(share, centre - half), np.maximum(share, centre + half)
    return np.maximum(lower, 0.0), np.minimum(upper, 1.0)  # rounding alone could leave these


def sign_flip_p(differences: np.ndarray, seed: int = 0) -> float:
    """Two-sided permutation p: where nothing changed, each document's difference is as likely to have either sign.

    Exact up to 14 non-zero differences, else from 9,999 seeded permutations, so never below 0.0001 (beyond 20,000
    non-zero differences from 999).
    """
    x = np.asarray(differences, dtype=float)
    x = x[x != 0]
    if not len(x):
        return 1.0
    seen = abs(x.sum()) - 1e-9 * np.abs(x).sum()  # sums of equal size differ in rounding
    if len(x) <= _EXACT_FLIPS:
        signs = 1 - 2 * ((np.arange(2 ** len(x))[:, None] >> np.arange(len(x))) & 1)
        return float(np.mean(np.abs(signs @ x) >= seen))
    generator, hits = np.random.default_rng(seed), 0
    permutations = _draws(len(x))
    block = max(1, 2_000_000 // len(x))
    for start in range(0, permutations, block):
        rows = min(block, permutations - start)
        negative = generator.integers(0, 2, size=(rows, len(x)), dtype=np.int8)
        hits += int(np.sum(np.abs(x.sum() - 2 * (negative @ x)) >= seen))
    return (hits + 1) / (permutations + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the given order."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for place, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def deviations(error: float, power: float = 0.8) -> float:
    """How many standard errors a value must lie off for a one-sided test to see it with this probability."""
    return float(stats.norm.ppf(1 - error) + stats.norm.ppf(power))


def documents_needed(
    n: int, drop: float, variance: float, limit: float, error: float = 0.05, power: float = 0.8, unseen: float = 0.0
) -> int | None:
    """Documents at which a drop as seen would be told from ``limit`` with this probability.

    By the normal approximation, which asks for too few where few right-or-wrong documents flip: ``powers.py``
    enumerates.

    Args:
        n: Documents seen.
        drop: Seen.
        variance: Of a document's difference; for right-or-wrong metrics discordant share minus drop squared.
        limit: The largest drop that is allowed.
        error: Of the one-sided test.
        power: The probability.
        unseen: Documents that the test adds and takes for lost (Gaffke's does, ``bounded.py``).

    Returns:
        The number, above ``n``; None where the seen drop is so near the limit that more than a hundred million
        documents would be needed.
    """
    z = deviations(error, power)
    variance = max(variance, 1 / (n + 2))  # about what one discordant document would give
    distance = abs(drop - limit)
    if variance * z**2 > 1e8 * distance**2:
        return None
    if unseen:  # distance - unseen / n is z standard errors, sqrt(variance / n)
        root = sqrt(variance * z**2 + 4 * unseen * distance) - sqrt(variance) * z
        return max(n + 1, ceil((2 * unseen / root) ** 2))
    return max(n + 1, ceil(variance * z**2 / distance**2))
