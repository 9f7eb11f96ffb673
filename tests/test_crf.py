"""The CRF stopper: filtering against CRFsuite's own marginals, files, fitting, and what it refuses."""

from __future__ import annotations

import sys

import numpy as np
import pycrfsuite
import pytest
import torch
from helpers.refusals import refused
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_eval_adainfer.strategies import crf, files, specs
from lm_eval_adainfer.strategies.crf import CRFStopper

NAMES = ("gap", "top_prob")


def sequences(seed, n=40, length=7, n_features=2):
    """Features that grow along the blocks, and labels that mostly turn to stop once and sometimes turn back."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(0, 1, (n, length, n_features)) * np.linspace(0.3, 1, length)[None, :, None]
    y = (x.sum(-1) + 0.3 * rng.normal(size=(n, length)) > 0.6 * n_features).astype(int)
    return x, y


@pytest.fixture(scope="module")
def model():
    return crf.train(*sequences(0), NAMES)


@pytest.fixture(scope="module")
def tagger(model):
    found = pycrfsuite.Tagger()
    found.open_inmemory(model)
    return found


def filtered(stopper, x):
    """[N, L] probabilities of stopping after every block, asked block after block."""
    memory = torch.zeros(len(x), stopper.memory)
    steps = torch.as_tensor(x, dtype=torch.float32)
    return np.stack([stopper.margin(k + 1, steps[:, k], memory).numpy() for k in range(x.shape[1])], 1) + stopper.threshold


def marginals(tagger, x):
    """[N, L]: CRFsuite's marginal of stop at the last block of every prefix of every sequence."""
    found = np.empty(x.shape[:2])
    for n, sequence in enumerate(x.astype(np.float32).tolist()):
        for k in range(1, len(sequence) + 1):
            tagger.set(crf.attributes(sequence[:k], NAMES))
            found[n, k - 1] = tagger.marginal("stop", k - 1)
    return found


def test_the_filtered_probability_is_crfsuites_marginal_of_every_prefix(model, tagger):
    stopper = CRFStopper.from_crfsuite(model, NAMES)
    x, _ = sequences(1)
    expected = marginals(tagger, x)
    assert expected.min() < 0.2 and expected.max() > 0.8, "one-sided data would prove nothing"
    np.testing.assert_allclose(filtered(stopper, x), expected, rtol=0, atol=1e-5)


@given(x=st.lists(st.tuples(*[st.floats(-3, 3, width=32)] * 2), min_size=1, max_size=12))
@settings(max_examples=50, deadline=None)
def test_the_filtered_probability_is_crfsuites_marginal_at_any_point(x, model, tagger):
    stopper = CRFStopper.from_crfsuite(model, NAMES)
    whole = np.array([x])
    np.testing.assert_allclose(filtered(stopper, whole), marginals(tagger, whole), rtol=0, atol=2e-5)


def test_trained_on_prefixes_it_is_nearer_the_truth_at_the_first_block():
    """Every block turns a sixth of the instances to stop, for good, and the features tell nothing."""
    x = np.random.default_rng(0).uniform(0, 1, (300, 6, 2))
    y = (np.arange(6)[None] >= np.arange(300)[:, None] % 6).astype(int)
    first = {}
    for prefixes in (False, True):
        stopper = CRFStopper.from_crfsuite(crf.train(x, y, NAMES, prefixes), NAMES)
        first[prefixes] = filtered(stopper, x)[:, 0].mean()
    assert first[False] > 1 / 6 + 0.2 > first[True]


def test_transitions_are_learned_and_earlier_blocks_matter(model):
    stopper = CRFStopper.from_crfsuite(model, NAMES)
    assert stopper.arrays["transition"].all() and stopper.arrays["state"].all()
    low, high = np.full((1, 6, 2), 0.1), np.full((1, 6, 2), 0.9)
    low[:, -1] = high[:, -1] = 0.55
    assert abs(filtered(stopper, low)[0, -1] - filtered(stopper, high)[0, -1]) > 0.01


def test_later_blocks_do_not_matter(model):
    stopper = CRFStopper.from_crfsuite(model, NAMES)
    x, _ = sequences(2)
    changed = x.copy()
    changed[:, 4:] = 1 - changed[:, 4:]
    np.testing.assert_array_equal(filtered(stopper, x)[:, :4], filtered(stopper, changed)[:, :4])


