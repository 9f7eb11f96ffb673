"""Early-exit decoding against a reference that runs the whole prefix of every token, without a cache."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from helpers.models import FAMILIES, make_model
from helpers.reference import gap_after_block, logits_after_block
from helpers.stoppers import Scripted
from helpers.tasks import instance
from lm_eval.models.huggingface import HFLM

from lm_eval_adainfer.errors import AdaInferError, UnsupportedModelError
from lm_eval_adainfer.generation.decoder import Decoder
from lm_eval_adainfer.generation.probes import _Script, prepare
from lm_eval_adainfer.harness.model import AdaInferLM
from lm_eval_adainfer.strategies.base import Schedule
from lm_eval_adainfer.strategies.rules import NoStopper
from lm_eval_adainfer.strategies.specs import parse
from lm_eval_adainfer.structure.anatomy import Anatomy
from lm_eval_adainfer.structure.windows import watch_windows

WITH_CACHE = [family for family in FAMILIES if family != "mamba"]
STEPS = 9


def decoder_of(model, stopper, prompts, **schedule):
    anatomy = Anatomy(model)
    return Decoder(
        anatomy, stopper, Schedule(anatomy.n_blocks, stopper, **schedule), prepare(anatomy), prompts, STEPS + 1
    )


def prompts_of(rows, seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(1, 101) for _ in range(rng.randint(3, 9))] for _ in range(rows)]


@pytest.mark.parametrize("family", WITH_CACHE)
@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("stopper", [Scripted(), parse("fixed:2"), NoStopper()], ids=lambda s: s.kind)
def test_every_logit_is_that_of_the_whole_prefix_without_a_cache(family, rows, stopper):
    """Rows of different lengths; some finish early and leave the batch."""
    model = make_model(family)
    prompts = prompts_of(rows, seed=rows)
    decoder = decoder_of(model, stopper, prompts)
    texts = [list(p) for p in prompts]
    for step in range(STEPS):
        active = list(decoder.rows)
        logits = decoder.step()
        chosen = logits.argmax(-1).tolist()
        for n, row in enumerate(active):
            layer = decoder.results[row].layers[-1]
            expected = logits_after_block(model, decoder.anatomy.blocks, texts[row], layer)[-1]
            torch.testing.assert_close(logits[n], expected, atol=1e-4, rtol=0)
            assert chosen[n] == expected.argmax().item()
            texts[row].append(chosen[n])
        decoder.append(chosen, [step == 3 + row % 4 and row > 0 for row in active])
    layers = {layer for result in decoder.results for layer in result.layers}
    if stopper.kind == "scripted" and rows > 1:
        assert len(layers) > 1
    for row, result in enumerate(decoder.results):  # no slot is run twice in a block, and none that nobody needed
        positions = len(prompts[row]) + len(result.tokens) - 1
        assert all(count <= positions for count in result.block_tokens)
        assert result.block_tokens == sorted(result.block_tokens, reverse=True)
        deepest = max(result.layers)
        assert result.block_tokens[deepest:] == [0] * (len(result.block_tokens) - deepest)
        if stopper.kind == "none":
            assert result.block_tokens == [positions] * 5


def test_a_gap_rule_leaves_where_the_reference_says():
    model = make_model("llama")
    prompts = prompts_of(5, seed=2)
    decoder = decoder_of(model, parse("gap:0.2"), prompts, check_layers="1+2+4")
    texts = [list(p) for p in prompts]
    for _ in range(STEPS):
        chosen = decoder.step().argmax(-1).tolist()
        for row in range(5):
            gaps = {k: gap_after_block(model, decoder.anatomy.blocks, texts[row], k) for k in (1, 2, 4)}
            expected = next((k for k, gap in gaps.items() if gap > 0.2), 5)
            assert all(abs(gap - 0.2) > 1e-4 for gap in gaps.values())
            assert decoder.results[row].layers[-1] == expected
            texts[row].append(chosen[row])
        decoder.append(chosen, [False] * 5)


def lm_of(model, tokenizer, **kwargs):
    return AdaInferLM(pretrained=model, tokenizer=tokenizer, **{"batch_size": 3, "max_length": 64, **kwargs})


def questions(n=7, **gen):
    texts = ["ab", "cde f", "the quick brown", "x", "hello world again", "q q q q", "zz"]
    settings = {"until": ["\n", "zq"], "max_gen_toks": 8, **gen}
    return [instance(t, settings, i, kind="generate_until") for i, t in enumerate(texts[:n])]


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_texts_that_never_leave_early_are_stock_hfs(tokenizer, batch_size):
    """gap:1 asks at every block and never stops: the early-exit loop itself must generate what stock does."""
    model = make_model("llama", vocab_size=257)
    stock = HFLM(pretrained=model, tokenizer=tokenizer, max_length=64, batch_size=batch_size)
    ours = lm_of(model, tokenizer, stopper="gap:1", generation="early", batch_size=batch_size)
    for settings in ({}, {"repetition_penalty": 1.3}, {"max_gen_toks": 1}):
        asked = questions(**settings)
        answers = ours.generate_until(asked, True)
        assert answers == stock.generate_until(asked, True)
        assert {a.exit_record.exit_layer for a in answers} == {5} and {a.exit_record.layers_run for a in answers} == {5}
        assert all(a.exit_record.flops_ratio_total > 1 for a in answers)  # the checks cost, and are counted


def test_a_text_does_not_depend_on_its_neighbours(tokenizer):
    model = make_model("llama", vocab_size=257)
    for settings in ({}, {"do_sample": True, "temperature": 0.8, "top_p": 0.9}):
        asked = questions(**settings)
        torch.manual_seed(1234)
        alone = lm_of(model, tokenizer, stopper="gap:0.3", generation="early", batch_size=1).generate_until(asked, True)
        together = lm_of(model, tokenizer, stopper="gap:0.3", generation="early", batch_size=7).generate_until(asked, True)
        assert alone == together
        assert [a.exit_record.layers for a in alone] == [a.exit_record.layers for a in together]
        assert any(a.exit_record.exit_layer < 5 for a in alone)


def test_repeats_of_a_sampled_question_differ_and_can_be_repeated(tokenizer):
    lm = lm_of(make_model("llama", vocab_size=257), tokenizer, stopper="gap:0.3", generation="early")
    asked = questions(1, do_sample=True, temperature=1.0) * 4
    torch.manual_seed(1)
    first = lm.generate_until(asked, True)
    assert len(set(first)) > 1
    assert lm.generate_until(asked, True) == first
    torch.manual_seed(2)
    assert lm.generate_until(asked, True) != first


def test_traces_belong_to_their_texts(tokenizer):
    """Of every text: the mean of its tokens' exits, and executions that add up to what the engine really ran."""
    lm = lm_of(make_model("llama", vocab_size=257), tokenizer, stopper="gap:0.3", generation="early")
    asked = questions()
    answers = lm.generate_until(asked, True)
    run = 0.0
    for request, answer in zip(asked, answers, strict=True):
        trace = answer.exit_record
        assert trace.exit_layer == pytest.approx(sum(trace.layers) / len(trace.layers))
        run += trace.layers_run * (len(lm.tok_encode(request.args[0])) + len(trace.layers) - 1)
    assert run == pytest.approx(lm.engine.block_tokens)
    assert lm.record()["generated_tokens_counted"] == sum(len(a.exit_record.layers) for a in answers)


