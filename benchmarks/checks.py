"""What it costs to ask after every block, where a call has many documents: most checks are made for 64 rows at once."""

from __future__ import annotations

from collections.abc import Iterator

from transformers import LlamaForCausalLM

from benchmarks.models import alternately, asking, over
from benchmarks.prefill import requests
from lm_eval_adainfer.harness.model import AdaInferLM

DOCUMENTS = 64


def measure(model: LlamaForCausalLM, lengths: list[int], batch_sizes: list[int], repeats: int) -> Iterator[dict]:
    """A row for every prompt length and batch size."""
    for tokens in lengths:
        for batch in batch_sizes:
            ask = asking(requests(DOCUMENTS, tokens), batch)
            sides = {"none": ask(AdaInferLM, model), "checks": ask(AdaInferLM, model, stopper="gap:1")}
            found = alternately(sides, repeats)
            yield {
                "prompt tokens": tokens,
                "batch size": batch,
                "documents": DOCUMENTS,
                "a head check at every block, stopper=gap:1 / stopper=none": over(found, "checks", "none"),
            }
