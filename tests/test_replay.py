"""Replay against real runs document by document, against a slow recomputation, and the oracles by hand."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.models import lm_of, make_model, tiny_lm
from helpers.refusals import refused
from helpers.tasks import KINDS, OFFLINE, documents, make_task, our_tasks
from helpers.traces import lens, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lm_eval_adainfer import container
from lm_eval_adainfer.cli import main
from lm_eval_adainfer.fitting import fit
from lm_eval_adainfer.harness import loading
from lm_eval_adainfer.harness.model import AdaInferLM
from lm_eval_adainfer.output import tables
from lm_eval_adainfer.readers.base import Reader
from lm_eval_adainfer.statistics import tango_interval, wilson_interval
from lm_eval_adainfer.strategies import files
from lm_eval_adainfer.strategies.rules import GapStopper, NoStopper
from lm_eval_adainfer.traces import recording, replay
from lm_eval_adainfer.traces.documents import TracedDocuments, exits
from lm_eval_adainfer.traces.plan import Plan

# ------------------------------------------------------------------------------------------------ real runs


def check_against_a_real_run(run, task, trace, spec, **options):
    """Every document whose margins are all beyond 1e-4: the same exit block and the same ``acc``."""
    found = replay.document_margins(replay.parse(spec, trace.n_blocks), trace, **options)
    mine = exits(found)
    answers = run.loglikelihood(task.instances, True)
    real: dict[int, list] = {}
    for request, answer in zip(task.instances, answers, strict=True):
        real.setdefault(request.doc_id, []).append((request, answer))
    assert len(real) == len(trace.doc_ids)
    clear = 0
    for number in range(len(mine)):
        if (np.abs(found[number][~np.isnan(found[number])]) <= 1e-4).any():
            continue
        pairs = real[number]
        assert {a.exit_record.exit_layer for _, a in pairs} == {mine[number]}
        results = [(a[0], a[1]) for _, a in sorted(pairs, key=lambda p: p[0].idx)]
        acc = task.process_results(pairs[0][0].doc, results)["acc"]
        assert trace.right[number, mine[number] - 1] == acc
        if not np.isnan(trace.top1[number, 0]):
            gold = [a for r, a in pairs if r.idx == trace.arrays["gold"][number]]
            assert trace.top1[number, mine[number] - 1] == gold[0].top1
        clear += 1
    return clear, mine


@pytest.fixture(scope="module")
def model():
    return make_model("llama", vocab_size=257, max_position_embeddings=512)


@pytest.mark.parametrize("options", [{}, {"check_layers": "2+4"}, {"min_layer": 3}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_replay_is_the_real_run_of_every_document(kind, options, model, tokenizer, tmp_path):
    task = make_task({"train": documents(3, 2), "test": documents(16, 7)}, **KINDS[kind])
    (path,) = recording.trace(lm_of(model, tokenizer, max_length=400), {"toy": task}, tmp_path, split="test")
    (trace,) = replay.load([path])
    svm = fit.fit_svm([path])
    fixed = "fixed:4"
    for spec in ("none", "gap:0.2", svm, fixed):
        run = lm_of(model, tokenizer, stopper=spec, batch_size=5, max_length=400, **options)
        clear, mine = check_against_a_real_run(run, task, trace, spec, **options)
        assert clear >= 12
        assert spec != fixed or set(mine) == {4}
        assert spec != "none" or set(mine) == {5}


@pytest.mark.parametrize("kind", KINDS)
def test_replay_is_the_real_run_under_every_reader(kind, model, tokenizer, tmp_path):
    task = make_task({"train": documents(3, 2), "test": documents(16, 7)}, **KINDS[kind])
    lm = lm_of(model, tokenizer, max_length=400)
    readers = [lens(lm.anatomy), Reader("copy", 1), Reader("copy", 5), Reader("sim", 3)]
    plan = Plan.of(lm.anatomy, readers, "2+3+4")
    (path,) = recording.trace(lm, {"toy": task}, tmp_path, split="test", plan=plan)
    (whole,) = replay.load([path])
    for reader in readers:
        trace, left = whole.under(reader.name), set()
        for spec in ("gap:0.1", "gap:0.3", fit.fit("svm", [path], reader=reader), "fixed:3"):
            checked = {"check_layers": "2+3+4"} if isinstance(spec, str) else {}  # the fitted one knows its blocks
            run = lm_of(model, tokenizer, stopper=spec, reader=reader, batch_size=5, max_length=400, **checked)
            clear, mine = check_against_a_real_run(run, task, trace, spec, **checked)
            assert clear >= 12
            left |= set(mine)
        assert len(left) > 1


@pytest.mark.parametrize("name", ["sentiment", "fact", "odd_of_six"])
def test_replay_is_the_real_run_of_the_demo_model(name, tmp_path):
    manager = our_tasks()
    task = loading.load_tasks(manager, [f"adainfer_demo_{name}"])[f"adainfer_demo_{name}"]
    options = {"pretrained": "adainfer-demo", "dtype": "float32", "batch_size": 16, "device": "cpu"}
    (path,) = recording.trace(AdaInferLM(**options), {task.config.task: task}, tmp_path, split="test", limit=40)
    (trace,) = replay.load([path])
    for spec, more in [("gap:0.8", {}), ("svm", {}), ("fixed:3", {}), ("none", {}), ("gap:0.8", {"check_layers": "4+8"})]:
        clear, _ = check_against_a_real_run(AdaInferLM(stopper=spec, **options, **more), task, trace, spec, **more)
        assert clear > 35


@pytest.mark.parametrize("name", ["adainfer_sst2", "adainfer_ag_news", "adainfer_word_landmark_country"])
def test_replay_is_the_real_run_of_a_small_real_model(name, shared, hub, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(Path(hub["HF_HOME"]) / "datasets"))
    monkeypatch.setattr(f"datasets.config.{OFFLINE}", True)
    monkeypatch.setenv("ADAINFER_DATA", str(shared / "hf" / "function_vectors"))
    manager = our_tasks()
    task = loading.load_tasks(manager, [name])[name]
    options = {"pretrained": str(shared / "models" / "llama-16x128"), "batch_size": 16, "device": "cpu"}
    lm = AdaInferLM(**options)
    (path,) = recording.trace(lm, {name: task}, tmp_path, num_fewshot=3, split="test", limit=40)
    (trace,) = replay.load([path])
    for spec in ("gap:0.8", "svm", "fixed:3", "none"):
        clear, _ = check_against_a_real_run(AdaInferLM(stopper=spec, **options), task, trace, spec)
        assert clear > 35


def test_accuracy_with_several_right_answers_is_lm_evals(model, tokenizer, tmp_path):
    docs = [{**d, "golds": [0, 2]} for d in documents(8, 3)]
    task = make_task({"train": docs, "test": docs}, doc_to_target="golds")
    (path,) = recording.trace(lm_of(model, tokenizer, max_length=400), {"toy": task}, tmp_path, split="test")
    (trace,) = replay.load([path])
    clear, _ = check_against_a_real_run(lm_of(model, tokenizer, max_length=400), task, trace, "none")
    assert clear == 8 and 0 < trace.right.mean() < 1


# ------------------------------------------------------------------------------------------------ by hand


def slow_exit(trace, arrays, threshold, blocks):
    """doc id -> first block after which the gap of each of its decisions exceeds the threshold."""
    found = {}
    for doc in sorted(set(arrays["doc_id"].tolist())):
        rows = [i for i, d in enumerate(arrays["doc_id"].tolist()) if d == doc]
        stops = [k for k in blocks if all(arrays["features"][i, k - 1, 0] - threshold > 0 for i in rows)]
        found[doc] = stops[0] if stops else trace.n_blocks
    return found


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_evaluation_is_the_slow_count_over_documents(data, tmp_path):
    n_docs, n_blocks, n_requests = (data.draw(st.integers(1, m)) for m in (6, 6, 4))
    contexts = data.draw(st.booleans())  # every choice a context of its own, as in Winogrande
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    order = rng.permutation(n_docs)
    document = np.repeat(order, n_requests) if contexts else order
    n, width = len(document), 1 if contexts else n_requests
    request = np.tile(np.arange(n_requests), n_docs)[:, None] if contexts else np.tile(np.arange(width), (n, 1))
    golds = rng.integers(0, n_requests, n_docs)
    path = write(
        tmp_path / "a.trace", rng.uniform(size=(n, n_blocks, 2)), rng.integers(0, 3, (n, n_blocks)), document,
        rng.integers(-3, 0, (n, n_blocks, width)), request, golds[document],
    )  # fmt: skip
    (trace,) = replay.load([path])
    blocks = sorted(data.draw(st.sets(st.integers(1, n_blocks), min_size=1)))
    threshold = data.draw(st.sampled_from([0.0, 0.3, 0.6, 1.0]))
    stopper = GapStopper(threshold)
    found = replay.document_margins(stopper, trace, check_layers=blocks)
    expected = slow_exit(trace, trace.arrays, np.float32(threshold), [k for k in blocks if k < n_blocks])
    assert dict(zip(trace.doc_ids.tolist(), exits(found).tolist(), strict=True)) == expected

    right = agree = saved_stable = saved_first = 0
    for doc, layer in expected.items():
        rows = [i for i, d in enumerate(document) if d == doc]
        best = []
        for k in range(n_blocks):
            scored = [(trace.arrays["scores"][i, k, c], request[i, c]) for i in rows for c in range(width)]
            top = max(s for s, _ in scored)
            best.append(min(r for s, r in scored if s == top))  # the first of equals
        right += best[layer - 1] == golds[doc]
        agree += best[layer - 1] == best[-1]
        saved_first += n_blocks - 1 - best.index(best[-1])
        stable = n_blocks
        while stable > 1 and best[stable - 2] == best[-1]:
            stable -= 1
        saved_stable += n_blocks - stable
    row = replay.evaluate([trace], [found])
    layers = list(expected.values())
    assert row["documents"] == n_docs
    assert row["acc"] == pytest.approx(right / n_docs) and row["agreement"] == pytest.approx(agree / n_docs)
    assert row["exit_layer"] == pytest.approx(np.mean(layers))
    assert row["exit_layer_var"] == pytest.approx(np.var(layers))
    assert row["pruning_ratio"] == pytest.approx(1 - np.mean(layers) / n_blocks)
    saved = sum(n_blocks - x for x in layers)
    for name, possible in (("of_stable", saved_stable), ("of_first", saved_first)):
        assert row[name] == (pytest.approx(saved / possible) if possible else None)
    eq2 = []
    for doc, layer in expected.items():
        s = np.mean([trace.arrays["prompt_tokens"][i] for i, d in enumerate(document) if d == doc])
        eq2.append((2 * layer * (6 * 8 + s) + 16) / (2 * n_blocks * (6 * 8 + s) + 16))
    assert row["flops_ratio"] == pytest.approx(np.mean(eq2))
    for name in ("acc", "acc_change", "agreement", "exit_layer", "pruning_ratio", "flops_ratio"):
        assert row[f"{name}_low"] <= row[name] + 1e-9 and row[name] <= row[f"{name}_high"] + 1e-9


def test_the_oracles_by_hand(tmp_path):
    choices = [[0, 1, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 1]]
    scores = [[[0.0, -1.0] if c == 0 else [-1.0, 0.0] for c in row] for row in choices]
    path = write(tmp_path / "a.trace", np.zeros((3, 6, 2)), np.zeros((3, 6)), scores=scores)
    (trace,) = replay.load([path])
    left = {
        (name, checked): exits(replay.document_margins(name, trace, check_layers=checked)).tolist()
        for name in replay.ORACLES
        for checked in ("all", "every:3")
    }
    assert left == {
        ("oracle:stable", "all"): [4, 1, 6],
        ("oracle:stable", "every:3"): [6, 3, 6],
        ("oracle:first", "all"): [2, 1, 1],
        ("oracle:first", "every:3"): [6, 3, 6],
    }


@given(answers=st.lists(st.lists(st.integers(0, 2), min_size=5, max_size=5), min_size=1, max_size=8))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_oracles_keep_every_answer_and_first_is_never_deeper(answers, tmp_path):
    path = write(tmp_path / "a.trace", np.zeros((len(answers), 5, 2)), answers, output_type="generate_until")
    (trace,) = replay.load([path])
    rows = {r["stopper"]: r for r in replay.replay([trace], replay.ORACLES)}
    assert all(row["agreement"] == 1 and row["acc"] is None for row in rows.values())
    assert rows["oracle:first"]["exit_layer"] <= rows["oracle:stable"]["exit_layer"]


def test_skipping_the_last_blocks_is_leaving_before_them(tmp_path):
    path = write(tmp_path / "a.trace", np.zeros((2, 6, 2)), np.zeros((2, 6)))
    rows = replay.replay(replay.load([path]), ["shortgpt:last2", "fixed:4"])
    assert [row["exit_layer"] for row in rows] == [4, 4]
    traces = replay.load([path])
    for spec in ("shortgpt:last6", "shortgpt:bi:2", "shortgpt:last0", "shortgpt:"):
        refused(lambda spec=spec: replay.replay(traces, [spec]), "stopper", spec, "lastN")


def test_a_strategy_that_drops_blocks_is_not_taken_for_a_dense_one(tmp_path):
    class Dropping(NoStopper):
        kind = "shortgpt"

    traces = replay.load([write(tmp_path / "a.trace", np.zeros((2, 6, 2)), np.zeros((2, 6)))])
    refused(lambda: replay.replay(traces, [Dropping()]), "stopper", "can't be replayed")


def test_shots_are_told_apart_and_pooled_and_resampled_by_document(tmp_path):
    rng = np.random.default_rng(0)
    for task in ("a", "b"):
        for shots in (0, 5):
            write(tmp_path / f"{task}{shots}.trace", rng.uniform(size=(4, 3, 2)), rng.integers(0, 2, (4, 3)),
                  task=task, num_fewshot=shots)  # fmt: skip
    rows = replay.replay(replay.load(fit.find([tmp_path])), ["gap:0.5"])
    assert [(r["task"], r["shots"], r["documents"], r["distinct_documents"]) for r in rows] == [
        ("a", "0", 4, 4), ("a", "5", 4, 4), ("a", "0/5", 8, 4),
        ("b", "0", 4, 4), ("b", "5", 4, 4), ("b", "0/5", 8, 4), ("pooled", "0/5", 16, 8),
    ]  # fmt: skip
    means = [r["exit_layer"] for r in rows]
    assert means[2] == pytest.approx((means[0] + means[1]) / 2) and means[6] == pytest.approx((means[2] + means[5]) / 2)


def test_intervals_hold_for_a_share_that_is_known():
    """Wilson's interval misses the true share of a binomial at most about as often as it says."""
    rng = np.random.default_rng(0)
    missed = 0
    for count in rng.binomial(60, 0.9, size=2000):
        low, high = wilson_interval(count / 60, 60)
        missed += not low <= 0.9 <= high
    assert missed / 2000 < 0.075
    low, high = wilson_interval(1.0, 40)
    assert 0.9 < low < 0.95 and high == 1.0


