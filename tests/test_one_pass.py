"""One pass for both sides: early answers, dense answers and their counts are those of two runs made one by one."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
from helpers.models import lm_of, make_model
from helpers.stoppers import ScriptedByState
from helpers.tasks import instance, make_task, our_tasks
from lm_eval import simple_evaluate

from lm_eval_adainfer.cli.main import main
from lm_eval_adainfer.comparison import adding, running
from lm_eval_adainfer.comparison import runs as comparison_runs
from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.harness import asides
from lm_eval_adainfer.harness.one_pass import OnePass, dense_args, hindered
from lm_eval_adainfer.strategies import files as stopper_files
from lm_eval_adainfer.strategies.crf import CRFStopper
from lm_eval_adainfer.strategies.shortgpt import ShortGPTStopper

SHARED = "a few shots that all documents of a task begin with. "
COUNTS = ("tokens", "block_tokens", "block_calls", "head_rows", "copied_tokens")
RECORD = ("exit_layer", "n_blocks", "flops_ratio", "flops_ratio_total", "layers_run", "flops", "flops_dense", "fingerprint")
READERS = ["head", "copy:1", "copy:3", "sim:3"]


def asked(seed=0, documents=14):
    """Contexts of all lengths, most behind a shared prefix; one context or two; 1 to 3 choices of many tokens or one.

    One document has more rows than a batch, and one more contexts than a batch; some have an empty context besides.
    """
    rng, found = random.Random(seed), []
    for doc in range(documents):
        context = (SHARED if doc % 3 else "") + "".join(rng.choices("abcdef ", k=rng.randint(2, 40)))
        contexts = [context + end for end in (" he", " she")] if doc % 4 == 0 else [context]
        choices = (" x and more than that", " yz", " or") if doc % 2 else ("x", "y", "z")
        pairs = [(c, k) for c in contexts for k in choices[: 1 + doc % 3]]
        pairs += [("", " x")] if doc == 6 else []
        found += [instance(c, k, doc, idx=i) for i, (c, k) in enumerate(pairs)]
    found += [instance(f"{SHARED}many", f" {word} of them", 90, idx=i) for i, word in enumerate("abcdefghij")]
    return found + [instance(f"{name} is a subject", " xy", 91, idx=i) for i, name in enumerate("pqrstuvwxyz")]


def same(answers, expected):
    for a, b in zip(answers, expected, strict=True):
        assert a[0] == pytest.approx(b[0], abs=2e-4) and (a[1], a.top, a.top1) == (b[1], b.top, b.top1)
        assert {n: getattr(a.exit_record, n) for n in RECORD} == {n: getattr(b.exit_record, n) for n in RECORD}


def both(model, tokenizer, requests, **options):
    """Answers and engines: of one pass, and of two runs; and the pass's own counts."""
    options = {"max_length": 128, "check_layers": "all", **options}
    lm = lm_of(model, tokenizer, **options)
    passes = OnePass(lm)
    one = lm.loglikelihood(requests, True), passes.dense.loglikelihood(requests, True)
    early, dense = lm_of(model, tokenizer, **options), lm_of(model, tokenizer, **{**options, "stopper": "none"})
    same(one[0], early.loglikelihood(requests, True))
    same(one[1], dense.loglikelihood(requests, True))
    for mine, alone in ((lm, early), (passes.dense, dense)):
        assert {c: getattr(mine.engine, c) for c in COUNTS} == {c: getattr(alone.engine, c) for c in COUNTS}
    assert not passes.too._rows  # nothing of a batch outlives it
    return one[0], {c: lm.totals()[f"one_pass_{c}_counted"] for c in COUNTS}, early, dense


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("batch_size", [1, 7])
@pytest.mark.parametrize("prefix_cache", [0, 4096])
def test_both_sides_are_those_of_runs_of_their_own(reader, batch_size, prefix_cache, tokenizer):
    model, requests = make_model("llama", vocab_size=257), asked()
    answers, counts, early, dense = both(
        model, tokenizer, requests, stopper=ScriptedByState(), reader=reader, batch_size=batch_size, prefix_cache=prefix_cache
    )
    assert len({a.exit_record.exit_layer for a in answers}) > 2
    first, second = early.engine, dense.engine
    assert second.block_tokens <= counts["block_tokens"] < first.block_tokens + second.block_tokens
    assert counts["tokens"] == first.tokens and counts["head_rows"] < first.head_rows + second.head_rows


