"""A pretrained model out of a GGUF file, as users without a hub have it: loaded by ``gguf_file=``, dense and early."""

from __future__ import annotations

import pytest
from helpers.tasks import our_tasks
from lm_eval import simple_evaluate

pytest.importorskip("gguf")
FILE, TASK = "SmolLM2-135M-Instruct.Q4_1.gguf", "adainfer_word_singular_plural"


def test_a_gguf_file_is_evaluated_dense_and_early(shared, monkeypatch):
    folder = shared / "models" / "smollm2-135m-instruct"
    if not folder.is_dir():
        pytest.skip("no SmolLM2 here")
    monkeypatch.setenv("ADAINFER_DATA", str(shared / "hf" / "function_vectors"))
    found = {}
    for model, more in (("hf", ""), ("adainfer", ",stopper=none"), ("adainfer", ",reader=copy:1,stopper=gap:0.5")):
        results = simple_evaluate(
            model=model, model_args=f"pretrained={folder},gguf_file={FILE},dtype=float32{more}", tasks=[TASK],
            num_fewshot=2, limit=6, batch_size=6, device="cpu", bootstrap_iters=0, log_samples=True,
            task_manager=our_tasks(),
        )  # fmt: skip
        found[model + more] = results
    answers = [[s["filtered_resps"] for s in of["samples"][TASK]] for of in found.values()]
    dense, none, early = answers
    for stock, ours in zip(dense, none, strict=True):
        assert [greedy for _, greedy in stock] == [greedy for _, greedy in ours]
        assert [value for value, _ in stock] == pytest.approx([value for value, _ in ours], abs=1e-3)
    assert early != none and found["adainfer,reader=copy:1,stopper=gap:0.5"]["results"][TASK]["exit_layer,none"] < 30
