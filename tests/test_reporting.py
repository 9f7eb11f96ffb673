"""Exit statistics beside the task's metrics, through lm-eval's own evaluate (written for lm-eval 0.4.13)."""

from __future__ import annotations

import functools
import importlib
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import datasets
import lm_eval
import numpy as np
import pytest
from helpers.models import byte_tokenizer, make_model
from helpers.processes import in_two_processes
from helpers.tasks import documents, our_tasks, own_names, request_of
from lm_eval import simple_evaluate
from lm_eval.api.metrics import mean
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.harness.model import AdaInferLM
from lm_eval_adainfer.traces import recording
from lm_eval_adainfer.traces.splits import split_of

TASKS = ["adainfer_demo"]
MEANS = ["exit_layer", "pruning_ratio", "flops_ratio", "flops_ratio_total", "layers_run"]


@pytest.fixture(scope="module")
def manager():
    return our_tasks()


def evaluate(folder, manager, stopper="gap:0.3", model="adainfer", tasks=TASKS, limit=9, extra="", **kwargs):
    stop = f",stopper={stopper},pilot=0" if model == "adainfer" else ""  # which has tests of its own
    found = simple_evaluate(
        model=model,
        model_args=f"pretrained={folder},dtype=float32{stop}{extra}",
        tasks=list(tasks),
        limit=limit,
        num_fewshot=kwargs.pop("num_fewshot", 1),
        batch_size=kwargs.pop("batch_size", 4),
        device="cpu",
        bootstrap_iters=0,
        task_manager=manager,
        **kwargs,
    )
    return own_names(found)


@pytest.fixture(scope="module")
def run(folder, manager):
    return evaluate(folder, manager)


def test_every_metric_of_the_table_is_the_mean_of_the_samples(run):
    for task, samples in run["samples"].items():
        row = run["results"][task]
        layers = [s["exit_layer"] for s in samples]
        for name in [*MEANS, "acc", "top1_acc"]:
            assert row[f"{name},none"] == pytest.approx(sum(s[name] for s in samples) / len(samples)), name
        mean = sum(layers) / len(layers)
        assert row["exit_layer_var,none"] == pytest.approx(sum((x - mean) ** 2 for x in layers) / len(layers))
        fourth = sum((x - mean) ** 4 for x in layers) / len(layers)
        error = ((fourth - row["exit_layer_var,none"] ** 2) / len(layers)) ** 0.5
        assert row["exit_layer_var_stderr,none"] == pytest.approx(error)
        assert row["pruning_ratio,none"] == pytest.approx(1 - mean / 5)
        for sample in samples:
            traces = [response.exit_record for responses in sample["resps"] for response in responses]
            assert {t.exit_layer for t in traces} == {sample["exit_layer"]}
    assert 0 < run["results"]["adainfer_demo"]["pruning_ratio,none"] < 1


def test_flops_ratio_is_equation_2(run):
    h, vocab, n_blocks = 32, 257, 5
    for samples in run["samples"].values():
        for s in samples:
            prompt = len(s["arguments"][0][0].encode())  # the tiny tokenizer has a token per byte
            layer = s["exit_layer"]
            expected = (2 * layer * (6 * h + prompt) + vocab) / (2 * n_blocks * (6 * h + prompt) + vocab)
            assert s["flops_ratio"] == pytest.approx(expected)


def test_group_rows_are_over_documents(run):
    group = run["groups"]["adainfer_demo"]
    pooled = [s for samples in run["samples"].values() for s in samples]
    for name in [*MEANS, "acc", "top1_acc"]:
        assert group[f"{name},none"] == pytest.approx(sum(s[name] for s in pooled) / len(pooled))
    layers = [s["exit_layer"] for s in pooled]
    mean = sum(layers) / len(layers)
    assert group["exit_layer_var,none"] == pytest.approx(sum((x - mean) ** 2 for x in layers) / len(layers))


def test_groups_of_unequal_tasks_are_weighted_by_documents(folder, manager):
    found = evaluate(folder, manager, limit=None, samples={"adainfer_demo_fact": [0, 3, 7], "adainfer_demo_plural": [1]},
                     tasks=["adainfer_demo_fact", "adainfer_demo_plural"])  # fmt: skip
    assert [s["doc_id"] for s in found["samples"]["adainfer_demo_fact"]] == [0, 3, 7]
    layers = [s["exit_layer"] for samples in found["samples"].values() for s in samples]
    assert len(layers) == 4 and all(1 <= x <= 5 for x in layers)


