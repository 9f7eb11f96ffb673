"""Early-exit decoding: every new token may leave at its own block, and later tokens see the right cache.

What a later token finds in the cache where earlier ones left is up to ``policies``, which tokens leave is up to
``decisions``, and how the tokens that a block has to run are laid out is up to ``layouts``.

An exit saves prefill too: the prompt is run only as deep as some token needs. Nothing a row computes reads another row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lm_eval_adainfer.generation.decoded import Decoded
from lm_eval_adainfer.generation.state import DecoderState
from lm_eval_adainfer.generation.step import Step
from lm_eval_adainfer.readers.base import HEAD, Reader
from lm_eval_adainfer.strategies.base import Schedule, Stopper
from lm_eval_adainfer.structure.anatomy import Anatomy
from lm_eval_adainfer.structure.calls import hooked
from lm_eval_adainfer.structure.windows import Windows


class Decoder:
    """Decodes a batch of rows, one token of every row per step.

    Args:
        anatomy: The model.
        stopper: Says after a block whether a new token leaves.
        schedule: After which blocks it is asked.
        windows: How the blocks' arguments follow a step (``probes.prepare``).
        prompts: Token ids of the rows.
        max_new_tokens: Room to make.
        kv_policy: As :class:`DecoderState`'s.
        shortlist: As :class:`DecoderState`'s.
        reader: As :class:`DecoderState`'s.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        stopper: Stopper,
        schedule: Schedule,
        windows: Windows,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        kv_policy: str = "recompute",
        shortlist: int = 0,
        reader: Reader = HEAD,
    ):
        self.anatomy = anatomy
        self.state = DecoderState(
            anatomy, stopper, schedule, windows, prompts, max_new_tokens, kv_policy, shortlist, reader
        )
        self.current: Step | None = None
        self._attached = False

    @property
    def rows(self) -> list[int]:
        """The rows still being decoded, by their number in the batch."""
        return self.state.rows

    @property
    def results(self) -> list[Decoded]:
        """What was decoded so far, for every row of the batch."""
        return self.state.results

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Keep the hooks on the model from step to step."""
        with hooked(self.anatomy, self, self.state.parts):
            self._attached = True
            try:
                yield
            finally:
                self._attached = False

    def pre_hook(self, k: int, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Hand on to the step."""
        return self.current.pre_hook(k, args, kwargs) if self.current is not None else None

    def part_hook(self, which: str, output: Any) -> None:
        """Hand on to the step."""
        if self.current is not None:
            self.current.part_hook(which, output)

    def post_hook(self, k: int, output: Any) -> Any:
        """Hand on to the step."""
        return self.current.post_hook(k, output) if self.current is not None else None

    @torch.no_grad()
    def step(self) -> Tensor:
        """Run every row's newest token as deep as it needs.

        Returns:
            [rows, V] float32 logits of each row at its exit block.
        """
        if not self._attached:
            with self.attached():
                return self.step()
        self.current = Step(self.state)
        try:
            return self.current.run()
        finally:
            self.current = None

    def append(self, tokens: Sequence[int], finished: Sequence[bool]) -> None:
        """Add each row's chosen token; rows that are finished leave the batch."""
        self.state.append(tokens, finished)
