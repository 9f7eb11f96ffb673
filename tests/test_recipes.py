"""The paper's studies: what a recipe fits on, that its tables are replay's, and its figures."""

from __future__ import annotations

import csv
import sys

import numpy as np
import pytest
from helpers.models import tiny_lm
from helpers.refusals import refused
from helpers.tasks import documents, make_task
from helpers.traces import add_reader, write

from lm_eval_adainfer.cli import main
from lm_eval_adainfer.fitting import fit
from lm_eval_adainfer.output import per_block
from lm_eval_adainfer.readers.base import Reader
from lm_eval_adainfer.studies import recipes
from lm_eval_adainfer.traces import recording, replay
from lm_eval_adainfer.traces.plan import Plan

TASKS = [f"t{i}" for i in range(8)] + ["t1_2x"]


@pytest.fixture
def tracer(tmp_path):
    """Synthetic traces of nine tasks: (shots, split) -> files."""

    def make(shots, split):
        files = []
        for task in TASKS:
            for n in shots:
                rng = np.random.default_rng([len(task), n, TASKS.index(task), split == "train"])
                top = rng.integers(0, 2, (12, 5))
                path = tmp_path / "traces" / f"{task}_{n}shot_{split}.trace"
                scores, meta = rng.normal(size=(12, 5, 2)), {"task": task, "num_fewshot": n, "split": split}
                files.append(write(path, rng.uniform(size=(12, 5, 2)), top, scores=scores, **meta))
        return files

    return make


def a_recipe(**changes):
    options = {
        "name": "r", "study": "table", "title": "T", "tasks": TASKS, "shots": [0, 5, 10], "train_shots": [5],
        "stoppers": {"dense": "none"}, **changes,
    }  # fmt: skip
    return recipes.Recipe(**options)


def test_every_recipe_that_ships_can_be_read():
    assert set(recipes.names()) >= {"table2", "table4", "table5", "table6", "draws", "figure1", "figure3"}
    for name in recipes.names():
        recipe = recipes.read(name)
        assert recipe.name == name and recipe.tasks and recipe.title
        assert (recipe.study == "table") == bool(recipe.stoppers)
    assert recipes.read("table2").shots == [0, 5, 10, 15, 20]


def test_table_rows_are_replays_with_zero_shot_apart(tracer, tmp_path):
    stoppers = {"dense": "none", "gap": "gap:0.5", "oracle": "oracle:stable"}
    files = recipes.run(a_recipe(stoppers=stoppers), tracer, tmp_path / "out")
    assert [f.name for f in files] == ["r.md", "r.csv"]
    rows = list(csv.DictReader(files[1].read_text().splitlines()))
    assert len(rows) == (len(TASKS) + 1) * 2 * 3 and {r["basis"] for r in rows} == {"simulated from traces"}
    assert "simulated from traces" in files[0].read_text()
    traces = replay.load(tracer([0, 5, 10], "test"))
    for shots, settings in (("0", [0]), ("5/10", [5, 10])):
        for task in ("t3", "pooled"):
            members = [t for t in traces if t.meta["num_fewshot"] in settings and task in ("pooled", t.meta["task"])]
            single = replay.replay(members, ["gap:0.5"])
            (found,) = [r for r in rows if (r["task"], r["shots"], r["stopper"]) == (task, shots, "gap")]
            mean = np.mean([r["acc"] for r in single if r["task"] != "pooled" and "/" not in r["shots"]])
            assert float(found["acc"]) == pytest.approx(mean)


def fitted_on(monkeypatch):
    """Names of the traces of each fit, in order; what is fitted is a rule."""
    calls = []

    def note(files, seed, **options):
        calls.append(sorted(f.stem for f in files))
        return replay.GapStopper(0.5)

    monkeypatch.setitem(fit.FITTERS, "svm", note)
    return calls