def test_a_change_of_no_document_has_a_width_and_what_is_drawn_is_seeded(tmp_path):
    right = np.random.default_rng(0).integers(0, 2, 50)
    scores = np.where(right[:, None, None] == 0, [[[0.0, -1.0]]], [[[-1.0, 0.0]]]).repeat(3, axis=1)
    path = write(tmp_path / "a.trace", np.ones((50, 3, 2)), np.zeros((50, 3)), scores=scores)
    traces = replay.load([path])
    (row,) = replay.replay(traces, ["gap:0.5"])
    none = tango_interval(0, 0, 50)
    assert (row["acc_change"], row["acc_change_low"], row["acc_change_high"]) == (0, none.lower, none.upper)
    assert none.lower < -0.03 and none.upper > 0.03
    assert replay.replay(traces, ["gap:0.5"]) == [row]


def answered(dense, early, repeats=1, task="t"):
    """Documents of two choices that are right or wrong after block 2 (dense) and block 1; ``repeats`` per document."""
    outcomes = np.stack([early, dense], axis=1)
    n = len(outcomes)
    scores = np.where(outcomes[:, :, None], [0.0, -1.0], [-1.0, 0.0])
    arrays = {
        "scores": scores, "request": np.tile([0, 1], (n, 1)), "gold": np.zeros(n, int), "gold_token": np.full(n, -1),
        "top_token": np.zeros((n, 2), int), "prompt_tokens": np.full(n, 9), "doc_id": np.arange(n),
    }  # fmt: skip
    meta = {"n_blocks": 2, "task": task, "split": "test", "output_type": "multiple_choice",
            "hidden_size": 8, "vocab_size": 16}  # fmt: skip
    return [TracedDocuments(Path("t"), {**meta, "num_fewshot": i}, arrays) for i in range(repeats)]


