"""Logistic regression, perceptron and boosted trees: as scikit-learn decides, in files, in runs and on bad input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.models import lm_of, make_model
from helpers.refusals import refused
from helpers.tasks import documents, make_task
from helpers.traces import write_random as write_trace
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.ensemble import GradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from lm_eval_adainfer.cli import main
from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.fitting import fit
from lm_eval_adainfer.strategies import files, specs
from lm_eval_adainfer.strategies.features import FEATURES
from lm_eval_adainfer.strategies.network import LogisticStopper, MLPStopper
from lm_eval_adainfer.strategies.trees import BoostedStopper
from lm_eval_adainfer.traces import documents as traced_documents
from lm_eval_adainfer.traces import recording
from lm_eval_adainfer.traces.documents import TracedDocuments
from lm_eval_adainfer.traces.margins import margins

KINDS = ("logistic", "mlp", "boosted")
NAMES = ("gap", "top_prob", "entropy", "depth")


def data(n=300, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.uniform(-1, 1, (n, 4)).astype(np.float32).astype(float)
    return x, (np.sin(3 * x[:, 0]) + x[:, 1] * x[:, 2] + 0.3 * rng.normal(size=n) > 0).astype(int)


def sklearn_model(kind, seed=0):
    """scikit-learn's model and the stopper of the same scores; its raw scores as a function."""
    x, y = data(seed=seed)
    if kind == "boosted":
        model = GradientBoostingClassifier(max_depth=3, n_estimators=20, random_state=seed).fit(x, y)
        start = np.log(y.mean() / (1 - y.mean()))  # the constant that Platt scaling replaces
        return (lambda v: model.decision_function(v) - start), BoostedStopper(BoostedStopper.arrays_of(model), NAMES)
    core = LogisticRegression() if kind == "logistic" else MLPClassifier((8, 5), max_iter=30, random_state=seed)
    model = make_pipeline(StandardScaler(), core).fit(x, y)
    arrays = MLPStopper.arrays_of(model[0], model[1])
    if kind == "logistic":
        return model.decision_function, LogisticStopper(arrays, NAMES)

    def score(v):
        p = model.predict_proba(v)[:, 1]
        return np.log(p) - np.log1p(-p)

    return score, MLPStopper(arrays, NAMES)


MODELS = {kind: sklearn_model(kind) for kind in KINDS}


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [0, 1])
def test_scores_are_scikit_learns(kind, seed):
    score, stopper = sklearn_model(kind, seed)
    points, _ = data(500, seed + 9)
    found = stopper.probability(torch.from_numpy(points).float())
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), 1 / (1 + np.exp(-score(points))), atol=1e-6)
    assert 0.1 < (found > 0.5).float().mean() < 0.9


@given(st.lists(st.tuples(*[st.floats(-1e6, 1e6, width=32)] * 4), min_size=1, max_size=5), st.sampled_from(KINDS))
@settings(max_examples=60, deadline=None)
def test_scores_are_scikit_learns_at_any_point(points, kind):
    score, stopper = MODELS[kind]
    x = np.array(points, dtype=np.float32)
    with np.errstate(divide="ignore", over="ignore"):
        expected = 1 / (1 + np.exp(-score(x.astype(float))))
    np.testing.assert_allclose(stopper.probability(torch.from_numpy(x)).numpy(), expected, atol=1e-6)


