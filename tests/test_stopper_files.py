"""Every strategy that can be saved is the same when it is loaded again, and what can't is refused before any work."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.refusals import refused
from helpers.traces import write_random as write_trace
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lm_eval_adainfer.cli import main
from lm_eval_adainfer.fitting import calibration, fit
from lm_eval_adainfer.strategies import files, specs
from lm_eval_adainfer.strategies.crf import CRFStopper
from lm_eval_adainfer.strategies.features import FEATURES
from lm_eval_adainfer.strategies.rules import GapStopper, SaturationStopper
from lm_eval_adainfer.strategies.shortgpt import ShortGPTStopper
from lm_eval_adainfer.strategies.svm import SVMStopper
from lm_eval_adainfer.traces import recording
from lm_eval_adainfer.traces.margins import margins

BLOCKS = 9
thresholds = st.floats(0, 1)
RULES = st.one_of(
    st.sampled_from(["none", "", None, "gap", "svm", "best"]),
    thresholds.map(lambda t: f"gap:{t}"),
    thresholds.map(lambda t: f"softmax:{t}"),
    thresholds.map(lambda t: f"saturation:{t}"),
    st.integers(1, 12).map(lambda k: f"patience:{k}"),
    st.integers(1, BLOCKS).map(lambda k: f"fixed:{k}"),
    st.integers(1, BLOCKS - 1).map(lambda k: f"shortgpt:last{k}"),
)


@st.composite
def fitted(draw):
    """A strategy of random numbers, of a kind that is fitted."""
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    if draw(st.booleans()):
        drop = draw(st.one_of(st.none(), st.integers(1, BLOCKS - 1)))
        return ShortGPTStopper({"influence": rng.uniform(size=BLOCKS)}, drop)
    names = draw(st.lists(st.sampled_from(list(FEATURES)), min_size=1, max_size=4, unique=True))
    n, at = len(names), draw(st.floats(0, 1, exclude_max=True))
    info = {"model": "m", "tasks": ["t"], "share": at}
    if draw(st.booleans()):
        arrays = {"state": rng.normal(size=(2, n)), "bias": rng.normal(size=2), "transition": rng.normal(size=(2, 2))}
        return CRFStopper(arrays, names, at, info)
    m = draw(st.integers(1, 5))
    arrays = {"support_vectors": rng.normal(size=(m, n)), "dual_coef": rng.normal(size=m), "intercept": rng.normal(size=1)}
    return SVMStopper(arrays, names, draw(st.sampled_from(["rbf", "linear", "poly", "sigmoid"])), threshold=at, info=info)


def said(stopper, n_blocks, seed):
    """What a strategy says after each block about random features, with its memory carried on."""
    stopper.bind(n_blocks)
    rng = torch.Generator().manual_seed(seed)
    memory = torch.zeros(20, stopper.memory) if stopper.memory else None
    found = []
    for k in range(1, n_blocks):
        values = torch.rand(20, len(stopper.features), generator=rng)
        found.append((stopper.wants(k), stopper.margin(k, values, memory).tolist()))
    return found, stopper.dropped_blocks, stopper.removes_blocks


@given(spec=st.one_of(RULES, fitted()), seed=st.integers(0, 99))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_loaded_stopper_decides_as_the_saved_one(spec, seed, tmp_path):
    stopper = specs.parse(spec)
    files.save(stopper, tmp_path / "s")
    again = files.load(tmp_path / "s")
    assert type(again) is type(stopper) and again.fingerprint == stopper.fingerprint
    n_blocks = len(stopper.arrays["influence"]) if "influence" in stopper.arrays else 12
    assert said(again, n_blocks, seed) == said(stopper, n_blocks, seed)
    assert (again.info, again.seen, again.kind) == (stopper.info, stopper.seen, stopper.kind)


def test_what_a_file_would_not_give_again_is_not_written(tmp_path):
    class Mine(GapStopper):
        def margin(self, block, values, memory=None):
            return values[:, 0]

    class Other(GapStopper):
        kind = "mine"

    odd = specs.parse("gap:0.5")
    odd.info = {"when": object()}
    late = specs.parse("gap:0.5")
    late.threshold = 2.0
    for stopper, word in ((Mine(), "Mine"), (Other(), "mine"), (odd, "JSON"), (late, "between 0 and 1")):
        refused(lambda stopper=stopper: files.save(stopper, tmp_path / "s"), "stopper", word)
        assert not (tmp_path / "s").exists()


def test_a_patience_below_1_in_a_file_is_refused(tmp_path):
    from lm_eval_adainfer import container

    for blocks in (0, -1, 1.5, "3"):
        meta = {"kind": "patience", "parameters": {"blocks": blocks}, "info": {}}
        container.write(tmp_path / "p", "stopper", files.VERSION, meta, {})
        refused(lambda: files.load(tmp_path / "p"), "stopper")


def test_a_saturation_of_1_never_stops_even_where_rounding_puts_a_cosine_above_1():
    values = torch.tensor([[1.0000001], [1.0], [0.999]])
    assert not (SaturationStopper(1.0).margin(1, values) > 0).any()
    assert (SaturationStopper(0.9999).margin(1, values) > 0).tolist() == [True, True, False]


# ------------------------------------------------------------------------------------------------ calibrate


def as_cosine(path, **options):
    """A trace whose cosines are what the others' gaps are."""
    return write_trace(path, features=["cos_hidden", "top_prob"], **options)


