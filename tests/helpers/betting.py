"""A betting test of a bounded mean (Waudby-Smith & Ramdas 2024): proven for every distribution, the slow reference."""

from __future__ import annotations

import numpy as np


def betting_rejects(drops: np.ndarray, limit: float, reach: float = 1.0, error: float = 0.05) -> bool:
    """Whether capital that bets on drops below ``limit`` ever reaches 1 / ``error``.

    Bets are made before each document is seen: the predictable plug-in that is best for this number of documents, at
    most three quarters of what can't go bankrupt.
    """
    n, most = len(drops), 0.75 / (reach - limit)
    mean, square, log = 0.0, 0.25 * reach**2, 0.0
    goal = np.log(1 / error)
    for i, x in enumerate(drops, 1):
        log += np.log1p(min(np.sqrt(2 * goal / (n * max(square, 1e-12) / i)), most) * (limit - x))
        if log >= goal:
            return True
        mean += (x - mean) / (i + 1)
        square += (x - mean) ** 2
    return False
