"""Structure is told from rounding on weights like pretrained ones, in every dtype; what is wrong is found in each."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import transformers
from helpers.models import cache_among, make_model
from helpers.tasks import instance
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_eval_adainfer.errors import UnsupportedModelError
from lm_eval_adainfer.generation.probes import prepare
from lm_eval_adainfer.harness.model import AdaInferLM
from lm_eval_adainfer.prefill import probes
from lm_eval_adainfer.structure import rounding
from lm_eval_adainfer.structure.anatomy import Anatomy
from lm_eval_adainfer.verification import FAILED, OK, render, verify_model

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def pretrained_like(dtype=torch.float32, **overrides):
    """A llama with activations of about 400 in one channel, which its norms scale down, as pretrained models do."""
    model = make_model("llama", vocab_size=257, **overrides)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 3] = 400.0
        for norm in [model.model.norm, *(n for b in model.model.layers for n in (b.input_layernorm, b.post_attention_layernorm))]:
            norm.weight.fill_(400 / 32**0.5)
            norm.weight[3] = 0.01
    return model.to(dtype)


# ------------------------------------------------------------------------------------------------ distances
@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.floats(1, 1e6))
def test_a_huge_channel_hides_nothing_in_the_others(seed, size):
    generator = torch.Generator().manual_seed(seed)
    expected = torch.randn(3, 4, 16, generator=generator)
    expected[..., 5] *= size
    found = expected.clone()
    found[1, 2, 7] += 0.01
    largest = expected.abs().amax((0, 1))
    by_hand = 0.01 / max(largest[7], largest.median())
    assert rounding.hidden_distance(found, expected) == pytest.approx(by_hand.item(), rel=0.01)
    assert rounding.hidden_distance(expected * (1 + 1e-6), expected) < 2e-6


def test_what_is_not_finite_is_infinitely_far_and_masked_tokens_are_no_difference():
    good = torch.ones(2, 8)
    bad = good.clone()
    bad[0, 0] = torch.nan
    assert rounding.hidden_distance(bad, good) == rounding.logits_distance(bad, good) == float("inf")
    masked = torch.tensor([[1.0, 2.0, -torch.inf]])
    assert rounding.logits_distance(masked, masked) == 0
    assert rounding.logits_distance(masked + torch.tensor([0.0, 0.5, 0.0]), masked) == 0.25


# ------------------------------------------------------------------------------------------------ float32 copies
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("kept", [True, False], ids=["all at once", "block by block"])
def test_float32_copies_compute_what_a_float32_model_does_and_leave_no_trace(dtype, kept, monkeypatch):
    monkeypatch.setattr(rounding, "_KEPT_BYTES", 2**31 if kept else 0)
    model = pretrained_like(dtype, tie_word_embeddings=True)
    before = {name: (id(p), p.data_ptr(), p.dtype) for name, p in model.named_parameters()}
    slow = copy.deepcopy(model).float()
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        expected = slow(input_ids=ids).logits
        own = model(input_ids=ids).logits
        with rounding.in_float32(model) as copied:
            assert copied
            found = model(input_ids=ids).logits
            with rounding.in_float32(model) as again:  # a verifier inside builds models of its own
                assert not again or not kept
        assert found.dtype == torch.float32 and torch.equal(found, expected)
        assert torch.equal(model(input_ids=ids).logits, own)
    assert {name: (id(p), p.data_ptr(), p.dtype) for name, p in model.named_parameters()} == before
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("kept", [True, False], ids=["all at once", "block by block"])
def test_an_error_leaves_the_model_as_it_was(kept, monkeypatch):
    monkeypatch.setattr(rounding, "_KEPT_BYTES", 2**31 if kept else 0)
    model = pretrained_like(torch.bfloat16)
    handle = model.model.layers[2].mlp.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), rounding.in_float32(model):
        model(input_ids=torch.arange(4)[None])
    handle.remove()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_what_is_float32_quantised_or_elsewhere_is_left_alone():
    model = pretrained_like()
    with rounding.in_float32(model) as copied:
        assert not copied
    with torch.autocast("cpu", torch.bfloat16), rounding.in_float32(model) as copied:
        assert copied and not torch.is_autocast_enabled("cpu")
    with rounding.in_float32(model.to(torch.bfloat16).to("meta")) as copied:
        assert not copied


# ------------------------------------------------------------------------------------------------ probes
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_activations_cost_no_speed_up(dtype, tokenizer, caplog):
    """Prefixes are shared and attended to together, and generation is packed; nothing is warned of."""
    lm = AdaInferLM(pretrained=pretrained_like(dtype), tokenizer=tokenizer, stopper="gap:0.3", max_length=64)
    with caplog.at_level(logging.WARNING, "lm_eval_adainfer"):
        found = lm._sharing()
    assert found.rule.apart and not found.missed and "prefix_cache" not in caplog.text
    windows = prepare(lm.anatomy)
    assert windows.layout == "packed" and not windows.missed


def scaled(model):
    """One block computes with other weights once there is a cache."""

    def act(module, args, kwargs):
        past = cache_among(kwargs)
        if past is not None and past.get_seq_length():
            return args, {**kwargs, "hidden_states": kwargs["hidden_states"] * 1.01}
        return None

    model.model.layers[2].self_attn.register_forward_pre_hook(act, with_kwargs=True)


def shifted(model):
    """One block's positions are one off once there is a cache."""

    def act(module, args, kwargs):
        past = cache_among(kwargs)
        if past is not None and past.get_seq_length():
            cos, sin = (x.roll(1, dims=1) for x in kwargs["position_embeddings"])
            return args, {**kwargs, "position_embeddings": (cos, sin)}
        return None

    model.model.layers[2].self_attn.register_forward_pre_hook(act, with_kwargs=True)


