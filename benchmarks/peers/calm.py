"""CALM as ``economize`` 0.3.2 has it, in that package's own lm-eval model, with the settings of its documentation.

    pip install economize==0.3.2
    python -m benchmarks.peers.calm

Confidence is the gap of the head's two largest probabilities, threshold 0.9, from block 1 on: ``CalmConfig``'s
defaults, and what its module's example spells out. ``scoring`` is left at ``auto``, which for CALM means that choices
are scored by its decoding loop.
"""

from __future__ import annotations

from benchmarks.peers import measuring


def make(loaded: measuring.Loaded):
    import economize
    from economize.integrations.lm_eval import EconomizeLM
    from economize.techniques.dynamic_depth import CalmConfig

    efficient = economize.apply(loaded.model, CalmConfig(confidence="softmax", threshold=0.9))
    return EconomizeLM(**{**loaded.given, "pretrained": efficient})


if __name__ == "__main__":
    options = measuring.parser("python -m benchmarks.peers.calm", __doc__).parse_args()
    measuring.main("economize, CALM 0.9", make, options)
