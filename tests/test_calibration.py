"""Learn-then-Test: exact p-values, losses by hand, the promise on 1,000 resampled calibration sets, bad input."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.refusals import refused
from helpers.tasks import our_tasks
from helpers.traces import BASE
from helpers.traces import write_random as write_trace
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, binomtest

from lm_eval_adainfer.cli import main
from lm_eval_adainfer.fitting import calibration, fit, grids
from lm_eval_adainfer.fitting.risk import Risk, documents_needed
from lm_eval_adainfer.strategies.files import load, save
from lm_eval_adainfer.strategies.rules import FixedStopper, GapStopper, NoStopper
from lm_eval_adainfer.traces import documents, recording
from lm_eval_adainfer.traces.documents import TracedDocuments
from lm_eval_adainfer.traces.margins import margins

# ------------------------------------------------------------------------------------------------ the test


@given(n=st.integers(1, 300), drop=st.floats(0.001, 0.5), data=st.data())
@settings(max_examples=60, deadline=None)
def test_p_values_are_the_binomial_tail(n, drop, data):
    lost = data.draw(st.integers(0, n))
    by_hand = sum(math.comb(n, i) * drop**i * (1 - drop) ** (n - i) for i in range(lost + 1))
    p = Risk(drop).p_of(lost, 0, n)
    assert p == pytest.approx(by_hand, rel=1e-6)
    assert p == pytest.approx(binomtest(lost, n, drop, alternative="less").pvalue, rel=1e-9)


@pytest.mark.parametrize(("drop", "confidence", "expected"), [(0.01, 0.95, 299), (0.05, 0.95, 59), (0.01, 0.99, 459)])
def test_documents_needed_are_those_of_the_formula_and_not_one_less(drop, confidence, expected):
    assert documents_needed(drop, confidence) == expected
    assert Risk(drop).p_of(0, 0, expected) <= 1 - confidence < Risk(drop).p_of(0, 0, expected - 1)


@pytest.mark.parametrize("share", [0.001, 0.004, 0.006])
def test_documents_needed_at_a_share_of_losses_is_near_the_smallest_number_that_passes(share):
    lost = np.arange(1000) < 1000 * share
    needed = Risk(0.01).needed(lost, 0.05)
    passes = [binom.cdf(math.ceil(share * n), n, 0.01) <= 0.05 for n in range(1, 2 * needed)]
    assert passes[needed - 1]
    assert 0.5 * needed < passes.index(True) + 1 <= needed, "rounding of the losses makes this no exact minimum"


def test_no_number_of_documents_helps_where_too_many_are_lost():
    assert Risk(0.01).needed(np.arange(100) < 1, 0.05) is None
    assert Risk(0.01).needed(np.arange(100) < 30, 0.05) is None


def test_testing_ends_at_the_first_threshold_that_fails():
    def passed(documents, *lost):
        return Risk(0.01).passed(np.array([np.arange(documents) < x for x in lost]).astype(int), 0.05)

    assert passed(400, 0, 0, 9, 0, 0) == 2
    assert passed(400, 0, 0, 0, 0, 0) == 5
    assert passed(298, 0, 0, 0, 0, 0) == 0


def test_thresholds_go_from_never_to_ever_looser(tmp_path):
    svm = fit.fit_svm([write_trace(tmp_path / "a.trace")])
    boosted = fit.fit_classifier("boosted", [tmp_path / "a.trace"])
    for stopper in (svm, boosted, GapStopper()):
        thresholds, _ = grids.grid(stopper)
        assert (np.diff(thresholds) < 0).all() and len(thresholds) > 60
        never = margins(_with(stopper, thresholds[0]), *recording.read(tmp_path / "a.trace"))
        assert not (never > 0).any()


def _with(stopper, threshold):
    stopper.threshold = threshold
    return stopper


# ------------------------------------------------------------------------------------------------ documents


def traced(arrays, **meta):
    return TracedDocuments(Path("t.trace"), {**BASE, **meta}, arrays)


def test_answers_and_losses_of_choices_in_two_contexts_by_hand():
    """Two contexts (instances) a document, as in Winogrande: one choice each, one decision together."""
    scores = np.array([[-1, -9, -1], [-5, -5, -5], [-2, -2, -2], [-1, -3, -9]], dtype=float)[:, :, None]
    arrays = {
        "top_token": np.zeros((4, 3), dtype=int), "doc_id": np.array([7, 7, 8, 8]), "gold": np.array([0, 0, 1, 1]),
        "gold_token": np.zeros(4, int), "scores": scores, "request": np.array([[0], [1], [0], [1]]),
    }  # fmt: skip
    found = traced(arrays, n_blocks=3, output_type="multiple_choice")
    assert found.answers.tolist() == [[0, 1, 0], [1, 0, 0]]
    assert (found.doc_ids.tolist(), found.gold.tolist()) == ([7, 8], [0, 1])
    together = found.together(np.array([[0.5, 0.9, np.nan], [0.3, 0.8, np.nan], [0.9, 0, np.nan], [0.7, 1, np.nan]]))
    np.testing.assert_array_equal(together, [[0.3, 0.8, np.nan], [0.7, 0, np.nan]])
    assert [documents.exits(together, t).tolist() for t in (0.2, 0.5, 0.7, 0.9)] == [[1, 1], [2, 1], [2, 3], [3, 3]]
    assert found.losses("gold", [2, 1]).tolist() == [1, 0], "the second was wrong at the end, right before"
    assert found.losses("agreement", [2, 1]).tolist() == [1, 1]
    assert found.losses("agreement", [1, 2]).tolist() == [0, 0]


def test_one_continuation_is_right_where_greedy_decoding_gives_all_of_it():
    """The first token is right after every block, the whole answer after the last one of the first document only."""
    arrays = {
        "top_token": np.full((2, 3), 4), "doc_id": np.array([3, 9]), "gold": np.zeros(2, int),
        "gold_token": np.full(2, 4), "request": np.zeros((2, 1), int), "scores": np.zeros((2, 3, 1)),
        "greedy": np.array([[0, 0, 1], [0, 0, 0]])[:, :, None],
    }  # fmt: skip
    found = traced(arrays, n_blocks=3, output_type="loglikelihood")
    assert found.losses("gold", [2, 2]).tolist() == [1, 0]
    assert found.losses("agreement", [2, 2]).tolist() == [1, 0]
    assert found.losses("gold", [3, 1]).tolist() == [0, 0]


def test_a_generated_text_is_lost_where_one_of_its_tokens_differs():
    arrays = {"top_token": np.array([[1, 2], [3, 3], [4, 4]]), "doc_id": np.array([5, 5, 6])}
    found = traced(arrays, n_blocks=2, output_type="generate_until")
    assert found.losses("agreement", [1, 1, 1]).tolist() == [1, 0]
    assert found.losses("agreement", [2, 1, 1]).tolist() == [0, 0]


@given(st.lists(st.lists(st.integers(0, 2), min_size=4, max_size=4), min_size=1, max_size=6))
def test_stable_means_the_answer_never_changes_again(rows):
    expected = [[all(later == row[-1] for later in row[k:]) for k in range(4)] for row in rows]
    assert documents.stable(np.array(rows)).tolist() == expected


def test_calibration_counts_what_the_calibrated_stopper_does(tmp_path):
    path = write_trace(tmp_path / "a.trace", n=2000)
    stopper, found = calibration.calibrate([path], GapStopper(), max_drop=0.05, loss="agreement")
    meta, arrays = recording.read(path)
    stops = margins(stopper, meta, arrays) > 0
    lost, depth = 0, 0
    for stop, top in zip(stops, arrays["top_token"], strict=True):
        exit_layer = next((k for k in range(1, 5) if stop[k - 1]), 4)
        depth += exit_layer
        lost += top[exit_layer - 1] != top[-1]
    assert found.first_token_only
    assert found.stops and 0 < lost == found.losses == stopper.info["promise"]["losses"]
    assert found.pruning == pytest.approx(1 - depth / 2000 / 4)
    assert binom.cdf(lost, 2000, 0.05) <= 0.05
    assert stopper.info["promise"]["thresholds"] == [stopper.threshold, 1.0]


# ------------------------------------------------------------------------------------------------ the promise


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Real traces: 200 documents of two tasks of the demo model, and an SVM fitted on training documents."""

    from lm_eval_adainfer.harness.model import AdaInferLM

    folder = tmp_path_factory.mktemp("demo")
    manager = our_tasks()
    lm = AdaInferLM(pretrained="adainfer-demo", dtype="float32", device="cpu", batch_size=32)
    names = ["adainfer_demo_plural", "adainfer_demo_fact"]
    train = recording.trace(lm, manager.load(names)["tasks"], folder, num_fewshot=1, limit=40)
    test = recording.trace(lm, manager.load(names)["tasks"], folder, num_fewshot=1, split="test", limit=200)
    return SimpleNamespace(train=train, test=test, svm=fit.fit_svm(train))


