"""Features among the choices: their maths, where they are read from, and stoppers that stop by them."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from helpers.models import lm_of, make_model
from helpers.reference import among, logits_after_block, slow_features
from helpers.refusals import refused
from helpers.tasks import documents, instance, make_task
from helpers.traces import traced, write
from hypothesis import given
from hypothesis import strategies as st

from lm_eval_adainfer.fitting import calibration, check_layers, fit
from lm_eval_adainfer.harness import scoring
from lm_eval_adainfer.prefill.documents import Answer, Document, Row
from lm_eval_adainfer.readers import specs as readers
from lm_eval_adainfer.strategies import features, specs
from lm_eval_adainfer.strategies.asking import ask
from lm_eval_adainfer.strategies.base import Stopper
from lm_eval_adainfer.strategies.features import FEATURES, Observation
from lm_eval_adainfer.structure.state import BlockState
from lm_eval_adainfer.traces import documents as traced_documents
from lm_eval_adainfer.traces import file, margins, replay
from lm_eval_adainfer.traces.plan import Plan
from lm_eval_adainfer.traces.recorders import Recorder
from lm_eval_adainfer.verification import OK, verify_model

NAMES = tuple(name for name in FEATURES if FEATURES[name].choices)
RECORDED = tuple(name for name in NAMES if FEATURES[name].recorded)


# ------------------------------------------------------------------------------------------------ the maths
def observed(logits, tokens):
    """What :data:`RECORDED` are for decisions of these logits over a vocabulary and these choices."""
    n = len(tokens)
    state = BlockState(1, torch.zeros(n, 1, 2), torch.zeros(n, 1, 2))
    number = torch.arange(n)
    choices = features.choices_of(logits, tokens)
    seen = Observation(state, number, torch.zeros_like(number), logits, 4, choices=choices)
    return features.compute(RECORDED, seen)


cases = st.lists(st.one_of(st.just(0), st.integers(2, 10)), min_size=1, max_size=5)


@given(counts=cases, seed=st.integers(0, 2**32 - 1), scale=st.floats(0.0, 30.0))
def test_they_are_of_the_full_softmax_picked_and_divided_by_its_sum(counts, seed, scale):
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(scale * rng.normal(size=(len(counts), 40))).float()
    tokens = [rng.choice(40, count, replace=False).tolist() for count in counts]
    found = observed(logits, tokens)
    for values, row, mine in zip(found, logits, tokens, strict=True):
        if not mine:
            assert values.isnan().all()
            continue
        shares = among(row.double().softmax(-1).tolist(), mine)
        first, second = sorted(shares, reverse=True)[:2]
        entropy = -sum(p * math.log(p) for p in shares if p) / math.log(len(mine))
        assert values.tolist() == pytest.approx([first - second, first, entropy], abs=1e-5)
        assert ((values > -1e-6) & (values < 1 + 1e-6)).all() and values[1] > 1 / len(mine) - 1e-6
    shuffled = observed(logits, [rng.permutation(mine).tolist() for mine in tokens])
    torch.testing.assert_close(shuffled, found, atol=1e-6, rtol=0, equal_nan=True)


def test_a_decision_does_not_depend_on_how_many_choices_others_have():
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    together = observed(logits, [[3, 5], [], list(range(10))])
    torch.testing.assert_close(together[:1], observed(logits[:1], [[3, 5]]))
    torch.testing.assert_close(together[2:], observed(logits[2:], [list(range(10))]))


# ------------------------------------------------------------------------------------------------ which choices
def row(*continuations, context=0, first=0):
    answers = [Answer(first + n, list(c)) for n, c in enumerate(continuations)]
    return Row([7, 8, *continuations[0][:-1]], len(continuations[0]), context, answers)


@pytest.mark.parametrize(
    ("rows", "deciders", "expected"),
    [
        ([row([5], [3], [9])], [0], [(5, 3, 9)]),
        ([row([9], first=2), row([5], first=0), row([3], first=1)], [1], [(5, 3, 9)]),  # without logits_cache
        ([row([5], [3]), row([4, 2], first=2)], [0], [()]),
        ([row([4, 2], first=2), row([5], [3])], [0], [()]),
        ([row([5], [3], [5])], [0], [()]),
        ([row([5])], [0], [()]),
        ([row([5], [3]), row([6], [4], context=1, first=2), row([5], [3], context=-1, first=4)], [0, 1], [(5, 3), (6, 4)]),
        ([row([5], [3]), row([6], context=1, first=2)], [0, 1], [(5, 3), ()]),
        ([row([5], [3], context=-1)], [], []),
    ],
)  # fmt: skip
def test_choices_are_two_or_more_to_one_context_of_a_token_each(rows, deciders, expected):
    document = Document(rows, deciders)
    assert [document.choices(j) for j in range(len(deciders))] == expected
    assert document.has_choices == all(expected)


# ------------------------------------------------------------------------------------------------ in the engine
class Watching(Stopper):
    """Reads the features among the choices, exits by a rule of block and value, and keeps what it was shown."""

    kind = "watching"
    features = (*NAMES, "depth")

    def __init__(self):
        self.shown = []

    def margin(self, block, values, memory=None):
        self.shown += [(block, row) for row in values.tolist()]
        coarse = torch.round(values[:, 0] * 100)  # so that rounding errors hardly ever change a decision
        return torch.frac(coarse * 0.618034 + block * 0.37) - 0.5


def asked_of(seed, count=12):
    """Documents in turn: 2 to 6 choices of a byte each; several contexts of such; longer ones; two that are equal."""
    rng = random.Random(seed)
    found = []
    for doc in range(count):
        text = "".join(rng.choices("abcdefgh ", k=rng.randint(3, 20))) + "?"
        if doc % 4 < 2 or doc % 8 == 2:
            choices = rng.sample("uvwxyz", rng.randint(2, 6))
        else:
            choices = ["no", "yes", "x"] if doc % 8 == 3 else ["x", "y", "x"]
        contexts = [text, text + "!", "So: " + text] if doc % 8 == 2 else [text]
        pairs = [(c, choice) for c in contexts for choice in choices]
        found += [instance(c, choice, doc, idx=n) for n, (c, choice) in enumerate(pairs)]
    return found


def decisions_of(lm, asked):
    """Document -> its distinct contexts, in tokens, each with the tokens of its choices (none where they are longer)."""
    found = {}
    for request in asked:
        context, continuation = lm._encode_pair(*request.args)
        found.setdefault(request.doc_id, {}).setdefault(tuple(context), []).append(continuation)
    ids = {}
    for doc, mine in found.items():
        ids[doc] = [
            (list(context), [c[0] for c in cs] if all(len(c) == 1 for c in cs) and len({*map(tuple, cs)}) == len(cs) else [])
            for context, cs in mine.items()
        ]  # fmt: skip
    return ids


@pytest.fixture(scope="module")
def model():
    return make_model("llama", vocab_size=257, max_position_embeddings=512)


@pytest.mark.parametrize(
    "options", [{"batch_size": 1}, {"batch_size": 7}, {"batch_size": 2, "logits_cache": False}], ids=str
)
@pytest.mark.parametrize("family", ["llama", "gptj"])
def test_a_stopper_of_the_choices_is_shown_the_slow_ones_and_stops_at_no_other_document(
    family, options, tokenizer, caplog
):
    model, asked = make_model(family, vocab_size=257), asked_of(3)
    stopper = Watching()
    lm = lm_of(model, tokenizer, stopper=stopper, **options)
    answers = lm.loglikelihood(asked, True)
    layers = {r.doc_id: int(a.exit_record.exit_layer) for r, a in zip(asked, answers, strict=True)}
    decisions, expected = decisions_of(lm, asked), {}
    for doc, mine in decisions.items():
        slow = [slow_features(model, family, context, choices) for context, choices in mine]
        rows = [[[s[name][k] for name in stopper.features] for s in slow] for k in range(4)]
        says = [[float(Watching().margin(k + 1, torch.tensor([r]))) for r in rows[k]] for k in range(4)]
        stops = [k + 1 for k in range(4) if all(margin > 0 for margin in says[k])]  # NaN is not
        assert layers[doc] == (stops[0] if stops else lm.n_blocks)
        expected[doc] = rows
    has = {doc for doc, mine in decisions.items() if all(choices for _, choices in mine)}
    assert {layers[doc] for doc in layers if doc not in has} == {lm.n_blocks} and len({layers[d] for d in has}) > 2
    known = sorted(
        (k + 1, row) for rows in expected.values() for k, some in enumerate(rows) for row in some if row[0] == row[0]
    )
    for block, values in stopper.shown:
        if values[0] == values[0]:
            close = [row for k, row in known if k == block and row == pytest.approx(values, abs=2e-5)]
            assert close, "no decision has these"
    for request, answer in zip(asked, answers, strict=True):
        context, continuation = lm._encode_pair(*request.args)
        tokens, k = context + continuation[:-1], layers[request.doc_id]
        logprobs = logits_after_block(model, lm.anatomy.blocks, tokens, k)[-len(continuation) :].log_softmax(-1)
        assert answer[0] == pytest.approx(logprobs[range(len(continuation)), continuation].sum().item(), abs=1e-4)
    (said,) = [r.getMessage() for r in caplog.records if "choice_gap" in r.getMessage()]
    assert f"{len(decisions) - len(has)} of {len(decisions)} documents do not have" in said


def test_they_are_logged_and_recorded_where_there_are_choices(model, tokenizer):
    lm, asked = lm_of(model, tokenizer, stopper="choice_gap:0.01", batch_size=7, log_features=True), asked_of(9)
    answers = lm.loglikelihood(asked, True)
    records = {r.doc_id: a.exit_record for r, a in zip(asked, answers, strict=True)}
    dense = lm_of(model, tokenizer)
    recorder = Recorder(dense, Plan.of(dense.anatomy))
    with dense.engine.observed(recorder):
        dense.loglikelihood(asked, True)
    kept = {asked[first].doc_id: record["said"]["head"]["features"] for first, record in recorder.records.items()}
    logged = 0
    for doc, mine in decisions_of(lm, asked).items():
        for (context, choices), seen, found in zip(mine, records[doc].features, kept[doc], strict=True):
            slow = slow_features(model, "llama", context, choices)
            for name in RECORDED:
                column = [row[recorder.plan.features.index(name)] for row in found]
                assert column == pytest.approx(slow[name], abs=2e-5, nan_ok=True)
                depth = records[doc].exit_layer
                assert seen.get(name, []) == pytest.approx(slow[name][:depth] if choices else [], abs=2e-5)
            logged += bool(choices)
    assert 0 < logged < len(answers)


def watched_head(lm, monkeypatch):
    """(positions, logits of each) of every time that the head is read."""
    calls, read = [], lm.anatomy.logits

    def logits(hidden, candidates=None):
        found = read(hidden, candidates)
        calls.append(tuple(found.shape))
        return found

    monkeypatch.setattr(lm.anatomy, "logits", logits)
    return calls


def test_only_the_rows_of_the_choices_are_read_until_something_is_scored(model, tokenizer, monkeypatch):
    asked = [instance("the fox?", choice, 0, idx=n) for n, choice in enumerate("uvwxy")]
    asked += [instance("a cat says?", choice, 1, idx=n) for n, choice in enumerate("xyz")]
    lm = lm_of(model, tokenizer, stopper="choice_gap:1", batch_size=8)
    calls = watched_head(lm, monkeypatch)
    lm.loglikelihood(asked, True)
    assert calls == [(2, 5)] * 4 + [(2, 257)]
    calls.clear()
    keys = [r.doc_id for r in asked]
    requests = [(None, *lm._encode_pair(*r.args)) for r in asked]
    found = lm.documents(requests, keys)
    for batches in scoring.batches(lm, found, None):
        lm.engine.run(batches)
    assert [(d.choice_rows, d.head_rows, d.decisions) for d in found] == [(20, 1, 4), (12, 1, 4)]


def test_a_head_that_is_read_anyway_serves_the_choices_too(model, tokenizer, monkeypatch):
    class Both(Stopper):
        kind, features = "both", ("gap", "choice_gap")

        def margin(self, block, values, memory=None):
            return values[:, 1] - 1

    asked = [instance("the fox?", choice, 0, idx=n) for n, choice in enumerate("uvwxy")]
    lm = lm_of(model, tokenizer, stopper=Both())
    calls = watched_head(lm, monkeypatch)
    lm.loglikelihood(asked, True)
    assert calls == [(1, 257)] * 5


def test_a_head_that_cant_be_read_for_a_few_tokens_is_read_whole_and_counted_so(model, tokenizer, monkeypatch):
    asked = asked_of(5)
    few = lm_of(model, tokenizer, stopper=Watching(), batch_size=7)
    expected = few.loglikelihood(asked, True)
    monkeypatch.setattr("lm_eval_adainfer.structure.anatomy.Anatomy.reads_few_tokens", False)
    whole = lm_of(model, tokenizer, stopper=Watching(), batch_size=7)
    calls = watched_head(whole, monkeypatch)
    found = whole.loglikelihood(asked, True)
    assert {width for _, width in calls} == {257}
    for a, b in zip(found, expected, strict=True):
        assert a.exit_record.exit_layer == b.exit_record.exit_layer and a[0] == pytest.approx(b[0], abs=1e-5)
    assert whole.engine.head_rows > few.engine.head_rows


def test_the_choices_are_read_from_what_a_reader_made(model, tokenizer):
    lm, stopper = lm_of(model, tokenizer), Watching()
    states, read = torch.randn(2, 2, 3, lm.anatomy.block_hidden_size, generator=torch.Generator().manual_seed(1))[
        :, :, 0
    ]
    state, points = BlockState(2, states[:, None], states[:, None]), (torch.tensor([0, 1]), torch.tensor([0, 0]))
    tokens = [[5, 9, 11], []]
    ask(stopper, lm.anatomy, state, points, torch.zeros(2, stopper.carries), choices=tokens, read=read)
    expected = observed(lm.anatomy.logits(read), tokens)
    (_, first), (_, second) = stopper.shown
    assert first[:3] == pytest.approx(expected[0].tolist(), abs=1e-5) and first[3:] == pytest.approx([1.0, 0.4])
    assert all(math.isnan(x) for x in second[:4])


def test_rolling_and_generated_texts_have_no_choices_and_run_dense(model, tokenizer, caplog):
    lm = lm_of(model, tokenizer, stopper="choice_gap:0")
    text = [instance("a deer and a goat", None, 0, kind="loglikelihood_rolling")]
    dense = lm_of(model, tokenizer).loglikelihood_rolling(text, True)
    for _ in range(2):
        (answer,) = lm.loglikelihood_rolling(text, True)
        assert answer == pytest.approx(dense[0], abs=1e-4) and answer.exit_record.exit_layer == 5
    asked = [instance("a cat", {"until": ["\0"], "max_gen_toks": 4}, 0, kind="generate_until")]
    assert lm.generate_until(asked, True)[0].exit_record.exit_layer == 5
    (said,) = [r.getMessage() for r in caplog.records if "choice_gap" in r.getMessage()]
    assert "1 of 1 texts do not have" in said and "run dense" in said


@pytest.mark.parametrize(
    "stopper", ["choice_gap:0.02", "choice_gap:0.01:2", Watching()], ids=["gap", "in a row", "all"]
)
def test_verify_asks_it_at_choices_of_a_token_each(stopper, tokenizer):
    findings = verify_model(lm_of(make_model("llama", vocab_size=257), tokenizer, stopper=stopper), True)
    assert findings[-1].check == "stopper" and findings[-1].status == OK, findings[-1]
    assert "leaves after blocks 5 as" not in findings[-1].detail, "it never stopped"


# ------------------------------------------------------------------------------------------------ the rule
def test_the_rule_wants_so_many_gaps_in_a_row_and_forgets_at_the_first_that_is_too_small():
    stopper = specs.parse("choice_gap:0.5:3")
    gaps = [[0.9, 0.6, 0.7, 0.2], [0.9, 0.4, 0.9, 0.9], [0.9, 0.6, 0.8, 0.9], [0.9, 0.9, 0.51, 0.5]]
    memory = torch.zeros(4, stopper.carries)
    said = []
    for k in range(4):
        said.append((stopper.margin(k + 1, torch.tensor(gaps)[:, k : k + 1], memory) > 0).tolist())
    assert [list(s) for s in zip(*said, strict=True)] == [
        [False, False, True, False], [False] * 4, [False, False, True, True], [False, False, True, False]
    ]  # fmt: skip
    assert (
        specs.parse("choice_gap:0.5").fingerprint == specs.parse("choice_gap:0.5:1").fingerprint != stopper.fingerprint
    )


@pytest.mark.parametrize(
    "spec", ["choice_gap:x", "choice_gap:0.5:0", "choice_gap:0.5:x", "choice_gap:2", "choice_gap:"]
)
def test_a_wrong_rule_is_refused_in_a_sentence(spec):
    refused(lambda: specs.parse(spec), "stopper", spec.partition(":")[0])


def test_a_slip_of_its_name_is_understood():
    refused(lambda: specs.parse("choice_gap=0.4"), "choice_gap:0.4 is probably meant")


def test_existing_stoppers_carry_what_they_did():
    assert [specs.parse(s).carries for s in ("gap:0.8", "patience:3", "choice_gap:0.5", "choice_gap:0.5:3")] == [
        0,
        3,
        0,
        2,
    ]
    assert Watching().carries == 2


# ------------------------------------------------------------------------------------------------ traces
@pytest.fixture(scope="module")
def task():
    rng = random.Random(4)
    docs = [
        {**d, "choices": rng.sample("uvwxyz", 3) if i % 3 else d["choices"], "question": d["question"] + ":"}
        for i, d in enumerate(documents(40, 7))
    ]
    return make_task({"train": docs[:3], "test": docs}, doc_to_choice="{{choices}}", target_delimiter="")


@pytest.fixture(scope="module")
def trace(model, tokenizer, task, tmp_path_factory):
    lm = lm_of(model, tokenizer, max_length=400)
    plan = Plan.of(lm.anatomy, "copy:1", "2+4")
    path, _, _ = traced(lm, task, tmp_path_factory.mktemp("traces"), split="test", plan=plan)
    return path


@pytest.mark.parametrize(
    ("options", "reader"), [({}, "head"), ({"check_layers": "2+4"}, "head"), ({"check_layers": "2+4"}, "copy:1")], ids=str
)
def test_replay_is_the_real_run_of_every_document(options, reader, model, tokenizer, task, trace):
    traced_task = replay.load([trace])[0].under(reader)
    names, own = [*NAMES, "depth"], readers.parse(reader)
    fitted = fit.fit_classifier("logistic", [trace], features=names, threshold=0.5, reader=own)
    layers = set()
    for spec in ("choice_gap:0.02", "choice_gap:0.01:3", Watching(), fitted):
        run = lm_of(model, tokenizer, stopper=spec, reader=own, batch_size=5, max_length=400, **options)
        said = replay.document_margins(replay.parse(spec, 5), traced_task, **options)
        mine = traced_documents.exits(said)
        answers = run.loglikelihood(task.instances, True)
        real = {r.doc_id: a.exit_record.exit_layer for r, a in zip(task.instances, answers, strict=True)}
        clear = [n for n in range(len(mine)) if not (np.abs(said[n][~np.isnan(said[n])]) <= 1e-4).any()]
        assert len(clear) > 30 and {n: real[n] for n in clear} == {n: mine[n] for n in clear}
        layers |= {(str(spec), mine[n]) for n in clear}
    assert len(layers) > 6


def test_a_threshold_is_swept_and_calibrated_where_some_documents_have_no_choices(trace):
    rows = replay.replay(replay.load([trace]), ["choice_gap:0.5"], sweep=True)
    assert all(math.isfinite(row["threshold"]) for row in rows) and len({row["exit_layer"] for row in rows}) > 3
    stopper, found = calibration.calibrate([trace], specs.parse("choice_gap:0.5:2"), max_drop=0.5, loss="agreement")
    assert stopper.blocks == 2 and found.documents == 40


def test_a_fit_on_them_is_on_the_decisions_that_have_them(trace):
    meta, arrays = file.read(trace)
    has = ~np.isnan(arrays["features"][:, 0, meta["features"].index("choice_gap")])
    assert 10 < has.sum() < 40
    found = fit.collect([trace], ["choice_gap", "choice_agreement"], "final")
    assert len(found.x) == 5 * has.sum() and np.isfinite(found.x).all()
    assert found.seen == {"toy/test": arrays["doc_id"][has].tolist()}
    assert not {*fit.fit_classifier("logistic", [trace]).features} & {*NAMES}


def made(path, choice_gap, names=("gap", "top_prob", *RECORDED), **options):
    """A trace by hand of two decisions and three blocks: the first has choices, the second has not."""
    values = np.full((2, 3, len(names)), 0.5, dtype=np.float32)
    values[1][:, [i for i, name in enumerate(names) if name in RECORDED]] = np.nan
    for i, name in enumerate(names):
        if name in RECORDED:
            values[0, :, i] = choice_gap
    return write(path, values, [[1, 2, 3], [4, 4, 4]], names=names, **options)


def test_agreement_follows_from_the_scores_of_a_trace(tmp_path):
    scores = np.zeros((2, 3, 3))
    scores[0] = [[-1, -2, np.nan], [-3, -2, np.nan], [-3, -1, np.nan]]
    path = made(tmp_path / "a.trace", [0.1, 0.2, 0.3], scores=scores)
    meta, arrays = file.read(path)
    found = margins.columns(["choice_agreement"], meta, arrays)[:, :, 0]
    assert found[0].tolist() == [1, 1, 2] and np.isnan(found[1]).all()


def test_only_a_decision_without_any_choices_may_lack_them(tmp_path):
    replay.load([made(tmp_path / "a.trace", [0.1, 0.2, 0.3])])
    broken = made(tmp_path / "b.trace", [0.1, np.nan, 0.3])
    for call in (lambda: replay.load([broken]), lambda: fit.collect([broken], ["choice_gap"], "final")):
        refused(call, "NaN or infinite features")
    calibration.calibrate(
        [made(tmp_path / "c.trace", [0.1, 0.2, 0.3])], specs.parse("choice_gap:0.5"), loss="agreement"
    )


def test_a_trace_without_them_is_refused_in_a_sentence(tmp_path):
    old = made(tmp_path / "a.trace", [0.1, 0.2, 0.3], names=("gap", "top_prob"))
    for name, missing in (("choice_gap", "choice_gap"), ("choice_agreement", "choice_top_prob")):
        refused(lambda name=name: fit.collect([old], [name], "final"), f"has no {missing}; it has gap, top_prob")
    none = made(tmp_path / "b.trace", [np.nan] * 3)
    refused(
        lambda: fit.collect([none], ["gap", "choice_entropy"], "final"), "choice_entropy", "no decision of these traces"
    )


def test_layers_counts_the_rows_of_the_choices_and_the_head_at_the_exit(tmp_path):
    path = made(tmp_path / "a.trace", [0.9, 0.9, 0.9])
    _, everywhere, _ = check_layers.choose([path], specs.parse("choice_gap:0.5"))
    blocks, head = 100 * np.array([5 * 1, 6 * 3]), 8 * 16
    spent = blocks + 8 * 2 * np.array([1, 2]) + head  # two choices, and an exit after block 1 and after block 3
    assert everywhere.cost == pytest.approx(spent.mean() / (300 * np.array([5, 6]) + head).mean())
