"""Early-exit decoding: every new token may leave at its own block, and later tokens see the right cache.

In every block the cache holds a *prefix* of a row's tokens, and it never holds more in a later block than in an earlier
one. A token that left after block e has keys and values in blocks 1..e alone; its hidden state after block e is kept
(one per token, since a token is pending after one block only). When a later token of the row goes deeper, the policy
decides:

- ``recompute``: the kept states are run along with it, so that the block fills what it misses and runs the new token
  in one call. A token that runs to the end sees exactly the dense model's hidden states of all tokens before it.
- ``propagate``: the kept states are projected into the block's keys and values as they are, and the block is left
  before it does anything else (CALM's state copy, arXiv 2207.07061, section 3.3). Cheaper, approximate.
  The prompt has no exits of its own and is always filled exactly.

An exit saves prefill too: the prompt is run only as deep as some token needs. Nothing a row computes reads another row.
How the tokens that a block has to run are laid out is up to ``layouts``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lm_eval_adainfer.generation.cache import SlotCache, Stored
from lm_eval_adainfer.generation.layouts import LAYOUTS, Tokens
from lm_eval_adainfer.strategies import features
from lm_eval_adainfer.strategies.asking import ask
from lm_eval_adainfer.strategies.base import Schedule, Stopper
from lm_eval_adainfer.structure.anatomy import Anatomy
from lm_eval_adainfer.structure.arguments import hidden_of, walk, with_hidden
from lm_eval_adainfer.structure.calls import AllRowsLeft, bypassed, explicit_masks, hooked, part_output
from lm_eval_adainfer.structure.hooks import without_hooks
from lm_eval_adainfer.structure.rounding import logits_distance, probed
from lm_eval_adainfer.structure.state import BlockState
from lm_eval_adainfer.structure.windows import Windows, no_cache, watch_windows

KV_POLICIES = ("recompute", "propagate")
_SLACK = 64  # slots that a deeper block may miss before it gets a forward of its own, with masks of its own


class _NextWindow(Exception):  # noqa: N818 - control flow
    """Leaves the model's forward before a block that misses more than this forward's masks cover."""


@dataclass
class Decoded:
    """What decoding one row came to.

    Attributes:
        tokens: New tokens.
        layers: Each one's exit block.
        block_tokens: Per block, tokens it ran.
        pairs: Per block, query-key pairs of its attention.
        stored_tokens: Per block, tokens of which it computed keys and values only.
        head_rows: Head rows computed (checks and choices of tokens).
        screened: Logits computed of candidates alone.
        decisions: Times the stopper was asked.
        finite: Whether the logits of all its tokens were.
    """

    tokens: list[int] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)
    block_tokens: list[int] = field(default_factory=list)
    pairs: list[int] = field(default_factory=list)
    stored_tokens: list[int] = field(default_factory=list)
    head_rows: int = 0
    screened: int = 0
    decisions: int = 0
    finite: bool = True

    @property
    def executed(self) -> int:
        """Block executions x token positions, fills included."""
        return sum(self.block_tokens)


class Decoder:
    """A batch of rows being decoded.

    Args:
        anatomy: The model.
        stopper: Says after a block whether a new token leaves.
        schedule: After which blocks it is asked.
        windows: How the blocks' arguments follow a step (``slots.watch_windows``).
        prompts: Token ids of the rows.
        max_new_tokens: Room to make.
        kv_policy: ``recompute`` or ``propagate``.
        shortlist: Candidates per token for screening (``head_check=shortlist``); 0 reads the full vocabulary at
            every check.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        stopper: Stopper,
        schedule: Schedule,
        windows: Windows,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        kv_policy: str = "recompute",
        shortlist: int = 0,
    ):
        self.anatomy, self.stopper, self.checked = anatomy, stopper, frozenset(schedule.blocks)
        self.windows, self.propagates = windows, kv_policy == "propagate"
        self.shortlist = min(shortlist, anatomy.vocab_size) if features.needs_head(stopper.features) else 0
        self.parts = features.needed_parts(stopper.features) if self.checked else []
        # a strategy that asks nothing stops every token at its one block; deeper ones are never needed
        self.deepest = schedule.blocks[0] if schedule.blocks and not stopper.features else anatomy.n_blocks
        self.length = self.prompt_end = max(map(len, prompts))
        self.device = anatomy.input_device
        capacity = self.length + max_new_tokens
        self.pad = [self.length - len(p) for p in prompts]
        self.slots = torch.zeros(len(prompts), capacity, dtype=torch.long)
        for r, prompt in enumerate(prompts):
            self.slots[r, self.pad[r] : self.length] = torch.tensor(list(prompt), dtype=torch.long)
        # known[k - 1][r]: the first slot that block k has not run for row r
        self.known = [list(self.pad) for _ in range(anatomy.n_blocks)]
        self.pending: Tensor | None = None  # [rows, capacity, h], of every token the output of its deepest block
        self.cache = SlotCache(capacity)
        self.rows = list(range(len(prompts)))  # rows still being decoded, by their number in the batch
        n = anatomy.n_blocks
        self.results = [Decoded(block_tokens=[0] * n, pairs=[0] * n, stored_tokens=[0] * n) for _ in prompts]
        self.current: Step | None = None
        self._attached = False

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Keep the hooks on the model from step to step."""
        with hooked(self.anatomy, self, self.parts):
            self._attached = True
            try:
                yield
            finally:
                self._attached = False

    def pre_hook(self, k: int, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Hand on to the step."""
        return self.current.pre_hook(k, args, kwargs) if self.current is not None else None

    def part_hook(self, which: str, output: Any) -> None:
        """Hand on to the step."""
        if self.current is not None:
            self.current.part_hook(which, output)

    def post_hook(self, k: int, output: Any) -> Any:
        """Hand on to the step."""
        return self.current.post_hook(k, output) if self.current is not None else None

    @torch.no_grad()
    def step(self) -> Tensor:
        """Run every row's newest token as deep as it needs.

        Returns:
            [rows, V] float32 logits of each row at its exit block.
        """
        if not self._attached:
            with self.attached():
                return self.step()
        self.current = Step(self)
        try:
            return self.current.run()
        finally:
            self.current = None

    def append(self, tokens: Sequence[int], finished: Sequence[bool]) -> None:
        """Add each row's chosen token; rows that are finished leave the batch."""
        for row, token in zip(self.rows, tokens, strict=True):
            self.results[row].tokens.append(token)
        keep = [n for n, done in enumerate(finished) if not done]
        if len(keep) < len(self.rows):
            index = torch.tensor(keep, dtype=torch.long)
            self.slots = self.slots[index]
            self.pad = [self.pad[n] for n in keep]
            self.known = [[row[n] for n in keep] for row in self.known]
            if self.pending is not None:
                self.pending = self.pending[index.to(self.pending.device)]
            self.cache.keep_rows(index)
            self.rows = [self.rows[n] for n in keep]
        if self.rows:
            self.slots[:, self.length] = torch.tensor([tokens[n] for n in keep])
            self.length += 1

    def keep(self, tokens: Tokens, hidden: Tensor) -> None:
        """Remember the states ([n, h]) of tokens that leave, for deeper blocks to fill in later."""
        if self.deepest < self.anatomy.n_blocks:  # nobody will ever go deeper
            return
        if self.pending is None:
            self.pending = hidden.new_zeros(len(self.rows), self.cache.capacity, hidden.shape[-1])
        device = self.pending.device
        self.pending[tokens.row.to(device), tokens.slot.to(device)] = hidden.to(device)

    def kept(self, tokens: Tokens, device: torch.device) -> Tensor:
        """[n, h] states of tokens that left."""
        assert self.pending is not None
        where = self.pending.device
        return self.pending[tokens.row.to(where), tokens.slot.to(where)].to(device)


