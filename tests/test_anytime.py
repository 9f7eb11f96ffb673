"""Documents that are added until they can tell: the bound's errors with optional stopping, and ``check --stop-early``."""

from __future__ import annotations

import json

import numpy as np
import pytest
from helpers.synthetic_runs import flips
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_eval_adainfer import anytime, statistics
from lm_eval_adainfer.cli.main import main
from lm_eval_adainfer.comparison import gate, runs
from lm_eval_adainfer.comparison.evidence import Evidence
from lm_eval_adainfer.comparison.matching import Pairs
from lm_eval_adainfer.errors import AdaInferError


def slow_p(drops, limit, reach):
    """One over the most capital that ever was, bet by bet and document by document."""
    capital, most = np.ones(len(anytime._BETS)), 1.0
    for x in drops:
        capital = capital * (1 + anytime._BETS / (reach - limit) * (limit - x))
        assert np.all(capital > 0)
        most = max(most, capital.mean())
    return 1 / most


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=60), st.floats(-0.9, 0.9), st.sampled_from([1.0, 100.0]))
@settings(max_examples=100, deadline=None)
def test_the_p_is_that_of_the_most_capital_that_ever_was(drops, limit, reach):
    x = np.array(drops) * reach
    assert anytime.betting_p(x, limit * reach, reach) == pytest.approx(slow_p(x, limit * reach, reach), rel=1e-9)


def test_no_bet_gains_on_average_where_the_drop_is_the_limit():
    for limit in (-0.3, 0.01, 0.2):
        for share in (abs(limit), 0.5, 1.0):
            chances = np.array([(share + limit) / 2, (share - limit) / 2, 1 - share])
            factors = 1 + np.outer(anytime._BETS / (1 - limit), limit - np.array([1.0, -1.0, 0.0]))
            assert factors @ chances == pytest.approx(np.ones(len(anytime._BETS)))


