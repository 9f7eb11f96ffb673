"""A run says how many of the documents that it evaluates its stopper was fitted or calibrated on."""

from __future__ import annotations

import logging
import math

import pytest
from helpers.models import byte_tokenizer, lm_of, make_model
from helpers.tasks import documents, make_task, our_tasks
from lm_eval import simple_evaluate

from lm_eval_adainfer.fitting import calibration, fit
from lm_eval_adainfer.strategies import files
from lm_eval_adainfer.strategies.rules import GapStopper
from lm_eval_adainfer.traces import recording
from lm_eval_adainfer.traces.splits import split_of

TRAIN, TEST = documents(50, 3), documents(60, 7)


@pytest.fixture(scope="module")
def model():
    return make_model("llama", vocab_size=257, max_position_embeddings=512)


def task(name="toy", training=False):
    return make_task({**({"train": TRAIN} if training else {}), "test": TEST}, name=name)


@pytest.fixture(scope="module")
def stoppers(model, tmp_path_factory):
    """Whether tasks have a training split -> what was done to a stopper -> its file."""
    made = {}
    for training in (False, True):
        folder = tmp_path_factory.mktemp("made")
        lm = lm_of(model, byte_tokenizer(), max_length=500)
        traces = {
            split: recording.trace(lm, {"toy": task(training=training)}, folder / split, split=split, num_fewshot=0)
            for split in ("train", "calibrate", "test")
        }
        fitted = fit.fit_svm(traces["train"])
        both, _ = calibration.calibrate(traces["calibrate"], fitted, max_drop=0.4, loss="agreement")
        rule, _ = calibration.calibrate(traces["calibrate"], GapStopper(), max_drop=0.4, loss="agreement")
        on_test, _ = calibration.calibrate(traces["test"], fitted, max_drop=0.4, loss="agreement")
        named = {"fitted": fitted, "both": both, "rule": rule, "on test": on_test}
        for name, stopper in named.items():
            files.save(stopper, folder / f"{name}.stopper")
        made[training] = {name: str(folder / f"{name}.stopper") for name in named}
    return made


@pytest.fixture
def run(model, caplog):
    """Evaluates tasks with a stopper; gives ``documents_seen`` of the record, and the warnings about it."""

    def evaluate(stopper, *tasks, **how):
        caplog.clear()
        caplog.set_level(logging.WARNING)
        lm = lm_of(model, byte_tokenizer(), stopper=stopper, max_length=500, pilot=0)
        found = simple_evaluate(
            lm, tasks=list(tasks), bootstrap_iters=0, task_manager=our_tasks(), log_samples=False, **how
        )
        warned = [r.getMessage() for r in caplog.records if "fitted or calibrated on" in r.getMessage()]
        return found["config"]["adainfer"].get("documents_seen"), warned

    return evaluate


# what was done -> the splits of an evaluation document of a task without training split that were used for it
USED = {"fitted": {"train"}, "both": {"train", "calibrate"}, "rule": {"calibrate"}, "on test": {"train", "test"}}


def slowly(used, places):
    """How many of these evaluation documents were used, by what they hold."""
    return sum(split_of(TEST[place], False) in used for place in places)


@pytest.mark.parametrize("kind", USED)
@pytest.mark.parametrize("how", [{}, {"limit": 13}, {"limit": 0.3}, {"limit": 500}, {"samples": {"toy": [4, 9, 33, 58]}}], ids=str)
def test_without_a_training_split_used_documents_are_counted(stoppers, run, kind, how):
    limit = how.get("limit", len(TEST))
    places = range(min(len(TEST), math.ceil(limit * len(TEST)) if limit < 1 else limit))
    places = how.get("samples", {}).get("toy", places)
    expected = slowly(USED[kind], places)
    found, warned = run(stoppers[False][kind], task(), **how)
    assert found == {"toy": expected}
    assert [f"({expected} of {len(places)} of toy)" in sentence for sentence in warned] == [True] * (expected > 0)


@pytest.mark.parametrize("kind", ["fitted", "both", "rule"])
def test_with_a_training_split_there_are_none(stoppers, run, kind):
    assert run(stoppers[True][kind], task(training=True)) == ({"toy": 0}, [])


def test_evaluation_documents_that_were_calibrated_on_are_counted_with_a_training_split_too(stoppers, run):
    found, warned = run(stoppers[True]["on test"], task(training=True), limit=20)
    assert found == {"toy": 20} and "(20 of 20 of toy)" in warned[0]


def test_it_is_said_task_by_task_and_of_other_tasks_nothing_is_known(stoppers, run):
    found, (warned,) = run(stoppers[False]["both"], task(), task("other"), limit=20)
    assert found == {"toy": slowly(USED["both"], range(20)), "other": 0} and "other" not in warned


def test_of_a_rule_that_nothing_was_fitted_for_nothing_is_said(run):
    assert run("gap:0.5", task(), limit=5) == (None, [])


@pytest.mark.parametrize("listed", [{"toy/train": "all"}, {"toy/train": [[1], None, 2.5, True]}, {"toy/train": {"1": 2}}])
def test_whatever_a_file_lists_a_run_goes_on(run, listed, tmp_path):
    stopper = GapStopper(0.5)
    stopper.seen = listed
    files.save(stopper, tmp_path / "odd.stopper")
    assert run(str(tmp_path / "odd.stopper"), task(), limit=5) == ({"toy": 0}, [])
