"""Asking a stopper after a block: read the output head if it is needed, observe, compute, decide, remember."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lm_eval_adainfer.readers.base import HEAD, Reader
from lm_eval_adainfer.strategies import features
from lm_eval_adainfer.strategies.base import Stopper
from lm_eval_adainfer.structure.anatomy import Anatomy
from lm_eval_adainfer.structure.state import BlockState


class Asked(NamedTuple):
    """What a stopper says about n decisions.

    Attributes:
        stops: Whether each of them stops.
        logits: [n, V], which scoring can use again; None where no feature has read the head.
    """

    stops: list[bool]
    logits: Tensor | None


def ask(
    stopper: Stopper,
    anatomy: Anatomy,
    state: BlockState,
    points: tuple[Tensor, Tensor],
    carried: Tensor | None = None,
    logits: Tensor | None = None,
    reader: Reader = HEAD,
) -> Asked:
    """Ask a stopper about n decisions after a block.

    Args:
        stopper: The strategy.
        anatomy: The model, whose head is read where the stopper's features need it.
        state: The block's.
        points: Rows of the state and token positions in them, [n] each, on the device of ``state.hidden``.
        carried: [n, stopper.carries], what the stopper keeps of each decision from one asked block to the next; it is
            changed in place. None where the stopper keeps nothing.
        logits: [n, V] where the head has been read already, or has been read for some candidates alone.
        reader: How the block is read, position by position.
    """
    rows, positions = points
    if logits is None and features.needs_head(stopper.features):
        logits = anatomy.logits(reader.translate(state.block, state.hidden[rows, positions]))
    observed = features.observe(stopper.features, state, rows, positions, logits, anatomy.n_blocks, carried)
    margins = stopper.ask(observed, features.compute(stopper.features, observed), carried)
    return Asked((margins > 0).tolist(), logits)


class Carried:
    """What a stopper keeps of decisions that are asked in changing company, by a key for each decision.

    Args:
        width: ``stopper.carries``.
    """

    def __init__(self, width: int):
        self.width = width
        self._kept: dict[Hashable, Tensor] = {}

    def of(self, decisions: Sequence[Hashable], device: torch.device) -> Tensor | None:
        """[n, width], zeros for a decision that has not been asked; None where the stopper keeps nothing."""
        if not self.width:
            return None
        fresh = torch.zeros(self.width, device=device)
        return torch.stack([self._kept.get(key, fresh).to(device) for key in decisions])

    def keep(self, decisions: Sequence[Hashable], carried: Tensor | None) -> None:
        """Keep what ``ask`` has left in the tensor that :meth:`of` gave."""
        if carried is not None:
            self._kept.update(zip(decisions, carried, strict=True))