class Step:
    """The newest token of every row, as deep as it goes.

    The model's own forward runs over the window of slots that some block still misses, so that it makes masks and
    rotary embeddings for all of them; the hooks cut what a block gets to what it needs. Where deep blocks miss much
    more than shallow ones (a prompt that nobody took there yet), they get a second forward, and only if a row comes
    so far: else every step would pay for masks of the whole prompt.
    """

    def __init__(self, decoder: Decoder):
        self.decoder, self.anatomy = decoder, decoder.anatomy
        self.n_rows, self.length = len(decoder.rows), decoder.length
        self.flow = list(range(self.n_rows))  # the decoder's rows that go on
        self.tokens: Tokens | None = None  # what the current block runs
        self.layout = LAYOUTS[decoder.windows.layout](decoder.windows, self.n_rows, self.length)
        self.before: Tensor | None = None  # [flow, h], the block's input at the newest tokens
        self.carried: Tensor | None = None
        self.first, self.end = 1, 0  # blocks of the current forward: first..end - 1
        self.parts: dict[str, Tensor] = {}
        self.parts_before: dict[str, Tensor] = {}
        self.logits: list[Tensor | None] = [None] * self.n_rows
        self.left: dict[int, Tensor] = {}  # row -> [h] where it left, if no check has computed its logits
        self.candidates: Tensor | None = None  # [n_rows, C]
        self.carried_over: Tensor | None = None  # [n_rows, carries], what the stopper keeps from block to block

    # ------------------------------------------------------------------ forwards
    def run(self) -> Tensor:
        """All forwards of this step."""
        self.first, last = 1, False
        while not last:
            self.end, base = self._reach()
            last = self.end > self.anatomy.n_blocks
            try:
                self._forward(base)
            except _NextWindow:
                self.first = self.end
            except AllRowsLeft:
                break
        device = self.decoder.device
        rows = sorted(self.left)  # one reading of the head's weights for all, whatever block they left after
        if rows:
            logits = self.anatomy.logits(torch.stack([self.left[row].to(device) for row in rows]))
            for row, x in zip(rows, logits, strict=True):
                self.logits[row] = x
                self.decoder.results[self.decoder.rows[row]].head_rows += 1
        return torch.stack([x.to(device) for x in self.logits if x is not None]).float()

    def _reach(self) -> tuple[int, int]:
        """One behind the last block of the next forward, and the first slot of its window.

        Only rows that are still in flow count: one that always leaves early misses everything in the deep blocks.
        """
        known, n_blocks = self.decoder.known, self.anatomy.n_blocks
        base = min(known[self.first - 1][row] for row in self.flow)
        for k in range(self.first + 1, self.decoder.deepest + 1):
            missing = min(known[k - 1][row] for row in self.flow)
            if base - missing > _SLACK:
                return k, base
            base = min(base, missing)
        return n_blocks + 1, base

    def _forward(self, base: int) -> None:
        decoder, anatomy, length = self.decoder, self.anatomy, self.length
        decoder.cache.base = base
        self.layout.covers(base)
        given: dict[str, Any] = {}
        slot, pad = torch.arange(length), torch.tensor(decoder.pad)
        if any(decoder.pad):
            given["attention_mask"] = (slot[None] >= pad[:, None]).long().to(decoder.device)
        if anatomy.takes_position_ids:
            given["position_ids"] = (slot[None, base:] - pad[:, None]).clamp(min=0).to(decoder.device)
        # one query needs no causal mask, and neither do the queries of all keys; whatever lies between does
        partial = length - 1 - base > 0 and length > decoder.prompt_end
        passed = anatomy.blocks[: self.first - 1]
        with explicit_masks(partial), self.layout.active(), without_hooks(passed), bypassed(anatomy, passed):
            anatomy.model(
                input_ids=decoder.slots[:, base:length].to(decoder.device),
                past_key_values=decoder.cache,
                use_cache=True,
                **given,
            )

    def pre_hook(self, k: int, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Before block k: give it what flows and what it misses, and cut its arguments to that."""
        if k < self.first:
            return None
        decoder, layout = self.decoder, self.layout
        original = args[0] if args else kwargs["hidden_states"]
        if k == self.end:
            self.carried = original
            raise _NextWindow
        hidden = original if self.carried is None else self.carried.to(original.device)
        self.carried = None
        newest = self.length - 1
        # the last prompt token is the first that decides: what lies behind it may have left, what lies before can't
        decides = decoder.prompt_end - 1
        starts = [decoder.known[k - 1][r] for r in self.flow]
        ends = [newest] * len(starts)
        if decoder.propagates and k > 1:
            exits = Tokens(self.flow, [max(s, decides) for s in starts], ends, newest, False)
            if exits.n:
                self._store(k, exits, args, kwargs, original)
            starts = [s if s < decides else newest for s in starts]
            ends = [min(decides, newest)] * len(starts)
        tokens = Tokens(self.flow, starts, ends, newest)
        if self.tokens is None or tokens != self.tokens:
            hidden = layout.assemble(hidden, self.tokens, tokens, decoder.kept)
            self.tokens = tokens
        tokens = self.tokens
        decoder.cache.call = layout.call(tokens)
        if decoder.parts or "cos_hidden" in decoder.stopper.features:
            self.before = layout.newest(hidden, tokens)
        if hidden is original and layout.fits(tokens):
            return None
        new_args, new_kwargs = walk([list(args), kwargs], layout.cutter(k, tokens, original, hidden))
        return tuple(new_args), new_kwargs

    def _store(self, k: int, exits: Tokens, args: tuple, kwargs: dict, original: Tensor) -> None:
        """``propagate``: project the exit states that block k misses into its keys and values, and no more."""
        decoder, layout = self.decoder, self.layout
        hidden = layout.laid_out(exits, decoder.kept(exits, original.device))
        decoder.cache.call = layout.call(exits, store_only=True)
        new_args, new_kwargs = walk([list(args), kwargs], layout.cutter(k, exits, original, hidden))
        decoder.current = None  # this call's hooks are other people's alone
        try:
            self.anatomy.blocks[k - 1](*new_args, **new_kwargs)
        except Stored:
            pass
        else:
            raise RuntimeError("a block ran on after its keys and values were stored")
        finally:
            decoder.current = self
        for row, count in zip(self.flow, exits.counts, strict=True):
            decoder.results[decoder.rows[row]].stored_tokens[k - 1] += count

    def part_hook(self, which: str, output: Any) -> None:
        """After the attention or feed-forward part of a block."""
        if self.tokens is not None:  # None while keys and values alone are made
            self.parts[which] = self.layout.newest(part_output(output, self.layout.shaped), self.tokens)

    def post_hook(self, k: int, output: Any) -> Any:
        """After block k: it now knows every slot of the rows in flow; those whose token leaves go."""
        if k < self.first:
            return None
        decoder, known, tokens = self.decoder, self.decoder.known[k - 1], self.tokens
        assert tokens is not None
        hidden = hidden_of(output)
        for row, count, reached in zip(self.flow, tokens.counts, tokens.reached, strict=True):
            result = decoder.results[decoder.rows[row]]
            result.block_tokens[k - 1] += count
            result.pairs[k - 1] += reached - count * decoder.pad[row]
            known[row] = self.length
        last = k == self.anatomy.n_blocks
        leaves: list[int] = []
        if last or k in decoder.checked:
            leaves = self._leaving(k, self.layout.newest(hidden, tokens))
        if decoder.parts:
            self.parts_before, self.parts = self.parts, {}
        if not leaves:
            return None
        if not last:
            gone = tokens.of([n in set(leaves) for n in range(len(self.flow))])
            decoder.keep(gone, self.layout.states(hidden, tokens, gone))
        if len(leaves) == len(self.flow):
            raise AllRowsLeft
        stay = [True] * len(self.flow)
        for n in leaves:
            stay[n] = False
        index = torch.tensor([n for n, stays in enumerate(stay) if stays], device=hidden.device)
        hidden = self.layout.select(hidden, tokens, stay)
        self.tokens = tokens.of(stay)
        self.flow = [row for row, stays in zip(self.flow, stay, strict=True) if stays]
        self.parts_before = {name: x[index.to(x.device)] for name, x in self.parts_before.items()}
        return with_hidden(output, hidden)

    # ------------------------------------------------------------------ decisions
    def _leaving(self, k: int, newest: Tensor) -> list[int]:
        """Indices (among the rows in flow) of the tokens that leave after block k.

        Args:
            k: The block.
            newest: [flow, h], its output at the newest tokens.
        """
        decoder, everyone = self.decoder, list(range(len(self.flow)))
        logits = None
        if k == self.anatomy.n_blocks or not decoder.stopper.features:
            leaves = everyone
        elif not features.needs_head(decoder.stopper.features):
            leaves = self._stopping(k, newest, everyone, None)
        else:
            asked = self._screened(k, newest, everyone)
            if not asked:
                return []
            logits = self._head(newest, asked)
            if decoder.shortlist:
                self._note_candidates(asked, logits)
            stops = self._stopping(k, newest, asked, logits)
            logits = logits[stops]
            leaves = [asked[n] for n in stops]
        for n, i in enumerate(leaves):
            row = self.flow[i]
            if logits is None:
                self.left[row] = newest[i]
            else:
                self.logits[row] = logits[n]
            decoder.results[decoder.rows[row]].layers.append(k)
        return leaves

    def _head(self, newest: Tensor, rows: list[int]) -> Tensor:
        """[len(rows), V] logits of the newest token."""
        for i in rows:
            self.decoder.results[self.decoder.rows[self.flow[i]]].head_rows += 1
        return self.anatomy.logits(newest if len(rows) == len(self.flow) else newest[rows])

    def _stopping(self, k: int, newest: Tensor, rows: list[int], logits: Tensor | None) -> list[int]:
        """Of these rows, by their place in ``rows``, those at which the stopper says stop."""
        stopper, device = self.decoder.stopper, newest.device
        before = newest if self.before is None else self.before
        parts, parts_before = ({n: x[:, None] for n, x in p.items()} for p in (self.parts, self.parts_before))
        state = BlockState(k, newest[:, None], before[:, None], parts, parts_before)
        at, position = torch.tensor(rows, device=device), torch.zeros(len(rows), dtype=torch.long, device=device)
        mine = [self.flow[i] for i in rows]
        carried = None
        if stopper.carries:
            if self.carried_over is None:
                self.carried_over = torch.zeros(self.n_rows, stopper.carries, device=device)
            self.carried_over = self.carried_over.to(device)
            carried = self.carried_over[mine]
        stops = ask(stopper, self.anatomy, state, (at, position), carried, logits).stops
        if carried is not None and self.carried_over is not None:
            self.carried_over[mine] = carried
        for row in mine:
            self.decoder.results[self.decoder.rows[row]].decisions += 1
        return [n for n, stop in enumerate(stops) if stop]

    def _screened(self, k: int, newest: Tensor, rows: list[int]) -> list[int]:
        """The rows that the full vocabulary has to decide: all, or those that the candidates speak for.

        A row's candidates are the top tokens of the last full head that it computed for this token. Among them alone
        ``gap`` and ``top_prob`` are at least as large as over the full vocabulary wherever the top token is a
        candidate; where it is not, a stop can be missed at this block, but none is made that the full vocabulary
        does not confirm.
        """
        if not self.decoder.shortlist or self.candidates is None:
            return rows
        mine = self.candidates[self.flow].to(newest.device)
        for i in rows:
            self.decoder.results[self.decoder.rows[self.flow[i]]].screened += mine.shape[1]
        return self._stopping(k, newest, rows, self.anatomy.logits(newest, mine))

    def _note_candidates(self, rows: list[int], logits: Tensor) -> None:
        top = logits.topk(self.decoder.shortlist, dim=-1).indices
        if self.candidates is None:  # the first check of a token is always a full one, for every row
            self.candidates = top.new_zeros(self.n_rows, top.shape[1])
        self.candidates[[self.flow[i] for i in rows]] = top.to(self.candidates.device)


class _Script(Stopper):
    """Leaves as a list says, step by step and row by row; for :func:`prepare`."""

    kind = "script"
    features = ("cos_hidden",)

    def __init__(self, exits: list[list[int]]):
        self.exits = [list(row) for row in exits]
        self.open: list[int] = []

    def margin(self, block: int, values: Tensor, memory: Tensor | None = None) -> Tensor:
        """Positive where the script says so; it is asked for all rows that have not left, in order."""
        if block == 1:
            self.now, self.open = self.exits.pop(0), list(range(len(values)))
        stops = [self.now[row] == block for row in self.open]
        self.open = [row for row, stop in zip(self.open, stops, strict=True) if not stop]
        return torch.tensor([1.0 if stop else -1.0 for stop in stops], device=values.device)


@torch.no_grad()
def prepare(anatomy: Anatomy) -> Windows:
    """Find out how this model can be decoded with early exit, and check it on a few tokens.

    Rows of different lengths leave at scripted blocks; then all run to the end, where their logits have to be those of
    a plain forward without a cache.

    Raises:
        UnsupportedModelError: Where no layout gives these logits.
    """
    windows = watch_windows(anatomy)
    failures = [] if windows.packs else ["packed: its blocks have arguments that don't follow single tokens"]
    for layout in ("packed", "padded") if windows.packs else ("padded",):
        found = replace(windows, layout=layout, missed="; ".join(failures))
        try:
            difference = probed(anatomy, "logits", partial(_off_by, anatomy, found))
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            failures.append(f"{layout}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
            continue
        if difference.is_rounding:
            return found
        failures.append(f"{layout}: logits are {difference}")
    raise no_cache(anatomy, "; ".join(failures))


def _off_by(anatomy: Anatomy, windows: Windows) -> float:
    """How far the logits of scripted decoding are from a plain forward's (:func:`rounding.logits_distance`)."""
    n = anatomy.n_blocks
    ids = anatomy.probe_ids(3).tolist()
    prompts = [ids[0], ids[1][:3], ids[2][:4]]
    exits = [[1, 1, 1], [max(1, n // 2), 1, n], [n, max(1, n - 1), 1], [n, n, n]]
    stopper = _Script(exits)
    decoder = Decoder(anatomy, stopper, Schedule(n, stopper), windows, prompts, len(exits))
    with decoder.attached():
        for number in range(len(exits)):
            logits = decoder.step()
            if number < len(exits) - 1:
                decoder.append([row[number] for row in ids], [False] * 3)
    texts = [[*p, *row[: len(exits) - 1]] for p, row in zip(prompts, ids, strict=True)]
    plain = [
        anatomy.model(input_ids=torch.tensor([t], device=anatomy.input_device), use_cache=False).logits[0, -1]
        for t in texts
    ]
    return logits_distance(logits, torch.stack(plain))
