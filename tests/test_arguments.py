"""Arguments that would do nothing: misspelt ones, and those that a model object has no use for."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from helpers.models import byte_tokenizer, make_model

from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.harness.model import AdaInferLM
from lm_eval_adainfer.strategies import specs


def one_sentence(caught, *words):
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


@pytest.fixture
def model():
    return make_model("llama", vocab_size=257)


SLIPS = [
    ("stoper", "stopper"), ("Stopper", "stopper"), ("check_layer", "check_layers"), ("minlayer", "min_layer"),
    ("kv_polcy", "kv_policy"), ("head_chek", "head_check"), ("prefix_cach", "prefix_cache"), ("log_feature", "log_features"),
    ("generations", "generation"), ("batchsize", "batch_size"), ("max_lenght", "max_length"), ("add_bos_tokens", "add_bos_token"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "meant"), SLIPS)
def test_a_misspelt_argument_is_refused_beside_an_object_and_beside_a_name(name, meant, model, folder):
    for pretrained, more in ((model, {"tokenizer": byte_tokenizer()}), (str(folder), {})):
        with pytest.raises(AdaInferError, match=f"^{name}: ") as caught:
            AdaInferLM(pretrained=pretrained, device="cpu", **more, **{name: "gap:0.3"})
        one_sentence(caught, meant)


def test_what_is_unlike_all_arguments_is_refused_beside_an_object(model):
    with pytest.raises(AdaInferError, match=r"^attn_implementation: ") as caught:
        AdaInferLM(pretrained=model, tokenizer=byte_tokenizer(), attn_implementation="eager")
    one_sentence(caught, "model object")


def test_what_transformers_takes_goes_to_transformers(folder):
    lm = AdaInferLM(
        pretrained=str(folder), device="cpu", attn_implementation="eager", device_map="cpu", local_files_only=True,
        low_cpu_mem_usage=True, use_safetensors=True, max_memory={"cpu": 2**30}, code_revision="main",
        initializer_range=0.5, rms_norm_eps=0.25,
    )  # fmt: skip
    assert lm.model.config.rms_norm_eps == 0.25 and lm.model.config._attn_implementation == "eager"
    assert AdaInferLM(pretrained=Path(folder), device="cpu").fingerprint != lm.fingerprint
    with pytest.raises(AdaInferError, match=r"^model_args: .*quite_unknown"):
        AdaInferLM(pretrained=str(folder), device="cpu", quite_unknown=1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"peft": "some/adapter"}, ["peft", "PeftModel"]),
        ({"delta": "some/delta"}, ["delta", "yourself"]),
        ({"parallelize": True}, ["parallelize", "device_map"]),
        ({"autogptq": True}, ["autogptq"]),
        ({"gguf_file": "x.gguf"}, ["gguf_file"]),
        ({"max_cpu_memory": "3GiB"}, ["max_cpu_memory", "max_memory"]),
        ({"dtype": "bfloat16"}, ["dtype", "float32", "bfloat16", "model.to"]),
        ({"dtype": torch.float16}, ["dtype", "float32", "float16"]),
    ],
    ids=str,
)
def test_what_only_acts_while_loading_is_refused_beside_an_object(options, words, model):
    with pytest.raises(AdaInferError, match=f"^{next(iter(options))}: ") as caught:
        AdaInferLM(pretrained=model, tokenizer=byte_tokenizer(), **options)
    one_sentence(caught, *words)


def test_what_says_what_the_object_is_already_is_taken(model, caplog):
    options = {"dtype": "float32", "device": "cpu", "peft": None, "parallelize": False, "revision": "main", "subfolder": ""}
    with caplog.at_level(logging.WARNING, "lm_eval_adainfer"):
        AdaInferLM(pretrained=model, tokenizer=byte_tokenizer(), **options)
    assert not [r for r in caplog.records if r.name.startswith("lm_eval_adainfer")]
    with caplog.at_level(logging.WARNING, "lm_eval_adainfer"):
        AdaInferLM(pretrained=model, tokenizer=byte_tokenizer(), device="mps", revision="v2")
    said = [r.getMessage() for r in caplog.records if r.name.startswith("lm_eval_adainfer")]
    assert len(said) == 2 and said[0].startswith("device: ") and said[1].startswith("revision: ")


# ------------------------------------------------------------------------------------------------ stopper=
@pytest.mark.parametrize(
    ("spec", "meant"),
    [
        ("GAP:0.8", "gap:0.8"), ("Gap", "gap"), ("gap=0.8", "gap:0.8"), ("gap 0.8", "gap:0.8"), ("gap0.8", "gap:0.8"),
        ("stopper=gap:0.8", "gap:0.8"), ("softmx:0.9", "softmax:0.9"), ("saturaton:0.98", "saturation:0.98"),
        ("patience=3", "patience:3"), ("PATIENCE:3", "patience:3"), ("fixd:2", "fixed:2"), ("fixed=24", "fixed:24"),
        ("NONE", "none"), ("non", "none"), ("shortgpt=last2", "shortgpt:last2"), ("ShortGPT:last2", "shortgpt:last2"),
        ("SVM", "svm"), ("bets", "best"), ("gap-0.8", "gap:0.8"), ("gap/0.8", "gap:0.8"), ("gap;.8", "gap:.8"),
    ],
)  # fmt: skip
def test_a_misspelt_stopper_is_told_the_nearest_and_all_there_are(spec, meant):
    with pytest.raises(AdaInferError, match=r"^stopper: ") as caught:
        specs.parse(spec)
    one_sentence(caught, spec, f"{meant} is probably meant", "saturation:0.98", "svm")


@pytest.mark.parametrize("spec", ["stopper=0.8", "0.8", ".8", 0.8, "wat", "1e-3"])
def test_a_stopper_that_is_like_none_is_told_all_there_are(spec):
    with pytest.raises(AdaInferError, match=r"^stopper: ") as caught:
        specs.parse(spec)
    one_sentence(caught, str(spec), "gap:0.8", "saturation:0.98", "svm")
    assert "damaged" not in str(caught.value) and "does not exist" not in str(caught.value)


@pytest.mark.parametrize("spec", ["./gap", "folder/some.stopper", "some.stopper", "missing.pkl", "C:\\x\\y.stopper"])
def test_a_path_is_taken_for_a_path(spec):
    with pytest.raises(AdaInferError, match="does not exist"):
        specs.parse(spec)
