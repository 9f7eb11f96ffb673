"""What a strategy would have done, from a trace: everything computed here is *simulated*."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.strategies import features
from lm_eval_adainfer.strategies.base import Schedule, Stopper
from lm_eval_adainfer.strategies.features import Recorded
from lm_eval_adainfer.traces.views import reader_of, recorded_blocks, require_recorded


def asked(
    stopper: Stopper, meta: Mapping[str, Any], min_layer: Any = 1, check_layers: Any = None
) -> tuple[int, ...]:
    """After which blocks of a trace a strategy is asked.

    Args:
        stopper: The strategy.
        meta: A trace's, under a reader.
        min_layer: As the model's argument.
        check_layers: As the model's argument. None takes the blocks that the stopper's file names for this reader, or
            all that were recorded.

    Raises:
        AdaInferError: On arguments out of range, or where a block was not recorded under the reader.
    """
    recorded = recorded_blocks(meta)
    if check_layers is None:
        named = stopper.info.get("check_layers")
        own = stopper.reader is not None and stopper.reader.runs_tokens and stopper.reader.name == reader_of(meta)
        check_layers = "all"
        if own and isinstance(named, list) and named:
            check_layers = named
        elif stopper.features and len(recorded) < meta["n_blocks"]:
            check_layers = recorded
    blocks = Schedule(meta["n_blocks"], stopper, min_layer, check_layers).blocks
    require_recorded(meta, blocks)
    return blocks


def margins(
    stopper: Stopper, meta: Mapping[str, Any], arrays: Mapping[str, np.ndarray], blocks: Sequence[int] | None = None
) -> np.ndarray:
    """What a strategy says after every asked block.

    Args:
        stopper: The strategy.
        meta: A trace's, under a reader.
        arrays: Its arrays.
        blocks: After which blocks it is asked, in order; by default after all recorded ones but the last at which it
            can stop.

    Returns:
        [N, L] margins (positive: stop), NaN where it is not asked.

    Raises:
        AdaInferError: Where the trace lacks a feature or the strategy does not fit its model.
    """
    stopper.bind(meta["n_blocks"])
    if stopper.removes_blocks:
        raise AdaInferError(
            f"stopper: {stopper.kind} takes blocks out of the model, which changes what all later ones see, so a trace "
            "can't tell what it would do; run it with lm_eval --model adainfer"
        )
    n_blocks, n = meta["n_blocks"], len(arrays["top_token"])
    if blocks is None:
        blocks = asked(stopper, meta)
    require_recorded(meta, blocks)
    found = np.full((n, n_blocks), np.nan)
    carried = torch.zeros(n, stopper.carries) if stopper.carries else None
    for k, values, seen in _walk(stopper.features, meta, arrays, blocks, carried):
        found[:, k - 1] = stopper.ask(seen, values, carried).double().numpy()
    return found


def columns(names: Sequence[str], meta: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """[N, B, F] float64: the named features after every recorded block, as if all of these were asked.

    Raises:
        AdaInferError: Where the trace lacks one.
    """
    width = features.past_width(names)
    carried = torch.zeros(len(arrays["top_token"]), width) if width else None
    found = []
    for _, values, seen in _walk(names, meta, arrays, recorded_blocks(meta), carried):
        found.append(values.double().numpy())
        features.remember(seen)
    return np.stack(found, axis=1)


def _walk(
    names: Sequence[str],
    meta: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
    blocks: Sequence[int],
    carried: Tensor | None,
) -> Iterator[tuple[int, Tensor, Recorded]]:
    """(k, [n, F] features, what was seen) of the blocks, in order; whoever walks notes the past."""
    needed = features.needs_recorded(names)
    if missing := [name for name in needed if name not in meta["features"]]:
        known = ", ".join(meta["features"])
        raise AdaInferError(f"features: the trace of {meta['task']} has no {missing[0]}; it has {known}")
    number = {name: meta["features"].index(name) for name in needed}
    table, top = torch.from_numpy(arrays["features"]), torch.from_numpy(arrays["top_token"])
    best_choices = _best_choices(meta, arrays) if features.needs_choice_past(names) else None
    nothing = torch.zeros(len(top))
    for k in blocks:
        best, best_choice = (
            table[:, k - 1, number[name]] if name in number else nothing for name in ("top_prob", "choice_top_prob")
        )
        which = nothing if best_choices is None else best_choices[:, k - 1]
        past, choice_past = features.pasts(names, carried)
        seen = Recorded(k, meta["n_blocks"], best, top[:, k - 1], past, best_choice, which, choice_past)
        values = [
            table[:, k - 1, number[name]] if name in number else features.DERIVED[name](seen).float() for name in names
        ]
        yield k, torch.stack(values, dim=-1) if values else torch.empty(len(top), 0), seen


def _best_choices(meta: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Tensor:
    """[N, L], the request of greatest score after every block, the first of equals."""
    if "scores" not in arrays:
        raise AdaInferError(f"features: the trace of {meta['task']} has no scores, which choice_agreement follows from")
    scores = arrays["scores"]
    if not scores.shape[-1]:  # generated text
        return torch.zeros(scores.shape[:2])
    return torch.from_numpy(np.where(np.isnan(scores), -np.inf, scores).argmax(axis=-1))
