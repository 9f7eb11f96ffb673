"""Runs of Inspect and HELM: recorded files of the real tools are compared document by document, damaged ones refused."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import pytest
from helpers.refusals import refused
from hypothesis import given
from hypothesis import strategies as st

from lm_eval_adainfer.cli.main import main
from lm_eval_adainfer.comparison import compare, elsewhere, helm, inspect_logs, runs

RECORDED = Path(__file__).parent / "recorded"
INSPECT, HELM = RECORDED / "inspect", RECORDED / "helm"


def only_file(folder: Path, pattern: str = "*") -> Path:
    (found,) = [f for f in folder.rglob(pattern) if f.is_file()]
    return found


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
    assert {n: t.documents for n, t in found.tasks.items()} == {n: t.documents for n, t in early.tasks.items()}
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
