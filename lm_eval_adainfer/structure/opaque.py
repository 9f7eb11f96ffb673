"""What a block is given besides tensors, and whether it holds a batch that rows could not leave.

Tensors in tuples, lists, dictionaries and dataclasses are cut to the rows that go on (``anatomy.walk``). Anything else
that holds tensors, or has an entry per row, would still be about the whole batch: answers would be wrong, or a kernel
would end the process. So a model whose blocks are given such a thing is refused when it is loaded.
"""

from __future__ import annotations

import functools
from collections import UserDict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import Cache, PreTrainedConfig

_PLAIN = (type(None), bool, int, float, complex, str, bytes, type, torch.dtype, torch.device, torch.Size)
_KNOWN = (*_PLAIN, Cache, nn.Module, PreTrainedConfig, ModuleType)  # a cache is cut by those who give it
_DEEPEST = 6


def parts(value: Any) -> dict[Any, Any] | None:
    """What a tuple, list, dictionary or dataclass is made of, by index, key or field; None for anything else."""
    if isinstance(value, (Tensor, *_KNOWN)):
        return None
    if type(value) in (tuple, list) or (isinstance(value, tuple) and hasattr(value, "_fields")):
        return dict(enumerate(value))
    if type(value) is dict:
        return value
    if is_dataclass(value):
        return {f.name: getattr(value, f.name) for f in fields(value) if hasattr(value, f.name)}
    return None


def opaque(arguments: tuple[list, dict]) -> Any:
    """The first thing in a block's arguments that holds tensors which can't be cut; None where all can."""
    args, kwargs = arguments
    for value in (*args, *kwargs.values()):
        # keys and values that later blocks read are cut as a whole (``Forward.keep``)
        inside = list(value.values()) if isinstance(value, UserDict) else [value]
        for found in (x for y in inside for x in _leaves(y)):
            if holds_tensors(found):
                return found
    return None


def per_row(of_two: tuple[list, dict], of_three: tuple[list, dict]) -> str | None:
    """Where one block's arguments for two and for three rows have a list with an entry per row; None for nowhere."""
    short, long = (dict(_lengths(list(arguments))) for arguments in (of_two, of_three))
    return next((path for path, n in short.items() if n == 2 and long.get(path) == 3), None)


def refusal(value: Any) -> str:
    """What is said of it, and what would help."""
    if isinstance(value, BlockMask):
        return (
            "attn_implementation: the masks of flex_attention are BlockMask objects, which can't be cut when rows "
            "leave a batch; pass attn_implementation=sdpa or attn_implementation=eager"
        )
    kind = type(value)
    return f"its blocks are given a {kind.__module__}.{kind.__qualname__}, whose tensors can't be cut when rows leave"


def _leaves(value: Any) -> Iterator[Any]:
    """Whatever is neither a tensor nor made of parts."""
    inside = parts(value)
    if inside is not None:
        for x in inside.values():
            yield from _leaves(x)
    elif not isinstance(value, (Tensor, *_KNOWN)):
        yield value


def _lengths(value: Any, path: str = "") -> Iterator[tuple[str, int]]:
    """Lists and arrays without tensors, by path, with their lengths."""
    inside = parts(value)
    if isinstance(value, np.ndarray):
        yield path, len(value) if value.ndim else 0
    elif inside is not None:
        if isinstance(value, (tuple, list)) and not holds_tensors(value):
            yield path, len(value)
        for key, x in inside.items():
            yield from _lengths(x, f"{path}.{key}")


def holds_tensors(value: Any, depth: int = 0, seen: set[int] | None = None) -> bool:
    """Whether there are tensors in an object, or in what it refers to; caches, modules and configs are left out."""
    seen = set() if seen is None else seen
    if isinstance(value, Tensor):
        return True
    if isinstance(value, _KNOWN) or id(value) in seen or depth > _DEEPEST:
        return False
    seen.add(id(value))
    return any(holds_tensors(x, depth + 1, seen) for x in _inside(value))


def _inside(value: Any) -> Iterator[Any]:
    """Whatever an object refers to by itself."""
    if isinstance(value, FunctionType):
        for cell in value.__closure__ or ():
            with suppress(ValueError):  # an empty one
                yield cell.cell_contents
        return
    if callable(value) and hasattr(value, "__self__"):  # a method
        yield value.__self__
        return
    if isinstance(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values())
        return
    if isinstance(value, Mapping):
        yield from value.values()
    elif isinstance(value, (tuple, list, set, frozenset)):
        yield from value
    yield from getattr(value, "__dict__", {}).values()
    for kind in type(value).__mro__:
        names = kind.__dict__.get("__slots__", ())
        for name in (names,) if isinstance(names, str) else names:
            if hasattr(value, name):
                yield getattr(value, name)
