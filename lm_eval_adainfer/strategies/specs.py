"""Specs: from what ``stopper=`` says to a strategy, with the nearest name where it says nothing known."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lm_eval_adainfer.errors import AdaInferError, nearest
from lm_eval_adainfer.strategies import files, registry
from lm_eval_adainfer.strategies.base import Stopper
from lm_eval_adainfer.strategies.registry import STRATEGIES, Strategy


def parse(spec: Any) -> Stopper:
    """The strategy that ``stopper=`` names.

    Args:
        spec: ``none`` (also None and ``""``), ``gap``, ``gap:0.8``, ``softmax:0.9``, ``saturation:0.98``,
            ``patience:3``, ``choice_gap:0.5``, ``choice_gap:0.5:3``, ``fixed:24``, ``shortgpt:last5``,
            ``shortgpt:bi:8:FILE``, a built-in name, the path of a stopper file, or a :class:`Stopper`.

    Raises:
        AdaInferError: Where it is none of these.
    """
    if isinstance(spec, Stopper):
        return spec
    text = "none" if spec is None else str(spec).strip()
    if text in ("", "None"):
        text = "none"
    name, colon, value = text.partition(":")
    strategy = STRATEGIES.get(name)
    if strategy is not None and strategy.specs and (strategy.read is not None or not colon):
        return _named(strategy, text, value)
    if text in files.built_in() and not Path(text).exists():
        return files.load(files.built_in()[text])
    if not Path(text).exists() and not _looks_like_a_path(text):
        names = [*registry.specs(), *files.built_in()]
        meant = _meant(text)
        raise AdaInferError(
            f"stopper: {text!r} is neither a known strategy ({', '.join(names)}) nor a stopper file"
            + (f"; {meant} is probably meant" if meant else "")
        )
    return files.load(text)


def _named(strategy: Strategy, text: str, value: str) -> Stopper:
    """A strategy of the registry, made of the value that follows the colon in ``text``."""
    if text in strategy.specs and not value:
        value = _value(strategy.specs[0])
    try:
        parameters = strategy.read(value) if strategy.read is not None else {}
    except ValueError:
        raise AdaInferError(f"stopper: {text!r} {strategy.wrong.format(name=strategy.name)}") from None
    file = parameters.pop("file", None)
    if file is None:
        return strategy.stopper_class().rebuild({}, **parameters)
    measured = files.load(file)
    if measured.kind != strategy.name or not measured.arrays:
        raise AdaInferError(f"stopper: {file} holds a stopper of kind {measured.kind}; give one of {strategy.command}")
    stopper = strategy.stopper_class().rebuild(measured.arrays, **parameters)
    stopper.info = dict(measured.info)
    return stopper


def _value(spec: str) -> str:
    return spec.partition(":")[2]


def _looks_like_a_path(text: str) -> bool:
    """Whether a file is meant: the text has a folder or an extension in it, and is neither a number nor a slip."""
    return any(c in text for c in "./\\") and not _is_number(_bare(text)) and _meant(text) is None


def _meant(text: str) -> str | None:
    """What ``gap=0.8``, ``GAP:0.8`` or ``softmx:0.9`` was probably meant to say; None where that is not clear."""
    parts = re.fullmatch(r"([a-z]+(?:_[a-z]+)*)[^a-z0-9.]*(.*)", _bare(text).lower(), re.DOTALL)
    examples = {s.name: s.specs for s in STRATEGIES.values() if s.specs} | {name: (name,) for name in files.built_in()}
    name = nearest(parts[1], examples) if parts else None
    if parts is None or name is None:
        return None
    value = _bare(text)[parts.start(2) :].strip()
    if not value:
        return name if name in examples[name] else examples[name][0]
    values = [_value(example) for example in examples[name] if ":" in example]
    return f"{name}:{value}" if any(_is_like(value, example) for example in values) else None


def _is_like(value: str, example: str) -> bool:
    """Whether a value begins with the letters of an example's, or is a number where the example has none."""
    letters = re.match(r"[a-z]*:?", example)
    assert letters is not None
    return value.lower().startswith(letters[0]) if letters[0] else _is_number(value)


def _bare(text: str) -> str:
    return text.removeprefix("stopper=").strip()


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
