"""Attention of rows to one prefix row and to themselves is that of whole rows; blocks that don't fit are noticed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lm_eval_adainfer.prefill.attention import Apart, merged


def drawn(rows, groups, per, own, shared, size, dtype=torch.float32, spread=1.0):
    """Query, own keys and values, the prefix's."""
    make = torch.Generator().manual_seed(0)
    shapes = [(rows, groups * per, own, size), *[(rows, groups, own, size)] * 2, *[(1, groups, shared, size)] * 2]
    return [(spread * torch.randn(*shape, generator=make)).to(dtype) for shape in shapes]


def whole(query, key, value, prefix_key, prefix_value, scale, allowed=None):
    """The same with every row's keys put together, in float64."""
    per, shared = query.shape[1] // key.shape[1], prefix_key.shape[2]
    key = torch.cat([prefix_key.expand(len(key), -1, -1, -1), key], dim=2).repeat_interleave(per, dim=1)
    value = torch.cat([prefix_value.expand(len(value), -1, -1, -1), value], dim=2).repeat_interleave(per, dim=1)
    mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(shared) if allowed is None else allowed
    return F.scaled_dot_product_attention(*(x.double() for x in (query, key, value)), attn_mask=mask, scale=scale)


sizes = st.integers(1, 4)


places = st.permutations(range(4))


@given(sizes, sizes, sizes, st.integers(1, 70), st.integers(1, 70), st.sampled_from([1, 3, 16]), st.booleans(), places)
@settings(deadline=None, max_examples=60)
def test_two_attentions_are_merged_to_the_whole_one(rows, groups, per, own, shared, size, scaled, order):
    """Wherever the numbers lie in memory."""
    back = [order.index(n) for n in range(4)]
    given_ = drawn(rows, groups, per, own, shared, size, spread=3.0)
    given_ = [x.permute(order).contiguous().permute(back) for x in given_]
    scale = 0.7 if scaled else None
    assert torch.allclose(merged(*given_, scale).double(), whole(*given_, scale), atol=1e-4)


def test_one_part_can_outweigh_the_other_by_far():
    for far in (1e3, -1e3):
        query, key, value, prefix_key, prefix_value = drawn(2, 1, 1, 3, 5, 4)
        query, key, prefix_key = torch.ones_like(query), 0 * key, far * torch.ones_like(prefix_key)
        found = merged(query, key, value, prefix_key, prefix_value, None)
        assert torch.allclose(found.double(), whole(query, key, value, prefix_key, prefix_value, None), atol=1e-5)


def test_bfloat16_stays_as_near_as_its_own_rounding():
    given_ = drawn(3, 2, 2, 40, 60, 16, torch.bfloat16)
    expected, found = whole(*given_, None), merged(*given_, None)
    assert found.dtype == torch.bfloat16
    assert (found.double() - expected).abs().max() <= 2**-7 * expected.abs().max()


def test_float64_stays_float64():
    given_ = drawn(3, 2, 2, 40, 60, 16, torch.float64)
    torch.testing.assert_close(merged(*given_, None), whole(*given_, None), atol=1e-12, rtol=0)


class Attention(torch.nn.Module):
    """As a transformers attention module seems to the attention function."""

    num_key_value_groups = 2
    is_causal = True


def attend(apart, query, key, value, mask, prefix, change=lambda x: x, **more):
    key, value = apart.hand_out(prefix, (key, value))
    return ALL_ATTENTION_FUNCTIONS["sdpa"](Attention(), query, change(key), value, mask, **more)[0].transpose(1, 2)


@pytest.mark.parametrize("window", [None, 4])
def test_a_mask_that_is_not_just_causal_is_kept(window):
    query, key, value, *prefix = drawn(3, 2, 2, 5, 7, 8)
    mask = torch.ones(5, 12, dtype=torch.bool).tril(7)
    if window:
        mask = mask.triu(7 - window + 1)
    apart = Apart()
    with apart.used():
        found = attend(apart, query, key, value, mask.expand(3, 1, 5, 12), tuple(prefix))
    assert torch.allclose(found.double(), whole(query, key, value, *prefix, None, mask), atol=1e-5)


def test_values_of_another_size_and_biases_are_kept():
    query, key, value, *prefix = drawn(3, 2, 2, 5, 7, 8)
    mask, apart = torch.ones(5, 12, dtype=torch.bool).tril(7), Apart()
    expected = whole(query, key, value, *prefix, None, mask)
    with apart.used():
        short = attend(apart, query, key, value[..., :3], mask.expand(3, 1, 5, 12), (prefix[0], prefix[1][..., :3]))
        bias = torch.arange(12.0).expand(1, 1, 5, 12)
        biased = attend(apart, query, key, value, mask.expand(3, 1, 5, 12), tuple(prefix), position_bias=bias)
    assert torch.allclose(short.double(), expected[..., :3], atol=1e-5)
    allowed = torch.where(mask, bias.double(), -torch.inf)
    assert torch.allclose(biased.double(), whole(query, key, value, *prefix, None, allowed), atol=1e-5)


def test_keys_that_are_changed_or_left_are_an_error_and_the_function_is_put_back():
    query, key, value, *prefix = drawn(3, 2, 2, 5, 7, 8)
    usual, apart = ALL_ATTENTION_FUNCTIONS["sdpa"], Apart()
    with pytest.raises(RuntimeError, match="changes the keys"), apart.used():
        attend(apart, query, key, value, None, tuple(prefix), change=torch.clone)
    with pytest.raises(RuntimeError, match="is not sdpa's"), apart.used():
        apart.hand_out(tuple(prefix), (key, value))
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is usual
    with apart.used():  # a block that reads no cache
        mask = torch.ones(5, 5, dtype=torch.bool).tril()
        found = ALL_ATTENTION_FUNCTIONS["sdpa"](Attention(), query, key, value, mask)[0]
    assert torch.equal(found, usual(Attention(), query, key, value, mask)[0])
