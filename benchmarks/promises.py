"""How often the promise of ``adainfer tune`` is broken: its choice and calibration repeated on resampled documents.

    adainfer trace ... --split train --readers copy:1,copy:32,sim:1,sim:32 --at BLOCKS -o POOL
    python -m benchmarks.promises POOL --max-drop 0.02 --documents 300 -o benchmarks/results/promises-NAME

The traced documents are the population. Every repeat draws fitting documents, and independently of them calibration
documents: from each task's pool the same number, uniformly and with replacement. On these ``adainfer tune``'s own
functions choose reader, stopper and blocks, calibrate at most three candidates, among which the error is divided, and
take one. The truth is its loss on the whole pool, every task weighing the same as in the draws. Promised is that it is
above ``--max-drop`` in at most 1 - confidence of the repeats; a repeat in which nothing is recommended breaks nothing.
What repeats do not do is to probe readers: all that were recorded are contestants. All figures are *simulated*.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest

from lm_eval_adainfer import container
from lm_eval_adainfer.output import rendering
from lm_eval_adainfer.readers import specs as readers
from lm_eval_adainfer.readers.base import Reader
from lm_eval_adainfer.traces.documents import read
from lm_eval_adainfer.traces.file import VERSION, find
from lm_eval_adainfer.traces.views import readers_of
from lm_eval_adainfer.tuning.choosing import Calibrated, allowed, calibrated, candidates
from lm_eval_adainfer.tuning.contestants import KINDS, Fitter, losses, scores
from lm_eval_adainfer.tuning.mix import most_each
from lm_eval_adainfer.tuning.search import left, lost_by
from lm_eval_adainfer.tuning.settings import Settings
from lm_eval_adainfer.tuning.work import Work

FAST = ("gap", "choice_gap", "logistic")  # trees and the SVM would take most of the time


class Pool:
    """The population: traced documents of one model, under every reader that was recorded."""

    def __init__(self, folder: Path):
        self.traces = read(find([folder]))
        self.readers: list[Reader] = [readers.parse(name) for name in readers_of(self.traces[0].meta)]
        self._under = {reader.name: [t.under(reader.name) for t in self.traces] for reader in self.readers}
        self._rows = [np.split(np.argsort(t.owner, kind="stable"), np.cumsum(np.bincount(t.owner))[:-1])
                      for t in self.traces]  # fmt: skip

    def draw(self, each: int, generator: np.random.Generator, folder: Path, first: int) -> list[Path]:
        """Write traces of so many documents of every task, drawn with replacement and numbered from ``first``."""
        for trace, rows in zip(self.traces, self._rows, strict=True):
            drawn = [rows[i] for i in generator.integers(len(rows), size=each)]
            arrays = {name: array[np.concatenate(drawn)] for name, array in trace.arrays.items()}
            arrays["doc_id"] = np.repeat(np.arange(first, first + each), [len(of) for of in drawn])
            container.write(folder / trace.path.name, "trace", VERSION, {**trace.meta, "documents": each}, arrays)
        return find([folder])

    def truth(self, best: Calibrated, loss: str) -> dict[str, float]:
        """What the stopper loses and saves on the whole pool, and what the loosest threshold would lose."""
        views, blocks = self._under[best.contestant.reader.name], best.contestant.choice.blocks
        said = [scores(best.stopper, view) for view in views]
        exits = [left(of, blocks, best.came.threshold) for of in said]
        lost = [losses([view], loss) for view in views]
        work = Work.of(views, best.contestant.reader, best.stopper)
        loosest = [left(of, blocks, -np.inf) for of in said]
        return {
            "lost": float(np.mean([lost_by(*of).mean() for of in zip(lost, exits, strict=True)])),
            "loosest_lost": float(np.mean([lost_by(*of).mean() for of in zip(lost, loosest, strict=True)])),
            "saved": 1 - work.ratio(np.concatenate(exits), blocks),
        }


class Repeated(Fitter):
    """A fitter of some kinds of stoppers only."""

    def __init__(self, files: Sequence[Path], seed: int, only: Sequence[str]):
        super().__init__(files, seed)
        self.only = only

    def kinds(self) -> tuple[str, ...]:
        return tuple(kind for kind in super().kinds() if kind in self.only)


def repeat(pool: Pool, settings: Settings, only: Sequence[str], seed: int) -> dict[str, Any]:
    """One repeat: draw, choose, calibrate, and look at the truth."""
    generator = np.random.default_rng(seed)
    each = most_each([len(t.doc_ids) for t in pool.traces], settings.documents)
    allowance = allowed(each * len(pool.traces), settings)
    with tempfile.TemporaryDirectory() as place:
        fitter = Repeated(pool.draw(each, generator, Path(place, "train"), 0), seed, only)
        _, chosen, _ = candidates(fitter, pool.readers, allowance, settings)
        files = pool.draw(each, generator, Path(place, "calibrate"), each)
        best, _ = calibrated(chosen, files, allowance, settings)
    if best is None:
        return {"seed": seed, "name": None}
    blocks = list(best.contestant.choice.blocks)
    return {"seed": seed, "name": best.contestant.name, "check_layers": blocks, "threshold": best.came.threshold,
            **pool.truth(best, settings.loss)}  # fmt: skip


_pool: Pool  # of a worker process


def _start(folder: Path) -> None:
    global _pool
    _pool = Pool(folder)


def _work(settings: Settings, only: Sequence[str], seed: int) -> dict[str, Any]:
    return repeat(_pool, settings, only, seed)


def measure(
    folder: Path, settings: Settings, only: Sequence[str], repeats: int, workers: int
) -> Iterator[dict[str, Any]]:
    """What the JSON file holds, again after every 50 repeats: they take long and are interrupted."""
    pool, rows = Pool(folder), []
    with ProcessPoolExecutor(workers, get_context("spawn"), _start, (folder,)) as processes:
        for row in processes.map(partial(_work, settings, tuple(only)), range(repeats)):
            rows.append(row)
            if len(rows) % 50 == 0 or len(rows) == repeats:
                yield described(pool, settings, only, rows)


def described(pool: Pool, settings: Settings, only: Sequence[str], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What was drawn from, how, and what the repeats come to."""
    meta = pool.traces[0].meta
    each = most_each([len(t.doc_ids) for t in pool.traces], settings.documents)
    allowance = allowed(each * len(pool.traces), settings)
    return {
        "simulated": "from traces",
        "model": Path(meta["model"]).name,
        "n_blocks": meta["n_blocks"],
        "shots": meta["num_fewshot"],
        "pool": {t.meta["task"]: len(t.doc_ids) for t in pool.traces},
        "readers": readers_of(meta),
        "stoppers": [kind for kind in KINDS if kind in only],
        "left_out": [kind for kind in KINDS if kind not in only],
        "max_drop": settings.max_drop,
        "confidence": settings.confidence,
        "documents": allowance.documents,
        "candidates": allowance.candidates,
        "may_lose": allowance.most_lost(),
        **summary(rows, settings),
        "rows": list(rows),
    }


