"""Metrics whose documents hold something else than the metric: each is judged right, or kept apart with its reason."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil

import numpy as np
import pytest
from helpers.synthetic_runs import DATE, sample, write
from lm_eval import simple_evaluate
from lm_eval.api.metrics import bits_per_byte, mean, nanmean, perplexity, weighted_perplexity
from lm_eval.api.registry import aggregation_registry
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager

from lm_eval_adainfer import paths, statistics
from lm_eval_adainfer.cli.main import main
from lm_eval_adainfer.comparison import compare, gate, matching, runs
from lm_eval_adainfer.errors import AdaInferError


def metric_run(folder, tasks, **options):
    """A run whose tasks map to (metric, aggregation or None, higher_is_better, values, reported value or None)."""
    rows = {t: [sample(t, i, v, metric=m) for i, v in enumerate(values)] for t, (m, _, _, values, _) in tasks.items()}
    place = write(folder, rows, **options)
    file = place / "m" / f"results_{DATE}.json"
    content = json.loads(file.read_text())
    for task, (metric, aggregation, higher, _, reported) in tasks.items():
        entry = {"metric": metric, **({"aggregation": aggregation} if aggregation else {})}
        content["configs"][task]["metric_list"] = [entry]
        content["higher_is_better"][task] = {} if higher is None else {metric: higher}
        if reported is not None:
            content["results"][task][f"{metric},none"] = reported
    file.write_text(json.dumps(content))
    return place


def verdict(capsys, baseline, candidate, *extra):
    code = main(["check", "--baseline", str(baseline), "--candidate", str(candidate), "--format", "json", *extra])
    out = capsys.readouterr()
    return code, json.loads(out.out) if code != 2 else out.err.strip().splitlines()[-1]


def likelihoods(cost, n=80, seed=0):
    """Log-likelihoods of n documents, so that perplexity is exp(cost)."""
    x = -cost * np.random.default_rng(seed).uniform(0.5, 1.5, n)
    return (x - x.mean() - cost).tolist()


@pytest.mark.parametrize("declared", ["perplexity", None])
def test_perplexity_is_judged_in_nats_and_the_right_way_round(tmp_path, capsys, declared):
    made = {
        name: metric_run(tmp_path / name, {"t": ("perplexity", declared, False, values, perplexity(values))})
        for name, values in (("low", likelihoods(math.log(1.06))), ("high", likelihoods(math.log(3.77), seed=1)))
    }
    code, found = verdict(capsys, made["low"], made["high"], "--metric", "perplexity", "--max-drop", "0.1")
    assert code == 1 and found["drop"] == pytest.approx(math.log(3.77 / 1.06)) and found["unit"] == "nats per document"
    code, found = verdict(capsys, made["high"], made["low"], "--metric", "perplexity", "--max-drop", "0.1")
    assert code == 0 and found["drop"] == pytest.approx(math.log(1.06 / 3.77))
    main(["check", "--baseline", str(made["low"]), "--candidate", str(made["high"]), "--max-drop", "1.5"])
    said = capsys.readouterr().out
    assert "--max-drop is in nats per document here: 1.5 allows perplexity to rise by a factor of 4.482" in said
    assert "perplexity of task t, 1.06 and 3.77, is compared in nats per document (lower is better)" in said
    assert verdict(capsys, made["low"], made["high"], "--max-drop", "-1")[0] == 2


def weighted(cost, n=60, seed=0):
    """(log-likelihood, weight) pairs whose ratio of sums is about -cost."""
    rng = np.random.default_rng(seed)
    weight = rng.integers(5, 400, n)
    return [[float(-cost * w * rng.uniform(0.8, 1.2)), int(w)] for w in weight]


@pytest.mark.parametrize(
    ("metric", "aggregation", "unit", "of"),
    [
        ("word_perplexity", weighted_perplexity, "nats per word", math.exp),
        ("byte_perplexity", weighted_perplexity, "nats per byte", math.exp),
        ("bits_per_byte", bits_per_byte, "bits per byte", float),
    ],
)
def test_pairs_are_judged_by_a_ratio_of_sums(tmp_path, capsys, metric, aggregation, unit, of):
    low, high = weighted(1.0), [[1.5 * a, w] for a, w in weighted(1.0)]
    a, b = (
        metric_run(tmp_path / name, {"t": (metric, None, False, values, aggregation(values))})
        for name, values in (("a", low), ("b", high))
    )
    (row,) = compare.compare(runs.load(a), runs.load(b)).rows
    assert of(row.baseline) == pytest.approx(aggregation(low)) and of(row.candidate) == pytest.approx(aggregation(high))
    assert row.unit == unit and row.lower_is_better and row.p < 0.001 and row.only_baseline_right is None
    assert row.difference == pytest.approx(row.candidate - row.baseline)
    assert 0 < row.lower < row.difference < row.upper
    assert verdict(capsys, a, b, "--max-drop", "0.1")[0] == 1
    code, found = verdict(capsys, b, a, "--max-drop", "0.1")
    assert code == 0 and found["unit"] == unit and found["drop"] == pytest.approx(-row.difference)
    assert verdict(capsys, a, b, "--max-drop", "0.1")[1] == verdict(capsys, a, b, "--max-drop", "0.1")[1]
    assert verdict(capsys, a, b, "--max-drop", "1.5")[0] == 0


def test_bounds_of_a_ratio_agree_with_its_tests_and_the_slow_bootstrap():
    rng = np.random.default_rng(3)
    weights, drops = rng.integers(1, 90, 40).astype(float), rng.normal(0.05, 0.2, 40)
    draws = statistics.ratio_draws(drops, weights, 0.5)
    for level, upper in ((0.95, True), (0.95, False), (0.99, True)):
        bound = statistics.draws_bound(draws, level, upper)
        sided, at = (draws, bound) if upper else (-draws[::-1], -bound)
        assert statistics.draws_p(sided, at + 1e-9) <= 1 - level + 1e-12 < statistics.draws_p(sided, at - 1e-9)
    x, w = [*drops, 0.5, -0.5], [*weights, weights.mean(), weights.mean()]
    slow = []
    for _ in range(4000):
        chosen = rng.integers(0, 42, 42)
        slow.append(sum(x[i] * w[i] for i in chosen) / sum(w[i] for i in chosen))
    found = statistics.ratio_interval(drops, weights, reach=0.5)
    assert (found.lower, found.upper) == pytest.approx(np.quantile(slow, [0.025, 0.975]), abs=0.008)
    assert found.drop == pytest.approx(np.average(drops, weights=weights))


@pytest.mark.parametrize("n", [8, 40])
def test_the_interval_of_a_ratio_covers_it(n):
    rng, missed, times = np.random.default_rng(0), 0, 150
    for _ in range(times):
        weights = rng.lognormal(4, 0.7, n)
        drops = rng.exponential(0.1, n)
        interval = statistics.ratio_interval(drops, weights, reach=0.4)
        missed += not interval.lower <= 0.1 <= interval.upper
    assert missed / times <= 0.08


def test_equal_documents_leave_a_width_that_shrinks_with_their_number():
    widths = []
    for n in (10, 1000):
        found = statistics.ratio_interval(np.zeros(n), np.ones(n))
        assert found.lower < 0 < found.upper and found.drop == 0
        widths.append(found.upper - found.lower)
    assert widths[1] < widths[0] / 20


ITEMS = {  # aggregation -> what lm-eval logs per document, as JSON holds it; the better candidate first
    "mean": ([1, 1, 1, 0] * 20, [1, 0, 0, 0] * 20),
    "nanmean": ([1, 1, 1, 0] * 20, [1, 0, 0, 0] * 20),
    "perplexity": (likelihoods(0.2), likelihoods(2.0)),
    "weighted_perplexity": (weighted(0.5), weighted(2.0)),
    "bits_per_byte": (weighted(0.5), weighted(2.0)),
    "median": ([3, 4, 1] * 20, [3, 1, 1] * 20),
    "bypass": ([None] * 20,) * 2,
    "f1": ([[1, 1], [0, 0], [1, 0]] * 20, [[1, 0], [0, 0], [1, 0]] * 20),
    "matthews_corrcoef": ([[1, 1], [0, 0], [1, 0]] * 20, [[1, 0], [0, 1], [1, 0]] * 20),
    "bleu": ([["a b c d e", "a b c d e"]] * 20, [["a b c d e", "a b x d e"]] * 20),
    "chrf": ([["a b c d e", "a b c d e"]] * 20, [["a b c d e", "a b x d e"]] * 20),
    "chrf++": ([["a b c d e", "a b c d e"]] * 20, [["a b c d e", "a b x d e"]] * 20),
    "ter": ([["a b c d e", "a b c d e"]] * 20, [["a b c d e", "a b x d e"]] * 20),
    "brier_score": ([[0, [0.9, 0.1]]] * 20, [[0, [0.3, 0.7]]] * 20),
}
JUDGED = {"mean", "nanmean", "perplexity", "weighted_perplexity", "bits_per_byte"}


@pytest.mark.parametrize("aggregation", sorted(aggregation_registry.keys()))
def test_every_aggregation_of_lm_eval_is_judged_right_or_kept_apart(tmp_path, capsys, aggregation):
    """Written for lm-eval 0.4.13; a new aggregation lands here."""
    lower = aggregation not in ("mean", "nanmean")
    good, bad = (
        metric_run(
            tmp_path / name,
            {
                "t": ("its", aggregation, not lower, items, aggregation_registry.get(aggregation)(items)),
                "other": ("acc", "mean", True, [1, 1, 0] * 100, 2 / 3),
            },
        )
        for name, items in zip(("good", "bad"), ITEMS[aggregation], strict=True)
    )
    found = compare.compare(runs.load(good), runs.load(bad))
    names = [row.name for row in found.rows if row.kind == "task"]
    if aggregation in JUDGED:
        assert names == ["t", "other"]
        assert verdict(capsys, good, bad, "--max-drop", "0.02", "--tasks", "t")[0] == 1
        assert verdict(capsys, bad, good, "--max-drop", "0.02", "--tasks", "t")[0] == 0
    else:
        assert names == ["other"]
        assert any("task t is kept apart and not compared: its " in note for note in found.notes)
        code, said = verdict(capsys, good, bad, "--max-drop", "0.02")
        assert code == 0 and any("task t is kept apart" in note for note in said["notes"])
        assert verdict(capsys, good, bad, "--max-drop", "0.02", "--tasks", "t")[0] == 2


def test_lm_evals_own_metrics_are_known_without_a_config(tmp_path):
    """Metrics are registered with an aggregation; a task's YAML need not repeat it, and class tasks have no list."""
    for metric, values in (("bleu", [["a", "b"]] * 4), ("ter", [["a", "b"]] * 4), ("mcc", [[1, 0]] * 4),
                           ("brier_score", ["[0.1 0.9]"] * 4), ("f1", [[1, 1]] * 4)):  # fmt: skip
        place = metric_run(tmp_path / metric, {"t": (metric, None, True, values, None)})
        assert metric in runs.load(place).tasks["t"].apart
    place = metric_run(tmp_path / "number", {"t": ("f1", None, True, [0.5, 0.25], 0.375)})
    assert not runs.load(place).tasks["t"].scales["f1"].lower_is_better
    place = metric_run(tmp_path / "ter2", {"t": ("ter", None, None, [0.5, 0.25], None)})
    assert runs.load(place).tasks["t"].scales["ter"].lower_is_better


