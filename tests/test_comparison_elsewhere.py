"""Runs of Inspect, HELM and lighteval: recorded files of the real tools are compared document by document, damaged ones refused."""

from __future__ import annotations

import datetime
import decimal
import json
import shutil
import zipfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from helpers.refusals import refused
from hypothesis import given
from hypothesis import strategies as st

from lm_eval_adainfer.cli.main import main
from lm_eval_adainfer.comparison import compare, elsewhere, helm, inspect_logs, lighteval, runs

RECORDED = Path(__file__).parent / "recorded"
INSPECT, HELM, LIGHTEVAL = RECORDED / "inspect", RECORDED / "helm", RECORDED / "lighteval"


def only_file(folder: Path, pattern: str = "*") -> Path:
    (found,) = [f for f in folder.rglob(pattern) if f.is_file()]
    return found


def documents(run: runs.Run) -> dict[str, dict]:
    return {name: task.documents for name, task in run.tasks.items()}


def edited(file: Path, change) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


# ------------------------------------------------------------------------------------------------ Inspect
def test_an_inspect_folder_has_a_task_for_every_log_with_its_documents_as_logged():
    dense = runs.load(INSPECT / "dense")
    assert list(dense.tasks) == ["sums", "letters"] and dense.label == "inspect model"
    for name, task in dense.tasks.items():
        log = json.loads(only_file(INSPECT / "dense", f"*_{name}_*").read_text())
        for scorer, scale in task.scales.items():
            (reported,) = [one["metrics"]["accuracy"]["value"] for one in log["results"]["scores"] if one["name"] == scorer]
            values = [scale.value(document, scorer) for document in task.documents.values()]
            assert sum(values) / len(values) == pytest.approx(reported) and not scale.lower_is_better
        assert len(task.documents) == len({sample["id"] for sample in log["samples"]})
    assert list(dense.tasks["sums"].scales) == ["match", "includes"]


def test_two_inspect_runs_are_compared_document_by_document(capsys):
    rows = {row.name: row for row in compare.compare(runs.load(INSPECT / "dense"), runs.load(INSPECT / "early")).rows}
    # of 4 sums asked twice, one is wrong in one epoch and one in the other; of 3 letters the second is wrong
    assert rows["sums"].difference == pytest.approx(-1 / 4) and rows["sums"].documents == 4
    assert rows["letters"].difference == pytest.approx(-1 / 3) and rows["letters"].only_baseline_right == 1
    both = ["check", "--baseline", f"{INSPECT}/dense", "--candidate", f"{INSPECT}/early"]
    assert main([*both, "--max-drop", "0.9"]) in (0, 3) and "letters" in capsys.readouterr().out
    assert main(["check", "--baseline", f"{INSPECT}/dense", "--candidate", f"{INSPECT}/dense", "--max-drop", "0.9"]) == 0
    assert main(["compare", f"a={INSPECT}/dense", f"b={INSPECT}/early"]) == 0
    assert "sums" in capsys.readouterr().out


def packed(log: Path, file: Path, method=zipfile.ZIP_DEFLATED) -> Path:
    """A log in Inspect's other format, packed as its releases did before they took to zstandard."""
    content = json.loads(log.read_text())
    file.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(file, "w", method) as archive:
        for sample in content.pop("samples"):
            archive.writestr(f"samples/{sample['id']}_epoch_{sample['epoch']}.json", json.dumps(sample))
        archive.writestr("header.json", json.dumps(content))
        archive.writestr("summaries.json", "[")  # is not read
    return file


def test_both_formats_of_a_log_are_the_same_run(tmp_path):
    for log in (INSPECT / "dense").iterdir():
        packed(log, tmp_path / "run" / log.with_suffix(".eval").name)
    one, other = runs.load(INSPECT / "dense"), runs.load(tmp_path / "run")
    for name, task in one.tasks.items():
        assert other.tasks[name].documents == task.documents and other.tasks[name].scales == task.scales
    alone = runs.load(next((tmp_path / "run").iterdir()))
    assert len(alone.tasks) == 1


def test_a_log_that_this_python_can_not_unpack_names_the_command_that_converts_it():
    log = only_file(INSPECT / "packed")
    try:
        with zipfile.ZipFile(log) as archive:
            archive.read("header.json")
    except NotImplementedError:
        refused(lambda: runs.load(log), "run: ", "zstandard", "inspect log convert --to json")
    else:  # Python 3.14
        assert list(runs.load(log).tasks) == ["sums"]


