"""``generate_until``: what requests ask for, who decodes it, and every finished text with its exit record.

Texts that exit early, and dense ones where that is possible, are decoded by ``generation``; what is left is done by
``model.generate``, as HFLM calls it, row by row where a batch would change a text.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from lm_eval.api.model import hash_args
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from tqdm import tqdm

from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.generation.decoded import Decoded, record_of
from lm_eval_adainfer.generation.loop import Asked, Generator, Seeds, Stop
from lm_eval_adainfer.generation.probes import prepare
from lm_eval_adainfer.generation.prompts import PromptExits
from lm_eval_adainfer.generation.settings import Settings
from lm_eval_adainfer.harness.answers import Text
from lm_eval_adainfer.harness.requests import require_known, require_unicode
from lm_eval_adainfer.records import ExitRecord
from lm_eval_adainfer.structure import wrappers
from lm_eval_adainfer.structure.storing import watch_storing
from lm_eval_adainfer.structure.windows import Windows

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

_logger = logging.getLogger(__name__)


class TextObserver(Protocol):
    """What watches texts that are generated dense (``traces.recording.TextRecorder``)."""

    def text(self, arguments: Any, prompt: list[int], new: list[int]) -> None:
        """See the token ids of a finished text and of its prompt, and the arguments of its request."""


class Texts:
    """The texts of one model, with the stopper and reader that it has now.

    Args:
        lm: The ``AdaInferLM``.
        known_windows: How its tokens are laid out, where that has been found out.

    Attributes:
        observer: What is shown every text that is generated.
        known_windows: How tokens are laid out, where that has been found out, here or elsewhere.
        windows: The same, where a call has needed it.
    """

    def __init__(self, lm: Any, known_windows: Windows | None = None):
        self._lm, self.known_windows = lm, known_windows
        self.observer: TextObserver | None = None
        self.windows: Windows | None = None
        self._exits: PromptExits | None = None  # for a reader that reads prompts
        self._found: defaultdict[str, deque[Text]] = defaultdict(deque)  # by request
        self._records: deque[ExitRecord] = deque()  # of rows that are generated, and not yet reported
        self._shown: deque[tuple[list[int], list[int]]] = deque()  # their tokens, for the observer
        self._max_length: int | None = None  # gen_kwargs' max_length of the requests being generated

    def generate(self, requests: list[Instance], quiet: bool, stock: Callable[..., Any]) -> list[Text]:
        """Every request's text with its exit record.

        Args:
            requests: lm-eval's.
            quiet: Whether no progress is shown.
            stock: HFLM's ``generate_until``, which comes back through :meth:`dense_batch` and :meth:`note`.

        Raises:
            AdaInferError: On generation settings that can't be followed, before anything is generated.
            UnsupportedModelError: Where the model's cache can't be driven block by block.
        """
        lm = self._lm
        early = lm.generation == "early"
        self._require_room(requests)
        self._check_settings(requests, early)
        if early:
            lm.caveats.without_choices(len(requests), len(requests), "texts")
        asked: list[Asked] | None = None
        if requests and early:
            self._prepare()
        elif requests:
            asked = self._asked_dense(requests)
        if requests and not early and lm.schedule.blocks:
            _logger.warning("generation=dense: generate_until does not exit early (exit_layer = L)")
        self._found.clear()
        self._records.clear()
        self._shown.clear()
        started = time.perf_counter()
        if requests and (early or asked is not None):
            texts = self._decode(requests, asked or self._asked(requests), quiet)
        else:
            try:
                for self._max_length, some in _by_max_length(requests).items():
                    stock(some, disable_tqdm=quiet)
            finally:
                self._max_length = None
            texts = [self._found[hash_args("generate_until", r.args)].popleft() for r in requests]
        seconds = time.perf_counter() - started
        lm.seconds, lm.generating_seconds = lm.seconds + seconds, lm.generating_seconds + seconds
        return texts

    def note(self, arguments: Any, text: str) -> Text:
        """Pair a generated text with its exit record; HFLM finishes rows in the order in which they were generated."""
        found = Text(text, self._records.popleft())
        if self.observer is not None:
            self.observer.text(arguments, *self._shown.popleft())
        self._found[hash_args("generate_until", arguments)].append(found)
        return found

    # ------------------------------------------------------------------ what is asked for

    def _require_room(self, requests: Sequence[Instance]) -> None:
        """Refuse prompts without tokens, and texts as long as the window."""
        lm = self._lm
        if requests and lm.eot_token_id is None:
            raise AdaInferError("tokenizer: it has no EOS token, without which lm-eval can't generate; give it one")
        for request in requests:
            if not request.args[0].strip() and not lm.tok_encode(request.args[0]):
                raise AdaInferError(f"request: the prompt {request.args[0]!r} has no token; give one of at least one")
        for options in {str(r.args[1]): r.args[1] for r in requests}.values():
            most = normalize_gen_kwargs(options, lm.max_gen_toks)["max_gen_toks"]
            if not 0 < most < lm.max_length:
                raise AdaInferError(
                    f"max_gen_toks: {most} new tokens don't fit a window of {lm.max_length} with room for a prompt; "
                    f"give 1 to {lm.max_length - 1}, or a larger max_length"
                )

    def _check_settings(self, requests: list[Instance], early: bool) -> None:
        """Refuse generation settings that can't be followed (``Settings``), and texts without room."""
        lm = self._lm
        for options in {str(r.args[1]): r.args[1] for r in requests}.values():
            given: dict[str, Any] = dict(normalize_gen_kwargs(options, lm.max_gen_toks))
            max_new, max_length = given.pop("max_gen_toks"), given.pop("max_length", None)
            given.pop("until")
            most = Settings(lm.anatomy.model, given, early).config.max_new_tokens
            if most is not None:
                _logger.warning(
                    f"generation_config.json: the checkpoint's max_new_tokens={most} goes before max_gen_toks, as with "
                    "--model hf"
                )
            if max_length is None or most is not None:
                continue
            longest = max(len(lm.tok_encode(r.args[0])) for r in requests if r.args[1] == options)
            longest = min(longest, lm.max_length - max_new)
            if not isinstance(max_length, int) or max_length <= longest:
                raise AdaInferError(
                    f"generation_kwargs: max_length={max_length!r} leaves no room after a prompt of {longest} tokens; "
                    "give max_gen_toks instead"
                )

    def _asked(self, requests: Sequence[Instance]) -> list[Asked]:
        """What requests ask for, as HFLM's ``generate_until`` reads them at batch size 1."""
        lm = self._lm
        kinds: dict[str, tuple[Settings, int, int | None, tuple[str, ...]]] = {}
        found = []
        eos = lm.tok_decode(lm.eot_token_id, skip_special_tokens=False)
        for request in requests:
            context, options = request.args
            if (key := str(options)) not in kinds:
                given: dict[str, Any] = dict(normalize_gen_kwargs(options, lm.max_gen_toks))
                stop = tuple(handle_stop_sequences(given.pop("until", None), eos=eos))
                max_new, max_length = given.pop("max_gen_toks"), given.pop("max_length", None)
                kinds[key] = Settings(lm.anatomy.model, given, early=True), max_new, max_length, stop
            settings, max_new, max_length, stop = kinds[key]
            require_unicode(context)
            ids, _ = lm.tok_batch_encode([context], left_truncate_len=lm.max_length - max_new, truncation=lm.truncation)
            prompt = ids[0].tolist()
            require_known(prompt, lm.n_embeddings)
            found.append(Asked(prompt, settings, max_new, stop, max_length))
        return found

    def _asked_dense(self, requests: Sequence[Instance]) -> list[Asked] | None:
        """What to decode here without early exit, where what prompts share is run once and no row waits.

        None where that can't be, or ``generation=dense`` asks for ``model.generate``.
        """
        if self._lm.options.generation == "dense" or self.observer is not None:
            return None
        try:
            asked = self._asked(requests)
            self._prepare()
        except AdaInferError:  # who is to do it instead says what is wrong, if anything is
            return None
        limit = self._lm.anatomy.fixed_positions
        return asked if limit is None or max(len(one.prompt) + one.limit for one in asked) <= limit else None

    # ------------------------------------------------------------------ decoded block by block

    def _prepare(self) -> None:
        """Find out how texts are decoded, and where prompts may leave on their own; once.

        Raises:
            UnsupportedModelError: Where the model's cache can't be driven block by block.
        """
        if self.windows is not None:
            return
        lm = self._lm
        self.windows = self.known_windows = self.known_windows or self._probed()
        lm.token_counter.stored_weights = self.windows.stored_weights
        if (reading := lm.engine.reading) is not None and lm.generation == "early":
            storing = reading.storing or watch_storing(lm.anatomy)
            lm.token_counter.copied_weights = storing.weights
            self._exits = PromptExits(lm.stopper, lm.schedule, reading, storing)

    def _probed(self) -> Windows:
        with self._lm._autocast():
            wrappers.require_same_generation(self._lm.anatomy)
            found = prepare(self._lm.anatomy)
        if found.missed:
            _logger.warning(f"generation: tokens are laid out {found.layout} ({found.missed})")
        return found

    def _decode(self, requests: Sequence[Instance], asked: Sequence[Asked], quiet: bool) -> list[Text]:
        """Generate with the engine; every text is noted, and kept in the response cache, as soon as it is finished.

        Returns:
            Every request's own text: where several requests are the same one, they have different samples.
        """
        assert self.windows is not None
        lm = self._lm
        size = lm._detect_batch_size() if lm.batch_size == "auto" else int(lm.batch_size)
        shares = lm.options.prefix_cache and len(requests) > 1
        generator = Generator(
            lm.anatomy, lm.token_stopper, lm.token_schedule, self.windows, lm.tokenizer, lm.options.kv_policy,
            lm.options.shortlist, lm.options.screen, lm.token_reader, self._exits,
            lm._sharing().rule if shares else None, lm.options.prefix_cache,
        )  # fmt: skip
        progress = tqdm(total=len(requests), disable=quiet or lm.rank != 0, desc="Running generate_until requests")
        decoded: dict[int, Text] = {}
        with lm._autocast():
            for n, row in generator.run(asked, size, Seeds()):
                self._note_decoded(requests[n], asked[n], row)
                decoded[n] = self._found[hash_args("generate_until", requests[n].args)].pop()
                progress.update(1)
        progress.close()
        lm.engine.block_tokens -= generator.spared
        lm.engine.count_reading()
        return [decoded[n] for n in range(len(requests))]

    def _note_decoded(self, request: Instance, asked: Asked, row: Decoded) -> None:
        """Note a finished text with its exit record, processed as HFLM does."""
        lm = self._lm
        prompt = len(asked.prompt)
        if not row.finite:
            lm.caveats.not_finite([*asked.prompt, *row.tokens[:-1]])
        early = lm.generation == "early"
        record = record_of(row, prompt, lm.token_counter, lm.fingerprint) if early else None
        self._records.append(record or self.dense_record(prompt, len(row.tokens)))
        lm.engine.head_rows += row.head_rows
        lm.engine.block_tokens += row.executed
        lm.engine.tokens += prompt + len(row.tokens) - 1
        lm.generated_tokens += len(row.tokens)
        tokens, think = row.tokens, lm.think_end_token
        if isinstance(think, int) and think in tokens:
            tokens = tokens[len(tokens) - tokens[::-1].index(think) :]
        text = lm.tok_decode(tokens)
        text = postprocess_generated_text(
            generation=text.lstrip() if isinstance(think, int) else text,
            stop=list(asked.stop),
            think_end_token=think if isinstance(think, str) else None,
        )
        lm.cache_hook.add_partial("generate_until", request.args, text)

    # ------------------------------------------------------------------ by model.generate

    def dense_batch(
        self, context: torch.Tensor, max_length: int, stop: list[str], stock: Callable[..., torch.Tensor], **kwargs: Any
    ) -> torch.Tensor:
        """One batch: [B, S] left-padded ids to [B, S + new]; notes every row's exit record.

        Args:
            context: As HFLM's ``_model_generate``.
            max_length: As HFLM's.
            stop: As HFLM's.
            stock: HFLM's ``_model_generate``.
            **kwargs: As HFLM's.
        """
        mask = kwargs.pop("attention_mask")
        settings = Settings(self._lm.anatomy.model, kwargs, early=False)
        max_new = max_length - context.shape[1]
        padded = bool((mask == 0).any())
        alone = settings.needs_rows_alone(context, mask) or (padded and self._max_length is not None)
        if alone:
            batches = [(row[m.bool()][None], m[m.bool()][None]) for row, m in zip(context, mask, strict=True)]
        else:
            batches = [(context, mask)]
        generated: list[list[int]] = []
        for ids, some in batches:
            whole = stock(ids, self._max_length or ids.shape[1] + max_new, stop, attention_mask=some, **kwargs)
            generated += self._note_rows(settings, ids, some, whole, stop)
        width = max(map(len, generated))
        new = torch.full((len(generated), width), self._lm.tokenizer.pad_token_id, dtype=context.dtype)
        for n, tokens in enumerate(generated):
            new[n, : len(tokens)] = torch.tensor(tokens)
        return torch.cat([context, new.to(context.device)], dim=1)

    def _note_rows(
        self, settings: Settings, context: torch.Tensor, mask: torch.Tensor, whole: torch.Tensor, stop: list[str]
    ) -> list[list[int]]:
        """New tokens of every row that ``model.generate`` gave, up to where the row ends by itself."""
        rows = whole[:, context.shape[1] :].tolist()
        finished = Stop(self._lm.tokenizer, stop, settings.end_tokens())
        ended = [finished.cut(row) for row in rows]
        if self.observer is not None:
            prompts = [row[m.bool()].tolist() for row, m in zip(context, mask, strict=True)]
            self._shown.extend(zip(prompts, ended, strict=True))
        self._records.extend(map(self.dense_record, mask.sum(-1).tolist(), map(len, ended)))
        self._lm.generated_tokens += sum(map(len, ended))
        return ended if len(rows) > 1 else rows  # a single row's end is stock's own, with beams too

    def dense_record(self, prompt: int = 1, new: int = 1) -> ExitRecord:
        """The exit record of a text of ``new`` tokens after a prompt that ran all blocks there are, with a cache."""
        lm = self._lm
        run, count, positions = lm.anatomy.n_blocks, lm.counter, prompt + max(new, 1) - 1
        flops, dense = count.blocks(run, positions) + count.head(new), count.dense(positions) + count.head(new)
        return ExitRecord(run, lm.n_blocks, count.flops_ratio(run, prompt), run, flops, dense, lm.fingerprint)


def _by_max_length(requests: list[Instance]) -> dict[int | None, list[Instance]]:
    """Requests by the ``max_length`` in their settings, which HFLM does not hand on as it was given."""
    found: dict[int | None, list[Instance]] = {}
    for request in requests:
        found.setdefault(request.args[1].get("max_length"), []).append(request)
    return found
