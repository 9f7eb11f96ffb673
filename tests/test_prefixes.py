"""Prefixes that documents share are run once: same answers, same exits, fewer tokens run."""

from __future__ import annotations

import random

import pytest
from helpers.models import FAMILIES, make_model
from helpers.reference import score
from helpers.stoppers import Scripted
from helpers.tasks import instance

from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.harness.model import AdaInferLM
from lm_eval_adainfer.prefill import common, probes
from lm_eval_adainfer.prefill.documents import Document, Row
from lm_eval_adainfer.strategies.specs import parse
from lm_eval_adainfer.structure.anatomy import Anatomy

SHARED = "a few shots that all documents of a task begin with. "


def lm_of(model, tokenizer, **kwargs):
    return AdaInferLM(pretrained=model, tokenizer=tokenizer, **{"batch_size": 4, "max_length": 128, **kwargs})


def asked(documents=9, shared=SHARED, seed=0, choices=(" x", " yz", " abc")):
    rng = random.Random(seed)
    found = []
    for doc in range(documents):
        text = shared + "".join(rng.choice("abcdef ") for _ in range(rng.randint(3, 20)))
        found += [instance(text, choice, doc, idx=i) for i, choice in enumerate(choices)]
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stopper", ["none", "scripted"])
def test_answers_and_exits_are_those_of_whole_prompts(family, stopper, tokenizer):
    model = make_model(family, vocab_size=257)
    spec = Scripted() if stopper == "scripted" else "none"
    whole = lm_of(model, tokenizer, stopper=spec, prefix_cache=0)
    once = lm_of(model, tokenizer, stopper=spec)
    requests = asked()
    expected, found = whole.loglikelihood(requests, True), once.loglikelihood(requests, True)
    for a, b in zip(expected, found, strict=True):
        assert b[0] == pytest.approx(a[0], abs=2e-4) and b[1] == a[1]
        assert b.exit_record.exit_layer == a.exit_record.exit_layer and b.exit_record.flops_ratio_total == a.exit_record.flops_ratio_total
    for request, answer in list(zip(requests, found, strict=True))[:4]:
        context, continuation = once._encode_pair(*request.args)
        slow = score(model, once.anatomy.blocks, context, continuation, int(answer.exit_record.exit_layer), 128)
        assert answer[0] == pytest.approx(slow[0], abs=2e-4)
    if once.found_sharing.rule:
        assert once.engine.block_tokens < 0.6 * whole.engine.block_tokens
        assert once.engine.tokens == whole.engine.tokens
    else:
        assert family == "mamba"
    if stopper == "scripted":
        assert len({a.exit_record.exit_layer for a in found}) > 1


def test_a_prefix_is_run_no_deeper_than_needed(tokenizer):
    model = make_model("llama", vocab_size=257)
    lm, requests = lm_of(model, tokenizer, stopper="fixed:2", batch_size=64), asked()
    calls = []
    handles = [
        block.mlp.register_forward_hook(lambda m, a, out, k=k: calls.append((k, out.shape[1])))
        for k, block in enumerate(lm.anatomy.blocks, 1)
    ]
    lm.loglikelihood(asked(seed=9), True)  # what can be shared is found out here
    calls.clear()
    lm.loglikelihood(requests, True)
    for handle in handles:
        handle.remove()
    # a block is called with the shared tokens once, and with what follows them once a batch
    assert [k for k, width in calls if width >= len(SHARED)] == [1, 2]
    assert {k for k, _ in calls} == {1, 2}


def test_shots_that_differ_are_not_shared(tokenizer):
    model = make_model("llama", vocab_size=257)
    requests = []
    for doc in range(6):
        requests += asked(1, shared=f"{doc} shots of its own, no two alike. ", seed=doc, choices=["x"])
        requests[-1].doc_id = doc
    whole, once = lm_of(model, tokenizer, prefix_cache=0), lm_of(model, tokenizer)
    assert whole.loglikelihood(requests, True) == once.loglikelihood(requests, True)
    assert whole.engine.block_tokens == once.engine.block_tokens


def test_two_tasks_each_share_their_own(tokenizer):
    model = make_model("llama", vocab_size=257)
    a, b = asked(5), asked(5, shared="quite another beginning, of another task, that goes on and on. ", seed=3)
    for request in b:
        request.task_name = "u"
    mixed = [x for pair in zip(a, b, strict=True) for x in pair]
    whole, once = lm_of(model, tokenizer, prefix_cache=0), lm_of(model, tokenizer)
    for x, y in zip(whole.loglikelihood(mixed, True), once.loglikelihood(mixed, True), strict=True):
        assert x[0] == pytest.approx(y[0], abs=2e-4)
    assert once.engine.block_tokens < 0.6 * whole.engine.block_tokens


LONG = [" x and more than that", " yz or something else", " abc, which is the third of them", " d"]


