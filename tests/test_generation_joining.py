"""Rows that join while others are decoded, and prompts with a common beginning, against whole prefixes run alone."""

from __future__ import annotations

import dataclasses
import gc
import random
import weakref
from collections import Counter

import pytest
import torch
from helpers.models import FAMILIES, PADDED, lm_of, make_model
from helpers.reference import logits_after_block
from helpers.replay import generated, prepared
from helpers.stoppers import Dice, Scripted
from helpers.tasks import instance

from lm_eval_adainfer.generation.decoder import SLACK, Decoder
from lm_eval_adainfer.prefill.forward import Forward
from lm_eval_adainfer.prefill.prefixes import Prefix
from lm_eval_adainfer.prefill.probes import sharing
from lm_eval_adainfer.strategies.base import Schedule

WITH_CACHE = [family for family in FAMILIES if family != "mamba"]


def decode_in_turn(anatomy, windows, stopper, queues, rule, places, longest, lengths, **options):
    """Decode prompts that join where others are finished; returns (the decoder, per row its logits, its prompt).

    Args:
        queues: (own ends of prompts, their common beginning) pairs.
        lengths: Per row, how many tokens it gets.
    """
    decoder = Decoder(anatomy, stopper, Schedule(anatomy.n_blocks, stopper), windows, [], longest, places, **options)
    waiting = [(own, start, Prefix(anatomy, [start], rule) if start else None) for own, start in queues]
    logits, prompts = [], []
    with decoder.attached():
        while waiting or decoder.state.rows:
            if waiting and decoder.state.free:
                own, start, prefix = waiting[0]
                joining, own[:] = own[: decoder.state.free], own[decoder.state.free :]
                if not own:
                    waiting.pop(0)
                prompts += [[*start, *end] for end in joining]
                logits += [[] for _ in joining]
                assert decoder.join([[*start, *end] for end in joining], prefix) == list(range(len(prompts)))[-len(joining):]
            found, rows = decoder.step(), decoder.rows
            done = []
            for row, x in zip(rows, found, strict=True):
                logits[row].append(x)
                done.append(len(logits[row]) == lengths[row])
            decoder.append(found.argmax(-1).tolist(), done)
    return decoder, logits, prompts


def assert_alone(model, decoder, prompts, logits):
    """Every logit is that of its whole prefix after its block, without a cache."""
    for prompt, result, row in zip(prompts, decoder.results, logits, strict=True):
        for n, (layer, found) in enumerate(zip(result.layers, row, strict=True)):
            expected = logits_after_block(model, decoder.anatomy.blocks, [*prompt, *result.tokens[:n]], layer)[-1]
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def some(draw, count, shortest, longest):
    return [[draw.randrange(1, 101) for _ in range(draw.randint(shortest, longest))] for _ in range(count)]


@pytest.mark.parametrize("family", WITH_CACHE)
def test_rows_that_join_behind_common_beginnings(family):
    """Prompts of one token of their own, rows that move to another place, beginnings that deep blocks lack at first."""
    model, anatomy, windows = prepared(family)
    rule = sharing(anatomy).rule
    for layout in ["padded"] if family in PADDED else ["packed", "padded"]:
        draw = random.Random(4)
        queues = [(some(draw, 5, 1, 6), some(draw, 1, 7, 7)[0]), (some(draw, 3, 2, 9), []), (some(draw, 2, 1, 3), [5, 6, 7])]
        lengths = [3, 1, 5, 2, 6, 4, 4, 2, 3, 5]
        found, logits, prompts = decode_in_turn(
            anatomy, dataclasses.replace(windows, layout=layout), Dice(seed=2), queues, rule, 3, 24, lengths
        )
        assert [len(result.tokens) for result in found.results] == lengths
        assert_alone(model, found, prompts, logits)
        assert len({layer for result in found.results for layer in result.layers}) >= 3


