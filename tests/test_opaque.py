"""What blocks are given besides tensors: it is cut with the rows, or the model is refused in one sentence."""

from __future__ import annotations

import functools
from collections import UserDict, namedtuple
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from helpers.models import lm_of, make_model
from helpers.tasks import requests
from lm_eval.models.huggingface import HFLM
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.verification import FAILED, render, verify_model


class Given(nn.Module):
    """A block that adds to its output what it finds in ``state``: something for every row."""

    def __init__(self, inner, find):
        super().__init__()
        self.inner, self.find = inner, find

    def forward(self, hidden_states, state=None, **kwargs):
        return self.inner(hidden_states, **kwargs) + self.find(state)


def given(make, find):
    """A tiny model whose blocks are given ``make(bias)``, bias [B, S, 1] from the token ids, and ``find`` it there."""
    model = make_model("llama", vocab_size=257)
    model.model.layers = nn.ModuleList(Given(layer, find) for layer in model.model.layers)
    forward = model.model.forward

    def with_state(input_ids=None, **kwargs):
        return forward(input_ids=input_ids, state=make(0.01 * input_ids[..., None].float()), **kwargs)

    model.model.forward = with_state
    return model


Pair = namedtuple("Pair", ["name", "bias"])


@dataclass(frozen=True)
class Frozen:
    bias: torch.Tensor
    name: str = "bias"


@dataclass
class Nested:
    inner: Frozen
    more: dict = field(default_factory=dict)


class Own:
    def __init__(self, bias):
        self.bias = bias


class Slotted:
    __slots__ = ("deep",)

    def __init__(self, bias):
        self.deep = [Own(bias)]


CUT = {
    "namedtuple": (lambda b: Pair("x", b), lambda s: s.bias),
    "frozen": (Frozen, lambda s: s.bias),
    "nested": (lambda b: Nested(Frozen(b), {"b": [b]}), lambda s: s.inner.bias + s.more["b"][0]),
    "model output": (
        lambda b: BaseModelOutput(last_hidden_state=b),
        lambda s: s.last_hidden_state + s["last_hidden_state"],
    ),
    "userdict": (lambda b: UserDict(bias=b), lambda s: s["bias"]),
}
REFUSED = {
    "own class": (Own, lambda s: s.bias, "Own"),
    "slots": (Slotted, lambda s: s.deep[0].bias, "Slotted"),
    "userdict deep inside": (lambda b: [UserDict(bias=b)], lambda s: s[0]["bias"], "UserDict"),
    "own class in a userdict": (lambda b: UserDict(own=Own(b)), lambda s: s["own"].bias, "Own"),
    "own class in a dataclass": (lambda b: Nested(Own(b)), lambda s: s.inner.bias, "Own"),
    "partial": (lambda b: functools.partial(torch.mul, b), lambda s: s(1.0), "partial"),
    "closure": (lambda b: lambda: b, lambda s: s(), "function"),
    "method": (lambda b: Own(b).__getattribute__, lambda s: s("bias"), "method"),
    "entries per row": (lambda b: b.flatten(1).tolist(), lambda s: torch.tensor(s)[..., None], "entry per row (state)"),
    "an array": (lambda b: b.numpy(), torch.from_numpy, "entry per row (state)"),
    "strings": (lambda b: ["row"] * len(b), lambda s: torch.ones(len(s), 1, 1), "entry per row (state)"),
}


@pytest.mark.parametrize("kind", CUT)
def test_containers_of_tensors_are_cut_with_the_rows(kind, tokenizer):
    model = given(*CUT[kind])
    stock = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, max_length=64)
    expected = stock.loglikelihood(requests(documents=3), True)
    for a, b in zip(expected, lm_of(model, tokenizer).loglikelihood(requests(documents=3), True), strict=True):
        assert b[0] == pytest.approx(a[0], rel=2e-6, abs=1e-4) and b[1] == a[1]
    findings = verify_model(lm_of(model, tokenizer, stopper="gap:0.3"), True)
    assert not [f for f in findings if f.status == FAILED], render(findings)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_can_not_be_cut_is_refused_by_its_name(kind, tokenizer):
    make, find, named = REFUSED[kind]
    with pytest.raises(AdaInferError) as found:
        lm_of(given(make, find), tokenizer)
    said = str(found.value)
    assert said.startswith("pretrained: LlamaForCausalLM is not supported for early exit: its blocks are given a ")
    assert named in said and said.endswith("when rows leave") and "\n" not in said


@pytest.mark.parametrize("state", [Own(3), functools.partial(int, 3), (1, 2, 3), np.ones(3), Nested(None), lambda: 1])
def test_what_holds_no_batch_passes(state, tokenizer):
    model = given(lambda bias: state, lambda s: 0.0 if type(s) is type(state) else torch.nan)
    assert not [f for f in verify_model(lm_of(model, tokenizer), True) if f.status == FAILED]


@pytest.mark.slow
def test_flex_attention_is_refused_with_what_to_pass(tokenizer):
    model = make_model("llama", vocab_size=257)
    model.set_attn_implementation("flex_attention")
    with pytest.raises(
        AdaInferError, match=r"^attn_implementation: .* BlockMask .*; pass attn_implementation=sdpa or "
    ):
        lm_of(model, tokenizer)


def test_a_block_mask_is_refused_with_what_to_pass(tokenizer):
    """As above, without the minutes that it takes to compile the kernel on some machines."""
    from torch.nn.attention.flex_attention import create_block_mask

    def masks(bias):
        return create_block_mask(lambda b, h, q, k: q >= k, len(bias), None, bias.shape[1], bias.shape[1], device="cpu")

    with pytest.raises(
        AdaInferError, match=r"^attn_implementation: .* BlockMask .*; pass attn_implementation=sdpa or "
    ):
        lm_of(given(masks, lambda s: 0.0), tokenizer)
