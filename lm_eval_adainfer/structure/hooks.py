"""Watching modules and putting something in their place, for a while."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from lm_eval_adainfer.structure import private

_Call = tuple[int, Any, Any]  # module id, (args, kwargs), output


@contextmanager
def _recorded(module: nn.Module, calls: list[_Call]) -> Iterator[None]:
    """Append every call of the module: what it was given, before anybody's pre-hook, and what came of it."""
    given: list[tuple[list, dict]] = []

    def note(m: nn.Module, args: Any, kwargs: Any) -> None:
        given.append((list(args), dict(kwargs)))

    def record(m: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls.append((id(m), given.pop(), output))

    handles = [
        module.register_forward_pre_hook(note, with_kwargs=True, prepend=True),
        module.register_forward_hook(record, with_kwargs=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable) -> Iterator[None]:
    """Put another forward in place; accelerate keeps its own in the instance's dict, so restore what was there."""
    missing = object()
    before = module.__dict__.get("forward", missing)
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        if before is missing:
            del module.__dict__["forward"]
        else:
            module.forward = before  # type: ignore[method-assign]


@contextmanager
def without_hooks(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Somebody's hooks on the blocks see real calls only, not those that find out what the blocks are given."""
    before = [{name: getattr(module, name) for name in private.HOOKS} for module in modules]
    try:
        for module in modules:
            for name in private.HOOKS:
                setattr(module, name, OrderedDict())
        yield
    finally:
        for module, hooks in zip(modules, before, strict=True):
            for name, value in hooks.items():
                setattr(module, name, value)
