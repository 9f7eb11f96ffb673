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
        logits: [n, V], which scoring can use again; None where no feature has read the whole head.
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
    choices: Sequence[Sequence[int]] | None = None,
    read: Tensor | None = None,
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
        choices: Per decision, the token ids of its choices where they are one token each, else nothing; None where no
            decision has any. A stopper that reads the choices alone has only their rows of the head read, and all of it
            where :func:`reads_head` says so.
        read: [n, h], what norm and head are to read, where tokens had to run for it (``copy``, ``sim``); None for the
            states at ``points``, as ``reader`` translates them.
    """
    rows, positions = points
    names, device = stopper.features, state.hidden.device

    def states() -> Tensor:
        return reader.translate(state.block, state.hidden[rows, positions]) if read is None else read

    if logits is None and (features.needs_head(names) if choices is None else reads_head(stopper, anatomy)):
        logits = anatomy.logits(states())
    seen = None
    if features.needs_choices(names):
        tokens = choices if choices is not None else [()] * len(rows)
        if logits is not None and choices is not None:
            seen = features.choices_of(logits.to(device), tokens)
        else:
            seen = features.read_choices(tokens, lambda at, some: anatomy.logits(states()[at], some), device)
    observed = features.observe(names, state, rows, positions, logits, anatomy.n_blocks, carried, seen)
    margins = stopper.ask(observed, features.compute(names, observed), carried)
    return Asked((margins > 0).tolist(), logits)


def reads_head(stopper: Stopper, anatomy: Anatomy) -> bool:
    """Whether asking this stopper about documents reads the whole output head.

    It does so for the choices alone where the model's head can't be read for a few tokens.
    """
    names = stopper.features
    return features.needs_head(names) or (features.needs_choices(names) and not anatomy.reads_few_tokens)


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