def test_beams_and_wrong_values_are_refused_in_one_sentence(tokenizer):
    model = make_model("llama", vocab_size=257)
    with pytest.raises(AdaInferError, match=r"^generation: 'late' is neither dense nor early$"):
        lm_of(model, tokenizer, generation="late")
    with pytest.raises(AdaInferError, match=r"^generation_kwargs: beam_search can't exit early"):
        lm_of(model, tokenizer, stopper="gap", generation="early").generate_until(questions(1, num_beams=2), True)


def test_a_model_without_a_plain_cache_is_refused_when_it_generates_unless_the_user_asks_for_dense(tokenizer):
    """Loglikelihood needs no cache, so it works all the same."""
    model = make_model("mamba", vocab_size=257)
    lm = lm_of(model, tokenizer, stopper="gap")
    assert len(lm.loglikelihood([instance("ab", " x", 0)], True)) == 1
    for _ in range(2):
        with pytest.raises(UnsupportedModelError, match=r"^generation: Mamba.*; pass generation=dense to generate.*$"):
            lm.generate_until(questions(2), True)
    stock = HFLM(pretrained=model, tokenizer=tokenizer, max_length=64, batch_size=3).generate_until(questions(), True)
    for options in ({"stopper": "gap", "generation": "dense"}, {"stopper": "none"}):
        assert lm_of(model, tokenizer, **options).generate_until(questions(), True) == stock


class Cosine(Scripted):
    kind = "cosine"
    features = ("cos_mlp", "cos_attn", "cos_hidden")

    def margin(self, block, values, memory=None):
        return torch.frac(values.sum(-1) * 97) - 0.5


@pytest.mark.parametrize("family", ["llama", "falcon", "opt"])
def test_a_decoding_step_sees_the_features_of_a_plain_forward(family, tokenizer):
    """The first new token of a prompt leaves where a document with that context leaves (Falcon adds parts in place)."""
    model = make_model(family, vocab_size=257)
    texts = ["ab", "cde f", "the quick brown", "hello world again"]
    lm = lm_of(model, tokenizer, stopper=Cosine(), generation="early", batch_size=1)
    documents = lm.loglikelihood([instance(t, " x", n) for n, t in enumerate(texts)], True)
    generated = lm.generate_until(
        [instance(t, {"until": [], "max_gen_toks": 1}, n, kind="generate_until") for n, t in enumerate(texts)], True
    )
    assert [g.exit_record.layers[0] for g in generated] == [d.exit_record.exit_layer for d in documents]


def test_a_second_forward_of_a_step_has_masks_of_its_own():
    """The row that misses the long prompt in deep blocks leaves first: the window of the others then gets shorter."""
    model = make_model("llama")
    anatomy = Anatomy(model)
    stopper = _Script([[3, 5], [1, 5], [2, 5], [5, 5]])
    windows = replace(watch_windows(anatomy), layout="packed")
    prompts = [[(7 * n + 1) % 101 for n in range(100)], [(5 * n + 2) % 101 for n in range(90)]]
    decoder = Decoder(anatomy, stopper, Schedule(5, stopper), windows, prompts, 4)
    for step in range(4):
        logits = decoder.step()
        whole = torch.tensor([[*prompts[1], *decoder.results[1].tokens]])
        with torch.no_grad():
            assert (logits[1] - model(input_ids=whole).logits[0, -1]).abs().max() < 1e-3
        decoder.append([3 + step, 9 + step], [False, False])
    assert decoder.results[0].layers == [3, 1, 2, 5]