def test_six_training_sets_are_drawn_by_seed_and_told(tracer, tmp_path, monkeypatch):
    calls = fitted_on(monkeypatch)
    for seed in (0, 0, 1):
        stoppers = {"svm": {"fit": "svm", "train": "drawn"}}
        files = recipes.run(a_recipe(stoppers=stoppers), tracer, tmp_path / "out", seed)
        (note,) = [line for line in files[0].read_text().splitlines() if "drawn with seed" in line]
        assert f"seed {seed}" in note and all(name in note for name in calls[-1])
    assert len(calls) == 3 and calls[0] == calls[1] != calls[2]
    assert all(len(set(c)) == 6 and all(name.endswith("_5shot_train") for name in c) for c in calls)


def test_draws_of_one_recipe_differ(tracer, tmp_path, monkeypatch):
    calls = fitted_on(monkeypatch)
    stoppers = {f"svm {i}": {"fit": "svm", "train": "drawn", "draw": i} for i in range(6)}
    recipes.run(a_recipe(stoppers=stoppers), tracer, tmp_path / "out")
    assert len({tuple(c) for c in calls}) == 6


def test_intra_task_fits_on_the_tasks_own_traces_and_inter_task_on_all_others(tracer, tmp_path, monkeypatch):
    calls = fitted_on(monkeypatch)
    recipes.run(a_recipe(stoppers={"intra": {"fit": "svm", "train": "same"}}), tracer, tmp_path / "out")
    assert sorted(calls) == sorted([f"{task}_5shot_train"] for task in TASKS)
    calls.clear()
    recipes.run(a_recipe(stoppers={"inter": {"fit": "svm", "train": "others"}}), tracer, tmp_path / "out")
    everything = {f"{task}_5shot_train" for task in TASKS}
    assert len(calls) == len(TASKS) and all(len(everything - set(c)) == 1 for c in calls)
    assert set().union(*(everything - set(c) for c in calls)) == everything


def test_the_other_models_traces_are_its_training_ones(tracer, tmp_path, monkeypatch):
    calls = fitted_on(monkeypatch)
    for split in ("train", "test"):
        write(tmp_path / "other" / f"x_3shot_{split}.trace", np.ones((2, 7, 2)), np.zeros((2, 7)), head_hash="y")
    stoppers = {"inter-model": {"fit": "svm", "train": "other_model"}}
    recipes.run(a_recipe(stoppers=stoppers), tracer, tmp_path / "out", other_model=tmp_path / "other")
    assert calls == [["x_3shot_train"]]


def test_what_was_fitted_on_another_model_is_asked_after_the_blocks_recorded_here(tmp_path):
    """Under ``copy:1``, which knows some blocks of each model alone: 4 and 5 of 7 there, 2 and 3 of 5 here."""
    random = np.random.default_rng(0)

    def a_trace(file, n_blocks, blocks, **meta):
        gaps = random.uniform(size=(40, n_blocks, 2))
        top = (random.uniform(size=(40, n_blocks)) > gaps[:, :, 0]).astype(int)
        top[:, -1] = 0
        path = write(tmp_path / file, gaps, top, **meta)
        add_reader(path, "copy:1", blocks, gaps[:, [k - 1 for k in blocks]])
        return path

    a_trace("other/x_5shot_train.trace", 7, [4, 5], head_hash="y", split="train")
    here = {split: a_trace(f"t_0shot_{split}.trace", 5, [2, 3], split=split) for split in ("train", "test")}
    stoppers = {kind: {"fit": "logistic", "threshold": 0.5, "train": kind} for kind in ("all", "other_model")}
    _, file = recipes.run(
        a_recipe(stoppers=stoppers, tasks=["t"], shots=[0]), lambda shots, split: [here[split]], tmp_path / "out",
        other_model=tmp_path / "other", readers=[Reader("copy", 1)],
    )  # fmt: skip
    rows = {row["stopper"]: row for row in csv.DictReader(file.read_text().splitlines())}
    assert set(rows) == {"all", "other_model"}
    assert 2 <= float(rows["other_model"]["exit_layer"]) < 5


