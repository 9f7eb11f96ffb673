"""``--tasks``, ``--exclude``, and a metric and a filter per task, in ``compare``, ``check`` and ``report``."""

from __future__ import annotations

import json
import shutil

import pytest
from helpers.synthetic_runs import DATE, sample, write

from lm_eval_adainfer.cli.main import main
from lm_eval_adainfer.comparison import running, runs
from lm_eval_adainfer.comparison.selection import Selection, Wanted
from lm_eval_adainfer.errors import AdaInferError

GROUPS = {"all_of_arc": ["arc", "deeper"], "deeper": ["arc_easy"]}


def make(folder, flexible=1, drop=()):
    """Three tasks with acc, one with two filters and two metrics."""
    gsm = [
        {**sample("gsm8k", i, score, metric="exact_match"), "filter": name, "metrics": ["exact_match", "f1"], "f1": 0.25}
        for name, score in (("strict-match", 0), ("flexible-extract", flexible))
        for i in range(30)
    ]
    tasks = {"arc": [1, 0] * 10, "arc_easy": [1] * 20, "sst2": [0] * 20, "gsm8k": gsm}
    place = write(folder, {t: v for t, v in tasks.items() if t not in drop}, groups=GROUPS)
    results = place / "m" / f"results_{DATE}.json"
    results.write_text(results.read_text().replace('"effective": 60', '"effective": 30'))
    return place


def compared(capsys, *arguments):
    code = main(["compare", *map(str, arguments), "--format", "json"])
    out = capsys.readouterr()
    if code:
        return out.err.strip().splitlines()[-1]
    return {row["name"]: row for row in json.loads(out.out)[0]["rows"]}


@pytest.mark.parametrize(
    ("options", "tasks"),
    [
        (["--tasks", "arc,sst2"], {"arc", "sst2"}),
        (["--tasks", "arc", "--tasks", "sst2"], {"arc", "sst2"}),
        (["--tasks", "arc*"], {"arc", "arc_easy"}),
        (["--tasks", "all_of_arc"], {"arc", "arc_easy"}),
        (["--tasks", "deep*"], {"arc_easy"}),
        (["--exclude", "gsm8k,all_of_arc"], {"sst2"}),
        (["--tasks", "arc*,gsm8k", "--exclude", "*_easy"], {"arc", "gsm8k"}),
        ([], {"arc", "arc_easy", "sst2", "gsm8k"}),
    ],
)
def test_tasks_and_groups_are_selected_by_name_and_glob(tmp_path, capsys, options, tasks):
    a = make(tmp_path / "a")
    rows = compared(capsys, a, a, *options)
    assert {row["name"] for row in rows.values() if row["kind"] == "task"} == tasks
    arc = {"arc", "arc_easy"} & tasks
    assert rows.get("all_of_arc", {}).get("documents", 0) == 20 * len(arc)


