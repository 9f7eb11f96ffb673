"""What a strategy carries from block to block is the same in documents, rolling texts, generated texts and traces."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.models import lm_of, make_model
from helpers.reference import logits_after_block, slow_features
from helpers.replay import generated
from helpers.tasks import KINDS, documents, instance, make_task
from helpers.traces import traced

from lm_eval_adainfer.fitting import fit
from lm_eval_adainfer.prefill.documents import Answer, Row
from lm_eval_adainfer.strategies.base import Schedule
from lm_eval_adainfer.strategies.crf import CRFStopper
from lm_eval_adainfer.strategies.features import RECORDED
from lm_eval_adainfer.strategies.specs import parse
from lm_eval_adainfer.traces.margins import margins

NAMES = ["patience:2", "patience:3", "saturation:0.6", "softmax:0.3", "crf", "svm"]
LEARNED = ("top_prob", "agreement", "top_prob_change")
CHECKS = ["all", "1+3+4"]


@pytest.fixture(scope="module")
def model():
    return make_model("llama", vocab_size=257, max_position_embeddings=512)


@pytest.fixture(scope="module")
def stoppers(model, tokenizer, tmp_path_factory):
    """Name to strategy; the fitted ones from a trace, with thresholds that half of the examples exceed."""
    lm = lm_of(model, tokenizer, max_length=400)
    task = make_task({"train": documents(3, 2), "test": documents(30, 5)})
    path, meta, arrays = traced(lm, task, tmp_path_factory.mktemp("traces"), split="test")
    crf = fit.fit_crf([path], features=("gap", "top_prob", "top_prob_change"))
    svm = fit.fit_svm([path], features=LEARNED)
    for stopper in (crf, svm):
        stopper.threshold += float(np.nanmedian(margins(stopper, meta, arrays)))
    return {name: {"crf": crf, "svm": svm}.get(name) or parse(name) for name in NAMES}


def exits(stopper, meta, arrays, blocks, groups):
    """Per group of instances: the first asked block at which all say stop (else L), and whether that was clear."""
    said = margins(stopper, meta, arrays, blocks)
    found = []
    for group in groups:
        mine = said[group]
        stops = [k for k in blocks if (mine[:, k - 1] > 0).all()]
        found.append((stops[0] if stops else meta["n_blocks"], bool((np.abs(mine[~np.isnan(mine)]) > 1e-4).all())))
    return found


def agree(real, simulated):
    """Real exits are the simulated ones wherever these are clear, and most are."""
    assert [r for r, (_, clear) in zip(real, simulated, strict=True) if clear] == [s for s, clear in simulated if clear]
    assert sum(clear for _, clear in simulated) > 0.9 * len(simulated)


@pytest.mark.parametrize("check_layers", CHECKS)
@pytest.mark.parametrize(("kind", "batch_size"), [("shared context", 5), ("many inputs", 5), ("many inputs", 2)])
def test_documents_exit_as_simulated_on_their_trace(kind, batch_size, check_layers, stoppers, model, tokenizer, tmp_path):
    """At a batch size of 2 a document's three contexts are decided in parts."""
    task = make_task({"train": documents(3, 2), "test": documents(25, 7)}, **KINDS[kind])
    _, meta, arrays = traced(lm_of(model, tokenizer, max_length=400), task, tmp_path, split="test")
    groups = [np.flatnonzero(arrays["doc_id"] == doc) for doc in sorted(set(arrays["doc_id"].tolist()))]
    layers = set()
    for stopper in stoppers.values():
        lm = lm_of(model, tokenizer, stopper=stopper, batch_size=batch_size, max_length=400, check_layers=check_layers)
        answers = lm.loglikelihood(task.instances, True)
        real = {r.doc_id: a.exit_record.exit_layer for r, a in zip(task.instances, answers, strict=True)}
        simulated = exits(stopper, meta, arrays, lm.schedule.blocks, groups)
        agree([real[doc] for doc in sorted(real)], simulated)
        layers |= {(stopper.kind, layer) for layer in real.values()}
    for kind_ in ("patience", "saturation", "crf", "svm"):
        assert len([layer for name, layer in layers if name == kind_]) > 1, kind_


def slow_trace(lm, model, prefixes):
    """Meta and arrays of the decisions at the ends of these token sequences, each run alone and without a cache."""
    names = [name for name in RECORDED if name != "entropy"]
    slow = [slow_features(model, "llama", prefix) for prefix in prefixes]
    top = [[logits_after_block(model, lm.anatomy.blocks, p, k)[-1].argmax().item() for k in range(1, 6)] for p in prefixes]
    table = np.array([[[s[name][k] for name in names] for k in range(5)] for s in slow], dtype=np.float32)
    return {"n_blocks": 5, "features": names, "task": "slow"}, {"features": table, "top_token": np.array(top)}