@pytest.mark.parametrize("loss", ["gold", "agreement"])
@pytest.mark.parametrize("which", ["gap", "svm"])
def test_the_promise_is_broken_in_at_most_5_percent_of_1000_calibration_sets(demo, which, loss):
    stopper = GapStopper() if which == "gap" else demo.svm
    thresholds, _ = grids.grid(stopper)
    lost = []
    for file in demo.test:
        (found,) = documents.read([file])
        scores = found.together(margins(stopper, found.meta, found.arrays) + stopper.threshold)
        lost.append([found.losses(loss, documents.exits(scores, t)) for t in thresholds])
    pool = np.concatenate(lost, axis=1)  # [G, documents]
    risk = pool.mean(axis=1)
    drop = risk[np.abs(risk - 0.1).argmin()] - 1e-9  # the hardest: there is a threshold whose risk is just too great
    assert risk[0] == 0 and 0.02 < drop < 0.3, "else nothing could be broken"
    rng = np.random.default_rng(0)
    broken = naive = stopped = 0
    for _ in range(1000):
        drawn = pool[:, rng.integers(0, pool.shape[1], 300)]
        sample = drawn.sum(axis=1)
        at = Risk(drop).passed(drawn, 0.05) - 1
        broken += at >= 0 and risk[: at + 1].max() > drop
        stopped += at >= 0 and risk[at] > 0
        over = sample / 300 > drop
        naive += risk[over.argmax() - 1 if over.any() else -1] > drop
    most = binom.ppf(0.999, 1000, 0.05)  # 5% and the sampling error of 1,000 draws
    assert broken <= most
    assert stopped > 900, "a threshold that never stops keeps any promise"
    assert naive > most, "taking the loosest threshold that looks good breaks it far more often"


