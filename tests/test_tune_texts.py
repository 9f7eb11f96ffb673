"""``adainfer tune`` for generated texts: the promise stands on real runs, and what is simulated is what a run does."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import lm_eval
import numpy as np
import pytest
from helpers.interruptions import InterruptAt
from helpers.models import lm_of, make_model
from helpers.refusals import refused
from helpers.tasks import documents, make_task, our_tasks
from helpers.traces import write
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from lm_eval_adainfer import bounded
from lm_eval_adainfer.cli import main
from lm_eval_adainfer.harness import loading
from lm_eval_adainfer.harness.asking import Asking
from lm_eval_adainfer.readers.base import HEAD
from lm_eval_adainfer.readers.specs import parse
from lm_eval_adainfer.strategies.files import load
from lm_eval_adainfer.strategies.rules import GapStopper
from lm_eval_adainfer.traces import recording
from lm_eval_adainfer.traces.documents import TracedDocuments, read
from lm_eval_adainfer.traces.plan import Plan
from lm_eval_adainfer.traces.splits import documents_of
from lm_eval_adainfer.traces.texts import PROMPTS as PROMPT_TRACE
from lm_eval_adainfer.traces.texts import TOKENS as TOKEN_TRACE
from lm_eval_adainfer.traces.texts import trace_texts
from lm_eval_adainfer.tuning import contestants, real, text_contestants
from lm_eval_adainfer.tuning.allowance import Allowance
from lm_eval_adainfer.tuning.generated import TextTuning, tuning_of
from lm_eval_adainfer.tuning.runs import Exits, Runs, losses
from lm_eval_adainfer.tuning.search import left, lost_by, search
from lm_eval_adainfer.tuning.settings import Settings
from lm_eval_adainfer.tuning.text_work import TokenWork
from lm_eval_adainfer.tuning.tune import RESULT, STOPPER, Tuning

TASK = "adainfer_demo_fact_generate"
PROMPTS = Settings(max_drop=0.15, documents=40, loss="agreement", readers=("copy:1",))
TOKENS = Settings(max_drop=0.15, documents=40, loss="gold", readers=())


def tuning(folder, wanted, on_forward=None):
    lm = loading.load_model("pretrained=adainfer-demo,dtype=float32", "cpu", batch_size=16)
    if on_forward is not None:
        lm.anatomy.blocks[0].register_forward_pre_hook(lambda *_: on_forward())
    return TextTuning(lm, loading.load_tasks(our_tasks(), [TASK]), folder, wanted)


@pytest.fixture(scope="module", autouse=True)
def small_and_quick():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recording, "PART_DOCUMENTS", 16)
        patch.setattr(contestants, "KINDS", ("gap", "logistic"))
        patch.setattr(text_contestants, "TOKEN_KINDS", ("gap", "logistic"))
        yield


@pytest.fixture(scope="module")
def of_prompts(tmp_path_factory):
    """A finished command's folder, what tuned, what came of it, and how many forwards were made."""
    folder, forwards = tmp_path_factory.mktemp("prompts"), []
    made = tuning(folder, PROMPTS, lambda: forwards.append(1))
    return folder, made, made.run(), len(forwards)


