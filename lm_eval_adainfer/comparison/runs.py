"""One run of lm-eval, found and read from its results JSON and samples, whatever model type made it."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lm_eval_adainfer.clusters import Key, passage_field
from lm_eval_adainfer.comparison import helm, inspect_logs, lighteval
from lm_eval_adainfer.comparison.names import own_names, renamed
from lm_eval_adainfer.comparison.samples import DATE, Document, finite, read_document, read_json, samples
from lm_eval_adainfer.comparison.scales import Scale, scale_of, undirected
from lm_eval_adainfer.comparison.selection import Selection, Wanted
from lm_eval_adainfer.comparison.weighting import tasks_weigh_the_same
from lm_eval_adainfer.errors import AdaInferError

_EXIT = ("exit_layer", "pruning_ratio", "flops_ratio", "flops_ratio_total", "layers_run")
EXIT_METRICS = frozenset((*_EXIT, "exit_layer_var", "top1_acc"))
PREFERRED = ("acc", "exact_match")
_SECTIONS = ("results", "config", "configs", "versions", "n-shot", "higher_is_better", "n-samples", "group_subtasks")
_MOST_BLOCKS = 10_000
_FILES_SHOWN = 6
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
    source: Path
    scales: dict[str, Scale]  # of the metrics whose documents can be compared, the task's own first
    apart: dict[str, str] = field(default_factory=dict)  # of the other metrics, why they can't
    wanted: str | None = None  # the metric that the user named
    undirected: frozenset[str] = frozenset()  # metrics of which nothing says which way is better
    clustered: bool = False  # whether the user said which documents belong together
    passages: int | None = None  # how many the documents are about, where the task is known for repeating them

    def require(self, name: str) -> None:
        """Refuse a metric by which the documents can't be compared.

        Raises:
            AdaInferError: Where the samples have no such number, or a broken one.
        """
        if name not in self.scales:
            own = [m for m in self.scales if m not in EXIT_METRICS]
            reason = f" ({name} {self.apart[name]})" if name in self.apart else ""
            hint = "; name one per task (TASK=METRIC), or leave the task out (--exclude)"
            if name in self.filters:
                hint = f"; {name!r} is a filter, so give --filter {name}"
            metric, _, its_filter = name.partition(",")
            if its_filter:
                hint = f"; lm-eval names results METRIC,FILTER, so give --metric {metric} --filter {its_filter}"
            raise AdaInferError(
                f"metric: the samples of {self.name} have no number {name!r} per document{reason}; they have "
                f"{', '.join(own) or 'none'}{hint}"
            )
        for document in self.documents.values():
            for value in (document.metrics.get(name, 0.0), *document.pairs.get(name, ())):
                if not math.isfinite(value):
                    what = f"{name} of document {document.doc_id} is {value} in {self.source}"
                    raise AdaInferError(f"metric: {what}, no number to compare; run it again")


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
    held: tuple[str, ...] = ()  # all its tasks, those that were not selected too
    held_groups: dict[str, list[str]] = field(default_factory=dict)
    by_task: dict[str, frozenset[str]] = field(default_factory=dict)  # group -> metrics: see weighting.py
    notes: list[str] = field(default_factory=list)

    @property
    def adainfer(self) -> dict[str, Any]:
        """What an adainfer model said of itself; empty for others."""
        found = self.config.get("adainfer")
        return found if isinstance(found, dict) else {}

    @property
    def seconds_in_model(self) -> float | None:
        """Measured, where the run says so; not where one pass gave the other side's answers, too."""
        return finite(self.adainfer.get("seconds_in_model_measured"))

    @property
    def n_blocks(self) -> int | None:
        """L, where the run says so."""
        found = self.adainfer.get("n_blocks")
        return found if isinstance(found, int) and 0 < found <= _MOST_BLOCKS else None


