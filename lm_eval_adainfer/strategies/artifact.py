"""Stopper files: saving, loading, and what ``stopper=`` may say."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lm_eval_adainfer import container, paths
from lm_eval_adainfer.errors import AdaInferError, nearest
from lm_eval_adainfer.strategies import shortgpt
from lm_eval_adainfer.strategies.base import Stopper
from lm_eval_adainfer.strategies.crf import CRFStopper
from lm_eval_adainfer.strategies.network import LogisticStopper, MLPStopper
from lm_eval_adainfer.strategies.rules import (
    RULES,
    FixedStopper,
    GapStopper,
    NoStopper,
    PatienceStopper,
    SaturationStopper,
    SoftmaxStopper,
)
from lm_eval_adainfer.strategies.shortgpt import LastStopper, ShortGPTStopper
from lm_eval_adainfer.strategies.svm import SVMStopper
from lm_eval_adainfer.strategies.trees import BoostedStopper

VERSION = 1
# kind -> the strategy made of a file's arrays and parameters; add a class here
KINDS: dict[str, Callable[..., Stopper]] = {
    **{cls.kind: cls for cls in (SVMStopper, LogisticStopper, MLPStopper, BoostedStopper, CRFStopper)},
    "shortgpt": shortgpt.rebuild,
    **{cls.kind: cls.rebuild for cls in RULES},
}
SPECS = ("none", "gap:0.8", "softmax:0.9", "saturation:0.98", "patience:3", "fixed:24", "shortgpt:last5")
_logger = logging.getLogger(__name__)


def save(stopper: Stopper, path: str | Path) -> None:
    """Write a stopper; the file is safetensors plus JSON whatever its extension.

    Raises:
        AdaInferError: Where the file can't be written, or would not give the strategy again (:func:`require_savable`).
    """
    container.write(path, "stopper", VERSION, require_savable(stopper), stopper.arrays)


def require_savable(stopper: Stopper) -> dict[str, Any]:
    """The meta of a stopper's file, after making the strategy again of what the file would hold.

    Raises:
        AdaInferError: Where that can't be done, or gives another strategy.
    """
    if stopper.kind not in KINDS:
        raise AdaInferError(f"stopper: files hold no {stopper.kind}; they hold {', '.join(KINDS)}")
    meta = {"kind": stopper.kind, "parameters": stopper.parameters(), "info": stopper.info, "seen": stopper.seen}
    try:
        meta = json.loads(json.dumps(meta))
    except (TypeError, ValueError) as error:
        raise AdaInferError(
            f"stopper: this {stopper.kind} holds what JSON can't ({error}); its parameters and info should be numbers, "
            "texts, lists and dicts of these"
        ) from None
    again = KINDS[stopper.kind](dict(stopper.arrays), **meta["parameters"])
    again.info = meta["info"]
    if type(again) is not type(stopper) or again.fingerprint != stopper.fingerprint:
        raise AdaInferError(
            f"stopper: this {stopper.kind} ({type(stopper).__name__}) is not what its file would give again "
            f"({type(again).__name__}); save a strategy of this package, or add a kind to artifact.KINDS"
        )
    return meta


def load(path: str | Path) -> Stopper:
    """Read a stopper file; never executes code.

    Raises:
        AdaInferError: Where the file is missing, damaged, a pickle, or no stopper.
    """
    meta, arrays = container.read(path, "stopper", VERSION, "stopper")
    kind, parameters, info, seen = (meta.get(name) for name in ("kind", "parameters", "info", "seen"))
    if not isinstance(kind, str) or kind not in KINDS:
        raise AdaInferError(f"stopper: {path} holds a stopper of kind {kind!r}; this release knows {', '.join(KINDS)}")
    if not isinstance(parameters, dict) or not isinstance(info, dict) or not isinstance(seen or {}, dict):
        raise AdaInferError(f"stopper: {path} is damaged or truncated (no parameters); make it again")
    try:
        stopper = KINDS[kind](arrays, **parameters)
    except AdaInferError:
        raise
    except (TypeError, ValueError, OverflowError) as error:
        raise AdaInferError(f"stopper: {path} has wrong parameters ({error}); make it again") from None
    stopper.info, stopper.seen = info, seen or {}
    return stopper


def built_in() -> dict[str, Path]:
    """Name to file of the fitted stoppers that ship with the package."""
    return {path.stem: path for path in sorted(paths.stoppers().glob("*.stopper"))}


def parse(spec: Any) -> Stopper:
    """The strategy that ``stopper=`` names.

    Args:
        spec: ``none`` (also None and ``""``), ``gap``, ``gap:0.8``, ``softmax:0.9``, ``saturation:0.98``,
            ``patience:3``, ``fixed:24``, ``shortgpt:last5``, ``shortgpt:bi:8:FILE``, a built-in name, the path of a
            stopper file, or a :class:`Stopper`.

    Raises:
        AdaInferError: Where it is none of these.
    """
    if isinstance(spec, Stopper):
        return spec
    text = "none" if spec is None else str(spec).strip()
    if text in ("", "none", "None"):
        return NoStopper()
    name, colon, value = text.partition(":")
    if name == "gap":
        return GapStopper(_number(value, text)) if colon else GapStopper()
    if name == "softmax":
        return SoftmaxStopper(_number(value, text))
    if name == "saturation":
        return SaturationStopper(_number(value, text))
    if name == "patience":
        if not value.strip().isdecimal() or int(value) < 1:
            raise AdaInferError(f"stopper: {text!r} has no number of blocks of 1 or more; give patience:3, say")
        return PatienceStopper(int(value))
    if name == "fixed":
        if not value.strip().isdecimal():
            raise AdaInferError(f"stopper: {text!r} has no block number; give fixed:24 to stop after block 24")
        return FixedStopper(int(value))
    if name == "shortgpt":
        return _shortgpt(value, text)
    if text in built_in() and not Path(text).exists():
        return load(built_in()[text])
    if not Path(text).exists() and not _looks_like_a_path(text):
        names = [*SPECS, *built_in()]
        meant = _meant(text)
        raise AdaInferError(
            f"stopper: {text!r} is neither a known strategy ({', '.join(names)}) nor a stopper file"
            + (f"; {meant} is probably meant" if meant else "")
        )
    return load(text)


def _looks_like_a_path(text: str) -> bool:
    """Whether a file is meant: the text has a folder or an extension in it, and is neither a number nor a slip."""
    return any(c in text for c in "./\\") and not _is_number(_bare(text)) and _meant(text) is None


def _meant(text: str) -> str | None:
    """What ``gap=0.8``, ``GAP:0.8`` or ``softmx:0.9`` was probably meant to say; None where that is not clear."""
    parts = re.fullmatch(r"([a-z]+)[^a-z0-9.]*(.*)", _bare(text).lower(), re.DOTALL)
    examples = {spec.partition(":")[0]: spec for spec in SPECS} | {name: name for name in built_in()}
    name = nearest(parts[1], examples) if parts else None
    if parts is None or name is None:
        return None
    value = _bare(text)[parts.start(2) :].strip()
    if not value:
        return "gap" if name == "gap" else examples[name]
    if ":" not in examples[name]:  # it takes no value
        return None
    fits = value.lower().startswith(("last", "bi:")) if name == "shortgpt" else _is_number(value)
    return f"{name}:{value}" if fits else None


def _bare(text: str) -> str:
    return text.removeprefix("stopper=").strip()


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _shortgpt(value: str, text: str) -> Stopper:
    """``last5``, or ``bi:8:FILE`` with a file of ``adainfer influence``."""
    if value.startswith("last") and value.removeprefix("last").isdecimal():
        return LastStopper(int(value.removeprefix("last")))
    how, _, rest = value.partition(":")
    number, _, file = rest.partition(":")
    if how != "bi" or not number.isdecimal() or not file:
        raise AdaInferError(
            f"stopper: {text!r} is neither shortgpt:last5, say, nor shortgpt:bi:8:FILE, where adainfer influence has "
            "written FILE"
        )
    measured = load(file)
    if not isinstance(measured, ShortGPTStopper):
        raise AdaInferError(f"stopper: {file} holds a stopper of kind {measured.kind}; give one of adainfer influence")
    return ShortGPTStopper(measured.arrays, int(number), measured.info)


def _number(value: str, text: str) -> float:
    try:
        return float(value)
    except ValueError:
        name = text.partition(":")[0]
        raise AdaInferError(
            f"stopper: {text!r} has no number after {name}:; give a threshold between 0 and 1, as in {name}:0.9"
        ) from None


def warn_if_foreign(stopper: Stopper, model: str, n_blocks: int, head_hash: str) -> None:
    """Say so when a stopper was fitted on another model: allowed (paper section 5.5), but rarely as good."""
    info = getattr(stopper, "info", None)
    if not info:
        return
    differences = []
    if info.get("n_blocks") not in (None, n_blocks):
        differences.append(f"{info['n_blocks']} blocks instead of {n_blocks}")
    if info.get("head_hash") and head_hash and info["head_hash"] != head_hash:
        differences.append("another output head")
    if differences:
        _logger.warning(
            "stopper: it was fitted on %s (%s), not on %s; check its accuracy here before you trust it",
            info.get("model", "another model"),
            ", ".join(differences),
            model,
        )