def test_of_several_logs_of_a_task_the_newest_is_taken_and_it_is_said(tmp_path):
    for name, day in (("dense", "26"), ("early", "27")):
        (tmp_path / name).mkdir()
        for log in (INSPECT / name).iterdir():
            shutil.copy(log, tmp_path / name / log.name.replace("2026-11-26", f"2026-11-{day}"))
    found = runs.load(tmp_path)
    early = runs.load(INSPECT / "early")
    assert documents(found) == documents(early)
    assert any("2 logs" in note and "newest" in note for note in found.notes)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda log: log.update(status="cancelled"), ["unfinished", "cancelled"]),
        (lambda log: log.pop("samples"), ["no log of Inspect with samples"]),
        (lambda log: log.update(samples={}), ["no log of Inspect with samples"]),
        (lambda log: log.update(eval=[]), ["no log of Inspect"]),
        (lambda log: log["samples"].append(3), ["without an id"]),
        (lambda log: log["samples"][0].pop("id"), ["without an id"]),
    ],
)
def test_a_damaged_inspect_log_is_one_sentence(change, words, tmp_path):
    shutil.copytree(INSPECT / "dense", tmp_path / "run")
    edited(only_file(tmp_path, "*_letters_*"), change)
    refused(lambda: runs.load(tmp_path / "run"), "run", *words)


def test_what_is_no_archive_is_one_sentence(tmp_path):
    file = tmp_path / "2026-11-26T02-03-18-00-00_sums_M3GkXbVE3fmFjaaZBzyGLL.eval"
    file.write_bytes(b"PK nothing")
    refused(lambda: runs.load(file), "run", "damaged")


def test_an_archive_that_unpacks_to_too_much_is_not_unpacked(tmp_path, monkeypatch):
    log = only_file(INSPECT / "dense", "*_sums_*")
    file = packed(log, tmp_path / log.with_suffix(".eval").name)
    monkeypatch.setattr(inspect_logs, "MOST_BYTES", 1000)
    refused(lambda: runs.load(file), "run", "unpacks to more")
    monkeypatch.setattr(elsewhere, "MOST_BYTES", 1000)
    refused(lambda: runs.load(log), "run", "GiB")


def test_logs_of_two_models_are_no_run(tmp_path):
    shutil.copytree(INSPECT / "dense", tmp_path / "run")
    edited(only_file(tmp_path, "*_sums_*"), lambda log: log["eval"].update(model="another/model"))
    refused(lambda: runs.load(tmp_path / "run"), "run", "2 models", "another/model, mockllm/model")


@pytest.mark.parametrize(
    ("value", "number", "directed"),
    [("C", 1, True), ("I", 0, True), ("P", 0.5, True), ("N", 0, True), (True, 1, True), ("no", 0, True), ("Yes", 1, True),
     (0.25, 0.25, False), ("3", 3, False), ("so-so", None, False), (None, None, False), ([1], None, False)],
)  # fmt: skip
def test_grades_are_numbers_as_inspect_counts_them(value, number, directed):
    better = {}
    assert inspect_logs._grades({"scores": {"s": {"value": value}}}, better) == {"s": number}
    assert better == ({"s": True} if directed else {})
    assert inspect_logs._grades({"scores": {"s": {"value": {"a": value}}}}, {}) == {"s_a": number}


@given(st.recursive(st.one_of(st.none(), st.booleans(), st.floats(), st.text(max_size=3)),
                    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3))))  # fmt: skip
def test_scores_of_any_form_are_read_or_left_out(scores):
    found = inspect_logs._grades({"scores": scores}, {})
    assert all(isinstance(name, str) and (number is None or isinstance(number, float)) for name, number in found.items())


# ------------------------------------------------------------------------------------------------ HELM
def test_a_helm_run_is_a_task_with_its_instances():
    run = runs.load(HELM)
    (task,) = run.tasks.values()
    assert task.name == "synthetic_reasoning:mode=pattern_match" and run.label == "helm simple_model1"
    stats = json.loads((HELM / "synthetic_reasoning" / "per_instance_stats.json").read_text())
    by_id = {int(row["instance_id"].removeprefix("id")): row for row in stats}
    assert set(task.documents) == set(by_id) and task.shots == "5"
    for number, document in task.documents.items():
        for stat in by_id[number]["stats"]:
            if stat["name"]["name"] in task.scales:
                assert document.metrics[stat["name"]["name"]] == stat["mean"]
        assert isinstance(document.answer, tuple)
    assert next(iter(task.scales)) == "exact_match" and not any("num_" in name for name in task.scales)