def swapped(model):
    """One block reads another row's keys once there is a cache."""

    def act(module, args, output):
        return output.roll(1, dims=0) if output.shape[0] > 1 and module.met else output

    def note(module, args, kwargs):
        past = cache_among(kwargs)
        module.k_proj.met = past is not None and bool(past.get_seq_length())

    attention = model.model.layers[2].self_attn
    attention.register_forward_pre_hook(note, with_kwargs=True)
    attention.k_proj.register_forward_hook(act)
    attention.k_proj.met = False


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sabotage", [scaled, shifted, swapped])
def test_one_wrong_block_is_found_in_every_dtype(sabotage, dtype, tokenizer, caplog):
    """The speed-up is off, with a warning that holds the figure, and so says the run's record."""
    model = pretrained_like(dtype)
    sabotage(model)
    lm = AdaInferLM(pretrained=model, tokenizer=tokenizer, max_length=128, batch_size=4)
    shared = "so many words that all of these begin with, and then"
    requests = [instance(shared + " x" * n, " y", n) for n in range(6)]
    with caplog.at_level(logging.WARNING, "lm_eval_adainfer"):
        found = lm.loglikelihood(requests, True)
    assert lm._sharing().rule is None and "hidden states are off by" in lm._sharing().missed
    assert "prefix_cache: every prompt is run whole (" in caplog.text
    assert "hidden states are off by" in lm.record()["shared_prefixes"]
    whole = AdaInferLM(pretrained=model, tokenizer=tokenizer, max_length=128, batch_size=4, prefix_cache=0)
    assert [a[0] for a in found] == [a[0] for a in whole.loglikelihood(requests, True)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sabotage", [scaled, shifted])
def test_generation_with_one_wrong_block_is_refused_in_every_dtype(sabotage, dtype):
    model = pretrained_like(dtype)
    sabotage(model)
    with pytest.raises(UnsupportedModelError, match=r"logits are off by \S+ of their size, \S+ allowed"):
        prepare(Anatomy(model))


@pytest.mark.parametrize("dtype", DTYPES)
def test_verify_finds_what_appears_behind_ten_tokens_in_every_dtype(dtype, tokenizer):
    """The probes see fewer tokens than that."""
    model = pretrained_like(dtype)

    def act(module, args, kwargs):
        past = cache_among(kwargs)
        cached = 0 if past is None else past.get_seq_length()
        if cached > 10 and cached > kwargs["hidden_states"].shape[1]:  # a plain forward fills a cache, and reads none
            return args, {**kwargs, "hidden_states": kwargs["hidden_states"] * 1.5}
        return None

    good = verify_model(AdaInferLM(pretrained=model, tokenizer=tokenizer, max_length=64), True)
    assert {f.status for f in good} == {OK}, render(good)
    assert ("rounding" in {f.check for f in good}) == (dtype != torch.float32)
    for layer in model.model.layers[2:3]:
        layer.self_attn.register_forward_pre_hook(act, with_kwargs=True)
    findings = verify_model(AdaInferLM(pretrained=model, tokenizer=tokenizer, max_length=64), True)
    assert {f.check for f in findings if f.status == FAILED} == {"prefix", "generation"}, render(findings)


def test_answers_that_are_wrong_in_the_models_own_dtype_alone_are_found(tokenizer):
    """A kernel that is wrong in bfloat16 is right in the float32 copies."""
    model = make_model("llama", vocab_size=257).to(torch.bfloat16)

    def act(module, args, output):  # in batches alone, and not where the probes look
        return output + 1 if output.dtype == torch.bfloat16 and len(output) > 8 else output

    model.model.layers[0].mlp.register_forward_hook(act)  # before documents leave
    findings = verify_model(AdaInferLM(pretrained=model, tokenizer=tokenizer, max_length=64), True)
    assert {f.check for f in findings if f.status == FAILED} == {"rounding"}, render(findings)


# ------------------------------------------------------------------------------------------------ a pretrained model
@pytest.mark.parametrize("dtype", DTYPES)
def test_smollm2_shares_prefixes_and_generates_packed(smollm2, dtype):
    model = copy.deepcopy(smollm2[0]).to(dtype)
    lm = AdaInferLM(pretrained=model, tokenizer=smollm2[1], stopper="gap:0.9")
    assert lm._sharing() == probes.Sharing(lm._sharing().rule, "what prompts share is attended to together")
    assert lm._sharing().rule.apart
    windows = prepare(lm.anatomy)
    assert windows.layout == "packed" and not windows.missed
    swapped(model)
    assert "hidden states are off by" in probes.sharing(Anatomy(model)).missed


@pytest.mark.parametrize("threads", [1, 2])
def test_smollm2_as_its_file_has_it_shares_prefixes_on_any_number_of_threads(shared, threads):
    """With one thread plain forwards of few and of more rows are rounded all alike, but continued ones are not."""
    folder, file = shared / "models" / "smollm2-135m-instruct", "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not folder.is_dir():
        pytest.skip("no SmolLM2 here")
    pytest.importorskip("gguf")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
        assert probes.sharing(Anatomy(model)).how == "what prompts share is attended to together"
        swapped(model)
        assert "hidden states are off by" in probes.sharing(Anatomy(model)).missed
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_smollm2_is_verified(smollm2, dtype):
    model = copy.deepcopy(smollm2[0]).to(dtype)
    findings = verify_model(AdaInferLM(pretrained=model, tokenizer=smollm2[1], stopper="gap:0.9"), True)
    assert {f.status for f in findings} == {OK}, render(findings)
