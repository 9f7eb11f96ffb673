"""Somebody's hooks on the blocks (steering vectors, say) act as in stock ``hf``, and compiled models run uncompiled."""

from __future__ import annotations

import pytest
import torch
from helpers.models import lm_of, make_model
from helpers.tasks import instance, requests
from lm_eval.models.huggingface import HFLM
from torch import nn

from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.verification import FAILED, NOT_SUPPORTED, render, verify_model

FAMILIES = ["llama", "gpt2", "gemma3", "bloom"]


def blocks_of(model):
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList))


def direction(model):
    torch.manual_seed(5)
    return torch.randn(model.config.hidden_size)


def steer(model, k, by=1.0, kind="pre"):
    """Add a direction to what block k is given, or gives."""
    block, add = blocks_of(model)[k - 1], by * direction(model)

    def given(module, args, kwargs):
        if args:
            return (args[0] + add, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"] + add}

    def gives(module, args, output):
        return output + add if isinstance(output, torch.Tensor) else (output[0] + add, *output[1:])

    if kind == "pre":
        block.register_forward_pre_hook(given, with_kwargs=True)
    else:
        block.register_forward_hook(gives)
    return model


def stock(model, tokenizer):
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, max_length=64)


def same(found, expected):
    for a, b in zip(expected, found, strict=True):
        assert b[0] == pytest.approx(a[0], rel=2e-6, abs=1e-4) and b[1] == a[1]


def texts():
    options = {"until": ["\n"], "max_gen_toks": 5}
    return [instance(text, options, n, kind="generate_until") for n, text in enumerate(["a", "to be or", "hello"])]


@pytest.mark.parametrize("kind", ["pre", "post"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_steered_block_answers_as_stock_does(family, kind, tokenizer):
    model = steer(steer(make_model(family, vocab_size=257), 1, 0.5, kind), 4, 2.0, kind)
    plain = stock(make_model(family, vocab_size=257), tokenizer).loglikelihood(requests(documents=3), True)
    expected = stock(model, tokenizer).loglikelihood(requests(documents=3), True)
    assert max(abs(a[0] - b[0]) for a, b in zip(plain, expected, strict=True)) > 0.1
    same(lm_of(model, tokenizer).loglikelihood(requests(documents=3), True), expected)
    findings = verify_model(lm_of(model, tokenizer, stopper="gap:0.3"), True)
    assert not [f for f in findings if f.status in (FAILED, NOT_SUPPORTED)], render(findings)
    wanted = list(stock(model, tokenizer).generate_until(texts(), True))
    assert list(map(str, lm_of(model, tokenizer, stopper="softmax:0.9999999").generate_until(texts(), True))) == wanted


@pytest.mark.parametrize("kind", ["pre", "post"])
def test_hooks_of_blocks_behind_the_exit_do_not_act(kind, tokenizer):
    """After block 2 a model answers as stock does with the later blocks taken out."""
    model = steer(steer(make_model("llama", vocab_size=257), 2, 1.0, kind), 3, 5.0, kind)
    short = steer(make_model("llama", vocab_size=257), 2, 1.0, kind)
    short.model.layers = short.model.layers[:2]
    short.config.num_hidden_layers = 2
    lm, cut = lm_of(model, tokenizer, stopper="fixed:2"), stock(short, tokenizer)
    same(lm.loglikelihood(requests(documents=3), True), cut.loglikelihood(requests(documents=3), True))
    assert list(map(str, lm.generate_until(texts(), True))) == list(cut.generate_until(texts(), True))


def test_a_steered_block_is_steered_while_states_are_propagated(tokenizer):
    """A token that goes deeper finds keys and values made of what the block would have been given."""
    seen = []
    model = steer(make_model("llama", vocab_size=257), 3)
    model.model.layers[2].register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(len((args[0] if args else kwargs["hidden_states"])[0])), with_kwargs=True
    )
    projected = []
    model.model.layers[2].self_attn.k_proj.register_forward_hook(
        lambda m, args, output: projected.append(len(output[0]))
    )
    lm = lm_of(model, tokenizer, stopper="gap:0.3", kv_policy="propagate")
    lm.generate_until(texts(), True)
    assert seen == projected and len(seen) > 5


@pytest.mark.parametrize("kind", ["pre", "post"])
def test_blocks_with_hooks_can_be_taken_out(kind, tokenizer):
    model = steer(steer(make_model("llama", vocab_size=257), 2, 1.0, kind), 5, 1.0, kind)
    lm = lm_of(model, tokenizer, stopper="shortgpt:last1")
    short = steer(make_model("llama", vocab_size=257), 2, 1.0, kind)
    short.model.layers, short.config.num_hidden_layers = short.model.layers[:4], 4
    expected = stock(short, tokenizer).loglikelihood(requests(documents=3), True)
    same(lm.loglikelihood(requests(documents=3), True), expected)


# ---------------------------------------------------------------------- torch.compile
def whole(model):
    return torch.compile(model, backend="eager")


def in_place(model):
    model.compile(backend="eager")
    return model


def blocks_in_place(model):
    for block in blocks_of(model):
        block.compile(backend="eager")
    return model


def some_blocks(model):
    blocks = blocks_of(model)
    for k in (1, 3):
        blocks[k] = torch.compile(blocks[k], backend="eager")
    return model


def forward_alone(model):
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def adapted_and_compiled(model):
    import peft

    lora = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "c_attn"], init_lora_weights=False)
    torch.manual_seed(3)
    return torch.compile(peft.get_peft_model(model, lora), backend="eager")


@pytest.mark.parametrize(
    "compiled", [whole, in_place, blocks_in_place, some_blocks, forward_alone, adapted_and_compiled]
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_compiled_model_runs_uncompiled_and_stays_as_it_is(family, compiled, tokenizer):
    def uncompiled():
        model = make_model(family, vocab_size=257)
        return adapted_and_compiled(model)._orig_mod if compiled is adapted_and_compiled else model

    model = compiled(make_model(family, vocab_size=257))
    modules = list(model.modules())
    expected = stock(uncompiled(), tokenizer).loglikelihood(requests(documents=3), True)
    lm = lm_of(model, tokenizer)
    same(lm.loglikelihood(requests(documents=3), True), expected)
    assert lm.fingerprint == lm_of(uncompiled(), tokenizer).fingerprint
    wanted = list(stock(uncompiled(), tokenizer).generate_until(texts(), True))
    assert list(map(str, lm_of(model, tokenizer, stopper="softmax:0.9999999").generate_until(texts(), True))) == wanted
    assert [id(m) for m in model.modules()] == [id(m) for m in modules]
    own, mine = {id(x) for x in model.parameters()}, {id(x) for x in lm.model.parameters()}
    assert own == mine


def test_a_compiled_function_in_place_of_a_forward_is_refused(tokenizer):
    model = make_model("llama", vocab_size=257)
    right = model.forward
    model.forward = torch.compile(lambda *args, **kwargs: right(*args, **kwargs), backend="eager")
    with pytest.raises(AdaInferError, match=r"^pretrained: a compiled function .* LlamaForCausalLM; .* uncompiled$"):
        lm_of(model, tokenizer)


def test_hooks_on_a_compiled_module_are_not_lost_in_silence(tokenizer):
    model = torch.compile(make_model("llama", vocab_size=257), backend="eager")
    nn.Module.register_forward_hook(model, lambda m, args, output: output)
    with pytest.raises(
        AdaInferError, match=r"^pretrained: hooks on the compiled LlamaForCausalLM would be lost; .* uncompiled"
    ):
        lm_of(model, tokenizer)
