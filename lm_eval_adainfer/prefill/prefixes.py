"""Tokens that rows have in common (few-shot examples, a system prompt, the context of several choices): run once.

A *prefix* is a few token rows that other rows continue, possibly itself a continuation of another prefix. It is run
block by block, no deeper than the rows that continue it, and these read its keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from lm_eval_adainfer.generation.cache import NoPlainCacheError, watch_windows
from lm_eval_adainfer.prefill.attention import Apart, in_front
from lm_eval_adainfer.prefill.forward import BlockState, Forward, run_blocks
from lm_eval_adainfer.structure.anatomy import Anatomy, BatchRule
from lm_eval_adainfer.structure.rounding import hidden_distance, probed

if TYPE_CHECKING:
    from lm_eval_adainfer.prefill.engine import Document

_WHOLE = "every prompt is run whole"
_LEAST = 16  # tokens; less is not worth a call of its own


class _ContinuedCache(DynamicCache):
    """Keys and values of rows behind those of the prefix rows that they continue.

    Args:
        source: The prefix; None for rows that continue nothing.
        owner: [rows], the prefix row that each continues; None where it has one row.
        store: Where to put what attention reads, by layer; None to forget it.
    """

    def __init__(
        self,
        source: Prefix | None,
        owner: Tensor | None = None,
        store: dict[int, tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        super().__init__()
        self.source, self.owner, self.store = source, owner, store
        self.slots: Tensor | None = None  # [rows, slots], an order that puts the padding in front; None: as it is
        self.apart: Apart | None = None  # set where the prefix's need not be put in front of every row's

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many tokens the model may take for cached."""
        return 0 if self.source is None else self.source.width

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """The slot of the first query."""
        return self.get_seq_length()

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:  # type: ignore[override]
        """(keys, offset)."""
        return self.get_seq_length() + query_length, 0

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """The prefix's in front of the new ones."""
        found = (key_states, value_states)
        if self.source is not None:
            stored = self.source.stored[layer_idx]
            if self.apart is not None:
                return self.apart.hand_out(stored, found)
            found = tuple(map(self._behind, stored, found))  # type: ignore[assignment]
        if self.store is not None:
            self.store[layer_idx] = found
        return found

    def _behind(self, old: Tensor, new: Tensor) -> Tensor:
        if old.shape[0] > 1:
            assert self.owner is not None
            old = old.index_select(0, self.owner.to(old.device))
        whole = in_front(old, new)
        if self.slots is None:
            return whole
        index = self.slots.to(whole.device)[:, None, :, None].expand(-1, whole.shape[1], -1, whole.shape[-1])
        return whole.gather(2, index)


