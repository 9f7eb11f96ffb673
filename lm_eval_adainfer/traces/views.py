"""A trace under one of its readers: meta and arrays as if that reader alone had been recorded, after every block.

A file holds what the head says after every block, and of other readers (``docs/traces.md``) what they say after some
blocks, as ``NAME/features`` and so on. A view puts these in the place of the head's. Where a block was not recorded it
holds NaN features and scores, top token -1 and no greedy flag; after block L every reader reads alike.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lm_eval_adainfer.errors import AdaInferError

HEAD = "head"
# what a reader says: array -> its letters (``file.SHAPES``) and what stands for a block that was not recorded;
# B are the reader's blocks, R the features that depend on the reader
PER_READER: dict[str, tuple[str, str, Any]] = {
    "features": ("NBR", "f", np.nan), "top_token": ("NB", "i", -1), "scores": ("NBC", "f", np.nan),
    "greedy": ("NBC", "i", 0),
}  # fmt: skip
_NAME = re.compile(r"(copy|sim):[1-9][0-9]{0,8}|tuned:[0-9a-f]{8}")


def recorded_blocks(meta: Mapping[str, Any]) -> list[int]:
    """The blocks after which the reader of this view was recorded, in order; block L is always among them."""
    return meta.get("recorded") or list(range(1, meta["n_blocks"] + 1))


def readers_of(meta: Mapping[str, Any]) -> Any:
    """Name to recorded blocks of a file's readers, the head first; files of version 2 know the head alone."""
    found = meta["readers"] if "readers" in meta else {HEAD: list(range(1, meta["n_blocks"] + 1))}
    return {HEAD: found[HEAD], **found} if isinstance(found, dict) and HEAD in found else found


def reader_of(meta: Mapping[str, Any]) -> str:
    """The name of this view's reader."""
    return meta.get("reader", HEAD)


def under(
    path: str | Path, meta: Mapping[str, Any], arrays: Mapping[str, np.ndarray], name: str
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Meta and arrays of a trace under a reader; they say which it is (``reader``, ``recorded``).

    Args:
        path: The trace's, for messages.
        meta: The file's, not a view's under another reader.
        arrays: The file's.
        name: The reader's.

    Raises:
        AdaInferError: Where that reader was not recorded.
    """
    readers = readers_of(meta)
    if name not in readers:
        raise AdaInferError(
            f"reader: {path} does not hold what {name} says, but what {', '.join(readers)} says; trace again with "
            f"--readers {name}"
        )
    if name == HEAD:
        return dict(meta), dict(arrays)
    last = meta["n_blocks"] - 1
    at = [k - 1 for k in readers[name]]
    found = {key: array for key, array in arrays.items() if "/" not in key}
    for key, (_, _, nothing) in PER_READER.items():
        if key not in arrays:
            continue
        whole, said = arrays[key].copy(), arrays[f"{name}/{key}"]
        if key == "features":  # cosines do not depend on the reader
            places = [meta["features"].index(feature) for feature in meta["reader_features"]]
            pairs = [(whole[..., place], said[..., i]) for i, place in enumerate(places)]
        else:
            whole = whole.astype(np.int64) if key == "top_token" else whole
            pairs = [(whole, said)]
        for target, source in pairs:
            target[:, :last] = nothing
            target[:, at] = source
        found[key] = whole
    return {**meta, "reader": name, "recorded": [*readers[name], meta["n_blocks"]]}, found


def require_recorded(meta: Mapping[str, Any], blocks: Sequence[int]) -> None:
    """Raise AdaInferError where a block is asked of which this view's trace does not know what its reader says."""
    recorded = recorded_blocks(meta)
    if missing := [k for k in blocks if k not in set(recorded)]:
        raise AdaInferError(
            f"check_layers: block {missing[0]} is not among the blocks after which the trace of {meta['task']} holds "
            f"what {reader_of(meta)} says ({', '.join(map(str, recorded))}); ask there, or trace again with --at "
            f"{'+'.join(map(str, sorted({*recorded[:-1], *missing} - {meta['n_blocks']})))}"
        )


def require_same_blocks(path: str | Path, meta: Mapping[str, Any], first: Mapping[str, Any], name: str) -> None:
    """Raise AdaInferError where a trace holds what a reader says after other blocks than another trace does."""
    blocks, others = (readers_of(view)[name] for view in (meta, first))
    if blocks != others:
        one, other = (f"{', '.join(map(str, some)):.60}" for some in (blocks, others))
        raise AdaInferError(
            f"traces: {path} holds what {name} says after the blocks {one}, the others after {other}; give traces that "
            "were recorded with the same --at"
        )


def wrong_readers(meta: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str | None:
    """What is wrong with what a file says of its readers, but for shapes; a file may say anything."""
    readers, n_blocks, own = readers_of(meta), meta["n_blocks"], meta.get("reader_features", [])
    if not isinstance(readers, dict) or readers.get(HEAD) != list(range(1, n_blocks + 1)):
        return f"readers are {readers!r:.60}"
    is_list = isinstance(own, list) and all(isinstance(feature, str) for feature in own)
    if not is_list or len(set(own)) < len(own) or not set(own) <= set(meta["features"]):
        return f"reader_features are {own!r:.60}"
    for name, blocks in readers.items():
        if name == HEAD:
            continue
        are_numbers = isinstance(blocks, list) and all(type(k) is int and 0 < k < n_blocks for k in blocks)
        if not _NAME.fullmatch(name) or not blocks or not are_numbers or sorted(set(blocks)) != blocks:
            return f"the reader {name:.30} after the blocks {blocks!r:.60}"
        for array in PER_READER:
            if (f"{name}/{array}" in arrays) != (array in arrays):
                return f"{name} without its {array}"
    return None
