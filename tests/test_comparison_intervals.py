"""What compare says beside differences: mid-p, Holm's p, intervals of exits, and candidates against each other."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from helpers.synthetic_runs import flips, sample, write
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lm_eval_adainfer import statistics
from lm_eval_adainfer.cli.main import main
from lm_eval_adainfer.comparison import compare, runs


@given(st.integers(0, 60), st.integers(0, 60))
@settings(max_examples=60, deadline=None)
def test_the_mid_p_counts_half_of_the_outcomes_as_likely_as_the_one_seen(b, c):
    chances = stats.binom.pmf(np.arange(b + c + 1), b + c, 0.5)
    seen = chances[b]
    expected = chances[chances < seen * (1 - 1e-9)].sum() + 0.5 * chances[np.isclose(chances, seen, rtol=1e-9, atol=0)].sum()
    if b == c:  # the likeliest outcome has no twin on the other side, and says nothing
        expected = 1.0
    assert statistics.mcnemar_mid_p(b, c) == pytest.approx(expected)
    assert statistics.mcnemar_mid_p(b, c) <= statistics.mcnemar_p(b, c) + 1e-12


def rejections(test, most):
    """Per number of discordant documents, which splits of them are significant at 5%: the uneven ones."""
    found, few = [], 0  # splits with fewer losses than that are
    for m in range(most + 1):
        while few < m / 2 and test(few, m - few) <= 0.05:
            few += 1
        lost = np.arange(m + 1)
        found.append(np.minimum(lost, m - lost) < few)
    return found


@pytest.fixture(scope="module")
def tables():
    return [rejections(test, 230) for test in (statistics.mcnemar_mid_p, statistics.mcnemar_p)]


def chance(table, n, share, drop):
    """Of a significant difference, over all outcomes of ``n`` documents."""
    lost, total = (share + drop) / (2 * share), 0.0
    for m in range(min(n, len(table) - 1) + 1):
        total += stats.binom.pmf(m, n, share) * float(stats.binom.pmf(np.arange(m + 1), m, lost) @ table[m])
    return total


@pytest.mark.parametrize("n", [10, 20, 50, 150, 300, 1000])
def test_the_mid_p_keeps_its_size_and_finds_more(tables, n):
    for share in np.linspace(0.004, min(0.5, 160 / n), 12):
        mid, exact = (chance(table, n, share, 0.0) for table in tables)
        assert exact <= mid <= 0.0502
        assert chance(tables[0], n, share, 0.7 * share) >= chance(tables[1], n, share, 0.7 * share)


def test_the_guide_says_what_the_mid_p_finds(tables):
    page = (Path(__file__).resolve().parents[1] / "docs" / "comparing.md").read_text()
    sizes, found = ([chance(table, 200, 0.04, drop) for table in tables] for drop in (0.0, 0.03))
    assert "size is {:.1%} instead of {:.1%}".format(*sizes) in page
    assert "in {:.1%} of runs instead of {:.1%}".format(*found) in page


@pytest.mark.parametrize("tasks", [3, 20])
def test_where_nothing_changed_holms_p_is_small_in_at_most_5_percent_of_runs(tasks):
    rng = np.random.default_rng(0)
    flipped = rng.binomial(300, 0.08, size=(1500, tasks))
    lost = rng.binomial(flipped, 0.5)
    known = {(b, m): statistics.mcnemar_p(b, m - b) for b, m in {*zip(lost.flat, flipped.flat, strict=True)}}
    wrong = [
        min(statistics.holm([known[b, m] for b, m in zip(*row, strict=True)])) <= 0.05
        for row in zip(lost, flipped, strict=True)
    ]
    assert np.mean(wrong) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 1500)


EXITS = {  # of 24 blocks
    "even": lambda rng, n: rng.integers(1, 25, n),
    "early, with a tail": lambda rng, n: np.minimum(3 + rng.geometric(0.3, n), 24),
    "one in ten runs to the end": lambda rng, n: np.where(rng.random(n) < 0.1, 24, 6),
}


@pytest.mark.parametrize("how", EXITS)
@pytest.mark.parametrize("n", [50, 200, 1000])
def test_intervals_of_mean_exits_cover(how, n):
    rng = np.random.default_rng(n)
    truth = EXITS[how](rng, 1_000_000).mean()
    found = [statistics.mean_interval(EXITS[how](rng, n)) for _ in range(1000)]
    covered = np.mean([lower <= truth <= upper for lower, upper in found])
    assert covered >= (0.94 if n >= 200 else 0.89) - 3 * np.sqrt(0.05 * 0.95 / 1000)  # rare exits: 89% at 50 documents


def test_intervals_of_mean_exits_cover_where_documents_share_passages():
    rng, clusters = np.random.default_rng(0), np.repeat(np.arange(80), 5)
    found = []
    for _ in range(1000):
        x = np.where(rng.random(400) < 0.5, np.repeat(rng.integers(1, 25, 80), 5), rng.integers(1, 25, 400))
        found.append([lower <= 12.5 <= upper for lower, upper in
                      (statistics.mean_interval(x, clusters), statistics.mean_interval(x))])  # fmt: skip
    clustered, plain = np.mean(found, axis=0)
    assert clustered >= 0.93 and plain < 0.90  # the passages are what is independent


def test_the_interval_is_scipys_and_one_document_has_none():
    x = np.random.default_rng(1).integers(1, 25, 60)
    expected = stats.ttest_1samp(x, 0).confidence_interval(0.95)
    assert statistics.mean_interval(x) == pytest.approx((expected.low, expected.high))
    assert statistics.mean_interval(x, np.arange(60)) == pytest.approx((expected.low, expected.high))
    assert statistics.mean_interval(np.array([4.0])) == (-np.inf, np.inf)
    assert statistics.variance_error(np.array([4.0])) is None


@pytest.mark.parametrize("how", EXITS)
@pytest.mark.parametrize("n", [200, 1000])
def test_the_error_of_the_variance_is_how_far_variances_of_runs_lie_apart(how, n):
    rng = np.random.default_rng(n)
    x = np.stack([EXITS[how](rng, n) for _ in range(1500)])
    stated = np.sqrt(np.mean([statistics.variance_error(row) ** 2 for row in x]))
    assert stated == pytest.approx(x.var(axis=1).std(), rel=0.08)


def test_the_error_of_the_variance_in_clusters_is_how_far_these_lie_apart():
    rng, clusters = np.random.default_rng(2), np.repeat(np.arange(100), 4)
    x = np.stack([np.repeat(rng.integers(1, 25, 100), 4) for _ in range(1500)])
    stated = np.sqrt(np.mean([statistics.variance_error(row, clusters) ** 2 for row in x]))
    assert stated == pytest.approx(x.var(axis=1).std(), rel=0.08)


@pytest.fixture
def three(tmp_path):
    """A dense run and two candidates, of two tasks of accuracies and one of another metric."""
    rng, names = np.random.default_rng(0), []
    for name, depth, lost in (("dense", 12, 0), ("svm", 5, 6), ("gap", 8, 3)):
        tasks = {}
        for task, n in (("a", 120), ("b", 60), ("c", 40)):
            scores = flips(n, 6, 0)[0]
            scores[:lost] = [0] * lost
            layers = np.clip(depth + rng.integers(-3, 4, n), 1, 12) if depth < 12 else np.full(n, 12)
            metric = "f1" if task == "c" else "acc"
            tasks[task] = [
                sample(task, i, v, exit_layer=int(k), metric=metric)
                for i, (v, k) in enumerate(zip(scores, layers, strict=True))
            ]
        names.append(f"{name}={write(tmp_path / name, tasks, kind='adainfer', stopper=name, groups={'g': ['a', 'b', 'c']})}")
    return names


def test_every_two_candidates_are_compared(three, tmp_path, capsys):
    loaded = runs.load_all(three)
    found = compare.compare_all(loaded)
    assert [(c.baseline, c.candidate, c.between_candidates) for c in found] == [
        ("dense", "svm", False), ("dense", "gap", False), ("svm", "gap", True),
    ]  # fmt: skip
    svm, gap, between = ({r.name: r for r in c.rows} for c in found)
    for name in ("a", "b", "g", "all documents"):
        assert between[name].difference == pytest.approx(gap[name].difference - svm[name].difference)
        assert between[name].exit_layer_difference == pytest.approx(gap[name].exit_layer - svm[name].exit_layer)
        assert between[name].pruning_ratio_difference == pytest.approx(gap[name].pruning_ratio - svm[name].pruning_ratio)
        ends = between[name].exit_layer_difference_lower, between[name].exit_layer_difference_upper
        assert ends[0] < between[name].exit_layer_difference < ends[1]
    assert main(["compare", *three]) == 0
    out = capsys.readouterr().out
    assert "gap minus svm" in out and "svm minus gap" not in out and out.count("every two candidates") == 1
    assert main(["compare", *three, "--format", "csv", "-o", str(tmp_path / "c.csv")]) == 0
    assert len((tmp_path / "c.csv").read_text().splitlines()) == 1 + 3 * len(svm)


def test_rows_hold_mid_p_holm_and_intervals(three, tmp_path):
    assert main(["compare", *three[:2], "--format", "json", "-o", str(tmp_path / "c.json")]) == 0
    (found,) = json.loads((tmp_path / "c.json").read_text())
    rows = {row["name"]: row for row in found["rows"]}
    tasks = [rows[t] for t in "abc"]
    assert [r["p_holm"] for r in tasks] == pytest.approx(statistics.holm([r["p"] for r in tasks]))
    assert rows["g"]["p_holm"] is None and rows["all documents"]["p_holm"] is None
    assert rows["a"]["p_mid"] == statistics.mcnemar_mid_p(6, 0) < rows["a"]["p"] == statistics.mcnemar_p(6, 0)
    layers = [s.metrics["exit_layer"] for s in runs.load(three[1]).tasks["a"].documents.values()]
    assert rows["a"]["exit_layer_var"] == pytest.approx(np.var(layers))
    assert rows["a"]["exit_layer_var_stderr"] == pytest.approx(statistics.variance_error(np.array(layers)))
    assert (rows["a"]["exit_layer_lower"], rows["a"]["exit_layer_upper"]) == pytest.approx(statistics.mean_interval(layers))
    pruned = [rows["a"][f"pruning_ratio{end}"] for end in ("_lower", "", "_upper")]
    assert pruned == pytest.approx([1 - rows["a"][f"exit_layer{end}"] / 12 for end in ("_upper", "", "_lower")])


def test_the_report_pools_tasks_of_one_metric_only(three, tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    from lm_eval_adainfer.comparison.matching import match
    from lm_eval_adainfer.output import report

    loaded = runs.load_all(three)
    pairs = {run.label: match(loaded[0], run) for run in loaded}
    assert {p.task for p in report._pooled(pairs)["svm"]} == {"a", "b"}
    assert report._columns(loaded[0], pairs) == {"all documents": ["a", "b"], "a": ["a"], "b": ["b"], "c": ["c"]}
    report._WIDE, wide = 2, report._WIDE
    try:  # more tasks than fit: the group takes its tasks' place, and what it leaves out is not pooled with it
        assert report._columns(loaded[0], pairs) == {"all documents": ["a", "b"]}
    finally:
        report._WIDE = wide
    page = report.write(loaded, str(tmp_path / "out")).read_text()
    assert "the frontier leaves out c (f1), which are another metric" in page