def test_a_number_per_document_that_does_not_make_the_result_is_no_mean(tmp_path):
    """Aggregations of a task's own are functions, of which results hold no name."""
    source = "def agg(items):\n    return max(items)"
    place = metric_run(tmp_path / "a", {"t": ("its", source, True, [0.1, 0.5], 0.5), "u": ("acc", None, True, [1], 1.0)})
    assert "the results say 0.5" in runs.load(place).tasks["t"].apart["its"]
    place = metric_run(tmp_path / "b", {"t": ("its", source, True, [0.1, 0.5], 0.3)})
    assert runs.load(place).tasks["t"].scales["its"].aggregation == "mean"
    values = likelihoods(1.0)
    place = metric_run(tmp_path / "c", {"t": ("its", source, False, values, perplexity(values))})
    assert runs.load(place).tasks["t"].scales["its"].unit == "nats per document"


def test_documents_without_a_number_are_left_out_only_by_nanmean(tmp_path):
    values = [1.0, float("nan"), 0.0]
    a = metric_run(tmp_path / "a", {"t": ("its", "nanmean", True, values, nanmean(values)), "u": ("acc", None, True, [1], 1)})
    assert "nanmean" in runs.load(a).tasks["t"].apart["its"]
    assert [p.task for p in matching.match(runs.load(a), runs.load(a))] == ["u"]
    b = metric_run(tmp_path / "b", {"t": ("its", "mean", True, values, None), "u": ("acc", None, True, [1], 1)})
    with pytest.raises(AdaInferError, match=r"^metric: its of document 1 is nan"):
        matching.match(runs.load(b), runs.load(b))
    rows = [{**sample("t", i, 1), "perplexity": -math.inf, "metrics": ["perplexity", "acc"]} for i in range(3)]
    c = write(tmp_path / "c", {"t": rows})
    assert matching.match(runs.load(c), runs.load(c))[0].metric == "acc", "an unused metric breaks nothing"


