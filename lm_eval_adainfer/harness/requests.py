"""From tokenised requests to documents, and what no request may hold: each refusal is one sentence."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.prefill.documents import Answer, Document, Row

_logger = logging.getLogger(__name__)

# the texts of a context and a continuation where they are known, and the tokens of both
TokenRequest = tuple["tuple[str, str] | None", list[int], list[int]]


def require_unicode(text: str) -> None:
    """Refuse half a surrogate pair, which no tokenizer takes.

    Raises:
        AdaInferError: On one.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        near = text[max(0, error.start - 20) : error.end + 20]
        raise AdaInferError(
            f"request: the text {near!r} holds half a surrogate pair, which is no Unicode; repair the document"
        ) from None


def require_known(ids: Sequence[int], known: int) -> None:
    """Refuse tokens that the model has no embedding for.

    Args:
        ids: Tokens.
        known: How many tokens have an embedding.

    Raises:
        AdaInferError: On a token that has none.
    """
    if ids and max(ids) >= known:
        raise AdaInferError(
            f"tokenizer: it gives token {max(ids)}, but the model has embeddings for {known} tokens; give the "
            "tokenizer that belongs to the model"
        )


def nothing_to_score(continuation: str) -> AdaInferError:
    """The refusal of a continuation without tokens."""
    return AdaInferError(
        f"request: the continuation {continuation!r} has no token of its own; give one of at least one token"
    )


def documents_of(
    requests: Sequence[TokenRequest], keys: Sequence[Any], max_length: int, shares_rows: bool
) -> list[Document]:
    """Group tokenised requests into documents, one row per distinct (context, continuation[:-1]).

    Args:
        requests: ((context, continuation) or None, context tokens, continuation tokens).
        keys: Per request, what it has in common with the other requests of its document.
        max_length: The model's window: a row is cut to it from the left.
        shares_rows: Whether requests whose rows are equal share one.

    Raises:
        AdaInferError: On a context or continuation without tokens, and on a continuation longer than the window.
    """
    grouped: dict[Any, dict[Any, Row]] = {}
    contexts: dict[Any, dict[tuple[int, ...], Any]] = {}  # document -> context -> key of the row that decides
    for n, ((strings, context, continuation), key) in enumerate(zip(requests, keys, strict=True)):
        if not continuation:
            raise nothing_to_score(strings[1] if strings else "")
        if not context:
            raise AdaInferError(
                f"request: the context {strings[0] if strings else ''!r} has no token; give one of at least one "
                "token, or an empty text"
            )
        if len(continuation) > max_length:
            raise AdaInferError(
                f"max_length: a continuation of {len(continuation)} tokens does not fit the window of "
                f"{max_length}; give a larger max_length or a shorter continuation"
            )
        before = tuple(context)
        row_key = (before, tuple(continuation[:-1]), None if shares_rows else n)
        rows = grouped.setdefault(key, {})
        if row_key not in rows:
            rows[row_key] = Row(_window(context, continuation, max_length), len(continuation))
        rows[row_key].answers.append(Answer(n, continuation))
        if strings is None or strings[0] != "":  # an empty context has no decision
            known = contexts.setdefault(key, {})
            known.setdefault(before, row_key)
            rows[row_key].context = list(known).index(before)
    documents = []
    for key, rows in grouped.items():
        order = list(rows)
        deciders = [order.index(row_key) for row_key in contexts.get(key, {}).values()]
        documents.append(Document(list(rows.values()), deciders))
    return documents


def _window(context: list[int], continuation: list[int], max_length: int) -> list[int]:
    """The input tokens: context + continuation[:-1], cut from the left to the model's window."""
    over = len(context) + len(continuation) - max_length - 1
    if over > 0:
        _logger.warning(
            f"Combined length of context ({len(context)}) and continuation ({len(continuation)}) exceeds model's "
            f"maximum length ({max_length}). Truncating {over} tokens from the left."
        )
    return (context + continuation)[-(max_length + 1) :][:-1]
