"""Documents that belong together: recorded while tracing, taken together by replay and calibrate; pooled intervals."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from helpers.models import lm_of, make_model
from helpers.refusals import refused
from helpers.tasks import documents, make_task
from helpers.traces import write, write_random

from lm_eval_adainfer import bounded, clusters
from lm_eval_adainfer.cli import main
from lm_eval_adainfer.fitting import calibration
from lm_eval_adainfer.statistics import wilson_interval
from lm_eval_adainfer.strategies.rules import GapStopper
from lm_eval_adainfer.traces import clustering, evaluation, recording, replay
from lm_eval_adainfer.traces.documents import TracedDocuments, exits

# ------------------------------------------------------------------------------------------------ recording


@pytest.fixture(scope="module")
def lm(tokenizer):
    return lm_of(make_model("llama", vocab_size=257, max_position_embeddings=512), tokenizer, max_length=400)


def about_passages(n=12):
    return [{**d, "context": f"passage {i // 3}", "title": f"title {i // 6}"} for i, d in enumerate(documents(n, 2))]


def traced(lm, folder, name, **options):
    task = make_task({"train": documents(4, 1), "test": about_passages()}, name=name)
    (path,) = recording.trace(lm, {name: task}, folder, split="test", **options)
    return path, *recording.read(path)


def grouping(numbers):
    return [numbers.tolist().index(x) for x in numbers]


@pytest.mark.parametrize(
    ("name", "said", "field", "each"),
    [
        ("toy", "context", "context", 3),
        ("toy", "toy={{title}}", "{{title}}", 6),
        ("my_squad", None, "context", 3),
        ("my_squad", "title", "title", 6),
        ("toy", None, None, None),
        ("my_race", None, None, None),  # it is known for its articles, but these documents have none
    ],
)
def test_a_trace_tells_which_documents_hold_the_same(lm, tmp_path, name, said, field, each):
    _, meta, arrays = traced(lm, tmp_path, name, cluster=clusters.parse(said))
    assert meta["cluster"] == field
    if field is None:
        assert "cluster" not in arrays
    else:
        assert grouping(arrays["cluster"]) == [i // each * each for i in arrays["doc_id"].tolist()]


def test_the_same_call_keeps_the_file_and_another_field_is_refused(lm, tmp_path):
    path, *_ = traced(lm, tmp_path, "my_squad")
    before = path.read_bytes()
    traced(lm, tmp_path, "my_squad")
    assert path.read_bytes() == before
    refused(lambda: traced(lm, tmp_path, "my_squad", cluster=(("", "title"),)), "output", "cluster", "title")
    refused(lambda: traced(lm, tmp_path / "other", "toy", cluster=(("", "nothing"),)), "cluster", "nothing", "context")
    refused(lambda: traced(lm, tmp_path / "other", "toy", cluster=(("taco", "title"),)), "cluster", "taco", "toy")


def test_the_field_of_a_task_is_its_own_before_a_globs_before_that_of_all():
    wanted = (("", "a"), ("squad*", "b"), ("squadv2", "c"))
    assert [clustering.field_of(wanted, task) for task in ("race", "squad_x", "squadv2")] == ["a", "b", "c"]
    assert clustering.field_of((("squad*", "b"),), "race") is None


# ------------------------------------------------------------------------------------------------ reading


def random_trace(path, n=400, each=4, **meta):
    numbers = np.arange(n) // each
    return write_random(path, n, arrays={"cluster": numbers}.items(), cluster="context", **meta)


def test_calibration_bounds_whole_clusters(tmp_path):
    path = random_trace(tmp_path / "a.trace", 3000)
    plain, alone = calibration.calibrate([path], GapStopper(), max_drop=0.1, loss="agreement")
    stopper, found = calibration.calibrate([path], GapStopper(), 0.1, loss="agreement", cluster=(("", "context"),))
    promise = stopper.info["promise"]
    assert promise["clusters"] == found.seen == 750 and "clusters" not in plain.info["promise"]
    assert found.stops and stopper.threshold >= plain.threshold, "clusters are fewer than documents"
    (trace,) = replay.load([path])
    lost = trace.losses("agreement", exits(replay.document_margins(stopper, trace)))
    assert bounded.gaffke_p(*bounded.by_cluster(lost, None, np.arange(3000) // 4), 0.1) <= 0.05
    assert alone.repeated is not None and "750 of context" in alone.repeated and found.repeated is None


def test_what_was_not_recorded_is_refused_and_what_repeats_is_told(tmp_path, capsys, caplog):
    path, other = random_trace(tmp_path / "a.trace"), write_random(tmp_path / "b.trace", task="squad_b")
    traces = replay.load([path, other])
    refused(lambda: replay.replay(traces, ["gap"], cluster=(("t", "title"),)), "cluster", "'context'", "--cluster t=title")
    refused(lambda: replay.replay(traces, ["gap"], cluster=(("squad_b", "context"),)), "cluster", "does not tell")
    refused(lambda: replay.replay(traces, ["gap"], cluster=(("u", "context"),)), "cluster", "'u'", "squad_b")
    with caplog.at_level(logging.WARNING):
        assert main.main(["replay", str(path), str(other), "-s", "gap"]) == 0
    assert "400 documents, 100 of context" in caplog.text and "squad_b repeats passages" in caplog.text
    caplog.clear()
    assert main.main(["replay", str(path), "-s", "gap", "--cluster", "context"]) == 0
    assert not caplog.text and "whole clusters" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ intervals


def answered(task, right, dense=None, number=None):
    """Documents of two choices that are right or wrong after block 1; and after block 2 (dense)."""
    outcomes = np.stack([right, right if dense is None else dense], axis=1).astype(bool)
    n = len(outcomes)
    arrays = {
        "scores": np.where(outcomes[:, :, None], [0.0, -1.0], [-1.0, 0.0]), "request": np.tile([0, 1], (n, 1)),
        "gold": np.zeros(n, int), "gold_token": np.full(n, -1), "top_token": np.zeros((n, 2), int),
        "prompt_tokens": np.full(n, 9), "doc_id": np.arange(n),
    }  # fmt: skip
    meta = {"n_blocks": 2, "task": task, "split": "test", "output_type": "multiple_choice", "num_fewshot": 0,
            "hidden_size": 8, "vocab_size": 16}  # fmt: skip
    return TracedDocuments(Path("t"), meta, arrays)


def evaluated(traces, stops=None, of=None):
    margins = [np.tile([1.0, np.nan], (len(t.doc_ids), 1)) for t in traces]
    if stops is not None:
        margins = [np.stack([np.where(s, 1.0, -1.0), np.full(len(s), np.nan)], axis=1) for s in stops]
    return evaluation.evaluate(traces, margins, clusters=of)


def test_pooled_intervals_are_within_tasks_they_hold_and_are_narrower():
    """Two tasks of unlike accuracy and depth, of fixed sizes: what differs between tasks is not sampled."""
    rng, runs = np.random.default_rng(0), 200
    sizes, accuracies, depths = (60, 120), (0.15, 0.95), (0.1, 0.9)
    true = sum(n * p for n, p in zip(sizes, accuracies, strict=True)) / 180
    early = sum(n * p for n, p in zip(sizes, depths, strict=True)) / 180
    missed, widths = {"acc": 0, "pruning_ratio": 0}, []
    for _ in range(runs):
        traces = [answered(t, rng.random(n) < p) for t, n, p in zip("ab", sizes, accuracies, strict=True)]
        row = evaluated(traces, [rng.random(n) < p for n, p in zip(sizes, depths, strict=True)])
        missed["acc"] += not row["acc_low"] <= true <= row["acc_high"]
        missed["pruning_ratio"] += not row["pruning_ratio_low"] <= early / 2 <= row["pruning_ratio_high"]
        plain = wilson_interval(np.array(row["acc"]), 180)
        widths.append((row["acc_high"] - row["acc_low"]) / float(plain[1] - plain[0]))
    assert max(missed.values()) / runs <= 0.085, missed
    assert np.mean(widths) < 0.75
    assert (row["tasks"], row["weighs"], row["documents"]) == (2, "documents", 180)


def test_many_tasks_of_a_few_documents_keep_a_width():
    rng = np.random.default_rng(1)
    row = evaluated([answered(f"t{i}", rng.random(2) < 0.7) for i in range(40)])
    assert 0.1 < row["acc_high"] - row["acc_low"] < 0.25
    row = evaluated([answered(f"t{i}", np.ones(1, bool)) for i in range(40)])
    assert row["acc"] == 1 == row["acc_high"] and 0.85 < row["acc_low"] < 0.95
    assert row["exit_layer_low"] == row["exit_layer_high"] == 1


def test_intervals_over_clusters_hold_where_those_over_documents_do_not():
    """60 clusters of 5 documents that are mostly right or wrong together."""
    rng, runs = np.random.default_rng(2), 80
    missed = {of: {"acc": 0, "acc_change": 0, "pruning_ratio": 0} for of in ("clusters", "documents")}
    cluster = np.repeat(np.arange(60), 5)

    def together(share):
        return np.where(rng.random(300) < 0.9, (rng.random(60) < share)[cluster], rng.random(300) < share)

    for _ in range(runs):
        dense, early, stops = together(0.8), together(0.6), together(0.5)
        for of in missed:
            trace = answered("t", early, dense)
            one = evaluated([trace], None, [cluster] if of == "clusters" else None)
            two = evaluated([trace], [stops], [cluster] if of == "clusters" else None)
            missed[of]["acc"] += not one["acc_low"] <= 0.6 <= one["acc_high"]
            missed[of]["acc_change"] += not one["acc_change_low"] <= -0.2 <= one["acc_change_high"]
            missed[of]["pruning_ratio"] += not two["pruning_ratio_low"] <= 0.25 <= two["pruning_ratio_high"]
    assert max(missed["clusters"].values()) / runs <= 0.1, missed
    assert min(missed["documents"].values()) / runs > 0.2, missed


def test_tasks_that_share_a_cluster_are_resampled_together_and_the_others_apart():
    task = np.repeat([0, 1, 2], 30)
    unit = np.concatenate([np.arange(30), np.arange(20, 50), np.arange(50, 80)])
    of = evaluation._strata(task, unit)
    assert len(set(of[:50].tolist())) == 1 and len(set(of[50:].tolist())) == 1 and of[0] != of[50]


def test_a_sweep_says_where_its_thresholds_were_picked(tmp_path, capsys):
    rng = np.random.default_rng(1)
    write(tmp_path / "a.trace", rng.uniform(size=(30, 5, 2)), rng.integers(0, 2, (30, 5)))
    for form in ("table", "markdown", "json", "csv"):
        assert main.main(["replay", str(tmp_path), "-s", "gap:0.6", "--sweep", "--format", form]) == 0
        out = capsys.readouterr().out
        assert "these documents" in out and (form == "csv" or "adainfer calibrate" in out)
        assert main.main(["replay", str(tmp_path), "-s", "gap:0.6", "--format", form]) == 0
        assert "these documents" not in capsys.readouterr().out
