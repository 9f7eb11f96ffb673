"""ShortGPT (arXiv 2403.03853): some blocks never run, the same for every document."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.strategies.base import Stopper
from lm_eval_adainfer.strategies.fitted import FittedStopper, checked_arrays
from lm_eval_adainfer.strategies.rules import FixedStopper


class LastStopper(FixedStopper):
    """``shortgpt:lastN``: the last N blocks are skipped (paper, section 5.3), which is an exit after block L - N."""

    kind = "shortgpt"

    def __init__(self, last: int):
        super().__init__(0)  # the block is known when L is
        self.last = int(last)

    def parameters(self) -> dict[str, Any]:
        """N."""
        return {"last": self.last}

    def bind(self, n_blocks: int) -> None:
        """N must leave a block."""
        _check_number(self.last, n_blocks, f"shortgpt:last{self.last}")
        self.layer = n_blocks - self.last
        self.dropped_blocks = tuple(range(self.layer + 1, n_blocks + 1))

    def describe(self) -> dict[str, Any]:
        """Kind, N."""
        return {"kind": self.kind, "features": [], "last": self.last}


class ShortGPTStopper(FittedStopper):
    """``shortgpt:bi:N:FILE``: the N blocks of least Block Influence are taken out of the model when it is loaded.

    Every document then runs all blocks that are left; nothing is asked.

    Args:
        arrays: ``influence`` [L], each block's Block Influence (equation 1 of arXiv 2403.03853).
        drop: N; None for a quarter of the blocks, the setting of that paper.
        info: On which model and texts the influence was measured.

    Raises:
        AdaInferError: Where the numbers don't fit together.
    """

    kind = "shortgpt"
    removes_blocks = True

    def __init__(
        self, arrays: Mapping[str, np.ndarray], drop: int | None = None, info: Mapping[str, Any] | None = None
    ):
        if "influence" not in arrays or arrays["influence"].ndim != 1:
            raise AdaInferError("stopper: a shortgpt needs the array influence, a number per block")
        n_blocks = len(arrays["influence"])
        self.arrays = checked_arrays(arrays, {"influence": (n_blocks,)}, self.kind)
        self.drop = max(1, round(n_blocks / 4)) if drop is None else int(drop)
        _check_number(self.drop, n_blocks, f"shortgpt:bi:{self.drop}")
        least = np.argsort(self.arrays["influence"], kind="stable")[: self.drop]
        self.dropped_blocks = tuple(sorted((least + 1).tolist()))
        self.info: dict[str, Any] = dict(info or {})

    @classmethod
    def rebuild(cls, arrays: Mapping[str, np.ndarray], **parameters: Any) -> Stopper:
        """The strategy of kind ``shortgpt`` that a stopper file holds: of the last blocks, or by Block Influence."""
        return LastStopper(**parameters) if "last" in parameters else cls(arrays, **parameters)

    def bind(self, n_blocks: int) -> None:
        """The influence must have been measured on as many blocks."""
        if n_blocks != len(self.arrays["influence"]):
            raise AdaInferError(
                f"stopper: this shortgpt was measured on a model of {len(self.arrays['influence'])} blocks, not of "
                f"{n_blocks}; measure this one with adainfer influence"
            )

    def wants(self, block: int) -> bool:
        """Never: what is left always runs."""
        return False

    def margin(self, block: int, values: Tensor, memory: Tensor | None = None) -> Tensor:
        """Never positive."""
        return torch.full((values.shape[0],), -1.0, device=values.device)

    @property
    def flops(self) -> int:
        """It computes nothing."""
        return 0

    def parameters(self) -> dict[str, Any]:
        """N."""
        return {"drop": self.drop}

    def describe(self) -> dict[str, Any]:
        """As every fitted strategy's, and the dropped blocks."""
        return {**super().describe(), "dropped_blocks": list(self.dropped_blocks)}


def _check_number(dropped: int, n_blocks: int, what: str) -> None:
    if not 1 <= dropped < n_blocks:
        raise AdaInferError(
            f"stopper: {what} can't drop {dropped} of {n_blocks} blocks; give 1 to {n_blocks - 1}"
        )
