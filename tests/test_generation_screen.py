"""Screens: a check reads few rows of the head first, against a rule spelled out on whole forwards of every prefix."""

from __future__ import annotations

import random

import pytest
import torch
from helpers.models import make_model
from helpers.reference import gap_after_block, logits_after_block
from helpers.replay import assert_exact, decode_greedily, finishes_in_turn, prepared, prompts_of
from helpers.stoppers import Dice, fitted
from helpers.tasks import instance
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_eval_adainfer.counting import FlopCounter
from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.generation import screen
from lm_eval_adainfer.generation.decoded import record_of
from lm_eval_adainfer.generation.screen import Screen, side_by_side
from lm_eval_adainfer.harness.model import AdaInferLM
from lm_eval_adainfer.strategies.rules import GapStopper
from lm_eval_adainfer.strategies.specs import parse
from lm_eval_adainfer.structure.anatomy import Anatomy

STEPS = 9
CHECKED = [1, 2, 3, 4]


def screened_tokens(ids, first, most=256):
    """The first token ids, and the newest distinct ones of a row's that are none of them."""
    own = [token for token in dict.fromkeys(reversed(ids)) if token >= first]
    return [*range(first), *own[:most]]


def exits_by_hand(model, blocks, ids, first, threshold):
    """(the block after which a token leaves, logits of screens, rows of the whole head), from a whole forward each."""
    some = screened_tokens(ids, first)
    count = heads = 0
    for k in CHECKED:
        logits = logits_after_block(model, blocks, ids, k)[-1]
        count += len(some)
        few, whole = (x.softmax(-1).topk(2).values for x in (logits[some], logits))
        few, whole = (float(x[0] - x[1]) for x in (few, whole))
        assert min(abs(few - threshold), abs(whole - threshold)) > 1e-6
        if few > threshold:
            heads += 1
            if whole > threshold:
                return k, count, heads
    return len(blocks), count, heads + 1


def middling(model, anatomy):
    """A threshold that a quarter of the decisions exceed."""
    gaps = sorted(gap_after_block(model, anatomy.blocks, p, k) for p in prompts_of(6, seed=30) for k in CHECKED)
    return sum(gaps[-len(gaps) // 4 - 1 :][:2]) / 2


@pytest.mark.parametrize("family", ["llama", "gptj", "gemma2", "cohere", "opt"])
@pytest.mark.parametrize("rows", [1, 6])
def test_a_token_leaves_where_the_screen_and_the_whole_head_say_so(family, rows):
    """With a bias in the head (GPT-J), soft-caps (Gemma 2) or scaled logits (Cohere) too; counts included."""
    model, anatomy, windows = prepared(family)
    prompts, threshold = prompts_of(rows, seed=40 + rows), middling(model, anatomy)
    depths = {}
    for first in (3, 40, 101):
        decoder, logits = decode_greedily(
            anatomy, windows, GapStopper(threshold), prompts, STEPS, finishes_in_turn, screen=first
        )
        for prompt, result in zip(prompts, decoder.results, strict=True):
            texts = [[*prompt, *result.tokens[:n]] for n in range(len(result.layers))]
            found = [exits_by_hand(model, anatomy.blocks, ids, first, threshold) for ids in texts]
            assert result.layers == [layer for layer, _, _ in found]
            if first < 101:
                assert (result.screened, result.head_rows) == tuple(map(sum, list(zip(*found, strict=True))[1:]))
                counter = FlopCounter(anatomy, GapStopper(threshold))
                blocks = zip(anatomy.block_weights, anatomy.attention_width, result.block_tokens, result.pairs, strict=True)
                expected = sum(2 * w * t + 4 * width * p for w, width, t, p in blocks) + result.decisions
                expected += 2 * anatomy.hidden_size * (101 * result.head_rows + result.screened)
                counter.stored_weights = windows.stored_weights
                assert record_of(result, len(prompt), counter, "").flops == expected
        assert_exact(model, decoder, prompts, logits)
        depths[first] = [layer for result in decoder.results for layer in result.layers]
    exact, _ = decode_greedily(anatomy, windows, GapStopper(threshold), prompts, STEPS, finishes_in_turn)
    assert depths[101] == [layer for result in exact.results for layer in result.layers]  # all of it: nothing to screen
    assert rows == 1 or len(set(depths[40])) >= 2


def test_a_screen_that_never_stops_reads_the_whole_head_once_a_token():
    _, anatomy, windows = prepared("llama")
    decoder, _ = decode_greedily(anatomy, windows, GapStopper(1.0), prompts_of(4, seed=4), STEPS, screen=10)
    assert all(result.head_rows == STEPS and result.decisions == 4 * STEPS for result in decoder.results)


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=20), min_size=1, max_size=4),
    first=st.integers(1, 13),
    most=st.integers(1, 6),
    asked=st.sets(st.integers(1, 20)),
)
def test_own_tokens_follow_from_the_text_alone_however_often_they_are_asked_for(texts, first, most, asked):
    before, screen.MOST_OWN = screen.MOST_OWN, most
    try:
        found, state = [], Screen(first)
        for row, text in enumerate(texts):
            for n in sorted(n for n in asked if n < len(text)):
                state.own(row, torch.tensor(text[:n]))
            found.append(state.own(row, torch.tensor(text)))
            assert sorted(found[-1].tolist()) == sorted(screened_tokens(text, first, most)[first:])
    finally:
        screen.MOST_OWN = before
    candidates, fill = side_by_side(found, torch.device("cpu"))
    assert candidates.shape == (len(texts), max(map(len, found)))
    for n, ids in enumerate(found):
        assert candidates[n, : len(ids)].tolist() == ids.tolist()
        assert fill is None or fill[n].tolist() == [i >= len(ids) for i in range(candidates.shape[1])]
    assert (fill is None) == (len(set(map(len, found))) == 1)
    state.forget(0)
    assert sorted(state.own(0, torch.tensor(texts[-1])).tolist()) == sorted(screened_tokens(texts[-1], first)[first:])


