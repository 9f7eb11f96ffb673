"""What happens when something goes wrong: killed processes, full disks, NaN, odd requests, damaged files.

Each fault is told in one sentence, and what was finished is neither lost nor changed (docs/faults.md).
"""

from __future__ import annotations

import errno
import io
import json
import logging
import math
import os
import random
import resource
import shutil
import signal
import sqlite3
import sys
import tempfile
from collections import Counter
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import killed
from helpers.caches import stored
from helpers.models import lm_of, make_model
from helpers.processes import in_two_processes
from helpers.tasks import instance, make_task
from helpers.traces import lens
from helpers.traces import write_labelled as write_trace
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lm_eval.api.model import CachingLM
from lm_eval.models.huggingface import HFLM

from lm_eval_adainfer import container
from lm_eval_adainfer.cli import main
from lm_eval_adainfer.errors import AdaInferError, report_errors_in_one_sentence
from lm_eval_adainfer.fitting import fit
from lm_eval_adainfer.output import per_block
from lm_eval_adainfer.strategies.crf import CRFStopper
from lm_eval_adainfer.strategies.network import LogisticStopper
from lm_eval_adainfer.strategies.trees import BoostedStopper
from lm_eval_adainfer.traces import documents, recording, replay
from lm_eval_adainfer.traces.file import SHAPES, not_finite
from lm_eval_adainfer.traces.plan import Plan
from lm_eval_adainfer.traces.views import PER_READER, readers_of


def same(found, expected):
    """Equal but for float noise (other batches); block numbers exactly."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            if str(key).startswith("exit_layer"):
                assert found[key] == expected[key], key
            else:
                same(found[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            same(a, b)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-4, nan_ok=True)
    else:
        assert found == expected


# ------------------------------------------------------------------------------------------------ killed evaluations


@pytest.fixture(scope="module")
def whole():
    return killed.evaluate(None)


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """Of an uninterrupted run with a cache: how many SQL steps it had made before each of its forwards."""
    seen, before = Counter(), []
    def count(what):
        if what == "forward":
            before.append(seen["sql"])
        seen.update([what])

    killed.evaluate(str(tmp_path_factory.mktemp("steps") / "c.db"), count)
    return before


def kept(cache):
    """How many answers a cache holds (whatever was being written is rolled back when it is opened)."""
    return len(stored(cache).keys() - {"adainfer_fingerprint"})


def killed_and_finished(cache, moments, whole):
    """Kill a run again and again, then let it end: the results are those of a run that nobody killed."""
    before = 0
    for what, number in moments:
        if killed.child(killed.run_evaluation, cache, what, number) == 0:
            break  # it had less to do than that
        assert kept(cache) >= before
        before = kept(cache)
    results, samples, tokens = killed.evaluate(cache)
    same(samples, whole[1])
    same(results, whole[0])
    assert (tokens < whole[2]) == (before > 0)
    return before


def test_a_run_that_is_killed_between_batches_loses_nothing_that_was_finished(tmp_path, whole, steps):
    rng = random.Random(1)
    moments = [("forward", rng.randint(2, len(steps) // 3)) for _ in range(3)]
    assert killed_and_finished(str(tmp_path / "c.db"), moments, whole) > 20


def test_a_documents_answers_are_written_all_or_none(tmp_path):
    """What lies on the disk after every step of SQLite's is what a kill at that moment leaves behind."""
    lm, cache, left = killed.make_lm(), tmp_path / "c.db", []
    def snapshot():
        folder = tmp_path / str(len(left))
        folder.mkdir()
        for file in tmp_path.glob("c.db*"):
            shutil.copy(file, folder)
        left.append(folder / "c.db")

    with killed.every_sql_step(snapshot):
        model = CachingLM(lm, str(cache))
    model.dbdict.commit()
    start = len(left)
    asked = [instance(f"{'the fox ' * n}?", " x", 0, idx=n) for n in range(1, 9)]
    lm.loglikelihood(asked, True)
    model.dbdict.close()
    assert {kept(file) for file in left[start:]} == {0, 8} and kept(cache) == 8
    assert len(left) - start > 50


