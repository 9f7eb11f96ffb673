"""The model type ``adainfer``: lm-eval's HFLM with an early-exit forward. Requests to token rows and back."""

from __future__ import annotations

import logging
import math
import os
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any, Protocol

import torch
from lm_eval import utils
from lm_eval.api.model import CacheHook, hash_args
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from tqdm import tqdm

from lm_eval_adainfer import paths
from lm_eval_adainfer.counting import FlopCounter
from lm_eval_adainfer.errors import AdaInferError, UnsupportedModelError, report_errors_in_one_sentence
from lm_eval_adainfer.generation.decoded import Decoded, record_of
from lm_eval_adainfer.generation.loop import Asked, Generator, Seeds, Stop
from lm_eval_adainfer.generation.probes import prepare
from lm_eval_adainfer.generation.prompts import PromptExits
from lm_eval_adainfer.generation.settings import Settings, check_checkpoint
from lm_eval_adainfer.harness import answer_cache, arguments, auto, identity, metrics, pilot, run_record
from lm_eval_adainfer.harness.answers import LogLikelihood, Text, rolling
from lm_eval_adainfer.harness.batch_sizes import BatchSizes
from lm_eval_adainfer.harness.options import Options, check_stock
from lm_eval_adainfer.prefill import planning, probes
from lm_eval_adainfer.prefill.documents import Answer, Document, Row
from lm_eval_adainfer.prefill.engine import Engine
from lm_eval_adainfer.prefill.exit_records import record_of_document, record_of_windows, share_of_checks
from lm_eval_adainfer.prefill.forward import first_not_finite, verify
from lm_eval_adainfer.prefill.planning import Batch
from lm_eval_adainfer.prefill.probes import Sharing
from lm_eval_adainfer.prefill.reading import Reading, prepared
from lm_eval_adainfer.readers.base import HEAD
from lm_eval_adainfer.records import ExitRecord
from lm_eval_adainfer.strategies import features, specs
from lm_eval_adainfer.strategies.base import Schedule
from lm_eval_adainfer.strategies.fitted import warn_if_foreign
from lm_eval_adainfer.structure import removal, unwrapping, wrappers
from lm_eval_adainfer.structure.anatomy import Anatomy
from lm_eval_adainfer.structure.hashes import signs_hash
from lm_eval_adainfer.structure.storing import watch_storing
from lm_eval_adainfer.structure.weights import input_device
from lm_eval_adainfer.structure.windows import Windows

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from lm_eval_adainfer.harness.one_pass import OnePass

eval_logger = logging.getLogger(__name__)

DEMO = "adainfer-demo"
_DEAR = 0.1  # of the dense work: checks that cost more are warned of

# what answers that are given aside leave as it was (``AdaInferLM.dense_aside``)
_SET_ASIDE = (
    "stopper", "schedule", "reader", "engine", "counter", "seconds", "generating_seconds", "generated_tokens",
    "batch_sizes", "_found_sharing", "_windows", "token_stopper", "token_schedule", "token_reader", "token_counter",
    "_prompt_exits", "one_pass",
)  # fmt: skip

TokenRequest = tuple["tuple[str, str] | None", list[int], list[int]]


class TextObserver(Protocol):
    """What watches texts that are generated dense (``traces.recording.TextRecorder``)."""

    def text(self, arguments: Any, prompt: list[int], new: list[int]) -> None:
        """See the token ids of a finished text and of its prompt, and the arguments of its request."""


def _identified(method: Callable[..., Any]) -> Callable[..., Any]:
    """Answers that one call gives carry one fingerprint, derived when it begins (or by the run around it)."""

    @wraps(method)
    def answering(self: AdaInferLM, *args: Any, **kwargs: Any) -> Any:
        with self.identified():
            return method(self, *args, **kwargs)

    return answering


