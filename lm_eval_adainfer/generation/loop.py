"""The generation loop: tokens are chosen from a decoder's logits as ``model.generate`` would, until a text ends."""

from __future__ import annotations

import hashlib
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation import LogitsProcessorList

from lm_eval_adainfer.errors import AdaInferError, UnsupportedModelError
from lm_eval_adainfer.generation.decoded import Decoded
from lm_eval_adainfer.generation.decoder import Decoder
from lm_eval_adainfer.generation.prompts import PromptExits
from lm_eval_adainfer.generation.settings import Settings
from lm_eval_adainfer.prefill.common import groups
from lm_eval_adainfer.prefill.documents import Document, Row
from lm_eval_adainfer.prefill.prefixes import Prefix
from lm_eval_adainfer.readers.base import HEAD, Reader
from lm_eval_adainfer.strategies.base import Schedule, Stopper
from lm_eval_adainfer.structure.anatomy import Anatomy
from lm_eval_adainfer.structure.arguments import BatchRule
from lm_eval_adainfer.structure.windows import Windows


class Stop:
    """When a row is finished: an end token, or a stop string in its last tokens (as lm-eval's criteria)."""

    def __init__(self, tokenizer: Any, strings: Sequence[str], end_tokens: Sequence[int]):
        self.tokenizer, self.end_tokens = tokenizer, frozenset(end_tokens)
        # lm-eval looks back over two tokens more than the string has, since it may be made of other tokens
        self.lookback = {s: len(tokenizer.encode(s, add_special_tokens=False)) + 2 for s in strings}

    def __call__(self, tokens: Sequence[int]) -> bool:
        """Whether these new tokens of a row finish it."""
        if tokens[-1] in self.end_tokens:
            return True
        tails = {n: self.tokenizer.decode(tokens[-n:]) for n in set(self.lookback.values())}
        return any(text in tails[n] for text, n in self.lookback.items())

    def cut(self, tokens: Sequence[int]) -> list[int]:
        """The tokens up to the one that finishes the row; stock generation runs on until all rows are finished."""
        return list(tokens[: next((n for n in range(1, len(tokens)) if self(tokens[:n])), len(tokens))])


class Seeds:
    """A generator per row, from torch's seed, the prompt and how often it has been sampled: not from the batch."""

    def __init__(self) -> None:
        self.seen: Counter[tuple[int, ...]] = Counter()

    def generator(self, prompt: Sequence[int], device: torch.device) -> torch.Generator:
        """The generator of the next row with this prompt."""
        key = tuple(prompt)
        text = f"{torch.initial_seed()} {self.seen[key]} {key}"
        self.seen[key] += 1
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
        return torch.Generator(device=device).manual_seed(seed)


@dataclass(frozen=True)
class Asked:
    """A text to generate.

    Attributes:
        prompt: Token ids.
        settings: How tokens are chosen, and when a text is finished.
        max_new: New tokens at most.
        stop: Stop strings.
        max_length: Tokens of prompt and text together at most, where the request says so.
    """

    prompt: Sequence[int]
    settings: Settings
    max_new: int
    stop: tuple[str, ...] = ()
    max_length: int | None = None

    @property
    def limit(self) -> int:
        """New tokens at most, whoever says so."""
        return self.settings.new_tokens(len(self.prompt), self.max_new, self.max_length)


@dataclass
class _Row:
    """A text that is being generated."""

    number: int  # among those asked for
    limit: int
    is_finished: Stop
    processors: LogitsProcessorList
    generator: torch.Generator | None  # None: greedy
    until: float  # when its time is over
    prefix: Prefix | None  # what its prompt continues

    def is_done(self, new: Sequence[int]) -> bool:
        return time.time() > self.until or len(new) >= self.limit or self.is_finished(new)


