"""Tiny random models of many families, a tiny tokenizer, and where the real data lies (if it does)."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import REFUSED, SUPPORTED
from lm_eval.tasks import TaskManager

from lm_eval_adainfer import paths
from lm_eval_adainfer.registration import install

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
torch.set_num_threads(1)  # tiny models gain nothing from more, and lose much where cores are busy
install()

SHARED = Path(__file__).resolve().parents[2] / "shared"

# those that many tests run over; test_families.py runs over all
FAMILIES: dict[str, tuple[str, dict]] = {
    name: SUPPORTED[name]
    for name in (
        "llama", "opt", "opt-post-norm-projected", "gptj", "gpt2", "gpt_neox", "bloom", "mpt", "falcon", "mistral",
        "gemma2", "gemma3", "phi3", "qwen3", "cohere", "granite", "mixtral", "qwen3_moe", "mamba",
    )
}  # fmt: skip


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


@pytest.fixture(scope="session")
def tokenizer():
    """One for all."""
    return byte_tokenizer()


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
