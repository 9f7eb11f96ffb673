"""Where a stopper's exits happen in traces, and after which few blocks asking it pays (``check_layers=``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.strategies import features
from lm_eval_adainfer.strategies.base import Stopper
from lm_eval_adainfer.traces.file import read_of_one_model
from lm_eval_adainfer.traces.margins import margins


@dataclass
class Choice:
    """What asking after some blocks comes to; *simulated* from traces.

    Attributes:
        blocks: The checked blocks.
        exit_layer: Mean exit block.
        checks: Mean checks per decision.
        cost: Multiplications (blocks, checks, the final head) over those of the dense model.
        agreement: Share of decisions whose token at the exit is the last block's.
    """

    blocks: tuple[int, ...]
    exit_layer: float
    checks: float
    cost: float
    agreement: float


@dataclass
class _Instances:
    stops: np.ndarray  # [N, L] bool
    agrees: np.ndarray  # [N, L] bool
    block_cost: np.ndarray  # [N, L + 1], of blocks 1..k
    check_cost: float
    head_cost: float
    check_is_head: bool  # whether a check reads the whole head, so that the one at the exit is the answer's


def choose(files: Sequence[Path], stopper: Stopper, count: int | None = None) -> tuple[list[float], Choice, Choice]:
    """Choose blocks greedily: always the one that saves most, until none saves or ``count`` are chosen.

    The cost of a decision are the linear maps of the blocks that it runs (its prompt's tokens, or one token where text
    is being generated; fills of skipped cache entries are not simulated) and hV for every check that reads the head, or
    hC for one that reads C choices alone.

    Args:
        files: Trace files of one model.
        stopper: The strategy.
        count: At most so many blocks.

    Returns:
        Share of the decisions that leave after each block if all are checked ([L]); what checking all comes to; and
        what checking the chosen ones comes to.

    Raises:
        AdaInferError: On unusable traces or a count below 1.
    """
    if count is not None and count < 1:
        raise AdaInferError(f"count: {count} blocks are none; give 1 or more")
    data = _read(files, stopper)
    n, n_blocks = data.stops.shape
    everywhere = [k for k in range(1, n_blocks) if stopper.wants(k)]
    exits = _exits(data.stops, everywhere)
    shares = [float((exits == k).mean()) for k in range(1, n_blocks + 1)]
    chosen: list[int] = []
    current = np.full(n, n_blocks)
    best = _cost(data, current, chosen)
    while everywhere and len(chosen) < (count or n_blocks):
        trials = []
        for k in everywhere:
            if k not in chosen:
                trial = np.where(data.stops[:, k - 1], np.minimum(current, k), current)
                trials.append((_cost(data, trial, [*chosen, k]), k, trial))
        if not trials or min(trials, key=lambda t: t[:2])[0] >= best:
            break
        best, k, current = min(trials, key=lambda t: t[:2])
        chosen.append(k)
    return shares, _summary(data, exits, everywhere), _summary(data, current, chosen)


def _read(files: Sequence[Path], stopper: Stopper) -> _Instances:
    parts: list[_Instances] = []
    for _, meta, arrays in read_of_one_model(files):
        stops = margins(stopper, meta, arrays) > 0
        top = arrays["top_token"]
        tokens = np.where(arrays["position"] > 0, 1, arrays["prompt_tokens"]).astype(np.float64)
        weights = np.concatenate([[0.0], np.cumsum(meta["block_weights"], dtype=np.float64)])
        head = float(meta["hidden_size"] * meta["vocab_size"])
        is_head = features.needs_head(stopper.features)
        check = head if is_head else 0.0
        if features.needs_choices(stopper.features) and not is_head:
            check = meta["hidden_size"] * float((arrays["request"] >= 0).sum(axis=1).mean())
        parts.append(
            _Instances(stops, top == top[:, -1:], tokens[:, None] * weights, check, head, is_head)
        )
    return _Instances(
        np.concatenate([p.stops for p in parts]),
        np.concatenate([p.agrees for p in parts]),
        np.concatenate([p.block_cost for p in parts]),
        float(np.average([p.check_cost for p in parts], weights=[len(p.stops) for p in parts])),
        parts[0].head_cost,
        parts[0].check_is_head,
    )


def _exits(stops: np.ndarray, blocks: Sequence[int]) -> np.ndarray:
    """[N], the first of the blocks that stops, else L."""
    n, n_blocks = stops.shape
    exits = np.full(n, n_blocks)
    for k in sorted(blocks, reverse=True):
        exits[stops[:, k - 1]] = k
    return exits


def _checks(exits: np.ndarray, blocks: Sequence[int], n_blocks: int) -> np.ndarray:
    """[N], checks up to the exit."""
    made = np.zeros(n_blocks + 1, dtype=int)
    for k in blocks:
        made[k:] += 1
    return made[exits]


def _cost(data: _Instances, exits: np.ndarray, blocks: Sequence[int]) -> float:
    """Mean multiplications of a decision; a check at the exit is the token's own head."""
    n, n_blocks = data.stops.shape
    checks = _checks(exits, blocks, n_blocks)
    final = data.head_cost * ((exits == n_blocks) | (not data.check_is_head))
    return float((data.block_cost[np.arange(n), exits] + data.check_cost * checks + final).mean())


def _summary(data: _Instances, exits: np.ndarray, blocks: Sequence[int]) -> Choice:
    n, n_blocks = data.stops.shape
    dense = float((data.block_cost[:, -1] + data.head_cost).mean())
    return Choice(
        tuple(sorted(blocks)),
        float(exits.mean()),
        float(_checks(exits, blocks, n_blocks).mean()),
        _cost(data, exits, blocks) / dense,
        float(data.agrees[np.arange(n), exits - 1].mean()),
    )
