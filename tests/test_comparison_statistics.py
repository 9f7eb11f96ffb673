"""The statistics against published examples, scipy, statsmodels, and enumeration of every possible outcome."""

from __future__ import annotations

import inspect
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from lm_eval_adainfer import statistics as S


def likelihood_score(b, c, n, drop):
    """Tango's statistic from its definition: the restricted maximum of the likelihood found numerically."""

    def minus_log(q):
        cells = [(b, q + drop), (c, q), (n - b - c, 1 - 2 * q - drop)]
        return -sum(k * np.log(max(p, 1e-300)) for k, p in cells if k)

    low, high = max(0.0, -drop), (1 - drop) / 2
    q = optimize.minimize_scalar(minus_log, bounds=(low, high), method="bounded", options={"xatol": 1e-12}).x
    return (b - c - n * drop) / np.sqrt(n * (2 * q + drop * (1 - drop)))


@given(st.integers(5, 300), st.data(), st.floats(-0.9, 0.9))
@settings(max_examples=150, deadline=None)
def test_tangos_statistic_is_the_score_at_the_restricted_maximum(n, data, drop):
    b = data.draw(st.integers(0, n))
    c = data.draw(st.integers(0, n - b))
    if abs(drop) < 1e-3:
        drop = 0.01
    assert float(S.tango_z(b, c, n, drop)) == pytest.approx(likelihood_score(b, c, n, drop), rel=1e-3, abs=1e-3)


def test_published_intervals():
    """Airway hyper-responsiveness (Fagerland, Lydersen & Laake 2014, table VI): 1 and 7 discordant of 21."""
    found = S.tango_interval(1, 7, 21)
    assert (round(found.lower, 3), round(found.upper, 3)) == (-0.517, -0.026)
    assert found.drop == pytest.approx(-6 / 21)


@pytest.mark.parametrize(("b", "c", "n"), [(0, 0, 20), (1, 0, 20), (20, 0, 20), (0, 20, 20), (3, 5, 400), (90, 70, 1000)])
def test_an_interval_holds_exactly_the_drops_that_the_score_test_keeps(b, c, n):
    found = S.tango_interval(b, c, n)
    assert -1 <= found.lower <= found.drop <= found.upper <= 1
    assert found.upper - found.lower > 0.001  # never of width zero, as Wald's is at no discordance
    for bound, outside in ((found.lower, -1), (found.upper, 1)):
        if abs(bound) < 1:
            assert abs(float(S.tango_z(b, c, n, bound + outside * 1e-6))) > stats.norm.ppf(0.975)
            assert abs(float(S.tango_z(b, c, n, bound - outside * 1e-6))) < stats.norm.ppf(0.975)


def test_an_interval_mirrors_when_the_runs_change_places():
    first, second = S.tango_interval(9, 2, 150), S.tango_interval(2, 9, 150)
    assert (first.lower, first.upper) == pytest.approx((-second.upper, -second.lower), abs=1e-9)


def test_tangos_interval_covers_95_percent_also_where_few_documents_flip():
    n = 60
    outcomes = [(b, c) for b in range(n + 1) for c in range(n + 1 - b)]
    keeps = {}
    for share, drop in ((0.03, 0.01), (0.05, 0.0), (0.1, 0.05), (0.3, -0.1)):
        p, q = (share + drop) / 2, (share - drop) / 2
        covered = 0.0
        for b, c in outcomes:
            chance = stats.multinomial.pmf([b, c, n - b - c], n, [p, q, 1 - p - q])
            if chance > 1e-7:
                covered += chance * (abs(float(S.tango_z(b, c, n, drop))) <= 1.959964)
        keeps[share, drop] = covered
    assert all(covered > 0.93 for covered in keeps.values()), keeps


@given(st.integers(0, 60), st.integers(0, 60))
@settings(max_examples=60, deadline=None)
def test_mcnemar_is_statsmodels_exact_test(b, c):
    from statsmodels.stats.contingency_tables import mcnemar

    expected = mcnemar([[10, b], [c, 10]], exact=True).pvalue if b + c else 1.0
    assert S.mcnemar_p(b, c) == pytest.approx(min(1.0, expected), abs=1e-12)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