def test_trees_go_left_exactly_at_their_split():
    score, stopper = MODELS["boosted"]
    split, feature = stopper.arrays["split"], stopper.arrays["feature"]
    for column in range(4):
        at = np.float32(split[(feature == column) & (stopper.arrays["left"] != np.arange(split.shape[1]))])
        points = np.zeros((3 * len(at), 4), dtype=np.float32)
        points[:, column] = np.concatenate([at, np.nextafter(at, np.float32(2)), np.nextafter(at, np.float32(-2))])
        np.testing.assert_allclose(stopper.bare_scores(points), score(points.astype(float)), atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_margins_and_thresholds(kind):
    _, stopper = MODELS[kind]
    x = torch.from_numpy(data(50, 3)[0])
    p = stopper.probability(x)
    assert stopper.margin(1, torch.empty(0, 4)).shape == (0,)
    strict = type(stopper)(stopper.arrays, NAMES, threshold=1.0, slope=1e6)
    assert not (strict.margin(1, x) > 0).any(), "a threshold of 1 never stops, even where the probability is 1"
    scaled = type(stopper)(stopper.arrays, NAMES, threshold=0.7, slope=2.0, offset=-0.5)
    by_hand = torch.sigmoid(2 * torch.logit(p) - 0.5) - 0.7
    torch.testing.assert_close(scaled.margin(1, x), by_hand)
    assert scaled.flops > 0 and scaled.fingerprint != stopper.fingerprint


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("label", fit.LABELS)
def test_a_fit_is_reproducible_calibrated_and_survives_its_file(kind, label, tmp_path):
    path = write_trace(tmp_path / "a.trace", split="train", n=2000)
    stopper = fit.fit_classifier(kind, [path], label=label, threshold=0.8, max_examples=600)
    again = fit.fit_classifier(kind, [path], label=label, threshold=0.8, max_examples=600)
    assert stopper.fingerprint == again.fingerprint
    assert stopper.features == ("gap", "top_prob", "depth", "agreement", "top_prob_change"), "all that the trace has"
    assert stopper.seen == {"t/train": list(range(2000))}
    assert (stopper.info["examples"], stopper.info["label"]) == (600, label)
    files.save(stopper, tmp_path / "s.pkl")
    loaded = files.load(tmp_path / "s.pkl")
    assert (loaded.kind, loaded.seen, loaded.info) == (kind, stopper.seen, stopper.info)
    assert loaded.fingerprint == stopper.fingerprint
    meta, arrays = recording.read(path)
    np.testing.assert_array_equal(margins(loaded, meta, arrays), margins(stopper, meta, arrays))
    x, y, _ = fit.examples([write_trace(tmp_path / "b.trace", seed=5, n=2000)], stopper.features, label)
    p = stopper.probability(torch.from_numpy(x)).numpy()
    assert abs(p.mean() - y.mean()) < 0.05, "probabilities are shares, also on other documents"
    surer = p > np.median(p)
    assert y[surer].mean() > y[~surer].mean() + 0.1


def test_the_label_stable_is_of_the_documents_answer(tmp_path):
    path = write_trace(tmp_path / "a.trace")
    _, arrays = recording.read(path)
    _, y, _ = fit.examples([path], ["gap"], "stable")
    assert y.tolist() == traced_documents.stable(arrays["top_token"]).astype(int).ravel().tolist()
    scores = np.random.default_rng(0).normal(size=(400, 4, 2)).astype(np.float32)
    pair = {"scores": scores, "request": np.tile([0, 1], (400, 1)), "gold": np.zeros(400, int)}
    choices = write_trace(tmp_path / "b.trace", output_type="multiple_choice", arrays=pair.items())
    _, y, _ = fit.examples([choices], ["gap"], "stable")
    assert y.tolist() == traced_documents.stable(scores.argmax(-1)).astype(int).ravel().tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_a_real_run_leaves_where_the_trace_says(kind, tokenizer, tmp_path):
    """On a tiny model, with features that remember: every document whose margins are clear."""
    task = make_task({"train": documents(3, 2), "test": documents(40, 11)})
    model = make_model("llama", vocab_size=257, num_hidden_layers=6, max_position_embeddings=512)
    lm = lm_of(model, tokenizer, batch_size=8, max_length=400)
    (path,) = recording.trace(lm, {"toy": task}, tmp_path, split="test")
    meta, arrays = recording.read(path)
    stopper = fit.fit_classifier(kind, [path], label="final", threshold=0.5)
    assert set(stopper.features) == {name for name in FEATURES if not FEATURES[name].choices}, "some have long choices"
    found = TracedDocuments(path, meta, arrays)
    clear, layers = 0, set()
    for threshold in (0.2, 0.4, 0.6, 0.8):
        stopper.threshold = threshold
        said = margins(stopper, meta, arrays)
        exits = traced_documents.exits(found.together(said))
        run = lm_of(model, tokenizer, stopper=stopper, batch_size=8, max_length=400)
        answers = run.loglikelihood(task.instances, True)
        real = {r.doc_id: a.exit_record.exit_layer for r, a in zip(task.instances, answers, strict=True)}
        assert len(said) == len(exits), "one context a document"
        for document, exit_layer, row in zip(found.doc_ids.tolist(), exits.tolist(), said, strict=True):
            if np.nanmin(np.abs(row)) > 1e-4:
                assert real[document] == exit_layer
                clear += 1
                layers.add(exit_layer)
    assert clear > 20 and len(layers) > 1


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "forest"}, ["kind", "forest", "boosted"]),
        ({"label": "best"}, ["label", "best", "stable"]),
        ({"features": ["shoe"]}, ["features", "shoe", "gap"]),
        ({"features": ["entropy"]}, ["features", "entropy"]),
        ({"max_examples": 1}, ["max_examples", "1"]),
        ({"threshold": 1.5}, ["threshold", "1.5", "between 0 and 1"]),
    ],
)
def test_wrong_arguments_are_one_sentence(options, words, tmp_path):
    path = write_trace(tmp_path / "a.trace", n=20)
    refused(lambda: fit.fit_classifier(**{"kind": "logistic", "paths": [path], **options}), *words)


