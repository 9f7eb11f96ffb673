"""The generation loop: tokens are chosen from a decoder's logits as ``model.generate`` would, until a text ends."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lm_eval_adainfer.errors import AdaInferError, UnsupportedModelError
from lm_eval_adainfer.generation.decoded import Decoded
from lm_eval_adainfer.generation.decoder import Decoder
from lm_eval_adainfer.generation.prompts import PromptExits
from lm_eval_adainfer.generation.settings import Settings
from lm_eval_adainfer.readers.base import HEAD, Reader
from lm_eval_adainfer.strategies.base import Schedule, Stopper
from lm_eval_adainfer.structure.anatomy import Anatomy
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


@torch.no_grad()
def decode(
    anatomy: Anatomy,
    stopper: Stopper,
    schedule: Schedule,
    windows: Windows,
    settings: Settings,
    context: Tensor,
    attention_mask: Tensor,
    max_new: int,
    max_length: int | None,
    tokenizer: Any,
    stop: Sequence[str],
    seeds: Seeds,
    kv_policy: str = "recompute",
    shortlist: int = 0,
    reader: Reader = HEAD,
    prompt_exits: PromptExits | None = None,
) -> list[Decoded]:
    """Generate with early exit.

    Args:
        anatomy: The model.
        stopper: Says after a block whether a new token leaves.
        schedule: After which blocks it is asked.
        windows: From ``probes.prepare``.
        settings: How tokens are chosen, and when a text is finished.
        context: [B, S] token ids, left-padded.
        attention_mask: [B, S], 0 at padding.
        max_new: New tokens of a row at most.
        max_length: Tokens of a row's prompt and text together at most, where the request says so.
        tokenizer: For stop strings.
        stop: Stop strings.
        seeds: Where rows that sample get their generators.
        kv_policy: As :class:`Decoder`'s.
        shortlist: As :class:`Decoder`'s.
        reader: As :class:`Decoder`'s.
        prompt_exits: What decides how deep prompts go; None where the first new token's decision does.

    Raises:
        UnsupportedModelError: On texts that are longer than the model's rotary embeddings allow.
    """
    prompts = [row[mask.bool()] for row, mask in zip(context, attention_mask, strict=True)]
    limits = [settings.new_tokens(len(prompt), max_new, max_length) for prompt in prompts]
    longest, limit = context.shape[1] + max(limits), anatomy.fixed_positions
    if limit is not None and longest > limit:
        raise UnsupportedModelError(
            f"generation: beyond {limit} tokens the rotary embeddings of {anatomy.name} depend on the longest text, so "
            f"texts of up to {longest} tokens can't exit early; pass generation=dense"
        )
    # each row has processors of its own, so what they remember and count is the row's, and none of it is padding
    processors = [settings.processors(p[None], new) for p, new in zip(prompts, limits, strict=True)]
    finished, samples = Stop(tokenizer, stop, settings.end_tokens()), settings.config.do_sample
    most_seconds, start = settings.config.max_time, time.time()

    texts = [prompt.tolist() for prompt in prompts]
    decoder = Decoder(anatomy, stopper, schedule, windows, texts, max(limits), kv_policy, shortlist, reader)
    state = decoder.state
    generators = [seeds.generator(text, context.device) for text in texts] if samples else []
    first = None if prompt_exits is None else prompt_exits.run(state, texts)
    with decoder.attached():
        while decoder.rows:
            logits = scores = decoder.step() if first is None else first
            first = None
            if any(processors):
                ids = state.slots[:, : state.length].to(logits.device)
                rows = zip(state.rows, state.pad, ids, logits, strict=True)
                scores = torch.cat([processors[row](x[None, pad:], y[None]) for row, pad, x, y in rows])
            odds = scores.softmax(dim=-1) if samples else scores
            # one reading of the device for everything
            read = [scores.argmax(dim=-1), logits.amax(dim=-1).isfinite(), odds.sum(dim=-1).isfinite()]
            chosen, finite, can_draw = torch.stack(read).tolist()
            for row, is_finite in zip(decoder.rows, finite, strict=True):
                decoder.results[row].finite &= bool(is_finite)
            if samples:
                if not all(can_draw):
                    raise AdaInferError(
                        "generation: the logits are NaN or infinite, so no token can be drawn; give a dtype that does "
                        "not overflow, or do_sample=False"
                    )
                chosen = [
                    int(torch.multinomial(odds[n], 1, generator=generators[row])) for n, row in enumerate(decoder.rows)
                ]
            is_late = most_seconds is not None and time.time() - start > most_seconds
            done = []
            for row, token in zip(decoder.rows, chosen, strict=True):
                new = [*decoder.results[row].tokens, token]
                done.append(is_late or len(new) >= limits[row] or finished(new))
            decoder.append(chosen, done)
    return decoder.results
