"""The early-exit prefill: the model's own forward, watched block by block, that rows can leave.

A pre-hook and a post-hook on every decoder block are all there is. The post-hook shows the block's output to a
callback, which says which rows go on; those alone are returned (batch compaction). The pre-hook cuts the next
block's batch-sized arguments (masks, position ids, ...) to these rows. When no row is left, a private exception
leaves the model's forward. The weights and the code of the model stay as they are.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from transformers import masking_utils

from lm_eval_adainfer.anatomy import Anatomy, BatchRule, hidden_of, replaced_forward, tolerance, walk
from lm_eval_adainfer.errors import UnsupportedModelError

if TYPE_CHECKING:
    from lm_eval_adainfer.prefixes import Continued


@dataclass
class BlockState:
    """What is known after block ``block`` for the n rows still in flow (S tokens each).

    Attributes:
        block: k, from 1 to L.
        hidden: [n, S, h], the block's output.
        before: [n, S, h], the block's input (for k = 1 the embedding output).
        parts: ``"attn"`` / ``"mlp"`` -> [n, S, h], output of that part of the block, where captured.
        parts_before: The same of the previous block (empty for k = 1).
    """

    block: int
    hidden: Tensor
    before: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)
    parts_before: dict[str, Tensor] = field(default_factory=dict)


AfterBlock = Callable[[BlockState], "Tensor | None"]


class AllRowsLeft(Exception):  # noqa: N818 - control flow, never seen by users
    """Leaves the model's forward when no row needs the next block."""


def part_output(output: Any, block_input: Tensor) -> Tensor:
    """[n, S, h] output of a block's attention or feed-forward part, kept apart from what the block does with it."""
    hidden = hidden_of(output).reshape(*block_input.shape[:2], -1)  # some families flatten here
    return hidden.clone()  # and some add the other part in place afterwards


@contextmanager
def explicit_masks(active: bool = True) -> Iterator[None]:
    """Let transformers build every causal mask.

    It leaves masks out ("is causal") where a plain forward allows that, but a block that runs some tokens against
    more keys needs one.
    """
    before = masking_utils._ignore_causal_mask_sdpa
    if active:
        masking_utils._ignore_causal_mask_sdpa = lambda *args, **kwargs: False
    try:
        yield
    finally:
        masking_utils._ignore_causal_mask_sdpa = before


@contextmanager
def bypassed(
    anatomy: Anatomy, blocks: Iterable[nn.Module], note: Callable[[tuple, dict], None] | None = None
) -> Iterator[None]:
    """Let these blocks hand their hidden states on, in the form in which the family's blocks do.

    ``note`` is told of every call's arguments.
    """

    def forward(*args: Any, **kwargs: Any) -> Any:
        if note is not None:
            note(args, kwargs)
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, None) if anatomy.blocks_return_tuples else hidden

    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(replaced_forward(block, forward))
        yield