CARRYING = {
    "patience": "patience:2",
    "crf": CRFStopper(
        {"state": np.array([[0.0], [9.0]]), "bias": np.array([2.0, 0.0]), "transition": np.array([[1.0, 0], [0, 2.0]])}, ("gap",)
    ),
}


@pytest.mark.parametrize("stopper", [*CARRYING, "fixed:2", "none", "gap:1", "choice_gap:0.3"])
@pytest.mark.parametrize("batch_size", [1, 7])
def test_whatever_decides(stopper, batch_size, tokenizer):
    """Decisions that carry a state from block to block, none at all, and documents of which none leaves."""
    model = make_model("llama", vocab_size=257)
    answers, *_ = both(model, tokenizer, asked(), stopper=CARRYING.get(stopper, stopper), batch_size=batch_size)
    assert (len({a.exit_record.exit_layer for a in answers}) > 1) == (stopper in {*CARRYING, "choice_gap:0.3"})


@pytest.mark.parametrize("family", ["gemma3", "falcon", "bloom", "mixtral", "gptj"])
def test_families(family, tokenizer):
    """Sliding windows, blocks in parallel, alibi, experts, and rows that no mask but the causal one tells apart."""
    both(make_model(family, vocab_size=257), tokenizer, asked(), stopper=ScriptedByState(), batch_size=4)


def test_the_blocks_run_what_a_dense_run_runs(tokenizer):
    model, ran = make_model("llama", vocab_size=257), []
    given = {"batch_size": 16, "prefix_cache": 0, "max_length": 128}
    lm, alone = (lm_of(model, tokenizer, stopper=s, **given) for s in (ScriptedByState(), "none"))
    passes = OnePass(lm)
    for block in lm.anatomy.blocks:
        block.register_forward_pre_hook(lambda m, args: ran.append(len(args[0])))
    requests = asked()
    early = lm.loglikelihood(requests, True)
    once = list(ran)
    assert passes.dense.loglikelihood(requests, True) != early and ran == once  # the dense side runs nothing
    ran.clear()
    alone.loglikelihood(requests, True)
    assert sorted(once) == sorted(ran)


def test_what_the_pass_was_not_asked_the_dense_side_answers_itself(tokenizer):
    model, requests = make_model("llama", vocab_size=257), asked()
    lm = lm_of(model, tokenizer, stopper=ScriptedByState(), max_length=128)
    passes, expected = OnePass(lm), lm_of(model, tokenizer, max_length=128).loglikelihood(requests, True)
    lm.loglikelihood(requests[:20], True)
    cut = next(n for n in range(20, 0, -1) if requests[n].doc_id != requests[n - 1].doc_id)
    lm.loglikelihood(requests[:cut], True)
    same(passes.dense.loglikelihood(requests[:cut], True), expected[:cut])
    passes.forget()
    same(passes.dense.loglikelihood(requests, True), expected)
    same(passes.dense.loglikelihood(requests[::-1], True), expected[::-1])


def test_an_early_side_is_itself_again_where_it_is_not_watched(tokenizer):
    """Dense answers that are given aside are no part of a pass, and neither is a model that has no dense side."""
    model, requests = make_model("llama", vocab_size=257), asked()
    lm = lm_of(model, tokenizer, stopper=ScriptedByState(), max_length=128)
    passes = OnePass(lm)
    with asides.dense(lm):
        lm.loglikelihood(requests, True)
    assert passes.answers(requests[:1], [("t", 0)]) == [None] and lm.one_pass is passes
    lm.one_pass = None
    lm.loglikelihood(requests, True)
    assert lm.engine.dense is None and "seconds_in_model_measured" in lm.totals()