def test_two_helm_runs_are_compared_and_perturbed_instances_are_left_out(tmp_path):
    shutil.copytree(HELM, tmp_path / "run")
    file = only_file(tmp_path, "per_instance_stats.json")

    def better(rows):
        for stat in rows[0]["stats"]:
            if stat["name"]["name"] == "exact_match":
                stat["mean"] = 1.0
        rows.append({**rows[1], "perturbation": {"name": "typos"}, "stats": []})

    edited(file, better)
    (row,) = [r for r in compare.compare(runs.load(HELM), runs.load(tmp_path / "run")).rows if r.name != compare.POOLED]
    assert row.documents == 6 and row.difference == pytest.approx(1 / 6) and row.only_candidate_right == 1


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("run_spec.json", lambda spec: spec.update(name=7), ["names no run"]),
        ("per_instance_stats.json", lambda rows: rows.append({}), ["without an id"]),
    ],
)
def test_a_damaged_helm_run_is_one_sentence(name, change, words, tmp_path):
    shutil.copytree(HELM, tmp_path / "run")
    edited(only_file(tmp_path, name), change)
    refused(lambda: runs.load(tmp_path / "run"), "run", *words)


def test_a_suite_of_two_models_is_no_run(tmp_path):
    for n, model in enumerate(("one", "two")):
        shutil.copytree(HELM / "synthetic_reasoning", tmp_path / model)
        edited(tmp_path / model / "run_spec.json", lambda spec, n=n: spec.update(name=f"t:mode=a,model=m{n}"))
    refused(lambda: helm.read(tmp_path, "run"), "run", "2 models", "m0, m1")


@given(st.lists(st.one_of(st.integers(0, 10**6), st.text(max_size=4), st.integers(0, 99).map("id{}".format)), min_size=1))
def test_documents_have_numbers_of_their_own_in_every_order(ids):
    numbers = elsewhere.numbered(ids)
    assert set(numbers) == {str(one) for one in ids} and len(set(numbers.values())) == len(numbers)
    assert elsewhere.numbered(list(reversed(ids))) == numbers


# ------------------------------------------------------------------------------------------------ lighteval
DATE = "2026-11-26T07-19-18.495258"
NAMES = {"texts": "details_texts|0", "which": "details_numbers:which|1"}


def as_written(place: Path, name: str = "dense", date: str = DATE, model: str = "org/model") -> Path:
    """A recorded run in lighteval's folders and under its names."""
    details, results = place / "details" / model / date, place / "results" / model
    for folder in (details, results):
        folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(LIGHTEVAL / name / "results.json", results / f"results_{date}.json")
    for file, real in NAMES.items():
        shutil.copy(LIGHTEVAL / name / f"{file}.parquet", details / f"{real}_{date}.parquet")
    return place


def rewritten(file: Path, change) -> None:
    """A file of details with other rows."""
    rows = pyarrow.parquet.read_table(file).to_pylist()
    changed = change(rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows if changed is None else changed), file)


def test_a_lighteval_run_has_the_tasks_documents_and_metrics_that_it_reports(tmp_path):
    run = runs.load(as_written(tmp_path))
    assert run.label == "lighteval model" and set(run.tasks) == {"texts", "numbers:which"}
    reported = json.loads((LIGHTEVAL / "dense" / "results.json").read_text())["results"]
    for name, task in run.tasks.items():
        (full,) = [key for key in reported if key.rpartition("|")[0] == name]
        assert sorted(task.documents) == list(range(8)) and task.shots == full.rpartition("|")[2]
        for metric, scale in task.scales.items():
            values = [scale.value(document, metric) for document in task.documents.values()]
            assert sum(values) / 8 == pytest.approx(reported[full][metric])
        assert not task.undirected
    # a perplexity and a correlation are of all documents together, and stand in no document as a number
    assert set(run.tasks["texts"].scales) == {"em", "f1", "rouge1"}
    assert set(run.tasks["numbers:which"].scales) == {"acc", "em"}
    answers = {number: document.answer for number, document in run.tasks["numbers:which"].documents.items()}
    assert answers == {n: (n % 5 if n != 3 else 4) for n in range(8)}  # the model was told to be wrong about 3


