"""Counted operations against sums by hand, PyTorch's own FLOP counter, and hooks on the output head."""

from __future__ import annotations

import pytest
import torch
from helpers.models import FAMILIES, lm_of, make_model
from helpers.reference import gap_after_block
from helpers.stoppers import Scripted
from helpers.tasks import instance, requests
from torch.utils.flop_counter import FlopCounterMode

from lm_eval_adainfer.counting import FlopCounter
from lm_eval_adainfer.strategies.rules import FixedStopper, GapStopper, NoStopper
from lm_eval_adainfer.strategies.svm import SVMStopper
from lm_eval_adainfer.structure.anatomy import Anatomy

V, L, H = 257, 5, 32
LLAMA_BLOCK = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48  # q, o; k, v (two of four heads); gate, up, down
BY_HAND = {
    "llama": LLAMA_BLOCK,
    "gpt2": 32 * 96 + 32 * 32 + 2 * 32 * 128,  # Conv1D: qkv, projection, up, down
    "gptj": 4 * 32 * 32 + 2 * 32 * 128,
    "opt": 4 * 32 * 32 + 2 * 32 * 48,
    "falcon": 32 * (32 + 2 * 8) + 32 * 32 + 2 * 32 * 128,  # one key and value head of 8
}


@pytest.fixture(scope="module")
def llama():
    return make_model("llama", vocab_size=V)


@pytest.mark.parametrize("family", BY_HAND)
def test_block_weights_are_the_linear_maps_by_hand(family):
    anatomy = Anatomy(make_model(family, vocab_size=V))
    assert anatomy.block_weights == [BY_HAND[family]] * L
    assert anatomy.attention_width == [32] * L


@pytest.mark.parametrize("active", [1, 2, 4])
def test_routed_experts_count_with_their_active_share(active):
    anatomy = Anatomy(make_model("mixtral", vocab_size=V, num_experts_per_tok=active))
    experts, attention = active * 3 * 32 * 48, 2 * 32 * 32 + 2 * 32 * 16
    router = 32 * 4
    assert anatomy.block_weights[0] - router in (experts + attention, experts + attention - router)


@pytest.mark.parametrize("tokens", [1, 7, 30])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj", "opt", "gpt_neox", "qwen3", "gemma2"])
def test_blocks_are_counted_as_pytorch_counts_them(family, tokens):
    """PyTorch counts the S x S matrix of the eager attention; the causal half is checked by hand below."""
    model = make_model(family, vocab_size=V)
    model.set_attn_implementation("eager")
    anatomy = Anatomy(model)
    counter = FlopCounter(anatomy, NoStopper())
    names = [name for name, m in model.named_modules() if any(m is block for block in anatomy.blocks)]
    with FlopCounterMode(display=False) as mode, torch.no_grad():
        model(input_ids=torch.arange(tokens)[None], use_cache=False)
    counts = mode.get_flop_counts()
    per_block = [sum(counts[f"{type(model).__name__}.{name}"].values()) for name in names]
    for depth in range(L + 1):
        assert counter.blocks(depth, tokens, pairs=tokens**2) == sum(per_block[:depth])


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_blocks_with_experts_are_counted_as_pytorch_counts_them(family):
    model = make_model(family, vocab_size=V)
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    counter = FlopCounter(Anatomy(model), NoStopper())
    with FlopCounterMode(display=False) as mode, torch.no_grad():
        model(input_ids=torch.arange(9)[None], use_cache=False)
    measured = sum(mode.get_flop_counts()[f"{type(model).__name__}.model.layers.0"].values())
    assert counter.blocks(1, 9, pairs=81) == measured


def test_pairs_are_the_causal_ones(llama):
    counter = FlopCounter(Anatomy(llama), NoStopper())
    for tokens in (1, 2, 10):
        pairs = sum(1 for q in range(tokens) for key in range(tokens) if key <= q)
        assert counter.blocks(3, tokens) == 2 * 3 * LLAMA_BLOCK * tokens + 4 * pairs * 3 * 32
    one_by_one = sum(counter.blocks(3, 1, pairs=position + 1) for position in range(10))
    assert one_by_one == counter.blocks(3, 10)


def test_head_rows_and_decisions(llama):
    anatomy = Anatomy(llama)
    assert FlopCounter(anatomy, NoStopper()).head(3) == 3 * 2 * V * H
    assert FlopCounter(anatomy, GapStopper()).decisions(7) == 7
    assert FlopCounter(anatomy, FixedStopper(2)).decisions(7) == 0
    arrays = {"support_vectors": torch.rand(4, 2).numpy(), "dual_coef": torch.rand(4).numpy()}
    svm = SVMStopper({**arrays, "intercept": torch.zeros(1).numpy()}, ("gap", "top_prob"))
    assert FlopCounter(anatomy, svm).decisions(2) == 2 * 4 * (3 * 2 + 4)