def test_a_calibrated_stopper_survives_its_file_and_decides_as_promised(demo, tmp_path):
    out = tmp_path / "safe.stopper"
    files = [str(f) for f in demo.test]
    save(demo.svm, tmp_path / "svm.stopper")
    arguments = ["--stopper", str(tmp_path / "svm.stopper"), "--max-drop", "0.1", "-o", str(out)]
    assert main.main(["calibrate", *files, *arguments]) == 0
    loaded = load(out)
    promise = loaded.info["promise"]
    assert (promise["max_drop"], promise["confidence"], promise["loss"]) == (0.1, 0.95, "gold")
    assert promise["documents"] == 400 and promise["stops"]
    assert promise["tasks"] == ["adainfer_demo_fact", "adainfer_demo_plural"]
    lost = 0
    for file in demo.test:
        (found,) = documents.read([file])
        lost += found.losses("gold", documents.exits(found.together(margins(loaded, found.meta, found.arrays)))).sum()
    assert lost == promise["losses"]
    assert loaded.fingerprint != demo.svm.fingerprint


# ------------------------------------------------------------------------------------------------ the grid


@pytest.mark.parametrize("kind", ["svm", "boosted", "crf"])
def test_a_fitted_stopper_notes_its_scores_which_are_the_thresholds_that_are_tested(kind, tmp_path):
    path = write_trace(tmp_path / "a.trace", n=150, split="train")
    if kind == "crf":
        pytest.importorskip("pycrfsuite")
    stopper = fit.fit(kind, [path], features=["gap", "top_prob"])
    save(stopper, tmp_path / "s")
    thresholds, origin = grids.grid(load(tmp_path / "s"))
    assert "fitted on" in origin
    free = _with(load(tmp_path / "s"), 0.0)
    (found,) = documents.read([path])
    scores = margins(free, found.meta, found.arrays, [1, 2, 3])[:, :3]
    assert thresholds[1] == pytest.approx(scores.max(), abs=1e-6) and thresholds[-1] == pytest.approx(scores.min(), abs=1e-6)
    stops = [(scores > t + 1e-6).any(axis=1).mean() for t in thresholds]  # most thresholds are in float32's numbers
    assert stops[0] == stops[1] == 0 and stops[-1] == 1
    assert kind != "svm" or np.diff(stops).max() < 0.08, "in small steps"
    other = calibration.calibrate([write_trace(tmp_path / "b.trace", seed=1)], stopper, 0.2, loss="agreement")[0]
    assert other.threshold in thresholds and other.info["promise"]["grid"] == origin


