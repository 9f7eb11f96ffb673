"""``--metadata shots=per_task`` from lm_eval's command line: prompts share their shots, and results say so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.processes import execute
from lm_eval._cli import utils as cli_utils

from lm_eval_adainfer.comparison import runs
from lm_eval_adainfer.comparison.matching import match
from lm_eval_adainfer.errors import AdaInferError

TASK = "adainfer_demo_topic"
# 0.5.0.dev1 takes JSON alone
METADATA = "shots=per_task" if hasattr(cli_utils, "split_top_level") else json.dumps({"shots": "per_task"})


def evaluate(folder: Path, more: str, monkeypatch) -> dict:
    model = "--model adainfer --model_args pretrained=adainfer-demo,dtype=float32 --device cpu --batch_size 8"
    command = f"lm_eval {model} --tasks {TASK} --limit 12 --log_samples --output_path {folder} {more}"
    assert execute(command, monkeypatch) == 0
    (found,) = folder.rglob("results_*.json")
    return json.loads(found.read_text())


def test_shots_per_task_are_run_once_recorded_and_not_compared_with_others(tmp_path, monkeypatch, only_our_tasks):
    own, once = (evaluate(tmp_path / name, more, monkeypatch) for name, more in (
        ("own", ""), ("once", f"--metadata '{METADATA}'"),
    ))  # fmt: skip
    assert own["configs"][TASK]["metadata"]["shots"] == "per_document"
    assert once["configs"][TASK]["metadata"]["shots"] == "per_task"

    def share(results):
        """Of the blocks x tokens of whole prompts, what was run."""
        record = results["config"]["adainfer"]
        return record["block_tokens_counted"] / (record["tokens_counted"] * record["n_blocks"])

    assert share(own) == 1 and share(once) < 0.6
    first, second = runs.load(tmp_path / "own"), runs.load(tmp_path / "once")
    with pytest.raises(AdaInferError, match="was asked with another prompt"):
        match(first, second)
    assert len(match(first, second, other_prompts=True)[0].documents) == 12
