"""The trace file: what every block said about documents, as arrays and a JSON header, and how it is read back.

There is a file per task, number of shots and split (``container`` format, so loading it runs no code). One instance is
one decision: a document's distinct context, or a token of a generated text. The arrays, for N instances, L blocks,
F features and at most C requests per context (none in generated text), are:

===============  =================  =====================================================================
features         [N, L, F] float32  the features after every block at the decision position
top_token        [N, L] int32       the full vocabulary's top token there
scores           [N, L, C] float32  log-probability of each request's continuation, NaN beyond the last
greedy           [N, L, C] uint8    1 where greedy decoding after that block gives the whole continuation
request          [N, C] int16       which request of the document that is, -1 beyond the last
right            [N, C] uint8       1 where that request is a right answer (a task may have several)
gold             [N] int16          the gold request, -1 where there is none
gold_token       [N] int32          the first token of the gold answer, -1 where there is none
prompt_tokens    [N] int32          tokens up to the decision, after truncation
position         [N] int32          index among the new tokens of a generated text, else 0
doc_id           [N] int64          the document's index in its split
cluster          [N] int64          equal where documents share a passage, where a field was named or is known
hidden           [N, L, h] float16  the decision position's states after every block, where they were asked for
===============  =================  =====================================================================

``features``, ``top_token``, ``scores`` and ``greedy`` are what the head says. What another reader says after the B
blocks that ``meta["readers"]`` names is in ``copy:1/top_token`` [N, B] and so on (``views.py``).

``docs/traces.md`` describes the file for other programs.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lm_eval_adainfer import container
from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.strategies.features import FEATURES
from lm_eval_adainfer.traces.views import HEAD, PER_READER, readers_of, require_same_blocks, under, wrong_readers

VERSION = 3
VERSIONS = (2, 3)  # that are read; 2 knows the head alone
# N decisions, L blocks, F features, at most C requests per context; "f" floats, "i" integers
SHAPES = {
    "features": ("NLF", "f"), "top_token": ("NL", "i"), "scores": ("NLC", "f"), "greedy": ("NLC", "i"),
    "request": ("NC", "i"), "right": ("NC", "i"), "gold": ("N", "i"), "gold_token": ("N", "i"),
    "prompt_tokens": ("N", "i"), "position": ("N", "i"), "doc_id": ("N", "i"),
    "cluster": ("N", "i"), "hidden": ("NLH", "f"),
}  # fmt: skip
# what every reader needs
ARRAYS = ("features", "top_token", "gold_token", "prompt_tokens", "position")
META = (
    "model", "n_blocks", "head_hash", "task", "num_fewshot", "split", "documents", "features", "output_type",
    "hidden_size", "vocab_size", "block_weights",
)  # fmt: skip
_NUMBERS = ("n_blocks", "num_fewshot", "documents", "hidden_size", "vocab_size")
# traces that are read together must agree in these: the model as it computed, and how its documents were asked
MODEL = ("n_blocks", "dtype", "autocast", "head_hash", "weights_hash", "add_bos_token")
ASKED = ("chat_template", "system_instruction", "fewshot_as_multiturn")
OUTPUT_TYPES = ("loglikelihood", "multiple_choice", "generate_until")
_MOST_SCORES = 2**30  # documents x blocks x requests that readers lay out: 8 GiB
_logger = logging.getLogger(__name__)


def find(paths: Sequence[str | Path]) -> list[Path]:
    """Trace files among files and folders, in order.

    Raises:
        AdaInferError: Where there is none.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            files += sorted(path.glob("*.trace"))
            for parts in sorted(path.glob("*.trace.parts")):
                _logger.warning(
                    "traces: %s is not finished and is left out; the same adainfer trace command goes on with it",
                    parts.with_suffix(""),
                )
        else:
            files.append(path)
    if not files:
        raise AdaInferError(f"traces: {', '.join(map(str, paths))} holds no .trace file; make some with adainfer trace")
    return files


