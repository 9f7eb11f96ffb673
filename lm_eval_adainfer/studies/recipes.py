"""Recipes, a YAML file per study of the paper: how one is read, and how it is run (trace, fit, replay, write).

A recipe (``stoppers/recipes/``) names a ``study`` (``table``, ``accuracy``: Figure 1, ``features``: Figures 3 and 4),
``tasks``, ``shots``, and for tables ``train_shots`` and ``stoppers``: what ``replay`` takes, or ``{fit: KIND, train:
drawn | all | same | others | other_model, features: [...], label: ..., threshold: ..., draw: 0}`` with a KIND of
``adainfer fit``. What is left out is as in ``adainfer fit``. All figures are *simulated* from the traces.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lm_eval_adainfer import container, paths
from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.fitting import fit
from lm_eval_adainfer.output import tables
from lm_eval_adainfer.readers.base import HEAD, Reader
from lm_eval_adainfer.strategies.features import check_names
from lm_eval_adainfer.studies import figures
from lm_eval_adainfer.studies.tables import table
from lm_eval_adainfer.traces.replay import load

STUDIES = ("table", "accuracy", "features")
_TRAIN = ("drawn", "all", "same", "others", "other_model")
_KEYS = {"study", "title", "tasks", "shots", "train_shots", "stoppers"}
_FIT_KEYS = {"fit", "train", "features", "label", "threshold", "draw"}

# (shots, split) -> trace files
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
    recipe: Recipe,
    tracer: Tracer,
    output: str | Path,
    seed: int = 0,
    other_model: str | Path | None = None,
    readers: Sequence[Reader] = (HEAD,),
) -> list[Path]:
    """Trace, fit, replay and write.

    Args:
        recipe: What to do.
        tracer: Traces the tasks at (shots, split) and gives the files; they are kept, so a second run goes on.
        output: The folder.
        seed: Of the drawn training sets, the fits and the bootstrap.
        other_model: A file or folder with training traces of another model (Table 5).
        readers: Which the tracer records; a table has every strategy under each of them.

    Returns:
        The files that were written.
    """
    output = Path(output)
    test = load(tracer(recipe.shots, "test"))
    about = f"{Path(test[0].meta['model']).name}, {test[0].n_blocks} blocks"
    if recipe.study != "table":
        return figures.write(recipe.study, recipe.name, f"{recipe.title}: {about}", test, output)
    fits = [how for how in recipe.stoppers.values() if isinstance(how, dict) and how.get("train") != "other_model"]
    train = tracer(recipe.train_shots, "train") if fits else []
    rows, notes = table(recipe.stoppers, test, train, seed, other_model, readers)
    return _write(recipe, f"{recipe.title}: {about}", rows, notes, output)


def _write(recipe: Recipe, title: str, rows: list[dict[str, Any]], notes: list[str], output: Path) -> list[Path]:
    """The table as Markdown and CSV."""
    text = f"# {recipe.title}\n\n{tables.render(rows, 'markdown', title)}\n"
    text += "Several shot counts in a row: the mean over them. `acc` is the task's own, `top1_acc` the paper's.\n\n"
    text += "".join(f"- {note}\n" for note in notes)
    files = [output / f"{recipe.name}.md", output / f"{recipe.name}.csv"]
    for file, content in zip(files, (text, tables.to_csv(rows)), strict=True):
        container.write_atomically(file, content.encode())
    return files
