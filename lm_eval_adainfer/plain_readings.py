"""What readers are, spelled out: one row, plain forwards of the whole model, hooks that put states in their places.

The reference of ``adainfer verify``. It shares nothing with the engine but the list of blocks, and has of the reader
only what it says of itself: its kind, its window, its arrays (docs/readers.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from lm_eval_adainfer.readers.base import Reader
from lm_eval_adainfer.structure.arguments import hidden_of, with_hidden

Change = Callable[[Tensor], Tensor]  # a block's output [1, S, h] -> what it hands on instead


class PlainReadings:
    """Reads rows under one reader, one row at a time.

    Args:
        blocks: The model's.
        reader: The reader.
        run: Runs the whole model on token ids, with these arguments besides: [S, V] float32 logits.
    """

    def __init__(self, blocks: Sequence[nn.Module], reader: Reader, run: Callable[..., Tensor]):
        self.blocks, self.reader, self.run = blocks, reader, run

    def logits(self, tokens: Sequence[int], prompt: int, k: int, behind: Sequence[int] = ()) -> Tensor:
        """Read one row after block k.

        Args:
            tokens: The row: a prompt, and what is scored behind it.
            prompt: Tokens of the prompt.
            k: The block.
            behind: Further tokens, which change nothing but rounding.

        Returns:
            [len(tokens) - prompt + 1, V], at the prompt's last token and at those behind it.
        """
        ids, n = [*tokens, *behind], len(self.blocks)
        away, window = self._away(prompt), slice(prompt - 1, len(tokens))
        if k == n:
            return self.run(ids)[window]
        if not self.reader.runs_tokens:
            return self._handed_on(ids, k)[window]
        if self.reader.kind == "sim" and away:
            left = self._after(ids, k)
            run = [0, *range(away, len(ids))]
            some = self._alone([ids[t] for t in run], run, {k: lambda hidden: left[:, run].to(hidden.device)})
            return some[prompt - away : len(tokens) - away + 1]
        left = self._after(ids, k)
        with self._changed({b: lambda hidden: _with_front(hidden, left[:, :away]) for b in range(k + 1, n + 1)}):
            return self.run(ids)[window]

    def logprobs(self, tokens: Sequence[int], prompt: int, k: int, behind: Sequence[int] = ()) -> Tensor:
        """:meth:`logits` as log-probabilities."""
        return self.logits(tokens, prompt, k, behind).log_softmax(-1)

    def next_token(self, prompt: Sequence[int], new: Sequence[int], k: int) -> Tensor:
        """[V] logits behind new tokens that follow a prompt which left after block k, under ``copy`` or ``sim``.

        New tokens go through all blocks, and see in the later ones what the prompt's tokens have left there: copies,
        and the states of those that ran on.
        """
        n, away = len(self.blocks), self._away(len(prompt))
        if not new or k == n or self.reader.kind == "copy" or not away:
            return self.logits([*prompt, *new], len(prompt), k)[-1]
        run, ran = [0, *range(away, len(prompt))], {}
        left = self._after(prompt, k)

        def noted(b: int) -> Change:
            def change(hidden: Tensor) -> Tensor:
                ran[b] = hidden
                return hidden.clone()  # some families add to it in place

            return change

        start: dict[int, Change] = {k: lambda hidden: left[:, run].to(hidden.device)}
        self._alone([prompt[t] for t in run], run, start | {b: noted(b) for b in range(k + 1, n + 1)})

        def put(b: int) -> Change:
            def change(hidden: Tensor) -> Tensor:
                hidden = _with_front(hidden, left)
                hidden[:, run] = ran[b]
                return hidden

            return change

        with self._changed({b: put(b) for b in range(k + 1, n + 1)}):
            return self.run([*prompt, *new])[-1]

    def _away(self, prompt: int) -> int:
        """How many of a prompt's tokens don't run on."""
        return max(0, prompt - self.reader.window)

    def _after(self, ids: Sequence[int], k: int) -> Tensor:
        """[1, S, h], the states after block k."""
        found: list[Tensor] = []

        def note(hidden: Tensor) -> Tensor:
            found.append(hidden)
            return hidden.clone()

        with self._changed({k: note}):
            self.run(ids)
        return found[0]

    def _alone(self, ids: Sequence[int], places: Sequence[int], changes: Mapping[int, Change]) -> Tensor:
        """[S, V] of some tokens of a row that see each other alone, at their own places in it."""
        with self._changed(changes):
            # without a mask, gaps between positions would be taken for the borders of packed texts
            return self.run(ids, position_ids=torch.tensor([places]), attention_mask=torch.ones(1, len(ids)).long())

    def _handed_on(self, ids: Sequence[int], k: int) -> Tensor:
        """[S, V] where later blocks hand on what block k has left, as the reader maps it."""
        kept: list[Tensor] = []

        def begin(hidden: Tensor) -> Tensor:
            kept.append(self._mapped(k, hidden))
            return kept[0].clone()

        def hand_on(hidden: Tensor) -> Tensor:
            return kept[0].to(hidden.device, copy=True)

        with self._changed({k: begin} | dict.fromkeys(range(k + 1, len(self.blocks) + 1), hand_on)):
            return self.run(ids)

    def _mapped(self, k: int, hidden: Tensor) -> Tensor:
        """A_k x + b_k in float64, from the arrays of ``tuned``; the states themselves under ``head``."""
        if self.reader.maps is None:
            return hidden
        arrays = {name: array[k - 1].astype(np.float64) for name, array in self.reader.maps.arrays.items()}
        matrix = arrays["weight"] if "weight" in arrays else arrays["up"] @ arrays["down"]
        x = hidden.double().cpu()
        mapped = x + x @ torch.from_numpy(matrix).T + torch.from_numpy(arrays["bias"])
        return mapped.to(hidden.device, hidden.dtype)

    @contextmanager
    def _changed(self, changes: Mapping[int, Change]) -> Iterator[None]:
        """Blocks hand on something else than they return."""
        handles = []
        for b, change in changes.items():

            def hook(module: nn.Module, args: object, output: object, change: Change = change) -> object:
                return with_hidden(output, change(hidden_of(output).clone()))

            handles.append(self.blocks[b - 1].register_forward_hook(hook))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _with_front(hidden: Tensor, front: Tensor) -> Tensor:
    """States [1, S, h] with others in front in place of their own."""
    return torch.cat([front.to(hidden.device), hidden[:, front.shape[1] :]], dim=1)