def test_a_candidate_whose_numbers_are_gone_is_refused_and_not_kept_apart(tmp_path):
    """A gate that left such a task out would pass a broken run."""
    a = metric_run(tmp_path / "a", {"t": ("acc", None, True, [1, 0], None), "u": ("acc", None, True, [1], None)})
    b = metric_run(tmp_path / "b", {"t": ("acc", None, True, ["1", "0"], None), "u": ("acc", None, True, [1], None)})
    for pair in ((a, b), (b, a)):
        with pytest.raises(AdaInferError, match=r"have no number 'acc' per document"):
            matching.match(*map(runs.load, pair))


def test_right_or_wrong_metrics_that_should_be_low(tmp_path):
    a = metric_run(tmp_path / "a", {"t": ("error", "mean", False, [0, 0, 0, 1, 0], 0.2)})
    b = metric_run(tmp_path / "b", {"t": ("error", "mean", False, [1, 1, 0, 0, 0], 0.4)})
    (row,) = compare.compare(runs.load(a), runs.load(b)).rows
    assert (row.only_baseline_right, row.only_candidate_right) == (2, 1) and row.difference == pytest.approx(0.2)


def test_a_metric_without_a_direction_says_so(tmp_path):
    a = metric_run(tmp_path / "a", {"t": ("its", "mean", None, [0.5, 0.2], 0.35)})
    notes = compare.compare(runs.load(a), runs.load(a)).notes
    assert notes == ["nothing says whether a higher its of task t is better; higher is taken for better"]