@pytest.mark.parametrize("stopper", ["fixed:1", "fixed:3", "fixed:5", "none", "gap:0.3"])
def test_flops_ratio_is_the_papers_equation_2(stopper, llama, tokenizer):
    lm = lm_of(llama, tokenizer, stopper=stopper)
    asked = [instance(c, w, n, idx=i) for n, c in enumerate(["a", "the fox hi"]) for i, w in enumerate([" x", " yes"])]
    for request, answer in zip(asked, lm.loglikelihood(asked, True), strict=True):
        s, layer = len(request.args[0]), answer.exit_record.exit_layer  # one token per byte
        assert answer.exit_record.flops_ratio == pytest.approx(
            (2 * layer * (6 * H + s) + V) / (2 * L * (6 * H + s) + V), rel=1e-12
        )
        assert answer.exit_record.pruning_ratio == pytest.approx(1 - layer / L)
    if stopper == "none":
        assert answer.exit_record.flops_ratio == 1


def row_flops(depth, tokens):
    """Blocks 1..depth over one row, by hand for the tiny llama."""
    return depth * (2 * LLAMA_BLOCK * tokens + 4 * (tokens * (tokens + 1) // 2) * 32)


HEAD = 2 * V * H
CONTEXT, CHOICES = "the fox", [" x", " yes"]  # rows of 7 + 1 and 7 + 3 tokens; 2 and 4 scored positions
DENSE = row_flops(L, 8) + row_flops(L, 10) + 6 * HEAD


def run_one(lm, batch=None):
    asked = [instance(CONTEXT, choice, 0, idx=i) for i, choice in enumerate(CHOICES)]
    return lm.loglikelihood(asked, True)[0].exit_record


def test_a_dense_run_counts_itself(llama, tokenizer):
    trace = run_one(lm_of(llama, tokenizer))
    assert trace.flops == trace.flops_dense == DENSE
    assert trace.flops_ratio_total == 1 and trace.layers_run == L


@pytest.mark.parametrize("k", [1, 4])
def test_a_fixed_exit_asks_the_head_for_scores_only(k, llama, tokenizer):
    trace = run_one(lm_of(llama, tokenizer, stopper=f"fixed:{k}"))
    assert trace.flops == row_flops(k, 8) + row_flops(k, 10) + 6 * HEAD
    assert trace.flops_dense == DENSE
    assert trace.layers_run == k


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize("check_layers", ["all", "every:2", "3"])
@pytest.mark.parametrize("threshold", [0.0, 0.05, 0.3, 1.0])
def test_a_rules_run_counts_checks_and_scores_and_uses_the_exits_check_again(
    threshold, check_layers, batch_size, llama, tokenizer
):
    lm = lm_of(llama, tokenizer, stopper=f"gap:{threshold}", check_layers=check_layers, batch_size=batch_size)
    trace = run_one(lm)
    checked = {"all": [1, 2, 3, 4], "every:2": [2, 4], "3": [3]}[check_layers]
    layer = int(trace.exit_layer)
    asked = [k for k in checked if k <= layer]
    reused = layer < L  # the check at the exit block gave the first scored position's logits
    expected = row_flops(layer, 8) + row_flops(layer, 10) + (len(asked) + 6 - reused) * HEAD + len(asked)
    assert trace.flops == expected
    assert trace.flops_ratio_total == pytest.approx(expected / DENSE, rel=1e-12)
    assert trace.layers_run == layer
    assert lm.totals()["head_rows_counted"] == len(asked) + 6 - reused
    assert {0.0: layer == checked[0], 1.0: layer == L}.get(threshold, True)


def test_checks_cost_more_than_they_save_where_nothing_stops(llama, tokenizer):
    assert run_one(lm_of(llama, tokenizer, stopper="gap:1")).flops_ratio_total > 1


def test_one_row_that_answers_many_choices_is_counted_once(llama, tokenizer):
    asked = [instance("the fox", f" {choice}", 0, idx=i) for i, choice in enumerate("abcd")]
    trace = lm_of(llama, tokenizer, stopper="fixed:2").loglikelihood(asked, True)[0].exit_record
    assert trace.flops == row_flops(2, 8) + 2 * HEAD  # "the fox" and the space; the last token is not an input
    assert trace.flops_dense == row_flops(L, 8) + 2 * HEAD


def test_deciding_passes_of_a_document_larger_than_the_batch_are_counted_on_top(llama, tokenizer):
    """Three contexts, two rows a batch: two deciding passes over the contexts alone, then the scoring passes."""
    contexts = ["the fox", "a cat hi", "deer deer goat"]
    asked = [instance(c, " yes", 0, idx=i) for i, c in enumerate(contexts)]
    lengths = [len(c) for c in contexts]
    seen_layers = set()
    for threshold in (0.0, 0.05, 0.1, 0.2, 0.3, 0.5):
        lm = lm_of(llama, tokenizer, stopper=f"gap:{threshold}", batch_size=2)
        trace = lm.loglikelihood(asked, True)[0].exit_record
        gaps = [
            [gap_after_block(llama, lm.anatomy.blocks, lm._encode_pair(c, " yes")[0], k) for k in range(1, L)]
            for c in contexts
        ]
        assert all(abs(g - threshold) > 1e-5 for row in gaps for g in row)
        candidates, extra, depth_tokens, checks = [1, 2, 3, 4], 0, 0, 0
        for part in ([0, 1], [2]):
            if candidates:
                depth = candidates[-1]
                extra += sum(row_flops(depth, lengths[i]) for i in part)
                depth_tokens += sum(depth * lengths[i] for i in part)
                checks += len(part) * len(candidates)
                candidates = [k for k in candidates if all(gaps[i][k - 1] > threshold for i in part)]
        layer = candidates[0] if candidates else L
        seen_layers.add(layer)
        rows = [n + 3 for n in lengths]
        assert trace.exit_layer == layer
        assert trace.flops == extra + sum(row_flops(layer, n) for n in rows) + (checks + 12) * HEAD + checks
        assert trace.flops_dense == sum(row_flops(L, n) for n in rows) + 12 * HEAD
        assert trace.layers_run == pytest.approx(layer + depth_tokens / sum(rows))
    assert len(seen_layers) > 1


@pytest.mark.parametrize("stopper", ["none", "fixed:2", "gap:0.3", "scripted"])
@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_head_rows_are_those_a_hook_on_the_head_sees(stopper, batch_size, llama, tokenizer):
    lm = lm_of(llama, tokenizer, stopper=Scripted() if stopper == "scripted" else stopper, batch_size=batch_size)
    rows = 0

    def count(module, args, output):
        nonlocal rows
        rows += output.shape[0] * output.shape[1]

    handle = llama.lm_head.register_forward_hook(count)
    try:
        answers = lm.loglikelihood(requests(seed=9, shared_context=False), True)
    finally:
        handle.remove()
    assert rows == lm.totals()["head_rows_counted"] > 0
    traces = {id(answer.exit_record): answer.exit_record for answer in answers}.values()
    assert sum(trace.flops for trace in traces) > rows * HEAD


@pytest.mark.parametrize("stopper", ["none", "fixed:2", "gap:0.05", "gap:0.3", "gap:1"])
def test_a_whole_run_is_counted_as_pytorch_counts_it(stopper, tokenizer):
    """Documents of one row each and batches of one: no padding, so that what runs is what is counted."""
    model = make_model("gpt2", vocab_size=V)
    model.set_attn_implementation("eager")
    lm = lm_of(model, tokenizer, stopper=stopper, batch_size=1)
    asked = [instance("the quick fox"[: 3 + n], " yes", n) for n in range(8)]
    with FlopCounterMode(display=False) as mode:
        traces = [a.exit_record for a in lm.loglikelihood(asked, True)]
    lengths = [3 + n + 3 for n in range(8)]
    future = sum(4 * 32 * t.exit_layer * (s * (s - 1) // 2) for t, s in zip(traces, lengths, strict=True))
    decisions = sum(min(t.exit_layer, L - 1) for t in traces) if stopper.startswith("gap") else 0
    assert sum(t.flops for t in traces) == mode.get_total_flops() - future + decisions


def test_a_text_scored_token_by_token_is_counted_as_if_each_token_had_left_at_its_block(llama, tokenizer):
    text = "the quick brown fox"
    asked = [instance(text, None, 0, kind="loglikelihood_rolling")]
    n = len(text)  # the row is the prefix token and all but the last
    (answer,) = lm_of(llama, tokenizer, stopper="fixed:2").loglikelihood_rolling(asked, True)
    assert answer.exit_record.flops == row_flops(2, n) + n * HEAD
    assert answer.exit_record.flops_dense == row_flops(L, n) + n * HEAD
    assert answer.exit_record.flops_ratio == pytest.approx(
        sum((4 * (6 * H + s) + V) / (2 * L * (6 * H + s) + V) for s in range(1, n + 1)) / n
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_weights_to_count(family):
    anatomy = Anatomy(make_model(family, vocab_size=V))
    assert all(w > 0 for w in anatomy.block_weights)
    linear = sum(p.numel() for p in anatomy.blocks[0].parameters() if p.dim() >= 2)
    assert anatomy.block_weights[0] <= linear