def test_other_traces_may_give_the_thresholds_but_not_the_calibration_documents(tmp_path):
    path = write_trace(tmp_path / "a.trace", split="calibrate")
    train = write_trace(tmp_path / "b.trace", seed=3, split="train", arrays={"doc_id": np.arange(400, 800)}.items())
    stopper, found = calibration.calibrate([path], GapStopper(), 0.2, loss="agreement", grid_from=[train])
    gaps = recording.read(train)[1]["features"][:, :-1, 0]
    assert found.grid == "scores of other traces" and gaps.min() <= stopper.threshold <= gaps.max()
    assert calibration.calibrate([path], GapStopper(), 0.2, loss="agreement")[1].grid == "round numbers"
    refused(lambda: calibration.calibrate([path], GapStopper(), grid_from=[path]), "grid_from", "400", "fitting documents")
    older = write_trace(tmp_path / "c.trace", split="train")  # which numbered the same documents
    refused(lambda: calibration.calibrate([path], GapStopper(), grid_from=[older]), "grid_from", "fitting documents")
    odd = GapStopper()
    odd.info = {grids.KEY: [0.5, "x"]}
    refused(lambda: calibration.calibrate([path], odd), "stopper", "score_quantiles", "fit it again")


# ------------------------------------------------------------------------------------------------ the command


def winning(path, n=1000, **meta):
    """Blocks in front of the last lose 4 documents in 100 and win 3, all where the gap is high."""
    draw = (np.arange(n) + 0.5) / n
    top = np.full((n, 4), 3)
    top[draw < 0.04, -1] = 1  # the gold answer at the end alone
    gold = np.where(draw < 0.04, 1, np.where(draw < 0.07, 3, 2))
    top[(draw >= 0.04) & (draw < 0.07), -1] = 4
    return write_trace(path, gap=np.full((n, 4), 0.9), gold=gold, arrays={
        "top_token": top, "greedy": (top == gold[:, None]).astype(int)[:, :, None],
    }.items(), **meta)  # fmt: skip


