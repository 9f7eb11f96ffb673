"""The page of a recommendation (placeholder)."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def write(tuned: Any, output: Any, command: str) -> Path | None:
    """Nothing yet."""
    return None