@pytest.mark.parametrize("shared", ["", SHARED])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
@pytest.mark.parametrize("stopper", ["none", "fixed:2", "scripted"])
def test_choices_of_several_tokens_share_their_context(shared, batch_size, stopper, tokenizer):
    """Of every document alone, whatever the batch; and behind what the documents share."""
    model = make_model("llama", vocab_size=257, max_position_embeddings=256)
    spec = Scripted() if stopper == "scripted" else stopper
    requests = asked(6, shared, choices=LONG)
    for request in requests:
        request.arguments = (request.args[0] + " and a context of its own", request.args[1])
    whole = lm_of(model, tokenizer, stopper=spec, prefix_cache=0, batch_size=batch_size, max_length=256)
    once = lm_of(model, tokenizer, stopper=spec, batch_size=batch_size, max_length=256)
    for a, b in zip(whole.loglikelihood(requests, True), once.loglikelihood(requests, True), strict=True):
        assert b[0] == pytest.approx(a[0], abs=2e-4) and b[1] == a[1]
        assert b.exit_record == a.exit_record
    assert once.engine.head_rows == whole.engine.head_rows
    tokens = 0  # every distinct context once (but for its last token), and what follows it once per choice
    contexts = {}
    for request in requests:
        context, continuation = once._encode_pair(*request.args)
        contexts[tuple(context)] = len(context) - 1
        tokens += len(continuation)
    tokens += sum(contexts.values()) - (len(contexts) - 1) * len(shared)
    if shared and batch_size == 64:  # a batch is not made smaller for a beginning that saves little
        tokens += (len(contexts) - 1) * len(shared)
    depth = {"none": 5, "fixed:2": 2}.get(stopper)
    if depth is not None:
        assert once.engine.block_tokens <= tokens * depth * 1.02  # the shared beginning may be a token shorter


def test_documents_of_several_contexts_and_mixed_lengths(tokenizer):
    """Contexts that differ by choice, with one or several continuations each, and documents that share nothing."""
    model = make_model("llama", vocab_size=257)
    rng, requests = random.Random(5), []
    for doc in range(8):
        stem = "".join(rng.choice("abcdef ") for _ in range(rng.randint(1, 40)))
        contexts = [stem + end for end in (" he", " she")] if doc % 2 else [stem]
        pairs = [(c, k) for c in contexts for k in LONG[: 1 + doc % 4]]
        requests += [instance(c, k, doc, idx=i) for i, (c, k) in enumerate(pairs)]
    for batch_size in (1, 2, 5, 64):
        whole = lm_of(model, tokenizer, stopper=Scripted(), prefix_cache=0, batch_size=batch_size)
        once = lm_of(model, tokenizer, stopper=Scripted(), batch_size=batch_size)
        for a, b in zip(whole.loglikelihood(requests, True), once.loglikelihood(requests, True), strict=True):
            assert b[0] == pytest.approx(a[0], abs=2e-4) and b[1] == a[1]
            assert b.exit_record.exit_layer == a.exit_record.exit_layer


def test_truncated_prompts_and_short_limits_stay_right(tokenizer):
    """Prefixes longer than the window are cut with their prompts; a small prefix_cache shares only so much."""
    model = make_model("llama", vocab_size=257)
    for options in ({"max_length": 40}, {"prefix_cache": 20}):
        whole = lm_of(model, tokenizer, **{**options, "prefix_cache": 0}).loglikelihood(asked(), True)
        found = lm_of(model, tokenizer, **options).loglikelihood(asked(), True)
        for x, y in zip(whole, found, strict=True):
            assert x[0] == pytest.approx(y[0], abs=2e-4)


def documents(*prompts):
    return [Document([Row(list(prompt), 1)], [0]) for prompt in prompts]


def test_groups_by_hand():
    head = list(range(100, 140))
    same = documents(*([*head, n, n, n] for n in range(5)))
    other = documents(*([*range(50), 7, n] for n in range(4)))
    lonely = documents([1, 2, 3, 4])
    found = common.groups([*same, *other, *lonely], rows=4, most=1000)
    assert [(len(members), prefix) for members, prefix in found] == [(4, [*range(50), 7]), (5, head), (1, [])]
    assert common.groups(same, rows=4, most=30)[0][1] == head[:30]
    assert common.groups(lonely, rows=4, most=30) == [(lonely, [])]
    few = documents([*head, *range(500)], [*head, *range(700, 1200)])
    assert common.groups(few, rows=8, most=1000) == [(sorted(few, key=lambda d: d.rows[0].tokens), [])]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_usable_is_known_by_family(family):
    anatomy = Anatomy(make_model(family))
    if family == "mamba":
        found = probes.sharing(anatomy)
        assert found == probes.Sharing(None, "every prompt is run whole", "blocks keep a recurrent state")
    else:
        rule = probes.sharing(anatomy).rule
        assert rule is not None and rule.apart == (
            anatomy.model.config._attn_implementation == "sdpa" and family != "falcon"  # Falcon has one of its own
        )


def test_a_wrong_number_is_one_sentence(tokenizer):
    with pytest.raises(AdaInferError, match=r"^prefix_cache: 'many' is no number of tokens; give 0 or more$"):
        lm_of(make_model("llama", vocab_size=257), tokenizer, stopper=parse("none"), prefix_cache="many")
