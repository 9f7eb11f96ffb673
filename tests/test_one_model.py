"""Traces that are read together: of one model, weights and dtype included, whose documents were asked in one way."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from helpers.refusals import refused
from helpers.traces import write

from lm_eval_adainfer import container
from lm_eval_adainfer.cli import main
from lm_eval_adainfer.fitting import calibration, check_layers, fit
from lm_eval_adainfer.output import per_block
from lm_eval_adainfer.strategies.rules import GapStopper
from lm_eval_adainfer.traces import recording, replay

READERS = {
    "fit svm": lambda files: fit.fit_svm(files),
    "fit crf": lambda files: fit.fit_crf(files),
    "fit logistic": lambda files: fit.fit_classifier("logistic", files),
    "layers": lambda files: check_layers.choose(files, GapStopper(0.5)),
    "calibrate": lambda files: calibration.calibrate(files, GapStopper(), 0.5),
    "replay": lambda files: replay.load(files),
    "report": lambda files: per_block.load(str(files[0].parent)),
}
OTHERS = {
    "head_hash": "g",
    "weights_hash": "tuned",
    "dtype": "torch.bfloat16",
    "autocast": "torch.float16",
    "add_bos_token": "True",
    "chat_template": "0123456789abcdef",
    "system_instruction": "Be brief.",
    "fewshot_as_multiturn": True,
}


def a_trace(path, task, **meta):
    rng = np.random.default_rng(len(task))
    meta = {"weights_hash": "w", "dtype": "torch.float32", "autocast": "None", "add_bos_token": "None", **meta}
    return write(path, rng.uniform(size=(40, 4, 2)), rng.integers(0, 2, (40, 4)), task=task, **meta)


@pytest.mark.parametrize("name", READERS)
def test_traces_of_two_models_are_pooled_by_nobody(name, tmp_path):
    if name == "fit crf":
        pytest.importorskip("pycrfsuite")
    first = a_trace(tmp_path / "first.trace", "first")
    same = a_trace(tmp_path / "same.trace", "same", **dict.fromkeys(("chat_template", "system_instruction")))
    READERS[name]([first, same])
    same.unlink()
    for key, value in OTHERS.items():
        other = a_trace(tmp_path / "other.trace", "other", **{key: value})
        words = ("traces", "other.trace", "one model", key, str(value))
        refused(lambda other=other: READERS[name]([first, other]), *words)
    deeper = write(tmp_path / "other.trace", np.ones((9, 5, 2)), np.zeros((9, 5)), task="other")
    refused(lambda: READERS[name]([first, deeper]), "traces", "other.trace", "n_blocks 5")


def test_the_command_says_it_before_anything_is_written(tmp_path, capsys):
    first = a_trace(tmp_path / "first.trace", "first")
    a_trace(tmp_path / "tuned.trace", "tuned", weights_hash="tuned")
    out = tmp_path / "o"
    common = [str(tmp_path), "-o", str(out)]
    for command in (["fit", "svm", *common], ["calibrate", *common, "-s", "gap"], ["layers", str(tmp_path), "-s", "gap"],
                    ["replay", str(tmp_path), "-s", "gap"]):  # fmt: skip
        assert main.main(command) == 2
        assert "tuned.trace is of m with weights_hash tuned" in capsys.readouterr().err
    assert not out.exists()
    shutil.copy(first, tmp_path / "copy")
    meta, arrays = recording.read(first)
    assert "chat_template" not in meta  # what was traced before these were recorded goes with what was asked plainly
    container.write(tmp_path / "tuned.trace", "trace", recording.VERSION, {**meta, "task": "t", "chat_template": None}, arrays)
    assert main.main(["layers", str(tmp_path), "-s", "gap"]) == 0