@pytest.mark.parametrize("check_layers", CHECKS)
def test_rolling_tokens_exit_as_simulated(check_layers, stoppers, model, tokenizer):
    seen = {name: set() for name in NAMES}
    texts = ["a deer and a goat", "hi fox! no"]
    for name, stopper in stoppers.items():
        lm = lm_of(model, tokenizer, stopper=stopper, check_layers=check_layers)
        rows, prefixes = [], []
        for text in texts:
            tokens = lm.tok_encode(text)
            whole = [lm.prefix_token_id, *tokens]
            rows.append(Row(whole[:-1], len(tokens), answers=[Answer(0, tokens)]))
            prefixes += [whole[: j + 1] for j in range(len(tokens))]
        real = [layer for row in lm.engine.run_tokens(rows) for layer in row]
        meta, arrays = slow_trace(lm, model, prefixes)
        agree(real, exits(stopper, meta, arrays, lm.schedule.blocks, [[n] for n in range(len(prefixes))]))
        seen[name] = set(real)
    assert all(len(seen[name]) > 1 for name in ("patience:2", "crf", "svm"))


@pytest.mark.parametrize("check_layers", CHECKS)
def test_generated_tokens_exit_as_simulated(check_layers, stoppers, model, tokenizer, monkeypatch):
    """Every new token is compared with the whole text before it, run alone; the text is what the early run wrote."""
    prompts = ["a cat", "deer fox goat hi", "x", "no way"]
    seen = {name: set() for name in NAMES}
    for name, stopper in stoppers.items():
        lm = lm_of(model, tokenizer, stopper=stopper, check_layers=check_layers)
        requests = [
            instance(p, {"until": ["\0"], "max_gen_toks": 7}, n, kind="generate_until") for n, p in enumerate(prompts)
        ]
        real, prefixes = [], []
        for row, prompt in generated(lm, requests, monkeypatch):
            real += row.layers
            prefixes += [[*prompt, *row.tokens[:j]] for j in range(len(row.layers))]
        meta, arrays = slow_trace(lm, model, prefixes)
        agree(real, exits(stopper, meta, arrays, lm.schedule.blocks, [[n] for n in range(len(prefixes))]))
        seen[name] = set(real)
    assert all(len(seen[name]) > 1 for name in ("patience:2", "crf", "svm"))


def test_patience_counts_asked_blocks_with_one_top_token():
    """By hand: after blocks 1, 2, 4, 5 of top tokens a a (b) a b."""
    meta = {"n_blocks": 6, "features": ["top_prob"], "task": "hand"}
    arrays = {
        "features": np.full((2, 6, 1), 0.5, dtype=np.float32),
        "top_token": np.array([[7, 7, 9, 7, 9, 9], [7, 9, 9, 9, 9, 9]]),
    }
    found = margins(parse("patience:3"), meta, arrays, [1, 2, 4, 5]) > 0
    assert [np.flatnonzero(row).tolist() for row in found] == [[3], [4]]
    everywhere = margins(parse("patience:2"), meta, arrays) > 0
    assert [(np.flatnonzero(row) + 1).tolist() for row in everywhere] == [[2], [3, 4, 5]]


@pytest.mark.parametrize("label", ["final", "gold"])
def test_a_crf_is_fitted_on_one_sequence_per_instance(label, model, tokenizer, tmp_path):
    lm, task = lm_of(model, tokenizer, max_length=400), make_task({"train": documents(3, 2), "test": documents(30, 5)})
    path, meta, arrays = traced(lm, task, tmp_path, split="test")
    if label == "gold":  # a random model never finds the gold answer
        from lm_eval_adainfer import container
        from lm_eval_adainfer.traces import recording

        arrays["gold_token"] = np.where(np.arange(30) % 3, arrays["top_token"][:, 3], -1).astype(np.int32)
        container.write(path, "trace", recording.VERSION, meta, arrays)
    stopper = fit.fit_crf([path], label=label)
    goal = arrays["top_token"][:, -1] if label == "final" else arrays["gold_token"]
    y = (arrays["top_token"] == goal[:, None])[goal >= 0]
    assert isinstance(stopper, CRFStopper) and stopper.threshold == 0.5 and stopper.features == ("gap", "top_prob")
    assert stopper.info["examples"] == stopper.info["examples_available"] == y.size == (150 if label == "final" else 100)
    assert stopper.info["positive_share"] == pytest.approx(y.mean()) and stopper.info["label"] == label
    few = [fit.fit_crf([path], label=label, max_instances=9, seed=seed) for seed in (0, 0, 1)]
    assert few[0].info["examples"] == 45 and few[0].fingerprint == few[1].fingerprint != few[2].fingerprint


def test_a_schedule_asks_the_new_rules_after_every_block_but_the_last():
    for name in ("patience:3", "softmax:0.9", "saturation:0.9"):
        assert Schedule(5, parse(name)).blocks == (1, 2, 3, 4)
