"""The automatic batch size of a model: what was found for rows of one length is kept, and told where it follows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval_adainfer.prefill.documents import Row


class BatchSizes:
    """Largest batch sizes by the length of rows; longer rows never get larger batches."""

    def __init__(self) -> None:
        self._found: dict[int, int] = {}

    def keep(self, length: int, size: int) -> None:
        """Keep what was found for rows of so many tokens."""
        self._found[length] = size

    def of(self, length: int, most: int) -> int | None:
        """The size for rows of so many tokens, where those found leave but one.

        Args:
            length: Tokens.
            most: The largest size that is ever tried.
        """
        at_most = min((size for n, size in self._found.items() if n <= length), default=most)
        at_least = max((size for n, size in self._found.items() if n >= length), default=1)
        return at_most if at_most <= at_least else None


class Shapes(Sequence[Any]):
    """Token rows as HFLM's search for a batch size reads them: (arguments, context, continuation)."""

    def __init__(self, rows: Sequence[Row]):
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, n: Any) -> tuple[None, list[int], list[int]]:
        row = self._rows[n]
        return None, row.tokens[: row.decision + 1], [0] * row.scored