def load(
    path: str | Path,
    argument: str = "run",
    filter: str | None = None,
    prompts: bool = False,
    selection: Selection | None = None,
) -> Run:
    """Read a run.

    Args:
        path: A results JSON, or a folder with one somewhere inside, or what Inspect, HELM or lighteval wrote;
            ``NAME=PATH`` gives the run a name.
        argument: The user's argument, for messages.
        filter: Of lm-eval, where a task has several; by default the first that the samples name.
        prompts: Keep the documents' prompts (the report shows some).
        selection: Which tasks are read, and the metric and filter of each; by default all, and ``filter``.

    Raises:
        AdaInferError: On files that are missing, damaged or not lm-eval's, and on tasks that it does not hold.
    """
    selection = selection or Selection(filter=filter)
    name, place = _split_name(str(path))
    notes: list[str] = []
    other = (
        inspect_logs.read(Path(place), argument, notes)
        or helm.read(Path(place), argument)
        or lighteval.read(Path(place), argument, notes)
    )
    file = _results_file(Path(place), argument, notes) if other is None else other.source
    results = read_json(file, argument) if other is None else other.results()
    if not isinstance(results, dict) or not isinstance(results.get("results"), dict):
        raise AdaInferError(f"{argument}: {file} is no results file of lm-eval: it has no 'results'; give another")
    sections = {key: _mapping(results, key, file, argument) for key in _SECTIONS}
    if other is None:
        files = _sample_files(file, list(sections["configs"]) or list(results["results"]))
    else:
        files = dict.fromkeys(other.tasks, file)
    if own := own_names(sections["configs"]):
        results, files = renamed(results, own), {own.get(name, name): found for name, found in files.items()}
        sections = {key: _mapping(results, key, file, argument) for key in _SECTIONS}
    held = [t for t in sections["configs"] or results["results"] if t in files or t not in sections["group_subtasks"]]
    held = held if sections["configs"] else [t for t in held if t in files]
    held_groups = _groups(sections["group_subtasks"], held)
    chosen = selection.choose(held, held_groups, f"{argument} {place}")
    names = [task for task in chosen if task in files]
    absent = [task for task in chosen if task not in files]
    if not names or absent:
        which = f" for task {absent[0]}" if absent and names else ""
        raise AdaInferError(
            f"{argument}: {file} has no samples beside it{which}; run lm_eval with --log_samples and --output_path"
        )
    tasks = {}
    for task in names:
        wanted = selection.for_task(task, held, held_groups)
        cluster = selection.cluster_of(task, held, held_groups)
        rows = samples(files[task], argument) if other is None else enumerate(other.tasks[task].samples, 1)
        tasks[task] = _read_task(task, files[task], rows, sections, argument, wanted, prompts, notes, cluster)
    run = Run(
        label=name or _label(sections["config"]),
        source=file,
        config=sections["config"],
        tasks=tasks,
        groups=_groups(sections["group_subtasks"], tasks),
        aliases=_aliases(results["results"]),
        seconds_total=None if _of_one_pass(sections) else finite(results.get("total_evaluation_time_seconds")),
        held=tuple(held),
        held_groups=held_groups,
        by_task=tasks_weigh_the_same(results["results"], held_groups, sections["n-samples"], notes, EXIT_METRICS),
        notes=notes,
    )
    for note in notes:
        _logger.info("%s: %s", run.label, note)
    return run


def _of_one_pass(sections: dict[str, Any]) -> bool:
    """Whether the run's answers came from a pass that gave those of another run, too."""
    found = sections["config"].get("adainfer")
    return isinstance(found, dict) and bool(found.get("one_pass"))


def load_all(
    paths: list[str],
    argument: str = "runs",
    filter: str | None = None,
    prompts: bool = False,
    selection: Selection | None = None,
) -> list[Run]:
    """Read runs and give each a label of its own; the arguments are those of :func:`load`."""
    shown = tqdm(paths, desc="Reading runs", disable=len(paths) < 3)
    runs = [load(path, argument, filter, prompts, selection) for path in shown]
    if selection is not None:
        require_known(selection, runs)
    seen: dict[str, int] = {}
    for run in runs:
        seen[run.label] = seen.get(run.label, 0) + 1
        if seen[run.label] > 1:
            run.label += f" ({seen[run.label]})"
    return runs


def require_known(selection: Selection, runs: Sequence[Run]) -> None:
    """Refuse a selection that names tasks which none of the runs holds.

    Raises:
        AdaInferError: On such a name.
    """
    selection.require_known([(run.label, run.held, run.held_groups) for run in runs])


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
    found = [f for f in sorted(path.rglob("*.json")) if f.name == "results.json" or re.search(DATE, f.name)]
    if not found:
        raise AdaInferError(f"{argument}: {path} holds no results_*.json of lm-eval; give its --output_path")
    found.sort(key=lambda f: _date_of(f) or "")
    folders = {f.parent for f in found}
    if len(folders) > 1:
        raise AdaInferError(
            f"{argument}: {path} holds runs of {len(folders)} models ({_with_times(found)}); give one of these files "
            "or its folder"
        )
    if len(found) > 1:
        newest = "the newest is taken; give a file to take another"
        notes.append(f"{len(found)} runs are in {path} ({_with_times(found)}); {newest}")
    return found[-1]


