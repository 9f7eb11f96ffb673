"""Tiny random models of many families, a tiny tokenizer, and where the real data lies (if it does)."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lm_eval.tasks import TaskManager

from lm_eval_adainfer import paths
from lm_eval_adainfer.registration import install

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
torch.set_num_threads(1)  # tiny models gain nothing from more, and lose much where cores are busy
install()

SHARED = Path(__file__).resolve().parents[2] / "shared"

_LLAMA_LIKE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_GPT2_LIKE = {"n_embd": 32, "n_layer": 5, "n_head": 4, "n_positions": 128}

# name -> (model_type, config); alibi, parallel blocks, fused QKV, sliding windows, soft-caps, experts, projections
FAMILIES: dict[str, tuple[str, dict]] = {
    "llama": ("llama", _LLAMA_LIKE),
    "opt": ("opt", {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 5, "num_attention_heads": 4,
                    "word_embed_proj_dim": 32, "max_position_embeddings": 128}),
    "opt-post-norm-projected": ("opt", {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 5,
                                        "num_attention_heads": 4, "word_embed_proj_dim": 16,
                                        "do_layer_norm_before": False, "max_position_embeddings": 128}),
    "gptj": ("gptj", {**_GPT2_LIKE, "rotary_dim": 4}),
    "gpt2": ("gpt2", _GPT2_LIKE),
    "gpt_neox": ("gpt_neox", {**_LLAMA_LIKE}),
    "bloom": ("bloom", {"hidden_size": 32, "n_layer": 5, "n_head": 4}),
    "mpt": ("mpt", {"d_model": 32, "n_layers": 5, "n_heads": 4, "max_seq_len": 128}),
    "falcon": ("falcon", {"hidden_size": 32, "num_hidden_layers": 5, "num_attention_heads": 4}),
    "mistral": ("mistral", {**_LLAMA_LIKE, "sliding_window": 4}),
    "gemma2": ("gemma2", {**_LLAMA_LIKE, "head_dim": 8, "sliding_window": 4}),
    "gemma3": ("gemma3_text", {**_LLAMA_LIKE, "head_dim": 8, "sliding_window": 4}),
    "phi3": ("phi3", {**_LLAMA_LIKE, "pad_token_id": 0}),
    "qwen3": ("qwen3", {**_LLAMA_LIKE, "head_dim": 8}),
    "cohere": ("cohere", {**_LLAMA_LIKE, "logit_scale": 0.25}),
    "granite": ("granite", {**_LLAMA_LIKE, "logits_scaling": 8.0}),
    "mixtral": ("mixtral", {**_LLAMA_LIKE, "num_local_experts": 4}),
    "qwen3_moe": ("qwen3_moe", {**_LLAMA_LIKE, "head_dim": 8, "moe_intermediate_size": 16, "num_experts": 4,
                                "num_experts_per_tok": 2}),
    "mamba": ("mamba", {"hidden_size": 32, "num_hidden_layers": 5}),
}  # fmt: skip


def make_model(family: str, vocab_size: int = 101, seed: int = 0, **overrides):
    """A freshly initialised tiny model in float32, eval mode; larger weights so that blocks matter."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, values = FAMILIES[family]
    tokens = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": values.get("pad_token_id")}
    config = AutoConfig.for_model(kind, **{**values, "vocab_size": vocab_size, **tokens, **overrides})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(4)
        model.get_output_embeddings().weight.mul_(6)  # so that probabilities are spread and rules fire somewhere
    return model


@pytest.fixture(scope="session")
def tokenizer():
    """Byte-level: any text round-trips; one token per byte (vocabulary 257, ``<s>`` first)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: n for n, token in enumerate(["<s>", *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="<s>", pad_token="<s>")


@pytest.fixture(scope="session")
def folder(tmp_path_factory, tokenizer):
    """A tiny model on disk, as a user would name it."""
    where = tmp_path_factory.mktemp("model")
    make_model("llama", vocab_size=257, max_position_embeddings=1024).save_pretrained(where)
    tokenizer.save_pretrained(where)
    return where


def in_two_processes(*command, **environment) -> subprocess.CompletedProcess:
    """A script or ``-m module`` with its arguments, on CPUs, through the launcher that people use."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]
    return subprocess.run(
        [str(c) for c in (*launcher, *command)],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def our_tasks(metadata: dict | None = None) -> TaskManager:
    """The packaged tasks without lm-eval's thousands, through which it looks for five seconds."""
    return TaskManager(include_path=str(paths.task_configs()), include_defaults=False, metadata=metadata)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real data and a small real model; tests that need it skip without it."""
    if not SHARED.is_dir():
        pytest.skip("no ../shared here")
    return SHARED


@pytest.fixture(scope="session")
def hub(shared, tmp_path_factory):
    """A writable copy of the offline hub cache (datasets writes lock files), with the environment set for it."""
    import shutil

    home = tmp_path_factory.mktemp("hf")
    (home / "datasets").mkdir()
    for folder in (shared / "hf" / "datasets").iterdir():
        if folder.is_dir():
            shutil.copytree(folder, home / "datasets" / folder.name, symlinks=True)
    return {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


@pytest.fixture
def only_our_tasks(monkeypatch):
    """Commands know no other tasks."""
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda *args, metadata=None, **kwargs: our_tasks(metadata))
