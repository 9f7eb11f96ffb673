"""Readers that let tokens go on (copy, sim), batched and with shared prefixes, against one row at a time."""

from __future__ import annotations

import json
import random

import pytest
import torch
from helpers.models import byte_tokenizer, make_model
from helpers.reference import read_score
from helpers.stoppers import ScriptedByState
from helpers.tasks import instance
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.harness.model import AdaInferLM
from lm_eval_adainfer.prefill import prefixes
from lm_eval_adainfer.prefill import reading as reading_module
from lm_eval_adainfer.prefill.documents import Row
from lm_eval_adainfer.prefill.forward import Forward, padded
from lm_eval_adainfer.prefill.reading import Spot

READERS = ("copy:1", "copy:3", "sim:1", "sim:3")
# tests/test_families.py runs over all of them
SOME = ("llama", "opt-post-norm-projected", "gptj", "gpt2", "bloom", "falcon", "gemma3", "mixtral", "mamba")
NO_COPY, NO_SIM = {"mamba"}, {"bloom", "mpt", "mamba"}  # no plain cache; no position ids (alibi)


def lm_of(model, tokenizer, **kwargs):
    return AdaInferLM(pretrained=model, tokenizer=tokenizer, **{"batch_size": 4, "max_length": 128, **kwargs})


def unsupported(family, reader):
    return family in (NO_COPY if reader.startswith("copy") else NO_SIM)


def asked(shared="", documents=6, seed=0, choices=(" x", " yz", " abc"), lengths=(3, 20)):
    rng = random.Random(seed)
    found = []
    for doc in range(documents):
        text = shared + "".join(rng.choice("abcdef ") for _ in range(rng.randint(*lengths)))
        found += [instance(text, choice, doc, idx=i) for i, choice in enumerate(choices)]
    return found


def compare(lm, reader, requests, answers):
    """Every answer is the slow reference's at its own exit block; returns the exits."""
    exits = set()
    for request, answer in zip(requests, answers, strict=True):
        k = int(answer.exit_record.exit_layer)
        exits.add(k)
        pair = lm._encode_pair(*request.args)
        slow = read_score(lm.model, lm.anatomy.blocks, reader, *pair, k, lm.max_length)
        assert answer[0] == pytest.approx(slow[0], abs=1e-4 * max(1, abs(slow[0])))
        assert (answer[1], answer.top1) == slow[1:]
    return exits


@pytest.mark.parametrize("batch_size", [1, 7])
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("family", SOME)
def test_mixed_exits_are_those_of_rows_alone(family, reader, batch_size, tokenizer):
    if unsupported(family, reader):
        pytest.skip("another test says that it is refused")
    lm = lm_of(
        make_model(family, vocab_size=257), tokenizer, stopper=ScriptedByState(), reader=reader, check_layers="all",
        batch_size=batch_size, prefix_cache=0,
    )  # fmt: skip
    requests = asked()
    assert len(compare(lm, reader, requests, lm.loglikelihood(requests, True))) > 1


SHOTS = "a few shots that all documents of a task begin with. "


@pytest.mark.parametrize("reader", ["copy:1", "copy:4", "sim:4"])
@pytest.mark.parametrize("family", SOME)
def test_what_prompts_share_is_read_once(family, reader, tokenizer, monkeypatch):
    """Own parts of 1, W - 1, W and W + 1 tokens: windows begin behind the prefix, at its end, and inside of it."""
    if unsupported(family, reader) or family == "mamba":
        pytest.skip("another test says that it is refused, or that it shares nothing")
    window, choices = int(reader[-1]), (" x", " yz", " abcdefgh")
    requests = []
    for doc, own in enumerate(n for n in (1, window - 1, window, window + 1, 12, 13) if n > 0):
        text = SHOTS + "".join(random.Random(doc).choice("abcdef") for _ in range(own))
        requests += [instance(text, choice, doc, idx=i) for i, choice in enumerate(choices)]
    model = make_model(family, vocab_size=257)
    lm = lm_of(model, tokenizer, stopper=ScriptedByState(), reader=reader, check_layers="all", batch_size=7)
    answers = lm.loglikelihood(requests, True)
    compare(lm, reader, requests, answers)
    monkeypatch.setattr(prefixes, "_KEPT", 0)  # copies that don't stay for later batches are made again
    again = lm_of(model, tokenizer, stopper=ScriptedByState(), reader=reader, check_layers="all", batch_size=7)
    assert again.loglikelihood(requests, True) == answers
    whole = lm_of(
        model, tokenizer, stopper=ScriptedByState(), reader=reader, check_layers="all", batch_size=7, prefix_cache=0
    )
    for a, b in zip(answers, whole.loglikelihood(requests, True), strict=True):
        assert a.exit_record == b.exit_record
    assert lm.engine.block_tokens + lm.engine.copied_tokens < 0.7 * (
        whole.engine.block_tokens + whole.engine.copied_tokens
    )


