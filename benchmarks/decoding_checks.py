"""Checks while decoding: what they cost where they never stop, and what is left of an exit that they lead to.

The stopper is asked after every sixth block, from the whole head (``exact``) or screened by few rows of it
(``screen``); in the second setting it is asked six blocks and twelve blocks before half depth, and leaves there.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import LlamaForCausalLM

from benchmarks.decoding import identified, requests
from benchmarks.models import alternately, make_tokenizer, over
from lm_eval_adainfer.harness.model import AdaInferLM
from lm_eval_adainfer.strategies.rules import GapStopper

EVERY = 6


class AtBlock(GapStopper):
    """Reads the gap wherever it is asked, and stops at one block whatever it is."""

    def __init__(self, block: int):
        super().__init__()
        self.block = block

    def margin(self, block: int, values: Tensor, memory: Tensor | None = None) -> Tensor:
        """Positive from the block on."""
        return torch.zeros_like(values[:, 0]) + (1.0 if block >= self.block else -1.0)


def measure(model: LlamaForCausalLM, lengths: list[int], batch_sizes: list[int], repeats: int) -> Iterator[dict]:
    """A row of ratios for every prompt length and batch size; times are of whole calls, prefill included."""
    model.generation_config.eos_token_id = None
    half = model.config.num_hidden_layers // 2
    never = {"stopper": "gap:1", "check_layers": f"every:{EVERY}"}
    there = {"stopper": AtBlock(half), "check_layers": [k for k in (half - 2 * EVERY, half - EVERY, half) if k > 0]}
    for tokens in lengths:
        for batch in batch_sizes:
            new = 32 if batch == 1 else 16
            common = {"pretrained": model, "tokenizer": make_tokenizer(), "batch_size": batch, "max_length": 4096}
            asked = requests(batch, tokens, new)
            sides = {
                "hf": HFLM(**common),
                "none": AdaInferLM(**common),
                "exact": AdaInferLM(**common, **never),
                "shortlist": AdaInferLM(**common, **never, head_check="shortlist"),
                "screen": AdaInferLM(**common, **never, head_check="screen"),
                "half": AdaInferLM(**common, **there),
                "half, screen": AdaInferLM(**common, **there, head_check="screen"),
            }
            with identified(sides.values()):
                acts = {name: partial(lm.generate_until, asked, disable_tqdm=True) for name, lm in sides.items()}
                rounds = alternately(acts, repeats)
            yield {
                "prompt tokens": tokens,
                "batch size": batch,
                "new tokens": new,
                "stock hf / stopper=none": over(rounds, "hf", "none"),
                "stock hf / checks that never stop, exact": over(rounds, "hf", "exact"),
                "the same, shortlist": over(rounds, "hf", "shortlist"),
                "the same, screen": over(rounds, "hf", "screen"),
                "stock hf / exits at half depth, exact checks before": over(rounds, "hf", "half"),
                "the same, screen ": over(rounds, "hf", "half, screen"),
            }