class BlockHooks(Protocol):
    """What watches a forward's blocks (numbered k, from 1) and their parts."""

    def pre_hook(self, k: int, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Before block k: its arguments, as they are to be (None: as they are)."""

    def part_hook(self, which: str, output: Any) -> None:
        """After the attention or feed-forward part of a block."""

    def post_hook(self, k: int, output: Any) -> Any:
        """After block k: its output, as it is to be (None: as it is); or raises AllRowsLeft."""


@contextmanager
def hooked(anatomy: Anatomy, hooks: BlockHooks, capture: Sequence[str]) -> Iterator[None]:
    """Attach ``hooks`` to every block and to its captured parts, for a while."""
    handles: list[Any] = []
    try:
        for k, block in enumerate(anatomy.blocks, start=1):
            handles.append(
                block.register_forward_pre_hook(
                    lambda m, args, kwargs, k=k: hooks.pre_hook(k, args, kwargs), with_kwargs=True
                )
            )
            for which in capture:
                handles.append(
                    anatomy.part(block, which).register_forward_hook(
                        lambda m, args, output, which=which: hooks.part_hook(which, output)
                    )
                )
            handles.append(block.register_forward_hook(lambda m, args, output, k=k: hooks.post_hook(k, output)))
        yield
    finally:
        for handle in handles:
            handle.remove()


class ArgumentCutter:
    """Cuts the batch-sized arguments of a forward's blocks (masks, position ids, ...) to the rows still in flow.

    Args:
        rule: How the arguments follow the batch.
        batch: Rows at the start.
    """

    def __init__(self, rule: BatchRule, batch: int):
        self.rule, self.batch = rule, batch
        self.rows: Tensor | None = None  # indices into the batch of the rows in flow; None while that is all of them
        self.hidden: Tensor | None = None  # not to be cut: it is compact already
        self.beside: list[Any] = []  # what blocks hand to later ones besides: compact too
        self._cut: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # (id, factor) -> (whole, cut); whole kept alive

    def keep(self, rows: Tensor) -> None:
        """Some of the rows in flow (by their place among them) go on."""
        self.rows = rows if self.rows is None else self.rows.to(rows.device)[rows]
        self._cut.clear()
        for shared in self.beside:
            if isinstance(shared, UserDict):  # keys and values that later blocks read (Gemma 4)
                shared.update({key: self.of_rows(value, rows) for key, value in shared.items()})

    def of_rows(self, value: Any, rows: Tensor) -> Any:
        """What a block made for the rows in flow, for some of them (a loss or a count is for none of them)."""
        assert self.hidden is not None
        n = len(self.hidden)
        return walk(value, lambda _, x: x.index_select(0, rows.to(x.device)) if x.shape[:1] == (n,) else x)

    def cut(self, k: int, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Block k's arguments."""
        new_args, new_kwargs = walk([list(args), kwargs], lambda path, x: self._select(k, path, x))
        return tuple(new_args), new_kwargs

    def _select(self, k: int, path: str, value: Tensor) -> Tensor:
        if value is self.hidden or any(value is x for x in self.beside):
            return value
        key = (id(value), self.rule.factors.get((k, path), -1))
        if key not in self._cut:  # blocks share most arguments: cut each once, until rows leave again
            assert self.rows is not None
            self._cut[key] = (value, self.rule.cut(k, path, value, self.rows, self.batch))
        return self._cut[key][1]


class _Run:
    """One forward's hooks and their bookkeeping."""

    def __init__(self, anatomy: Anatomy, batch: int, after_block: AfterBlock, prefix: Continued | None):
        self.anatomy, self.after_block, self.prefix = anatomy, after_block, prefix
        self.cutter = ArgumentCutter(anatomy.batch_rule if prefix is None else prefix.rule, batch)
        self.beside: tuple = ()  # what the last block returned besides hidden states
        self.paused = False  # while the prefix runs the same blocks
        self.before: Tensor | None = None
        self.parts: dict[str, Tensor] = {}
        self.parts_before: dict[str, Tensor] = {}

    def pre_hook(self, k: int, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Before block k: remember its input, cut its other arguments to the rows in flow."""
        if self.paused:
            return None
        if self.prefix is not None:
            self.paused = True
            try:
                self.prefix.prefix.require(k)
            finally:
                self.paused = False
        self.before = self.cutter.hidden = args[0] if args else kwargs["hidden_states"]
        self.cutter.beside = [*self.beside, *(x for x in kwargs.values() if isinstance(x, UserDict))]
        return (args, kwargs) if self.cutter.rows is None else self.cutter.cut(k, args, kwargs)

    def part_hook(self, which: str, output: Any) -> None:
        """After the attention or feed-forward part of a block."""
        if self.paused:
            return
        assert self.before is not None
        self.parts[which] = part_output(output, self.before)

    def post_hook(self, k: int, output: Any) -> Any:
        """After block k: ask which rows go on, and let only those."""
        if self.paused:
            return None
        assert self.before is not None
        hidden = hidden_of(output)
        keep = self.after_block(BlockState(k, hidden, self.before, self.parts, self.parts_before))
        self.parts_before, self.parts = self.parts, {}
        self.beside = () if isinstance(output, Tensor) else output[1:]
        if keep is None:
            return output
        if keep.numel() == 0:
            raise AllRowsLeft
        if self.prefix is not None and len(keep) < len(hidden):
            self.prefix.keep(keep)
        keep = keep.to(hidden.device)
        self.cutter.keep(keep)
        self.parts_before = {name: x[keep.to(x.device)] for name, x in self.parts_before.items()}
        self.beside = self.cutter.of_rows(self.beside, keep)
        return hidden[keep] if isinstance(output, Tensor) else (hidden[keep], *self.beside)


@torch.no_grad()
def run_blocks(
    anatomy: Anatomy,
    input_ids: Tensor,
    after_block: AfterBlock,
    capture: Sequence[str] = (),
    prefix: Continued | None = None,
) -> None:
    """Run the model's own forward over ``input_ids`` until the callback lets no row go on.

    Args:
        anatomy: The model.
        input_ids: [B, S], right-padded; no mask is needed because attention is causal.
        after_block: Called after each block with its :class:`BlockState`; returns the indices (into the rows of
            ``state.hidden``) that go on, empty to stop, or None for all. After block L it must return an empty one.
        capture: Which parts' outputs to keep for ``state.parts``: of ``"attn"``, ``"mlp"``.
        prefix: What the rows continue; ``input_ids`` are what follows.
    """
    run = _Run(anatomy, input_ids.shape[0], after_block, prefix)
    given = {"use_cache": False} if prefix is None else prefix.arguments(input_ids)
    try:
        with hooked(anatomy, run, capture), explicit_masks(prefix is not None):
            anatomy.model(input_ids=input_ids, **given)
    except AllRowsLeft:
        return
    raise RuntimeError("after_block let rows go on after the last block")


def first_not_finite(anatomy: Anatomy, tokens: Sequence[int]) -> int | None:
    """The first block whose output for a row of token ids holds NaN or infinity: 0 the embeddings, None no block."""
    found: int | None = None

    def look(state: BlockState) -> Tensor | None:
        nonlocal found
        for number, hidden in ((state.block - 1, state.before), (state.block, state.hidden)):
            if found is None and not bool(torch.isfinite(hidden).all()):
                found = number
        ends = found is not None or state.block == anatomy.n_blocks
        return torch.empty(0, dtype=torch.long) if ends else None

    run_blocks(anatomy, torch.tensor([list(tokens)], device=anatomy.input_device), look)
    return found


@torch.no_grad()
def verify(anatomy: Anatomy) -> None:
    """Check on a small batch that rows leaving at different blocks get, and leave others with, the right states.

    Raises:
        UnsupportedModelError: Where they don't: then no number of an early exit could be trusted.
    """
    n, batch = anatomy.n_blocks, 3
    ids = anatomy.probe_ids(batch)
    dense: list[Tensor] = []

    def record(state: BlockState) -> Tensor | None:
        dense.append(state.hidden[:, -1].detach().clone())
        return torch.empty(0, dtype=torch.long) if state.block == n else None

    run_blocks(anatomy, ids, record)

    exits = [n, 1, max(1, n // 2)]  # the first to leave is not the last row, so order matters
    rows = list(range(batch))
    worst = 0.0

    def scripted(state: BlockState) -> Tensor | None:
        nonlocal rows, worst
        reference = dense[state.block - 1][rows]
        error = (state.hidden[:, -1] - reference).abs().max().item()
        worst = max(worst, error / tolerance(reference)) if error == error else float("inf")
        keep = [i for i, row in enumerate(rows) if exits[row] > state.block]
        rows = [rows[i] for i in keep]
        return torch.tensor(keep, dtype=torch.long)

    run_blocks(anatomy, ids, scripted)
    if worst > 1:
        raise UnsupportedModelError(
            f"pretrained: {anatomy.name} is not supported for early exit: rows of a batch change when others leave it"
        )
