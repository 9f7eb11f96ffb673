"""The features against a slow, obvious computation: one row at a time, plain hooks, parts named by hand."""

from __future__ import annotations

import pytest
import torch
from helpers.models import lm_of, make_model
from helpers.reference import PARTS, slow_features
from helpers.stoppers import Scripted
from helpers.tasks import instance, requests

from lm_eval_adainfer.strategies.base import Stopper
from lm_eval_adainfer.strategies.features import FEATURES, RECORDED
from lm_eval_adainfer.traces.plan import Plan
from lm_eval_adainfer.traces.recorders import Recorder

FAMILY_NAMES = list(PARTS)


def choices_of(lm, asked, doc, context):
    """The tokens of a document's choices after a context, if they are two or more and a token each that differ."""
    pairs = [lm._encode_pair(*r.args) for r in asked if r.doc_id == doc]
    mine = [continuation for before, continuation in pairs if before == context]
    tokens = [continuation[0] for continuation in mine]
    alike = all(len(c) == 1 for c in mine) and len(set(tokens)) == len(tokens)
    return tokens if alike and len(tokens) > 1 else []


def contexts_of(lm, asked):
    """Document -> its distinct contexts as tokens, in order."""
    found = {}
    for request in asked:
        context = lm._encode_pair(*request.args)[0]
        if context not in found.setdefault(request.doc_id, []):
            found[request.doc_id].append(context)
    return found


class Watching(Stopper):
    """Reads all features, exits by a rule of the block and the values, and keeps what it was shown."""

    kind = "watching"
    features = tuple(name for name in FEATURES if not FEATURES[name].choices)

    def __init__(self):
        self.shown = []

    def margin(self, block, values, memory=None):
        self.shown += [(block, row) for row in values.tolist()]
        return torch.frac(values.sum(-1).abs() * 9973 + block * 0.37) - 0.6


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("shared_context", [True, False])
def test_logged_features_are_the_slow_ones_while_documents_leave_around_them(family, shared_context, tokenizer):
    model = make_model(family, vocab_size=257)
    lm = lm_of(model, tokenizer, stopper=Scripted(), batch_size=16, log_features=True)
    asked = requests(seed=2, documents=12, shared_context=shared_context)
    answers = lm.loglikelihood(asked, True)
    contexts = contexts_of(lm, asked)
    traces = {r.doc_id: a.exit_record for r, a in zip(asked, answers, strict=True)}
    assert len({t.exit_layer for t in traces.values()}) > 1, "nothing left early, so compaction is not tested"
    for doc, trace in traces.items():
        assert len(trace.features) == len(contexts[doc])
        for seen, context in zip(trace.features, contexts[doc], strict=True):
            depth = int(trace.exit_layer)
            assert seen["layer"] == list(range(1, depth + 1))
            choices = choices_of(lm, asked, doc, context)
            expected = slow_features(model, family, context, choices)
            for name in RECORDED:
                if FEATURES[name].choices and not choices:
                    assert name not in seen, "NaN is no JSON"
                    continue
                assert seen[name] == pytest.approx(expected[name][:depth], abs=2e-5), (doc, name)
            assert seen["cos_attn"][0] == seen["cos_mlp"][0] == 0.0


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_stopper_is_shown_the_slow_features_in_its_order_and_nothing_after_its_document_left(family, tokenizer):
    model = make_model(family, vocab_size=257)
    stopper = Watching()
    lm = lm_of(model, tokenizer, stopper=stopper, batch_size=32)
    asked = requests(seed=4, documents=7)
    answers = lm.loglikelihood(asked, True)
    layers = {r.doc_id: int(a.exit_record.exit_layer) for r, a in zip(asked, answers, strict=True)}
    assert len(set(layers.values())) > 1
    expected = []
    for doc, (context,) in contexts_of(lm, asked).items():
        slow = slow_features(model, family, context)
        expected += [(k, [slow[name][k - 1] for name in Watching.features]) for k in range(1, min(layers[doc], 4) + 1)]
    assert len(stopper.shown) == len(expected)
    for (block, row), (slow_block, slow_row) in zip(sorted(stopper.shown), sorted(expected), strict=True):
        assert block == slow_block
        assert row == pytest.approx(slow_row, abs=2e-5)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_recorder_keeps_the_slow_features_of_every_block(family, tokenizer):
    model = make_model(family, vocab_size=257)
    lm = lm_of(model, tokenizer)
    asked = requests(seed=6, documents=4, shared_context=False)
    recorder = Recorder(lm, Plan.of(lm.anatomy))
    with lm.engine.observed(recorder):
        lm.loglikelihood(asked, True)
    assert recorder.plan.features == tuple(RECORDED)
    contexts = contexts_of(lm, asked)
    assert len(recorder.records) == len(contexts)
    for first, record in recorder.records.items():
        for found, context in zip(record["said"]["head"]["features"], contexts[asked[first].doc_id], strict=True):
            choices = choices_of(lm, asked, asked[first].doc_id, context)
            expected = slow_features(model, family, context, choices)
            for column, name in enumerate(recorder.plan.features):
                assert [row[column] for row in found] == pytest.approx(expected[name], abs=2e-5, nan_ok=True)


