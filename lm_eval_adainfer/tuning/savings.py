"""What exits save and lose, with 95% intervals over documents: of exits on traces and of real runs alike."""

from __future__ import annotations

import numpy as np

from lm_eval_adainfer.statistics import tango_interval, wilson_interval

_RESAMPLES = 1000


def saving(cost: np.ndarray, dense: np.ndarray, seed: int) -> dict[str, float | int]:
    """The share of the dense work that is saved, and resampled documents' interval: ``documents``, ``saved``, ...

    Args:
        cost: [documents], the work of each.
        dense: [documents], that of the dense model.
        seed: Of the resampling.
    """
    n = len(cost)
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), _RESAMPLES)
    low, high = np.quantile(1 - (draws @ cost) / (draws @ dense), [0.025, 0.975])
    saved = float(1 - cost.sum() / dense.sum())
    return {"documents": n, "saved": saved, "saved_low": float(low), "saved_high": float(high)}


def losing(lost: np.ndarray, net: bool = False) -> dict[str, float]:
    """The share that is lost, ``lost``, with Wilson's interval, or Tango's where documents can be won as well.

    Args:
        lost: [documents], 1 where a document is lost, -1 where one is won.
        net: Whether the loss is one of ``fitting.risk.NET``.
    """
    share, n = float(lost.mean()), len(lost)
    if net:
        found = tango_interval(float((lost > 0).sum()), float((lost < 0).sum()), n)
        low, high = found.lower, found.upper
    else:
        low, high = wilson(share, n)
    return {"lost": share, "lost_low": low, "lost_high": high}


def wilson(share: float, n: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share of ``n`` documents."""
    low, high = wilson_interval(np.array(share), n)
    return float(low), float(high)
