"""Contexts are encoded once for all their choices, and every request becomes the tokens that stock HFLM makes of it."""

from __future__ import annotations

from collections import Counter

import pytest
from helpers.models import lm_of, make_model
from helpers.tasks import instance
from hypothesis import example, given, settings
from hypothesis import strategies as st
from lm_eval.models.huggingface import HFLM

from lm_eval_adainfer import paths

PIECES = ["Q: ", "A:", "\n\n", " ", "  ", "\t", "\u00a0", "the", " answer", "er", "s", "1", "23", "é", "日本", "🦊", "<s>", "_"]
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(st.characters(exclude_categories=["Cs"]), max_size=3), max_size=8).map("".join)
REQUESTS = st.lists(st.tuples(TEXTS, st.lists(TEXTS.filter(str.strip), min_size=1, max_size=4)), min_size=1, max_size=4)


def one_word_tokenizer():
    """As Llama 2's: a text is one word, so merges cross every boundary; a BOS token in front."""
    from tokenizers import Tokenizer, models, normalizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    lines = ["Q: the answer\n\nA: 123 answers", "the other answer  is 1", "A:\tthere", "her answer"] * 4
    special = ["<unk>", "<s>", *(f"<0x{n:02X}>" for n in range(256))]
    core.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False))
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="<s>", pad_token="<s>")


def tokenizer_named(name, request):
    from transformers import AutoTokenizer

    if name == "one word":
        return one_word_tokenizer()
    if name == "demo":
        return AutoTokenizer.from_pretrained(paths.demo_model())
    folder = request.getfixturevalue("shared") / "models" / "smollm2-135m-instruct"
    if not folder.is_dir():
        pytest.skip("no SmolLM2 here")
    pytest.importorskip("gguf")
    return AutoTokenizer.from_pretrained(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(params=["one word", "demo", "smollm2"])
def sides(request):
    """Stock HFLM and ours, without and with a BOS token asked for, and what each hands on as tokens."""
    tokenizer = tokenizer_named(request.param, request)
    model = make_model("llama", vocab_size=len(tokenizer))

    def pair(**options):
        found = HFLM(pretrained=model, tokenizer=tokenizer, **options), lm_of(model, tokenizer, **options)
        for lm in found:
            lm._loglikelihood_tokens = lambda requests, **_: requests  # type: ignore[method-assign]
        return found

    return [pair(), pair(add_bos_token=True)]


def test_every_request_becomes_the_tokens_that_stock_makes_of_it(sides):
    @settings(max_examples=60, deadline=None)
    @given(REQUESTS)
    @example([("Q: the\n\nA:  ", [" answer", "  er", "1"]), ("", ["the"]), ("<s>the ans", ["wer", "wers"]), (" \n", ["the", "er"])])
    def check(asked):
        requests = [instance(context, choice, n) for n, (context, some) in enumerate(asked) for choice in some]
        for stock, ours in sides:
            assert ours.loglikelihood(requests, True) == stock.loglikelihood(requests, True)

    check()


def test_a_context_is_encoded_once_for_all_its_choices(sides, monkeypatch):
    _, ours = sides[0]
    seen, encode = Counter(), HFLM.tok_encode

    def counted(self, string, *args, **kwargs):
        seen[string] += 1
        return encode(self, string, *args, **kwargs)

    monkeypatch.setattr(HFLM, "tok_encode", counted)
    asked = [instance(f"Q: {n}\nA:" + " " * (choice == "er"), choice, n) for n in range(3) for choice in ("the", "1", "s", "er")]
    found = ours.loglikelihood(asked, True)
    assert [seen[f"Q: {n}\nA:"] for n in range(3)] == [1, 1, 1] and sum(seen.values()) == 3 * (1 + 4)
    seen.clear()
    assert ours.loglikelihood(asked[:4], True) == found[:4]
    assert seen["Q: 0\nA:"] == 1  # the next call keeps nothing of this one
