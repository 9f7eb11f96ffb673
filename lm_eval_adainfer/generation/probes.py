"""A probe of generation: do tokens that leave at scripted blocks get a plain forward's logits, and in which layout?"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from lm_eval_adainfer.generation.decoder import Decoder
from lm_eval_adainfer.strategies.base import Schedule, Stopper
from lm_eval_adainfer.structure.anatomy import Anatomy
from lm_eval_adainfer.structure.rounding import logits_distance, probed
from lm_eval_adainfer.structure.windows import Windows, no_cache, watch_windows


class _Script(Stopper):
    """Leaves as a list says, step by step and row by row; for :func:`prepare`."""

    kind = "script"
    features = ("cos_hidden",)

    def __init__(self, exits: list[list[int]]):
        self.exits = [list(row) for row in exits]
        self.open: list[int] = []

    def margin(self, block: int, values: Tensor, memory: Tensor | None = None) -> Tensor:
        """Positive where the script says so; it is asked for all rows that have not left, in order."""
        if block == 1:
            self.now, self.open = self.exits.pop(0), list(range(len(values)))
        stops = [self.now[row] == block for row in self.open]
        self.open = [row for row, stop in zip(self.open, stops, strict=True) if not stop]
        return torch.tensor([1.0 if stop else -1.0 for stop in stops], device=values.device)


@torch.no_grad()
def prepare(anatomy: Anatomy) -> Windows:
    """Find out how this model can be decoded with early exit, and check it on a few tokens.

    Rows of different lengths leave at scripted blocks; then all run to the end, where their logits have to be those of
    a plain forward without a cache.

    Raises:
        UnsupportedModelError: Where no layout gives these logits.
    """
    windows = watch_windows(anatomy)
    failures = [] if windows.packs else ["packed: its blocks have arguments that don't follow single tokens"]
    for layout in ("packed", "padded") if windows.packs else ("padded",):
        found = replace(windows, layout=layout, missed="; ".join(failures))
        try:
            difference = probed(anatomy, "logits", partial(_off_by, anatomy, found))
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            failures.append(f"{layout}: its forward fails ({type(error).__name__})")
            continue
        if difference.is_rounding:
            return found
        failures.append(f"{layout}: logits are {difference}")
    raise no_cache(anatomy, "; ".join(failures))


def _off_by(anatomy: Anatomy, windows: Windows) -> float:
    """How far the logits of scripted decoding are from a plain forward's (:func:`rounding.logits_distance`)."""
    n = anatomy.n_blocks
    ids = anatomy.probe_ids(3).tolist()
    prompts = [ids[0], ids[1][:3], ids[2][:4]]
    exits = [[1, 1, 1], [max(1, n // 2), 1, n], [n, max(1, n - 1), 1], [n, n, n]]
    stopper = _Script(exits)
    decoder = Decoder(anatomy, stopper, Schedule(n, stopper), windows, prompts, len(exits))
    with decoder.attached():
        for number in range(len(exits)):
            logits = decoder.step()
            if number < len(exits) - 1:
                decoder.append([row[number] for row in ids], [False] * 3)
    texts = [[*p, *row[: len(exits) - 1]] for p, row in zip(prompts, ids, strict=True)]
    plain = [
        anatomy.model(input_ids=torch.tensor([t], device=anatomy.input_device), use_cache=False).logits[0, -1]
        for t in texts
    ]
    return logits_distance(logits, torch.stack(plain))
