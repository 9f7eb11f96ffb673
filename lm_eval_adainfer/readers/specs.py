"""Specs: from what ``reader=`` says to a reader."""

from __future__ import annotations

from typing import Any

from lm_eval_adainfer.errors import AdaInferError, nearest
from lm_eval_adainfer.readers import files
from lm_eval_adainfer.readers.base import HEAD, KINDS, Reader

_FORMS = "head, copy, copy:W, sim, sim:W with W tokens of 1 or more, or tuned:FILE"


def parse(spec: Any) -> Reader:
    """The reader that ``reader=`` names.

    Args:
        spec: ``head``, ``copy`` (``copy:1``), ``copy:32``, ``sim``, ``sim:32``, ``tuned:FILE``, or a :class:`Reader`.

    Raises:
        AdaInferError: Where it is none of these, or the file holds no reader.
    """
    if isinstance(spec, Reader):
        return spec
    text = str(spec).strip()
    kind, colon, value = text.partition(":")
    if kind == "head" and not colon:
        return HEAD
    if kind in ("copy", "sim") and (not colon or (value.isdecimal() and int(value) > 0)):
        return Reader(kind, int(value) if colon else 1)
    if kind == "tuned" and value:
        return Reader("tuned", maps=files.load(value))
    meant = nearest(kind.lower(), KINDS)
    raise AdaInferError(
        f"reader: {text!r} is none of {_FORMS}" + (f" (did you mean {meant}?)" if meant and meant != kind else "")
    )


def resolve(asked: Any, stoppers: Reader | None) -> Reader:
    """The reader of a run.

    Args:
        asked: What ``reader=`` says; None (also ``""``, and the word) where it is not given.
        stoppers: The reader that the stopper's file names; None where it comes from no file.

    Raises:
        AdaInferError: Where the two differ.
    """
    if asked is None or str(asked).strip() in ("", "None"):
        return stoppers or HEAD
    reader = parse(asked)
    if stoppers is not None and not reader.same(stoppers):
        raise AdaInferError(
            f"reader: {asked!s:.60} is not the one that this stopper's file names ({stoppers.name}); leave reader= "
            "out, or fit a stopper under the other one"
        )
    return reader
