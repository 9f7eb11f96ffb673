"""Documents as token rows: which rows decide, what is scored, and what their run has come to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass
class Answer:
    """One request's result, filled position by position: log-probability, greedy match, top token at the first.

    ``top`` is the full vocabulary's top token at the first position, ``top1`` whether that is the continuation's.
    """

    request: int
    continuation: list[int]
    logprob: float = 0.0
    is_greedy: bool = True
    top1: bool = False
    top: int = -1


@dataclass(eq=False)
class Row:
    """One token row; it answers every request of its document with this context and this continuation[:-1].

    A row is an identity: two rows are never equal, whatever their tokens are.

    Attributes:
        tokens: The input: context + continuation[:-1], left-truncated to the model's window.
        scored: How many positions at the end are scored (the continuation's length).
        context: Which of the document's distinct contexts it has (index into the deciders); -1 for an empty one.
        answers: The requests it answers; their continuations have ``scored`` tokens.
        choices: Where it decides, the token ids of its context's choices, by request, if these are two or more and a
            token each, which differ; else empty. Its document fills it in; None before that.
    """

    tokens: list[int]
    scored: int
    context: int = -1
    answers: list[Answer] = field(default_factory=list)
    choices: tuple[int, ...] | None = None

    @property
    def decision(self) -> int:
        """The position of the last context token."""
        return len(self.tokens) - self.scored


@dataclass(eq=False)
class Document:
    """The rows of one document, and what its run has come to; an identity, as a row is.

    Attributes:
        rows: Its token rows.
        deciders: Indices of the rows that decide: one per distinct context. Empty: it has no decision and, unless
            the strategy needs none, runs dense.
        exit_layer: The block it leaves after; None until decided.
        head_rows: Head rows computed for it (checks and scores).
        choice_rows: Rows of the output head that were read for choices alone: C per such decision, of h numbers each.
        decisions: Times the stopper was asked for it.
        reads: (block, tokens of the prompt, positions read) of every time that a row was read after a block.
        decided_by: (depth, tokens) of every row of the passes that decided it before it was scored.
        logged: With ``log_features``: per decider, ``layer`` and feature values.
    """

    rows: list[Row]
    deciders: list[int]
    exit_layer: int | None = None
    head_rows: int = 0
    choice_rows: int = 0
    decisions: int = 0
    reads: list[tuple[int, int, int]] = field(default_factory=list)
    decided_by: list[tuple[int, int]] = field(default_factory=list)
    logged: list[dict[str, list[float]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for row in (self.rows[i] for i in self.deciders):
            if row.choices is None:  # a piece of a document has not all of its answers, but its rows know already
                row.choices = _choices(a for other in self.rows if other.context == row.context for a in other.answers)

    def choices(self, decider: int) -> tuple[int, ...]:
        """The token ids of the choices at a decider (an index into ``deciders``); empty where it has none."""
        return self.rows[self.deciders[decider]].choices or ()

    @property
    def has_choices(self) -> bool:
        """Whether each of its decisions has choices of one token each."""
        return all(self.choices(j) for j in range(len(self.deciders)))

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(len(row.tokens) for row in self.rows)

    def decides(self, row: Row) -> bool:
        """Whether this row decides for its context."""
        return row.context >= 0 and self.rows[self.deciders[row.context]] is row


def _choices(answers: Iterable[Answer]) -> tuple[int, ...]:
    """What ``Row.choices`` holds, of all answers to one context."""
    ordered = sorted(answers, key=lambda answer: answer.request)
    tokens = tuple(answer.continuation[0] for answer in ordered if len(answer.continuation) == 1)
    return tokens if 2 <= len(tokens) == len(ordered) == len(set(tokens)) else ()
