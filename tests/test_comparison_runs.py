"""Reading and comparing runs: synthetic ones for what goes wrong, real ones of ``hf`` and ``adainfer`` for what works."""

from __future__ import annotations

import csv
import io
import json
import shutil

import numpy as np
import pytest
from helpers.synthetic_runs import DATE, flips, sample, sha, write
from helpers.tasks import our_tasks
from lm_eval import simple_evaluate
from lm_eval.loggers import EvaluationTracker

from lm_eval_adainfer import paths, statistics
from lm_eval_adainfer.cli.main import main
from lm_eval_adainfer.comparison import compare, gate, matching, runs
from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.output import comparisons

TASKS = ["adainfer_demo_fact", "adainfer_demo_topic"]


@pytest.fixture(scope="session")
def real(tmp_path_factory):
    """Runs of the demo model on disk, as the lm_eval command writes them: hf, stopper=none and svm."""
    where = tmp_path_factory.mktemp("runs")
    manager = our_tasks()
    for name, model, args in (
        ("hf", "hf", {"pretrained": str(paths.demo_model())}),
        ("none", "adainfer", {"pretrained": "adainfer-demo", "stopper": "none"}),
        ("svm", "adainfer", {"pretrained": "adainfer-demo", "stopper": "svm"}),
    ):
        tracker = EvaluationTracker(output_path=str(where / name))
        results = simple_evaluate(
            model=model, model_args={**args, "dtype": "float32"}, tasks=TASKS, limit=20, batch_size=8, device="cpu",
            bootstrap_iters=0, task_manager=manager, log_samples=True, evaluation_tracker=tracker,
        )  # fmt: skip
        samples = results.pop("samples")
        tracker.save_results_aggregated(results=results, samples=samples)
        for task, found in samples.items():
            tracker.save_results_samples(task_name=task, samples=found)
    return where


def test_real_runs_compare_as_their_results_say(real):
    hf, svm = runs.load(real / "hf"), runs.load(real / "svm")
    found = compare.compare(hf, svm)
    by_name = {row.name: row for row in found.rows}
    for task in TASKS:
        for run, side in ((hf, "baseline"), (svm, "candidate")):
            results = json.loads(run.source.read_text())["results"][task]
            assert getattr(by_name[task], side) == pytest.approx(results["acc,none"])
        assert by_name[task].exit_layer == pytest.approx(results["exit_layer,none"])
        assert by_name[task].flops_ratio_total == pytest.approx(results["flops_ratio_total,none"])
    pooled = by_name[compare.POOLED]
    assert pooled.documents == 40 and pooled.only_baseline_right > 0
    assert pooled.difference == pytest.approx((pooled.only_candidate_right - pooled.only_baseline_right) / 40)
    assert pooled.agreement < 1
    assert list(found.seconds) == ["in all, loading included"]
    assert next(iter(compare.compare(runs.load(real / "none"), svm).seconds)) == "in the model"


def test_a_real_dense_run_reproduces_stock_hf_and_an_early_one_fails_the_gate(real, capsys):
    both = ["check", "--baseline", str(real / "hf"), "--candidate"]
    assert main([*both, str(real / "none"), "--reproduces"]) == 0
    assert main([*both, str(real / "none"), "--max-drop", "0.2"]) == 0
    assert main([*both, str(real / "svm"), "--max-drop", "0.01"]) in (1, 3)
    capsys.readouterr()


def test_every_format_says_the_same(tmp_path, capsys):
    first, second = flips(200, 9, 3)
    names = [str(write(tmp_path / "a", {"t|1_&": first})), str(write(tmp_path / "b=%", {"t|1_&": second}, exit_layer=6))]
    drawn = {}
    for form in comparisons.FORMATS:
        assert main(["compare", *names, "--format", form]) == 0
        drawn[form] = capsys.readouterr().out
    row = json.loads(drawn["json"])[0]["rows"][0]
    assert row["difference"] == pytest.approx(-0.03) and row["p"] == statistics.mcnemar_p(9, 3)
    interval = statistics.tango_interval(3, 9, 200)
    assert (row["lower"], row["upper"]) == (interval.lower, interval.upper)
    (line,) = csv.DictReader(io.StringIO(drawn["csv"]))
    assert float(line["lower"]) == row["lower"] and line["name"] == "t|1_&"
    shown = f"[{interval.lower:+.4f}, {interval.upper:+.4f}]"
    assert all(shown in drawn[form] for form in ("table", "markdown", "latex"))
    assert "t\\|1_&amp;" in drawn["markdown"] and "t|1\\_\\&" in drawn["latex"] and "9/3" in drawn["table"]
    assert drawn["latex"].count("\\begin{tabular}") == drawn["latex"].count("\\end{tabular}") == 1


