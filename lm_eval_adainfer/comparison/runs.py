"""One run of lm-eval, found and read from its results JSON and samples, whatever model type made it."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lm_eval_adainfer.comparison.samples import Document, finite, read_document, read_json, samples
from lm_eval_adainfer.errors import AdaInferError

_DATE = r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d(?:\.\d+)?"
_EXIT = ("exit_layer", "pruning_ratio", "flops_ratio", "flops_ratio_total", "layers_run")
_OURS = frozenset((*_EXIT, "exit_layer_var", "top1_acc"))
_PREFERRED = ("acc", "exact_match")
_MOST_BLOCKS = 10_000
_logger = logging.getLogger(__name__)


@dataclass
class Task:
    """One task's documents, of one filter."""

    name: str
    documents: dict[int, Document]
    filter: str
    filters: tuple[str, ...]
    version: str
    shots: str
    metrics: tuple[str, ...]  # those with a number per document, the task's own first
    lower_is_better: frozenset[str] = frozenset()

    def metric(self, wanted: str | None) -> str:
        """The wanted metric, or the first of acc, exact_match and the task's first.

        Raises:
            AdaInferError: Where the samples have no such number.
        """
        own = [m for m in self.metrics if m not in _OURS]
        if wanted is not None:
            if wanted not in self.metrics:
                raise AdaInferError(
                    f"metric: the samples of {self.name} have no number {wanted!r} per document; they have "
                    f"{', '.join(own) or 'none'}"
                )
            return wanted
        for name in (*_PREFERRED, *own):
            if name in own:
                return name
        raise AdaInferError(
            f"metric: the samples of {self.name} hold no number per document (corpus metrics can't be paired); "
            "leave that task out"
        )


@dataclass
class Run:
    """One evaluation."""

    label: str
    source: Path
    config: dict[str, Any]
    tasks: dict[str, Task]
    groups: dict[str, list[str]]  # group -> its tasks, through nested groups
    aliases: dict[str, str]
    seconds_total: float | None
    notes: list[str] = field(default_factory=list)

    @property
    def adainfer(self) -> dict[str, Any]:
        """What an adainfer model said of itself; empty for others."""
        found = self.config.get("adainfer")
        return found if isinstance(found, dict) else {}

    @property
    def seconds_in_model(self) -> float | None:
        """Measured, where the run says so."""
        return finite(self.adainfer.get("seconds_in_model_measured"))

    @property
    def n_blocks(self) -> int | None:
        """L, where the run says so."""
        found = self.adainfer.get("n_blocks")
        return found if isinstance(found, int) and 0 < found <= _MOST_BLOCKS else None


def load(path: str | Path, argument: str = "run", filter: str | None = None, prompts: bool = False) -> Run:
    """Read a run.

    Args:
        path: A results JSON, or a folder with one somewhere inside; ``NAME=PATH`` gives the run a name.
        argument: The user's argument, for messages.
        filter: Of lm-eval, where a task has several; by default the first that the samples name.
        prompts: Keep the documents' prompts (the report shows some).

    Raises:
        AdaInferError: On files that are missing, damaged or not lm-eval's.
    """
    name, place = _split_name(str(path))
    notes: list[str] = []
    file = _results_file(Path(place), argument, notes)
    results = read_json(file, argument)
    if not isinstance(results, dict) or not isinstance(results.get("results"), dict):
        raise AdaInferError(f"{argument}: {file} is no results file of lm-eval: it has no 'results'; give another")
    sections = {
        key: _mapping(results, key, file, argument)
        for key in ("config", "configs", "versions", "n-shot", "higher_is_better", "n-samples", "group_subtasks")
    }
    files = _sample_files(file, list(sections["configs"]) or list(results["results"]))
    names = [task for task in sections["configs"] or results["results"] if task in files]
    absent = [t for t in sections["configs"] if t not in files and t not in sections["group_subtasks"]]
    if not names or absent:
        which = f" for task {absent[0]}" if absent and names else ""
        raise AdaInferError(
            f"{argument}: {file} has no samples beside it{which}; run lm_eval with --log_samples and --output_path"
        )
    tasks = {task: _read_task(task, files[task], sections, argument, filter, prompts, notes) for task in names}
    run = Run(
        label=name or _label(sections["config"]),
        source=file,
        config=sections["config"],
        tasks=tasks,
        groups=_groups(sections["group_subtasks"], tasks),
        aliases=_aliases(results["results"]),
        seconds_total=finite(results.get("total_evaluation_time_seconds")),
        notes=notes,
    )
    for note in notes:
        _logger.info("%s: %s", run.label, note)
    return run