class Prefix:
    """Token rows that others continue, run no deeper than these need.

    Args:
        anatomy: The model.
        rows: P lists of token ids; where ``parent`` is given, what follows it.
        rule: How the blocks' arguments follow the batch where a cache is used (``slots.Windows.rows``).
        parent: A prefix of one row that all of these continue.
        stays: Keep every block's keys and values, for later batches; else the current block's alone.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        rows: Sequence[Sequence[int]],
        rule: BatchRule,
        parent: Prefix | None = None,
        stays: bool = True,
    ):
        self.anatomy, self.rows, self.rule, self.parent, self.stays = anatomy, rows, rule, parent, stays
        self.shared: int = 0 if parent is None else parent.lengths[0]  # tokens that the parent has of every row
        self.longest = max(map(len, rows))
        self.width = self.shared + self.longest
        self.lengths: list[int] = [self.shared + len(row) for row in rows]  # of whole rows, in tokens
        self.depth = 0
        self.executed = 0  # block executions x tokens
        self.stored: dict[int, tuple[Tensor, Tensor]] = {}
        self._forward: Forward | None = None
        self._kept = list(range(len(rows)))  # of those that stay no longer than the batch: the rows still needed

    @property
    def ragged(self) -> bool:
        """Whether rows differ in length, so that shorter ones have padding in front."""
        return min(self.lengths) < self.width

    def mask(self, width: int) -> Tensor:
        """[P, width], 0 at the padding in front of the rows still needed, 1 elsewhere."""
        pads = torch.tensor([self.width - self.lengths[r] for r in self._kept])
        return (torch.arange(width)[None] >= pads[:, None]).long()

    def require(self, k: int) -> None:
        """Run the blocks up to k that were not run yet."""
        while self.depth < k:
            if self.parent is not None:
                self.parent.require(self.depth + 1)
            if self._forward is None:
                self._forward = self._begun()
            if not self.stays:
                self.stored.clear()
            self.depth += 1
            self._forward.advance()
            self.executed += sum(len(self.rows[r]) for r in self._kept)
            if self.depth == self.anatomy.n_blocks:
                self._forward = None

    def keep(self, rows: list[int]) -> None:
        """Forget all but some (by their place among those left) of the rows; only where nothing stays."""
        index = torch.tensor(rows, dtype=torch.long)
        self._kept = [self._kept[r] for r in rows]
        for layer, pair in self.stored.items():
            self.stored[layer] = (pair[0][index.to(pair[0].device)], pair[1][index.to(pair[1].device)])
        if self._forward is not None:
            self._forward.keep(index)
        if self._cache.slots is not None:
            self._cache.slots = self._cache.slots[index]

    def _begun(self) -> Forward:
        """These rows before the first block."""
        anatomy, ids = self.anatomy, torch.zeros(len(self.rows), self.longest, dtype=torch.long)
        for r, row in enumerate(self.rows):
            ids[r, self.longest - len(row) :] = torch.tensor(row, dtype=torch.long)
        self._cache = _ContinuedCache(self.parent, store=self.stored)
        given: dict[str, Any] = {"past_key_values": self._cache, "use_cache": True}
        if self.ragged:
            given["attention_mask"] = self.mask(self.width).to(anatomy.input_device)
        pads = torch.tensor([self.width - n for n in self.lengths])[:, None]
        positions = torch.arange(self.shared, self.width)[None] - pads
        if self.shared and self.ragged:
            # slots are padding, parent, own tokens; what is there are the parent and the padded tokens
            slot = torch.arange(self.width)[None] - pads
            own = torch.arange(self.width)[None].expand_as(slot)
            self._cache.slots = torch.where(slot < self.shared, slot.clamp(min=0), own)
        if anatomy.takes_position_ids:
            given["position_ids"] = positions.clamp(min=0).to(anatomy.input_device)
        return Forward(anatomy, ids.to(anatomy.input_device), rule=self.rule, given=given, masks=self.shared > 0)


class Continued:
    """Rows of one forward that continue a prefix: what :func:`forward.run_blocks` needs of it.

    Args:
        prefix: The prefix.
        owner: Per row, the prefix row that it continues.
    """

    def __init__(self, prefix: Prefix, owner: Sequence[int]):
        self.prefix, self.rule = prefix, prefix.rule
        self.cache = _ContinuedCache(prefix, torch.tensor(owner, dtype=torch.long))
        if prefix.rule.apart and len(prefix.rows) == 1:
            self.cache.apart = Apart()

    def reading(self) -> AbstractContextManager[None]:
        """While a block runs: it reads the prefix's keys and values."""
        return nullcontext() if self.cache.apart is None else self.cache.apart.used()

    def arguments(self, ids: Tensor) -> dict[str, Any]:
        """What the model is given besides the rows' own tokens [n, S]."""
        prefix, given = self.prefix, {"use_cache": True, "past_key_values": self.cache}
        owner, width = self.cache.owner, ids.shape[1]
        if prefix.ragged:
            given["attention_mask"] = prefix.mask(prefix.width + width)[owner].to(ids.device)
        if prefix.anatomy.takes_position_ids:
            starts = torch.tensor(prefix.lengths)[owner]
            given["position_ids"] = (starts[:, None] + torch.arange(width)).to(ids.device)
        return given

    def keep(self, rows: Tensor) -> None:
        """Some of the rows (by their place among those in flow) go on; what no row needs any more goes too."""
        assert self.cache.owner is not None
        self.cache.owner = self.cache.owner[rows.cpu()]
        if self.prefix.stays:
            return
        used, self.cache.owner = self.cache.owner.unique(return_inverse=True)
        if len(used) < len(self.prefix._kept):
            self.prefix.keep(used.tolist())