def test_dense_run_equals_stock_hf_and_stock_models_get_no_exit_statistics(folder, manager):
    ours = evaluate(folder, manager, stopper="none")
    stock = evaluate(folder, manager, model="hf")
    for task, row in stock["results"].items():
        assert "exit_layer,none" not in row and "top1_acc,none" not in row
        assert ours["results"][task].get("acc,none") == row.get("acc,none")
    for task, samples in stock["samples"].items():
        for a, b in zip(samples, ours["samples"][task], strict=True):
            for (x,), (y,) in zip(a["resps"], b["resps"], strict=True):
                assert y[0] == pytest.approx(x[0], rel=2e-6, abs=1e-4) and x[1] == y[1]
            assert b["exit_layer"] == 5 and b["flops_ratio_total"] == pytest.approx(1)
    assert ours["results"]["adainfer_demo"]["pruning_ratio,none"] == 0


def test_top1_acc_needs_the_whole_vocabulary(folder, manager, run):
    """One-token choices: where the gold choice's first token is the vocabulary's top token, its greedy flag says so."""
    for sample in run["samples"]["adainfer_demo_plural"]:
        ((response,),) = sample["resps"]
        assert sample["top1_acc"] == float(response.top1)
    for sample in run["samples"]["adainfer_demo_topic"]:
        gold = int(sample["target"])
        assert sample["top1_acc"] == float(sample["resps"][gold][0].top1)


def test_log_features_puts_every_checked_block_into_the_samples(folder, manager):
    found = evaluate(folder, manager, extra=",log_features=True", tasks=["adainfer_demo_fact"])
    plain = evaluate(folder, manager, tasks=["adainfer_demo_fact"])
    for sample, other in zip(found["samples"]["adainfer_demo_fact"], plain["samples"]["adainfer_demo_fact"], strict=True):
        (seen,) = sample["adainfer_features"]
        assert seen["layer"] == list(range(1, int(sample["exit_layer"]) + 1))
        assert all(len(seen[name]) == len(seen["layer"]) for name in ("gap", "top_prob", "cos_hidden", "cos_attn", "cos_mlp"))
        stops = [gap > 0.3 for gap in seen["gap"]]
        assert not any(stops[:-1]) and (stops[-1] or sample["exit_layer"] == 5)
        assert {k: sample[k] for k in MEANS} == pytest.approx({k: other[k] for k in MEANS})
    json.dumps(found["samples"], default=str)


def test_the_record_says_what_ran(run):
    record = run["config"]["adainfer"]
    assert record["stopper"]["kind"] == "gap" and record["n_blocks"] == 5 and record["checked_blocks"] == [1, 2, 3, 4]
    assert record["seconds_in_model_measured"] > 0 and record["tokens_counted"] > 0 and record["head_rows_counted"] > 0
    json.dumps(record)


def test_tasks_and_groups_are_left_as_they_were(folder, manager):
    lm = AdaInferLM(pretrained=str(folder), stopper="fixed:2", device="cpu", dtype="float32")
    loaded = manager.load(TASKS)
    group = loaded["groups"]["adainfer_demo"]
    before = list(group.aggregate_metric_list)
    import lm_eval.evaluator

    for task in loaded["tasks"].values():
        task.set_fewshot_seed(1)
    lm_eval.evaluator.evaluate(lm, loaded, limit=2, bootstrap_iters=0)
    assert group.aggregate_metric_list == before
    for task in loaded["tasks"].values():
        assert not {"doc_iterator", "process_results", "aggregation", "higher_is_better"} & set(vars(task))


FILTERED = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{q}}}}"
doc_to_target: "{{{{a}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 3}}
filter_list: [{filters}]
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


