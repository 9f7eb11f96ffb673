"""The file of ``adainfer check --config``: its keys are the command's options, its values YAML's."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval_adainfer.errors import AdaInferError

_LISTS = ("tasks", "exclude", "metric")  # of names, with commas between them on the command line
# what the command line must spell as a text, YAML can say itself
_WANTED = {
    "apply_chat_template": "true, false or the name of a template",
    "fewshot_as_multiturn": "true or false",
    "gen_kwargs": "a mapping, or a text like temperature=0.8,do_sample=true",
    "metadata": "a mapping, or a text like shots=per_task",
}


def fill(arguments: argparse.Namespace, options: Sequence[argparse.Action]) -> None:
    """Set the arguments that the command line left open to what ``--config`` says.

    Args:
        arguments: Of the command line; None is open.
        options: The options that may stand in the file.

    Raises:
        AdaInferError: On a file that can't be read, an unknown key, or a value of a wrong kind.
    """
    for name, value in _read(arguments.config, options).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)


def _read(file: str, options: Sequence[argparse.Action]) -> dict[str, Any]:
    """Argument to value."""
    import yaml

    try:
        values = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise AdaInferError(f"config: {file} can't be read: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise AdaInferError(f"config: {file} is no YAML ({' '.join(str(error).split())[:200]})") from None
    if not isinstance(values, dict):
        raise AdaInferError(f"config: {file} holds no options; write lines such as max_drop: 0.01")
    known, found = {option.dest: option for option in options}, {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise AdaInferError(f"config: {file} has the unknown key {key!r}; keys are {', '.join(sorted(known))}")
        try:
            found[name] = _converted(known[name], value)
        except _WrongValueError as wanted:
            raise AdaInferError(f"config: {file}: {key} is {value!r}; it takes {wanted}") from None
    return found


class _WrongValueError(Exception):
    """Says what an option takes."""


def _converted(option: argparse.Action, value: Any) -> Any:
    """A value of the file as the command line gives it; None where it says what holds anyway."""
    if option.dest in _WANTED:
        found = _own_kind(option.dest, value)
        if found is None:
            raise _WrongValueError(_WANTED[option.dest])
        return found
    if option.nargs == 0:
        return _require(isinstance(value, bool), "true or false", value or None)
    if option.choices and (isinstance(value, bool) or str(value) not in option.choices):
        raise _WrongValueError(" or ".join(option.choices))
    if option.dest == "cluster":  # templates may hold commas
        values = value if isinstance(value, list) else [value]
        return _require(all(isinstance(v, str) for v in values), "a text or a list of texts", values)
    if option.dest in _LISTS and isinstance(value, list):
        return ",".join(_require(all(isinstance(v, str) for v in value), "a text or a list of texts", value))
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if option.type is float:
        return _require(number, "a number", value)
    if option.type is int:
        return _require(number and isinstance(value, int), "a whole number", value)
    return _require(number or isinstance(value, str), "a text", str(value))


def _require(right: bool, wanted: str, value: Any) -> Any:
    if not right:
        raise _WrongValueError(wanted)
    return value


def _own_kind(name: str, value: Any) -> Any:
    """The value of an option in ``_WANTED``; None where it is of a wrong kind."""
    if name == "apply_chat_template":
        return value if isinstance(value, (bool, str)) else None
    if name == "fewshot_as_multiturn":
        return value if isinstance(value, bool) else None
    if isinstance(value, str):
        from lm_eval_adainfer.harness.asking import key_values

        try:
            return key_values(value, name)
        except AdaInferError:
            return None
    return value if isinstance(value, dict) and all(isinstance(key, str) for key in value) else None
