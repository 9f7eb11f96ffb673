"""What documents and choices have in common: fixed few-shot examples, and choices of many tokens after one context.

Prompt lengths and batch sizes are those of ``CASES``; ``--lengths`` and ``--batch_sizes`` don't apply.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import LlamaForCausalLM

from benchmarks.models import alternately, asking, over
from lm_eval_adainfer.harness.model import AdaInferLM
from lm_eval_adainfer.releases import request


@dataclass(frozen=True)
class Case:
    """Documents: tokens that all of a task's have in common, their own, choices and their tokens."""

    name: str
    shared: int
    own: int
    choices: int
    choice_tokens: int
    documents: int
    batch_size: int
    tasks: int = 1


CASES = [
    Case("few-shot, letters", 600, 120, 4, 1, 8, 8),
    Case("few-shot, letters", 600, 120, 4, 1, 40, 8),
    Case("long choices", 0, 100, 4, 20, 32, 8),
    Case("long choices", 0, 100, 4, 20, 32, 1),
    Case("few-shot, long choices", 600, 100, 4, 20, 8, 8),
    Case("two tasks in turn, few-shot, letters", 600, 120, 4, 1, 16, 8, tasks=2),
]


def requests(case: Case) -> list[Instance]:
    """The documents' requests; those of several tasks in turn."""
    rng = random.Random(0)

    def text(tokens: int) -> list[str]:
        return [f"w{rng.randrange(1000)}" for _ in range(tokens)]

    beginnings = [text(case.shared) for _ in range(case.tasks)]
    found = []
    for doc in range(case.documents):
        task = doc % case.tasks
        context = " ".join([*beginnings[task], *text(case.own)])
        for n in range(case.choices):
            choice = " " + " ".join([f"w{n}", *text(case.choice_tokens - 1)])
            found.append(request("loglikelihood", {}, (context, choice), n, f"bench {task}", doc))
    return found


def measure(model: LlamaForCausalLM, lengths: list[int], batch_sizes: list[int], repeats: int) -> Iterator[dict]:
    """A row per case."""
    half = model.config.num_hidden_layers // 2
    for case in CASES:
        ask = asking(requests(case), case.batch_size)
        answers: dict[str, list] = {}
        sides = {
            "stock": ask(HFLM, model, keep=answers.setdefault("stock", [])),
            "none": ask(AdaInferLM, model, keep=answers.setdefault("none", [])),
            "whole": ask(AdaInferLM, model, prefix_cache=0),
            "half": ask(AdaInferLM, model, stopper=f"fixed:{half}"),
        }
        found = alternately(sides, repeats)
        differences = [abs(a[0] - b[0]) for a, b in zip(answers["stock"], answers["none"], strict=True)]
        yield {
            "prompts": case.name,
            "shared tokens": case.shared,
            "own tokens": case.own,
            "choices x tokens": f"{case.choices} x {case.choice_tokens}",
            "documents": case.documents,
            "batch size": case.batch_size,
            "stock hf / stopper=none": over(found, "stock", "none"),
            "stock hf / exit at half depth": over(found, "stock", "half"),
            "prefix_cache=0 / default": over(found, "whole", "none"),
            "largest difference of a logprob from stock hf's": max(differences),
        }