def test_group_rows_have_the_variance_of_the_members_under_each_filter(folder, tmp_path):
    for name, filters, questions in (("one", ["none"], 4), ("two", ["none", "strict"], 7)):
        data = tmp_path / f"{name}.jsonl"
        data.write_text("".join(json.dumps({"q": f"{name} {'x' * i}", "a": "y"}) + "\n" for i in range(questions)))
        listed = ", ".join(f"{{name: {f}, filter: [{{function: take_first}}]}}" for f in filters)
        (tmp_path / f"{name}.yaml").write_text(FILTERED.format(name=name, data=data, filters=listed))
    (tmp_path / "group.yaml").write_text(
        "group: both\ntask: [one, two]\naggregate_metric_list: [{metric: exact_match, weight_by_size: true}]\n"
    )
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = evaluate(folder, manager, tasks=["both"], limit=None, num_fewshot=0)
    layers = {
        name: [s["exit_layer"] for s in samples if s["filter"] == "none"] for name, samples in found["samples"].items()
    }
    assert (len(layers["one"]), len(layers["two"])) == (4, 7)
    for under, members in (("none", [*layers["one"], *layers["two"]]), ("strict", layers["two"])):
        for section in ("groups", "results"):
            row = found[section]["both"]
            assert row[f"exit_layer,{under}"] == pytest.approx(np.mean(members))
            assert row[f"exit_layer_var,{under}"] == pytest.approx(np.var(members)) != 0
    assert found["results"]["both"]["exit_layer_var,none"] != pytest.approx(np.var(layers["two"]))


def test_a_model_evaluated_twice_reports_the_counts_of_each_run(folder, manager):
    lm = AdaInferLM(pretrained=str(folder), stopper="gap:0.3", device="cpu", dtype="float32", batch_size=4)
    counted = [
        {name: value for name, value in found["config"]["adainfer"].items() if name.endswith("_counted")}
        for found in (
            simple_evaluate(model=lm, tasks=TASKS, limit=limit, bootstrap_iters=0, task_manager=manager)
            for limit in (5, 5, 2)
        )
    ]
    assert counted[0] == counted[1] and counted[0]["tokens_counted"] > counted[2]["tokens_counted"] > 0
    alone = evaluate(folder, manager, limit=2, num_fewshot=None)
    assert {name: alone["config"]["adainfer"][name] for name in counted[2]} == counted[2]


