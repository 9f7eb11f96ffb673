"""The loop around ``generation.Decoder``: choosing tokens as ``model.generate`` would, knowing when to stop."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation import GenerationMode, LogitsProcessorList

from lm_eval_adainfer.anatomy import Anatomy
from lm_eval_adainfer.answers import ExitTrace
from lm_eval_adainfer.counting import FlopCounter
from lm_eval_adainfer.errors import AdaInferError, UnsupportedModelError
from lm_eval_adainfer.generation import Decoded, Decoder
from lm_eval_adainfer.slots import Windows
from lm_eval_adainfer.strategies.base import Schedule, Stopper


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
    context: Tensor,
    attention_mask: Tensor,
    max_length: int,
    tokenizer: Any,
    stop: Sequence[str],
    seeds: Seeds,
    kv_policy: str = "recompute",
    shortlist: int = 0,
    **kwargs: Any,
) -> list[Decoded]:
    """Generate with early exit.

    Args:
        anatomy: The model.
        stopper: Says after a block whether a new token leaves.
        schedule: After which blocks it is asked.
        windows: From ``slots.watch_windows``.
        context: [B, S] token ids, left-padded.
        attention_mask: [B, S], 0 at padding.
        max_length: S + new tokens at most.
        tokenizer: For stop strings.
        stop: Stop strings.
        seeds: Where rows that sample get their generators.
        kv_policy: As :class:`Decoder`'s.
        shortlist: As :class:`Decoder`'s.
        **kwargs: As ``model.generate`` takes them (``do_sample``, ``temperature``, ``top_p``, ...).

    Raises:
        AdaInferError: On generation settings that need more than one pass over a row (beams, assistants).
    """
    model = anatomy.model
    config, unknown = model._prepare_generation_config(None, max_length=max_length, **kwargs)
    refused = {name: value for name, value in unknown.items() if value is not None}
    refused |= {n: v for n in ("stop_strings", "max_time") if (v := getattr(config, n, None)) is not None}
    refused |= {"num_return_sequences": config.num_return_sequences} if (config.num_return_sequences or 1) > 1 else {}
    refused |= {"use_cache": False} if config.use_cache is False else {}
    if refused:
        name, value = next(iter(refused.items()))
        raise AdaInferError(
            f"generation_kwargs: {name}={value!r} is unknown to early-exit generation; leave it out, or pass "
            "generation=dense"
        )
    if max_length <= context.shape[1]:
        raise AdaInferError(
            f"generation_kwargs: max_length={max_length} leaves no room after prompts of {context.shape[1]} tokens; "
            "give max_gen_toks instead"
        )
    limit = anatomy.fixed_positions
    if limit is not None and max_length > limit:
        raise UnsupportedModelError(
            f"generation: beyond {limit} tokens the rotary embeddings of {anatomy.name} depend on the longest text, so "
            f"texts of up to {max_length} tokens can't exit early; pass generation=dense"
        )
    if config.get_generation_mode() not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise AdaInferError(
            f"generation_kwargs: {config.get_generation_mode().value} can't exit early; use greedy decoding or "
            "sampling, or pass generation=dense"
        )
    model._prepare_special_tokens(config, True, device=context.device)
    processors = model._get_logits_processor(
        config,
        input_ids_seq_length=context.shape[1],
        encoder_input_ids=context,
        logits_processor=LogitsProcessorList(),
        device=context.device,
        model_kwargs={},
    )
    ends = config._eos_token_tensor
    finished = Stop(tokenizer, stop, [] if ends is None else ends.flatten().tolist())

    prompts = [row[mask.bool()].tolist() for row, mask in zip(context, attention_mask, strict=True)]
    new = max_length - context.shape[1]
    decoder = Decoder(anatomy, stopper, schedule, windows, prompts, new, kv_policy, shortlist)
    decoder.slots[:, : context.shape[1]] = context.cpu()  # padding ids as the tokenizer wrote them, for processors
    generators = [seeds.generator(prompt, context.device) for prompt in prompts] if config.do_sample else []
    with decoder.attached():
        while decoder.rows:
            logits = decoder.step()
            scores = logits
            if processors:
                scores = processors(decoder.slots[:, : decoder.length].to(logits.device), logits)
            best = torch.stack([scores.argmax(dim=-1), logits.amax(dim=-1).isfinite()])  # one reading of the device
            chosen, finite = best.tolist()
            for row, is_finite in zip(decoder.rows, finite, strict=True):
                decoder.results[row].finite &= bool(is_finite)
            if config.do_sample and not all(finite):
                raise AdaInferError(
                    "generation: the logits are NaN or infinite, so no token can be drawn; give a dtype that does not "
                    "overflow, or do_sample=False"
                )
            if config.do_sample:
                odds = scores.softmax(dim=-1)
                chosen = [
                    int(torch.multinomial(odds[n], 1, generator=generators[row])) for n, row in enumerate(decoder.rows)
                ]
            done = [
                decoder.length + 1 >= max_length or finished([*decoder.results[row].tokens, token])
                for row, token in zip(decoder.rows, chosen, strict=True)
            ]
            decoder.append(chosen, done)
    return decoder.results


def trace(decoded: Decoded, prompt_tokens: int, counter: FlopCounter, fingerprint: str) -> ExitTrace:
    """The exit trace of a generated text (docs/numbers.md)."""
    n_blocks, new = counter.n_blocks, len(decoded.tokens)
    positions = prompt_tokens + new - 1  # the last new token is never run
    layer = sum(decoded.layers) / new
    flops = (
        sum(counter.block(k, decoded.block_tokens[k - 1], decoded.pairs[k - 1]) for k in range(1, n_blocks + 1))
        + sum(counter.stored(k, n) for k, n in enumerate(decoded.stored_tokens, start=1))
        + counter.head(decoded.head_rows)
        + counter.screened(decoded.screened)
        + counter.decisions(decoded.decisions)
    )
    return ExitTrace(
        exit_layer=layer,
        n_blocks=counter.n_whole,
        flops_ratio=counter.flops_ratio(layer, prompt_tokens),
        layers_run=decoded.executed / positions,
        flops=flops,
        flops_dense=counter.dense(positions) + counter.head(new),
        fingerprint=fingerprint,
        layers=tuple(decoded.layers),
    )