def test_what_is_won_is_set_against_what_is_lost(tmp_path, capsys, caplog):
    path = winning(tmp_path / "a.trace")
    found = {}
    for loss in ("gold", "accuracy"):
        _, found[loss], *_ = run(capsys, caplog, path, "-s", "gap", "--loss", loss, "--max-drop", "0.03", "-o", tmp_path / loss)
    assert "never stops" in found["gold"] and "accuracy falls by at most 3.00%" in found["accuracy"]
    promise = load(tmp_path / "accuracy").info["promise"]
    assert (promise["losses"], promise["wins"], promise["stops"]) == (40, 30, True)
    assert "40 of 1000" in found["accuracy"] and "30 won" in found["accuracy"]


def test_a_promise_about_a_set_of_known_size_needs_fewer_documents(tmp_path, capsys, caplog):
    path = write_trace(tmp_path / "a.trace", gap=np.full((200, 4), 0.99), arrays={"top_token": np.full((200, 4), 3)}.items())
    common = (path, "-s", "gap", "--loss", "agreement", "-o", tmp_path / "o")
    assert "at least 299" in run(capsys, caplog, *common)[1]
    out = run(capsys, caplog, *common, "--test-size", "400")[1]
    assert "of these 400 documents" in out and load(tmp_path / "o").info["promise"]["test_size"] == 400
    assert "about" in run(capsys, caplog, *common, "--test-size", "4000")[1]
    code, _, err, _ = run(capsys, caplog, *common, "--test-size", "100")
    assert code == 2 and "test_size" in err and "200" in err


def test_several_stoppers_and_tasks_have_a_file_each_and_may_divide_the_error(tmp_path, capsys, caplog):
    for i, task in enumerate("ab"):
        write_trace(tmp_path / f"{task}.trace", n=300, seed=i, task=task)
    common = (tmp_path, "-s", "gap", "-s", "softmax:0.9", "--by-task", "--loss", "agreement", "--max-drop", "0.2", "-o")
    _, apart, *_ = run(capsys, caplog, *common, tmp_path / "apart")
    _, joint, *_ = run(capsys, caplog, *common, tmp_path / "joint", "--joint")
    names = ["gap-a", "gap-b", "softmax-0.9-a", "softmax-0.9-b"]
    for folder in ("apart", "joint"):
        assert sorted(p.stem for p in (tmp_path / folder).iterdir()) == names
    assert "each of these 4 promises holds with 95% confidence on its own" in apart and "together with 81%" in apart
    assert "all 4 promises hold" in joint and "error of 0.0125" in joint
    for name in names:
        one, other = (load(tmp_path / folder / f"{name}.stopper") for folder in ("apart", "joint"))
        assert other.info["promise"]["together_with"] == 3 and "together_with" not in one.info["promise"]
        assert other.info["promise"]["tasks"] == [name[-1]] and other.threshold >= one.threshold
        n, lost = other.info["promise"]["documents"], other.info["promise"]["losses"]
        assert binom.cdf(lost, n, 0.2) <= 0.0125
    code, _, err, _ = run(capsys, caplog, tmp_path, "-s", "gap", "-s", "gap", "-o", tmp_path / "twice")
    assert code == 2 and "called gap" in err



