"""The causal LM inside what a user hands in: compiled forwards and wrappers are taken off."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from lm_eval_adainfer.errors import UnsupportedModelError
from lm_eval_adainfer.structure import private


def uncompiled(model: Any) -> Any:
    """The model without ``torch.compile``, in any of its forms, around the same weights.

    A compiled forward does not see the hooks and the replaced forwards through which blocks are left, so the modules
    have to be called as they are. A model that is compiled in place, or in part, stays as it is: it is copied around
    its tensors.

    Raises:
        UnsupportedModelError: Where somebody's hooks hang on a compiled module, since they would be lost.
    """
    model = _original(model)
    if not isinstance(model, nn.Module) or not any(_is_compiled(module) for module in model.modules()):
        return model
    model = with_same_weights(model)  # a copy leaves behind what Module.compile has set
    for module in list(model.modules()):
        if _compiled_forward(module) is not None:
            del module.__dict__["forward"]
        for name, child in module.named_children():
            if _is_compiled(child):
                setattr(module, name, _original(child))
    return model


def with_same_weights(model: Any) -> Any:
    """The model's modules and config once more, around the same tensors, so that the original keeps its structure."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(x): x for x in tensors})


def _is_compiled(module: nn.Module) -> bool:
    if private.is_compiled_wrapper(module) or private.is_compiled_in_place(module):
        return True
    forward = _compiled_forward(module)
    if forward is not None and getattr(forward, "__func__", None) is not type(module).forward:
        raise UnsupportedModelError(
            f"pretrained: a compiled function is in place of the forward of {type(module).__name__}; pass the model "
            "uncompiled"
        )
    return forward is not None


def _compiled_forward(module: nn.Module) -> Any:
    """What was compiled where ``module.forward = torch.compile(module.forward)`` was said; None elsewhere."""
    return private.compiled_function(module.__dict__.get("forward"))


def _original(module: Any) -> Any:
    """The module in an ``OptimizedModule``; any other as it is."""
    while private.is_compiled_wrapper(module):
        inside = private.compiled_module(module)
        if any(private.hooks_of(module)):
            raise UnsupportedModelError(
                f"pretrained: hooks on the compiled {type(inside).__name__} would be lost; put them on the "
                "module that was compiled, and pass the model uncompiled"
            )
        module = inside
    return module


def base_of(model: Any) -> Any:
    """The causal LM inside a wrapper: what ``get_base_model`` gives, or the one that has all of the parameters."""
    unwrap = getattr(model, "get_base_model", None)  # PEFT's; its adapters stay in place
    if callable(unwrap):
        return unwrap()
    if not isinstance(model, PreTrainedModel):
        inner = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
        whole = {*map(id, model.parameters())}
        if inner is not None and inner.get_output_embeddings() is not None and {*map(id, inner.parameters())} == whole:
            return inner
    return model
