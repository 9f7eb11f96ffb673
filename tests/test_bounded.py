"""Gaffke's bound against its definition, binomial bounds and a proven test; how often it lets a real drop pass.

The simulations draw drops of exactly the limit, where the error is largest, so what passes is an error. ``-m slow`` has
the larger grids behind docs/numbers.md.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers.betting import betting_rejects
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lm_eval_adainfer import bounded, statistics


def slow_p(totals, sizes, drop, reach=1.0, draws=200_000, seed=0):
    """Gaffke's p from its definition: random weights, and one more unit that lost all."""
    weights = np.random.default_rng(seed).exponential(size=(draws, len(totals) + 1))
    found = weights @ np.append(totals, reach * np.max(sizes)) / (weights @ np.append(sizes, np.max(sizes)))
    return np.mean(found >= drop)


@pytest.mark.parametrize(("units", "seed"), [(1, 0), (3, 1), (12, 2), (60, 3)])
def test_the_p_is_that_of_randomly_weighted_units(units, seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 6, units).astype(float)
    totals = np.clip(rng.normal(0, 0.5, units), -1, 1) * sizes
    for drop in (-0.3, -0.05, 0.0, 0.1, 0.3, 0.7):
        assert bounded.gaffke_p(totals, sizes, drop) == pytest.approx(slow_p(totals, sizes, drop), abs=0.006)


