"""The early-exit prefill: the model's own blocks, called one by one, that rows can leave.

The model's own forward makes what its blocks are given (embeddings, masks, position ids, rotary embeddings), with the
blocks bypassed; then the blocks are called one after the other with that. Between two blocks rows can leave: whatever
follows the batch is cut to the rows that go on (batch compaction). Because a batch can be stopped between blocks,
several batches can go through the blocks together. The weights and the code of the model stay as they are.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from lm_eval_adainfer.errors import UnsupportedModelError
from lm_eval_adainfer.structure.anatomy import Anatomy
from lm_eval_adainfer.structure.arguments import BatchRule, hidden_of, walk
from lm_eval_adainfer.structure.calls import AllRowsLeft, bypassed, explicit_masks, part_output
from lm_eval_adainfer.structure.hooks import without_hooks
from lm_eval_adainfer.structure.rounding import hidden_distance, plain_forward, probed
from lm_eval_adainfer.structure.state import BlockState
from lm_eval_adainfer.structure.storing import Stored, Storing

AfterBlock = Callable[[BlockState], "Tensor | None"]


class Continues(Protocol):
    """What a forward asks of the prefix that its rows continue (``prefixes.Continued``)."""

    rule: BatchRule

    def arguments(self, ids: Tensor) -> dict[str, Any]:
        """What the model is given besides the rows' own tokens [n, S]."""

    def require(self, k: int) -> None:
        """Have the prefix's keys and values of block k at hand."""

    def reading(self) -> AbstractContextManager[None]:
        """While a block runs: it reads the prefix's keys and values."""

    def keep(self, rows: Tensor) -> None:
        """Some of the rows ([m], by their place among those in flow) go on."""