def load_all(
    paths: list[str], argument: str = "runs", filter: str | None = None, prompts: bool = False
) -> list[Run]:
    """Read runs and give each a label of its own."""
    runs = [load(path, argument, filter, prompts) for path in tqdm(paths, desc="Reading runs", disable=len(paths) < 3)]
    seen: dict[str, int] = {}
    for run in runs:
        seen[run.label] = seen.get(run.label, 0) + 1
        if seen[run.label] > 1:
            run.label += f" ({seen[run.label]})"
    return runs


def _split_name(text: str) -> tuple[str | None, str]:
    name, equals, place = text.partition("=")
    return (name, place) if equals and "/" not in name and not Path(text).exists() else (None, text)


def _results_file(path: Path, argument: str, notes: list[str]) -> Path:
    if path.is_file():
        if path.suffix == ".jsonl":
            raise AdaInferError(f"{argument}: {path} holds samples; give the results_*.json beside it, or the folder")
        return path
    if not path.is_dir():
        raise AdaInferError(f"{argument}: {path} does not exist; give a results file of lm-eval or its --output_path")
    found = [f for f in sorted(path.rglob("*.json")) if f.name == "results.json" or re.search(_DATE, f.name)]
    if not found:
        raise AdaInferError(f"{argument}: {path} holds no results_*.json of lm-eval; give its --output_path")
    folders = sorted({f.parent for f in found})
    if len(folders) > 1:
        raise AdaInferError(
            f"{argument}: {path} holds runs of {len(folders)} models ({folders[0].name}, {folders[1].name}, ...); "
            "give one of these folders"
        )
    found.sort(key=lambda f: _date_of(f) or "")
    if len(found) > 1:
        notes.append(f"{len(found)} runs are in {folders[0]}; the newest, {found[-1].name}, is taken")
    return found[-1]


def _date_of(file: Path) -> str | None:
    found = re.search(f"({_DATE})(?=\\.jsonl?$)", file.name)
    return found[1] if found else None


def _sample_files(results: Path, tasks: list[str]) -> dict[str, Path]:
    """Task -> samples; ``samples_TASK_DATE.jsonl``, or ``..._TASK.jsonl`` as before lm-eval 0.4.3."""
    date, known = _date_of(results), set(tasks)
    names = {f.name.removesuffix(f"_{date}.jsonl"): f for f in results.parent.glob("samples_*.jsonl")}
    found = {name.removeprefix("samples_"): f for name, f in names.items() if name.removeprefix("samples_") in known}
    if not found and date is None:
        for file in sorted(results.parent.glob("*.jsonl")):
            matches = [t for t in tasks if file.stem == t or file.stem.endswith(f"_{t}")]
            if matches:
                found[max(matches, key=len)] = file
    return found


