"""Linear maps of few rows in pieces give the linear map, and leave alone what is none of theirs."""

from __future__ import annotations

import pytest
import torch
from helpers.replay import assert_exact, decode_greedily, finishes_in_turn, prepared, prompts_of
from helpers.stoppers import Dice
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lm_eval_adainfer.structure import few_rows
from lm_eval_adainfer.structure.few_rows import quick


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.integers(1, 12), min_size=0, max_size=2),
    pieces=st.integers(1, 4),
    size=st.integers(1, 30),
    biased=st.booleans(),
    several=st.booleans(),
)
def test_pieces_give_the_linear_map(rows, pieces, size, biased, several):
    make = torch.Generator().manual_seed(size)
    linear = nn.Linear(size, 64 * pieces, bias=biased)
    x = torch.randn(*rows, size, generator=make)
    calls, product = [], torch.bmm
    most = 128 if several else 4
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        expected = linear(x)
        patch.setattr(few_rows, "_WORTH", 0)
        patch.setattr(torch, "get_num_threads", lambda: 1 + several)
        patch.setattr(torch, "bmm", lambda *args: calls.append(1) or product(*args))
        with quick([nn.Sequential(linear)]):
            found = linear(x)
    assert found.shape == expected.shape and found.stride() == expected.stride()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert bool(calls) == (x.numel() // size <= most and torch.backends.mkl.is_available())
    assert "forward" not in vars(linear)


def test_what_is_no_plain_map_of_some_size_keeps_its_own_forward():
    class Other(nn.Linear):
        pass

    watched = nn.Linear(256, 256)
    forward = watched.forward = watched.forward  # as accelerate's hooks do
    others = [
        watched, Other(256, 256), nn.Linear(256, 255), nn.Linear(128, 64), nn.Linear(256, 256, dtype=torch.bfloat16),
        nn.Linear(256, 256, device="meta"),
    ]  # fmt: skip
    own = nn.Linear(256, 256)
    with quick([*others, own, nn.Sequential(own)]):
        assert ("forward" in vars(own)) == torch.backends.mkl.is_available()
        assert not any("forward" in vars(other) for other in others[1:])
        assert vars(watched)["forward"] is forward
    assert "forward" not in vars(own)


def test_gradients_and_autocast_go_through_the_usual_product():
    linear = nn.Linear(256, 256)
    x = torch.randn(1, 256)
    with quick([linear]):
        linear(x).sum().backward()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert linear(x).dtype == torch.bfloat16
    assert linear.weight.grad is not None


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "mixtral", "bloom", "falcon", "phi3"])
@pytest.mark.parametrize("policy", ["recompute", "propagate"])
def test_decoding_with_pieces_is_decoding(family, policy, monkeypatch):
    """All maps of the blocks are in pieces, with 1 to 16 tokens a call: logits of whole prefixes without a cache."""
    model, anatomy, windows = prepared(family)
    monkeypatch.setattr(few_rows, "_WORTH", 0)
    monkeypatch.setattr(few_rows, "_PIECE", 8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    prompts = prompts_of(6, seed=3)
    runs = {}
    for quickly in (True, False):
        monkeypatch.setattr(few_rows, "_ROWS", {True: 16 if quickly else 0})
        runs[quickly] = decode_greedily(
            anatomy, windows, Dice(seed=5), prompts, 8, finishes_in_turn, kv_policy=policy
        )
    if policy == "recompute":
        assert_exact(model, runs[True][0], prompts, runs[True][1])
    for found, expected in zip(*(logits for _, logits in runs.values()), strict=True):
        torch.testing.assert_close(torch.stack(found), torch.stack(expected), atol=1e-5, rtol=0)
