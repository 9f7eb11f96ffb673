"""What fitted classifiers other than the paper's SVM share: a score, made a probability by Platt scaling, a threshold.

Platt scaling (J. Platt, 1999, "Probabilistic outputs for support vector machines") fits sigmoid(a x score + b) on
documents that the classifier has not seen, so ``threshold`` reads as a probability whatever the classifier is.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.strategies.features import check_names
from lm_eval_adainfer.strategies.fitted import FittedStopper


class ClassifierStopper(FittedStopper):
    """Stop when the probability that the answer is there exceeds ``threshold``; subclasses give :meth:`score`.

    Args:
        arrays: The classifier's numbers, named by its kind.
        features: The F feature names, in the order of the columns.
        threshold: In [0, 1]; at 1 it never stops.
        slope: a of Platt scaling; positive.
        offset: b of Platt scaling.
        info: Where it comes from, as :class:`~lm_eval_adainfer.strategies.svm.SVMStopper`'s.

    Raises:
        AdaInferError: Where shapes, features or numbers don't fit together.
    """

    def __init__(
        self,
        arrays: Mapping[str, np.ndarray],
        features: Sequence[str],
        threshold: float = 0.95,
        slope: float = 1.0,
        offset: float = 0.0,
        info: Mapping[str, Any] | None = None,
    ):
        check_names(features, "stopper")
        self.features = tuple(features)
        self.arrays = {name: np.ascontiguousarray(arrays[name]) for name in sorted(arrays)}
        self.threshold, self.slope, self.offset = float(threshold), float(slope), float(offset)
        self.info = dict(info or {})
        if not 0.0 <= self.threshold <= 1.0:
            raise AdaInferError(f"stopper: the threshold {threshold:g} of this {self.kind} is not between 0 and 1")
        if not all(np.isfinite(a).all() for a in self.arrays.values()) or not np.isfinite([slope, offset]).all():
            raise AdaInferError(f"stopper: this {self.kind} holds NaN or infinite numbers; fit it again")
        if self.slope <= 0:
            raise AdaInferError(f"stopper: the slope {slope:g} of this {self.kind} is not positive; fit it again")
        self._tensors: dict[torch.device, dict[str, Tensor]] = {}
        self.check_arrays()

    @abstractmethod
    def check_arrays(self) -> None:
        """Raise AdaInferError where the arrays are not a classifier of ``features``."""

    @abstractmethod
    def score(self, x: Tensor, arrays: Mapping[str, Tensor]) -> Tensor:
        """[n] float64 scores of [n, F] float64 features; ``arrays`` are the classifier's, on the device of ``x``."""

    def bare_scores(self, x: np.ndarray) -> np.ndarray:
        """[n] float64 scores of [n, F] features, before Platt scaling."""
        arrays = {name: torch.from_numpy(a) for name, a in self.arrays.items()}
        return self.score(torch.from_numpy(np.asarray(x, dtype=np.float64)), arrays).numpy()

    def probability(self, values: Tensor) -> Tensor:
        """[n] float64: Platt-scaled scores of [n, F] features, on the device of ``values``."""
        device = values.device if values.device.type != "mps" else torch.device("cpu")  # MPS has no float64
        if device not in self._tensors:
            self._tensors[device] = {name: torch.from_numpy(a).to(device) for name, a in self.arrays.items()}
        score = self.score(values.to(device=device, dtype=torch.float64), self._tensors[device])
        return torch.sigmoid(self.slope * score + self.offset).to(values.device)

    def margin(self, block: int, values: Tensor, memory: Tensor | None = None) -> Tensor:
        """Probability minus threshold, in float64."""
        return self.probability(values) - self.threshold

    def need(self, *names: str) -> None:
        """Raise AdaInferError where an array is missing."""
        if missing := [name for name in names if name not in self.arrays]:
            raise AdaInferError(f"stopper: this {self.kind} has no array {missing[0]}; fit it again")

    def parameters(self) -> dict[str, Any]:
        """What besides the arrays rebuilds this stopper, JSON-serialisable."""
        names = ("threshold", "slope", "offset")
        return {"features": list(self.features), **{name: getattr(self, name) for name in names}}