@pytest.mark.parametrize("policy", ["recompute", "propagate"])
def test_what_is_counted_is_what_a_row_alone_needs(policy):
    """Beginnings that were run once count for every row; places and neighbours do not count."""
    _, anatomy, windows = prepared("llama")
    rule, draw = sharing(anatomy).rule, random.Random(1)
    start, own = some(draw, 1, 9, 9)[0], some(draw, 5, 1, 5)
    lengths = [4, 2, 6, 3, 5]
    queues = [(list(own), start)]
    shared, _, prompts = decode_in_turn(anatomy, windows, Scripted(), queues, rule, 2, 24, lengths, kv_policy=policy)
    for prompt, length, result in zip(prompts, lengths, shared.results, strict=True):
        queues = [([prompt], [])]
        alone, _, _ = decode_in_turn(anatomy, windows, Scripted(), queues, rule, 1, 24, [length], kv_policy=policy)
        assert result == alone.results[0]
    assert shared.state.copied == len(start) * sum(max(result.layers) for result in shared.results)
    assert len({max(result.layers) for result in shared.results}) > 1


def test_slots_are_reused_when_they_run_out():
    """Many short texts one after the other need no more slots than the longest row, and some of slack."""
    model, anatomy, windows = prepared("gpt2")
    draw = random.Random(0)
    own = some(draw, 120, 1, 8)
    lengths = [draw.randint(1, 6) for _ in own]
    found, logits, prompts = decode_in_turn(anatomy, windows, Dice(seed=5), [(own, [])], None, 3, 14, lengths)
    assert found.state.capacity == 14 + SLACK < sum(lengths) / 3 + 8
    assert_alone(model, found, prompts, logits)


def test_a_longer_prompt_moves_the_others():
    model, anatomy, windows = prepared("llama")
    queues = [([[4, 5], [6, 7, 8]], []), ([list(range(1, 13))], [])]
    found, logits, prompts = decode_in_turn(anatomy, windows, Dice(seed=1), queues, None, 2, 20, [2, 6, 4])
    assert_alone(model, found, prompts, logits)


# ------------------------------------------------------------------------------------------------ through lm-eval


def questions(until, new, shared="", n=9, seed=0):
    draw = random.Random(seed)
    texts = [shared + "".join(draw.choice("abcdef ") for _ in range(draw.randint(1, 12))) + "q" for _ in range(n)]
    return [instance(t, {"until": until, "max_gen_toks": new}, i, kind="generate_until") for i, t in enumerate(texts)]


def mixed():
    """Requests of several kinds, some of them twice."""
    sampled = questions([], 9, "some words that all have ", seed=2)
    for one in sampled[::2]:
        one.args[1].update(do_sample=True, temperature=1.3)
    penalised = questions(["e"], 6, seed=3)
    for one in penalised:
        one.args[1]["repetition_penalty"] = 1.7
    again = questions([], 9, "some words that all have ", seed=2)[::2]
    for one in again:
        one.args[1].update(do_sample=True, temperature=1.3)
    return [*questions(["a"], 12, "some words that all have "), *sampled, *penalised, *again, *questions([], 3, seed=5)]


@pytest.mark.parametrize("stopper", ["none", "gap:0.02"])
def test_a_text_depends_on_no_neighbour(tokenizer, monkeypatch, stopper):
    """Kinds of gen_kwargs, common beginnings, samples and penalties, in batches of any size; equal to stock's greedy."""
    model = make_model("llama", vocab_size=257, max_position_embeddings=512)
    found = {}
    for size in (1, 4, 16):
        for share in (0, 4096):
            lm = lm_of(model, tokenizer, stopper=stopper, batch_size=size, prefix_cache=share)
            torch.manual_seed(0)
            rows = generated(lm, mixed(), monkeypatch)
            found[size, share] = [row.tokens for row, _ in rows], [row.layers for row, _ in rows]
            assert lm.engine.block_tokens <= sum(row.executed for row, _ in rows)
            assert (lm.engine.block_tokens == sum(row.executed for row, _ in rows)) == (not share)
    first = found.pop((1, 0))
    assert all(other == first for other in found.values())


def test_samples_of_one_request_are_told_apart_whatever_the_batch(tokenizer):
    """A prompt that is sampled twelve times: the n-th request has the n-th sample, whichever is finished first."""
    model = make_model("llama", vocab_size=257, max_position_embeddings=512)
    model.generation_config.eos_token_id = None
    options = {"until": list("abcdefghijklmnopqrstuvwxyz"), "max_gen_toks": 25, "do_sample": True, "temperature": 2.0}
    requests = [instance("some words", dict(options), n, kind="generate_until") for n in range(12)]
    found = []
    for size in (1, 5, 12):
        lm = lm_of(model, tokenizer, stopper="gap:0.02", batch_size=size)
        torch.manual_seed(0)
        found.append([(str(answer), answer.exit_record.layers) for answer in lm.generate_until(requests, True)])
    assert found[1:] == found[:1] * 2
    assert len({len(layers) for _, layers in found[0]}) > 3