@pytest.fixture(scope="module")
def of_tokens(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    made = tuning(folder, TOKENS)
    return folder, made, made.run()


@pytest.fixture
def again(of_tokens, tmp_path):
    """A copy of a finished folder."""
    return shutil.copytree(of_tokens[0], tmp_path / "again")


# ------------------------------------------------------------------------------------------------ the promise


@pytest.mark.parametrize("which", ["of_prompts", "of_tokens"])
def test_losses_are_those_of_texts_that_are_generated_one_by_one(which, request):
    folder, made, tuned, *_ = request.getfixturevalue(which)
    chosen, wanted = tuned.found["chosen"], made.settings
    stopper = load(folder / STOPPER)
    assert stopper.reader.name == chosen["reader"] and stopper.info["promise"] == chosen["promise"]
    (documents,) = made._runs.documents("calibrate", dict.fromkeys(made.tasks, 40))
    args = f"pretrained=adainfer-demo,dtype=float32,stopper={folder / STOPPER},kv_policy={chosen['kv_policy']}"
    args += f",check_layers={'+'.join(map(str, chosen['check_layers']))}"
    early = loading.load_model(args, "cpu", batch_size=1)
    dense = loading.load_model("pretrained=adainfer-demo,dtype=float32", "cpu", batch_size=1)
    lost = 0
    for instance in documents.instances:
        (a,), (b,) = (lm.generate_until([instance], disable_tqdm=True) for lm in (dense, early))
        gold = documents.task.doc_to_target(instance.doc)
        lost += a != b if wanted.loss == "agreement" else a.strip() == gold and b.strip() != gold
    promise = chosen["promise"]
    assert lost == promise["losses"] and promise["documents"] == 40
    assert binom.cdf(lost, 40, wanted.max_drop) <= 0.05 / tuned.found["calibration"]["error_divided_by"]


@pytest.mark.parametrize("which", ["of_prompts", "of_tokens"])
def test_thresholds_are_tested_from_the_strictest_on_until_one_fails(which, request):
    _, made, tuned, *_ = request.getfixturevalue(which)
    for candidate in tuned.found["candidates"]:
        rungs, level = candidate["rungs"], 1 - candidate["confidence"]
        assert rungs
        assert [rung["threshold"] for rung in rungs] == sorted({rung["threshold"] for rung in rungs}, reverse=True)
        for rung in rungs:
            assert rung["p"] == pytest.approx(binom.cdf(rung["losses"], 40, made.settings.max_drop))
            assert rung["passed"] == (rung["p"] <= level)
        assert all(rung["passed"] for rung in rungs[:-1]), "nothing is tested behind one that failed"
        passed = [rung["threshold"] for rung in rungs if rung["passed"]]
        assert candidate["threshold"] == (passed[-1] if passed else None)


def test_figures_of_test_documents_are_those_of_their_runs(of_tokens):
    folder, _, tuned = of_tokens
    found, rows = tuned.found["test"], []
    for path in folder.glob("runs/test_*/*.json"):
        part = json.loads(path.read_text())
        rows += [(part["identity"]["tokens"], row) for row in part["rows"]]
    early = [row for is_dense, row in rows if not is_dense]
    dense = [row for is_dense, row in rows if is_dense]
    assert len(early) == len(dense) == found["documents"] == 40
    saved = 1 - sum(row["flops"] for row in early) / sum(row["flops_dense"] for row in early)
    assert found["saved"] == pytest.approx(saved) and found["saved_low"] <= saved <= found["saved_high"]
    same = sum(sorted(row["text"] for row in early).count(text) > 0 for text in {row["text"] for row in dense})
    assert same > 1, "else texts tell nothing here"
    (row,) = found["rows"]
    assert row["metric"] == "exact_match" and row["acc"] - row["acc_change"] <= 1
    assert len(tuned.exits[TASK]) == sum(len(row["layers"]) for row in early)


def test_splits_share_no_document(of_tokens):
    _, made, _ = of_tokens
    of = dict.fromkeys(made.tasks, 40)
    train, calibrate, test = ({i.args[0] for i in made._runs.documents(split, of)[0].instances}
                              for split in ("train", "calibrate", "test"))  # fmt: skip
    assert not train & calibrate and not (train | calibrate) & test


# ------------------------------------------------------------------------------------------------ what is simulated


@pytest.mark.parametrize("which", ["of_prompts", "of_tokens"])
@pytest.mark.parametrize("threshold", [0.3, 0.95])
def test_what_is_simulated_is_what_a_run_does_to_the_same_documents(which, threshold, request):
    """Greedy texts: whether one differs is known exactly; attention's pairs are left out of the simulated work."""
    _, made, tuned, *_ = request.getfixturevalue(which)
    dense = made._runs.run("train", dict.fromkeys(made.tasks, 40))
    seen = set()
    for rival in tuned.contestants:
        if rival.kind != "gap" or rival.exits in seen or not rival.choice.blocks:
            continue
        seen.add(rival.exits)
        stopper = real.at(GapStopper(0.5), rival, threshold)
        early = made._runs.run("train", dict.fromkeys(made.tasks, 40), Exits(stopper, rival.choice.blocks, rival.kv_policy))
        exits = left(rival.scores, rival.choice.blocks, threshold)
        differs = lost_by((rival.lost > 0).astype(float), exits, rival.text)
        found = losses(dense, early, "agreement")
        if made.settings.loss == "gold":  # documents that are wrong anyway lose nothing
            found = found * np.concatenate([ran.scores()[1] for ran in dense])
        assert found.sum() > 0 or threshold > 0.3 or rival.exits == "prompt"
        np.testing.assert_array_equal(differs, found)
        assert real.saved(early) == pytest.approx(1 - rival.work.ratio(exits, rival.choice.blocks), abs=0.03)
    assert seen


@pytest.mark.parametrize("reader", ["head", "copy:2"])
def test_texts_differ_where_a_trace_says_so(reader, tiny, tokenizer, tmp_path):
    """Of a random model, whose texts change with nearly every exit."""
    lm = lm_of(tiny, tokenizer, max_length=200, batch_size=4)
    task = generating({"train": documents(40, 1), "test": documents(4, 2)})
    wanted, blocks, every = parse(reader), (1, 3, 4), tuple(range(1, 6))
    runs = Runs(lm, {"toy": task}, tmp_path, TOKENS, Asking())
    (dense,) = runs.run("train", {"toy": 40})
    of, what = dense.documents, PROMPT_TRACE if wanted.runs_tokens else TOKEN_TRACE
    plan = Plan(lm.anatomy, ((HEAD, every), *([(wanted, blocks)] if wanted.runs_tokens else [])))
    identity = {"task": "toy", "num_fewshot": 0, "split": "train"}
    path = trace_texts(lm, what, plan, of.instances, dense.tokens, of.doc_ids, tmp_path / "a.trace", identity)
    view = read([path], wanted.name)[0]
    assert sorted(set(view.doc_ids.tolist())) == sorted(of.doc_ids)
    gap = view.arrays["features"][:, :, view.meta["features"].index("gap")]
    counts = set()
    for threshold in np.quantile(gap[:, 2], [0.31, 0.72, 0.93]).tolist():  # between two scores
        stopper = GapStopper(threshold)
        stopper.reader = wanted
        policy = "propagate" if wanted.runs_tokens else "recompute"
        (early,) = runs.run("train", {"toy": 40}, Exits(stopper, blocks, policy))
        lost = dict.fromkeys(of.doc_ids, False)
        for d, i in enumerate(view.doc_ids.tolist()):
            at = next((k for k in blocks if gap[d, k - 1] > threshold), 5)
            kept = view.arrays["greedy"][d, at - 1, 0] if wanted.runs_tokens else (
                view.arrays["top_token"][d, at - 1] == view.arrays["top_token"][d, -1]
            )
            lost[i] |= not kept
        pairs = zip(of.doc_ids, dense.texts, early.texts, strict=True)
        differs = {i: a != b for i, a, b in pairs}  # tokens that are no Unicode all read alike, so some do not
        assert all(lost[i] for i in of.doc_ids if differs[i])
        counts.add(sum(differs.values()))
    assert max(counts) > min(counts)
    assert trace_texts(lm, what, plan, of.instances, dense.tokens, of.doc_ids, path, identity) == path


def test_the_ladder_climbs(of_prompts):
    for rival in of_prompts[2].contestants:
        if not rival.choice.blocks:
            continue
        thresholds = rival.ladder(0.1)
        assert 1 <= len(thresholds) <= 6
        assert thresholds == sorted(set(thresholds), reverse=True)
        exits = [left(rival.scores, rival.choice.blocks, t) for t in thresholds]
        assert all(not np.array_equal(a, b) for a, b in itertools.pairwise(exits))
        assert all(rival.work.ratio(of, rival.choice.blocks) < 1 for of in exits)


@given(seed=st.integers(0, 500), recompute=st.booleans())
@settings(max_examples=30, deadline=None)
def test_work_of_tokens_against_a_slow_count(tmp_path_factory, seed, recompute):
    draw = np.random.default_rng(seed)
    sizes = draw.integers(1, 5, 3)
    position = np.concatenate([np.arange(n) for n in sizes])
    document = np.repeat(np.arange(3), sizes)
    n, weights, stored = len(position), [100, 200, 300], [30, 20, 10]
    path = write(
        tmp_path_factory.mktemp("t") / "a.trace", draw.uniform(size=(n, 3, 2)), draw.integers(0, 9, (n, 3)),
        document=document, block_weights=weights, output_type="generate_until",
    )  # fmt: skip
    meta, arrays = recording.read(path)
    prompts = draw.integers(3, 9, 3)
    arrays["position"], arrays["prompt_tokens"] = position.astype(np.int32), prompts[document] + position
    view = TracedDocuments(path, meta, arrays)
    work = TokenWork.of_tokens([view], HEAD, GapStopper(0.5), None if recompute else stored)
    exits, asked, head = draw.integers(1, 4, n), (1, 2), meta["hidden_size"] * meta["vocab_size"]
    total = dense = 0.0
    for text in range(3):
        mine = exits[document == text].tolist()
        total += (prompts[text] - 1) * sum(weights[: max(mine)])
        dense += (prompts[text] - 1) * sum(weights)
        for j, k in enumerate(mine):
            behind = range(k, max(mine[j:]))
            total += sum(weights[:k]) + sum((weights if recompute else stored)[b] for b in behind)
            total += sum(head + GapStopper(0.5).flops / 2 for b in asked if b <= k) + (head if k == 3 else 0)
            dense += sum(weights) + head
    assert work.dense.sum() == pytest.approx(dense)
    assert work.at(exits, asked).sum() == pytest.approx(total)


@given(seed=st.integers(0, 500))
@settings(max_examples=20, deadline=None)
def test_a_text_is_lost_with_any_of_its_tokens(seed):
    draw = np.random.default_rng(seed)
    text = np.sort(draw.integers(0, 4, 12))
    text = np.unique(text, return_inverse=True)[1]
    lost, exits = (draw.uniform(size=(12, 3)) < 0.3).astype(float), draw.integers(1, 4, 12)
    slow = [max(lost[i, exits[i] - 1] for i in range(12) if text[i] == t) for t in range(text.max() + 1)]
    assert lost_by(lost, exits, text).tolist() == slow
    scores = draw.uniform(size=(12, 3))
    scores[:, 2], lost[:, 2] = np.nan, 0
    work = TokenWork(np.tile(np.arange(4.0), (12, 1)), np.full((12, 3), 0.1), np.full(12, 0.1), True, text,
                     np.full(text.max() + 1, 3.0), np.arange(4.0))  # fmt: skip
    found = search(scores, lost, work, Allowance(1, 0.25, 0.95), calibrates=False, text=text)
    assert lost_by(lost, found.exit_layer, text).mean() == pytest.approx(found.lost) and found.lost <= 0.25


# ------------------------------------------------------------------------------------------------ losses


def ran(texts, scores):
    return SimpleNamespace(texts=texts, scores=lambda: ("f1", np.array(scores)), documents=SimpleNamespace(name="t"))


def test_losses_by_text_and_by_metric():
    dense, early = ran(list("abcd"), [1.0, 0.5, 0.0, 0.25]), ran(list("abxy"), [1.0, 0.0, 1.0, 0.25])
    assert losses([dense], [early], "agreement").tolist() == [0, 0, 1, 1]
    assert losses([dense], [early], "gold").tolist() == [0, 0.5, 0, 0]
    assert losses([dense], [early], "accuracy").tolist() == [0, 0.5, -1, 0]


def test_metrics_that_are_no_share_are_refused():
    one = ran(["a"], [37.5])
    assert "f1 of t is 37.5" in refused(lambda: losses([one], [one], "gold"))
    nothing = ran(["a"], [np.nan])
    nothing.scores = lambda: (None, np.array([np.nan]))
    assert "--loss agreement" in refused(lambda: losses([nothing], [nothing], "gold"))
    assert losses([nothing], [nothing], "agreement").tolist() == [0]


def test_losses_between_0_and_1_are_bounded_by_gaffke():
    whole, part = np.array([1.0] + [0.0] * 59), np.array([0.5] + [0.0] * 59)
    assert real.risk_of(whole, 0.1, "gold").p(whole) == pytest.approx(binom.cdf(1, 60, 0.1))
    assert real.risk_of(part, 0.1, "gold").p(part) == pytest.approx(bounded.gaffke_p(part, np.ones(60), 0.1))


# ------------------------------------------------------------------------------------------------ one folder


def test_the_time_that_is_left_is_that_of_the_documents_that_there_are(tmp_path):
    """However many were asked for: about twelve dense passes over a document, two of them over test documents."""
    made, said = tuning(tmp_path, replace(TOKENS, documents=10**6)), []

    def stopped_at_once(step, what, seconds=0.0):
        said.append(what)
        raise KeyboardInterrupt

    made._say = stopped_at_once
    with pytest.raises(KeyboardInterrupt):
        made.run()
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(json.loads(plan.read_text()) | {"seconds": 6.0}))
    with pytest.raises(KeyboardInterrupt):
        made.run()
    held = {}
    for split in ("train", "calibrate", "test"):
        with documents_of(made.tasks[TASK], TASK, split, None, 0, 0) as doc_ids:
            held[split] = len(doc_ids)
    assert max(held.values()) < 10**5 and len(set(held.values())) > 1
    minutes = (2 * held["train"] + 8 * held["calibrate"] + 2 * held["test"]) / 10
    assert said[1].endswith(f"at most about {minutes:.1f} minutes more")


