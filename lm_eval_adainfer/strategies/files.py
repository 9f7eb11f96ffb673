"""Stopper files: what a strategy is saved to and loaded from, without ever running code that a file holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lm_eval_adainfer import container, paths
from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.readers import files as readers
from lm_eval_adainfer.readers.base import HEAD
from lm_eval_adainfer.strategies.base import Stopper
from lm_eval_adainfer.strategies.registry import STRATEGIES, savable

VERSION = 1


def save(stopper: Stopper, path: str | Path) -> None:
    """Write a stopper; the file is safetensors plus JSON whatever its extension.

    Raises:
        AdaInferError: Where the file can't be written, or would not give the strategy again (:func:`require_savable`).
    """
    named, arrays = readers.packed(stopper.reader or HEAD)
    meta = {**require_savable(stopper), "reader": named}
    container.write(path, "stopper", VERSION, meta, {**stopper.arrays, **arrays})


def require_savable(stopper: Stopper) -> dict[str, Any]:
    """The meta of a stopper's file, after making the strategy again of what the file would hold.

    Raises:
        AdaInferError: Where that can't be done, or gives another strategy.
    """
    if stopper.kind not in savable():
        raise AdaInferError(f"stopper: files hold no {stopper.kind}; they hold {', '.join(savable())}")
    meta = {"kind": stopper.kind, "parameters": stopper.parameters(), "info": stopper.info, **_documents(stopper)}
    try:
        meta = json.loads(json.dumps(meta))
    except (TypeError, ValueError) as error:
        raise AdaInferError(
            f"stopper: this {stopper.kind} holds what JSON can't ({error}); its parameters and info should be numbers, "
            "texts, lists and dicts of these"
        ) from None
    again = STRATEGIES[stopper.kind].stopper_class().rebuild(dict(stopper.arrays), **meta["parameters"])
    again.info = meta["info"]
    if type(again) is not type(stopper) or again.fingerprint != stopper.fingerprint:
        raise AdaInferError(
            f"stopper: this {stopper.kind} ({type(stopper).__name__}) is not what its file would give again "
            f"({type(again).__name__}); save a strategy of this package, or declare one in strategies/registry.py"
        )
    return meta


def load(path: str | Path) -> Stopper:
    """Read a stopper file; never executes code.

    Raises:
        AdaInferError: Where the file is missing, damaged, a pickle, or no stopper.
    """
    meta, arrays = container.read(path, "stopper", VERSION, "stopper")
    reader, arrays = readers.unpacked(meta.get("reader", {"kind": "head"}), arrays)  # older files know no other
    kind, parameters, info, *listed = (meta.get(name) for name in ("kind", "parameters", "info", *_DOCUMENTS))
    seen, calibrated = (documents or {} for documents in listed)
    if kind not in savable():
        known = ", ".join(savable())
        raise AdaInferError(f"stopper: {path} holds a stopper of kind {kind!r}; this release knows {known}")
    listed_well = isinstance(seen, dict) and isinstance(calibrated, dict)
    if not isinstance(parameters, dict) or not isinstance(info, dict) or not listed_well:
        raise AdaInferError(f"stopper: {path} is damaged or truncated (no parameters); make it again")
    try:
        stopper = STRATEGIES[kind].stopper_class().rebuild(arrays, **parameters)
    except AdaInferError:
        raise
    except (TypeError, ValueError, OverflowError) as error:
        raise AdaInferError(f"stopper: {path} has wrong parameters ({error}); make it again") from None
    stopper.info, stopper.seen, stopper.calibrated, stopper.reader = info, seen, calibrated, reader
    return stopper


_DOCUMENTS = ("seen", "calibrated")


def _documents(stopper: Stopper) -> dict[str, Any]:
    return {name: getattr(stopper, name) for name in _DOCUMENTS}


def built_in() -> dict[str, Path]:
    """Name to file of the fitted stoppers that ship with the package."""
    return {path.stem: path for path in sorted(paths.stoppers().glob("*.stopper"))}
