"""A calibrated stopper's promise beside the run: what differs is named in one warning and stands in the record."""

from __future__ import annotations

import logging

import pytest
from helpers.models import byte_tokenizer, lm_of, make_model
from helpers.tasks import documents, make_task, our_tasks
from lm_eval import simple_evaluate

from lm_eval_adainfer.fitting import calibration
from lm_eval_adainfer.harness.asking import Asking
from lm_eval_adainfer.strategies import files
from lm_eval_adainfer.strategies.rules import GapStopper
from lm_eval_adainfer.traces import recording

TEMPLATE = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}<assistant>"
SHOTS = 2
EXACT = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]


@pytest.fixture(scope="module")
def model():
    return make_model("llama", vocab_size=257, max_position_embeddings=512)


@pytest.fixture(scope="module")
def tokenizer():
    found = byte_tokenizer()
    found.chat_template = TEMPLATE
    return found


def task(name="toy", **config):
    return make_task({"train": documents(40, 3), "test": documents(5, 7)}, name=name, num_fewshot=SHOTS, **config)


def texts(name="texts"):
    return task(name, output_type="generate_until", doc_to_choice=None, doc_to_target="{{choices[answer]}}",
                generation_kwargs={"until": ["\n"], "max_gen_toks": 3}, metric_list=EXACT)  # fmt: skip


@pytest.fixture(scope="module")
def calibrated(model, tokenizer, tmp_path_factory):
    """Makes a stopper's file with a promise about tasks, asked in some way."""

    def make(*tasks, asked=None, loss="gold", **options):
        folder = tmp_path_factory.mktemp("calibrated")
        lm = lm_of(model, tokenizer, max_length=500)
        named = {t.config.task: t for t in tasks}
        made = recording.trace(lm, named, folder, split="calibrate", num_fewshot=SHOTS, asked=asked)
        stopper, _ = calibration.calibrate(made, GapStopper(), max_drop=0.4, loss=loss, **options)
        files.save(stopper, folder / "safe.stopper")
        return str(folder / "safe.stopper")

    return make


@pytest.fixture(scope="module")
def usual(calibrated):
    return calibrated(task())


def run(model, tokenizer, stopper, caplog, *tasks, **options):
    """The record of a run, and its warnings about a promise."""
    ours = {name: options.pop(name) for name in list(options) if name in (
        "num_fewshot", "fewshot_random_seed", "apply_chat_template", "fewshot_as_multiturn", "system_instruction",
        "limit",
    )}  # fmt: skip
    caplog.clear()
    caplog.set_level(logging.WARNING)
    lm = lm_of(model, tokenizer, stopper=stopper, max_length=500, pilot=0, **options)
    found = simple_evaluate(
        lm, tasks=list(tasks) or [task()], bootstrap_iters=0, task_manager=our_tasks(), log_samples=False, **ours
    )
    warned = [r.getMessage() for r in caplog.records if "promises" in r.getMessage()]
    return found["config"]["adainfer"], warned


def test_a_run_that_asks_as_the_calibration_documents_were_asked_has_the_promise(model, tokenizer, usual, caplog):
    record, warned = run(model, tokenizer, usual, caplog)
    assert record["promise_applies"] is True and record["promise_differences"] == [] and not warned


def test_without_a_promise_nothing_is_said(model, tokenizer, caplog):
    record, warned = run(model, tokenizer, "gap:0.5", caplog)
    assert "promise_applies" not in record and not warned


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_fewshot": 1}, "1 shots instead of 2"),
        ({"fewshot_random_seed": 5}, "another fewshot_seed than 1234"),
        ({"min_layer": 3}, "min_layer 3 instead of 1"),
        ({"check_layers": "2+4"}, "check_layers that leave 2+4 instead of all"),
        ({"apply_chat_template": True}, "a chat template"),
        ({"system_instruction": "Be brief."}, "system_instruction"),
        ({"tasks": ("toy", "other")}, "not calibrated on (other)"),
        ({"tasks": ("other",)}, "without tasks that were calibrated on (toy)"),
    ],
    ids=str,
)
def test_what_differs_is_named_in_one_warning_and_in_the_record(model, tokenizer, usual, caplog, options, words):
    options = dict(options)
    record, warned = run(model, tokenizer, usual, caplog, *map(task, options.pop("tasks", ())), **options)
    assert record["promise_applies"] is False
    assert len(warned) == 1 and words in warned[0], warned
    assert any(words in difference for difference in record["promise_differences"])


