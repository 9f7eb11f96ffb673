"""A model and tasks from the options of a command, with one sentence for whatever is wrong."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.harness import asking


def load_model_and_tasks(arguments: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """The model and the tasks (name to task) of a command with the options of ``asking.add_arguments``.

    Raises:
        AdaInferError: On wrong arguments, in the words of whoever found it first.
    """
    from lm_eval.tasks import TaskManager

    from lm_eval_adainfer.registration import install

    if arguments.include_path and not Path(arguments.include_path).is_dir():
        raise AdaInferError(f"include_path: {arguments.include_path} is no folder; give one that holds task YAMLs")
    install()
    metadata = {**asking.key_values(arguments.model_args), **(arguments.metadata or {})}  # as lm_eval's command has it
    manager = TaskManager(include_path=arguments.include_path, metadata=metadata)
    tasks = load_tasks(manager, [name for name in arguments.tasks.split(",") if name])
    return load_model(arguments.model_args, arguments.device, batch_size=arguments.batch_size), tasks


def load_model(model_args: str, device: str | None, **defaults: Any) -> Any:
    """The model that ``--model_args`` and ``--device`` name.

    Raises:
        AdaInferError: On wrong arguments, in the words of whoever found it first.
    """
    from lm_eval_adainfer.harness.model import AdaInferLM

    options: dict[str, Any] = {**defaults, **asking.key_values(model_args)}
    if device:
        options["device"] = device
    try:
        return AdaInferLM(**options)
    except (AttributeError, OSError, TypeError, ValueError) as error:  # transformers' words for what it can't load
        if isinstance(error, AdaInferError):
            raise
        raise AdaInferError(f"model_args: {str(error).splitlines()[0] if str(error) else repr(error)}") from error


def load_tasks(manager: Any, names: list[str]) -> dict[str, Any]:
    """Load tasks, groups and tags by name; a ``*`` matches any text.

    Raises:
        AdaInferError: On a name that lm-eval does not know.
    """
    if not names:
        raise AdaInferError("tasks: none is named; `lm_eval ls tasks` lists what there is")
    matched = manager.match_tasks(names)
    unknown = [name for name in names if "*" not in name and name not in matched]
    if unknown or not matched:
        raise AdaInferError(
            f"tasks: {(unknown or names)[0]!r} is no task that lm-eval knows; `lm_eval ls tasks` lists them"
        )
    return manager.load(matched)["tasks"]
