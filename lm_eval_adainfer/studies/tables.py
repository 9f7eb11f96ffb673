"""The paper's tables: rows per task and pooled, of strategies that are fitted on the training traces a recipe names."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.fitting import fit
from lm_eval_adainfer.readers.base import HEAD, Reader
from lm_eval_adainfer.strategies.base import Stopper
from lm_eval_adainfer.traces.documents import TracedDocuments
from lm_eval_adainfer.traces.evaluation import evaluate
from lm_eval_adainfer.traces.file import find
from lm_eval_adainfer.traces.replay import document_margins, parse

DRAWN = 6  # the paper draws six training sets
_logger = logging.getLogger(__name__)


def table(
    stoppers: Mapping[str, Any],
    test: Sequence[TracedDocuments],
    train: Sequence[Path],
    seed: int,
    other_model: str | Path | None,
    readers: Sequence[Reader] = (HEAD,),
) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows per task and pooled, zero-shot and few-shot apart, and what has to be said about them.

    Args:
        stoppers: A recipe's: name to specification.
        test: The documents that are evaluated.
        train: Training traces of the same model.
        seed: Of the drawn training sets, the fits and the bootstrap.
        other_model: A file or folder with training traces of another model (Table 5).
        readers: Under which every strategy is fitted and evaluated; the traces hold them.

    Raises:
        AdaInferError: Where there is nothing to tabulate, or none of the strategies can be had.
    """
    notes: list[str] = []
    fitted = _Fits(train, seed, other_model, notes)
    rows: list[dict[str, Any]] = []
    tasks = list(dict.fromkeys(t.meta["task"] for t in test if not t.generated))
    if not tasks:
        raise AdaInferError("tasks: generated text has no answers to tabulate; give tasks with choices or one answer")
    under = {reader.name: [trace.under(reader.name) for trace in test] for reader in readers}
    margins: dict[tuple[str, str], dict[Any, Any]] = {}
    for reader in readers:
        for name, how in stoppers.items():
            if how == "none" and reader is not readers[0]:
                continue  # which is the same under all
            try:
                margins[name, reader.name] = {
                    t.setting: document_margins(
                        fitted.stopper(how, t.meta["task"], t.n_blocks, reader), t, check_layers=_asked(how, t)
                    )
                    for t in under[reader.name]
                }
            except AdaInferError as error:  # one strategy that can't be had does not spoil the others
                where = f" under {reader.name}" if len(readers) > 1 else ""
                notes.append(f"{name}{where}: left out ({error})")
    if not margins:
        raise AdaInferError(f"recipe: none of its strategies can be had; {notes[0]}")
    for task in [*tasks, "pooled"] if len(tasks) > 1 else tasks:
        for few in (False, True):
            of = {
                reader_name: [
                    t for t in traces
                    if task in ("pooled", t.meta["task"]) and not t.generated and (t.meta["num_fewshot"] > 0) == few
                ]
                for reader_name, traces in under.items()
            }  # fmt: skip
            first = of[readers[0].name]
            if not first:
                continue
            shots = "/".join(map(str, sorted({t.meta["num_fewshot"] for t in first})))
            constant = best_constant(first)
            dense: dict[str, Any] | None = None
            for (name, reader_name), found in margins.items():
                own = {"reader": reader_name} if len(readers) > 1 else {}
                numbers = evaluate(of[reader_name], [found[t.setting] for t in of[reader_name]], seed=seed)
                rows.append({"task": task, "shots": shots, "stopper": name, **own, **numbers, "constant": constant})
                dense = numbers if stoppers[name] == "none" else dense
            if dense is None:  # a recipe without it
                dense = evaluate(first, [document_margins("none", t) for t in first])
            notes += _hopeless(task, shots, dense, constant)
    return rows, notes


def _asked(how: Any, trace: TracedDocuments) -> list[int] | None:
    """All recorded blocks for what was fitted on another model, whose blocks are others; else those it names."""
    other = isinstance(how, Mapping) and how.get("train") == "other_model"
    return trace.blocks if other and len(trace.blocks) < trace.n_blocks else None


