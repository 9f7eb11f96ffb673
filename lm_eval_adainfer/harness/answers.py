"""Answers that carry their exit trace: they are what lm-eval expects, plus a ``trace``.

lm-eval passes responses through filters, SQLite caches and process boundaries untouched, so the trace of a document
travels with them to the place where metrics are made (``reporting``).
"""

from __future__ import annotations

from typing import Any

from lm_eval_adainfer.records import ExitTrace


class LogLikelihood(tuple):
    """``(log-probability, is_greedy)`` of a continuation.

    Attributes:
        trace: The document's exit trace.
        top1: Whether the full vocabulary's top token is the continuation's first token.
    """

    trace: ExitTrace
    top1: bool

    def __new__(cls, logprob: float, is_greedy: bool, trace: ExitTrace, top1: bool) -> LogLikelihood:
        """Pair the answer with its trace."""
        self = super().__new__(cls, (logprob, is_greedy))
        self.trace, self.top1 = trace, top1
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self[0], self[1], self.trace, self.top1)


class Rolling(float):
    """Log-probability of a whole text."""

    trace: ExitTrace

    def __new__(cls, logprob: float, trace: ExitTrace) -> Rolling:
        """Pair the number with its trace."""
        self = super().__new__(cls, logprob)
        self.trace = trace
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (float(self), self.trace)


class Text(str):
    """Generated text. ``Text(x)`` works for any x, as ``str`` does (lm-eval calls ``type(result)(gold)``)."""

    trace: ExitTrace | None

    def __new__(cls, value: Any = "", trace: ExitTrace | None = None) -> Text:
        """As ``str(value)``, with a trace."""
        self = super().__new__(cls, value)
        self.trace = trace
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.trace)
