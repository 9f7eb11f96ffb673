"""Which stopper saves most at equal accuracy: fit on traces, choose thresholds on others, compare on yet others.

    python -m benchmarks.stoppers traces/ -o benchmarks/results/stoppers-NAME

``traces/`` holds ``train`` and ``test`` traces of one model and several tasks. Every stopper is fitted once, on all
``train`` traces. The documents of the ``test`` traces are split by a fixed hash, 2 to 5, into those that thresholds are
chosen on and those that are reported (docs/numbers.md, Splits). All figures are *simulated* from the traces.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest

from lm_eval_adainfer import container
from lm_eval_adainfer.fitting import fit
from lm_eval_adainfer.strategies.base import Stopper
from lm_eval_adainfer.strategies.features import FEATURES
from lm_eval_adainfer.strategies.rules import GapStopper
from lm_eval_adainfer.tasks.qa import stable_hash
from lm_eval_adainfer.traces.documents import TracedDocuments, at_exit, exits, read, stable
from lm_eval_adainfer.traces.margins import margins

MAX_LOSS = 0.01
# thresholds: quantiles of the scores on the training traces, closest where stoppers are strict
GRID = np.concatenate([np.linspace(0, 0.8, 100, endpoint=False), np.linspace(0.8, 1, 200)])
RESAMPLES = 2000
HEAD_ONLY = ("gap", "top_prob", "entropy")

CONTESTANTS: dict[str, Callable[[list[Path]], Stopper]] = {
    "paper's SVM (gap, top_prob; final)": lambda files: fit.fit_svm(files),
    "gap rule": lambda files: GapStopper(),
    "SVM, all features; final": lambda files: fit.fit_svm(
        files, features=[name for name in FEATURES if not FEATURES[name].choices]
    ),
    "logistic; stable": lambda files: fit.fit_classifier("logistic", files, label="stable"),
    "mlp; stable": lambda files: fit.fit_classifier("mlp", files, label="stable"),
    "boosted; stable": lambda files: fit.fit_classifier("boosted", files, label="stable"),
    "boosted; gold": lambda files: fit.fit_classifier("boosted", files, label="gold"),
    "boosted; final": lambda files: fit.fit_classifier("boosted", files, label="final"),
    "boosted, gap top_prob entropy; stable": lambda files: fit.fit_classifier(
        "boosted", files, label="stable", features=HEAD_ONLY
    ),
    "boosted, gap top_prob; final": lambda files: fit.fit_classifier(
        "boosted", files, label="final", features=fit.PAPER_FEATURES
    ),
}


@dataclass
class Task:
    """A test trace.

    Attributes:
        name: Of the task.
        found: Answers after every block.
        calibrate: [D] bool, the documents that thresholds are chosen on.
        above_chance: Whether the dense model is significantly better than always naming the commonest gold answer.
    """

    name: str
    found: TracedDocuments
    calibrate: np.ndarray
    above_chance: bool

    @property
    def dense(self) -> np.ndarray:
        """[D] bool: the dense answer is right."""
        return self.found.hits[:, -1] > 0


@dataclass
class Curve:
    """What a stopper does on a task at every threshold, from strict to loose, for every document: [G + 1, D]."""

    saved: np.ndarray  # 1 - exit / L
    lost: np.ndarray  # dense right, early wrong
    gained: np.ndarray  # dense wrong, early right
    agrees: np.ndarray


def as_task(found: TracedDocuments) -> Task:
    name = found.meta["task"]
    hashes = [stable_hash("calibrate", name, str(i)) % 7 for i in found.doc_ids.tolist()]
    calibrate = np.array(hashes) < 2
    right = (found.hits[:, -1] > 0)[~calibrate]
    commonest = max(np.bincount(found.gold[~calibrate])) / len(right)
    p = binomtest(int(right.sum()), len(right), commonest, alternative="greater").pvalue
    return Task(name, found, calibrate, bool(p < 0.01))


def scores(stopper: Stopper, found: TracedDocuments) -> np.ndarray:
    """[N, L] margins, NaN at the last block."""
    return margins(stopper, found.meta, found.arrays) + stopper.threshold  # type: ignore[attr-defined]


def curve(stopper: Stopper, task: Task, grid: np.ndarray) -> Curve:
    values = task.found.together(scores(stopper, task.found))
    left = np.array([exits(values, t) for t in grid])
    right = np.array([at_exit(task.found.hits, e) > 0 for e in left])
    agrees = np.array([at_exit(task.found.answers, e) for e in left]) == task.found.answers[:, -1]
    return Curve(1 - left / task.found.n_blocks, task.dense & ~right, ~task.dense & right, agrees)


def loosest(bad: np.ndarray) -> int:
    """Index of the last threshold before the first at which ``bad`` ([G]) exceeds MAX_LOSS."""
    over = bad > MAX_LOSS + 1e-9
    return (int(over.argmax()) if over.any() else len(over)) - 1


def interval(values: np.ndarray) -> str:
    low, high = np.quantile(values, [0.025, 0.975])
    return f"[{low:.1f}, {high:.1f}]"


def report(folder: Path, names: list[str]) -> str:
    files = fit.find([folder])
    traces = read(files)
    training = [t for t in traces if t.meta["split"] == "train"]
    train = [t.path for t in training]
    tasks = [as_task(t) for t in traces if t.meta["split"] == "test"]
    model = tasks[0].found.meta
    curves: dict[str, list[Curve]] = {}
    standing: dict[str, list[int]] = {}
    for name in names:
        stopper = CONTESTANTS[name](train)
        pooled = np.concatenate([scores(stopper, t).ravel() for t in training])
        pooled = pooled[~np.isnan(pooled)]
        grid = np.unique(np.quantile(pooled, GRID))[::-1]
        grid = np.concatenate([[np.inf], grid, [stopper.threshold]])  # type: ignore[attr-defined]
        found = [curve(stopper, task, grid) for task in tasks]
        standing[name] = [len(grid) - 1] * len(tasks)
        curves[name] = found
        print(name, "fitted", flush=True)
    lines = [
        f"# Stoppers: `{Path(model['model']).name}`, {model['n_blocks']} blocks, {model['num_fewshot']} shots",
        "",
        __doc__.split("\n\n", 2)[2].strip(),
        "Losses are percentage points of accuracy, with 95% intervals (paired bootstrap over documents, "
        f"{RESAMPLES} resamples).",
        "The ratio's denominator is always the paper's SVM at the best threshold at which "
        "the *reported* documents lose at most 1 point per task: chosen in hindsight, in its favour.",
        "",
        *tasks_table(tasks),
    ]
    measurable = [i for i, task in enumerate(tasks) if task.above_chance]
    base = names[0]
    for title, choose in PROTOCOLS.items():
        picked = {n: choose(curves[n], tasks, measurable) for n in names}
        lines += ["", f"## {title}", "", *protocol_table(curves, tasks, measurable, picked, base)]
        best = [base, *[n for n in ("boosted; final", "logistic; stable") if n in names]]
        lines += ["", *per_task_table(curves, tasks, {n: picked[n] for n in best})]
    lines += ["", "## Thresholds as they stand (paper's SVM: 0; gap: 0.8; others: 0.95)", ""]
    lines += [*protocol_table(curves, tasks, measurable, standing, base), ""]
    lines += per_task_table(curves, tasks, {n: standing[n] for n in (base, "boosted; final")})
    return "\n".join(lines) + "\n"


def tasks_table(tasks: list[Task]) -> list[str]:
    lines = [
        "| task | thresholds on | reported on | dense accuracy | saving of oracle:stable | |",
        "|---|---|---|---|---|---|",
    ]
    for task in tasks:
        test = ~task.calibrate
        oracle = oracle_saving(task)[test].mean()
        note = "" if task.above_chance else "not measurable: dense is not above chance"
        lines.append(
            f"| {task.name} | {task.calibrate.sum()} | {test.sum()} | {task.dense[test].mean():.3f} | {oracle:.1%} "
            f"| {note} |"
        )
    return lines


def oracle_saving(task: Task) -> np.ndarray:
    """[D], what leaving at the earliest block saves from which the answer never changes."""
    first = stable(task.found.answers).argmax(1) + 1
    return 1 - first / task.found.n_blocks


def _curve_choice(curves: list[Curve], tasks: list[Task], measurable: list[int]) -> list[int]:
    """The greatest pruning among all thresholds at which the reported documents lose at most MAX_LOSS."""
    picked = []
    for c, task in zip(curves, tasks, strict=True):
        net = (c.lost.astype(float) - c.gained)[:-1, ~task.calibrate].mean(1)
        saved = c.saved[:-1, ~task.calibrate].mean(1)
        picked.append(int(np.where(net <= MAX_LOSS + 1e-9, saved, -1).argmax()))
    return picked


def _own_choice(curves: list[Curve], tasks: list[Task], measurable: list[int]) -> list[int]:
    return [loosest(c.lost[:-1, t.calibrate].mean(1)) for c, t in zip(curves, tasks, strict=True)]


def _common_choice(curves: list[Curve], tasks: list[Task], measurable: list[int]) -> list[int]:
    pooled = np.concatenate([curves[i].lost[:-1, tasks[i].calibrate] for i in measurable], axis=1)
    return [loosest(pooled.mean(1))] * len(tasks)


PROTOCOLS = {
    "One threshold per task, chosen on the calibration documents so that at most 1% of them are lost": _own_choice,
    "One threshold for all tasks, chosen on the calibration documents so that at most 1% of them are lost": (
        _common_choice
    ),
    "Equal accuracy: per task, the best threshold at which the *reported* documents lose at most 1 point": (
        _curve_choice
    ),
}


def protocol_table(
    curves: dict[str, list[Curve]],
    tasks: list[Task],
    measurable: list[int],
    picked: dict[str, list[int]],
    base: str,
) -> list[str]:
    """Means over the measurable tasks, and mean pruning over that of the base at its best threshold there.

    Numerator and denominator are of the same resampled documents.
    """
    best = _curve_choice(curves[base], tasks, measurable)
    rng = np.random.default_rng(0)
    kept = [np.flatnonzero(~task.calibrate) for task in tasks]
    draws = [rng.choice(kept[i], (RESAMPLES, len(kept[i]))) for i in measurable]

    def pruning(name: str, picks: list[int], at: Any) -> np.ndarray:
        return np.mean([curves[name][i].saved[picks[i]][d].mean(-1) for i, d in zip(measurable, at, strict=True)], 0)

    lines = [
        "| stopper | accuracy lost, mean | worst task | pruning | times the paper's SVM | of oracle:stable, choices |",
        "|---|---|---|---|---|---|",
    ]
    whole = [kept[i] for i in measurable]
    choices = [i for i in measurable if tasks[i].found.has_choices]
    for name, found in curves.items():
        net = [
            100 * (found[i].lost[picked[name][i]].astype(float) - found[i].gained[picked[name][i]]) for i in measurable
        ]
        means = [n[k].mean() for n, k in zip(net, whole, strict=True)]
        resampled = np.mean([n[d].mean(-1) for n, d in zip(net, draws, strict=True)], axis=0)
        mean = pruning(name, picked[name], whole)
        ratio = mean / pruning(base, best, whole)
        ratios = pruning(name, picked[name], draws) / pruning(base, best, draws)
        low, high = np.quantile(ratios, [0.025, 0.975])
        share = [
            found[i].saved[picked[name][i], kept[i]].mean() / oracle_saving(tasks[i])[kept[i]].mean() for i in choices
        ]
        lines.append(
            f"| {name} | {np.mean(means):.1f} {interval(resampled)} | {max(means):.1f} | {mean:.1%} | "
            f"{ratio:.2f} [{low:.2f}, {high:.2f}] | {', '.join(f'{s:.0%}' for s in share)} |"
        )
    return lines


def per_task_table(curves: dict[str, list[Curve]], tasks: list[Task], picked: dict[str, list[int]]) -> list[str]:
    """Every task; points lost with interval, or agreement where not measurable, and pruning."""
    lines = ["| task | " + " | ".join(picked) + " |", "|---" * (len(picked) + 1) + "|"]
    rng = np.random.default_rng(1)
    for i, task in enumerate(tasks):
        kept = np.flatnonzero(~task.calibrate)
        draws = rng.choice(kept, (RESAMPLES, len(kept)))
        cells = []
        for name, at in picked.items():
            c, k = curves[name][i], at[i]
            net = 100 * (c.lost[k].astype(float) - c.gained[k])
            said = f"{net[kept].mean():.1f} {interval(net[draws].mean(1))} lost"
            if not task.above_chance:
                said = f"not measurable; {c.agrees[k, kept].mean():.1%} agree"
            cells.append(f"{said}, {c.saved[k, kept].mean():.1%} pruned")
        lines.append(f"| {task.name} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stoppers", description=__doc__.split("\n")[0])
    parser.add_argument("traces", type=Path, help="a folder of train and test traces")
    parser.add_argument("--output", "-o", type=Path, help="the .md file (default: printed)")
    arguments = parser.parse_args()
    text = report(arguments.traces, list(CONTESTANTS))
    if arguments.output:
        container.write_atomically(arguments.output.with_suffix(".md"), text.encode())
    print(text)


if __name__ == "__main__":
    main()
