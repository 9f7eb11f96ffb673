"""``benchmarks.stoppers`` and ``benchmarks.promises``: what is drawn, chosen on, and reported on; no figure is judged."""

from __future__ import annotations

import json

import numpy as np
import pytest
from helpers.traces import write, write_random
from scipy.stats import binom

from benchmarks import promises, stoppers
from lm_eval_adainfer.traces import recording
from lm_eval_adainfer.traces.documents import read
from lm_eval_adainfer.traces.file import find
from lm_eval_adainfer.tuning.settings import Settings

FEW = [stoppers.Contestant("head", "gap rule", "gap"),
       stoppers.Contestant("head", "logistic; stable", "logistic", {"label": "stable"})]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    for i, task in enumerate("ab"):
        for j, split in enumerate(("train", "calibrate", "test")):
            write_random(tmp_path / f"{task}_{split}.trace", 150 + 10 * i, seed=10 * i + j, task=task, split=split)
    return tmp_path


def figures(found, threshold):
    """The rows at one kind of threshold, without names."""
    return [row for row in found["rows"] if row["threshold"] == threshold]


def test_every_draw_is_half_of_each_tasks_training_documents(folder, tmp_path):
    training = [trace for trace in read(find([folder])) if trace.meta["split"] == "train"]
    drawn = {}
    for seed in (0, 0, 1):
        about = stoppers.draw(training, seed, tmp_path / "drawn")
        assert about["documents"] == {"a": 75, "b": 80}
        halves = [read(find([tmp_path / "drawn" / half])) for half in ("fit", "ask")]
        for whole, fitted, other in zip(training, *halves, strict=True):
            assert sorted([*fitted.doc_ids, *other.doc_ids]) == whole.doc_ids.tolist()
            for part in (fitted, other):
                keep = np.isin(whole.arrays["doc_id"], part.doc_ids)
                assert np.array_equal(part.arrays["features"], whole.arrays["features"][keep])
        drawn.setdefault(seed, set()).add(about["documents_sha256"])
    assert len(drawn[0]) == 1 and drawn[0] != drawn[1]


def test_thresholds_see_calibration_documents_alone_and_figures_test_documents(folder):
    first = stoppers.measure(folder, 2, FEW)
    write_random(folder / "a_test.trace", 150, seed=77, task="a", split="test")
    other_test = stoppers.measure(folder, 2, FEW)
    for how in ("calibrated", "own"):
        before, after = figures(first, how), figures(other_test, how)
        assert [row["thresholds"] for row in before] == [row["thresholds"] for row in after]
        assert [row["pruned"] for row in before] != [row["pruned"] for row in after]
    write_random(folder / "a_calibrate.trace", 150, seed=78, task="a", split="calibrate")
    other_calibration = stoppers.measure(folder, 2, FEW)
    assert figures(other_calibration, "own") == figures(other_test, "own")
    moved = [row["thresholds"] for found in (other_test, other_calibration) for row in figures(found, "calibrated")]
    assert moved[:2] != moved[2:]


def test_the_gap_rules_threshold_and_figures_against_a_slow_count(folder):
    (row,) = figures(stoppers.measure(folder, 1, FEW[:1]), "calibrated")

    asked = row["check_layers"][0]
    assert asked, "else there is nothing to be seen here"

    def come_to(split, threshold):
        lost, change, pruned = [], [], []
        for trace in read(sorted(folder.glob(f"*_{split}.trace"))):
            gap = trace.arrays["features"][:, :, 0]
            leaves = [next((k for k in asked if gap[d, k - 1] > threshold), 4) for d in range(len(gap))]
            gold, top = trace.arrays["gold_token"], trace.arrays["top_token"]
            pairs = [(top[d, 3] == gold[d], top[d, k - 1] == gold[d]) for d, k in enumerate(leaves)]
            lost.append(np.mean([dense and not early for dense, early in pairs]))
            change.append(np.mean([int(early) - int(dense) for dense, early in pairs]))
            pruned.append(np.mean([1 - k / 4 for k in leaves]))
        return np.mean(lost), 100 * np.mean(change), 100 * np.mean(pruned)

    at = row["thresholds"][0]
    assert come_to("calibrate", at)[0] <= stoppers.MOST_LOST < come_to("calibrate", at - 0.011)[0]
    _, change, pruned = come_to("test", at)
    assert row["acc_change"] == [pytest.approx(change)] and row["pruned"] == [pytest.approx(pruned)]
    low, high = row["acc_change_interval"]
    assert low <= change <= high