@pytest.mark.parametrize("moment", [0.6])
def test_an_interrupted_command_goes_on_to_the_same_recommendation(of_prompts, tmp_path, moment):
    interrupt = InterruptAt(round(moment * of_prompts[3]))
    with pytest.raises(KeyboardInterrupt):
        tuning(tmp_path, PROMPTS, interrupt).run()
    assert not (tmp_path / RESULT).exists()
    again = InterruptAt(0)  # which never comes
    tuning(tmp_path, PROMPTS, again).run()
    assert again.calls < of_prompts[3]
    for name in (RESULT, STOPPER):
        assert (tmp_path / name).read_bytes() == (of_prompts[0] / name).read_bytes()


def spoil(folder, split):
    """Change the texts of a split's early runs."""
    for path in folder.glob(f"runs/{split}_*/*.json"):
        part = json.loads(path.read_text())
        if not part["identity"]["tokens"]:
            for row in part["rows"][::2]:
                row["text"] = "?"
            path.write_text(json.dumps(part))


def test_the_choice_sees_no_calibration_and_no_test_document(of_tokens, again):
    before = of_tokens[2].found
    spoil(again, "test")
    after = tuning(again, TOKENS).run().found
    assert after["chosen"] == before["chosen"] and after["candidates"] == before["candidates"]
    assert after["test"]["lost"] > before["test"]["lost"]
    spoil(again, "calibrate")
    last = tuning(again, TOKENS).run().found
    assert last["contestants"] == before["contestants"] and last["candidates"][0]["losses"] is None
    assert "chosen" not in last and not (again / STOPPER).exists()