def test_scores_of_any_size_stay_finite():
    arrays = {"state": [[-900.0], [900.0]], "bias": [0.0, 0.0], "transition": [[0.0, -800.0], [-800.0, 0.0]]}
    stopper = CRFStopper({k: np.array(v) for k, v in arrays.items()}, ("gap",))
    found = filtered(stopper, np.array([[[1.0], [1.0], [-1.0], [-1.0], [-1.0], [1.0]]]))
    assert np.isfinite(found).all() and found[0, 0] == 1.0 and found[0, -2] == 0.0


def test_a_saved_crf_decides_the_same_without_crfsuite(model, tmp_path, monkeypatch):
    stopper = CRFStopper.from_crfsuite(model, NAMES, 0.7, {"model": "m", "tasks": ["a"]})
    files.save(stopper, tmp_path / "crf.pkl")
    monkeypatch.setitem(sys.modules, "pycrfsuite", None)  # importing it fails
    again = specs.parse(str(tmp_path / "crf.pkl"))
    assert isinstance(again, CRFStopper) and again.fingerprint == stopper.fingerprint and again.info == stopper.info
    x, _ = sequences(3)
    np.testing.assert_array_equal(filtered(again, x), filtered(stopper, x))
    refused(lambda: crf.train(*sequences(0), NAMES), "crf", "python-crfsuite", "[crf]")


def test_whatever_changes_decisions_changes_the_fingerprint(model):
    stopper = CRFStopper.from_crfsuite(model, NAMES)
    prints = {stopper.fingerprint, CRFStopper(stopper.arrays, NAMES, 0.6).fingerprint}
    prints.add(CRFStopper(stopper.arrays, NAMES[::-1]).fingerprint)
    for name, array in stopper.arrays.items():
        prints.add(CRFStopper({**stopper.arrays, name: np.nextafter(array, np.inf)}, NAMES).fingerprint)
    assert len(prints) == 6


@pytest.mark.parametrize(
    ("spec", "kind", "value"),
    [("softmax:0.9", "softmax", 0.9), ("saturation:0.98", "saturation", 0.98), ("patience:3", "patience", 3)],
)
def test_the_new_rules_are_parsed(spec, kind, value):
    stopper = specs.parse(spec)
    assert (stopper.kind, getattr(stopper, "threshold", getattr(stopper, "blocks", None))) == (kind, value)
    assert len({specs.parse(s).fingerprint for s in (spec, spec + "1", "gap:0.9")}) == 3


@pytest.mark.parametrize(
    "spec", ["softmax", "softmax:", "softmax:2", "saturation:x", "saturation:-1", "saturation:nan", "patience",
             "patience:0", "patience:-1", "patience:1.5", "patience:"],
)  # fmt: skip
def test_wrong_rules_are_told_in_a_sentence(spec):
    refused(lambda: specs.parse(spec), "stopper", spec.partition(":")[0])


@pytest.mark.parametrize("array", ["state", "bias", "transition"])
def test_bad_arrays_are_refused(array, model):
    good = CRFStopper.from_crfsuite(model, NAMES).arrays
    refused(lambda: CRFStopper({**good, array: good[array] * np.nan}, NAMES), "stopper", "NaN")
    refused(lambda: CRFStopper({**good, array: good[array][..., None]}, NAMES), "stopper", array, "shape")
    refused(lambda: CRFStopper({n: a for n, a in good.items() if n != array}, NAMES), "stopper", array, "missing")


@pytest.mark.parametrize("threshold", [-0.1, 1.0, 1.5, float("nan")])
def test_thresholds_are_probabilities(threshold, model):
    good = CRFStopper.from_crfsuite(model, NAMES).arrays
    refused(lambda: CRFStopper(good, NAMES, threshold), "threshold", "probability")


def test_other_models_of_crfsuite_are_refused(model, tmp_path):
    refused(lambda: CRFStopper.from_crfsuite(model, ("gap",)), "crf", "top_prob")
    trainer = pycrfsuite.Trainer(verbose=False)
    trainer.append([{"gap": 1.0}, {"gap": 0.0}], ["B", "I"])
    trainer.train(str(tmp_path / "m"))
    refused(lambda: CRFStopper.from_crfsuite((tmp_path / "m").read_bytes(), ("gap",)), "crf", "labels", "go and stop")
