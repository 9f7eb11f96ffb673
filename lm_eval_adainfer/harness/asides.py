"""Answering in another way for a while: dense, or with another strategy; afterwards the model is as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from lm_eval_adainfer.counting import FlopCounter
from lm_eval_adainfer.harness.options import Options
from lm_eval_adainfer.harness.texts import Texts
from lm_eval_adainfer.prefill.engine import Engine
from lm_eval_adainfer.readers.base import HEAD
from lm_eval_adainfer.strategies import specs
from lm_eval_adainfer.strategies.base import Schedule


@contextmanager
def using(lm: Any, options: Options, check_layers: Any = None) -> Iterator[None]:
    """Answer with another strategy, reader or KV policy for a while; totals and counts are as before afterwards.

    Args:
        lm: The ``AdaInferLM``.
        options: What is used.
        check_layers: As the argument of the model.
    """
    known = lm.known_sharing
    with _as_before(lm):
        lm.options = options
        lm.use(1, check_layers)
        lm.found_sharing = lm.known_sharing = None  # which is another one under another reader
        try:
            yield
        finally:
            lm.known_sharing = known


@contextmanager
def dense(lm: Any) -> Iterator[dict[str, Any]]:
    """Answer dense for a while, by the forward of every run, and change neither totals nor caches.

    Args:
        lm: The ``AdaInferLM``.

    Yields:
        What it cost, filled in at the end: measured seconds, counted tokens and block executions x tokens.
    """
    none = specs.parse("none")
    schedule, counter, before = Schedule(lm.n_blocks, none), FlopCounter(lm.anatomy, none), lm.seconds
    cost: dict[str, Any] = {}
    with _as_before(lm):
        generation = lm.generation
        lm.take(replace(
            lm.setup, stopper=none, schedule=schedule, reader=HEAD, token_stopper=none, token_schedule=schedule,
            token_reader=HEAD, engine=Engine(lm.anatomy, none, schedule, lm.softmax_dtype), counter=counter,
            token_counter=counter,
        ))  # fmt: skip
        lm.generation, lm.one_pass = generation, None
        try:
            with lm.without_cache():
                yield cost
            cost["tokens_counted"], cost["block_tokens_counted"] = lm.engine.tokens, lm.engine.block_tokens
            cost["seconds_measured"] = lm.seconds - before
        finally:
            lm.known_sharing = lm.found_sharing or lm.known_sharing


@contextmanager
def _as_before(lm: Any) -> Iterator[None]:
    """Whatever is done inside, answering goes on afterwards as before it, and so do the totals.

    Only what was found out of the model's cache stays: how its tokens are laid out.
    """
    counts = lm.seconds, lm.generating_seconds, lm.generated_tokens
    before = lm.setup, lm.generation, lm.options, lm.batch_sizes, lm.one_pass, lm.found_sharing
    texts, lm.texts = lm.texts, Texts(lm, lm.texts.known_windows)
    try:
        yield
    finally:
        setup, generation, lm.options, lm.batch_sizes, lm.one_pass, lm.found_sharing = before
        lm.take(setup)
        lm.generation = generation
        lm.seconds, lm.generating_seconds, lm.generated_tokens = counts
        texts.known_windows = lm.texts.known_windows
        lm.texts = texts
