"""ShortGPT (arXiv 2403.03853): the blocks that change hidden states least are taken out, the same for every document.

    python -m benchmarks.peers.shortgpt --drop 8

Block Influence, 1 - E[cos(a block's input, its output)], is measured on prompts of training documents; the paper takes
books (PG19), and removes a quarter. What is left is evaluated by stock ``hf``. Nothing of this package is used for it.
"""

from __future__ import annotations

import torch

from benchmarks.peers import measuring
from benchmarks.peers.layerskip import Without


@torch.no_grad()
def influence(loaded: measuring.Loaded) -> list[float]:
    """A number per block."""
    blocks = loaded.model.model.layers
    total, tokens = [0.0] * len(blocks), 0

    def hook(k: int):
        def see(module: torch.nn.Module, given: tuple, kwargs: dict, out: torch.Tensor | tuple) -> None:
            before = given[0] if given else kwargs["hidden_states"]
            after = out if isinstance(out, torch.Tensor) else out[0]
            total[k] += torch.nn.functional.cosine_similarity(before, after, dim=-1).double().sum().item()

        return see

    hooks = [block.register_forward_hook(hook(k), with_kwargs=True) for k, block in enumerate(blocks)]
    try:
        for prompt in loaded.prompts:
            tokens += loaded.model(**loaded.tokenizer(prompt, return_tensors="pt"), use_cache=False).logits.shape[1]
    finally:
        for each in hooks:
            each.remove()
    return [1 - value / tokens for value in total]


class ShortGPT(Without):
    """Stock ``hf`` without the least influential blocks."""

    def __init__(self, loaded: measuring.Loaded, drop: int):
        found = influence(loaded)
        self.dropped = sorted(sorted(range(len(found)), key=found.__getitem__)[:drop])
        super().__init__([k for k in range(len(found)) if k not in self.dropped], **loaded.given)

    def said(self) -> str:
        return f"without blocks {', '.join(str(k + 1) for k in self.dropped)}"


if __name__ == "__main__":
    parser = measuring.parser("python -m benchmarks.peers.shortgpt", __doc__)
    parser.add_argument("--drop", type=int, default=8, help="how many blocks")
    options = parser.parse_args()
    measuring.main(f"ShortGPT, {options.drop} blocks less", lambda loaded: ShortGPT(loaded, options.drop), options)