def test_two_lighteval_runs_are_compared_document_by_document(tmp_path, capsys):
    dense, early = as_written(tmp_path / "dense"), as_written(tmp_path / "early", "early")
    rows = {row.name: row for row in compare.compare(runs.load(dense), runs.load(early)).rows}
    for name in ("texts", "numbers:which"):  # wrong about 3, and about 3, 5 and 6
        assert rows[name].documents == 8 and rows[name].difference == pytest.approx(-2 / 8)
        assert rows[name].only_baseline_right == 2 and rows[name].only_candidate_right == 0
        assert rows[name].agreement == pytest.approx(6 / 8)
    sides = ["check", "--baseline", str(dense), "--candidate"]
    assert main([*sides, str(dense), "--max-drop", "0.9"]) == 0
    assert main([*sides, str(early), "--max-drop", "0.9", "--metric", "em"]) in (0, 3)
    assert "numbers:which" in capsys.readouterr().out


def test_a_file_a_folder_of_one_time_and_the_output_folder_are_the_same_run(tmp_path):
    whole = runs.load(as_written(tmp_path))
    folder = tmp_path / "details" / "org" / "model" / DATE
    for place in (tmp_path / "details", folder):
        assert documents(runs.load(place)) == documents(whole)
    alone = runs.load(folder / f"{NAMES['texts']}_{DATE}.parquet")
    assert documents(alone) == {"texts": whole.tasks["texts"].documents}


def test_on_the_hub_results_lie_above_the_details(tmp_path):
    place = as_written(tmp_path / "run")
    hub = tmp_path / "hub"
    shutil.copytree(place / "details" / "org" / "model", hub)
    shutil.copy(place / "results" / "org" / "model" / f"results_{DATE}.json", hub)
    assert documents(runs.load(hub)) == documents(runs.load(place))


def test_of_several_lighteval_runs_the_newest_counts_and_it_is_said(tmp_path):
    as_written(tmp_path, "dense")
    as_written(tmp_path, "early", "2026-11-27T00-00-00")  # no microseconds, where there are none
    run, early = runs.load(tmp_path), runs.load(as_written(tmp_path / "alone", "early"))
    assert documents(run) == documents(early)
    assert any("2 files" in note and "newest" in note for note in run.notes)


@pytest.mark.parametrize("place", ["", "other"])
def test_details_of_two_models_or_outputs_are_no_run(place, tmp_path):
    as_written(tmp_path)
    as_written(tmp_path / place, "early", "2026-11-27T00-00-00", "org/other")
    refused(lambda: runs.load(tmp_path), "run", "2 models or outputs", "org/model", "org/other")


def test_other_few_shot_examples_are_refused_and_so_is_another_number_of_them(tmp_path):
    dense, other = runs.load(as_written(tmp_path / "dense")), as_written(tmp_path / "other")
    file = only_file(other, f"{NAMES['which']}_*")

    def shown_another(rows):
        for row in rows:
            row["doc"]["fewshot_samples"][0]["gold_index"] = 1

    rewritten(file, shown_another)
    refused(lambda: compare.compare(dense, runs.load(other)), "", "another prompt (other few-shot examples")
    file.rename(file.with_name(file.name.replace("|1_", "|2_")))
    refused(lambda: compare.compare(dense, runs.load(other)), "", "another number of shots (1 and 2)")
    # two numbers of shots in one run are two tasks
    shutil.copy(only_file(as_written(tmp_path / "again"), f"{NAMES['which']}_*"), file.parent)
    assert set(runs.load(other).tasks) == {"texts|0", "numbers:which|1", "numbers:which|2"}


def test_of_a_document_that_was_asked_twice_the_mean_counts(tmp_path):
    place = as_written(tmp_path)
    rewritten(only_file(place, f"{NAMES['texts']}_*"), lambda rows: [*rows, *({**r, "metric": {"em": 0.0}} for r in rows)])
    edited(only_file(place / "results"), lambda r: r["results"]["texts|0"].update(em=7 / 24))
    documents = runs.load(place).tasks["texts"].documents
    assert [documents[n].metrics["em"] for n in range(8)] == pytest.approx([0 if n == 3 else 1 / 3 for n in range(8)])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda file: file.write_bytes(b"PAR1 nothing PAR1"), ["damaged", "run it again"]),
        (lambda file: file.write_bytes(file.read_bytes()[:-500]), ["damaged"]),
        (lambda file: file.write_bytes(file.read_bytes().replace(b"Which", b"\xff\xfe\xfd\xfc\xfb")), ["damaged"]),
        (lambda file: rewritten(file, lambda rows: [{"example": "a", "metrics": {"em": 1}}]), ["since 0.11"]),
        (lambda file: rewritten(file, lambda rows: [{**r, "doc": {"query": "a"}} for r in rows]), ["without an id"]),
        (lambda file: rewritten(file, lambda rows: [{**r, "doc": "a"} for r in rows]), ["without an id"]),
        (lambda file: rewritten(file, lambda rows: [{**r, "doc": {"id": "1"}} for r in rows]), ["or a query"]),
        (lambda file: rewritten(file, lambda rows: rows[:0]), ["since 0.11"]),
    ],
)  # fmt: skip
def test_a_damaged_file_of_details_is_one_sentence(change, words, tmp_path):
    place = as_written(tmp_path)
    change(only_file(place, f"{NAMES['texts']}_*"))
    refused(lambda: runs.load(place), "run", *words)


