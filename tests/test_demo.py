"""The demo: its data, and what README promises of the model and the stopper that ship."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from lm_eval_adainfer import paths
from lm_eval_adainfer.demo import data

CHANCE = {"sentiment": 1 / 2, "topic": 1 / 4, "odd_one_out": 1 / 4, "fact": 1 / 8, "plural": 0.0, "row": 1 / 6}


@pytest.fixture(scope="module")
def splits():
    return {task: data.load(task) for task in data.TASKS}


def test_no_document_is_in_both_splits_and_none_twice(splits):
    for task, found in splits.items():
        train, test = found["train"]["question"], found["test"]["question"]
        assert len(set(train)) == len(train) and len(set(test)) == len(test), task
        assert not set(train) & set(test), task
        assert len(test) >= 250 and len(train) >= 500, task


def test_facts_of_the_test_split_can_be_known_from_the_train_split(splits):
    """A fact can't be guessed: each one asked in test is told in train, in other words."""
    known = {row["answer"] for row in splits["fact"]["train"]}
    assert {row["answer"] for row in splits["fact"]["test"]} <= known


@pytest.mark.parametrize("task", data.TASKS)
def test_questions_are_one_line_and_answers_are_among_the_choices(task, splits):
    for split in splits[task].values():
        for row in split:
            assert "\n" not in row["question"] and row["answer"] == row["answer"].strip() != ""
            assert not row["choices"] or row["choices"].count(row["answer"]) == 1


def test_answers_follow_the_rules(splits):
    for row in list(splits["row"]["test"])[:50]:
        words = [w.strip(",.?:") for w in row["question"].split()]
        assert row["answer"] in words
    assert [data.plural(w) for w in ("box", "berry", "leaf", "cat")] == ["boxes", "berries", "leaves", "cats"]


def test_every_process_generates_the_same_data():
    code = "from lm_eval_adainfer.demo import data; import hashlib, json, sys\n" \
        "rows = [[list(r.values()) for r in data.load(t)[s]] for t in data.TASKS for s in ('train', 'test')]\n" \
        "print(hashlib.sha256(json.dumps(rows).encode()).hexdigest(), 'torch' in sys.modules)"  # fmt: skip
    outputs = {
        subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, text=True,
                       capture_output=True, check=True).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(outputs) == 1 and outputs.pop().endswith("False\n")


@pytest.fixture(scope="module")
def runs():
    manager = TaskManager(include_path=str(paths.task_configs()), include_defaults=False)
    return {
        stopper: simple_evaluate(
            model="adainfer",
            model_args=f"pretrained=adainfer-demo,dtype=float32,stopper={stopper}",
            tasks=["adainfer_demo"],
            batch_size=16,
            device="cpu",
            bootstrap_iters=0,
            task_manager=manager,
        )["results"]
        for stopper in ("none", "svm")
    }


def test_the_demo_model_is_above_chance_everywhere_and_above_90_percent_somewhere(runs):
    scores = {task: runs["none"][f"adainfer_demo_{task}"]["acc,none"] for task in data.TASKS}
    assert all(scores[task] > CHANCE[task] + 0.15 for task in data.TASKS), scores
    assert max(scores.values()) > 0.9 and min(scores.values()) < 0.85, scores


@pytest.mark.parametrize("task", ["sentiment", "topic"])
def test_the_stopper_prunes_a_fifth_of_the_easy_tasks_at_a_drop_of_at_most_a_point(task, runs):
    dense, early = (runs[s][f"adainfer_demo_{task}"] for s in ("none", "svm"))
    assert early["pruning_ratio,none"] >= 0.2
    assert early["acc,none"] >= dense["acc,none"] - 0.01


def test_harder_tasks_go_deeper(runs):
    """The paper's Observation 2."""
    layers = {task: runs["svm"][f"adainfer_demo_{task}"]["exit_layer,none"] for task in data.TASKS}
    assert max(layers["sentiment"], layers["topic"]) < min(layers["fact"], layers["row"], layers["odd_one_out"])