@pytest.mark.parametrize("kind", ["svm", "crf", "logistic", "mlp", "boosted"])
def test_every_kind_of_fit_is_what_adainfer_fit_makes(kind, tmp_path):
    """The reference: the command ``adainfer fit`` on the same traces, replayed."""
    if kind == "crf":
        pytest.importorskip("pycrfsuite")

    def tracer(shots, split):
        files = []
        for task in ("a", "b"):
            rng = np.random.default_rng([task == "a", split == "train"])
            certain = rng.uniform(size=(60, 5, 2))
            top = (rng.uniform(size=(60, 5)) > certain[:, :, 0]).astype(int)  # 0 where the block is sure
            top[:, -1] = 0
            path = tmp_path / "traces" / f"{task}_0shot_{split}.trace"
            scores = np.stack([1 - top, top], axis=-1) + 0.1 * certain
            files.append(write(path, certain, top, scores=scores, task=task, split=split))
        return files

    recipe = a_recipe(stoppers={"mine": {"fit": kind, "train": "all", "threshold": 0.6}}, tasks=["a", "b"], shots=[0])
    rows = list(csv.DictReader(recipes.run(recipe, tracer, tmp_path / "out", seed=3)[1].read_text().splitlines()))
    train = [str(f) for f in tracer([5], "train")]
    stopper = str(tmp_path / "s")
    assert main.main(["fit", kind, *train, "--seed", "3", "--threshold", "0.6", "-o", stopper]) == 0
    reference = replay.replay(replay.load(tracer([0], "test")), [stopper])
    assert {r["task"] for r in rows} == {"a", "b", "pooled"}
    for row in rows:
        (expected,) = [r for r in reference if r["task"] == row["task"]]
        for column in ("acc", "agreement", "exit_layer"):
            assert float(row[column]) == pytest.approx(expected[column])
    assert min(float(r["exit_layer"]) for r in rows) < 5


def test_a_strategy_that_cannot_be_had_is_named_and_left_out(tracer, tmp_path):
    stoppers = {
        "dense": "none",
        "inter-model": {"fit": "svm", "train": "other_model"},
        "forest": {"fit": "forest", "train": "all"},
        "bi": "shortgpt:bi:2",
    }
    files = recipes.run(a_recipe(stoppers=stoppers), tracer, tmp_path / "out")
    text = files[0].read_text()
    assert {r["stopper"] for r in csv.DictReader(files[1].read_text().splitlines())} == {"dense"}
    for name, why in (("inter-model", "other_model"), ("forest", "'forest'"), ("bi", "can't be replayed")):
        assert any(line.startswith(f"- {name}: left out") and why in line for line in text.splitlines())


def test_a_recipe_without_anything_to_show_is_refused(tracer, tmp_path):
    none = a_recipe(stoppers={"bi": "shortgpt:bi:2"})
    refused(lambda: recipes.run(none, tracer, tmp_path / "out"), "recipe", "bi", "can't be replayed")
    text = write(tmp_path / "g.trace", np.ones((2, 5, 2)), np.zeros((2, 5)), output_type="generate_until")
    refused(lambda: recipes.run(a_recipe(), lambda *_: [text], tmp_path / "out"), "tasks", "generated text")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("with_matplotlib", [True, False])
