"""Reader files: the maps of a tuned lens, written and read without ever running code that a file holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lm_eval_adainfer import container
from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.readers.base import Reader
from lm_eval_adainfer.readers.tuned import Maps

VERSION = 1
_PREFIX = "reader."  # of the arrays' names in a stopper file


def save(maps: Maps, path: str | Path) -> None:
    """Write maps; the file is safetensors plus JSON whatever its extension."""
    container.write(path, "reader", VERSION, {"kind": "tuned", "info": maps.info}, maps.arrays)


def load(path: str | Path) -> Maps:
    """Read the maps of a tuned lens; never executes code.

    Raises:
        AdaInferError: Where the file is missing, damaged, a pickle, or no reader.
    """
    meta, arrays = container.read(path, "reader", VERSION, "reader")
    if meta.get("kind") != "tuned" or not isinstance(meta.get("info"), dict):
        raise AdaInferError(f"reader: {path} is damaged or truncated (no tuned reader); make it again")
    return Maps(arrays, meta["info"])


def packed(reader: Reader | None) -> tuple[dict[str, Any] | None, dict[str, np.ndarray]]:
    """What a stopper file says of its reader, and the arrays that it holds for it."""
    if reader is None:
        return None, {}
    arrays = {} if reader.maps is None else {_PREFIX + name: array for name, array in reader.maps.arrays.items()}
    info = {} if reader.maps is None else {"info": reader.maps.info}
    return {"kind": reader.kind, "window": reader.window, **info}, arrays


def unpacked(meta: Any, arrays: Mapping[str, np.ndarray]) -> tuple[Reader | None, dict[str, np.ndarray]]:
    """The reader that a stopper file names, and the arrays that are not the reader's.

    Raises:
        AdaInferError: Where what it says is no reader.
    """
    own = {name.removeprefix(_PREFIX): array for name, array in arrays.items() if name.startswith(_PREFIX)}
    rest = {name: array for name, array in arrays.items() if not name.startswith(_PREFIX)}
    if meta is None:
        return None, rest
    kind, window = (meta.get("kind"), meta.get("window")) if isinstance(meta, dict) else (None, None)
    if kind == "head":
        return Reader(), rest
    if kind in ("copy", "sim") and isinstance(window, int) and window > 0:
        return Reader(kind, window), rest
    if kind == "tuned" and isinstance(meta.get("info", {}), dict):
        return Reader("tuned", maps=Maps(own, meta.get("info", {}))), rest
    raise AdaInferError(f"stopper: its file names no reader that this release knows ({meta!s:.60}); make it again")
