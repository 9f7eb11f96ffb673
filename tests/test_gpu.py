"""On CUDA everything is as on the CPU: within 1e-4 in float32, and within what rounding was seen to do in bfloat16."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.stoppers import Listed
from sklearn.ensemble import GradientBoostingClassifier
from sklearn.svm import SVC
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm_eval_adainfer import releases
from lm_eval_adainfer.generation.decoder import Decoder
from lm_eval_adainfer.generation.policies import KV_POLICIES
from lm_eval_adainfer.generation.probes import prepare
from lm_eval_adainfer.harness.model import AdaInferLM
from lm_eval_adainfer.readers.base import Reader
from lm_eval_adainfer.readers.tuned import Maps
from lm_eval_adainfer.strategies.base import Schedule
from lm_eval_adainfer.strategies.specs import parse
from lm_eval_adainfer.strategies.svm import SVMStopper
from lm_eval_adainfer.strategies.trees import BoostedStopper
from lm_eval_adainfer.structure.rounding import in_float32, logits_distance
from lm_eval_adainfer.verification import OK, render, verify_model

DEVICE = "cuda:0"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA here")]

TIMES_ROUNDING = 3  # each device rounds once, and the other way than it did where rounding was measured
FEATURES = ("gap", "top_prob")
TEXTS = ["a cat", "deer and a fox", "x", "hi goat! no way", "e.", "one more of them", "the last"]
EXITS = [[2, 5, 1], [1, 3, 3], [3, 1, 2], [1, 1, 5], [5, 2, 1], [5, 5, 5]]  # of a step's tokens, row by row


def lm_on(device, folder, dtype="float32", **options):
    return AdaInferLM(pretrained=str(folder), device=device, dtype=dtype, batch_size=4, max_length=96, **options)


def documents():
    """Choices of one context, behind few-shot examples that many share or not."""
    contexts = [*TEXTS, *("many shots " * 4 + text for text in TEXTS)]
    return [releases.request("loglikelihood", {"id": n}, (context, continuation), idx, "t", n)
            for n, context in enumerate(contexts) for idx, continuation in enumerate((" x", " yes", " no way"))]  # fmt: skip


def prompts(kind):
    more = ({"until": ["\0"], "max_gen_toks": 8},) if kind == "generate_until" else ()
    return [releases.request(kind, {"id": n}, (text, *more), 0, "t", n) for n, text in enumerate(TEXTS)]


def layers(answers):
    return [answer.exit_record.exit_layer for answer in answers]


def noted(stopper):
    """What a stopper is asked from now on: [(block, [n, features] values)]."""
    asked, margin = [], stopper.margin

    def noting(block, values, memory=None):
        asked.append((block, values.cpu().clone()))
        return margin(block, values, memory)

    stopper.margin = noting
    return asked


def hangs_on_rounding(stopper, asked):
    """Whether any decision would be another one if the features were off by 1e-4."""
    decisions = [[(stopper.margin(k, values + off) > 0).tolist() for k, values in list(asked)] for off in (-1e-4, 0, 1e-4)]
    return not decisions[0] == decisions[1] == decisions[2]


def assert_same_answers(found, expected):
    assert layers(found) == layers(expected)
    assert [a[1] for a in found] == [a[1] for a in expected]  # is_greedy
    assert [a[0] for a in found] == pytest.approx([a[0] for a in expected], rel=2e-6, abs=1e-4)


def assert_same_texts(found, expected):
    assert [str(a) for a in found] == [str(a) for a in expected]
    assert [a.exit_record.layers for a in found] == [a.exit_record.layers for a in expected]


# ------------------------------------------------------------------------------------------------ loglikelihood


@pytest.mark.parametrize("prefix_cache", [0, 64])
def test_documents_leave_after_the_same_blocks_with_the_same_scores(prefix_cache, folder):
    expected, found = (lm_on(d, folder, stopper="gap:0.3", prefix_cache=prefix_cache) for d in ("cpu", DEVICE))
    asked = noted(expected.stopper)
    answers = expected.loglikelihood(documents(), True)
    assert len(set(layers(answers))) > 2 and not hangs_on_rounding(parse("gap:0.3"), asked)
    assert_same_answers(found.loglikelihood(documents(), True), answers)


def test_rolling_texts_leave_after_the_same_blocks_with_the_same_scores(folder):
    expected, found = (
        lm_on(d, folder, stopper="gap:0.3").loglikelihood_rolling(prompts("loglikelihood_rolling"), True)
        for d in ("cpu", DEVICE)
    )
    assert layers(found) == layers(expected)
    assert [float(a) for a in found] == pytest.approx([float(a) for a in expected], rel=2e-6, abs=1e-4)


def test_scores_in_bfloat16_differ_by_rounding(folder):
    expected, found = (lm_on(d, folder, "bfloat16", stopper="fixed:3") for d in ("cpu", DEVICE))
    own = [a[0] for a in expected.loglikelihood(documents(), True)]
    with in_float32(expected.model) as copied:
        assert copied
        rounding = max(abs(a - b[0]) for a, b in zip(own, expected.loglikelihood(documents(), True), strict=True))
    answers = found.loglikelihood(documents(), True)
    assert set(layers(answers)) == {3}
    assert max(abs(a - b[0]) for a, b in zip(own, answers, strict=True)) <= TIMES_ROUNDING * rounding


# ------------------------------------------------------------------------------------------------ generation


def logits_of(lm, policy, copies=False):
    """[steps, rows, V] logits of given tokens that leave at EXITS, whatever the logits say."""
    rows = [list(range(7 * n + 3, 7 * n + 9 + n)) for n in range(len(EXITS[0]))]
    stopper = Listed(EXITS)
    schedule = Schedule(lm.anatomy.n_blocks, stopper)
    decoder = Decoder(lm.anatomy, stopper, schedule, prepare(lm.anatomy), rows, len(EXITS), kv_policy=policy)
    logits = []
    with decoder.attached():
        for step in range(len(EXITS)):
            logits.append(decoder.step().cpu())
            decoder.append([11 + step, 23 + step, 31 + step], [False] * len(rows))
    assert [result.layers for result in decoder.results] == [list(row) for row in zip(*EXITS, strict=True)]
    return torch.stack(logits)


@pytest.mark.parametrize("policy", KV_POLICIES)
def test_every_logit_of_decoding_is_the_cpus(policy, folder):
    expected, found = (logits_of(lm_on(d, folder), policy) for d in ("cpu", DEVICE))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=2e-6)


@pytest.mark.parametrize("policy", KV_POLICIES)
def test_logits_of_decoding_in_bfloat16_differ_by_rounding(policy, folder):
    lm = lm_on("cpu", folder, "bfloat16")
    own = logits_of(lm, policy)
    with in_float32(lm.model) as copied:
        assert copied
        rounding = logits_distance(own, logits_of(lm, policy))
    assert 0 < rounding < 0.2
    assert logits_distance(logits_of(lm_on(DEVICE, folder, "bfloat16"), policy), own) <= TIMES_ROUNDING * rounding


@pytest.mark.parametrize("options", [{}, {"kv_policy": "propagate"}, {"head_check": "shortlist:8"}], ids=str)
def test_generated_texts_are_the_cpus_token_by_token(options, folder):
    expected, found = (lm_on(d, folder, stopper="gap:0.3", **options) for d in ("cpu", DEVICE))
    asked = noted(expected.stopper)
    texts = expected.generate_until(prompts("generate_until"), True)
    assert len({k for text in texts for k in text.exit_record.layers}) > 2
    assert not hangs_on_rounding(parse("gap:0.3"), asked)
    assert_same_texts(found.generate_until(prompts("generate_until"), True), texts)


# ------------------------------------------------------------------------------------------------ stoppers


def stopper_of(kind):
    """A rule, or a classifier of two features that stops at about half of what it sees."""
    if kind == "gap":
        return parse("gap:0.3")
    rng = np.random.default_rng(2)  # with this one, no decision below hangs on rounding
    x = rng.uniform(0, 1, (120, 2)).astype(np.float32).astype(float)
    y = (x[:, 0] + 0.2 * np.sin(9 * x[:, 1]) + 0.1 * rng.normal(size=len(x)) > 0.35).astype(int)
    if kind == "svm":
        return SVMStopper.from_sklearn(SVC(kernel="rbf").fit(x, y), FEATURES)
    trees = GradientBoostingClassifier(max_depth=2, n_estimators=8, learning_rate=0.5, random_state=0).fit(x, y)
    return BoostedStopper(BoostedStopper.arrays_of(trees), FEATURES, threshold=0.5)


KINDS = ["gap", "svm", "boosted"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopper_decides_on_cuda_as_on_the_cpu(kind):
    stopper = stopper_of(kind)
    values = torch.rand(500, len(stopper.features), generator=torch.Generator().manual_seed(1))
    expected, found = (stopper.margin(2, values.to(device)) for device in ("cpu", DEVICE))
    assert found.device == torch.device(DEVICE)
    torch.testing.assert_close(found.cpu(), expected, atol=1e-6, rtol=0)
    assert 0 < int((expected > 0).sum()) < len(values)


@pytest.mark.parametrize("kind", KINDS)
def test_documents_and_tokens_leave_after_the_same_blocks_under_every_stopper(kind, folder):
    expected, found = (lm_on(d, folder, stopper=stopper_of(kind)) for d in ("cpu", DEVICE))
    asked = noted(expected.stopper)
    answers, texts = expected.loglikelihood(documents(), True), expected.generate_until(prompts("generate_until"), True)
    assert len(set(layers(answers))) > 1 and not hangs_on_rounding(stopper_of(kind), asked)
    assert_same_answers(found.loglikelihood(documents(), True), answers)
    assert_same_texts(found.generate_until(prompts("generate_until"), True), texts)


@pytest.mark.parametrize("kind", KINDS)
def test_features_in_bfloat16_differ_by_rounding(kind, folder):
    def first_features(lm, asked):
        """Of all documents after block 1, where none has left."""
        asked.clear()
        lm.loglikelihood(documents(), True)
        return torch.cat([values for block, values in asked if block == 1])

    lm, other = (lm_on(d, folder, "bfloat16", stopper=stopper_of(kind), prefix_cache=0) for d in ("cpu", DEVICE))
    asked = noted(lm.stopper)
    own = first_features(lm, asked)
    with in_float32(lm.model) as copied:
        assert copied
        rounding = (own - first_features(lm, asked)).abs().max()
    found = first_features(other, noted(other.stopper))
    assert 0 < rounding < 0.2
    assert (found - own).abs().max() <= TIMES_ROUNDING * rounding


# ------------------------------------------------------------------------------------------------ offloading


@pytest.mark.parametrize("policy", KV_POLICIES)
def test_weights_in_memory_and_on_disk_run_on_cuda_with_the_cpus_answers(policy, folder, tmp_path):
    ends = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"), DEVICE)
    where = {**ends, **{f"model.layers.{k}": (DEVICE, "cpu", "disk", "cpu", "disk")[k] for k in range(5)}}
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, device_map=where, offload_folder=str(tmp_path)
    ).eval()
    assert any(p.device.type == "meta" for p in model.parameters())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = lm_on("cpu", folder, stopper="gap:0.3", kv_policy=policy)
    found = AdaInferLM(
        pretrained=model, tokenizer=tokenizer, stopper="gap:0.3", kv_policy=policy, batch_size=4, max_length=96
    )
    assert found.device == torch.device(DEVICE)
    assert_same_answers(found.loglikelihood(documents(), True), expected.loglikelihood(documents(), True))
    asked = prompts("generate_until")
    assert_same_texts(found.generate_until(asked, True), expected.generate_until(asked, True))


# ------------------------------------------------------------------------------------------------ readers

READERS = ["copy:1", "copy:4", "sim:1", "sim:4", "tuned"]


def named(reader):
    """The reader; a tuned one has maps that matter, and h is 32."""
    if reader != "tuned":
        return reader
    rng = np.random.default_rng(0)
    arrays = {"bias": rng.normal(size=(4, 32)), "down": rng.normal(size=(4, 3, 32)), "up": rng.normal(size=(4, 32, 3))}
    return Reader("tuned", maps=Maps({name: (0.1 * x).astype(np.float32) for name, x in arrays.items()}))


@pytest.mark.parametrize("prefix_cache", [0, 64])
@pytest.mark.parametrize("reader", READERS)
def test_documents_are_read_as_on_the_cpu(reader, prefix_cache, folder):
    options = {"stopper": "gap:0.3", "check_layers": "all", "reader": named(reader), "prefix_cache": prefix_cache}
    expected, found = (lm_on(d, folder, **options) for d in ("cpu", DEVICE))
    asked = noted(expected.stopper)
    answers = expected.loglikelihood(documents(), True)
    assert len(set(layers(answers))) > 1 and not hangs_on_rounding(parse("gap:0.3"), asked)
    assert_same_answers(found.loglikelihood(documents(), True), answers)


@pytest.mark.parametrize("reader", READERS)
def test_scores_under_a_reader_in_bfloat16_differ_by_rounding(reader, folder):
    options = {"stopper": "fixed:3", "reader": named(reader)}
    expected, found = (lm_on(d, folder, "bfloat16", **options) for d in ("cpu", DEVICE))
    own = [a[0] for a in expected.loglikelihood(documents(), True)]
    with in_float32(expected.model) as copied:
        assert copied
        rounding = max(abs(a - b[0]) for a, b in zip(own, expected.loglikelihood(documents(), True), strict=True))
    answers = found.loglikelihood(documents(), True)
    assert max(abs(a - b[0]) for a, b in zip(own, answers, strict=True)) <= TIMES_ROUNDING * rounding


@pytest.mark.parametrize("reader", READERS)
def test_texts_under_a_reader_are_the_cpus(reader, folder):
    options = {"stopper": "gap:0.3", "check_layers": "all", "reader": named(reader)}
    expected, found = (lm_on(d, folder, **options) for d in ("cpu", DEVICE))
    asked = noted(expected.stopper)
    texts = expected.generate_until(prompts("generate_until"), True)
    assert not hangs_on_rounding(parse("gap:0.3"), asked)
    found_texts = found.generate_until(prompts("generate_until"), True)
    assert_same_texts(found_texts, texts)
    where = [[text.exit_record.prompt_exit_layer for text in some] for some in (found_texts, texts)]
    assert where[0] == where[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("reader", READERS)
def test_verify_finds_nothing_wrong_under_a_reader(reader, dtype, folder):
    findings = verify_model(lm_on(DEVICE, folder, dtype, stopper="gap:0.3", reader=named(reader)), True)
    assert {f.status for f in findings} == {OK}, render(findings)
    assert {"reader", "texts"} <= {f.check for f in findings}


# ------------------------------------------------------------------------------------------------ verify


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_verify_finds_nothing_wrong_on_cuda(dtype, folder):
    findings = verify_model(lm_on(DEVICE, folder, dtype, stopper="gap:0.3"), True)
    assert {f.status for f in findings} == {OK}, render(findings)
