"""Measure and use early exit in language models, inside lm-evaluation-harness.

Importing this package is cheap on purpose (it is on the start-up path of every Python process of the
environment, see ``registration``): it imports neither torch nor lm_eval.
"""

from lm_eval_adainfer._version import __version__

__all__ = ["AdaInferLM", "__version__"]


def __getattr__(name: str) -> object:
    if name == "AdaInferLM":
        from lm_eval_adainfer.harness.model import AdaInferLM

        return AdaInferLM
    raise AttributeError(f"module 'lm_eval_adainfer' has no attribute {name!r}")