# ------------------------------------------------------------------------------------------------ refusals


def generating(splits=None, **config):
    return make_task(
        splits, output_type="generate_until", doc_to_choice=None, doc_to_target="{{choices[answer]}}",
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        **{"generation_kwargs": {"until": ["\n"], "max_gen_toks": 4}, **config},
    )  # fmt: skip


def test_tasks_of_both_kinds_are_refused_together():
    texts, choices = (SimpleNamespace(OUTPUT_TYPE=kind) for kind in ("generate_until", "multiple_choice"))
    assert tuning_of({"a": texts}) is TextTuning and tuning_of({"a": choices}) is Tuning
    both = {"a": texts, "b": choices}
    error = refused(lambda: tuning_of(both)(None, both, "x", TOKENS))
    assert "a is a generate_until task" in error and "alone" in error


@pytest.mark.parametrize("config, words", [
    ({"repeats": 2}, "several texts"),
    ({"generation_kwargs": {"until": ["\n"], "do_sample": True, "max_gen_toks": 4}}, "do_sample=False"),
])  # fmt: skip
def test_texts_that_are_drawn_are_refused(config, words, tiny, tokenizer, tmp_path):
    runs = Runs(lm_of(tiny, tokenizer, max_length=200), {"toy": generating(**config)}, tmp_path, TOKENS, Asking())
    assert words in refused(lambda: runs.run("train", {"toy": 4}))


