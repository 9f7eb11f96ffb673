"""Runs of other tools in lm-eval's form: what their readers share (``inspect_logs``, ``helm``, ``lighteval``).

Files are other people's: they are JSON or parquet, none that is read is larger than ``MOST_BYTES``, and nothing in them
is run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lm_eval_adainfer.comparison.samples import finite, read_json
from lm_eval_adainfer.errors import AdaInferError

MOST_BYTES = 2**30  # of a file, unpacked


@dataclass
class Translated:
    """A run of another tool.

    Attributes:
        source: The file, or the folder, that it was read from.
        model: Its model's name.
        tool: The tool's name.
        tasks: Its tasks by name.
    """

    source: Path
    tool: str
    model: str
    tasks: dict[str, TranslatedTask] = field(default_factory=dict)

    def results(self) -> dict[str, Any]:
        """What a results file of lm-eval would say."""
        return {
            "results": {name: {f"{m},none": v for m, v in t.reported.items()} for name, t in self.tasks.items()},
            "config": {"model": self.tool, "model_args": {"model": self.model}},
            "configs": {name: {"task": name} for name in self.tasks},
            "versions": {name: t.version for name, t in self.tasks.items()},
            "n-shot": {name: t.shots for name, t in self.tasks.items()},
            "higher_is_better": {name: t.better for name, t in self.tasks.items()},
        }


@dataclass
class TranslatedTask:
    """One task of it.

    Attributes:
        samples: Of every document what lm-eval would log.
        reported: The metrics that are means over documents, as the tool reports them.
        better: Whether higher is better, of metrics of which it is known.
        version: The task's.
        shots: Few-shot examples per document, where the tool tells.
    """

    samples: list[dict[str, Any]]
    reported: dict[str, float] = field(default_factory=dict)
    better: dict[str, bool] = field(default_factory=dict)
    version: str = "0"
    shots: int = 0


def json_of(file: Path, argument: str) -> Any:
    """A JSON file's content.

    Raises:
        AdaInferError: Where it can't be read, is no JSON, or is too large.
    """
    try:
        size = file.stat().st_size
    except OSError as error:
        raise AdaInferError(f"{argument}: {file} can't be read: {error.strerror or error}") from None
    if size > MOST_BYTES:
        raise AdaInferError(f"{argument}: {file} has {size / 2**30:.1f} GiB, more than is read; log less per sample")
    return read_json(file, argument)


def numbered(ids: Sequence[Any]) -> dict[str, int]:
    """A number for each document's name, the same in every run over these documents; in the order of the numbers.

    Args:
        ids: The names: numbers or texts. Numbers stay, and those of texts like ``id7`` do; else the names are sorted.
    """
    texts = sorted({str(one) for one in ids})
    digits = {text: text.lstrip("id") for text in texts}
    numbers = {text: int(number) for text, number in digits.items() if number.isascii() and number.isdigit()}
    if len(set(numbers.values())) == len(texts):
        return dict(sorted(numbers.items(), key=lambda one: one[1]))
    return {text: n for n, text in enumerate(texts)}


def sample_of(
    doc_id: int, doc: Mapping[str, Any], prompt: Any, target: Any, answers: Sequence[Any], metrics: Mapping[str, float]
) -> dict[str, Any]:
    """What lm-eval would log of a document.

    Args:
        doc_id: Its number.
        doc: What tells it from others.
        prompt: Its prompt, or its question where the tool logs no prompt.
        target: The right answer.
        answers: What the model answered, once for each time it was asked; or of each choice its log-probability and
            whether greedy decoding gives it.
        metrics: Numbers by name.
    """
    return {
        "doc_id": doc_id,
        "doc": dict(doc),
        "target": target if isinstance(target, str) else json.dumps(target),
        "arguments": {"gen_args_0": {"arg_0": prompt if isinstance(prompt, str) else json.dumps(prompt)}},
        "filtered_resps": list(answers) or None,
        "filter": "none",
        "metrics": list(metrics),
        **metrics,
    }


def mean_of(rows: Sequence[Mapping[str, float | None]]) -> dict[str, float]:
    """Means over the times that a document was asked; without the metrics that one of them has no number for."""
    names = [name for name in rows[0] if all(finite(row.get(name)) is not None for row in rows)]
    return {name: sum(float(row[name] or 0) for row in rows) / len(rows) for name in names}