@pytest.mark.parametrize("reader", ["copy:1", "copy:5", "sim:5"])
def test_long_documents_are_decided_first_and_scored_second(reader, tokenizer):
    """More rows than a batch, more contexts than a batch, prompts shorter than the window, empty contexts."""
    model = make_model("llama", vocab_size=257)
    requests = [instance("a question with many answers", f" {word}", 0, idx=i) for i, word in enumerate("abcdefghij")]
    requests += [instance(f"{name} is the subject", " xy", 1, idx=i) for i, name in enumerate("pqrstuvwxyz")]
    requests += [instance("ab", " cd", 2, idx=0), instance("ab", " e", 2, idx=1), instance("", " fg", 2, idx=2)]
    for prefix_cache in (0, 4096):
        lm = lm_of(
            model, tokenizer, stopper=ScriptedByState(), reader=reader, check_layers="all", batch_size=3,
            prefix_cache=prefix_cache,
        )  # fmt: skip
        exits = [
            {a.exit_record.exit_layer for a, r in zip(lm.loglikelihood(requests, True), requests, strict=True)
             if r.doc_id == n}
            for n in range(3)
        ]  # fmt: skip
        assert [len(found) for found in exits] == [1, 1, 1]
        compare(lm, reader, requests[:-1], lm.loglikelihood(requests, True)[:-1])


@pytest.mark.parametrize("reader", ["copy:2", "sim:2"])
def test_truncated_prompts(reader, tokenizer):
    lm = lm_of(
        make_model("llama", vocab_size=257), tokenizer, stopper=ScriptedByState(), reader=reader, check_layers="all",
        max_length=12,
    )  # fmt: skip
    requests = asked(lengths=(5, 30), choices=(" x", " yz", " abcdefghij"))
    compare(lm, reader, requests, lm.loglikelihood(requests, True))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("reader", ["copy:1", "copy:40", "sim:1", "sim:40"])
def test_a_fixed_block_and_no_exit(family, reader, tokenizer):
    """fixed:N reads nothing before its block; a window of the whole prompt gives the dense model's answers."""
    model, requests = make_model(family, vocab_size=257), asked()
    dense = lm_of(model, tokenizer).loglikelihood(requests, True)
    lm = lm_of(model, tokenizer, stopper="fixed:2", reader=reader, prefix_cache=0)
    answers = lm.loglikelihood(requests, True)
    assert compare(lm, reader, requests, answers) == {2}
    if reader.endswith("40"):
        assert [a[0] for a in answers] == pytest.approx([a[0] for a in dense], abs=1e-4, rel=1e-5)
    unread = lm_of(model, tokenizer, stopper="none", reader=reader).loglikelihood(requests, True)
    assert [a[0] for a in unread] == pytest.approx([a[0] for a in dense], abs=1e-5)
    assert {a.exit_record.flops_ratio_total for a in unread} == {1.0}


