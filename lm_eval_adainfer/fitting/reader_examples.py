"""What a tuned lens is trained on: the states after every block at sampled positions of texts, or of traced decisions.

They lie in a file of plain numbers while maps are trained, block by block: [L, N, h] float32, of which one block at a
time is read, so that memory holds one block's whatever the model's size.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.prefill.forward import padded, run_blocks
from lm_eval_adainfer.structure.state import BlockState
from lm_eval_adainfer.traces import file as trace_file

if TYPE_CHECKING:
    from lm_eval_adainfer.harness.model import AdaInferLM

WINDOW = 1024  # tokens of a window at most, which is what a forward's memory and attention cost
_RUN_PER_EXAMPLE = 4  # tokens are run for each that is taken, so that examples come from more texts
_PIECE = 2**16  # characters of a text that are tokenised together
_HELD_OUT = 10  # one window or document of so many
_logger = logging.getLogger(__name__)


@dataclass
class Examples:
    """N positions, those that are held out behind all others.

    Attributes:
        n: N.
        n_held_out: How many of them are held out.
        described: Where they come from, JSON-serialisable.
        write: Fills an array [L, N, h].
    """

    n: int
    n_held_out: int
    described: dict[str, Any]
    write: Callable[[np.ndarray], None]


def of_texts(
    lm: AdaInferLM, files: Sequence[str | Path], examples: int, seed: int, batch_size: int = 8
) -> Examples:
    """Positions of the windows of texts, each an example; windows and positions are drawn with a seed.

    Args:
        lm: The model.
        files: ``.txt``, or ``.jsonl`` with a ``text`` in each line.
        examples: N at most.
        seed: Of the draws.
        batch_size: Windows per forward.

    Raises:
        AdaInferError: Where a file can't be read, or texts are too short to hold some out.
    """
    rng = np.random.default_rng(seed)
    texts = [text for path in files for text in _texts(Path(path))]
    pieces = [text[i : i + _PIECE] for text in texts for i in range(0, len(text), _PIECE)]
    length = min(lm.max_length, WINDOW)
    windows: list[list[int]] = []
    tokens = 0
    for n in rng.permutation(len(pieces)):
        ids = lm.tok_encode(pieces[n])
        for start in range(0, len(ids), length):
            windows.append(ids[start : start + length])
            tokens += len(windows[-1])
        if tokens >= _RUN_PER_EXAMPLE * examples and len(windows) > 1:
            break
    if len(windows) < 2:
        raise AdaInferError(
            f"text: {', '.join(map(str, files))} make {len(windows)} window of {length} tokens, of which none can be "
            "held out; give more text"
        )
    held = max(1, len(windows) // _HELD_OUT)
    owner = np.repeat(np.arange(len(windows)), [len(w) for w in windows])
    place = np.concatenate([np.arange(len(w)) for w in windows])
    is_held = owner >= len(windows) - held
    taken = np.sort(_drawn(rng, is_held, examples))
    owner, place, n_held = owner[taken], place[taken], int(is_held[taken].sum())

    @torch.no_grad()
    def write(into: np.ndarray) -> None:
        anatomy = lm.anatomy
        order = sorted(set(owner.tolist()), key=lambda w: -len(windows[w]))
        for start in tqdm(range(0, len(order), batch_size), desc="Running texts", disable=lm.rank != 0):
            batch = order[start : start + batch_size]
            at = np.concatenate([np.flatnonzero(owner == w) for w in batch])
            rows = torch.from_numpy(np.repeat(np.arange(len(batch)), [int((owner == w).sum()) for w in batch]))
            positions = torch.from_numpy(place[at])

            def after_block(state: BlockState, at: Any = at, rows: Any = rows, positions: Any = positions) -> Any:
                device = state.hidden.device
                into[state.block - 1, at] = state.hidden[rows.to(device), positions.to(device)].float().cpu().numpy()
                return torch.empty(0, dtype=torch.long) if state.block == anatomy.n_blocks else None

            with lm._autocast():
                run_blocks(anatomy, padded(anatomy, [windows[w] for w in batch]), after_block)

    digest = hashlib.sha256(repr([windows[w] for w in sorted(set(owner.tolist()))]).encode() + taken.tobytes())
    described = {
        "texts": [Path(f).name for f in files],
        "texts_hash": digest.hexdigest()[:16],
        "windows": len(windows),
        "window": length,
    }
    return Examples(len(taken), n_held, described, write)


def of_traces(lm: AdaInferLM, paths: Sequence[str | Path], examples: int, seed: int) -> Examples:
    """Decisions that traces recorded with their states (``adainfer trace --hidden``).

    Args:
        lm: The model, whose norm and head read them.
        paths: Trace files, and folders of them.
        examples: N at most.
        seed: Of the draw.

    Raises:
        AdaInferError: On a trace of another model, without states, or with states that are not finite.
    """
    rng = np.random.default_rng(seed)
    anatomy = lm.anatomy
    files = trace_file.find(paths)
    whole: list[np.ndarray] = []
    documents: list[tuple[int, int]] = []
    tasks = []
    for number, (path, meta, arrays) in enumerate(trace_file.read_of_one_model(files)):
        same_weights = str(lm._dtype()) != meta.get("dtype") or anatomy.weights_hash() == meta.get("weights_hash")
        same_head = (meta["n_blocks"], meta["head_hash"]) == (anatomy.n_blocks, anatomy.head_hash())
        if not (same_head and same_weights):
            raise AdaInferError(
                f"traces: {path} is of {meta['model']} ({meta['n_blocks']} blocks), and model_args name another model; "
                "give the model that was traced"
            )
        found = arrays.get("hidden")
        if found is None:
            raise AdaInferError(f"traces: {path} holds no hidden states; trace again with --hidden")
        shape = (len(arrays["top_token"]), anatomy.n_blocks, anatomy.block_hidden_size)
        if found.shape != shape or found.dtype.kind != "f":
            raise AdaInferError(
                f"traces: the array hidden of {path} is {found.dtype} of shape {found.shape}, not floats of shape "
                f"{shape}; trace again"
            )
        if not np.isfinite(found).all():
            raise AdaInferError(
                f"traces: the hidden states of {path} are NaN or too large for float16; fit the reader on texts, with "
                "--text"
            )
        whole.append(found)
        documents += [(number, int(d)) for d in arrays.get("doc_id", np.arange(shape[0]))]
        tasks.append(meta["task"])
    _, owner = np.unique(np.array(documents), axis=0, return_inverse=True)
    owner = owner.reshape(-1)
    n_documents = int(owner.max(initial=-1)) + 1
    if n_documents < 2:
        raise AdaInferError("traces: they hold fewer than 2 documents, so none can be held out; trace more of them")
    held = rng.permutation(n_documents)[: max(1, n_documents // _HELD_OUT)]
    is_held = np.isin(owner, held)
    taken = _drawn(rng, is_held, examples)
    starts = np.cumsum([0, *map(len, whole)])

    def write(into: np.ndarray) -> None:
        for part, start in zip(whole, starts, strict=False):
            here = np.flatnonzero((taken >= start) & (taken < start + len(part)))
            into[:, here] = part[taken[here] - start].transpose(1, 0, 2)

    digest = hashlib.sha256(taken.tobytes())
    for part in whole:
        digest.update(part.tobytes())
    described = {
        "tasks": sorted(set(tasks)),
        "states_hash": digest.hexdigest()[:16],
        "files": len(files),
        "documents": n_documents,
    }
    return Examples(len(taken), int(is_held[taken].sum()), described, write)


def stored(examples: Examples, path: Path, n_blocks: int, hidden_size: int) -> Callable[[int], Tensor]:
    """Store the states in a file, unless it is there; what a killed run left half written is written anew.

    Returns:
        Block (from 1) to its states [N, h], float32.

    Raises:
        AdaInferError: Where the file can't be written or has no room, or states are not finite.
    """
    shape = (n_blocks, examples.n, hidden_size)
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            needed = 4 * n_blocks * examples.n * hidden_size
            if needed > shutil.disk_usage(path.parent).free:  # a mapped file that finds no room ends the process
                raise AdaInferError(
                    f"output: {path.parent} has no room for {needed / 1e6:,.0f} MB of states; give fewer examples"
                )
            _logger.info("%s holds %.0f MB of states until the reader is finished", path.parent, needed / 1e6)
            partial = path.with_suffix(".partial")
            array = np.memmap(partial, np.float32, "w+", shape=shape)
            examples.write(array)
            if not all(np.isfinite(block).all() for block in array):
                raise AdaInferError("model_args: the states of these texts are NaN or infinite; give another dtype")
            array.flush()
            os.replace(partial, path)
        array = np.memmap(path, np.float32, "r", shape=shape)
    except (OSError, ValueError) as error:
        raise AdaInferError(f"output: {path} can't be written or read ({error}); is there room beside it?") from None
    return lambda block: torch.from_numpy(np.array(array[block - 1]))


def _drawn(rng: np.random.Generator, is_held: np.ndarray, examples: int) -> np.ndarray:
    """Indices of at most so many positions, those that are held out behind the others."""
    n_held = max(1, examples // _HELD_OUT)
    found = []
    for part, most in ((np.flatnonzero(~is_held), examples - n_held), (np.flatnonzero(is_held), n_held)):
        found.append(part if len(part) <= most else rng.choice(part, most, replace=False))
    return np.concatenate(found)


def _texts(path: Path) -> Iterator[str]:
    """The texts of a file that have characters.

    Raises:
        AdaInferError: Where it is no text, or a line of a ``.jsonl`` has no ``text``.
    """
    if path.suffix not in (".txt", ".jsonl"):
        raise AdaInferError(f"text: {path} is neither a .txt nor a .jsonl file with a text in each line")
    try:
        whole = path.read_text(encoding="utf-8")
    except OSError as error:
        raise AdaInferError(f"text: {path} can't be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise AdaInferError(f"text: {path} is not in UTF-8; convert it") from None
    if path.suffix == ".txt":
        if whole.strip():
            yield whole
        return
    for number, line in enumerate(whole.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, TypeError, KeyError):
            text = None
        if not isinstance(text, str):
            raise AdaInferError(f'text: line {number} of {path} is no JSON object with a "text"')
        if text.strip():
            yield text
