"""Real tasks and a real small model, where ../shared holds them: equality with stock, and exits that pay."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

COMPARE = """
import json, sys
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval_adainfer.registration import install
install()
model, manager = sys.argv[1], TaskManager()
def run(kind, size, extra=""):
    found = simple_evaluate(model=kind, model_args=f"pretrained={model},dtype=float32{extra}", limit=40, batch_size=size,
        tasks=["sst2", "mmlu_anatomy", "commonsense_qa"], device="cpu", bootstrap_iters=0, task_manager=manager)
    scores = {task: row["acc,none"] for task, row in found["results"].items()}
    answers = [list(r[0]) for task in sorted(found["samples"]) for s in found["samples"][task] for r in s["resps"]]
    return scores, answers
print(json.dumps([run("hf", 8), *(run("adainfer", n, ",stopper=none") for n in (1, 7, 32))]))
"""


@pytest.fixture(scope="module")
def environment(hub):
    return {**os.environ, **hub, "TQDM_DISABLE": "1"}


def test_dense_equals_stock_hf_on_real_tasks_at_every_batch_size(shared, environment):
    model = shared / "models" / "llama-16x128"
    done = subprocess.run([sys.executable, "-c", COMPARE, model], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    (scores, answers), *ours = json.loads(done.stdout.strip().splitlines()[-1])
    assert len(answers) == 40 * (2 + 4 + 5)
    for found, given in ours:
        assert found == scores
        for a, b in zip(answers, given, strict=True):
            assert b[0] == pytest.approx(a[0], abs=1e-4) and b[1] == a[1]


def test_a_gap_rule_and_a_freshly_fitted_svm_prune_sst2(shared, environment, tmp_path):
    model = f"pretrained={shared / 'models' / 'llama-16x128'},dtype=float32"

    def run(*arguments):
        done = subprocess.run([sys.executable, "-m", *map(str, arguments)], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]

    tasks = ["--tasks", "adainfer_sst2", "--num_fewshot", "3"]
    run("lm_eval_adainfer.cli.main", "trace", "--model_args", model, *tasks, "--limit", "100", "-o", tmp_path / "traces")
    run("lm_eval_adainfer.cli.main", "fit", "svm", tmp_path / "traces", "-o", tmp_path / "svm.pkl")
    pruned = {}
    for name, stopper in (("gap", "gap:0.8"), ("svm", tmp_path / "svm.pkl")):
        run("lm_eval_adainfer", "--model", "adainfer", "--model_args", f"{model},stopper={stopper}", *tasks,
            "--limit", "60", "--batch_size", "16", "--device", "cpu", "--output_path", tmp_path / name)  # fmt: skip
        (file,) = (tmp_path / name).rglob("results_*.json")
        row = json.loads(file.read_text())["results"]["adainfer_sst2"]
        pruned[name] = row["pruning_ratio,none"]
        assert row["acc,none"] > 0.55
    assert 0.1 < pruned["gap"] < pruned["svm"] < 1