def test_a_direction_that_one_run_says_holds_for_both_and_two_are_refused(tmp_path):
    high, low, silent = (
        runs.load(metric_run(tmp_path / name, {"t": ("its", "mean", higher, [0.5, 0.2], 0.35)}))
        for name, higher in (("high", True), ("low", False), ("silent", None))
    )
    for pair in ((low, silent), (silent, low)):
        assert matching.match(*pair)[0].lower_is_better
    assert not matching.match(silent, high)[0].lower_is_better
    with pytest.raises(AdaInferError, match=r"one takes higher and one lower for better"):
        matching.match(low, high)


def test_scales_are_pooled_apart(tmp_path, capsys):
    def tasks(shift):
        perplexities = [(np.array(likelihoods(1.0, seed=i)) - shift).tolist() for i in range(2)]
        return {
            "a": ("acc", None, True, [1, 0] * 200, None),
            "b": ("acc", None, True, [1, 1] * 200, None),
            "p": ("perplexity", None, False, perplexities[0], None),
            "q": ("perplexity", None, False, perplexities[1], None),
            "w": ("word_perplexity", None, False, weighted(1.0), None),
        }

    groups = {"mixed": ["a", "p"]}
    first, second = (metric_run(tmp_path / name, tasks(shift), groups=groups) for name, shift in (("x", 0.0), ("y", 0.5)))
    found = compare.compare(runs.load(first), runs.load(second))
    rows = {row.name: row for row in found.rows}
    assert list(rows) == ["a", "b", "p", "q", "w", "mixed", "all documents", "all documents of perplexity"]
    assert rows["all documents"].documents == 800 and rows["all documents"].difference == 0
    assert rows["mixed"].documents == 400 and rows["all documents of perplexity"].difference == pytest.approx(0.5)
    assert any("the row of mixed leaves out p (perplexity)" in note for note in found.notes)
    code, said = verdict(capsys, first, second, "--max-drop", "0.02")
    assert code == 0 and [g["task"] for g in said["guards"]] == ["a", "b"] and said["documents"] == 800
    assert any(note.startswith("not judged: p (perplexity), q (perplexity), w (word_perplexity)") for note in said["notes"])
    code, said = verdict(capsys, first, second, "--max-drop", "0.02", "--tasks", "p,q")
    assert code == 1 and said["drop"] == pytest.approx(0.5)
    code, said = verdict(capsys, first, second, "--max-drop", "0.02", "--group", "w")
    assert said["unit"] == "nats per word"


