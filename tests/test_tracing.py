"""Traces against a slow recomputation and against real early-exit runs, and stoppers that are fitted on them."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from helpers.models import lm_of, make_model
from helpers.reference import logits_after_block, slow_features
from helpers.refusals import refused
from helpers.tasks import ANIMALS, KINDS, documents, instance, make_task
from helpers.traces import traced
from helpers.traces import write_labelled as write_trace
from lm_eval.api.task import ConfigurableTask
from sklearn.svm import SVC

from lm_eval_adainfer import container
from lm_eval_adainfer.fitting import fit
from lm_eval_adainfer.harness import identity
from lm_eval_adainfer.strategies.features import RECORDED
from lm_eval_adainfer.strategies.svm import SVMStopper
from lm_eval_adainfer.traces import recording, splits


@pytest.fixture(scope="module")
def model():
    return make_model("llama", vocab_size=257, max_position_embeddings=512)


@pytest.fixture(scope="module")
def lm(model, tokenizer):
    return lm_of(model, tokenizer, batch_size=4, max_length=400)


def prompts(task):
    """doc_id -> distinct contexts (not the empty one), in order; by the requests lm-eval built."""
    found = {}
    for request in task.instances:
        contexts = found.setdefault(request.doc_id, [])
        if request.args[0] and request.args[0] not in contexts:
            contexts.append(request.args[0])
    return found


# ------------------------------------------------------------------------------------------------ what is in it


@pytest.mark.parametrize("kind", KINDS)
def test_a_trace_is_the_slow_recomputation_of_every_block(kind, lm, model, tmp_path):
    task = make_task(**KINDS[kind])
    _, meta, arrays = traced(lm, task, tmp_path, split="test")
    docs = task.dataset["test"]
    assert meta["features"] == list(RECORDED)
    assert (meta["documents"], meta["task"], meta["split"], meta["n_blocks"]) == (6, "toy", "test", 5)

    expected = [(doc_id, context) for doc_id, contexts in prompts(task).items() for context in contexts]
    n, width = len(expected), 3 if kind not in ("loglikelihood", "many inputs") else 1
    assert {name: (a.shape, a.dtype.name) for name, a in arrays.items()} == {
        "features": ((n, 5, 9), "float32"),
        "top_token": ((n, 5), "int32"),
        "scores": ((n, 5, width), "float32"),
        "greedy": ((n, 5, width), "uint8"),
        "right": ((n, width), "uint8"),
        "request": ((n, width), "int16"),
        "gold": ((n,), "int16"),
        "gold_token": ((n,), "int32"),
        "prompt_tokens": ((n,), "int32"),
        "doc_id": ((n,), "int64"),
        "position": ((n,), "int32"),
    }
    assert not arrays["position"].any()
    assert arrays["doc_id"].tolist() == [doc_id for doc_id, _ in expected]
    for row, (doc_id, text) in enumerate(expected):
        doc = docs[doc_id]
        mine = [r for r in task.instances if r.doc_id == doc_id and r.args[0] == text]
        pairs = [lm._encode_pair(*r.args) for r in mine]
        context = pairs[0][0]
        assert arrays["prompt_tokens"][row] == len(context)
        tokens = [c[0] for _, c in pairs]
        has_choices = len(set(tokens)) == len(tokens) > 1 and all(len(c) == 1 for _, c in pairs)
        slow = slow_features(model, "llama", context, tokens if has_choices else ())
        np.testing.assert_allclose(arrays["features"][row].T, [slow[name] for name in meta["features"]], atol=2e-5)
        assert arrays["request"][row].tolist() == [r.idx for r in mine]
        for k in range(1, 6):
            logits = logits_after_block(model, lm.anatomy.blocks, context, k)[-1]
            assert arrays["top_token"][row, k - 1] == logits.argmax().item()
            for c, (_, continuation) in enumerate(pairs):
                tokens = (context + continuation)[:-1]
                logprobs = logits_after_block(model, lm.anatomy.blocks, tokens, k)[-len(continuation) :].log_softmax(-1)
                total = sum(logprobs[j, t].item() for j, t in enumerate(continuation))
                assert arrays["greedy"][row, k - 1, c] == (logprobs.argmax(-1).tolist() == continuation)
                assert arrays["scores"][row, k - 1, c] == pytest.approx(total, rel=1e-5, abs=1e-4)
        gold = 0 if kind == "loglikelihood" else doc["answer"]
        assert arrays["gold"][row] == gold
        assert arrays["right"][row].tolist() == [r.idx == gold for r in mine]
        gold_tokens = [pair[1][0] for r, pair in zip(mine, pairs, strict=True) if r.idx == gold]
        assert arrays["gold_token"][row] == (gold_tokens[0] if gold_tokens else -1)
        assert bool(gold_tokens) == (kind != "many inputs" or text.endswith(doc["choices"][gold]))


def test_documents_of_unlike_numbers_of_choices_are_padded(lm, tmp_path):
    docs = [{"question": f"{i}?", "choices": ANIMALS[: i + 2], "answer": i} for i in range(3)]
    _, _, arrays = traced(lm, make_task({"train": docs, "test": docs}), tmp_path, split="test")
    assert arrays["request"].tolist() == [[0, 1, -1, -1], [0, 1, 2, -1], [0, 1, 2, 3]]
    assert (np.isnan(arrays["scores"]) == (arrays["request"] < 0)[:, None, :]).all()


@pytest.mark.parametrize(
    ("target", "gold"),
    [
        ("answer", [0, 1]),
        ("{{choices[answer]}}", [0, 1]),
        (lambda doc: doc["choices"][doc["answer"]], [0, 1]),
        (lambda doc: [doc["answer"], 2], [0, 1]),
        # 0.5.0.dev1 asks nothing of a document whose target is none of its choices
        *([] if hasattr(ConfigurableTask, "scorers") else [(lambda doc: "none of them", [-1, -1])]),
    ],
)
def test_gold_is_found_however_the_task_names_it(target, gold, lm, tmp_path):
    docs = [{"question": f"{i}?", "choices": ANIMALS[i : i + 3], "answer": i} for i in range(2)]
    task = make_task({"train": docs, "test": docs}, doc_to_target=target)
    _, _, arrays = traced(lm, task, tmp_path, split="test")
    first = [lm.tok_encode(" " + docs[i]["choices"][g], add_special_tokens=False)[0] for i, g in enumerate(gold)]
    assert arrays["gold"].tolist() == gold
    assert arrays["gold_token"].tolist() == [t if g >= 0 else -1 for t, g in zip(first, gold, strict=True)]


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_dense_and_fixed_runs(kind, lm, model, tokenizer, tmp_path):
    task = make_task(**KINDS[kind])
    _, _, arrays = traced(lm, task, tmp_path, split="test")
    rows = [(doc_id, context) for doc_id, contexts in prompts(task).items() for context in contexts]
    for k, stopper in [(5, "none"), (1, "fixed:1"), (3, "fixed:3")]:
        run = lm_of(model, tokenizer, stopper=stopper, max_length=400).loglikelihood(task.instances, True)
        for request, answer in zip(task.instances, run, strict=True):
            if request.args[0]:
                row = rows.index((request.doc_id, request.args[0]))
                column = arrays["request"][row].tolist().index(request.idx)
                assert arrays["scores"][row, k - 1, column] == pytest.approx(answer[0], abs=1e-4)


@pytest.mark.parametrize("kind", ["shared context", "with shots", "many inputs"])
def test_the_gap_rule_replayed_on_a_trace_exits_where_a_real_run_does(kind, lm, model, tokenizer, tmp_path):
    task = make_task({"train": documents(3, 2), "test": documents(20, 7)}, **KINDS[kind])
    _, meta, arrays = traced(lm, task, tmp_path, split="test")
    gaps = arrays["features"][:, :, meta["features"].index("gap")]
    layers_seen = set()
    for threshold in (0.05, 0.2, 0.4, 0.7):
        run = lm_of(model, tokenizer, stopper=f"gap:{threshold}", batch_size=5, max_length=400)
        answers = run.loglikelihood(task.instances, True)
        real = {r.doc_id: a.exit_record.exit_layer for r, a in zip(task.instances, answers, strict=True)}
        clear = 0
        for doc in set(arrays["doc_id"].tolist()):
            mine = gaps[arrays["doc_id"] == doc]
            if (np.abs(mine - threshold) < 1e-4).any():
                continue
            stops = [k for k in range(1, 5) if (mine[:, k - 1] > threshold).all()]
            assert real[doc] == (stops[0] if stops else 5)
            layers_seen.add(real[doc])
            clear += 1
        assert clear > 15
    assert len(layers_seen) > 2


def test_a_long_prompt_is_traced_as_it_is_truncated(model, tokenizer, tmp_path):
    lm = lm_of(model, tokenizer, max_length=12)
    docs = [{"question": "the quick brown fox jumps", "choices": ["a", "b"], "answer": 1}]
    task = make_task({"train": docs, "test": docs})
    _, _, arrays = traced(lm, task, tmp_path, split="test")
    context = lm._encode_pair(*task.instances[0].args)[0][-11:]  # two tokens of continuation, one is input
    assert arrays["prompt_tokens"].tolist() == [11]
    expected = slow_features(model, "llama", context)["gap"]
    assert arrays["features"][0, :, 0] == pytest.approx(expected, abs=2e-5)


# ------------------------------------------------------------------------------------------------ which documents


@pytest.mark.parametrize("fewshot_split", ["train", None, "test"])
def test_a_document_is_never_among_its_own_shots(fewshot_split, lm, tmp_path):
    docs = documents(5, 3)
    task = make_task({"train": docs, "test": docs}, fewshot_split=fewshot_split)
    for seed in range(3):
        recording.trace(lm, {"toy": task}, tmp_path / str(seed), num_fewshot=4, fewshot_seed=seed)
        for request in task.instances:
            others = [d["question"] for d in docs if d["question"] != request.doc["question"]]
            assert request.args[0].count(request.doc["question"]) == 1
            assert all(request.args[0].count(question) == 1 for question in others)


def test_a_document_without_training_split_is_never_among_its_own_shots(lm, tmp_path):
    task = make_task({"test": documents(12, 3)}, fewshot_split="test")
    recording.trace(lm, {"toy": task}, tmp_path, num_fewshot=11, split="test")
    assert all(r.args[0].count(r.doc["question"]) == 1 for r in task.instances)


def test_a_training_split_is_for_fitting_and_calibrating_and_testing_is_on_the_evaluation_documents(lm, tmp_path):
    ids = {}
    for split in splits.SPLITS:
        task = make_task()
        _, _, arrays = traced(lm, task, tmp_path, split=split)
        own = [d["question"] for d in task.dataset["test" if split == "test" else "train"]]
        ids[split] = arrays["doc_id"].tolist()
        assert [own[i] for i in ids[split]] == list(dict.fromkeys(r.doc["question"] for r in task.instances))
    assert ids["test"] == list(range(6)) and sorted(ids["train"] + ids["calibrate"]) == list(range(9))
    assert ids["train"] and ids["calibrate"]


def test_limit_draws_the_same_documents_again_and_others_with_another_seed(lm, tmp_path):
    def draw(folder, **options):
        task = make_task({"train": documents(40, 1), "test": documents(4, 2)})
        _, meta, arrays = traced(lm, task, tmp_path / folder, limit=6, **options)
        assert {r.doc["question"] for r in task.instances} == {
            task.dataset["train"][int(i)]["question"] for i in arrays["doc_id"]
        }
        assert meta["documents"] == 6
        return arrays["doc_id"].tolist()

    first = draw("a", seed=0)
    assert first == sorted(set(first)) and len(first) == 6 and max(first) < 40
    assert draw("b", seed=0) == first != draw("c", seed=1)
    assert first != list(range(6)), "drawn, not the first six"


def test_a_limit_beyond_the_split_takes_all_of_it(lm, tmp_path):
    _, meta, arrays = traced(lm, make_task(), tmp_path, limit=1000, split="test")
    assert meta["documents"] == len(arrays["doc_id"]) == 6


def hash_parts(docs, training=None):
    """The parts of a task, by default without training split, as sets of questions (no model is run)."""
    parts = {}
    for split in splits.SPLITS:
        task = make_task({"test": docs, **({"train": training} if training else {})})
        with splits.documents_of(task, "toy", split, None, 0, 0) as doc_ids:
            chosen = [d["question"] for d in task.eval_docs]
        own = training if training and split != "test" else docs
        assert chosen == [own[i]["question"] for i in doc_ids]
        parts[split] = set(chosen)
    return parts


def test_without_training_split_a_hash_of_the_document_divides_30_20_50_whatever_the_order():
    docs = documents(1000, 5)
    parts = hash_parts(docs)
    assert sum(map(len, parts.values())) == 1000  # disjoint, since together they are all
    assert parts["train"] | parts["calibrate"] | parts["test"] == {d["question"] for d in docs}
    assert 240 < len(parts["train"]) < 360 and 150 < len(parts["calibrate"]) < 250
    shuffled = [dict(reversed(d.items())) for d in random.Random(0).sample(docs, 1000)]
    assert hash_parts(shuffled) == parts
    some = hash_parts(docs[:100])
    for split in splits.SPLITS:
        assert some[split] == {d["question"] for d in docs[:100]} & parts[split]


def test_a_training_split_is_divided_60_40_by_the_hash_of_the_document():
    training, docs = documents(1000, 6), documents(5, 7)
    parts = hash_parts(docs, training)
    assert parts["test"] == {d["question"] for d in docs}
    assert parts["train"] | parts["calibrate"] == {d["question"] for d in training}
    assert len(parts["train"]) + len(parts["calibrate"]) == 1000 and 540 < len(parts["train"]) < 660
    again = hash_parts(docs, random.Random(0).sample(training, 500))
    assert again["train"] <= parts["train"] and again["calibrate"] <= parts["calibrate"]


def test_the_parts_that_are_traced_are_those_of_the_hash(lm, tmp_path):
    docs = documents(20, 5)
    ids = {}
    for split in splits.SPLITS:
        _, _, arrays = traced(lm, make_task({"test": docs}), tmp_path, split=split)
        ids[split] = arrays["doc_id"].tolist()
        assert ids[split] == [i for i, d in enumerate(docs) if splits.split_of(d, False) == split]
    assert sorted(ids["train"] + ids["calibrate"] + ids["test"]) == list(range(20))


@pytest.mark.parametrize("splits", [{"train": documents(9, 1), "test": documents(6, 2)}, {"test": documents(20, 5)}])
def test_a_task_can_be_traced_twice(splits, lm, tmp_path):
    task = make_task(splits)
    traced(lm, task, tmp_path, split="train", limit=2)
    _, _, again = traced(lm, task, tmp_path, split="test")
    _, _, fresh = traced(lm, make_task(splits), tmp_path / "fresh", split="test")
    assert again["doc_id"].tolist() == fresh["doc_id"].tolist()
    np.testing.assert_array_equal(again["scores"], fresh["scores"])


# ------------------------------------------------------------------------------------------------ calls


def test_an_equal_call_keeps_the_file_and_runs_nothing(lm, tmp_path, monkeypatch):
    path, _, _ = traced(lm, make_task(), tmp_path, limit=3)
    before = (path.read_bytes(), path.stat().st_mtime_ns)
    monkeypatch.setattr(lm, "loglikelihood", lambda *_: pytest.fail("the model was run again"))
    again, _, _ = traced(lm, make_task(), tmp_path, limit=3)
    assert again == path and (path.read_bytes(), path.stat().st_mtime_ns) == before


def test_weights_are_read_as_often_for_many_parts_as_for_one(lm, tmp_path, monkeypatch):
    derived, derive = [], identity.fingerprint
    monkeypatch.setattr(identity, "fingerprint", lambda lm: derived.append(derive(lm)) or derived[-1])
    for in_a_part in (1, 4):
        derived.clear()
        monkeypatch.setattr(recording, "PART_DOCUMENTS", in_a_part)
        traced(lm, make_task(), tmp_path / str(in_a_part), limit=4)
        assert len(derived) == 1, in_a_part


@pytest.mark.parametrize("change", [{"limit": 4}, {"limit": None}, {"seed": 1}, {"fewshot_seed": 1}])
def test_an_unequal_call_is_refused_and_the_file_kept(change, lm, tmp_path):
    path, _, _ = traced(lm, make_task(), tmp_path, limit=3)
    before = path.read_bytes()
    refused(lambda: traced(lm, make_task(), tmp_path, **{"limit": 3, **change}), "output", path.name)
    assert path.read_bytes() == before


def test_another_models_trace_or_another_version_of_the_task_is_not_taken_for_this_one(lm, tokenizer, tmp_path):
    traced(lm, make_task(), tmp_path)
    other = lm_of(make_model("llama", vocab_size=257, seed=1), tokenizer, max_length=400)
    refused(lambda: traced(other, make_task(), tmp_path), "output", "other settings")
    refused(lambda: traced(lm, make_task(metadata={"version": 2.0}), tmp_path), "output", "other settings")


def test_a_trace_in_another_dtype_is_not_taken_for_this_one(lm, model, tokenizer, tmp_path):
    import copy

    traced(lm, make_task(), tmp_path)
    half = lm_of(copy.deepcopy(model).to(torch.bfloat16), tokenizer, batch_size=4, max_length=400)
    refused(lambda: traced(half, make_task(), tmp_path), "output", "other settings")


def test_shots_and_splits_have_files_of_their_own(lm, tmp_path):
    names = {traced(lm, make_task(), tmp_path, num_fewshot=n, limit=2)[0].name for n in (0, 1, 2)}
    names.add(traced(lm, make_task(), tmp_path, split="test", limit=2)[0].name)
    assert len(names) == 4 == len(list(tmp_path.iterdir()))


def test_a_broken_file_there_is_not_overwritten_silently(lm, tmp_path):
    path, _, _ = traced(lm, make_task(), tmp_path)
    path.write_bytes(path.read_bytes()[:-7])
    refused(lambda: traced(lm, make_task(), tmp_path), path.name)


def test_a_failing_run_leaves_no_file_and_the_model_as_it_was(lm, tmp_path, monkeypatch):
    monkeypatch.setattr(recording.Recorder, "after_block", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        traced(lm, make_task(), tmp_path)
    assert lm.engine.observer is None and not list(tmp_path.iterdir())


def test_tracing_leaves_the_models_own_answers_alone(lm, tmp_path):
    asked = [instance("a fox", " x", 0), instance("a hen", " yes", 1)]
    before = lm.loglikelihood(asked, True)
    traced(lm, make_task(), tmp_path)
    assert lm.loglikelihood(asked, True) == before


def test_a_trace_does_not_depend_on_the_models_stopper_or_batch_size(lm, model, tokenizer, tmp_path):
    _, _, arrays = traced(lm, make_task(**KINDS["many inputs"]), tmp_path / "a")
    other = lm_of(model, tokenizer, stopper="gap:0.1", batch_size=1, max_length=400)
    _, _, again = traced(other, make_task(**KINDS["many inputs"]), tmp_path / "b")
    assert arrays.keys() == again.keys()
    for name in arrays:
        np.testing.assert_allclose(arrays[name], again[name], rtol=1e-5, atol=1e-4)


def test_rolling_tasks_are_refused_before_any_other_is_traced(lm, tmp_path):
    good = make_task(name="good")
    bad = make_task(name="bad", output_type="loglikelihood_rolling", doc_to_choice=None, doc_to_target="{{question}}")
    refused(lambda: recording.trace(lm, {"good": good, "bad": bad}, tmp_path), "tasks", "bad", "loglikelihood_rolling")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "words"),
    [({"split": "dev"}, ["split", "dev", "train"]), ({"limit": 0}, ["limit", "0"]), ({"limit": -3}, ["limit", "-3"])],
)
def test_wrong_arguments_are_one_sentence(options, words, lm, tmp_path):
    refused(lambda: traced(lm, make_task(), tmp_path, **options), *words)


# ------------------------------------------------------------------------------------------------ fitting


def test_labels_by_hand(tmp_path):
    path = write_trace(tmp_path / "a.trace", [[5, 7, 7], [7, 5, 5], [9, 9, 9]], [7, 5, -1])
    features = recording.read(path)[1]["features"]
    x, y, metas = fit.examples([path], ["top_prob", "gap"], "final")
    assert y.tolist() == [0, 1, 1, 0, 1, 1, 1, 1, 1]
    np.testing.assert_array_equal(x, features[:, :, [1, 0]].reshape(9, 2).astype(np.float64))
    x, y, _ = fit.examples([path], ["gap"], "gold")
    assert y.tolist() == [0, 1, 1, 0, 1, 1], "an instance without gold answer has no label"
    np.testing.assert_array_equal(x, features[:2, :, :1].reshape(6, 1))
    assert [m["task"] for m in metas] == ["t"]


def test_examples_of_several_traces_follow_each_other(tmp_path):
    write_trace(tmp_path / "b.trace", [[1, 2]], [2])
    write_trace(tmp_path / "a.trace", [[3, 3]], [2])
    (tmp_path / "notes.txt").write_text("no trace")
    files = fit.find([tmp_path])
    assert [f.name for f in files] == ["a.trace", "b.trace"]
    _, y, metas = fit.examples(files, ["gap"], "final")
    assert y.tolist() == [1, 1, 0, 1] and len(metas) == 2


def test_the_cap_on_examples_is_a_seeded_draw(tmp_path):
    rng = np.random.default_rng(1)
    path = write_trace(tmp_path / "a.trace", rng.integers(0, 2, (40, 5)), rng.integers(0, 2, 40))
    first = fit.fit_svm([path], max_examples=50, seed=3)
    assert first.fingerprint == fit.fit_svm([path], max_examples=50, seed=3).fingerprint
    assert first.fingerprint != fit.fit_svm([path], max_examples=50, seed=4).fingerprint
    assert (first.info["examples"], first.info["examples_available"]) == (50, 200)
    x, _, _ = fit.examples([path], ["gap", "top_prob"], "final")
    assert {tuple(v) for v in first.arrays["support_vectors"]} <= {tuple(v) for v in x}
    assert fit.fit_svm([path], max_examples=200).info["examples"] == 200


def test_a_fitted_stopper_is_scikit_learns_default_svc_on_the_examples(tmp_path):
    rng = np.random.default_rng(2)
    path = write_trace(tmp_path / "a.trace", rng.integers(0, 2, (30, 4)), rng.integers(0, 2, 30))
    x, y, _ = fit.examples([path], fit.PAPER_FEATURES, "gold")
    expected = SVMStopper.from_sklearn(SVC().fit(x, y), ("gap", "top_prob"))
    stopper = fit.fit_svm([path], label="gold", threshold=0.25)
    for name, array in expected.arrays.items():
        np.testing.assert_array_equal(stopper.arrays[name], array)
    assert (stopper.threshold, stopper.kernel, stopper.features) == (0.25, "rbf", ("gap", "top_prob"))
    assert stopper.info["positive_share"] == pytest.approx(y.mean())
    assert (stopper.info["label"], stopper.info["tasks"], stopper.info["documents"]) == ("gold", ["t"], 30)


def test_unusable_traces_are_one_sentence(tmp_path):
    good = write_trace(tmp_path / "good.trace", [[1, 2, 1], [2, 2, 2]], [1, 2])
    agree = write_trace(tmp_path / "agree.trace", [[4, 4], [4, 4]], [5, 5])
    refused(lambda: fit.fit_svm([agree]), "traces", "stop")
    refused(lambda: fit.fit_svm([agree], label="gold"), "traces", "go on")
    refused(lambda: fit.fit_svm([good], features=["cos_attn"]), "features", "cos_attn", "gap")
    refused(lambda: fit.fit_svm([good], features=["entropy"]), "features", "entropy")
    refused(lambda: fit.fit_svm([good], label="best"), "label", "best", "final")
    refused(lambda: fit.fit_svm([good], max_examples=1), "max_examples", "1")
    (tmp_path / "empty").mkdir()
    refused(lambda: fit.fit_svm([tmp_path / "empty"]), "traces", "empty")
    refused(lambda: fit.fit_svm([]), "traces")
    refused(lambda: fit.fit_svm([tmp_path / "none.trace"]), "none.trace", "does not exist")
    other = write_trace(tmp_path / "other.trace", [[1, 2, 1]], [1], head_hash="another", model="another")
    refused(lambda: fit.fit_svm([good, other]), "traces", "other.trace", "another")
    deeper = write_trace(tmp_path / "deeper.trace", [[1, 2, 1, 1]], [1])
    refused(lambda: fit.fit_svm([good, deeper]), "traces", "deeper.trace")
    no_gold = write_trace(tmp_path / "no_gold.trace", [[1, 2, 1]], [-1])
    refused(lambda: fit.fit_svm([no_gold], label="gold"), "label", "gold")
    for bad in (np.nan, np.inf):
        features = np.full((1, 3, 2), 0.5, dtype=np.float32)
        features[0, 1, 1] = bad
        nan = write_trace(tmp_path / "nan.trace", [[1, 2, 1]], [1], features)
        refused(lambda nan=nan: fit.fit_svm([nan]), "traces", "nan.trace", "NaN")


def test_no_features_are_refused(tmp_path):
    path = write_trace(tmp_path / "a.trace", [[1, 2, 1], [2, 2, 2]], [1, 2])
    refused(lambda: fit.fit_svm([path], features=[]), "features")


@pytest.mark.parametrize("missing", ["features", "gold_token", "position", "head_hash", "block_weights"])
def test_a_trace_without_its_parts_is_refused(missing, tmp_path):
    path = write_trace(tmp_path / "a.trace", [[1, 2, 1], [2, 2, 2]], [1, 2])
    meta, arrays = recording.read(path)
    del (meta if missing in meta else arrays)[missing]
    container.write(path, "trace", recording.VERSION, meta, arrays)
    refused(lambda: fit.fit_svm([path], label="gold"), "a.trace")


@pytest.mark.parametrize("features", [("gap", "top_prob"), ("cos_hidden", "gap", "cos_mlp", "cos_attn")])
def test_a_fitted_svm_exits_where_scikit_learn_predicts_stop_on_the_trace(features, lm, model, tokenizer, tmp_path):
    task = make_task({"train": documents(3, 2), "test": documents(24, 11)})
    path, meta, arrays = traced(lm, task, tmp_path, split="test")
    stopper = fit.fit_svm([path], features=features)
    x, y, _ = fit.examples([path], features, "final")
    svc = SVC().fit(x, y)
    seen = arrays["features"][:, :, [meta["features"].index(name) for name in features]].astype(np.float64)
    for options, checked in [({}, (1, 2, 3, 4)), ({"check_layers": "2+4"}, (2, 4))]:
        run = lm_of(model, tokenizer, stopper=stopper, batch_size=8, max_length=400, **options)
        answers = run.loglikelihood(task.instances, True)
        real = {r.doc_id: a.exit_record.exit_layer for r, a in zip(task.instances, answers, strict=True)}
        clear = []
        for row, doc in enumerate(arrays["doc_id"].tolist()):
            if (np.abs(svc.decision_function(seen[row])) < 1e-3).any():
                continue
            stops = [k for k in checked if svc.predict(seen[row, k - 1 : k])[0] == 1]
            assert real[doc] == (stops[0] if stops else 5)
            clear.append(real[doc])
        assert len(clear) > 15 and len(set(clear)) > 1
