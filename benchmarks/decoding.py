"""Decoding: tokens per second of ``generate_until`` against stock ``hf``, cut models, and what exits allow at best."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

from benchmarks.models import cut, make_tokenizer, ratio, seconds, summary
from lm_eval_adainfer.generation.step import Step
from lm_eval_adainfer.harness.model import AdaInferLM
from lm_eval_adainfer.releases import request
from lm_eval_adainfer.strategies.base import Stopper
from lm_eval_adainfer.structure.anatomy import Anatomy


class RandomExits(Stopper):
    """Leaves after every fourth of the blocks with a probability of its own, whatever it reads."""

    kind = "random"
    features = ("cos_hidden",)

    def __init__(self, probability: float, every: int):
        self.probability, self.every = probability, every
        self.restart()

    def restart(self) -> None:
        """The same exits again."""
        self.generator = torch.Generator().manual_seed(0)

    def wants(self, block: int) -> bool:
        """Every fourth block, or so."""
        return block % self.every == 0

    def margin(self, block: int, values: Tensor, memory: Tensor | None = None) -> Tensor:
        """Positive with the probability."""
        return (self.probability - torch.rand(len(values), generator=self.generator)).to(values.device)


def requests(rows: int, tokens: int, new: int) -> list[Instance]:
    """Prompts of one length, and so many new tokens each."""
    rng = random.Random(0)
    found = []
    for doc in range(rows):
        context = " ".join(f"w{rng.randrange(1000)}" for _ in range(tokens))
        found.append(request("generate_until", {}, (context, {"until": [], "max_gen_toks": new}), 0, "bench", doc))
    return found


@torch.no_grad()
def block_seconds(model: LlamaForCausalLM, keys: int, most: int, repeats: int) -> dict[int, float]:
    """Seconds of one block with n rows of one token after ``keys`` cached ones, n a power of two."""
    found, n, anatomy = {}, 1, Anatomy(model)
    while True:
        times = []
        for _ in range(repeats + 1):
            cache = DynamicCache()
            ids = torch.ones(n, keys, dtype=torch.long, device=model.device)
            model.model(input_ids=ids, **anatomy.with_cache(cache))
            times.append(
                seconds(lambda n=n, cache=cache: model.model(
                    input_ids=torch.ones(n, 1, dtype=torch.long, device=model.device), **anatomy.with_cache(cache),
                ))
            )  # fmt: skip
        found[n] = min(times) / model.config.num_hidden_layers
        if n >= most:
            return found
        n *= 2


def interpolated(known: dict[int, float], n: int) -> float:
    """Between powers of two, linearly; beyond them a block's time is proportional."""
    if n in known:
        return known[n]
    if n > max(known):
        return known[max(known)] * n / max(known)
    low = max(k for k in known if k < n)
    high = min(k for k in known if k > n)
    return known[low] + (known[high] - known[low]) * (n - low) / (high - low)


@torch.no_grad()
def allowed(model: LlamaForCausalLM, lm: AdaInferLM, asked: list[Instance], keys: int, repeats: int) -> float:
    """Seconds of the decoding steps if every block took what it takes with just the rows (and fills) that need it.

    Prompts are left out of the count, and the head is asked once for every token.
    """
    lm.generate_until(asked[:1], disable_tqdm=True)  # which finds out how the model is decoded
    calls: Counter[int] = Counter()  # tokens in a block call -> how often
    original = Step.post_hook
    if isinstance(lm.stopper, RandomExits):
        lm.stopper.restart()

    def noted(self: Step, k: int, output: object) -> object:
        if self.tokens is not None and k >= self.first:
            calls[self.tokens.n] += 1
        return original(self, k, output)

    Step.post_hook = noted  # type: ignore[method-assign]
    try:
        lm.generate_until(asked, disable_tqdm=True)
    finally:
        Step.post_hook = original  # type: ignore[method-assign]
    one = block_seconds(model, keys, min(64, max(calls)), repeats)
    rows, new = len(asked), asked[0].args[1]["max_gen_toks"]
    hidden = torch.zeros(rows, model.config.hidden_size, dtype=model.dtype, device=model.device)
    head = min(seconds(lambda: model.lm_head(hidden)) for _ in range(repeats + 1))
    return sum(interpolated(one, n) * count for n, count in calls.items()) + head * (new - 1)


@contextmanager
def identified(models: Iterable[HFLM]) -> Iterator[None]:
    """Derive what identifies each of our models once for all its calls, as in a run."""
    with ExitStack() as stack:
        for lm in models:
            if isinstance(lm, AdaInferLM):
                stack.enter_context(lm.identified())
        yield


def measure(model: LlamaForCausalLM, lengths: list[int], batch_sizes: list[int], repeats: int) -> Iterator[dict]:
    """A row of ratios for every prompt length and batch size; times are of whole calls, prefill included."""
    model.generation_config.eos_token_id = None
    n_blocks = model.config.num_hidden_layers
    half, every = n_blocks // 2, max(1, n_blocks // 4)
    for tokens in lengths:
        for batch in batch_sizes:
            new = 32 if batch == 1 else 16
            stack = ExitStack()
            common = {"tokenizer": make_tokenizer(), "batch_size": batch, "max_length": 4096}
            asked = requests(batch, tokens, new)

            def timed(lm: HFLM, asked: list[Instance] = asked, stack: ExitStack = stack):
                def act() -> None:
                    if isinstance(lm, AdaInferLM) and isinstance(lm.stopper, RandomExits):
                        lm.stopper.restart()
                    lm.generate_until(asked, disable_tqdm=True)

                stack.enter_context(identified([lm]))
                return act

            def ours(common: dict = common, **arguments: object) -> AdaInferLM:
                return AdaInferLM(pretrained=model, **common, **arguments)

            stock, limit = timed(HFLM(pretrained=model, **common)), timed(HFLM(pretrained=cut(model, half), **common))
            early = timed(ours(stopper=f"fixed:{half}"))
            never = {"stopper": "gap:1", "check_layers": f"every:{every}"}
            mixed = ours(stopper=RandomExits(0.4, every))
            first = timed(mixed, requests(batch, tokens, 1))
            best = []
            for _ in range(repeats):
                limit_seconds = allowed(model, mixed, asked, tokens + new // 2, 2)
                whole, prefill = seconds(timed(mixed)), seconds(first)
                best.append(limit_seconds / (whole - prefill))
            mean = sum(n for r in mixed.generate_until(asked, disable_tqdm=True) for n in r.exit_record.layers)
            row = (
                {
                    "prompt tokens": tokens,
                    "batch size": batch,
                    "new tokens": new,
                    "stopper=none / stock hf": ratio(timed(ours()), stock, repeats),
                    "stock hf / exit at half depth": ratio(stock, early, repeats),
                    "speed of exit at half depth / stock hf cut to half": ratio(limit, early, repeats),
                    "mixed exits, mean block": mean / (batch * new),
                    "stock hf / mixed exits": ratio(stock, timed(mixed), repeats),
                    "speed of mixed exits / what the block counts allow": summary(best),
                    "mixed exits: recompute / propagate": ratio(
                        timed(mixed), timed(ours(stopper=RandomExits(0.4, every), kv_policy="propagate")), repeats
                    ),
                    "checks at every fourth that never stop, exact / stock hf": ratio(
                        timed(ours(**never)), stock, repeats
                    ),
                    "the same, shortlist / stock hf": ratio(
                        timed(ours(**never, head_check="shortlist")), stock, repeats
                    ),
                }
            )
            stack.close()
            yield row
