"""``adainfer report``: one self-contained HTML page about some runs, and its pictures as files."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from lm_eval_adainfer import container, statistics
from lm_eval_adainfer._version import __version__
from lm_eval_adainfer.comparison import gate
from lm_eval_adainfer.comparison.compare import POOLED, compare
from lm_eval_adainfer.comparison.evidence import reach, weights_of
from lm_eval_adainfer.comparison.matching import Pairs, match, pools
from lm_eval_adainfer.comparison.runs import Run
from lm_eval_adainfer.comparison.selection import listing
from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.harness.metrics import population_variance
from lm_eval_adainfer.output import marks, per_block, verdicts
from lm_eval_adainfer.output.marks import Mark
from lm_eval_adainfer.traces.documents import TracedDocuments

_WIDE = 8  # columns of tasks that still fit a table; beyond, groups take their place
_SHOWN = 5  # easiest and deepest documents


@dataclass(frozen=True)
class Cell:
    """One run on one column's documents."""

    score: float
    share: bool  # from 0 to 1, shown in percent
    pruning: float | None
    layers: float | None
    variance: float | None
    beyond: bool = False  # its task's guard failed


@dataclass(frozen=True)
class Entry:
    """A run's line in the leaderboard; the baseline has no verdict."""

    label: str
    mark: Mark
    verdict: gate.Verdict | None
    said: str  # in one word: within, beyond or inconclusive
    compute: float  # share of the dense run's FLOPs
    cells: list[Cell]


@dataclass(frozen=True)
class Picture:
    """A figure of the page."""

    name: str
    title: str
    caption: str
    svg: Any


def require() -> None:
    """Raise one sentence where the extra is not installed."""
    missing = [name for name in ("matplotlib", "jinja2") if find_spec(name) is None]
    if missing:
        raise AdaInferError(f"report: {missing[0]} is not installed; pip install 'lm-eval-adainfer[report]'")


def write(
    runs: list[Run],
    output: str,
    traces: str | None = None,
    title: str = "Early exit, measured",
    metric: str | None = None,
    other_prompts: bool = False,
    max_drop: float = 0.01,
) -> Path:
    """Write ``index.html`` and the pictures.

    Args:
        runs: The first is the baseline; all have the same documents.
        output: The folder.
        traces: A folder of ``adainfer trace``.
        title: Of the page.
        metric: For all tasks; by default each task's own.
        other_prompts: Accept that prompts differ between the runs.
        max_drop: The drop from the baseline that the leaderboard judges runs by, as ``adainfer check`` does.

    Returns:
        The page.

    Raises:
        AdaInferError: Where runs don't match, traces are damaged, or the folder can't be written to.
    """
    found = per_block.load(traces) if traces else []
    for run in runs:
        if found and run.n_blocks not in (None, found[0].n_blocks):
            raise AdaInferError(
                f"traces: {traces} is of a model of {found[0].n_blocks} blocks, but {run.label} has {run.n_blocks}; "
                "give traces of the same model"
            )
    baseline, others = runs[0], runs[1:]
    said: list[str] = []
    pairs = {run.label: match(baseline, run, metric, other_prompts, said) for run in runs}
    columns = _columns(baseline, pairs)
    comparisons = [compare(baseline, run, metric, other_prompts) for run in others]
    verdicts_of = {run.label: gate.judge_runs(baseline, run, pairs[run.label], max_drop) for run in others}
    said += [note for verdict in verdicts_of.values() for note in verdict.notes]
    mark_of = marks.of_all((run.label for run in runs), dense=baseline.label)
    if apart := pools(pairs[baseline.label])[1:]:
        which = listing(f"{p.task} ({p.metric})" for alike in apart for p in alike)
        said.append(f"the frontier leaves out {which}, which are another metric")
    folder, pictures = Path(output), []
    for name, heading, caption, figure in _figures(runs, _pooled(pairs), found, mark_of):
        pictures.append(save_picture(folder, name, heading, caption, figure))
    text = render(
        "page.html",
        title=title,
        runs=runs,
        columns=list(columns),
        leaderboard=_leaderboard(runs, pairs, columns, verdicts_of, mark_of),
        max_drop=max_drop,
        mark_of=mark_of,
        comparisons=comparisons,
        pictures=pictures,
        documents=[(run.label, run.n_blocks, *_extremes(run, pairs[run.label])) for run in runs if _early(run, pairs)],
        notes=list(dict.fromkeys([*(f"{run.label}: {note}" for run in runs for note in run.notes), *said])),
    )
    container.write_atomically(folder / "index.html", text.encode("utf-8", "replace"))
    return folder / "index.html"


