"""Runs of lighteval (0.11 and later): the parquet files of ``--save-details``, and the results JSON of the same time.

A file is one task. A document stands in it once for each way in which it was asked (for a text, for log-probabilities);
its metrics are taken together, and of a metric that it has several times the mean counts. Metrics that lighteval
computes from all documents have no number here and are left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lm_eval_adainfer.comparison.elsewhere import (
    MOST_BYTES,
    Translated,
    TranslatedTask,
    json_of,
    mean_of,
    numbered,
    sample_of,
)
from lm_eval_adainfer.comparison.samples import DATE, finite
from lm_eval_adainfer.errors import AdaInferError

_NAME = re.compile(rf"details_(.+)_({DATE})\.parquet")
_SHOTS = re.compile(r"(.+)\|(\d+)")
_OF_DOC = ("id", "query", "choices", "gold_index", "instruction", "fewshot_samples")
_OF_RESPONSE = ("text", "logprobs", "argmax_logits_eq_gold")
_COLUMNS = ["metric", *(f"doc.{name}" for name in _OF_DOC), *(f"model_response.{name}" for name in _OF_RESPONSE)]
_ROWS = 64  # unpacked at once: a few bytes of a file may stand for many


def read(path: Path, argument: str, notes: list[str]) -> Translated | None:
    """The details in a folder, of every task the newest, or one file of them; None where there are none.

    Args:
        path: lighteval's ``--output-dir``, a folder in it, or the file.
        argument: The user's argument, for messages.
        notes: Told where older files are left out.

    Raises:
        AdaInferError: On files that are damaged, too large, of an older lighteval or without their results, and on
            runs of several models or output folders.
    """
    found = [path] if path.is_file() else path.rglob("*.parquet") if path.is_dir() else []
    files = [(name[2], name[1], file) for file in found if (name := _NAME.fullmatch(file.name))]
    if not files:
        return None
    places = sorted({str(file.parent.parent) for _, _, file in files})  # above the folder of a time is the model's
    if len(places) > 1:
        raise AdaInferError(
            f"{argument}: {path} holds runs of {len(places)} models or outputs ({', '.join(places[:6])}); give one of "
            "these folders"
        )
    newest = {task: (date, file) for date, task, file in sorted(files)}
    if len(newest) < len(files):
        older = len(files) - len(newest)
        notes.append(f"{older} files in {path} are older ones of the same tasks; the newest are taken")
    run, results = Translated(path, "lighteval", ""), dict[str, Any]()
    names = _own_names(list(newest))
    for task, (date, file) in newest.items():
        if date not in results:
            results[date] = _results(path, file, date, argument)
        run.model = str(_part(results[date], "config_general").get("model_name"))
        run.tasks[names[task]] = _task(task, file, results[date], argument)
    return run


def _own_names(tasks: list[str]) -> dict[str, str]:
    """Tasks without the number of shots that lighteval puts behind their names, where they are told apart by the rest.

    So a run of other shots is refused for its shots, and not for other tasks.
    """
    short = {task: found[1] if (found := _SHOTS.fullmatch(task)) else task for task in tasks}
    return short if len(set(short.values())) == len(tasks) else {task: task for task in tasks}


def _results(path: Path, file: Path, date: str, argument: str) -> Mapping[str, Any]:
    """The results JSON of the run that wrote ``file``."""
    places = [path, *(parent.parent / "results" for parent in file.parents if parent.name == "details")]
    for place in places:
        for found in place.rglob(f"results_{date}.json") if place.is_dir() else ():
            content = json_of(found, argument)
            if not isinstance(content, dict) or not isinstance(content.get("results"), dict):
                raise AdaInferError(f"{argument}: {found} is no results file of lighteval: it has no 'results'")
            return content
    raise AdaInferError(
        f"{argument}: results_{date}.json, which lighteval wrote with {file}, is not there; give its --output-dir"
    )


def _part(content: Any, *keys: str) -> Mapping[str, Any]:
    """What a mapping holds under the first of these keys that it has; empty where that is no mapping."""
    found = next((content[key] for key in keys if key in content), None) if isinstance(content, dict) else None
    return found if isinstance(found, dict) else {}


def _task(name: str, file: Path, results: Mapping[str, Any], argument: str) -> TranslatedTask:
    keys = (name, name.replace("|", ":"))  # some releases write the one, some the other
    config, shots = _part(results.get("config_tasks"), *keys), _SHOTS.fullmatch(name)
    task = TranslatedTask(
        [],
        reported={m: n for m, v in _part(results["results"], *keys).items() if (n := finite(v)) is not None},
        better=_better(config.get("metrics")),
        version=str(config.get("version", "0")),
        shots=int(shots[2]) if shots else 0,
    )
    asked: dict[str, list[Mapping[str, Any]]] = {}
    for row in _rows(file, argument):
        doc = row.get("doc")
        if not isinstance(doc, dict) or not isinstance(doc.get("id"), str) or not isinstance(doc.get("query"), str):
            raise AdaInferError(f"{argument}: {file} holds a document without an id or a query; run lighteval again")
        asked.setdefault(doc["id"], []).append(row)
    for name_of_doc, number in numbered(list(asked)).items():
        rows = asked[name_of_doc]
        doc, right = rows[0]["doc"], _gold(rows[0]["doc"])
        own = {"query": doc["query"], "choices": [str(c) for c in _list(doc.get("choices"))], "right": right}
        task.samples.append(sample_of(number, own, _prompt(doc), right, _answers(rows), _metrics(rows)))
    return task


def _rows(file: Path, argument: str) -> Iterator[dict[str, Any]]:
    """The rows of a file of details, with the parts of them that are used."""
    import pyarrow.parquet  # takes a moment, and only this needs it

    unpacked = 0
    try:
        if file.stat().st_size > MOST_BYTES:
            raise AdaInferError(f"{argument}: {file} has more than the 1 GiB that are read")
        with pyarrow.parquet.ParquetFile(file) as parquet:
            if not {"doc", "metric", "model_response"} <= set(parquet.schema_arrow.names):
                raise AdaInferError(
                    f"{argument}: {file} has no columns doc, metric and model_response, as lighteval writes them since "
                    "0.11; run it again with one of these releases"
                )
            for batch in parquet.iter_batches(batch_size=_ROWS, columns=_COLUMNS, use_threads=False):
                unpacked += batch.nbytes
                if unpacked > MOST_BYTES:
                    raise AdaInferError(f"{argument}: {file} unpacks to more than the 1 GiB that are read")
                yield from batch.to_pylist()
    except (OSError, ValueError, TypeError, MemoryError, OverflowError, pyarrow.ArrowException) as error:
        if isinstance(error, AdaInferError):
            raise
        reason = f"{' '.join(str(error).split()):.80}"
        raise AdaInferError(f"{argument}: {file} is damaged ({reason}); run it again") from None


def _metrics(rows: list[Mapping[str, Any]]) -> dict[str, float]:
    """A document's metrics that are numbers; a metric that a row does not ask for is missing or null there."""
    found: dict[str, list[dict[str, float | None]]] = {}
    for row in rows:
        for name, value in _part(row, "metric").items():
            if value is not None:
                number = float(value) if isinstance(value, (int, float)) else None
                found.setdefault(name, []).append({name: number})
    return {name: mean for times in found.values() for name, mean in mean_of(times).items()}


