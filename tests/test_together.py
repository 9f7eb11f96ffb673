"""Batches that go through the blocks together: same answers and exits as one by one, fewer readings of the head."""

from __future__ import annotations

import random

import pytest
import torch
from helpers.models import lm_of, make_model
from helpers.reference import score
from helpers.stoppers import Scripted
from helpers.tasks import instance, requests
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_eval_adainfer.prefill import planning
from lm_eval_adainfer.prefill.documents import Document, Row
from lm_eval_adainfer.prefill.forward import Forward
from lm_eval_adainfer.prefill.planning import make_batch
from lm_eval_adainfer.structure.anatomy import Anatomy

SHARED = "a few shots that all documents of a task begin with. "


def asked(seed=0):
    """One context or two per document, of all lengths, some behind a shared prefix; up to three long choices."""
    rng, found = random.Random(seed), []
    for doc in range(14):
        context = (SHARED if doc % 3 else "") + "".join(rng.choices("abcdef ", k=rng.randint(2, 40)))
        contexts = [context + end for end in (" he", " she")] if doc % 4 == 0 else [context]
        pairs = [(c, k) for c in contexts for k in (" x and more than that", " yz", " or something else")[: 1 + doc % 3]]
        found += [instance(c, k, doc, idx=i) for i, (c, k) in enumerate(pairs)]
    return found


@pytest.mark.parametrize("stopper", ["none", "fixed:2", "scripted", "cos"])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("prefix_cache", [0, 4096])
def test_answers_and_exits_do_not_depend_on_what_goes_together(stopper, batch_size, prefix_cache, monkeypatch, tokenizer):
    model = make_model("llama", vocab_size=257)
    options = {"batch_size": batch_size, "prefix_cache": prefix_cache, "max_length": 128}
    if stopper == "cos":  # features of a block's parts, and of the block before
        options |= {"stopper": "saturation:0.6", "log_features": True}
    else:
        options |= {"stopper": Scripted() if stopper == "scripted" else stopper}
    together = lm_of(model, tokenizer, **options)
    found = together.loglikelihood(asked(), True)
    monkeypatch.setattr(planning, "TOGETHER_ROWS", 1)
    alone = lm_of(model, tokenizer, **options)
    expected = alone.loglikelihood(asked(), True)
    for a, b in zip(expected, found, strict=True):
        assert b[0] == pytest.approx(a[0], abs=2e-4) and b[1] == a[1]
        assert b.exit_record.exit_layer == a.exit_record.exit_layer and b.exit_record.flops_ratio_total == a.exit_record.flops_ratio_total
        for x, y in zip(a.exit_record.features or (), b.exit_record.features or (), strict=True):
            assert x["layer"] == y["layer"]
            for name in x:
                assert y[name] == pytest.approx(x[name], abs=1e-3)
    for request, answer in list(zip(asked(), found, strict=True))[::5]:
        context, continuation = together._encode_pair(*request.args)
        slow = score(model, together.anatomy.blocks, context, continuation, int(answer.exit_record.exit_layer), 128)
        assert answer[0] == pytest.approx(slow[0], abs=2e-4)
    for count in ("tokens", "block_tokens", "block_calls", "head_rows"):
        assert getattr(together.engine, count) == getattr(alone.engine, count)


def test_the_head_is_read_once_per_block_for_all_batches(monkeypatch, tokenizer):
    model = make_model("llama", vocab_size=257)
    lm = lm_of(model, tokenizer, stopper="gap:1", batch_size=1, prefix_cache=0)  # asks after every block and never stops
    heads, rows = [], []
    model.lm_head.register_forward_hook(lambda m, args, out: heads.append(len(out)))
    lm.anatomy.blocks[0].register_forward_pre_hook(lambda m, args: rows.append(len(args[0])))
    lm.loglikelihood([instance("a fox" * (1 + n % 3), "x", n) for n in range(9)], True)
    assert heads == [9] * 5 and rows == [1] * 9
    heads.clear()
    monkeypatch.setattr(planning, "TOGETHER_ROWS", 4)
    lm.loglikelihood([instance("a deer" * (1 + n % 3), "x", n) for n in range(9)], True)
    assert heads == [4] * 5 + [4] * 5 + [1] * 5


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=5), max_size=12),
    size=st.integers(1, 4),
    most_rows=st.integers(1, 12),
    most_tokens=st.integers(1, 200),
)
def test_what_goes_together_keeps_its_order_and_its_bounds(lengths, size, most_rows, most_tokens):
    batches = [make_batch([Document([Row([1] * max(rows), 1) for _ in rows], [0])], size) for rows in lengths]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "TOGETHER_ROWS", most_rows)
        patch.setattr(planning, "TOGETHER_TOKENS", most_tokens)
        found = list(planning.together(batches))
    assert [batch for together in found for batch in together] == batches
    for together in found:
        rows = [row for batch in together for document in batch.documents for row in document.rows]
        if len(together) > 1:
            assert len(rows) <= most_rows and sum(len(row.tokens) for row in rows) <= most_tokens
            assert all(len(document.rows) <= size for batch in together for document in batch.documents)


def test_a_block_gets_what_the_models_own_forward_gives_it_and_is_called_once():
    model = make_model("gemma3")  # masks and rotary embeddings differ by block
    anatomy, ids = Anatomy(model), torch.arange(24).reshape(2, 12) % 101
    expected, calls = [], []
    handles = [b.register_forward_hook(lambda m, a, out: expected.append(out)) for b in anatomy.blocks]
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    for k, block in enumerate(anatomy.blocks, 1):
        block.register_forward_pre_hook(lambda m, args, k=k: calls.append(k))
    forward = Forward(anatomy, ids)
    assert calls == []  # what blocks are given is found out without them
    for k in range(1, 6):
        state = forward.advance()
        assert state.block == k and torch.equal(state.hidden, expected[k - 1])
    assert calls == [1, 2, 3, 4, 5]


def test_an_error_in_a_block_leaves_the_model_as_it_was(tokenizer):
    model = make_model("llama", vocab_size=257)
    lm = lm_of(model, tokenizer, stopper="gap:0.3", batch_size=2)
    before = lm.loglikelihood(requests(), True)

    def fails(module, args):
        raise RuntimeError("out of memory, say")

    handle = lm.anatomy.blocks[2].register_forward_pre_hook(fails)
    with pytest.raises(RuntimeError, match="say"):
        lm.loglikelihood(requests(), True)
    handle.remove()
    assert all("forward" not in block.__dict__ for block in lm.anatomy.blocks)
    assert lm.loglikelihood(requests(), True) == before
