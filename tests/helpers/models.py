"""Tiny random models of many families, a tiny tokenizer, and where the real ones lie (if they do)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from helpers.families import REFUSED, SUPPORTED
from lm_eval_adainfer.harness.model import AdaInferLM

SHARED = Path(__file__).resolve().parents[3] / "shared"

# those that many tests run over; test_families.py runs over all
FAMILIES: dict[str, tuple[str, dict]] = {
    name: SUPPORTED[name]
    for name in (
        "llama", "opt", "opt-post-norm-projected", "gptj", "gpt2", "gpt_neox", "bloom", "mpt", "falcon", "mistral",
        "gemma2", "gemma3", "phi3", "qwen3", "cohere", "granite", "mixtral", "qwen3_moe", "mamba",
    )
}  # fmt: skip
# those whose rows can't be packed: attention of their own (no interface to wrap; GPT-J's until transformers 5.24), or
# masks that are no masks (alibi)
PADDED = {"bloom", "mpt", "falcon"} | (
    set() if transformers.GPTJPreTrainedModel._supports_attention_backend else {"gptj"}
)


def make_model(family: str, vocab_size: int = 101, seed: int = 0, **overrides):
    """A freshly initialised tiny model in float32, eval mode; larger weights so that blocks matter."""
    kind, values = (SUPPORTED.get(family) or REFUSED[family])[:2]
    return build(kind, values, vocab_size, seed, **overrides)


def build(kind: str, values: dict, vocab_size: int = 101, seed: int = 0, **overrides):
    """As ``make_model``, from a model type and its config."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    text = values.get("text_config", values)
    tokens = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": text.get("pad_token_id")}
    text = {**text, "vocab_size": vocab_size, **tokens, **overrides}
    config = AutoConfig.for_model(kind, **({**values, "text_config": text} if "text_config" in values else text))
    auto: Any = AutoModelForCausalLM
    if type(config) not in auto._model_mapping:
        auto = AutoModelForImageTextToText
    torch.manual_seed(seed)
    model = auto.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(4)
        model.get_output_embeddings().weight.mul_(6)  # so that probabilities are spread and rules fire somewhere
    return model


def byte_tokenizer():
    """Byte-level: any text round-trips; one token per byte (vocabulary 257, ``<s>`` first)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: n for n, token in enumerate(["<s>", *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="<s>", pad_token="<s>")


def lm_of(model, tokenizer, **kwargs) -> AdaInferLM:
    """The model type around a tiny model, with small batches and a short window."""
    return AdaInferLM(pretrained=model, tokenizer=tokenizer, **{"batch_size": 4, "max_length": 64, **kwargs})


def tiny_lm() -> AdaInferLM:
    """A model that another process can make again."""
    model = make_model("llama", vocab_size=257, max_position_embeddings=512)
    return lm_of(model, byte_tokenizer(), max_length=400)


def cache_among(arguments: dict[str, Any]) -> Any:
    """A module's key-value cache among its named arguments: transformers before 5.24 calls it past_key_values."""
    return arguments.get("cache", arguments.get("past_key_values"))