def test_weights_are_read_once_for_a_run_and_again_for_the_next(tiny, tokenizer, tmp_path, monkeypatch):
    """However many parts it is kept in; a model that was changed in between is another one."""
    lm, read = lm_of(make_model("llama", vocab_size=257, max_position_embeddings=512), tokenizer, max_length=200), []
    monkeypatch.setattr(recording, "PART_DOCUMENTS", 1)
    whole = type(lm.anatomy).weights_hash
    monkeypatch.setattr(lm.anatomy, "weights_hash", lambda *given: read.append(1) or whole(lm.anatomy, *given))

    def texts():
        return Runs(lm, {"toy": generating()}, tmp_path, TOKENS, Asking()).run("train", {"toy": 4})[0].texts

    first = texts()
    assert len(read) == 1 and len(list(tmp_path.glob("*/*.json"))) == 4
    lm.model.get_output_embeddings().weight.data.neg_()
    second = texts()
    assert len(read) == 2 and len(list(tmp_path.glob("*/*.json"))) == 8 and first != second


@pytest.fixture(scope="module")
def tiny():
    return make_model("llama", vocab_size=257, max_position_embeddings=512)


def test_another_way_of_answering_for_a_while_leaves_the_model_as_it_was(tiny, tokenizer, tmp_path):
    lm = lm_of(tiny, tokenizer, max_length=200, batch_size=2)
    runs = Runs(lm, {"toy": generating()}, tmp_path, TOKENS, Asking())
    before, totals = lm.fingerprint, lm.totals()
    first = runs.run("train", {"toy": 4})
    between = lm.totals()
    early = runs.run("train", {"toy": 4}, Exits(GapStopper(0.0), (1, 2), "propagate"))
    assert lm.fingerprint == before and lm.stopper.kind == "none" and lm.generation == "dense"
    assert lm.totals() == between and totals != between
    assert {k for found in early for layers in found.layers for k in layers} == {1}
    fresh = Runs(lm, {"toy": generating()}, tmp_path / "fresh", TOKENS, Asking()).run("train", {"toy": 4})
    assert [found.texts for found in fresh] == [found.texts for found in first]


