"""The paper's studies: what a recipe fits on, that its tables are replay's, and its figures."""

from __future__ import annotations

import csv
import sys

import numpy as np
import pytest
from test_replay import write
from test_tracing import refused

from lm_eval_adainfer import cli, fitting, recipes, replay, studies

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
    rows = list(csv.DictReader(files[1].open()))
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

    def fit(files, seed, **options):
        calls.append(sorted(f.stem for f in files))
        return replay.GapStopper(0.5)

    monkeypatch.setattr(fitting, "fit_svm", fit)
    return calls


def test_six_training_sets_are_drawn_by_seed_and_told(tracer, tmp_path, monkeypatch):
    calls = fitted_on(monkeypatch)
    for seed in (0, 0, 1):
        stoppers = {"svm": {"fit": "svm", "train": "drawn"}}
        files = recipes.run(a_recipe(stoppers=stoppers), tracer, tmp_path / "out", seed)
        note = files[0].read_text().splitlines()[-1]
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


def test_a_strategy_that_cannot_be_had_is_named_and_left_out(tracer, tmp_path):
    stoppers = {
        "dense": "none",
        "inter-model": {"fit": "svm", "train": "other_model"},
        "forest": {"fit": "forest", "train": "all"},
        "bi": "shortgpt:bi:2",
    }
    files = recipes.run(a_recipe(stoppers=stoppers), tracer, tmp_path / "out")
    text = files[0].read_text()
    assert {r["stopper"] for r in csv.DictReader(files[1].open())} == {"dense"}
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
        rows = list(csv.DictReader(files[0].open()))
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
    last = [r for r in studies.accuracy(traces[:1]) if r["block"] == 5]
    assert [r["acc"] for r in last] == [row["acc"]] and last[0]["agreement"] == 1


def test_the_command_makes_a_table_of_the_demo_model_and_goes_on_where_it_was(tmp_path, capsys, monkeypatch):
    command = [
        "recipe", "table2", "-a", "pretrained=adainfer-demo,dtype=float32", "-t",
        "adainfer_demo_sentiment,adainfer_demo_fact", "-f", "0,1", "-L", "6", "--device", "cpu", "-o", str(tmp_path),
    ]  # fmt: skip
    assert cli.main(command) == 0
    text = (tmp_path / "table2.md").read_text()
    assert "AdaInfer (SVM)" in text and "adainfer-demo, 12 blocks" in text and "simulated" in text
    assert len(list((tmp_path / "traces").iterdir())) == 6
    from lm_eval_adainfer.model import AdaInferLM

    monkeypatch.setattr(AdaInferLM, "loglikelihood", lambda *_, **__: pytest.fail("traced again"))
    assert cli.main(command) == 0
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
        assert cli.main([*more, *common]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and all(line.startswith("adainfer: error: ") for line in lines)
