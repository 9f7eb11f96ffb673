"""The paper's studies, a YAML recipe each: trace (resumably), fit, replay, and write Markdown, CSV and figures.

A recipe (``stoppers/recipes/``) names a ``study`` (``table``, ``accuracy``: Figure 1, ``features``: Figures 3 and 4),
``tasks``, ``shots``, and for tables ``train_shots`` and ``stoppers``: what ``replay`` takes, or ``{fit: KIND, train:
drawn | all | same | others | other_model, features: [...], label: ..., threshold: ..., draw: 0}`` with a KIND of
``adainfer fit``. What is left out is as in ``adainfer fit``. All figures are *simulated* from the traces.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import yaml

from lm_eval_adainfer import container, paths
from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.fitting import fit
from lm_eval_adainfer.output import tables
from lm_eval_adainfer.strategies.base import Stopper
from lm_eval_adainfer.strategies.features import check_names
from lm_eval_adainfer.studies import paper
from lm_eval_adainfer.traces.replay import Trace, document_margins, evaluate, load, parse

STUDIES = ("table", "accuracy", "features")
DRAWN = 6  # the paper draws six training sets
_TRAIN = ("drawn", "all", "same", "others", "other_model")
_KEYS = {"study", "title", "tasks", "shots", "train_shots", "stoppers"}
_FIT_KEYS = {"fit", "train", "features", "label", "threshold", "draw"}
_logger = logging.getLogger(__name__)

# (shots, split, limit) -> trace files
Tracer = Callable[[Sequence[int], str], list[Path]]


@dataclass
class Recipe:
    """What a recipe file says.

    Attributes:
        name: The file's name without its ending.
        study: One of ``STUDIES``.
        title: For headings.
        tasks: Tasks and groups.
        shots: Numbers of shots that are evaluated.
        train_shots: Numbers of shots of the training traces.
        stoppers: Name to specification.
    """

    name: str
    study: str
    title: str
    tasks: list[str]
    shots: list[int]
    train_shots: list[int]
    stoppers: dict[str, Any]


def names() -> list[str]:
    """Recipes that ship with the package."""
    found = []
    for path in sorted((paths.stoppers() / "recipes").glob("*.yaml")):
        content = yaml.safe_load(path.read_text())
        if isinstance(content, dict) and "study" in content:
            found.append(path.stem)
    return found


def read(name: str) -> Recipe:
    """A recipe that ships, or a file.

    Raises:
        AdaInferError: Where there is none of that name, or it says what nobody understands.
    """
    path = Path(name) if Path(name).is_file() else paths.stoppers() / "recipes" / f"{name}.yaml"
    if not path.is_file() or (path.stem == name and name not in names()):
        raise AdaInferError(f"recipe: {name!r} is neither a recipe ({', '.join(names())}) nor a file")
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise AdaInferError(f"recipe: {path} is no YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(content, dict) or content.get("study") not in STUDIES:
        raise AdaInferError(f"recipe: {path} names no study; there are {', '.join(STUDIES)}")
    if unknown := set(content) - _KEYS:
        raise AdaInferError(f"recipe: {path} has an unknown key {min(unknown)!r}; known are {', '.join(sorted(_KEYS))}")
    shots = content.get("shots", [0, 5, 10, 15, 20])
    train_shots, stoppers = content.get("train_shots", [5]), content.get("stoppers", {})
    for key, numbers in (("shots", shots), ("train_shots", train_shots)):
        if not isinstance(numbers, list) or not numbers or not all(isinstance(n, int) and n >= 0 for n in numbers):
            raise AdaInferError(f"recipe: {path} has {key}: {numbers!r}; give a list of numbers like [0, 5]")
    if content["study"] == "table" and not (isinstance(stoppers, dict) and stoppers):
        raise AdaInferError(f"recipe: {path} names no stoppers; give a name and what replay takes for each")
    for stopper, how in stoppers.items():
        if isinstance(how, dict):
            _check_fit(path, stopper, how)
    tasks = content.get("tasks", [])
    tasks = [tasks] if isinstance(tasks, str) else tasks
    return Recipe(path.stem, content["study"], content.get("title", path.stem), tasks, shots, train_shots, stoppers)


def _check_fit(path: Path, stopper: str, how: dict[str, Any]) -> None:
    """Raise AdaInferError where a recipe asks for a fit that nobody can make: before anything is traced for it."""
    if set(how) - _FIT_KEYS or "fit" not in how or how.get("train", "all") not in _TRAIN:
        raise AdaInferError(
            f"recipe: {path} can't fit {stopper!r} ({how}); give fit: svm and train: one of {', '.join(_TRAIN)}"
        )
    features, threshold, draw = how.get("features", ["gap"]), how.get("threshold", 0.0), how.get("draw", 0)
    try:
        fit.check_kind(how["fit"])
        fit.check_label(how.get("label", "final"))
        if not isinstance(features, list) or not all(isinstance(name, str) for name in features):
            raise AdaInferError(f"features: {features!r} is no list of names; give [gap, top_prob], say")
        check_names(features, "features")
        if not isinstance(threshold, (int, float)) or isinstance(threshold, bool):
            raise AdaInferError(f"threshold: {threshold!r} is no number; give 0.95, say")
        if not isinstance(draw, int) or isinstance(draw, bool):
            raise AdaInferError(f"draw: {draw!r} is no whole number; give 0, say")
    except AdaInferError as error:
        raise AdaInferError(f"recipe: {path} can't fit {stopper!r}: {error}") from None


def run(
    recipe: Recipe, tracer: Tracer, output: str | Path, seed: int = 0, other_model: str | Path | None = None
) -> list[Path]:
    """Trace, fit, replay and write.

    Args:
        recipe: What to do.
        tracer: Traces the tasks at (shots, split) and gives the files; they are kept, so a second run goes on.
        output: The folder.
        seed: Of the drawn training sets, the fits and the bootstrap.
        other_model: A file or folder with training traces of another model (Table 5).

    Returns:
        The files that were written.
    """
    output = Path(output)
    test = load(tracer(recipe.shots, "test"))
    about = f"{test[0].meta['model']}, {test[0].n_blocks} blocks"
    if recipe.study != "table":
        return paper.write(recipe.study, recipe.name, f"{recipe.title}: {about}", test, output)
    fits = [how for how in recipe.stoppers.values() if isinstance(how, dict) and how.get("train") != "other_model"]
    train = tracer(recipe.train_shots, "train") if fits else []
    rows, notes = table(recipe, test, train, seed, other_model)
    return _write(recipe, f"{recipe.title}: {about}", rows, notes, output)


def table(
    recipe: Recipe, test: Sequence[Trace], train: Sequence[Path], seed: int, other_model: str | Path | None
) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows per task and pooled, zero-shot and few-shot apart, and what has to be said about them."""
    notes: list[str] = []
    fitted = _Fits(train, seed, other_model, notes)
    rows: list[dict[str, Any]] = []
    tasks = list(dict.fromkeys(t.meta["task"] for t in test if not t.generated))
    if not tasks:
        raise AdaInferError("tasks: generated text has no answers to tabulate; give tasks with choices or one answer")
    margins: dict[str, dict[Any, Any]] = {}
    for name, how in recipe.stoppers.items():
        try:
            margins[name] = {
                t.setting: document_margins(fitted.stopper(how, t.meta["task"], t.n_blocks), t) for t in test
            }
        except AdaInferError as error:  # one strategy that can't be had does not spoil the others
            notes.append(f"{name}: left out ({error})")
    if not margins:
        raise AdaInferError(f"recipe: none of its strategies can be had; {notes[0]}")
    for task in [*tasks, "pooled"] if len(tasks) > 1 else tasks:
        for few in (False, True):
            members = [t for t in test if task in ("pooled", t.meta["task"]) and (t.meta["num_fewshot"] > 0) == few]
            members = [t for t in members if not t.generated]
            if not members:
                continue
            shots = "/".join(map(str, sorted({t.meta["num_fewshot"] for t in members})))
            for name, found in margins.items():
                numbers = evaluate(members, [found[t.setting] for t in members], seed=seed)
                rows.append({"task": task, "shots": shots, "stopper": name, **numbers})
    return rows, notes


