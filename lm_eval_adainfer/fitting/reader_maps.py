"""One block's affine map: least squares towards the final states, shrunk to the identity, and then KL (2303.08112).

With thousands of examples and not millions, gradients of the KL alone do not come near what the closed form gives:
states vary along few directions by far the most. So the KL, which is what counts, refines and judges (docs/readers.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.readers.tuned import Maps

if TYPE_CHECKING:
    from lm_eval_adainfer.harness.model import AdaInferLM

WIDEST_WHOLE = 1024  # wider blocks get narrow matrices of NARROW rows, unless rank says otherwise
NARROW = 128
_SHRINKS = (0.1, 0.01, 0.001)  # towards the identity, in units of the median direction's sum of squares
_JUDGES = 256  # examples that choose one of them, a quarter at most
_LEAST_SPREAD = 0.01  # of the average, which what a direction varies by is taken for at least
_BIAS = 0.02  # its share of the learning rate
_WARM_UP = 0.05  # of the steps, after which the learning rate falls to 0 along a line
_AT_ONCE = 64  # examples whose logits are held at once where nothing is trained


@dataclass(frozen=True)
class Training:
    """How maps are trained.

    Attributes:
        rank: Rows of the narrow matrices; 0 for whole ones, None: whole up to a width of 1,024, else 128.
        epochs: How often the KL sees each example; 0 leaves least squares alone.
        learning_rate: What one step of Adam can move a state by at most, in units of what states vary by.
        batch: Examples per step.
        seed: Of the order of examples.

    Raises:
        AdaInferError: On a number that makes no sense.
    """

    rank: int | None = None
    epochs: int = 1
    learning_rate: float = 0.1
    batch: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 0:
            raise AdaInferError(f"rank: {self.rank} is negative; give 1 or more, or 0 for whole matrices")
        if self.epochs < 0:
            raise AdaInferError(f"epochs: {self.epochs} is negative; give 0 or more")
        if not 0 < self.learning_rate < float("inf"):
            raise AdaInferError(f"learning_rate: {self.learning_rate} is no number above 0")

    def rank_for(self, hidden_size: int) -> int:
        """The rank at a width; 0 for whole matrices.

        Raises:
            AdaInferError: Where it is not below the width.
        """
        if self.rank is not None and self.rank >= hidden_size:
            raise AdaInferError(
                f"rank: {self.rank} is not below the width of the blocks, {hidden_size}; give 0 for whole matrices"
            )
        return self.rank if self.rank is not None else 0 if hidden_size <= WIDEST_WHOLE else NARROW


@dataclass(frozen=True)
class Held:
    """What a block's reading is worth on held-out examples (measured).

    Attributes:
        kl: Mean KL(final distribution || lens distribution), in nats; NaN counts as infinite.
        agreement: Share of examples whose top token is the final one.
    """

    kl: float
    agreement: float


def block_map(
    lm: AdaInferLM, x: Tensor, last: Tensor, n_held: int, block: int, how: Training, dtype: Any = np.float32
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The best of identity, least squares and least squares refined by KL, and its figures on held-out examples.

    Args:
        lm: The model.
        x: [N, h] states after the block, float32.
        last: [N, h] states after the last one.
        n_held: How many of the N, the last ones, are held out.
        block: Its number.
        how: How it is trained.
        dtype: Of the arrays.

    Returns:
        Arrays as :class:`Maps`', of this block alone; ``kl_before``, ``kl_after``, ``agreement_before``,
        ``agreement_after`` and ``kept`` (which of the three).
    """
    n, rank = len(x) - n_held, how.rank_for(x.shape[1])
    squares = least_squares(x[:n], last[:n], rank, _chosen_shrink(lm, x[:n], last[:n], rank))
    found = {"identity": {name: np.zeros_like(array) for name, array in squares.items()}, "least squares": squares}
    if how.epochs:
        found["kl"] = _refined(lm, squares, x[:n], last[:n], block, how)
    found = {name: {key: array.astype(dtype) for key, array in arrays.items()} for name, arrays in found.items()}
    held = {name: _held_out(lm, arrays, x[n:], last[n:]) for name, arrays in found.items()}
    best = min(held, key=lambda name: held[name].kl)  # the first of equals
    figures = {
        "block": block,
        "kl_before": held["identity"].kl, "kl_after": held[best].kl,
        "agreement_before": held["identity"].agreement, "agreement_after": held[best].agreement,
        "kept": best,
    }  # fmt: skip
    return found[best], figures


