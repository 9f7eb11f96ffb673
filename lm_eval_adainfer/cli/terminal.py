"""Printing what comes from files, whose names and texts the terminal must neither refuse nor obey."""

from __future__ import annotations

import os
import sys


def show(text: str) -> None:
    """Print, also where the terminal can't show every character, or nobody reads on."""
    text = "".join(c if c.isprintable() or c == "\n" else " " for c in text)
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(text.encode(encoding, "replace").decode(encoding), flush=True)
    except BrokenPipeError:  # `| head` has seen enough; the exit status still counts
        drop_output()


def drop_output() -> None:
    """Throw away what is still to be written, or Python would try to write it once more when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
