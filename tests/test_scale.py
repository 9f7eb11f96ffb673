"""Several processes, offloaded and quantised weights, every dtype, many documents: the plain model's results each time."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tracemalloc
from collections import Counter

import pytest
import torch
from helpers.models import lm_of, make_model
from helpers.processes import in_two_processes
from helpers.reference import read_score, score
from helpers.stoppers import Scripted
from helpers.tasks import instance, our_tasks, requests
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from lm_eval_adainfer import paths
from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.harness.model import AdaInferLM
from lm_eval_adainfer.prefill import planning

ROLLING = """
task: rolling
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
"""
TASKS = ["adainfer_demo_topic", "adainfer_demo_fact_generate", "rolling"]
TEXTS = ["a cat", "deer and a fox", "x", "hi goat! no way", "e.", "one more of them", "the last"]


def of(folder, **kwargs):
    return AdaInferLM(**{"pretrained": str(folder), "device": "cpu", "dtype": "float32", "batch_size": 4, **kwargs})


def texts(kind="generate_until"):
    more = ({"until": ["\0"], "max_gen_toks": 6},) if kind == "generate_until" else ()
    return [instance(text, *more, n, kind=kind) if more else instance(text, None, n, kind=kind) for n, text in enumerate(TEXTS)]


def with_shots():
    return [instance("many shots " * 6 + r.args[0], r.args[1], r.doc_id, idx=r.idx) for r in requests()]


def everything(lm):
    """(answer, exit layer, exits per token) of shared-prefix documents, rolling and generated texts."""
    found = [*lm.loglikelihood(requests(), True), *lm.loglikelihood(with_shots(), True)]
    found = [(a[0], a.exit_record.exit_layer, None) for a in found]
    found += [(float(a), a.exit_record.exit_layer, None) for a in lm.loglikelihood_rolling(texts("loglikelihood_rolling"), True)]
    return found + [(str(a), a.exit_record.exit_layer, a.exit_record.layers) for a in lm.generate_until(texts(), True)]


def assert_same(found, expected, abs=1e-4):
    for (a, *exits), (b, *others) in zip(found, expected, strict=True):
        assert exits == others
        assert a == (b if isinstance(b, str) else pytest.approx(b, rel=2e-6, abs=abs))


# ------------------------------------------------------------------------------------------------ several processes


def test_processes_share_the_documents_and_give_the_results_of_one(folder, tmp_path):
    """Seven documents: one process has fewer than the other, and lm-eval pads it."""
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    (tmp_path / "rolling.yaml").write_text(ROLLING.replace("DATA", json.dumps(str(tmp_path / "texts.jsonl"))))
    options = f"pretrained={folder},dtype=float32,stopper=gap:0.3"
    one = simple_evaluate(
        model="adainfer", model_args=options, tasks=list(TASKS), limit=7, batch_size=4, device="cpu", bootstrap_iters=0,
        gen_kwargs="max_gen_toks=5",
        task_manager=TaskManager(include_path=[str(paths.task_configs()), str(tmp_path)], include_defaults=False),
    )  # fmt: skip
    done = in_two_processes(
        "-m", "lm_eval_adainfer",
        "--model", "adainfer", "--model_args", options, "--tasks", ",".join(TASKS), "--include_path", tmp_path,
        "--limit", "7", "--batch_size", "4", "--device", "cpu", "--gen_kwargs", "max_gen_toks=5",
        "--output_path", tmp_path / "two", "--log_samples", HF_HOME=str(tmp_path / "hf"), HF_HUB_OFFLINE="1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = (tmp_path / "two").rglob("results_*.json")
    two = json.loads(file.read_text())
    assert two["config"]["adainfer"]["processes"] == 2
    layers = set()
    for task, row in one["results"].items():
        numbers = {k: v for k, v in row.items() if isinstance(v, float) and "stderr" not in k}
        assert "exit_layer,none" in numbers or "exit_layer,stripped" in numbers
        assert {k: two["results"][task][k] for k in numbers} == pytest.approx(numbers, abs=1e-6)
        (file,) = (tmp_path / "two").rglob(f"samples_{task}_*.jsonl")
        theirs = {s["doc_id"]: s for s in map(json.loads, file.read_text().splitlines())}
        assert len(theirs) == 7
        for sample in one["samples"][task]:
            other = theirs[sample["doc_id"]]
            layers.add(sample["exit_layer"])
            for key in ("exit_layer", "layers_run", "flops_ratio_total"):
                assert other[key] == pytest.approx(sample[key])
            assert other.get("exit_layers") == (json.loads(json.dumps(sample.get("exit_layers"))))
            for (mine, *_), (their, *_) in zip(sample["resps"], other["resps"], strict=True):
                if isinstance(mine, str):
                    assert their == mine
                elif isinstance(mine, tuple):
                    assert float(their[0]) == pytest.approx(mine[0], rel=1e-5) and str(their[1]) == str(mine[1])
                else:
                    assert float(their) == pytest.approx(mine, rel=1e-5)
    assert len(layers) > 3


# ------------------------------------------------------------------------------------------------ split and offloaded


def device_map(head):
    blocks = {f"model.layers.{k}": "cpu" if k == 0 else "disk" for k in range(5)}
    return {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": head, "lm_head": head, **blocks}


MAPS = {"deep blocks": device_map("cpu"), "deep blocks and head": device_map("disk"), "everything": {"": "disk"}}


@pytest.mark.parametrize("options", [{}, {"kv_policy": "propagate"}, {"head_check": "shortlist:8"}], ids=str)
@pytest.mark.parametrize("where", MAPS)
def test_weights_on_disk_give_the_plain_models_results(where, options, folder, tmp_path):
    plain = of(folder, stopper=Scripted(), **options)
    lm = of(folder, stopper=Scripted(), parallelize=True, device_map=MAPS[where], offload_folder=str(tmp_path), **options)
    assert any(p.device.type == "meta" for p in lm.model.parameters())
    assert lm.fingerprint == plain.fingerprint and lm.anatomy.head_hash() == plain.anatomy.head_hash() != ""
    assert_same(everything(lm), everything(plain))


@pytest.mark.parametrize("where", ["deep blocks and head", "everything"])
@pytest.mark.parametrize("reader", ["copy:2", "sim:2"])
def test_readers_that_let_tokens_go_on_do_so_with_weights_on_disk(reader, where, folder, tmp_path):
    options = {"stopper": Scripted(), "reader": reader, "check_layers": "all"}
    plain = of(folder, **options)
    lm = of(folder, parallelize=True, device_map=MAPS[where], offload_folder=str(tmp_path), **options)
    assert any(p.device.type == "meta" for p in lm.model.parameters())
    found, expected = ([*x.loglikelihood(requests(), True), *x.loglikelihood(with_shots(), True)] for x in (lm, plain))
    assert [a.exit_record.exit_layer for a in found] == [a.exit_record.exit_layer for a in expected]
    assert len({a.exit_record.exit_layer for a in found}) > 2
    assert [a[0] for a in found] == pytest.approx([a[0] for a in expected], rel=2e-6, abs=1e-4)
    found, expected = (x.generate_until(texts(), True) for x in (lm, plain))
    assert list(found) == list(expected)
    assert [a.exit_record.prompt_exit_layer for a in found] == [a.exit_record.prompt_exit_layer for a in expected]


@pytest.fixture
def read_from_disk(monkeypatch):
    """Counts how often a tensor is fetched from where accelerate offloaded it."""
    from accelerate.utils.offload import OffloadedWeightsLoader

    reads, fetch = Counter(), OffloadedWeightsLoader.__getitem__

    def counted(self, name):
        reads[name] += 1
        return fetch(self, name)

    monkeypatch.setattr(OffloadedWeightsLoader, "__getitem__", counted)
    return reads


def blocks_read(reads):
    return {int(name.split(".")[2]) + 1 for name in reads if ".layers." in name}


@pytest.mark.parametrize("where", ["deep blocks and head", "everything"])
def test_blocks_behind_the_exit_are_never_loaded(where, folder, tmp_path, read_from_disk):
    lm = of(folder, stopper="fixed:3", parallelize=True, device_map=MAPS[where], offload_folder=str(tmp_path))
    lm.generate_until(texts()[:1], True)  # what it finds out about the model it finds out now
    lm.loglikelihood(with_shots(), True)
    first = {"deep blocks and head": 2, "everything": 1}[where]
    for ask in (
        lambda: lm.loglikelihood(requests(), True),
        lambda: lm.loglikelihood(with_shots(), True),
        lambda: lm.loglikelihood_rolling(texts("loglikelihood_rolling"), True),
        lambda: lm.generate_until(texts(), True),
    ):
        read_from_disk.clear()
        ask()
        assert blocks_read(read_from_disk) == set(range(first, 4))
        assert not [name for name in read_from_disk if "lm_head" in name or "model.norm" in name]  # these stay


@pytest.mark.parametrize("prefix_cache", [0, 4096])
def test_a_block_is_loaded_once_for_all_that_goes_through_it_together(
    prefix_cache, folder, tmp_path, read_from_disk, monkeypatch
):
    """As many blocks as the deepest document needs; where batches go one by one, as many for each."""
    options = {"stopper": "gap:0.3", "batch_size": 1, "prefix_cache": prefix_cache}
    lm = of(folder, parallelize=True, device_map={"": "disk"}, offload_folder=str(tmp_path), **options)
    asked = [r for r in with_shots() if r.idx == 0]
    expected = of(folder, **options).loglikelihood(asked, True)
    lm.loglikelihood(asked, True)  # what it finds out about the model it finds out now

    def loads():
        read_from_disk.clear()
        found = lm.loglikelihood(asked, True)
        assert [a[0] for a in found] == pytest.approx([a[0] for a in expected], rel=2e-6, abs=1e-4)
        depths = [a.exit_record.exit_layer for a in found]
        assert depths == [a.exit_record.exit_layer for a in expected] and len(set(depths)) > 1
        counted = Counter({name: n for name, n in read_from_disk.items() if ".layers." in name})
        assert len({counted[name] for name in counted if ".layers.0." in name}) == 1  # every weight of a block alike
        return depths, sum(n for name, n in counted.items() if "input_layernorm" in name)

    depths, loaded = loads()
    assert loaded == max(depths)
    assert all(p.device.type == "meta" for block in lm.anatomy.blocks for p in block.parameters())  # and not kept
    monkeypatch.setattr(planning, "TOGETHER_ROWS", 1)
    depths, loaded = loads()
    assert loaded == sum(depths) if not prefix_cache else loaded > max(depths)  # own tokens of several rows fit a batch


def test_a_model_object_whose_weights_are_offloaded(tokenizer, tmp_path):
    import accelerate

    expected = everything(lm_of(make_model("llama", vocab_size=257, tie_word_embeddings=True), tokenizer, stopper=Scripted()))
    for offload in (
        lambda model: accelerate.cpu_offload(model, execution_device="cpu"),
        lambda model: accelerate.disk_offload(model, str(tmp_path), execution_device="cpu"),
    ):
        model = offload(make_model("llama", vocab_size=257, tie_word_embeddings=True))
        lm = lm_of(model, tokenizer, stopper=Scripted())
        assert lm.device.type == "cpu"
        assert_same(everything(lm), expected)


# ------------------------------------------------------------------------------------------------ adapters, quantised


def test_an_adapter_from_disk_is_the_stock_models(folder, tokenizer, tmp_path):
    import peft

    torch.manual_seed(3)
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    peft.get_peft_model(make_model("llama", vocab_size=257, max_position_embeddings=1024), config).save_pretrained(tmp_path)
    stock = HFLM(pretrained=str(folder), peft=str(tmp_path), device="cpu", dtype="float32", batch_size=4)
    lm = of(folder, peft=str(tmp_path), prefix_cache=0)
    assert lm.fingerprint != of(folder, prefix_cache=0).fingerprint
    for a, b in zip(stock.loglikelihood(requests(), True), lm.loglikelihood(requests(), True), strict=True):
        assert b[0] == pytest.approx(a[0], rel=2e-6, abs=1e-4)


def quantised(kind, folder):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, QuantoConfig, TorchAoConfig

    if kind == "torchao":
        config = TorchAoConfig(pytest.importorskip("torchao.quantization").Int8WeightOnlyConfig())
    elif kind == "quanto":
        pytest.importorskip("optimum.quanto")
        config = QuantoConfig(weights="int8")
    else:
        pytest.importorskip("bitsandbytes")
        config = BitsAndBytesConfig(load_in_8bit=True)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32, device_map="cpu").eval()


@pytest.mark.parametrize("kind", ["bitsandbytes", "quanto", "torchao"])
def test_a_model_in_8_bit_is_counted_as_the_whole_one_and_exits_where_its_own_blocks_say(kind, folder, tokenizer):
    model = quantised(kind, folder)
    plain, lm = of(folder, stopper="fixed:3"), lm_of(model, tokenizer, stopper="fixed:3")
    assert lm.anatomy.block_weights == plain.anatomy.block_weights
    assert lm.fingerprint != plain.fingerprint
    answers = lm.loglikelihood(requests(documents=4), True)
    loose = {"rel": 1e-2, "abs": 0.1} if kind == "bitsandbytes" else {"rel": 1e-4, "abs": 1e-3}  # it rounds activations
    for request, answer in zip(requests(documents=4), answers, strict=True):
        context, continuation = lm._encode_pair(*request.args)
        assert answer[0] == pytest.approx(score(model, lm.anatomy.blocks, context, continuation, 3, 64)[0], **loose)
    for reader in ("copy:2", "sim:2"):
        read = lm_of(model, tokenizer, stopper="fixed:3", reader=reader)
        for request, answer in zip(requests(documents=4), read.loglikelihood(requests(documents=4), True), strict=True):
            slow = read_score(model, read.anatomy.blocks, reader, *read._encode_pair(*request.args), 3, 64)
            assert answer[0] == pytest.approx(slow[0], **loose)
    scripted = lm_of(model, tokenizer, stopper="gap:0.3")
    assert len({a.exit_record.exit_layer for a in scripted.loglikelihood(requests(), True)}) > 1
    assert {a.exit_record.n_blocks for a in scripted.generate_until(texts()[:3], True)} == {5}


# ------------------------------------------------------------------------------------------------ dtypes, Python


@pytest.mark.parametrize(
    ("options", "eps"),
    [
        ({"dtype": "float32"}, 0),
        ({"dtype": "auto"}, 0),
        ({"dtype": "bfloat16"}, 2**-7),
        ({"dtype": "bfloat16", "softmax_dtype": "float32"}, 2**-7),
        ({"dtype": "float16"}, 2**-10),
        ({"mixed_precision_dtype": "bfloat16"}, 2**-7),
    ],
    ids=str,
)
def test_every_dtype_gives_stocks_answers_and_the_exit_blocks_log_probabilities(options, eps, folder):
    stock = HFLM(**{"pretrained": str(folder), "device": "cpu", "dtype": "float32", "batch_size": 4, **options})
    dense, early = of(folder, prefix_cache=0, **options), of(folder, stopper="fixed:3", **options)
    close = {"rel": 2e-6 + 2 * eps, "abs": 1e-4 + 40 * eps}  # a rounding of logits of about 10 per token
    for a, b in zip(stock.loglikelihood(requests(), True), dense.loglikelihood(requests(), True), strict=True):
        assert b[0] == pytest.approx(a[0], **close)
    exact = of(folder, stopper="fixed:3").loglikelihood(requests(), True)
    for a, b in zip(exact, early.loglikelihood(requests(), True), strict=True):
        assert b[0] == pytest.approx(a[0], rel=10 * eps + 2e-6, abs=1e-4 + 200 * eps)
    assert [a.exit_record.layers for a in early.generate_until(texts(), True)] == [(3,) * 6] * len(TEXTS)


@pytest.mark.parametrize("name", ["float8_e4m3fn", "int64", torch.float8_e5m2])
def test_a_dtype_without_a_forward_is_refused(name, folder):
    with pytest.raises(AdaInferError, match=r"^dtype: no forward .*bfloat16"):
        of(folder, dtype=name)


def test_tensor_parallelism_is_refused(folder):
    with pytest.raises(AdaInferError, match=r"^tp_plan: 'auto' is not supported; .*parallelize=True"):
        of(folder, tp_plan="auto")


def test_python_takes_a_model_object_or_a_dictionary_of_arguments(folder, tokenizer):
    options = {
        "tasks": ["adainfer_demo_topic"], "limit": 6, "num_fewshot": 1, "bootstrap_iters": 0, "task_manager": our_tasks(),
    }  # fmt: skip
    ours = {"stopper": "gap:0.3", "batch_size": 4}
    model = make_model("llama", vocab_size=257, max_position_embeddings=1024)
    by_object = simple_evaluate(model=AdaInferLM(pretrained=model, tokenizer=tokenizer, **ours), **options)
    by_name = simple_evaluate(
        model="adainfer", model_args={"pretrained": str(folder), "dtype": "float32", "stopper": "gap:0.3"}, batch_size=4,
        device="cpu", **options,
    )  # fmt: skip
    rows = [r["results"]["adainfer_demo_topic"] for r in (by_object, by_name)]
    assert {k: v for k, v in rows[0].items() if isinstance(v, float)} == pytest.approx(
        {k: v for k, v in rows[1].items() if isinstance(v, float)}, abs=1e-6
    )
    assert 1 <= rows[0]["exit_layer,none"] < 5


# ------------------------------------------------------------------------------------------------ memory


def peak(lm, asked):
    """Bytes of Python objects at the worst moment of a run, beyond what was there before it."""
    gc.collect()
    gc.disable()  # when it runs depends on what other tests have left behind
    tracemalloc.start()
    try:
        lm.loglikelihood(asked, True)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        gc.enable()


def per_document(make, length):
    """Growth of the peak per further document."""
    contexts = [f"{n:04d} " + "abcdefg " * (length // 8) for n in range(480)]
    asked = [instance(c, f" {x}", n, idx=i) for n, c in enumerate(contexts) for i, x in enumerate("xy")]
    lm = make()
    lm.loglikelihood(asked[:8], True)
    few, many = (peak(lm, asked[: 2 * n]) for n in (160, 480))
    return (many - few) / 320


def test_memory_per_document_is_a_few_token_lists_and_does_not_follow_the_vocabulary(tokenizer):
    def model(vocab):
        return make_model("llama", vocab_size=vocab, num_hidden_layers=2)

    short, long = 16, 64
    ours = {
        (vocab, n): per_document(lambda v=vocab: lm_of(model(v), tokenizer, stopper="gap:0.3", batch_size=16, max_length=128), n)
        for vocab, n in ((257, short), (257, long), (4097, short))
    }
    stock = per_document(lambda: HFLM(pretrained=model(257), tokenizer=tokenizer, batch_size=16, max_length=128), short)
    assert ours[4097, short] < 1.1 * ours[257, short]
    assert ours[257, short] < stock + 6 * 2**10
    assert ours[257, long] - ours[257, short] < 12 * 8 * (long - short)  # bytes: two requests, six lists of tokens each


MANY = """
import sys, resource, torch
sys.path.insert(0, sys.argv[1])
from helpers.models import make_model, byte_tokenizer
from helpers.tasks import instance
from lm_eval.models.huggingface import HFLM
from lm_eval_adainfer.harness.model import AdaInferLM
torch.set_num_threads(1)
kind, documents = sys.argv[2], int(sys.argv[3])
kinds = {"hf": (HFLM, {}), "adainfer": (AdaInferLM, {"stopper": "gap:0.3"})}
model, words = make_model("llama", vocab_size=257, num_hidden_layers=2), byte_tokenizer()
lm = kinds[kind][0](pretrained=model, tokenizer=words, batch_size=256, max_length=64, **kinds[kind][1])
asked = [instance(f"document {n}", " x", n) for n in range(documents)]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
answers = lm.loglikelihood(asked, True)
assert len(answers) == documents
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.slow
def test_100_000_documents_need_a_few_kilobytes_each(tmp_path):
    (tmp_path / "many.py").write_text(MANY)
    grown = {}
    for kind in ("hf", "adainfer"):
        command = [sys.executable, str(tmp_path / "many.py"), os.path.dirname(__file__), kind, "100000"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=1200, env={**os.environ, "TQDM_DISABLE": "1"})
        assert done.returncode == 0, done.stderr[-2000:]
        grown[kind] = float(done.stdout.split()[-1]) / 100_000
    assert grown["adainfer"] < grown["hf"] + 4096, grown
