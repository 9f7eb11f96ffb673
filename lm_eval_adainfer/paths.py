"""Where the packaged tasks, stoppers and the demo model lie, in a wheel and in a source checkout."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def _folder(name: str) -> Path:
    """A wheel carries the folder inside the package; an editable install finds it beside the package."""
    inside = _PACKAGE / name
    return inside if inside.is_dir() else _PACKAGE.parent / name


def task_configs() -> Path:
    """The folder of the packaged task YAMLs."""
    return _folder("task_configs")


def stoppers() -> Path:
    """The folder of the fitted stoppers that ship with the package."""
    return _folder("stoppers")


def demo_model() -> Path:
    """The embedded demo model (``pretrained=adainfer-demo``)."""
    return _PACKAGE / "demo" / "model"
