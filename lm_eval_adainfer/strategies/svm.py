"""The paper's classifier: a support vector machine, fitted by scikit-learn and evaluated as tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.features import check_names
from lm_eval_adainfer.strategies.fitted import FittedStopper

if TYPE_CHECKING:
    from sklearn.svm import SVC

KERNELS = ("rbf", "linear", "poly", "sigmoid")


class SVMStopper(FittedStopper):
    """``svm``: stop when the decision function of a fitted two-class SVC is positive (class 1 = stop).

    Args:
        arrays: ``support_vectors`` [m, F], ``dual_coef`` [m], ``intercept`` [1], all float64.
        features: The F feature names, in the order of the columns.
        kernel: One of ``rbf``, ``linear``, ``poly``, ``sigmoid``.
        gamma: Kernel coefficient (scikit-learn's fitted ``_gamma``).
        coef0: Independent term of ``poly`` and ``sigmoid``.
        degree: Degree of ``poly``.
        threshold: Stop when the decision function exceeds it; scikit-learn's ``predict`` uses 0.
        info: Where it comes from: model, L, head hash, tasks, shots, split, label, versions.

    Raises:
        AdaInferError: Where shapes, features or numbers don't fit together.
    """

    kind = "svm"

    def __init__(
        self,
        arrays: Mapping[str, np.ndarray],
        features: Sequence[str],
        kernel: str = "rbf",
        gamma: float = 1.0,
        coef0: float = 0.0,
        degree: int = 3,
        threshold: float = 0.0,
        info: Mapping[str, Any] | None = None,
    ):
        check_names(features, "stopper")
        missing = {"support_vectors", "dual_coef", "intercept"} - set(arrays)
        if missing:
            raise AdaInferError(f"stopper: an svm needs the arrays {', '.join(sorted(missing))}, which are missing")
        self.arrays = {name: np.ascontiguousarray(arrays[name], dtype=np.float64) for name in sorted(arrays)}
        vectors, dual, intercept = (self.arrays[n] for n in ("support_vectors", "dual_coef", "intercept"))
        if vectors.ndim != 2 or vectors.shape[1] != len(features):
            found = vectors.shape[-1] if vectors.ndim else 0
            raise AdaInferError(
                f"stopper: this svm reads {found} features but names {len(features)} "
                f"({', '.join(features)}); the numbers must be equal"
            )
        if dual.shape != (vectors.shape[0],) or intercept.shape != (1,):
            raise AdaInferError(
                f"stopper: this svm has {vectors.shape[0]} support vectors but dual_coef of shape {dual.shape} and "
                f"intercept of shape {intercept.shape}; they should be ({vectors.shape[0]},) and (1,)"
            )
        numbers = [float(gamma), float(coef0), float(threshold)]
        if not all(np.isfinite(a).all() for a in self.arrays.values()) or not np.isfinite(numbers).all():
            raise AdaInferError("stopper: this svm holds NaN or infinite numbers; fit it again on finite features")
        if kernel not in KERNELS:
            raise AdaInferError(f"stopper: this svm has the kernel {kernel!r}; supported are {', '.join(KERNELS)}")
        self.features = tuple(features)
        self.kernel, self.gamma, self.coef0, self.degree = kernel, float(gamma), float(coef0), int(degree)
        self.threshold = float(threshold)
        self.info: dict[str, Any] = dict(info or {})
        self._tensors: dict[torch.device, tuple[Tensor, ...]] = {}

    @classmethod
    def from_sklearn(
        cls,
        svc: SVC,
        features: Sequence[str],
        threshold: float = 0.0,
        info: Mapping[str, Any] | None = None,
    ) -> SVMStopper:
        """A stopper from a fitted ``sklearn.svm.SVC`` with classes (0, 1) = (go on, stop).

        Raises:
            AdaInferError: Where it is not fitted, has other classes or a kernel that is not supported.
        """
        if not hasattr(svc, "support_vectors_"):
            raise AdaInferError("svc: it is not fitted; call fit on it first")
        if svc.kernel not in KERNELS:
            raise AdaInferError(f"svc: its kernel is {svc.kernel!r}; supported are {', '.join(KERNELS)}")
        if not np.array_equal(svc.classes_, [0, 1]):
            raise AdaInferError(f"svc: its classes are {list(svc.classes_)}, but 0 (go on) and 1 (stop) are needed")
        vectors, dual = (x.toarray() if hasattr(x, "toarray") else x for x in (svc.support_vectors_, svc.dual_coef_))
        arrays = {"support_vectors": vectors, "dual_coef": dual[0], "intercept": svc.intercept_}
        return cls(arrays, features, svc.kernel, svc._gamma, svc.coef0, svc.degree, threshold, info)

    def margin(self, block: int, values: Tensor, memory: Tensor | None = None) -> Tensor:
        """Decision function minus threshold, in float64, on the device of ``values``."""
        return self.decision_function(values) - self.threshold

    def decision_function(self, values: Tensor) -> Tensor:
        """[n] float64, as ``SVC.decision_function`` of the [n, F] ``values``."""
        device = values.device if values.device.type != "mps" else torch.device("cpu")  # MPS has no float64
        if device not in self._tensors:
            self._tensors[device] = tuple(
                torch.from_numpy(self.arrays[n]).to(device) for n in ("support_vectors", "dual_coef", "intercept")
            )
        vectors, dual, intercept = self._tensors[device]
        x = values.to(device=device, dtype=torch.float64)
        if self.kernel == "rbf":
            k = torch.exp(-self.gamma * (x[:, None, :] - vectors[None]).square().sum(-1))
        elif self.kernel == "linear":
            k = x @ vectors.T
        elif self.kernel == "poly":
            k = (self.gamma * (x @ vectors.T) + self.coef0) ** self.degree
        else:
            k = torch.tanh(self.gamma * (x @ vectors.T) + self.coef0)
        return (k @ dual + intercept).to(values.device)

    @property
    def flops(self) -> int:
        """About (3F + 4) per support vector."""
        return self.arrays["support_vectors"].shape[0] * (3 * len(self.features) + 4)

    def parameters(self) -> dict[str, Any]:
        """What besides the arrays rebuilds this stopper, JSON-serialisable."""
        return {
            "features": list(self.features),
            "kernel": self.kernel,
            "gamma": self.gamma,
            "coef0": self.coef0,
            "degree": self.degree,
            "threshold": self.threshold,
        }

    def describe(self) -> dict[str, Any]:
        """As every fitted strategy's, and how many support vectors there are."""
        return {**super().describe(), "support_vectors": int(self.arrays["support_vectors"].shape[0])}
