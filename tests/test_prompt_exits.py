"""Prompts that leave early in generate_until (copy, sim) against whole prefixes without a cache, one text at a time."""

from __future__ import annotations

import random

import pytest
import torch
from helpers.models import lm_of, make_model
from helpers.reference import read_logits, states_after_blocks
from helpers.replay import generated
from helpers.stoppers import Scripted, ScriptedByState
from helpers.tasks import instance

from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.structure.arguments import hidden_of

NEW = 5


def questions(n=7, new=NEW, start=""):
    rng = random.Random(3)
    texts = [start + "".join(rng.choice("abcdef ") for _ in range(rng.randint(1, 25))) + "q" for _ in range(n)]
    return [instance(t, {"until": [], "max_gen_toks": new}, i, kind="generate_until") for i, t in enumerate(texts)]


def slow_logits(model, blocks, reader, prompt, new, k):
    """[V] logits behind ``new`` tokens that follow a prompt which left after block k.

    In the later blocks the prompt's tokens are put to the states that their keys and values were made of.
    """
    if not new or reader.startswith("copy") or k == len(blocks):
        return read_logits(model, blocks, reader, [*prompt, *new], len(prompt), k)[-1]
    window, seen, handles = int(reader.partition(":")[2]), [], []
    left = states_after_blocks(model, blocks, prompt)[k - 1]
    away = max(0, len(prompt) - window)
    run = [0, *range(away, len(prompt))] if away else list(range(len(prompt)))
    for block in blocks[k:]:
        handles.append(block.register_forward_hook(lambda m, a, out: seen.append(hidden_of(out)[0].clone())))
    read_logits(model, blocks, reader, prompt, len(prompt), k)
    # the first of these calls found the states after block k, the second is the one of the tokens that run on
    states = seen[-len(blocks[k:]) :]
    for handle in handles:
        handle.remove()
    handles = []
    for n in range(k, len(blocks) + 1):

        def put(module, args, out, n=n):
            hidden = hidden_of(out).clone()
            hidden[0, : len(prompt)] = left
            if n > k:
                hidden[0, run] = states[n - k - 1]
            return hidden if isinstance(out, torch.Tensor) else (hidden, *out[1:])

        handles.append(blocks[n - 1].register_forward_hook(put))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *new]]), use_cache=False).logits[0, -1]
    for handle in handles:
        handle.remove()
    return logits


SHARED = "some words that all of them have "  # 33 tokens


@pytest.mark.parametrize(
    ("reader", "batch_size", "start"),
    [(reader, size, "") for reader in ("copy:1", "copy:4", "sim:1", "sim:4") for size in (1, 3)]
    # windows that begin behind what all prompts share, in it, and before it
    + [(reader, 3, SHARED) for reader in ("copy:1", "copy:20", "copy:99", "sim:4", "sim:20", "sim:99")],
)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mistral", "opt"])
def test_texts_are_those_of_whole_prefixes(family, reader, batch_size, start, tokenizer, monkeypatch):
    model = make_model(family, vocab_size=257)
    lm = lm_of(
        model, tokenizer, stopper=ScriptedByState(), reader=reader, check_layers="all", batch_size=batch_size
    )
    exits = set()
    for row, prompt in generated(lm, questions(start=start), monkeypatch):
        k, new = row.prompt_exit, row.tokens
        exits.add(k)
        assert row.layers == [k, *[lm.n_blocks] * (len(new) - 1)]
        for n in range(len(new)):
            logits = slow_logits(model, lm.anatomy.blocks, reader, prompt, new[:n], k)
            best = logits.topk(2)
            assert best.indices[0] == new[n] or best.values[0] - best.values[1] < 1e-3
    assert len(exits) > 1