# ------------------------------------------------------------------------------------------------ the command


def test_the_command_writes_a_page_and_prints_a_command_whose_promise_applies(
    of_tokens, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(loading, "task_manager", lambda *_, **__: our_tasks())
    out = tmp_path / "out"
    arguments = ["tune", "-a", "pretrained=adainfer-demo,dtype=float32", "-t", TASK, "--max-drop", "0.15", "-n", "40"]
    arguments += ["--loss", "gold", "--readers", "", "-b", "16", "--device", "cpu", "-o", str(out)]
    assert main.main(arguments) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    found = json.loads((out / RESULT).read_text())
    assert found["test"] == json.loads(json.dumps(of_tokens[2].found["test"]))
    said = "\n".join(lines)
    assert len(lines) <= 15 and "generated dense and early" in said and "new tokens leave" in said
    blocks, policy = "+".join(map(str, found["chosen"]["check_layers"])), found["chosen"]["kv_policy"]
    end = f"stopper={out / STOPPER},check_layers={blocks},kv_policy={policy}"
    assert f"--model_args pretrained=adainfer-demo,dtype=float32,{end} --tasks {TASK}" in lines[-1]
    page = (out / "index.html").read_text()
    assert found["chosen"]["name"] in page and "really generated" in page
    assert (out / "frontier.svg").exists() and (out / "exit_layers.svg").exists()


@pytest.mark.parametrize("which", ["of_prompts", "of_tokens"])
def test_auto_runs_what_was_tuned_and_its_promise_applies(which, request):
    folder, _, tuned, *_ = request.getfixturevalue(which)
    chosen = tuned.found["chosen"]

    def run(**options):
        arguments = {"pretrained": "adainfer-demo", "dtype": "float32", "pilot": 0, **options}
        return lm_eval.simple_evaluate(
            model="adainfer", model_args=arguments, tasks=[TASK], limit=4, bootstrap_iters=0, device="cpu",
            task_manager=our_tasks(), batch_size=4,
        )["config"]["adainfer"]  # fmt: skip

    record = run(stopper="auto", stopper_dir=str(folder))
    assert record["kv_policy"].startswith(chosen["kv_policy"]) and record["checked_blocks"] == chosen["check_layers"]
    assert record["reader"] == chosen["reader"] and record["promise_applies"], record["promise_differences"]
    if chosen["exits"] == "token":
        other = {"recompute": "propagate", "propagate": "recompute"}[chosen["kv_policy"]]
        record = run(stopper="auto", stopper_dir=str(folder), kv_policy=other)
        assert not record["promise_applies"] and f"instead of {chosen['kv_policy']}" in record["promise_differences"][0]


def test_dense_generation_leaves_nothing_to_tune(tmp_path):
    made = tuning(tmp_path, TOKENS)
    made.lm.options = replace(made.lm.options, generation="dense")
    assert "generation: dense" in refused(made.run)


def test_a_kv_policy_is_what_is_found(capsys, tmp_path):
    arguments = ["tune", "-a", "pretrained=adainfer-demo,kv_policy=propagate", "-t", TASK, "-o", str(tmp_path)]
    assert main.main(arguments) == 2
    assert "kv_policy is what adainfer tune finds" in capsys.readouterr().err