@given(st.lists(st.sampled_from([-1.0, 0.0, 0.0, 0.0, 0.5, 1.0]), min_size=1, max_size=200), st.floats(-0.5, 0.5))
@settings(max_examples=50, deadline=None)
def test_bounds_agree_with_the_test_and_mirror(drops, limit):
    x = np.array(drops)
    upper = anytime.betting_bound(x, 0.95, True, at=limit)
    assert (upper <= limit) == (anytime.betting_p(x, limit) <= 0.05)
    assert anytime.betting_bound(-x, 0.95, False) == pytest.approx(-anytime.betting_bound(x, 0.95, True))
    half = anytime.betting_p(x[: len(x) // 2], limit) if len(x) > 1 else 1.0
    assert anytime.betting_p(x, limit) <= half  # documents that are added never take back what was shown


def drawn(rng, n, share, drop):
    u = rng.random(n)
    return np.where(u < (share + drop) / 2, 1.0, np.where(u < share, -1.0, 0.0))


CASES = [  # documents, limit, share that flips, times
    (50, 0.05, 0.05, 800), (50, 0.1, 0.3, 800), (200, 0.03, 0.06, 800), (1000, 0.01, 0.01, 600), (1000, 0.01, 0.04, 600),
    (4000, 0.01, 0.1, 300), (14_000, 0.01, 0.02, 200), (14_000, 0.01, 0.2, 200),
]  # fmt: skip


@pytest.mark.parametrize(("n", "limit", "share", "times"), CASES)
@pytest.mark.parametrize("sign", [1, -1])
def test_whoever_stops_as_soon_as_it_passes_or_fails_errs_at_most_5_percent_of_the_time(n, limit, share, times, sign):
    """The p is that of the best moment to stop, which is whatever anyone could choose."""
    rng = np.random.default_rng(n + sign)
    wrong = np.mean([anytime.betting_p(sign * drawn(rng, n, share, limit), sign * limit) <= 0.05 for _ in range(times)])
    assert wrong <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / times)


def test_the_exact_test_asked_again_and_again_errs_far_more_often():
    """Why documents can't be added until the fixed gate passes."""
    rng, wrong = np.random.default_rng(0), 0
    for _ in range(150):
        x = drawn(rng, 2000, 0.04, 0.02)
        looks = ((int(np.sum(x[:n] > 0)), int(np.sum(x[:n] < 0)), n) for n in range(100, 2001, 100))
        wrong += any(statistics.exact_p(*seen, 0.02) <= 0.05 for seen in looks)
    assert wrong / 150 > 0.1


def test_metrics_between_right_and_wrong_err_no_more_often():
    rng = np.random.default_rng(3)
    draw = lambda: np.where(rng.random(1000) < 0.04, 1.0, -(0.04 - 0.01) / 0.96)  # noqa: E731
    assert np.mean([anytime.betting_p(draw(), 0.01) <= 0.05 for _ in range(500)]) <= 0.08


@pytest.mark.parametrize(("limit", "most"), [(0.05, 110), (0.02, 270), (0.01, 540)])
def test_equal_answers_are_enough_before_twice_the_rule_of_three(limit, most):
    assert anytime.betting_p(np.zeros(most), limit) <= 0.05
    assert anytime.betting_p(np.zeros(int(3 / limit)), limit) > 0.05  # the price of looking at any time


def pairs(task, n, lost, won, seed=0):
    """Documents in random places."""
    from types import SimpleNamespace

    first, second = (np.array(side, float)[np.random.default_rng(seed).permutation(n)] for side in flips(n, lost, won))
    documents = [(SimpleNamespace(doc_id=i, answer=None, metrics={}), SimpleNamespace(answer=None, metrics={})) for i in range(n)]
    return Pairs(task, "acc", False, first, second, documents)


def test_the_gate_of_documents_in_order_bets():
    found = [pairs("a", 1500, 0, 3), pairs("b", 1000, 2, 1, 1)]
    every = [("a", i) for i in range(1500)] + [("b", i) for i in range(1000)]
    places = {every[i]: place for place, i in enumerate(np.random.default_rng(0).permutation(2500))}
    verdict = gate.judge(found, ["a", "b"], 0.01, places=places)
    assert verdict.status == "pass" and verdict.pools[0].method == "betting" and verdict.documents == 2500
    drops = np.zeros(2500)
    for pair in found:
        for (document, _), drop in zip(pair.documents, pair.drops, strict=True):
            drops[places[pair.task, document.doc_id]] = drop
    assert Evidence.of(found, places=places).p_above(0.01) == anytime.betting_p(drops, 0.01)
    assert verdict.upper <= 0.01 and [g.sees for g in verdict.guards] == [None, None]
    collapsed = [found[0], pairs("b", 1000, 300, 0, 1)]
    failed = gate.judge(collapsed, ["a", "b"], 0.01, places=places)
    assert failed.status == "fail" and [g.failed for g in failed.guards] == [False, True]


def test_what_it_is_not_proven_for_is_refused():
    pair = pairs("t", 20, 1, 1)
    places = {("t", i): i for i in range(20)}
    for other in (
        Pairs("t", "acc", False, pair.baseline, pair.candidate, pair.documents, clusters=np.repeat(["x", "y"], 10)),
        Pairs("t", "perplexity", True, pair.baseline, pair.candidate, pair.documents, unit="nats per document"),
    ):
        with pytest.raises(AdaInferError, match="stop-early: t can't be judged by it"):
            Evidence.of([other], places=places)


RUN = ["check", "--run", "--stop-early", "--model_args", "pretrained=adainfer-demo,dtype=float32,stopper=svm",
       "--tasks", "adainfer_demo_sentiment,adainfer_demo_topic", "--device", "cpu"]  # fmt: skip


def test_documents_are_added_until_they_can_tell(tmp_path, capsys, only_our_tasks):
    arguments = [*RUN, "--limit", "300", "--max-drop", "0.06", "--format", "json", "--output", str(tmp_path)]
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["status"] == "pass" and found["documents"] < 600 and found["pools"][0]["method"] == "betting"
    assert any(f"{found['documents']} of 600 were used" in note for note in found["notes"])
    both = [runs.load(tmp_path / side) for side in ("baseline", "candidate")]
    for run in both:
        assert sum(len(task.documents) for task in run.tasks.values()) == found["documents"]
        rows = json.loads(run.source.read_text())["results"]
        for name, task in run.tasks.items():
            assert rows[name]["acc,none"] == pytest.approx(np.mean([d.metrics["acc"] for d in task.documents.values()]))
    assert [run.label for run in both] == ["adainfer none", "adainfer svm"]
    assert both[0].tasks["adainfer_demo_topic"].documents.keys() != set(range(len(both[0].tasks["adainfer_demo_topic"].documents)))
    fixed = ["check", "--baseline", str(tmp_path / "baseline"), "--candidate", str(tmp_path / "candidate")]
    assert main([*fixed, "--max-drop", "0.06"]) == 0  # the runs are runs like any other


FILTERED = """
task: my_words
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {max_gen_toks: 2, until: ["x"]}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
filter_list:
  - {name: one, filter: [{function: take_first}]}
  - {name: two, filter: [{function: lowercase}, {function: take_first}]}
"""


def test_texts_under_two_filters_are_added_too(tmp_path, capsys):
    rows = [json.dumps({"question": f"{i} is", "answer": "odd"}) for i in range(150)]
    (tmp_path / "d.jsonl").write_text("\n".join(rows) + "\n")
    (tmp_path / "t.yaml").write_text(FILTERED % (tmp_path / "d.jsonl"))
    arguments = ["check", "--run", "--stop-early", "--model_args", "pretrained=adainfer-demo,dtype=float32,stopper=gap:0.9",
                 "--tasks", "my_words", "--include_path", str(tmp_path), "--device", "cpu", "--batch_size", "16",
                 "--max-drop", "0.1", "--output", str(tmp_path / "out"), "--filter", "two"]  # fmt: skip
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "betting" in out and "of 150 were used" in out
    assert runs.load(tmp_path / "out" / "baseline", filter="one").tasks["my_words"].filters == ("one", "two")


@pytest.mark.parametrize("extra", [["--baseline", "x"], ["--cluster", "a"], ["--reproduces"]])
def test_stopping_early_goes_with_neither(extra, capsys):
    limit = [] if extra == ["--reproduces"] else ["--max-drop", "0.1"]
    assert main([*RUN, *limit, *extra]) == 2
    assert "stop-early: it can't go with" in capsys.readouterr().err


def first_told(x, limit, error=0.05):
    """After how many documents it is told that the drop is less than the limit; infinite where never."""
    bets = anytime._BETS / (1 - limit)
    logs = np.logaddexp.reduce(np.cumsum(np.log1p(np.outer(bets, limit - x)), 1), axis=0) - np.log(len(bets))
    found = np.nonzero(logs >= np.log(1 / error))[0]
    return found[0] + 1 if len(found) else np.inf


@pytest.mark.slow
@pytest.mark.parametrize(
    ("drop", "share"), [(0.0, 0.0), (0.0, 0.005), (0.0, 0.01), (0.0, 0.04), (0.0, 0.1), (0.03, 0.04), (0.05, 0.1)]
)
def test_the_guide_says_how_many_documents_it_takes(drop, share):
    from pathlib import Path

    from lm_eval_adainfer import powers

    rng, sign, told = np.random.default_rng(0), (-1 if drop > 0.01 else 1), []
    for _ in range(400):
        told.append(first_told(sign * drawn(rng, 20_000, share, drop), sign * 0.01))
    half, most = np.sort(told)[[199, 319]]
    sides = ((share + drop) / 2, (share - drop) / 2)
    sides = sides[::sign]
    tests = [(sign * 0.01, 0.05)]
    low, high = 1, 20_000
    while high - low > max(1, 0.01 * high):
        middle = (low + high) // 2
        low, high = (low, middle) if powers.power(middle, *sides, tests) >= 0.8 else (middle, high)
    row = f"| {100 * drop:g} | {share:.1%} | {'fail' if sign < 0 else 'pass'} | {high:,} | {int(half):,} | {int(most):,} |"
    page = (Path(__file__).resolve().parents[1] / "docs" / "numbers.md").read_text()
    assert row in page, row
