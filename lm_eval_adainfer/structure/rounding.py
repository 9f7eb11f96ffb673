"""Tells what rounding does to a model's numbers from what only another computation does.

A probe compares two computations of the same numbers. How far rounding alone may move them apart depends on the
model: pretrained ones have activations of 400 and more in single channels, and every block adds to the error. So
nothing is guessed here. Hidden states are compared channel by channel, each in units of its own size; what rounding
does to them is measured, as the difference of forwards that are equivalent on paper; and structure is looked for where
rounding is small: in float32 copies of the weights, made block by block while it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from lm_eval_adainfer.structure import private
from lm_eval_adainfer.structure.arguments import hidden_of

_STRUCTURE = 8  # a difference so many times larger than measured rounding is none
_MOST, _MOST_COARSE = 1e-4, 0.1  # no model's rounding is larger, in float32 and in anything coarser
_KEPT_BYTES = 2**31  # copies of up to so many bytes are kept while a probe runs, larger ones are made block by block
_EQUIVALENT_ROWS, _ROWS = 8, 3
_START = 3  # tokens of a row that begins alone


class Probed(Protocol):
    """What is needed of a model that was taken apart (``anatomy.Anatomy``)."""

    model: Any
    config: Any
    blocks: Any
    rounding: dict[bool, Rounding]

    @property
    def fixed_positions(self) -> int | None:
        """Up to so many tokens a position's embedding depends on the position alone; None: always."""

    def probe_ids(self, batch: int) -> Tensor:
        """Token ids [batch, n] for a probe forward."""


class Rounding(NamedTuple):
    """By how much of their size rounding moves a model's numbers.

    Attributes:
        hidden: The hidden states of any block, channel by channel (:func:`hidden_distance`).
        logits: The logits (:func:`logits_distance`).
    """

    hidden: float
    logits: float


@torch.no_grad()
def hidden_distance(found: Tensor, expected: Tensor) -> float:
    """The largest difference of two tensors of hidden states [..., h], every channel in units of its own size.

    A channel's size is its largest absolute value in ``expected``, and at least the median channel's: so a few channels
    of huge activations hide nothing in the others. NaN on either side is infinitely far.
    """
    found, expected = found.detach().float(), expected.detach().float()
    size = expected.abs().reshape(-1, expected.shape[-1]).amax(0)
    size = size.clamp(min=float(size.median())).clamp(min=torch.finfo(torch.float32).tiny)
    worst = ((found.to(expected.device) - expected).abs() / size).max().item()
    return worst if worst == worst else float("inf")


@torch.no_grad()
def logits_distance(found: Tensor, expected: Tensor) -> float:
    """The largest difference of two tensors of logits [..., V] in units of the largest finite one of ``expected``.

    Tokens that a model masks may be at minus infinity on both sides. NaN is infinitely far.
    """
    found, expected = found.detach().float().to(expected.device), expected.detach().float()
    size = expected.where(expected.isfinite() & (expected > -1e4), 0).abs().max().clamp(min=1e-3)
    worst = (torch.where(found == expected, 0, (found - expected).abs()).max() / size).item()
    return worst if worst == worst else float("inf")


def coarsest(model: nn.Module) -> torch.dtype:
    """The coarsest dtype that the model's forward computes in, autocast included."""
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype.itemsize >= 2}
    dtypes |= {torch.get_autocast_dtype(kind) for kind in _devices(model) if torch.is_autocast_enabled(kind)}
    return max(dtypes or {torch.float32}, key=lambda dtype: torch.finfo(dtype).eps)


def unmeasured(model: nn.Module) -> float:
    """The largest distance that is still rounding where no rounding of the model could be measured yet."""
    return max(1e-4, 16 * torch.finfo(coarsest(model)).eps)


class Difference(NamedTuple):
    """What a probe saw, and what rounding allows."""

    seen: float
    allowed: float

    @property
    def is_rounding(self) -> bool:
        """Whether rounding explains it."""
        return self.seen <= self.allowed

    def __str__(self) -> str:
        return f"off by {self.seen:.2g} of their size, {self.allowed:.2g} allowed"