@given(st.integers(1, 200), st.data(), st.floats(-0.95, 0.95))
@settings(max_examples=150, deadline=None)
def test_of_two_values_it_is_the_binomial_tail(n, data, drop):
    lost = data.draw(st.integers(0, n))
    x = np.array([1.0] * lost + [-1.0] * (n - lost))
    expected = stats.binom.cdf(lost, n, (1 + drop) / 2)
    assert bounded.gaffke_p(x, np.ones(n), drop) == pytest.approx(expected, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("n", [1, 2, 5, 30, 300, 3000, 14_000])
def test_where_nothing_differs_the_bound_is_clopper_and_pearsons(n):
    found = bounded.gaffke_bound(np.zeros(n), np.ones(n), 0.95, True)
    assert found == pytest.approx(1 - 0.05 ** (1 / n), abs=3e-7)
    in_clusters = bounded.gaffke_bound(np.zeros(n), np.full(n, 7.0), 0.95, True)
    assert in_clusters == pytest.approx(found, abs=3e-7)  # a cluster can lose all its documents at once


@given(st.lists(st.tuples(st.floats(-1, 1), st.integers(1, 9)), min_size=1, max_size=40), st.floats(-0.9, 0.9))
@settings(max_examples=50, deadline=None)
def test_bounds_agree_with_the_test_and_mirror(units, limit):
    sizes = np.array([m for _, m in units], float)
    totals = np.array([d for d, _ in units]) * sizes
    upper = bounded.gaffke_bound(totals, sizes, 0.95, True, at=limit)
    p = bounded.gaffke_p(totals, sizes, limit)
    assert (upper <= limit) == (p <= 0.05) or abs(p - 0.05) < 1e-6
    assert 0 <= p <= 1 and upper >= totals.sum() / sizes.sum() - 1e-6
    assert bounded.gaffke_bound(-totals, sizes, 0.95, False) == pytest.approx(-bounded.gaffke_bound(totals, sizes, 0.95, True))


def test_a_metric_up_to_100_is_the_same_one_times_100():
    x = np.random.default_rng(0).uniform(-1, 0.9, 80)
    one, hundred = (bounded.gaffke_interval(x * most, np.ones(80), reach=most) for most in (1.0, 100.0))
    assert (one.lower * 100, one.upper * 100, one.drop * 100) == pytest.approx((hundred.lower, hundred.upper, hundred.drop), abs=1e-4)


def test_merging_units_that_nearly_agree_changes_nothing_to_speak_of(monkeypatch):
    x = np.clip(np.random.default_rng(1).normal(0.002, 0.1, 3000), -1, 1)
    merged = [bounded.gaffke_p(x, np.ones(3000), drop) for drop in (0.003, 0.005, 0.01)]
    monkeypatch.setattr(bounded, "_KINDS", 10_000)
    assert merged == pytest.approx([bounded.gaffke_p(x, np.ones(3000), drop) for drop in (0.003, 0.005, 0.01)], rel=0.005)


def test_units_are_sums_over_clusters():
    drops, weights = np.array([1.0, 0.5, -1.0, 0.25]), np.array([1.0, 2.0, 3.0, 4.0])
    totals, sizes = bounded.by_cluster(drops, weights, np.array(["a", "b", "a", "c"]))
    assert totals.tolist() == [-2.0, 1.0, 1.0] and sizes.tolist() == [4.0, 2.0, 4.0]
    assert bounded.by_cluster(drops)[0].tolist() == drops.tolist()


# ------------------------------------------------------------------------------------------------ errors


def ternary(rng, shape, share, drop):
    """Documents lost (1), won (-1) and alike (0); ``share`` of them differ, ``drop`` is their mean."""
    u = rng.random(shape)
    return np.where(u < (share + drop) / 2, 1.0, np.where(u < share, -1.0, 0.0))


def clustered(rng, clusters, each, share, drop, correlation=0.3):
    """[clusters, each] such documents, of which two in one cluster have this correlation."""
    copied = rng.random((clusters, each)) < np.sqrt(correlation)
    return np.where(copied, ternary(rng, (clusters, 1), share, drop), ternary(rng, (clusters, each), share, drop))


def passes(totals, sizes, limit, error=0.05):
    return bounded.gaffke_p(np.asarray(totals), np.asarray(sizes, dtype=float), limit) <= error


def rate(draw, times, seed):
    """How often ``draw`` is true, and three standard errors of a rate of 5%."""
    rng = np.random.default_rng(seed)
    return np.mean([draw(rng) for _ in range(times)]), 3 * np.sqrt(0.05 * 0.95 / times)


def worst_error(n, drop, error):
    """By enumeration: how often a drop of exactly the limit passes, at the least favourable discordance."""
    counts = np.array([(b, c, n - b - c) for b in range(n + 1) for c in range(n + 1 - b)])
    accepted = [passes(np.repeat([1.0, -1.0, 0.0], k), np.ones(n), drop, error) for k in counts]
    worst = 0.0
    for share in np.linspace(max(abs(drop), 1e-3), 1, 40):
        chances = [(share + drop) / 2, (share - drop) / 2, 1 - share]
        worst = max(worst, float(stats.multinomial.pmf(counts[accepted], n, np.maximum(chances, 0)).sum()))
    return worst


@pytest.mark.parametrize("n", [4, 20, pytest.param(40, marks=pytest.mark.slow), pytest.param(80, marks=pytest.mark.slow)])
@pytest.mark.parametrize("drop", [-0.3, -0.05, 0.0, 0.05, 0.2, 0.5, 0.8])
@pytest.mark.parametrize("error", [0.05, 0.001])
def test_right_or_wrong_documents_break_it_less_often_than_stated(n, drop, error):
    assert worst_error(n, drop, error) <= error * (1 + 1e-9)


CLUSTERS = [  # documents, each cluster's, limit, share that differs, times
    (50, 5, 0.05, 0.05, 400), (50, 10, 0.1, 0.3, 400), (200, 5, 0.05, 0.2, 400), (1000, 5, 0.01, 0.04, 400),
    (1000, 10, 0.03, 0.1, 400), (4000, 10, 0.01, 0.04, 300), (14_000, 5, 0.01, 0.012, 200), (14_000, 10, 0.01, 0.1, 200),
]  # fmt: skip


@pytest.mark.parametrize(("n", "each", "limit", "share", "times"), CLUSTERS)
def test_clusters_of_correlated_documents_pass_wrongly_at_most_5_percent_of_the_time(n, each, limit, share, times):
    def draw(rng):
        x = clustered(rng, n // each, each, share, limit)
        return passes(x.sum(1), np.full(n // each, each), limit)

    found, spread = rate(draw, times, seed=n + each)
    assert found <= 0.05 + spread


@pytest.mark.slow
@pytest.mark.parametrize("each", [5, 10])
@pytest.mark.parametrize("n", [50, 100, 200, 500, 1000, 4000, 14_000])
def test_clusters_at_length(n, each):
    for limit in (0.01, 0.03, 0.1):
        for share in (limit, 1.5 * limit, 4 * limit):
            def draw(rng, limit=limit, share=share):
                x = clustered(rng, n // each, each, share, limit)
                return passes(x.sum(1), np.full(n // each, each), limit)

            found, spread = rate(draw, 1000, seed=n + each)
            assert found <= 0.05 + spread, (limit, share)


@pytest.mark.parametrize("how", ["even", "in large clusters", "in small clusters"])
def test_clusters_of_unequal_sizes_pass_wrongly_at_most_5_percent_of_the_time(how):
    sizes = np.repeat([1, 2, 5, 20], [200, 100, 40, 10])
    losing = {"even": sizes > 0, "in large clusters": sizes == 20, "in small clusters": sizes == 1}[how]
    drop = 0.02 * sizes.sum() / sizes[losing].sum()

    def draw(rng):
        lost = losing & (rng.random(len(sizes)) < drop)  # a cluster loses all its documents, or none
        return passes(sizes * lost, sizes, 0.02)

    found, spread = rate(draw, 1000, seed=5)
    assert found <= 0.05 + spread


def test_the_unclustered_test_is_broken_by_clusters():
    """What issue and guide say: the exact test of documents lets a real drop pass in 12 to 15% of runs."""

    def draw(rng):
        x = clustered(rng, 800, 5, 0.04, 0.01)
        return float(statistics.tango_z(np.sum(x > 0), np.sum(x < 0), x.size, 0.01)) <= -1.645

    assert 0.1 < rate(draw, 1000, seed=0)[0] < 0.18


SPARSE = {  # drops of documents whose mean is the limit
    "rare whole losses": lambda rng, n, limit: (rng.random(n) < limit) * 1.0,
    "rare half losses": lambda rng, n, limit: (rng.random(n) < 2 * limit) * 0.5,
    "sparse, skewed": lambda rng, n, limit: np.where(rng.random(n) < 2 * limit, rng.random(n), 0.0),
    "many small gains": lambda rng, n, limit: np.where(rng.random(n) < 0.04, 1.0, -(0.04 - limit) / 0.96),
    "dense": lambda rng, n, limit: rng.beta(2, 2, n) - 0.5 + limit,
}


@pytest.mark.parametrize("how", SPARSE)
@pytest.mark.parametrize(("n", "limit", "times"), [(50, 0.05, 600), (200, 0.03, 600), (1000, 0.01, 400), (14_000, 0.01, 100)])
def test_bounded_metrics_pass_wrongly_at_most_5_percent_of_the_time(how, n, limit, times):
    found, spread = rate(lambda rng: passes(SPARSE[how](rng, n, limit), np.ones(n), limit), times, seed=n)
    assert found <= 0.05 + spread


def test_students_t_passes_many_gains_with_rare_losses_too_often():
    """Why it is no longer asked: the same documents, the same limit."""
    draw = lambda rng: statistics.t_p(SPARSE["many small gains"](rng, 200, 0.01), 0.01) <= 0.05  # noqa: E731
    assert rate(draw, 1000, seed=0)[0] > 0.06


GROUPS = {"two": [100, 1900], "eight": [60, 120, 250, 500, 900, 1200, 1500, 2500], "large": [500, 1500, 4000, 8000]}
LOSSES = ["even", "rare", "all in the smallest", "all in the largest", "lost and won back"]


def group_drops(rng, sizes, limit, how):
    k = len(sizes)
    drops, shares = [limit] * k, [max(2 * limit, 0.04)] * k
    if how == "rare":
        shares = [limit] * k
    elif how.startswith("all"):
        at = 0 if "smallest" in how else k - 1
        drops = [k * limit * (i == at) for i in range(k)]
        shares = [max(d, 0.02) for d in drops]
    elif how == "lost and won back":
        drops = [3 * k * limit, *[0.0] * (k - 2), -2 * k * limit]
        shares = [max(abs(d), 0.02) for d in drops]
    return [ternary(rng, n, s, d) for n, s, d in zip(sizes, shares, drops, strict=True)]


@pytest.mark.parametrize("how", LOSSES)
@pytest.mark.parametrize("name", GROUPS)
def test_groups_whose_tasks_weigh_the_same_pass_wrongly_at_most_5_percent_of_the_time(name, how):
    sizes = np.array(GROUPS[name])
    weights = np.repeat(sizes.mean() / sizes, sizes)

    def draw(rng):
        parts = group_drops(rng, sizes, 0.01, how)
        return passes(*bounded.by_cluster(np.concatenate(parts), weights), 0.01)

    found, spread = rate(draw, 100 if name == "large" else 200, seed=len(how))
    assert found <= 0.05 + spread


WRONG_FAILURES = {  # totals and sizes whose mean drop is the limit, of one point
    "clusters": lambda rng: (clustered(rng, 200, 5, 0.04, 0.01).sum(1), np.full(200, 5.0)),
    "few large clusters": lambda rng: (clustered(rng, 30, 10, 0.2, 0.01).sum(1), np.full(30, 10.0)),
    "rare losses": lambda rng: (SPARSE["rare whole losses"](rng, 200, 0.01), np.ones(200)),
    "many small losses, rare gains": lambda rng: (np.where(rng.random(200) < 0.04, -1.0, 0.05 / 0.96), np.ones(200)),
    "group": lambda rng: bounded.by_cluster(
        np.concatenate(group_drops(rng, [100, 1900], 0.01, "all in the smallest")), np.repeat([10.0, 10 / 19], [100, 1900])
    ),
}


@pytest.mark.parametrize("how", WRONG_FAILURES)
def test_a_drop_of_the_limit_fails_wrongly_at_most_5_percent_of_the_time(how):
    def draw(rng):
        totals, sizes = WRONG_FAILURES[how](rng)
        return passes(-totals, sizes, -0.01)

    found, spread = rate(draw, 600, seed=1)
    assert found <= 0.05 + spread


# ------------------------------------------------------------------------------------------------ power


def power(rule, draw, times=400, seed=0):
    rng = np.random.default_rng(seed)
    return np.mean([rule(draw(rng)) for _ in range(times)])


def test_it_settles_more_than_a_proven_betting_test():
    def draw(rng):
        return np.where(rng.random(300) < 0.05, rng.choice([-0.5, 0.5], 300), 0.0)

    ours = power(lambda x: passes(x, np.ones(300), 0.02), draw)
    assert ours > power(lambda x: betting_rejects(x, 0.02), draw) + 0.03


def test_it_comes_near_the_exact_test_of_right_or_wrong_documents():
    """Which is what is asked where it can be; the difference is what clusters and half-points cost beyond themselves."""

    def draw(rng):
        return ternary(rng, 2000, 0.04, 0.0)

    exact = power(lambda x: statistics.exact_p(int(np.sum(x > 0)), int(np.sum(x < 0)), 2000, 0.01) <= 0.05, draw, 200)
    assert exact - 0.06 <= power(lambda x: passes(x, np.ones(2000), 0.01), draw, 200) <= exact + 0.02


def test_clusters_settle_most_of_what_an_approximate_test_settles():
    """The cluster-robust normal test passes a real drop there in 6%, and in up to 29% where fewer documents flip."""

    def normal(x):
        means = x.mean(1)
        return means.mean() + 1.645 * means.std(ddof=1) / np.sqrt(len(means)) <= 0.01

    def draw(rng):
        return clustered(rng, 800, 5, 0.03, 0.0)

    ours = power(lambda x: passes(x.sum(1), np.full(800, 5.0), 0.01), draw)
    assert power(normal, draw) - 0.16 <= ours


# ------------------------------------------------------------------------------------------------ the guide's tables


def normal_passes(means, limit):
    return means.mean() + 1.645 * means.std(ddof=1) / np.sqrt(len(means)) <= limit


DREW = {  # drops of documents that score from 0 to 1, by their mean
    "1%, all of it": lambda rng, n, drop: (rng.random(n) < 0.01) * 1.0 - (rng.random(n) < 0.01 - drop),
    "2%, half of it": lambda rng, n, drop: (rng.random(n) < 0.02) * 0.5 - (rng.random(n) < 0.02 - 2 * drop) * 0.5,
    "4% lost, the rest gain": lambda rng, n, drop: np.where(rng.random(n) < 0.04, 1.0, -(0.04 - drop) / 0.96),
    "50%, a little": lambda rng, n, drop: np.clip(np.where(rng.random(n) < 0.5, rng.normal(2 * drop, 0.1, n), 0), -1, 1),
}


def said(*cells):
    """Whether the guide has this row of a table; its last cell holds how often each test passed."""
    *first, found = cells
    row = " | ".join([*first, *(f"{rate:.1%}" for rate in np.mean(found, 0))])
    return f"| {row} |" in (Path(__file__).resolve().parents[1] / "docs" / "numbers.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("drop", [0.01, 0.0])
@pytest.mark.parametrize(
    ("n", "each", "share"), [(1000, 5, 0.04), (4000, 5, 0.012), (4000, 5, 0.04), (4000, 10, 0.04), (14_000, 10, 0.04)]
)
def test_the_guide_says_how_often_clusters_pass(drop, n, each, share):
    rng, found = np.random.default_rng(n + each), []
    for _ in range(4000 if n <= 1000 else 1000):
        x = clustered(rng, n // each, each, share, drop)
        flips = int(np.sum(x > 0)), int(np.sum(x < 0))
        found.append((
            float(statistics.tango_z(*flips, n, 0.01)) <= -1.645, normal_passes(x.mean(1), 0.01),
            betting_rejects(rng.permutation(x.mean(1)), 0.01), passes(x.sum(1), np.full(n // each, each), 0.01),
        ))  # fmt: skip
    assert said(f"{100 * drop:.0f}", f"{n:,}", f"{each}", f"{share:.1%}", found)


@pytest.mark.slow
@pytest.mark.parametrize("drop", [0.01, 0.0])
@pytest.mark.parametrize("n", [300, 1000, 4000])
@pytest.mark.parametrize("name", DREW)
def test_the_guide_says_how_often_bounded_metrics_pass(drop, n, name):
    rng, found = np.random.default_rng(n), []
    for _ in range(4000 if n <= 1000 else 1000):
        x = DREW[name](rng, n, drop)
        found.append((statistics.t_p(x, 0.01) <= 0.05, betting_rejects(x, 0.01), passes(x, np.ones(n), 0.01)))
    assert said(f"{100 * drop:.0f}", f"{n:,}", name, found)
