"""Where a stopper's exits happen in traces, and after which few blocks asking it pays (``check_layers=``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.readers.base import HEAD, Reader
from lm_eval_adainfer.strategies import features
from lm_eval_adainfer.strategies.base import Stopper
from lm_eval_adainfer.traces.file import read_of_one_model
from lm_eval_adainfer.traces.margins import asked, margins


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
    reading_cost: np.ndarray  # [N, L], of what the reader runs after block k, before the head
    check_cost: np.ndarray  # [N], of the head at a check, or of its rows for the choices
    head_cost: float
    reads: bool  # whether a check reads either
    check_is_head: bool  # whether a check reads the whole head, so that the one at the exit is the answer's


def choose(
    files: Sequence[Path], stopper: Stopper, count: int | None = None, reader: Reader = HEAD
) -> tuple[list[float], Choice, Choice]:
    """Choose blocks greedily: always the one that saves most, until none saves or ``count`` are chosen.

    The cost of a decision are the linear maps of the blocks that it runs (its prompt's tokens, or one token where text
    is being generated; fills of skipped cache entries are not simulated) and for every check that reads the head hV, or
    hC for one that reads C choices alone, and what the reader runs for it.

    Args:
        files: Trace files of one model.
        stopper: The strategy.
        count: At most so many blocks.
        reader: Under which it is asked; only blocks that were recorded under it can be chosen.

    Returns:
        Share of the decisions that leave after each block if all recorded ones are checked ([L]); what checking these
        comes to; and what checking the chosen ones comes to.

    Raises:
        AdaInferError: On unusable traces or a count below 1.
    """
    if count is not None and count < 1:
        raise AdaInferError(f"count: {count} blocks are none; give 1 or more")
    data, everywhere = _read(files, stopper, reader)
    n, n_blocks = data.stops.shape
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


def _read(files: Sequence[Path], stopper: Stopper, reader: Reader) -> tuple[_Instances, list[int]]:
    parts: list[_Instances] = []
    blocks: tuple[int, ...] = ()
    for _, meta, arrays in read_of_one_model(files, reader.name):
        blocks = asked(stopper, meta)
        stops = margins(stopper, meta, arrays, blocks) > 0
        top = arrays["top_token"]
        tokens = np.where(arrays["position"] > 0, 1, arrays["prompt_tokens"]).astype(np.float64)
        weights = np.concatenate([[0.0], np.cumsum(meta["block_weights"], dtype=np.float64)])
        head, is_head = float(meta["hidden_size"] * meta["vocab_size"]), features.needs_head(stopper.features)
        of_choices = features.needs_choices(stopper.features) and not is_head
        check = np.full(len(top), head if is_head else 0.0)
        if of_choices:
            check = meta["hidden_size"] * (arrays["request"] >= 0).sum(axis=1).astype(np.float64)
        costs = tokens[:, None] * weights, reading(reader, meta, tokens), check
        parts.append(_Instances(stops, top == top[:, -1:], *costs, head, is_head or of_choices, is_head))
    found = _Instances(
        np.concatenate([p.stops for p in parts]),
        np.concatenate([p.agrees for p in parts]),
        np.concatenate([p.block_cost for p in parts]),
        np.concatenate([p.reading_cost for p in parts]),
        np.concatenate([p.check_cost for p in parts]),
        parts[0].head_cost,
        parts[0].reads,
        parts[0].check_is_head,
    )
    return found, list(blocks)


def reading(reader: Reader, meta: Mapping[str, Any], tokens: np.ndarray) -> np.ndarray:
    """[N, L], multiplications of what a reader runs for a prompt of so many tokens ([N]) after every block."""
    n_blocks, weights = meta["n_blocks"], np.array(meta["block_weights"], dtype=float)
    if not reader.runs_tokens:
        per_token = np.array([reader.flops(k) / 2 for k in range(1, n_blocks + 1)])
        return np.tile(per_token, (len(tokens), 1))
    # what the blocks behind each come to: all of their maps, and those that lead to keys and values
    keys = np.array(meta.get("stored_weights", weights), dtype=float)
    whole, stored = (np.append(np.cumsum(of[::-1])[::-1], 0.0)[1:] for of in (weights, keys))
    run = np.minimum(reader.width, tokens)
    others = tokens - run if reader.kind == "copy" else 0 * tokens
    return run[:, None] * whole + others[:, None] * stored


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
    decision = np.arange(n)
    early = exits < n_blocks
    cost = data.block_cost[decision, exits] + data.head_cost * ~(early & data.check_is_head)
    if data.reads:
        for k in blocks:
            cost = cost + (exits >= k) * (data.reading_cost[:, k - 1] + data.check_cost)
        return float(cost.mean())
    return float((cost + early * data.reading_cost[decision, exits - 1]).mean())


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
