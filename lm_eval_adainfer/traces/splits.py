"""Which documents of a task a trace is made of: its splits, and a seeded draw of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from random import Random
from typing import Any

import numpy as np

from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.tasks.qa import canonical_json, stable_hash

SPLITS = ("train", "calibrate", "test")
_TRAINING = (60, 100)  # up to which per cent of the training documents are for fitting, for calibrating
_EVALUATION = (30, 50)  # the same of the evaluation documents of a task without training split; the rest is for testing


def split_of(doc: Any, has_training: bool) -> str:
    """The split of a training document, or of an evaluation document of a task that has none (docs/numbers.md)."""
    percent = stable_hash("split", canonical_json(doc)) % 100
    fit, calibrate = _TRAINING if has_training else _EVALUATION
    return "train" if percent < fit else "calibrate" if percent < calibrate else "test"


def overlap(seen: Mapping[str, Sequence[int]], task: str, split: str, documents: Sequence[int] | np.ndarray) -> int:
    """How many of a split's documents were used in fitting.

    Args:
        seen: ``Stopper.seen``.
        task: The task.
        split: The split.
        documents: Their indices.
    """
    # train and calibrate number the same documents, and train was once all of them
    alike = ("train", "calibrate") if split in ("train", "calibrate") else (split,)
    used = {int(i) for name in alike for i in seen.get(f"{task}/{name}", [])}
    return len(used & {int(i) for i in documents})


@contextmanager
def documents_of(
    task: Any, name: str, split: str, limit: int | None, seed: int, num_fewshot: int
) -> Iterator[list[int]]:
    """Make the task evaluate these documents for a while; yields their indices in the split they come from."""
    has_training = task.has_training_docs()
    is_whole = has_training and split == "test"
    docs = task.training_docs() if has_training and not is_whole else task.eval_docs
    indices = [i for i in range(len(docs)) if is_whole or split_of(docs[i], has_training) == split]
    if limit is not None and limit < len(indices):
        indices = sorted(Random(seed).sample(indices, limit))
    if not indices:
        raise AdaInferError(f"tasks: {name} has no documents for split={split}")
    chosen = [docs[i] for i in indices]
    shots, test_split = task.get_config("num_fewshot"), task.get_config("test_split")
    task.has_test_docs, task.test_docs = (lambda: True), (lambda: chosen)
    task.set_config(key="num_fewshot", value=num_fewshot)
    # lm-eval excludes a document from its own shots only where it believes the two splits to be the same
    if (own := task.get_config("fewshot_config")) is not None:
        task.set_config(key="test_split", value=own.split)
    try:
        yield indices
    finally:
        del task.has_test_docs, task.test_docs
        task.set_config(key="num_fewshot", value=shots)
        task.set_config(key="test_split", value=test_split)
