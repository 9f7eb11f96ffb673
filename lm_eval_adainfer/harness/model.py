"""The model type ``adainfer``: lm-eval's HFLM with an early-exit forward; what lm-eval calls, and the run's counts.

What it hands on to: ``setup`` (what the options come to), ``requests`` (documents), ``scoring`` and ``texts`` (the
answers), ``caveats`` (warnings).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api.model import CacheHook
from lm_eval.models.huggingface import HFLM

from lm_eval_adainfer import paths
from lm_eval_adainfer.errors import AdaInferError, report_errors_in_one_sentence
from lm_eval_adainfer.generation.settings import check_checkpoint
from lm_eval_adainfer.harness import answer_cache, arguments, auto, identity, metrics, pilot, run_record, scoring
from lm_eval_adainfer.harness import requests as asked_for
from lm_eval_adainfer.harness.batch_sizes import BatchSizes
from lm_eval_adainfer.harness.caveats import Caveats
from lm_eval_adainfer.harness.options import Options, check_stock
from lm_eval_adainfer.harness.setup import Setup, taken_apart
from lm_eval_adainfer.harness.texts import TextObserver, Texts
from lm_eval_adainfer.prefill import probes
from lm_eval_adainfer.prefill.documents import Document
from lm_eval_adainfer.prefill.probes import Sharing
from lm_eval_adainfer.structure import unwrapping
from lm_eval_adainfer.structure.weights import input_device

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from lm_eval_adainfer.harness.one_pass import OnePass

eval_logger = logging.getLogger(__name__)

DEMO = arguments.DEMO


def _identified(method: Callable[..., Any]) -> Callable[..., Any]:
    """Answers that one call gives carry one fingerprint, derived when it begins (or by the run around it)."""

    @wraps(method)
    def answering(self: AdaInferLM, *args: Any, **kwargs: Any) -> Any:
        with self.identified():
            return method(self, *args, **kwargs)

    return answering


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
        pretrained, self._further = arguments.pretrained_of(pretrained, kwargs, HFLM, AdaInferLM)
        kwargs.setdefault("device", "cuda" if torch.cuda.is_available() else "cpu")
        self._pretrained_name = DEMO if pretrained == str(paths.demo_model()) else pretrained
        try:
            super().__init__(pretrained, **kwargs)
        except TypeError as error:  # HFLM hands unknown arguments on to the model's constructor
            raise AdaInferError(f"model_args: {str(error).splitlines()[0]}") from error
        arguments.check_built(self)
        self._set_ranks()
        if self.device.type == "meta":  # a model object whose weights are offloaded
            self._device: torch.device = input_device(self.model)
        if strategy.removes_blocks and not isinstance(pretrained, str):
            self._model = unwrapping.with_same_weights(self.model)  # the caller's model keeps its blocks
        self.anatomy = taken_apart(self.model, self._autocast)
        self.n_blocks = self.anatomy.n_blocks
        self.use(min_layer, check_layers)
        self._identified = ""  # the fingerprint, for the length of a run
        if any(weight.device.type == "meta" for weight in self.model.parameters()):
            self.anatomy.weights_hash(self.model)  # it reads offloaded weights once: now, and not in a run
        self.seconds = 0.0
        self.generating_seconds = 0.0
        self.generated_tokens = 0
        self.batch_sizes: dict[int, int] = {}
        self.caveats = Caveats(self)
        self.texts = Texts(self)
        self.set_cache_hook(CacheHook(None))
        self.run_totals: dict[str, Any] = {}
        self.pilot_record: dict[str, Any] | None = None
        self.promise_record: dict[str, Any] | None = None
        self.seen_record: dict[str, Any] | None = None
        self._document_keys: list[Any] = []
        self.found_sharing: Sharing | None = None  # found out when something is first shared
        self.known_sharing: Sharing | None = None  # found out aside
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

    def use(self, min_layer: Any, check_layers: Any) -> None:
        """Answer as the options say."""
        self.take(Setup.of(
            self.anatomy, self.n_blocks, self.options, min_layer, check_layers, self.softmax_dtype, self._autocast,
            self._model_name(),
        ))  # fmt: skip

    def take(self, setup: Setup) -> None:
        """Answer in this way from now on."""
        self.setup, self.anatomy = setup, setup.anatomy
        self.stopper, self.schedule, self.reader = setup.stopper, setup.schedule, setup.reader
        self.token_stopper, self.token_schedule = setup.token_stopper, setup.token_schedule
        self.token_reader, self.reading, self.generation = setup.token_reader, setup.reading, setup.generation
        self.engine, self.counter, self.token_counter = setup.engine, setup.counter, setup.token_counter

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
        self.use(self._auto.min_layer, check_layers)
        self.found_sharing, self.known_sharing, self.texts = None, None, Texts(self)
        self.auto_record = {"file": str(path), "tasks": dict(strategy.info["tuned"]["shots"])}

    def _set_ranks(self) -> None:
        """Stock HFLM sets rank and world size only where there are several GPUs; processes on CPUs count too."""
        accelerator = getattr(self, "accelerator", None)
        if accelerator is not None:
            self._rank = accelerator.process_index
            self._world_size = accelerator.num_processes

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

        Each call outside reads all weights, since nothing else tells for certain that they are what they were (changes
        of ``weight.data``, as PEFT makes them, pass torch's counters). A script that makes many small calls, and does
        not change the model between them, makes them inside.

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
        asked_for.require_unicode(string)
        ids = super().tok_encode(string, *args, **kwargs)
        asked_for.require_known(ids, self.n_embeddings)
        if is_context:
            self._contexts[string] = ids
        return ids

    @property
    def n_embeddings(self) -> int:
        """How many tokens the model has embeddings for."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    # ------------------------------------------------------------------ loglikelihood
    @_identified
    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Any]:
        """As HFLM's, every answer with its document's exit record."""
        for context, continuation in (r.args for r in requests):
            if context == "" and not self.tok_encode(continuation, add_special_tokens=False):
                raise asked_for.nothing_to_score(continuation)
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
        requests: list[asked_for.TokenRequest],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[Any]:
        keys = self._document_keys or [(None, tuple(r[1])) for r in requests]
        return scoring.loglikelihoods(self, requests, keys, disable_tqdm or self.rank != 0, override_bs)

    def documents(self, requests: Sequence[asked_for.TokenRequest], keys: Sequence[Any]) -> list[Document]:
        """Tokenised requests as documents (``requests``).

        Args:
            requests: ((context, continuation) or None, context tokens, continuation tokens).
            keys: Per request, what it has in common with the other requests of its document.
        """
        return asked_for.documents_of(requests, keys, self.max_length, bool(self.logits_cache))

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
        self.caveats.without_choices(len(requests), len(requests), "texts")
        size = self._detect_batch_size() if self.batch_size == "auto" else int(self.batch_size)
        return scoring.rolled(self, requests, size, disable_tqdm or self.rank != 0)

    # ------------------------------------------------------------------ batches
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

    def _sharing(self) -> Sharing:
        """How prompts can share what they begin with; found out once, and a speed-up that is lost is warned of."""
        if self.found_sharing is None:
            self.found_sharing = self.known_sharing or self._probed_sharing()
        return self.found_sharing

    def _probed_sharing(self) -> Sharing:
        with self._autocast():
            found = probes.sharing(self.anatomy, self.reading)
        if found.missed:
            eval_logger.warning(f"prefix_cache: {found.how} ({found.missed})")
        return found

    # ------------------------------------------------------------------ texts
    @_identified
    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Any]:
        """As HFLM's at batch size 1, every text with its exit record.

        Raises:
            AdaInferError: On generation settings that can't be followed, before anything is generated.
            UnsupportedModelError: Where the model's cache can't be driven block by block; ``generation=dense`` helps.
        """
        return self.texts.generate(requests, disable_tqdm, super().generate_until)

    @_identified
    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **kwargs: Any) -> torch.Tensor:
        """HFLM's call for one batch: [B, S] left-padded ids to [B, S + new], dense."""
        return self.texts.dense_batch(context, max_length, stop, super()._model_generate, **kwargs)

    @contextmanager
    def observed_texts(self, observer: TextObserver) -> Iterator[None]:
        """Generate dense for a while, and show an observer the tokens of every text."""
        texts, generation = self.texts, self.generation
        self.generation, texts.observer = "dense", observer
        try:
            yield
        finally:
            self.generation, texts.observer = generation, None

    # ------------------------------------------------------------------ --use_cache
    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Accept a response cache, unless it holds answers of another model or stopper."""
        if cache_hook.dbdict is not None:
            answer_cache.require_own(cache_hook.dbdict, self.fingerprint)
        super().set_cache_hook(answer_cache.TextHook(cache_hook, lambda *given: self.texts.note(*given)))

    @contextmanager
    def without_cache(self) -> Iterator[None]:
        """Keep answers out of the response cache for a while."""
        before: CacheHook = self.cache_hook  # type: ignore[has-type]
        self.set_cache_hook(CacheHook(None))
        try:
            yield
        finally:
            self.cache_hook = before

    # ------------------------------------------------------------------ the run's record
    def get_model_info(self) -> dict[str, Any]:
        """HFLM's, and under ``adainfer`` what identifies this run and what it came to."""
        return {**super().get_model_info(), "adainfer": self.record()}

    def record(self) -> dict[str, Any]:
        """JSON-serialisable: what identifies this run and what it came to (``run_record``)."""
        return run_record.of(self, self.found_sharing, self.texts.windows)

    def totals(self) -> dict[str, Any]:
        """This process's totals since it was built (``run_record``)."""
        return run_record.totals(self)