def _require_unicode(text: str) -> None:
    """Refuse half a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        near = text[max(0, error.start - 20) : error.end + 20]
        raise AdaInferError(
            f"request: the text {near!r} holds half a surrogate pair, which is no Unicode; repair the document"
        ) from None


class AdaInferLM(HFLM):
    """A Hugging Face causal LM whose forward stops early, document by document.

    Everything HFLM takes is taken too, and:

    Args:
        pretrained: As HFLM's; ``adainfer-demo`` is the small model that ships with the package.
        stopper: When to stop. ``none`` (dense, the default), ``gap`` or ``gap:0.8`` (P(top 1) - P(top 2) exceeds
            it; also ``softmax:0.9``), ``saturation:0.98`` (the hidden state's cosine with the block before exceeds
            it), ``patience:3`` (the top token of 3 asked blocks in a row is the same), ``choice_gap:0.5`` (the gap
            among choices of one token each exceeds it; ``choice_gap:0.5:3``: after 3 asked blocks in a row),
            ``fixed:24`` (always after block 24), ``shortgpt:last5`` (without the last 5 blocks), ``shortgpt:bi:8:FILE``
            (without the 8 blocks of least Block Influence, as ``adainfer influence`` wrote them to FILE), a built-in
            name (``demo``, ``svm``, ``best``: made on ``adainfer-demo``), or a stopper file written by ``adainfer
            tune``, ``fit``, ``calibrate`` or ``influence``.
        min_layer: No exit before this block (1 to L; default 1).
        check_layers: After which blocks the stopper is asked: ``all`` (default with ``reader=head`` and ``tuned``),
            ``every:2``, or a list ``8+12+16``. With ``copy`` and ``sim``, where asking is dear, the default is those
            that the stopper's file names, or at most four of the last 40%.
        generation: What ``generate_until`` does: ``early`` (default), where every new token leaves at its own block, or
            ``dense``.
        kv_policy: What a token that goes deeper than its predecessors did finds in the cache: ``recompute`` (default):
            their blocks are run first, so that it sees exactly the dense model's cache; ``propagate``: their exit
            states are projected into it (CALM's state copy; approximate, cheaper). With ``reader=copy`` or ``sim`` it
            is ``propagate``, for the prompt as well.
        head_check: How ``generate_until`` asks the stopper: ``exact`` (default): from the full vocabulary at every
            checked block; ``shortlist`` (or ``shortlist:64``, the number of candidates): from the top tokens of the
            token's previous full check, confirmed by the full vocabulary before it leaves: never sooner than ``exact``;
            ``screen`` (or ``screen:4096``): likewise from the first 4,096 token ids and the row's own tokens.
        prefix_cache: Tokens of a prefix shared by documents (few-shot examples, a system prompt) that are run once and
            whose keys and values are kept while these documents are scored; 0 runs every prompt whole. Default 4096.
        pilot: How many documents of every task an evaluation answers dense, too, before it begins, to warn where early
            exit changes too many answers; 0 answers none. Default 16. The record of the run holds what came of it.
        reader: What the model would answer after a block, which stoppers decide from and answers are scored by:
            ``head`` (default: final norm and output head of the last token, as in the paper), ``copy`` or ``copy:32``
            (the prompt's last 1 or 32 tokens run on through the later blocks, the others' keys and values are made
            from their states here), ``sim`` or ``sim:32`` (the first and the last 1 or 32 tokens run on, and see each
            other alone), ``tuned:FILE`` (affine maps written by ``adainfer fit reader``). A stopper file names its own.
        token_stopper: With ``reader=copy`` or ``sim``, whose ``stopper`` decides how deep the prompt goes: when new
            tokens stop in ``generate_until`` (``none`` by default; anything that ``stopper`` takes, read by ``head`` or
            a file's own ``tuned`` reader).
        stopper_dir: With ``stopper=auto``, which takes the stopper that ``adainfer tune`` made for this model, the
            evaluation's tasks and its shots: the folder in which files are looked for. By default the model's own, and
            ``lm_eval_adainfer`` in the user's cache.
        log_features: Put the features after every block up to the exit into the samples (``--log_samples``);
            default False.

    Raises:
        AdaInferError: On a wrong argument or a model that can't exit early, in one sentence.
    """

    reports_exits = True  # to ``metrics``

    def __init__(
        self,
        pretrained: Any = DEMO,
        stopper: Any = "none",
        min_layer: int | str = 1,
        check_layers: Any = None,
        log_features: bool | str = False,
        generation: str = "early",
        kv_policy: str | None = None,
        head_check: str = "exact",
        prefix_cache: int | str = 4096,
        reader: Any = None,
        token_stopper: Any = None,
        pilot: int | str = pilot.DOCUMENTS,
        stopper_dir: Any = None,
        **kwargs: Any,
    ) -> None:
        report_errors_in_one_sentence()
        # before the weights are loaded: a wrong argument should fail at once
        others = log_features, generation, kv_policy, head_check, prefix_cache, pilot, reader, token_stopper
        self._auto = auto.Auto.of(stopper, stopper_dir, pretrained, min_layer, check_layers, others)
        self.auto_record: dict[str, Any] | None = None  # which file was taken
        self.arguments_read, self.asked_after = others, (min_layer, check_layers)
        self.one_pass: OnePass | None = None  # what keeps the dense answers of its passes, too
        self.answered: OnePass | None = None  # what has its own answers, of another model's passes
        self._contexts: dict[str, list[int] | None] = {}  # those that several requests of one call have, encoded once
        self._sizes = BatchSizes()
        self.options = Options.read(*((stopper, *others) if self._auto is None else self._auto.waiting()))
        strategy = self.options.stopper
        self.stopper_name = strategy.kind if stopper is strategy else str(stopper)
        check_stock(kwargs)
        if isinstance(pretrained, os.PathLike):  # which HFLM would take for a model object
            pretrained = os.fspath(pretrained)
        self._further = arguments.further(kwargs, HFLM, AdaInferLM)
        if not isinstance(pretrained, str):
            arguments.check_beside_object(pretrained, kwargs, self._further)
        if pretrained == DEMO:
            if not paths.demo_model().is_dir():
                raise AdaInferError(
                    f"pretrained: {DEMO} is not in this installation; install the package from its wheel"
                )
            pretrained = str(paths.demo_model())
        pretrained = unwrapping.uncompiled(pretrained)
        kwargs.setdefault("device", "cuda" if torch.cuda.is_available() else "cpu")
        self._pretrained_name = DEMO if pretrained == str(paths.demo_model()) else pretrained
        try:
            super().__init__(pretrained, **kwargs)
        except TypeError as error:  # HFLM hands unknown arguments on to the model's constructor
            raise AdaInferError(f"model_args: {str(error).splitlines()[0]}") from error
        if self.backend == "seq2seq":  # a model object of a type that has an encoder, too
            raise AdaInferError(
                f"pretrained: lm-eval takes {type(self.model).__name__} for an encoder-decoder model; if it is a "
                "decoder, pass backend=causal"
            )
        if self.prefix_token_id is None:
            raise AdaInferError(
                "tokenizer: it has neither a BOS nor an EOS token to begin a text with; give prefix_token_id=0, say"
            )
        self._set_ranks()
        if self.device.type == "meta":  # a model object whose weights are offloaded
            self._device: torch.device = input_device(self.model)
        if strategy.removes_blocks and not isinstance(pretrained, str):
            self._model = unwrapping.with_same_weights(self.model)  # the caller's model keeps its blocks
        self.anatomy = self._taken_apart()
        self.n_blocks = self.anatomy.n_blocks
        self._use(min_layer, check_layers)
        self._identified = ""  # the fingerprint, for the length of a run
        if any(weight.device.type == "meta" for weight in self.model.parameters()):
            self.anatomy.weights_hash(self.model)  # it reads offloaded weights once: now, and not in a run
        self.seconds = 0.0
        self.generating_seconds = 0.0
        self.generated_tokens = 0
        self._generated: defaultdict[str, deque[Text]] = defaultdict(deque)
        self._max_length_asked: int | None = None  # gen_kwargs' max_length of the requests being generated
        self._exit_records: deque[ExitRecord] = deque()
        self.text_observer: TextObserver | None = None  # what is shown every text that is generated
        self._generated_tokens: deque[tuple[list[int], list[int]]] = deque()  # for it, as the exit records are
        self.set_cache_hook(CacheHook(None))
        self.run_totals: dict[str, Any] = {}
        self.pilot_record: dict[str, Any] | None = None
        self.promise_record: dict[str, Any] | None = None
        self.seen_record: dict[str, Any] | None = None
        self._document_keys: list[Any] = []
        self._warned_not_finite = False
        self._warned_of_dear_checks = False
        self._warned_without_choices: set[str] = set()
        self._found_sharing: Sharing | None = None  # found out when something is first shared
        self._windows: Windows | None = None  # watched when generation first exits early
        self._prompt_exits: PromptExits | None = None  # made then, for a reader that reads prompts
        self._found_aside: tuple[Sharing | None, Windows | None] = None, None
        metrics.install()

    # ------------------------------------------------------------------ set-up
    def _get_config(self, pretrained: str, **kwargs: Any) -> None:
        """Refuse, before the weights are loaded, an encoder-decoder model and settings that transformers can't read."""
        try:
            super()._get_config(pretrained, **kwargs)
        except OSError as error:  # transformers' and the hub's errors are subclasses
            found = " ".join(str(error).split())
            raise AdaInferError(
                f"pretrained: {pretrained!r} is neither a model's folder nor one that the hub gives ({found:.200})"
            ) from error
        arguments.check_spelling(self._further, self._config)
        if getattr(self._config, "is_encoder_decoder", False):
            raise AdaInferError(
                f"pretrained: {pretrained} is an encoder-decoder model ({self._config.model_type}), "
                "but adainfer needs a decoder-only one"
            )
        check_checkpoint(pretrained, kwargs.get("revision"), kwargs.get("subfolder"))

    def _use(self, min_layer: Any, check_layers: Any) -> None:
        """Set up what depends on the options' strategy and reader."""
        strategy = self.options.stopper
        self.stopper = strategy
        strategy.bind(self.n_blocks)
        self.reader = self.options.reader
        if strategy.dropped_blocks and (str(min_layer), str(check_layers)) not in (("1", "None"), ("1", "all")):
            eval_logger.warning(f"min_layer/check_layers: {strategy.kind} asks nothing, so they don't apply")
            min_layer, check_layers = 1, None
        self.schedule = Schedule(self.n_blocks, strategy, min_layer, check_layers, self.reader)
        if strategy.kind != "none" and not strategy.removes_blocks and not self.schedule.blocks:
            eval_logger.warning("check_layers/min_layer: they leave no block to ask the stopper at, so it runs dense")
        warn_if_foreign(strategy, self._model_name(), self.n_blocks, self.anatomy.head_hash())
        for reader in (self.reader, self.options.token_stopper.reader):
            if reader is not None and reader.maps is not None:
                width, signs = self.anatomy.block_hidden_size, signs_hash(self.anatomy.model)
                reader.maps.require_model(self.n_blocks, width, self.anatomy.head_hash(), signs)
        if strategy.removes_blocks:
            if self.reader.kind != "head":
                raise AdaInferError(
                    f"reader: {self.reader.name} has nothing to read with stopper={strategy.kind}, which takes blocks "
                    "out of the model and asks nothing; leave reader= out"
                )
            self._drop_blocks()
        self.reading: Reading | None = None
        if self.reader.runs_tokens:
            with self._autocast():
                self.reading = prepared(self.anatomy, self.reader)
        # what new tokens are asked: with a reader that reads prompts, a strategy of their own
        self.token_stopper, self.token_schedule, self.token_reader = strategy, self.schedule, self.reader
        if self.reader.runs_tokens:
            self.token_stopper = self.options.token_stopper
            self.token_reader = self.token_stopper.reader or HEAD
            self.token_schedule = Schedule(self.n_blocks, self.token_stopper, reader=self.token_reader)
        if self.schedule.blocks or self.token_schedule.blocks:
            self.anatomy.keep_head_loaded()
        self.engine = Engine(
            self.anatomy, strategy, self.schedule, self.softmax_dtype, self.options.log_features, self.reader,
            self.reading,
        )
        self.counter = FlopCounter(self.anatomy, strategy, self.reader)
        self.token_counter = FlopCounter(self.anatomy, self.token_stopper, self.reader)
        if self.reading is not None and self.reading.storing is not None:
            self.counter.copied_weights = self.token_counter.copied_weights = self.reading.storing.weights
        self.generation = self.options.generation if self.schedule.blocks or self.token_schedule.blocks else "dense"
        if self.options.shortlist and self.token_stopper.carries:
            raise AdaInferError(
                f"head_check: shortlist needs a stopper that decides from one block alone, which "
                f"{self.token_stopper.kind} with {', '.join(self.token_stopper.features)} does not; use "
                "head_check=exact"
            )
        if self.options.screen and features.needs_head(self.token_stopper.features) and not self.token_stopper.rises:
            raise AdaInferError(
                "head_check: screen needs a stopper that reads the head for gap or top_prob alone and stops where they "
                f"are large, as gap and softmax do, and {self.token_stopper.kind} does not; use head_check=exact"
            )
        if self.options.shortlist or self.options.screen:
            self.anatomy.require_candidates()
        if features.needs_choices(strategy.features):
            with self._autocast():
                _ = self.anatomy.reads_few_tokens  # it takes forwards of its own: now, and not in a run

    def resolve_auto(self, tasks: dict[str, Any], how: Mapping[str, Any]) -> None:
        """Take the stopper that was tuned for what an evaluation asks, where the model was built with ``stopper=auto``.

        Args:
            tasks: The evaluation's, by name.
            how: The arguments of lm-eval's ``evaluate``, by name.

        Raises:
            AdaInferError: Where there is none, or more than one.
        """
        if self._auto is None:
            return
        path, strategy, blocks = self._auto.find(self, tasks, how)
        self.options = self._auto.options(path, strategy)
        self.stopper_name = str(path)
        check_layers = blocks if self._auto.check_layers is None else self._auto.check_layers
        if self.one_pass is not None and self.options.stopper.removes_blocks:
            raise AdaInferError(f"stopper: {path} takes blocks out of the model; give it by its name instead of auto")
        self._use(self._auto.min_layer, check_layers)
        self._found_sharing, self._windows, self._prompt_exits = None, None, None
        self._found_aside = None, None
        self.auto_record = {"file": str(path), "tasks": dict(strategy.info["tuned"]["shots"])}

    @contextmanager
    def using(self, options: Options, check_layers: Any = None) -> Iterator[None]:
        """Answer with another strategy, reader or KV policy for a while; totals and counts are as before afterwards.

        Args:
            options: What is used.
            check_layers: As the argument of the model.
        """
        names = (*_SET_ASIDE, "options", "reading", "generation")
        before, (sharing, windows) = {name: vars(self)[name] for name in names if name in vars(self)}, self._found_aside
        windows = self._windows or windows
        try:
            self.options = options
            self._use(1, check_layers)
            self._found_sharing = self._windows = self._prompt_exits = None
            self._found_aside = None, windows
            yield
        finally:
            self._found_aside = sharing, self._windows or windows  # what was found out of the model stays true
            for name in names:
                self.__dict__.pop(name, None)
            self.__dict__.update(before)

    def _set_ranks(self) -> None:
        """Stock HFLM sets rank and world size only where there are several GPUs; processes on CPUs count too."""
        accelerator = getattr(self, "accelerator", None)
        if accelerator is not None:
            self._rank = accelerator.process_index
            self._world_size = accelerator.num_processes

    def _taken_apart(self) -> Anatomy:
        """The model's anatomy, checked; whatever goes wrong in these few forwards is told in one sentence."""
        try:
            anatomy = Anatomy(self.model)
            with self._autocast():
                wrappers.require_nothing_around(anatomy)
                verify(anatomy)
        except (AdaInferError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise UnsupportedModelError(
                f"pretrained: {type(self.model).__name__} can't exit early: its forward fails when rows leave it "
                f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
            ) from error
        return anatomy

    def _drop_blocks(self) -> None:
        """Take the stopper's blocks out of the model; what is left is taken apart and checked as any model is."""
        whole = self.anatomy
        removal.drop(whole, self.stopper.dropped_blocks)
        self.anatomy = self._taken_apart()
        self.anatomy.whole_weights, self.anatomy.whole_widths = whole.block_weights, whole.attention_width

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            device_type=self.device.type,
            dtype=self.mixed_precision_dtype,
            enabled=self.mixed_precision_dtype is not None,
        )

    def _model_name(self) -> str:
        name = self._pretrained_name
        return name if isinstance(name, str) else (getattr(name, "name_or_path", "") or type(name).__name__)

    @property
    def fingerprint(self) -> str:
        """16 hex digits of whatever changes an answer (``identity``), derived anew whenever no run is going on."""
        return self._identified or identity.fingerprint(self)

    @contextmanager
    def identified(self) -> Iterator[None]:
        """Derive the fingerprint once for all answers that are given inside, and hold the cache to it.

        Raises:
            AdaInferError: Where the model is no longer the one whose answers the cache holds.
        """
        if self._auto is not None and self.auto_record is None:
            raise AdaInferError(
                "stopper: auto is found by the tasks of an evaluation; give a stopper file where there is none"
            )
        if self._identified:
            yield
            return
        self._identified = identity.fingerprint(self)
        try:
            answer_cache.require_own(self.cache_hook.dbdict, self._identified)
            yield
        finally:
            self._identified = ""

    def _dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    # ------------------------------------------------------------------ tokens
    def tok_encode(self, string: str, *args: Any, **kwargs: Any) -> list[int]:
        """As HFLM's, which encodes all requests before the model runs the first.

        Raises:
            AdaInferError: On text that is no Unicode, and on tokens that the model has no embedding for.
        """
        is_context = not args and not kwargs and string in self._contexts
        if is_context and (ids := self._contexts[string]) is not None:
            return ids
        _require_unicode(string)
        ids = super().tok_encode(string, *args, **kwargs)
        self._require_known(ids)
        if is_context:
            self._contexts[string] = ids
        return ids

    def _require_known(self, ids: Sequence[int]) -> None:
        """Refuse tokens that the model has no embedding for."""
        known = self.model.get_input_embeddings().weight.shape[0]
        if ids and max(ids) >= known:
            raise AdaInferError(
                f"tokenizer: it gives token {max(ids)}, but the model has embeddings for {known} tokens; give the "
                "tokenizer that belongs to the model"
            )

    def _warn_not_finite(self, tokens: Sequence[int]) -> None:
        """Say once that a row of tokens led to NaN, and where."""
        if self._warned_not_finite:
            return
        self._warned_not_finite = True
        with self._autocast():
            block = first_not_finite(self.anatomy, tokens)
        where = "the output head gives" if block is None else f"block {block} gives" if block else "the embeddings give"
        eval_logger.warning(
            f"dtype: {where} NaN or infinite numbers in {self._dtype()}, so a document of {len(tokens)} tokens (and "
            "maybe others) runs all blocks and has NaN scores; another dtype may help"
        )

    def _warn_without_choices(self, without: int, total: int, what: str) -> None:
        """Say once where the stopper reads choices that some documents, or texts, do not have."""
        named = [name for name in self.stopper.features if features.FEATURES[name].choices]
        if not named or not without or not self.schedule.blocks or what in self._warned_without_choices:
            return
        self._warned_without_choices.add(what)
        eval_logger.warning(
            f"stopper: it reads {', '.join(named)}, which {without} of {total} {what} do not have (it takes two or "
            "more choices of one token each); they run dense"
        )

    # ------------------------------------------------------------------ loglikelihood
    @_identified
    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Any]:
        """As HFLM's, every answer with its document's exit record."""
        for context, continuation in (r.args for r in requests):
            if context == "" and not self.tok_encode(continuation, add_special_tokens=False):
                raise _nothing_to_score(continuation)
        self._document_keys = [
            (r.task_name, r.doc_id) if r.task_name is not None and r.doc_id is not None else (None, r.args[0])
            for r in requests
        ]
        times = Counter(r.args[0].rstrip() for r in requests)  # a context is encoded without the spaces behind it
        self._contexts = {context: None for context, n in times.items() if n > 1}
        try:
            if self.answered is not None:
                return self._already_answered(self.answered, requests, disable_tqdm)
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        finally:
            self._document_keys, self._contexts = [], {}

    def _already_answered(self, passes: OnePass, requests: list[Instance], disable_tqdm: bool) -> list[Any]:
        """The answers that another model's passes have given, and those to what it was not asked."""
        found: list[Any] = passes.answers(requests, self._document_keys)
        missing = [n for n, answer in enumerate(found) if answer is None]
        if missing:
            self._document_keys = [self._document_keys[n] for n in missing]
            own = super().loglikelihood([requests[n] for n in missing], disable_tqdm=disable_tqdm)
            for n, answer in zip(missing, own, strict=True):
                found[n] = answer
        return found

    def score_tokens(self, pairs: Sequence[tuple[list[int], list[int]]], keys: Sequence[Any]) -> list[Any]:
        """Log-probabilities of continuations whose tokens are known, each with its document's exit record.

        Args:
            pairs: The tokens of a context, and of its continuation.
            keys: Per pair, what it has in common with the others of its document.
        """
        self._document_keys = list(keys)
        try:
            return self._loglikelihood_tokens([(None, *pair) for pair in pairs], disable_tqdm=True)
        finally:
            self._document_keys = []

    @_identified
    def _loglikelihood_tokens(
        self,
        requests: list[TokenRequest],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[Any]:
        keys = self._document_keys or [(None, tuple(r[1])) for r in requests]
        documents = self.documents(requests, keys)
        if self.engine.observer is None:
            self._warn_without_choices(sum(not d.has_choices for d in documents), len(documents), "documents")
        self._warn_of_dear_checks(documents)
        results: list[LogLikelihood | None] = [None] * len(requests)
        progress = tqdm(
            total=len(requests),
            disable=disable_tqdm or self.rank != 0,
            desc="Running loglikelihood requests",
        )
        self.engine.dense = None if self.one_pass is None else self.one_pass.too
        try:
            for batches in self._batches(documents, override_bs):
                started = time.perf_counter()
                with self._autocast():
                    self.engine.run(batches)
                self.seconds += time.perf_counter() - started
                for document in (document for batch in batches for document in batch.documents):
                    record = record_of_document(document, self.counter, self.fingerprint, self.options.log_features)
                    finished = {}
                    for row, answer in [(r, a) for r in document.rows for a in r.answers]:
                        result = LogLikelihood(answer.logprob, answer.is_greedy, record, answer.top1, answer.top)
                        results[answer.request] = result
                        if (strings := requests[answer.request][0]) is not None:
                            finished[hash_args("loglikelihood", strings)] = result
                        if math.isnan(answer.logprob):
                            self._warn_not_finite(row.tokens)
                        progress.update(1)
                    answer_cache.remember(self.cache_hook.dbdict, finished)
                    if self.one_pass is not None:
                        self.one_pass.keep(document, requests, keys)
        finally:
            progress.close()
        return results

    def _warn_of_dear_checks(self, documents: Sequence[Document]) -> None:
        """Say once where asking a reader that runs tokens may cost more than it is likely to save.

        A tuned stopper's blocks were chosen with that cost counted.
        """
        if not (self.reader.runs_tokens and self.stopper.features) or self._warned_of_dear_checks:
            return
        if self.stopper.info.get("tuned", {}).get("check_layers") == list(self.schedule.blocks):
            return
        share = share_of_checks(documents, self.counter, self.schedule)
        if share > _DEAR:
            self._warned_of_dear_checks = True
            blocks = ", ".join(map(str, self.schedule.blocks))
            eval_logger.warning(
                f"check_layers: asking under reader={self.reader.name} after block {blocks} costs {share:.0%} of the "
                "dense work of a document that does not leave (counted); fewer or later blocks cost less"
            )

    def documents(self, requests: Sequence[TokenRequest], keys: Sequence[Any]) -> list[Document]:
        """Group tokenised requests into documents, one row per distinct (context, continuation[:-1]).

        Args:
            requests: ((context, continuation) or None, context tokens, continuation tokens).
            keys: Per request, what it has in common with the other requests of its document.
        """
        grouped: dict[Any, dict[Any, Row]] = {}
        contexts: dict[Any, dict[tuple[int, ...], Any]] = {}  # document -> context -> key of the row that decides
        for n, ((strings, context, continuation), key) in enumerate(zip(requests, keys, strict=True)):
            if not continuation:
                raise _nothing_to_score(strings[1] if strings else "")
            if not context:
                raise AdaInferError(
                    f"request: the context {strings[0] if strings else ''!r} has no token; give one of at least one "
                    "token, or an empty text"
                )
            if len(continuation) > self.max_length:
                raise AdaInferError(
                    f"max_length: a continuation of {len(continuation)} tokens does not fit the window of "
                    f"{self.max_length}; give a larger max_length or a shorter continuation"
                )
            before = tuple(context)
            row_key = (before, tuple(continuation[:-1]), None if self.logits_cache else n)
            rows = grouped.setdefault(key, {})
            if row_key not in rows:
                rows[row_key] = Row(self._window(context, continuation), len(continuation))
            rows[row_key].answers.append(Answer(n, continuation))
            if strings is None or strings[0] != "":  # an empty context has no decision
                known = contexts.setdefault(key, {})
                known.setdefault(before, row_key)
                rows[row_key].context = list(known).index(before)
        documents = []
        for key, rows in grouped.items():
            order = list(rows)
            deciders = [order.index(row_key) for row_key in contexts.get(key, {}).values()]
            documents.append(Document(list(rows.values()), deciders))
        return documents

    def _window(self, context: list[int], continuation: list[int]) -> list[int]:
        """The input tokens: context + continuation[:-1], cut from the left to the model's window."""
        over = len(context) + len(continuation) - self.max_length - 1
        if over > 0:
            eval_logger.warning(
                f"Combined length of context ({len(context)}) and continuation ({len(continuation)}) exceeds model's "
                f"maximum length ({self.max_length}). Truncating {over} tokens from the left."
            )
        return (context + continuation)[-(self.max_length + 1) :][:-1]

    def _batch_scheduler(self, pos: int, n_reordered_requests: Sequence[Any]) -> int:
        """As HFLM's, which (0.4.13) divides by zero where there are fewer rows than sections."""
        before: float = self.batch_schedule  # type: ignore[has-type]
        self.batch_schedule: float = min(before, len(n_reordered_requests))
        try:
            return super()._batch_scheduler(pos, n_reordered_requests)
        finally:
            self.batch_schedule = before

    def _detect_batch_size(self, requests: Sequence[Any] | None = None, pos: int = 0) -> int:
        """As HFLM's, which tries sizes out; those found are kept for this model, and none is found twice."""
        if requests and self.world_size > 1:  # processes try them out together, each with its own rows
            return int(super()._detect_batch_size(requests, pos))
        length = self.max_length
        if requests:
            _, context, continuation = requests[pos]
            length = min(length, len(context) + len(continuation) - 1)
        size = self._sizes.of(length, self.max_batch_size)
        if size is None:
            size = int(super()._detect_batch_size(requests, pos))
            self._sizes.keep(length, size)
        return size

    def _batches(self, documents: Sequence[Document], fixed: int | None) -> Iterator[list[Batch]]:
        """Batches of all documents, as lists of those that are run together."""
        size: int | planning.SizeAt = self._size_at if self.batch_size == "auto" else int(self.batch_size)
        self.batch_sizes: dict[int, int] = {}
        budget = 0 if self.engine.observer is not None else self.options.prefix_cache  # what is observed is run whole
        return planning.plan(
            self.anatomy, documents, size if fixed is None else fixed, lambda: self._sharing().rule, budget,
            self.schedule.blocks if self.reader.runs_tokens else (),
        )  # fmt: skip

    def _size_at(self, position: int, rows: Sequence[Row]) -> int:
        """The automatic batch size at one of these rows."""
        return int(self._batch_scheduler(position, _Shapes(rows)))

    def _sharing(self) -> Sharing:
        """How prompts can share what they begin with; found out once, and a speed-up that is lost is warned of."""
        if self._found_sharing is None:
            self._found_sharing = self._found_aside[0] or self._probed_sharing()
        return self._found_sharing

    def _probed_sharing(self) -> Sharing:
        with self._autocast():
            found = probes.sharing(self.anatomy, self.reading)
        if found.missed:
            eval_logger.warning(f"prefix_cache: {found.how} ({found.missed})")
        return found

    # ------------------------------------------------------------------ rolling and generation
    @_identified
    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Any]:
        """As HFLM's, every token scored at its own exit block; the saving is counted as if it had been run.

        Raises:
            AdaInferError: Under ``copy`` and ``sim``, which read a prompt and not each of its tokens.
        """
        if self.reader.runs_tokens:
            raise AdaInferError(
                f"reader: {self.reader.name} reads the end of a prompt, and loglikelihood_rolling scores every token "
                "of a text; give reader=head or reader=tuned:FILE"
            )
        self._warn_without_choices(len(requests), len(requests), "texts")
        texts: list[list[Row]] = [[] for _ in requests]  # their windows
        for n, (*_, text) in enumerate([r.args for r in requests]):  # behind an empty context, or alone
            pairs = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, continuation in map(utils.make_disjoint_window, pairs):
                row = Row((context + continuation)[:-1], len(continuation))
                row.answers.append(Answer(n, continuation))
                texts[n].append(row)
        finished: list[list[tuple[Row, list[int]]]] = [[] for _ in requests]
        results: list[Any] = [
            None if windows else rolling(r.args, 0.0, self._dense_record())
            for r, windows in zip(requests, texts, strict=True)
        ]
        # a text's windows stay together, so that it is finished, and kept, before many others are begun
        order = sorted(range(len(texts)), key=lambda n: -max((len(row.tokens) for row in texts[n]), default=0))
        windows = [(n, row) for n in order for row in texts[n]]
        size = self._detect_batch_size() if self.batch_size == "auto" else int(self.batch_size)
        progress = tqdm(total=len(windows), disable=disable_tqdm or self.rank != 0, desc="Running rolling windows")
        for start in range(0, len(windows), size):
            batch = windows[start : start + size]
            started = time.perf_counter()
            with self._autocast():
                layers = self.engine.run_tokens([row for _, row in batch])
            self.seconds += time.perf_counter() - started
            for (n, row), found in zip(batch, layers, strict=True):
                finished[n].append((row, found))
                if len(finished[n]) == len(texts[n]):
                    results[n] = self._rolled(requests[n].args, finished[n])
                    key = hash_args("loglikelihood_rolling", requests[n].args)
                    answer_cache.remember(self.cache_hook.dbdict, {key: results[n]})
            progress.update(len(batch))
        progress.close()
        return results

    def _rolled(self, arguments: Sequence[str], parts: Sequence[tuple[Row, list[int]]]) -> Any:
        """The answer of a text from all its windows."""
        for row, _ in parts:
            if any(math.isnan(answer.logprob) for answer in row.answers):
                self._warn_not_finite(row.tokens)
        logprob = sum(answer.logprob for row, _ in parts for answer in row.answers)
        record = record_of_windows(parts, self.counter, self.stopper, self.schedule, self.fingerprint, self.reader)
        return rolling(arguments, logprob, record)

    @_identified
    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Any]:
        """As HFLM's at batch size 1, every text with its exit record.

        Raises:
            AdaInferError: On generation settings that can't be followed, before anything is generated.
            UnsupportedModelError: Where the model's cache can't be driven block by block; ``generation=dense`` helps.
        """
        early = self.generation == "early"
        if requests and self.eot_token_id is None:
            raise AdaInferError("tokenizer: it has no EOS token, without which lm-eval can't generate; give it one")
        for request in requests:
            if not request.args[0].strip() and not self.tok_encode(request.args[0]):
                raise AdaInferError(f"request: the prompt {request.args[0]!r} has no token; give one of at least one")
        for options in {str(r.args[1]): r.args[1] for r in requests}.values():
            most = normalize_gen_kwargs(options, self.max_gen_toks)["max_gen_toks"]
            if not 0 < most < self.max_length:
                raise AdaInferError(
                    f"max_gen_toks: {most} new tokens don't fit a window of {self.max_length} with room for a prompt; "
                    f"give 1 to {self.max_length - 1}, or a larger max_length"
                )
        self._check_settings(requests, early)
        if early:
            self._warn_without_choices(len(requests), len(requests), "texts")
        asked: list[Asked] | None = None
        if requests and early:
            self._prepare_decoding()
        elif requests:
            asked = self._asked_dense(requests)
        if requests and not early and self.schedule.blocks:
            eval_logger.warning("generation=dense: generate_until does not exit early (exit_layer = L)")
        self._generated.clear()
        self._exit_records.clear()
        self._generated_tokens.clear()
        started = time.perf_counter()
        if requests and (early or asked is not None):
            self._decode(requests, asked or self._asked(requests), disable_tqdm)
        else:
            try:
                for self._max_length_asked, some in _by_max_length(requests).items():
                    super().generate_until(some, disable_tqdm=disable_tqdm)
            finally:
                self._max_length_asked = None
        seconds = time.perf_counter() - started
        self.seconds, self.generating_seconds = self.seconds + seconds, self.generating_seconds + seconds
        return [self._generated[hash_args("generate_until", r.args)].popleft() for r in requests]

    def _probed_windows(self) -> Windows:
        with self._autocast():
            wrappers.require_same_generation(self.anatomy)
            found = prepare(self.anatomy)
        if found.missed:
            eval_logger.warning(f"generation: tokens are laid out {found.layout} ({found.missed})")
        return found

    def _check_settings(self, requests: list[Instance], early: bool) -> None:
        """Refuse generation settings that can't be followed (``Settings``), and texts without room."""
        for options in {str(r.args[1]): r.args[1] for r in requests}.values():
            given: dict[str, Any] = dict(normalize_gen_kwargs(options, self.max_gen_toks))
            max_new, max_length = given.pop("max_gen_toks"), given.pop("max_length", None)
            given.pop("until")
            most = Settings(self.anatomy.model, given, early).config.max_new_tokens
            if most is not None:
                eval_logger.warning(
                    f"generation_config.json: the checkpoint's max_new_tokens={most} goes before max_gen_toks, as with "
                    "--model hf"
                )
            if max_length is None or most is not None:
                continue
            longest = max(len(self.tok_encode(r.args[0])) for r in requests if r.args[1] == options)
            longest = min(longest, self.max_length - max_new)
            if not isinstance(max_length, int) or max_length <= longest:
                raise AdaInferError(
                    f"generation_kwargs: max_length={max_length!r} leaves no room after a prompt of {longest} tokens; "
                    "give max_gen_toks instead"
                )

    @_identified
    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **kwargs: Any) -> torch.Tensor:
        """HFLM's call for one batch: [B, S] left-padded ids to [B, S + new], dense; notes every row's exit record."""
        mask = kwargs.pop("attention_mask")
        settings = Settings(self.anatomy.model, kwargs, early=False)
        max_new = max_length - context.shape[1]
        padded = bool((mask == 0).any())
        alone = settings.needs_rows_alone(context, mask) or (padded and self._max_length_asked is not None)
        if alone:
            batches = [(row[m.bool()][None], m[m.bool()][None]) for row, m in zip(context, mask, strict=True)]
        else:
            batches = [(context, mask)]
        generated: list[list[int]] = []
        for ids, some in batches:
            longest = self._max_length_asked or ids.shape[1] + max_new
            generated += self._generate_dense(settings, ids, some, longest, stop, kwargs)
        width = max(map(len, generated))
        new = torch.full((len(generated), width), self.tokenizer.pad_token_id, dtype=context.dtype)
        for n, tokens in enumerate(generated):
            new[n, : len(tokens)] = torch.tensor(tokens)
        return torch.cat([context, new.to(context.device)], dim=1)

    def _generate_dense(
        self,
        settings: Settings,
        context: torch.Tensor,
        mask: torch.Tensor,
        max_length: int,
        stop: list[str],
        kwargs: dict[str, Any],
    ) -> list[list[int]]:
        """New tokens of every row from ``model.generate``, up to where the row ends by itself."""
        whole = super()._model_generate(context, max_length, stop, attention_mask=mask, **kwargs)
        rows = whole[:, context.shape[1] :].tolist()
        finished = Stop(self.tokenizer, stop, settings.end_tokens())
        ended = [finished.cut(row) for row in rows]
        if self.text_observer is not None:
            prompts = [row[m.bool()].tolist() for row, m in zip(context, mask, strict=True)]
            self._generated_tokens.extend(zip(prompts, ended, strict=True))
        self._exit_records.extend(map(self._dense_record, mask.sum(-1).tolist(), map(len, ended)))
        self.generated_tokens += sum(map(len, ended))
        return ended if len(rows) > 1 else rows  # a single row's end is stock's own, with beams too

    def _prepare_decoding(self) -> None:
        """Find out how texts are decoded, and where prompts may leave on their own; once.

        Raises:
            UnsupportedModelError: Where the model's cache can't be driven block by block.
        """
        if self._windows is not None:
            return
        self._windows = self._found_aside[1] or self._probed_windows()
        self.token_counter.stored_weights = self._windows.stored_weights
        if (reading := self.engine.reading) is not None and self.generation == "early":
            storing = reading.storing or watch_storing(self.anatomy)
            self.token_counter.copied_weights = storing.weights
            self._prompt_exits = PromptExits(self.stopper, self.schedule, reading, storing)

    def _asked_dense(self, requests: Sequence[Instance]) -> list[Asked] | None:
        """What to decode here without early exit, where what prompts share is run once and no row waits.

        None where that can't be, or ``generation=dense`` asks for ``model.generate``.
        """
        if self.options.generation == "dense" or self.text_observer is not None:
            return None
        try:
            asked = self._asked(requests)
            self._prepare_decoding()
        except AdaInferError:  # who is to do it instead says what is wrong, if anything is
            return None
        limit = self.anatomy.fixed_positions
        return asked if limit is None or max(len(one.prompt) + one.limit for one in asked) <= limit else None

    def _decode(self, requests: Sequence[Instance], asked: Sequence[Asked], disable_tqdm: bool) -> None:
        """Generate with the engine; every text is noted, and kept in the response cache, as soon as it is finished."""
        assert self._windows is not None
        size = self._detect_batch_size() if self.batch_size == "auto" else int(self.batch_size)
        shares = self.options.prefix_cache and len(requests) > 1
        generator = Generator(
            self.anatomy, self.token_stopper, self.token_schedule, self._windows, self.tokenizer,
            self.options.kv_policy, self.options.shortlist, self.options.screen, self.token_reader, self._prompt_exits,
            self._sharing().rule if shares else None, self.options.prefix_cache,
        )  # fmt: skip
        is_quiet = disable_tqdm or self.rank != 0
        progress = tqdm(total=len(requests), disable=is_quiet, desc="Running generate_until requests")
        with self._autocast():
            for n, row in generator.run(asked, size, Seeds()):
                self._note_decoded(requests[n], asked[n], row)
                progress.update(1)
        progress.close()
        self.engine.block_tokens -= generator.spared
        self.engine.count_reading()

    def _asked(self, requests: Sequence[Instance]) -> list[Asked]:
        """What requests ask for, as HFLM's ``generate_until`` reads them at batch size 1."""
        kinds: dict[str, tuple[Settings, int, int | None, tuple[str, ...]]] = {}
        found = []
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        for request in requests:
            context, options = request.args
            if (key := str(options)) not in kinds:
                given: dict[str, Any] = dict(normalize_gen_kwargs(options, self.max_gen_toks))
                stop = tuple(handle_stop_sequences(given.pop("until", None), eos=eos))
                max_new, max_length = given.pop("max_gen_toks"), given.pop("max_length", None)
                kinds[key] = Settings(self.anatomy.model, given, early=True), max_new, max_length, stop
            settings, max_new, max_length, stop = kinds[key]
            _require_unicode(context)
            ids, _ = self.tok_batch_encode(
                [context], left_truncate_len=self.max_length - max_new, truncation=self.truncation
            )
            prompt = ids[0].tolist()
            self._require_known(prompt)
            found.append(Asked(prompt, settings, max_new, stop, max_length))
        return found

    def _note_decoded(self, request: Instance, asked: Asked, row: Decoded) -> None:
        """Note a finished text with its exit record, processed as HFLM does."""
        prompt = len(asked.prompt)
        if not row.finite:
            self._warn_not_finite([*asked.prompt, *row.tokens[:-1]])
        early = self.generation == "early"
        record = record_of(row, prompt, self.token_counter, self.fingerprint) if early else None
        self._exit_records.append(record or self._dense_record(prompt, len(row.tokens)))
        self.engine.head_rows += row.head_rows
        self.engine.block_tokens += row.executed
        self.engine.tokens += prompt + len(row.tokens) - 1
        self.generated_tokens += len(row.tokens)
        tokens, think = row.tokens, self.think_end_token
        if isinstance(think, int) and think in tokens:
            tokens = tokens[len(tokens) - tokens[::-1].index(think) :]
        text = self.tok_decode(tokens)
        text = postprocess_generated_text(
            generation=text.lstrip() if isinstance(think, int) else text,
            stop=list(asked.stop),
            think_end_token=think if isinstance(think, str) else None,
        )
        self.cache_hook.add_partial("generate_until", request.args, text)

    def note_text(self, arguments: Any, text: str) -> Text:
        """Pair a generated text with its exit record; HFLM finishes rows in the order in which they were generated."""
        found = Text(text, self._exit_records.popleft())
        if self.text_observer is not None:
            self.text_observer.text(arguments, *self._generated_tokens.popleft())
        self._generated[hash_args("generate_until", arguments)].append(found)
        return found

    @contextmanager
    def observed_texts(self, observer: TextObserver) -> Iterator[None]:
        """Generate dense for a while, and show an observer the tokens of every text."""
        generation, self.generation, self.text_observer = self.generation, "dense", observer
        try:
            yield
        finally:
            self.generation, self.text_observer = generation, None

    def _dense_record(self, prompt: int = 1, new: int = 1) -> ExitRecord:
        """The exit record of a text of ``new`` tokens after a prompt that ran all blocks there are, with a cache."""
        run, count, positions = self.anatomy.n_blocks, self.counter, prompt + max(new, 1) - 1
        flops, dense = count.blocks(run, positions) + count.head(new), count.dense(positions) + count.head(new)
        return ExitRecord(run, self.n_blocks, count.flops_ratio(run, prompt), run, flops, dense, self.fingerprint)

    # ------------------------------------------------------------------ --use_cache
    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Accept a response cache, unless it holds answers of another model or stopper."""
        if cache_hook.dbdict is not None:
            answer_cache.require_own(cache_hook.dbdict, self.fingerprint)
        super().set_cache_hook(answer_cache.TextHook(cache_hook, self.note_text))

    @contextmanager
    def without_cache(self) -> Iterator[None]:
        """Keep answers out of the response cache for a while."""
        before: CacheHook = self.cache_hook  # type: ignore[has-type]
        self.set_cache_hook(CacheHook(None))
        try:
            yield
        finally:
            self.cache_hook = before

    @contextmanager
    def dense_aside(self) -> Iterator[dict[str, Any]]:
        """Answer dense for a while, by the forward of every run, and change neither totals nor caches.

        Yields:
            What it cost, filled in at the end: measured seconds, counted tokens and block executions x tokens.
        """
        before = {name: value for name, value in vars(self).items() if name in _SET_ASIDE}
        self.stopper = specs.parse("none")
        self.schedule, self.reader = Schedule(self.n_blocks, self.stopper), HEAD
        self.engine = Engine(self.anatomy, self.stopper, self.schedule, self.softmax_dtype)
        self.counter = self.token_counter = FlopCounter(self.anatomy, self.stopper)
        self.token_stopper, self.token_schedule, self.token_reader = self.stopper, self.schedule, self.reader
        self._prompt_exits, self.one_pass = None, None
        cost: dict[str, Any] = {}
        try:
            with self.without_cache():
                yield cost
            cost["tokens_counted"], cost["block_tokens_counted"] = self.engine.tokens, self.engine.block_tokens
            cost["seconds_measured"] = self.seconds - before["seconds"]
        finally:
            self._found_aside = self._found_sharing, self._windows  # what was found out of the model stays true
            for name in _SET_ASIDE:
                self.__dict__.pop(name, None)
            self.__dict__.update(before)

    # ------------------------------------------------------------------ the run's record
    def get_model_info(self) -> dict[str, Any]:
        """HFLM's, and under ``adainfer`` what identifies this run and what it came to."""
        return {**super().get_model_info(), "adainfer": self.record()}

    def record(self) -> dict[str, Any]:
        """JSON-serialisable: what identifies this run and what it came to (``run_record``)."""
        return run_record.of(self, self._found_sharing, self._windows)

    def totals(self) -> dict[str, Any]:
        """This process's totals since it was built: measured seconds, counted tokens, head rows and block calls.

        The record of a run holds what one evaluation added to them (``metrics``). Of a pass that gave two sides'
        answers neither side has seconds of its own.
        """
        seconds = {} if self.one_pass or self.answered else {"seconds_in_model_measured": self.seconds}
        return {
            **seconds,
            **({} if self.one_pass is None else self.one_pass.totals()),
            "tokens_counted": self.engine.tokens,
            "block_tokens_counted": self.engine.block_tokens,
            "block_calls_counted": self.engine.block_calls,
            "head_rows_counted": self.engine.head_rows,
            **({"copied_tokens_counted": self.engine.copied_tokens} if self.reader.kind == "copy" else {}),
            "generated_tokens_counted": self.generated_tokens,
            "seconds_generating_measured": self.generating_seconds,
        }


class _Shapes(Sequence[Any]):
    """Token rows as HFLM's search for a batch size reads them: (arguments, context, continuation)."""

    def __init__(self, rows: Sequence[Row]):
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, n: Any) -> tuple[None, list[int], list[int]]:
        row = self._rows[n]
        return None, row.tokens[: row.decision + 1], [0] * row.scored


def _by_max_length(requests: list[Instance]) -> dict[int | None, list[Instance]]:
    """Requests by the ``max_length`` in their settings, which HFLM does not hand on as it was given."""
    found: dict[int | None, list[Instance]] = {}
    for request in requests:
        found.setdefault(request.args[1].get("max_length"), []).append(request)
    return found


def _nothing_to_score(continuation: str) -> AdaInferError:
    return AdaInferError(
        f"request: the continuation {continuation!r} has no token of its own; give one of at least one token"
    )
