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

from lm_eval_adainfer.generation import prefill
from lm_eval_adainfer.generation.decoded import Decoded
from lm_eval_adainfer.generation.prompts import PromptExits
from lm_eval_adainfer.generation.state import DecoderState
from lm_eval_adainfer.generation.step import Step
from lm_eval_adainfer.prefill.prefixes import Prefix
from lm_eval_adainfer.strategies.base import Schedule, Stopper
from lm_eval_adainfer.structure.anatomy import Anatomy
from lm_eval_adainfer.structure.calls import hooked
from lm_eval_adainfer.structure.few_rows import quick
from lm_eval_adainfer.structure.windows import Windows

SLACK = 64  # slots beyond a row's own, so that rows need not be moved at every step


class Decoder:
    """Decodes rows, one token of every row per step; others can join where some are finished.

    Args:
        anatomy: The model.
        stopper: Says after a block whether a new token leaves.
        schedule: After which blocks it is asked.
        windows: How the blocks' arguments follow a step (``probes.prepare``).
        prompts: Token ids of the first rows.
        max_new_tokens: Room to make behind the longest of these; without prompts, for whole rows.
        places: Rows at once, at most; None for these.
        prompt_exits: What decides how deep prompts go; None where the first new token's decision does.
        options: ``kv_policy``, ``shortlist``, ``screen`` and ``reader`` as :class:`DecoderState`'s.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        stopper: Stopper,
        schedule: Schedule,
        windows: Windows,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        places: int | None = None,
        prompt_exits: PromptExits | None = None,
        **options: Any,
    ):
        self.anatomy, self.prompt_exits = anatomy, prompt_exits
        capacity = max(map(len, prompts), default=0) + max_new_tokens + SLACK
        self.state = DecoderState(anatomy, stopper, schedule, windows, places or len(prompts), capacity, **options)
        self.current: Step | None = None
        self._attached = False
        if prompts:
            self.join(prompts)

    @property
    def rows(self) -> list[int]:
        """The rows that are being decoded, by their numbers, in the order of :meth:`step`'s logits."""
        state = self.state
        return [state.rows[place] for place in state.joined] if state.joined else list(state.rows)

    @property
    def results(self) -> list[Decoded]:
        """What was decoded so far, for every row that ever joined."""
        return self.state.results

    def texts(self) -> list[Tensor]:
        """[n] token ids of each row that is stepped, prompt and new tokens."""
        state = self.state
        return [state.text(place) for place in state.joined or range(len(state.rows))]

    def join(self, prompts: Sequence[Sequence[int]], prefix: Prefix | None = None) -> list[int]:
        """As :meth:`DecoderState.join`; the next step runs these prompts, and nothing else."""
        return self.state.join(prompts, prefix)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Keep the hooks on the model from step to step, and have its linear maps compute few rows quickly."""
        with quick(self.anatomy.blocks), hooked(self.anatomy, self, self.state.parts):
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
        """Run every row's newest token as deep as it needs; or, where rows have joined, these rows' prompts.

        Returns:
            [rows, V] float32 logits of each row at its exit block.
        """
        if not self._attached:
            with self.attached():
                return self.step()
        if self.state.joined:
            return prefill.run(self.state) if self.prompt_exits is None else self.prompt_exits.run(self.state)
        self.current = Step(self.state)
        try:
            return self.current.run()
        finally:
            self.current = None

    def append(self, tokens: Sequence[int], finished: Sequence[bool]) -> None:
        """Add each stepped row's chosen token; rows that are finished leave."""
        self.state.append(tokens, finished)