def test_tasks_that_only_one_run_has_can_be_left_out_and_their_samples_may_be_missing(tmp_path, capsys):
    a, b = make(tmp_path / "a"), make(tmp_path / "b", drop=("sst2",))
    assert "select them with --tasks or --exclude" in compared(capsys, a, b)
    assert "sst2" not in compared(capsys, a, b, "--exclude", "sst2")
    (a / "m" / f"samples_sst2_{DATE}.jsonl").unlink()
    assert "has no samples beside it for task sst2" in compared(capsys, a, a)
    assert set(compared(capsys, a, a, "--tasks", "arc")) >= {"arc"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--tasks", "arc,nope"], "tasks: 'nope' is no task or group of"),
        (["--tasks", "no*"], "it holds all_of_arc, deeper, arc, arc_easy, sst2, gsm8k"),
        (["--exclude", "nope"], "exclude: 'nope' is no task or group of these runs; hf m holds all_of_arc, deeper, arc"),
        (["--exclude", "*"], "exclude: nothing is left of"),
        (["--metric", "nope=acc"], "metric: 'nope' is no task or group of these runs"),
        (["--metric", "gsm8k=bleu"], "metric: the samples of gsm8k have no number 'bleu'"),
        (["--metric", "gsm8k=f1:other"], "filter: the samples of gsm8k have no filter 'other'; they have strict-match, flex"),
        (["--metric", "gsm8k=f1,gsm8k=exact_match"], "metric: gsm8k has two, f1 and exact_match"),
        (["--metric", "=f1"], "metric: '=f1' is neither METRIC, METRIC:FILTER, TASK=METRIC nor"),
        (["--metric", "f1:"], "metric: 'f1:' is neither"),
        (["--metric", "gsm8k="], "metric: 'gsm8k=' is neither"),
        (["--metric", "exact_match,strict-match"], "give --metric exact_match --filter strict-match"),
        (["--metric", "acc", "--metric", "f1"], "metric: acc and f1 are two for all tasks"),
        (["--metric", "strict-match", "-t", "gsm8k"], "'strict-match' is a filter, so give --filter strict-match"),
        (["--metric", "exact_match"], "name one per task (TASK=METRIC), or leave the task out (--exclude)"),
    ],
)
def test_what_can_not_be_selected_is_one_sentence(tmp_path, capsys, options, words):
    a = make(tmp_path / "a")
    assert words in compared(capsys, a, a, *options)


@pytest.mark.parametrize(
    ("options", "metric", "won"),
    [
        ([], "exact_match", 0),
        (["--filter", "flexible-extract", "--tasks", "gsm8k"], "exact_match", 30),
        (["--metric", "gsm8k=exact_match:flexible-extract"], "exact_match", 30),
        (["--metric", "acc,gsm8k=exact_match:flexible-extract"], "exact_match", 30),
        (["--metric", "acc", "--metric", "gs*=exact_match:flexible-extract"], "exact_match", 30),
        (["--metric", "gs*=f1,gsm8k=exact_match:flexible-extract"], "exact_match", 30),
        (["--metric", "gsm8k=exact_match:flexible-extract,gs*=f1"], "exact_match", 30),
        (["--metric", "f1:flexible-extract", "--tasks", "gsm8k"], "f1", None),
    ],
)
def test_a_metric_and_a_filter_per_task(tmp_path, capsys, options, metric, won):
    a, b = make(tmp_path / "a", flexible=0), make(tmp_path / "b")
    rows = compared(capsys, a, b, *options)
    assert rows["gsm8k"]["metric"] == metric and rows["gsm8k"]["only_candidate_right"] == won
    if len(rows) > 1:
        assert rows["arc"]["metric"] == "acc"


def test_the_api_parses_what_the_commands_take():
    found = Selection.parse("a,b", ["c", "d"], ["acc", "t=f1:x"], "none")
    assert found == Selection(("a", "b"), ("c", "d"), (Wanted("", "acc", None), Wanted("t", "f1", "x")), "none")
    groups = {"g": ["t", "u"]}
    assert found.for_task("t", ["t", "u"], groups) == Wanted("t", "f1", "x")
    assert found.for_task("u", ["t", "u"], groups) == Wanted("u", "acc", "none")
    by_group = Selection.parse(metric="acc,g=f1,u=em")
    assert [by_group.for_task(t, ["t", "u", "v"], groups).metric for t in "tuv"] == ["f1", "em", "acc"]
    with pytest.raises(AdaInferError, match=r"^metric: "):
        Selection.parse(metric="acc,f1")


