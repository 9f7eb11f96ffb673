"""The head's product with few rows, in narrow pieces, is a linear map's; only a plain head of the right kind takes it."""

from __future__ import annotations

import pytest
import torch
from helpers.models import make_model
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_eval_adainfer.structure import anatomy
from lm_eval_adainfer.structure.anatomy import Anatomy
from lm_eval_adainfer.structure.few_rows import few_rows_linear


@given(st.integers(1, 70), st.sampled_from([1, 5, 511, 512, 513, 1300]), st.integers(1, 40), st.booleans())
@settings(deadline=None, max_examples=40)
def test_pieces_give_the_whole_product(rows, width, size, biased):
    make = torch.Generator().manual_seed(rows)
    x, weight = torch.randn(rows, 1, size, generator=make), torch.randn(width, size, generator=make)
    bias = torch.randn(width, generator=make) if biased else None
    expected = x.double() @ weight.double().T + (bias.double() if biased else 0)
    found = few_rows_linear(x, weight, bias)
    assert found.dtype == torch.float32 and torch.allclose(found.double(), expected, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 4, 5, 64, 65])
def test_logits_are_the_models(rows):
    model = make_model("llama", vocab_size=1300)
    hidden = torch.randn(rows, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.lm_head(model.model.norm(hidden))
    assert torch.allclose(Anatomy(model).logits(hidden), expected, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gptj"])  # whose head has a bias
def test_under_autocast_logits_are_the_models_for_any_number_of_rows(family):
    model = make_model(family, vocab_size=1300)
    if model.lm_head.bias is not None:
        torch.nn.init.normal_(model.lm_head.bias)
    hidden = torch.randn(130, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        norm = Anatomy(model).tail
        for rows in (1, 40, 130):
            expected = hidden[:rows, None]
            for module in norm:
                expected = module(expected)
            torch.testing.assert_close(Anatomy(model).logits(hidden[:rows]), model.lm_head(expected)[:, 0])


def test_a_head_that_is_no_plain_float32_map_keeps_its_own_forward(monkeypatch):
    calls = []
    real = few_rows_linear
    monkeypatch.setattr(anatomy, "few_rows_linear", lambda *args: calls.append(1) or real(*args))
    hidden = torch.randn(2, 32)

    def taken(change):
        model = make_model("llama", vocab_size=1300)
        found = Anatomy(model)
        change(model.lm_head)
        calls.clear()
        found.logits(hidden.to(model.lm_head.weight.dtype))
        return bool(calls)

    class Other(torch.nn.Linear):
        pass

    assert taken(lambda head: None) == torch.backends.mkl.is_available()
    assert not taken(lambda head: setattr(head, "__class__", Other))
    assert not taken(lambda head: setattr(head, "forward", head.forward))  # as accelerate's hooks do
    assert not taken(lambda head: setattr(head, "weight", torch.nn.Parameter(head.weight.T.contiguous().T)))