def _chosen_shrink(lm: AdaInferLM, x: Tensor, last: Tensor, rank: int) -> float:
    """The one with which a map of the first examples reads the last ones best."""
    n = len(x) - max(1, min(_JUDGES, len(x) // 4))
    kl = {s: _held_out(lm, least_squares(x[:n], last[:n], rank, s), x[n:], last[n:]).kl for s in _SHRINKS}
    return min(kl, key=lambda shrink: kl[shrink])


def least_squares(x: Tensor, last: Tensor, rank: int = 0, shrink: float = 0.1) -> dict[str, np.ndarray]:
    """The map x + W x + b closest to the final states, shrunk to the identity (W = 0).

    Narrow matrices span what the whole one moves states along most.

    Args:
        x: [n, h] states.
        last: [n, h] final states.
        rank: 0 for a whole matrix.
        shrink: How much a move costs, in units of the median direction's sum of squares.
    """
    mean, mean_last = x.double().mean(0), last.double().mean(0)
    inner = x - mean
    wanted = last - mean_last - inner
    gram = inner.T @ inner
    cost = shrink * gram.diagonal().median().clamp(min=1e-6) * torch.eye(len(gram), dtype=gram.dtype)
    moved = torch.linalg.solve(gram + cost, inner.T @ wanted)  # [h, h]
    if rank:
        fitted = moved.T @ gram @ moved
        along = torch.linalg.eigh(fitted).eigenvectors[:, -rank:]  # [h, r]
        found = {"down": (moved @ along).T, "up": along}
        shift = found["up"] @ (found["down"] @ mean)
    else:
        found = {"weight": moved.T}
        shift = found["weight"] @ mean
    found["bias"] = mean_last - mean - shift
    return {name: np.ascontiguousarray(value.float().numpy()) for name, value in found.items()}


def _refined(
    lm: AdaInferLM, start: Mapping[str, np.ndarray], x: Tensor, last: Tensor, block: int, how: Training
) -> dict[str, np.ndarray]:
    """A map trained further by KL.

    What is trained maps states of unit spread to what the final states vary by, so that one learning rate serves all
    blocks and models.
    """
    device, n, width = lm.anatomy.input_device, *x.shape
    draw = torch.Generator().manual_seed(how.seed * 100_003 + block)
    frame = _Frame(x, last, device)
    learned = frame.inside({name: torch.from_numpy(array).to(device) for name, array in start.items()})
    for value in learned.values():
        value.requires_grad_()
    # Adam moves every number by its rate, and a map's output by that times what it reads
    rates = {"weight": 1 / width, "down": 1 / width, "up": 1 / len(learned.get("down", x)), "bias": _BIAS}
    groups = [{"params": [value], "rate": how.learning_rate * rates[name]} for name, value in learned.items()]
    optimizer = torch.optim.Adam(groups)
    steps = how.epochs * -(-n // how.batch)
    for step, chosen in enumerate(_batches(n, how, draw)):
        read = frame.apply(learned, x[chosen].to(device))
        loss = _divergence(lm, read, last[chosen].to(device))[0].mean()
        gradients = torch.autograd.grad(loss, list(learned.values()))  # those of the maps alone
        for value, gradient in zip(learned.values(), gradients, strict=True):
            value.grad = gradient
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * min(1.0, (step + 1) / (_WARM_UP * steps)) * (1 - step / steps)
        optimizer.step()
    outside = frame.outside({name: value.detach() for name, value in learned.items()})
    return {name: np.ascontiguousarray(value.cpu().numpy()) for name, value in outside.items()}


class _Frame:
    """The coordinates of training: states less their mean over their spread, and moves over the final spread."""

    def __init__(self, x: Tensor, last: Tensor, device: torch.device):
        self.mean, self.spread, self.scale = (v.to(device) for v in (x.mean(0), _spread(x), _spread(last)))

    def apply(self, learned: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """[n, h] of states [n, h]."""
        moved = (x - self.mean) / self.spread
        for name in ("weight", "down", "up"):
            if name in learned:
                moved = moved @ learned[name].T
        return x + self.scale * (moved + learned["bias"])

    def inside(self, maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A map of states, in these coordinates."""
        found = {name: value.clone() for name, value in maps.items()}
        first, final = ("down", "up") if "down" in found else ("weight", "weight")
        found["bias"] = (found["bias"] + self._moved_mean(maps)) / self.scale
        found[first] *= self.spread
        found[final] /= self.scale[:, None]
        return found

    def outside(self, learned: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The map of states."""
        found = {name: value.clone() for name, value in learned.items()}
        first, final = ("down", "up") if "down" in found else ("weight", "weight")
        found[first] /= self.spread
        found[final] *= self.scale[:, None]
        found["bias"] = self.scale * found["bias"] - self._moved_mean(found)
        return found

    def _moved_mean(self, maps: Mapping[str, Tensor]) -> Tensor:
        return maps["up"] @ (maps["down"] @ self.mean) if "down" in maps else maps["weight"] @ self.mean


def _spread(x: Tensor) -> Tensor:
    """[h], the standard deviation of each direction, or a hundredth of the average where it hardly varies."""
    found = x.std(0)
    return found.clamp(min=max(_LEAST_SPREAD * found.mean().item(), 1e-6))


def _batches(n: int, how: Training, draw: torch.Generator) -> Iterator[Tensor]:
    """Indices of the examples of every step; each epoch in an order of its own."""
    for _ in range(how.epochs):
        yield from torch.randperm(n, generator=draw).split(how.batch)


def _divergence(lm: AdaInferLM, read: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """[n], KL(final || lens) of states that norm and head read, and whether their top tokens are the same."""
    dtype, anatomy = lm._dtype(), lm.anatomy
    final = anatomy.logits(last.to(dtype)).float().log_softmax(-1)
    head = anatomy.differentiable_logits if read.requires_grad else anatomy.logits
    lens = head(read.to(dtype)).float().log_softmax(-1)
    return (final.exp() * (final - lens)).sum(-1), final.argmax(-1) == lens.argmax(-1)


@torch.no_grad()
def _held_out(lm: AdaInferLM, arrays: Mapping[str, np.ndarray], x: Tensor, last: Tensor) -> Held:
    """What these arrays are worth, applied as a run applies them, in the model's dtype."""
    if not all(np.isfinite(array).all() for array in arrays.values()):
        return Held(float("inf"), 0.0)
    maps = Maps({name: array[None] for name, array in arrays.items()})
    device, dtype = lm.anatomy.input_device, lm._dtype()
    kl, same = zip(
        *(
            _divergence(lm, maps.apply(1, states.to(device, dtype)), final.to(device))
            for states, final in zip(x.split(_AT_ONCE), last.split(_AT_ONCE), strict=True)
        ),
        strict=True,
    )
    mean = torch.cat(kl).double().mean().item()
    return Held(mean if mean == mean else float("inf"), torch.cat(same).double().mean().item())
