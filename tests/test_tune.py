"""``adainfer tune``: what it chooses by, its promise, interruptions, nothing to save; and ``stopper=auto``."""

from __future__ import annotations

import json
import logging
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from types import SimpleNamespace

import lm_eval
import numpy as np
import pytest
from helpers.interruptions import InterruptAt
from helpers.refusals import refused
from helpers.tasks import our_tasks
from helpers.traces import write
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import frontier
from lm_eval_adainfer import container, paths
from lm_eval_adainfer.cli import main
from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.fitting.risk import Risk
from lm_eval_adainfer.harness import auto, loading
from lm_eval_adainfer.output import marks, per_block
from lm_eval_adainfer.readers.base import HEAD
from lm_eval_adainfer.readers.specs import parse
from lm_eval_adainfer.statistics import exact_p
from lm_eval_adainfer.strategies.files import load, save
from lm_eval_adainfer.strategies.rules import GapStopper
from lm_eval_adainfer.traces import recording
from lm_eval_adainfer.traces.documents import TracedDocuments, read
from lm_eval_adainfer.tuning import choosing, page, told
from lm_eval_adainfer.tuning.allowance import Allowance, documents_for, tried
from lm_eval_adainfer.tuning.mix import mixed, most_each
from lm_eval_adainfer.tuning.probe import around_the_best
from lm_eval_adainfer.tuning.search import DRAWS, expected, left, search
from lm_eval_adainfer.tuning.settings import Settings
from lm_eval_adainfer.tuning.tune import RESULT, STOPPER, Tuned, Tuning
from lm_eval_adainfer.tuning.work import Work

TASK = "adainfer_demo_fact"
SETTINGS = Settings(max_drop=0.1, documents=40, readers=("copy:1",))


def tune(folder, settings=SETTINGS, on_forward=None):
    """(what ``tune.json`` holds, what it is made of) of the demo model and a task."""
    lm = loading.load_model("pretrained=adainfer-demo,dtype=float32", "cpu", batch_size=16)
    tasks = loading.load_tasks(our_tasks(), [TASK])
    if on_forward is not None:
        lm.anatomy.blocks[0].register_forward_pre_hook(lambda *_: on_forward())
    tuned = Tuning(lm, tasks, folder, settings).run()
    assert json.loads((folder / RESULT).read_text()) == json.loads(json.dumps(tuned.found))
    return tuned.found


