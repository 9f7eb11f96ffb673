"""``python -m benchmarks``: every kind runs on a tiny model and writes its rows; no figure is looked at."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import memory, screens, shared, texts
from benchmarks.models import alternately, make_model, make_tokenizer, over
from benchmarks.prefill import SpreadExits, requests, run_needed
from lm_eval_adainfer.harness.model import AdaInferLM


@pytest.fixture
def small(monkeypatch):
    cases = [replace(case, shared=case.shared // 20, own=12, documents=4) for case in shared.CASES]
    monkeypatch.setattr(shared, "CASES", cases)
    monkeypatch.setattr(texts, "DOCUMENTS", 5)
    monkeypatch.setattr(texts, "NEW", 8)
    monkeypatch.setattr(memory, "CASES", [replace(memory.CASES[0], documents=8, batch_size=8)])


@pytest.mark.parametrize("kind", command.KINDS)
def test_a_kind_writes_its_rows(kind, small, tmp_path):
    if kind == "memory" and not Path("/proc/self/clear_refs").exists():
        pytest.skip("memory is measured on Linux")
    command.main([kind, "--shape", "tiny", "--device", "cpu", "--lengths", "12", "--batch_sizes", "1,8",
                  "--repeats", "1", "-o", str(tmp_path)])  # fmt: skip
    record = json.loads((tmp_path / f"{kind}-tiny-float32-cpu.json").read_text())
    rows, table = record["rows"], (tmp_path / f"{kind}-tiny-float32-cpu.md").read_text().splitlines()
    assert len(rows) == {"shared": 6, "memory": 1, "readers": 8, "texts": 4}.get(kind, 2) and len(table) == 4 + len(rows)
    assert record["measured"] in table[0] and "*measured*" in table[0]
    ratios = [value for row in rows for name, value in row.items() if " / " in name and value != "-"]
    assert ratios and all(r["low"] <= r["median"] <= r["high"] for r in ratios if isinstance(r, dict))
    if kind == "memory":  # stock hf keeps logits of all tokens: 8 x 720 x 4096 float32 numbers
        assert rows[0]["stock hf, MiB"] > 90 and rows[0]["stopper=none / stock hf"] < 0.9
    if kind == "texts":
        assert {row["same"] for row in rows} == {"5 of 5"}
    if kind == "shared":
        assert all(row["largest difference of a logprob from stock hf's"] < 1e-4 for row in rows)


def test_sides_take_turns_and_only_a_cheap_first_round_is_left_out(monkeypatch):
    called = []
    sides = {name: (lambda name=name: called.append(name)) for name in "ab"}
    assert len(alternately(sides, 2)) == 2 and "".join(called) == "ababab"
    monkeypatch.setattr("benchmarks.models.WARM_UP", 0)
    called.clear()
    assert len(alternately(sides, 2)) == 2 and "".join(called) == "abab"
    assert over([{"a": 2.0, "b": 1.0}, {"a": 9.0, "b": 3.0}], "a", "b") == {"median": 2.5, "low": 2.0, "high": 3.0}


def test_spread_exits_leave_where_they_say_and_the_needed_blocks_run_just_these_rows():
    model, documents = make_model("tiny", torch.float32, "cpu"), 8
    spread = SpreadExits(8)
    exits = [spread.exit(n) for n in range(documents)]
    assert len(set(exits)) > 5 and min(exits) >= 1 and max(exits) <= 8
    lm = AdaInferLM(pretrained=model, tokenizer=make_tokenizer(), stopper=spread, batch_size=8)
    calls = []
    hooks = [
        block.register_forward_pre_hook(lambda m, args, k=k: calls.append((k, len(args[0]))))
        for k, block in enumerate(model.model.layers, 1)
    ]
    for _ in range(2):  # the second time the same again
        spread.restart()
        calls.clear()
        found = lm.loglikelihood(requests(documents, 12), disable_tqdm=True)
        assert sorted(answer.exit_record.exit_layer for answer in found[::2]) == sorted(exits)
    ours = list(calls)
    calls.clear()
    run_needed(model, torch.ones(documents, 12, dtype=torch.long), exits)
    assert calls == ours == [(k, sum(e >= k for e in exits)) for k in range(1, max(exits) + 1)]
    assert lm.engine.head_rows == 2 * documents  # scores, twice; no check needs the head
    for hook in hooks:
        hook.remove()


def test_screens_count_every_check_and_the_whole_vocabulary_misses_nothing(monkeypatch):
    monkeypatch.setattr(screens, "SIZES", (5, 4096))
    monkeypatch.setattr(screens, "THRESHOLDS", (0.0001, 0.001))
    monkeypatch.setattr(screens, "NEW", 6)
    found = Counter()
    screens.counted(make_model("tiny", torch.float32, "cpu"), torch.tensor([[7, 9, 4000]]), [2, 5], found)
    for threshold in (0.0001, 0.001):
        for own in (True, False):
            whole, few = ({w: found[threshold, n, own, w] for w in ("checks", "stops", "missed", "vain")} for n in (4096, 5))
            assert whole["checks"] == few["checks"] == 12 and whole["stops"] == few["stops"] <= 12
            assert whole["missed"] == whole["vain"] == 0
    assert found[0.0001, 5, False, "vain"] + found[0.0001, 5, False, "stops"] > 6  # among five tokens gaps are large
