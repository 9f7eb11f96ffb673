"""Answers that carry an exit record: they are what lm-eval expects, plus an ``exit_record``.

lm-eval passes responses through filters, SQLite caches and process boundaries untouched, so the record of a
document travels with them to the place where metrics are made (``metrics``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval_adainfer.records import ExitRecord


class LogLikelihood(tuple):
    """``(log-probability, is_greedy)`` of a continuation.

    Attributes:
        exit_record: How deep the document went.
        top1: Whether the full vocabulary's top token is the continuation's first token.
        top: That top token.
    """

    exit_record: ExitRecord
    top1: bool
    top: int

    def __new__(cls, logprob: float, is_greedy: bool, exit_record: ExitRecord, top1: bool, top: int) -> LogLikelihood:
        """Pair the answer with its record."""
        self = super().__new__(cls, (logprob, is_greedy))
        self.exit_record, self.top1, self.top = exit_record, top1, top
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self[0], self[1], self.exit_record, self.top1, self.top)


class Rolling(float):
    """Log-probability of a whole text."""

    exit_record: ExitRecord

    def __new__(cls, logprob: float, exit_record: ExitRecord) -> Rolling:
        """Pair the number with its record."""
        self = super().__new__(cls, logprob)
        self.exit_record = exit_record
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (float(self), self.exit_record)


class RollingPair(tuple):
    """``(log-probability, False)`` of a whole text, for which 0.5.0.dev1 asks behind an empty context."""

    exit_record: ExitRecord

    def __new__(cls, logprob: float, exit_record: ExitRecord) -> RollingPair:
        """Pair the answer with its record."""
        self = super().__new__(cls, (logprob, False))
        self.exit_record = exit_record
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self[0], self.exit_record)


def rolling(arguments: Sequence[str], logprob: float, exit_record: ExitRecord) -> Rolling | RollingPair:
    """The answer to a request for a text's log-probability: a number to ``(text,)``, a pair to ``("", text)``."""
    return (Rolling if len(arguments) == 1 else RollingPair)(logprob, exit_record)


class Text(str):
    """Generated text. ``Text(x)`` works for any x, as ``str`` does (lm-eval calls ``type(result)(gold)``)."""

    exit_record: ExitRecord | None

    def __new__(cls, value: Any = "", exit_record: ExitRecord | None = None) -> Text:
        """As ``str(value)``, with a record."""
        self = super().__new__(cls, value)
        self.exit_record = exit_record
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.exit_record)
