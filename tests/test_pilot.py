"""The pilot: what it compares, when it warns, and that nothing else of a run knows of it."""

from __future__ import annotations

import json
import logging
import math
import random
import sqlite3
from contextlib import closing
from fractions import Fraction
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from helpers.models import lm_of, make_model
from helpers.processes import execute, in_two_processes
from helpers.tasks import documents, make_task, our_tasks, request_of
from lm_eval import simple_evaluate
from lm_eval.api.group import Group
from lm_eval.api.metrics import mean
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate

from lm_eval_adainfer import releases
from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.harness import pilot
from lm_eval_adainfer.strategies.shortgpt import ShortGPTStopper

TEXTS = {"until": ["\n"], "max_gen_toks": 4}
EXACT = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]


def choices(n=24, name="choices", **config):
    return make_task({"train": documents(9, 1), "test": documents(n, 2)}, name=name, **config)


def continuation(n=24):
    return choices(n, "continuation", output_type="loglikelihood", doc_to_choice=None,
                   doc_to_target="{{' ' + choices[answer]}}")  # fmt: skip


def mutual(n=24):
    both = [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_mutual_info")]
    return choices(n, "mutual", metric_list=both, target_delimiter="")  # 0.5.0.dev1 needs equal texts after no context


def texts(n=24, name="texts", **config):
    settings = {**TEXTS, **config.pop("generation_kwargs", {})}
    return choices(n, name, output_type="generate_until", doc_to_choice=None, doc_to_target="{{choices[answer]}}",
                   generation_kwargs=settings, metric_list=EXACT, **config)  # fmt: skip


def rolling(n=6):
    return choices(n, "rolling", output_type="loglikelihood_rolling", doc_to_choice=None, doc_to_text="",
                   doc_to_target="{{question}}",
                   metric_list=[{"metric": "word_perplexity", "aggregation": "weighted_perplexity",
                                 "higher_is_better": False}])  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return make_model("llama", vocab_size=257, max_position_embeddings=512)


def run(model, tokenizer, tasks, **options):
    """One evaluation; options of the evaluation by name, all others are the model's."""
    ours = {name: options.pop(name) for name in ("limit", "use_cache", "num_fewshot") if name in options}
    lm = lm_of(model, tokenizer, **{"max_length": 400, **options})
    return simple_evaluate(lm, tasks=tasks, bootstrap_iters=0, task_manager=our_tasks(), **ours)


def warnings(caplog):
    return [r.getMessage() for r in caplog.records if r.getMessage().startswith("pilot: ")]


def pilot_of(results):
    return results["config"]["adainfer"].get("pilot")


def without_pilot(results):
    """All that a run says, but for times and for the pilot's entry."""

    def cleaned(value):
        if isinstance(value, dict):
            return {
                k: cleaned(v) for k, v in value.items()
                if "seconds" not in k and "per_second" not in k and k not in ("date", "pilot", "use_cache")
            }  # fmt: skip
        return [cleaned(v) for v in value] if isinstance(value, (list, tuple)) else value

    records = [
        [response.exit_record for responses in sample["resps"] for response in responses]
        for samples in results["samples"].values() for sample in samples
    ]  # fmt: skip
    return json.dumps(cleaned(dict(results)), sort_keys=True, default=str), records


# ------------------------------------------------------------------ the rule
def below(kept, n):
    """P(X <= kept) of n documents that each keep their answer with probability 0.9, exactly."""
    rate = Fraction(9, 10)
    return sum(math.comb(n, k) * rate**k * (1 - rate) ** (n - k) for k in range(kept + 1))


def test_the_bound_has_the_error_of_11_in_16_at_any_number_of_documents():
    error = below(11, 16)
    assert 0.0165 < error < 0.0175
    for n in range(1, 200):
        bound = pilot.too_few(n)
        assert -1 <= bound < n and below(bound, n) <= error < below(bound + 1, n)
    assert pilot.too_few(16) == 11 and pilot.too_few(1) == -1 and 780 < pilot.too_few(57 * 16) < 0.9 * 57 * 16


def test_documents_are_drawn_by_what_they_say_alone():
    task = choices(40)
    task.build_all_requests(limit=None, rank=0, world_size=1)
    first = [d[0].doc["question"] for d in pilot.drawn(task.instances, 16)]
    shuffled = list(task.instances)
    random.Random(1).shuffle(shuffled)
    again = pilot.drawn(shuffled, 16)
    assert [d[0].doc["question"] for d in again] == first and len(set(first)) == 16
    assert all([i.idx for i in d] == [0, 1, 2] for d in again)
    assert {d[0].doc_id for d in again} != set(range(16))
    one = {"when": object, "a": {1, 2}, "n": 3}  # what JSON has no words for
    assert len(pilot.drawn([releases.request("loglikelihood", one, ("a", "b"), 0, "t", 0)], 16)) == 1


# ------------------------------------------------------------------ what it finds
def answer(sample, kind):
    if kind != "texts":
        scores = [float(once(r)[0]) for r in sample["filtered_resps"][:3]]  # behind them, those without the question
        return scores.index(max(scores))
    return once(sample["filtered_resps"][0])


def once(response):
    """A filtered response, alone in a list in lm-eval 0.5.0.dev1."""
    return response[0] if isinstance(response, list) else response


@pytest.mark.parametrize("stopper", ["fixed:1", "fixed:4", "gap:0.3"])
@pytest.mark.parametrize("kind", ["choices", "mutual", "texts"])
def test_it_finds_what_two_whole_runs_show_of_its_documents(kind, stopper, model, tokenizer, caplog):
    task = {"choices": choices, "mutual": mutual, "texts": texts}[kind]()
    metric = "exact_match" if kind == "texts" else "acc"
    early = run(model, tokenizer, [task], stopper=stopper)
    with caplog.at_level(logging.CRITICAL):
        dense = run(model, tokenizer, [task], stopper="none")
    asked = [d[0].doc_id for d in pilot.drawn(task.instances, 16)]
    pairs = [[next(s for s in r["samples"][kind] if s["doc_id"] == i) for r in (dense, early)] for i in asked]
    found = pilot_of(early)["tasks"][kind]
    assert found["documents"] == 16 and found["metric"] == metric
    assert found["kept"] == sum(answer(a, kind) == answer(b, kind) for a, b in pairs)
    assert found["dense"] == pytest.approx(sum(a[metric] for a, _ in pairs) / 16)
    assert found["early"] == pytest.approx(sum(b[metric] for _, b in pairs) / 16)
    assert bool(warnings(caplog)) == (found["kept"] <= 11)
    assert pilot_of(dense) is None


def test_a_single_continuation_is_kept_where_the_top_token_and_the_greedy_flag_are(model, tokenizer):
    task = continuation()
    early = run(model, tokenizer, [task], stopper="fixed:2")
    first = {i.doc_id: i.resps[0] for i in task.instances}
    run(model, tokenizer, [task], stopper="none")
    second = {i.doc_id: i.resps[0] for i in task.instances}
    same = [
        (first[i].top, first[i][1]) == (second[i].top, second[i][1])
        for i in (d[0].doc_id for d in pilot.drawn(task.instances, 16))
    ]
    assert pilot_of(early)["tasks"]["continuation"]["kept"] == sum(same) < 16
    lm = lm_of(model, tokenizer)
    (found,) = lm.loglikelihood([releases.request("loglikelihood", {}, ("a fox", " x"), 0, "t", 0)], True)
    with torch.no_grad():
        logits = model(torch.tensor([lm._encode_pair("a fox", " x")[0]])).logits[0, -1]
    assert found.top == int(logits.argmax())


def test_an_answer_is_what_the_tasks_first_filter_makes_of_it(model, tokenizer):
    """Texts differ, but of each the filter keeps nothing; under the second filter they would differ."""
    nothing = {"name": "nothing", "filter": [{"function": "regex", "regex_pattern": "(never)"}, {"function": "take_first"}]}
    whole = {"name": "whole", "filter": [{"function": "take_first"}]}
    found = run(model, tokenizer, [texts(filter_list=[nothing, whole])], stopper="fixed:1")
    assert pilot_of(found)["tasks"]["texts"]["kept"] == 16
    found = run(model, tokenizer, [texts(filter_list=[whole, nothing])], stopper="fixed:1")
    assert pilot_of(found)["tasks"]["texts"]["kept"] < 16


def test_documents_that_keep_all_answers_are_no_cause_for_a_warning(model, tokenizer, caplog):
    found = run(model, tokenizer, [choices(), continuation(), texts()], stopper="gap:1")  # it never stops
    assert not warnings(caplog)
    assert all(task["kept"] == task["documents"] == 16 for task in pilot_of(found)["tasks"].values())
    assert all(task["dense"] == task["early"] for task in pilot_of(found)["tasks"].values())


def test_the_warning_is_one_paragraph_that_names_all_it_should(model, tokenizer, caplog):
    found = run(model, tokenizer, [texts()], stopper="fixed:1")
    (said,) = warnings(caplog)
    task = pilot_of(found)["tasks"]["texts"]
    assert "\n" not in said and f"{task['kept']} of 16 documents keep their answer" in said
    assert f"exact_match is {task['early']:.3f} with early exit, and {task['dense']:.3f} when all blocks run" in said
    for words in ("answers of texts", "stopper=fixed:1", "reader=copy", "adainfer trace", "calibrate", "stopper=none"):
        assert words in said


# ------------------------------------------------------------------ groups
def grouped(*groups):
    """A task dictionary as lm-eval's manager makes it: name of a group, and its tasks or groups."""
    made, tasks = {}, {}
    for name, members in groups:
        made[name] = Group(name)
        for member in members:
            made[name].add(made[member] if isinstance(member, str) else member)
            if not isinstance(member, str):
                tasks[member.task_name] = member
    for task in tasks.values():
        task.set_fewshot_seed(1)
    return {"tasks": tasks, "groups": made, "group_map": {}}


def test_a_group_is_warned_of_once_and_as_a_whole(model, tokenizer, caplog):
    tasks = [texts(n, name) for n, name in ((20, "a"), (4, "b"), (18, "c"))]
    loaded = grouped(("part", tasks[:2]), ("all", ["part", tasks[2]]))
    alone = texts(20, "alone")
    loaded["tasks"]["alone"] = alone
    lm = lm_of(model, tokenizer, stopper="fixed:1", max_length=400)
    evaluate(lm, loaded, bootstrap_iters=0)
    said = warnings(caplog)
    found = lm.pilot_record["tasks"]
    assert {name: task["documents"] for name, task in found.items()} == {"a": 16, "b": 4, "c": 16, "alone": 16}
    kept = sum(found[name]["kept"] for name in "abc")
    assert len(said) == 2 and f"the 3 tasks of all: {kept} of 36 documents" in said[0] and "of alone: " in said[1]


def entry(kept, documents=16, metric="acc", dense=0.0, early=0.0):
    return {"documents": documents, "kept": kept, "metric": metric, "scored": documents, "dense": dense, "early": early}


@pytest.mark.parametrize(("kept", "warns"), [((11, 16), 0), ((16, 16), 0), ((11, 11), 1), ((0, 0), 1), ((8, 17), 1)])
def test_one_task_of_a_group_is_judged_with_the_others(kept, warns, model, tokenizer, caplog):
    loaded = grouped(("g", [texts(20, "a"), texts(20, "b")]))
    sizes = [max(k, 16) for k in kept]
    part = {"tasks": {n: entry(k, s) for n, k, s in zip("ab", kept, sizes, strict=True)}, "cost": {"seconds_measured": 1.0}}
    lm = lm_of(model, tokenizer, stopper="fixed:1")
    pilot.warn([part], {name: releases.members(g, loaded["tasks"]) for name, g in loaded["groups"].items()}, lm)
    assert len(warnings(caplog)) == warns == (sum(kept) <= pilot.too_few(sum(sizes)))
    caplog.clear()
    pilot.warn([part], {}, lm)
    assert len(warnings(caplog)) == sum(k <= 11 for k in kept)


def test_parts_of_several_processes_are_added_up():
    halves = [
        {"tasks": {"t": entry(3, 8, dense=6.0, early=2.0)}, "cost": {"seconds_measured": 2.0, "tokens_counted": 5}},
        {"tasks": {"t": entry(5, 8, dense=7.0, early=1.0)}, "cost": {"seconds_measured": 3.0, "tokens_counted": 6}},
        {"tasks": {}, "cost": {}},
    ]
    assert pilot.record(halves) == {
        "tasks": {"t": {"documents": 16, "kept": 8, "metric": "acc", "dense": 13 / 16, "early": 3 / 16}},
        "seconds_measured": 3.0,
        "tokens_counted": 11,
    }
    assert pilot.record([{"tasks": {}, "cost": {}}]) is None


# ------------------------------------------------------------------ who has none
@pytest.mark.parametrize(
    "options",
    [{}, {"stopper": "fixed:1", "pilot": 0}, {"stopper": "gap:0.3", "check_layers": "5"}, {"stopper": "shortgpt:bi"}],
    ids=["none", "pilot=0", "never asked", "blocks taken out"],
)
def test_without_exits_or_with_pilot_0_every_document_runs_once(options, model, tokenizer, caplog):
    if options.get("stopper") == "shortgpt:bi":
        options = {"stopper": ShortGPTStopper({"influence": np.array([0.5, 0.1, 0.5, 0.5, 0.5])}, drop=1)}
    lm = lm_of(model, tokenizer, max_length=400, batch_size=1, prefix_cache=0, **options)
    ran = []
    lm.anatomy.blocks[0].register_forward_pre_hook(lambda m, args: ran.append(args[0].shape[1]))
    task = choices(6)
    found = simple_evaluate(lm, tasks=[task], bootstrap_iters=0, task_manager=our_tasks())
    assert pilot_of(found) is None and not warnings(caplog)
    assert sum(ran) == found["config"]["adainfer"]["tokens_counted"]


def test_rolling_texts_have_no_pilot_and_dense_texts_neither(model, tokenizer, caplog):
    found = run(model, tokenizer, [rolling(), texts()], stopper="fixed:1", generation="dense")
    assert pilot_of(found) is None and not warnings(caplog)
    found = run(model, tokenizer, [rolling(), texts(), choices()], stopper="fixed:1", generation="dense")
    assert set(pilot_of(found)["tasks"]) == {"choices"}


@pytest.mark.parametrize("value", ["a few", -1, "1.5", None])
def test_a_pilot_of_no_number_is_refused(value, model, tokenizer):
    with pytest.raises(AdaInferError, match=r"^pilot: .* is no number of documents; give 0 or more$"):
        lm_of(model, tokenizer, stopper="gap:0.3", pilot=value)


# ------------------------------------------------------------------ what it leaves alone
class Mixed(ConfigurableTask):
    """As stock squadv2: every document generates a text and scores an answer."""

    VERSION = 1
    DATASET_PATH = "unused"

    def __init__(self):
        splits = {"train": documents(4, 1), "test": documents(9, 2)}
        super().__init__(
            config={
                "task": "mixed", "output_type": "generate_until", "training_split": "train", "test_split": "test",
                "custom_dataset": lambda **_: {k: datasets.Dataset.from_list(v) for k, v in splits.items()},
                "doc_to_text": "{{question}}", "doc_to_target": "{{choices[answer]}}", "num_fewshot": 0,
            }
        )  # fmt: skip

    def construct_requests(self, doc, ctx, **kwargs):
        return [
            request_of("generate_until", doc, (ctx, TEXTS), 0, "mixed", **kwargs),
            request_of("loglikelihood", doc, (ctx, " unanswerable"), 1, "mixed", **kwargs),
        ]

    def process_results(self, doc, results):
        text, (logprob, _) = results
        return {"loss": -logprob, "sound": ("no", "number"), "length": len(text)}

    def aggregation(self):
        return {"length": mean, "loss": mean, "sound": len}

    def higher_is_better(self):
        return {"length": True, "loss": False, "sound": True}


MANY = {
    "choices": lambda: [choices(), choices(7, "few", num_fewshot=2)],
    "one continuation": lambda: [continuation()],
    "texts": lambda: [texts()],
    "sampled texts": lambda: [texts(generation_kwargs={"do_sample": True, "temperature": 1.5})],
    "repeats": lambda: [texts(repeats=2, generation_kwargs={"do_sample": True, "temperature": 1.5})],
    "mutual information": lambda: [mutual()],
    "all kinds": lambda: [choices(), texts(), continuation(), rolling(), Mixed()],
    "shared prefixes": lambda: [choices(doc_to_text="{{'many shots that all share. ' * 6}}{{question}}")],
}  # fmt: skip
OPTIONS = {
    "plain": {},
    "limit": {"limit": 5},
    "features": {"log_features": True, "limit": 8},
    "auto": {"batch_size": "auto", "max_batch_size": 4, "max_length": 96, "limit": 6},
    "propagate": {"kv_policy": "propagate", "head_check": "shortlist:4", "limit": 8},
    "alone": {"batch_size": 1, "prefix_cache": 0, "limit": 6},
}


@pytest.mark.parametrize(
    ("tasks", "options"),
    [*((t, "plain") for t in MANY), *(("all kinds", o) for o in OPTIONS if o != "plain")],
    ids=str,
)
def test_all_else_is_as_without_it(tasks, options, model, tokenizer):
    given = {"stopper": "gap:0.3", **OPTIONS[options]}
    dense = {name: run(model, tokenizer, MANY[tasks](), pilot=n, **given) for name, n in (("off", 0), ("on", 16))}
    assert pilot_of(dense["off"]) is None and pilot_of(dense["on"])["tokens_counted"] > 0
    assert without_pilot(dense["on"]) == without_pilot(dense["off"])
    assert json.dumps(pilot_of(dense["on"]))


def stored(path):
    """What a cache holds."""
    with closing(sqlite3.connect(path)) as connection:
        (name,) = (row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'"))
        return sorted(connection.execute(f'SELECT key, value FROM "{name}"').fetchall())


def test_a_cache_of_answers_knows_nothing_of_it(model, tokenizer, tmp_path, caplog):
    found = {}
    for n in (0, 16):
        for turn in ("first", "again"):
            where = str(tmp_path / f"cache{n}")
            found[n, turn] = run(model, tokenizer, MANY["all kinds"](), use_cache=where, stopper="fixed:1", pilot=n,
                                 batch_size="auto", max_batch_size=4, max_length=96, limit=6)  # fmt: skip
    for turn in ("first", "again"):
        assert without_pilot(found[16, turn]) == without_pilot(found[0, turn])
    assert found[16, "again"]["config"]["adainfer"]["tokens_counted"] == 0
    assert stored(f"{tmp_path}/cache16_rank0.db") == stored(f"{tmp_path}/cache0_rank0.db")
    first, again = (pilot_of(found[16, turn])["tasks"] for turn in ("first", "again"))
    assert first == again and len(warnings(caplog)) % 2 == 0 and warnings(caplog)


def test_its_cost_is_what_its_forwards_were(model, tokenizer):
    counted = {}
    for n in (0, 16):
        blocks = []
        handles = [
            layer.register_forward_pre_hook(lambda m, args, blocks=blocks: blocks.append(args[0].shape[:2].numel()))
            for layer in model.model.layers
        ]
        found = run(model, tokenizer, [choices()], stopper="fixed:1", pilot=n, batch_size=1, prefix_cache=0)
        for handle in handles:
            handle.remove()
        counted[n] = sum(blocks)
    cost = pilot_of(found)
    assert cost["block_tokens_counted"] == counted[16] - counted[0] == 5 * cost["tokens_counted"]
    assert cost["seconds_measured"] > 0


def test_a_model_and_its_tasks_are_left_as_they_were(model, tokenizer):
    lm, task = lm_of(model, tokenizer, stopper="gap:0.3", max_length=400), choices(6)
    task.set_fewshot_seed(1)
    before = {name: value for name, value in vars(lm).items() if name not in ("_found_aside", "pilot_record", "run_totals")}
    found = evaluate(lm, {"tasks": {"choices": task}, "groups": {}}, bootstrap_iters=0)
    assert "build_all_requests" not in vars(task) and found["results"]["choices"]["acc,none"] >= 0
    assert all(vars(lm)[name] is before[name] for name in ("stopper", "schedule", "engine", "counter", "reader"))
    first = lm.pilot_record
    again = evaluate(lm, {"tasks": {"choices": task}, "groups": {}}, bootstrap_iters=0)
    assert lm.pilot_record["tasks"] == first["tasks"] and again["results"] == found["results"]


def test_a_run_that_fails_in_the_pilot_leaves_the_model_as_it_was(model, tokenizer, monkeypatch):
    lm, task = lm_of(model, tokenizer, stopper="gap:0.3", max_length=400), choices(6)
    task.set_fewshot_seed(1)
    engine, real = lm.engine, lm.loglikelihood
    monkeypatch.setattr(lm, "loglikelihood", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate(lm, {"tasks": {"choices": task}, "groups": {}}, bootstrap_iters=0)
    monkeypatch.setattr(lm, "loglikelihood", real)
    assert lm.engine is engine and lm.stopper.kind == "gap" and "build_all_requests" not in vars(task)
    assert evaluate(lm, {"tasks": {"choices": task}, "groups": {}}, bootstrap_iters=0)["results"]


# ------------------------------------------------------------------ the command, and processes
def test_the_command_warns_too(folder, tmp_path, monkeypatch, only_our_tasks, caplog):
    assert not execute(
        f"lm_eval --model adainfer --model_args pretrained={folder},dtype=float32,stopper=fixed:1 --device cpu "
        f"--tasks adainfer_demo_plural_generate --limit 20 --batch_size 8 --output_path {tmp_path}",
        monkeypatch,
    )
    (said,) = warnings(caplog)
    assert "adainfer_demo_plural_generate" in said and "of 16 documents" in said
    (file,) = Path(tmp_path).rglob("results_*.json")
    assert json.loads(file.read_text())["config"]["adainfer"]["pilot"]["tasks"]["adainfer_demo_plural_generate"]


def test_two_processes_share_it(folder, tmp_path):
    tasks = ["adainfer_demo_fact", "adainfer_demo_plural_generate"]
    done = in_two_processes(
        "-m", "lm_eval_adainfer", "--model", "adainfer",
        "--model_args", f"pretrained={folder},dtype=float32,stopper=fixed:1",
        "--tasks", ",".join(tasks), "--limit", "20", "--batch_size", "4", "--device", "cpu",
        "--output_path", str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = Path(tmp_path).rglob("results_*.json")
    found = json.loads(file.read_text())
    alone = simple_evaluate(
        model="adainfer", model_args=f"pretrained={folder},dtype=float32,stopper=fixed:1,pilot=0", tasks=list(tasks),
        limit=20, batch_size=4, device="cpu", task_manager=our_tasks(),
    )  # fmt: skip
    for name in tasks:
        numbers = {k: v for k, v in alone["results"][name].items() if isinstance(v, float) and "stderr" not in k}
        assert {k: found["results"][name][k] for k in numbers} == pytest.approx(numbers, abs=1e-6) and numbers
    for count in ("tokens_counted", "generated_tokens_counted"):
        assert found["config"]["adainfer"][count] == alone["config"]["adainfer"][count]
    shared = pilot_of(found)["tasks"]
    assert {name: task["documents"] for name, task in shared.items()} == dict.fromkeys(tasks, 16)
    said = done.stderr.count("pilot: early exit")
    assert said == sum(task["kept"] <= 11 for task in shared.values()) >= 1
