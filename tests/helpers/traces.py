"""Trace files made by hand, without a model."""

from __future__ import annotations

import numpy as np

from lm_eval_adainfer import container
from lm_eval_adainfer.readers.base import Reader
from lm_eval_adainfer.readers.tuned import Maps
from lm_eval_adainfer.traces import recording


def write(path, features, top, document=None, scores=None, request=None, gold=None, names=("gap", "top_prob"), **meta):
    """A trace by hand; by default every decision is a document of two choices, of which the first is right."""
    top = np.array(top, dtype=np.int32)
    n, n_blocks = top.shape
    scores = np.zeros((n, n_blocks, 2)) if scores is None else np.array(scores)
    request = np.tile(np.arange(scores.shape[2]), (n, 1)) if request is None else np.array(request)
    gold = np.zeros(n) if gold is None else np.array(gold)
    base = {
        "model": "m", "n_blocks": n_blocks, "head_hash": "h", "task": "t", "num_fewshot": 0, "split": "test",
        "output_type": "multiple_choice", "hidden_size": 8, "vocab_size": 16, "block_weights": [100] * n_blocks,
        "features": list(names), "documents": n,
    }  # fmt: skip
    arrays = {
        "features": np.array(features, dtype=np.float32).reshape(n, n_blocks, np.shape(features)[-1]),
        "top_token": top,
        "scores": scores.astype(np.float32),
        "request": request.astype(np.int16),
        "gold": gold.astype(np.int16),
        "gold_token": np.full(n, 1, dtype=np.int32),
        "prompt_tokens": np.arange(5, 5 + n, dtype=np.int32),
        "position": np.zeros(n, dtype=np.int32),
        "doc_id": np.arange(n) if document is None else np.array(document, dtype=np.int64),
    }
    container.write(path, "trace", recording.VERSION, {**base, **meta}, arrays)
    return path


def add_reader(path, name, blocks, features):
    """Note what another reader says after these blocks: the head's tokens and scores, and features [N, B, R] of its own,
    the first R of the trace's."""
    meta, arrays = recording.read(path)
    at = [k - 1 for k in blocks]
    said = {f"{name}/{array}": arrays[array][:, at] for array in ("top_token", "scores")}
    said[f"{name}/features"] = np.array(features, dtype=np.float32)
    meta |= {
        "readers": {"head": list(range(1, meta["n_blocks"] + 1)), name: list(blocks)},
        "reader_features": meta["features"][: np.shape(features)[-1]],
    }
    container.write(path, "trace", recording.VERSION, meta, {**arrays, **said})


def write_labelled(path, top, gold_token, features=None, names=("gap", "top_prob"), **meta):
    """A trace by hand, of which only labels are read: top tokens [N, L] and gold tokens [N]."""
    top = np.array(top, dtype=np.int32)
    if features is None:
        features = np.random.default_rng(0).uniform(size=(*top.shape, len(names))).astype(np.float32)
    base = {
        "model": "m", "n_blocks": top.shape[1], "head_hash": "h", "task": "t", "num_fewshot": 0, "split": "train",
        "output_type": "multiple_choice", "hidden_size": 4, "vocab_size": 10, "block_weights": [100] * top.shape[1],
    }  # fmt: skip
    ones = np.ones(len(top), dtype=np.int32)
    container.write(
        path,
        "trace",
        recording.VERSION,
        {**base, "documents": len(top), "features": list(names), **meta},
        {
            "features": features,
            "top_token": top,
            "gold_token": np.array(gold_token, dtype=np.int32),
            "prompt_tokens": ones,
            "position": 0 * ones,
        },
    )
    return path


BASE = {
    "model": "m", "n_blocks": 4, "head_hash": "h", "task": "t", "num_fewshot": 0, "split": "test", "documents": 0,
    "features": ["gap", "top_prob"], "output_type": "loglikelihood", "hidden_size": 8, "vocab_size": 50,
    "block_weights": [100] * 4,
}  # fmt: skip


def write_random(path, n=400, seed=0, gap=None, gold=None, arrays=(), version=recording.VERSION, **meta):
    """A trace of a model whose early tokens are the more often the last one's, the greater their gap."""
    rng = np.random.default_rng(seed)
    meta = {**BASE, "documents": n, **meta}
    gap = rng.uniform(size=(n, 4)) if gap is None else np.asarray(gap, dtype=float)
    n = len(gap)
    final = rng.integers(0, 50, n)
    same = rng.uniform(size=(n, 4)) < gap**0.2
    same[:, -1] = True
    values = np.stack([gap, (1 + gap) / 2], axis=-1).astype(np.float32)
    found = {
        "features": values,
        "top_token": np.where(same, final[:, None], 50).astype(np.int32),
        "gold_token": np.where(rng.uniform(size=n) < 0.8, final, 51).astype(np.int32) if gold is None else gold,
        "prompt_tokens": np.full(n, 9, dtype=np.int32),
        "position": np.zeros(n, dtype=np.int32),
        "doc_id": np.arange(n),
        "scores": np.zeros((n, 4, 1), dtype=np.float32),
        "request": np.zeros((n, 1), dtype=np.int16),
        **dict(arrays),
    }
    container.write(path, "trace", version, meta, found)
    return path


def lens(anatomy, seed=0):
    """A tuned reader of affine maps that are far from the identity."""
    rng = np.random.default_rng(seed)
    n, h = anatomy.n_blocks - 1, anatomy.block_hidden_size
    arrays = {"bias": rng.normal(size=(n, h)) / 2, "weight": rng.normal(size=(n, h, h)) / h**0.5}
    return Reader("tuned", maps=Maps({name: array.astype(np.float32) for name, array in arrays.items()}))


def traced(lm, task, folder, **options):
    """(file, meta, arrays) of a recorded task."""
    (path,) = recording.trace(lm, {task.config.task: task}, folder, **options)
    meta, arrays = recording.read(path)
    return path, meta, arrays