def summary(rows: Sequence[dict[str, Any]], settings: Settings) -> dict[str, Any]:
    """The share of broken promises, its exact interval, and the p-value of "it is at most 1 - confidence"."""
    given = [row for row in rows if row["name"] is not None]
    broken = sum(row["lost"] > settings.max_drop + 1e-12 for row in given)
    test = binomtest(broken, len(rows), 1 - settings.confidence, alternative="greater")
    interval = binomtest(broken, len(rows)).proportion_ci(0.95, "exact")
    return {
        "repeats": len(rows),
        "recommended": len(given),
        "broken": broken,
        "broken_share": broken / len(rows),
        "broken_interval": [float(interval.low), float(interval.high)],
        "p": float(test.pvalue),
        "could_be_broken": sum(row["loosest_lost"] > settings.max_drop for row in given),
        "lost_quantiles": quantiles([row["lost"] for row in given]),
        "saved_quantiles": quantiles([row["saved"] for row in given]),
        "chosen": dict(Counter(row["name"] or "nothing" for row in rows).most_common()),
    }


def quantiles(values: Sequence[float]) -> list[float]:
    """The 5th, 50th and 95th percentile."""
    return [float(q) for q in np.quantile(values, [0.05, 0.5, 0.95])] if len(values) else []


def report(found: dict[str, Any]) -> str:
    """The Markdown file."""
    pool = ", ".join(f"{task} {n}" for task, n in found["pool"].items())
    told = " ".join(
        [
            f"Population: {sum(found['pool'].values())} documents ({pool}).",
            f"Each repeat: {found['documents']} fitting and {found['documents']} calibration documents, of which",
            f"{found['may_lose']} may be lost; candidates, at most: {found['candidates']}. Contestants: the readers",
            ", ".join(f"`{name}`" for name in found["readers"]) + " with the stoppers",
            ", ".join(f"`{kind}`" for kind in found["stoppers"]),
            "(`choice_gap` only where every decision has choices of one token).",
            *([f"Left out for their time: {', '.join(f'`{k}`' for k in found['left_out'])}."] if found["left_out"]
              else []),
        ]
    )  # fmt: skip
    low, high = found["broken_interval"]
    cells = [
        ["repeats", str(found["repeats"])],
        ["in which something was recommended", str(found["recommended"])],
        ["of these, it could be broken: the loosest threshold loses too many", str(found["could_be_broken"])],
        ["broken promises", str(found["broken"])],
        ["share of the repeats, exact 95% interval", f"{found['broken_share']:.1%} ({low:.1%} to {high:.1%})"],
        [f"p of \"at most {1 - found['confidence']:.0%}\", one-sided, exact", f"{found['p']:.3g}"],
        ["lost on the pool: 5%, 50%, 95% of the recommendations", shown(found["lost_quantiles"], 2)],
        ["work saved on the pool, likewise", shown(found["saved_quantiles"], 1)],
        ["chosen, times", ", ".join(f"{name} {times}" for name, times in found["chosen"].items())],
    ]
    lines = [
        f"# Promises: `{found['model']}`, {found['n_blocks']} blocks, {found['shots']} shots, at most "
        f"{found['max_drop']:.1%} lost at {found['confidence']:.0%}, *simulated*",
        "",
        (__doc__ or "").split("\n\n", 2)[2].strip(),
        "",
        *textwrap.wrap(told, 120, break_long_words=False, break_on_hyphens=False),
        "",
        *rendering.markdown(rendering.Table(["", ""], cells, left=(0, 1))),
    ]
    return "\n".join(lines) + "\n"


