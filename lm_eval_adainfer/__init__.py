"""Measure and use early exit in language models, inside lm-evaluation-harness.

Importing this package is cheap on purpose (it is on the start-up path of every Python process of the
environment, see ``registration``): it imports neither torch nor lm_eval.
"""

__version__ = "0.1.0"

__all__ = ["AdaInferLM", "__version__"]


def __getattr__(name: str) -> object:
    if name == "AdaInferLM":
        from lm_eval_adainfer.harness.model import AdaInferLM

        return AdaInferLM
    raise AttributeError(f"module 'lm_eval_adainfer' has no attribute {name!r}")