@pytest.mark.parametrize("how", ["one task", "a task at five shots beside another at one"])
def test_the_interval_of_a_change_covers_it(how):
    """Where 1.5 documents in 100 flip, an interval of 95% misses the change about 5 times in 100."""
    rng, missed, runs = np.random.default_rng(0), 0, 300
    lost, won = 0.01, 0.005
    for _ in range(runs):
        traces = []
        for task, n, repeats in [("t", 102, 1)] if how == "one task" else [("t", 60, 5), ("u", 150, 1)]:
            drawn, right = rng.random(n), rng.random(n) < 0.5
            dense, early = right.copy(), right.copy()
            dense[drawn < lost], early[drawn < lost] = True, False
            flips = (drawn >= lost) & (drawn < lost + won)
            dense[flips], early[flips] = False, True
            traces += answered(dense, early, repeats, task=task)
        row = replay.evaluate(traces, [np.tile([1.0, np.nan], (len(t.doc_ids), 1)) for t in traces])
        missed += not row["acc_change_low"] <= won - lost <= row["acc_change_high"]
    assert missed / runs <= 0.08


def test_a_sweep_goes_from_never_to_always_and_holds_the_strategys_own_threshold(tmp_path):
    rng = np.random.default_rng(1)
    path = write(tmp_path / "a.trace", rng.uniform(size=(30, 5, 2)), rng.integers(0, 2, (30, 5)))
    traces = replay.load([path])
    rows = replay.replay(traces, ["gap:0.6"], sweep=True)
    layers = [row["exit_layer"] for row in rows]
    assert layers == sorted(layers, reverse=True) and layers[0] == 5 and layers[-1] == 1
    for row in rows:
        if 0 <= row["threshold"] <= 1:
            (alone,) = replay.replay(traces, [GapStopper(row["threshold"])])
            assert alone["exit_layer"] == pytest.approx(row["exit_layer"], abs=0.04)  # a margin of 0 may round
    own = [row for row in rows if row["threshold"] == 0.6]
    (plain,) = replay.replay(traces, ["gap:0.6"])
    assert len(own) == 1 and {k: v for k, v in own[0].items() if k not in ("threshold", "picked_on")} == plain
    assert [row["picked_on"] for row in rows if row != own[0]] == ["these documents"] * (len(rows) - 1)
    assert own[0]["picked_on"] is None and "picked_on" not in plain
    for spec in ("none", "fixed:2", "oracle:first"):
        refused(lambda spec=spec: replay.replay(traces, [spec], sweep=True), "sweep", spec)


