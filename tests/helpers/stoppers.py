"""Strategies for tests: exits by a script, at random or by a list, and an SVM that scikit-learn has fitted."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.svm import SVC

from lm_eval_adainfer.strategies.base import Stopper
from lm_eval_adainfer.strategies.svm import SVMStopper

NAMES = ("gap", "top_prob", "cos_hidden", "cos_attn", "cos_mlp")


class Scripted(Stopper):
    """Stops by a rule of (gap, block) that is different for every document: exits everywhere."""

    kind = "scripted"
    features = ("gap",)

    def margin(self, block, values, memory=None):
        coarse = torch.round(values[:, 0] * 1000)  # so that rounding errors hardly ever change a decision
        return torch.frac(coarse * 0.618034 + block * 0.37) - 0.6


class ScriptedByState(Stopper):
    """As Scripted, by the hidden states as well: for models whose probabilities are all alike."""

    kind = "scripted_by_state"
    features = ("gap", "cos_hidden")

    def margin(self, block, values, memory=None):
        coarse = torch.round(values.sum(-1) * 1000)
        return torch.frac(coarse * 0.618034 + block * 0.37) - 0.6


class Dice(Stopper):
    """Leaves at random; what it did is read from the decoder's record."""

    kind = "dice"
    features = ("gap",)

    def __init__(self, probability=0.35, seed=0):
        self.probability, self.generator = probability, torch.Generator().manual_seed(seed)

    def margin(self, block, values, memory=None):
        return self.probability - torch.rand(len(values), generator=self.generator)


class Listed(Stopper):
    """Rows leave after the blocks of a list, step by step: ``exits[step][row]``. No row finishes."""

    kind = "listed"
    features = ("cos_hidden",)

    def __init__(self, exits):
        self.steps = [list(step) for step in exits]

    def margin(self, block, values, memory=None):
        if block == 1:
            self.flow = self.steps.pop(0)
        stops = [exit_block == block for exit_block in self.flow]
        self.flow = [e for e, stop in zip(self.flow, stops, strict=True) if not stop]
        return torch.tensor([1.0 if stop else -1.0 for stop in stops], device=values.device)


def data(seed, n_features, n=80):
    """Two noisy, overlapping classes of float32 points, as the features are."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(-1, 1, (n, n_features)).astype(np.float32)
    y = (x.sum(1) + 0.5 * rng.normal(size=n) + 0.3 * np.sin(5 * x[:, 0]) > 0).astype(int)
    return x.astype(np.float64), y


def fitted(kernel="rbf", n_features=2, seed=0, threshold=0.0, info=None, **options):
    x, y = data(seed, n_features)
    svc = SVC(kernel=kernel, **options).fit(x, y)
    return svc, SVMStopper.from_sklearn(svc, NAMES[:n_features], threshold, info)