def test_the_report_shows_other_scales_without_percent(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    made = [
        metric_run(tmp_path / name, {"p": ("perplexity", None, False, likelihoods(cost), None)})
        for name, cost in (("a", 1.0), ("b", 1.25), ("c", 2.0))
    ]
    names = [f"{x.name}={x}" for x in made]
    assert main(["report", *names, "-o", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "index.html").read_text()
    assert ">1.25</span>" in page and ">2</span>" in page and "nats per document" in page
    assert "(%), with 95% interval" not in (tmp_path / "out" / "frontier.svg").read_text()


LANGUAGE = {
    "my_pages": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
    "metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]\n",
    "my_last": "output_type: loglikelihood\ndoc_to_text: '{{text[:-4]}}'\ndoc_to_target: '{{text[-4:]}}'\n"
    "metric_list: [{metric: perplexity, aggregation: perplexity, higher_is_better: false}, "
    "{metric: acc, aggregation: mean, higher_is_better: true}]\n",
}


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    """Runs of the demo model on texts: hf, stopper=none and an early exit."""
    where = tmp_path_factory.mktemp("language")
    texts = [f"{'the cat sat on the mat and ' * (1 + i % 4)}went to paris {i}" for i in range(12)]
    (where / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for name, yaml in LANGUAGE.items():
        (where / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {where}/texts.jsonl}}}}\n"
            f"test_split: test\n{yaml}"
        )
    manager = TaskManager(include_path=str(where), include_defaults=False)
    for name, model, stopper in (("hf", "hf", {}), ("none", "adainfer", {}), ("early", "adainfer", {"stopper": "fixed:4"})):
        tracker = EvaluationTracker(output_path=str(where / name))
        results = simple_evaluate(
            model=model, model_args={"pretrained": str(paths.demo_model()), "dtype": "float32", **stopper},
            tasks=list(LANGUAGE), batch_size=4, device="cpu", bootstrap_iters=0, task_manager=manager, log_samples=True,
            evaluation_tracker=tracker,
        )  # fmt: skip
        samples = results.pop("samples")
        tracker.save_results_aggregated(results=results, samples=samples)
        for task, found in samples.items():
            tracker.save_results_samples(task_name=task, samples=found)
    return where