# ------------------------------------------------------------------------------------------------ the command


def test_the_command_prints_every_format_and_says_simulated(tmp_path, capsys):
    rng = np.random.default_rng(1)
    write(tmp_path / "a.trace", rng.uniform(size=(9, 5, 2)), rng.integers(0, 2, (9, 5)))
    out = {}
    for form in tables.FORMATS:
        assert main.main(["replay", str(tmp_path), "-s", "gap:0.5", "-s", "oracle:stable", "--format", form]) == 0
        out[form] = capsys.readouterr().out
        assert "simulated" in out[form]
    rows = json.loads(out["json"])["rows"]
    assert [row["stopper"] for row in rows] == ["gap:0.5", "oracle:stable"]
    for row, again in zip(rows, csv.DictReader(io.StringIO(out["csv"])), strict=True):
        assert float(again["acc"]) == row["acc"] and again["basis"] == "simulated from traces"
        for form in ("table", "markdown"):
            assert f"{100 * row['pruning_ratio']:.1f}" in out[form]


# ------------------------------------------------------------------------------------------------ bad input


def test_unusable_input_is_one_sentence(tmp_path):
    good = write(tmp_path / "good.trace", np.ones((2, 3, 2)), np.zeros((2, 3)))
    empty = write(tmp_path / "empty.trace", np.ones((0, 3, 2)), np.zeros((0, 3)), task="e")
    refused(lambda: replay.load([good, empty]), "traces", "empty.trace", "no decision")
    nan = write(tmp_path / "nan.trace", np.full((2, 3, 2), np.nan), np.zeros((2, 3)), task="n")
    refused(lambda: replay.load([nan]), "traces", "nan.trace", "NaN")
    scores = np.zeros((2, 3, 2))
    scores[1, 1, 1] = np.nan
    nan = write(tmp_path / "nan2.trace", np.ones((2, 3, 2)), np.zeros((2, 3)), scores=scores)
    refused(lambda: replay.load([nan]), "traces", "nan2.trace", "NaN scores")
    other = write(tmp_path / "other.trace", np.ones((2, 3, 2)), np.zeros((2, 3)), task="o", head_hash="x", model="mm")
    refused(lambda: replay.load([good, other]), "traces", "other.trace", "mm", "one model")
    refused(lambda: replay.load([good, good]), "traces", "good.trace", "t at 0 shots")
    refused(lambda: replay.load([good], "train"), "split", "train")
    meta, arrays = recording.read(good)
    container.write(tmp_path / "old.trace", "trace", 1, meta, arrays)
    refused(lambda: replay.load([tmp_path / "old.trace"]), "traces", "old.trace", "version 1", "version 2 or 3")
    for name in ("scores", "doc_id", "request"):
        container.write(tmp_path / "cut.trace", "trace", 2, meta, {k: v for k, v in arrays.items() if k != name})
        refused(lambda name=name: replay.load([tmp_path / "cut.trace"]), "traces", "cut.trace", name)
    traces = replay.load([good])
    refused(lambda: replay.replay(traces, ["cleverest"]), "stopper", "cleverest")
    refused(lambda: replay.replay(traces, ["oracle:last"]), "stopper", "oracle:last", "oracle:stable")
    refused(lambda: replay.replay(traces, ["fixed:9"]), "stopper", "fixed:9", "3 blocks")
    refused(lambda: replay.replay(traces, ["gap:0.5"], check_layers="7"), "check_layers", "7")


