"""Checks on a user's own model: what early exit answers against a plain forward of the whole model, row by row.

The reference is slow and obvious: lm-eval's own call of the model, wrapper and all, one row at a time and from its
first token on, blocks k+1..L handing on what they get. It shares nothing with the engine but the list of blocks.
Prompts are random tokens, so any tokenizer will do. What a reader other than ``head`` reads is compared with what the
reader is defined to be (``plain_readings``).

Where the model computes in a dtype coarser than float32, rounding would hide what is wrong: so it is checked with
float32 copies of its weights first, and then in its own dtype, where early exit may differ from plain forwards as much
as these differ from each other.
"""

from __future__ import annotations

import json
import logging
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from lm_eval_adainfer.errors import AdaInferError, UnsupportedModelError
from lm_eval_adainfer.generation.decoder import Decoder
from lm_eval_adainfer.generation.probes import prepare
from lm_eval_adainfer.generation.prompts import PromptExits
from lm_eval_adainfer.harness.model import AdaInferLM
from lm_eval_adainfer.plain_readings import PlainReadings
from lm_eval_adainfer.prefill.reading import prepared
from lm_eval_adainfer.readers.base import HEAD, Reader
from lm_eval_adainfer.strategies import features, specs
from lm_eval_adainfer.strategies.base import Schedule, Stopper
from lm_eval_adainfer.structure.arguments import hidden_of, with_hidden
from lm_eval_adainfer.structure.rounding import coarsest, in_float32, measured
from lm_eval_adainfer.structure.state import BlockState
from lm_eval_adainfer.structure.storing import watch_storing
from lm_eval_adainfer.structure.windows import Windows

OK, NOT_SUPPORTED, FAILED = "ok", "not supported", "FAILED"
_LONGEST = 40  # tokens of a prompt and what follows it
_MOST_BLOCKS = 8  # after which answers are compared one block at a time
_BATCH = 16
_NEW_TOKENS = 6
_MOST_OF_READING = 2e-5  # of the log-probabilities' size: what rounding is believed to do under a reader at most


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        check: Its name.
        status: ``ok``, ``not supported`` (early exit does without, or says so in one sentence) or ``FAILED``.
        detail: A sentence.
        comparisons: How many answers, exits or positions were compared with the reference.
        skipped: How many were left out, as the reference itself is nearer to a tie than rounding allows to decide.
        largest_error: The largest difference of log-probabilities (nats); None where none was compared.
        tolerance: What was allowed there.
    """

    check: str
    status: str
    detail: str
    comparisons: int = 0
    skipped: int = 0
    largest_error: float | None = None
    tolerance: float | None = None


@dataclass
class _Tally:
    """Counts comparisons of one check, and keeps the worst."""

    comparisons: int = 0
    skipped: int = 0
    error: float | None = None
    allowed: float = 0.0
    share: float = 0.0  # error / allowed
    wrong: list[str] = field(default_factory=list)

    def number(self, found: Tensor | float, expected: Tensor | float, allowed: float, where: str) -> None:
        """Two numbers, or two tensors of them, that may differ by ``allowed``; NaN never passes."""
        found, expected = (torch.as_tensor(x).detach().float().cpu() for x in (found, expected))
        # masked tokens may be at minus infinity on both sides
        error = torch.where(found == expected, torch.zeros(()), (found - expected).abs()).max().item()
        self.comparisons += 1
        share = error / allowed if error == error else math.inf
        if self.error is None or share > self.share:
            self.error, self.allowed, self.share = error, allowed, share
        if not error <= allowed:
            self.wrong.append(f"{where} is off by {error:.2g}, with a tolerance of {allowed:.2g}")

    def same(self, found: Any, expected: Any, where: str) -> None:
        """Two things that have to be equal; ``expected`` None: too near to a tie to tell."""
        if expected is None:
            self.skipped += 1
            return
        self.comparisons += 1
        if found != expected:
            self.wrong.append(f"{where} is {found}, not {expected}")

    def finding(self, check: str, detail: str, status: str = OK) -> Finding:
        """The check's finding; ``detail`` says what was compared."""
        if self.wrong:
            many = f" ({len(self.wrong)} of {self.comparisons} comparisons differ)" if len(self.wrong) > 1 else ""
            status, detail = FAILED, f"{self.wrong[0]}{many}"
        else:
            error = "" if self.error is None else f", largest error {self.error:.2g} of {self.allowed:.2g} allowed"
            detail += f": {self.comparisons} comparisons{error}"
        if self.skipped:
            detail += f"; {self.skipped} too near to a tie to compare"
        allowed = None if self.error is None else self.allowed
        return Finding(check, status, detail, self.comparisons, self.skipped, self.error, allowed)