def test_probabilities_are_of_the_full_vocabulary_in_float32_even_for_a_half_precision_model(tokenizer):
    model = make_model("llama", vocab_size=257).to(torch.bfloat16)
    lm = lm_of(model, tokenizer, stopper="gap:1", log_features=True)
    asked = [instance("the quick brown fox", " x", 0)]
    (seen,) = lm.loglikelihood(asked, True)[0].exit_record.features
    context = lm._encode_pair(*asked[0].args)[0]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([context])).logits[0, -1]
    first, second = logits.double().softmax(-1).topk(2).values.tolist()
    assert seen["top_prob"][-1] == pytest.approx(first, rel=1e-5)
    assert seen["gap"][-1] == pytest.approx(first - second, rel=1e-5, abs=1e-6)


def test_features_are_in_their_ranges_and_only_checked_blocks_and_the_last_are_logged(tokenizer):
    model = make_model("llama", vocab_size=257)
    lm = lm_of(model, tokenizer, stopper="gap:1", check_layers="2+4", log_features=True)
    for answer in lm.loglikelihood(requests(seed=1, documents=5), True):
        for seen in answer.exit_record.features:
            assert set(seen["layer"]) >= {2, 4}
            assert all(0 <= g <= p <= 1 for g, p in zip(seen["gap"], seen["top_prob"], strict=True))
            assert all(abs(c) <= 1 + 1e-6 for name in ("cos_hidden", "cos_attn", "cos_mlp") for c in seen[name])


def test_logging_features_changes_no_answer_and_no_count(tokenizer):
    model = make_model("gptj", vocab_size=257)
    asked = requests(seed=8, documents=6)
    plain = lm_of(model, tokenizer, stopper="gap:0.3").loglikelihood(asked, True)
    logged = lm_of(model, tokenizer, stopper="gap:0.3", log_features=True).loglikelihood(asked, True)
    for a, b in zip(plain, logged, strict=True):
        assert b[0] == pytest.approx(a[0], abs=1e-5) and b[1] == a[1]
        assert (b.exit_record.exit_layer, b.exit_record.flops_ratio_total) == (a.exit_record.exit_layer, a.exit_record.flops_ratio_total)
        assert a.exit_record.features is None


def test_features_are_logged_whatever_the_batch_size(tokenizer):
    model = make_model("llama", vocab_size=257)
    asked = [instance(f"the fox {c}", " x", 0, idx=n) for n, c in enumerate("abc")]
    few = lm_of(model, tokenizer, stopper="gap:0.9", batch_size=2, log_features=True).loglikelihood(asked, True)
    many = lm_of(model, tokenizer, stopper="gap:0.9", batch_size=8, log_features=True).loglikelihood(asked, True)
    assert few[0].exit_record.exit_layer == many[0].exit_record.exit_layer
    assert len(few[0].exit_record.features) == len(many[0].exit_record.features) == 3


def test_a_block_without_attention_has_the_other_features(tokenizer):
    lm = lm_of(make_model("mamba", vocab_size=257), tokenizer, stopper="gap:1", log_features=True)
    assert {"gap", "top_prob", "cos_hidden"} <= set(lm.engine.log.names)
