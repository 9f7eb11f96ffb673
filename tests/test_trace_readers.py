"""Traces under several readers: against a slow recomputation, seen as one reader's, and what is fitted under one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.models import lm_of, make_model
from helpers.reference import states_after_blocks
from helpers.refusals import refused
from helpers.tasks import KINDS, documents, make_task
from helpers.traces import lens, traced, write_random
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lm_eval_adainfer import container
from lm_eval_adainfer.cli import main
from lm_eval_adainfer.fitting import calibration, check_layers, fit
from lm_eval_adainfer.output import figures, per_block
from lm_eval_adainfer.readers import files as reader_files
from lm_eval_adainfer.readers.base import HEAD, Reader, default_blocks
from lm_eval_adainfer.strategies import files
from lm_eval_adainfer.strategies.rules import FixedStopper, GapStopper
from lm_eval_adainfer.traces import documents as traced_documents
from lm_eval_adainfer.traces import recording, replay, splits, views
from lm_eval_adainfer.traces.plan import Plan, estimate

L = 5
COPY, SIM = Reader("copy", 2), Reader("sim", 2)


@pytest.fixture(scope="module")
def model():
    return make_model("llama", vocab_size=257, max_position_embeddings=512)


@pytest.fixture(scope="module")
def lm(model, tokenizer):
    return lm_of(model, tokenizer, batch_size=4, max_length=400)


def slow_states(model, reader, tokens, decision, k):
    """[len(tokens) - decision, h]: what norm and head read from the decision on, after block k, one row at a time."""
    blocks = list(model.model.layers)
    states = states_after_blocks(model, blocks, tokens)[k - 1]
    if reader.maps is not None:
        bias, weight = (torch.from_numpy(reader.maps.arrays[name][k - 1]) for name in ("bias", "weight"))
        return (states + states @ weight.T + bias)[decision:]
    if not reader.runs_tokens:
        return states[decision:]
    start = max(0, decision + 1 - reader.window)
    some = sorted({0, *range(start, len(tokens))}) if reader.kind == "sim" else list(range(len(tokens)))
    handles = []

    def put_back(module, args, kwargs):
        hidden = (args[0] if args else kwargs["hidden_states"]).clone()
        if module is blocks[k]:
            hidden[0] = states[some]
        elif reader.kind == "copy":
            hidden[0, :start] = states[:start]
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    found = []
    for block in blocks[k:]:
        handles.append(block.register_forward_pre_hook(put_back, with_kwargs=True))
    handles.append(blocks[-1].register_forward_hook(lambda m, a, out: found.append(out[0] if out.dim() == 3 else out)))
    with torch.no_grad():
        ids = torch.tensor([tokens])[:, some]  # without a mask, gaps in positions would be borders of packed texts
        model(input_ids=ids, position_ids=torch.tensor([some]), attention_mask=torch.ones_like(ids), use_cache=False)
    for handle in handles:
        handle.remove()
    return found[0][decision - len(tokens) :]


# ------------------------------------------------------------------------------------------------ what is in it


LETTERS = {"doc_to_choice": lambda doc: list("uvwxyz"[: len(doc["choices"])]), "target_delimiter": ""}


@pytest.mark.parametrize("kind", [*KINDS, "a token each"])
def test_what_every_reader_says_is_the_slow_recomputation(kind, lm, model, tmp_path):
    readers = [lens(lm.anatomy), COPY, SIM]
    task = make_task(**KINDS.get(kind, LETTERS))
    plan = Plan.of(lm.anatomy, readers, [2, 4], hidden=True)
    _, meta, arrays = traced(lm, task, tmp_path, split="test", plan=plan)
    early = {readers[0].name: [1, 2, 3, 4], "copy:2": [2, 4], "sim:2": [2, 4]}
    assert meta["readers"] == {"head": [1, 2, 3, 4, 5], **early}
    of_choices = ["choice_gap", "choice_top_prob", "choice_entropy"]
    assert meta["reader_features"] == ["gap", "top_prob", "entropy", *of_choices]
    at = arrays["features"].shape[2] - 3
    assert np.isnan(arrays["features"][:, :, at:]).any() == (kind != "a token each")
    prompts = {(r.doc_id, r.args[0]): r for r in task.instances if r.args[0]}
    assert len(prompts) == len(arrays["doc_id"])
    for n, (doc, text) in enumerate(prompts):
        pairs = [lm._encode_pair(*r.args) for r in task.instances if r.doc_id == doc and r.args[0] == text]
        context = pairs[0][0]
        states = states_after_blocks(model, model.model.layers, context)
        np.testing.assert_allclose(arrays["hidden"][n], [s[-1].numpy() for s in states], rtol=2e-3, atol=2e-3)
        for reader in readers:
            for b, k in enumerate(meta["readers"][reader.name]):
                said = {name: arrays[f"{reader.name}/{name}"][n, b] for name in views.PER_READER}
                for c, (_, continuation) in enumerate(pairs):
                    tokens = (context + continuation)[:-1]
                    with torch.no_grad():
                        read = slow_states(model, reader, tokens, len(context) - 1, k)
                        logprobs = model.lm_head(model.model.norm(read)).log_softmax(-1)
                    total = sum(logprobs[j, token].item() for j, token in enumerate(continuation))
                    assert said["scores"][c] == pytest.approx(total, rel=1e-5, abs=1e-4)
                    assert said["greedy"][c] == (logprobs.argmax(-1).tolist() == continuation)
                    top = logprobs[0].exp().topk(2).values
                    assert said["top_token"] == logprobs[0].argmax()
                    assert said["features"][:2] == pytest.approx([(top[0] - top[1]).item(), top[0].item()], abs=2e-5)
                expected = [np.nan] * 3
                tokens = [continuation[0] for _, continuation in pairs if len(continuation) == 1]
                if 2 <= len(tokens) == len(pairs) == len(set(tokens)):
                    p = logprobs[0, tokens].softmax(-1)
                    best = p.topk(2).values
                    expected = [(best[0] - best[1]).item(), best[0].item(), -(p * p.log()).sum().item() / np.log(len(p))]
                assert said["features"][3:] == pytest.approx(expected, abs=2e-5, nan_ok=True)


def test_a_trace_of_generated_text_holds_head_and_tuned(lm, model, tmp_path):
    reader = lens(lm.anatomy)
    texts = {
        "output_type": "generate_until", "doc_to_choice": None, "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": 3},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    plan = Plan.of(lm.anatomy, [reader], hidden=True)
    task = make_task(**texts)
    _, _, arrays = traced(lm, task, tmp_path, split="test", plan=plan)
    starts = np.flatnonzero(arrays["position"] == 0)
    for n, instance in zip(starts, task.instances, strict=True):
        tokens = lm.tok_encode(instance.args[0])
        for k in range(1, L):
            with torch.no_grad():
                logits = model.lm_head(model.model.norm(slow_states(model, reader, tokens, len(tokens) - 1, k)))[0]
            assert arrays[f"{reader.name}/top_token"][n, k - 1] == logits.argmax()
        states = states_after_blocks(model, model.model.layers, tokens)
        np.testing.assert_allclose(arrays["hidden"][n], [s[-1].numpy() for s in states], rtol=2e-3, atol=2e-3)
    for other in (COPY, SIM):
        plan = Plan.of(lm.anatomy, [other])
        good, bad = make_task(name="good"), make_task(name="bad", **texts)
        refused(
            lambda plan=plan, tasks={"good": good, "bad": bad}: recording.trace(lm, tasks, tmp_path / "no", plan=plan),
            "readers", other.name, "bad", "generate_until",
        )  # fmt: skip
    assert not (tmp_path / "no").exists()


def test_other_readers_blocks_or_states_are_other_settings(lm, tmp_path):
    def trace(readers, at=None, hidden=False):
        return traced(lm, make_task(), tmp_path, limit=2, plan=Plan.of(lm.anatomy, readers, at, hidden))

    path, _, _ = trace("copy:2", "2+4")
    before = path.read_bytes()
    assert trace("head,copy:2", [4, 2])[0].read_bytes() == before
    for readers, at, hidden in ((None, None, False), ("copy:2", "2+3", False), ("sim:2", "2+4", False),
                                ("copy:2", "2+4", True)):  # fmt: skip
        refused(lambda o=(readers, at, hidden): trace(*o), "output", path.name, "hidden" if hidden else "readers")


def test_a_file_of_version_2_is_that_of_the_head(lm, tmp_path):
    path, meta, arrays = traced(lm, make_task(), tmp_path)
    old = {key: value for key, value in meta.items() if key not in ("readers", "hidden")}
    container.write(path, "trace", 2, old, arrays)
    again, found, same = traced(lm, make_task(), tmp_path)
    assert again == path and found == old and container.read(path, "trace", 2, "traces")[0] == old
    np.testing.assert_array_equal(arrays["features"], same["features"])
    (trace,) = replay.load([path])
    every = [1, 2, 3, 4, 5]
    assert (trace.reader, trace.blocks, views.readers_of(trace.meta)) == ("head", every, {"head": every})
    assert replay.replay([trace], ["gap:0.2"], reader="head") == replay.replay([trace], ["gap:0.2"])
    refused(lambda: trace.under("copy:1"), "reader", path.name, "copy:1", "--readers copy:1")


def test_plans_that_make_no_sense_are_one_sentence(lm, tmp_path):
    other = make_model("llama", vocab_size=257, num_hidden_layers=3)
    foreign = lens(lm_of(other, lm.tokenizer).anatomy)
    for readers, at, *words in (
        ("copy:2,copy:2", None, "readers", "twice"),
        ("copy", "6", "at", "6", "1 to 4"),
        ("copy", "5", "at", "1 to 4"),
        ("copy", "two", "at", "two"),
        ("copy", [], "at"),
        ("head", "2", "at", "copy and sim"),
        ("coppy", None, "reader", "copy"),
        ([foreign], None, "reader", "3 blocks"),
    ):  # fmt: skip
        refused(lambda r=readers, at=at: Plan.of(lm.anatomy, r, at), *words)
    assert Plan.of(lm.anatomy, "head,copy").names == {"head": [1, 2, 3, 4, 5], "copy:1": [3, 4]}


@given(st.integers(1, 200))
def test_blocks_are_asked_late_and_at_most_four_times(n_blocks):
    blocks = default_blocks(n_blocks)
    assert len(blocks) <= 4 and list(blocks) == sorted(set(blocks)) and bool(blocks) == (n_blocks > 1)
    assert all(0.6 * n_blocks - 0.5 <= k < n_blocks for k in blocks)
    assert n_blocks != 30 or blocks == (20, 22, 26, 28)


def test_the_estimate_is_the_files_size_and_what_is_counted(lm, tmp_path, caplog):
    caplog.set_level("INFO")
    task = make_task({"train": documents(3, 2), "test": documents(20, 7)})
    for readers in (None, "copy:2", [lens(lm.anatomy), SIM]):
        plan = Plan.of(lm.anatomy, readers, hidden=readers is None)
        path, _, arrays = traced(lm, task, tmp_path / f"{readers}"[:6], split="test", plan=plan)
        found = estimate(lm, plan.ready(lm), task.instances)
        assert found.size == sum(array.nbytes for array in arrays.values())
        assert f"{found.work:.2f} times the work" in caplog.text and path.name in caplog.text
    # by hand, for prompts of one length: dense blocks, a head row after each, and what two tokens run through after 3, 4
    docs = [{"question": f"{i}, which?", "choices": ["a", "b"], "answer": 0} for i in range(4)]
    task = make_task({"train": docs, "test": docs})
    plan = Plan.of(lm.anatomy, "sim:2", "3+4")
    traced(lm, task, tmp_path / "hand", split="test", plan=plan)
    context, continuation = lm._encode_pair(*task.instances[0].args)
    n, c, a = len(context) + len(continuation) - 1, len(continuation), lm.anatomy
    head = 2 * c * a.vocab_size * a.hidden_size

    def blocks(tokens):
        pairs = tokens * (tokens + 1) / 2
        return [2 * w * tokens + 4 * pairs * d for w, d in zip(a.block_weights, a.attention_width, strict=True)]

    dense, later = sum(blocks(n)) + head, blocks(3 + c - 1)
    extra = 4 * head + (head + later[3] + later[4]) + (head + later[4])
    assert estimate(lm, plan.ready(lm), task.instances).work == pytest.approx((dense + extra) / dense)


# ------------------------------------------------------------------------------------------------ seen under one


def readers_of_a_file(path, blocks=(2, 3), n=60, seed=0, n_blocks=4, **meta):
    """A random trace that holds what ``copy:1`` says after some blocks besides the head; copy:1's gaps are greater."""
    write_random(path, n=n, seed=seed, **meta)
    meta, arrays = recording.read(path)
    rng, at = np.random.default_rng(seed + 1), [k - 1 for k in blocks]
    final = arrays["top_token"][:, -1:]
    arrays |= {
        "copy:1/features": (0.5 + arrays["features"][:, at] / 2).astype(np.float32),
        "copy:1/top_token": np.where(rng.uniform(size=(n, len(at))) < 0.8, final, 50).astype(np.int32),
        "copy:1/scores": rng.uniform(-2, 0, (n, len(at), 1)).astype(np.float32),
    }
    readers = {"head": list(range(1, n_blocks + 1)), "copy:1": list(blocks)}
    container.write(path, "trace", 3, {**meta, "readers": readers, "reader_features": ["gap", "top_prob"]}, arrays)
    return path