def test_unusable_traces_are_one_sentence(tmp_path):
    def boosted(path):
        return lambda: fit.fit_classifier("boosted", [path])

    one = write_trace(tmp_path / "one.trace", arrays={"top_token": np.ones((400, 4), int)}.items())
    refused(boosted(one), "traces", "every one", "stop")
    refused(boosted(write_trace(tmp_path / "empty.trace", n=0)), "traces", "no document")
    refused(boosted(write_trace(tmp_path / "few.trace", n=3)), "traces", "too few documents")
    refused(boosted(write_trace(tmp_path / "old.trace", version=1)), "traces", "old.trace", "version 1")
    refused(boosted(write_trace(tmp_path / "nan.trace", gap=np.full((9, 4), np.nan))), "traces", "nan.trace", "NaN")
    rng = np.random.default_rng(0)
    noise = write_trace(tmp_path / "noise.trace", n=60, arrays={"top_token": rng.integers(0, 2, (60, 4))}.items())
    try:
        fit.fit_classifier("logistic", [noise], features=["gap"])
    except AdaInferError as error:
        assert "no better than chance" in str(error)


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_arrays_are_refused(kind):
    stopper = MODELS[kind][1]
    for name, array in stopper.arrays.items():
        rest = {n: a for n, a in stopper.arrays.items() if n != name}
        refused(lambda rest=rest: type(stopper)(rest, NAMES), "stopper", kind)
        bad = array.astype(float)
        bad.reshape(-1)[0] = np.nan
        refused(lambda n=name, b=bad, rest=rest: type(stopper)({**rest, n: b}, NAMES), "stopper", "NaN")
        refused(lambda n=name, a=array, rest=rest: type(stopper)({**rest, n: a[..., None]}, NAMES), "stopper", kind)
    refused(lambda: type(stopper)(stopper.arrays, NAMES[:1]), "stopper", kind)
    refused(lambda: type(stopper)(stopper.arrays, NAMES, slope=0), "stopper", "slope")
    refused(lambda: type(stopper)(stopper.arrays, NAMES, threshold=2), "stopper", "threshold")


def test_trees_that_point_outside_are_refused():
    arrays = MODELS["boosted"][1].arrays
    for name, value in (("left", 99), ("right", -1), ("feature", 4), ("depth", 99)):
        bad = arrays[name].copy()
        bad.reshape(-1)[0] = value
        refused(lambda n=name, b=bad: BoostedStopper({**arrays, n: b}, NAMES), "stopper", "boosted")


def test_the_command_fits_and_prints_what_it_did(tmp_path, capsys):
    path = write_trace(tmp_path / "a.trace")
    assert main.main(["fit", "logistic", str(path), "--features", "gap,agreement", "-o", str(tmp_path / "s")]) == 0
    assert "logistic on gap, agreement" in capsys.readouterr().out
    assert specs.parse(str(tmp_path / "s")).kind == "logistic"