def test_a_stopper_that_is_found_later_is_the_early_sides_alone(tokenizer):
    """As ``stopper=auto`` finds one by the tasks, when the dense side is there already."""
    model, requests = make_model("llama", vocab_size=257), asked()
    given = {"max_length": 128, "check_layers": "all"}
    lm = lm_of(model, tokenizer, **given)
    passes = OnePass(lm)
    early = lm_of(model, tokenizer, stopper=ScriptedByState(), reader="copy:3", **given)
    lm.options = early.options
    lm.use(1, "all")
    same(lm.loglikelihood(requests, True), early.loglikelihood(requests, True))
    same(passes.dense.loglikelihood(requests, True), lm_of(model, tokenizer, **given).loglikelihood(requests, True))


# ------------------------------------------------------------------ through lm-eval
def plain(found):
    """Results and samples without what differs from run to run."""
    record = {k: v for k, v in found["config"]["adainfer"].items() if "one_pass" not in k and "seconds" not in k and "per_second" not in k}
    kept = {k: found[k] for k in ("results", "groups", "n-samples", "configs", "versions", "group_subtasks") if k in found}
    return {**kept, "adainfer": record, "samples": found["samples"]}


def near(a, b, where="results"):
    """Equal, numbers within rounding."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            near(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for n, (x, y) in enumerate(zip(a, b, strict=True)):
            near(x, y, f"{where}[{n}]")
    elif isinstance(a, float) or (isinstance(a, str) and re.fullmatch(r"-?\d+\.\d+(e-?\d+)?", a)):  # samples hold texts
        assert float(a) == pytest.approx(float(b), abs=2e-4), where
    elif not callable(a):
        assert a == b, where


def tasks():
    return [
        make_task(name="choices", num_fewshot=2),
        make_task(name="mutual", target_delimiter="", metric_list=[{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_mutual_info")]),
        make_task(name="one", output_type="loglikelihood", doc_to_choice=None, doc_to_target="{{' ' + choices[answer]}}"),
        make_task(name="texts", output_type="generate_until", doc_to_choice=None, doc_to_target="{{choices[answer]}}",
                  generation_kwargs={"max_gen_toks": 5, "until": ["x"]}),
        make_task(name="rolling", output_type="loglikelihood_rolling", doc_to_choice=None, doc_to_text="", doc_to_target="{{question}}"),
    ]  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"batch_size": "auto", "max_batch_size": 4}, {"kv_policy": "propagate", "batch_size": 1}])
def test_evaluations_of_all_kinds_of_tasks(options, tokenizer):
    """Texts and rolling requests are answered by each side itself, with the same record as ever."""
    model, given = make_model("llama", vocab_size=257), {"pilot": 0, "max_length": 400, **options}

    def run(lm):
        return simple_evaluate(lm, tasks=tasks(), bootstrap_iters=0, task_manager=our_tasks())

    lm = lm_of(model, tokenizer, stopper="gap:0.3", **given)
    passes = OnePass(lm)
    found = run(lm), run(passes.dense)
    for mine, stopper in zip(found, ("gap:0.3", "none"), strict=True):
        alone = run(lm_of(model, tokenizer, stopper=stopper, **given))
        near(plain(mine), plain(alone))
        assert mine["config"]["adainfer"]["one_pass"] is True and "one_pass" not in alone["config"]["adainfer"]
        assert "seconds_in_model_measured" not in mine["config"]["adainfer"]
        assert mine["config"]["batch_sizes"] == alone["config"]["batch_sizes"]
    assert found[0]["config"]["adainfer"]["one_pass_block_tokens_counted"] > found[0]["config"]["adainfer"]["block_tokens_counted"]


# ------------------------------------------------------------------ the command
MODEL = "pretrained=adainfer-demo,dtype=float32"
GATE = ["check", "--run", "--device", "cpu", "--max-drop", "0.5", "--limit", "12", "--batch_size", "7"]


def files(folder):
    (found,) = Path(folder).rglob("results_*.json")
    samples = [json.loads(line) for file in sorted(found.parent.glob("samples_*.jsonl")) for line in file.read_text().splitlines()]
    return json.loads(found.read_text()), samples


def test_the_command_writes_the_runs_that_two_models_would(tmp_path, capsys, only_our_tasks):
    tasks = "adainfer_demo_topic,adainfer_demo_plural_generate"
    assert main([*GATE, "--model_args", f"{MODEL},stopper=svm", "--tasks", tasks, "--output", str(tmp_path / "one")]) in (0, 1, 3)
    said = capsys.readouterr().out
    assert "one pass gave both sides' answers" in said and "the texts of adainfer_demo_plural_generate were run for each side" in said
    for side, stopper in (("candidate", "svm"), ("baseline", "none")):
        args = {"pretrained": "adainfer-demo", "dtype": "float32", "stopper": stopper}
        running._evaluate(
            "adainfer", args, tasks.split(","), str(tmp_path / side), our_tasks(args), {"limit": 12, "batch_size": "7", "device": "cpu"}
        )
        (mine, its_samples), (alone, samples) = files(tmp_path / "one" / side), files(tmp_path / side)
        own = ("date", "pilot", "fingerprint")  # both of one model's weights, whatever ran
        near(its_samples, samples)
        near(mine["results"], alone["results"])
        near(*({k: v for k, v in r["config"]["adainfer"].items() if k not in own and "one_pass" not in k and "seconds" not in k and "per_second" not in k} for r in (mine, alone)))
        assert mine["config"]["adainfer"]["fingerprint"] == alone["config"]["adainfer"]["fingerprint"]
        near(*({k: v for k, v in r["config"].items() if k != "adainfer"} for r in (mine, alone)))
        assert {*alone} == {*mine}
        for key in ("model_source", "model_name", "model_name_sanitized", "n-samples", "n-shot", "higher_is_better", "group_subtasks"):
            assert mine[key] == alone[key]
        run = comparison_runs.load(tmp_path / "one" / side)
        assert run.seconds_in_model is None and run.seconds_total is None and run.label == f"adainfer {stopper}"


@pytest.mark.parametrize(
    ("extra", "tasks", "words"),
    [
        (",stopper=shortgpt:bi:2:{file}", "adainfer_demo_topic", "each side was run by itself, since stopper=shortgpt:bi:2:"),
        (",stopper=svm,log_features=True", "adainfer_demo_topic", "each side was run by itself, since log_features"),
        (",stopper=gap:0.9", "adainfer_demo_plural_generate", "one pass answers for both in loglikelihood tasks alone"),
    ],
)
@pytest.mark.parametrize("how", [[], ["--stop-early"]])
def test_where_one_pass_does_not_do_there_are_two_and_it_says_so(extra, tasks, words, how, capsys, tmp_path, only_our_tasks):
    stopper_files.save(ShortGPTStopper({"influence": np.arange(12) / 12}, drop=1), tmp_path / "bi.stopper")
    args = MODEL + extra.format(file=tmp_path / "bi.stopper")
    assert main([*GATE, *how, "--model_args", args, "--tasks", tasks, "--output", str(tmp_path)]) in (0, 1, 3)
    assert words in capsys.readouterr().out
    for side in ("baseline", "candidate"):
        record = files(tmp_path / side)[0]["config"]["adainfer"]
        assert "one_pass" not in record and record["seconds_in_model_measured"] > 0


def test_other_baselines_are_run_as_ever(tmp_path, capsys, only_our_tasks):
    run = [*GATE, "--model_args", f"{MODEL},stopper=svm", "--tasks", "adainfer_demo_topic"]
    assert main([*run, "--output", str(tmp_path / "first")]) in (0, 1, 3)
    capsys.readouterr()
    assert main([*run, "--baseline", str(tmp_path / "first" / "baseline"), "--output", str(tmp_path / "second")]) in (0, 1, 3)
    assert "the candidate alone was run, since the baseline was there already" in capsys.readouterr().out
    assert not (tmp_path / "second" / "baseline").exists()
    same_as = [files(tmp_path / name / "candidate")[1] for name in ("first", "second")]
    near(*same_as)


def test_what_dense_arguments_are_and_what_hinders():
    given = {"pretrained": "m", "stopper": "auto", "stopper_dir": "d", "token_stopper": "gap", "reader": "copy", "min_layer": 3}
    assert dense_args(given) == {"pretrained": "m", "reader": "copy", "min_layer": 3, "stopper": "none"}
    assert hindered(given) == hindered({"pretrained": "m"}) == hindered({"stopper": "gap:0.5", "log_features": False}) == ""
    with pytest.raises(AdaInferError, match=r"^stopper: "):
        hindered({"stopper": "no_such"})


# ------------------------------------------------------------------ documents that are added
EARLY = ["check", "--run", "--stop-early", "--model_args", f"{MODEL},stopper=svm", "--device", "cpu", "--batch_size", "16", "--format", "json"]


def test_parts_are_those_of_two_models(tmp_path, capsys, monkeypatch, only_our_tasks):
    """And scores of groups are those that lm-eval makes of the same documents."""
    arguments = [*EARLY, "--tasks", "adainfer_demo", "--limit", "30", "--max-drop", "0.5", "--seed", "3"]
    assert main([*arguments, "--output", str(tmp_path / "one")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert any("seed 3" in note for note in found["notes"]) and any("one pass" in note for note in found["notes"])
    monkeypatch.setattr(running, "not_in_one_pass", lambda *args: "not now")
    assert main([*arguments, "--output", str(tmp_path / "two")]) == 0
    again = json.loads(capsys.readouterr().out)
    assert found["documents"] == again["documents"] < 180
    for side in ("baseline", "candidate"):
        (mine, its_samples), (alone, samples) = files(tmp_path / "one" / side), files(tmp_path / "two" / side)
        near(its_samples, samples)
        near(mine["results"], alone["results"])
        assert mine["config"]["adainfer"]["stop_early"] == {"seed": 3, "documents": 180}
        for count in COUNTS[:-1]:
            assert mine["config"]["adainfer"][f"{count}_counted"] == alone["config"]["adainfer"][f"{count}_counted"]
        group = mine["groups"]["adainfer_demo"]
        assert mine["results"]["adainfer_demo"] == group and group["sample_len"] == found["documents"]
        rows = comparison_runs.load(tmp_path / "one" / side).tasks
        for metric in ("acc", "exit_layer", "pruning_ratio", "flops_ratio_total"):
            every = [d.metrics[metric] for task in rows.values() for d in task.documents.values()]
            assert group[f"{metric},none"] == pytest.approx(np.mean(every)) and len(every) == found["documents"]


def test_the_seed_is_that_of_the_order(tmp_path, capsys, only_our_tasks):
    places = {}
    for seed in ("0", "1", None):
        stop = lambda *args, seed=seed: places.setdefault(seed, args[2]) is not None  # noqa: E731
        adding.run_until(stop, f"{MODEL},stopper=svm", "adainfer_demo_topic", tmp_path / str(seed), limit=70, device="cpu",
                         batch_size=16, **({} if seed is None else {"seed": int(seed)}))  # fmt: skip
    assert places["0"] == places[None] != places["1"] and sorted(places["0"]) == sorted(places["1"])
    capsys.readouterr()
    for extra, words in ((["--seed", "1"], "seed: only --stop-early draws an order"), (["--seed", "-1", "--stop-early"], "seed: -1 is below 0")):
        assert main([*GATE, "--model_args", MODEL, "--tasks", "adainfer_demo_topic", *extra]) == 2
        assert words in capsys.readouterr().err


def test_what_is_excluded_is_not_run(tmp_path, capsys, only_our_tasks):
    arguments = [*EARLY, "--tasks", "adainfer_demo", "--limit", "20", "--max-drop", "0.5", "--output", str(tmp_path)]
    assert main([*arguments, "--exclude", "adainfer_demo_odd*,adainfer_demo_fact"]) in (0, 3)
    found = json.loads(capsys.readouterr().out)
    left = {"adainfer_demo_topic", "adainfer_demo_sentiment", "adainfer_demo_plural"}
    assert {guard["task"] for guard in found["guards"]} == left and "of 60 were used" in " ".join(found["notes"])
    for side in ("baseline", "candidate"):
        assert {f.name.split("_2026")[0].split("_20")[0] for f in Path(tmp_path / side).rglob("samples_*")} == {f"samples_{t}" for t in left}
    for names, words in (("adainfer_demo", "exclude: nothing is left of --tasks"), ("gsm9k", "'gsm9k' in --exclude")):
        assert main([*arguments, "--exclude", names]) == 2
        assert words in capsys.readouterr().err