def shown(values: Sequence[float], digits: int) -> str:
    return ", ".join(f"{value:.{digits}%}" for value in values)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.promises", description=__doc__.split("\n")[0])
    parser.add_argument("pool", type=Path, help="a folder of traces of one model, one split, under all readers")
    parser.add_argument("--repeats", type=int, default=1000)
    parser.add_argument("--max-drop", type=float, default=0.02)
    parser.add_argument("--confidence", type=float, default=0.95)
    parser.add_argument("--documents", type=int, default=500, help="to fit on and to calibrate on, each")
    parser.add_argument("--stoppers", default=",".join(FAST), help=f"of {','.join(KINDS)} (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--output", "-o", type=Path, help="the files, .json and .md (default: printed)")
    options = parser.parse_args(arguments)
    settings = Settings(max_drop=options.max_drop, confidence=options.confidence, documents=options.documents)
    only = options.stoppers.split(",")
    for found in measure(options.pool, settings, only, options.repeats, options.workers):
        print(f"{found['repeats']} of {options.repeats} repeats, {found['broken']} broken", flush=True)
        if options.output:
            container.write_atomically(options.output.with_suffix(".json"), (json.dumps(found) + "\n").encode())
            container.write_atomically(options.output.with_suffix(".md"), report(found).encode())
    print(report(found))


if __name__ == "__main__":
    main()