def test_a_file_for_the_output_and_more_than_two_runs(tmp_path, capsys):
    names = [str(write(tmp_path / name, {"t": [1, 0, 1]})) for name in "abc"]
    assert main(["compare", *names, "--format", "json", "-o", str(tmp_path / "out.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert [c["between_candidates"] for c in found] == [False, False, True]
    assert main(["compare", names[0]]) == 2
    assert "one run has nothing to be compared with" in capsys.readouterr().err


def test_57_subjects_make_groups_and_nested_groups(tmp_path):
    subjects = {f"mmlu_s{i}": flips(10 + i % 3, 1, i % 2) for i in range(57)}
    names = list(subjects)
    groups = {"mmlu": ["mmlu_stem", "mmlu_other"], "mmlu_stem": names[:19], "mmlu_other": names[19:]}
    pair = [
        runs.load(write(tmp_path / name, {t: s[side] for t, s in subjects.items()}, groups=groups))
        for side, name in enumerate(("a", "b"))
    ]
    rows = {row.name: row for row in compare.compare(*pair).rows}
    assert len(rows) == 57 + 3 + 1
    total = sum(10 + i % 3 for i in range(57))
    assert rows["mmlu"].documents == rows[compare.POOLED].documents == total
    assert rows["mmlu_stem"].documents == sum(10 + i % 3 for i in range(19))
    assert rows["mmlu"].only_baseline_right == 57 and rows["mmlu"].only_candidate_right == 28
    assert compare.pool_of(pair[0], "mmlu") == names


def test_a_metric_between_0_and_1_gets_a_permutation_test(tmp_path):
    a = write(tmp_path / "a", {"t": [sample("t", i, x, metric="f1") for i, x in enumerate([0.5, 0.75, 1.0, 0.2])]})
    b = write(tmp_path / "b", {"t": [sample("t", i, x, metric="f1") for i, x in enumerate([0.5, 0.5, 0.5, 0.1])]})
    (row,) = compare.compare(runs.load(a), runs.load(b)).rows
    assert row.metric == "f1" and row.test == "sign-flip permutation" and row.p == pytest.approx(2 / 8)
    assert row.difference == pytest.approx(-0.2125) and row.only_baseline_right is None


def test_answers_agree_where_the_same_choice_or_text_was_given(tmp_path):
    def text(i, answer):
        return {**sample("t", i, 1, metric="exact_match"), "filtered_resps": [answer], "resps": [[answer]]}

    a = write(tmp_path / "a", {"t": [text(i, x) for i, x in enumerate(["4", "5", "6"])]})
    b = write(tmp_path / "b", {"t": [text(i, x) for i, x in enumerate(["4", "five", "6"])]})
    (row,) = compare.compare(runs.load(a), runs.load(b)).rows
    assert row.metric == "exact_match" and row.agreement == pytest.approx(2 / 3)


def refused(tmp_path, capsys, first, second, *extra):
    assert main(["compare", str(first), str(second), *extra]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in error if line.startswith("adainfer: error: ")]) == 1
    return error[-1]


def test_runs_that_did_not_do_the_same_are_refused_with_the_reason(tmp_path, capsys):
    base = write(tmp_path / "base", {"t": [1, 0, 1, 1]})
    for name, words, tasks, options in (
        ("half", "4 and 2 documents, and 2 are in one of them only (the first is 2)", {"t": [1, 0]}, {}),
        ("shots", "another number of shots (0 and 5)", {"t": [1, 0, 1, 1]}, {"shots": 5}),
        ("version", "another version (1.0 and 2.0)", {"t": [1, 0, 1, 1]}, {"version": 2.0}),
        ("tasks", "(u in m", {"t": [1, 0, 1, 1], "u": [1]}, {}),
        ("prompt", "asked with another prompt", {"t": [sample("t", i, 1, prompt=f"! {i}") for i in range(4)]}, {}),
        ("texts", "is another text in each", {"t": [sample("x", i, 1) for i in range(4)]}, {}),
        ("filter", "another filter (none and strict)", {"t": [{**sample("t", i, 1), "filter": "strict"} for i in range(4)]}, {}),
        ("metric", "has no number 'acc'|have no number 'acc'", {"t": [sample("t", i, 1, metric="f1") for i in range(4)]}, {}),
    ):
        other = write(tmp_path / name, tasks, **({"model": "m"} | options))
        error = refused(tmp_path, capsys, base, other)
        if name == "tasks":
            assert "1 of the tasks are in one of them only (u in" in error
        else:
            assert any(w in error for w in words.split("|")), (name, error)
    assert main(["compare", str(base), str(tmp_path / "prompt"), "--other-prompts"]) == 0


def damage(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("cut results", "is damaged, it is no JSON"),
        ("results list", "it has no 'results'"),
        ("results configs", "'configs' is a list, not a mapping"),
        ("binary", "is no text"),
        ("cut samples", "line 3, is damaged, it is no JSON"),
        ("lost line", "holds 2 documents, but the results say 3"),
        ("no samples", "run lm_eval with --log_samples"),
        ("empty samples", "is empty"),
        ("doc_id text", "it has no doc_id"),
        ("doubled", "repeats document 0"),
        ("nan", "acc of document 0 is nan"),
        ("huge", "acc of document 0 is inf"),
        ("text metric", "have no number 'acc' per document"),
        ("filter number", "names the filter 3"),
        ("nested", "is damaged, it is no JSON"),
        ("missing", "does not exist"),
        ("empty folder", "holds no results_*.json"),
        ("two models", "holds runs of 2 models"),
        ("samples given", "holds samples; give the results_*.json"),
    ],
)
def test_damaged_input_is_one_sentence(tmp_path, capsys, what, words):
    good = write(tmp_path / "good", {"t": [1, 0, 1]})
    bad = write(tmp_path / "bad", {"t": [1, 0, 1]})
    results, samples = bad / "m" / f"results_{DATE}.json", bad / "m" / f"samples_t_{DATE}.jsonl"
    lines = samples.read_text().splitlines(keepends=True)
    target = bad
    if what == "cut results":
        results.write_text(results.read_text()[:200])
    elif what == "results list":
        results.write_text("[1]")
    elif what == "results configs":
        results.write_text(json.dumps({**json.loads(results.read_text()), "configs": ["t"]}))
    elif what == "binary":
        results.write_bytes(b"\x80\x04\xff\xfe")
    elif what == "cut samples":
        samples.write_text("".join(lines)[:-40])
    elif what == "lost line":
        samples.write_text("".join(lines[:2]))
    elif what == "no samples":
        samples.unlink()
    elif what == "empty samples":
        samples.write_text("")
    elif what == "doc_id text":
        damage(samples, '"doc_id": 0', '"doc_id": "0"')
    elif what == "doubled":
        samples.write_text(lines[0] * 2)
    elif what == "nan":
        damage(samples, '"acc": 1', '"acc": NaN')
    elif what == "huge":
        damage(samples, '"acc": 1', '"acc": 1' + "0" * 400)
    elif what == "text metric":
        samples.write_text("".join(lines).replace('"acc": 1', '"acc": "1"').replace('"acc": 0', '"acc": "0"'))
    elif what == "filter number":
        damage(samples, '"filter": "none"', '"filter": 3')
    elif what == "nested":
        samples.write_text("[" * 100_000)
    elif what == "missing":
        shutil.rmtree(bad)
    elif what == "empty folder":
        results.unlink()
    elif what == "two models":
        write(bad, {"t": [1, 0, 1]}, model="other")
    elif what == "samples given":
        target = samples
    assert words in refused(tmp_path, capsys, good, target)


def test_of_several_runs_in_a_folder_the_newest_is_taken_and_said(tmp_path, capsys):
    a = write(tmp_path / "a", {"t": [0, 0]}, date="2026-01-01T00-00-00.1")
    write(tmp_path / "a", {"t": [1, 1]}, date="2026-02-01T00-00-00.1")
    found = runs.load(a)
    assert [d.metrics["acc"] for d in found.tasks["t"].documents.values()] == [1, 1]
    assert "2 runs" in found.notes[0] and "2026-02-01" in found.notes[0]
    old = runs.load(tmp_path / "a" / "m" / "results_2026-01-01T00-00-00.1.json")
    assert [d.metrics["acc"] for d in old.tasks["t"].documents.values()] == [0, 0]


def test_of_several_filters_the_first_is_taken_unless_one_is_named(tmp_path):
    rows = [{**sample("t", i, x), "filter": f} for f, x in (("strict", 0), ("flexible", 1)) for i in range(3)]
    place = write(tmp_path / "a", {"t": rows})
    results = place / "m" / f"results_{DATE}.json"
    damage(results, '"effective": 6', '"effective": 3')
    assert [d.metrics["acc"] for d in runs.load(place).tasks["t"].documents.values()] == [0, 0, 0]
    assert "--filter" in runs.load(place).notes[0]
    assert [d.metrics["acc"] for d in runs.load(place, filter="flexible").tasks["t"].documents.values()] == [1, 1, 1]


def test_samples_of_older_lm_eval_are_read(tmp_path):
    """Before 0.4.3: results.json, one indented array per task, no hashes, no filter, no list of metrics."""
    new = write(tmp_path / "new", {"arc_easy": [1, 0, 1], "arc": [1, 1]})
    old = tmp_path / "old"
    old.mkdir()
    for task, values in (("arc_easy", [1, 1, 1]), ("arc", [1, 1])):
        rows = []
        for i, value in enumerate(values):
            row = sample(task, i, value)
            arguments = [[a["arg_0"], a["arg_1"]] for a in row["arguments"].values()]
            keep = {k: row[k] for k in ("doc_id", "doc", "target", "filtered_resps", "acc")}
            rows.append({**keep, "arguments": arguments})
        (old / f"pretrained=m_{task}.jsonl").write_text(json.dumps(rows, indent=2))
    (old / "results.json").write_text(json.dumps({
        "results": {"arc_easy": {"acc,none": 1.0}, "arc": {"acc,none": 1.0}},
        "configs": {"arc_easy": {"num_fewshot": 0}, "arc": {"num_fewshot": 0}},
        "versions": {"arc_easy": 1.0, "arc": 1.0}, "config": {"model": "hf", "model_args": "pretrained=org/m,dtype=float16"},
    }))  # fmt: skip
    found = runs.load(old)
    assert found.label == "hf m"
    rows = {r.name: r for r in compare.compare(runs.load(new), found).rows}
    assert rows["arc_easy"].only_candidate_right == 1 and rows["arc_easy"].agreement == pytest.approx(2 / 3)
    assert rows["arc"].documents == 2


def test_without_doc_hash_and_doc_documents_can_not_be_matched(tmp_path, capsys):
    rows = [{k: v for k, v in sample("t", 0, 1).items() if k not in ("doc", "doc_hash")}]
    a = write(tmp_path / "a", {"t": rows})
    assert "neither doc_hash nor doc" in refused(tmp_path, capsys, a, a)


def test_doc_hash_is_recomputed_as_lm_eval_makes_it(real, tmp_path):
    """Written for lm-eval 0.4.13."""
    for file in (real / "svm").rglob("samples_*.jsonl"):
        for line in file.read_text().splitlines()[:3]:
            row = json.loads(line)
            assert row["doc_hash"] == sha(json.dumps(row["doc"], indent=2, ensure_ascii=False))


@pytest.mark.parametrize("name", ["../../etc/passwd", "a/b", "x" * 5000, "nul\0"])
def test_tasks_with_names_that_no_file_has(tmp_path, capsys, name):
    good, bad = write(tmp_path / "good", {"t": [1]}), write(tmp_path / "bad", {"t": [1]})
    results = bad / "m" / f"results_{DATE}.json"
    content = json.loads(results.read_text())
    content["configs"][name] = {}
    results.write_text(json.dumps(content))
    assert "has no samples beside it for task" in refused(tmp_path, capsys, good, bad)


def test_the_terminal_is_not_given_orders_by_names(tmp_path, capsys):
    run = write(tmp_path / "a", {"t": [1]}, kind="adainfer", stopper="\x1b[2Jgap")
    assert main(["compare", str(run), str(run)]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_names_of_runs(tmp_path):
    a = write(tmp_path / "a", {"t": [1]}, kind="adainfer", stopper="gap:0.8")
    assert [r.label for r in runs.load_all([str(a), str(a), f"mine={a}"])] == [
        "adainfer gap:0.8",
        "adainfer gap:0.8 (2)",
        "mine",
    ]


def test_100_000_documents(tmp_path, capsys):
    """Correctness only: a time would depend on the machine."""
    n, both = 50_000, flips(50_000, 300, 280)
    for name, scores in zip("ab", both, strict=True):
        write(tmp_path / name, {"t": [1], "u": [1]})
        results = tmp_path / name / "m" / f"results_{DATE}.json"
        results.write_text(results.read_text().replace('"effective": 1', f'"effective": {n}'))
        for task in "tu":
            right, wrong = (json.dumps(sample(task, 10**9, x)).replace("1000000000", "%d") for x in (1, 0))
            with (tmp_path / name / "m" / f"samples_{task}_{DATE}.jsonl").open("w") as file:
                file.writelines((right if x else wrong).replace("%d", str(i)) + "\n" for i, x in enumerate(scores))
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--format", "json"]) == 0
    pooled = json.loads(capsys.readouterr().out)[0]["rows"][-1]
    assert pooled["documents"] == 2 * n and (pooled["only_baseline_right"], pooled["only_candidate_right"]) == (600, 560)
    drops = [matching.Pairs(t, "acc", False, *(np.array(x, float) for x in both), []) for t in "tu"]
    assert gate.judge(drops, ["t", "u"], 0.01).status == "pass"


def test_a_run_without_any_task_number_names_the_sentence(tmp_path):
    with pytest.raises(AdaInferError, match="corpus metrics can't be paired"):
        run = runs.load(write(tmp_path / "a", {"t": [sample("t", 0, [1, 2], metric="perplexity")]}))
        compare.compare(run, run)