class ArgumentCutter:
    """Cuts the batch-sized arguments of a forward's blocks (masks, position ids, ...) to the rows still in flow.

    Args:
        rule: How the arguments follow the batch.
        batch: Rows at the start.
    """

    def __init__(self, rule: BatchRule, batch: int):
        self.rule, self.batch = rule, batch
        self.rows: Tensor | None = None  # indices into the batch of the rows in flow; None while that is all of them
        self._cut: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # (id, factor) -> (whole, cut); whole kept alive

    def keep(self, rows: Tensor) -> None:
        """Some of the rows in flow (by their place among them) go on."""
        self.rows = rows if self.rows is None else self.rows.to(rows.device)[rows]
        self._cut.clear()

    def cut(self, k: int, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Block k's arguments."""
        if self.rows is None:
            return args, kwargs
        new_args, new_kwargs = walk([list(args), kwargs], lambda path, x: self._select(k, path, x))
        return tuple(new_args), new_kwargs

    def _select(self, k: int, path: str, value: Tensor) -> Tensor:
        key = (id(value), self.rule.factors.get((k, path), -1))
        if key not in self._cut:  # blocks share most arguments: cut each once, until rows leave again
            assert self.rows is not None
            self._cut[key] = (value, self.rule.cut(k, path, value, self.rows, self.batch))
        return self._cut[key][1]


class Forward:
    """A batch on its way through the blocks.

    Args:
        anatomy: The model.
        input_ids: [B, S], right-padded; no mask is needed because attention is causal.
        capture: Which parts' outputs to keep for ``state.parts``: of ``"attn"``, ``"mlp"``.
        prefix: What the rows continue; ``input_ids`` are what follows.
        rule: How the blocks' arguments follow the batch; None for what ``anatomy`` or the prefix says.
        given: What the model is given besides; None for what ``anatomy`` or the prefix needs.
        masks: Whether transformers has to build every mask.
    """

    @torch.no_grad()
    def __init__(
        self,
        anatomy: Anatomy,
        input_ids: Tensor,
        capture: Sequence[str] = (),
        prefix: Continues | None = None,
        rule: BatchRule | None = None,
        given: dict[str, Any] | None = None,
        masks: bool = False,
    ):
        self.anatomy, self.capture, self.prefix = anatomy, capture, prefix
        if given is None:
            given = {"use_cache": False} if prefix is None else prefix.arguments(input_ids)
        self._cutter = ArgumentCutter(rule or (anatomy.batch_rule if prefix is None else prefix.rule), len(input_ids))
        self._arguments: list[tuple[tuple, dict]] = []
        self._parts_before: dict[str, Tensor] = {}
        self._beside: Any = ()  # what the last block returned besides hidden states
        self.block = 0
        try:
            with (
                without_hooks(anatomy.blocks),
                bypassed(anatomy, anatomy.blocks, self._note),
                explicit_masks(masks or prefix is not None),
            ):
                anatomy.model(input_ids=input_ids, **given)
        except AllRowsLeft:
            return
        raise RuntimeError("the model's forward did not call all of its blocks")

    def _note(self, args: tuple, kwargs: dict) -> None:
        """Keep what a block is given besides the hidden states; behind the last block nothing is needed."""
        if not self._arguments:
            self.hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        self._arguments.append(((None, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": None}))
        if len(self._arguments) == self.anatomy.n_blocks:
            raise AllRowsLeft

    def go_on_from(self, block: int, hidden: Tensor) -> None:
        """Go on from states [n, S, h] after a block, as if the rows had come so far."""
        self.block, self.hidden = block, hidden

    def _given(self, k: int, hidden: Tensor, beside: Sequence[tuple[int | str, Any]] = ()) -> tuple[list, dict]:
        """What block k is given."""
        cut_args, cut_kwargs = self._cutter.cut(k, *self._arguments[k - 1])
        args, kwargs = list(cut_args), dict(cut_kwargs)
        for at, value in ((0 if args else "hidden_states", hidden), *beside):
            place: Any = args if isinstance(at, int) else kwargs
            place[at] = value
        return args, kwargs

    @torch.no_grad()
    def store(self, k: int, hidden: Tensor, storing: Storing) -> None:
        """Let block k store its keys and values of states [n, S, h] in the forward's cache, and compute nothing else.

        The cache has to raise ``Stored`` once it has them.
        """
        args, kwargs = self._given(k, hidden)
        with storing.without_idle(k):
            try:
                self.anatomy.blocks[k - 1](*args, **kwargs)
            except Stored:
                return
        raise RuntimeError("a block ran on after its keys and values were stored")

    @torch.no_grad()
    def advance(self) -> BlockState:
        """Run the next block for the rows in flow."""
        self.block += 1
        k, before, parts = self.block, self.hidden, {}
        if self.prefix is not None:
            self.prefix.require(k)
        args, kwargs = self._given(k, before, [(at, self._beside[n]) for at, n in self.anatomy.handed_on[k - 1]])
        block, handles = self.anatomy.blocks[k - 1], []
        try:
            for which in self.capture:
                handles.append(
                    self.anatomy.part(block, which).register_forward_hook(
                        lambda m, a, output, which=which: parts.update({which: part_output(output, before)})
                    )
                )
            with nullcontext() if self.prefix is None else self.prefix.reading():
                output = block(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        self.hidden, self._beside = hidden_of(output), () if isinstance(output, Tensor) else output[1:]
        state = BlockState(k, self.hidden, before, parts, self._parts_before)
        self._parts_before = parts
        return state

    def _of_rows(self, value: Any, rows: Tensor) -> Any:
        """What blocks made for the rows in flow, for some of them (a loss or a count is for none of them)."""
        n = len(self.hidden)
        return walk(value, lambda _, x: x.index_select(0, rows.to(x.device)) if x.shape[:1] == (n,) else x)

    def keep(self, rows: Tensor) -> None:
        """Some of the rows in flow ([m], by their place among them) go on."""
        if self.prefix is not None and len(rows) < len(self.hidden):
            self.prefix.keep(rows)
        rows = rows.to(self.hidden.device)
        self._cutter.keep(rows)
        self._beside = self._of_rows(self._beside, rows)
        given = (x for args, kwargs in self._arguments for x in (*args, *kwargs.values()))
        for shared in {id(x): x for x in given}.values():
            if isinstance(shared, UserDict):  # keys and values that later blocks read (Gemma 4)
                shared.update({key: self._of_rows(value, rows) for key, value in shared.items()})
        self.hidden = self.hidden[rows]
        self._parts_before = {name: x[rows.to(x.device)] for name, x in self._parts_before.items()}


def padded(anatomy: Anatomy, rows: Sequence[Sequence[int]]) -> Tensor:
    """[B, S] token ids of rows, right-padded with 0 (causal attention never looks there)."""
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.long)
    return ids.to(anatomy.input_device)


@torch.no_grad()
def run_blocks(
    anatomy: Anatomy,
    input_ids: Tensor,
    after_block: AfterBlock,
    capture: Sequence[str] = (),
    prefix: Continues | None = None,
) -> None:
    """Run one batch through the blocks until the callback lets no row go on.

    Args:
        anatomy: The model.
        input_ids: As :class:`Forward`'s, and so are ``capture`` and ``prefix``.
        after_block: Called after each block with its :class:`BlockState`; returns the indices (into the rows of
            ``state.hidden``) that go on, empty to stop, or None for all. After block L it must return an empty one.
        capture: Which parts' outputs to keep.
        prefix: What the rows continue.
    """
    forward = Forward(anatomy, input_ids, capture, prefix)
    for _ in anatomy.blocks:
        keep = after_block(forward.advance())
        if keep is not None:
            if keep.numel() == 0:
                return
            forward.keep(keep)
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

    The right ones are those of the model's own forward, whose blocks call each other's successors.

    Raises:
        UnsupportedModelError: Where they don't: then no number of an early exit could be trusted.
    """
    difference = probed(anatomy, "hidden", lambda: _off_by(anatomy))
    if not difference.is_rounding:
        raise UnsupportedModelError(
            f"pretrained: {anatomy.name} is not supported for early exit: rows of a batch change when others leave it, "
            f"or a block reads more of earlier blocks than their hidden states (these are {difference})"
        )


def _off_by(anatomy: Anatomy) -> float:
    """The largest distance of the hidden states of three rows that leave at different blocks from the model's own."""
    n, batch = anatomy.n_blocks, 3
    ids = anatomy.probe_ids(batch)
    dense, _ = plain_forward(anatomy, ids)
    exits = [n, 1, max(1, n // 2)]  # the first to leave is not the last row, so order matters
    rows = list(range(batch))
    worst = 0.0

    def scripted(state: BlockState) -> Tensor | None:
        nonlocal rows, worst
        reference = dense[state.block - 1][rows, -1]
        worst = max(worst, hidden_distance(state.hidden[:, -1], reference))
        keep = [i for i, row in enumerate(rows) if exits[row] > state.block]
        rows = [rows[i] for i in keep]
        return torch.tensor(keep, dtype=torch.long)

    run_blocks(anatomy, ids, scripted)
    return worst