def probed(
    anatomy: Probed, of: Literal["hidden", "logits"], probe: Callable[[], float | tuple[float, float]]
) -> Difference:
    """Run a probe where rounding is small, in float32 copies of the weights, and then in the model's own dtype.

    Args:
        anatomy: The model.
        of: What the probe compares.
        probe: Computes something in two ways and returns their distance; where plain forwards say little about its
            rounding, also how far one of the ways is from one that is equivalent on paper.

    Returns:
        The difference that is the larger one, measured by what is allowed in its dtype.
    """

    def run(copied: bool) -> Difference:
        rounding, seen, own = getattr(measured(anatomy, copied), of), probe(), 0.0
        if isinstance(seen, tuple):
            seen, own = seen
        most = _MOST if copied or coarsest(anatomy.model) == torch.float32 else _MOST_COARSE
        return Difference(seen, _STRUCTURE * max(rounding, min(own, most)))

    found = []
    with in_float32(anatomy.model) as copied:
        if copied:
            found.append(run(True))
    found.append(run(False))
    return max(found, key=lambda difference: difference.seen / difference.allowed)


def measured(anatomy: Probed, copied: bool) -> Rounding:
    """What rounding does to this model's numbers now; measured once, with and without float32 copies.

    It is the largest difference between forwards of the same tokens that are equivalent on paper: a few rows, the same
    rows among more, the same rows with more tokens behind them, and the first tokens of one row alone. Products of so
    few rows are computed in another way than larger ones, which one thread may round all alike.
    """
    if copied not in anatomy.rounding:
        anatomy.rounding[copied] = _measure(anatomy)
    return anatomy.rounding[copied]


@torch.no_grad()
def _measure(anatomy: Probed) -> Rounding:
    rows = anatomy.probe_ids(_EQUIVALENT_ROWS)
    few, length = rows[:_ROWS], rows.shape[1]
    positions = getattr(anatomy.config, "max_position_embeddings", None) or 2 * length
    room = min(anatomy.fixed_positions or positions, positions)
    longer = torch.cat([few, rows[_ROWS : 2 * _ROWS]], dim=1)[:, : max(length, room)]
    expected, logits = plain_forward(anatomy, few)
    found = [plain_forward(anatomy, other) for other in (rows, longer)]
    dtype = coarsest(anatomy.model)
    least, most = 8 * torch.finfo(dtype).eps, _MOST if dtype == torch.float32 else _MOST_COARSE
    start, start_logits = plain_forward(anatomy, few[:1, :_START])
    pairs = [
        (state[:_ROWS, :length], reference)
        for states, _ in found
        for state, reference in zip(states, expected, strict=True)
    ]
    # what stands behind the start is there for the channels' sizes
    pairs += [
        (torch.cat([state, reference[:1, _START:]], dim=1), reference[:1])
        for state, reference in zip(start, expected, strict=True)
    ]
    hidden = max(hidden_distance(*pair) for pair in pairs)
    heads = max(logits_distance(other[:_ROWS, :length], logits) for _, other in found)
    heads = max(heads, logits_distance(start_logits, logits[:1, :_START]))
    return Rounding(max(least, min(hidden, most)), max(least, min(heads, most)))


@torch.no_grad()
def plain_forward(anatomy: Probed, ids: Tensor) -> tuple[list[Tensor], Tensor]:
    """Every block's hidden states ([B, S, h]) and the logits ([B, S, V]) of the model's own forward of ids [B, S]."""
    states: list[Tensor] = []

    def record(module: Any, args: Any, output: Any) -> None:
        states.append(hidden_of(output).clone())

    with ExitStack() as stack:
        for block in anatomy.blocks:
            stack.callback(block.register_forward_hook(record).remove)
        logits = anatomy.model(input_ids=ids, use_cache=False).logits
    return states, logits


