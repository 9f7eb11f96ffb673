"""What a decoded row holds: its new tokens, the block after which each left, and counts of what was computed for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from lm_eval_adainfer.counting import FlopCounter
from lm_eval_adainfer.generation.tokens import Tokens
from lm_eval_adainfer.records import ExitRecord


@dataclass
class Decoded:
    """The new tokens of one row, and what was computed for it.

    Attributes:
        tokens: The new tokens.
        layers: The exit block of each.
        block_tokens: Per block, how many tokens it ran.
        pairs: Per block, the query-key pairs of its attention.
        stored_tokens: Per block, of how many tokens it computed keys and values only.
        head_rows: Head rows computed, for checks and for choices of tokens.
        screened: Logits computed of candidates alone, and of the first token ids.
        decisions: How often the stopper was asked.
        prompt_exit: The block after which the prompt left, where that was decided on its own (``prompts``).
        reads: (block, tokens of the prompt, positions read) of every time that the prompt was read after a block.
        copied_prompt: Tokens of the prompt whose keys and values in later blocks were copied besides.
        reading: Floating-point operations of the reader's maps, and of decisions about the prompt.
        finite: Whether the logits of all its tokens were finite.
    """

    tokens: list[int] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)
    block_tokens: list[int] = field(default_factory=list)
    pairs: list[int] = field(default_factory=list)
    stored_tokens: list[int] = field(default_factory=list)
    head_rows: int = 0
    screened: int = 0
    decisions: int = 0
    prompt_exit: int | None = None
    reads: list[tuple[int, int, int]] = field(default_factory=list)
    copied_prompt: int = 0
    reading: int = 0
    finite: bool = True

    @property
    def executed(self) -> int:
        """Block executions x token positions, fills included."""
        return sum(self.block_tokens)


def count_run(results: Sequence[Decoded], pad: Sequence[int], k: int, tokens: Tokens) -> None:
    """Count the tokens that block k ran, and the query-key pairs of its attention without padding.

    Args:
        results: Of the decoder's rows.
        pad: Slots of padding in front of each row.
        k: The block.
        tokens: What it ran.
    """
    for row, count, reached in zip(tokens.rows, tokens.counts, tokens.reached, strict=True):
        result = results[row]
        result.block_tokens[k - 1] += count
        result.pairs[k - 1] += reached - count * pad[row]


def count_stored(results: Sequence[Decoded], k: int, tokens: Tokens) -> None:
    """Count the tokens of which block k computed keys and values only."""
    for row, count in zip(tokens.rows, tokens.counts, strict=True):
        results[row].stored_tokens[k - 1] += count


def record_of(decoded: Decoded, prompt_tokens: int, counter: FlopCounter, fingerprint: str) -> ExitRecord:
    """The exit record of a generated text (docs/numbers.md)."""
    n_blocks, new = counter.n_blocks, len(decoded.tokens)
    positions = prompt_tokens + new - 1  # the last new token is never run
    layer = sum(decoded.layers) / new
    run_on = sum((n_blocks - k) * counter.run_on(*read) for k, *read in decoded.reads)
    flops = (
        sum(counter.block(k, decoded.block_tokens[k - 1], decoded.pairs[k - 1]) for k in range(1, n_blocks + 1))
        + sum(counter.stored(k, n) for k, n in enumerate(decoded.stored_tokens, start=1))
        + sum(counter.read(*read) for read in decoded.reads)
        + counter.copied(decoded.prompt_exit or n_blocks, decoded.copied_prompt)
        + counter.head(decoded.head_rows)
        + counter.screened(decoded.screened)
        + counter.decisions(decoded.decisions)
        + decoded.reading
    )
    return ExitRecord(
        exit_layer=layer,
        n_blocks=counter.n_whole,
        flops_ratio=counter.flops_ratio(layer, prompt_tokens),
        layers_run=(decoded.executed + run_on) / positions,
        flops=flops,
        flops_dense=counter.dense(positions) + counter.head(new),
        fingerprint=fingerprint,
        layers=tuple(decoded.layers),
        prompt_exit_layer=decoded.prompt_exit,
    )
