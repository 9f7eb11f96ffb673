"""Planning: which documents make a batch, what their rows have in common, and which batches are run side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

from lm_eval_adainfer.prefill.documents import Document, Row
from lm_eval_adainfer.prefill.prefixes import Prefix
from lm_eval_adainfer.structure.anatomy import Anatomy
from lm_eval_adainfer.structure.arguments import BatchRule

TOGETHER_ROWS = 64  # of batches that go through the blocks together: a check costs little more than one of few rows
TOGETHER_TOKENS = 2**14  # of these batches, which bounds the memory that their hidden states take
_LEAST = 16  # tokens; less is not worth a call of its own

SizeAt = Callable[[int, Sequence[Row]], int]  # the batch size at a position among all rows, in the order they are run


@dataclass(frozen=True, eq=False)
class Batch:
    """Whole documents that go through the blocks as one batch, and what their rows continue.

    Attributes:
        documents: The documents, with their rows in order.
        size: The batch size, in rows.
        prefix: Tokens that are run once, which every row continues; None where all prompts are run whole.
        owner: Per row, which of the prefix's rows it continues.
        rows_at_once: Where this is one document that is larger than a batch: how many of its rows are run together.
            None where all are.
        rows: How many rows there are.
        tokens: Tokens that go through a block, padding included.
    """

    documents: Sequence[Document]
    size: int
    prefix: Prefix | None
    owner: Sequence[int]
    rows_at_once: int | None
    rows: int
    tokens: int


@dataclass(frozen=True)
class Shared:
    """What the rows of a batch can have in common.

    Attributes:
        anatomy: The model.
        rule: How the blocks' arguments follow the batch where rows continue a prefix.
        budget: Tokens of which keys and values may stay from batch to batch.
        prefix: What all the documents begin with; None where this is nothing.
    """

    anatomy: Anatomy
    rule: BatchRule
    budget: int
    prefix: Prefix | None = None

    @property
    def skip(self) -> int:
        """Tokens of what the documents begin with."""
        return 0 if self.prefix is None else self.prefix.lengths[0]


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


def plan(
    anatomy: Anatomy,
    documents: Sequence[Document],
    size: int | SizeAt,
    rule: Callable[[], BatchRule | None],
    budget: int,
) -> Iterator[list[Batch]]:
    """Plan how documents are run: whole documents, longest first, as many to a batch as fit the batch size.

    Args:
        anatomy: The model.
        documents: All of them.
        size: The batch size in rows, or what says it at every row.
        rule: Asked only where something could be run once: how the blocks' arguments follow the batch then; None
            where the model does not allow it.
        budget: Tokens of a prefix that may be run once and kept for the documents that share it; 0 shares nothing.

    Yields:
        Batches that go through the blocks together.
    """
    found, shared = _groups_of(anatomy, documents, 1 if callable(size) else size, rule, budget)
    parts = [(sorted(some, key=_longest_first), prefix) for some, prefix in found]
    sizes = _Sizes(size, [row for some, _ in parts for d in some for row in d.rows])
    for ordered, tokens in parts:
        if shared is not None:
            prefix = Prefix(anatomy, [tokens], shared.rule) if tokens else None
            shared = Shared(anatomy, shared.rule, budget, prefix)
        yield from together(_cut(ordered, sizes, shared))


def make_batch(
    documents: Sequence[Document], size: int, shared: Shared | None = None, load: Load | None = None
) -> Batch:
    """Make a batch of documents, and find what its rows have in common.

    Args:
        documents: Those of one batch; a document that does not fit it comes alone.
        size: The batch size, in rows.
        shared: What its rows can have in common; None to run every prompt whole.
        load: What the documents come to, where this is known.
    """
    if load is None:
        load = _load(documents, shared)
    longest, prefix = max(d.longest for d in documents), None if shared is None else shared.prefix
    is_whole = load.fits(size, longest, prefix is not None)
    rows_at_once, owner = None if is_whole else size, [0] * load.rows
    if shared is not None and load.shares:
        # the contexts of a document that comes in pieces stay for all of them
        fits = load.contexts <= size and load.contexts * load.longest_context <= shared.budget
        if is_whole or fits:
            own, owner = contexts(documents, shared.skip)
            prefix = Prefix(shared.anatomy, own, shared.rule, prefix, stays=not is_whole)
            rows_at_once = None if is_whole else max(1, size * longest // load.longest_rest)
    return Batch(documents, size, prefix, owner, rows_at_once, load.rows, load.tokens(longest))


def together(batches: Iterable[Batch]) -> Iterator[list[Batch]]:
    """Put neighbouring batches together, as far as this pays.

    A check reads the whole output head, whether for one row or for many; batches that go through the blocks side by
    side read it once. So it pays until a check has enough rows, and only where its cost can be seen at all.
    """
    found: list[Batch] = []
    rows = tokens = 0
    for batch in batches:
        is_whole = batch.rows_at_once is None
        is_full = rows + batch.rows > TOGETHER_ROWS or tokens + batch.tokens > TOGETHER_TOKENS
        if found and (not is_whole or is_full):
            yield found
            found, rows, tokens = [], 0, 0
        if not is_whole:
            yield [batch]
            continue
        found, rows, tokens = [*found, batch], rows + batch.rows, tokens + batch.tokens
    if found:
        yield found


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
    keys = {d: _common([row.tokens[: row.decision] for row in d.rows]) for d in documents}
    found: list[tuple[list[Document], list[int]]] = []
    for document in sorted(documents, key=keys.__getitem__):
        key = keys[document][:most]
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


def _groups_of(
    anatomy: Anatomy, documents: Sequence[Document], size: int, rule: Callable[[], BatchRule | None], budget: int
) -> tuple[list[tuple[list[Document], list[int]]], Shared | None]:
    """Documents by the prefix that they share, where that pays and the model allows it; else all of them together."""
    alone: list[tuple[list[Document], list[int]]] = [(list(documents), [])]
    if not budget or not documents:
        return alone, None
    limit = anatomy.fixed_positions
    if limit is not None and max(d.longest for d in documents) > limit:
        return alone, None
    found = groups(documents, size, budget)
    if not any(prefix for _, prefix in found) and not any(Load.of(d, 0).shares for d in documents):
        return alone, None
    allowed = rule()
    return (alone, None) if allowed is None else (found, Shared(anatomy, allowed, budget))


def _longest_first(document: Document) -> tuple[int, list[int]]:
    return -document.longest, max(row.tokens for row in document.rows)


class _Sizes:
    """The batch size at the row that is next.

    Args:
        size: It, or what says it at every row.
        rows: All rows, in the order in which they are run.
    """

    def __init__(self, size: int | SizeAt, rows: Sequence[Row]):
        self.size, self.rows, self.next = size, rows, 0

    def now(self) -> int:
        """The batch size of the batch that begins with the next row."""
        return self.size(self.next, self.rows) if callable(self.size) else self.size

    def passed(self, count: int) -> None:
        """Go on behind so many rows; stock asks at every row, so that it skips no section."""
        if callable(self.size):
            for row in range(self.next + 1, self.next + count):
                self.size(row, self.rows)
        self.next += count


def _cut(ordered: Sequence[Document], sizes: _Sizes, shared: Shared | None) -> Iterator[Batch]:
    """Cut documents, longest first, into batches."""
    start, prefixed = 0, shared is not None and shared.prefix is not None
    while start < len(ordered):
        size, longest = sizes.now(), ordered[start].longest
        load, end = _load(ordered[start : start + 1], shared), start + 1
        while end < len(ordered):
            more = load.and_also(_load(ordered[end : end + 1], shared))
            if not more.fits(size, longest, prefixed):
                break
            load, end = more, end + 1
        sizes.passed(load.rows)
        yield make_batch(ordered[start:end], size, shared, load)
        start = end


def _load(documents: Sequence[Document], shared: Shared | None) -> Load:
    """What these come to when they are run together: their rows alone, where nothing can be run once."""
    if shared is None:
        return Load(sum(len(d.rows) for d in documents))
    return reduce(Load.and_also, (Load.of(d, shared.skip) for d in documents))


def _common(lists: Sequence[list[int]]) -> list[int]:
    """The longest common beginning (of the least and the greatest, as everything lies in between)."""
    low, high = min(lists), max(lists)
    end = next((n for n, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
    return list(low[:end])
