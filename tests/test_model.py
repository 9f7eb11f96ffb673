"""The model type against the slow reference: every family, batch size and exit pattern."""

from __future__ import annotations

import random

import pytest
import torch
from helpers.models import FAMILIES, lm_of, make_model
from helpers.reference import gap_after_block, logits_after_block, score
from helpers.stoppers import Scripted
from helpers.tasks import WORDS, instance, requests
from lm_eval.models.huggingface import HFLM

from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.harness.model import AdaInferLM


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_equals_stock_hf(family, tokenizer):
    model = make_model(family, vocab_size=257)
    asked = requests()
    stock = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, max_length=64).loglikelihood(asked, True)
    ours = lm_of(model, tokenizer).loglikelihood(asked, True)
    for a, b in zip(stock, ours, strict=True):
        assert b[0] == pytest.approx(a[0], rel=2e-6, abs=1e-4)
        assert b[1] == a[1]
        assert b.exit_record.exit_layer == 5 and b.exit_record.pruning_ratio == 0 and b.exit_record.flops_ratio_total == pytest.approx(1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("k", [1, 3])
def test_fixed_exit_equals_norm_and_head_of_that_block(family, k, tokenizer):
    model = make_model(family, vocab_size=257)
    lm = lm_of(model, tokenizer, stopper=f"fixed:{k}")
    asked = requests(documents=4)
    for request, answer in zip(asked, lm.loglikelihood(asked, True), strict=True):
        context, continuation = lm._encode_pair(*request.args)
        logprob, greedy, top1 = score(model, lm.anatomy.blocks, context, continuation, k, 64)
        assert answer[0] == pytest.approx(logprob, rel=2e-6, abs=1e-4)
        assert (answer[1], answer.top1, answer.exit_record.exit_layer) == (greedy, top1, k)


@pytest.mark.parametrize("family", FAMILIES)
def test_documents_leave_at_their_own_block_and_do_not_disturb_each_other(family, tokenizer):
    model = make_model(family, vocab_size=257)
    lm = lm_of(model, tokenizer, stopper=Scripted(), batch_size=16)
    asked = requests(documents=8)
    answers = lm.loglikelihood(asked, True)
    for request, answer in zip(asked, answers, strict=True):
        context, continuation = lm._encode_pair(*request.args)
        logprob, *_ = score(model, lm.anatomy.blocks, context, continuation, int(answer.exit_record.exit_layer), 64)
        assert answer[0] == pytest.approx(logprob, rel=2e-6, abs=1e-4)
    layers = {r.doc_id: a.exit_record.exit_layer for r, a in zip(asked, answers, strict=True)}
    assert len(set(layers.values())) > 1


def expected_exit(model, lm, contexts, threshold, checked):
    """The rule, naively: the first checked block after which every distinct context's gap exceeds the threshold."""
    for k in checked:
        gaps = [gap_after_block(model, lm.anatomy.blocks, c[-64:], k) for c in contexts]
        assert all(abs(g - threshold) > 1e-4 for g in gaps), "the reference is too near the threshold to decide"
        if all(g > threshold for g in gaps):
            return k
    return lm.anatomy.n_blocks


@pytest.mark.parametrize("shared_context", [True, False])
@pytest.mark.parametrize("batch_size", [1, 3, 32])
@pytest.mark.parametrize(
    ("options", "checked"),
    [
        ({}, (1, 2, 3, 4)),
        ({"check_layers": "every:2", "min_layer": 2}, (2, 4)),
        ({"check_layers": "2+3"}, (2, 3)),
    ],
)
def test_one_decision_per_document(shared_context, batch_size, options, checked, tokenizer):
    model = make_model("llama", vocab_size=257)
    lm = lm_of(model, tokenizer, stopper="gap:0.3", batch_size=batch_size, **options)
    asked = requests(seed=3, shared_context=shared_context)
    answers = lm.loglikelihood(asked, True)
    for doc in {r.doc_id for r in asked}:
        mine = [(r, a) for r, a in zip(asked, answers, strict=True) if r.doc_id == doc]
        contexts = [lm._encode_pair(*r.args)[0] for r, _ in mine]
        layer = expected_exit(model, lm, contexts, 0.3, checked)
        assert {a.exit_record.exit_layer for _, a in mine} == {layer}
        for request, answer in mine:
            context, continuation = lm._encode_pair(*request.args)
            assert answer[0] == pytest.approx(
                score(model, lm.anatomy.blocks, context, continuation, layer, 64)[0], abs=1e-4
            )


def test_results_do_not_depend_on_order_batch_size_or_limit(tokenizer):
    model = make_model("llama", vocab_size=257)
    asked = requests(seed=5, shared_context=False)
    base = lm_of(model, tokenizer, stopper="gap:0.3", batch_size=1).loglikelihood(asked, True)
    expected = {(r.doc_id, r.idx): (a[0], a[1], a.exit_record.exit_layer) for r, a in zip(asked, base, strict=True)}
    variants = [(list(reversed(asked)), 2), (asked[:11], 7), (random.Random(1).sample(asked, len(asked)), "auto")]
    for subset, size in variants:
        kept = {r.doc_id for r in asked} - ({asked[11].doc_id} if len(subset) == 11 else set())
        answers = lm_of(model, tokenizer, stopper="gap:0.3", batch_size=size, max_batch_size=8).loglikelihood(
            subset, True
        )
        for r, a in zip(subset, answers, strict=True):
            if r.doc_id in kept:
                logprob, greedy, layer = expected[r.doc_id, r.idx]
                assert (a[1], a.exit_record.exit_layer) == (greedy, layer)
                assert a[0] == pytest.approx(logprob, rel=2e-6, abs=1e-4)


class Detector:
    """Takes the place of the search for the largest batch size; longer rows get smaller batches."""

    def __init__(self, lm, size):
        self.asked, self.size = [], size
        lm._detect_batch_size = self
        lm.max_batch_size = 64

    def __call__(self, rows=None, pos=0):
        self.asked.append(pos)
        return self.size(len(rows[pos][1])) if rows else 3


@pytest.mark.parametrize("schedule", [1, 4, 7])
@pytest.mark.parametrize("size", [lambda n: 5, lambda n: 64, lambda n: max(1, 20 - n)], ids=["5", "64", "falling"])
def test_auto_batch_sizes_are_found_as_stock_finds_them_at_any_number_of_documents(schedule, size, tokenizer):
    model = make_model("llama", vocab_size=257)
    both = [cls(pretrained=model, tokenizer=tokenizer, batch_size=f"auto:{schedule}", max_length=64)
            for cls in (HFLM, AdaInferLM)]  # fmt: skip
    for n in (1, 2, 3, 5, 6, 7, 10, 11, 13, 22):
        asked = [instance("x" * (1 + k), " y", k) for k in range(n)]
        detectors = [Detector(lm, size) for lm in both]
        both[0].batch_sizes = {}  # which 0.5.0.dev1 keeps from one call to the next
        theirs = both[0].loglikelihood(asked, True) if n >= schedule else None  # fewer rows than sections: stock fails
        ours = both[1].loglikelihood(asked, True)
        assert len(ours) == n and all(isinstance(a[0], float) for a in ours)
        if theirs is not None:
            assert detectors[1].asked == detectors[0].asked and both[1].batch_sizes == both[0].batch_sizes
            assert [a[0] for a in ours] == pytest.approx([a[0] for a in theirs], abs=1e-4)


def test_documents_of_several_rows_jump_over_sections_of_auto_batch_sizes(tokenizer):
    lm = lm_of(make_model("llama", vocab_size=257), tokenizer, stopper="gap:0.3", batch_size="auto:4")
    expected = lm_of(lm.model, tokenizer, stopper="gap:0.3", batch_size=4)
    for n in (1, 2, 4, 7, 11):
        asked = [instance(f"{'x' * k}{c}", " y", k, idx=c) for k in range(n) for c in range(1 + k % 5)]
        for size in (1, 5, 64):
            detector = Detector(lm, lambda _, size=size: size)
            found = lm.loglikelihood(asked, True)
            for a, b in zip(found, expected.loglikelihood(asked, True), strict=True):
                assert a[0] == pytest.approx(b[0], abs=1e-4) and a.exit_record.exit_layer == b.exit_record.exit_layer
            assert len(detector.asked) == len(set(detector.asked)) <= len(lm.batch_sizes)


def test_left_truncation_moves_the_decision(tokenizer):
    model = make_model("llama", vocab_size=257)
    lm = lm_of(model, tokenizer, stopper="gap:0.3", max_length=12)
    asked = [instance("the quick brown fox jumps over", c, 0, idx=i) for i, c in enumerate([" it", " everything"])]
    answers = lm.loglikelihood(asked, True)
    pairs = [lm._encode_pair(*r.args) for r in asked]
    # the first request's row decides for the document
    first = (pairs[0][0] + pairs[0][1])[-13:][:-1][: 12 - len(pairs[0][1]) + 1]
    layer = expected_exit(model, lm, [first], 0.3, (1, 2, 3, 4))
    for (context, continuation), answer in zip(pairs, answers, strict=True):
        assert answer.exit_record.exit_layer == layer
        assert answer[0] == pytest.approx(
            score(model, lm.anatomy.blocks, context, continuation, layer, 12)[0], abs=1e-4
        )


def test_empty_context_follows_its_document_and_has_no_decision_of_its_own(tokenizer):
    model = make_model("llama", vocab_size=257)
    lm = lm_of(model, tokenizer, stopper="gap:0.3")
    asked = [
        instance(c, w, 0, idx=i)
        for i, (c, w) in enumerate([("a fox", " x"), ("a fox", " yes"), ("", " x"), ("", " yes")])
    ]
    asked.append(instance("", " alone", 1))
    answers = lm.loglikelihood(asked, True)
    layer = expected_exit(model, lm, [lm._encode_pair("a fox", " x")[0]], 0.3, (1, 2, 3, 4))
    assert [a.exit_record.exit_layer for a in answers] == [layer] * 4 + [5]
    for request, answer in zip(asked[2:4], answers[2:4], strict=True):
        tokens = lm.tok_encode(request.args[1], add_special_tokens=False)
        expected = score(model, lm.anatomy.blocks, [lm.prefix_token_id], tokens, layer, 64)[0]
        assert answer[0] == pytest.approx(expected, abs=1e-4)
    fixed = lm_of(model, tokenizer, stopper="fixed:2").loglikelihood(asked, True)
    assert {a.exit_record.exit_layer for a in fixed} == {2}


@pytest.mark.parametrize("logits_cache", [True, False])
def test_one_row_answers_all_one_token_choices_and_contexts_are_kept_apart(tokenizer, logits_cache):
    """ " ab" + "c" and " a" + "bc" are one token row, but two decisions at different positions."""
    model = make_model("llama", vocab_size=257)
    lm = lm_of(model, tokenizer, stopper="gap:0.3", logits_cache=logits_cache)
    asked = [instance("the ab", "c", 0), instance("the ab", "d", 0, idx=1), instance("the a", "bc", 1)]
    documents = lm.documents([(r.args, *lm._encode_pair(*r.args)) for r in asked], [r.doc_id for r in asked])
    assert [len(d.rows) for d in documents] == ([1, 1] if logits_cache else [2, 1])
    for request, answer in zip(asked, lm.loglikelihood(asked, True), strict=True):
        context, continuation = lm._encode_pair(*request.args)
        layer = expected_exit(model, lm, [context], 0.3, (1, 2, 3, 4))
        assert answer.exit_record.exit_layer == layer
        assert answer[0] == pytest.approx(
            score(model, lm.anatomy.blocks, context, continuation, layer, 64)[0], abs=1e-4
        )


@pytest.mark.parametrize("stopper", ["none", "gap:0.3", "fixed:2"])
def test_rolling_scores_every_token_at_its_own_block(tokenizer, stopper):
    model = make_model("llama", vocab_size=257)
    lm = lm_of(model, tokenizer, stopper=stopper, max_length=16)
    texts = ["the quick brown fox jumps over it", "hi", "a b c d e f g h i j"]
    asked = [instance(t, None, n, kind="loglikelihood_rolling") for n, t in enumerate(texts)]
    answers = lm.loglikelihood_rolling(asked, True)
    stock = HFLM(pretrained=model, tokenizer=tokenizer, max_length=16).loglikelihood_rolling(asked, True)
    from lm_eval import utils

    for text, answer, dense in zip(texts, answers, stock, strict=True):
        total, layers = 0.0, []
        for context, continuation in map(
            utils.make_disjoint_window,
            utils.get_rolling_token_windows(lm.tok_encode(text), lm.prefix_token_id, 16, 1),
        ):
            tokens = (context + continuation)[:-1]
            by_block = [logits_after_block(model, lm.anatomy.blocks, tokens, k) for k in range(1, 6)]
            for j, target in enumerate(continuation):
                position = len(context) - 1 + j
                for k in range(1, 6):
                    logits = by_block[k - 1][position]
                    top = logits.softmax(-1).topk(2).values
                    stops = {"none": False, "gap:0.3": top[0] - top[1] > 0.3, "fixed:2": k == 2}[stopper]
                    if stops or k == 5:
                        total += logits.log_softmax(-1)[target].item()
                        layers.append(k)
                        break
        if isinstance(answer, tuple):  # of 0.5.0.dev1, to a request with an empty context
            (answer_logprob, _), (dense, _) = answer, dense
        else:
            answer_logprob = float(answer)
        assert answer_logprob == pytest.approx(total, abs=1e-3)
        assert answer.exit_record.exit_layer == pytest.approx(sum(layers) / len(layers))
        if stopper == "none":
            assert answer_logprob == pytest.approx(dense, abs=1e-3)
            assert answer.exit_record.flops_ratio_total == pytest.approx(1)
        else:
            assert (answer.exit_record.flops_ratio < 1) == (answer.exit_record.exit_layer < 5)


def test_generation_can_be_dense_and_says_so(tokenizer, caplog):
    model = make_model("llama", vocab_size=257)
    asked = [
        instance(t, {"until": ["\n"], "max_gen_toks": 5}, n, kind="generate_until")
        for n, t in enumerate(["ab", "cde f"])
    ]
    stock = HFLM(pretrained=model, tokenizer=tokenizer, max_length=64, batch_size=2).generate_until(asked, True)
    ours = lm_of(model, tokenizer, stopper="gap:0.1", batch_size=2, generation="dense").generate_until(asked, True)
    assert ours == stock
    assert "generation=dense" in caplog.text
    assert {a.exit_record.exit_layer for a in ours} == {5} and {a.exit_record.pruning_ratio for a in ours} == {0}


def test_exit_layers_agree_with_a_count_of_block_calls(tokenizer):
    """Block calls are counted by independent hooks; batch size 1, so a document's depth is its calls."""
    model = make_model("llama", vocab_size=257)
    lm = lm_of(model, tokenizer, stopper="gap:0.3", batch_size=1, prefix_cache=0)
    calls = 0

    def count(*_):
        nonlocal calls
        calls += 1

    handles = [block.register_forward_hook(count) for block in lm.anatomy.blocks]
    asked = [instance("".join(random.Random(n).choices(WORDS, k=5)), " x", n) for n in range(12)]
    answers = lm.loglikelihood(asked, True)
    for handle in handles:
        handle.remove()
    assert calls == sum(a.exit_record.exit_layer for a in answers) == lm.engine.block_calls
    assert calls < 12 * 5


def test_answers_survive_pickling_with_their_trace(tokenizer):
    import pickle

    model = make_model("llama", vocab_size=257)
    lm = lm_of(model, tokenizer, stopper="gap:0.3", log_features=True)
    (answer,) = lm.loglikelihood([instance("a fox", " x", 0)], True)
    again = pickle.loads(pickle.dumps(answer))
    assert again == answer and again.exit_record == answer.exit_record and again.top1 == answer.top1
    seen = answer.exit_record.features[0]
    assert seen["layer"] == list(range(1, int(answer.exit_record.exit_layer) + 1))
    gaps = [gap_after_block(model, lm.anatomy.blocks, lm._encode_pair("a fox", " x")[0], k) for k in seen["layer"]]
    assert seen["gap"] == pytest.approx(gaps, abs=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"stopper": "fixed:99"}, ["stopper", "99", "1 to 5"]),
        ({"stopper": "fixed:0"}, ["stopper", "1 to 5"]),
        ({"stopper": "fixed:x"}, ["stopper", "fixed:24"]),
        ({"stopper": "gap:abc"}, ["stopper", "gap:abc", "between 0 and 1"]),
        ({"stopper": "gap:7"}, ["stopper", "gap:7", "between 0 and 1"]),
        ({"stopper": "gap:nan"}, ["stopper", "between 0 and 1"]),
        ({"stopper": "wat"}, ["stopper", "wat", "gap:0.8"]),
        ({"stopper": "./missing.pkl"}, ["stopper", "missing.pkl", "does not exist"]),
        ({"stopper": "gap", "min_layer": 6}, ["min_layer", "6", "1 to 5"]),
        ({"stopper": "gap", "check_layers": "every:0"}, ["check_layers", "every:2"]),
        ({"stopper": "gap", "check_layers": "1+9"}, ["check_layers", "9", "1 to 5"]),
        ({"stopper": "gap", "check_layers": "some"}, ["check_layers", "every:N"]),
        ({"stopper": "fixed:2", "min_layer": 3}, ["min_layer", "fixed:2"]),
        ({"log_features": "perhaps"}, ["log_features", "perhaps"]),
        ({"batch_size": 0}, ["batch_size", "0"]),
        ({"batch_size": "abc"}, ["batch_size", "abc", "auto"]),
        ({"batch_size": "auto:0"}, ["batch_size", "auto:0", "auto:4"]),
        ({"batch_size": "auto:x"}, ["batch_size", "auto:x", "auto:4"]),
        ({"max_length": "abc"}, ["max_length", "abc"]),
        ({"dtype": "foo"}, ["dtype", "foo", "float32"]),
    ],
)
def test_wrong_arguments_are_refused_in_one_sentence(options, words, tokenizer):
    with pytest.raises(AdaInferError) as caught:
        lm_of(make_model("llama", vocab_size=257), tokenizer, **options)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words)


