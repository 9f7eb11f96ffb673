"""Greedy decoding with a strategy, and slow references that replay the exits it recorded."""

from __future__ import annotations

import dataclasses
import random
from functools import cache

import torch

from helpers.models import make_model
from helpers.reference import logits_after_block
from lm_eval_adainfer.generation.decoder import Decoder
from lm_eval_adainfer.generation.loop import Generator
from lm_eval_adainfer.generation.probes import prepare
from lm_eval_adainfer.strategies.base import Schedule
from lm_eval_adainfer.structure.anatomy import Anatomy


@cache
def prepared(family, **overrides):
    """(model, its anatomy, how it is decoded), made once a family."""
    model = make_model(family, **overrides)
    if (bias := getattr(model.get_output_embeddings(), "bias", None)) is not None:  # zeros say nothing
        torch.nn.init.normal_(bias)
    anatomy = Anatomy(model)
    return model, anatomy, prepare(anatomy)


def prompts_of(rows, seed=0, shortest=3, longest=9):
    rng = random.Random(seed)
    return [[rng.randrange(1, 101) for _ in range(rng.randint(shortest, longest))] for _ in range(rows)]


def finishes_in_turn(step, row):
    return row > 0 and step == 3 + row % 4


def never(step, row):
    return False


def decode_greedily(anatomy, windows, stopper, prompts, steps, finishes=never, layout=None, **options):
    """Decode; returns (the decoder, per row and new token its float32 logits)."""
    windows = dataclasses.replace(windows, layout=layout or windows.layout)
    schedule = Schedule(anatomy.n_blocks, stopper, check_layers=options.pop("check_layers", "all"))
    decoder = Decoder(anatomy, stopper, schedule, windows, prompts, steps + 1, **options)
    logits = [[] for _ in prompts]
    with decoder.attached():
        for step in range(steps):
            found, active = decoder.step(), list(decoder.rows)
            for row, x in zip(active, found, strict=True):
                logits[row].append(x)
            decoder.append(found.argmax(-1).tolist(), [finishes(step, row) for row in active])
    return decoder, logits


def assert_exact(model, decoder, prompts, logits):
    """Every token is the argmax, and its logits are those, of its whole prefix after its block, without a cache."""
    for prompt, result, row in zip(prompts, decoder.results, logits, strict=True):
        for n, (layer, found) in enumerate(zip(result.layers, row, strict=True)):
            expected = logits_after_block(model, decoder.anatomy.blocks, [*prompt, *result.tokens[:n]], layer)[-1]
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
            assert result.tokens[n] == expected.argmax().item()


def generated(lm, requests, monkeypatch):
    """(what was decoded, prompt tokens) of every request; the texts themselves can't be turned into tokens again."""
    found, run = {}, Generator.run

    def noting(self, asked, *args):
        for n, row in run(self, asked, *args):
            found[n] = row, list(asked[n].prompt)
            yield n, row

    with monkeypatch.context() as patch:
        patch.setattr(Generator, "run", noting)
        lm.generate_until(requests, True)
    return [found[n] for n in range(len(requests))]


def logits_with_states_copied(model, blocks, ids, copied, k):
    """[V] logits after block k at the last position, where positions that left early keep their state.

    One dense forward without a cache: in front of block j, the hidden state of every position p with
    ``copied[p] < j`` is put back to what block ``copied[p]`` made of it.
    """
    outputs, handles = {}, []

    def before(j):
        def hook(module, args, kwargs):
            hidden = (args[0] if args else kwargs["hidden_states"]).clone()
            for position, left in copied.items():
                if left < j <= k:
                    hidden[:, position] = outputs[left][:, position]
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

        return hook

    def after(j):
        def hook(module, args, kwargs, out):
            if j > k:  # the head reads block k's output
                hidden = args[0] if args else kwargs["hidden_states"]
                return hidden if isinstance(out, torch.Tensor) else (hidden, *out[1:])
            outputs[j] = (out if isinstance(out, torch.Tensor) else out[0]).clone()
            return None

        return hook

    for j, block in enumerate(blocks, start=1):
        handles.append(block.register_forward_pre_hook(before(j), with_kwargs=True))
        handles.append(block.register_forward_hook(after(j), with_kwargs=True))
    try:
        with torch.no_grad():
            return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
    finally:
        for handle in handles:
            handle.remove()
