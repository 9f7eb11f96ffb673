"""Strategies without fitting: thresholds on what a block says or does, patience, or a given block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.strategies.base import Stopper


class NoStopper(Stopper):
    """``none``: the dense model."""

    kind = "none"

    def wants(self, block: int) -> bool:
        """Never."""
        return False

    def margin(self, block: int, values: Tensor, memory: Tensor | None = None) -> Tensor:
        """Never positive."""
        return torch.full((values.shape[0],), -1.0, device=values.device)


class GapStopper(Stopper):
    """``gap:T``: stop when P(top 1) - P(top 2) exceeds T (paper: 0.8, section 5.3).

    Raises:
        AdaInferError: Where T is not in [0, 1].
    """

    kind = "gap"
    features = ("gap",)
    rises = True

    def __init__(self, threshold: float = 0.8):
        if not 0.0 <= threshold <= 1.0:
            raise AdaInferError(
                f"stopper: {self.kind}:{threshold:g} has no threshold between 0 and 1; give {self.kind}:0.8, say"
            )
        self.threshold = threshold

    def parameters(self) -> dict[str, Any]:
        """The threshold."""
        return {"threshold": self.threshold}

    def margin(self, block: int, values: Tensor, memory: Tensor | None = None) -> Tensor:
        """The one feature minus threshold."""
        return values[:, 0] - self.threshold

    def describe(self) -> dict[str, Any]:
        """Kind, features, threshold."""
        return {**super().describe(), "threshold": self.threshold}


class SoftmaxStopper(GapStopper):
    """``softmax:T``: CALM's softmax measure (arXiv 2207.07061, section 3.5): ``gap:T`` under its other name.

    CALM lets T decay over a generated text; here it is constant, since a strategy knows the block, not the token.
    """

    kind = "softmax"


class SaturationStopper(GapStopper):
    """``saturation:T``: CALM's hidden-state saturation (section 3.5): stop when cos(block k, block k - 1) exceeds T.

    It never reads the head. After block 1 the cosine is against the embedding output.
    """

    kind = "saturation"
    features = ("cos_hidden",)
    rises = False

    def margin(self, block: int, values: Tensor, memory: Tensor | None = None) -> Tensor:
        """The cosine minus threshold; rounding may put a cosine above 1, and a threshold of 1 never stops."""
        return super().margin(block, values.clamp(max=1.0), memory)


class PatienceStopper(Stopper):
    """``patience:k``: stop when k asked blocks in a row have the same top token (PABEE, arXiv 2006.04152).

    PABEE counts how often a prediction was confirmed, so its patience t is k = t + 1 here.

    Args:
        blocks: k, 1 or more; 1 stops after the first asked block.

    Raises:
        AdaInferError: Where k is no whole number of 1 or more.
    """

    kind = "patience"
    features = ("agreement",)

    def __init__(self, blocks: int):
        if blocks != int(blocks) or blocks < 1:
            raise AdaInferError(f"stopper: patience:{blocks} names no number of 1 or more; give patience:3, say")
        self.blocks = int(blocks)

    def parameters(self) -> dict[str, Any]:
        """K."""
        return {"blocks": self.blocks}

    def margin(self, block: int, values: Tensor, memory: Tensor | None = None) -> Tensor:
        """Agreement minus k, plus a half: both are whole numbers, and k is enough."""
        return values[:, 0] - self.blocks + 0.5

    def describe(self) -> dict[str, Any]:
        """Kind, features, k."""
        return {**super().describe(), "blocks": self.blocks}


class ChoiceGapStopper(GapStopper):
    """``choice_gap:T:N``: stop when P(best) - P(second) among the choices exceeded T after N asked blocks in a row.

    It reads the choices' rows of the head alone, and stops at no decision without choices of one token each.

    Args:
        threshold: T.
        blocks: N, this block included.

    Raises:
        AdaInferError: Where T is not in [0, 1], or N is no whole number of 1 or more.
    """

    kind = "choice_gap"
    features = ("choice_gap",)
    rises = False

    def __init__(self, threshold: float = 0.5, blocks: int = 1):
        super().__init__(threshold)
        if blocks != int(blocks) or blocks < 1:
            raise AdaInferError(
                f"stopper: {self.kind}:{threshold:g}:{blocks} names no number of blocks of 1 or more; give "
                f"{self.kind}:0.5:3, say"
            )
        self.blocks = int(blocks)
        self.memory = self.blocks - 1  # the gaps of the blocks asked before, plus 1, so that 0 is none

    def parameters(self) -> dict[str, Any]:
        """Threshold, N."""
        return {**super().parameters(), "blocks": self.blocks}

    def margin(self, block: int, values: Tensor, memory: Tensor | None = None) -> Tensor:
        """The least of the last N gaps minus threshold; a block that was not asked counts as -1."""
        if memory is None:
            return super().margin(block, values)
        last = torch.cat([memory, values + 1], dim=1)
        memory[:] = last[:, 1:]
        return last.amin(dim=1) - 1 - self.threshold

    def describe(self) -> dict[str, Any]:
        """Kind, features, threshold, N."""
        return {**super().describe(), "blocks": self.blocks}


class FixedStopper(Stopper):
    """``fixed:N``: always after block N, without asking the head."""

    kind = "fixed"

    def __init__(self, layer: int):
        self.layer = int(layer)

    def parameters(self) -> dict[str, Any]:
        """N."""
        return {"layer": self.layer}

    def bind(self, n_blocks: int) -> None:
        """N must be a block of the model."""
        if not 1 <= self.layer <= n_blocks:
            raise AdaInferError(
                f"stopper: fixed:{self.layer} names no block of this model; its {n_blocks} blocks are 1 to {n_blocks}"
            )

    def wants(self, block: int) -> bool:
        """Only block N."""
        return block == self.layer

    def margin(self, block: int, values: Tensor, memory: Tensor | None = None) -> Tensor:
        """Positive at block N."""
        return torch.full((values.shape[0],), 1.0 if block == self.layer else -1.0, device=values.device)

    @property
    def flops(self) -> int:
        """It computes nothing."""
        return 0

    def describe(self) -> dict[str, Any]:
        """Kind, features, layer."""
        return {**super().describe(), "layer": self.layer}
