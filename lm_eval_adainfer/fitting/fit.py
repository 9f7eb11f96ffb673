"""From traces to a stopper: one training example per (instance, block), as in the paper (Appendix B)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lm_eval_adainfer._version import __version__
from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.fitting import grids
from lm_eval_adainfer.readers.base import HEAD, Reader
from lm_eval_adainfer.strategies import crf, registry
from lm_eval_adainfer.strategies.base import Stopper
from lm_eval_adainfer.strategies.classifier import ClassifierStopper
from lm_eval_adainfer.strategies.crf import CRFStopper
from lm_eval_adainfer.strategies.features import FEATURES, RECORDED, check_names
from lm_eval_adainfer.strategies.network import MLPStopper
from lm_eval_adainfer.strategies.registry import PAPER_FEATURES
from lm_eval_adainfer.strategies.svm import SVMStopper
from lm_eval_adainfer.strategies.trees import BoostedStopper
from lm_eval_adainfer.traces.documents import TracedDocuments
from lm_eval_adainfer.traces.file import ASKED, find, read, read_of_one_model, require_finite, without_choices
from lm_eval_adainfer.traces.margins import columns
from lm_eval_adainfer.traces.views import recorded_blocks

LABELS = ("final", "gold", "stable")
HELD_OUT = 5  # one in so many documents is for Platt scaling
_HOW = registry.fitted()  # the defaults of the functions below


@dataclass
class Examples:
    """One example per (instance, block), of the E blocks after which examples were taken.

    Attributes:
        blocks: These blocks, in order.
        x: [n, F] float64 features.
        y: [n] ints, 1 = stop.
        document: [n] ints, which document (over all traces) an example is of.
        metas: The traces'.
        seen: ``"task/split"`` to the documents' indices there.
    """

    blocks: list[int]
    x: np.ndarray
    y: np.ndarray
    document: np.ndarray
    metas: list[dict[str, Any]]
    seen: dict[str, list[int]]


def examples(
    files: Sequence[Path], features: Sequence[str], label: str
) -> tuple[np.ndarray, np.ndarray, list[dict[str, Any]]]:
    """Training examples of traces.

    Args:
        files: Trace files of one model.
        features: Which features, in this order; those among the choices leave out the decisions without such choices.
        label: ``final``: the block's top token is the last block's (paper, Eq. 1). ``gold``: it is the gold answer's
            first token (Appendix B). ``stable``: the document's answer (``TracedDocuments.answers``) is the last
            block's and never changes again: where ``oracle:stable`` would leave.

    Returns:
        [n, F] float64 features, [n] int labels (1 = stop), and the traces' metas.

    Raises:
        AdaInferError: On traces of different models, missing or NaN features, or no gold answers.
    """
    found = collect(files, features, label)
    return found.x, found.y, found.metas


def collect(files: Sequence[Path], features: Sequence[str], label: str, reader: Reader = HEAD) -> Examples:
    """:func:`examples` under a reader, and which documents they are of.

    Where every block was recorded, they are of every block, as in the paper. Else they are of the recorded ones but
    block L, after which nobody asks and every decision is to stop: it would be a large share of them.
    """
    check_names(features, "features")
    check_label(label)
    xs, ys, owners = [], [], []
    metas: list[dict[str, Any]] = []
    numbers: dict[tuple[str, str, int], int] = {}
    blocks: list[int] = []
    has_choices = False
    for path, meta, arrays in read_of_one_model(files, reader.name):
        x = columns(features, meta, arrays)
        require_finite(path, x, features)
        y, known = _labels(path, meta, arrays, label)
        lacks = without_choices(x, features)
        has_choices = has_choices or not lacks.all()
        known = known & ~lacks
        blocks = recorded_blocks(meta)
        if len(blocks) < meta["n_blocks"]:
            blocks = blocks[:-1]
        x, y = x[:, : len(blocks)], y[:, [k - 1 for k in blocks]]
        xs.append(x[known].reshape(-1, len(features)))
        ys.append(y[known].astype(int).reshape(-1))
        place = (meta["task"], meta["split"])
        ids = arrays["doc_id"] if "doc_id" in arrays else np.arange(len(y))
        of = np.array([numbers.setdefault((*place, i), len(numbers)) for i in ids[known].tolist()], dtype=int)
        owners.append(np.repeat(of, y.shape[1]))
        metas.append(meta)
    if not has_choices:
        of_choices = next(name for name in features if FEATURES[name].choices)
        raise AdaInferError(
            f"features: {of_choices} is of choices of one token each, and no decision of these traces has such "
            "choices; give features of the vocabulary"
        )
    x_all, y_all = np.concatenate(xs), np.concatenate(ys)
    if len(x_all) == 0:
        raise AdaInferError(f"label: no instance of these traces has a label {label!r}; use final")
    seen: dict[str, list[int]] = {}
    for task, split, i in numbers:
        seen.setdefault(f"{task}/{split}", []).append(i)
    return Examples(blocks, x_all, y_all, np.concatenate(owners), metas, seen)


def _labels(
    path: Path, meta: dict[str, Any], arrays: dict[str, np.ndarray], label: str
) -> tuple[np.ndarray, np.ndarray]:
    """[N, L] bool labels of a trace, and [N] bool: which instances have one."""
    top = arrays["top_token"]
    if len(top) == 0:
        raise AdaInferError(f"traces: the trace of {meta['task']} holds no document; trace some")
    if label == "stable":
        documents = TracedDocuments(path, meta, arrays)
        return documents.stable[documents.owner], np.ones(len(top), dtype=bool)
    goal = top[:, -1] if label == "final" else arrays["gold_token"]
    return top == goal[:, None], goal >= 0


def fit(kind: str, paths: Sequence[str | Path], reader: Reader = HEAD, **options: Any) -> Stopper:
    """Fit a stopper of any kind that the registry declares as fitted.

    Args:
        kind: What to fit.
        paths: Trace files or folders of them.
        reader: Under which it is fitted; the stopper knows it, and where asking is dear also after which blocks to.
        **options: Those that all of them take (``label``, ``features``, ``seed``, ``threshold``), or the kind's own.

    Raises:
        AdaInferError: On an unknown kind, and as :func:`fit_svm`, :func:`fit_crf` and :func:`fit_classifier`.
    """
    check_kind(kind)
    return FITTERS[kind](paths, reader=reader, **options)


def check_kind(kind: Any) -> None:
    """Raise AdaInferError where the registry does not declare ``kind`` as a strategy that is fitted."""
    kinds = tuple(registry.fitted())
    if kind not in kinds:
        raise AdaInferError(f"fit: {kind!r} is none of {', '.join(kinds)}")


def check_label(label: Any) -> None:
    """Raise AdaInferError where ``label`` is none of ``LABELS``."""
    if label not in LABELS:
        raise AdaInferError(f"label: {label!r} is none of {', '.join(LABELS)}")


def fit_svm(
    paths: Sequence[str | Path],
    label: str = "final",
    features: Sequence[str] = PAPER_FEATURES,
    max_examples: int = _HOW["svm"].most,
    seed: int = 0,
    threshold: float = _HOW["svm"].threshold,
    reader: Reader = HEAD,
) -> SVMStopper:
    """Fit the paper's SVM: scikit-learn's SVC with its default settings.

    Args:
        paths: Trace files or folders of them.
        label: ``final`` or ``gold``.
        features: The paper's are gap and top_prob.
        max_examples: SVC takes time quadratic in the examples, so at most so many are used: drawn uniformly and
            without replacement from all (instance, block) pairs, with ``seed``.
        seed: Of the draw.
        threshold: Stop when the decision function exceeds it; 0 is scikit-learn's ``predict``.
        reader: As :func:`fit`'s.

    Raises:
        AdaInferError: On unusable traces, or where all examples have one label.
    """
    from sklearn.svm import SVC

    if max_examples < 2:
        raise AdaInferError(f"max_examples: {max_examples} can't hold both labels; give 2 or more")
    found = collect(find(paths), features, label, reader)
    chosen = _draw(np.arange(len(found.x)), max_examples, seed)
    x, y = found.x[chosen], found.y[chosen]
    _need_both_labels(y)
    info = _info(found, label, y, seed, "scikit-learn")
    stopper = SVMStopper.from_sklearn(SVC().fit(x, y), features, threshold, info)
    _note(stopper, found, reader)
    return stopper


def fit_crf(
    paths: Sequence[str | Path],
    label: str = "final",
    features: Sequence[str] = PAPER_FEATURES,
    max_instances: int = _HOW["crf"].most,
    seed: int = 0,
    threshold: float = _HOW["crf"].threshold,
    prefixes: bool = False,
    reader: Reader = HEAD,
) -> CRFStopper:
    """Fit a conditional random field along the blocks (paper, section 5.3): CRFsuite with its default settings.

    Args:
        paths: Trace files or folders of them.
        label: ``final``, ``gold`` or ``stable``.
        features: The paper's are gap and top_prob.
        max_instances: At most so many sequences (one per instance), drawn uniformly with ``seed``.
        seed: Of the draw.
        threshold: Stop when the filtered probability of stopping exceeds it.
        prefixes: Train on every prefix of every sequence (see ``crf.train``).
        reader: As :func:`fit`'s.

    Raises:
        AdaInferError: On unusable traces, where all examples have one label, or without python-crfsuite.
    """
    if max_instances < 1:
        raise AdaInferError(f"max_instances: {max_instances} sequences are none; give 1 or more")
    found = collect(find(paths), features, label, reader)
    length = len(found.blocks)
    x, y = found.x.reshape(-1, length, len(features)), found.y.reshape(-1, length)
    chosen = _draw(np.arange(len(x)), max_instances, seed)
    x, y = x[chosen], y[chosen]
    _need_both_labels(y.reshape(-1))
    info = {**_info(found, label, y.reshape(-1), seed, "python-crfsuite"), "prefixes": prefixes}
    stopper = CRFStopper.from_crfsuite(crf.train(x, y, features, prefixes), features, threshold, info)
    _note(stopper, found, reader)
    return stopper


def fit_classifier(
    kind: str,
    paths: Sequence[str | Path],
    label: str = "final",
    features: Sequence[str] | None = None,
    max_examples: int | None = None,
    seed: int = 0,
    threshold: float | None = None,
    reader: Reader = HEAD,
) -> ClassifierStopper:
    """Fit one of scikit-learn's other small models, and Platt-scale it on documents that it has not seen.

    Args:
        kind: ``logistic``, ``mlp`` or ``boosted``.
        paths: Trace files or folders of them.
        label: ``final``, ``gold`` or ``stable``.
        features: None takes all that the first trace allows; those among the choices only where every decision of all
            traces has choices of one token each.
        max_examples: At most so many (instance, block) pairs, drawn uniformly with ``seed``; None takes the registry's
            number.
        seed: Of the draw, of the held-out fifth of the documents and of the model.
        threshold: Stop when the probability exceeds it; None takes the registry's.
        reader: As :func:`fit`'s.

    Raises:
        AdaInferError: On unusable traces or a wrong argument, or where all examples have one label.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss

    if kind not in _ARRAYS:
        raise AdaInferError(f"kind: {kind!r} is none of {', '.join(_ARRAYS)}")
    stopper_class = registry.STRATEGIES[kind].stopper_class()
    assert issubclass(stopper_class, ClassifierStopper)
    max_examples = _HOW[kind].most if max_examples is None else max_examples
    threshold = _HOW[kind].threshold if threshold is None else threshold
    if max_examples < 2:
        raise AdaInferError(f"max_examples: {max_examples} can't hold both labels; give 2 or more")
    if not 0 <= threshold <= 1:
        raise AdaInferError(f"threshold: {threshold:g} is not between 0 and 1; give 0.95, say")
    files = find(paths)
    if features is None:
        features = _all_features(files)
    found = collect(files, features, label, reader)
    documents = np.random.default_rng(seed).permutation(found.document.max() + 1)
    held_out = np.isin(found.document, documents[: len(documents) // HELD_OUT])
    chosen = _draw(np.flatnonzero(~held_out), max_examples, seed)
    x, y = found.x[chosen], found.y[chosen]
    for part in (y, found.y[held_out]):
        _need_both_labels(part)
    arrays = _ARRAYS[kind](x, y, seed)
    bare = stopper_class(arrays, features)  # slope 1 and offset 0: its probability is the sigmoid of the score
    scores = bare.bare_scores(found.x[held_out])[:, None]
    platt = LogisticRegression(C=1e6).fit(scores, found.y[held_out])
    slope, offset = float(platt.coef_[0, 0]), float(platt.intercept_[0])
    if slope <= 0:
        raise AdaInferError(
            f"traces: this {kind} is no better than chance on documents that it was not fitted on; trace more documents"
        )
    info = _info(found, label, y, seed)
    info["held_out_log_loss"] = float(log_loss(found.y[held_out], platt.predict_proba(scores)[:, 1]))
    stopper = stopper_class(arrays, features, threshold, slope, offset, info)
    _note(stopper, found, reader)
    return stopper


def _all_features(files: Sequence[Path]) -> list[str]:
    """What ``fit_classifier`` takes by default."""
    recorded = read(files[0])[0]["features"]
    found = [name for name in FEATURES if name in recorded or name not in RECORDED]
    if all(_all_have_choices(*read(path)) for path in files):
        return found
    return [name for name in found if not FEATURES[name].choices]


def _all_have_choices(meta: dict[str, Any], arrays: dict[str, np.ndarray]) -> bool:
    """Whether a trace holds every feature among the choices, of every decision."""
    of_choices = {name for name in RECORDED if RECORDED[name].choices}
    return of_choices <= set(meta["features"]) and not without_choices(arrays["features"], meta["features"]).any()


def _logistic(x: np.ndarray, y: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(x)
    return MLPStopper.arrays_of(scaler, LogisticRegression(max_iter=1000).fit(scaler.transform(x), y))


def _mlp(x: np.ndarray, y: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(x)
    network = MLPClassifier((32,), batch_size=min(512, len(x)), max_iter=60, tol=1e-3, random_state=seed)
    with warnings.catch_warnings():  # 60 passes are what is asked for
        warnings.simplefilter("ignore", ConvergenceWarning)
        network.fit(scaler.transform(x), y)
    return MLPStopper.arrays_of(scaler, network)


def _boosted(x: np.ndarray, y: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    from sklearn.ensemble import GradientBoostingClassifier

    model = GradientBoostingClassifier(max_depth=4, subsample=0.5, min_samples_leaf=20, random_state=seed)
    return BoostedStopper.arrays_of(model.fit(x, y))


# kind -> the arrays of a classifier fitted on examples x, y with a seed; fit_classifier does the rest
_ARRAYS: dict[str, Callable[[np.ndarray, np.ndarray, int], dict[str, np.ndarray]]] = {
    "logistic": _logistic, "mlp": _mlp, "boosted": _boosted,
}  # fmt: skip
# kind -> what fits it, called with trace files and options; the kinds are those that the registry declares as fitted
FITTERS: dict[str, Callable[..., Stopper]] = {
    "svm": fit_svm, "crf": fit_crf, **{kind: partial(fit_classifier, kind) for kind in _ARRAYS},
}  # fmt: skip


def _note(stopper: Stopper, found: Examples, reader: Reader) -> None:
    """Note what a stopper was fitted on: documents, their scores, reader, and blocks where asking is dear."""
    stopper.seen, stopper.reader = found.seen, reader
    decisions = found.x.reshape(-1, len(found.blocks), found.x.shape[1])
    asked = [k for k in found.blocks if k < found.metas[0]["n_blocks"]] or found.blocks
    stopper.info[grids.KEY] = grids.of_examples(stopper, decisions[:, : len(asked)], asked)
    if reader.runs_tokens:
        stopper.info["check_layers"] = found.blocks


def _draw(indices: np.ndarray, most: int, seed: int) -> np.ndarray:
    """At most so many of the indices, in order."""
    if len(indices) <= most:
        return indices
    return indices[np.sort(np.random.default_rng(seed).choice(len(indices), most, replace=False))]


def _need_both_labels(y: np.ndarray) -> None:
    if len(set(y.tolist())) == 1:
        always = "stop" if y[0] else "go on"
        raise AdaInferError(
            f"traces: every one of the {len(y)} examples says {always}; trace more documents or other tasks"
        )
    if len(y) == 0:
        raise AdaInferError("traces: too few documents to hold a fifth of them out; trace 5 or more")


def _info(found: Examples, label: str, y: np.ndarray, seed: int, fitter: str = "scikit-learn") -> dict[str, Any]:
    """What a stopper file says about where it comes from; y are the labels of the examples used."""
    metas = found.metas
    return {
        **{key: metas[0][key] for key in ("model", "n_blocks", "head_hash")},
        "tasks": sorted({meta["task"] for meta in metas}),
        "num_fewshot": sorted({meta["num_fewshot"] for meta in metas}),
        "split": sorted({meta["split"] for meta in metas}),
        "documents": sum(meta["documents"] for meta in metas),
        **{key: metas[0][key] for key in ASKED if metas[0].get(key) is not None},
        "label": label,
        "examples": len(y),
        "examples_available": len(found.y),
        "positive_share": float(np.mean(y)),
        "seed": seed,
        "versions": {"lm_eval_adainfer": __version__, fitter.replace("-", "_"): _version(fitter)},
    }


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)