def test_rolling_texts_are_kept_one_by_one(tmp_path):
    """Also those of several windows: a text's windows are not put off until all others have had their first."""
    lm = killed.make_lm()
    model = CachingLM(lm, str(tmp_path / "c.db"))
    asked = [instance(f"{n} " * 300, None, n, kind="loglikelihood_rolling") for n in range(9)]  # two windows each
    batches, run = [], lm.engine.run_tokens

    def stops(rows):
        if len(batches) == 3:
            raise KeyboardInterrupt
        batches.append(len(rows))
        return run(rows)

    lm.engine.run_tokens = stops
    with pytest.raises(KeyboardInterrupt):
        model.loglikelihood_rolling(asked)
    model.dbdict.close()
    assert kept(tmp_path / "c.db") == sum(batches) // 2 == 6


def test_a_run_that_is_killed_while_the_cache_is_written_keeps_whole_documents(tmp_path, whole, steps):
    rng = random.Random(2)
    # the first steps look answers up; how many they are differs between releases of Python
    moments = [("sql", rng.randint(steps[len(steps) // 4], steps[len(steps) // 2])) for _ in range(3)]
    assert killed_and_finished(str(tmp_path / "c.db"), moments, whole) > 5


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_a_run_that_is_killed_at_any_moment_loses_nothing(seed, tmp_path, whole):
    """Moments are drawn, not counted: a kill lands wherever the process happens to be."""
    rng, cache = random.Random(seed), str(tmp_path / "c.db")
    for _ in range(8):
        killed.child(killed.evaluate, cache, kill_after=rng.uniform(0.5, 2.5))
    results, samples, _ = killed.evaluate(cache)
    same(samples, whole[1])
    same(results, whole[0])


# ------------------------------------------------------------------------------------------------ killed traces


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    """The files of an uninterrupted trace, and how often each kind of moment came."""
    seen: Counter = Counter()
    files = killed.trace(str(tmp_path_factory.mktemp("whole")), lambda what: seen.update([what]))
    return files, seen


def test_a_killed_trace_goes_on_and_comes_to_the_same_file(tmp_path, traces):
    """Killed between forwards, in the middle of a file, before a rename and before the parts are removed."""
    files, seen = traces
    assert set(seen) == {"forward", "write", "replace", "rmtree"}
    rng, parts = random.Random(3), 0
    for what, number in [
        ("forward", rng.randint(2, seen["forward"] // 4)),
        ("write", 2),
        ("replace", 2),
        ("write", 3),  # the first file's last step
        ("rmtree", 1),
        ("write", 4),  # of the second file
    ]:
        assert killed.child(killed.run_trace, str(tmp_path), what, number) == -9
        for file in tmp_path.glob("*.trace"):
            assert file.read_bytes() == files[file.name], "a file that is there is whole"
        assert len(list(tmp_path.rglob("*.part"))) >= parts or list(tmp_path.glob("*.trace"))
        parts = len(list(tmp_path.rglob("*.part")))
    again: Counter = Counter()
    assert killed.trace(str(tmp_path), lambda what: again.update([what])) == files
    assert 0 < again["forward"] < seen["forward"] // 2, "what was finished is not run again"
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(files), "nothing else is left"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_a_trace_that_is_killed_at_any_moment_comes_to_the_same_file(seed, tmp_path, traces):
    rng = random.Random(seed)
    for _ in range(8):
        killed.child(killed.trace, str(tmp_path), kill_after=rng.uniform(0.3, 1.2))
    assert killed.trace(str(tmp_path)) == traces[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(traces[0])


# ------------------------------------------------------------------------------------------------ processes that die

RANKS = """
import json, sys
sys.path.insert(0, sys.argv[1])
from helpers import killed
found = killed.evaluate_topics(sys.argv[2], dies=sys.argv[3] == "killed")
if found is not None:
    print("FOUND" + json.dumps(found))
"""


def test_a_rank_that_dies_ends_the_run_and_the_rerun_reuses_what_both_had_finished(tmp_path):
    here = Path(__file__).parent
    (tmp_path / "run.py").write_text(RANKS)

    def launch(cache, how):
        path = os.pathsep.join([str(here), str(here.parent)])
        return in_two_processes(
            tmp_path / "run.py", here, tmp_path / cache, how, HF_HUB_OFFLINE="1", PYTHONPATH=path
        )

    def found(done):
        assert done.returncode == 0, done.stderr[-2000:]
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("FOUND")]
        return json.loads(line.removeprefix("FOUND"))

    assert launch("c", "killed").returncode != 0
    assert 0 < kept(tmp_path / "c_rank1.db") < 20 * 4
    assert kept(tmp_path / "c_rank0.db") > 0
    found_samples, tokens = found(launch("c", "whole"))
    alone = killed.evaluate_topics(None)
    assert found_samples == alone[0] and len(found_samples) == 40
    assert 0 < tokens < alone[1]


# ------------------------------------------------------------------------------------------------ full disks


@contextmanager
def small_disk(size):
    """No file of this process may grow beyond ``size`` bytes, as on a disk that is full.

    What it prints is kept from the files that pytest catches it in: they may be larger already.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def one_sentence(error, *words):
    message = str(error)
    assert "\n" not in message and all(word in message for word in words), message


def test_a_full_disk_keeps_the_good_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "a.stopper"
    container.write(path, "stopper", 1, {}, {"a": np.zeros(9)})
    before = path.read_bytes()
    with small_disk(10_000), pytest.raises(AdaInferError) as caught:
        container.write(path, "stopper", 1, {}, {"a": np.zeros(10_000)})
    one_sentence(caught.value, "output", "a.stopper", "can't be written")
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("where", ["flush", "fsync", "replace"])
def test_a_disk_that_fills_up_at_any_step_is_told_by_its_name(where, tmp_path, monkeypatch):
    path = tmp_path / "table.md"
    path.write_text("good")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if where == "flush":
        opened = tempfile.NamedTemporaryFile

        def opens(*args, **kwargs):
            file = opened(*args, **kwargs)
            file.flush = full
            return file

        monkeypatch.setattr(tempfile, "NamedTemporaryFile", opens)
    else:
        monkeypatch.setattr(os, where, full)
    with pytest.raises(AdaInferError) as caught:
        container.write_atomically(path, b"new")
    one_sentence(caught.value, "output", "table.md", "No space left on device")
    assert path.read_text() == "good" and list(tmp_path.iterdir()) == [path]


def test_a_trace_on_a_full_disk_keeps_its_parts_and_goes_on(tmp_path, traces):
    files, seen = traces
    most = max(len(f.read_bytes()) for f in _parts(tmp_path / "parts"))
    with small_disk(most + 100), pytest.raises(AdaInferError) as caught:  # parts fit, the whole file does not
        killed.trace(str(tmp_path / "t"))
    one_sentence(caught.value, "output", "choices_0shot_test.trace", "can't be written")
    assert not list((tmp_path / "t").glob("*.trace")) and list((tmp_path / "t").rglob("*.part"))
    again: Counter = Counter()
    assert killed.trace(str(tmp_path / "t"), lambda what: again.update([what])) == files
    assert again["forward"] < seen["forward"]


def _parts(folder):
    """The parts of a trace that was stopped before its last step."""
    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        killed.trace(str(folder))
    return list(folder.rglob("*.part"))


def test_a_cache_on_a_full_disk_ends_the_run_and_keeps_whole_documents(tmp_path, whole):
    cache = str(tmp_path / "c.db")
    with small_disk(20_000), pytest.raises(sqlite3.Error):
        killed.evaluate(cache)
    before = kept(cache)
    assert before > 0
    results, samples, tokens = killed.evaluate(cache)
    same(samples, whole[1])
    same(results, whole[0])
    assert tokens < whole[2]


def test_the_lm_eval_command_tells_of_a_full_disk_in_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lm_eval"])
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    monkeypatch.setattr(logging.getLogger("sqlitedict"), "level", logging.WARNING)
    report_errors_in_one_sentence()
    error = sqlite3.OperationalError("database or disk is full")
    sys.excepthook(type(error), error, None)
    (line,) = capsys.readouterr().err.splitlines()
    one_sentence(line, "adainfer: error: use_cache", "disk is full", "goes on")


def run_cli(monkeypatch, capsys, error):
    """Exit status and standard error of an ``adainfer`` command that meets this error."""

    def failing(*_, **__):
        raise error

    monkeypatch.setattr(replay, "replay", failing)
    monkeypatch.setattr(replay, "load", lambda *_: [])
    monkeypatch.setattr(fit, "find", lambda *_: [])
    status = main.main(["replay", "traces", "-s", "gap"])
    return status, capsys.readouterr().err.strip()


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "some/file"), 2, ["some/file", "No space left"]),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"), 2, ["batch_size", "2 GiB"]),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), 2, ["batch_size"]),
        (MemoryError(), 2, ["batch_size", "not enough memory"]),
        (KeyboardInterrupt(), 130, ["interrupted"]),
    ],
)
def test_commands_tell_faults_of_the_machine_in_one_line(error, status, words, monkeypatch, capsys):
    found, said = run_cli(monkeypatch, capsys, error)
    assert found == status
    one_sentence(said, "adainfer: ", *words)


def test_an_error_of_the_program_itself_is_not_hidden(monkeypatch, capsys):
    with pytest.raises(RuntimeError, match="a bug"):
        run_cli(monkeypatch, capsys, RuntimeError("a bug"))


# ------------------------------------------------------------------------------------------------ signals


@pytest.mark.parametrize(("number", "status", "said"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, -15, "")])
def test_a_stopped_command_keeps_what_is_finished_and_shows_no_traceback(number, status, said, tmp_path):
    assert killed.child(killed.stopped_trace_command, str(tmp_path), int(number)) == status
    shown = (tmp_path / "shown").read_text()
    assert "Traceback" not in shown and said in shown
    assert len(list(tmp_path.rglob("*.part"))) == 2


# ------------------------------------------------------------------------------------------------ errors in a forward


@pytest.mark.parametrize("error", [KeyboardInterrupt(), torch.OutOfMemoryError("CUDA out of memory"), ValueError("x")])
@pytest.mark.parametrize("method", ["loglikelihood", "loglikelihood_rolling", "generate_until"])
def test_an_error_in_a_forward_leaves_the_model_as_it_was_and_usable(method, error, tokenizer):
    model = make_model("llama", vocab_size=257, max_position_embeddings=256)
    lm = lm_of(model, tokenizer, stopper="gap:0.3", max_length=200)
    shared = "a long prefix that all documents share, so that it is run once and kept "
    asked = {
        "loglikelihood": [instance(f"{shared}{n}", " x", n) for n in range(8)],
        "loglikelihood_rolling": [instance(f"text {n}", None, n, kind="loglikelihood_rolling") for n in range(8)],
        "generate_until": [
            instance(f"{n} ab", {"until": ["\n"], "max_gen_toks": 4}, n, kind="generate_until") for n in range(8)
        ],
    }[method]
    run = getattr(lm, method)
    expected = [(a, a.exit_record) for a in run(asked, True)]
    ids = torch.arange(12)[None]
    logits = model(input_ids=ids).logits
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    forwards = [m.__dict__.get("forward") for m in model.modules()]

    calls = []

    def fails(*_):
        calls.append(1)
        if len(calls) == 2:
            raise error

    handle = lm.anatomy.blocks[2].register_forward_hook(fails)
    with pytest.raises(type(error)):
        run(asked, True)
    handle.remove()
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert forwards == [m.__dict__.get("forward") for m in model.modules()]
    assert torch.equal(model(input_ids=ids).logits, logits)
    assert [(a, a.exit_record) for a in run(asked, True)] == expected


# ------------------------------------------------------------------------------------------------ NaN


@pytest.fixture
def overflowing(tokenizer):
    """A model whose third block gives infinite numbers wherever the text has a ``q``."""
    model = make_model("llama", vocab_size=257, max_position_embeddings=256)
    q = tokenizer.encode("q", add_special_tokens=False)[0]
    model.get_input_embeddings().weight.data[q, 0] = 1e6

    def overflows(module, args, output):
        return torch.where(output[..., :1] > 1e5, output * torch.inf, output)

    lm = lm_of(model, tokenizer)  # whose probe meets no q
    lm.anatomy.blocks[2].register_forward_hook(overflows)
    return model


STOPPERS = {
    "gap": "gap:0",
    "saturation": "saturation:0",
    "patience": "patience:1",
    "logistic": LogisticStopper({"weight_0": np.array([[0.0, 9.0]]), "bias_0": np.array([9.0])}, ["gap", "agreement"], 0.0),
    "boosted": BoostedStopper(
        {
            "feature": np.zeros((1, 3), dtype=np.int64), "split": np.full((1, 3), 0.5), "left": np.array([[1, 1, 2]]),
            "right": np.array([[2, 1, 2]]), "value": np.array([[0.0, 9.0, 9.0]]), "depth": np.array([1]),
        },
        ["gap"],
        0.0,
    ),
    "crf": CRFStopper({"state": np.zeros((2, 1)), "bias": np.array([0.0, 99.0]), "transition": np.zeros((2, 2))}, ["gap"], 0.1),
}  # fmt: skip


@pytest.mark.parametrize("stopper", STOPPERS)
def test_no_stopper_stops_at_nan_and_others_stop_as_ever(stopper, overflowing, tokenizer, caplog):
    """These stop at the first block that they are asked at; here they are asked from block 3 on."""
    asked = [instance(text, " x", n) for n, text in enumerate(["the fox", "the taq", "a hen"])]
    lm = lm_of(overflowing, tokenizer, stopper=STOPPERS[stopper], check_layers="3+4")
    answers = lm.loglikelihood(asked, True)
    assert [a.exit_record.exit_layer for a in answers] == [3, 5, 3]
    assert [math.isnan(a[0]) for a in answers] == [False, True, False]
    again = lm.loglikelihood(asked, True)
    assert [a.exit_record.exit_layer for a in again] == [3, 5, 3]
    (said,) = [r.getMessage() for r in caplog.records if "NaN" in r.getMessage()]
    one_sentence(said, "dtype", "block 3", "float32")


def test_a_dense_run_with_nan_gives_what_stock_gives(overflowing, tokenizer, caplog):
    choices = [instance(t, c, n, idx=i) for n, t in enumerate(["the fox", "the taq"]) for i, c in enumerate([" x", " yes"])]
    texts = [instance(t, None, n, kind="loglikelihood_rolling") for n, t in enumerate(["the fox", "the taq", "a q"])]
    prompts = [
        instance(t, {"until": ["\n"], "max_gen_toks": 4}, n, kind="generate_until") for n, t in enumerate(["fox", "taq"])
    ]
    stock = HFLM(pretrained=overflowing, tokenizer=tokenizer, batch_size=4, max_length=64)
    for options in ({}, {"stopper": "gap:1"}):
        ours = lm_of(overflowing, tokenizer, **options)
        for a, b in zip(stock.loglikelihood(choices, True), ours.loglikelihood(choices, True), strict=True):
            assert a[0] == pytest.approx(b[0], abs=1e-4, nan_ok=True) and a[1] == b[1]
        found = ours.loglikelihood_rolling(texts, True)
        assert [float(a) for a in found] == pytest.approx(stock.loglikelihood_rolling(texts, True), abs=1e-3, nan_ok=True)
        assert ours.generate_until(prompts, True) == stock.generate_until(prompts, True)
    assert sum("block 3" in r.getMessage() for r in caplog.records) == 2, "once for each model"


def test_generated_text_with_nan_runs_on_and_is_warned_of(overflowing, tokenizer, caplog):
    options = {"until": ["\n"], "max_gen_toks": 4}
    lm = lm_of(overflowing, tokenizer, stopper="patience:1", check_layers="3")
    prompts = [instance(t, options, n, kind="generate_until") for n, t in enumerate(["a fox", "a taq"])]
    fox, taq = lm.generate_until(prompts, True)
    assert set(fox.exit_record.layers) == {3} and set(taq.exit_record.layers) == {5}
    assert sum("block 3 gives NaN" in r.getMessage() for r in caplog.records) == 1
    drawn = {**options, "do_sample": True, "temperature": 1.0}
    with pytest.raises(AdaInferError) as caught:
        lm.generate_until([instance("a taq", drawn, 0, kind="generate_until")], True)
    one_sentence(caught.value, "generation", "NaN", "do_sample=False")


def test_a_trace_with_nan_is_recorded_warned_of_and_refused_by_those_who_read_it(overflowing, tokenizer, tmp_path, caplog):
    lm = lm_of(overflowing, tokenizer, max_length=200)
    docs = [{"question": q, "choices": ["a", "b"], "answer": 0} for q in ("the fox", "the taq")]
    (path,) = recording.trace(lm, {"toy": make_task({"train": docs, "test": docs})}, tmp_path, split="test")
    meta, arrays = recording.read(path)
    odd = not_finite(arrays["features"], meta["features"]).any(axis=2)  # there are no choices of a token each
    assert odd.tolist() == [[False] * 5, [False, False, True, True, True]]
    (said,) = [r.getMessage() for r in caplog.records if "will hold NaN" in r.getMessage()]
    one_sentence(said, "traces", "block 3")
    for read in (lambda: fit.fit_svm([path]), lambda: replay.load([path])):
        with pytest.raises(AdaInferError) as caught:
            read()
        one_sentence(caught.value, "traces", path.name, "NaN")


# ------------------------------------------------------------------------------------------------ odd requests


def ask(text, kind="loglikelihood", continuation=None, **options):
    if kind == "generate_until":
        continuation = {"until": ["\n"], "max_gen_toks": 4, **options}
    return [instance(text, continuation, 0, kind=kind)]


@pytest.mark.parametrize(
    "asked",
    [
        ask("a" * 200, continuation=" b"),
        ask("", continuation="xyz"),
        ask("a", continuation="b"),
        ask("abc", continuation="b" * 64),
        ask("a 😀", continuation="é\x00"),
        [instance("the fox", " x", 0, idx=n) for n in range(5)],  # the same choice again and again
        [instance("the fox", f" {n}", 0, idx=n) for n in range(300)],
        ask("", "loglikelihood_rolling"),
        ask("a", "loglikelihood_rolling"),
        ask("abc", "generate_until", max_gen_toks=63),
        ask("abc" * 100, "generate_until"),
    ],
)
@pytest.mark.parametrize("vocab", [257, 300])
def test_odd_requests_get_what_stock_gives(asked, vocab, tokenizer):
    """Long, short, empty, many, equal; also with more embeddings than the tokenizer has tokens."""
    model = make_model("llama", vocab_size=vocab)
    method = asked[0].request_type
    stock = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, max_length=64)
    expected = getattr(stock, method)(asked, True)
    for options in ({}, {"stopper": "gap:1"}):
        found = getattr(lm_of(model, tokenizer, **options), method)(asked, True)
        if method == "generate_until":
            assert found == expected
        else:
            same([tuple(a) if isinstance(a, tuple) else float(a) for a in found], [a if isinstance(a, tuple) else float(a) for a in expected])


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (ask("abc", continuation=""), ["request", "continuation ''", "at least one token"]),
        (ask("", continuation=""), ["request", "continuation ''", "at least one token"]),
        (ask("  ", continuation="x"), ["request", "context '  '", "at least one token"]),
        (ask("abc", continuation="b" * 65), ["max_length", "65", "64"]),
        (ask("a\ud800", continuation="b"), ["request", "surrogate"]),
        (ask("a\ud800", "loglikelihood_rolling"), ["request", "surrogate"]),
        (ask("a\ud800", "generate_until"), ["request", "surrogate"]),
        (ask("", "generate_until"), ["request", "prompt ''", "at least one"]),
        (ask("abc", "generate_until", max_gen_toks=64), ["max_gen_toks", "64", "1 to 63"]),
        (ask("abc", "generate_until", max_gen_toks=0), ["max_gen_toks", "0", "1 to 63"]),
    ],
)
@pytest.mark.parametrize("stopper", ["none", "gap:0.3"])
def test_requests_that_have_no_answer_are_refused_before_anything_runs(asked, words, stopper, tokenizer):
    good = {"loglikelihood": ask("a fox", continuation=" x"), "generate_until": ask("a fox", "generate_until")}
    lm = lm_of(make_model("llama", vocab_size=257), tokenizer, stopper=stopper)
    method = asked[0].request_type
    before = lm.engine.tokens
    with pytest.raises(AdaInferError) as caught:
        getattr(lm, method)([*good.get(method, []), *asked], True)
    one_sentence(caught.value, *words)
    assert lm.engine.tokens == before and lm.generated_tokens == 0


@pytest.mark.parametrize("kind", ["loglikelihood", "loglikelihood_rolling", "generate_until"])
def test_a_tokenizer_of_another_model_is_refused_by_its_first_unknown_token(kind, tokenizer):
    lm = lm_of(make_model("llama", vocab_size=100), tokenizer)
    asked = ask("a\u00ff", kind, continuation=" x" if kind == "loglikelihood" else None)
    with pytest.raises(AdaInferError) as caught:
        getattr(lm, kind)(asked, True)
    one_sentence(caught.value, "tokenizer", "100 tokens", "belongs to the model")


def test_a_tokenizer_without_special_tokens_needs_a_token_to_begin_with(tokenizer):
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    model = make_model("llama", vocab_size=257)

    def bare():
        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()))

    with pytest.raises(AdaInferError) as caught:
        lm_of(model, bare())
    one_sentence(caught.value, "tokenizer", "BOS", "prefix_token_id")
    lm = lm_of(model, bare(), prefix_token_id=0)
    asked = [*ask("a fox", continuation=" x"), *ask("", continuation=" x")]
    same([tuple(a) for a in lm.loglikelihood(asked, True)],
         [tuple(a) for a in lm_of(model, tokenizer).loglikelihood(asked, True)])  # fmt: skip
    with pytest.raises(AdaInferError) as caught:
        lm.generate_until(ask("a fox", "generate_until"), True)
    one_sentence(caught.value, "tokenizer", "EOS")


# ------------------------------------------------------------------------------------------------ damaged traces


@pytest.fixture(scope="module")
def trace_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    lm = killed.make_lm("none")
    plan = Plan.of(lm.anatomy, [lens(lm.anatomy)], hidden=True)
    (path,) = recording.trace(lm, {"choices": killed.make_tasks()["choices"]}, folder, plan=plan)
    return path


def read_everywhere(path):
    """Whether a file is refused in one sentence by those who read traces; anything else they raise is raised."""
    refused = False
    for read in (
        lambda: recording.read(path),
        lambda: replay.replay(replay.load([path]), ["gap:0.5", "oracle:stable"]),
        lambda: fit.collect([path], ["gap", "agreement"], "stable"),
        lambda: per_block.accuracy_panels(per_block.load(str(path)), 1),
        lambda: [documents.read([path], name)[0].stable for name in readers_of(recording.read(path)[0])],
    ):
        try:
            read()
        except AdaInferError as error:
            one_sentence(error)
            refused = True
    return refused


@given(position=st.integers(0, 10**6), bit=st.integers(0, 7))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_flipped_bit_is_refused_or_harmless(position, bit, trace_file, tmp_path):
    content = bytearray(trace_file.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    content[position % (header if position % 2 else len(content))] ^= 1 << bit
    path = tmp_path / "flipped.trace"
    path.write_bytes(content)
    read_everywhere(path)


def test_a_cut_trace_is_refused(trace_file, tmp_path):
    content, path = trace_file.read_bytes(), tmp_path / "cut.trace"
    for end in (0, 5, 8, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:end])
        assert read_everywhere(path)


ODD_READERS = [
    ("copy:1", [2]),  # of which there is no array
    ("copy:1", []),
    ("copy:1", "2"),
    ("copy:1", [5]),
    ("copy:1", [0]),
    ("copy:1", [3, 2]),
    ("copy:1", [2, 2]),
    ("copy:1", [True]),
    ("copy:1", [10**30]),
    ("copy:0", [2]),
    ("head:1", [2]),
    ("../copy", [2]),
    ("tuned:maps.reader", [2]),
]


@pytest.mark.parametrize(
    "change",
    [
        {"n_blocks": 10**12},
        {"n_blocks": "5"},
        {"n_blocks": 4},
        {"features": ["gap"]},
        {"features": [1, 2, 3, 4, 5, 6]},
        {"features": "gap"},
        {"block_weights": ["x"] * 5},
        {"task": ["choices"]},
        {"num_fewshot": None},
        {"hidden_size": "big"},
        {"readers": None},
        {"readers": {}},
        {"readers": ["head"]},
        {"readers": {"head": [1, 2, 3, 4]}},
        *({"readers": {"head": [1, 2, 3, 4, 5], name: blocks}} for name, blocks in ODD_READERS),
        {"reader_features": None},
        {"reader_features": ["gap"]},
        {"reader_features": ["gap", "top_prob", "top_prob"]},
        {"reader_features": ["gap", "top_prob", "courage"]},
        {"reader_features": [1, 2, 3]},
        {"stored_weights": [1]},
        {"stored_weights": ["x"] * 5},
    ],
)
def test_a_trace_that_says_what_it_does_not_hold_is_refused(change, trace_file, tmp_path):
    meta, arrays = recording.read(trace_file)
    path = tmp_path / "odd.trace"
    container.write(path, "trace", recording.VERSION, {**meta, **change}, arrays)
    assert read_everywhere(path)


@pytest.mark.parametrize("name", [*sorted(SHAPES), *(f"reader/{name}" for name in PER_READER)])
@pytest.mark.parametrize("how", ["cut", "flat", "kind", "empty"])
def test_arrays_of_another_shape_or_kind_are_refused(name, how, trace_file, tmp_path):
    meta, arrays = recording.read(trace_file)
    name = name.replace("reader", list(meta["readers"])[1])
    array = arrays["doc_id"] if name == "cluster" else arrays[name]  # which this trace has no need of
    arrays[name] = {
        "cut": array[:-1],
        "flat": array.reshape(-1, 1, 1, 1),
        "kind": np.nan_to_num(array).astype(np.int32 if array.dtype.kind == "f" else np.float32),
        "empty": np.zeros((2**40, 0), dtype=array.dtype),
    }[how]
    path = tmp_path / "odd.trace"
    container.write(path, "trace", recording.VERSION, meta, arrays)
    assert read_everywhere(path)


def test_a_trace_that_would_fill_the_memory_is_refused(tmp_path):
    n, n_blocks = 1000, 100
    path = write_trace(tmp_path / "bomb.trace", np.zeros((n, n_blocks)), np.zeros(n))
    meta, arrays = recording.read(path)
    arrays |= {
        "request": np.full((n, 1), 32767, dtype=np.int16),
        "scores": np.zeros((n, n_blocks, 1), dtype=np.float32),
        "gold": np.zeros(n, dtype=np.int16),
        "doc_id": np.arange(n),
    }
    container.write(path, "trace", recording.VERSION, meta, arrays)
    with pytest.raises(AdaInferError) as caught:
        replay.load([path])
    one_sentence(caught.value, "traces", "bomb.trace", "32768 requests")