def test_real_runs_of_language_modelling_are_compared_as_their_results_say(language, capsys):
    dense, early = (runs.load(language / name) for name in ("none", "early"))
    for task, metric in (("my_last", "perplexity"), ("my_pages", "word_perplexity"), ("my_pages", "byte_perplexity"),
                         ("my_pages", "bits_per_byte")):  # fmt: skip
        (row,) = compare.compare(only(dense, task), only(early, task), metric).rows
        for run, side in ((dense, row.baseline), (early, row.candidate)):
            reported = json.loads(run.source.read_text())["results"][task][f"{metric},none"]
            assert math.log(reported) == pytest.approx(side) if metric != "bits_per_byte" else reported == pytest.approx(side)
    assert [r.name for r in compare.compare(dense, early).rows] == ["my_last", "my_pages"]  # acc, and nats per word
    assert main(["check", "--baseline", f"{language}/hf", "--candidate", f"{language}/none", "--reproduces"]) == 0
    assert main(["check", "--baseline", f"{language}/hf", "--candidate", f"{language}/none", "--max-drop", "0.4"]) == 0
    capsys.readouterr()


def only(run, task):
    return dataclasses.replace(run, tasks={task: run.tasks[task]})


def longer(logged):
    """Every number in logged responses 1% larger; lm-eval logs numbers as text, and 0.5.0.dev1 in lists of pairs."""
    if isinstance(logged, list):
        return [longer(one) for one in logged]
    return logged if logged == "False" else str(float(logged) * 1.01)


def test_a_lossy_rolling_run_does_not_reproduce(language, tmp_path, capsys):
    shutil.copytree(language / "none", tmp_path / "changed")
    (file,) = (tmp_path / "changed").rglob("samples_my_pages_*.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[3]["filtered_resps"] = longer(lines[3]["filtered_resps"])
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    both = ["check", "--baseline", f"{language}/hf", "--candidate", f"{tmp_path}/changed", "--reproduces"]
    assert main(both) == 1
    assert "my_pages is reproduced: fail (1 of 12 documents differ (the first is 3)" in capsys.readouterr().out


def test_a_task_without_numbers_is_reproduced_by_its_answers(tmp_path):
    def text(i, answer):
        return {**sample("t", i, [answer, "x"], metric="bleu"), "filtered_resps": [answer]}

    a = write(tmp_path / "a", {"t": [text(i, str(i)) for i in range(4)]})
    b = write(tmp_path / "b", {"t": [text(i, str(min(i, 2))) for i in range(4)]}, kind="adainfer", stopper="none")
    assert main(["check", "--baseline", str(a), "--candidate", str(a), "--reproduces"]) == 0
    assert main(["check", "--baseline", str(a), "--candidate", str(b), "--reproduces"]) == 1


def test_the_gate_of_a_ratio_rarely_errs():
    """Drops of exactly the limit pass, and fail, at most about as often as the gate says."""
    rng, passed, failed, times = np.random.default_rng(1), 0, 0, 60
    for _ in range(times):
        weights = rng.lognormal(4, 0.5, 50)
        base = rng.normal(2.0, 0.1, 50)
        pair = matching.Pairs("t", "word_perplexity", True, base, base + rng.normal(0.3, 0.3, 50), [], weights, "nats per word")
        status = gate.judge([pair], ["t"], 0.3).status
        passed, failed = passed + (status == "pass"), failed + (status == "fail")
    assert passed <= 8 and failed <= 8 and mean([passed, failed]) < 6
