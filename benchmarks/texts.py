"""Texts: whole ``generate_until`` runs that end by themselves, against stock ``hf``; answers compared one by one.

Two kinds of prompts: questions behind eight shots that all of them share, and questions alone. With ``--pretrained``
they are word problems in English, in float32 and with the model's own tokenizer, and texts end at a stop string. With
random weights they are random words, and texts end where one of many end tokens is drawn.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from benchmarks.models import alternately, make_tokenizer, over
from lm_eval_adainfer.harness.model import AdaInferLM
from lm_eval_adainfer.releases import request

WHAT = (
    "*measured* ratios of wall-clock times of whole `generate_until` runs, taken alternately; `same` *counts* the "
    "texts that equal those of stock `hf` at the same batch size"
)
DOCUMENTS, NEW = 64, 128
_NAMES = ("Tom", "Anna", "Ben", "Lea", "Sam", "Mia")
_THINGS = ("apples", "pears", "coins", "books", "cards", "stones", "shells", "cups", "pens")


def _problem(draw: random.Random) -> tuple[str, str]:
    """A question and its answer."""
    (who, other), what = draw.sample(_NAMES, 2), draw.choice(_THINGS)
    a, b, c = (draw.randrange(2, 60) for _ in range(3))
    question = (
        f"{who} has {a} {what} and buys {b} more at the market on Monday. On Tuesday {who} gives {c} of the {what} to "
        f"{other}, who already had some. How many {what} does {who} have in the end, if nothing is lost and nobody "
        "else gives any away?"
    )
    answer = f"{who} starts with {a} {what}. After buying {b} more there are {a}+{b}={a + b}. "
    return question, answer + f"Giving away {c} leaves {a + b}-{c}={a + b - c}. The answer is {a + b - c}."


def _english(shots: int) -> tuple[list[str], list[str]]:
    """Prompts, and where texts end."""
    draw = random.Random(0)
    start = "".join("Question: {}\nAnswer: {}\n\n".format(*_problem(draw)) for _ in range(shots))
    prompts = [f"{start}Question: {_problem(draw)[0]}\nAnswer:" for _ in range(DOCUMENTS)]
    return prompts, ["Question:", "\n\n"] if shots else ["."]


def _words(shots: int) -> tuple[list[str], list[str]]:
    draw = random.Random(0)

    def some(count: int) -> str:
        return " ".join(f"w{draw.randrange(1000)}" for _ in range(count))

    start = f"{some(950)} " if shots else ""
    return [start + some(draw.randint(40, 80)) for _ in range(DOCUMENTS)], []


def measure(
    model: Any, lengths: list[int], batch_sizes: list[int], repeats: int, tokenizer: Any = None
) -> Iterator[dict]:
    """A row for every kind of prompts and batch size; lengths are the prompts' own."""
    texts = _words if tokenizer is None else _english
    if tokenizer is None:
        ends = torch.randperm(model.config.vocab_size, generator=torch.Generator().manual_seed(1))
        model.generation_config.eos_token_id = ends[: model.config.vocab_size // 50].tolist()
    tokenizer = tokenizer or make_tokenizer()
    for shots in (8, 0):
        prompts, until = texts(shots)
        asked = [
            request("generate_until", {}, (prompt, {"until": until, "max_gen_toks": NEW}), n, "bench", n)
            for n, prompt in enumerate(prompts)
        ]
        for batch in batch_sizes:
            options = {"pretrained": model, "tokenizer": tokenizer, "batch_size": batch, "max_length": 2048}
            sides = {"hf": HFLM(**options), "none": AdaInferLM(stopper="none", **options)}
            sides["none"].generate_until(asked[:2], disable_tqdm=True)  # which finds out how the model is decoded
            answers: dict[str, list[str]] = {}
            before, runs = sides["none"].generated_tokens, []

            def run(
                name: str, sides: dict = sides, answers: dict = answers, asked: list = asked, runs: list = runs
            ) -> None:
                answers[name] = [str(text) for text in sides[name].generate_until(asked, disable_tqdm=True)]
                runs.append(name)

            rounds = alternately({name: lambda name=name: run(name) for name in sides}, repeats)
            # counted over all runs, which are alike: random words have more tokens than can be read back from texts
            new = (sides["none"].generated_tokens - before) / runs.count("none")
            yield {
                "prompts": "8 shots shared" if shots else "nothing shared",
                "documents": len(asked),
                "prompt tokens": max(len(tokenizer.encode(prompt)) for prompt in prompts),
                "new tokens, mean": round(new / len(asked), 1),
                "batch size": batch,
                "stock hf / stopper=none": over(rounds, "hf", "none"),
                "same": f"{sum(a == b for a, b in zip(answers['hf'], answers['none'], strict=True))} of {len(asked)}",
            }
