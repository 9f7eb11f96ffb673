"""Every kind of promise is kept: enumerated where a set is small, else calibrations simulated by the thousand."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest
from scipy.stats import binom, hypergeom, norm

from lm_eval_adainfer import finite, statistics
from lm_eval_adainfer.fitting.risk import Risk

# ------------------------------------------------------------------------------------------------ finite sets


@pytest.mark.parametrize("share", [0.05, 0.1, 0.25])
@pytest.mark.parametrize("size", [6, 13])
def test_a_set_that_loses_too_much_passes_as_rarely_as_stated_whatever_is_drawn(size, share):
    """Every number drawn, every number of losing and winning documents that breaks the limit, every level."""
    checked = 0
    for drawn in range(1, size + 1):
        gross = [float(finite.gross_p(b, drawn, size, share)) for b in range(drawn + 1)]
        outcomes = [(b, c) for b in range(drawn + 1) for c in range(drawn + 1 - b)]
        net = {(b, c): finite.net_p(b, c, drawn, size, share) for b, c in outcomes}
        for lose in range(size + 1):
            for win in range(size + 1 - lose):
                if lose - win <= share * size:
                    continue
                rest = size - lose - win
                chance = {
                    (b, c): comb(lose, b) * comb(win, c) * comb(rest, drawn - b - c) / comb(size, drawn)
                    for b, c in outcomes
                }
                assert sum(chance.values()) == pytest.approx(1)
                for level in (0.01, 0.05, 0.2, 0.5):
                    assert sum(p for key, p in chance.items() if net[key] <= level) <= level + 1e-9
                    if not win:
                        assert sum(p for (b, _), p in chance.items() if gross[b] <= level) <= level + 1e-9
                    checked += 1
    assert checked > 100


def test_what_is_drawn_whole_is_known_and_a_small_draw_is_as_if_from_all_documents():
    assert finite.net_p(3, 1, 50, 50, 0.05) == 0 and finite.net_p(4, 1, 50, 50, 0.05) == 1
    assert finite.gross_p(2, 50, 50, 0.05) == 0 and finite.gross_p(3, 50, 50, 0.05) == 1
    assert float(finite.gross_p(2, 300, 10**6, 0.02)) == pytest.approx(float(binom.cdf(2, 300, 0.02)), rel=1e-2)
    assert finite.net_p(5, 3, 300, 20_000, 0.02) == pytest.approx(statistics.exact_p(5, 3, 300, 0.02), rel=0.03)


def test_five_documents_in_a_hundred_are_five_per_cent_and_not_more():
    assert [finite.fewest_above(share, 100) for share in (0.05, 0.049, 0.01, 0.29)] == [6, 5, 2, 30]
    assert finite.fewest_above(0.1 + 0.2, 10) == 4


def test_net_p_of_documents_that_only_lose_is_near_the_exact_one_for_them():
    """The ordering has a price where none wins, but not a great one."""
    for lost in range(4):
        assert finite.net_p(lost, 0, 200, 400, 0.05) <= 3 * float(hypergeom.cdf(lost, 400, 21, 200)) + 1e-5


# ------------------------------------------------------------------------------------------------ simulations

ALPHA = 0.05
RISKS = np.array([0.0, 0.3, 0.7, 1.0001, 1.4, 2.0]) * ALPHA  # of thresholds, from strict to loose; three are too loose


def losses(rng, documents, net=False, clusters=None, correlation=0.0):
    """[thresholds, documents]: who loses at a strict threshold loses at every looser one; risks are exactly RISKS."""
    noise = rng.normal(size=documents)
    if clusters is not None:
        noise = np.sqrt(correlation) * rng.normal(size=clusters.max() + 1)[clusters] + np.sqrt(1 - correlation) * noise
    place = norm.cdf(noise)
    wins = 0.5 * RISKS if net else 0 * RISKS  # so that losers minus winners are RISKS
    return (place < (RISKS + wins)[:, None]).astype(int) - (place > 1 - wins[:, None])


def broken(passed):
    return passed > 0 and RISKS[passed - 1] > ALPHA


def most(runs):
    """5% and the sampling error of so many."""
    return binom.ppf(0.999, runs, 0.05)


@pytest.mark.parametrize("net", [False, True], ids=["gross", "net"])
@pytest.mark.parametrize("documents", [120, 400])
def test_a_promise_about_documents_like_these_is_broken_in_at_most_5_percent(net, documents):
    rng, runs = np.random.default_rng(documents), 400
    risk = Risk(ALPHA, net)
    passed = [risk.passed(losses(rng, documents, net), 0.05) for _ in range(runs)]
    assert sum(map(broken, passed)) <= most(runs)
    assert np.mean(np.array(passed) > 1) > 0.2, "a threshold that never stops keeps any promise"


@pytest.mark.parametrize("net", [False, True], ids=["gross", "net"])
def test_a_promise_about_a_finite_set_is_broken_in_at_most_5_percent_and_passes_more(net):
    rng, size, drawn, runs = np.random.default_rng(3), 500, 250, 300
    whole = losses(rng, size, net)
    risks = whole.mean(axis=1)
    limit = float(risks[4]) - 1e-9  # the hardest: one threshold is just too loose
    risk, unlimited = Risk(limit, net, size=size), Risk(limit, net)
    failed, passed, of_all = 0, 0, 0
    for _ in range(runs):
        sample = whole[:, rng.permutation(size)[:drawn]]
        count = risk.passed(sample, 0.05)
        failed += risks[:count].max(initial=0) > limit
        passed += count
        of_all += unlimited.passed(sample, 0.05)
    assert failed <= most(runs)
    assert passed > 1.05 * of_all


@pytest.mark.parametrize("net", [False, True], ids=["gross", "net"])
def test_a_promise_about_documents_in_clusters_is_broken_in_at_most_5_percent(net):
    rng, runs = np.random.default_rng(5), 300
    kept, naive, stopped = 0, 0, 0
    for _ in range(runs):
        sizes = rng.integers(1, 12, 300)
        clusters = np.repeat(np.arange(300), sizes)
        rows = losses(rng, len(clusters), net, clusters, 0.6)
        passed = Risk(ALPHA, net, clusters).passed(rows, 0.05)
        kept += not broken(passed)
        stopped += passed > 1
        naive += broken(Risk(ALPHA, net).passed(rows, 0.05))
    assert runs - kept <= most(runs)
    assert stopped > 0.2 * runs
    assert naive > most(runs), "single documents taken for independent ones break it more often"


def test_promises_that_divide_the_error_hold_together():
    rng, runs, candidates = np.random.default_rng(7), 400, 8
    together = apart = 0
    for _ in range(runs):
        rows = [losses(rng, 250) for _ in range(candidates)]
        together += any(broken(Risk(ALPHA).passed(row, 0.05 / candidates)) for row in rows)
        apart += any(broken(Risk(ALPHA).passed(row, 0.05)) for row in rows)
    assert together <= most(runs)
    assert apart > 2 * most(runs)


def test_the_net_drop_prunes_more_for_the_same_promise():
    """Pruning rises by a step with every threshold; half as many documents win as lose."""
    rng, runs, documents, steps = np.random.default_rng(9), 60, 600, 60
    lose = np.linspace(0, 0.12, steps)
    pruning = np.linspace(0, 0.6, steps)
    gross, net = [], []
    for _ in range(runs):
        place = rng.uniform(size=documents)
        rows = (place < lose[:, None]).astype(int) - (place > 1 - lose[:, None] / 2)
        gross.append(pruning[Risk(ALPHA).passed(np.maximum(rows, 0), 0.05) - 1])
        net.append(pruning[Risk(ALPHA, True).passed(rows, 0.05) - 1])
    print(f"pruning {np.mean(gross):.3f} gross, {np.mean(net):.3f} net (simulated)")
    assert np.mean(net) > 1.1 * np.mean(gross)


# ------------------------------------------------------------------------------------------------ docs/guarantee.md


def calibrations(rng, kind, documents, net):
    """A promise broken or not, whether any threshold that stops passed, and whether taking what looks good breaks it."""
    clusters = None
    if kind == "clusters":
        clusters = np.repeat(np.arange(documents // 5), rng.multinomial(documents - documents // 5, [5 / documents] *
                             (documents // 5)) + 1)  # fmt: skip
    size = 2 * documents if kind == "finite set" else None
    rows = losses(rng, size or documents, net, clusters, 0.3)
    risks, limit = RISKS, ALPHA
    if size is not None:
        risks = rows.mean(axis=1)
        limit = float(risks[3]) - 1e-9
        rows = rows[:, rng.permutation(size)[:documents]]
    passed = Risk(limit, net, clusters, size).passed(rows, 0.05)
    picked = np.flatnonzero(rows.mean(axis=1) <= limit)[-1]
    return risks[:passed].max(initial=0) > limit, passed > 1, risks[picked] > limit


@pytest.mark.slow
@pytest.mark.parametrize("net", [False, True], ids=["gross", "net"])
@pytest.mark.parametrize("kind", ["documents like these", "finite set", "clusters"])
@pytest.mark.parametrize("documents", [300, 1200])
def test_guide(kind, documents, net):
    """The table of docs/guarantee.md."""
    rng, runs = np.random.default_rng(documents), 2000
    found = np.mean([calibrations(rng, kind, documents, net) for _ in range(runs)], axis=0)
    print(f"| {kind} | {documents} | {'net' if net else 'gross'} | {found[0]:.1%} | {found[1]:.0%} | {found[2]:.0%} |")
    assert found[0] <= most(runs) / runs
