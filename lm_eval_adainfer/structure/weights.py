"""A module's weights, wherever they are and however they are stored."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lm_eval_adainfer.structure import private


def input_device(model: Any) -> torch.device:
    """Where token ids go: the device that the embeddings run on, also where they are offloaded."""
    embeddings = model.get_input_embeddings()
    if embeddings.weight.device.type != "meta":
        return embeddings.weight.device
    return torch.empty(0, device=getattr(private.offload_hook(embeddings), "execution_device", None)).device


@torch.no_grad()
def values_of(module: Any, name: str) -> Tensor | None:
    """A module's parameter, whole: read where it is offloaded, unpacked where it is quantised.

    None where there is no such parameter, or its values are not at hand.
    """
    value: Any = getattr(module, name, None)
    if isinstance(value, Tensor) and value.device.type == "meta":
        stored = getattr(private.offload_hook(module), "weights_map", None)
        value = None if stored is None else stored[name]
    if not isinstance(value, Tensor):
        return None
    value = value.detach()
    return value if type(value) is Tensor or isinstance(value, nn.Parameter) else value.dequantize()


@contextmanager
def kept_loaded(module: nn.Module) -> Iterator[None]:
    """Where accelerate offloads a module's weights: load them once for all calls inside, not once for each."""
    held: list[tuple[nn.Module, Any]] = []
    try:
        for part in module.modules():
            hook = private.offload_hook(part)
            if getattr(hook, "offload", False):
                hook.pre_forward(part)
                hook.offload = False
                held.append((part, hook))
        yield
    finally:
        for part, hook in held:
            hook.offload = True
            hook.post_forward(part, None)


def is_linear(module: nn.Module) -> bool:
    """A linear map: ``nn.Linear`` and its quantised subclasses, or GPT-2's ``Conv1D``."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def linear_size(module: Any) -> int:
    """Weights of a linear map."""
    if isinstance(module, nn.Linear):  # packed 4-bit weights have another shape than the map
        return module.in_features * module.out_features
    return module.weight.numel()


def _expert_count(config: Any) -> int | None:
    for name in ("num_local_experts", "num_experts", "n_routed_experts"):
        if value := getattr(config, name, None):
            return value
    return None


def _has_weights(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())