def _answers(rows: list[Mapping[str, Any]]) -> list[Any]:
    """As lm-eval logs responses: of several choices the log-probabilities, else what the model wrote, once per time."""
    texts: list[Any] = []
    for row in rows:
        response, choices = _part(row, "model_response"), _list(row["doc"].get("choices"))
        logprobs, greedy = _list(response.get("logprobs")), _list(response.get("argmax_logits_eq_gold"))
        if len(choices) == len(logprobs) > 1:
            return [[one, greedy[n] if n < len(greedy) else None] for n, one in enumerate(logprobs)]
        texts += [text for text in _list(response.get("text")) if isinstance(text, str)]
    return texts


def _prompt(doc: Mapping[str, Any]) -> str:
    """What was asked, with its few-shot examples; the chat template and the separators are not in the details."""
    parts = [doc.get("instruction")]
    for shot in _list(doc.get("fewshot_samples")):
        parts += [shot.get("query"), _gold(shot)] if isinstance(shot, dict) else []
    return "\n".join(part for part in (*parts, doc["query"]) if isinstance(part, str))


def _gold(doc: Mapping[str, Any]) -> str:
    choices, index = _list(doc.get("choices")), doc.get("gold_index")
    right = [choices[i] for i in (index if isinstance(index, list) else [index])
             if isinstance(i, int) and 0 <= i < len(choices)]  # fmt: skip
    return right[0] if len(right) == 1 and isinstance(right[0], str) else json.dumps(right, default=str)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _better(metrics: Any) -> dict[str, bool]:
    """Whether higher is better, of a task's metrics; metrics that are computed together say it together."""
    found = {}
    for one in _list(metrics):
        names, higher = (one.get("metric_name"), one.get("higher_is_better")) if isinstance(one, dict) else (None, None)
        for name in names if isinstance(names, list) else [names]:
            way = higher.get(name) if isinstance(higher, dict) else higher
            if isinstance(name, str) and isinstance(way, bool):
                found[name] = way
    return found
