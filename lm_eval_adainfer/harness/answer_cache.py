"""lm-eval's response cache (``--use_cache``): whose answers it holds, and whole documents at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lm_eval.api.model import CacheHook

from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.harness.answers import Text

_FINGERPRINT_KEY = "adainfer_fingerprint"
_MOST_ROWS = 10_000  # answers in one statement: SQLite binds at most 32,766 values


def require_own(answers: Any, fingerprint: str) -> None:
    """Accept a cache's dictionary (None: there is none), unless it holds answers of another model or stopper.

    lm-eval's keys hash the method and the arguments alone, so a cache says itself whose it is.

    Raises:
        AdaInferError: Where the answers are another's.
    """
    if answers is None:
        return
    found = answers.get(_FINGERPRINT_KEY)
    if found is None and len(answers) == 0:
        answers[_FINGERPRINT_KEY] = fingerprint
        answers.commit()
    elif found != fingerprint:
        whose = "no adainfer model's" if found is None else f"those of fingerprint {found}"
        raise AdaInferError(
            f"use_cache: its answers are {whose}, not this model's and stopper's ({fingerprint}); give another path"
        )


def remember(answers: Any, finished: Mapping[str, Any]) -> None:
    """Store a whole document's answers in one transaction: a killed run leaves no half document behind."""
    if answers is None:
        return
    # dbdict.update would be a transaction per answer
    pairs = [(answers.encode_key(key), answers.encode(value)) for key, value in finished.items()]
    for some in (pairs[start : start + _MOST_ROWS] for start in range(0, len(pairs), _MOST_ROWS)):
        rows = ", ".join(["(?, ?)"] * len(some))
        answers.conn.execute(
            f'REPLACE INTO "{answers.tablename}" (key, value) VALUES {rows}', [x for pair in some for x in pair]
        )


class TextHook(CacheHook):
    """HFLM reports finished texts here, as plain strings; they are noted with their exit records, and those cached.

    Args:
        hook: lm-eval's.
        note: Gives a generated text (by the request's arguments) its exit record.
    """

    def __init__(self, hook: CacheHook, note: Callable[[Any, str], Text]):
        self.dbdict = hook.dbdict
        self._note = note

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        """Store an answer."""
        super().add_partial(attr, req, self._note(req, res) if attr == "generate_until" else res)