def test_an_encoder_decoder_model_is_refused(tmp_path, tokenizer):
    from transformers import T5Config

    T5Config(vocab_size=257, d_model=16, d_ff=16, num_layers=2, num_heads=2, d_kv=8).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(AdaInferError, match=r"encoder-decoder .*decoder-only"):
        AdaInferLM(pretrained=str(tmp_path), device="cpu")


def test_a_model_that_is_not_there_is_one_sentence(tmp_path):
    with pytest.raises(AdaInferError, match=r"^pretrained: '.*missing' is neither a model's folder nor .*\)$"):
        AdaInferLM(pretrained=str(tmp_path / "missing"), device="cpu")


def test_a_decision_in_parts_is_counted_on_top(tokenizer):
    """Batch size 1 and several contexts: the deciding passes are real work, and every number says so."""
    model = make_model("llama", vocab_size=257)
    asked = requests(seed=3, shared_context=False)
    together = lm_of(model, tokenizer, stopper="gap:0.3", batch_size=32)
    apart = lm_of(model, tokenizer, stopper="gap:0.3", batch_size=1)
    traces = {}
    for lm in (together, apart):
        answers = lm.loglikelihood(asked, True)
        traces[lm] = {r.doc_id: a.exit_record for r, a in zip(asked, answers, strict=True)}
        documents = lm.documents([(r.args, *lm._encode_pair(*r.args)) for r in asked], [r.doc_id for r in asked])
        tokens = {d.rows[0].answers[0].request: sum(len(row.tokens) for row in d.rows) for d in documents}
        run = sum(traces[lm][asked[first].doc_id].layers_run * count for first, count in tokens.items())
        assert run == pytest.approx(lm.engine.block_tokens)
    for doc, trace in traces[together].items():
        assert trace.layers_run == trace.exit_layer == traces[apart][doc].exit_layer
        assert traces[apart][doc].flops_dense == trace.flops_dense
        assert traces[apart][doc].flops > trace.flops