@pytest.mark.parametrize("reader", ["copy:2", "sim:2"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_coarse_dtypes_answer_as_float32_to_their_rounding(reader, dtype, tokenizer):
    requests = asked(documents=12)
    found = [
        lm_of(make_model("llama", vocab_size=257).to(kind), tokenizer, stopper="fixed:2", reader=reader)
        .loglikelihood(requests, True)
        for kind in (getattr(torch, dtype), torch.float32)
    ]  # fmt: skip
    off = [abs(a[0] - b[0]) / max(1, abs(b[0])) for a, b in zip(*found, strict=True)]
    assert sum(off) / len(off) < (0.05 if dtype == "bfloat16" else 0.01)


@pytest.mark.parametrize(("family", "reader"), [(f, "copy") for f in NO_COPY] + [(f, "sim:4") for f in sorted(NO_SIM)])
def test_families_that_cannot_be_read_so_are_refused(family, reader, tokenizer):
    with pytest.raises(AdaInferError, match=rf"^reader: \w+ can't be read by {reader[:3]}.*; use head or tuned$"):
        lm_of(make_model(family, vocab_size=257), tokenizer, stopper="gap:0.8", reader=reader)


def test_checks_that_cost_more_than_a_tenth_of_the_dense_work_are_warned_of(tokenizer, caplog):
    model, requests = make_model("llama", vocab_size=257), asked()
    for options, warned in (({"reader": "copy", "check_layers": "all"}, True), ({"check_layers": "all"}, False)):
        lm = lm_of(model, tokenizer, stopper="gap:1.0", **options)
        caplog.clear()
        for _ in range(2):
            lm.loglikelihood(requests, True)
        said = [r.getMessage() for r in caplog.records if r.getMessage().startswith("check_layers: asking under")]
        assert len(said) == warned
        # the figure is what such a run is counted to cost, dense work not included
        if warned:
            more = lm.loglikelihood(requests, True)[0].exit_record
            assert "after block 1, 2, 3, 4 costs" in said[0] and more.flops_ratio_total > 1.1
    for tuned, warned in (([1, 2, 3, 4], False), ([3], True)):  # whose cost was counted when they were chosen
        lm = lm_of(model, tokenizer, stopper="gap:1.0", reader="copy", check_layers="all")
        lm.stopper.info = {"tuned": {"check_layers": tuned}}
        caplog.clear()
        lm.loglikelihood(requests, True)
        assert ("check_layers: asking under" in caplog.text) == warned


def test_asked_blocks_are_placed_late_where_nobody_names_them(tokenizer):
    model = make_model("llama", vocab_size=257, num_hidden_layers=20)
    blocks = {
        name: lm_of(model, tokenizer, **options).schedule.blocks
        for name, options in {
            "copy": {"stopper": "gap:0.8", "reader": "copy"},
            "sim": {"stopper": "gap:0.8", "reader": "sim:4", "min_layer": 16},
            "named": {"stopper": "gap:0.8", "reader": "copy", "check_layers": "4+9"},
            "all": {"stopper": "gap:0.8", "reader": "copy", "check_layers": "all"},
            "head": {"stopper": "gap:0.8"},
            "fixed": {"stopper": "fixed:3", "reader": "copy"},
        }.items()
    }
    assert blocks["copy"] == (13, 15, 17, 19) and blocks["sim"] == (17, 19)
    assert blocks["named"] == (4, 9) and blocks["fixed"] == (3,)
    assert blocks["all"] == blocks["head"] == tuple(range(1, 20))


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    reader=st.sampled_from(["copy:1", "copy:3", "copy:9", "sim:1", "sim:3", "sim:9"]),
    k=st.integers(1, 4),
    prompt=st.integers(1, 20),
    positions=st.integers(1, 5),
)
def test_what_a_reading_costs_is_what_hooks_count(reader, k, prompt, positions, counted_lm):
    """FLOPs of linear maps and of attention, of one row that is read at some positions."""
    lm = counted_lm(reader)
    reading, row = lm.engine.reading, Row(list(range(5, 5 + prompt + positions - 1)), positions)
    forward = Forward(lm.anatomy, padded(lm.anatomy, [row.tokens]))
    for _ in range(k):
        forward.advance()
    spent, pairs, handles = 0, [], []

    def linear(module, args, output):
        nonlocal spent
        spent += 2 * module.weight.numel() * args[0].shape[:-1].numel()

    for block in lm.anatomy.blocks:
        handles += [m.register_forward_hook(linear) for m in block.modules() if isinstance(m, torch.nn.Linear)]
        handles.append(block.self_attn.o_proj.register_forward_hook(lambda m, args, out: pairs.append(args[0].shape[1])))
    idle = {id(module) for some in (reading.storing.idle if reading.storing else []) for module, _ in some}
    before, tokens = spent, 0
    reading.read(k, forward.hidden, None, [Spot(0, row, 0, positions)])
    for handle in handles:
        handle.remove()
    # a stand-in for an idle map is called with the tokens that are only stored, and computes nothing
    tokens = max(0, prompt - reading.reader.window) if reader.startswith("copy") else 0
    nothing = sum(2 * m.weight.numel() * tokens for b in lm.anatomy.blocks[k:] for m in b.modules() if id(m) in idle)
    queries = sum(pairs)
    assert queries == (lm.n_blocks - k) * lm.counter.run_on(prompt, positions)
    run = lm.counter.run_on(prompt, positions)
    first = prompt + positions - 1 - run if reader.startswith("copy") else 0
    attended = (lm.n_blocks - k) * sum(first + n + 1 for n in range(run)) * 4 * 32
    assert lm.counter.read(k, prompt, positions) == spent - before - nothing + attended


@pytest.fixture(scope="module")
def counted_lm():
    """An early-exit model per reader, made once."""
    made = {}

    def of(reader):
        if reader not in made:
            made[reader] = AdaInferLM(
                pretrained=make_model("llama", vocab_size=257), tokenizer=byte_tokenizer(), stopper="gap:0.8",
                reader=reader, max_length=64,
            )  # fmt: skip
        return made[reader]

    return of


# ------------------------------------------------------------------------------------------------ a pretrained model
def test_smollm2_is_read_by_copies_where_its_head_says_nothing(smollm2, shared):
    """The plural of a noun, 5 shots: after block 22 of 30 norm and head give no answer, and copies nearly all."""
    file = shared / "hf" / "function_vectors" / "singular-plural.json"
    if not file.is_file():
        pytest.skip("no word tasks here")
    pairs = json.loads(file.read_text())
    random.Random(0).shuffle(pairs)
    shots = "".join(f"Q: {pair['input']}\nA: {pair['output']}\n\n" for pair in pairs[:5])
    requests = [
        instance(f"{shots}Q: {pair['input']}\nA:", f" {pair['output']}", n) for n, pair in enumerate(pairs[5:45])
    ]
    right = {}
    for reader in (None, "head", "copy:1"):
        options = {} if reader is None else {"stopper": "fixed:22", "reader": reader}
        lm = AdaInferLM(
            pretrained=smollm2[0], tokenizer=smollm2[1], mixed_precision_dtype=None, batch_size=16, **options
        )
        right[reader] = sum(answer[1] for answer in lm.loglikelihood(requests, True))
    assert right[None] >= 28 and right["head"] <= 4 and right["copy:1"] >= right[None] - 4


@pytest.mark.parametrize("reader", ["copy:4", "sim:4"])
def test_prefixes_are_not_shared_where_they_would_be_read_wrongly(reader, tokenizer, monkeypatch, caplog):
    """A fault planted into what windows get of a prefix is found before anything is shared, and warned of."""
    put = reading_module._put

    def shifted(into, source, places):
        moved = [(i, j, r, max(0, t - 1)) for i, j, r, t in places]
        put(into, source, moved if source.shape[1] == 4 and source.shape[0] == 1 else places)

    requests = asked(SHOTS, lengths=(1, 6))
    for planted in (False, True):
        if planted:
            monkeypatch.setattr(reading_module, "_put", shifted)
        lm = lm_of(make_model("llama", vocab_size=257), tokenizer, stopper="gap:0.5", reader=reader)
        answers = lm.loglikelihood(requests, True)
        assert (lm._sharing().rule is None) == planted
        said = [r.getMessage() for r in caplog.records if r.getMessage().startswith("prefix_cache:")]
        assert bool(said) == planted
    monkeypatch.undo()
    compare(lm, reader, requests, answers)
