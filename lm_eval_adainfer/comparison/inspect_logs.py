"""Logs of Inspect AI (``.json``, and ``.eval`` where Python unpacks it): a task's samples with their scores.

A log holds one task, and a folder one log for each. A scorer's grades are one metric: C and I are 1 and 0, P is a half,
as Inspect counts them. Of a sample that was asked in several epochs the mean counts.
"""

from __future__ import annotations

import json
import re
import zipfile
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
from lm_eval_adainfer.comparison.samples import finite
from lm_eval_adainfer.errors import AdaInferError

_NAME = re.compile(r"(\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d[-+]\d\d-\d\d)_.+_[A-Za-z0-9]{22}\.(?:json|eval)")
_GRADES = {"C": 1.0, "I": 0.0, "P": 0.5, "N": 0.0, "yes": 1.0, "true": 1.0, "no": 0.0, "false": 0.0}


def read(path: Path, argument: str, notes: list[str]) -> Translated | None:
    """The logs in a folder, of every task the newest, or one log; None where there are none.

    Args:
        path: The folder, or the log.
        argument: The user's argument, for messages.
        notes: Told where older logs are left out.

    Raises:
        AdaInferError: On logs that are damaged, unfinished, packed so that Python can't unpack them, or of two models.
    """
    if path.is_file():
        files = [path] if path.suffix == ".eval" or _NAME.fullmatch(path.name) else []
    else:
        files = sorted((f for f in path.rglob("*") if _NAME.fullmatch(f.name)), key=lambda f: f.name)
    if not files:
        return None
    run = Translated(path, "inspect", "")
    models, older = set(), 0
    for file in files:  # the names begin with the time
        header, samples = _log(file, argument)
        task, model = str(header["eval"].get("task")), str(header["eval"].get("model"))
        models.add(model)
        older += task in run.tasks
        run.model, run.tasks[task] = model, _task(header, samples, file, argument)
    if len(models) > 1:
        raise AdaInferError(
            f"{argument}: {path} holds logs of {len(models)} models ({', '.join(sorted(models))}); give one's alone"
        )
    if older:
        notes.append(f"{older} logs in {path} are older ones of the same tasks; the newest are taken")
    return run


def _log(file: Path, argument: str) -> tuple[dict[str, Any], list[Any]]:
    """A log's header and samples."""
    if file.suffix == ".eval":
        members = dict(_members(file, argument))
        header = members.pop("header.json", None)
        samples: Any = list(members.values())
    else:
        header = json_of(file, argument)
        samples = header.get("samples") if isinstance(header, dict) else None
    if not isinstance(header, dict) or not isinstance(header.get("eval"), dict) or not isinstance(samples, list):
        raise AdaInferError(f"{argument}: {file} is no log of Inspect with samples; give one that it wrote")
    if header.get("status") != "success":
        status = f"{header.get('status')!s:.20}"
        raise AdaInferError(f"{argument}: {file} is unfinished, its status is {status}; run it again")
    return header, samples


def _members(file: Path, argument: str) -> Iterator[tuple[str, Any]]:
    """The header and the samples of an ``.eval`` file, by their names in it."""
    try:
        with zipfile.ZipFile(file) as archive:
            wanted = [i for i in archive.infolist() if i.filename == "header.json" or i.filename.startswith("samples/")]
            if sum(i.file_size for i in wanted) > MOST_BYTES:
                raise AdaInferError(f"{argument}: {file} unpacks to more than the 1 GiB that are read; log less")
            for info in wanted:
                with archive.open(info) as member:
                    yield info.filename, json.loads(member.read(info.file_size + 1))
    except NotImplementedError:
        raise AdaInferError(
            f"{argument}: {file} is packed with zstandard, which this Python does not unpack; convert it with "
            "inspect log convert --to json --output-dir FOLDER"
        ) from None
    except (OSError, ValueError, RecursionError, zipfile.BadZipFile) as error:
        if isinstance(error, AdaInferError):
            raise
        raise AdaInferError(f"{argument}: {file} is damaged ({error!s:.80}); run it again") from None


def _task(header: Mapping[str, Any], samples: list[Any], file: Path, argument: str) -> TranslatedTask:
    asked: dict[str, list[Mapping[str, Any]]] = {}
    for sample in samples:
        if not isinstance(sample, dict) or not isinstance(sample.get("id"), (int, str)):
            raise AdaInferError(f"{argument}: {file} holds a sample without an id; run it again")
        if not sample.get("error"):
            asked.setdefault(str(sample["id"]), []).append(sample)
    task = TranslatedTask([], version=str(header["eval"].get("task_version")))
    for name, number in numbered(list(asked)).items():
        epochs = asked[name]
        first, metrics = epochs[0], mean_of([_grades(one, task.better) for one in epochs])
        doc = {key: first.get(key) for key in ("input", "choices", "target")}
        answers = [answer for one in epochs if (answer := _answer(one)) is not None]
        task.samples.append(
            sample_of(number, doc, first.get("input"), first.get("target"), answers, metrics)
        )
    task.reported = _reported(header)
    return task


def _grades(sample: Mapping[str, Any], better: dict[str, bool]) -> dict[str, float | None]:
    """Scorer, or scorer and key, to a number; None where the grade is none."""
    found: dict[str, float | None] = {}
    scores = sample.get("scores")
    for scorer, score in scores.items() if isinstance(scores, dict) else ():
        value = score.get("value") if isinstance(score, dict) else None
        values = {f"{scorer}_{key}": v for key, v in value.items()} if isinstance(value, dict) else {scorer: value}
        for name, one in values.items():
            if isinstance(one, bool) or (isinstance(one, str) and (one in _GRADES or one.lower() in _GRADES)):
                better[name] = True
                found[name] = float(one) if isinstance(one, bool) else _GRADES.get(one, _GRADES.get(one.lower()))
            else:
                found[name] = finite(one)
    return found


def _answer(sample: Mapping[str, Any]) -> str | None:
    """What the first scorer took for the answer, else the model's text."""
    scores = sample.get("scores")
    for score in scores.values() if isinstance(scores, dict) else ():
        if isinstance(score, dict) and isinstance(score.get("answer"), str):
            return score["answer"]
    output = sample.get("output")
    text = output.get("completion") if isinstance(output, dict) else None
    return text if isinstance(text, str) else None


def _reported(header: Mapping[str, Any]) -> dict[str, float]:
    """The means that a log reports, by scorer."""
    results, found = header.get("results"), dict[str, float]()
    for one in results.get("scores") or () if isinstance(results, dict) else ():
        metrics = one.get("metrics") if isinstance(one, dict) else None
        for name in ("accuracy", "mean"):
            entry = metrics.get(name) if isinstance(metrics, dict) else None
            value = finite(entry.get("value")) if isinstance(entry, dict) else None
            if value is not None and isinstance(one.get("name"), str):
                found.setdefault(one["name"], value)
    return found
