"""What the exact test of right-or-wrong documents can see: its power, and the documents that a verdict would take.

The test (``statistics.exact_p``) accepts, for every number of documents that flipped the one way, some least number
that flipped the other way. Its power is summed over these; nothing is approximated by a normal distribution, whose
variance would have to be that under the hypothesis, and which is far off where few documents flip.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import ceil

import numpy as np
from scipy import optimize, stats

from lm_eval_adainfer import statistics

_EACH, _PLACES = 30, 5  # so many numbers of flips are looked at one by one; of more, a few, and between it is linear
_MOST = 3000  # documents beyond which the normal approximation will do
POWER = 0.8

Tests = Sequence[tuple[float, float]]  # drops, and the error at which "it is that or more" must be rejected


def power(n: int, lost: float, won: float, tests: Tests) -> float:
    """The probability that all ``tests`` reject.

    Args:
        n: Documents.
        lost: The share of documents that only the baseline gets right.
        won: The share that only the candidate gets right.
        tests: Each a drop and an error: "the drop is that or more" must have at most this p. To ask for "or less",
            exchange ``lost`` and ``won``, and turn the drop's sign.
    """
    few, chances = _likely(n, lost)
    share = min(1.0, won / (1 - lost)) if lost < 1 else 0.0
    return float(chances @ stats.binom.sf(_least(few, n, tuple(tests)) - 1, n - few, share))


def visible_drop(won: float, n: int, limit: float, error: float, at: float = POWER) -> float | None:
    """The least true drop that a test of "at most ``limit``" reveals with this probability; None where none is.

    Args:
        won: The share of documents that only the candidate gets right.
        n: Documents.
        limit: The largest drop that is allowed.
        error: Of the test.
        at: The probability.
    """
    most = 1 - 2 * won if won < 0.5 else 0.0

    def lacking(drop: float) -> float:
        return power(n, won, min(won + drop, 1 - won), [(-limit, error)]) - at

    if most <= limit or lacking(most) < 0:
        return None
    return float(optimize.brentq(lacking, limit, most, xtol=1e-5)) if lacking(limit) < 0 else limit


def documents_needed(lost: int, won: int, n: int, tests: Tests, at: float = POWER) -> int | None:
    """Documents at which all ``tests`` reject with this probability, if documents flip as they were seen to.

    Args:
        lost: Documents that only the baseline got right.
        won: Documents that only the candidate got right.
        n: Documents seen.
        tests: As in :func:`power`.
        at: The probability.

    Returns:
        The number, above ``n``; None where more than a hundred million documents would be needed.
    """
    share, drop = max((lost + won) / n, 1 / (n + 2)), (lost - won) / n  # none seen is about one
    guesses = [statistics.documents_needed(n, drop, share - drop**2, limit, error, at) for limit, error in tests]
    if any(guess is None for guess in guesses):
        return None
    guess = max(g for g in guesses if g is not None)
    if guess > _MOST:
        return guess
    sides = (share + drop) / 2, (share - drop) / 2

    def settled(m: int) -> bool:
        return power(m, *sides, tests) >= at

    low, high = n, guess  # low is too few, or was seen; high is enough
    while not settled(high):
        low, high = high, ceil(1.3 * high)
    while high - low > max(1, 0.02 * high):
        middle = max(low + 1, (low + high) // 2)
        low, high = (low, middle) if settled(middle) else (middle, high)
    return high


def _likely(n: int, share: float) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of flips to be expected, all but one in a hundred thousand, and their probabilities."""
    first, last = (int(x) for x in stats.binom.interval(1 - 1e-5, n, share))
    few = np.arange(first, last + 1)
    return few, stats.binom.pmf(few, n, share)


def _least(few: np.ndarray, n: int, tests: tuple[tuple[float, float], ...]) -> np.ndarray:
    """For numbers lost, the least numbers won with which all tests reject."""
    places = few if len(few) <= _EACH else np.unique(np.linspace(few[0], few[-1], _PLACES).astype(int))
    found = [max(_least_won(int(b), n, drop, error) for drop, error in tests) for b in places]
    return np.round(np.interp(few, places, found))


@lru_cache(maxsize=100_000)
def _least_won(lost: int, n: int, drop: float, error: float) -> int:
    """The least number won with which the test of ``drop`` rejects beside this number lost; n + 1 where none does."""

    def enough(won: int) -> bool:
        return won > n - lost or statistics.exact_p(lost, won, n, drop) <= error

    z = float(stats.norm.ppf(1 - error))
    low, high = -1, n - lost + 1  # low is too few, high is enough; Tango's test says about where that changes
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if float(statistics.tango_z(lost, middle, n, drop)) <= -z else (middle, high)
    low, step = high, 1
    if enough(high):
        while low >= 0 and enough(low):
            low, high, step = low - step, low, 2 * step
        low = max(low, -1)
    else:
        while not enough(high):
            low, high, step = high, min(high + step, n - lost + 1), 2 * step
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high if high <= n - lost else n + 1