class Load(NamedTuple):
    """What documents come to once a prefix of ``skip`` tokens is run.

    Attributes:
        rows: Rows.
        contexts: Distinct contexts; each but its last token can be run once for all rows that have it.
        longest_context: Tokens of the longest of these, without the prefix.
        longest_rest: Most tokens of a row behind its context but for the context's last.
        longest_whole: Most tokens of a row behind the prefix.
        own: Tokens of all rows behind the prefix.
        shares: Whether running contexts once pays for some document.
    """

    rows: int
    contexts: int = 0
    longest_context: int = 0
    longest_rest: int = 0
    longest_whole: int = 0
    own: int = 0
    shares: bool = False

    @classmethod
    def of(cls, document: Document, skip: int) -> Load:
        """One document's."""
        found, rows = contexts([document], skip)[0], document.rows
        tokens = sum(len(row.tokens) - skip for row in rows)
        saved = sum(row.decision - skip for row in rows) - sum(map(len, found))
        return cls(
            len(rows),
            len(found),
            max(map(len, found)),
            max(row.scored for row in rows),
            max(len(row.tokens) for row in rows) - skip,
            tokens,
            saved >= _LEAST and 10 * saved >= tokens,
        )

    def and_also(self, other: Load) -> Load:
        """Both together."""
        return Load(
            self.rows + other.rows,
            self.contexts + other.contexts,
            max(self.longest_context, other.longest_context),
            max(self.longest_rest, other.longest_rest),
            max(self.longest_whole, other.longest_whole),
            self.own + other.own,
            self.shares or other.shares,
        )

    def tokens(self, longest: int) -> int:
        """Tokens that go through a block, padding included; ``longest`` are those of the longest row."""
        if self.shares:
            return self.contexts * self.longest_context + self.rows * self.longest_rest
        return self.rows * (self.longest_whole or longest)

    def fits(self, batch_size: int, longest: int, prefixed: bool) -> bool:
        """Whether it is no more than ``batch_size`` rows of the longest: in rows, or in tokens where some run once.

        Behind a prefix rows differ much in length, so more rows than that only where they have little padding.
        """
        if self.rows <= batch_size:
            return True
        if self.shares:
            return max(self.contexts * self.longest_context, self.rows * self.longest_rest) <= batch_size * longest
        padded = self.rows * self.longest_whole
        return prefixed and padded <= batch_size * longest and padded <= 1.25 * self.own


def contexts(documents: Sequence[Document], skip: int) -> tuple[list[tuple[int, ...]], list[int]]:
    """The distinct contexts of these documents' rows, but for their last tokens, behind ``skip`` tokens.

    Returns:
        The contexts; per row, in order, which of them it has.
    """
    number: dict[tuple[int, ...], int] = {}
    owner = [
        number.setdefault(tuple(row.tokens[skip : row.decision]), len(number)) for d in documents for row in d.rows
    ]
    return list(number), owner


def groups(documents: Sequence[Document], rows: int, most: int) -> list[tuple[list[Document], list[int]]]:
    """Group documents that share a prefix worth running once.

    Args:
        documents: All of them.
        rows: The batch size: smaller groups pay only where the prefix is most of what they have.
        most: Tokens of a prefix at most.

    Returns:
        (documents, prefix) pairs; those that share nothing come together, with an empty prefix.
    """
    keys = {id(d): _common([row.tokens[: row.decision] for row in d.rows]) for d in documents}
    ordered = sorted(documents, key=lambda d: keys[id(d)])
    found: list[tuple[list[Document], list[int]]] = []
    for document in ordered:
        key = keys[id(document)][:most]
        if found:
            members, prefix = found[-1]
            shared = _common([prefix, key])
            # joining shortens everybody's prefix; it pays where what is saved in all does not shrink
            if len(shared) >= _LEAST and len(shared) * len(members) >= len(prefix) * (len(members) - 1):
                found[-1] = ([*members, document], shared)
                continue
        found.append(([document], key))
    alone: list[Document] = []
    kept = []
    for members, prefix in found:
        tokens = sum(len(row.tokens) for d in members for row in d.rows)
        count = sum(len(d.rows) for d in members)
        saved = (count - 1) * len(prefix)
        if len(members) > 1 and (count >= rows or 2 * saved >= tokens) and 10 * saved >= tokens:
            kept.append((members, prefix))
        else:
            alone += members
    return [*kept, (alone, [])] if alone else kept


