"""The rule-understanding word tasks of Todd et al. (arXiv 2310.15213): input/output pairs, split by a fixed hash."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import datasets

from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.tasks.qa import QATask, stable_hash

URL = "https://raw.githubusercontent.com/ericwtodd/function_vectors/main/dataset_files/abstractive/{name}.json"
SPLITS = (("train", 30), ("validation", 20), ("test", 50))  # per cent: fit, calibrate, test


def hash_split(question: str) -> str:
    """The split a document belongs to, for data without official ones: ``train``, ``validation`` or ``test``.

    30%, 20% and 50% (fit, calibrate, test). The question alone decides, so that a word that
    occurs in several tasks is in the same split of all of them.
    """
    percentile = stable_hash("split", question.strip()) % 100
    for split, share in SPLITS:
        percentile -= share
        if percentile < 0:
            return split
    raise AssertionError("the shares add up to 100")


def load_words(name: str) -> datasets.DatasetDict:
    """Load a word task, from ``$ADAINFER_DATA/<name>.json`` if that is set, else from its public address.

    Of several outputs for one input the first in the file counts, the others are left out: a prompt should not
    contradict itself, and top-1 accuracy knows one answer. Surrounding whitespace is stripped.

    Returns:
        ``train``, ``validation`` and ``test``, each with the columns ``input`` and ``output`` in the file's order.

    Raises:
        AdaInferError: if the pairs can't be had.
    """
    outputs: dict[str, str] = {}
    for row in _pairs(name):
        outputs.setdefault(row["input"].strip(), row["output"].strip())
    splits: dict[str, list[dict[str, str]]] = {split: [] for split, _ in SPLITS}
    for word, output in outputs.items():
        splits[hash_split(word)].append({"input": word, "output": output})
    features = datasets.Features({key: datasets.Value("string") for key in ("input", "output")})
    return datasets.DatasetDict(
        {split: datasets.Dataset.from_list(rows, features=features) for split, rows in splits.items()}  # type: ignore[dict-item]
    )


def _pairs(name: str) -> Iterable[Mapping[str, str]]:
    if folder := os.environ.get("ADAINFER_DATA"):
        file = Path(folder).expanduser() / f"{name}.json"
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise AdaInferError(
                f"ADAINFER_DATA={folder} has no readable {name}.json; unset it to download the word tasks."
            ) from error
    url = URL.format(name=name)
    try:
        return datasets.load_dataset("json", data_files=url, split="train")
    except (OSError, ValueError) as error:
        raise AdaInferError(
            f"{url} can't be downloaded; set ADAINFER_DATA to a folder that holds {name}.json."
        ) from error


class WordTask(QATask):
    """A word task; ``dataset_name`` in its YAML is the file's name without ``.json``."""

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Load the pairs instead of a data set of the hub."""
        self.dataset = load_words(str(self.config.dataset_name))