def test_what_prompts_share_is_run_once(tokenizer, monkeypatch):
    """Tokens that blocks really run before the first new token: the beginning once, of each prompt what follows it."""
    model = make_model("llama", vocab_size=257, max_position_embeddings=512)
    lm = lm_of(model, tokenizer, stopper="none", batch_size=2, max_length=400)
    requests = [instance("x" * 100 + end, {"until": [], "max_gen_toks": 2}, n, kind="generate_until")
                for n, end in enumerate(["ab", "cd", "ef", "gh"])]  # fmt: skip
    lm.generate_until(requests, True)  # which finds out how the model can be decoded
    ran, advance = Counter(), Forward.advance

    def counting(self):
        state = advance(self)
        ran[state.block] += state.hidden.shape[0] * state.hidden.shape[1]
        return state

    monkeypatch.setattr(Forward, "advance", counting)
    rows = generated(lm, requests, monkeypatch)
    together = len(rows[0][1]) + 3 * 2
    assert len({len(prompt) for _, prompt in rows}) == 1
    assert ran == dict.fromkeys(range(1, lm.n_blocks + 1), together)


@pytest.mark.parametrize("options", [{"reader": "head"}, {"reader": "copy:2"}, {"reader": "sim:2"}], ids=str)
def test_a_beginning_goes_with_the_last_text_behind_it(options, tokenizer, monkeypatch):
    """Six beginnings of three prompts each, two at a time: keys and values are held for two beginnings at most."""
    model = make_model("llama", vocab_size=257, max_position_embeddings=512)
    lm = lm_of(model, tokenizer, stopper="fixed:3", batch_size=2, max_length=200, **options)
    requests = [
        instance(start * 30 + end, {"until": [], "max_gen_toks": 4}, n, kind="generate_until")
        for n, (start, end) in enumerate((start, end) for start in "abcdef" for end in ("x", "yx", "zyx"))
    ]
    alive, held, begin, append = weakref.WeakSet(), [], Prefix.__init__, Decoder.append

    def beginning(self, *args, **given):
        begin(self, *args, **given)
        alive.add(self)

    def counting(self, *args):
        held.append(sum(bool(prefix.stored) for prefix in alive))
        append(self, *args)

    lm.generate_until(requests, True)  # which finds out how the model can be decoded
    ran = lm.engine.block_tokens
    with monkeypatch.context() as patch:
        patch.setattr(Prefix, "__init__", beginning)
        patch.setattr(Decoder, "append", counting)
        gc.disable()
        try:
            lm.generate_until(requests, True)
        finally:
            gc.enable()
    assert max(held) == 2
    assert lm.engine.block_tokens == 2 * ran


def test_a_finished_text_makes_room_at_once(tokenizer, monkeypatch):
    """One long text and eleven short ones, two at a time: the short ones take turns beside the long one."""
    model = make_model("llama", vocab_size=257, max_position_embeddings=512)
    model.generation_config.eos_token_id = None
    lm = lm_of(model, tokenizer, stopper="none", batch_size=2, max_length=200, prefix_cache=0)
    requests = [
        instance("ab" + "c" * (20 - n), {"until": [], "max_gen_toks": 45 if n == 0 else 5}, n, kind="generate_until")
        for n in range(12)
    ]
    lm.generate_until(requests[:1], True)
    steps, step = Counter(), Decoder.step

    def counting(self):
        rows = len(self.rows)
        steps["joins" if self.state.joined else "decodes", rows] += 1
        return step(self)

    monkeypatch.setattr(Decoder, "step", counting)
    rows = generated(lm, requests, monkeypatch)
    lengths = [len(row.tokens) for row, _ in rows]
    assert lengths == [45] + [5] * 11
    # the long text's 44 steps after its first token, 4 of each of the short ones beside it
    assert steps == {("joins", 2): 1, ("joins", 1): 10, ("decodes", 2): 44}