class _Fits:
    """Makes the stoppers of a recipe; equal fits are made once."""

    def __init__(self, train: Sequence[Path], seed: int, other_model: str | Path | None, notes: list[str]):
        self.train, self.seed, self.notes = list(train), seed, notes
        self.other = other_model
        self._made: dict[Any, Stopper] = {}

    def stopper(self, how: Any, task: str, n_blocks: int) -> Stopper | str:
        """The strategy for one task."""
        if not isinstance(how, Mapping):
            return parse(how, n_blocks)
        files, sentence = self._files(how, task)
        key = (tuple(files), str(sorted(how.items(), key=str)))
        if key not in self._made:
            options = {k: how[k] for k in ("features", "label", "threshold") if k in how}
            self._made[key] = fit.fit(how["fit"], files, seed=self.seed, **options)
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
            files = [f for f in fit.find([self.other]) if not f.stem.endswith("_test")]
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


def _write(recipe: Recipe, title: str, rows: list[dict[str, Any]], notes: list[str], output: Path) -> list[Path]:
    """The table as Markdown and CSV."""
    text = f"# {recipe.title}\n\n{tables.render(rows, 'markdown', title)}\n"
    text += "Several shot counts in a row: the mean over them. `acc` is the task's own, `top1_acc` the paper's.\n\n"
    text += "".join(f"- {note}\n" for note in notes)
    files = [output / f"{recipe.name}.md", output / f"{recipe.name}.csv"]
    for file, content in zip(files, (text, tables.to_csv(rows)), strict=True):
        container.write_atomically(file, content.encode())
    return files