@given(data=st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_view_holds_what_was_recorded_and_nothing_else(data, tmp_path):
    blocks = sorted(data.draw(st.sets(st.integers(1, 3), min_size=1)))
    path = readers_of_a_file(tmp_path / "a.trace", blocks, n=7, seed=data.draw(st.integers(0, 99)))
    meta, arrays = recording.read(path)
    view, found = views.under(path, meta, arrays, "copy:1")
    assert (views.reader_of(view), views.recorded_blocks(view)) == ("copy:1", [*blocks, 4])
    assert not any("/" in name for name in found)
    for name, nothing in (("features", np.nan), ("top_token", -1), ("scores", np.nan)):
        for k in range(1, 5):
            expected = np.full_like(arrays[name][:, k - 1], nothing)
            if k == 4:
                expected = arrays[name][:, 3]
            elif k in blocks:
                expected = arrays[f"copy:1/{name}"][:, blocks.index(k)]
            np.testing.assert_array_equal(found[name][:, k - 1], expected)
    (head,) = traced_documents.read([path])
    trace = head.under("copy:1")
    again = trace.under("copy:1")
    assert again is trace and head.under("head") is head
    # the oracles know the recorded blocks alone
    for doc, (said, stable) in enumerate(zip(trace.answers, trace.stable, strict=True)):
        for k in range(1, 5):
            later = [said[j - 1] for j in [*blocks, 4] if j >= k]
            assert stable[k - 1] == (k in [*blocks, 4] and set(later) == {said[3]})
            assert (trace.oracle("oracle:first")[doc, k - 1] > 0) == (k in [*blocks, 4] and said[k - 1] == said[3])
            assert np.isnan(trace.top1[doc, k - 1]) or k in [*blocks, 4]


def test_cosines_are_the_same_under_every_reader(lm, tmp_path):
    path, meta, arrays = traced(lm, make_task(), tmp_path, plan=Plan.of(lm.anatomy, [COPY], "2+3"))
    _, found = views.under(path, meta, arrays, "copy:2")
    for n, name in enumerate(meta["features"]):
        alike = np.array_equal(arrays["features"][:, :, n], found["features"][:, :, n])
        assert alike == name.startswith("cos_")


def test_a_stopper_is_asked_where_its_reader_was_recorded(tmp_path):
    path = readers_of_a_file(tmp_path / "a.trace")
    (head,) = replay.load([path])
    trace = head.under("copy:1")
    gaps = trace.arrays["features"][:, :, 0]
    found = replay.document_margins(GapStopper(0.8), trace)
    np.testing.assert_array_equal(np.isnan(found), [[True, False, False, True]] * len(found))
    np.testing.assert_allclose(found[:, 1:3], gaps[:, 1:3] - np.float32(0.8), atol=1e-7)
    for wanted in ("all", "1", "every:1", "1+2"):
        refused(lambda w=wanted: replay.document_margins(GapStopper(0.8), trace, check_layers=w),
                "check_layers", "block 1", "copy:1", "2, 3, 4", "--at 1+2+3")  # fmt: skip
    for oracle in replay.ORACLES:
        refused(lambda o=oracle: replay.document_margins(o, trace, check_layers="1"), "block 1")
    refused(lambda: replay.document_margins(FixedStopper(1), trace), "block 1", "copy:1")
    assert (replay.document_margins(FixedStopper(3), trace)[:, 2] > 0).all()
    # a file under copy names its blocks, which a run asks
    stopper = GapStopper(0.8)
    stopper.reader, stopper.info = Reader("copy", 1), {"check_layers": [3]}
    asked = ~np.isnan(replay.document_margins(stopper, trace))
    assert asked.any(axis=0).tolist() == [False, False, True, False]


def test_strategies_are_replayed_under_their_own_readers_side_by_side(tmp_path, capsys):
    path = readers_of_a_file(tmp_path / "a.trace")
    stopper = fit.fit("svm", [path], reader=Reader("copy", 1))
    files.save(stopper, tmp_path / "copy.stopper")
    (trace,) = replay.load([path])
    rows = replay.replay([trace], ["gap:0.7", str(tmp_path / "copy.stopper"), "oracle:stable"])
    assert [row["reader"] for row in rows] == ["head", "copy:1", "head"]
    alone = replay.replay([trace.under("copy:1")], [stopper])
    assert {**alone[0], "stopper": "", "reader": ""} == {**rows[1], "stopper": "", "reader": ""}
    rows = replay.replay([trace], ["gap:0.7", "oracle:stable"], reader="copy:1")
    assert {row["reader"] for row in rows} == {"copy:1"}
    assert all("reader" not in row for row in replay.replay([trace], ["gap:0.7"]))
    refused(lambda: replay.replay([trace], [str(tmp_path / "copy.stopper")], reader="head"), "reader", "copy:1")
    refused(lambda: replay.replay([trace], ["gap:0.7"], reader="sim:3"), "reader", "sim:3", "head, copy:1")
    assert main.main(["replay", str(path), "-s", "gap:0.7", "--reader", "copy:1"]) == 0
    assert "copy:1" in capsys.readouterr().out


def test_nan_counts_where_a_reader_was_recorded(tmp_path):
    path = readers_of_a_file(tmp_path / "a.trace")
    meta, arrays = recording.read(path)
    for name, words in (("features", "NaN or infinite features"), ("scores", "NaN scores")):
        odd = {**arrays, f"copy:1/{name}": arrays[f"copy:1/{name}"].copy()}
        odd[f"copy:1/{name}"][1, 0, 0] = np.nan
        container.write(path, "trace", 3, meta, odd)
        (trace,) = replay.load([path])  # the head's are fine
        refused(lambda t=trace: replay.replay([t], ["gap"], reader="copy:1"), "traces", "a.trace", words)
        if name == "features":
            refused(lambda: fit.fit("svm", [path], reader=Reader("copy", 1)), "traces", "a.trace", words)


def test_traces_that_were_recorded_after_unlike_blocks_are_not_pooled(tmp_path):
    a = readers_of_a_file(tmp_path / "a.trace", (2, 3), task="a")
    b = readers_of_a_file(tmp_path / "b.trace", (1, 3), task="b")
    reader = Reader("copy", 1)
    for read in (
        lambda: fit.fit("svm", [a, b], reader=reader),
        lambda: calibration.calibrate([a, b], GapStopper(0.8), loss="agreement", reader=reader),
        lambda: check_layers.choose([a, b], GapStopper(0.8), reader=reader),
        lambda: replay.replay(replay.load([a, b]), ["gap"], reader="copy:1"),
    ):
        refused(read, "traces", "b.trace", "1, 3", "2, 3")
    assert len(replay.replay(replay.load([a, b]), ["gap"])) == 3


# ------------------------------------------------------------------------------------------------ fitted under one


def test_examples_under_a_reader_are_of_its_blocks(tmp_path):
    path = readers_of_a_file(tmp_path / "a.trace")
    _, arrays = recording.read(path)
    found = fit.collect([path], ["top_prob", "gap"], "final", Reader("copy", 1))
    assert found.blocks == [2, 3]  # block L, after which nobody asks, would be a third of so few
    x = arrays["copy:1/features"][:, :, [1, 0]].reshape(-1, 2)
    np.testing.assert_array_equal(found.x, x.astype(np.float64))
    y = arrays["copy:1/top_token"] == arrays["top_token"][:, -1:]
    np.testing.assert_array_equal(found.y, y.reshape(-1).astype(int))
    stable = fit.collect([path], ["gap"], "stable", Reader("copy", 1)).y.reshape(-1, 2)
    (trace,) = traced_documents.read([path], "copy:1")
    np.testing.assert_array_equal(stable, trace.stable[:, 1:3])
    assert fit.collect([path], ["gap"], "final").blocks == [1, 2, 3, 4]


@pytest.mark.parametrize("kind", ["svm", "crf", "logistic"])
def test_a_stopper_file_names_its_reader_and_where_asking_is_dear_its_blocks(kind, tmp_path):
    path = readers_of_a_file(tmp_path / "a.trace", n=200)
    if kind == "crf":
        pytest.importorskip("pycrfsuite")
    stopper = fit.fit(kind, [path], reader=Reader("copy", 1))
    files.save(stopper, tmp_path / "s.stopper")
    again = files.load(tmp_path / "s.stopper")
    assert (again.reader.name, again.info["check_layers"]) == ("copy:1", [2, 3])
    plain = fit.fit(kind, [path])
    assert plain.reader.same(HEAD) and "check_layers" not in plain.info


def test_a_tuned_readers_maps_go_into_the_stopper_file(lm, tmp_path, capsys):
    reader = lens(lm.anatomy)
    reader_files.save(reader.maps, tmp_path / "a.reader")
    path, _, _ = traced(lm, make_task(), tmp_path, split="test", plan=Plan.of(lm.anatomy, f"tuned:{tmp_path}/a.reader"))
    out = tmp_path / "s.stopper"
    assert main.main(["fit", "svm", str(path), "--reader", f"tuned:{tmp_path}/a.reader", "-o", str(out)]) == 0
    again = files.load(out)
    assert again.reader.name == reader.name and "check_layers" not in again.info
    np.testing.assert_array_equal(again.reader.maps.arrays["weight"], reader.maps.arrays["weight"])
    reader_files.save(lens(lm.anatomy, seed=1).maps, tmp_path / "b.reader")
    capsys.readouterr()
    assert main.main(["fit", "svm", str(path), "--reader", f"tuned:{tmp_path}/b.reader", "-o", str(out)]) == 2
    assert main.main(["replay", str(path), "-s", str(out), "--reader", "head"]) == 2
    one, two = capsys.readouterr().err.splitlines()
    assert "does not hold" in one and reader.name in two


def test_a_promise_is_made_under_a_reader(tmp_path, capsys):
    path = readers_of_a_file(tmp_path / "a.trace", n=400)
    out = tmp_path / "s.stopper"
    arguments = ["calibrate", str(path), "-s", "gap:0.8", "--loss", "agreement", "--max-drop", "0.5", "-o", str(out)]
    assert main.main([*arguments, "--reader", "copy:1"]) == 0
    again = files.load(out)
    assert (again.reader.name, again.info["check_layers"]) == ("copy:1", [2, 3])
    assert (again.info["promise"]["reader"], again.info["promise"]["check_layers"]) == ("copy:1", "2+3")
    # its losses are those of a replay under that reader
    (row,) = replay.replay(replay.load([path]), [str(out)])
    assert row["reader"] == "copy:1"
    assert round((1 - row["agreement"]) * 400) == again.info["promise"]["losses"] > 0
    assert main.main(arguments) == 0
    plain = files.load(out)
    assert plain.reader.same(HEAD) and plain.info["promise"]["check_layers"] == "all"
    capsys.readouterr()
    files.save(again, out)
    assert main.main(["calibrate", str(path), "-s", str(out), "--reader", "head", "-o", str(out)]) == 2
    assert "copy:1" in capsys.readouterr().err


@pytest.mark.parametrize("reader", [Reader("copy", 1), Reader("copy", 3), Reader("sim", 1)], ids=lambda r: r.name)
def test_asking_costs_what_a_reader_runs(reader, tmp_path):
    path = readers_of_a_file(tmp_path / "a.trace", n=30)
    meta, arrays = recording.read(path)
    arrays = {name.replace("copy:1", reader.name): array for name, array in arrays.items()}
    meta["readers"][reader.name] = meta["readers"].pop("copy:1") if reader.name != "copy:1" else [2, 3]
    meta |= {"block_weights": [100, 110, 120, 130], "stored_weights": [10, 11, 12, 13]}
    container.write(path, "trace", 3, meta, arrays)
    shares, everywhere, chosen = check_layers.choose([path], GapStopper(0.8), reader=reader)
    head, run = 8 * 50, min(9, reader.window + (reader.kind == "sim"))

    def cost(blocks):
        total = 0.0
        for gaps in arrays[f"{reader.name}/features"][:, :, 0]:
            left = next((k for k in blocks if gaps[k - 2] > np.float32(0.8)), 4)
            total += 9 * sum(meta["block_weights"][:left]) + head * (left == 4)
            for k in blocks:
                if k <= left:
                    total += head + run * sum(meta["block_weights"][k:])
                    total += (9 - run) * sum(meta["stored_weights"][k:]) * (reader.kind == "copy")
        return total / (30 * (9 * sum(meta["block_weights"]) + head))

    assert everywhere.blocks == (2, 3) and everywhere.cost == pytest.approx(cost([2, 3]))
    assert chosen.cost == pytest.approx(cost(chosen.blocks))
    assert chosen.cost == pytest.approx(min(cost([]), cost([2]), cost([3]), cost([2, 3]))) or len(chosen.blocks) == 1
    assert sum(shares) == pytest.approx(1) and shares[0] == 0


def test_layers_writes_a_stopper_that_asks_where_it_pays(tmp_path, capsys):
    path = readers_of_a_file(tmp_path / "a.trace", n=300, block_weights=[10**6] * 4, stored_weights=[10**4] * 4)
    out = tmp_path / "s.stopper"
    assert main.main(["layers", str(path), "-s", "gap:0.8", "--reader", "copy:1", "-n", "1", "-o", str(out)]) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    again = files.load(out)
    assert again.reader.name == "copy:1" and said == f"check_layers={again.info['check_layers'][0]}"


def test_documents_that_were_fitted_on_are_found_whatever_the_split_was_called():
    seen = {"t/train": [1, 2, 3], "t/test": [7], "u/train": [9]}
    found = {split: splits.overlap(seen, "t", split, [3, 4, 7, 9]) for split in splits.SPLITS}
    assert found == {"train": 1, "calibrate": 1, "test": 1}  # train was once all training documents


# ------------------------------------------------------------------------------------------------ pictures


def test_readers_are_drawn_side_by_side_in_the_same_colours(tmp_path):
    readers_of_a_file(tmp_path / "a.trace", task="x_a", output_type="loglikelihood")
    write_random(tmp_path / "b.trace", task="x_b", n=20)
    traces = per_block.load(str(tmp_path))
    assert per_block.readers(traces) == ["head", "copy:1"]
    rows = per_block.accuracy_rows(traces)
    assert [(r["task"], r["reader"], r["block"]) for r in rows] == [
        *(("x_a", "head", k) for k in (1, 2, 3, 4)), *(("x_a", "copy:1", k) for k in (2, 3, 4)),
        *(("x_b", "head", k) for k in (1, 2, 3, 4)),
    ]  # fmt: skip
    panels = per_block.accuracy_panels(traces, 12)
    assert {name: [(line.label, line.colour) for line in lines] for name, lines in panels.items()} == {
        "a, 0 shots": [("head", 0), ("copy:1", 1)], "b, 0 shots": [("head", 0)],
    }  # fmt: skip
    (line,) = [line for line in panels["a, 0 shots"] if line.label == "copy:1"]
    mine = [r["top1_acc"] for r in rows if r.get("reader") == "copy:1"]
    np.testing.assert_allclose(line.values, [np.nan, *(100 * x for x in mine)])
    (means,) = per_block.accuracy_panels(traces, 1).values()
    both = [lines[0].values for lines in panels.values()]
    np.testing.assert_allclose(means[0].values, np.mean(both, axis=0))
    np.testing.assert_allclose(means[1].values, line.values)
    pytest.importorskip("matplotlib")
    picture = figures.files(figures.accuracy(panels), "a")
    assert b"copy:1" in picture["a.svg"]