def best_constant(traces: Sequence[TracedDocuments]) -> float | None:
    """The share of documents that one answer for all would get right, the best one of each task.

    An answer is a choice's number, or the first token of the one right answer.

    Args:
        traces: The documents; tasks weigh by their number.
    """
    gold: dict[str, list[int]] = {}
    for trace in traces:
        gold.setdefault(trace.meta["task"], []).extend(int(g) for g in trace.gold if g >= 0)
    best = [Counter(of).most_common(1)[0][1] for of in gold.values() if of]
    return sum(best) / sum(len(of) for of in gold.values()) if best else None


def _hopeless(task: str, shots: str, dense: Mapping[str, Any], constant: float | None) -> list[str]:
    """A sentence where the dense model, as it was evaluated, is not better than a constant answer, at 95%."""
    measure = "acc" if dense["acc"] is not None else "top1_acc"
    if constant is None or dense[f"{measure}_low"] is None or dense[f"{measure}_low"] > constant:
        return []
    value, low, high = (100 * dense[f"{measure}{end}"] for end in ("", "_low", "_high"))
    return [
        f"{task} at {shots} shots: the dense model's {measure} of {value:.1f}% ({low:.1f} to {high:.1f}) is not "
        f"clearly above {100 * constant:.1f}%, what the best constant answer gets; compare "
        f"agreement there, not {measure}."
    ]


class _Fits:
    """Makes the stoppers of a recipe; equal fits are made once."""

    def __init__(self, train: Sequence[Path], seed: int, other_model: str | Path | None, notes: list[str]):
        self.train, self.seed, self.notes = list(train), seed, notes
        self.other = other_model
        self._made: dict[Any, Stopper] = {}

    def stopper(self, how: Any, task: str, n_blocks: int, reader: Reader) -> Stopper | str:
        """The strategy for one task, fitted under a reader."""
        if not isinstance(how, Mapping):
            return parse(how, n_blocks)
        files, sentence = self._files(how, task)
        key = (tuple(files), str(sorted(how.items(), key=str)), reader.name)
        if key not in self._made:
            options = {k: how[k] for k in ("features", "label", "threshold") if k in how}
            self._made[key] = fit.fit(how["fit"], files, reader, seed=self.seed, **options)
            self._say(sentence)
        return self._made[key]

    def _say(self, sentence: str) -> None:
        if sentence not in self.notes:
            self.notes.append(sentence)
            _logger.info("%s", sentence)

    def _files(self, how: Mapping[str, Any], task: str) -> tuple[list[Path], str]:
        """Training traces, and a sentence on which they are."""
        train = how.get("train", "all")
        if train == "other_model":
            if self.other is None:
                raise AdaInferError("other_model: no folder with traces of another model was given")
            files = [f for f in find([self.other]) if not f.stem.endswith("_test")]
            if not files:
                raise AdaInferError(f"other_model: {self.other} holds no training traces; trace with --split train")
            return files, f"The other model's training sets are {', '.join(f.stem for f in files)}."
        own = [f for f in self.train if re.fullmatch(rf"{re.escape(task)}_\d+shot_train", f.stem)]
        if train == "same":
            return own, "Intra-task: each task's stopper is fitted on its own training set."
        if train == "others":
            others = [f for f in self.train if f not in own]
            if not others:
                raise AdaInferError(f"tasks: there is no other task than {task} to fit on; give several")
            return others, "Inter-task: each task's stopper is fitted on the training sets of all other tasks."
        if train == "drawn" and len(self.train) > DRAWN:
            seed = self.seed + how.get("draw", 0)
            files = sorted(Random(seed).sample(self.train, DRAWN))
            return files, f"Training sets drawn with seed {seed}: {', '.join(f.stem for f in files)}."
        return self.train, f"Training sets, all there are: {', '.join(f.stem for f in self.train)}."
