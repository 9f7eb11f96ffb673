"""Makes the stock ``lm_eval`` command see the model type ``adainfer`` and the packaged tasks.

lm-eval 0.4.13 has no plugin mechanism, so the wheel carries a one-line ``.pth`` file that calls :func:`install`
at start-up. It only puts a finder on ``sys.meta_path``; nothing of lm-eval or torch is imported until somebody
imports lm-eval, and nothing happens in processes that never do. Where lm-eval reads the entry points
``lm_eval.models`` and ``lm_eval.tasks`` itself, the model and the task folder are left to it.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec, PathFinder

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing itself would be the slowest line of this file, and it runs at every start of Python
    from typing import Any

MODEL_NAME = "adainfer"
MODEL_TARGET = "lm_eval_adainfer.harness.model:AdaInferLM"
TASKS_MODULE = "lm_eval_adainfer.task_configs"  # what the entry point ``lm_eval.tasks`` names: the folder, as a package


def _register_model(module: Any) -> None:
    """Register by string: the model's module (and torch) loads only when somebody asks for it."""
    from lm_eval.api import registry

    if hasattr(registry, "load_plugins"):  # entry points do it
        return
    if MODEL_NAME not in registry.model_registry:
        registry.model_registry.register(MODEL_NAME, target=MODEL_TARGET)


def finds_tasks(module: Any) -> bool:
    """Whether lm-eval finds the packaged tasks by their entry point (proposed for it in August 2026).

    Args:
        module: ``lm_eval.tasks.manager``.
    """
    discover = getattr(module, "discover_plugin_task_paths", None)
    if discover is None:
        return False
    from lm_eval_adainfer.paths import task_configs

    return task_configs().resolve() in [path.resolve() for path in discover()]


def _add_tasks(module: Any) -> None:
    """Let every TaskManager that loads the stock tasks see ours too, behind them and before the user's paths."""
    if MODEL_NAME in sys.argv or f"--model={MODEL_NAME}" in sys.argv:
        from lm_eval_adainfer.errors import report_errors_in_one_sentence

        report_errors_in_one_sentence()
    manager = module.TaskManager
    original = manager.__init__
    if getattr(original, "adainfer", False) or finds_tasks(module):
        return

    def __init__(self, verbosity=None, include_path=None, include_defaults=True, *args, **kwargs):
        from lm_eval_adainfer.paths import task_configs

        paths = include_path
        if include_defaults and task_configs().is_dir():
            own = include_path or []
            paths = [str(task_configs()), *(own if isinstance(own, (list, tuple)) else [own])]
        original(self, verbosity, paths, include_defaults, *args, **kwargs)
        self.include_path = include_path

    __init__.__doc__, __init__.adainfer = original.__doc__, True  # type: ignore[attr-defined]
    manager.__init__ = __init__


_AFTER_IMPORT = {"lm_eval.models": _register_model, "lm_eval.tasks.manager": _add_tasks}


class _Loader:
    """Runs the real loader, then our few lines."""

    def __init__(self, loader):
        self._loader = loader

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        self._loader.exec_module(module)
        _AFTER_IMPORT[module.__name__](module)

    def __getattr__(self, name):  # get_source, get_filename, ... for inspect and tracebacks
        return getattr(self._loader, name)


class _Finder:
    def find_spec(self, fullname, path, target=None):
        if fullname == TASKS_MODULE:
            return _tasks_beside_the_package()
        if fullname not in _AFTER_IMPORT:
            return None
        spec = PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)  # type: ignore[assignment]
        return spec


def _tasks_beside_the_package():
    """The folder of the tasks as a package without code, where an editable install has it outside this one."""
    from lm_eval_adainfer.paths import task_configs

    folder = task_configs()
    if folder.parent.samefile(__file__.rpartition("registration")[0]) or not folder.is_dir():
        return None  # a wheel's, which Python finds itself
    spec = ModuleSpec(TASKS_MODULE, None, is_package=True)
    spec.submodule_search_locations = [str(folder)]
    return spec


def install() -> None:
    """Attach to lm-eval: now, where it is imported already, else when it is. Safe to call twice."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    for name, act in _AFTER_IMPORT.items():
        if (module := sys.modules.get(name)) is not None:
            act(module)