def run(capsys, caplog, *arguments):
    caplog.set_level(logging.WARNING)
    caplog.clear()
    code = main.main(["calibrate", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err, caplog.text


def test_too_few_documents_write_a_file_that_never_stops_and_say_how_many_are_needed(tmp_path, capsys, caplog):
    path = write_trace(tmp_path / "a.trace", n=298, gap=np.ones((298, 4)))
    code, out, _, _ = run(capsys, caplog, path, "--stopper", "gap:0.5", "-o", tmp_path / "o")
    assert code == 0 and "never stops" in out and "299" in out
    stopper = load(tmp_path / "o")
    assert stopper.kind == "gap" and not stopper.info["promise"]["stops"]
    assert not (margins(stopper, *recording.read(path)) > 0).any()
    path = write_trace(tmp_path / "b.trace", gap=np.full((299, 4), 0.99), arrays={"top_token": np.full((299, 4), 3)}.items())
    _, out, _, _ = run(capsys, caplog, path, "--stopper", "gap:0.5", "--loss", "agreement", "-o", tmp_path / "o")
    assert "never stops" not in out
    assert (margins(load(tmp_path / "o"), *recording.read(path))[:, :-1] > 0).all()


def test_where_even_the_strictest_loses_too_much_no_number_of_documents_is_named(tmp_path, capsys, caplog):
    top = np.tile([1, 1, 1, 2], (500, 1))
    path = write_trace(tmp_path / "a.trace", gap=np.full((500, 4), 0.99), arrays={"top_token": top}.items())
    _, out, _, _ = run(capsys, caplog, path, "-s", "gap", "--loss", "agreement", "-o", tmp_path / "o")
    assert "never stops" in out and "strictest" in out


def test_calibration_documents_that_were_used_in_fitting_are_warned_about(tmp_path, capsys, caplog):
    train = write_trace(tmp_path / "fit.trace", split="train")
    other = write_trace(tmp_path / "other.trace", seed=1, split="test")
    save(fit.fit_svm([train]), tmp_path / "svm")
    *_, warned = run(capsys, caplog, train, other, "-s", tmp_path / "svm", "-o", tmp_path / "o")
    assert "400 of the 800" in warned and "used in fitting" in warned
    *_, warned = run(capsys, caplog, other, "-s", tmp_path / "svm", "-o", tmp_path / "o")
    assert "fitting" not in warned and "fitted" not in warned
    old = fit.fit_svm([train])
    old.seen = {}
    save(old, tmp_path / "old")
    *_, warned = run(capsys, caplog, other, "-s", tmp_path / "old", "-o", tmp_path / "o")
    assert "does not tell" in warned


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--confidence", "1.5"], ["confidence", "1.5", "between 0 and 1"]),
        (["--confidence", "nan"], ["confidence", "nan"]),
        (["--max-drop", "0"], ["max_drop", "0", "between 0 and 1"]),
        (["--stopper", "fixed:2"], ["stopper", "fixed", "threshold"]),
        (["--stopper", "none"], ["stopper", "none", "threshold"]),
        (["--check_layers", "9"], ["check_layers", "9", "4 blocks"]),
    ],
)
def test_wrong_arguments_are_one_sentence_and_write_nothing(options, words, tmp_path, capsys, caplog):
    path = write_trace(tmp_path / "a.trace")
    code, _, err, _ = run(capsys, caplog, path, "-s", "gap", "-o", tmp_path / "o", *options)
    assert code == 2 and err.count("\n") == 1 and all(word in err for word in words), err
    assert not (tmp_path / "o").exists()


def test_unusable_traces_are_one_sentence(tmp_path):
    def calibrated(path, **options):
        return lambda: calibration.calibrate([path] if not isinstance(path, list) else path, GapStopper(), **options)

    good = write_trace(tmp_path / "good.trace")
    refused(calibrated([]), "traces", "none")
    refused(calibrated(write_trace(tmp_path / "empty.trace", n=0)), "traces", "no decision")
    refused(calibrated(write_trace(tmp_path / "old.trace", version=99)), "traces", "old.trace", "version 99")
    nan = write_trace(tmp_path / "nan.trace", gap=[[0.5, np.nan, 0.5, 0.5]])
    refused(calibrated(nan), "traces", "nan.trace", "NaN")
    refused(calibrated([good, good]), "traces", "second trace")
    refused(calibrated([good, write_trace(tmp_path / "m.trace", model="n", head_hash="g", task="u")]), "traces", "m.trace")
    refused(calibrated(write_trace(tmp_path / "g.trace", gold=np.full(400, -1))), "loss", "gold", "agreement")
    refused(calibrated(good, loss="best"), "loss", "best", "agreement")
    refused(lambda: calibration.calibrate([good], NoStopper()), "stopper", "none")
    refused(lambda: calibration.calibrate([good], FixedStopper(2)), "stopper", "fixed")