def test_the_command_tells_a_mistake_in_one_line(tmp_path, capsys):
    write(tmp_path / "good.trace", np.ones((2, 3, 2)), np.zeros((2, 3)))
    assert main.main(["replay", str(tmp_path), "-s", "nonsense"]) == 2
    assert main.main(["replay", str(tmp_path / "none.trace"), "-s", "gap"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "nonsense" in lines[0] and "none.trace" in lines[1]


def test_a_stopper_that_was_fitted_on_these_documents_is_warned_of(tmp_path, caplog):
    rng = np.random.default_rng(2)
    path = write(tmp_path / "a.trace", rng.uniform(size=(20, 4, 2)), rng.integers(0, 2, (20, 4)))
    test = write(tmp_path / "b.trace", rng.uniform(size=(20, 4, 2)), rng.integers(0, 2, (20, 4)), split="train")
    files.save(fit.fit_svm([path]), tmp_path / "s.stopper")
    replay.replay(replay.load([test]), [str(tmp_path / "s.stopper")])
    assert "fitted on" not in caplog.text
    replay.replay(replay.load([path]), [str(tmp_path / "s.stopper")])
    assert "fitted on this split of t" in caplog.text


# ------------------------------------------------------------------------------------------------ long traces

KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from helpers.models import tiny_lm
from helpers.tasks import documents, make_task
from lm_eval_adainfer import container
from lm_eval_adainfer.traces import recording

write, made = container.write, []
def watched(path, *rest):
    write(path, *rest)
    made.append(path)
    if len(made) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
container.write = watched
recording.PART_DOCUMENTS = 4
lm = tiny_lm()
recording.trace(lm, {"toy": make_task({"train": documents(6, 2), "test": documents(9, 1)})}, sys.argv[2], split="test")
"""


def test_finished_documents_survive_a_kill(tmp_path, monkeypatch, caplog):
    here = Path(__file__).resolve().parent
    done = subprocess.run([sys.executable, "-c", KILLED, str(here), str(tmp_path)], cwd=here, capture_output=True)
    assert done.returncode == -9, done.stderr.decode()[-2000:]
    folder = tmp_path / "toy_0shot_test.trace.parts"
    assert sorted(p.name for p in folder.iterdir()) == ["00000000.part", "00000004.part"]
    refused(lambda: fit.find([tmp_path]), "traces")
    assert "toy_0shot_test.trace is not finished and is left out" in caplog.text

    monkeypatch.setattr(recording, "PART_DOCUMENTS", 4)
    lm, asked = tiny_lm(), []
    loglikelihood = lm.loglikelihood
    monkeypatch.setattr(lm, "loglikelihood", lambda r, **o: asked.extend(i.doc_id for i in r) or loglikelihood(r, **o))
    docs = {"train": documents(6, 2), "test": documents(9, 1)}
    (path,) = recording.trace(lm, {"toy": make_task(docs)}, tmp_path, split="test")
    assert set(asked) == {8}, "eight of nine documents were done"
    assert not folder.exists()
    (whole,) = recording.trace(tiny_lm(), {"toy": make_task(docs)}, tmp_path / "whole", split="test")
    assert path.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("change", [{"limit": 8}, {"fewshot_seed": 7, "num_fewshot": 1}, "damaged"])
def test_parts_of_another_call_or_damaged_ones_are_made_again(change, tmp_path, monkeypatch):
    monkeypatch.setattr(recording, "PART_DOCUMENTS", 4)
    lm = tiny_lm()
    record = recording._record
    calls = []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return record(*arguments)

    shots = {"num_fewshot": 1}
    monkeypatch.setattr(recording, "_record", failing)
    with pytest.raises(KeyboardInterrupt):
        recording.trace(lm, {"toy": make_task()}, tmp_path, **shots)
    monkeypatch.setattr(recording, "_record", record)
    options = shots
    if change == "damaged":
        (part,) = tmp_path.glob("*.parts/*")
        part.write_bytes(part.read_bytes()[:-9])
    else:
        options = {**shots, **change}
    (path,) = recording.trace(lm, {"toy": make_task()}, tmp_path, **options)
    (whole,) = recording.trace(lm, {"toy": make_task()}, tmp_path / "whole", **options)
    assert path.read_bytes() == whole.read_bytes()
    assert not list(tmp_path.glob("*.parts"))


def test_parts_with_unlike_numbers_of_choices_fit_together(tmp_path, monkeypatch):
    docs = [{"question": f"{i}?", "choices": list("abcdefgh")[: i + 2], "answer": i} for i in range(5)]
    lm, arrays = tiny_lm(), []
    for size in (2, 64):
        monkeypatch.setattr(recording, "PART_DOCUMENTS", size)
        (path,) = recording.trace(lm, {"toy": make_task({"train": docs, "test": docs})}, tmp_path / str(size))
        arrays.append(recording.read(path)[1])
    for name in arrays[0]:
        assert arrays[0][name].dtype == arrays[1][name].dtype
        np.testing.assert_allclose(arrays[0][name], arrays[1][name], rtol=1e-5, atol=1e-5)


def test_several_shots_make_a_file_each_as_single_calls_do(tmp_path):
    lm = tiny_lm()
    files = recording.trace(lm, {"toy": make_task()}, tmp_path, num_fewshot=[0, 2, 1], limit=3)
    assert [f.name for f in files] == [f"toy_{n}shot_train.trace" for n in (0, 2, 1)]
    for n, file in zip((0, 2, 1), files, strict=True):
        (alone,) = recording.trace(lm, {"toy": make_task()}, tmp_path / "alone", num_fewshot=n, limit=3)
        assert file.read_bytes() == alone.read_bytes()
    refused(lambda: recording.trace(lm, {"toy": make_task()}, tmp_path, num_fewshot=[1, 1]), "num_fewshot", "twice")
    refused(lambda: recording.trace(lm, {"toy": make_task()}, tmp_path, num_fewshot=[]), "num_fewshot")
    refused(lambda: recording.trace(lm, {"toy": make_task()}, tmp_path, num_fewshot=[0, -1]), "num_fewshot", "-1")


def test_the_command_reads_several_shots(capsys):
    parse = main._parser().parse_args
    common = ["trace", "-a", "x", "-t", "t", "-o", "f"]
    assert parse([*common, "-f", "0,5,10,15,20"]).num_fewshot == [0, 5, 10, 15, 20]
    assert parse([*common, "-f", "3"]).num_fewshot == 3 and parse(common).num_fewshot is None
    with pytest.raises(SystemExit):
        parse([*common, "-f", "few"])
    assert "'few' is no number of shots" in capsys.readouterr().err


def test_generated_text_is_replayed_token_by_token(tmp_path):
    lm = tiny_lm()
    task = make_task(output_type="generate_until", doc_to_choice=None, doc_to_target="{{question}}",
                     generation_kwargs={"until": ["\n"], "max_gen_toks": 4})  # fmt: skip
    (path,) = recording.trace(lm, {"toy": task}, tmp_path, limit=4)
    (trace,) = replay.load([path])
    (row,) = replay.replay([trace], ["gap:0.3"])
    gaps = torch.from_numpy(trace.arrays["features"][:, :, 0]) > 0.3
    layers = [next((k for k in range(1, 5) if stop[k - 1]), 5) for stop in gaps.tolist()]
    assert row["exit_layer"] == pytest.approx(np.mean(layers)) and row["acc"] is None
    assert row["documents"] == len(layers) and row["distinct_documents"] == 4
