"""Every private name of torch, transformers, accelerate, PEFT and scikit-learn that the package touches.

These names may change in any release of those libraries. No other module uses them, and ``tests/test_private_names.py``
names each with the release that it was written for, so that an upgrade which breaks one fails there, with a sentence.
(lm-eval's private names lie in ``harness/private.py``.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# ------------------------------------------------------------------ torch: modules

HOOKS = ("_forward_pre_hooks", "_forward_hooks")  # attributes of every module, each a dict from handle to hook


def hooks_of(module: nn.Module) -> tuple[Mapping[int, Callable], Mapping[int, Callable]]:
    """A module's own forward pre-hooks and forward hooks; of a compiled wrapper its own, not those of what it wraps."""
    before, after = (vars(module)[name] for name in HOOKS)
    return before, after


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """A module's own parameters by name, also those that are None."""
    return module._parameters


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """A module's own buffers by name, also those that are None or are not saved."""
    return module._buffers


def saved_state(module: nn.Module) -> dict[str, Any]:
    """What a module itself, without its children, puts into a state dict."""
    stored: dict[str, Any] = {}
    module._save_to_state_dict(stored, "", True)
    return stored


def version_of(tensor: Tensor) -> int:
    """How often a tensor has been changed in place; 0 where autograd does not count it."""
    return 0 if tensor.is_inference() else tensor._version


# ------------------------------------------------------------------ torch: compiled modules


def is_compiled_wrapper(module: Any) -> bool:
    """Whether this is what ``torch.compile(module)`` has returned."""
    return isinstance(module, torch._dynamo.OptimizedModule)


def compiled_module(wrapper: Any) -> Any:
    """The module that was given to ``torch.compile``."""
    return wrapper._orig_mod


def is_compiled_in_place(module: nn.Module) -> bool:
    """Whether ``module.compile()`` was called."""
    return module._compiled_call_impl is not None


def compiled_function(forward: Any) -> Any:
    """The function from which ``torch.compile`` has made this one; None where it has not."""
    return getattr(forward, "_torchdynamo_orig_callable", None)


# ------------------------------------------------------------------ torch: attention

# The kernel of F.scaled_dot_product_attention on a CPU, which returns the log-sums of exponentials as well.
CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

# ------------------------------------------------------------------ accelerate


def offload_hook(module: Any) -> Any:
    """The hook with which accelerate moves a module's weights and inputs; None where it has put none."""
    return getattr(module, "_hf_hook", None)


# ------------------------------------------------------------------ PEFT

# attributes of its layers that say, beside their weights, which adapters act
ADAPTER_STATE = ("scaling", "_active_adapter", "_disable_adapters", "merged_adapters")

# ------------------------------------------------------------------ scikit-learn


def gamma_of(svc: Any) -> float:
    """The kernel coefficient that a fitted SVC computes with, where ``gamma`` may be ``"scale"``."""
    return svc._gamma


# ------------------------------------------------------------------ transformers: attention


@contextmanager
def every_mask_built() -> Iterator[None]:
    """Let transformers build the causal masks that it would leave out for sdpa."""
    from transformers import masking_utils

    before = masking_utils._ignore_causal_mask_sdpa
    masking_utils._ignore_causal_mask_sdpa = lambda *args, **kwargs: False
    try:
        yield
    finally:
        masking_utils._ignore_causal_mask_sdpa = before


@contextmanager
def attention_functions_restored() -> Iterator[None]:
    """Afterwards ``ALL_ATTENTION_FUNCTIONS`` holds what it held before."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS._local_mapping = before


# ------------------------------------------------------------------ transformers: configs

NAME_OR_PATH = "_name_or_path"  # the key of a config's dict that says where it was read


def attention_of(config: Any) -> str | None:
    """The attention implementation that a model's config has chosen; None where it has chosen none."""
    return getattr(config, "_attn_implementation", None)


def model_from_config(kind: Any, config: Any, attention: str) -> Any:
    """A freshly initialised model of a class, with this attention implementation."""
    return kind._from_config(config, attn_implementation=attention)


# ------------------------------------------------------------------ transformers: generation


def generation_config_of(model: Any, given: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The settings of checkpoint and request together, as ``generate`` makes them, and what is no setting."""
    return model._prepare_generation_config(None, **given)


def put_special_tokens(model: Any, config: Any, device: torch.device) -> None:
    """Put the special tokens that ``generate`` works with into a generation config, as tensors."""
    model._prepare_special_tokens(config, True, device=device)


def end_tokens_of(config: Any) -> Tensor | None:
    """The tokens that end a text, in a config that ``put_special_tokens`` has seen."""
    return config._eos_token_tensor


def logits_processors(model: Any, config: Any, **given: Any) -> Any:
    """The logits processors that ``generate`` makes of a generation config."""
    return model._get_logits_processor(config, **given)


def check_model_arguments(model: Any, given: Mapping[str, Any]) -> None:
    """Raise a ValueError for arguments of ``generate`` that neither it nor the model's forward knows."""
    model._validate_model_kwargs(dict(given))


def check_moved_mode(model: Any, mode: Any, trust_remote_code: Any, custom_generate: Any) -> None:
    """Raise where a generation mode has moved out of transformers; nothing once a release has forgotten them."""
    if hasattr(model, "_get_deprecated_gen_repo"):
        model._get_deprecated_gen_repo(mode, trust_remote_code, custom_generate)
