"""What README and its page promise of the demo model and the stoppers that ship."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from helpers.printed import as_printed, table_below
from helpers.processes import execute
from helpers.tasks import our_tasks, own_names
from lm_eval import simple_evaluate

from lm_eval_adainfer.demo import data
from lm_eval_adainfer.strategies import files

ROOT = Path(__file__).resolve().parents[1]

CHANCE = {"sentiment": 1 / 2, "topic": 1 / 4, "odd_one_out": 1 / 4, "fact": 1 / 8, "plural": 0.0, "odd_of_six": 1 / 6}


@pytest.fixture(scope="module")
def runs():
    manager = our_tasks()
    return {
        stopper: own_names(simple_evaluate(
            model="adainfer",
            model_args=f"pretrained=adainfer-demo,dtype=float32,stopper={stopper}",
            tasks=["adainfer_demo"],
            batch_size=16,
            device="cpu",
            bootstrap_iters=0,
            task_manager=manager,
        ))["results"]
        for stopper in ("none", "svm", "demo")
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


def of(runs, stopper, task):
    """Metric to value; ``all`` is the group's."""
    name = "adainfer_demo" if task == "all" else f"adainfer_demo_{task.strip('`')}"
    return {key.split(",")[0]: value for key, value in runs[stopper][name].items()}


def test_the_stopper_of_the_demo_loses_little_and_saves_half(runs):
    dense, early = (of(runs, stopper, "all") for stopper in ("none", "demo"))
    assert early["acc"] >= dense["acc"] - 0.01, "which is its promise"
    assert early["flops_ratio_total"] <= 0.5


def test_the_table_of_the_readme(runs):
    rows = table_below(ROOT / "README.md", "| task | `acc`")
    assert {row[0].strip("`") for row in rows} == {*CHANCE, "all"}
    for task, dense, acc, blocks, saved in rows:
        early = of(runs, "demo", task)
        assert as_printed(dense, of(runs, "none", task)["acc"]) and as_printed(acc, early["acc"]), task
        assert as_printed(blocks, early["layers_run"]) and as_printed(saved, 1 - early["flops_ratio_total"]), task


def test_the_table_of_the_page(runs):
    rows = table_below(ROOT / "docs" / "demo-model.md", "| task |")
    assert {row[0].strip("`") for row in rows} == set(CHANCE)
    for task, _, dense, acc, work, svm_acc, svm_layer, svm_work in rows:
        demo, svm = (of(runs, stopper, task) for stopper in ("demo", "svm"))
        assert as_printed(dense, of(runs, "none", task)["acc"]), task
        assert as_printed(acc, demo["acc"]) and as_printed(work, demo["flops_ratio_total"]), (task, demo)
        assert as_printed(svm_acc, svm["acc"]) and as_printed(svm_layer, svm["exit_layer"]), (task, svm)
        assert as_printed(svm_work, svm["flops_ratio_total"]), (task, svm)


def test_a_run_of_the_demo_keeps_to_the_promise_and_sees_fresh_documents(caplog):
    caplog.set_level(logging.WARNING)
    found = simple_evaluate(
        model="adainfer", model_args="pretrained=adainfer-demo,dtype=float32,stopper=demo,pilot=0",
        tasks=["adainfer_demo"], limit=2, batch_size=16, device="cpu", bootstrap_iters=0, task_manager=our_tasks(),
    )["config"]["adainfer"]  # fmt: skip
    assert found["promise_applies"] and set(found["documents_seen"].values()) == {0}
    assert found["reader"] == "copy:1" and found["checked_blocks"] == files.load(files.built_in()["demo"]).info["check_layers"]
    said = " ".join(record.getMessage() for record in caplog.records)
    assert "promises" not in said and "fitted or calibrated" not in said


@pytest.mark.slow
def test_the_command_of_the_page_makes_the_stopper_that_ships(tmp_path, monkeypatch, only_our_tasks):
    page = (ROOT / "docs" / "demo-model.md").read_text()
    (command,) = [line for line in page.splitlines() if line.startswith("adainfer tune ")]
    assert command.endswith(" -o tuned/")
    monkeypatch.chdir(tmp_path)
    assert execute(command, monkeypatch) == 0
    made, ships = files.load("tuned/tuned.stopper"), files.load(files.built_in()["demo"])
    assert made.describe() == ships.describe() and made.info["promise"] == ships.info["promise"]
    assert (made.info["check_layers"], made.reader.name) == (ships.info["check_layers"], ships.reader.name)
    assert (made.seen, made.calibrated) == (ships.seen, ships.calibrated)