@contextmanager
def in_float32(model: nn.Module, autocast: bool = False) -> Iterator[bool]:
    """Compute in float32 for a while: weights of a coarser dtype are replaced by float32 copies, autocast is off.

    The blocks of a large model have copies while they run, one block at a time; the rest of the model has them all the
    while. The model is given back as it was, whatever happens.

    Args:
        model: The model.
        autocast: Whether its caller uses autocast elsewhere, where it is off now.

    Yields:
        Whether anything was replaced. False where the model computes in float32 already, and where its weights can't be
        copied (they are quantised, or offloaded): then nothing is changed.
    """
    kinds = [kind for kind in _devices(model) if torch.is_autocast_enabled(kind)]
    coarse = _coarse(model)
    if coarse is None or not (coarse or kinds or autocast):
        yield False
        return
    units = _units(model)
    inside = {id(m) for unit in units for m in unit.modules()}
    keeps = 4 * sum(value.numel() for _, _, value in coarse) <= _KEPT_BYTES
    with ExitStack() as stack:
        for kind in kinds:
            stack.enter_context(torch.autocast(kind, enabled=False))
        rest = [entry for entry in coarse if id(entry[0]) not in inside]
        stack.enter_context(_replaced(rest, _copies(rest)))
        for unit in units:
            mine = {id(m) for m in unit.modules()}
            entries = [entry for entry in coarse if id(entry[0]) in mine]
            if not entries:
                continue
            if keeps:
                stack.enter_context(_replaced(entries, _copies(entries)))
            else:
                stack.enter_context(_replaced_while_running(unit, entries))
        yield True


_Entry = tuple[nn.Module, str, Tensor]  # a module, and the name and value of one of its parameters or buffers


def _devices(model: nn.Module) -> list[str]:
    return sorted({p.device.type for p in model.parameters() if p.device.type != "meta"})


def _coarse(model: nn.Module) -> list[_Entry] | None:
    """All parameters and buffers of a floating-point dtype coarser than float32; None where they can't be copied."""
    found: list[_Entry] = []
    for module in model.modules():
        if getattr(private.offload_hook(module), "offload", False):
            return None
        parameters = private.parameters_of(module)
        for name, value in [*parameters.items(), *private.buffers_of(module).items()]:
            if value is None:
                continue
            floating, weight = value.dtype.is_floating_point, name in parameters and value.ndim > 1
            if type(value) not in (Tensor, nn.Parameter) or value.device.type == "meta":
                return None
            if (weight and not floating) or (floating and value.dtype.itemsize < 2):
                return None
            if floating and value.dtype.itemsize < 4:
                found.append((module, name, value))
    return found


def _units(model: nn.Module) -> list[nn.Module]:
    """The members of the outermost module lists: a large model's blocks."""
    found: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer, _ in found):
            found.append((name, module))
    return [unit for _, units in found for unit in units.children()]


def _copies(entries: list[_Entry]) -> list[Tensor]:
    """Float32 values; what is tied stays tied."""
    made: dict[int, Tensor] = {}
    return [made.setdefault(id(value), value.detach().float()) for _, _, value in entries]


@contextmanager
def _replaced(entries: list[_Entry], values: list[Tensor]) -> Iterator[None]:
    before = [value.data for _, _, value in entries]
    try:
        for (_, _, value), copy in zip(entries, values, strict=True):
            value.data = copy
        yield
    finally:
        for (_, _, value), data in zip(entries, before, strict=True):
            value.data = data


@contextmanager
def _replaced_while_running(unit: nn.Module, entries: list[_Entry]) -> Iterator[None]:
    """Copies are made before every call of a block and dropped after it, also where the call raises."""
    running = ExitStack()

    def before(module: nn.Module, args: Any) -> None:
        running.close()
        running.enter_context(_replaced(entries, _copies(entries)))

    handles = [
        unit.register_forward_pre_hook(before, prepend=True),
        unit.register_forward_hook(lambda *_: running.close(), always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        running.close()
