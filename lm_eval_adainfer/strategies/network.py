"""``logistic`` and ``mlp``: logistic regression and a small multilayer perceptron, evaluated as tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.strategies.classifier import ClassifierStopper


class MLPStopper(ClassifierStopper):
    """Linear maps with ReLU between them; arrays ``weight_i`` [out, in] and ``bias_i`` [out] for i = 0, 1, ..."""

    kind = "mlp"

    def check_arrays(self) -> None:
        """Widths must follow each other from F to 1."""
        self.layers = len(self.arrays) // 2
        self.need(*(f"{part}_{i}" for i in range(max(self.layers, 1)) for part in ("weight", "bias")))
        width = len(self.features)
        for i in range(self.layers):
            weight, bias = self.arrays[f"weight_{i}"], self.arrays[f"bias_{i}"]
            if weight.ndim != 2 or weight.shape[1] != width or bias.shape != weight.shape[:1]:
                raise AdaInferError(
                    f"stopper: layer {i} of this {self.kind} has the shapes {weight.shape} and {bias.shape}, which do "
                    f"not take {width} numbers; fit it again"
                )
            width = weight.shape[0]
        if width != 1:
            raise AdaInferError(f"stopper: this {self.kind} gives {width} scores instead of 1; fit it again")

    def score(self, x: Tensor, arrays: Mapping[str, Tensor]) -> Tensor:
        """The network's one output."""
        for i in range(self.layers):
            x = x @ arrays[f"weight_{i}"].T + arrays[f"bias_{i}"]
            if i < self.layers - 1:
                x = x.relu()
        return x[:, 0]

    @property
    def flops(self) -> int:
        """2 per weight."""
        return 2 * sum(a.size for a in self.arrays.values() if a.ndim == 2)

    @staticmethod
    def arrays_of(scaler: Any, model: Any) -> dict[str, np.ndarray]:
        """Arrays of a fitted ``StandardScaler`` followed by an ``MLPClassifier`` or a ``LogisticRegression``.

        The scaling is folded into the first layer.
        """
        if hasattr(model, "coefs_"):
            weights, biases = [w.T for w in model.coefs_], list(model.intercepts_)
        else:
            weights, biases = [model.coef_], [model.intercept_]
        biases[0] = biases[0] - weights[0] @ (scaler.mean_ / scaler.scale_)
        weights[0] = weights[0] / scaler.scale_
        pairs = enumerate(zip(weights, biases, strict=True))
        named = [(f"{part}_{i}", a) for i, pair in pairs for part, a in zip(("weight", "bias"), pair, strict=True)]
        return {name: np.asarray(array, dtype=np.float64) for name, array in named}


class LogisticStopper(MLPStopper):
    """Logistic regression: the network with a single layer."""

    kind = "logistic"
