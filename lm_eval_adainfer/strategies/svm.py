"""The paper's classifier: a support vector machine, fitted by scikit-learn and evaluated as tensors."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.strategies.features import check_names
from lm_eval_adainfer.strategies.fitted import FittedStopper
from lm_eval_adainfer.structure.private import gamma_of

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
        """A stopper from a fitted ``sklearn.svm.SVC`` or ``NuSVC`` with classes (0, 1) = (go on, stop).

        An estimator that was fitted on a DataFrame knows the names of its columns (``feature_names_in_``); these are
        then put in the order of ``features``. A few decisions are compared with the estimator's own.

        Raises:
            AdaInferError: Where it is another estimator (a Pipeline, a search), not fitted, has other classes or
                columns, a kernel that is not supported, or decides otherwise than its support vectors say.
        """
        from sklearn.svm import SVC, NuSVC

        if not isinstance(svc, (SVC, NuSVC)):
            raise AdaInferError(f"svc: it is a {type(svc).__name__}, {_what_to_pass(svc)}")
        if not hasattr(svc, "support_vectors_"):
            raise AdaInferError("svc: it is not fitted; call fit on it first")
        if svc.kernel not in KERNELS:
            raise AdaInferError(f"svc: its kernel is {svc.kernel!r}; supported are {', '.join(KERNELS)}")
        if not np.array_equal(svc.classes_, [0, 1]):
            raise AdaInferError(f"svc: its classes are {list(svc.classes_)}, but 0 (go on) and 1 (stop) are needed")
        check_names(features, "stopper")
        vectors, dual = (x.toarray() if hasattr(x, "toarray") else x for x in (svc.support_vectors_, svc.dual_coef_))
        named = list(getattr(svc, "feature_names_in_", features))
        if set(named) != set(features):
            raise AdaInferError(
                f"features: they are {', '.join(features)}, but the svc was fitted on columns named "
                f"{', '.join(map(str, named))}; give these names, or fit it on an array, whose columns have none"
            )
        order = [named.index(name) for name in features]
        if len(order) == vectors.shape[1]:
            vectors = vectors[:, order]
        arrays = {"support_vectors": vectors, "dual_coef": dual[0], "intercept": svc.intercept_}
        stopper = cls(arrays, features, svc.kernel, gamma_of(svc), svc.coef0, svc.degree, threshold, info)
        _require_same_decisions(stopper, svc, order)
        return stopper

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
        return (self._kernel(x, vectors) @ dual + intercept).to(values.device)

    def _kernel(self, x: Tensor, vectors: Tensor) -> Tensor:
        """[n, m], the kernel between [n, F] points and the [m, F] support vectors, float64."""
        if self.kernel == "rbf":
            return torch.exp(-self.gamma * (x[:, None, :] - vectors[None]).square().sum(-1))
        if self.kernel == "linear":
            return x @ vectors.T
        if self.kernel == "poly":
            return (self.gamma * (x @ vectors.T) + self.coef0) ** self.degree
        return torch.tanh(self.gamma * (x @ vectors.T) + self.coef0)

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


def _what_to_pass(estimator: Any) -> str:
    """What an estimator that is no SVC is, and what would be right, for the end of a sentence."""
    if hasattr(estimator, "best_estimator_"):
        chosen = type(estimator.best_estimator_).__name__
        return f"which only wraps the estimator that it chose; pass its best_estimator_ (it is a {chosen})"
    if hasattr(estimator, "param_grid") or hasattr(estimator, "param_distributions"):
        return "which has chosen no estimator yet; fit it with refit=True and pass its best_estimator_"
    if hasattr(estimator, "steps"):
        before = [type(step).__name__ for _, step in estimator.steps[:-1] if step not in (None, "passthrough")]
        if not before:
            return f"which only wraps its last step; pass that (it is a {type(estimator.steps[-1][1]).__name__})"
        return (
            f"which changes the features ({', '.join(before)}) before its last step sees them; a stopper reads them as "
            "they are, so fit an SVC on the features themselves and pass that"
        )
    return "and no SVC; pass a fitted sklearn.svm.SVC, or make a stopper of another kind with adainfer fit"


def _require_same_decisions(stopper: SVMStopper, svc: SVC, order: Sequence[int]) -> None:
    """Raise AdaInferError where the estimator itself decides otherwise than ``stopper``, made of its numbers.

    Args:
        stopper: What was made of it.
        svc: The estimator; somebody may have changed it after fitting, or its class may override what SVC does.
        order: [F], the estimator's column for each of the stopper's.
    """
    vectors = stopper.arrays["support_vectors"]
    some = vectors[:: max(1, len(vectors) // 32)]
    points = np.concatenate([some, some + np.random.default_rng(0).normal(size=some.shape)])
    theirs = np.empty_like(points)
    theirs[:, order] = points
    with warnings.catch_warnings():  # the points are an array, whose columns have no names
        warnings.simplefilter("ignore")
        expected, stops = svc.decision_function(theirs), svc.predict(theirs) == svc.classes_[1]
    x = torch.from_numpy(points)
    found = stopper.decision_function(x).numpy()
    terms = stopper._kernel(x, torch.from_numpy(vectors)).abs().numpy() @ np.abs(stopper.arrays["dual_coef"])
    allowed = 1e-6 * (terms + np.abs(stopper.arrays["intercept"]))  # rounding grows with what is added up
    clear = np.abs(expected) > allowed
    if not (np.abs(found - expected) <= allowed).all() or ((found > 0) != stops)[clear].any():
        raise AdaInferError(
            "svc: its decisions are not those of its support vectors, dual_coef_ and intercept_; pass an SVC as "
            "scikit-learn fitted it, of no other class and not changed since"
        )
