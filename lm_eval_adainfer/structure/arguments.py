"""How the arguments of a model's blocks follow the batch, and where hidden states are in what a block returns."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, is_dataclass
from typing import Any

from torch import Tensor

from lm_eval_adainfer.structure import opaque


def hidden_of(output: Any) -> Tensor:
    """The hidden states in a block's output; blocks return a tensor or a tuple, depending on the family."""
    return output if isinstance(output, Tensor) else output[0]


def with_hidden(output: Any, hidden: Tensor) -> Any:
    """The block's output with other hidden states in it."""
    return hidden if isinstance(output, Tensor) else (hidden, *output[1:])


@dataclass
class BatchRule:
    """How a block argument's first dimension follows the batch, as seen at two batch sizes.

    ``factors[(block, path)]`` is f where the first dimension was f x batch (Bloom's alibi: f = heads), or 0 where
    it did not change (shared by the batch). Sizes can coincide, so the rule is observed, not guessed. ``apart``: the
    keys of a prefix can stay apart from those of the rows that continue it.
    """

    factors: dict[tuple[int, str], int] = field(default_factory=dict)
    apart: bool = False

    def cut(self, block: int, path: str, value: Tensor, rows: Tensor, batch: int) -> Tensor:
        """Keep ``rows`` (indices into the original batch of ``batch`` rows) of an argument of block ``block``."""
        factor = self.factors.get((block, path))
        if factor is None:  # not there at the probe (a mask that was None): judge by its size
            factor = 1 if value.dim() > 0 and value.shape[0] == batch else 0
        if factor == 0:
            return value
        rows = rows.to(value.device)
        if factor == 1:
            return value.index_select(0, rows)
        return value.unflatten(0, (batch, factor)).index_select(0, rows).flatten(0, 1)


def walk(arguments: Any, act: Callable[[str, Tensor], Any], path: str = "") -> Any:
    """Rebuild nested tuples, lists, dicts and dataclasses with ``act(path, tensor)`` in place of every tensor."""
    if isinstance(arguments, Tensor):
        return act(path, arguments)
    inside = opaque.parts(arguments)
    if inside is None or (is_dataclass(arguments) and not opaque.holds_tensors(list(inside.values()))):
        return arguments
    walked = {key: walk(x, act, f"{path}.{key}") for key, x in inside.items()}
    if type(arguments) in (tuple, list):
        return type(arguments)(walked.values())
    if isinstance(arguments, tuple):  # named
        return type(arguments)(*walked.values())
    if type(arguments) is dict:
        return walked
    changed = copy.copy(arguments)
    put: Any = object.__setattr__ if type(arguments).__dataclass_params__.frozen else setattr
    for name, value in walked.items():
        put(changed, name, value)
    return changed


def _tensors(arguments: Any) -> list[tuple[str, Tensor]]:
    """Every tensor in nested arguments, with its path."""
    found: list[tuple[str, Tensor]] = []
    walk(arguments, lambda path, x: found.append((path, x)))
    return found


def batch_factors(first: dict, second: dict, batches: tuple[int, int]) -> dict[tuple[int, str], int]:
    """From argument shapes at two batch sizes: the factor by which the first dimension follows the batch, or 0."""
    factors = {}
    for key, shape in first.items():
        other = second.get(key)
        if not other or not shape:
            continue
        factor, rest = divmod(shape[0], batches[0])
        factors[key] = factor if rest == 0 and other[0] == factor * batches[1] else 0
    return factors
