"""``boosted``: gradient-boosted decision trees, stored as arrays and walked by gathers, all trees at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.strategies.classifier import ClassifierStopper

_SHAPED = ("feature", "split", "left", "right", "value")


class BoostedStopper(ClassifierStopper):
    """The sum of T trees of at most M nodes; a leaf is its own child, so every walk may take the same steps.

    Arrays, all [T, M] but the last: ``feature`` (column compared at a node), ``split`` (go left where the feature is at
    most this), ``left``, ``right`` (nodes), ``value`` (a node's term of the score, already times the learning rate);
    ``depth`` [1]: steps that reach every leaf.
    """

    kind = "boosted"

    def check_arrays(self) -> None:
        """Equal shapes; columns, nodes and depth in range."""
        self.need(*_SHAPED, "depth")
        shapes = {self.arrays[name].shape for name in _SHAPED}
        (shape,) = shapes if len(shapes) == 1 else ((),)
        if len(shape) != 2 or 0 in shape or self.arrays["depth"].shape != (1,):
            raise AdaInferError(
                "stopper: the arrays of this boosted do not have one shape [trees, nodes]; fit it again"
            )
        limits = {"feature": len(self.features), "left": shape[1], "right": shape[1]}
        for name, limit in limits.items():
            array = self.arrays[name] = self.arrays[name].astype(np.int64)
            if array.min() < 0 or array.max() >= limit:
                raise AdaInferError(f"stopper: {name} of this boosted goes beyond {limit - 1}; fit it again")
        self.depth = int(self.arrays["depth"][0])
        if not 0 <= self.depth < shape[1]:
            raise AdaInferError(f"stopper: this boosted can't be {self.depth} deep with {shape[1]} nodes; fit it again")

    def score(self, x: Tensor, arrays: Mapping[str, Tensor]) -> Tensor:
        """Sum of the leaves' values."""
        node = torch.zeros(len(x), len(arrays["left"]), dtype=torch.long, device=x.device)  # [n, T]

        def at(name: str) -> Tensor:
            return arrays[name].expand(len(x), -1, -1).gather(2, node[..., None])[..., 0]

        for _ in range(self.depth):
            seen = x.gather(1, at("feature"))
            node = torch.where(seen <= at("split"), at("left"), at("right"))
        return at("value").double().sum(dim=1)

    @property
    def flops(self) -> int:
        """A comparison per level and an addition, per tree."""
        return self.arrays["left"].shape[0] * (self.depth + 1)

    @staticmethod
    def arrays_of(model: Any) -> dict[str, np.ndarray]:
        """Arrays of a fitted two-class ``GradientBoostingClassifier``, without its constant (Platt scaling has one)."""
        trees = [estimator.tree_ for estimator in model.estimators_[:, 0]]
        size = max(tree.node_count for tree in trees)
        arrays: dict[str, np.ndarray] = {
            **{name: np.tile(np.arange(size), (len(trees), 1)) for name in ("left", "right")},
            "feature": np.zeros((len(trees), size), dtype=np.int64),
            "split": np.zeros((len(trees), size)),
            "value": np.zeros((len(trees), size)),
            "depth": np.array([max(tree.max_depth for tree in trees)], dtype=np.int64),
        }
        for t, tree in enumerate(trees):
            inner = np.flatnonzero(tree.children_left >= 0)
            arrays["left"][t, inner], arrays["right"][t, inner] = tree.children_left[inner], tree.children_right[inner]
            arrays["feature"][t, inner], arrays["split"][t, inner] = tree.feature[inner], tree.threshold[inner]
            arrays["value"][t, : tree.node_count] = model.learning_rate * tree.value[:, 0, 0]
        return arrays
