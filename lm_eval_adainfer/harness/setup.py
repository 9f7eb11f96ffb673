"""How a loaded model exits early: everything that follows from its options, made at once and as one value."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from lm_eval_adainfer.counting import FlopCounter
from lm_eval_adainfer.errors import AdaInferError, UnsupportedModelError
from lm_eval_adainfer.harness.options import Options
from lm_eval_adainfer.prefill.engine import Engine
from lm_eval_adainfer.prefill.forward import verify
from lm_eval_adainfer.prefill.reading import Reading, prepared
from lm_eval_adainfer.readers.base import HEAD, Reader
from lm_eval_adainfer.strategies import features
from lm_eval_adainfer.strategies.base import Schedule, Stopper
from lm_eval_adainfer.strategies.fitted import warn_if_foreign
from lm_eval_adainfer.structure import removal, wrappers
from lm_eval_adainfer.structure.anatomy import Anatomy
from lm_eval_adainfer.structure.hashes import signs_hash

_logger = logging.getLogger(__name__)
Autocast = Callable[[], AbstractContextManager[Any]]


@dataclass
class Setup:
    """What answers, as the options say.

    Attributes:
        anatomy: The model's; without the blocks that a stopper takes out.
        stopper: Of whole documents; of new tokens too, unless the reader reads prompts.
        schedule: After which blocks it is asked.
        reader: What it is asked under.
        reading: That reader on this model, where it runs tokens.
        token_stopper: Of new tokens.
        token_schedule: After which blocks that one is asked.
        token_reader: What that one is asked under.
        engine: Runs documents.
        counter: Counts their operations.
        token_counter: Counts those of new tokens.
        generation: ``early`` or ``dense``.
    """

    anatomy: Anatomy
    stopper: Stopper
    schedule: Schedule
    reader: Reader
    reading: Reading | None
    token_stopper: Stopper
    token_schedule: Schedule
    token_reader: Reader
    engine: Engine
    counter: FlopCounter
    token_counter: FlopCounter
    generation: str

    @classmethod
    def of(
        cls,
        anatomy: Anatomy,
        n_blocks: int,
        options: Options,
        min_layer: Any,
        check_layers: Any,
        softmax_dtype: Any,
        autocast: Autocast,
        name: str,
    ) -> Setup:
        """What the options come to on this model.

        Args:
            anatomy: The loaded model's.
            n_blocks: How many blocks it had when it was loaded.
            options: What is asked for.
            min_layer: As the model's argument.
            check_layers: As the model's argument.
            softmax_dtype: HFLM's.
            autocast: Around every forward.
            name: The model's, for warnings.

        Raises:
            AdaInferError: On options that do not go with the model, or with each other.
        """
        stopper, reader = options.stopper, options.reader
        stopper.bind(n_blocks)
        if stopper.dropped_blocks and (str(min_layer), str(check_layers)) not in (("1", "None"), ("1", "all")):
            _logger.warning(f"min_layer/check_layers: {stopper.kind} asks nothing, so they don't apply")
            min_layer, check_layers = 1, None
        schedule = Schedule(n_blocks, stopper, min_layer, check_layers, reader)
        if stopper.kind != "none" and not stopper.removes_blocks and not schedule.blocks:
            _logger.warning("check_layers/min_layer: they leave no block to ask the stopper at, so it runs dense")
        warn_if_foreign(stopper, name, n_blocks, anatomy.head_hash())
        for one in (reader, options.token_stopper.reader):
            if one is not None and one.maps is not None:
                width, signs = anatomy.block_hidden_size, signs_hash(anatomy.model)
                one.maps.require_model(n_blocks, width, anatomy.head_hash(), signs)
        if stopper.removes_blocks:
            if reader.kind != "head":
                raise AdaInferError(
                    f"reader: {reader.name} has nothing to read with stopper={stopper.kind}, which takes blocks out of "
                    "the model and asks nothing; leave reader= out"
                )
            anatomy = _without(anatomy, stopper, autocast)
        reading: Reading | None = None
        token_stopper, token_schedule, token_reader = stopper, schedule, reader
        if reader.runs_tokens:
            with autocast():
                reading = prepared(anatomy, reader)
            token_stopper = options.token_stopper  # new tokens are asked a strategy of their own
            token_reader = token_stopper.reader or HEAD
            token_schedule = Schedule(n_blocks, token_stopper, reader=token_reader)
        exits = bool(schedule.blocks or token_schedule.blocks)
        if exits:
            anatomy.keep_head_loaded()
        engine = Engine(anatomy, stopper, schedule, softmax_dtype, options.log_features, reader, reading)
        counter, token_counter = FlopCounter(anatomy, stopper, reader), FlopCounter(anatomy, token_stopper, reader)
        if reading is not None and reading.storing is not None:
            counter.copied_weights = token_counter.copied_weights = reading.storing.weights
        _require_checkable(anatomy, options, token_stopper)
        if features.needs_choices(stopper.features):
            with autocast():
                _ = anatomy.reads_few_tokens  # it takes forwards of its own: now, and not in a run
        return cls(
            anatomy, stopper, schedule, reader, reading, token_stopper, token_schedule, token_reader, engine, counter,
            token_counter, options.generation if exits else "dense",
        )  # fmt: skip


def taken_apart(model: Any, autocast: Autocast) -> Anatomy:
    """The model's anatomy, checked; whatever goes wrong in these few forwards is told in one sentence.

    Raises:
        AdaInferError: Where it can't exit early.
    """
    try:
        anatomy = Anatomy(model)
        with autocast():
            wrappers.require_nothing_around(anatomy)
            verify(anatomy)
    except (AdaInferError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"pretrained: {type(model).__name__} can't exit early: its forward fails when rows leave it "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
        ) from error
    return anatomy


def _without(whole: Anatomy, stopper: Stopper, autocast: Autocast) -> Anatomy:
    """Take the stopper's blocks out of the model; what is left is taken apart and checked as any model is."""
    removal.drop(whole, stopper.dropped_blocks)
    found = taken_apart(whole.model, autocast)
    found.whole_weights, found.whole_widths = whole.block_weights, whole.attention_width
    return found


def _require_checkable(anatomy: Anatomy, options: Options, token_stopper: Stopper) -> None:
    """Refuse a way of asking the head, ``head_check``, that the stopper of new tokens can't be asked by."""
    if options.shortlist and token_stopper.carries:
        raise AdaInferError(
            f"head_check: shortlist needs a stopper that decides from one block alone, which {token_stopper.kind} with "
            f"{', '.join(token_stopper.features)} does not; use head_check=exact"
        )
    if options.screen and features.needs_head(token_stopper.features) and not token_stopper.rises:
        raise AdaInferError(
            "head_check: screen needs a stopper that reads the head for gap or top_prob alone and stops where they are "
            f"large, as gap and softmax do, and {token_stopper.kind} does not; use head_check=exact"
        )
    if options.shortlist or options.screen:
        anatomy.require_candidates()
