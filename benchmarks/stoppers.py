"""Which reader and stopper save most at equal accuracy, and how much that depends on the training documents.

    adainfer trace ... --split train --readers copy:1 -o TRACES    (and --split calibrate, and --split test)
    python -m benchmarks.stoppers TRACES --draws 10 -o benchmarks/results/stoppers-NAME

Every draw parts each task's training documents at random: on one half every contestant, a reader with a stopper, is
fitted, and on the other half it is chosen after which blocks it is asked (``tuning.search``: work saved, reading and
checks counted, with at most 1% lost). For a mean, half samples spread as fresh samples of the whole size would. One
threshold for all tasks is then chosen on the calibration documents: the loosest before the first at which more than 1%
of them are lost (dense right, early wrong). What it comes to is reported on test documents, which nothing was fitted or
chosen on. Every task weighs the same in calibrating and reporting. All figures are *simulated*.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import itertools
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from scipy.stats import binomtest

from benchmarks import stoppers_report
from lm_eval_adainfer import container
from lm_eval_adainfer.fitting import fit, grids
from lm_eval_adainfer.readers import specs as readers
from lm_eval_adainfer.strategies.base import Stopper
from lm_eval_adainfer.strategies.features import FEATURES
from lm_eval_adainfer.strategies.rules import GapStopper
from lm_eval_adainfer.traces.documents import TracedDocuments, at_exit, exits, read
from lm_eval_adainfer.traces.file import VERSION, find
from lm_eval_adainfer.traces.margins import margins
from lm_eval_adainfer.traces.splits import SPLITS
from lm_eval_adainfer.tuning.allowance import Allowance
from lm_eval_adainfer.tuning.contestants import losses
from lm_eval_adainfer.tuning.search import search
from lm_eval_adainfer.tuning.work import Work

MOST_LOST = 0.01
AT_MOST = Allowance(1, MOST_LOST, 0.95)  # one document promises nothing, so the share itself is the limit
WITHOUT_CHOICES = [name for name in FEATURES if not FEATURES[name].choices]


@dataclass(frozen=True)
class Contestant:
    """A reader with a stopper.

    Attributes:
        reader: The reader.
        name: The stopper's, for the tables.
        kind: What is fitted (``fit.FITTERS``), or ``gap``.
        options: Of the fit.
    """

    reader: str
    name: str
    kind: str
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    def fitted(self, files: Sequence[Path], seed: int) -> Stopper:
        reader = readers.parse(self.reader)
        if self.kind == "gap":
            return GapStopper()
        return fit.fit(self.kind, files, reader=reader, seed=seed, **self.options)

    def __str__(self) -> str:
        return f"{self.reader}, {self.name}"


BASE = Contestant("head", "paper's SVM (gap, top_prob; final)", "svm")
CONTESTANTS = [
    BASE,
    Contestant("head", "gap rule", "gap"),
    Contestant("head", "SVM, all features; final", "svm", {"features": WITHOUT_CHOICES}),
    Contestant("head", "logistic; stable", "logistic", {"label": "stable"}),
    Contestant("head", "mlp; stable", "mlp", {"label": "stable"}),
    Contestant("head", "boosted; stable", "boosted", {"label": "stable"}),
    Contestant("head", "boosted; final", "boosted", {"label": "final"}),
    Contestant("copy:1", "gap rule", "gap"),
    Contestant("copy:1", "logistic; stable", "logistic", {"label": "stable"}),
    Contestant("copy:1", "boosted; stable", "boosted", {"label": "stable"}),
]


@dataclass(frozen=True)
class Outcome:
    """What a threshold comes to on test documents, one number per document, an array per task.

    Attributes:
        threshold: The threshold.
        blocks: After which it is asked.
        change: ``acc`` minus that of the dense answer.
        pruned: 1 - exit block / L.
        saved: Of the counted work, reading and checks included, over the task's mean dense work.
    """

    threshold: float
    blocks: list[int]
    change: list[np.ndarray]
    pruned: list[np.ndarray]
    saved: list[np.ndarray]

    def mean(self, name: str) -> float:
        """Over tasks, in per cent or percentage points."""
        return 100 * float(np.mean([of.mean() for of in getattr(self, name)]))


def draw(training: Sequence[TracedDocuments], seed: int, folder: Path) -> dict[str, Any]:
    """Write traces of a random half of every task's training documents, and of the other half; what was drawn."""
    drawn: dict[str, list[int]] = {}
    for trace in training:
        ids = sorted(set(trace.doc_ids.tolist()))
        name = trace.meta["task"]
        drawn[name] = sorted(Random(f"{seed} {name}").sample(ids, len(ids) // 2))
        is_drawn = np.isin(trace.arrays["doc_id"], drawn[name])
        for half, keep, count in (("fit", is_drawn, len(drawn[name])), ("ask", ~is_drawn, len(ids) - len(drawn[name]))):
            arrays = {key: array[keep] for key, array in trace.arrays.items()}
            meta = {**trace.meta, "documents": count}
            container.write(folder / half / trace.path.name, "trace", VERSION, meta, arrays)
    digest = hashlib.sha256(json.dumps(drawn, sort_keys=True).encode()).hexdigest()[:16]
    return {"seed": seed, "documents": {name: len(ids) for name, ids in drawn.items()}, "documents_sha256": digest}


def blocks_of(contestant: Contestant, stopper: Stopper, views: Sequence[TracedDocuments]) -> list[int]:
    """After which blocks it pays to ask; after none where nothing does."""
    said = np.concatenate([scores(stopper, view, everywhere(view)) for view in views])
    work = Work.of(views, readers.parse(contestant.reader), stopper)
    return list(search(said, losses(views, "gold"), work, AT_MOST, calibrates=False).blocks)


def everywhere(view: TracedDocuments) -> list[int]:
    """All recorded blocks but the last."""
    return [k for k in view.blocks if k < view.n_blocks]


def scores(stopper: Stopper, view: TracedDocuments, blocks: Sequence[int]) -> np.ndarray:
    """[D, L], what a stopper says of documents where it is asked after these blocks alone, its threshold left out."""
    free = copy.copy(stopper)
    free.threshold = 0.0  # type: ignore[attr-defined]
    return view.together(margins(free, view.meta, view.arrays, blocks))


def calibrated(stopper: Stopper, views: Sequence[TracedDocuments], blocks: Sequence[int]) -> float:
    """The loosest threshold before the first at which more than ``MOST_LOST`` of the documents are lost."""
    said = [scores(stopper, view, blocks) for view in views]
    thresholds, _ = grids.grid(stopper)
    for before, threshold in itertools.pairwise(thresholds):
        lost = [view.losses("gold", exits(of, threshold)).mean() for view, of in zip(views, said, strict=True)]
        if np.mean(lost) > MOST_LOST + 1e-9:
            return float(before)
    return float(thresholds[-1])


def outcome(
    contestant: Contestant,
    stopper: Stopper,
    views: Sequence[TracedDocuments],
    threshold: float,
    blocks: Sequence[int],
) -> Outcome:
    """What exits at a threshold come to."""
    found = Outcome(threshold, list(blocks), [], [], [])
    for view in views:
        left = exits(scores(stopper, view, blocks), threshold)
        work = Work.of([view], readers.parse(contestant.reader), stopper)
        found.change.append(at_exit(view.hits, left) - view.hits[:, -1])
        found.pruned.append(1 - left / view.n_blocks)
        found.saved.append((work.dense - work.at(left, blocks)) / work.dense.mean())
    return found


def above_chance(trace: TracedDocuments) -> bool:
    """Whether the dense model is significantly better than always naming the commonest gold answer."""
    right = trace.hits[:, -1] > 0
    commonest = max(np.unique(trace.gold, return_counts=True)[1]) / len(right)
    return bool(binomtest(int(right.sum()), len(right), commonest, alternative="greater").pvalue < 0.01)


def measure(folder: Path, draws: int, contestants: Sequence[Contestant]) -> dict[str, Any]:
    """All draws of all contestants: what the JSON file holds."""
    traces = read(find([folder]))
    able = {t.meta["task"] for t in traces if t.meta["split"] == "train" and above_chance(t)}
    by_split = {s: [t for t in traces if t.meta["split"] == s and t.meta["task"] in able] for s in SPLITS}
    tasks = [[t.meta["task"] for t in found] for found in by_split.values()]
    if not tasks[0] or tasks[0] != tasks[1] or tasks[0] != tasks[2]:
        raise SystemExit(f"traces: {folder} needs the same tasks in the splits {', '.join(by_split)}, above chance")
    names = sorted({c.reader for c in contestants})
    views = {(s, r): [t.under(r) for t in by_split[s]] for s in ("calibrate", "test") for r in names}
    found: dict[str, Any] = {
        "simulated": "from traces",
        "model": Path(traces[0].meta["model"]).name,
        "n_blocks": traces[0].n_blocks,
        "shots": traces[0].meta["num_fewshot"],
        "tasks": {
            test.meta["task"]: {
                **{split: len(of[i].doc_ids) for split, of in by_split.items()},
                "acc_dense": float(test.hits[:, -1].mean()),
            }
            for i, test in enumerate(by_split["test"])
        },
        "not_above_chance": sorted({t.meta["task"] for t in traces} - able),
        "readers": {r: views["test", r][0].blocks[:-1] for r in names},
        "draws": [],
        "rows": [],
    }
    every: dict[tuple[Contestant, str], list[Outcome]] = {}
    for seed in range(draws):
        with tempfile.TemporaryDirectory() as place:
            found["draws"].append(draw(by_split["train"], seed, Path(place)))
            for contestant in contestants:
                stopper = contestant.fitted(find([Path(place, "fit")]), seed)
                others = read(find([Path(place, "ask")]), contestant.reader)
                blocks = blocks_of(contestant, stopper, others)
                chosen = calibrated(stopper, views["calibrate", contestant.reader], blocks)
                own = float(stopper.threshold)  # type: ignore[attr-defined]
                for how, threshold, at in (("calibrated", chosen, blocks), ("own", own, everywhere(others[0]))):
                    of = outcome(contestant, stopper, views["test", contestant.reader], threshold, at)
                    every.setdefault((contestant, how), []).append(of)
        print(f"draw {seed + 1} of {draws}", flush=True)
    found["rows"] = [row(contestant, how, of, every[contestants[0], how]) for (contestant, how), of in every.items()]
    return found


def row(contestant: Contestant, how: str, of: Sequence[Outcome], base: Sequence[Outcome]) -> dict[str, Any]:
    """A contestant's figures: each draw's, and an interval over test documents of the draws' mean."""
    change = [np.mean(parts, axis=0) for parts in zip(*(one.change for one in of), strict=True)]
    error = 100 * np.sqrt(np.sum([part.var(ddof=1) / len(part) for part in change])) / len(change)
    mean = 100 * np.mean([part.mean() for part in change])
    return {
        "contestant": str(contestant),
        "threshold": how,
        "thresholds": [one.threshold for one in of],
        "check_layers": [one.blocks for one in of],
        "acc_change": [one.mean("change") for one in of],
        "acc_change_interval": [mean - 1.96 * error, mean + 1.96 * error],
        "worst_task": [100 * min(part.mean() for part in one.change) for one in of],
        "pruned": [one.mean("pruned") for one in of],
        "saved": [one.mean("saved") for one in of],
        "saved_more": [one.mean("saved") - other.mean("saved") for one, other in zip(of, base, strict=True)],
        "per_task": {
            name: [[100 * float(part.mean()) for part in getattr(one, name)] for one in of]
            for name in ("change", "saved")
        },
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stoppers", description=__doc__.split("\n")[0])
    parser.add_argument("traces", type=Path, help="a folder of train, calibrate and test traces of one model")
    parser.add_argument("--draws", type=int, default=10, help="of training documents")
    parser.add_argument("--output", "-o", type=Path, help="the files, .json and .md (default: printed)")
    options = parser.parse_args(arguments)
    found = measure(options.traces, options.draws, CONTESTANTS)
    text = stoppers_report.report(found, __doc__.split("\n\n", 2)[2].strip())
    if options.output:
        container.write_atomically(options.output.with_suffix(".json"), (json.dumps(found) + "\n").encode())
        container.write_atomically(options.output.with_suffix(".md"), text.encode())
    print(text)


if __name__ == "__main__":
    main()