def test_the_command_labels_its_tables_and_leaves_out_what_is_not_above_chance(folder, tmp_path, monkeypatch, capsys):
    for split in ("train", "calibrate", "test"):
        write_random(folder / f"c_{split}.trace", 60, task="c", split=split, gold=np.full(60, 51, dtype=np.int32))
    monkeypatch.setattr(stoppers, "CONTESTANTS", FEW)
    stoppers.main([str(folder), "--draws", "2", "-o", str(tmp_path / "out" / "stoppers-m")])
    text = (tmp_path / "out" / "stoppers-m.md").read_text()
    assert "*simulated*" in text.splitlines()[0] and "above chance there: c." in text
    assert "medians over 2 draws" in text
    found = json.loads((tmp_path / "out" / "stoppers-m.json").read_text())
    assert [draw["seed"] for draw in found["draws"]] == [0, 1] and set(found["tasks"]) == {"a", "b"}
    assert text in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ promises


def test_documents_are_drawn_whole_with_replacement(tmp_path):
    generator = np.random.default_rng(0)
    write(tmp_path / "a.trace", generator.uniform(size=(5, 3, 2)), generator.integers(0, 9, (5, 3)),
          document=[0, 0, 1, 2, 2], split="train")  # fmt: skip
    pool = promises.Pool(tmp_path)
    meta, arrays = recording.read(pool.draw(40, np.random.default_rng(1), tmp_path / "drawn", 100)[0])
    of = {i: pool.traces[0].arrays["features"][rows] for i, rows in enumerate(([0, 1], [2], [3, 4]))}
    assert meta["documents"] == 40 and sorted(set(arrays["doc_id"].tolist())) == list(range(100, 140))
    seen = []
    for document in range(100, 140):
        rows = arrays["features"][arrays["doc_id"] == document]
        seen += [i for i, whole in of.items() if np.array_equal(rows, whole)]
    assert len(seen) == 40 and set(seen) == {0, 1, 2}


def test_a_repeats_truth_is_the_loss_on_the_whole_pool(tmp_path):
    for i, task in enumerate("ab"):
        write_random(tmp_path / f"{task}.trace", 300, seed=i, task=task, split="train")
    pool, settings = promises.Pool(tmp_path), Settings(max_drop=0.3, documents=200)
    row = promises.repeat(pool, settings, ("gap",), 3)
    assert row == promises.repeat(pool, settings, ("gap",), 3) and row["name"] == "head gap"
    assert row != promises.repeat(pool, settings, ("gap",), 4)
    lost = {"lost": [], "loosest_lost": []}
    for trace in pool.traces:
        gap, top, gold = trace.arrays["features"][:, :, 0], trace.arrays["top_token"], trace.arrays["gold_token"]
        for name, threshold in (("lost", row["threshold"]), ("loosest_lost", -1.0)):
            leaves = [next((k for k in row["check_layers"] if gap[d, k - 1] > threshold), 4) for d in range(300)]
            lost[name].append(np.mean([top[d, 3] == gold[d] != top[d, k - 1] for d, k in enumerate(leaves)]))
    assert {name: pytest.approx(np.mean(values)) for name, values in lost.items()} == {n: row[n] for n in lost}


def test_broken_promises_are_counted_with_exact_bounds():
    rows = [{"name": None}] * 10 + [
        {"name": "head gap", "lost": 0.03 if i < 9 else 0.01, "loosest_lost": 0.05, "saved": 0.2} for i in range(90)
    ]
    found = promises.summary(rows, Settings(max_drop=0.02))
    assert (found["repeats"], found["recommended"], found["broken"], found["could_be_broken"]) == (100, 90, 9, 90)
    assert found["p"] == pytest.approx(binom.sf(8, 100, 0.05))
    low, high = found["broken_interval"]
    assert binom.sf(8, 100, low) == pytest.approx(0.025) and binom.cdf(9, 100, high) == pytest.approx(0.025)
