"""Automatic batch sizes: found once for a model, never another than what trying it out would find."""

from __future__ import annotations

import pytest
from helpers.models import lm_of, make_model
from helpers.tasks import instance
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.models.huggingface import HFLM

from lm_eval_adainfer.harness.batch_sizes import BatchSizes

MOST = 64


@given(
    falls=st.lists(st.integers(1, 40), max_size=6).map(sorted), lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30)
)
def test_what_is_kept_is_what_would_be_found(falls, lengths):
    def largest(length):  # halved at every length in ``falls``
        return MOST >> sum(length >= at for at in falls)

    sizes, tried = BatchSizes(), []
    for length in lengths:
        known = sizes.of(length, MOST)
        if known is None:
            tried.append(length)
            sizes.keep(length, largest(length))
        else:
            assert known == largest(length)
    assert len(set(tried)) == len(tried)


@pytest.fixture
def tried(monkeypatch):
    """The lengths for which stock tries sizes out; rows of more than 20 tokens get smaller batches."""
    found = []

    def detect(self, requests=None, pos=0):
        length = self.max_length if not requests else len(requests[pos][1]) + len(requests[pos][2]) - 1
        found.append(length)
        return 2 if length > 20 else MOST

    monkeypatch.setattr(HFLM, "_detect_batch_size", detect)
    return found


@pytest.mark.parametrize("generation", ["early", "dense"])
def test_no_size_is_tried_out_twice(generation, tried, tokenizer):
    model = make_model("llama", vocab_size=257)
    lm = lm_of(model, tokenizer, stopper="gap:0.3", generation=generation, batch_size="auto", max_batch_size=MOST)
    fixed = lm_of(model, tokenizer, stopper="gap:0.3", generation=generation, batch_size=3)
    scored = [instance("a fox" * (1 + n), " x", n) for n in range(4)]
    rolled = [instance("a deer" * (1 + n), None, n, kind="loglikelihood_rolling") for n in range(3)]
    asked = [instance("a cat" * (1 + n), {"until": ["\0"], "max_gen_toks": 3}, n, kind="generate_until") for n in range(3)]
    for _ in range(2):
        assert list(lm.generate_until(asked, True)) == list(fixed.generate_until(asked, True))
        for name, some in (("loglikelihood_rolling", rolled), ("loglikelihood", scored)):
            ours, theirs = (getattr(x, name)(some, True) for x in (lm, fixed))
            first = (lambda a: a[0]) if name == "loglikelihood" else float
            assert [first(a) for a in ours] == pytest.approx([first(a) for a in theirs], abs=1e-4)
    longest = len(lm.tok_encode("a fox" * 4)) + 1
    assert tried == [lm.max_length, longest]  # generated and rolled texts are tried at the whole window
    lm.loglikelihood(scored[:2], True)  # of 11 tokens, where nothing is known yet
    lm.loglikelihood(scored[:1], True)  # shorter than what got the largest size there is
    assert tried == [lm.max_length, longest, len(lm.tok_encode("a fox" * 2)) + 1]