@pytest.fixture(scope="module", autouse=True)
def small_parts():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recording, "PART_DOCUMENTS", 16)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished command, what it found, and how many forwards it made."""
    folder, forwards = tmp_path_factory.mktemp("tuned"), []
    return folder, tune(folder, on_forward=lambda: forwards.append(1)), len(forwards)


@pytest.fixture
def again(finished, tmp_path):
    """A copy of a finished folder."""
    return shutil.copytree(finished[0], tmp_path / "again")


def change(folder, split, what):
    """Change the arrays of the traces of a split."""
    for path in (folder / "traces").glob(f"*_{split}.trace"):
        meta, arrays = recording.read(path)
        what(arrays)
        container.write(path, "trace", recording.VERSION, meta, arrays)


def early(arrays, kind):
    """What every reader says after blocks before the last: views of the arrays of a kind."""
    return [a[:, : a.shape[1] - (name == kind)] for name, a in arrays.items() if name.rpartition("/")[2] == kind]


def plant(arrays):
    """Early answers of every reader are right at random."""
    draw = np.random.default_rng(0)
    for said in early(arrays, "greedy"):
        said[:] = draw.integers(0, 2, said.shape)


# ------------------------------------------------------------------------------------------------ what it chooses by


def test_the_choice_sees_no_calibration_and_no_test_document(finished, again):
    before = finished[1]
    assert before["chosen"]["reader"] == "copy:1", "else there is nothing to be seen here"
    change(again, "test", plant)
    after = tune(again)
    assert after["chosen"] == before["chosen"] and after["candidates"] == before["candidates"]
    assert after["test"] != before["test"]
    change(again, "calibrate", plant)
    last = tune(again)
    assert last["contestants"] == before["contestants"]
    names = [[(c["name"], c["check_layers"]) for c in found["candidates"]] for found in (before, last)]
    assert names[0] == names[1] and last["candidates"] != before["candidates"]


def test_the_choice_sees_fitting_documents(finished, again):
    change(again, "train", plant)
    for path in [*again.glob("traces/*_calibrate.trace"), *again.glob("traces/*_test.trace")]:
        path.unlink()  # they are of the readers that were chosen then
    assert tune(again)["contestants"] != finished[1]["contestants"]


def test_the_picture_of_a_folder_has_the_point_that_was_reported(finished, tmp_path):
    folder, found, _ = finished
    frontier.main([str(folder), "-o", str(tmp_path / "new" / "points")])
    drawn, (row,) = json.loads((tmp_path / "new" / "points.json").read_text()), found["test"]["rows"]
    assert drawn["recommended"]["work"] == pytest.approx(1 - found["test"]["saved"])
    assert drawn["recommended"]["acc"] == pytest.approx(row["acc"])
    assert drawn["dense"]["work"] == 1 and drawn["dense"]["acc"] == pytest.approx(row["acc"] - row["acc_change"])
    assert set(drawn["lines"]) == {"head", found["chosen"]["reader"]}
    assert "recommended: copy:1" in (tmp_path / "new" / "points.svg").read_text()


def test_the_file_keeps_what_it_promises(finished):
    folder, found, _ = finished
    stopper, promise = load(folder / STOPPER), found["chosen"]["promise"]
    blocks = found["chosen"]["check_layers"]
    assert stopper.reader.name == found["chosen"]["reader"] and stopper.info["promise"] == promise
    assert stopper.info["tuned"]["check_layers"] == blocks and stopper.info["tuned"]["shots"] == found["shots"]
    for listed, of, split in ((stopper.seen, "*", "train"), (stopper.calibrated, "traces", "calibrate")):
        traced = [view.doc_ids.tolist() for view in read(sorted(folder.glob(f"{of}/*_{split}.trace")))]
        assert listed == {f"{TASK}/{split}": sorted({i for some in traced for i in some})}
    (view,) = read(sorted((folder / "traces").glob("*_calibrate.trace")), stopper.reader.name)
    gap = view.meta["features"].index("gap")
    assert stopper.kind == "gap" and stopper.features == ("gap",), "what follows is a gap rule's"
    lost = won = 0
    for d in range(len(view.doc_ids)):
        stops = [k for k in blocks if view.arrays["features"][d, k - 1, gap] > stopper.threshold]
        at = stops[0] if stops else view.n_blocks
        lost += view.right[d, -1] == 1 and view.right[d, at - 1] == 0
        won += view.right[d, -1] == 0 and view.right[d, at - 1] == 1
    assert (lost, won) == (promise["losses"], promise["wins"]) and len(view.doc_ids) == promise["documents"]
    error = 0.05 / found["calibration"]["error_divided_by"]
    assert exact_p(lost, won, promise["documents"], promise["max_drop"]) <= error


def test_the_splits_share_no_document(finished):
    folder, found, _ = finished
    seen = {}
    for split in ("train", "calibrate", "test"):
        (path,) = (folder / "traces").glob(f"*_{split}.trace")
        seen[split] = set(recording.read(path)[1]["doc_id"].tolist())
    assert not seen["train"] & seen["calibrate"], "both number the training documents"
    assert {len(documents) for documents in seen.values()} == {40}
    assert found["test"]["documents"] == 40


# ------------------------------------------------------------------------------------------------ interruptions


@pytest.mark.parametrize("moment", [0.2, 0.6, 0.95])
def test_an_interrupted_command_goes_on_to_the_same_recommendation(finished, tmp_path, moment):
    interrupt = InterruptAt(round(moment * finished[2]))
    with pytest.raises(KeyboardInterrupt):
        tune(tmp_path, on_forward=interrupt)
    assert not (tmp_path / RESULT).exists()
    tune(tmp_path)
    for name in (RESULT, STOPPER):
        assert (tmp_path / name).read_bytes() == (finished[0] / name).read_bytes()


# the command as ``main.main`` is here: the packaged tasks alone, and small parts
CHILD = """
import sys
from lm_eval.tasks import TaskManager
from lm_eval_adainfer import paths
from lm_eval_adainfer.cli import main
from lm_eval_adainfer.harness import loading
from lm_eval_adainfer.traces import recording
recording.PART_DOCUMENTS = 16
loading.task_manager = lambda *_, **__: TaskManager(include_path=str(paths.task_configs()), include_defaults=False)
sys.exit(main.main(sys.argv[1:]))
"""


def killed_once_there_is(pattern, folder, arguments):
    """Start the command in a process of its own, and kill it as soon as its folder holds such a file."""
    child = subprocess.Popen([sys.executable, "-c", CHILD, *arguments], stderr=subprocess.DEVNULL)
    try:
        while child.poll() is None and not any(folder.glob(pattern)):
            with suppress(subprocess.TimeoutExpired):
                child.wait(0.01)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert child.returncode == -signal.SIGKILL, "it had ended before"


@pytest.mark.slow
def test_a_command_that_was_killed_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    """By SIGKILL, which no process can prepare for: once while it traces, and once while it calibrates."""
    monkeypatch.setattr(loading, "task_manager", lambda *_, **__: our_tasks())
    options = ["-t", TASK, "--max-drop", "0.1", "-n", "40", "--readers", "copy:1", "-b", "16", "--device", "cpu"]
    command = ["tune", "-a", "pretrained=adainfer-demo,dtype=float32", *options, "-o"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main.main([*command, str(whole)]) == 0
    for pattern in ("traces/*_train*", "traces/*_calibrate*"):
        killed_once_there_is(pattern, broken, [*command, str(broken)])
        assert not (broken / RESULT).exists() and not (broken / STOPPER).exists()
    kept = {path: path.stat().st_mtime_ns for path in broken.glob("traces/*.trace")}
    assert main.main([*command, str(broken)]) == 0
    assert kept and all(path.stat().st_mtime_ns == then for path, then in kept.items()), "traced twice"
    for name in (RESULT, STOPPER):
        assert (broken / name).read_bytes() == (whole / name).read_bytes()


def test_a_folder_of_other_settings_is_refused(finished, again):
    error = refused(lambda: tune(again, Settings(max_drop=0.2, documents=40, readers=("copy:1",))))
    assert "max_drop was 0.1" in error and "another folder" in error


def test_a_budget_bounds_the_documents(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    found = tune(tmp_path, Settings(max_drop=0.1, documents=400, readers=(), budget=0.0001))
    assert found["fitting"]["documents"] == 30, "the fewest that are traced"
    assert "budget: it allows about 30 documents" in caplog.text


# ------------------------------------------------------------------------------------------------ nothing to save


def test_too_few_documents_recommend_none_and_say_how_many_would_do(tmp_path):
    found = tune(tmp_path, Settings(max_drop=0.01, documents=30, readers=()))
    assert "chosen" not in found and not (tmp_path / STOPPER).exists()
    assert found["nothing"]["more_documents_would_help"]
    assert "299 calibration documents without a loss, 473 with one" in found["nothing"]["more"]
    options = {"model_args": "pretrained=m", "tasks": TASK, "batch_size": "8"}
    lines = told.lines(found, tmp_path, told.recommended(found, tmp_path, options), None)
    assert lines[-1] == f"lm_eval --model adainfer --model_args pretrained=m,stopper=none --tasks {TASK} --batch_size 8"
    assert any("oracle" in line for line in lines) and len(lines) <= 15


def test_where_no_early_answer_is_right_nothing_is_recommended(again):
    def spoil(arrays):
        for said in early(arrays, "greedy"):
            said[:] = 0
        for said in early(arrays, "features"):
            said[:] = 0.5  # so that no document looks better than another

    change(again, "train", spoil)
    found = tune(again)
    assert "chosen" not in found and not found["nothing"]["more_documents_would_help"]
    assert not (again / STOPPER).exists(), "the file of an earlier recommendation is gone"


def test_what_candidates_save_on_calibration_documents_is_what_leaves_there(finished):
    folder, found, _ = finished
    for one in found["candidates"]:
        if not one["stops"]:
            assert one["saved_on_calibration"] is None
            continue
        reader, kind = parse(one["name"].split()[0]), one["name"].split()[1]
        (view,) = read(sorted((folder / "traces").glob("*_calibrate.trace")), reader.name)
        blocks = list(map(int, one["check_layers"].split("+")))
        assert kind == "gap", "what follows is a gap rule's"
        gap = view.arrays["features"][:, :, view.meta["features"].index("gap")]
        leave = [[k for k in blocks if gap[d, k - 1] > one["threshold"]] for d in range(len(gap))]
        exits = np.array([stops[0] if stops else view.n_blocks for stops in leave])
        saved = 1 - Work.of([view], reader, GapStopper(0.5)).ratio(exits, blocks)
        assert one["saved_on_calibration"] == pytest.approx(saved) and saved > choosing.WORTH


def test_what_saves_next_to_nothing_is_not_recommended(finished, again):
    """A threshold that only one document passes, a short one, keeps any promise, but is not worth its checks."""

    def spoil(arrays):
        for said in early(arrays, "features"):
            said[1:] = 0.0
        for said in early(arrays, "greedy"):
            said[1:] = 0
        for said in early(arrays, "right"):
            said[1:] = 0

    change(again, "calibrate", spoil)
    found = tune(again)
    assert "chosen" not in found and not (again / STOPPER).exists() and "test" not in found
    assert any(one["stops"] for one in found["candidates"])
    best = max(one["saved_on_calibration"] for one in found["candidates"] if one["stops"])
    assert best < 0.01
    lines = told.lines(found, again, "run", None)
    (line,) = [line for line in lines if line.startswith("recommended: stopper=none; nothing saves 1% of the dense work")]
    assert f"saves {best:.2%} on calibration documents" in line and line.endswith("so use the dense model")
    assert found["nothing"]["more_documents_would_help"] and "--max-drop" in found["nothing"]["more"]


# ------------------------------------------------------------------------------------------------ parts


def test_documents_for_a_promise():
    assert (documents_for(0, 0.01, 0.95), documents_for(1, 0.01, 0.95)) == (299, 473)
    assert [Allowance(n, 0.01, 0.95).most_lost() for n in (298, 299, 472, 473)] == [-1, 0, 0, 1]
    assert Allowance(473, 0.01, 0.95).most_lost(won=5) == 1, "what is won counts only where accuracy is promised"
    assert tried(100, 0.01, 0.95) == 1 and tried(5000, 0.01, 0.95) == 3


@pytest.mark.parametrize("documents, drop", [(200, 0.05), (500, 0.02), (60, 0.01)])
def test_allowance_of_accuracy_against_the_gates_test(documents, drop):
    allowance = Allowance(documents, drop, 0.95, "accuracy")
    lost, won = np.meshgrid(np.arange(12), np.arange(12), indexing="ij")
    allowed = allowance.allows(lost, won)
    if exact_p(0, 0, documents, drop) > 0.05:  # no promise at all: the drop is the limit
        assert not allowance.can_promise
        assert (allowed == (lost - won <= drop * documents)).all()
        return
    passes = np.array([[exact_p(int(b), int(c), documents, drop) <= 0.05 for c in range(12)] for b in range(12)])
    assert (allowed == passes).all() and passes.any() and not passes.all()
    assert (allowance.allows(lost, won + 0.7) == passes).all(), "a part of a document wins nothing"
    needed = documents_for(1, drop, 0.95, "accuracy")
    assert exact_p(1, 0, needed, drop) <= 0.05 < exact_p(1, 0, needed - 1, drop)


@given(held=st.lists(st.integers(1, 90), min_size=1, max_size=6), wanted=st.integers(1, 300))
def test_most_each_is_the_least_that_makes_so_many_together(held, wanted):
    most = most_each(held, wanted)
    reached = sum(min(most, n) for n in held)
    assert reached >= wanted or reached == sum(held)
    assert sum(min(most - 1, n) for n in held) < wanted


@given(
    held=st.lists(st.tuples(*[st.integers(1, 400)] * 3), min_size=1, max_size=6), wanted=st.integers(10, 600)
)
def test_every_split_has_the_same_mix_of_tasks(held, wanted):
    splits = {s: {f"t{i}": of[k] for i, of in enumerate(held)} for k, s in enumerate(("train", "calibrate", "test"))}
    found = mixed(splits, wanted)
    least = {name: min(of[name] for of in splits.values()) for name in splits["test"]}
    shares = {name: min(n, most_each(list(least.values()), wanted)) for name, n in least.items()}
    for split, of in found.items():
        held_here = splits[split]
        assert all(1 <= of[name] <= held_here[name] for name in held_here)
        assert sum(of.values()) < wanted + len(held)
        times = [of[name] / shares[name] for name in shares]
        assert max(times) - min(times) < 1 / min(shares.values()), "rounded to whole documents, and no more"
        full = any((of[name] + 1) / shares[name] * (sum(shares.values())) > wanted or of[name] == held_here[name]
                   for name in shares)  # fmt: skip
        assert full, "it takes as many as there are"


def test_a_task_whose_calibration_split_is_small_is_small_in_all_splits():
    held = {
        "train": {"small": 33, "large": 900}, "calibrate": {"small": 25, "large": 600},
        "test": {"small": 105, "large": 2000},
    }  # fmt: skip
    assert mixed(held, 500) == {key: {"small": 25, "large": 475} for key in held}
    assert mixed(held, 50) == {key: {"small": 25, "large": 25} for key in held}
    alone = {"train": {"t": 5000}, "calibrate": {"t": 5000}, "test": {"t": 100}}
    assert mixed(alone, 500) == {"train": {"t": 500}, "calibrate": {"t": 500}, "test": {"t": 100}}


@given(seed=st.integers(0, 200), allowed=st.sampled_from([0.0, 0.1, 0.5]))
@settings(max_examples=40, deadline=None)
def test_search_against_all_blocks_and_thresholds_of_one_check(seed, allowed):
    draw = np.random.default_rng(seed)
    scores = draw.uniform(size=(20, 4))
    scores[:, 3] = np.nan
    lost = (draw.uniform(size=(20, 4)) < 0.3).astype(float)
    lost[:, 3] = 0
    blocks = np.tile(np.arange(5.0), (20, 1))
    work = Work(blocks, np.full((20, 4), 0.2), np.full(20, 0.1), True)
    allowance = Allowance(20, allowed, 0.95) if allowed else None  # 20 documents promise 0.1 only by what they lose
    if allowance is not None and allowance.can_promise:
        allowed = allowance.most_lost() / 20
    found = search(scores, lost, work, allowance)
    assert found.lost <= allowed and found.cost <= 1

    def cost_of(exits, asked):
        total = 0.0
        for k in exits:
            total += (k if k < 4 else 4.1) + 0.2 * sum(j <= k for j in asked)
        return total / (20 * 4.1)

    exits = []
    for row in scores:
        stops = [k for k in found.blocks if row[k - 1] > found.threshold]
        exits.append(stops[0] if stops else 4)
    assert exits == found.exit_layer.tolist()
    if found.blocks:
        assert found.cost == pytest.approx(cost_of(exits, found.blocks))
    for k in (1, 2, 3):
        for threshold in found.threshold, np.inf:
            left = [k if row[k - 1] > threshold else 4 for row in scores]
            if np.mean([lost[d, e - 1] for d, e in enumerate(left)]) <= allowed:
                assert found.cost <= cost_of(left, [k]) + 1e-9


@given(seed=st.integers(0, 200), drop=st.sampled_from([0.12, 0.3, 0.5]), loss=st.sampled_from(["gold", "accuracy"]))
@settings(max_examples=20, deadline=None)
def test_what_is_expected_after_calibration_against_a_slow_calibration(seed, drop, loss):
    draw = np.random.default_rng(seed)
    scores, lost = draw.uniform(size=(15, 4)), draw.choice([0, 1, -1], (15, 4), p=[0.6, 0.3, 0.1]).astype(float)
    if loss == "gold":
        lost = lost.clip(0)
    lost[:, 3] = 0
    risk = Risk(drop, loss == "accuracy")
    work = Work(np.tile(np.arange(5.0), (15, 1)), np.full((15, 4), 0.2), np.full(15, 0.1), True)
    thresholds = [0.9, 0.6, 0.3]
    total = 0.0
    for counts in np.random.default_rng(0).multinomial(30, np.full(15, 1 / 15), DRAWS):
        cost = 1.0
        for threshold in thresholds:
            exits = left(scores, [1, 3], threshold)
            drawn = np.repeat(lost[np.arange(15), exits - 1], counts)
            if risk.p(drawn) > 0.05:
                break
            cost = work.ratio(exits, [1, 3])
        total += cost
    allowance = Allowance(30, drop, 0.95, loss)
    assert expected(scores, lost, work, allowance, [1, 3], thresholds) == pytest.approx(total / DRAWS)


@pytest.mark.parametrize("spec", ["head", "copy:2", "sim:2"])
def test_work_against_a_slow_count(tmp_path, spec):
    draw = np.random.default_rng(0)
    stored = [30, 20, 10]
    path = write(
        tmp_path / "a.trace", draw.uniform(size=(6, 3, 2)), draw.integers(0, 9, (6, 3)), document=[0, 0, 1, 2, 2, 3],
        block_weights=[100, 200, 300], stored_weights=stored,
    )  # fmt: skip
    view, reader, stopper = TracedDocuments(path, *recording.read(path)), parse(spec), GapStopper(0.5)
    work = Work.of([view], reader, stopper)
    exits, asked = np.array([1, 2, 3, 2]), (1, 2)
    weights, head = [100, 200, 300], 8 * 16
    expected = np.zeros(4)
    for document, tokens in zip(view.owner, view.arrays["prompt_tokens"].tolist(), strict=True):
        k = exits[document]
        cost = tokens * sum(weights[:k]) + (0 if k < 3 else head)
        for j in [j for j in asked if j <= k]:
            cost += head + stopper.flops / 2
            if reader.runs_tokens:
                run = 2 + (reader.kind == "sim")
                cost += run * sum(weights[j:])
                cost += (tokens - run) * sum(stored[j:]) if reader.kind == "copy" else 0
        expected[document] += cost
    np.testing.assert_allclose(work.at(exits, asked), expected)
    np.testing.assert_allclose(work.dense.sum(), sum(t * 600 + head for t in view.arrays["prompt_tokens"].tolist()))


def test_what_cannot_be_fitted_on_all_documents_is_no_candidate(monkeypatch):
    rivals = [SimpleNamespace(name=f"head {kind}", kind=kind, reader=HEAD, expected=saved, stopper=None)
              for kind, saved in (("logistic", 0.5), ("gap", 0.4), ("svm", 0.3), ("boosted", 0.001))]  # fmt: skip
    monkeypatch.setattr(choosing, "contestants", lambda *_: (rivals, {"head crf": "no"}))

    def fitted(kind, reader):
        if kind == "logistic":
            raise AdaInferError("traces: every one of the 9 examples says stop")
        return kind

    found, chosen, without = choosing.candidates(
        SimpleNamespace(fitted=fitted), [HEAD], choosing.allowed(5000, Settings()), Settings()
    )
    assert [one.name for one in found] == ["head gap", "head svm", "head boosted"]
    assert [(one.name, one.stopper) for one in chosen] == [("head gap", "gap"), ("head svm", "svm")]
    assert without == {"head crf": "no", "head logistic": "traces: every one of the 9 examples says stop"}


# ------------------------------------------------------------------------------------------------ the command


def test_the_command_writes_a_page_and_prints_the_command_to_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(loading, "task_manager", lambda *_, **__: our_tasks())
    out = tmp_path / "out"
    arguments = ["tune", "-a", "pretrained=adainfer-demo,dtype=float32", "-t", TASK, "--max-drop", "0.1", "-n", "40"]
    assert main.main([*arguments, "--readers", "copy:1", "-b", "16", "-f", "2", "--device", "cpu", "-o", str(out)]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) <= 15 and "simulated" in "".join(lines)
    found = json.loads((out / RESULT).read_text())
    blocks = "+".join(map(str, found["chosen"]["check_layers"]))
    model_args = f"pretrained=adainfer-demo,dtype=float32,stopper={out / STOPPER},check_layers={blocks}"
    assert lines[-1] == (
        f"lm_eval --model adainfer --model_args {model_args} --tasks {TASK} --device cpu --num_fewshot 2 "
        "--batch_size 16"
    )
    text = (out / "index.html").read_text()
    assert found["chosen"]["name"] in text and "frontier.png" in text and (out / "exit_layers.svg").exists()
    assert all(one["name"] in text for one in found["contestants"])


def test_a_reader_keeps_its_colour_and_mark_on_the_page():
    """Also where readers were dropped, and whatever order the contestants come in."""
    made = [SimpleNamespace(meta={"task": "t", "readers": {name: {} for name in ("copy:1", "sim:32")}})]
    probed = [{"reader": name} for name in ("head", "sim:1", "copy:1", "sim:32")]
    rivals = [
        {"name": f"{reader} {kind}", "reader": reader, "acc": 0.8, "acc_dense": 0.9, "acc_low": 0.7, "acc_high": 0.9,
         "saved": 0.3}
        for kind in ("gap", "svm") for reader in ("sim:32", "head", "copy:1")
    ]  # fmt: skip
    found = {"readers": probed, "contestants": rivals, "chosen": {"name": "copy:1 svm"}}
    mark_of = page.reader_marks(Tuned(found, made, []))
    assert set(mark_of) == {"head", "sim:1", "copy:1", "sim:32"}
    lines = per_block.readers(made)
    assert [mark_of[name] for name in lines] == [marks.of(i) for i in range(3)], "as lines per reader are drawn"
    dense, *points = page.frontier_points(found, mark_of)
    assert dense.mark == marks.DENSE
    assert {point.label: point.mark for point in points} == {
        "sim:32 gap": mark_of["sim:32"], "head gap": mark_of["head"], "recommended: copy:1 svm": mark_of["copy:1"]
    }  # fmt: skip


@pytest.mark.parametrize("given", ["stopper=gap:0.8", "reader=copy", "check_layers=3"])
def test_arguments_that_are_to_be_found_are_refused(given, capsys, tmp_path):
    assert main.main(["tune", "-a", f"pretrained=adainfer-demo,{given}", "-t", TASK, "-o", str(tmp_path)]) == 2
    assert f"{given.partition('=')[0]} is what adainfer tune finds" in capsys.readouterr().err


def test_readers_that_do_not_exist_are_refused(tmp_path):
    assert "copy" in refused(lambda: tune(tmp_path, Settings(readers=("copy:0",))))


def test_a_task_of_texts_is_refused():
    task = SimpleNamespace(OUTPUT_TYPE="generate_until")
    assert "generate_until" in refused(lambda: Tuning(None, {"t": task}, "x", SETTINGS))


# ------------------------------------------------------------------------------------------------ stopper=auto


def evaluate(pretrained="adainfer-demo", shots=None, **options):
    """Results of ``lm_eval`` with ``stopper=auto``."""
    arguments = {"pretrained": pretrained, "dtype": "float32", "stopper": "auto", "pilot": 0, **options}
    return lm_eval.simple_evaluate(
        model="adainfer", model_args=arguments, tasks=[TASK], limit=6, bootstrap_iters=0, task_manager=our_tasks(),
        num_fewshot=shots, device="cpu", batch_size=8,
    )  # fmt: skip


def test_auto_takes_the_one_that_matches_and_says_so(finished):
    folder, found, _ = finished
    record = evaluate(stopper_dir=str(folder))["config"]["adainfer"]
    assert record["stopper_auto"]["file"] == str(folder / STOPPER)
    assert record["checked_blocks"] == found["chosen"]["check_layers"] and record["reader"] == "copy:1"
    named = evaluate(stopper=str(folder / STOPPER))["config"]["adainfer"]
    assert record["fingerprint"] == named["fingerprint"]


def test_auto_refuses_two(finished, again):
    shutil.copy(again / STOPPER, again / "second.stopper")
    error = refused(lambda: evaluate(stopper_dir=str(again)))
    assert "finds 2" in error and "second.stopper" in error


def test_auto_names_a_file_that_came_with_the_model(finished, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = shutil.copytree(paths.demo_model(), tmp_path / "model")
    shutil.copy(finished[0] / STOPPER, model / "its.stopper")
    record = evaluate(pretrained=str(model))["config"]["adainfer"]
    assert record["stopper_auto"]["file"] == str(model / "its.stopper")
    assert "its.stopper, which lies in the model's own folder" in caplog.text


@pytest.mark.parametrize("options", [{"shots": 1}, {"reader": "head"}, {"dtype": "bfloat16"}])
def test_auto_without_a_match_says_how_to_make_one(finished, options):
    error = refused(lambda: evaluate(stopper_dir=str(finished[0]), **options))
    assert "adainfer tune" in error and TASK in error


def test_auto_finds_the_users_cache(finished, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    auto.cache_folder().mkdir()
    shutil.copy(finished[0] / STOPPER, auto.cache_folder() / "mine.stopper")
    save(GapStopper(0.5), auto.cache_folder() / "another.stopper")  # which was not tuned
    (auto.cache_folder() / "damaged.stopper").write_text("no stopper")
    assert evaluate()["config"]["adainfer"]["stopper_auto"]["file"].endswith("mine.stopper")


def test_auto_outside_an_evaluation_and_wrong_folders(finished, tmp_path):
    lm = loading.load_model(f"pretrained=adainfer-demo,stopper=auto,stopper_dir={finished[0]}", "cpu")
    assert "tasks of an evaluation" in refused(lambda: lm.loglikelihood([]))
    error = refused(lambda: loading.load_model(f"pretrained=adainfer-demo,stopper=auto,stopper_dir={tmp_path}/x", "cpu"))
    assert "is no folder" in error
    error = refused(lambda: loading.load_model(f"pretrained=adainfer-demo,stopper_dir={tmp_path}", "cpu"))
    assert "stopper=auto" in error



@pytest.mark.parametrize(
    ("saves", "blocks"),
    [({}, ()), ({5: 0.005}, ()), ({7: 0.2}, (7,)), ({8: 0.0, 20: 0.24, 23: 0.18, 26: 0.1}, (15, 17, 19, 21, 23, 25)),
     ({1: 0.0, 2: 0.3, 3: 0.1}, (2,)), ({4: 0.4, 10: 0.4}, (4, 5, 6, 8, 9, 10))],
)  # fmt: skip
def test_blocks_around_the_best(saves, blocks):
    """Linear between those that were probed: 15 of 8 to 20 saves 0.14, more than half of 0.24."""
    assert around_the_best(saves) == blocks
