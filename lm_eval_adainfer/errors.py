"""One-sentence errors: the argument's name, what was found, what would be right."""

from __future__ import annotations

import logging
import sqlite3
import sys
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path


class AdaInferError(ValueError):
    """A user's mistake or an unsupported model, told in one sentence."""


class UnsupportedModelError(AdaInferError):
    """The model's structure does not allow early exit by attaching to its blocks."""


def nearest(name: str, known: Iterable[str], alike: float = 0.6) -> str | None:
    """The known name that is most like ``name``, whatever its case; None where none is.

    Args:
        name: What was found.
        known: What there is.
        alike: The least similarity (``difflib``'s ratio, 0 to 1).
    """
    names = {k.lower(): k for k in known}
    found = get_close_matches(name.lower(), names, 1, alike)
    return names[found[0]] if found else None


def report_errors_in_one_sentence() -> None:
    """Make the ``lm_eval`` command print an :class:`AdaInferError` without a traceback.

    Only where the process is a command (``lm_eval`` or ``python -m ...``): a library must not change how other
    people's programs report errors. Exit status stays 1.
    """
    main = Path(sys.argv[0]) if sys.argv and sys.argv[0] else Path()
    is_command = main.name in {"lm_eval", "lm-eval", "lm_eval.exe", "lm-eval.exe"} or (
        main.name == "__main__.py" and main.parent.name in {"lm_eval", "lm_eval_adainfer"}
    )
    if not is_command or getattr(sys.excepthook, "adainfer", False):
        return
    previous = sys.excepthook
    logging.getLogger("sqlitedict").setLevel(logging.CRITICAL)  # it logs two stacks, and then raises

    def hook(kind, error, traceback):
        if isinstance(error, AdaInferError):
            print(f"adainfer: error: {error}", file=sys.stderr)
        elif kind is ValueError and str(error).startswith("Tasks not found: "):  # lm-eval's words for a wrong --tasks
            print(f"adainfer: error: tasks: {error}; `lm_eval ls tasks` lists what there is", file=sys.stderr)
        elif kind is KeyError and "is not a registered task" in str(error):  # those of 0.5.0.dev1
            print(f"adainfer: error: tasks: {error.args[0]}; `lm_eval ls tasks` lists what there is", file=sys.stderr)
        elif issubclass(kind, sqlite3.Error):
            print(
                f"adainfer: error: use_cache: its file can't be read or written ({error}); what it holds is kept, and "
                "the same command goes on from there",
                file=sys.stderr,
            )
        else:
            previous(kind, error, traceback)

    hook.adainfer = True  # type: ignore[attr-defined]
    sys.excepthook = hook
