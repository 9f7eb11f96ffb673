"""Stock lm-evaluation-harness, ``--model hf``: every block of every token, and what all others are compared with.

    python -m benchmarks.peers.stock

Nothing needs to be installed besides what this package needs.
"""

from __future__ import annotations

from lm_eval.models.huggingface import HFLM

from benchmarks.peers import measuring


def make(loaded: measuring.Loaded) -> HFLM:
    return HFLM(**loaded.given)


if __name__ == "__main__":
    measuring.main("stock hf", make, measuring.parser("python -m benchmarks.peers.stock", __doc__).parse_args())