TWICE = """
import json, sys
import torch
from helpers.tasks import our_tasks
from lm_eval import simple_evaluate
from lm_eval_adainfer.harness.model import AdaInferLM

lm, found = AdaInferLM(pretrained=sys.argv[1], stopper="gap:0.3", dtype="float32", batch_size=4), []
for _ in range(2):
    results = simple_evaluate(model=lm, tasks=["adainfer_demo_fact"], limit=6, bootstrap_iters=0, task_manager=our_tasks())
    found.append(results and results["config"]["adainfer"])
if lm.rank == 0:
    open(sys.argv[2], "w").write(json.dumps(found))
# a process that exits while the other one still waits for it can be aborted by torch's threads
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def test_two_processes_report_the_counts_of_each_run(folder, tmp_path):
    (tmp_path / "twice.py").write_text(TWICE)
    done = in_two_processes(
        tmp_path / "twice.py", folder, tmp_path / "out.json",
        PYTHONPATH=os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = json.loads((tmp_path / "out.json").read_text())
    assert first["processes"] == second["processes"] == 2
    assert first["tokens_counted"] == second["tokens_counted"] > 0


def statistics(found):
    return {
        task: {k: v for k, v in row.items() if k.split(",")[0] in {*MEANS, "acc", "top1_acc", "exit_layer_var"}}
        for task, row in found["results"].items()
    }


def test_use_cache_gives_the_same_statistics_and_refuses_other_stoppers(folder, manager, run, tmp_path):
    cache = str(tmp_path / "answers")
    first = evaluate(folder, manager, use_cache=cache)
    again = evaluate(folder, manager, use_cache=cache)
    assert statistics(first) == statistics(again) == statistics(run)
    assert again["config"]["adainfer"]["block_calls_counted"] == 0
    with pytest.raises(AdaInferError, match=r"^use_cache: .*another path$"):
        evaluate(folder, manager, stopper="gap:0.4", use_cache=cache)
    with pytest.raises(AdaInferError, match=r"^use_cache"):
        evaluate(folder, manager, use_cache=cache, extra=",check_layers=every:2")


def test_another_models_cache_is_refused(folder, manager, tmp_path):
    cache = str(tmp_path / "answers")
    evaluate(folder, manager, model="hf", use_cache=cache, limit=2)
    with pytest.raises(AdaInferError, match=r"no adainfer model's"):
        evaluate(folder, manager, use_cache=cache, limit=2)


def test_an_interrupted_run_keeps_whole_documents(folder, manager, run, tmp_path, monkeypatch):
    from lm_eval_adainfer.prefill.engine import Engine

    cache, real, calls = str(tmp_path / "answers"), Engine.run, []

    def interrupted(self, batches):
        calls.append(len(batches))
        if len(calls) == 6:
            raise KeyboardInterrupt
        real(self, batches)

    monkeypatch.setattr(Engine, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(folder, manager, use_cache=cache)
    monkeypatch.setattr(Engine, "run", real)
    resumed = evaluate(folder, manager, use_cache=cache)
    for task, row in statistics(resumed).items():
        assert row == pytest.approx(statistics(run)[task])
    assert 0 < resumed["config"]["adainfer"]["tokens_counted"] < run["config"]["adainfer"]["tokens_counted"]


def test_two_processes_give_the_same_numbers(folder, run, tmp_path):
    """A real two-process run on CPUs, through the launcher that people use."""
    done = in_two_processes(
        "-m", "lm_eval_adainfer", "--model", "adainfer",
        "--model_args", f"pretrained={folder},dtype=float32,stopper=gap:0.3",
        "--tasks", ",".join(TASKS), "--limit", "9", "--num_fewshot", "1", "--batch_size", "4", "--device", "cpu",
        "--output_path", str(tmp_path), "--log_samples",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = Path(tmp_path).rglob("results_*.json")
    found = own_names(json.loads(file.read_text()))
    for task, row in statistics(found).items():
        assert row == pytest.approx(statistics(run)[task], abs=1e-6)
    assert found["config"]["adainfer"]["processes"] == 2
    assert found["config"]["adainfer"]["tokens_counted"] == run["config"]["adainfer"]["tokens_counted"]


def wrapped(module):
    """As another package might do it, before a model of ours is built."""
    stock = module.evaluate
    module.evaluate = functools.wraps(stock)(lambda *args, **kwargs: stock(*args, **kwargs))
    return module.evaluate


HOLDS = {
    "the function": lambda module: module.evaluate,
    "the package's": lambda module: lm_eval.evaluate,
    "the package": lambda module: lambda *args, **kwargs: lm_eval.evaluate(*args, **kwargs),
    "the module": lambda module: lambda *args, **kwargs: module.evaluate(*args, **kwargs),
    "a partial": lambda module: functools.partial(module.evaluate, bootstrap_iters=0),
    "a wrapper in its place": wrapped,
    "what lies under a wrapper": lambda module: (module.evaluate, wrapped(module))[0],
    "simple_evaluate": lambda module: lambda lm, tasks, limit: module.simple_evaluate(
        lm, tasks=list(tasks["tasks"].values()), limit=limit, bootstrap_iters=0, task_manager=our_tasks()
    ),
}


@pytest.mark.parametrize("when", ["before", "between", "after"])
@pytest.mark.parametrize("what", HOLDS)
def test_no_import_order_loses_the_exit_metrics(what, when, folder, manager, monkeypatch):
    """``evaluate`` is bound before the model is built, between two models, or after; each time from a fresh module."""
    monkeypatch.delitem(sys.modules, "lm_eval.evaluator")
    monkeypatch.setattr(lm_eval, "evaluator", None)
    module = importlib.import_module("lm_eval.evaluator")
    build = lambda: AdaInferLM(pretrained=str(folder), stopper="gap:0.3", device="cpu", batch_size=4)  # noqa: E731
    built = build() if when != "before" else None
    evaluate = HOLDS[what](module)
    lm = built if when == "after" else build()
    tasks = manager.load(["adainfer_demo_fact"])
    for task in tasks["tasks"].values():
        task.set_fewshot_seed(1)
    row = evaluate(lm, tasks, limit=3)["results"]["adainfer_demo_fact"]
    assert {f"{name},none" for name in [*MEANS, "exit_layer_var", "top1_acc"]} <= set(row)


def test_a_script_that_imports_evaluate_first_gets_exit_metrics_without_the_start_up_hook(folder):
    script = """