def test_check_and_report_select_too_and_the_config_file_knows_the_keys(tmp_path, capsys):
    a, b = make(tmp_path / "a", flexible=1), make(tmp_path / "b", flexible=0)
    both = ["check", "--baseline", str(a), "--candidate", str(b), "--max-drop", "0.2", "--format", "json"]
    assert main([*both, "--metric", "gsm8k=exact_match:flexible-extract"]) == 1
    assert main([*both, "--metric", "gsm8k=exact_match:strict-match", "--tasks", "gsm8k"]) == 0
    capsys.readouterr()
    for keys in ("metric: gsm8k=exact_match:flexible-extract\ntasks: gsm8k\n",
                 "metric: [acc, 'gsm8k=exact_match:flexible-extract']\ntasks: [gsm8k, arc]\nexclude: [arc]\n"):  # fmt: skip
        (tmp_path / "gate.yaml").write_text(keys)
        assert main([*both, "--config", str(tmp_path / "gate.yaml")]) == 1
        assert json.loads(capsys.readouterr().out)["documents"] == 30
    (tmp_path / "gate.yaml").write_text("tasks: [gsm8k, 3]\n")
    assert main([*both, "--config", str(tmp_path / "gate.yaml")]) == 2
    assert "tasks is ['gsm8k', 3]; it takes a text or a list of texts" in capsys.readouterr().err
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    assert main(["report", str(a), "--tasks", "gsm8k,sst2", "--exclude", "sst2", "-o", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "index.html").read_text()
    assert "gsm8k" in page and "sst2" not in page


def test_the_tasks_that_run_are_those_compared_with_a_baseline_that_holds_more(tmp_path, capsys, monkeypatch):
    a, b = make(tmp_path / "a", flexible=1), make(tmp_path / "b", flexible=0, drop=("arc", "sst2"))
    monkeypatch.setattr(running, "run_both", lambda *args, baseline=None, **options: running.Made(baseline or str(b), str(b)))
    knows = {"__init__": lambda self, **options: None, "match_tasks": lambda self, names: names,
             "all_tasks": ["a_tag_of_lm_eval", "gsm8k"]}  # fmt: skip
    knowing_all = type("Manager", (), knows)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", knowing_all)
    run = ["check", "--run", "--model_args", "pretrained=m", "--max-drop", "0.2", "--format", "json"]
    assert main([*run, "--tasks", "a_tag_of_lm_eval", "--baseline", str(a)]) == 0
    assert [g["task"] for g in json.loads(capsys.readouterr().out)["guards"]] == ["arc_easy", "gsm8k"]
    assert main([*run, "--tasks", "a_tag_of_lm_eval", "--exclude", "gsm8k"]) in (0, 3)
    assert json.loads(capsys.readouterr().out)["documents"] == 20


def test_names_that_lm_eval_does_not_know_are_refused_before_anything_runs(tmp_path, capsys, monkeypatch, only_our_tasks):
    monkeypatch.setattr(running, "run_both", lambda *args, **options: pytest.fail("it ran"))
    run = ["check", "--run", "--model_args", "pretrained=m", "--tasks", "adainfer_demo", "--max-drop", "0.2"]
    for option in (["--exclude", "adainfer_demo_fcat"], ["--metric", "adainfer_demo_fcat=acc"]):
        assert main([*run, *option]) == 2
        assert "'adainfer_demo_fcat' in --exclude, --metric or --cluster is no task" in capsys.readouterr().err


def test_a_folder_of_several_runs_names_their_paths_and_times(tmp_path, capsys):
    a = write(tmp_path / "a", {"t": [0, 0]}, date="2026-01-01T10-20-30.5")
    write(tmp_path / "a", {"t": [1, 1]}, date="2026-02-01T01-02-03.5")
    (note,) = runs.load(a).notes
    first, second = (f"{a}/m/results_{x}.json of {y}" for x, y in (
        ("2026-01-01T10-20-30.5", "2026-01-01 10:20:30"), ("2026-02-01T01-02-03.5", "2026-02-01 01:02:03")))  # fmt: skip
    assert note.startswith(f"2 runs are in {a} ({second}; {first}); the newest is taken")
    assert main(["check", "--baseline", str(a), "--candidate", str(a), "--max-drop", "0.1"]) == 3
    assert note in capsys.readouterr().out
    shutil.copytree(a / "m", a / "other")
    for file in (a / "other").glob("*2026-02*"):
        file.unlink()
    said = compared(capsys, a, a)
    assert "holds runs of 2 models" in said
    for time in ("other/results_2026-01-01T10-20-30.5.json of 2026-01-01 10:20:30", second, first):
        assert time in said
