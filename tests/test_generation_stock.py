"""The early-exit loop against stock ``hf``, whole runs that are killed, and what a run records."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time

import datasets
import pytest
import torch
from helpers.caches import stored
from helpers.models import SHARED, make_model
from helpers.replay import generated
from helpers.tasks import instance, our_tasks
from lm_eval import simple_evaluate
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm_eval_adainfer import paths, releases
from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.harness.model import AdaInferLM

FACTS = [
    ("The Normans were the people who in the 10th and 11th centuries gave their name to Normandy, a region in France.",
     "In what country is Normandy located?"),
    ("Oxygen is a chemical element with symbol O and atomic number 8.", "What is its symbol?"),
    ("Warsaw is the capital of Poland. It stands on the Vistula River, roughly 260 kilometres from the Baltic Sea and "
     "300 kilometres from the Carpathian Mountains. Its population is estimated at 1.740 million residents.",
     "On what river does Warsaw stand?"),
    ("The Amazon is a forest.", "What is the Amazon?"),
]  # fmt: skip
SQUAD = [
    f"Context: {context}\nQuestion: {question}\nAnswer:" if n % 2 else
    f"Context: {FACTS[n - 1][0]}\nQuestion: {FACTS[n - 1][1]}\nAnswer: it is\n\n"
    f"Context: {context}\nQuestion: {question}\nAnswer:"
    for n, (context, question) in enumerate(FACTS)
]  # fmt: skip
WORDS = [
    f"Q: {a}\nA: {a}s\n\nQ: {b}\nA:"
    for a, b in [("cat", "dog"), ("owl", "emu"), ("ox", "foxglove"), ("a", "be"), ("tin", "pan")]
]
PROMPTS = [*SQUAD, *WORDS, "x", " ".join(f"{n} and" for n in range(60)), *(f"Item {n}:" * (n + 1) for n in range(6))]


def asked(prompts, **settings):
    settings = {"until": ["\n\n"], "max_gen_toks": 10, **settings}
    return [instance(p, settings, n, kind="generate_until") for n, p in enumerate(prompts)]


def both(model, requests, batch_size, stopper="gap:1", **options):
    """(stock's texts, ours); ours asks the stopper after every block, and it never fires."""
    options = {"batch_size": batch_size, "max_length": 700, "device": "cpu", **options}
    stock = HFLM(pretrained=model, **options).generate_until(requests, True)
    ours = AdaInferLM(pretrained=model, stopper=stopper, **options).generate_until(requests, True)
    assert {trace.exit_layer for trace in (a.exit_record for a in ours)} == {ours[0].exit_record.n_blocks}
    return stock, ours


@pytest.fixture(scope="module")
def model():
    return make_model("llama", vocab_size=257, max_position_embeddings=1024)


@pytest.fixture(scope="module")
def demo():
    """A trained model, which writes words."""
    model = AutoModelForCausalLM.from_pretrained(paths.demo_model(), dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(paths.demo_model())


def pieces(texts, n):
    """Strings of three letters, out of the middle of words and across words: they do occur, but are no tokens."""
    return [text[4:7] for text in texts if len(text) > 12 and text.isascii()][:n]


# ------------------------------------------------------------------------------------------------ equal to stock


@pytest.mark.parametrize("batch_size", [1, 5, 16])
@pytest.mark.parametrize("family", ["llama", "mistral", "falcon"])
def test_a_rule_that_never_fires_generates_what_stock_does(family, batch_size, tokenizer):
    sizes = {} if family == "falcon" else {"max_position_embeddings": 1024}
    model = make_model(family, vocab_size=257, **sizes)
    for options in ({}, {"kv_policy": "propagate"}, {"head_check": "shortlist"}):
        requests = asked(PROMPTS)
        stock = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=700)
        ours = AdaInferLM(
            pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=700, stopper="gap:1", **options
        )
        assert ours.generate_until(requests, True) == stock.generate_until(requests, True)
        assert ours.generation == "early" and ours.texts.windows is not None
        if family != "llama" or batch_size != 5:
            break


@pytest.mark.parametrize("batch_size", [1, 5, 16])
def test_stopper_none_generates_what_stock_does(model, tokenizer, batch_size):
    stock, ours = both(model, asked(PROMPTS), batch_size, "none", tokenizer=tokenizer)
    assert ours == stock


SETTINGS = {
    "one token": {"max_gen_toks": 1},
    "many tokens": {"max_gen_toks": 40},
    "no stop strings": {"until": []},
    "a stop string alone": {"until": "a"},
    "repetition penalty": {"repetition_penalty": 1.3},
    "no repeated pairs": {"no_repeat_ngram_size": 2, "max_gen_toks": 20},
    "at least six": {"min_new_tokens": 6},
    "temperature of 0": {"temperature": 0.0, "do_sample": False},
    "banned": {"suppress_tokens": list(range(80, 160))},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_generation_settings_mean_what_they_mean_to_stock(settings, model, tokenizer):
    stock, ours = both(model, asked(PROMPTS, **settings), 5, tokenizer=tokenizer)
    assert ours == stock


@pytest.mark.parametrize("max_length", [12, 30, 64])
def test_prompts_are_cut_as_stock_cuts_them(max_length, model, tokenizer):
    requests = asked(PROMPTS)
    stock, ours = both(model, requests, 5, tokenizer=tokenizer, max_length=max_length)
    assert ours == stock
    assert any(len(r.args[0]) > max_length for r in requests)


def test_stop_strings_of_several_tokens_end_a_text_where_stock_ends_it_alone(demo):
    """In a batch, stock runs on until *one* string is in all rows, and what a row adds can cut it at another string."""
    options = {"pretrained": demo[0], "tokenizer": demo[1], "max_length": 250}
    stock = HFLM(**options)
    stops = pieces(stock.generate_until(asked(PROMPTS[::2], until=[], max_gen_toks=20), True), 3)
    assert len(stops) == 3
    requests = asked(PROMPTS[::2], until=stops, max_gen_toks=20)
    expected = stock.generate_until(requests, True)
    for size in (1, 5):
        ours = AdaInferLM(stopper="gap:1", batch_size=size, **options).generate_until(requests, True)
        assert ours == expected
        assert sum(len(a.exit_record.layers) < 20 for a in ours) >= 3


def test_every_end_token_of_a_list_ends_a_text(tokenizer, monkeypatch):
    model = make_model("llama", vocab_size=257, max_position_embeddings=1024)
    options = {"tokenizer": tokenizer, "batch_size": 1, "max_length": 700}
    probe = AdaInferLM(pretrained=model, stopper="gap:1", **options)
    seen = [row.tokens for row, _ in generated(probe, asked(PROMPTS, until=[]), monkeypatch)]
    model.generation_config.eos_token_id = [0, seen[0][3], seen[1][5]]
    for size in (1, 5, 16):
        stock, ours = both(model, asked(PROMPTS, until=[]), size, tokenizer=tokenizer)
        assert ours == stock
        assert min(len(a.exit_record.layers) for a in ours) <= 4


@pytest.mark.parametrize("setting", [{"temprature": 0.7}, {"num_return_sequences": 2, "do_sample": True, "temperature": 1.0},
                                     {"stop_strings": ["x"]}], ids=str)  # fmt: skip
def test_settings_that_stock_refuses_are_not_dropped_silently(setting, model, tokenizer):
    options = {"pretrained": model, "tokenizer": tokenizer, "max_length": 700}
    with pytest.raises(ValueError):
        HFLM(**options).generate_until(asked(PROMPTS[:2], **setting), True)
    with pytest.raises(AdaInferError):
        AdaInferLM(stopper="gap:1", **options).generate_until(asked(PROMPTS[:2], **setting), True)


def test_thoughts_are_cut_off_as_stock_cuts_them(demo):
    """By a string or by a token; stock's rows go on until all are finished, so it is asked one at a time."""
    model, tokenizer = demo
    options = {"pretrained": model, "tokenizer": tokenizer, "max_length": 250}
    free = HFLM(**options).generate_until(asked(PROMPTS[::2], until=[], max_gen_toks=16), True)
    text = next(t for t in free if t.isascii() and len(t) > 12)
    for end in (text[4:6], tokenizer.encode(text, add_special_tokens=False)[3]):
        requests = asked(PROMPTS[::2], until=["zz", pieces(free, 5)[-1]], max_gen_toks=16)
        expected = HFLM(think_end_token=end, **options).generate_until(requests, True)
        assert sum(a != b for a, b in zip(expected, free, strict=True)) > 1
        for size in (1, 5):
            ours = AdaInferLM(think_end_token=end, stopper="gap:1", batch_size=size, **options)
            assert ours.generate_until(requests, True) == expected


def test_chat_templates_are_applied_as_by_stock(model, tokenizer, monkeypatch):
    monkeypatch.setattr(
        tokenizer, "chat_template",
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}",
    )  # fmt: skip
    documents = [{"question": p[-60:], "answer": "x"} for p in PROMPTS]

    def run(lm):
        task = releases.class_for(ConfigurableTask, "generate_until")(config={
            "task": "toy", "output_type": "generate_until", "test_split": "test", "fewshot_split": "test",
            "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(documents)}, "num_fewshot": 1,
            "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}", "metadata": {"version": 1.0},
            "generation_kwargs": {"until": ["\n\n"], "do_sample": False, "max_gen_toks": 8},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        })  # fmt: skip
        found = simple_evaluate(
            model=lm, tasks=[task], bootstrap_iters=0, apply_chat_template=True, fewshot_as_multiturn=True,
            system_instruction="be brief", task_manager=our_tasks(),
        )  # fmt: skip
        return [(s["arguments"]["gen_args_0"]["arg_0"] if isinstance(s["arguments"], dict) else s["arguments"][0][0],
                 str(s["resps"][0][0])) for s in found["samples"]["toy"]]  # fmt: skip

    options = {"pretrained": model, "tokenizer": tokenizer, "batch_size": 5, "max_length": 700}
    stock, ours = run(HFLM(**options)), run(AdaInferLM(stopper="gap:1", **options))
    assert ours == stock
    assert all("<assistant>" in prompt and "be brief" in prompt for prompt, _ in ours)


@pytest.mark.parametrize("which", ["adainfer-demo", "llama-16x128"])
def test_trained_models_generate_what_stock_does(which):
    """Where answers end by themselves, at every batch size and under every option."""
    folder = paths.demo_model() if which == "adainfer-demo" else SHARED / "models" / which
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    stock = HFLM(pretrained=str(folder), dtype="float32", device="cpu", max_length=250)
    requests = asked(PROMPTS, until=["\n"], max_gen_toks=12)
    for size, options in ((1, {}), (5, {"kv_policy": "propagate"}), (16, {"head_check": "shortlist"})):
        stock.batch_size_per_gpu = size
        ours = AdaInferLM(
            pretrained=str(folder), dtype="float32", device="cpu", max_length=250, batch_size=size, stopper="gap:1", **options
        )
        answers = ours.generate_until(requests, True)
        assert answers == stock.generate_until(requests, True)
        assert len({len(a.exit_record.layers) for a in answers}) > 1


# ------------------------------------------------------------------------------------------------ killed runs

TASK = "adainfer_demo_plural_generate"


RUN = f"""
import json, sys, torch
torch.set_num_threads(1)
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval_adainfer import paths
from lm_eval_adainfer.registration import install
install()
found = simple_evaluate(
    model="adainfer", model_args="pretrained=adainfer-demo,dtype=float32,stopper=gap:0.6,check_layers=every:3",
    tasks=["{TASK}"], limit=150, batch_size=2, device="cpu", bootstrap_iters=0, use_cache=sys.argv[1] if sys.argv[1:] else None,
    task_manager=TaskManager(include_path=str(paths.task_configs()), include_defaults=False),
)
keys = ("doc_id", "resps", "exact_match", "exit_layer", "exit_layers", "layers_run", "flops_ratio_total")
documents = sorted([sample[key] for key in keys] for sample in found["samples"]["{TASK}"])
print(json.dumps([found["results"]["{TASK}"], documents, found["config"]["adainfer"]]))
"""


def finished(file):
    """The finished texts in a cache that another process may be writing: key to value."""
    try:
        rows = stored(f"file:{file}?mode=ro", uri=True)
    except sqlite3.OperationalError:  # not there yet, or just being written
        return {}
    rows.pop("adainfer_fingerprint", None)
    return rows


def test_a_killed_run_loses_no_finished_text_and_comes_to_the_same_statistics(tmp_path):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    start, cache, file = [sys.executable, "-c", RUN], str(tmp_path / "cache"), tmp_path / "cache_rank0.db"

    def run(*more):
        done = subprocess.run([*start, *more], env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout.strip().splitlines()[-1])

    with subprocess.Popen(
        [*start, cache], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        while process.poll() is None and len(finished(file)) < 10:
            time.sleep(0.02)
        process.kill()
    assert process.returncode == -signal.SIGKILL  # it was killed, and had not ended by itself
    kept = finished(file)
    assert 10 <= len(kept) < 150

    resumed, whole = run(cache), run()
    assert resumed[:2] == whole[:2]
    assert len(whole[1]) == 150 and 1 < whole[0]["exit_layer,stripped"] < 12
    after = finished(file)
    assert len(after) == 150 and kept.items() <= after.items()
    assert resumed[2]["generated_tokens_counted"] < whole[2]["generated_tokens_counted"]
    assert whole[2]["generated_tokens_counted"] == sum(len(layers) for row in whole[1] for layers in row[4])


# ------------------------------------------------------------------------------------------------ the record


def test_the_record_says_how_many_tokens_were_generated_how_fast_and_how(model, tokenizer):
    requests = asked(PROMPTS)

    def record(**options):
        lm = AdaInferLM(pretrained=model, tokenizer=tokenizer, max_length=700, **{"batch_size": 5, "stopper": "gap:0.3", **options})
        answers = lm.generate_until(requests, True)
        found = lm.get_model_info()["adainfer"]
        tokens, seconds = found["generated_tokens_counted"], found["seconds_generating_measured"]
        assert found["generated_tokens_per_second_measured"] == pytest.approx(tokens / seconds)
        return answers, found

    answers, found = record()
    assert (found["generation"], found["kv_policy"], found["head_check"]) == ("early", "recompute", "exact")
    assert found["generated_tokens_counted"] == sum(len(a.exit_record.layers) for a in answers)
    _, found = record(kv_policy="propagate", head_check="shortlist:9")
    assert (found["kv_policy"], found["head_check"]) == ("propagate (approximate)", "shortlist:9")
    for options in ({"generation": "dense"}, {"stopper": "none"}):
        _, found = record(**options)
        assert found["generation"] == "dense" and not {"kv_policy", "head_check"} & set(found)
    json.dumps(found)


@pytest.mark.parametrize("batch_size", [1, 5, 16])
def test_a_dense_run_counts_the_tokens_up_to_the_end_of_each_row(batch_size, demo):
    """Stock runs finished rows on, until all are; what comes after a row's end is nobody's."""
    options = {"pretrained": demo[0], "tokenizer": demo[1], "max_length": 250}
    free = HFLM(**options).generate_until(asked(PROMPTS, until=[], max_gen_toks=16), True)
    requests = asked(PROMPTS, until=["\n", *pieces(free, 2)], max_gen_toks=16)
    dense = AdaInferLM(generation="dense", stopper="gap", batch_size=batch_size, **options)
    dense.generate_until(requests, True)
    early = AdaInferLM(stopper="gap:1", batch_size=1, **options)
    expected = sum(len(a.exit_record.layers) for a in early.generate_until(requests, True))
    assert dense.record()["generated_tokens_counted"] == expected < 16 * len(PROMPTS)


def test_a_model_that_is_never_asked_to_generate_has_no_speed(model, tokenizer):
    lm = AdaInferLM(pretrained=model, tokenizer=tokenizer, stopper="gap", max_length=64)
    lm.loglikelihood([instance("ab", " x", 0)], True)
    assert lm.record()["generated_tokens_counted"] == 0
    assert "generated_tokens_per_second_measured" not in lm.record()
    assert torch.is_grad_enabled()
