"""Prefill: documents of choices, against stock ``hf`` and against models physically cut to the exit's depth."""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import LlamaForCausalLM

from benchmarks.models import alternately, asking, cut, over
from lm_eval_adainfer.harness.model import AdaInferLM
from lm_eval_adainfer.releases import request
from lm_eval_adainfer.strategies.base import Stopper
from lm_eval_adainfer.structure.arguments import hidden_of

MOST_TOKENS = 4096  # of the documents of a call, unless a batch has more


class SpreadExits(Stopper):
    """Document n leaves after block ``exit(n)``, whatever it reads; the exits of any few are spread over all blocks."""

    kind = "spread"
    features = ("cos_hidden",)  # nothing that needs the head
    memory = 1  # the document's exit

    def __init__(self, n_blocks: int):
        self.n_blocks = n_blocks
        self.restart()

    def restart(self) -> None:
        """The next document is document 0."""
        self.documents = 0

    def exit(self, document: int) -> int:
        """1 to L."""
        return 1 + int(self.n_blocks * ((0.5 + document * 0.6180339887498949) % 1))

    def margin(self, block: int, values: Tensor, memory: Tensor | None = None) -> Tensor:
        """Positive at the document's block."""
        assert memory is not None
        if block == 1:
            exits = [self.exit(self.documents + n) for n in range(len(values))]
            memory[:, 0] = torch.tensor(exits, dtype=memory.dtype, device=memory.device)
            self.documents += len(values)
        return 0.5 - (memory[:, 0] - block).abs()


@torch.no_grad()
def run_needed(model: LlamaForCausalLM, ids: Tensor, exits: list[int]) -> None:
    """One batch ([B, S] ids): every block with just as many rows as need it, the head for those that leave."""
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    hidden = model.model.embed_tokens(ids)
    rotary = model.model.rotary_emb(hidden, positions)
    for k, block in enumerate(model.model.layers[: max(exits)], 1):
        rows, leaving = sum(e >= k for e in exits), exits.count(k)
        hidden = hidden_of(block(hidden[:rows], position_ids=positions, position_embeddings=rotary))
        if leaving:
            model.lm_head(model.model.norm(hidden[:leaving, -1]))


def requests(documents: int, tokens: int) -> list[Instance]:
    """Documents of two one-token choices, all of one length, that share nothing."""
    rng = random.Random(0)
    found = []
    for doc in range(documents):
        context = " ".join(f"w{rng.randrange(1000)}" for _ in range(tokens))
        found += [request("loglikelihood", {}, (context, f" w{c}"), c, "bench", doc) for c in (0, 1)]
    return found


def measure(model: LlamaForCausalLM, lengths: list[int], batch_sizes: list[int], repeats: int) -> Iterator[dict]:
    """A row of ratios for every prompt length and batch size; several batches of documents per call, where they fit."""
    n_blocks = model.config.num_hidden_layers
    half = n_blocks // 2
    for tokens in lengths:
        for batch in batch_sizes:
            documents = max(batch, min(64, MOST_TOKENS // tokens))
            ask = asking(requests(documents, tokens), batch)
            spread = SpreadExits(n_blocks)
            exits = [spread.exit(n) for n in range(documents)]
            ids = torch.ones(batch, tokens, dtype=torch.long, device=model.device)
            mixed = ask(AdaInferLM, model, stopper=spread)

            def spread_exits(spread: SpreadExits = spread, mixed=mixed) -> None:
                spread.restart()
                mixed()

            def needed(ids: Tensor = ids, exits: list[int] = exits, batch: int = batch) -> None:
                for start in range(0, len(exits), batch):
                    run_needed(model, ids, exits[start : start + batch])

            sides = {
                "stock": ask(HFLM, model),
                "half": ask(AdaInferLM, model, stopper=f"fixed:{half}"),
                "cut": ask(AdaInferLM, cut(model, half)),
                "stock cut": ask(HFLM, cut(model, half)),
                "spread": spread_exits,
                "needed": needed,
                "checks": ask(AdaInferLM, model, stopper="gap:1"),  # a gap never exceeds 1
                "none": ask(AdaInferLM, model),
                "whole": ask(AdaInferLM, model, prefix_cache=0),
            }
            found = alternately(sides, repeats)
            yield {
                "prompt tokens": tokens,
                "batch size": batch,
                "documents": documents,
                "stock hf / stopper=none": over(found, "stock", "none"),
                "stock hf / exit at half depth": over(found, "stock", "half"),
                "exit at half depth / model cut to half": over(found, "half", "cut"),
                "stock hf cut to half / exit at half depth": over(found, "stock cut", "half"),
                "spread exits / their blocks and heads alone": over(found, "spread", "needed"),
                "a head check at every block, stopper=gap:1 / stopper=none": over(found, "checks", "none"),
                "nothing to share: prefix_cache=4096 / 0": over(found, "none", "whole"),
            }
