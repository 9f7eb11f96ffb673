"""Exact early-exit decoding: every new token may leave at its own block, and later tokens see the right cache.

In every block the cache holds a *prefix* of a row's tokens, and it never holds more in a later block than in an earlier
one. A token that left after block e has keys and values in blocks 1..e alone; its hidden state after block e is kept.
When a later token of the row goes deeper, the kept states are put in front of it, so that the block fills what it
misses and runs the new token in one call. A token that runs to the end therefore sees exactly the dense model's
hidden states of all tokens before it. The prompt is treated the same way: an early exit saves prefill too.

Rows are left-padded, so that a row's token and its neighbours' are in the same *slot* counted from the right; rows
miss different stretches, and a mask says which slots of a row a block really writes. Nothing a row computes reads
another row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, masking_utils

from lm_eval_adainfer import features
from lm_eval_adainfer.anatomy import Anatomy, BatchRule, batch_factors, hidden_of, walk, with_hidden
from lm_eval_adainfer.errors import UnsupportedModelError
from lm_eval_adainfer.features import Observation
from lm_eval_adainfer.forward import AllRowsLeft, BlockState, hooked, part_output
from lm_eval_adainfer.strategies.base import Schedule, Stopper


@contextmanager
def explicit_masks() -> Iterator[None]:
    """Let transformers build every causal mask.

    It leaves masks out ("is causal") where a plain forward allows that, but a block that runs some tokens against
    more keys needs one.
    """
    before = masking_utils._ignore_causal_mask_sdpa
    masking_utils._ignore_causal_mask_sdpa = lambda *args, **kwargs: False
    try:
        yield
    finally:
        masking_utils._ignore_causal_mask_sdpa = before


class SlotCache(DynamicCache):
    """Keys and values by slot, per block and row; rows in flow write what they miss.

    It tells the model that ``base`` tokens are cached, so that the model makes masks and rotary embeddings for every
    slot that some block still misses.
    """

    def __init__(self) -> None:
        super().__init__()
        self.base = 0
        self.capacity = 0
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.step: _Step | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many tokens the model may take for cached."""
        return self.base

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """The slot of the first query."""
        return self.base

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:  # type: ignore[override]
        """(keys, offset)."""
        return self.base + query_length, 0

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Write the slots that the rows in flow miss, and return all keys and values up to the newest slot."""
        assert self.step is not None
        return (
            self._write(self.keys, layer_idx, key_states),
            self._write(self.values, layer_idx, value_states),
        )

    def _write(self, store: dict[int, Tensor], layer: int, new: Tensor) -> Tensor:
        step = self.step
        assert step is not None
        if layer not in store:
            store[layer] = new.new_zeros(step.n_rows, new.shape[1], self.capacity, new.shape[-1])
        whole, end, width = store[layer], step.length, new.shape[-2]
        valid = step.valid[:, None, :, None]
        if step.rows is None:
            window = whole[:, :, end - width : end]
            window.copy_(new if step.all_valid else torch.where(valid, new, window))
            return whole[:, :, :end]
        part = whole[step.rows, :, :end]
        part[:, :, end - width :] = new if step.all_valid else torch.where(valid, new, part[:, :, end - width :])
        whole[step.rows, :, end - width : end] = part[:, :, end - width :]
        return part

    def keep_rows(self, rows: Tensor) -> None:
        """Forget finished rows."""
        for store in (self.keys, self.values):
            for layer, whole in store.items():
                store[layer] = whole[rows]


@dataclass
class Decoded:
    """What decoding one row came to.

    Attributes:
        tokens: New tokens.
        layers: Each one's exit block.
        executed: Block executions x token positions, fills included.
        pairs: Per block, query-key pairs of its attention.
        block_tokens: Per block, tokens it ran.
        head_rows: Head rows computed (checks and choices of tokens).
        decisions: Times the stopper was asked.
    """

    tokens: list[int] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)
    block_tokens: list[int] = field(default_factory=list)
    pairs: list[int] = field(default_factory=list)
    head_rows: int = 0
    decisions: int = 0

    @property
    def executed(self) -> int:
        """Block executions x token positions, fills included."""
        return sum(self.block_tokens)


@dataclass
class Windows:
    """How the blocks' arguments follow a decoding step, as seen in two small forwards.

    Attributes:
        queries: (block, path) -> the dimensions that followed the number of queries.
        rows: How they follow the batch (position ids are given per row here, unlike in a plain forward).
    """

    queries: dict[tuple[int, str], tuple[int, ...]]
    rows: BatchRule


class Decoder:
    """A batch of rows being decoded.

    Args:
        anatomy: The model.
        stopper: Says after a block whether a new token leaves.
        schedule: After which blocks it is asked.
        windows: How the blocks' arguments follow a step (:func:`watch_windows`).
        prompts: Token ids of the rows.
        max_new_tokens: Room to make.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        stopper: Stopper,
        schedule: Schedule,
        windows: Windows,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
    ):
        self.anatomy, self.stopper, self.checked = anatomy, stopper, frozenset(schedule.blocks)
        self.windows = windows
        self.parts = features.needed_parts(stopper.features) if self.checked else []
        # a strategy that asks nothing stops every token at its one block; deeper ones are never needed
        self.deepest = schedule.blocks[0] if schedule.blocks and not stopper.features else anatomy.n_blocks
        self.length = max(map(len, prompts))
        device = anatomy.input_device
        capacity = self.length + max_new_tokens
        self.pad = torch.tensor([self.length - len(p) for p in prompts])
        self.slots = torch.zeros(len(prompts), capacity, dtype=torch.long)
        for r, prompt in enumerate(prompts):
            self.slots[r, self.length - len(prompt) : self.length] = torch.tensor(list(prompt), dtype=torch.long)
        self.device = device
        # known[k - 1][r]: the first slot that block k has not run for row r
        self.known = self.pad.repeat(anatomy.n_blocks, 1)
        self.states: dict[int, Tensor] = {}  # block -> [rows, capacity, h], outputs of tokens that left after it
        self.cache = SlotCache()
        self.cache.capacity = capacity
        self.rows = list(range(len(prompts)))  # rows still being decoded, by their number in the batch
        n = anatomy.n_blocks
        self.results = [Decoded(block_tokens=[0] * n, pairs=[0] * n) for _ in prompts]

    @torch.no_grad()
    def step(self) -> Tensor:
        """Run every row's newest token as deep as it needs.

        Returns:
            [rows, V] float32 logits of each row at its exit block.
        """
        run = _Step(self)
        return run.forward()

    def append(self, tokens: Sequence[int], finished: Sequence[bool]) -> None:
        """Add each row's chosen token; rows that are finished leave the batch."""
        for row, token in zip(self.rows, tokens, strict=True):
            self.results[row].tokens.append(token)
        keep = [n for n, done in enumerate(finished) if not done]
        if len(keep) < len(self.rows):
            index = torch.tensor(keep, dtype=torch.long)
            self.slots, self.pad, self.known = self.slots[index], self.pad[index], self.known[:, index]
            self.states = {k: x[index.to(x.device)] for k, x in self.states.items()}
            self.cache.keep_rows(index.to(self.device))
            self.rows = [self.rows[n] for n in keep]
        if self.rows:
            self.slots[:, self.length] = torch.tensor([tokens[n] for n in keep])
            self.length += 1


