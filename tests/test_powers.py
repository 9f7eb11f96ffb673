"""What the exact test can see: its power against enumeration, and the promises that rest on it."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.synthetic_runs import flips
from scipy import stats

from lm_eval_adainfer import powers, statistics
from lm_eval_adainfer.comparison import gate
from lm_eval_adainfer.comparison.matching import Pairs


def enumerated(n, lost, won, tests):
    """The power, summed over every outcome that can be expected to occur."""
    total = 0.0
    for b in range(int(stats.binom.ppf(1 - 1e-7, n, lost)) + 1):
        for c in range(min(n - b, int(stats.binom.ppf(1 - 1e-7, n, won))) + 1):
            chance = stats.multinomial.pmf([b, c, n - b - c], n, [lost, won, 1 - lost - won])
            if chance > 1e-7 and all(statistics.exact_p(b, c, n, drop) <= error for drop, error in tests):
                total += chance
    return total


@pytest.mark.parametrize(
    ("n", "lost", "won", "tests"),
    [(152, 0.0025, 0.0025, [(0.02, 0.05)]), (60, 0.05, 0.05, [(0.1, 0.05), (0.3, 0.005)]), (40, 0.02, 0.3, [(-0.05, 0.01)])],
)
def test_the_power_is_that_of_all_outcomes(n, lost, won, tests):
    assert powers.power(n, lost, won, tests) == pytest.approx(enumerated(n, lost, won, tests), abs=0.005)


SEEN = [  # lost, won, documents, limit: what "would settle it" answers for
    (0, 0, 100, 0.01), (0, 0, 100, 0.02), (1, 1, 100, 0.02), (2, 2, 200, 0.02), (2, 1, 100, 0.05), (2, 2, 100, 0.03),
    (6, 0, 100, 0.02),
]  # fmt: skip


@pytest.mark.parametrize(("lost", "won", "n", "limit"), SEEN)
def test_what_would_settle_it_does_so_four_times_in_five(lost, won, n, limit):
    far = max(limit + gate.FAR, gate.FAR_TIMES * limit)
    tests, sides = [(limit, 0.05), (far, gate.FAR_ERROR)], (lost, won)
    if lost - won >= limit * n:
        tests, sides = [(-limit, 0.05)], (won, lost)
    needed = powers.documents_needed(*sides, n, tests)
    share, drop = max((lost + won) / n, 1 / (n + 2)), (sides[0] - sides[1]) / n
    p, q = (share + drop) / 2, (share - drop) / 2
    known = {}

    def settled(b, c):
        if (b, c) not in known:
            known[b, c] = all(statistics.exact_p(b, c, needed, d) <= e for d, e in tests)
        return known[b, c]

    draws = np.random.default_rng(0).multinomial(needed, [p, q, 1 - p - q], size=1500)
    assert 0.76 < np.mean([settled(b, c) for b, c, _ in draws.tolist()]) < 0.87


def test_the_normal_approximation_asked_for_too_few():
    """Where few documents flip it promised 80% and kept 65%, which is why it is no longer asked."""
    n = statistics.documents_needed(100, 0.0, 0.005, 0.02)
    assert powers.power(n, 0.0025, 0.0025, [(0.02, 0.05)]) < 0.72


def pairs(task, n, lost, won):
    first, second = flips(n, lost, won)
    return Pairs(task, "acc", False, np.array(first, float), np.array(second, float), [])


@pytest.mark.parametrize(("n", "won"), [(100, 0), (300, 6), (1000, 20)])
def test_a_guard_sees_what_it_says_in_four_of_five_runs(n, won):
    tasks = [pairs("t", n, won, won), *(pairs(f"other{i}", 200, 0, 0) for i in range(4))]
    guard = gate.judge(tasks, [p.task for p in tasks], 0.01).guards[0]
    level, p = 0.01 / 5, won / n
    draws = np.random.default_rng(1).multinomial(n, [guard.sees + p, p, 1 - guard.sees - 2 * p], size=800)
    found = np.mean([statistics.exact_p(c, b, n, -0.01) <= level for b, c, _ in draws.tolist()])
    assert 0.75 < found < 0.87


def test_what_a_guard_can_not_see_is_said():
    tasks = [pairs("tiny", 2, 0, 0), pairs("large", 500, 1, 1)]
    tiny, large = gate.judge(tasks, ["tiny", "large"], 0.01).guards
    assert tiny.sees is None and 0.02 < large.sees < 0.05


@pytest.mark.parametrize(("share", "without", "with_it"), [(0.04, 0.161, 0.161), (0.1, 0.108, 0.090)])
def test_the_guide_says_what_the_rule_about_far_drops_costs(share, without, with_it):
    both = [(0.01, gate.ERROR), (0.03, gate.FAR_ERROR)]
    assert powers.power(200, share / 2, share / 2, both[:1]) == pytest.approx(without, abs=0.003)
    assert powers.power(200, share / 2, share / 2, both) == pytest.approx(with_it, abs=0.003)