@pytest.mark.parametrize(("spec", "write"), [("gap:0.5", write_trace), ("softmax:0.9", write_trace),
                                             ("saturation:0.98", as_cosine), ("saturation:0", as_cosine)])  # fmt: skip
def test_every_rule_with_a_threshold_is_calibrated_alike(spec, write, tmp_path, capsys):
    top = np.full((400, 4), 3)
    path = write(tmp_path / "a.trace", gap=np.full((400, 4), 0.99), arrays={"top_token": top}.items())
    assert main.main(["calibrate", str(path), "-s", spec, "--loss", "agreement", "-o", str(tmp_path / "o")]) == 0
    found = files.load(tmp_path / "o")
    assert found.kind == spec.partition(":")[0] and found.info["promise"]["stops"]
    assert (margins(found, *recording.read(path))[:, :-1] > 0).all()
    few = write(tmp_path / "few.trace", gap=np.ones((9, 4)))
    assert main.main(["calibrate", str(few), "-s", spec, "--loss", "agreement", "-o", str(tmp_path / "o")]) == 0
    assert "never stops" in capsys.readouterr().out
    assert not (margins(files.load(tmp_path / "o"), *recording.read(few)) > 0).any()


@pytest.mark.parametrize("spec", ["none", "patience:3", "fixed:2", "shortgpt:last2"])
def test_what_has_no_threshold_is_refused_before_the_traces_are_read(spec, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(calibration, "calibrate", lambda *_: pytest.fail("it did the work"))
    assert main.main(["calibrate", str(write_trace(tmp_path / "a.trace")), "-s", spec, "-o", str(tmp_path / "o")]) == 2
    assert "no threshold to choose" in capsys.readouterr().err and not (tmp_path / "o").exists()


def test_a_crf_of_which_no_threshold_qualifies_writes_nothing(tmp_path, capsys):
    pytest.importorskip("pycrfsuite")
    files.save(fit.fit_crf([write_trace(tmp_path / "fit.trace", split="train")]), tmp_path / "crf")
    few = write_trace(tmp_path / "few.trace", n=40, seed=1)
    command = ["calibrate", "-s", str(tmp_path / "crf"), "--loss", "agreement", "-o", str(tmp_path / "o")]
    assert main.main([*command, str(few)]) == 2
    out, err = capsys.readouterr()
    sentence = err.splitlines()[-1]
    assert "299 are needed" in sentence and "nothing is written" in sentence and not out
    assert not (tmp_path / "o").exists()
    top = np.full((400, 4), 3)
    many = write_trace(tmp_path / "many.trace", gap=np.full((400, 4), 0.9), arrays={"top_token": top}.items())
    assert main.main([*command, str(many)]) == 0
    assert files.load(tmp_path / "o").kind == "crf"