@settings(max_examples=10, deadline=None)  # statsmodels collects garbage in every call
def test_holm_is_statsmodels(p_values):
    from statsmodels.stats.multitest import multipletests

    assert S.holm(p_values) == pytest.approx(list(multipletests(p_values, method="holm")[1]), abs=1e-12)


def test_wilsons_interval_is_statsmodels():
    from statsmodels.stats.proportion import proportion_confint

    for hits, n in ((0, 10), (10, 10), (33, 40), (1, 1000)):
        share, lower, upper = S.wilson(np.array([[1]] * hits + [[0]] * (n - hits)))
        expected = proportion_confint(hits, n, method="wilson")
        assert (float(lower[0]), float(upper[0])) == pytest.approx(expected, abs=1e-12)
        assert float(share[0]) == hits / n


def brute_force_p(b, c, n, drop, grid=400):
    """The exact p from its definition: the worst, over discordances, probability of an outcome as extreme."""
    z = float(S.tango_z(b, c, n, drop)) + 1e-9
    outcomes = [(i, j) for i in range(n + 1) for j in range(n + 1 - i) if float(S.tango_z(i, j, n, drop)) <= z]
    counts = np.array([[i, j, n - i - j] for i, j in outcomes])
    low, high = S._clopper_pearson(b + c, n, S.GAMMA)
    worst = 0.0
    for share in np.append(np.linspace(max(low, drop), high, grid), np.clip(-drop, max(low, drop), high)):
        least = max(drop, -share)  # the drop of the hypothesis nearest to the limit that this discordance allows
        p, q = (share + least) / 2, (share - least) / 2
        worst = max(worst, float(stats.multinomial.pmf(counts, n, [p, q, max(0.0, 1 - p - q)]).sum()))
    return worst + S.GAMMA


@pytest.mark.parametrize("drop", [-0.05, 0.0, 0.02, 0.2])
@pytest.mark.parametrize(("b", "c"), [(0, 0), (0, 3), (2, 1), (9, 2), (1, 14)])
def test_the_exact_p_is_the_worst_probability_over_discordances(b, c, drop):
    assert S.exact_p(b, c, 25, drop) == pytest.approx(brute_force_p(b, c, 25, drop), rel=0.01, abs=1e-4)


