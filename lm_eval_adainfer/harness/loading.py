"""A model and tasks from what a user names, with one sentence for whatever is wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval_adainfer import releases
from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.harness import asking
from lm_eval_adainfer.paths import task_configs

_OURS = "adainfer_"  # what the names of the packaged tasks begin with, and no other


def load_model_and_tasks(
    model_args: str,
    tasks: str,
    device: str | None = None,
    batch_size: str | int = 8,
    include_path: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> tuple[Any, dict[str, Any]]:
    """The model and the tasks (name to task) that the options of a command name, which are called as ``lm_eval``'s.

    Args:
        model_args: As ``--model_args``: key=value pairs with commas between them.
        tasks: Names of tasks, groups and tags, with commas between them.
        device: As ``--device``.
        batch_size: As ``--batch_size``; ``model_args`` may hold another.
        include_path: A folder of further task YAMLs.
        metadata: What tasks are told besides the model's arguments.

    Raises:
        AdaInferError: On wrong arguments, in the words of whoever found it first.
    """
    names = [name for name in tasks.split(",") if name]
    manager = task_manager(asking.key_values(model_args), include_path, metadata, names)
    found = load_tasks(manager, names)
    return load_model(model_args, device, batch_size=batch_size), found


def task_manager(
    model_args: Mapping[str, Any],
    include_path: str | None,
    metadata: Mapping[str, Any] | None = None,
    names: Sequence[str] = (),
) -> Any:
    """lm-eval's task manager, which knows the packaged tasks and tells tasks what ``lm_eval``'s command tells them.

    Args:
        model_args: The model's arguments.
        include_path: A folder of further task YAMLs.
        metadata: What tasks are told besides.
        names: Tasks, groups, tags and globs that it will be asked for. Where the package has all of them, lm-eval's
            own thousands of YAMLs are not read.

    Raises:
        AdaInferError: Where ``include_path`` is no folder.
    """
    from lm_eval.tasks import TaskManager, manager

    from lm_eval_adainfer.registration import finds_tasks, install

    if include_path and not Path(include_path).is_dir():
        raise AdaInferError(f"include_path: {include_path} is no folder; give one that holds task YAMLs")
    install()
    told = {**model_args, **(metadata or {})}
    if names and not include_path and task_configs().is_dir():
        folder = None if finds_tasks(manager) else str(task_configs())
        packaged = TaskManager(include_path=folder, include_defaults=False, metadata=told)
        if all(name in packaged.all_tasks or ("*" in name and name.startswith(_OURS)) for name in names):
            return packaged
    return TaskManager(include_path=include_path, metadata=told)


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
    matched = releases.matched(manager, names)
    unknown = [name for name in names if "*" not in name and name not in matched]
    if unknown or not matched:
        raise AdaInferError(
            f"tasks: {(unknown or names)[0]!r} is no task that lm-eval knows; `lm_eval ls tasks` lists them"
        )
    return releases.by_own_name(manager.load(matched)["tasks"])