def _common(lists: Sequence[list[int]]) -> list[int]:
    """The longest common beginning (of the least and the greatest, as everything lies in between)."""
    low, high = min(lists), max(lists)
    end = next((n for n, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
    return list(low[:end])


@dataclass(frozen=True)
class Sharing:
    """Whether rows can continue prefixes, and how.

    Attributes:
        rule: How the blocks' arguments follow the batch then; None where every prompt has to be run whole.
        how: A clause for the run's record.
        missed: What this machine could do and this model does not allow, with the figure that decided; or empty.
    """

    rule: BatchRule | None
    how: str
    missed: str = ""


@torch.no_grad()
def sharing(anatomy: Anatomy) -> Sharing:
    """How rows can continue prefixes: apart from their keys (a CPU alone has that kernel), behind them, or not at all.

    It is seen on a prefix that continues a prefix, and on rows that continue one row: they have to get a plain
    forward's hidden states after every block, also where rows have left.
    """
    try:
        rule = watch_windows(anatomy).rows
    except NoPlainCacheError as error:
        return Sharing(None, _WHOLE, error.why)
    ways = {"what prompts share is attended to together": True, "shared keys are put in front of every row's": False}
    failures = []
    for how, apart in ways.items():
        if apart and anatomy.input_device.type != "cpu":
            continue
        found = replace(rule, apart=apart)
        try:
            difference = probed(anatomy, "hidden", partial(_off_by, anatomy, found))
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            failures.append(f"if {how}, {str(error).splitlines()[0] if str(error) else type(error).__name__}")
            continue
        if difference.is_rounding:
            return Sharing(found, how, "; ".join(failures))
        failures.append(f"if {how}, hidden states are {difference}")
    return Sharing(None, _WHOLE, "; ".join(failures))


def _off_by(anatomy: Anatomy, rule: BatchRule) -> float:
    """How far rows that continue prefixes are from a plain forward's hidden states (``rounding.hidden_distance``)."""
    probe = anatomy.probe_ids(3)
    ids = torch.cat([probe[:1, :3].expand(3, 3), probe[:, 1:]], dim=1)  # 3 shared, 4 of their own
    plain: list[Tensor] = []

    def record(state: BlockState) -> Tensor | None:
        plain.append(state.hidden[:, 5:7].clone())
        return torch.empty(0, dtype=torch.long) if state.block == anatomy.n_blocks else None

    run_blocks(anatomy, ids, record)
    starts = [5, 4, 5]  # tokens that prefixes of several rows have of each
    own = [ids[r, 3 : starts[r]].tolist() for r in (1, 0, 2)]
    first = Prefix(anatomy, [ids[0, :3].tolist()], rule)
    second = Prefix(anatomy, own, rule, first, stays=False)
    return max(
        _continued_off_by(plain, ids, Continued(second, [1, 0, 2]), starts),
        _continued_off_by(plain, ids, Continued(first, [0, 0, 0]), [3, 3, 3]),
    )


def _continued_off_by(plain: Sequence[Tensor], ids: Tensor, continued: Continued, starts: Sequence[int]) -> float:
    """How far 3 rows ([3, 7] ids) that go on behind so many tokens are from the ``plain`` states of their last two.

    Rows leave in between.
    """
    anatomy, n = continued.prefix.anatomy, len(plain)
    rest = torch.zeros(3, 7 - min(starts), dtype=torch.long, device=ids.device)
    for r, start in enumerate(starts):
        rest[r, : 7 - start] = ids[r, start:]
    rows, worst = [0, 1, 2], 0.0

    def compare(state: BlockState) -> Tensor | None:
        nonlocal rows, worst
        found = torch.stack([state.hidden[i, 5 - starts[r] : 7 - starts[r]] for i, r in enumerate(rows)])
        worst = max(worst, hidden_distance(found, plain[state.block - 1][rows]))
        keep = [i for i, row in enumerate(rows) if state.block < (n, 1, max(1, n - 1))[row]]
        rows = [rows[i] for i in keep]
        return torch.tensor(keep, dtype=torch.long)

    run_blocks(anatomy, rest, compare, prefix=continued)
    return worst
