"""What fitted strategies share: arrays and parameters that a stopper file holds, and where they come from."""

from __future__ import annotations

import hashlib
import logging
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np

from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.strategies.base import Stopper

_logger = logging.getLogger(__name__)


class FittedStopper(Stopper):
    """A strategy that a stopper file holds: ``type(s)(s.arrays, info=s.info, **s.parameters())`` rebuilds it.

    To add one, subclass this and declare it in ``strategies/registry.py``. Its ``__init__`` checks whatever it is given
    and raises AdaInferError, because files come from anywhere.

    Attributes:
        arrays: Name to array, C-contiguous.
        info: Where it comes from: model, L, head hash, tasks, shots, split, label, versions.
    """

    arrays: dict[str, np.ndarray]
    info: dict[str, Any]

    @abstractmethod
    def parameters(self) -> dict[str, Any]:
        """What besides the arrays rebuilds this stopper, JSON-serialisable."""

    @classmethod
    def rebuild(cls, arrays: Mapping[str, np.ndarray], **parameters: Any) -> Stopper:
        """The strategy that a stopper file of these arrays and parameters holds."""
        return cls(arrays, **parameters)  # type: ignore[call-arg]  # every subclass takes its arrays first

    def describe(self) -> dict[str, Any]:
        """Kind, parameters, a hash of the arrays, and what it was fitted on."""
        digest = hashlib.sha256()
        for name, array in self.arrays.items():
            digest.update(name.encode() + array.tobytes())
        return {
            "kind": self.kind,
            **self.parameters(),
            "arrays_sha256": digest.hexdigest()[:16],
            "fitted_on": self.info,
        }


def checked_arrays(arrays: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]], kind: str) -> dict:
    """The named arrays as float64, C-contiguous, sorted by name.

    Raises:
        AdaInferError: Where one is missing, has another shape, or holds NaN or infinity.
    """
    found = {}
    for name, shape in sorted(shapes.items()):
        if name not in arrays:
            raise AdaInferError(f"stopper: a {kind} needs the array {name}, which is missing")
        array = np.ascontiguousarray(arrays[name], dtype=np.float64)
        if array.shape != shape:
            raise AdaInferError(f"stopper: the array {name} of this {kind} has the shape {array.shape}, not {shape}")
        if not np.isfinite(array).all():
            raise AdaInferError(f"stopper: this {kind} holds NaN or infinite numbers; fit it again on finite features")
        found[name] = array
    return found


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