@pytest.mark.parametrize("family", ["llama", "falcon"])
def test_a_screen_depends_on_the_row_alone(family, tokenizer):
    """Texts, exits and what is counted, in batches of any size in which rows come and go, and behind shared tokens."""
    model = make_model(family, vocab_size=257, max_position_embeddings=512)
    draw = random.Random(1)
    texts = ["some words that all of them have " * 2 + "".join(draw.choices("abcdef ", k=k % 5 + 1)) for k in range(9)]
    asked = [
        instance(t, {"until": ["\n"], "max_gen_toks": 4 + n % 5}, n, kind="generate_until") for n, t in enumerate(texts)
    ]
    found, threshold = [], middling(model, Anatomy(model))
    for size, share in ((1, 0), (1, 4096), (4, 4096), (9, 0)):
        lm = AdaInferLM(
            pretrained=model, tokenizer=tokenizer, batch_size=size, max_length=200, stopper=GapStopper(threshold),
            head_check="screen:70", prefix_cache=share,
        )  # fmt: skip
        answers = lm.generate_until(asked, True)
        found.append([(a, a.exit_record.layers, a.exit_record.flops) for a in answers])
    assert all(other == found[0] for other in found[1:])
    assert len({layer for _, layers, _ in found[0] for layer in layers}) >= 2


def test_what_a_screen_is_called(tokenizer):
    model = make_model("llama", vocab_size=257)

    def built(check):
        return AdaInferLM(pretrained=model, tokenizer=tokenizer, stopper="gap", head_check=check)

    records = {check: built(check).get_model_info()["adainfer"] for check in ("exact", "screen", "screen:70", "shortlist:70")}
    assert {check: found["head_check"] for check, found in records.items()} == {
        "exact": "exact", "screen": "screen:4096", "screen:70": "screen:70", "shortlist:70": "shortlist:70",
    }  # fmt: skip
    assert len({found["fingerprint"] for found in records.values()}) == 4


def test_a_stopper_that_a_screen_cannot_speak_for_is_refused(tokenizer):
    """Those that may stop where the gap is small, and those that remember; what reads no head has nothing to screen."""
    model = make_model("llama", vocab_size=257)
    for stopper in (parse("patience:2"), fitted(n_features=2)[1], Dice()):
        with pytest.raises(AdaInferError) as caught:
            AdaInferLM(pretrained=model, tokenizer=tokenizer, stopper=stopper, head_check="screen")
        assert str(caught.value) == (
            "head_check: screen needs a stopper that reads the head for gap or top_prob alone and stops where they "
            f"are large, as gap and softmax do, and {stopper.kind} does not; use head_check=exact"
        )
    for stopper in ("gap:0.9", "softmax:0.9", "saturation:0.9", "fixed:2", "none"):
        AdaInferLM(pretrained=model, tokenizer=tokenizer, stopper=stopper, head_check="screen")


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=2), st.integers(1, 9))
def test_stoppers_that_are_said_to_rise_do(values, block):
    """A larger gap never has a smaller margin."""
    low, high = sorted(values)
    for stopper in (parse("gap:0.4"), parse("softmax:0.4")):
        assert stopper.rises and set(stopper.features) <= {"gap", "top_prob"}
        assert stopper.margin(block, torch.tensor([[low]])) <= stopper.margin(block, torch.tensor([[high]]))
    assert not any(parse(spec).rises for spec in ("none", "saturation:0.9", "patience:2", "choice_gap:0.5", "fixed:3"))
