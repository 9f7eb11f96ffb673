"""Every private name of lm-eval that the package touches.

They may change in any release of lm-eval. ``tests/test_private_names.py`` names each with the release that it was
written for, so that an upgrade which breaks one fails there, with a sentence.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

# Methods of HFLM that ``AdaInferLM`` overrides.
OVERRIDDEN = (
    "_batch_scheduler", "_detect_batch_size", "_get_config", "_loglikelihood_tokens", "_model_generate",
)  # fmt: skip
# Attributes of HFLM that it sets or reads.
ATTRIBUTES = ("_config", "_device", "_model", "_rank", "_world_size")


def groups_and_tasks(task_dict: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Groups and tasks by name, of a dict of the form that ``evaluate`` took before 0.4.13."""
    from lm_eval.evaluator_utils import _handle_back_comp

    return _handle_back_comp(task_dict)


def task_of(task: Any, instances: Sequence[Any]) -> Any:
    """A copy of a task that holds these instances, so that ``apply_filters`` filters their responses alone."""
    alone = copy.copy(task)
    alone._instances = list(instances)
    return alone


def merge_dict_action() -> Any:
    """The argparse action with which ``lm_eval`` reads options like ``--gen_kwargs``; it raises a ValueError."""
    from lm_eval._cli.utils import MergeDictAction

    return MergeDictAction


def key_val_to_dict(text: str) -> dict[str, Any]:
    """``key=value`` pairs with commas between them, as ``lm_eval``'s command reads them; or a ValueError."""
    from lm_eval._cli.utils import key_val_to_dict

    return key_val_to_dict(text)
