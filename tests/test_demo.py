"""What README promises of the demo model and the stopper that ship."""

from __future__ import annotations

import pytest
from helpers.tasks import our_tasks
from lm_eval import simple_evaluate

from lm_eval_adainfer.demo import data

CHANCE = {"sentiment": 1 / 2, "topic": 1 / 4, "odd_one_out": 1 / 4, "fact": 1 / 8, "plural": 0.0, "odd_of_six": 1 / 6}


@pytest.fixture(scope="module")
def runs():
    manager = our_tasks()
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
    assert max(layers["sentiment"], layers["topic"]) < min(layers["fact"], layers["odd_one_out"], layers["odd_of_six"])