def test_figures_are_means_per_block(with_matplotlib, tracer, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    if with_matplotlib:
        pytest.importorskip("matplotlib")
    else:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
    traces = replay.load(tracer([0, 5], "test"))
    for study in ("accuracy", "features"):
        files = recipes.run(a_recipe(name=study, study=study, shots=[0, 5]), tracer, tmp_path / "out")
        assert len(files) == (3 if with_matplotlib else 2)
        if with_matplotlib:
            assert files[2].read_bytes().startswith(b"\x89PNG")
        rows = list(csv.DictReader(files[0].read_text().splitlines()))
        for row in rows[:: max(1, len(rows) // 40)]:
            (t,) = [t for t in traces if (t.meta["task"], str(t.meta["num_fewshot"])) == (row["task"], row["shots"])]
            k = int(row["block"]) - 1
            if study == "accuracy":
                scores = t.arrays["scores"]
                right = [scores[i, k, 0] >= scores[i, k, 1] for i in range(12)]  # the first choice is right
                assert float(row["acc"]) == pytest.approx(np.mean(right))
            else:
                values = t.arrays["features"][:, k, t.meta["features"].index(row["feature"])]
                assert float(row["mean"]) == pytest.approx(float(np.mean(values)))
                assert float(row["median"]) == pytest.approx(float(np.median(values)))
    assert ("[report]" in caplog.text) == (not with_matplotlib)


def test_accuracy_per_block_ends_at_the_dense_models(tracer):
    traces = replay.load(tracer([0], "test"))
    (row,) = replay.replay(traces[:1], ["none"])
    last = [r for r in per_block.accuracy_rows(traces[:1]) if r["block"] == 5]
    assert [r["acc"] for r in last] == [row["acc"]] and last[0]["agreement"] == 1


def test_the_command_makes_a_table_of_the_demo_model_and_goes_on_where_it_was(tmp_path, capsys, monkeypatch):
    command = [
        "recipe", "table2", "-a", "pretrained=adainfer-demo,dtype=float32", "-t",
        "adainfer_demo_sentiment,adainfer_demo_fact", "-f", "0,1", "-L", "6", "--device", "cpu", "-o", str(tmp_path),
    ]  # fmt: skip
    assert main.main(command) == 0
    text = (tmp_path / "table2.md").read_text()
    assert "AdaInfer (SVM)" in text and "adainfer-demo, 12 blocks" in text and "simulated" in text
    assert len(list((tmp_path / "traces").iterdir())) == 6
    from lm_eval_adainfer.harness.model import AdaInferLM

    monkeypatch.setattr(AdaInferLM, "loglikelihood", lambda *_, **__: pytest.fail("traced again"))
    assert main.main(command) == 0
    assert (tmp_path / "table2.md").read_text() == text
    capsys.readouterr()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("study: poem", ["poem.yaml", "study"]),
        ("- 1", ["study"]),
        ("study: [", ["YAML"]),
        ("study: table\ncolour: red\nstoppers: {a: none}", ["colour"]),
        ("study: table", ["no stoppers"]),
        ("study: table\nshots: many\nstoppers: {a: none}", ["shots", "many"]),
        ("study: table\nshots: [-1]\nstoppers: {a: none}", ["shots", "-1"]),
        ("study: table\nstoppers: {a: {fit: svm, train: mine}}", ["mine", "drawn"]),
        ("study: table\nstoppers: {a: {train: all}}", ["fit"]),
        ("study: table\nstoppers: {a: {fit: forest}}", ["'a'", "'forest'", "svm, crf, logistic, mlp, boosted"]),
        ("study: table\nstoppers: {a: {fit: classifier}}", ["'classifier'"]),
        ("study: table\nstoppers: {a: {fit: [svm]}}", ["['svm']"]),
        ("study: table\nstoppers: {a: {fit: mlp, label: best}}", ["'best'", "stable"]),
        ("study: table\nstoppers: {a: {fit: mlp, features: [gab]}}", ["'gab'", "gap"]),
        ("study: table\nstoppers: {a: {fit: mlp, features: gap}}", ["features", "'gap'", "list"]),
        ("study: table\nstoppers: {a: {fit: mlp, threshold: high}}", ["threshold", "'high'"]),
        ("study: table\nstoppers: {a: {fit: mlp, draw: x}}", ["draw", "'x'"]),
    ],
)
def test_wrong_recipes_are_one_sentence(text, words, tmp_path):
    (tmp_path / "poem.yaml").write_text(text)
    refused(lambda: recipes.read(str(tmp_path / "poem.yaml")), "recipe", *words)


def test_unknown_recipes_and_wrong_arguments_are_one_sentence(tmp_path, capsys):
    refused(lambda: recipes.read("table9"), "recipe", "table9", "table2")
    common = ["-a", "pretrained=adainfer-demo", "-t", "adainfer_demo_fact", "-o", str(tmp_path)]
    for more in (["recipe", "table9"], ["recipe", "table2", "-f", "x"], ["recipe", "table2", "-L", "0"],
                 ["recipe", "table5", "--other_model", str(tmp_path / "no")]):  # fmt: skip
        assert main.main([*more, *common]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and all(line.startswith("adainfer: error: ") for line in lines)


def test_strategies_are_fitted_and_replayed_under_every_reader(tmp_path):
    """Of a random model, whose answers change with nearly every block."""
    lm = tiny_lm()
    task = make_task({"train": documents(40, 1), "test": documents(30, 2)})
    plan = Plan.of(lm.anatomy, "copy:1", "2+3")

    def tracer(shots, split):
        return recording.trace(lm, {"toy": task}, tmp_path, shots, split, plan=plan)

    stoppers = {"dense": "none", "gap": "gap:0.2", "oracle": "oracle:stable", "logistic": {"fit": "logistic"}}
    recipe = a_recipe(stoppers=stoppers, shots=[0], train_shots=[0])
    readers = [reader for reader, _ in plan.readers]
    assert [reader.name for reader in readers] == ["head", "copy:1"]
    files = recipes.run(recipe, tracer, tmp_path / "out", readers=readers)
    rows = {(r["stopper"], r["reader"]): r for r in csv.DictReader(files[1].read_text().splitlines())}
    assert {reader for name, reader in rows if name == "dense"} == {"head"}, "it is the same under all"
    traces = replay.load(tracer([0], "test"))
    for reader in readers:
        fitted = fit.fit("logistic", tracer([0], "train"), reader)
        for name, stopper in (("gap", "gap:0.2"), ("oracle", "oracle:stable"), ("logistic", fitted)):
            (row,) = replay.replay(traces, [stopper], reader=reader)
            for column in ("acc", "agreement", "exit_layer", "flops_ratio"):
                assert float(rows[name, reader.name][column]) == pytest.approx(row[column]), (name, reader, column)
    assert all(len({rows[name, r.name]["exit_layer"] for r in readers}) == 2 for name in ("gap", "oracle", "logistic"))


@pytest.mark.parametrize("stoppers", [{"whole": "none"}, {"half": "fixed:2"}, {"half": "fixed:2", "whole": "none"}])
def test_a_task_on_which_the_dense_model_is_no_better_than_one_answer_for_all_is_named(tmp_path, stoppers):
    """Whether or not the dense model is among the strategies."""
    rng = np.random.default_rng(0)
    for task, right in (("guesses", 0.5), ("knows", 0.95)):
        gold = (np.arange(200) % 10 >= 6).astype(int)  # 60% are choice 0
        scores = rng.normal(size=(200, 4, 2)) / 10
        said = np.where(rng.uniform(size=200) < right, gold, 1 - gold)
        scores[np.arange(200), -1, said] += 5
        write(tmp_path / f"{task}_5shot_test.trace", rng.uniform(size=(200, 4, 2)), np.zeros((200, 4), int),
              scores=scores, gold=gold, task=task, num_fewshot=5, split="test")  # fmt: skip
    files = [tmp_path / f"{task}_5shot_test.trace" for task in ("guesses", "knows")]
    recipe = a_recipe(shots=[5], train_shots=[5], stoppers=stoppers)
    written = recipes.run(recipe, lambda *_: files, tmp_path / "out")
    rows = {r["task"]: r for r in csv.DictReader(written[1].read_text().splitlines())}
    assert {float(r["constant"]) for r in rows.values()} == {0.6}
    notes = [line for line in written[0].read_text().splitlines() if "best constant answer gets" in line]
    assert len(notes) == 1 and notes[0].startswith("- guesses at 5 shots") and "60.0%" in notes[0]
