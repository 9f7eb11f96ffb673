"""The public import path of the model type: ``from lm_eval_adainfer.model import AdaInferLM``."""

from lm_eval_adainfer.harness.model import AdaInferLM

__all__ = ["AdaInferLM"]
