"""Keys and values alone: what of a block has to run before they are there, and how a block is left behind them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from lm_eval_adainfer.structure.anatomy import Anatomy
from lm_eval_adainfer.structure.arguments import hidden_of
from lm_eval_adainfer.structure.calls import explicit_masks
from lm_eval_adainfer.structure.hooks import replaced_forward
from lm_eval_adainfer.structure.weights import is_linear, linear_size


class Stored(Exception):  # noqa: N818 - control flow, never seen by users
    """Leaves a block once its keys and values are stored."""


@dataclass(frozen=True)
class Storing:
    """What a block computes for its keys and values.

    Attributes:
        idle: Per block, its linear maps that run before these are stored and that they do not depend on (queries), each
            with the width of what stands in for its output.
        weights: Per block, weights of the other linear maps that a token meets until then.
    """

    idle: list[list[tuple[nn.Module, int]]]
    weights: list[int]

    @contextmanager
    def without_idle(self, k: int) -> Iterator[None]:
        """Block k's idle maps compute nothing."""
        with ExitStack() as stack:
            for module, width in self.idle[k - 1]:
                stack.enter_context(replaced_forward(module, _nothing(width)))
            yield


def _nothing(width: int) -> Callable[[Tensor], Tensor]:
    return lambda x: x.new_zeros(1).expand(*x.shape[:-1], width)


class _WatchedCache(DynamicCache):
    """Notes what a block stores, and can leave the block there."""

    def __init__(self) -> None:
        super().__init__()
        self.leaves = False
        self.stored: list[Tensor] = []
        self.met: list[tuple[nn.Module, int]] = []
        self.before: list[list[tuple[nn.Module, int]]] = []

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        self.stored = [key_states.clone(), value_states.clone()]
        if self.leaves:
            raise Stored
        self.before.append(list(self.met))
        return key_states, value_states


@torch.no_grad()
def watch_storing(anatomy: Anatomy) -> Storing:
    """Find out what every block needs for its keys and values; the model has to use a plain cache (``windows``)."""
    cache, handles = _WatchedCache(), []
    given: list[tuple[tuple, dict]] = []
    stored: list[list[Tensor]] = []

    def begin(module: Any, args: tuple, kwargs: dict) -> None:
        cache.met = []
        given.append((args, kwargs))

    def met(module: nn.Module, args: Any, output: Any) -> None:
        cache.met.append((module, hidden_of(output).shape[-1]))  # a router returns more than its logits

    for block in anatomy.blocks:
        handles.append(block.register_forward_pre_hook(begin, with_kwargs=True))
        handles.append(block.register_forward_hook(lambda m, args, output: stored.append(cache.stored)))
        handles += [m.register_forward_hook(met) for m in block.modules() if is_linear(m)]
    try:
        with explicit_masks():
            anatomy.model(input_ids=anatomy.probe_ids(2), **anatomy.with_cache(cache))
    finally:
        for handle in handles:
            handle.remove()
    cache.leaves = True
    idle: list[list[tuple[nn.Module, int]]] = []
    for block, (args, kwargs), expected, before in zip(anatomy.blocks, given, stored, cache.before, strict=True):
        names = {id(module): name for name, module in block.named_modules()}
        last = {name for module, _ in (idle[-1] if idle else []) for name in [_name_in(anatomy, len(idle), module)]}
        likely = [found for found in before if names[id(found[0])] in last]
        if not likely or not _stores(block, args, kwargs, cache, likely, expected):
            likely = [found for found in before if _stores(block, args, kwargs, cache, [found], expected)]
            if len(likely) > 1 and not _stores(block, args, kwargs, cache, likely, expected):
                likely = []
        # what nobody reads may as well have a single head, where the block does not mind
        narrow = [(module, expected[0].shape[-1]) for module, _ in likely]
        idle.append(narrow if narrow and _stores(block, args, kwargs, cache, narrow, expected) else likely)
    weights = [
        sum(linear_size(module) for module, _ in before) - sum(linear_size(module) for module, _ in some)
        for before, some in zip(cache.before, idle, strict=True)
    ]
    return Storing(idle, weights)


def _name_in(anatomy: Anatomy, k: int, module: nn.Module) -> str:
    """The name of a module in block k."""
    return next(name for name, other in anatomy.blocks[k - 1].named_modules() if other is module)


def _stores(
    block: nn.Module, args: tuple, kwargs: dict, cache: _WatchedCache, without: Any, expected: list[Tensor]
) -> bool:
    """Whether a block stores these keys and values without some of its linear maps."""
    with ExitStack() as stack:
        for module, width in without:
            stack.enter_context(replaced_forward(module, _nothing(width)))
        try:
            block(*args, **kwargs)
        except Stored:
            return all(torch.equal(x, y) for x, y in zip(cache.stored, expected, strict=True))
        except (RuntimeError, TypeError, ValueError):  # it does what a stand-in does not allow
            return False
    return False
