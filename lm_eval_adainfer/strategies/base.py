"""What an exit strategy is: it reads a few features after a block and says stop or go on."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.readers.base import HEAD, Reader, default_blocks
from lm_eval_adainfer.strategies.features import Observation, Recorded, past_width, remember


class Stopper(ABC):
    """Says after a block which decisions stop.

    Subclasses set ``kind`` (what ``stopper=`` calls it), ``features`` (names from ``features.FEATURES``, in the
    order of the columns that :meth:`margin` gets) and, where they decide from more than one block, ``memory`` (how many
    numbers they keep per decision). Those that a stopper file can hold also have ``threshold`` (what :meth:`margin`
    subtracts), ``arrays``, :meth:`parameters`, ``info`` (where it comes from), ``seen`` and ``calibrated`` (the
    documents it was fitted on, and those its threshold was moved on: ``"task/split"`` to their indices) and ``reader``
    (under which it was fitted; None where it comes from no file).
    """

    kind: str
    features: tuple[str, ...] = ()
    memory: int = 0
    rises: bool = False  # whether it reads the head for ``gap`` or ``top_prob`` alone, and its margin grows with them
    removes_blocks: bool = False  # whether ``dropped_blocks`` are to be taken out of the model
    dropped_blocks: tuple[int, ...] = ()  # blocks that no document ever runs, known after :meth:`bind`
    arrays: Mapping[str, np.ndarray] = {}
    info: dict[str, Any] = {}
    seen: dict[str, list[int]] = {}
    calibrated: dict[str, list[int]] = {}
    reader: Reader | None = None

    @abstractmethod
    def margin(self, block: int, values: Tensor, memory: Tensor | None = None) -> Tensor:
        """How clearly to stop: positive means stop.

        Args:
            block: k, from 1 to L.
            values: [n, len(features)], float32 features at n decision positions.
            memory: [n, self.memory] float32, what this strategy noted at the block asked before (zeros at the first);
                to be changed in place. None where it keeps nothing.

        Returns:
            [n] margins, on the device of ``values``.
        """

    @property
    def carries(self) -> int:
        """Numbers kept per decision from one asked block to the next: the features' and the strategy's own."""
        return past_width(self.features) + self.memory

    def ask(self, seen: Observation | Recorded, values: Tensor, carried: Tensor | None) -> Tensor:
        """:meth:`margin`, with what is carried from block to block; never positive where a feature is not finite.

        Args:
            seen: What is seen after the block; its pasts are views of ``carried``.
            values: The features there.
            carried: [n, self.carries] float32, changed in place; None where nothing is.
        """
        memory = None if carried is None or not self.memory else carried[:, carried.shape[1] - self.memory :]
        margins = self.margin(seen.block, values, memory)
        remember(seen)
        return margins.masked_fill(~values.isfinite().all(dim=-1).to(margins.device), -torch.inf)

    def wants(self, block: int) -> bool:
        """Whether this strategy can stop after ``block`` at all; blocks it never stops at are not checked."""
        return True

    def bind(self, n_blocks: int) -> None:
        """Raise AdaInferError where the strategy does not fit a model of ``n_blocks`` blocks."""
        return None

    def parameters(self) -> dict[str, Any]:
        """What besides ``arrays`` rebuilds this strategy from its file, JSON-serialisable."""
        return {}

    @classmethod
    def rebuild(cls, arrays: Mapping[str, np.ndarray], **parameters: Any) -> Stopper:
        """The strategy that a stopper file of these arrays and parameters holds; rules have no arrays to take."""
        return cls(**parameters)

    @property
    def flops(self) -> int:
        """Floating-point operations of one decision (counted, see ``docs/numbers.md``)."""
        return len(self.features)

    def describe(self) -> dict[str, Any]:
        """What identifies the strategy, JSON-serialisable; it goes into results and fingerprints."""
        return {"kind": self.kind, "features": list(self.features)}

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change with whatever changes decisions."""
        return hashlib.sha256(json.dumps(self.describe(), sort_keys=True).encode()).hexdigest()[:16]


class Schedule:
    """After which blocks the stopper is asked.

    Args:
        n_blocks: L.
        stopper: The strategy.
        min_layer: No exit before this block (1 to L).
        check_layers: ``all``, ``every:2`` (blocks 2, 4, ...), a list like ``8+12+16``, or a sequence of ints. None: all
            blocks, but under a reader that runs tokens those that the stopper's file names, or ``default_blocks``.
        reader: How blocks are read.

    Raises:
        AdaInferError: Where an argument is out of range, or leaves ``fixed:N`` unchecked.

    Attributes:
        blocks: The checked blocks, in order; block L is never checked, because the forward ends there anyway.
    """

    def __init__(
        self, n_blocks: int, stopper: Stopper, min_layer: Any = 1, check_layers: Any = None, reader: Reader = HEAD
    ):
        stopper.bind(n_blocks)
        self.min_layer = _block_number("min_layer", min_layer, n_blocks)
        if check_layers is None:
            placed = reader.runs_tokens and bool(stopper.features)  # a stopper that asks nothing costs nothing to ask
            check_layers = (stopper.info.get("check_layers") or default_blocks(n_blocks)) if placed else "all"
        asked = _parse_check_layers(check_layers, n_blocks)
        wanted = [k for k in range(1, n_blocks) if stopper.wants(k)]
        self.blocks = tuple(k for k in wanted if k in asked and k >= self.min_layer)
        if wanted and not self.blocks and not stopper.features:  # fixed:N must mean block N
            raise AdaInferError(
                f"check_layers/min_layer: they leave out block {wanted[0]}, the only one after which "
                f"stopper={stopper.kind}:{wanted[0]} stops"
            )

    def describe(self) -> dict[str, Any]:
        """JSON-serialisable summary for results and fingerprints."""
        return {"min_layer": self.min_layer, "checked_blocks": list(self.blocks)}


def _block_number(argument: str, value: Any, n_blocks: int) -> int:
    try:
        number = int(str(value).strip())
    except ValueError:
        raise AdaInferError(f"{argument}: {value!r} is no block number; give 1 to {n_blocks}") from None
    if not 1 <= number <= n_blocks:
        raise AdaInferError(
            f"{argument}: block {number} does not exist in a model of {n_blocks} blocks; give 1 to {n_blocks}"
        )
    return number


def _parse_check_layers(value: Any, n_blocks: int) -> set[int]:
    if isinstance(value, (list, tuple, set, frozenset)):
        items = list(value)
    else:
        text = str(value).strip()
        if text == "all":
            return set(range(1, n_blocks + 1))
        if text.startswith("every:"):
            step = text.removeprefix("every:")
            if not step.isdecimal() or int(step) < 1:
                raise AdaInferError(f"check_layers: {text!r} has no whole step of 1 or more; give every:2, say")
            return set(range(int(step), n_blocks + 1, int(step)))
        items = text.split("+")
    if not items or any(not str(item).strip().isdecimal() for item in items):
        raise AdaInferError(f"check_layers: {value!r} is not all, every:N or a list of blocks like 8+12+16")
    return {_block_number("check_layers", item, n_blocks) for item in items}