import sys, json
sys.path[:0] = json.loads(sys.argv[2])  # -S: no site-packages, and no .pth file either
from lm_eval.evaluator import evaluate
from lm_eval_adainfer import AdaInferLM
from helpers.tasks import our_tasks
lm = AdaInferLM(pretrained=sys.argv[1], stopper="gap:0.3", device="cpu", batch_size=4)
tasks = our_tasks().load(["adainfer_demo_fact"])
tasks["tasks"]["adainfer_demo_fact"].set_fewshot_seed(1)
print(sorted(evaluate(lm, tasks, limit=2)["results"]["adainfer_demo_fact"]))
"""
    path = json.dumps([*sys.path, str(Path(__file__).parent)])
    command = [sys.executable, "-S", "-c", script, str(folder), path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(f"'{name},none'" in done.stdout for name in [*MEANS, "exit_layer_var", "top1_acc"])


def test_evaluate_is_what_it_was_to_those_who_look_at_it(folder):
    """Written for lm-eval 0.4.13: a plain function, whose code is exchanged."""
    import inspect

    from lm_eval.evaluator import evaluate as theirs

    AdaInferLM(pretrained=str(folder), device="cpu")
    AdaInferLM(pretrained=str(folder), device="cpu")
    assert list(inspect.signature(theirs).parameters)[:3] == ["lm", "task_dict", "limit"]
    assert theirs.__name__ == "evaluate" and "Dictionary of results" in theirs.__doc__
    with pytest.raises(ValueError, match="Either 'limit' or 'samples' must be None"):
        theirs(None, {}, 3, {"t": [1]})


# ------------------------------------------------------------------------------------------------ mixed documents
class Mixed(ConfigurableTask):
    """As stock squadv2: every document generates a text and scores an answer."""

    VERSION = 1
    DATASET_PATH = "unused"

    def __init__(self, order, output_type="generate_until"):
        self.order = order
        splits = {"train": documents(4, 1), "test": documents(6, 2)}
        super().__init__(
            config={
                "task": "mixed", "output_type": output_type, "training_split": "train", "test_split": "test",
                "custom_dataset": lambda **_: {k: datasets.Dataset.from_list(v) for k, v in splits.items()},
                "doc_to_text": "{{question}}", "doc_to_target": "{{choices[answer]}}", "num_fewshot": 0,
            }
        )  # fmt: skip

    def construct_requests(self, doc, ctx, **kwargs):
        arguments = {
            "generate_until": [(ctx, {"until": ["\n"], "max_gen_toks": 5})],
            "loglikelihood": [(ctx, " unanswerable"), (ctx, " no")],
            "loglikelihood_rolling": [("", ctx) if hasattr(self, "scorers") else (ctx,)],
        }
        return [
            request_of(kind, doc, one, n, "mixed", **kwargs)
            for kind in self.order
            for n, one in enumerate(arguments[kind])
        ]

    def process_results(self, doc, results):
        assert len(results) == sum(2 if kind == "loglikelihood" else 1 for kind in self.order)
        texts = [r for r in results if isinstance(r, str)]
        return {"length": float(len(texts[0])) if texts else 0.0}

    def aggregation(self):
        return {"length": mean}

    def higher_is_better(self):
        return {"length": True}


ORDERS = [
    ("generate_until", "loglikelihood"),
    ("loglikelihood", "generate_until"),
    ("loglikelihood_rolling", "loglikelihood"),
    ("loglikelihood", "loglikelihood_rolling", "generate_until"),
]


def run_mixed(order, **kwargs):
    model, tokenizer = make_model("llama", vocab_size=257, max_position_embeddings=512), byte_tokenizer()
    found = {}
    for cls, more in ((AdaInferLM, {"stopper": "gap:0.3"}), (HFLM, {})):
        lm = cls(pretrained=model, tokenizer=tokenizer, batch_size=4, max_length=400, **more)
        found[cls] = simple_evaluate(lm, tasks=[Mixed(order)], bootstrap_iters=0, task_manager=our_tasks(), **kwargs)
    return found[AdaInferLM], found[HFLM]


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_documents_that_mix_kinds_of_requests_have_one_exit_layer_of_each_kind(order, tmp_path):
    found, stock = run_mixed(order)
    assert "length,none" in found["results"]["mixed"] and "length,none" in stock["results"]["mixed"]
    several = 0
    for sample in found["samples"]["mixed"]:
        layers, texts = {}, []
        for kind, (response,) in zip(sorted_by_index(order), sample["resps"], strict=True):
            layers.setdefault(kind, set()).add(response.exit_record.exit_layer)
            if kind == "generate_until":
                texts.append(list(response.exit_record.layers))
                assert response.exit_record.exit_layer == pytest.approx(sum(texts[0]) / len(texts[0]))
        assert all(len(found_layers) == 1 for found_layers in layers.values())  # compared requests share a block
        each = [next(iter(found_layers)) for found_layers in layers.values()]
        several += len(set(each)) > 1
        assert sample["exit_layer"] == pytest.approx(sum(each) / len(each))
        assert sample["pruning_ratio"] == pytest.approx(1 - sample["exit_layer"] / 5)
        assert [list(x) for x in sample.get("exit_layers", [])] == texts
    assert several
    cached = run_mixed(order, use_cache=str(tmp_path / "cache"))[0]
    assert statistics(cached) == statistics(found)


def sorted_by_index(order):
    """lm-eval sorts a document's requests by their index; equal ones keep their order."""
    pairs = [(n, kind) for kind in order for n in range(2 if kind == "loglikelihood" else 1)]
    return [kind for _, kind in sorted(pairs, key=lambda pair: pair[0])]