@given(st.integers(1, 20000), st.data(), st.floats(-0.2, 0.2))
@settings(max_examples=100, deadline=None)
def test_the_two_sides_of_a_limit_are_never_both_rejected(n, data, limit):
    b = data.draw(st.integers(0, n // 4))
    c = data.draw(st.integers(0, n // 4))
    above, below = S.exact_p(b, c, n, limit), S.exact_p(c, b, n, -limit)
    assert max(above, below) > 0.3
    assert (above if b - c <= n * limit else below) == min(above, below) or min(above, below) > 0.3


def test_fewer_flips_than_the_limit_are_no_evidence_of_a_drop():
    """18 of 9,000 flipped, to the better: a drop of a point is out of the question, so "at most a point" stands."""
    assert S.exact_p(18, 0, 9000, -0.01) > 0.9
    assert S.exact_p(0, 18, 9000, 0.01) < 1e-5


@pytest.mark.parametrize("lost", [14, 15, 16, 17])
def test_where_only_losses_can_explain_the_limit_the_p_is_the_binomial_tail(lost):
    """A drop of exactly a point at a discordance of exactly a point: all that flips is lost."""
    assert S.exact_p(0, lost, 1000, -0.01) >= stats.binom.sf(lost - 1, 1000, 0.01)
    assert S.exact_p(0, lost, 1000, -0.01) == pytest.approx(stats.binom.sf(lost - 1, 1000, 0.01), rel=0.01)


def test_at_no_discordance_the_exact_bound_is_clopper_and_pearsons():
    """All that can have happened unseen is loss, so the bound is the rule of three's exact form."""
    for n in (30, 300, 3000):
        assert S.exact_bound(0, 0, n, 0.95, True) == pytest.approx(1 - 0.05 ** (1 / n), abs=0.05 / n)


@given(st.integers(20, 400), st.data(), st.floats(0, 0.2))
@settings(max_examples=60, deadline=None)
def test_bounds_lie_on_the_side_where_the_test_put_the_limit(n, data, limit):
    b = data.draw(st.integers(0, n // 3))
    c = data.draw(st.integers(0, n // 3))
    assert (S.exact_bound(b, c, n, 0.95, True, limit) <= limit) == (S.exact_p(b, c, n, limit) <= 0.05)
    assert (S.exact_bound(b, c, n, 0.95, False, limit) >= limit) == (S.exact_p(c, b, n, -limit) <= 0.05)


def test_sign_flips_are_enumerated_where_few_and_drawn_where_many():
    x = np.array([0.5, -0.25, 0.75, 1.0, 0.0, 0.5])
    nonzero = x[x != 0]
    sums = [abs(np.dot(signs, nonzero)) for signs in itertools.product([1, -1], repeat=5)]
    assert S.sign_flip_p(x) == pytest.approx(np.mean(np.array(sums) >= abs(nonzero.sum()) - 1e-9))
    many = np.random.default_rng(3).normal(0.1, 1, 200)
    assert S.sign_flip_p(many, seed=1) == S.sign_flip_p(many, seed=1)
    drawn_by = "rng" if "rng" in inspect.signature(stats.permutation_test).parameters else "random_state"  # before 1.15
    scipy_p = stats.permutation_test(
        (many,), np.mean, permutation_type="samples", n_resamples=9999, **{drawn_by: np.random.default_rng(0)}
    ).pvalue
    assert S.sign_flip_p(many) == pytest.approx(scipy_p, abs=0.02)
    assert S.sign_flip_p(np.zeros(5)) == 1.0
    binary = np.array([1.0] * 10 + [-1.0] * 3 + [0.0] * 50)
    assert S.sign_flip_p(binary) == pytest.approx(S.mcnemar_p(10, 3))  # the same test, where all differences are 1


def test_the_t_interval_is_scipys_on_the_differences_and_two_pseudo_documents():
    x = np.random.default_rng(0).normal(0.02, 0.2, 50)
    found = S.t_interval(x)
    expected = stats.ttest_1samp([*x, 1, -1], 0).confidence_interval(0.95)
    assert (found.lower, found.upper) == pytest.approx((expected.low, expected.high))
    assert found.drop == pytest.approx(x.mean())
    assert S.t_p(x, 0.1) == pytest.approx(stats.ttest_1samp([*x, 1, -1], 0.1, alternative="less").pvalue)
    assert S.t_interval(np.zeros(20)).upper > 0.1  # twenty equal answers prove little


def test_the_t_interval_covers_where_few_documents_differ():
    generator, covered = np.random.default_rng(1), 0
    for _ in range(2000):
        x = np.where(generator.random(200) < 0.04, generator.uniform(-1, 1, 200), 0)
        found = S.t_interval(x)
        covered += found.lower <= 0 <= found.upper
    assert covered / 2000 > 0.94


@pytest.mark.parametrize(("drop", "share"), [(0.03, 0.04), (0.0, 0.1)])
def test_the_number_of_documents_that_settles_it_does_so_four_times_in_five(drop, share):
    needed = S.documents_needed(100, drop, share - drop**2, 0.01)
    p, q = (share + drop) / 2, (share - drop) / 2
    draws = np.random.default_rng(0).multinomial(needed, [p, q, 1 - p - q], size=300)
    level = 0.05
    settled = [
        min(S.exact_p(b, c, needed, 0.01), S.exact_p(c, b, needed, -0.01)) <= level for b, c, _ in draws.tolist()
    ]
    assert 0.7 < np.mean(settled) < 0.93
    assert S.documents_needed(100, 0.01, 0.04, 0.01) is None
