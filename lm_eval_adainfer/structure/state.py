"""What is known after a block for the rows still in flow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class BlockState:
    """What is known after block ``block`` for the n rows still in flow (S tokens each).

    Attributes:
        block: k, from 1 to L.
        hidden: [n, S, h], the block's output.
        before: [n, S, h], the block's input (for k = 1 the embedding output).
        parts: ``"attn"`` / ``"mlp"`` -> [n, S, h], output of that part of the block, where captured.
        parts_before: The same of the previous block (empty for k = 1).
    """

    block: int
    hidden: Tensor
    before: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)
    parts_before: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def at(cls, states: Sequence[BlockState], points: Sequence[tuple[int, int, int]]) -> BlockState:
        """Some tokens of several batches after the same block, as n rows of one token.

        Args:
            states: The batches' states.
            points: n of (batch, row, position); those of a batch stand together, batches in order.
        """
        index = {n: torch.tensor([p[1:] for p in points if p[0] == n]).T for n in {p[0] for p in points}}

        def gather(tensors: Sequence[Tensor]) -> Tensor:
            found = []
            for n in sorted(index):
                rows, positions = index[n] = index[n].to(tensors[n].device)
                found.append(tensors[n][rows, positions])
            return torch.cat(found)[:, None]

        first = states[0]
        return cls(
            first.block,
            gather([state.hidden for state in states]),
            gather([state.before for state in states]),
            {name: gather([state.parts[name] for state in states]) for name in first.parts},
            {name: gather([state.parts_before[name] for state in states]) for name in first.parts_before},
        )