def test_a_task_without_numbers_is_kept_apart(tmp_path):
    place = as_written(tmp_path)
    nothing = {"metric": None, "model_response": None}
    rewritten(only_file(place, f"{NAMES['texts']}_*"), lambda rows: [{**row, **nothing} for row in rows])
    found = compare.compare(runs.load(place), runs.load(place))
    assert [row.name for row in found.rows if row.name != compare.POOLED] == ["numbers:which"]
    assert any("texts is kept apart" in note and "no number per document" in note for note in found.notes)


@pytest.mark.parametrize("odd", [b"\xff", 0.5, None, ["a"], {"a": 1}, datetime.datetime(2026, 1, 1), decimal.Decimal(1)])
@pytest.mark.parametrize("field", ["choices", "gold_index", "instruction", "fewshot_samples"])
def test_a_document_may_hold_what_lighteval_never_writes(field, odd, tmp_path):
    place = as_written(tmp_path)
    value = [odd, odd] if field in ("choices", "fewshot_samples") else odd
    rewritten(only_file(place, f"{NAMES['which']}_*"), lambda rows: [{**r, "doc": {**r["doc"], field: value}} for r in rows])
    assert len(runs.load(place, prompts=True).tasks["numbers:which"].documents) == 8


def test_details_without_their_results_are_one_sentence(tmp_path):
    place = as_written(tmp_path)
    file = only_file(place / "results")
    file.write_text("[]")
    refused(lambda: runs.load(place), "run", "no results file of lighteval")
    file.unlink()
    refused(lambda: runs.load(place), "run", f"results_{DATE}.json", "give its --output-dir")


def test_details_that_unpack_to_too_much_are_not_unpacked(tmp_path, monkeypatch):
    place = as_written(tmp_path)
    file = only_file(place, f"{NAMES['texts']}_*")
    # one long text, of which a file needs a single copy for all of its rows
    row = {"doc": {"id": "1", "query": "a" * 90_000}, "metric": {"em": 1}, "model_response": {"text": ["b"]}}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row] * 2_000), file)
    monkeypatch.setattr(lighteval, "MOST_BYTES", 10**8)
    assert file.stat().st_size < 10**6
    refused(lambda: runs.load(place), "run", "unpacks to more than the 1 GiB")
    monkeypatch.setattr(lighteval, "MOST_BYTES", 1000)
    refused(lambda: runs.load(place), "run", "more than the 1 GiB")


values = st.one_of(st.none(), st.booleans(), st.integers(-(2**40), 2**40), st.floats(), st.text(max_size=3))


@given(st.dictionaries(st.text(min_size=1, max_size=3), st.one_of(values, st.lists(values, max_size=2), st.dictionaries(st.text(max_size=2), values)), max_size=4))  # fmt: skip
def test_metrics_of_any_form_are_numbers_or_left_out(metric):
    found = lighteval._metrics([{"metric": metric}, {"metric": None}, {}])
    numbers = {name: value for name, value in metric.items() if isinstance(value, (int, float)) and abs(float(value)) < float("inf")}
    assert found == {name: float(value) for name, value in numbers.items()}


@pytest.mark.parametrize(
    ("metrics", "better"),
    [
        ([{"metric_name": "acc", "higher_is_better": True}, {"metric_name": "ppl", "higher_is_better": False}], {"acc": True, "ppl": False}),
        ([{"metric_name": ["a", "b"], "higher_is_better": {"a": True, "b": False}}], {"a": True, "b": False}),
        ([{"metric_name": "acc"}, {"metric_name": 3, "higher_is_better": True}, 7, None], {}),
        ("acc", {}),
    ],
)  # fmt: skip
def test_which_way_is_better_is_read_from_the_tasks_metrics(metrics, better):
    assert lighteval._better(metrics) == better
