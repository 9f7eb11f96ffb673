"""Stoppers: the SVM against scikit-learn, its files against friends and foes, the rules, and the schedule."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct

import joblib
import numpy as np
import pytest
import torch
from helpers.refusals import refused
from helpers.stoppers import NAMES, data, fitted
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save as save_safetensors
from sklearn.svm import SVC, SVR, LinearSVC, NuSVC

from lm_eval_adainfer import container
from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.strategies import files, specs
from lm_eval_adainfer.strategies.base import Schedule
from lm_eval_adainfer.strategies.features import FEATURES
from lm_eval_adainfer.strategies.rules import FixedStopper, GapStopper, NoStopper
from lm_eval_adainfer.strategies.svm import SVMStopper

KERNELS = ("rbf", "linear", "poly", "sigmoid")
LENIENT = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def decisions(stopper, points):
    return (stopper.margin(1, torch.as_tensor(points, dtype=torch.float32)) > 0).tolist()


# ------------------------------------------------------------------------------------------------ scikit-learn


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("n_features", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_svm_decides_as_scikit_learn(kernel, n_features, seed):
    svc, stopper = fitted(kernel, n_features, seed)
    points = np.random.default_rng(seed + 100).uniform(-1.5, 1.5, (400, n_features)).astype(np.float32)
    expected = svc.decision_function(points.astype(np.float64))
    found = stopper.decision_function(torch.from_numpy(points))
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-5)
    predicted = svc.predict(points.astype(np.float64)) == 1
    assert 0 < predicted.sum() < 400, "one-sided data would prove nothing"
    assert decisions(stopper, points) == predicted.tolist()


@pytest.mark.parametrize("kernel", ["poly", "sigmoid", "rbf"])
def test_svm_keeps_the_parameters_of_its_kernel(kernel):
    svc, stopper = fitted(kernel, 3, gamma=0.37, coef0=0.9, degree=2, C=10.0, class_weight="balanced")
    points, _ = data(5, 3)
    found = stopper.decision_function(torch.from_numpy(points))
    np.testing.assert_allclose(found.numpy(), svc.decision_function(points), rtol=0, atol=1e-5)


@given(
    seed=st.integers(0, 50),
    points=st.lists(st.tuples(*[st.floats(-2, 2, width=32)] * 2), min_size=1, max_size=8),
    kernel=st.sampled_from(KERNELS),
)
@settings(max_examples=40, deadline=None)
def test_svm_decides_as_scikit_learn_at_any_point(seed, points, kernel):
    svc, stopper = fitted(kernel, 2, seed)
    x = np.array(points, dtype=np.float32)
    expected = svc.decision_function(x.astype(np.float64))
    np.testing.assert_allclose(stopper.decision_function(torch.from_numpy(x)).numpy(), expected, rtol=0, atol=1e-5)
    clear = np.abs(expected) > 1e-9
    assert (np.array(decisions(stopper, x)) == (svc.predict(x.astype(np.float64)) == 1))[clear].all()


def test_threshold_moves_the_decision_and_leaves_the_decision_function():
    svc, plain = fitted(threshold=0.0)
    _, strict = fitted(threshold=0.5)
    points, _ = data(9, 2, 200)
    values = svc.decision_function(points)
    assert decisions(strict, points) == (values > 0.5).tolist() != decisions(plain, points)
    x = torch.from_numpy(points)
    assert torch.equal(strict.decision_function(x), plain.decision_function(x))


def test_no_decision_positions_give_no_decisions():
    _, stopper = fitted()
    assert stopper.margin(1, torch.empty(0, 2)).shape == (0,)


def test_boolean_labels_mean_stop_where_true():
    x, y = data(0, 2)
    svc = SVC().fit(x, y.astype(bool))
    assert decisions(SVMStopper.from_sklearn(svc, NAMES[:2]), x) == svc.predict(x).tolist()


def test_a_decision_is_counted_with_its_support_vectors():
    svc, stopper = fitted("rbf", 3)
    assert stopper.flops == len(svc.support_vectors_) * (3 * 3 + 4)


def named_columns(x, names):
    pandas = pytest.importorskip("pandas")
    return pandas.DataFrame(x, columns=list(names))


@given(
    seed=st.integers(0, 10**6),
    kernel=st.sampled_from(KERNELS),
    columns=st.lists(st.sampled_from(NAMES), min_size=1, max_size=5, unique=True),
    shuffle=st.randoms(use_true_random=False),
    options=st.fixed_dictionaries(
        {
            "C": st.sampled_from([0.1, 1.0, 100.0]),
            "gamma": st.sampled_from(["scale", "auto", 0.7]),
            "coef0": st.sampled_from([0.0, 0.6]),
            "degree": st.integers(1, 4),
            "class_weight": st.sampled_from([None, "balanced", {0: 5.0, 1: 1.0}]),
            "decision_function_shape": st.sampled_from(["ovo", "ovr"]),
        }
    ),
    nu=st.booleans(),
    dtype=st.sampled_from([np.float32, np.float64]),
    sparse=st.booleans(),
    boolean=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_an_estimator_that_knows_its_columns_decides_the_same_in_whatever_order_they_are_named(
    seed, kernel, columns, shuffle, options, nu, dtype, sparse, boolean
):
    """The reference is the estimator's own ``predict`` and ``decision_function`` on a table with its own columns."""
    from scipy.sparse import csr_matrix

    x, y = data(seed, len(columns))
    x, y = x.astype(dtype), y.astype(bool) if boolean else y
    if len(set(y.tolist())) < 2:
        return
    if nu:
        options = {k: v for k, v in options.items() if k not in ("C", "class_weight")}
    svc = (NuSVC(kernel=kernel, nu=0.2, **options) if nu else SVC(kernel=kernel, **options)).fit(
        csr_matrix(x) if sparse else named_columns(x, columns), y
    )
    asked = list(columns)
    if not sparse:  # a sparse matrix has no names, so its columns are those that ``features`` says
        shuffle.shuffle(asked)
    stopper = SVMStopper.from_sklearn(svc, asked)
    assert list(stopper.features) == asked
    points = np.random.default_rng(seed + 1).uniform(-1.5, 1.5, (100, len(columns))).astype(np.float32)
    table = points.astype(np.float64) if sparse else named_columns(points.astype(np.float64), columns)
    ours = torch.from_numpy(points[:, [columns.index(name) for name in asked]])
    expected = svc.decision_function(table)
    np.testing.assert_allclose(stopper.decision_function(ours).numpy(), expected, rtol=1e-6, atol=1e-5)
    clear = np.abs(expected) > 1e-5
    assert (np.array(decisions(stopper, ours)) == svc.predict(table).astype(bool))[clear].all()