def read(path: str | Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Meta and arrays of a trace file.

    Raises:
        AdaInferError: Where it is missing, damaged or no trace.
    """
    meta, arrays = container.read(path, "trace", VERSIONS, "traces")
    missing = [f"array {n}" for n in ARRAYS if n not in arrays] + [n for n in META if n not in meta]
    if missing:
        raise AdaInferError(f"traces: {path} is incomplete: it has no {missing[0]}; make it again with adainfer trace")
    if wrong := _wrong(meta, arrays):
        raise AdaInferError(f"traces: {path} is no trace that adainfer wrote ({wrong}); make it again")
    return meta, arrays


def read_of_one_model(
    files: Sequence[str | Path], reader: str = HEAD
) -> Iterator[tuple[Path, dict[str, Any], dict[str, np.ndarray]]]:
    """Path, meta and arrays of trace files that are read together, one after the other.

    Args:
        files: The files.
        reader: The name of the reader under which they are seen (``views.under``).

    Raises:
        AdaInferError: As :func:`read`, and where one is not of the first one's model, was asked in another way, or was
            not recorded under the reader after the same blocks.
    """
    first: dict[str, Any] | None = None
    for path in map(Path, files):
        meta, arrays = read(path)
        first = first or meta
        require_one_model(path, meta, first)
        meta, arrays = under(path, meta, arrays, reader)
        require_same_blocks(path, meta, first, reader)
        yield path, meta, arrays


def require_one_model(path: str | Path, meta: Mapping[str, Any], first: Mapping[str, Any]) -> None:
    """Raise AdaInferError where a trace is not of the model of another, or its documents were asked in another way.

    Args:
        path: The trace's.
        meta: The trace's.
        first: The other's, with which it is to be pooled.
    """
    for key in (*MODEL, *ASKED):
        if meta.get(key) != first.get(key):
            raise AdaInferError(
                f"traces: {path} is of {meta['model']} with {key} {meta.get(key)!s:.60}, the others are of "
                f"{first['model']} with {key} {first.get(key)!s:.60}; give traces of one model, asked in one way"
            )


def not_finite(features: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """[N, L, F] bool, where features are NaN or infinite that should not be.

    Features among the choices may be NaN in a decision without choices of one token each, at every block then.

    Args:
        features: [N, L, F].
        names: The F features.
    """
    odd = ~np.isfinite(features)
    of_choices = np.array([name in FEATURES and FEATURES[name].choices for name in names], dtype=bool)
    return odd & ~(without_choices(features, names)[:, None, None] & of_choices)


def without_choices(features: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """[N] bool, which decisions have no choices of one token each, as far as these features tell.

    Args:
        features: [N, L, F].
        names: The F features.
    """
    of_choices = [i for i, name in enumerate(names) if name in FEATURES and FEATURES[name].choices]
    if not of_choices:
        return np.zeros(len(features), dtype=bool)
    return np.isnan(features[:, :, of_choices]).all(axis=(1, 2))


def require_finite(path: str | Path, features: np.ndarray, names: Sequence[str]) -> None:
    """Raise AdaInferError where a trace's features ([N, L, F]) are :func:`not_finite`: no fit could be trusted."""
    if not_finite(features, names).any():
        raise AdaInferError(f"traces: {path} holds NaN or infinite features; trace in a dtype that does not overflow")


def _wrong(meta: dict[str, Any], arrays: dict[str, np.ndarray]) -> str | None:
    """What does not fit together in a trace; a file may say anything, and no reader should have to ask."""
    for name in META:
        wanted = int if name in _NUMBERS else list if name in ("features", "block_weights") else str
        if not isinstance(meta[name], wanted) or isinstance(meta[name], bool):
            return f"{name} is {meta[name]!r:.60}"
    if not all(isinstance(name, str) for name in meta["features"]):
        return "features are no names"
    if not all(isinstance(n, (int, float)) for n in meta["block_weights"]):
        return "block_weights are no numbers"
    if meta["n_blocks"] != len(meta["block_weights"]) or meta["n_blocks"] < 1:
        return f"{meta['n_blocks']} blocks, but weights of {len(meta['block_weights'])}"
    if wrong := wrong_readers(meta, arrays):
        return wrong
    stored = meta.get("stored_weights", meta["block_weights"])
    numbers = isinstance(stored, list) and all(isinstance(n, (int, float)) for n in stored)
    if not numbers or len(stored) != meta["n_blocks"]:
        return "stored_weights are no weights of every block"
    sizes = {"L": meta["n_blocks"], "F": len(meta["features"]), "R": len(meta.get("reader_features", []))}
    shapes = [*((name, *of) for name, of in SHAPES.items())]
    for reader in readers_of(meta):
        if reader != HEAD:
            shapes += [(f"{reader}/{name}", letters, kind) for name, (letters, kind, _) in PER_READER.items()]
    for name, letters, kind in shapes:
        if name not in arrays:
            continue
        if "B" in letters:
            sizes["B"] = len(readers_of(meta)[name.partition("/")[0]])
        array = arrays[name]
        expected = tuple(
            sizes.setdefault(letter, size) for letter, size in zip(letters, array.shape, strict=False)
        )
        if len(letters) != array.ndim or array.shape != expected or (array.dtype.kind == "f") != (kind == "f"):
            return f"{name} is {array.dtype} of shape {array.shape}"
    if meta["output_type"] not in OUTPUT_TYPES or (meta["output_type"] != "generate_until" and sizes.get("C") == 0):
        return f"{meta['output_type']} without requests"
    most = int(arrays["request"].max(initial=0)) + 1 if "request" in arrays else 1
    documents = len(np.unique(arrays["doc_id"])) if "doc_id" in arrays else 0
    if documents * sizes["L"] * most > _MOST_SCORES:
        return f"documents of {most} requests"
    return None
