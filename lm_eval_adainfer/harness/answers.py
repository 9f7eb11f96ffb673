"""Answers that carry their exit trace: they are what lm-eval expects, plus a ``trace``.

lm-eval passes responses through filters, SQLite caches and process boundaries untouched, so the trace of a document
travels with them to the place where metrics are made (``reporting``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ExitTrace:
    """How deep one document went (``docs/numbers.md``, "Per document").

    Attributes:
        exit_layer: The decided block, 1 to L; where every token decides, the mean over its tokens.
        n_blocks: L.
        flops_ratio: The paper's Eq. 2.
        layers_run: Mean blocks executed per token position.
        flops: Counted floating-point operations.
        flops_dense: The same count with stopper ``none``.
        fingerprint: Of the model and the stopper that made it.
        features: Where ``log_features=True``: one dict per distinct context, ``layer`` and the features' values
            after every block up to the exit.
        layers: Of generated text, every new token's exit block.
    """

    exit_layer: float
    n_blocks: int
    flops_ratio: float
    layers_run: float
    flops: float
    flops_dense: float
    fingerprint: str
    features: tuple[dict[str, list[float]], ...] | None = None
    layers: tuple[int, ...] | None = None

    @property
    def pruning_ratio(self) -> float:
        """1 - exit_layer / L."""
        return 1.0 - self.exit_layer / self.n_blocks

    @property
    def flops_ratio_total(self) -> float:
        """Counted over dense."""
        return self.flops / self.flops_dense


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