def test_columns_of_other_names_are_refused_with_both():
    x, y = data(0, 2)
    svc = SVC().fit(named_columns(x, ("gap", "entropy")), y)
    refused(lambda: SVMStopper.from_sklearn(svc, ("gap", "top_prob")), "features", "gap, top_prob", "gap, entropy")
    refused(lambda: SVMStopper.from_sklearn(svc, ("gap",)), "features", "gap, entropy")


# ------------------------------------------------------------------------------------------------ wrong svms


def test_an_unfitted_svc_is_refused():
    refused(lambda: SVMStopper.from_sklearn(SVC(), NAMES[:2]), "svc", "not fitted")


def other_estimators():
    from sklearn import model_selection
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, RandomizedSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import MinMaxScaler, StandardScaler

    grid = {"C": [1.0, 2.0]}
    found = {
        "scaled": (make_pipeline(StandardScaler(), MinMaxScaler(), SVC()), ["Pipeline", "StandardScaler, MinMaxScaler"]),
        "bare": (make_pipeline("passthrough", SVC()), ["Pipeline", "last step", "SVC"]),
        "grid": (GridSearchCV(SVC(), grid), ["GridSearchCV", "best_estimator_", "SVC"]),
        "random": (RandomizedSearchCV(SVC(), grid, n_iter=1), ["RandomizedSearchCV", "best_estimator_"]),
        "no refit": (GridSearchCV(SVC(), grid, refit=False), ["GridSearchCV", "refit=True"]),
        "grid of a pipeline": (
            GridSearchCV(make_pipeline(StandardScaler(), SVC()), {"svc__C": [1.0]}),
            ["GridSearchCV", "best_estimator_", "Pipeline"],
        ),
        "linear": (LinearSVC(dual="auto"), ["LinearSVC", "sklearn.svm.SVC"]),
        "regression": (SVR(), ["SVR", "sklearn.svm.SVC"]),
        "logistic": (LogisticRegression(), ["LogisticRegression", "adainfer fit"]),
    }
    if fixed := getattr(model_selection, "FixedThresholdClassifier", None):  # scikit-learn 1.5
        found["threshold"] = (fixed(SVC(), threshold=1.0), ["FixedThresholdClassifier", "sklearn.svm.SVC"])
    return found