def test_a_cached_generation_keeps_its_trace(tokenizer, tmp_path):
    from lm_eval.api.model import CachingLM

    asked = [instance("ab", {"until": ["\n"], "max_gen_toks": 3}, 0, kind="generate_until")]
    lm = lm_of(make_model("llama", vocab_size=257), tokenizer)
    cached = CachingLM(lm, str(tmp_path / "answers.db"))
    first = cached.generate_until(asked)
    (again,) = cached.generate_until(asked)
    assert again == first[0] and again.exit_record.exit_layer == 5


def test_adapters_are_part_of_the_model_and_of_its_fingerprint(tokenizer):
    import peft

    asked = requests(documents=3)

    def adapted(seed, config):
        model = make_model("llama", vocab_size=257)
        torch.manual_seed(seed)
        return peft.get_peft_model(model, config).eval()

    lora = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    fingerprints = set()
    for seed in (1, 2):
        model = adapted(seed, lora)
        lm = lm_of(model, tokenizer)
        stock = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, max_length=64).loglikelihood(asked, True)
        for a, b in zip(stock, lm.loglikelihood(asked, True), strict=True):
            assert b[0] == pytest.approx(a[0], rel=2e-6, abs=1e-4)
        fingerprints.add(lm.fingerprint)
    assert len(fingerprints) == 2
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(AdaInferError, match=r"^peft: .*prompt learning"):
        lm_of(adapted(1, prompt), tokenizer)


def test_a_model_of_nan_is_refused_for_what_it_is(tokenizer):
    model = make_model("llama", vocab_size=257)
    model.get_output_embeddings().weight.data[3] = float("nan")
    with pytest.raises(AdaInferError, match=r"^dtype: the logits .* are not finite"):
        lm_of(model, tokenizer)


def test_a_forward_that_breaks_when_rows_leave_is_one_sentence(tokenizer, monkeypatch):
    def broken(anatomy):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied\nmore")

    monkeypatch.setattr("lm_eval_adainfer.harness.setup.verify", broken)
    with pytest.raises(AdaInferError, match=r"^pretrained: .* can't exit early: .*multiplied\)$"):
        lm_of(make_model("llama", vocab_size=257), tokenizer)
