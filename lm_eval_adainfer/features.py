"""The features a stopper may read after a block (``docs/numbers.md``, paper section 4.1): one function each.

All are computed at the decision positions only. ``gap`` and ``top_prob`` come from the full vocabulary's softmax in
float32; the cosines compare a block with the previous one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.forward import BlockState


class Observation:
    """What can be seen after one block at n decision positions.

    Args:
        state: The block's state.
        rows: [n], indices into the state's rows.
        positions: [n], token positions in these rows.
        logits: [n, V], final norm and head of the hidden states there; None where no feature needs them.
    """

    def __init__(self, state: BlockState, rows: Tensor, positions: Tensor, logits: Tensor | None):
        self.state, self.rows, self.positions, self.logits = state, rows, positions, logits

    @cached_property
    def top2(self) -> Tensor:
        """[n, 2], the two greatest probabilities over the full vocabulary, float32."""
        assert self.logits is not None
        return self.logits.float().softmax(dim=-1).topk(2, dim=-1).values

    def at(self, tensor: Tensor) -> Tensor:
        """[n, h] of a [rows, S, h] tensor, at the decision positions."""
        return tensor[self.rows.to(tensor.device), self.positions.to(tensor.device)]

    def part_cosine(self, which: str) -> Tensor:
        """[n], cosine between this block's and the previous block's part; 0 for block 1 (it has no previous one)."""
        now = self.at(self.state.parts[which])
        if which not in self.state.parts_before:
            return now.new_zeros(now.shape[0], dtype=torch.float32)
        return cosine(now, self.at(self.state.parts_before[which]))


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """[n], cosine similarity of the rows of two [n, h] tensors, in float32."""
    return torch.nn.functional.cosine_similarity(a.float(), b.to(a.device).float(), dim=-1)


def gap(seen: Observation) -> Tensor:
    """P(top 1) - P(top 2), in [0, 1]."""
    return seen.top2[:, 0] - seen.top2[:, 1]


def top_prob(seen: Observation) -> Tensor:
    """P(top 1), in (0, 1]."""
    return seen.top2[:, 0]


def cos_hidden(seen: Observation) -> Tensor:
    """Cosine of the block's output and its input (block 1: the embedding output), in [-1, 1]."""
    return cosine(seen.at(seen.state.hidden), seen.at(seen.state.before))


def cos_attn(seen: Observation) -> Tensor:
    """Cosine of the attention output and the previous block's, before the residual addition; 0 for block 1."""
    return seen.part_cosine("attn")


def cos_mlp(seen: Observation) -> Tensor:
    """Cosine of the MLP output and the previous block's, before the residual addition; 0 for block 1."""
    return seen.part_cosine("mlp")


FEATURES: dict[str, Callable[[Observation], Tensor]] = {
    f.__name__: f for f in (gap, top_prob, cos_attn, cos_mlp, cos_hidden)
}
_NEEDS_HEAD = {"gap", "top_prob"}
_NEEDS_PART = {"cos_attn": "attn", "cos_mlp": "mlp"}


def check_names(names: Sequence[str], argument: str) -> None:
    """Raise AdaInferError where a name is not a feature's."""
    if not names:
        raise AdaInferError(f"{argument}: no feature is named; the features are {', '.join(FEATURES)}")
    for name in names:
        if name not in FEATURES:
            raise AdaInferError(f"{argument}: {name!r} is no feature; the features are {', '.join(FEATURES)}")


def needs_head(names: Sequence[str]) -> bool:
    """Whether any of these features reads the output head."""
    return any(name in _NEEDS_HEAD for name in names)


def needed_parts(names: Sequence[str]) -> list[str]:
    """Which parts of a block (``attn``, ``mlp``) these features read."""
    return [part for name, part in _NEEDS_PART.items() if name in names]


def compute(names: Sequence[str], seen: Observation) -> Tensor:
    """[n, len(names)] float32: the named features at the decision positions."""
    device = seen.state.hidden.device
    columns = [FEATURES[name](seen).to(device) for name in names]
    return torch.stack(columns, dim=-1) if columns else torch.empty(len(seen.rows), 0, device=device)