class _Plain:
    """The reference: plain forwards of the whole model as lm-eval would run it, a row at a time."""

    def __init__(self, lm: AdaInferLM, copied: bool):
        self.lm, self.anatomy = lm, lm.anatomy
        with lm._autocast():
            self.rounding = max(2e-6, 2 * measured(self.anatomy, copied).logits)
        self.rows: list[tuple[int, ...]] = []  # on which the rounding of what the reader reads is measured
        # as lm-eval calls it, wrapper and all; but for models that fail with the cache that they make themselves
        self.given: dict[str, Any] = {}
        try:
            self.logits(self.anatomy.probe_ids(1)[0].tolist())
        except (RuntimeError, ValueError):
            self.given = {"use_cache": False}
        self.read = PlainReadings(self.anatomy.blocks, lm.reader, self.logits)

    @torch.no_grad()
    def logits(self, tokens: Sequence[int], behind: Sequence[int] = (), **more: Tensor) -> Tensor:
        """[S, V], float32, also with other tokens behind these, which changes nothing but rounding."""
        ids = torch.tensor([[*tokens, *behind]], device=self.anatomy.input_device)
        more = {name: value.to(ids.device) for name, value in more.items()}
        with self.lm._autocast():
            return self.lm.model(ids, **self.given, **more).logits[0, : len(tokens)].float().cpu()

    def logprobs(self, tokens: Sequence[int], k: int, behind: Sequence[int] = ()) -> Tensor:
        """[S, V] log-probabilities of one row after block k: what comes behind it hands on what it gets."""
        given: list[Tensor] = []

        def note(module: Any, args: tuple, kwargs: dict) -> None:  # before anybody's pre-hook
            given.append((args[0] if args else kwargs["hidden_states"]).clone())

        handles: list[Any] = []
        for b in self.anatomy.blocks[k:]:
            handles.append(b.register_forward_pre_hook(note, with_kwargs=True, prepend=True))
            handles.append(b.register_forward_hook(lambda m, args, output: with_hidden(output, given.pop())))
        try:
            return self.logits(tokens, behind).log_softmax(-1)
        finally:
            for handle in handles:
                handle.remove()

    def states(self, tokens: Sequence[int], parts: Sequence[str] = ()) -> list[BlockState]:
        """Every block's input and output ([1, S, h]) for one row, and these parts' outputs."""
        found: list[BlockState] = []
        now: dict[str, Tensor] = {}

        def part(which: str, output: Any) -> None:  # cloned: some families add to it in place
            now[which] = hidden_of(output).reshape(1, len(tokens), -1).clone()

        given: list[Tensor] = []

        def note(module: Any, args: tuple, kwargs: dict) -> None:  # before anybody's pre-hook
            given.append((args[0] if args else kwargs["hidden_states"]).clone())

        def block(module: Any, args: tuple, output: Any) -> None:
            before, earlier = (found[-1].hidden, found[-1].parts) if found else (given[0], {})
            found.append(BlockState(len(found) + 1, hidden_of(output).clone(), before, dict(now), earlier))

        handles: list[Any] = [self.anatomy.blocks[0].register_forward_pre_hook(note, with_kwargs=True, prepend=True)]
        try:
            for b in self.anatomy.blocks:
                for which in parts:
                    of = self.anatomy.part(b, which)
                    handles.append(of.register_forward_hook(lambda m, args, output, w=which: part(w, output)))
                handles.append(b.register_forward_hook(block))
            self.logits(tokens)
        finally:
            for handle in handles:
                handle.remove()
        return found

    @cached_property
    def reading_rounding(self) -> float:
        """What rounding does to what the model's reader reads, by size: it is read with more tokens behind, too.

        Tokens that run on among few others can be rounded otherwise than a plain forward's.
        """
        worst = 0.0
        for row in self.rows:
            for k in sorted({1, max(1, self.anatomy.n_blocks // 2)}):
                one, *others = (self.read.logprobs(row, len(row), k, behind)[0] for behind in ((), row[:3], row))
                size = one.where(one > -1e4, 0).abs().max().item()
                worst = max(worst, *((other - one).nan_to_num(0).abs().max().item() / size for other in others))
        return max(self.rounding, min(2 * worst, max(_MOST_OF_READING, 4 * self.rounding)))

    def allowed(self, logprobs: Tensor, reads: bool = False) -> float:
        """How far rounding may move the sum of n positions' log-probabilities ([n, V]): 1e-4, and by their size.

        ``reads``: they are what the model's reader reads.
        """
        size = logprobs.where(logprobs > -1e4, 0).abs().amax(-1).sum().item()  # some models mask tokens
        return 1e-4 + (self.reading_rounding if reads else self.rounding) * size

    def top(self, logprobs: Tensor, reads: bool = False) -> int | None:
        """The top token of [V]; None where the second is too near to tell."""
        best = logprobs.topk(2)
        near = not (best.values[0] - best.values[1]).item() > 2 * self.allowed(logprobs[None], reads)
        return None if near else int(best.indices[0])


class _Drawn(Stopper):
    """Leaves after a drawn block, each as likely as any other; or, where ``only`` is set, after that one."""

    kind = "drawn"

    def __init__(self, reads: bool = False) -> None:
        # it has to be asked, and a cosine reads no head
        self.features = ("gap",) if reads else ("cos_hidden",)
        self.only: int | None = None
        self.generator = torch.Generator().manual_seed(0)
        self.n_blocks = 0

    def bind(self, n_blocks: int) -> None:
        """Any number of blocks is fine."""
        self.n_blocks = n_blocks

    def margin(self, block: int, values: Tensor, memory: Tensor | None = None) -> Tensor:
        """Positive with probability 1 / (blocks left), so that every block is as likely; or at ``only``."""
        if self.only is not None:
            return torch.full((len(values),), 1.0 if block == self.only else -1.0, device=values.device)
        drawn = torch.rand(len(values), generator=self.generator)
        return (1 / (self.n_blocks - block + 1) - drawn).to(values.device)


@dataclass(frozen=True)
class _Asked:
    """One request of a document: a context and a continuation, in tokens."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    @property
    def row(self) -> tuple[int, ...]:
        """What the model reads."""
        return self.context + self.continuation[:-1]


class _Step(NamedTuple):
    """A step of decoding, of one text.

    Attributes:
        text: The tokens so far.
        prompt: How many of them are the prompt's.
        block: The block after which the new token left; or the prompt, where prompts leave.
        rows: Texts of the batch.
        logits: [V], what was read.
        token: What was chosen.
    """

    text: tuple[int, ...]
    prompt: int
    block: int
    rows: int
    logits: Tensor
    token: int


class _Verifier:
    """The checks, and what they share."""

    def __init__(self, lm: AdaInferLM, computes_in: str, copied: bool = False):
        self.lm, self.anatomy, self.plain, self.copied = lm, lm.anatomy, _Plain(lm, copied), copied
        self.computes_in = computes_in
        self.n = lm.anatomy.n_blocks
        self.random = random.Random(0)
        self.window = min(_LONGEST, lm.max_length, lm.anatomy.fixed_positions or _LONGEST)
        embedded = int(lm.model.get_input_embeddings().weight.shape[0])
        known = range(min(embedded, len(lm.tokenizer)))
        special = set(lm.tokenizer.all_special_ids)  # an image's, say, stands for more than a token
        self.vocabulary = [t for t in known if t not in special] or list(known)
        self.drawn = _Drawn()
        if lm.reader.kind != "head":
            longest = min(self.window, 12 + lm.reader.window)
            self.plain.rows = [self.tokens(n) for n in sorted({max(1, longest // 2), longest})]
        self._early: dict[tuple[int, str], AdaInferLM] = {}

    # ------------------------------------------------------------------ what is asked
    def tokens(self, length: int) -> tuple[int, ...]:
        """Random ones."""
        return tuple(self.random.choices(self.vocabulary, k=length))

    def document(
        self, length: int, beginning: Sequence[int] = (), at: int | None = None, room: int = 0
    ) -> list[_Asked]:
        """Requests with one context of ``length`` tokens: a few random tokens, and the top token after block ``at``.

        They are no longer than ``room``; 0 for the window.
        """
        context = (*beginning, *self.tokens(length - len(beginning)))
        top = int(self.plain.logprobs(context, at or self.n)[-1].argmax())
        few = max(1, min(3, (room or self.window) - length))
        return [_Asked(context, self.tokens(few)), _Asked(context, (top,))]

    def choices(self, context: tuple[int, ...]) -> list[_Asked]:
        """Requests with this context, whose continuations are a token each: the top one and two others."""
        top = int(self.plain.logprobs(context, self.n)[-1].argmax())
        others = self.random.sample([t for t in self.vocabulary if t != top], 2)
        return [_Asked(context, (token,)) for token in (top, *others)]

    def documents(self, count: int) -> list[list[_Asked]]:
        """Some of all lengths, in random order."""
        longest = max(1, min(16, self.window - 3))
        lengths = [1 + (longest - 1) * n // max(1, count - 1) for n in range(count)]
        return [self.document(length) for length in self.random.sample(lengths, count)]

    def with_stopper(self, stopper: Any, prefix_cache: int = 0, reader: Reader = HEAD) -> AdaInferLM:
        """The same model, with another stopper, asked after every block."""
        lm = self.lm
        with _quiet("lm_eval.models.huggingface"):  # it warns of model objects
            return AdaInferLM(
                pretrained=lm.model,
                tokenizer=lm.tokenizer,
                stopper=stopper,
                prefix_cache=prefix_cache,
                reader=reader,
                check_layers="all",
                max_length=lm.max_length,
                softmax_dtype=lm.softmax_dtype,
                mixed_precision_dtype=lm.mixed_precision_dtype,
                prefix_token_id=lm.prefix_token_id,
            )

    def early(self, prefix_cache: int = 0, reader: Reader = HEAD) -> AdaInferLM:
        """The same model, leaving where ``self.drawn`` says."""
        key = (prefix_cache, reader.kind)
        if key not in self._early:
            self._early[key] = self.with_stopper(self.drawn, prefix_cache, reader)
        return self._early[key]

    def expected(self, lm: AdaInferLM, a: _Asked, k: int, behind: Sequence[int] = ()) -> Tensor:
        """[n, V] log-probabilities at a request's n scored positions, read after block k as ``lm`` reads."""
        if lm.reader.kind == "head":
            return self.plain.logprobs(a.row, k, behind)[-len(a.continuation) :]
        return self.plain.read.logprobs(a.row, len(a.context), k, behind)

    def compare(self, tally: _Tally, lm: AdaInferLM, documents: Sequence[Sequence[_Asked]]) -> list[int]:
        """Ask for all log-probabilities in one call, and compare each with its row's alone, at the block it names.

        Returns:
            The exit block of every request.
        """
        asked = [request for document in documents for request in document]
        requests: list[Any] = [(None, list(a.context), list(a.continuation)) for a in asked]
        with _quiet("lm_eval_adainfer.harness"):  # what such short prompts cost says nothing of real ones
            answers = lm._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=_BATCH)
        exits = [int(answer.exit_record.exit_layer) for answer in answers]
        reads = lm.reader.kind != "head"
        for a, answer, k in zip(asked, answers, exits, strict=True):
            n = len(a.continuation)
            expected = self.expected(lm, a, k)
            where = f"of {n} tokens after {len(a.context)} that left after block {k}"
            total = expected[range(n), list(a.continuation)].sum()
            tally.number(answer[0], total, self.plain.allowed(expected, reads), f"the log-probability {where}")
            tops = [self.plain.top(x, reads) for x in expected]
            # one token that is surely not the top one settles it
            surely = any(top is not None and top != t for top, t in zip(tops, a.continuation, strict=True))
            greedy = False if surely else None if None in tops else True
            tally.same(answer[1], greedy, f"the greedy flag {where}")
        return exits

    # ------------------------------------------------------------------ checks
    def structure(self) -> Finding:
        """What the model was found to be made of."""
        a, parameters = self.anatomy, list(self.lm.model.parameters())
        head = a.model.get_output_embeddings()
        chain = [type(m).__name__ for m in a.tail] + ["the model's own head" if head is None else type(head).__name__]
        blocks = ", ".join(sorted({type(b).__name__ for b in a.blocks}))
        return Finding(
            "structure",
            OK,
            f"{a.name}: {a.n_blocks} blocks ({blocks}), hidden size {a.block_hidden_size}, vocabulary {a.vocab_size}, "
            f"{self.computes_in}, on "
            f"{'+'.join(sorted({str(p.device) for p in parameters}))}; a block is read through {' -> '.join(chain)}"
            f"{'; checked with float32 copies of its weights' if self.copied else ''}",
        )

    def dense(self) -> Finding:
        """stopper=none against the plain forward."""
        tally, lm = _Tally(), self.lm if self.lm.stopper.kind == "none" else self.with_stopper("none")
        for k in self.compare(tally, lm, self.documents(4)):
            tally.same(k, self.n, "the exit block under stopper=none")
        return tally.finding("dense", "log-probabilities and greedy flags are the plain forward's")

    def exits(self) -> Finding:
        """One block at a time: what is read after it, and what documents that leave there get."""
        tally, blocks = _Tally(), spread(self.n)
        for k in blocks:
            self.drawn.only = k
            documents = [self.document(length, at=k) for length in (1, max(1, min(9, self.window - 3)))]
            for request in (document[0] for document in documents):
                expected = self.plain.logprobs(request.row, k)
                found = self.anatomy_logprobs(self.plain.states(request.row)[k - 1].hidden[0])
                allowed = max(self.plain.allowed(x[None]) for x in expected)
                tally.number(found, expected, allowed, f"what norm and head read after block {k}")
            for exit_block in self.compare(tally, self.early(), documents):
                tally.same(exit_block, k, "the exit block")
        which = f"each of the {self.n} blocks" if len(blocks) == self.n else f"blocks {_listed(blocks)} of {self.n}"
        return tally.finding("exits", f"answers after {which} are the model's without the later ones")

    def anatomy_logprobs(self, hidden: Tensor) -> Tensor:
        """[n, V] log-probabilities that the engine reads from hidden states [n, h]."""
        with self.lm._autocast():
            return self.anatomy.logits(hidden).float().cpu().log_softmax(-1)

    def compaction(self) -> Finding:
        """A batch of rows of different lengths that leave at different blocks."""
        tally = _Tally()
        exits = self.compare(tally, self.early(), self.documents(8))
        return tally.finding("compaction", f"rows of one batch that left after blocks {_listed(exits)} answer as alone")

    def prefix(self) -> Finding:
        """Documents with a long common beginning, some of it run once."""
        tally, lm = _Tally(), self.early(prefix_cache=4096)
        beginning = self.tokens(max(1, self.window - 10))
        lengths = [len(beginning) + n for n in (1, 3, 6, 2, 4, 5)]
        documents = [self.document(min(n, self.window - 1), beginning[: self.window - 2]) for n in lengths]
        before = lm.totals()["block_tokens_counted"]
        exits = self.compare(tally, lm, documents)
        ran = lm.totals()["block_tokens_counted"] - before
        asked = [request for document in documents for request in document]
        whole = sum({a.row: k * len(a.row) for a, k in zip(asked, exits, strict=True)}.values())
        if ran >= whole:
            missed = lm.found_sharing.missed if lm.found_sharing is not None else ""
            why = f" ({missed})" if missed else ""
            return tally.finding("prefix", f"not used, every prompt is run whole{why}", NOT_SUPPORTED)
        missed = lm._sharing().missed
        how = f"{lm._sharing().how}, as not: {missed}" if missed else lm._sharing().how
        return tally.finding("prefix", f"what prompts share was run once ({ran} of {whole} tokens x blocks; {how})")

    def generation(self) -> Finding:
        """Greedy decoding, token by token at drawn blocks, against the whole prefix without a cache."""
        try:
            with self.lm._autocast():
                windows = prepare(self.anatomy)
        except UnsupportedModelError as error:
            return Finding("generation", NOT_SUPPORTED, str(error))
        tally, steps = _Tally(), self.decoded(windows, HEAD, None, 12)
        for s in steps:
            self.compare_token(tally, s, self.plain.logprobs(s.text, s.block)[-1])
        how = windows.layout + (f", as not {windows.missed}" if windows.missed else "")
        return tally.finding(
            "generation",
            f"tokens that left after blocks {_listed(s.block for s in steps)} are as without a cache (laid out {how})",
        )

    def decoded(self, windows: Windows, reader: Reader, prompts: PromptExits | None, longest: int) -> list[_Step]:
        """Decode greedily, one text alone and four together.

        Args:
            windows: How tokens are laid out.
            reader: How new tokens are read.
            prompts: What says where prompts leave; new tokens then run dense. None: tokens leave at drawn blocks.
            longest: Tokens of the longest prompt, where the window is long enough.
        """
        stopper = self.drawn if prompts is None else specs.parse("none")
        schedule, steps = Schedule(self.n, stopper), []
        new = max(1, min(_NEW_TOKENS, self.window - 1))
        longest = max(1, min(longest, self.window - new))
        for rows in (1, 4):
            texts = [list(self.tokens(1 + (longest - 1) * (n + 1) // rows)) for n in range(rows)]
            lengths, policy = [len(text) for text in texts], "recompute" if prompts is None else "propagate"
            with self.lm._autocast():
                decoder = Decoder(
                    self.anatomy, stopper, schedule, windows, texts, new, prompt_exits=prompts, kv_policy=policy,
                    reader=reader,
                )  # fmt: skip
                with decoder.attached():
                    for step in range(1, new + 1):
                        # the last tokens go through all blocks, so whatever earlier ones left out is filled in
                        self.drawn.only = self.n if step == new else None
                        logits = decoder.step()
                        chosen = logits.argmax(-1).tolist()
                        for n, (text, result) in enumerate(zip(texts, decoder.results, strict=True)):
                            k = result.layers[-1] if prompts is None else int(result.prompt_exit or 0)
                            steps.append(_Step(tuple(text), lengths[n], k, rows, logits[n].float().cpu(), chosen[n]))
                        decoder.append(chosen, [False] * rows)
                        for text, token in zip(texts, chosen, strict=True):
                            text.append(token)
        return steps

    def compare_token(self, tally: _Tally, step: _Step, expected: Tensor, reads: bool = False) -> None:
        """A step of decoding against the log-probabilities [V] of its next token."""
        where = f"after {len(step.text)} tokens, left after block {step.block} with {step.rows} rows in the batch,"
        if step.prompt < len(step.text):
            where = where.replace(" tokens,", f" tokens, {step.prompt} of them the prompt's,")
        allowed = self.plain.allowed(expected[None], reads)
        tally.number(step.logits.log_softmax(-1), expected, allowed, f"a log-probability {where}")
        tally.same(step.token, self.plain.top(expected, reads), f"the token {where}")

    def reader(self) -> Finding:
        """What the model's reader reads, of rows of one batch and of rows that share prefixes, against rows alone."""
        tally, reader, exits = _Tally(), self.lm.reader, []
        for reads in (False, True):  # a decision that reads nothing, and one whose reading is scored as well
            drawn = _Drawn(reads)
            exits += self.compare(tally, self.with_stopper(drawn, 0, reader), self.documents(8))
            sharing = self.with_stopper(drawn, 4096, reader)
            exits += self.compare(tally, sharing, self.behind_a_beginning())
        how = "run whole" if sharing.found_sharing is None or sharing.found_sharing.rule is None else "read once"
        return tally.finding(
            "reader",
            f"{reader.name} reads rows of one batch after blocks {_listed(exits)} as alone, what prompts share {how}",
        )

    def behind_a_beginning(self) -> list[list[_Asked]]:
        """Documents that begin alike, with own parts of 1, W - 1, W, W + 1 tokens and a few more."""
        window = max(1, self.lm.reader.window)
        room = min(self.lm.max_length, self.anatomy.fixed_positions or self.lm.max_length, 2 * window + 36)
        most = max(1, room - 3)  # tokens of a prompt
        lengths = [n for n in (1, window - 1, window, window + 1, window + 4, window + 9) if 0 < n < most]
        beginning = self.tokens(most - max(lengths, default=0))
        return [self.document(len(beginning) + n, beginning, room=room) for n in lengths]

    def texts(self) -> Finding:
        """Texts under the model's reader, token by token, against whole prefixes without a cache."""
        reader, prompts = self.lm.reader, None
        try:
            with self.lm._autocast():
                windows = prepare(self.anatomy)
                if reader.runs_tokens:  # what leaves is the prompt, and new tokens find its cache as the reader left it
                    reading, drawn = prepared(self.anatomy, reader), _Drawn(reads=True)
                    storing = reading.storing or watch_storing(self.anatomy)
                    schedule = Schedule(self.n, drawn, check_layers="all", reader=reader)
                    prompts = PromptExits(drawn, schedule, reading, storing)
        except UnsupportedModelError as error:
            return Finding("texts", NOT_SUPPORTED, str(error))
        tally, steps = _Tally(), self.decoded(windows, reader, prompts, 12 + reader.window)
        for s in steps:
            if prompts is None:
                expected = self.plain.read.logits(s.text, len(s.text), s.block)[-1]
            else:
                expected = self.plain.read.next_token(s.text[: s.prompt], s.text[s.prompt :], s.block)
            self.compare_token(tally, s, expected.log_softmax(-1), reads=True)
        blocks, what = _listed(s.block for s in steps), "tokens" if prompts is None else "prompts"
        return tally.finding(
            "texts", f"under {reader.name} texts whose {what} left after blocks {blocks} go on as without a cache"
        )

    def rounding(self) -> Finding:
        """In the model's own dtype: how far answers are from plain forwards, against how far these are from each other.

        A plain forward with other tokens behind a row's is the same one on paper.
        """
        documents, found, own, sizes = self.documents(8), [], [], []
        readers = [HEAD] if self.lm.reader.kind == "head" else [HEAD, self.lm.reader]
        for lm in (self.early(size, reader) for reader in readers for size in (0, 4096)):
            asked = [request for document in documents for request in document]
            requests: list[Any] = [(None, list(a.context), list(a.continuation)) for a in asked]
            for a, answer in zip(asked, lm._loglikelihood_tokens(requests, True, override_bs=_BATCH), strict=True):
                k, n = int(answer.exit_record.exit_layer), len(a.continuation)
                plain = [self.expected(lm, a, k, behind) for behind in ((), self.tokens(3), self.tokens(9))]
                total, *others = (x[range(n), list(a.continuation)].sum().item() for x in plain)
                found.append(answer[0] - total)
                own += [other - total for other in others]
                sizes.append(plain[0].where(plain[0] > -1e4, 0).abs().amax(-1).mean().item())
        # kernels may be too much alike to differ, but logits can be off by their last digit
        digit = torch.finfo(coarsest(self.lm.model)).eps * sum(sizes) / len(sizes)
        seen, allowed = _root_mean_square(found), max(4 * _root_mean_square(own), digit)
        good = seen <= allowed  # not where it is NaN
        detail = (
            f"in {self.computes_in} answers differ from plain forwards by {seen:.2g} nats (root mean square of "
            f"{len(found)}), and these from each other by {_root_mean_square(own):.2g}; {allowed:.2g} are allowed"
        )
        return Finding("rounding", OK if good else FAILED, detail, len(found), 0, seen, allowed)

    def stopper(self) -> Finding:
        """The stopper's exits against the stopper asked block by block, of one context at a time."""
        tally, documents = _Tally(), self.documents(8)
        if features.needs_choices(self.lm.stopper.features):  # it stops at choices of one token each alone
            documents = [self.choices(document[0].context) for document in documents]
        exits = self.compare(tally, self.lm, documents)
        for document, k in zip(documents, exits[:: len(documents[0])], strict=True):
            context, answers = document[0].context, [asked.continuation for asked in document]
            with torch.no_grad(), self.lm._autocast():
                expected = self.naive_exit(context, [a[0] for a in answers if len(a) == 1])
            tally.same(k, expected, f"the exit block of a context of {len(context)} tokens")
        return tally.finding(
            "stopper", f"{self.lm.stopper.kind} leaves after blocks {_listed(exits)} as when asked alone"
        )

    def naive_exit(self, context: Sequence[int], choices: Sequence[int]) -> int | None:
        """The first asked block at which the stopper says stop; None where rounding could change that.

        It is asked about its features as they are, and with each of them a little larger and a little smaller.

        Args:
            context: The tokens that it decides at the end of.
            choices: The tokens of the choices, where these are one token each.
        """
        stopper, anatomy, asked = self.lm.stopper, self.anatomy, self.lm.schedule.blocks
        names = stopper.features
        if not names:  # it asks nothing, and leaves after its one block
            return asked[0] if asked else self.n
        reads = self.lm.reader.kind != "head"
        # features are of the order of 1
        little = 1e-4 + (self.plain.reading_rounding if reads else self.plain.rounding)
        whole = ("depth", "agreement", "choice_agreement")  # what rounding does not move
        moves = torch.diag(torch.tensor([0.0 if name in whole else little for name in names]))
        moves = torch.cat([torch.zeros(1, len(names)), moves, -moves])
        n = len(moves)
        carried = torch.zeros(n, stopper.carries) if stopper.carries else None
        for state in self.plain.states(context, features.needed_parts(names)):
            if state.block not in asked:
                continue
            if reads:
                logits = self.plain.read.logits(context, len(context), state.block)
            else:
                logits = anatomy.logits(state.hidden[:, -1])
            logprobs = logits[0].float().cpu().log_softmax(-1)
            if features.needs_past(names) and self.plain.top(logprobs, reads) is None:
                return None
            if features.needs_choice_past(names) and self.plain.top(logprobs[list(choices)], reads) is None:
                return None
            device = state.hidden.device
            carried = None if carried is None else carried.to(device)
            rows, last = torch.zeros(n, dtype=torch.long, device=device), len(context) - 1
            logits = logits.expand(n, -1)
            of_choices = features.choices_of(logits.to(device), [choices] * n)
            seen = features.observe(names, state, rows, rows + last, logits, self.n, carried, of_choices)
            values = features.compute(names, seen)
            stops = (stopper.ask(seen, values + moves.to(values.device), carried) > 0).tolist()
            if any(stops):
                return state.block if all(stops) else None
        return self.n


def verify_model(lm: AdaInferLM, disable_tqdm: bool = False) -> list[Finding]:
    """Check early exit on this model against plain forwards of it, on a few random prompts of up to 40 tokens.

    Works with any tokenizer and vocabulary. The model's totals (``lm.totals()``) count these forwards too.

    Args:
        lm: The model; its stopper is checked where it has one, and so is its reader. What comes before these is checked
            with the reader ``head``.
        disable_tqdm: Show no progress.

    Tolerances are 1e-4 plus a share of the log-probabilities' size: 2e-6, or twice what rounding was measured to do to
    this model's logits (:mod:`rounding`), or to what its reader reads. A model that computes in a coarser dtype than
    float32 is checked with float32 copies of its weights; in its own dtype its answers are compared in the finding
    ``rounding``.

    Returns:
        A finding per check: ``structure``, ``dense``, ``exits``, ``compaction``, ``prefix``, ``generation``, for a
        reader other than ``head`` ``reader`` and ``texts``, for a stopper other than ``none`` ``stopper``, and for a
        dtype coarser than float32 ``rounding``. Whatever goes wrong in a check is its finding.
    """
    names = ["structure", "dense", "exits", "compaction", "prefix", "generation"]
    dtype = _computes_in(lm)
    names += ["reader", "texts"] * (lm.reader.kind != "head")
    names += ["stopper"] * (lm.stopper.kind != "none")
    with tqdm(desc="Verifying", total=len(names), disable=disable_tqdm or lm.rank != 0) as progress:
        with _in_float32(lm) as copied:
            findings = _run(_Verifier(lm, dtype, copied), names, progress)
        if copied:
            findings += _run(_Verifier(lm, dtype), ["rounding"], progress)
    return findings


@contextmanager
def _in_float32(lm: AdaInferLM) -> Iterator[bool]:
    """Let the model compute in float32 for a while; yields whether it does not otherwise."""
    autocast = lm.mixed_precision_dtype
    with in_float32(lm.model, autocast is not None) as copied:
        lm.mixed_precision_dtype = None if copied else autocast
        try:
            yield copied
        finally:
            lm.mixed_precision_dtype = autocast


def _run(verifier: _Verifier, names: Sequence[str], progress: Any) -> list[Finding]:
    """These checks' findings."""
    findings = []
    for name in names:
        check: Callable[[], Finding] = getattr(verifier, name)
        verifier.drawn.only = None
        try:
            findings.append(check())
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a model that fails here is what is looked for
            said = str(error).splitlines()[0] if str(error) else ""
            what = said if isinstance(error, AdaInferError) else f"{type(error).__name__}: {said}"
            findings.append(Finding(name, FAILED, f"it ended with an error ({what})"))
        progress.update(1)
    return findings


def render(findings: Sequence[Finding]) -> str:
    """A table of the findings, and the verdict."""
    width = max(len(f.check) for f in findings)
    lines = [f"{'check':{width}}  {'result':13}  detail"]
    lines += [f"{f.check:{width}}  {f.status:13}  {f.detail}" for f in findings]
    failed = [f.check for f in findings if f.status == FAILED]
    missing = [f.check for f in findings if f.status == NOT_SUPPORTED]
    count = sum(f.comparisons for f in findings)
    if failed:
        verdict = f"FAILED: {', '.join(failed)}: early exit gives other answers than this model"
    else:
        verdict = f"ok: {count} comparisons with plain forwards, none differs" + (
            f" (not supported: {', '.join(missing)})" if missing else ""
        )
    return "\n".join([*lines, "", verdict])


def as_json(findings: Sequence[Finding]) -> str:
    """The findings as a list of objects; an error that is not finite is null, as JSON has no such number."""
    rows = [asdict(f) for f in findings]
    for row in rows:
        if row["largest_error"] is not None and not math.isfinite(row["largest_error"]):
            row["largest_error"] = None
    return json.dumps(rows, indent=1) + "\n"


def _computes_in(lm: AdaInferLM) -> str:
    """The weights' dtypes, and autocast's."""
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in lm.model.parameters()})
    return f"{'+'.join(dtypes)}{'' if lm.mixed_precision_dtype is None else f' under {lm.mixed_precision_dtype}'}"


def _root_mean_square(values: Sequence[float]) -> float:
    return math.sqrt(sum(x * x for x in values) / len(values))


def spread(n_blocks: int) -> list[int]:
    """Block numbers from 1 to L, all or a spread selection with both ends."""
    most = min(n_blocks, _MOST_BLOCKS)
    return sorted({1 + round(i * (n_blocks - 1) / max(1, most - 1)) for i in range(most)})


def _listed(blocks: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(set(blocks))))


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """A logger's warnings are left out."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
