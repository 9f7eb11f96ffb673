"""What a reader is: it says what the model would answer after a block, for stoppers, features and scores alike.

A reader maps the states after block k to states that final norm and output head read. ``head`` (the paper's) takes
them as they are and ``tuned`` sends each through an affine map of its block: both read a position on its own. ``copy``
and ``sim`` let a few tokens of the prompt go on through the later blocks (``prefill/reading.py``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lm_eval_adainfer.readers.tuned import Maps

KINDS = ("head", "copy", "sim", "tuned")


@dataclass(frozen=True, eq=False)
class Reader:
    """How blocks are read.

    Attributes:
        kind: One of ``KINDS``.
        window: W, how many of the prompt's last tokens go on; 0 where none do.
        maps: The affine maps of ``tuned``.
    """

    kind: str = "head"
    window: int = 0
    maps: Maps | None = None

    @property
    def name(self) -> str:
        """What ``reader=``, traces and records call it; maps are called by their hash."""
        if self.maps is not None:
            return f"tuned:{self.maps.fingerprint}"
        return f"{self.kind}:{self.window}" if self.runs_tokens else self.kind

    @property
    def runs_tokens(self) -> bool:
        """Whether tokens of the prompt run through later blocks, so that it reads prompts and no position alone."""
        return self.kind in ("copy", "sim")

    @property
    def width(self) -> int:
        """How many tokens of a long prompt run on: the window, and with ``sim`` the first token; 0 where none do."""
        return self.window + (self.kind == "sim")

    def translate(self, block: int, hidden: Tensor) -> Tensor:
        """[n, h], what norm and head read of states [n, h] after a block, where each is read on its own."""
        return hidden if self.maps is None else self.maps.apply(block, hidden)

    def flops(self, block: int) -> int:
        """Floating-point operations of :meth:`translate` for one position after a block."""
        return 0 if self.maps is None else self.maps.flops(block)

    def describe(self) -> dict[str, Any]:
        """What identifies the reader, JSON-serialisable; it goes into results and fingerprints."""
        return {"reader": self.name}

    def same(self, other: Reader) -> bool:
        """Whether both read alike."""
        return self.name == other.name


HEAD = Reader()
_PLACES = (0.65, 0.75, 0.85, 0.95)  # of L


def default_blocks(n_blocks: int) -> tuple[int, ...]:
    """After which blocks a reader that runs tokens is asked where nobody says: at most four of the last 40%."""
    return tuple(sorted({k for share in _PLACES if 1 <= (k := round(share * n_blocks)) < n_blocks}))