def _read_task(
    task: str,
    file: Path,
    sections: dict[str, Any],
    argument: str,
    wanted: str | None,
    prompts: bool,
    notes: list[str],
) -> Task:
    kept: dict[str, dict[int, Document]] = {}
    for number, sample in samples(file, argument):
        where = f"{argument}: {file}, line {number}"
        if not isinstance(sample, dict) or type(sample.get("doc_id")) is not int:
            raise AdaInferError(f"{where} is no sample of lm-eval: it has no doc_id; run it again with --log_samples")
        name = sample.get("filter", "none")
        if not isinstance(name, str):
            raise AdaInferError(f"{where} names the filter {name!r}, which is no text; run it again")
        if wanted is not None and name != wanted:
            kept.setdefault(name, {})
            continue
        if kept and wanted is None and name != next(iter(kept)):
            kept.setdefault(name, {})
            continue
        documents = kept.setdefault(name, {})
        document = read_document(sample, where, prompts)
        if document.doc_id in documents:
            raise AdaInferError(f"{where} repeats document {document.doc_id}; two runs may be in one file")
        documents[document.doc_id] = document
    if not kept:
        raise AdaInferError(f"{argument}: {file} is empty; run lm_eval again with --log_samples")
    if wanted is not None and not kept.get(wanted):
        raise AdaInferError(f"filter: the samples of {task} have no filter {wanted!r}; they have {', '.join(kept)}")
    chosen = wanted or next(iter(kept))
    if len(kept) > 1 and wanted is None:
        notes.append(f"{task} has the filters {', '.join(kept)}; {chosen} is taken (--filter names another)")
    documents = kept[chosen]
    expected = sections["n-samples"].get(task)
    expected = expected.get("effective") if isinstance(expected, dict) else None
    if isinstance(expected, int) and expected != len(documents):
        raise AdaInferError(
            f"{argument}: {file} holds {len(documents)} documents, but the results say {expected}; "
            "the file is cut off or not this run's, so run it again"
        )
    first = next(iter(documents.values()))
    better = sections["higher_is_better"].get(task)
    better = better if isinstance(better, dict) else {}
    names = [m for m in first.metrics if all(m in d.metrics for d in documents.values())]
    config = sections["configs"].get(task)
    shots = sections["n-shot"].get(task, config.get("num_fewshot") if isinstance(config, dict) else None)
    return Task(
        name=task,
        documents=documents,
        filter=chosen,
        filters=tuple(kept),
        version=str(sections["versions"].get(task)),
        shots=str(shots if shots is not None else 0),
        metrics=tuple(names),
        lower_is_better=frozenset(m for m in names if better.get(m) is False),
    )


def _mapping(results: dict[str, Any], key: str, file: Path, argument: str) -> dict[str, Any]:
    found = results.get(key) or {}
    if not isinstance(found, dict):
        raise AdaInferError(f"{argument}: {file}: {key!r} is a {type(found).__name__}, not a mapping; run it again")
    return found


def _groups(subtasks: dict[str, Any], tasks: dict[str, Task]) -> dict[str, list[str]]:
    def members(name: str, above: tuple[str, ...] = ()) -> list[str]:
        inside = subtasks.get(name)
        if not isinstance(inside, list) or name in above:
            return [name] if name in tasks else []
        found = [m for child in inside if isinstance(child, str) for m in members(child, (*above, name))]
        return list(dict.fromkeys(found))

    return {name: found for name in subtasks if name not in tasks and (found := members(name))}


def _aliases(results: dict[str, Any]) -> dict[str, str]:
    return {
        name: row["alias"].strip(" -")
        for name, row in results.items()
        if isinstance(row, dict) and isinstance(row.get("alias"), str) and row["alias"].strip(" -")
    }


def _label(config: dict[str, Any]) -> str:
    kind, arguments = str(config.get("model", "run")), config.get("model_args")
    if isinstance(arguments, str):
        arguments = dict(part.partition("=")[::2] for part in arguments.split(","))
    arguments = arguments if isinstance(arguments, dict) else {}
    if kind == "adainfer":
        return f"adainfer {arguments.get('stopper', 'none') or 'none'}"
    model = str(arguments.get("pretrained") or arguments.get("model") or "").rstrip("/").rsplit("/", 1)[-1]
    return f"{kind} {model}".strip()