def render(template: str, **values: Any) -> str:
    """A page from one of the templates, with everything escaped that is not a picture; it says when it was made."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("lm_eval_adainfer.output", "templates"), autoescape=True, undefined=StrictUndefined
    )
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return environment.get_template(template).render(made=made, version=__version__, **values)


def _pooled(pairs: dict[str, list[Pairs]]) -> dict[str, list[Pairs]]:
    """Of every run, the tasks of the first pool, of one metric, in all runs the same."""
    alike = [{p.task for p in pools(found)[0]} for found in pairs.values()]
    common = set.intersection(*alike) or alike[0]
    return {label: [p for p in found if p.task in common] for label, found in pairs.items()}


def _columns(run: Run, pairs: dict[str, list[Pairs]]) -> dict[str, list[str]]:
    """Column -> tasks: every task where they fit, else the groups; and the pool of each metric."""
    found = pairs[run.label]
    names, by_task = [p.task for p in found], {p.task: p for p in found}
    first = {p.task for p in _pooled(pairs)[run.label]}
    tasks = {run.aliases.get(t, t): [t] for t in names}
    if len(tasks) < len(names):  # two tasks go by one alias
        tasks = {t: [t] for t in names}
    if len(tasks) == 1:
        return tasks
    if len(tasks) > _WIDE:
        members = {
            g: [p.task for p in pools([by_task[t] for t in tasks if t in by_task])[0]]
            for g, tasks in run.groups.items()
            if any(t in by_task for t in tasks)
        }
        groups = sorted((g for g in members if members[g]), key=lambda g: -len(members[g]))[:_WIDE]
        tasks = {run.aliases.get(g, g): members[g] for g in groups}
    tasks = {f"{name}, {by_task[t[0]].unit}" if by_task[t[0]].unit else name: t for name, t in tasks.items()}
    pool = [t for t in names if t in first]
    others = [[p.task for p in alike] for alike in pools([p for p in found if p.task not in first])]
    pooled = {POOLED: pool, **{f"{POOLED} of {by_task[t[0]].metric}": t for t in others}}
    if tasks:
        pooled = {name: t for name, t in pooled.items() if len(t) > 1}
    return {**pooled, **{name: t for name, t in tasks.items() if t not in pooled.values()}}


def _leaderboard(
    runs: list[Run],
    pairs: dict[str, list[Pairs]],
    columns: dict[str, list[str]],
    verdicts_of: dict[str, gate.Verdict],
    mark_of: dict[str, Mark],
) -> list[Entry]:
    """A line per run, a cell per column, like the paper's Tables 2, 7 and 8, with the verdict on its drop."""
    found = []
    for run in runs:
        verdict = verdicts_of.get(run.label)
        failed = {guard.task for guard in verdict.guards if guard.failed} if verdict else set()
        cells = [
            replace(_cell(pairs[run.label], tasks), beyond=len(tasks) == 1 and tasks[0] in failed)
            for tasks in columns.values()
        ]
        said = verdicts.OF_DROP[verdict.status] if verdict else ""
        found.append(Entry(run.label, mark_of[run.label], verdict, said, _compute(pairs[run.label]), cells))
    return found