@pytest.mark.parametrize("reader", ["copy:2", "copy:20", "sim:2"])
def test_what_prompts_share_is_run_and_copied_once(reader, tokenizer, monkeypatch):
    """Texts, exits and records are those without sharing; what was really run is less by what is shared."""
    model, found = make_model("llama", vocab_size=257), []
    for share in (0, 4096):
        lm = lm_of(
            model, tokenizer, stopper=ScriptedByState(), reader=reader, check_layers="all", batch_size=3,
            prefix_cache=share, token_stopper=Scripted(),
        )  # fmt: skip
        answers = lm.generate_until(questions(start=SHARED), True)
        found.append((lm.engine, list(answers), [answer.exit_record for answer in answers]))
    (alone, *expected), (together, *shared) = found
    assert shared == expected
    depths = [record.prompt_exit_layer for record in expected[1]]
    assert alone.block_tokens - together.block_tokens == len(SHARED) * (sum(depths) - max(depths))
    assert together.copied_tokens < alone.copied_tokens or reader.startswith("sim")


@pytest.mark.parametrize("reader", ["copy:2", "sim:2"])
def test_a_prompt_without_an_exit_gives_the_dense_texts(reader, tokenizer):
    model, asked = make_model("llama", vocab_size=257), questions()
    dense = lm_of(model, tokenizer).generate_until(asked, True)
    lm = lm_of(model, tokenizer, stopper="gap:1.0", reader=reader)
    answers = lm.generate_until(asked, True)
    assert list(answers) == list(dense)
    for answer in answers:
        assert answer.exit_record.prompt_exit_layer == lm.n_blocks == answer.exit_record.exit_layer
        assert answer.exit_record.flops_ratio_total > 1  # what was asked has to be paid
    assert lm.record()["kv_policy"] == "propagate (approximate)"


@pytest.mark.parametrize("reader", ["copy:2", "sim:2"])
def test_new_tokens_leave_where_their_own_stopper_says(reader, tokenizer):
    model, asked = make_model("llama", vocab_size=257), questions()
    lm = lm_of(model, tokenizer, stopper="fixed:2", reader=reader, token_stopper=Scripted())
    records = [answer.exit_record for answer in lm.generate_until(asked, True)]
    assert {record.prompt_exit_layer for record in records} == {2} == {record.layers[0] for record in records}
    assert len({layer for record in records for layer in record.layers[1:]}) > 1
    dense = lm_of(model, tokenizer, stopper="fixed:2", reader=reader)
    assert all(
        record.layers_run < answer.exit_record.layers_run
        for record, answer in zip(records, dense.generate_until(asked, True), strict=True)
        if len(record.layers) > 1 and min(record.layers[1:]) < lm.n_blocks
    )


def test_the_prompt_is_paid_as_in_loglikelihood(tokenizer):
    """One new token: the text costs what a document of one continuation token costs under the same reader."""
    model = make_model("llama", vocab_size=257)
    for reader in ("copy:2", "sim:2"):
        lm = lm_of(model, tokenizer, stopper=ScriptedByState(), reader=reader, check_layers="all")
        asked = questions(new=1)
        scored = [instance(r.args[0], "x", r.doc_id) for r in asked]
        for text, answer in zip(lm.generate_until(asked, True), lm.loglikelihood(scored, True), strict=True):
            mine, other = text.exit_record, answer.exit_record
            assert mine.prompt_exit_layer == other.exit_layer == mine.exit_layer
            assert mine.layers_run == pytest.approx(other.layers_run)
            if reader.startswith("copy"):
                assert mine.flops_ratio_total == pytest.approx(other.flops_ratio_total)
            else:  # and the keys and values for new tokens, which no score needs
                assert mine.flops >= other.flops


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"reader": "copy", "kv_policy": "recompute"}, r"^kv_policy: recompute promises .* give propagate$"),
        ({"token_stopper": "gap:0.8"}, r"^token_stopper: it goes with reader=copy or sim"),
        ({"reader": "sim", "token_stopper": "gapp"}, r"^stopper: "),
    ],
)
def test_wrong_combinations_are_refused_in_one_sentence(options, said, tokenizer):
    with pytest.raises(AdaInferError, match=said):
        lm_of(make_model("llama", vocab_size=257), tokenizer, stopper="gap:0.8", **options)