@dataclass
class Generator:
    """Generates texts with early exit, so many rows at once; where one is finished, the next takes its place.

    Attributes:
        anatomy: The model.
        stopper: Says after a block whether a new token leaves.
        schedule: After which blocks it is asked.
        windows: From ``probes.prepare``.
        tokenizer: For stop strings.
        kv_policy: As ``DecoderState``'s.
        shortlist: As ``DecoderState``'s.
        screen: As ``DecoderState``'s.
        reader: As ``DecoderState``'s.
        prompt_exits: What decides how deep prompts go; None where the first new token's decision does.
        rule: How the blocks' arguments follow the batch where rows continue a prefix; None: all prompts run whole.
        budget: Tokens of a prefix that may be run once for the prompts that share it; 0 shares nothing.
        spared: Block executions x tokens that are counted for texts, and were run for another one.
    """

    anatomy: Anatomy
    stopper: Stopper
    schedule: Schedule
    windows: Windows
    tokenizer: Any
    kv_policy: str = "recompute"
    shortlist: int = 0
    screen: int = 0
    reader: Reader = HEAD
    prompt_exits: PromptExits | None = None
    rule: BatchRule | None = None
    budget: int = 0
    spared: int = 0

    @torch.no_grad()
    def run(self, asked: Sequence[Asked], size: int, seeds: Seeds) -> Iterator[tuple[int, Decoded]]:
        """Generate texts.

        Args:
            asked: What is asked for.
            size: Rows at once, at most.
            seeds: Where rows that sample get their generators.

        Yields:
            The number of a text among those asked for, and what was decoded, as soon as it is finished.

        Raises:
            UnsupportedModelError: On texts that are longer than the model's rotary embeddings allow.
            AdaInferError: Where logits overflow and a token has to be drawn.
        """
        # those on a clock of their own wait for nobody
        alone = [n for n, one in enumerate(asked) if one.settings.value("max_time") is not None]
        for n in alone:
            yield from self._some(asked, [([n], None)], 1, seeds)
        together = [n for n in range(len(asked)) if n not in set(alone)]
        yield from self._some(asked, self._queues(asked, together, size), size, seeds)

    def _queues(
        self, asked: Sequence[Asked], numbers: Sequence[int], size: int
    ) -> list[tuple[list[int], Prefix | None]]:
        """Texts by what their prompts share, the longest first, and that."""

        def longest_first(n: int) -> tuple[int, list[int]]:
            return -len(asked[n].prompt), list(asked[n].prompt)

        if self.rule is None or not self.budget or len(numbers) < 2:
            return [(sorted(numbers, key=longest_first), None)]
        documents = {Document([Row(list(asked[n].prompt), 1)], []): n for n in numbers}
        found, asked_after = [], () if self.prompt_exits is None else self.prompt_exits.checked
        for members, shared in groups(list(documents), size, self.budget):
            queue = sorted((documents[d] for d in members), key=longest_first)
            prefix = Prefix(self.anatomy, [shared], self.rule, asked=asked_after) if shared else None
            found.append((queue, prefix))
        return sorted(found, key=lambda one: longest_first(one[0][0]))

    def _some(
        self, asked: Sequence[Asked], queues: list[tuple[list[int], Prefix | None]], size: int, seeds: Seeds
    ) -> Iterator[tuple[int, Decoded]]:
        numbers = [n for queue, _ in queues for n in queue]
        behind = {prefix: len(queue) for queue, prefix in queues if prefix is not None}
        if not numbers:
            return
        longest = max(len(asked[n].prompt) + asked[n].limit for n in numbers)
        self._require_positions(longest)
        size = min(size, len(numbers))
        decoder = Decoder(
            self.anatomy, self.stopper, self.schedule, self.windows, [], longest, size, self.prompt_exits,
            kv_policy=self.kv_policy, shortlist=self.shortlist, screen=self.screen, reader=self.reader,
        )  # fmt: skip
        rows: dict[int, _Row] = {}
        with decoder.attached():
            while queues or rows:
                # prompts that join in groups fill the model's matrices better; the last ones wait for nobody
                if queues and (decoder.state.free >= min(max(1, size // _JOIN), len(queues[0][0])) or not rows):
                    self._join(decoder, asked, queues, rows, seeds)
                logits = decoder.step()
                stepped = decoder.rows
                chosen = _choose(logits, [rows[row] for row in stepped], decoder)
                done = []
                for row, token in zip(stepped, chosen, strict=True):
                    new = decoder.results[row].tokens
                    done.append(rows[row].is_done([*new, token]))
                decoder.append(chosen, done)
                for row, is_done in zip(stepped, done, strict=True):
                    if is_done:
                        yield self._finished(rows.pop(row), behind), decoder.results[row]
        self.spared += decoder.state.copied

    def _join(
        self,
        decoder: Decoder,
        asked: Sequence[Asked],
        queues: list[tuple[list[int], Prefix | None]],
        rows: dict[int, _Row],
        seeds: Seeds,
    ) -> None:
        """The next prompts take the free places, as many as have one beginning."""
        queue, prefix = queues[0]
        joining, queue[:] = queue[: decoder.state.free], queue[decoder.state.free :]
        if not queue:
            queues.pop(0)
        prompts = [asked[n].prompt for n in joining]
        for n, row in zip(joining, decoder.join(prompts, prefix), strict=True):
            one, device = asked[n], self.anatomy.input_device
            settings, ids = one.settings, torch.tensor([list(one.prompt)], device=device)
            seconds = settings.value("max_time")
            rows[row] = _Row(
                n,
                one.limit,
                Stop(self.tokenizer, one.stop, settings.end_tokens()),
                # each row has processors of its own, so what they remember and count is the row's
                settings.processors(ids, one.limit),
                seeds.generator(one.prompt, device) if settings.config.do_sample else None,
                math.inf if seconds is None else time.time() + seconds,
                prefix,
            )

    def _finished(self, row: _Row, behind: dict[Prefix, int]) -> int:
        """The number of a text that is finished.

        Args:
            row: It.
            behind: The texts behind each prefix that are not finished; a prefix goes, with its keys and values, as soon
                as there are none.
        """
        if row.prefix is not None:
            behind[row.prefix] -= 1
            if not behind[row.prefix]:
                del behind[row.prefix]
                self.spared -= row.prefix.executed
        return row.number

    def _require_positions(self, longest: int) -> None:
        limit = self.anatomy.fixed_positions
        if limit is not None and longest > limit:
            raise UnsupportedModelError(
                f"generation: beyond {limit} tokens the rotary embeddings of {self.anatomy.name} depend on the longest "
                f"text, so texts of up to {longest} tokens can't exit early; pass generation=dense"
            )


_JOIN = 8  # a part of the batch that is worth a call of its own for prompts that join


def _choose(logits: Tensor, rows: Sequence[_Row], decoder: Decoder) -> list[int]:
    """The next token of each row, of its logits [rows, V]; notes which were not finite."""
    scores: Any = logits
    texts: list[Any] = decoder.texts() if any(row.processors for row in rows) else []
    if texts:
        scores = logits.clone()
        for n, (row, text) in enumerate(zip(rows, texts, strict=True)):
            if row.processors:
                scores[n] = row.processors(text.to(logits.device)[None], logits[n : n + 1])[0]
    largest, top = scores.max(dim=-1)
    if texts:
        largest = logits.amax(dim=-1)
    # one reading of the device for everything
    chosen, finite = torch.stack([top.double(), largest.isfinite().double()]).long().tolist()
    for number, is_finite in zip(decoder.rows, finite, strict=True):
        decoder.results[number].finite &= bool(is_finite)
    for n, row in enumerate(rows):
        if row.generator is None:
            continue
        odds = scores[n].softmax(dim=-1)
        if not bool(odds.sum().isfinite()):
            raise AdaInferError(
                "generation: the logits are NaN or infinite, so no token can be drawn; give a dtype that does not "
                "overflow, or do_sample=False"
            )
        chosen[n] = int(torch.multinomial(odds, 1, generator=row.generator))
    return chosen