@pytest.mark.parametrize("name", other_estimators())
def test_another_estimator_is_named_for_what_it_is(name):
    estimator, words = other_estimators()[name]
    x, y = data(0, 2)
    message = refused(lambda: SVMStopper.from_sklearn(estimator.fit(x, y), NAMES[:2]), "svc", *words)
    assert "not fitted" not in message


def test_an_estimator_that_decides_otherwise_than_its_numbers_is_refused():
    class Cautious(SVC):
        def predict(self, x):
            return (self.decision_function(x) > 1).astype(int)

    x, y = data(0, 2)
    refused(lambda: SVMStopper.from_sklearn(Cautious().fit(x, y), NAMES[:2]), "svc", "decisions")
    changed = SVC().fit(x, y)
    changed.intercept_ = changed.intercept_ + 1  # decision_function does not read it
    refused(lambda: SVMStopper.from_sklearn(changed, NAMES[:2]), "svc", "decisions")


@pytest.mark.parametrize(
    "labels",
    [
        [1, 2],
        [-1, 1],
        [0, 1, 2],
        [0, 2],
        ["go on", "stop"],
    ],
)
def test_classes_other_than_0_and_1_are_refused(labels):
    x, _ = data(0, 2, 90)
    svc = SVC().fit(x, np.array(labels)[np.arange(90) % len(labels)])
    refused(lambda: SVMStopper.from_sklearn(svc, NAMES[:2]), "svc", "classes", str(labels[-1]))


def test_as_many_names_as_features():
    x, y = data(0, 3)
    refused(lambda: SVMStopper.from_sklearn(SVC().fit(x, y), NAMES[:2]), "stopper", "reads 3", "names 2", "gap")
    refused(lambda: SVMStopper.from_sklearn(SVC().fit(x, y), NAMES[:4]), "stopper", "reads 3", "names 4")


def test_unknown_feature_names_are_refused_with_the_known_ones():
    x, y = data(0, 2)
    svc = SVC().fit(x, y)
    refused(lambda: SVMStopper.from_sklearn(svc, ["gap", "perplexity"]), "stopper", "perplexity", *FEATURES)


def test_unknown_kernels_are_refused_with_the_known_ones():
    x, y = data(0, 2)
    callable_kernel = SVC(kernel=lambda a, b: a @ b.T).fit(x, y)
    refused(lambda: SVMStopper(fitted()[1].arrays, NAMES[:2], kernel="cubic"), "stopper", "cubic", *KERNELS)
    refused(lambda: SVMStopper.from_sklearn(callable_kernel, NAMES[:2]), "svc", "kernel")


