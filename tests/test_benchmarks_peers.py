"""``benchmarks.peers``: what is counted is what ran, sides leave the model whole, and the table says what was recorded."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import pytest
import torch

from benchmarks.models import make_model, make_tokenizer
from benchmarks.peers import __main__ as command
from benchmarks.peers import measuring, report, shortgpt
from benchmarks.peers.counting import counting
from benchmarks.peers.layerskip import Without
from lm_eval_adainfer import releases

BLOCKS, HIDDEN, INNER, VOCABULARY = 8, 128, 344, 4096


@pytest.fixture(scope="module")
def model():
    return make_model("tiny", torch.float32, "cpu")


def loaded(model, prompts=()):
    return measuring.Loaded(model, make_tokenizer(), list(prompts), SimpleNamespace(batch_size=2))


def requests():
    doc, name = {}, "w1 w2 w3 w4"
    return [
        releases.request("loglikelihood", doc, (name, word), k, "t", 0) for k, word in enumerate((" w5", " w6"))
    ]


@torch.no_grad()
def test_a_forward_is_counted_block_by_block_and_product_by_product(model):
    with counting(model) as found:
        model(torch.ones(2, 5, dtype=torch.long), use_cache=False)
    assert found.block_tokens == BLOCKS * 10
    maps = HIDDEN * HIDDEN * 2 + HIDDEN * HIDDEN // 2 * 2 + 3 * HIDDEN * INNER  # half as many heads of keys and values
    attention = 4 * HIDDEN * 5 * 5 * 2
    assert found.operations >= 2 * 10 * (BLOCKS * maps + HIDDEN * VOCABULARY) + BLOCKS * attention
    assert found.operations <= 1.01 * (2 * 10 * (BLOCKS * maps + HIDDEN * VOCABULARY) + BLOCKS * attention)


def test_a_fixed_exit_answers_as_the_model_that_ends_there_and_leaves_the_model_whole(model):
    lm = Without([0, 1, 2], **loaded(model).given)
    with counting(model) as found:
        answers = lm.loglikelihood(requests(), disable_tqdm=True)
    assert found.block_tokens == 3 * 4 and len(model.model.layers) == BLOCKS
    smaller = copy.deepcopy(model)
    smaller.model.layers = smaller.model.layers[:3]
    with torch.no_grad():
        logits = smaller(torch.tensor([[2, 3, 4, 5]]), use_cache=False).logits[0, -1].log_softmax(-1)
    assert [value for value, _ in answers] == pytest.approx([logits[6].item(), logits[7].item()], abs=1e-5)


def test_a_block_that_does_nothing_is_the_first_that_shortgpt_drops(model):
    idle = copy.deepcopy(model)
    with torch.no_grad():
        idle.model.layers[4].self_attn.o_proj.weight.zero_()
        idle.model.layers[4].mlp.down_proj.weight.zero_()
    lm = shortgpt.ShortGPT(loaded(idle, ["w1 w2 w3", "w4 w9"]), 1)
    assert lm.said() == "without blocks 5"


def record(name, right, block_tokens=300, said=None):
    row = {"documents": [0, 1, 2, 3], "right": right, "requests": "abc", "block_tokens": block_tokens,
           "operations": 2 * block_tokens, "stock_seconds": 2.0, "seconds": 1.0}  # fmt: skip
    return {"name": name, "blocks": 30, "machine": "CPU", "peak_growth_mib": None, "said": said, "tasks": {"t": row},
            "versions": {"torch": "2", "transformers": "5", "lm_eval": "0"},
            "options": {"num_fewshot": 5, "batch_size": 8, "timed": 2, "repeats": 1}}  # fmt: skip


def test_the_command_reads_records_that_are_there_and_names_what_did_not_run(tmp_path, monkeypatch):
    for side in command.SIDES:
        if side != "tide":
            of = record(side, [1, 1, 0, 1] if side == "stock" else [1, 0, 0, 1], 300 if side == "stock" else 200)
            (tmp_path / f"{side}.json").write_text(json.dumps(of))
    ended = SimpleNamespace(returncode=1, stderr="Traceback\nModuleNotFoundError: No module named 'TIDE'\n")
    monkeypatch.setattr(command.subprocess, "run", lambda *args, **kwargs: ended)
    command.main(["--records", str(tmp_path), "-o", str(tmp_path / "out")])
    text = (tmp_path / "out.md").read_text()
    assert "| economize | 0.500 | -25.0 (" in text and "| 20.0 | 0.67 | 0.50 | - |" in text
    assert "- tide: ModuleNotFoundError: No module named 'TIDE'" in text and "quantised to Q4_1" in text
    assert json.loads((tmp_path / "out.json").read_text())["failed"].keys() == {"tide"}


def test_other_prompts_are_refused():
    other = record("peer", [1, 1, 1, 1])
    other["tasks"]["t"]["requests"] = "xyz"
    with pytest.raises(SystemExit, match="other prompts"):
        report.rows({"peer": other}, record("stock", [1, 1, 1, 1]))