def _cell(pairs: list[Pairs], tasks: list[str]) -> Cell:
    chosen = [p for p in pairs if p.task in set(tasks)]
    documents = [b for p in chosen for _, b in p.documents]
    score = float(np.average(np.concatenate([p.candidate for p in chosen]), weights=weights_of(chosen)))
    share = all(not p.kind[0] for p in chosen)
    layers = [d.metrics["exit_layer"] for d in documents if "exit_layer" in d.metrics]
    pruning = [d.metrics["pruning_ratio"] for d in documents if "pruning_ratio" in d.metrics]
    if len(layers) != len(documents) or len(pruning) != len(documents):
        return Cell(score, share, None, None, None)
    return Cell(score, share, sum(pruning) / len(pruning), sum(layers) / len(layers), population_variance(layers))


def _early(run: Run, pairs: dict[str, list[Pairs]]) -> bool:
    layers = {b.metrics.get("exit_layer") for p in pairs[run.label] for _, b in p.documents}
    return None not in layers and layers != {run.n_blocks}


def _extremes(run: Run, pairs: list[Pairs]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The documents that left first, and those that left last; of equal ones, some of every task."""
    found = []
    for pair in pairs:
        for place, ((_, document), value) in enumerate(zip(pair.documents, pair.candidate, strict=True)):
            found.append((document.metrics["exit_layer"], place, pair, document, value))

    def shown(sign: int) -> list[dict[str, Any]]:
        return [
            {
                "task": run.aliases.get(pair.task, pair.task),
                "doc_id": document.doc_id,
                "layer": layer,
                "metric": pair.metric,
                "value": value,
                "prompt": document.prompt,
                "target": document.target,
            }
            for layer, _, pair, document, value in sorted(found, key=lambda f: (sign * f[0], f[1]))[:_SHOWN]
        ]

    return shown(1), shown(-1)


def _figures(
    runs: list[Run], pairs: dict[str, list[Pairs]], traces: list[TracedDocuments], mark_of: dict[str, Mark]
) -> list[tuple[str, str, str, Any]]:
    """Name, heading, caption and figure of everything that these runs have data for."""
    from lm_eval_adainfer.output import figures

    found = []
    with figures.style():
        points, metric = _points(runs, pairs, traces, mark_of)
        first = pairs[runs[0].label][0]
        caption = (
            "FLOPs are counted, checks of the head included (flops_ratio_total); runs that don't log them ran dense. "
            "Bars: 95% interval over documents (each run by itself; the differences in the tables are paired)."
        )
        if any(p.simulated for p in points):
            caption += (
                " The oracle is simulated on the traced documents: exit after the first block that answers right, "
                "without the cost of checking."
            )
        found.append(("frontier", "Accuracy against compute", caption,
                      figures.frontier(points, metric, not first.kind[0], first.lower_is_better)))  # fmt: skip
        layers = _exit_layers(runs, pairs)
        n_blocks = max((run.n_blocks or 0 for run in runs), default=0)
        if layers and n_blocks:
            found.append(
                ("exit_layers", "Exit blocks per task", f"Counted; {n_blocks} blocks in all. One exit per document. "
                 "Runs that always leave at the same block are left out.",
                 figures.histograms(layers, n_blocks, mark_of))
            )  # fmt: skip
        if rows := _speeds(runs, pairs):
            found.append(
                ("speed", "Speed-up, measured and predicted",
                 "Predicted from counted FLOPs; measured is one run's wall-clock against the baseline's, so without an "
                 "interval: seconds in the model where both have them, else of the whole evaluation, loading included.",
                 figures.speed(rows, mark_of))
            )  # fmt: skip
        many = len(traces) > figures.LINES
        panels = per_block.accuracy_panels(traces, figures.PANELS)
        if any(panels.values()):
            lines = per_block.accuracy_lines(traces)
            several = len(per_block.readers(traces)) > 1
            how = (
                f"All {len(lines)} traces with gold answers, in the order of their last block; brighter is better."
                if len(lines) > figures.LINES and not several
                else "Solid: acc; dashed: the answer's first token, where a trace knows no more. Bands: 95% intervals."
            )
            if several:
                how = f"One line per reader, after the blocks that were recorded. {how}"
            found.append(
                ("accuracy_per_block", "Accuracy per block",
                 f"Simulated from traces: what each block would have answered (the paper's Figure 1). {how}",
                 figures.accuracy(panels))
            )  # fmt: skip
        if traces:
            how = (
                f"Faint: each of {len(traces)} traces; bold: their mean, every trace weighing the same, with its "
                "95% interval over traces."
                if many
                else "Bands: 95% intervals of the mean."
            )
            found.append(
                ("features_per_block", "Features per block",
                 "From traces: probabilities, entropy and cosines at the decision position, mean over decisions (the "
                 f"paper's Figures 3 and 4). {how}",
                 figures.features(per_block.feature_lines(traces)))
            )  # fmt: skip
    return found


def _points(
    runs: list[Run], pairs: dict[str, list[Pairs]], traces: list[TracedDocuments], mark_of: dict[str, Mark]
) -> tuple[list[Any], str]:
    from lm_eval_adainfer.output.figures import Point

    points = []
    for i, run in enumerate(runs):
        values, weights = np.concatenate([p.candidate for p in pairs[run.label]]), weights_of(pairs[run.label])
        if all(p.binary for p in pairs[run.label]):
            mean, lower, upper = (float(x[0]) for x in statistics.wilson(values[:, None]))
        else:
            mean, furthest = float(np.average(values, weights=weights)), reach(values, values, pairs[run.label][0].unit)
            if weights is None:
                spread = statistics.t_interval(values - mean, reach=furthest)
            else:
                spread = statistics.ratio_interval(values - mean, weights, reach=furthest)
            lower, upper = mean + spread.lower, mean + spread.upper
        name = f"{run.label} (baseline)" if i == 0 else run.label
        points.append(Point(name, _compute(pairs[run.label]), mean, lower, upper, mark_of[run.label]))
    simulated = per_block.oracle([t for t in traces if t.meta["task"] in runs[0].tasks])
    if simulated and not pairs[runs[0].label][0].kind[0]:
        points.append(Point("oracle, simulated", *simulated, marks.DENSE, simulated=True))
    first = pairs[runs[0].label]
    return points, "/".join(dict.fromkeys(p.metric for p in first)) + (f", {first[0].unit}" if first[0].unit else "")


def _compute(pairs: list[Pairs]) -> float:
    """Share of the dense run's FLOPs; runs that do not say ran dense."""
    values = [b.metrics.get("flops_ratio_total", 1.0) for p in pairs for _, b in p.documents]
    return sum(values) / len(values)


def _exit_layers(runs: list[Run], pairs: dict[str, list[Pairs]]) -> dict[str, dict[str, np.ndarray]]:
    found: dict[str, dict[str, np.ndarray]] = {}
    for run in runs:
        if not _early(run, pairs):
            continue
        by_task = {p.task: np.array([b.metrics["exit_layer"] for _, b in p.documents]) for p in pairs[run.label]}
        if all(len(set(layers)) == 1 for layers in by_task.values()):
            continue  # always the same block: nothing to see
        for pair in pairs[run.label]:
            layers = by_task[pair.task]
            found.setdefault(run.aliases.get(pair.task, pair.task), {})[run.label] = layers
    return found


def _speeds(runs: list[Run], pairs: dict[str, list[Pairs]]) -> list[tuple[str, float, float]]:
    baseline, rows = runs[0], []
    for run in runs[1:]:
        if not _early(run, pairs):
            continue
        first, second = baseline.seconds_in_model, run.seconds_in_model
        if not first or not second:
            first, second = baseline.seconds_total, run.seconds_total
        if first and second:
            rows.append((run.label, 1 / max(_compute(pairs[run.label]), 1e-9), first / second))
    return rows


def save_picture(folder: Path, name: str, heading: str, caption: str, figure: Any) -> Picture:
    """Write a figure's files into a folder.

    Args:
        folder: The page's.
        name: Of the files, without extensions.
        heading: Over the picture.
        caption: Below it.
        figure: matplotlib's.

    Returns:
        The picture for the page.
    """
    from markupsafe import Markup

    from lm_eval_adainfer.output import figures

    with figures.style():
        for file, data in figures.files(figure, name).items():
            container.write_atomically(folder / file, data)
        return Picture(name, heading, caption, Markup(figures.inline(figure, name)))  # matplotlib escapes its texts


