"""Which documents of a task a trace is made of: its splits, and a seeded draw of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from typing import Any

from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.tasks.qa import canonical_json, stable_hash

SPLITS = ("train", "test")
_FIT_PERCENT = 30


def in_fitting_part(doc: Any) -> bool:
    """Whether a document of a task without training split is among the 30% for fitting (docs/numbers.md, Splits)."""
    return stable_hash("split", canonical_json(doc)) % 100 < _FIT_PERCENT


@contextmanager
def documents_of(
    task: Any, name: str, split: str, limit: int | None, seed: int, num_fewshot: int
) -> Iterator[list[int]]:
    """Make the task evaluate these documents for a while; yields their indices in the split they come from."""
    has_training = task.has_training_docs()
    docs = task.training_docs() if split == "train" and has_training else task.eval_docs
    indices = list(range(len(docs)))
    if not has_training:
        indices = [i for i in indices if in_fitting_part(docs[i]) == (split == "train")]
    if limit is not None and limit < len(indices):
        indices = sorted(Random(seed).sample(indices, limit))
    if not indices:
        raise AdaInferError(f"tasks: {name} has no documents for split={split}")
    chosen = [docs[i] for i in indices]
    shots, test_split = task.get_config("num_fewshot"), task.get_config("test_split")
    task.has_test_docs, task.test_docs = (lambda: True), (lambda: chosen)
    task.set_config(key="num_fewshot", value=num_fewshot)
    # lm-eval excludes a document from its own shots only where it believes the two splits to be the same
    if hasattr(task, "fewshot_cfg"):
        task.set_config(key="test_split", value=task.fewshot_cfg.split)
    try:
        yield indices
    finally:
        del task.has_test_docs, task.test_docs
        task.set_config(key="num_fewshot", value=shots)
        task.set_config(key="test_split", value=test_split)
