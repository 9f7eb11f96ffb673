"""Planning: which documents make a batch, what its rows continue, and which batches are run side by side."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

from lm_eval_adainfer.prefill.common import Load, contexts, groups
from lm_eval_adainfer.prefill.documents import Document, Row
from lm_eval_adainfer.prefill.prefixes import Prefix
from lm_eval_adainfer.structure.anatomy import Anatomy
from lm_eval_adainfer.structure.arguments import BatchRule

TOGETHER_ROWS = 64  # of batches that go through the blocks together: a check costs little more than one of few rows
TOGETHER_TOKENS = 2**14  # of these batches, which bounds the memory that their hidden states take

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
        asked: Blocks after which prefixes keep their hidden states (``prefixes.Prefix``).
        prefix: What all the documents begin with; None where this is nothing.
    """

    anatomy: Anatomy
    rule: BatchRule
    budget: int
    asked: Collection[int] = ()
    prefix: Prefix | None = None

    @property
    def skip(self) -> int:
        """Tokens of what the documents begin with."""
        return 0 if self.prefix is None else self.prefix.lengths[0]


def plan(
    anatomy: Anatomy,
    documents: Sequence[Document],
    size: int | SizeAt,
    rule: Callable[[], BatchRule | None],
    budget: int,
    asked: Collection[int] = (),
) -> Iterator[list[Batch]]:
    """Plan how documents are run: whole documents, longest first, as many to a batch as fit the batch size.

    Args:
        anatomy: The model.
        documents: All of them.
        size: The batch size in rows, or what says it at every row.
        rule: Asked only where something could be run once: how the blocks' arguments follow the batch then; None
            where the model does not allow it.
        budget: Tokens of a prefix that may be run once and kept for the documents that share it; 0 shares nothing.
        asked: Blocks after which prefixes keep their hidden states.

    Yields:
        Batches that go through the blocks together.
    """
    found, shared = _groups_of(anatomy, documents, 1 if callable(size) else size, rule, budget)
    parts = [(sorted(some, key=_longest_first), prefix) for some, prefix in found]
    sizes = _Sizes(size, [row for some, _ in parts for d in some for row in d.rows])
    for ordered, tokens in parts:
        if shared is not None:
            prefix = Prefix(anatomy, [tokens], shared.rule, asked=asked) if tokens else None
            shared = Shared(anatomy, shared.rule, budget, asked, prefix)
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
            prefix = Prefix(shared.anatomy, own, shared.rule, prefix, not is_whole, shared.asked)
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
