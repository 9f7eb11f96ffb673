"""From traces to a stopper: one training example per (instance, block), as in the paper (Appendix B)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lm_eval_adainfer import __version__, tracing
from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.features import check_names
from lm_eval_adainfer.simulation import columns
from lm_eval_adainfer.strategies import crf
from lm_eval_adainfer.strategies.crf import CRFStopper
from lm_eval_adainfer.strategies.svm import SVMStopper

LABELS = ("final", "gold")
PAPER_FEATURES = ("gap", "top_prob")
MAX_EXAMPLES = 5000


def find(paths: Sequence[str | Path]) -> list[Path]:
    """Trace files among files and folders, in order.

    Raises:
        AdaInferError: Where there is none.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            files += sorted(path.glob("*.trace"))
        else:
            files.append(path)
    if not files:
        raise AdaInferError(f"traces: {', '.join(map(str, paths))} holds no .trace file; make some with adainfer trace")
    return files


def examples(
    files: Sequence[Path], features: Sequence[str], label: str
) -> tuple[np.ndarray, np.ndarray, list[dict[str, Any]]]:
    """Training examples of traces.

    Args:
        files: Trace files of one model.
        features: Which features, in this order.
        label: ``final``: the block's top token is the last block's (paper, Eq. 1). ``gold``: it is the gold answer's
            first token (Appendix B).

    Returns:
        [n, F] float64 features, [n] int labels (1 = stop), and the traces' metas.

    Raises:
        AdaInferError: On traces of different models, missing or NaN features, or no gold answers.
    """
    check_names(features, "features")
    if label not in LABELS:
        raise AdaInferError(f"label: {label!r} is none of {', '.join(LABELS)}")
    xs, ys = [], []
    metas: list[dict[str, Any]] = []
    for file in files:
        meta, arrays = tracing.read(file)
        if metas and (meta["n_blocks"], meta["head_hash"]) != (metas[0]["n_blocks"], metas[0]["head_hash"]):
            raise AdaInferError(
                f"traces: {file} is of {meta['model']}, the others of {metas[0]['model']}; fit one model at a time"
            )
        x = columns(features, meta, arrays)
        if not np.isfinite(x).all():
            raise AdaInferError(
                f"traces: {file} holds NaN or infinite features; trace in a dtype that does not overflow"
            )
        top = arrays["top_token"]
        goal = top[:, -1] if label == "final" else arrays["gold_token"]
        known = goal >= 0
        xs.append(x[known].reshape(-1, len(features)))
        ys.append((top == goal[:, None])[known].astype(int).reshape(-1))
        metas.append(meta)
    x_all, y_all = np.concatenate(xs), np.concatenate(ys)
    if len(x_all) == 0:
        raise AdaInferError(f"label: no instance of these traces has a label {label!r}; use final")
    return x_all, y_all, metas


def fit_svm(
    paths: Sequence[str | Path],
    label: str = "final",
    features: Sequence[str] = PAPER_FEATURES,
    max_examples: int = MAX_EXAMPLES,
    seed: int = 0,
    threshold: float = 0.0,
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

    Raises:
        AdaInferError: On unusable traces, or where all examples have one label.
    """
    from sklearn.svm import SVC

    if max_examples < 2:
        raise AdaInferError(f"max_examples: {max_examples} can't hold both labels; give 2 or more")
    x, y, metas = examples(find(paths), features, label)
    total = len(x)
    if total > max_examples:
        chosen = np.sort(np.random.default_rng(seed).choice(total, max_examples, replace=False))
        x, y = x[chosen], y[chosen]
    _require_both(y)
    info = _info(metas, label, x, y, total, seed, "scikit-learn")
    return SVMStopper.from_sklearn(SVC().fit(x, y), features, threshold, info)


def fit_crf(
    paths: Sequence[str | Path],
    label: str = "final",
    features: Sequence[str] = PAPER_FEATURES,
    max_instances: int = MAX_EXAMPLES,
    seed: int = 0,
    threshold: float = 0.5,
    prefixes: bool = False,
) -> CRFStopper:
    """Fit a conditional random field along the blocks (paper, section 5.3): CRFsuite with its default settings.

    Args:
        paths: Trace files or folders of them.
        label: ``final`` or ``gold``.
        features: The paper's are gap and top_prob.
        max_instances: At most so many sequences (one per instance), drawn uniformly with ``seed``.
        seed: Of the draw.
        threshold: Stop when the filtered probability of stopping exceeds it.
        prefixes: Train on every prefix of every sequence (see ``crf.train``).

    Raises:
        AdaInferError: On unusable traces, where all examples have one label, or without python-crfsuite.
    """
    if max_instances < 1:
        raise AdaInferError(f"max_instances: {max_instances} sequences are none; give 1 or more")
    x, y, metas = examples(find(paths), features, label)
    total, n_blocks = len(x), metas[0]["n_blocks"]
    x, y = x.reshape(-1, n_blocks, len(features)), y.reshape(-1, n_blocks)
    if len(x) > max_instances:
        chosen = np.sort(np.random.default_rng(seed).choice(len(x), max_instances, replace=False))
        x, y = x[chosen], y[chosen]
    _require_both(y.reshape(-1))
    info = _info(metas, label, x.reshape(-1, len(features)), y, total, seed, "python-crfsuite")
    info["prefixes"] = prefixes
    return CRFStopper.from_crfsuite(crf.train(x, y, features, prefixes), features, threshold, info)


def _require_both(y: np.ndarray) -> None:
    if len(set(y.tolist())) < 2:
        always = "stop" if y[0] else "go on"
        raise AdaInferError(
            f"traces: every one of the {len(y)} examples says {always}; trace more documents or other tasks"
        )


def _info(
    metas: Sequence[dict[str, Any]], label: str, x: np.ndarray, y: np.ndarray, total: int, seed: int, fitter: str
) -> dict[str, Any]:
    """What a stopper says about where it comes from; x and y are the examples used, out of ``total``."""
    return {
        **{key: metas[0][key] for key in ("model", "n_blocks", "head_hash")},
        "tasks": sorted({meta["task"] for meta in metas}),
        "num_fewshot": sorted({meta["num_fewshot"] for meta in metas}),
        "split": sorted({meta["split"] for meta in metas}),
        "documents": sum(meta["documents"] for meta in metas),
        "label": label,
        "examples": len(x),
        "examples_available": total,
        "positive_share": float(np.mean(y)),
        "seed": seed,
        "versions": {"lm_eval_adainfer": __version__, fitter.replace("-", "_"): _version(fitter)},
    }


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)