@pytest.mark.parametrize("array", ["support_vectors", "dual_coef", "intercept"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_refused(array, bad):
    arrays = {name: a.copy() for name, a in fitted()[1].arrays.items()}
    arrays[array].reshape(-1)[0] = bad
    refused(lambda: SVMStopper(arrays, NAMES[:2]), "stopper", "NaN")


@pytest.mark.parametrize("number", ["gamma", "coef0", "threshold"])
def test_nan_parameters_are_refused(number):
    refused(lambda: SVMStopper(fitted()[1].arrays, NAMES[:2], **{number: float("nan")}), "stopper", "NaN")


@pytest.mark.parametrize("array", ["support_vectors", "dual_coef", "intercept"])
def test_missing_and_misshapen_arrays_are_refused(array):
    arrays = dict(fitted()[1].arrays)
    refused(lambda: SVMStopper({**arrays, array: arrays[array][..., None]}, NAMES[:2]), "stopper")
    del arrays[array]
    refused(lambda: SVMStopper(arrays, NAMES[:2]), "stopper", array)


# ------------------------------------------------------------------------------------------------ files


@pytest.fixture
def saved(tmp_path):
    """A stopper and the bytes of its file."""
    _, stopper = fitted("rbf", 2, info={"model": "m", "n_blocks": 5, "head_hash": "x", "tasks": ["t"]})
    files.save(stopper, tmp_path / "good.stopper")
    return stopper, (tmp_path / "good.stopper").read_bytes()


@pytest.mark.parametrize("name", ["svm.pkl", "x", "x.safetensors", "a folder/and more/s.joblib", "ü.stopper"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_saved_stopper_decides_the_same_under_any_extension(name, kernel, tmp_path):
    info = {"model": "m", "tasks": ["a", "b"], "positive_share": 0.1 + 0.2}
    _, stopper = fitted(kernel, 3, threshold=0.1, info=info, gamma=0.3, coef0=0.2, degree=4)
    files.save(stopper, tmp_path / name)
    again = files.load(tmp_path / name)
    points = torch.from_numpy(data(7, 3, 300)[0])
    assert torch.equal(again.margin(1, points), stopper.margin(1, points))
    assert again.fingerprint == stopper.fingerprint
    assert (again.features, again.info, again.parameters()) == (stopper.features, stopper.info, stopper.parameters())
    assert specs.parse(str(tmp_path / name)).fingerprint == stopper.fingerprint


def test_whatever_changes_decisions_changes_the_fingerprint():
    _, stopper = fitted("poly", 2)
    variants = [
        {"kernel": "rbf"},
        {"gamma": stopper.gamma * 2},
        {"coef0": 1.0},
        {"degree": 2},
        {"threshold": 0.1},
        {"features": ("top_prob", "gap")},
    ]
    prints = {SVMStopper(stopper.arrays, **{**stopper.parameters(), **v}).fingerprint for v in variants}
    for name, array in stopper.arrays.items():
        changed = {**stopper.arrays, name: np.nextafter(array, np.inf)}
        prints.add(SVMStopper(changed, **stopper.parameters()).fingerprint)
    prints.add(stopper.fingerprint)
    assert len(prints) == len(variants) + 3 + 1
    assert SVMStopper(stopper.arrays, **stopper.parameters()).fingerprint == stopper.fingerprint
    assert all(len(p) == 16 and int(p, 16) >= 0 for p in prints)


@pytest.mark.parametrize("failing", ["fsync", "replace", "chmod"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failing_write_leaves_the_old_file_as_it_was(failing, error, tmp_path, monkeypatch):
    path = tmp_path / "s.stopper"
    files.save(fitted()[1], path)
    before = path.read_bytes()

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(os, failing, fail)
    expected = AdaInferError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as caught:
        files.save(fitted("linear")[1], path)
    if expected is AdaInferError:
        assert "s.stopper" in str(caught.value) and "No space left" in str(caught.value)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["s.stopper"]


def test_an_output_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    refused(lambda: files.save(fitted()[1], tmp_path / "file" / "s.stopper"), "output", "can't be written")
    (tmp_path / "folder").mkdir()
    refused(lambda: files.save(fitted()[1], tmp_path / "folder"), "output", "can't be written")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


# ------------------------------------------------------------------------------------------------ hostile files


class Payload:
    """Unpickling it makes a file."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


def dumps_joblib(thing, compress):
    file = io.BytesIO()
    joblib.dump(thing, file, compress=compress)
    return file.getvalue()


def dumps_torch(thing, legacy):
    file = io.BytesIO()
    torch.save(thing, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


PICKLES = {
    **{f"pickle {p}": (lambda thing, p=p: pickle.dumps(thing, protocol=p)) for p in range(6)},
    **{f"list, pickle {p}": (lambda thing, p=p: pickle.dumps([1, thing], protocol=p)) for p in range(6)},
    **{f"dict, pickle {p}": (lambda thing, p=p: pickle.dumps({"a": thing}, protocol=p)) for p in range(6)},
    **{
        f"joblib {c}": (lambda thing, c=c: dumps_joblib(thing, c))
        for c in (0, 1, 9, ("gzip", 3), ("bz2", 3), ("lzma", 3))
    },
    "torch": lambda thing: dumps_torch(thing, legacy=False),
    "torch legacy": lambda thing: dumps_torch(thing, legacy=True),
}


@pytest.mark.parametrize("kind", PICKLES)
@pytest.mark.parametrize("name", ["svm.pkl", "svm.stopper"])
def test_a_pickle_is_never_opened(kind, name, tmp_path):
    marker = tmp_path / "marker"
    (tmp_path / name).write_bytes(PICKLES[kind](Payload(marker)))
    refused(lambda: files.load(tmp_path / name), "stopper", name, "from_sklearn")
    refused(lambda: specs.parse(str(tmp_path / name)), "stopper", name, "from_sklearn")
    assert not marker.exists()


@pytest.mark.parametrize("compress", [3, ("zlib", 5), ("xz", 3)])
def test_every_joblib_compression_is_refused_with_the_way_out(compress, tmp_path):
    path = tmp_path / "svm.joblib"
    path.write_bytes(dumps_joblib(fitted()[0], compress))
    refused(lambda: files.load(path), "stopper", "svm.joblib", "from_sklearn")


@pytest.mark.parametrize("protocol", range(6))
def test_the_authors_kind_of_file_a_pickled_svc_is_refused_with_the_way_out(protocol, tmp_path):
    path = tmp_path / "svm.pkl"
    path.write_bytes(pickle.dumps(fitted()[0], protocol=protocol))
    refused(lambda: files.load(path), "stopper", "pickle", "from_sklearn", "files.save")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"hello world, this is text\n", b"\x00" * 50, b"\x80\x04", b"{}" * 30, b"\xff" * 9]
)
def test_a_file_that_is_no_stopper_is_refused(content, tmp_path):
    path = tmp_path / "x.stopper"
    path.write_bytes(content)
    refused(lambda: files.load(path), "stopper", "x.stopper")


def test_every_truncation_is_refused(saved, tmp_path):
    _, content = saved
    path = tmp_path / "cut.stopper"
    header = 8 + int.from_bytes(content[:8], "little")
    cuts = {*range(0, 40), *range(40, len(content), 17), *range(header - 5, header + 5), len(content) - 1}
    for cut in sorted(cuts):
        path.write_bytes(content[:cut])
        refused(lambda: files.load(path), "stopper", "cut.stopper")


@given(content=st.binary(max_size=200))
@LENIENT
def test_random_bytes_are_refused(content, tmp_path):
    path = tmp_path / "random.stopper"
    path.write_bytes(content)
    refused(lambda: files.load(path), "stopper")


@given(header=st.binary(max_size=120), body=st.binary(max_size=40))
@LENIENT
def test_random_bytes_behind_a_valid_length_are_refused(header, body, tmp_path):
    path = tmp_path / "random.stopper"
    path.write_bytes(struct.pack("<Q", len(header) + 1) + b"{" + header + body)
    refused(lambda: files.load(path), "stopper")


@given(position=st.integers(0, 10**6), value=st.integers(0, 255))
@settings(LENIENT, max_examples=300)
def test_one_changed_byte_is_refused_or_gives_a_stopper_with_another_fingerprint(saved, position, value, tmp_path):
    stopper, content = saved
    changed = bytearray(content)
    changed[position % len(content)] = value
    path = tmp_path / "changed.stopper"
    path.write_bytes(bytes(changed))
    try:
        found = files.load(path)
    except AdaInferError as error:
        assert "\n" not in str(error)
    else:
        same = found.parameters() == stopper.parameters() and found.info == stopper.info
        same = same and all(np.array_equal(found.arrays[name], a) for name, a in stopper.arrays.items())
        assert (found.fingerprint == stopper.fingerprint) == same


def test_a_foreign_safetensors_file_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    for metadata in (None, {"format": "pt"}, {"adainfer": "null"}, {"adainfer": "[]"}, {"adainfer": "{"}):
        path.write_bytes(save_safetensors({"w": np.zeros((2, 2))}, metadata=metadata))
        refused(lambda: files.load(path), "stopper", "model.safetensors")


def test_a_trace_is_no_stopper_and_a_stopper_no_trace(saved, tmp_path):
    from lm_eval_adainfer.traces import recording

    container.write(tmp_path / "t.trace", "trace", 1, {"task": "t"}, {"a": np.zeros(3)})
    refused(lambda: files.load(tmp_path / "t.trace"), "stopper", "trace")
    refused(lambda: recording.read(tmp_path / "good.stopper"), "trace", "stopper")


@pytest.mark.parametrize("version", [0, 2, None, "1"])
def test_another_format_version_is_refused(version, saved, tmp_path):
    stopper, _ = saved
    meta = {"kind": "svm", "parameters": stopper.parameters(), "info": {}}
    container.write(tmp_path / "v.stopper", "stopper", version, meta, stopper.arrays)
    refused(lambda: files.load(tmp_path / "v.stopper"), "stopper", "version", str(version))


def test_folders_and_missing_files_are_named(tmp_path):
    refused(lambda: files.load(tmp_path), "stopper", str(tmp_path), "folder")
    refused(lambda: files.load(tmp_path / "no.stopper"), "stopper", "no.stopper", "does not exist")
    refused(lambda: specs.parse(str(tmp_path)), "stopper", "folder")


@pytest.mark.parametrize(
    "change",
    [
        {"features": ["gap", "top_prob", "cos_attn"]},
        {"features": ["gap"]},
        {"features": ["gap", "nonsense"]},
        {"features": "gap"},
        {"features": 5},
        {"features": None},
        {"features": [["gap"], ["gap"]]},
        {"kernel": "cubic"},
        {"kernel": None},
        {"kernel": ["rbf"]},
        {"gamma": "high"},
        {"gamma": None},
        {"gamma": float("nan")},
        {"coef0": float("inf")},
        {"degree": "three"},
        {"degree": float("inf")},
        {"threshold": []},
        {"what": "is this"},
    ],
)
def test_a_tampered_header_is_refused(change, saved, tmp_path):
    stopper, _ = saved
    meta = {"kind": "svm", "parameters": {**stopper.parameters(), **change}, "info": {}}
    container.write(tmp_path / "t.stopper", "stopper", 1, meta, stopper.arrays)
    refused(lambda: files.load(tmp_path / "t.stopper"), "stopper")


@pytest.mark.parametrize(
    "meta",
    [
        {},
        {"kind": "svm"},
        {"kind": "tree", "parameters": {}, "info": {}},
        {"kind": "svm", "parameters": [], "info": {}},
        {"kind": "svm", "parameters": {}, "info": {}},
        {"kind": ["svm"], "parameters": {}, "info": {}},
    ],
)
def test_a_header_without_its_parts_is_refused(meta, saved, tmp_path):
    container.write(tmp_path / "t.stopper", "stopper", 1, meta, saved[0].arrays)
    refused(lambda: files.load(tmp_path / "t.stopper"), "stopper", "t.stopper")


@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3", "F8_E5M2", "U16", "BOOL", "I64"])
def test_arrays_of_another_type_are_read_or_refused(dtype, saved, tmp_path):
    width = {"BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "BOOL": 1, "I64": 8}[dtype]
    meta = {"kind": "svm", "parameters": saved[0].parameters(), "info": {}}
    header, offset = {"__metadata__": {"adainfer": json.dumps({"what": "stopper", "version": 1, "meta": meta})}}, 0
    for name, shape in {"support_vectors": (3, 2), "dual_coef": (3,), "intercept": (1,)}.items():
        size = width * int(np.prod(shape))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    path = tmp_path / "t.stopper"
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\x01" * offset)
    try:
        stopper = files.load(path)
    except AdaInferError as error:
        assert "\n" not in str(error) and "stopper" in str(error)
    else:
        assert torch.isfinite(stopper.margin(1, torch.zeros(1, 2))).all()


def test_a_deeply_nested_header_is_refused(tmp_path):
    path = tmp_path / "deep.stopper"
    path.write_bytes(save_safetensors({"w": np.zeros(1)}, metadata={"adainfer": "[" * 200_000}))
    refused(lambda: files.load(path), "stopper", "deep.stopper")


# ------------------------------------------------------------------------------------------------ rules, parsing


def test_gap_stops_above_its_threshold_only():
    stopper = GapStopper(0.5)
    assert (stopper.margin(3, torch.tensor([[0.25], [0.5], [0.75], [1.0]])) > 0).tolist() == [False, False, True, True]
    assert GapStopper().threshold == 0.8
    assert not (GapStopper(1.0).margin(1, torch.ones(2, 1)) > 0).any()
    assert stopper.wants(1) and stopper.features == ("gap",) and stopper.flops == 1


def test_fixed_stops_at_its_block_only_and_reads_nothing():
    stopper = FixedStopper(3)
    assert [k for k in range(1, 6) if stopper.wants(k)] == [3]
    assert [bool((stopper.margin(k, torch.empty(2, 0)) > 0).all()) for k in (2, 3, 4)] == [False, True, False]
    assert stopper.features == () and stopper.flops == 0


def test_none_never_stops():
    assert not NoStopper().wants(1) and not (NoStopper().margin(1, torch.ones(3, 0)) > 0).any()


@pytest.mark.parametrize(
    ("spec", "kind", "value"),
    [
        (None, "none", None),
        ("", "none", None),
        ("None", "none", None),
        (" none ", "none", None),
        ("gap", "gap", 0.8),
        ("gap:0.25", "gap", 0.25),
        ("gap:0", "gap", 0.0),
        ("gap:1", "gap", 1.0),
        ("fixed:7", "fixed", 7),
    ],
)
def test_specs_name_their_strategy(spec, kind, value):
    stopper = specs.parse(spec)
    assert stopper.kind == kind
    assert getattr(stopper, "threshold", getattr(stopper, "layer", None)) == value
    assert specs.parse(stopper) is stopper


@pytest.mark.parametrize(
    "spec", ["gap:", "gap:1.01", "gap:-0.1", "gap:inf", "fixed", "fixed:", "fixed:-1", "fixed:2.5", "fixed:x"]
)
def test_wrong_specs_name_the_argument_and_the_value(spec):
    refused(lambda: specs.parse(spec), "stopper", spec.split(":")[0])


@pytest.mark.parametrize("spec", ["svm.pkl", "some/where", "./x", "Gap", "none:1", "svmm", "gap 0.8", 7, 0.5, True])
def test_an_unknown_spec_is_refused(spec):
    refused(lambda: specs.parse(spec), "stopper", str(spec).removeprefix("./"))


def test_rules_that_differ_have_different_fingerprints():
    stoppers = [NoStopper(), GapStopper(0.8), GapStopper(0.8000001), GapStopper(1), FixedStopper(1), FixedStopper(2)]
    stoppers.append(fitted()[1])
    assert len({s.fingerprint for s in stoppers}) == len(stoppers)
    assert GapStopper(0.8).fingerprint == specs.parse("gap").fingerprint == specs.parse("gap:.80").fingerprint


# ------------------------------------------------------------------------------------------------ the schedule


@pytest.mark.parametrize(
    ("check_layers", "min_layer", "expected"),
    [
        ("all", 1, (1, 2, 3, 4, 5, 6, 7)),
        (" all ", "3", (3, 4, 5, 6, 7)),
        ("all", 8, ()),
        ("every:1", 1, (1, 2, 3, 4, 5, 6, 7)),
        ("every:2", 1, (2, 4, 6)),
        ("every:3", 4, (6,)),
        ("every:8", 1, ()),
        ("every:100", 1, ()),
        ("5", 1, (5,)),
        (5, 1, (5,)),
        ("6+2+2+4", 1, (2, 4, 6)),
        (" 2 + 8", 1, (2,)),
        ([6, 2], 1, (2, 6)),
        ((1, "7", 8), 2, (7,)),
        ({3, 4}, 1, (3, 4)),
        ([8], 1, ()),
    ],
)
def test_checked_blocks_are_in_order_and_never_the_last(check_layers, min_layer, expected):
    schedule = Schedule(8, GapStopper(), min_layer, check_layers)
    assert schedule.blocks == expected
    assert schedule.describe() == {"min_layer": int(min_layer), "checked_blocks": list(expected)}


@pytest.mark.parametrize(
    "check_layers",
    ["", "0", "9", "1+9", "1,2", "every:", "every:-1", "every:x", "-1", [], [0], [9], [1.5], True, "1++2"],
)
def test_wrong_check_layers_are_named(check_layers):
    refused(lambda: Schedule(8, GapStopper(), 1, check_layers), "check_layers")


@pytest.mark.parametrize("min_layer", [0, 9, -1, "x", 1.5, None, ""])
def test_wrong_min_layers_are_named(min_layer):
    refused(lambda: Schedule(8, GapStopper(), min_layer), "min_layer", "1 to 8")


@pytest.mark.parametrize("check_layers", ["all", "every:2", "2+8", [4]])
@pytest.mark.parametrize("min_layer", [1, 8])
def test_none_is_never_checked(check_layers, min_layer):
    assert Schedule(8, NoStopper(), min_layer, check_layers).blocks == ()


def test_fixed_is_checked_at_its_block_alone_and_the_last_block_needs_no_check():
    assert Schedule(8, FixedStopper(3)).blocks == (3,)
    assert Schedule(8, FixedStopper(8)).blocks == ()
    refused(lambda: Schedule(8, FixedStopper(3), check_layers="every:2"), "check_layers", "3")
    refused(lambda: Schedule(8, FixedStopper(9)), "stopper", "9", "1 to 8")


def test_a_rule_may_be_left_without_blocks_in_a_model_of_any_depth():
    for n_blocks in (3, 2):
        assert Schedule(n_blocks, GapStopper(), min_layer=n_blocks).blocks == ()


def test_a_model_of_one_block_has_nothing_to_check():
    assert Schedule(1, GapStopper()).blocks == Schedule(1, FixedStopper(1)).blocks == ()