@pytest.mark.parametrize("order", ORDERS[:2] + ORDERS[3:], ids="-".join)
@pytest.mark.parametrize("output_type", ["generate_until", "loglikelihood"])
def test_of_mixed_documents_the_requests_of_the_tasks_kind_are_traced(order, output_type, tmp_path, caplog):
    model, tokenizer = make_model("llama", vocab_size=257, max_position_embeddings=512), byte_tokenizer()
    lm = AdaInferLM(pretrained=model, tokenizer=tokenizer, batch_size=4, max_length=400)
    with caplog.at_level(logging.WARNING, "lm_eval_adainfer"):
        (path,) = recording.trace(lm, {"mixed": Mixed(order, output_type)}, tmp_path)
    meta, arrays = recording.read(path)
    fitting = {n for n, doc in enumerate(documents(4, 1)) if split_of(doc, has_training=True) == "train"}
    assert meta["output_type"] == output_type and set(arrays["doc_id"].tolist()) == fitting != set()
    assert arrays["scores"].shape[2] == (0 if output_type == "generate_until" else 2)
    said = [r.getMessage() for r in caplog.records if r.getMessage().startswith("tasks: ")]
    other = next(kind for kind in order if kind != output_type)
    assert len(said) == 1 and other in said[0]


def test_a_task_that_makes_no_request_of_its_own_kind_is_refused_before_the_model_runs(tmp_path):
    model, tokenizer = make_model("llama", vocab_size=257, max_position_embeddings=512), byte_tokenizer()
    lm = AdaInferLM(pretrained=model, tokenizer=tokenizer, batch_size=4, max_length=400)
    with pytest.raises(AdaInferError, match=r"^tasks: mixed is a generate_until task, but .*loglikelihood requests"):
        recording.trace(lm, {"mixed": Mixed(("loglikelihood",))}, tmp_path)
    assert lm.engine.tokens == 0 and not list(tmp_path.iterdir())


def test_where_prompts_leave_stands_beside_the_texts(folder, tmp_path):
    """Rows of a task and of its group, under a reader that decides how deep a prompt goes, and not otherwise."""
    for name, questions in (("one", 4), ("two", 7)):
        data = tmp_path / f"{name}.jsonl"
        data.write_text("".join(json.dumps({"q": f"{name} {'x' * i}", "a": "y"}) + "\n" for i in range(questions)))
        listed = "{name: none, filter: [{function: take_first}]}"
        (tmp_path / f"{name}.yaml").write_text(FILTERED.format(name=name, data=data, filters=listed))
    (tmp_path / "group.yaml").write_text(
        "group: both\ntask: [one, two]\naggregate_metric_list: [{metric: exact_match, weight_by_size: true}]\n"
    )
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    for extra in (",reader=copy:2", ",reader=copy:2,generation=dense", ""):
        found = evaluate(folder, manager, "fixed:2", tasks=["both"], limit=None, num_fewshot=0, extra=extra)
        rows = [found["results"][name].get("prompt_exit_layer,none") for name in ("one", "two", "both")]
        assert rows == ([2, 2, 2] if extra == ",reader=copy:2" else [None] * 3)
        layers = {s["exit_layer"] for samples in found["samples"].values() for s in samples}
        assert min(layers) == 2 if extra == "" else min(layers) > 2
