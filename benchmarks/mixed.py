"""Mixed exits in a batch: most tokens leave on the way, one in eight runs to the end, against ``stopper=none``.

An eighth leaves after a quarter of the blocks, half of them after half, a quarter after three quarters: at 59% of the
blocks on average. Texts are longer than their prompts, so that decoding is what is timed.
"""

from __future__ import annotations

from collections.abc import Iterator

from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import LlamaForCausalLM

from benchmarks.decoding import RandomExits, identified, requests
from benchmarks.models import alternately, make_tokenizer, over
from lm_eval_adainfer.harness.model import AdaInferLM

NEW = 64


class Mixed(RandomExits):
    """Leaves after every quarter of the blocks but the last with these chances, where it has not left before."""

    chances = (1 / 8, 4 / 7, 2 / 3)

    def __init__(self, every: int):
        super().__init__(0.0, every)

    def margin(self, block: int, values: Tensor, memory: Tensor | None = None) -> Tensor:
        """Positive with the chance of the block."""
        self.probability = self.chances[min(block // self.every, len(self.chances)) - 1]
        return super().margin(block, values, memory)


def measure(model: LlamaForCausalLM, lengths: list[int], batch_sizes: list[int], repeats: int) -> Iterator[dict]:
    """A row of ratios for every prompt length and batch size; times are of whole calls, prefill included."""
    model.generation_config.eos_token_id = None
    every = max(1, model.config.num_hidden_layers // 4)
    for tokens in lengths:
        for batch in batch_sizes:
            common = {"pretrained": model, "tokenizer": make_tokenizer(), "batch_size": batch, "max_length": 4096}
            asked = requests(batch, tokens, NEW)
            sides = {
                "hf": HFLM(**common),
                "none": AdaInferLM(**common),
                **{p: AdaInferLM(**common, stopper=Mixed(every), kv_policy=p) for p in ("recompute", "propagate")},
            }
            depth: list[float] = []

            def run(name: str, sides: dict = sides, asked: list = asked, depth: list = depth) -> None:
                lm = sides[name]
                if name in ("recompute", "propagate"):
                    lm.stopper.restart()
                answers = lm.generate_until(asked, disable_tqdm=True)
                if name == "recompute":
                    depth[:] = [answer.exit_record.exit_layer for answer in answers]

            with identified(sides.values()):
                rounds = alternately({name: lambda name=name: run(name) for name in sides}, repeats)
            yield {
                "prompt tokens": tokens,
                "batch size": batch,
                "new tokens": NEW,
                "mean block": sum(depth) / len(depth),
                "stock hf / stopper=none": over(rounds, "hf", "none"),
                "stopper=none / mixed exits, recompute": over(rounds, "none", "recompute"),
                "stopper=none / mixed exits, propagate": over(rounds, "none", "propagate"),
                "stock hf / mixed exits, recompute": over(rounds, "hf", "recompute"),
                "stock hf / mixed exits, propagate": over(rounds, "hf", "propagate"),
            }
