"""What token rows have in common: the beginnings that documents share, the contexts of rows, and what both save."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lm_eval_adainfer.prefill.documents import Document

_LEAST = 16  # tokens; less is not worth a call of its own


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


def _common(lists: Sequence[list[int]]) -> list[int]:
    """The longest common beginning (of the least and the greatest, as everything lies in between)."""
    low, high = min(lists), max(lists)
    end = next((n for n, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
    return list(low[:end])