def _with_times(files: Sequence[Path]) -> str:
    """Some results files and when each was written, the newest first."""
    shown = []
    for file in sorted(files, key=lambda f: _date_of(f) or "", reverse=True)[:_FILES_SHOWN]:
        date, _, time = (_date_of(file) or "").partition("T")
        shown.append(f"{file} of {date} {time[:8].replace('-', ':')}" if date else f"{file} without a time")
    return "; ".join(shown) + ("; ..." if len(files) > _FILES_SHOWN else "")


def _date_of(file: Path) -> str | None:
    found = re.search(f"({DATE})(?=\\.jsonl?$)", file.name)
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
    rows: Iterable[tuple[int, Any]],
    sections: dict[str, Any],
    argument: str,
    asked: Wanted,
    prompts: bool,
    notes: list[str],
    cluster: str | None,
) -> Task:
    config = sections["configs"].get(task)
    config = config if isinstance(config, dict) else {}
    rolling = config.get("output_type") == "loglikelihood_rolling"
    wanted, logged = asked.filter, dict[str, None]()  # the metrics' names in their order
    kept: dict[str, dict[int, Document]] = {}
    key = Key(cluster) if cluster is not None else None
    passages, known_for = set[str](), Key(passage) if key is None and (passage := passage_field(task)) else None
    for number, sample in rows:
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
        document = read_document(sample, where, prompts, rolling, key)
        for exit_metric in _EXIT:
            if not math.isfinite(value := document.metrics.get(exit_metric, 0.0)):
                raise AdaInferError(f"{where}: {exit_metric} of document {document.doc_id} is {value}; run it again")
        if document.doc_id in documents:
            raise AdaInferError(f"{where} repeats document {document.doc_id}; two runs may be in one file")
        if not documents:
            listed = sample.get("metrics")
            names = listed if isinstance(listed, list) else [*document.metrics, *document.pairs]
            logged = dict.fromkeys(m for m in names if isinstance(m, str))
        documents[document.doc_id] = document
        if known_for is not None and isinstance(doc := sample.get("doc"), dict) and known_for.field in doc:
            passages.add(known_for.of(doc, where))
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
    better = sections["higher_is_better"].get(task)
    better = better if isinstance(better, dict) else {}
    scales, apart = _scales(task, chosen, logged, list(documents.values()), sections, config, better)
    shots = sections["n-shot"].get(task, config.get("num_fewshot"))
    return Task(
        name=task,
        documents=documents,
        filter=chosen,
        filters=tuple(kept),
        version=str(sections["versions"].get(task)),
        shots=str(shots if shots is not None else 0),
        source=file,
        scales=scales,
        apart=apart,
        wanted=asked.metric or None,
        undirected=frozenset(m for m in scales if m not in EXIT_METRICS and undirected(m, better.get(m))),
        clustered=key is not None,
        passages=len(passages) or None,
    )


def _scales(
    task: str,
    filter: str,
    logged: Collection[str],
    documents: list[Document],
    sections: dict[str, Any],
    config: dict[str, Any],
    better: dict[str, Any],
) -> tuple[dict[str, Scale], dict[str, str]]:
    """How each metric is compared, and of those that can't be, why."""
    results, listed = sections["results"].get(task), config.get("metric_list")
    results = results if isinstance(results, dict) else {}
    declared = {
        entry.get("metric"): entry.get("aggregation")
        for entry in (listed if isinstance(listed, list) else [])
        if isinstance(entry, dict) and isinstance(entry.get("metric"), str)
    }
    scales, apart = {}, {}
    for metric in logged:
        reported = finite(results.get(f"{metric},{filter}", results.get(metric)))
        found = scale_of(metric, documents, declared.get(metric), better.get(metric), reported)
        if isinstance(found, Scale):
            scales[metric] = found
        else:
            apart[metric] = found
    return scales, apart


def _mapping(results: dict[str, Any], key: str, file: Path, argument: str) -> dict[str, Any]:
    found = results.get(key) or {}
    if not isinstance(found, dict):
        raise AdaInferError(f"{argument}: {file}: {key!r} is a {type(found).__name__}, not a mapping; run it again")
    return found


def _groups(subtasks: dict[str, Any], tasks: Collection[str]) -> dict[str, list[str]]:
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