class _Step:
    """One forward over the rows being decoded; slot windows end at the newest slot."""

    def __init__(self, decoder: Decoder):
        self.decoder, self.anatomy = decoder, decoder.anatomy
        self.n_rows, self.length = len(decoder.rows), decoder.length
        self.rows: Tensor | None = None  # of the decoder's rows those in flow; None while that is all of them
        self.flow = torch.arange(self.n_rows)
        self.start = decoder.pad  # per row in flow, the first slot that is valid in the window
        self.valid = torch.ones(1, 1, dtype=torch.bool)
        self.all_valid = False
        self.width = 0
        self.before: Tensor | None = None
        self.parts: dict[str, Tensor] = {}
        self.parts_before: dict[str, Tensor] = {}
        self.logits: list[Tensor | None] = [None] * self.n_rows

    def forward(self) -> Tensor:
        decoder, anatomy = self.decoder, self.anatomy
        base = int(decoder.known[: decoder.deepest].min())
        decoder.cache.base, decoder.cache.step = base, self
        slot = torch.arange(self.length)
        attend = (slot[None] >= decoder.pad[:, None]).to(decoder.device)
        positions = (slot[None, base:] - decoder.pad[:, None]).clamp(min=0).to(decoder.device)
        try:
            with explicit_masks(), hooked(anatomy, self, decoder.parts):
                anatomy.model(
                    input_ids=decoder.slots[:, base : self.length].to(decoder.device),
                    attention_mask=attend.long(),
                    past_key_values=decoder.cache,
                    use_cache=True,
                    **({"position_ids": positions} if anatomy.takes_position_ids else {}),
                )
        except AllRowsLeft:
            pass
        return torch.stack([x.to(decoder.device).float() for x in self.logits if x is not None])

    def pre_hook(self, k: int, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Before block k: put what it misses in front of what flows, and cut its arguments to that window."""
        decoder = self.decoder
        hidden = args[0] if args else kwargs["hidden_states"]
        before, self.start = self.start, decoder.known[k - 1, self.flow]
        self.width = self.length - int(self.start.min())
        first = self.length - self.width
        self.all_valid = bool((self.start == first).all())
        window = torch.arange(first, self.length)
        self.valid = (window[None] >= self.start[:, None]).to(hidden.device)
        original, hidden = hidden, hidden[:, -self.width :]
        if k > 1 and bool((self.start < before).any()):  # this block misses tokens that left before it
            kept = decoder.states[k - 1][self.flow.to(hidden.device), first : self.length]
            newest = kept[:, -hidden.shape[1] :]
            flowing = (window[None] >= before[:, None]).to(hidden.device)[:, -hidden.shape[1] :]
            newest.copy_(torch.where(flowing[..., None], hidden, newest))
            hidden = kept
        self.before = hidden
        new_args, new_kwargs = walk(
            [list(args), kwargs], lambda path, x: hidden if x is original else self._cut(k, path, x)
        )
        return tuple(new_args), new_kwargs

    def _cut(self, k: int, path: str, value: Tensor) -> Tensor:
        for dim in self.decoder.windows.queries.get((k, path), ()):
            if value.shape[dim] > self.width:
                value = value.narrow(dim, value.shape[dim] - self.width, self.width)
        if self.rows is None:
            return value
        return self.decoder.windows.rows.cut(k, path, value, self.rows, self.n_rows)

    def part_hook(self, which: str, output: Any) -> None:
        assert self.before is not None
        self.parts[which] = part_output(output, self.before)

    def post_hook(self, k: int, output: Any) -> Any:
        """After block k: it now knows every slot of the rows in flow; those whose token leaves go."""
        decoder = self.decoder
        hidden = hidden_of(output)
        assert self.before is not None
        for n, row in enumerate(self.flow.tolist()):
            result, start = decoder.results[decoder.rows[row]], int(self.start[n])
            count, pad = self.length - start, int(decoder.pad[row])
            result.block_tokens[k - 1] += count
            result.pairs[k - 1] += count * (start - pad + 1 + self.length - pad) // 2  # causal: one key more a query
        decoder.known[k - 1, self.flow] = self.length
        state = BlockState(k, hidden, self.before, self.parts, self.parts_before)
        leaves = self._leaving(k, state)
        self.parts_before, self.parts = self.parts, {}
        if not leaves:
            return output
        if k < self.anatomy.n_blocks:
            self._keep_states(k, hidden, leaves)
        gone = set(leaves)
        keep = torch.tensor([n for n in range(len(self.flow)) if n not in gone], dtype=torch.long)
        if keep.numel() == 0:
            raise AllRowsLeft
        self.flow, self.start = self.flow[keep], self.start[keep]
        self.rows = self.flow.to(hidden.device)
        index = keep.to(hidden.device)
        self.parts_before = {name: x[index] for name, x in self.parts_before.items()}
        return with_hidden(output, hidden[index])

    def _keep_states(self, k: int, hidden: Tensor, leaves: Sequence[int]) -> None:
        decoder = self.decoder
        if k not in decoder.states:
            decoder.states[k] = hidden.new_zeros(self.n_rows, decoder.cache.capacity, hidden.shape[-1])
        store, first = decoder.states[k], self.length - self.width
        for n in leaves:
            start = int(self.start[n])
            store[int(self.flow[n]), start : self.length] = hidden[n, start - first :]

    def _leaving(self, k: int, state: BlockState) -> list[int]:
        """Indices (among the rows in flow) of the tokens that leave after block k, their logits noted."""
        decoder, n = self.decoder, len(self.flow)
        last = k == self.anatomy.n_blocks
        if not last and k not in decoder.checked:
            return []
        asks = not last and bool(decoder.stopper.features)
        needs_head = last or not asks or features.needs_head(decoder.stopper.features)
        device = state.hidden.device
        at, newest = torch.arange(n, device=device), torch.full((n,), -1, device=device)
        logits = self.anatomy.logits(state.hidden[:, -1]) if needs_head else None
        leaves = list(range(n))
        if asks:
            seen = Observation(state, at, newest, logits)
            margins = decoder.stopper.margin(k, features.compute(decoder.stopper.features, seen))
            leaves = [i for i, stop in enumerate((margins > 0).tolist()) if stop]
        for i in range(n):
            result = decoder.results[decoder.rows[int(self.flow[i])]]
            result.head_rows += logits is not None
            result.decisions += asks
        if logits is None and leaves:
            logits = state.hidden.new_zeros(n, self.anatomy.vocab_size)
            logits[leaves] = self.anatomy.logits(state.hidden[leaves, -1])
            for i in leaves:
                decoder.results[decoder.rows[int(self.flow[i])]].head_rows += 1
        for i in leaves:
            assert logits is not None
            row = int(self.flow[i])
            self.logits[row] = logits[i]
            decoder.results[decoder.rows[row]].layers.append(k)
        return leaves


@torch.no_grad()
def watch_windows(anatomy: Anatomy) -> Windows:
    """Watch two decoding steps of different batch, cache and window sizes.

    Raises:
        UnsupportedModelError: Where the model does not use a key-value cache the common way.
    """
    sizes = ((3, 5, 2), (5, 6, 4))  # batch, cached, window: no size is another's, and both change
    seen = [_watch_step(anatomy, *size) for size in sizes]
    both = {key: (shape, seen[1][key]) for key, shape in seen[0].items() if len(seen[1].get(key, ())) == len(shape)}
    queries = {
        key: tuple(d for d, pair in enumerate(zip(*shapes, strict=True)) if pair == (2, 4))
        for key, shapes in both.items()
    }
    return Windows(queries, BatchRule(batch_factors(seen[0], seen[1], (3, 5))))


def _watch_step(anatomy: Anatomy, batch: int, cached: int, width: int) -> dict[tuple[int, str], tuple[int, ...]]:
    """Shapes of all blocks' arguments in a step of ``width`` tokens after ``cached`` ones."""
    vocab = int(anatomy.model.get_input_embeddings().weight.shape[0])
    ids = (torch.arange(batch * (cached + width)).reshape(batch, -1) % vocab).to(anatomy.input_device)
    attend = torch.ones_like(ids)
    attend[0, 0] = 0
    positions = (attend.cumsum(-1) - 1).clamp(min=0)
    cache, handles = DynamicCache(), []
    shapes: dict[tuple[int, str], tuple[int, ...]] = {}
    for k, block in enumerate(anatomy.blocks, start=1):

        def note(m: Any, args: Any, kwargs: Any, k: int = k) -> None:
            walk([list(args), kwargs], lambda path, x: shapes.__setitem__((k, path), tuple(x.shape)))

        handles.append(block.register_forward_pre_hook(note, with_kwargs=True))
    try:
        with explicit_masks():
            for start, end in ((0, cached), (cached, cached + width)):
                shapes.clear()
                anatomy.model(
                    input_ids=ids[:, start:end],
                    attention_mask=attend[:, :end],
                    past_key_values=cache,
                    use_cache=True,
                    **({"position_ids": positions[:, start:end]} if anatomy.takes_position_ids else {}),
                )
        in_every_block = len(cache) >= anatomy.n_blocks and all(
            cache.get_seq_length(layer) == cached + width for layer in range(anatomy.n_blocks)
        )
    except Exception as error:  # whatever a family does with a cache that it does not expect
        raise _no_cache(anatomy, type(error).__name__) from error
    finally:
        for handle in handles:
            handle.remove()
    if not in_every_block:
        raise _no_cache(anatomy, "not in every block")
    return shapes


def _no_cache(anatomy: Anatomy, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"generation: {anatomy.name} does not use a plain key-value cache ({why}), so it can't exit early while "
        "generating; pass generation=dense to generate without early exit"
    )