def test_another_reader_is_named_where_it_is_not_refused(model, tokenizer, usual, caplog):
    """A file names its reader, and another one is refused; a strategy in memory may name none."""
    stopper = files.load(usual)
    stopper.reader = None
    record, _ = run(model, tokenizer, stopper, caplog, reader="copy:1", check_layers="1+2+3+4")
    assert record["promise_differences"] == ["reader copy:1 instead of head"]


def test_everything_that_differs_is_in_the_one_warning(model, tokenizer, usual, caplog):
    record, warned = run(model, tokenizer, usual, caplog, num_fewshot=1, min_layer=2, system_instruction="Be brief.")
    assert len(record["promise_differences"]) == 3 and len(warned) == 1
    assert all(difference in warned[0] for difference in record["promise_differences"])


def test_min_layer_and_check_layers_are_told_apart_and_other_words_for_the_same_blocks_are_no_difference(
    model, tokenizer, usual, caplog
):
    record, _ = run(model, tokenizer, usual, caplog, check_layers="1+2+3+4", min_layer=1)
    assert record["promise_applies"]
    record, _ = run(model, tokenizer, usual, caplog, check_layers="1+2+4", min_layer=2)
    assert len(record["promise_differences"]) == 2


def test_another_model_and_other_weights_are_seen(tokenizer, usual, caplog):
    other = make_model("llama", seed=1, vocab_size=257, max_position_embeddings=512)
    record, _ = run(other, tokenizer, usual, caplog)
    assert record["promise_differences"] == ["another model"]


def test_a_chat_template_that_was_calibrated_with_is_expected(model, tokenizer, calibrated, caplog):
    stopper = calibrated(task(), asked=Asking(apply_chat_template=True, system_instruction="Be brief."))
    how = {"apply_chat_template": True, "system_instruction": "Be brief.", "fewshot_as_multiturn": True}
    assert run(model, tokenizer, stopper, caplog, **how)[0]["promise_applies"]
    record, _ = run(model, tokenizer, stopper, caplog, **{**how, "fewshot_as_multiturn": False})
    assert record["promise_differences"] == ["fewshot_as_multiturn False"]
    record, _ = run(model, tokenizer, stopper, caplog)
    assert record["promise_differences"] == ["no chat template", "another system_instruction"]


def test_generated_text_needs_the_exact_cache_and_the_exact_head(model, tokenizer, calibrated, caplog):
    stopper = calibrated(texts(), loss="agreement")
    assert run(model, tokenizer, stopper, caplog, texts())[0]["promise_applies"]
    record, _ = run(model, tokenizer, stopper, caplog, texts(), kv_policy="propagate", head_check="shortlist:4")
    assert record["promise_differences"] == [
        "kv_policy propagate instead of recompute", "head_check shortlist instead of exact",
    ]  # fmt: skip
    record, _ = run(model, tokenizer, stopper, caplog, texts(), head_check="screen:9")
    assert record["promise_differences"] == ["head_check screen instead of exact"]


def test_a_promise_about_a_finite_set_is_not_about_a_part_of_it(model, tokenizer, calibrated, caplog):
    stopper = calibrated(task(), test_size=40)
    assert run(model, tokenizer, stopper, caplog)[0]["promise_applies"]
    record, _ = run(model, tokenizer, stopper, caplog, limit=3)
    assert record["promise_differences"] == ["a part of the 40 documents that it is about"]


@pytest.mark.parametrize(
    "promise",
    [
        {}, {"max_drop": 0.01}, {"checked_blocks": "all"}, {"checked_blocks": [1, "x"], "shots": 3},
        {"checked_blocks": None, "shots": {"toy": "two"}, "fewshot_seed": ["a", None], "thresholds": {}, "reader": 7},
        {"checked_blocks": [1, 2], "min_layer": "x", "shots": {"toy": [2]}, "thresholds": [0.9, "b"]},
    ],
    ids=str,
)  # fmt: skip
def test_whatever_a_file_says_of_its_promise_a_run_goes_on_without_it(model, tokenizer, caplog, promise):
    stopper = GapStopper(0.5)
    stopper.info = {"promise": promise}
    record, warned = run(model, tokenizer, stopper, caplog)
    assert record["promise_applies"] is False and len(warned) == 1
