"""What a model really ran, whoever called it: tokens through its blocks by hooks, operations by torch's own counter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


@dataclass
class Counted:
    """What ran under :func:`counting`.

    Attributes:
        block_tokens: Tokens that a block's feed-forward part was given, summed over blocks; padding is run, so it
            counts. The feed-forward part stands for the block: who gives a block some of the tokens, or calls its parts
            one by one, is counted by the tokens that went all the way through.
        operations: Of all matrix products and attentions, head and checks included: two for a multiplication and an
            addition, by ``torch.utils.flop_counter``.
    """

    block_tokens: int = 0
    operations: int = 0


def cpu_attention(q: tuple, k: tuple, v: tuple, *_: Any, **__: Any) -> int:
    """Operations of torch's attention on a CPU, which its counter leaves out; whole squares, as it counts others."""
    batch, heads, queries, width = q
    return 2 * batch * heads * queries * k[-2] * (width + v[-1])


@contextmanager
def counting(model: Any) -> Iterator[Counted]:
    """Count what runs of a model whose blocks are ``model.model.layers``, Llama's names."""
    found = Counted()

    def seen(module: torch.nn.Module, given: tuple) -> None:
        found.block_tokens += given[0].shape[:-1].numel()

    hooks = [block.mlp.register_forward_pre_hook(seen) for block in model.model.layers]
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    try:
        with FlopCounterMode(display=False, custom_mapping={attention: cpu_attention}) as counter:
            yield found
        found.operations = counter.get_total_flops()
    finally:
        for hook in hooks:
            hook.remove()
