"""Prefill: documents of choices, against stock ``hf`` and against models physically cut to the exit's depth.

Exits are scripted with ``fixed:k``, so that both sides run the same blocks.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import LlamaForCausalLM

from benchmarks.models import cut, make_tokenizer, ratio
from lm_eval_adainfer.model import AdaInferLM


def requests(documents: int, tokens: int) -> list[Instance]:
    """Documents of two one-token choices, all of one length."""
    rng = random.Random(0)
    found = []
    for doc in range(documents):
        context = " ".join(f"w{rng.randrange(1000)}" for _ in range(tokens))
        found += [Instance("loglikelihood", {}, (context, f" w{c}"), c, ("bench", doc, 1)) for c in (0, 1)]
    return found


def measure(model: LlamaForCausalLM, lengths: list[int], batch_sizes: list[int], repeats: int) -> Iterator[dict]:
    """A row of ratios for every prompt length and batch size."""
    half = model.config.num_hidden_layers // 2
    for tokens in lengths:
        for batch in batch_sizes:
            common = {"tokenizer": make_tokenizer(), "batch_size": batch, "max_length": 4096}
            asked = requests(max(2, 2 * batch), tokens)

            def timed(lm: HFLM, asked: list[Instance] = asked):
                return lambda: lm.loglikelihood(asked, disable_tqdm=True)

            stock = timed(HFLM(pretrained=model, **common))
            dense = timed(AdaInferLM(pretrained=model, **common))
            checks = timed(AdaInferLM(pretrained=model, stopper="gap:1", **common))  # a gap never exceeds 1
            early = timed(AdaInferLM(pretrained=model, stopper=f"fixed:{half}", **common))
            limit = timed(AdaInferLM(pretrained=cut(model, half), **common))
            row = (
                {
                    "prompt tokens": tokens,
                    "batch size": batch,
                    "stock hf / dense adainfer": ratio(stock, dense, repeats),
                    "stock hf / exit at half depth": ratio(stock, early, repeats),
                    "exit at half depth / model cut to half": ratio(early, limit, repeats),
                    "dense with a head check at every block / dense": ratio(checks, dense, repeats),
                }
            )
            print(json.dumps(row), flush=True)
            yield row
