"""Fixtures that many test modules use; what isn't a fixture lies in ``helpers``."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.models import SHARED, byte_tokenizer, make_model
from helpers.tasks import our_tasks

from lm_eval_adainfer.registration import install

install()


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


@pytest.fixture(scope="session")
def smollm2(shared):
    """SmolLM2-135M-Instruct with weights rounded to bfloat16, as checkpoints are saved."""
    import torch
    import transformers

    folder = shared / "models" / "smollm2-135m-instruct"
    if not folder.is_dir():
        pytest.skip("no SmolLM2 here")
    pytest.importorskip("gguf")
    file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    return model.to(torch.bfloat16), transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)


@pytest.fixture
def only_our_tasks(monkeypatch):
    """Commands know no other tasks."""
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda *args, metadata=None, **kwargs: our_tasks(metadata))
