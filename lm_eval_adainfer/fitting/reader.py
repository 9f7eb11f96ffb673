"""Fitting a tuned lens, block by block: each finished block is a checkpoint beside the file that is to be.

Every block has a draw of its own, so that what a killed command left is what the whole one would have made.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

from lm_eval_adainfer import container
from lm_eval_adainfer._version import __version__
from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.fitting import reader_examples
from lm_eval_adainfer.fitting.reader_examples import Examples
from lm_eval_adainfer.fitting.reader_maps import Training, block_map
from lm_eval_adainfer.readers.tuned import Maps
from lm_eval_adainfer.structure.hashes import signs_hash

if TYPE_CHECKING:
    from lm_eval_adainfer.harness.model import AdaInferLM

MOST_BYTES = 300 * 10**6  # of a file in float32; larger ones are float16
_PART = "part"
_logger = logging.getLogger(__name__)


def fit(lm: AdaInferLM, examples: Examples, output: str | Path, how: Training) -> Maps:
    """Fit the maps of all blocks but the last; finished blocks that an equal, killed call left are taken over.

    Args:
        lm: The model.
        examples: From ``reader_examples``.
        output: Where the maps will be written, beside which finished blocks and states lie until then.
        how: How.

    Returns:
        The maps; ``info["held_out"]`` has the figures of every block (``reader_maps.block_map``).

    Raises:
        AdaInferError: Where the model has one block, a number makes no sense, or the folder can't be written to.
    """
    anatomy = lm.anatomy
    if anatomy.n_blocks < 2:
        raise AdaInferError("model_args: a model of one block needs no reader")
    anatomy.keep_head_loaded()
    width, rank = anatomy.block_hidden_size, how.rank_for(anatomy.block_hidden_size)
    info = {
        "model": lm._model_name(),
        "n_blocks": anatomy.n_blocks,
        "head_hash": anatomy.head_hash(),
        "signs_hash": signs_hash(anatomy.model),
        "dtype": str(lm._dtype()),
        **examples.described,
        "examples": examples.n - examples.n_held_out,
        "examples_held_out": examples.n_held_out,
        **{name: getattr(how, name) for name in ("epochs", "learning_rate", "batch", "seed")},
        "rank": rank,
        "versions": {"lm_eval_adainfer": __version__, "torch": torch.__version__},
    }
    numbers = (anatomy.n_blocks - 1) * (width + (2 * rank if rank else width) * width)
    dtype: Any = np.float16 if 4 * numbers > MOST_BYTES else np.float32
    identity = json.dumps({**info, "weights_hash": anatomy.weights_hash()}, sort_keys=True)
    tag = hashlib.sha256(identity.encode()).hexdigest()[:16]
    folder = parts_folder(output)
    if folder.is_dir() and not any(tag in file.name for file in folder.iterdir()):
        _logger.warning("output: %s is of a command with other settings, so this one begins anew", folder)
        shutil.rmtree(folder, ignore_errors=True)
    states = reader_examples.stored(examples, folder / f"states-{tag}.f32", anatomy.n_blocks, width)
    last, found = states(anatomy.n_blocks), []
    for block in tqdm(range(1, anatomy.n_blocks), desc="Fitting maps", unit="block", disable=lm.rank != 0):
        file = folder / f"block-{block:04d}-{tag}.part"
        part = _read_part(file)
        if part is None:
            with lm._autocast():
                part = block_map(lm, states(block), last, examples.n_held_out, block, how, dtype)
            container.write(file, _PART, 1, part[1], part[0])
        found.append(part)
    arrays = {name: np.stack([block[name] for block, _ in found]) for name in found[0][0]}
    return Maps(arrays, {**info, "held_out": [figures for _, figures in found]})


def parts_folder(output: str | Path) -> Path:
    """Where states and finished blocks lie while maps are fitted."""
    return Path(output).with_name(f"{Path(output).name}.parts")


def forget_parts(output: str | Path) -> None:
    """Remove what lies beside a finished file."""
    shutil.rmtree(parts_folder(output), ignore_errors=True)


def _read_part(file: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
    """A finished block's arrays and figures; None where there is none, or it can't be read."""
    if not file.exists():
        return None
    try:
        figures, arrays = container.read(file, _PART, 1, "output")
    except AdaInferError:
        return None
    return arrays, figures
