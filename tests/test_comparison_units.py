"""What is independent, what weighs the same, and what a document can lose: clusters, groups and bounded metrics."""

from __future__ import annotations

import json

import numpy as np
import pytest
from helpers.synthetic_runs import DATE, flips, sample, sha, write
from lm_eval import simple_evaluate
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager

from lm_eval_adainfer import bounded, clusters, paths, statistics
from lm_eval_adainfer.cli.main import main
from lm_eval_adainfer.comparison import compare, gate, runs
from lm_eval_adainfer.comparison.evidence import Evidence
from lm_eval_adainfer.comparison.matching import Pairs, match
from lm_eval_adainfer.comparison.selection import Selection
from lm_eval_adainfer.errors import AdaInferError


def asked(task, scores, each, field="context", metric="acc"):
    """Samples of which ``each`` in turn are about one passage."""
    found = []
    for i, score in enumerate(scores):
        row = sample(task, i, score, metric=metric)
        row["doc"] = {**row["doc"], field: f"passage {i // each}", "meta": {"page": i // each}}
        row["doc_hash"] = sha(json.dumps(row["doc"], indent=2, ensure_ascii=False))
        found.append(row)
    return found


def pairs(task, baseline, candidate, metric="acc", **more):
    return Pairs(task, metric, False, np.array(baseline, float), np.array(candidate, float), [], **more)


@pytest.fixture
def passages(tmp_path):
    """200 passages of 5 questions each; the candidate lost all 5 of some passages."""

    def make(lost, task="squad", each=5, n=1000):
        first = [1.0] * n
        second = [0.0] * (lost * each) + [1.0] * (n - lost * each)
        for name, scores in (("a", first), ("b", second)):
            write(tmp_path / name, {task: asked(task, scores, each)})
        return ["--baseline", f"{tmp_path}/a", "--candidate", f"{tmp_path}/b"]

    return make


def judged(capsys, *arguments):
    code = main(["check", *arguments, "--format", "json"])
    out = capsys.readouterr()
    return code, json.loads(out.out) if code != 2 else out.err


# ------------------------------------------------------------------------------------------------ clusters


def test_lost_passages_are_as_many_losses_as_passages(passages, capsys):
    """5 lost passages of 200 are 25 lost documents: 2.5 points, which 25 documents would prove to be above one."""
    both = [*passages(5), "--max-drop", "0.01"]
    assert judged(capsys, *both)[0] == 1
    code, said = judged(capsys, *both, "--cluster", "context")
    assert code == 3
    (pool,) = said["pools"]
    assert pool["clusters"] == 200 and pool["method"] == "Gaffke" and pool["drop"] == pytest.approx(0.025)
    totals = np.array([1.0] * 5 + [0.0] * 195)
    assert pool["upper"] == pytest.approx(bounded.gaffke_bound(totals, np.ones(200), 0.95, True), abs=1e-6)
    assert pool["lower"] == pytest.approx(bounded.gaffke_bound(totals, np.ones(200), 0.95, False), abs=1e-6)
    assert judged(capsys, *both, "--cluster", "squad={{context}} {{meta.page}}")[1]["pools"] == [pool]
    main(["check", *both, "--cluster", "context"])
    assert "25 of them discordant, in 200 clusters" in capsys.readouterr().out


def test_clusters_of_one_document_are_the_documents(passages, capsys):
    both = [*passages(3), "--max-drop", "0.01"]
    plain = judged(capsys, *both)[1]
    assert judged(capsys, *both, "--cluster", "question")[1]["pools"] == plain["pools"]
    assert plain["pools"][0]["method"] == "exact"


def test_compare_shows_clusters_their_interval_and_their_permutation(passages, tmp_path, capsys):
    passages(5)
    found = [
        compare.compare(*runs.load_all([f"{tmp_path}/a", f"{tmp_path}/b"], selection=Selection.parse(cluster=by)))
        for by in (None, "context")
    ]
    plain, row = found[0].rows[0], found[1].rows[0]
    assert plain.method == "exact" and plain.clusters is None and plain.test == "exact McNemar"
    assert row.clusters == 200 and row.test == "sign-flip permutation of clusters"
    assert row.p == statistics.sign_flip_p(np.array([1.0] * 5 + [0.0] * 195)) == 2 / 2**5
    totals = np.array([-1.0] * 5 + [0.0] * 195)
    assert (row.lower, row.upper) == pytest.approx(
        tuple(bounded.gaffke_bound(totals, np.ones(200), 0.975, up) for up in (False, True)), abs=1e-6
    )
    assert row.lower < plain.lower and row.difference == plain.difference == -0.025
    main(["compare", f"{tmp_path}/a", f"{tmp_path}/b", "--cluster", "context"])
    assert "clusters" in capsys.readouterr().out.splitlines()[2]


@pytest.mark.parametrize("command", ["compare", "check"])
def test_a_task_that_repeats_passages_is_named_until_clusters_are(passages, tmp_path, capsys, command):
    both = passages(0)
    arguments = ["compare", f"{tmp_path}/a", f"{tmp_path}/b"] if command == "compare" else ["check", *both, "--max-drop", "0.1"]
    main(arguments)
    said = capsys.readouterr().out
    assert "passages repeat in squad (1000 documents, 200 of context)" in said
    assert "--cluster squad=context" in said and said.count("passages repeat") == 1
    main([*arguments, "--cluster", "squad=context"])
    assert "passages repeat" not in capsys.readouterr().out


@pytest.mark.parametrize(("task", "each"), [("squad", 1), ("arc", 5)])
def test_no_hint_where_passages_do_not_repeat_or_are_not_known(passages, tmp_path, capsys, task, each):
    passages(0, task, each, n=50)
    main(["compare", f"{tmp_path}/a", f"{tmp_path}/b"])
    assert "passages repeat" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("task", "field"),
    [("squadv2", "context"), ("squad_completion", "context"), ("xquad_de", "context"), ("race", "article"),
     ("coqa", "story"), ("drop", "passage"), ("boolq", "passage"), ("multirc", "paragraph"), ("record", "passage"),
     ("belebele_deu_Latn", "flores_passage"), ("arc_easy", None), ("hellaswag", None)],
)  # fmt: skip
def test_tasks_known_for_passages(task, field):
    assert clusters.passage_field(task) == field


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("passage", "has no 'passage'; its fields are question, context, meta"),
        ("{{context", "is no template of Jinja"),
        ("{{passage}}", "'passage' is undefined"),
        ("{{context.__class__.__mro__}}", "cluster: "),
        ("squad=", "is neither FIELD nor TASK=FIELD"),
        ("race=article", "cluster: 'race' is no task or group of these runs"),
    ],
)
def test_wrong_clusters_are_one_sentence(passages, capsys, value, words):
    code, said = judged(capsys, *passages(0), "--max-drop", "0.1", "--cluster", value)
    assert code == 2 and words in said.strip().splitlines()[-1]


def test_cluster_of_a_config_file_and_beside_reproduces(passages, tmp_path, capsys):
    both, file = passages(5), tmp_path / "gate.yaml"
    for text in ("cluster: context", "cluster: ['squad=context']", "cluster: 'squad={{context}}, {{meta}}'"):
        file.write_text(f"max_drop: 0.01\n{text}\n")
        assert judged(capsys, *both, "--config", str(file))[1]["pools"][0]["clusters"] == 200
    file.write_text("max_drop: 0.01\ncluster: 3\n")
    assert "it takes a text or a list of texts" in judged(capsys, *both, "--config", str(file))[1]
    assert "--reproduces does not use it" in judged(capsys, *both, "--reproduces", "--cluster", "context")[1]


def test_a_passage_of_two_tasks_is_one_cluster_and_tasks_without_stand_for_themselves():
    a, b = np.array(["x", "x", "y"]), np.array(["x", "z", "z"])
    found = Evidence.of([
        pairs("s", [1, 1, 1], [0, 0, 1], clusters=a), pairs("t", [1, 1, 1], [0, 1, 1], clusters=b), pairs("u", [1, 0], [0, 0]),
    ])  # fmt: skip
    assert found.clustered == 5 and sorted(found.units[0]) == [0, 0, 0, 1, 3] and sum(found.units[1]) == 8


def width(evidence):
    found = evidence.interval()
    return found.upper - found.lower


def test_perplexities_in_clusters_are_resampled_by_cluster():
    rng = np.random.default_rng(0)
    shift = np.repeat(rng.normal(0, 0.3, 40), 10)
    base = rng.normal(2, 0.1, 400)
    given = {"lower_is_better": True, "baseline": base, "candidate": base + shift, "documents": [], "unit": "nats per document"}
    names = np.repeat(np.arange(40), 10).astype(str)
    loose, tight = (Evidence.of([Pairs("t", "perplexity", clusters=c, **given)]) for c in (names, None))
    assert (loose.method, tight.method) == ("resampled", "Student's t")
    assert width(loose) > 2 * width(tight)
    notes = gate.judge([Pairs("t", "perplexity", **given)], ["t"], 0.5).notes
    assert any("the bounds of all documents are approximate (Student's t)" in note for note in notes)


def test_the_gate_rarely_passes_a_real_drop_in_clusters_and_says_how_many_documents_would_settle_it():
    rng, passed, unclustered = np.random.default_rng(0), 0, 0
    for _ in range(150):
        lost = rng.random(400) < 0.02  # all five questions about a passage are lost, or none
        scores = np.repeat(1.0 - lost, 5)
        pair = pairs("t", np.ones(2000), scores, clusters=np.repeat(np.arange(400), 5).astype(str))
        passed += Evidence.of([pair]).p_above(0.02) <= 0.05
        unclustered += Evidence.of([pairs("t", np.ones(2000), scores)]).p_above(0.02) <= 0.05
    assert passed <= 14 and unclustered > 20
    scores = np.repeat(1.0 - (np.arange(400) < 6), 5)
    said = gate.judge([pairs("t", np.ones(2000), scores, clusters=pair.clusters)], ["t"], 0.02)
    assert said.status == "inconclusive" and "in clusters like these, about" in said.reasons[0]
    alone = gate.judge([pairs("t", np.ones(2000), scores)], ["t"], 0.02)
    assert said.documents_needed > 2000 and alone.status == "inconclusive"
    assert said.documents_needed > 4 * alone.documents_needed  # five times the variance


@pytest.mark.parametrize(("drop", "limit"), [(0.0, 0.02), (0.08, 0.03)])
def test_as_many_documents_in_clusters_as_it_asks_for_settle_it_four_times_in_five(drop, limit):
    rng = np.random.default_rng(0)

    def draw(passages):
        each = rng.choice([1.0, -1.0, 0.0], (passages, 5), p=[0.05 + drop / 2, 0.05 - drop / 2, 0.9])
        drops = np.where(rng.random((passages, 1)) < 0.5, each[:, :1], each).ravel()  # in half of all passages, all alike
        return Evidence(drops, None, np.repeat(np.arange(passages), 5).astype(str), 1.0, 1.0)

    seen = next(e for e in (draw(60) for _ in range(1000)) if abs(e.mean - drop) < 1e-9 and 0.09 < np.mean(e.drops != 0) < 0.11)
    needed = seen.needed(limit, 0.05, 1.0, 0.001)
    settled = [min(e.p_above(limit), e.p_below(limit)) <= 0.05 for e in (draw(needed // 5) for _ in range(300))]
    assert 0.65 < np.mean(settled) < 0.95


# ------------------------------------------------------------------------------------------------ groups


def scored(folder, tasks, group, by_task, groups=None):
    """A run whose results hold the group's score, as lm-eval 0.4.13 writes it."""
    place = write(folder, tasks, groups=groups or {group: list(tasks)})
    file = place / "m" / f"results_{DATE}.json"
    content = json.loads(file.read_text())
    for task, scores in tasks.items():
        content["results"][task] |= {"acc,none": float(np.mean(scores)), "acc_stderr,none": 0.1, "sample_len": len(scores)}
    means, sizes = [float(np.mean(s)) for s in tasks.values()], [len(s) for s in tasks.values()]
    content["results"][group] = {"alias": group, "acc,none": float(np.average(means, weights=None if by_task else sizes))}
    file.write_text(json.dumps(content))
    return place


def two_tasks(tmp_path, by_task, small=(400, 8, 0), large=(3000, 0, 20)):
    made = [dict(zip(("small", "large"), both, strict=True)) for both in zip(flips(*small), flips(*large), strict=True)]
    return [scored(tmp_path / name, tasks, "g", by_task) for name, tasks in zip(("a", "b"), made, strict=True)]


@pytest.mark.parametrize("by_task", [True, False])
def test_a_group_weighs_as_its_own_score_does(tmp_path, capsys, by_task):
    """8 of 400 lost and 20 of 3,000 won: 0.7 points lost where tasks weigh the same, 0.35 won where documents do."""
    a, b = two_tasks(tmp_path, by_task)
    row = {r.kind: r for r in compare.compare(runs.load(a), runs.load(b)).rows}["group"]
    assert row.difference == pytest.approx((-8 / 400 + 20 / 3000) / 2 if by_task else 12 / 3400)
    assert row.equal_weight == ("tasks" if by_task else "documents") and row.method == ("Gaffke" if by_task else "exact")
    assert row.candidate - row.baseline == pytest.approx(row.difference)
    assert (row.only_baseline_right, row.only_candidate_right) == (8, 20)
    for extra in ([], ["--group", "g"]):
        code, said = judged(capsys, "--baseline", str(a), "--candidate", str(b), "--max-drop", "0.03", *extra)
        assert code == 0 and said["drop"] == pytest.approx(-row.difference)
        assert said["pool"] == ("g" if by_task or extra else "all documents")
        assert any("weigh the same" in note for note in said["notes"]) == by_task
    a, b = two_tasks(tmp_path, by_task, small=(400, 40, 0))
    said = judged(capsys, "--baseline", str(a), "--candidate", str(b), "--max-drop", "0.02")[1]
    assert [p["dropped"] for p in said["pools"]] == [by_task]  # 4.7 points, of 0.6 by documents


def test_the_bound_of_a_group_is_that_of_its_weighted_documents():
    small, large = pairs("s", *flips(100, 2, 1)), pairs("l", *flips(900, 5, 9))
    found = Evidence.of([small, large], by_task=True)
    weights = np.repeat([5.0, 5 / 9], [100, 900])
    totals = np.concatenate([small.drops, large.drops]) * weights
    assert found.mean == pytest.approx((small.drops.mean() + large.drops.mean()) / 2)
    assert found.bound(0.95, True) == pytest.approx(bounded.gaffke_bound(totals, weights, 0.95, True), abs=1e-6)
    same = Evidence.of([small, pairs("l", *flips(100, 5, 9))], by_task=True)
    assert same.method == "exact" and same.weights is None  # tasks of one size


def test_a_groups_own_way_is_told_by_its_score(tmp_path):
    def of(content):
        file = next((tmp_path / "a" / "m").glob("results_*.json"))
        old = json.loads(file.read_text())
        file.write_text(json.dumps({**old, "results": {**old["results"], **content}}))
        return runs.load(tmp_path / "a")

    two_tasks(tmp_path, True)
    assert of({}).by_task == {"g": {"acc"}}
    run = of({"g": {"acc,none": 0.123}})
    assert run.by_task == {} and any("g makes its acc in a way of its own" in note for note in run.notes)
    old = json.loads(run.source.read_text())["results"]
    with_variances = {t: {**old[t], "exit_layer_var,none": float(i)} for i, t in enumerate(run.tasks)}
    run = of({**with_variances, "g": {"exit_layer_var,none": 7.0}})
    assert not any("way of its own" in note for note in run.notes)  # a variance is no mean over tasks
    assert of({"g": {"acc,none": "N/A"}}).by_task == {} and of({"g": {}}).by_task == {} and of({"g": 3}).by_task == {}


GROUP = """
group: my_group
task: [my_short, my_long]
aggregate_metric_list: [{metric: acc, aggregation: mean, weight_by_size: %s}]
"""
TASK = """
task: my_%s
dataset_path: json
dataset_kwargs: {data_files: {test: %s/%s.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: ["yes", "no"]
doc_to_target: "{{answer}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.mark.parametrize("by_size", ["true", "false"])
def test_a_real_run_says_how_its_group_weighs(tmp_path, by_size):
    """Written for lm-eval 0.4.13, whose results hold a group's score and not how it was made."""
    for name, n in (("short", 5), ("long", 13)):
        rows = [json.dumps({"question": f"is {i} odd?", "answer": i % 3 // 2}) for i in range(n)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
        (tmp_path / f"{name}.yaml").write_text(TASK % (name, tmp_path, name))
    (tmp_path / "group.yaml").write_text(GROUP % by_size)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    tracker = EvaluationTracker(output_path=str(tmp_path / "run"))
    results = simple_evaluate(
        model="hf", model_args={"pretrained": str(paths.demo_model()), "dtype": "float32"}, tasks=["my_group"],
        batch_size=8, device="cpu", bootstrap_iters=0, task_manager=manager, log_samples=True, evaluation_tracker=tracker,
    )  # fmt: skip
    samples = results.pop("samples")
    tracker.save_results_aggregated(results=results, samples=samples)
    for task, found in samples.items():
        tracker.save_results_samples(task_name=task, samples=found)
    run = runs.load(tmp_path / "run")
    score = json.loads(run.source.read_text())["results"]["my_group"]["acc,none"]
    (row,) = (r for r in compare.compare(run, run).rows if r.kind == "group")
    assert row.baseline == pytest.approx(score)
    assert run.by_task == ({"my_group": {"acc"}} if by_size == "false" else {})


# ------------------------------------------------------------------------------------------------ metrics


def test_unlike_metrics_have_pools_of_their_own_and_all_must_pass():
    good, bad = flips(1000, 0, 0), flips(1000, 40, 0)
    tasks = [pairs("a", *good), pairs("b", *good), pairs("c", *good, metric="exact_match")]
    found = gate.judge(tasks, ["a", "b", "c"], 0.01)
    assert found.status == "pass" and [(p.name, p.documents) for p in found.pools] == [
        ("all documents (acc)", 2000), ("all documents (exact_match)", 1000),
    ]  # fmt: skip
    assert found.lower_level == pytest.approx(0.98) and len(found.guards) == 3
    worse = gate.judge([*tasks[:2], pairs("c", *bad, metric="exact_match")], ["a", "b", "c"], 0.01)
    assert worse.status == "fail" and worse.reasons[0].startswith("all documents (exact_match) dropped by more than 0.01")
    few = gate.judge([*tasks[:2], pairs("c", *flips(100, 0, 0), metric="exact_match")], ["a", "b", "c"], 0.01)
    assert few.status == "inconclusive" and len(few.reasons) == 1 and "exact_match" in few.reasons[0]


def test_unlike_metrics_are_kept_apart_in_tables(tmp_path):
    places = []
    for name, scores in (("a", [1, 0] * 20), ("b", [1, 1] * 20)):
        rows = {"s": [sample("s", i, v) for i, v in enumerate(scores)], "t": [sample("t", i, v) for i, v in enumerate(scores)]}
        rows |= {f"e{j}": [sample(f"e{j}", i, v, metric="exact_match") for i, v in enumerate(scores)] for j in (1, 2)}
        places.append(write(tmp_path / name, rows, groups={"g": list(rows)}))
    found = compare.compare(*map(runs.load, places))
    assert [(r.name, r.metric, r.documents) for r in found.rows if r.kind != "task"] == [
        ("g", "acc", 80), ("all documents", "acc", 80), ("all documents of exact_match", "exact_match", 80),
    ]  # fmt: skip
    assert any("the row of g leaves out e1 (exact_match), e2 (exact_match)" in note for note in found.notes)


def test_one_half_point_leaves_a_pool_right_or_wrong():
    first, second = flips(1000, 3, 1)
    plain = Evidence.of([pairs("t", first, second)])
    for value in (0.5, 0.25):
        half = Evidence.of([pairs("t", [*first[:-1], 1.0], [*second[:-1], value])])
        assert half.method == "exact"
        assert half.p_above(0.01) == statistics.exact_p(4, 1, 1000, 0.01)  # against passing, it is lost altogether
        assert half.p_below(0.01) == statistics.exact_p(1, 3, 1000, -0.01)  # against failing, nothing is lost
        assert half.bound(0.95, True, 0.01) == statistics.exact_bound(4, 1, 1000, 0.95, True, 0.01)
    alike = Evidence.of([pairs("t", [*first[:-1], 0.5], [*second[:-1], 0.5])])
    assert alike.method == "exact" and alike.p_above(0.01) == plain.p_above(0.01)
    gained = Evidence.of([pairs("t", [*first[:-1], 0.0], [*second[:-1], 0.5])])
    assert gained.p_above(0.01) == plain.p_above(0.01)


@pytest.mark.parametrize("halves", [0.2, 1.0, 3.0])
def test_pools_with_a_half_point_now_and_then_pass_wrongly_at_most_5_percent_of_the_time(halves):
    """The way is chosen by the documents, so what is tried is the whole of it, where either is taken about as often."""
    rng, n, known, passed = np.random.default_rng(0), 400, {}, 0
    chances = [0.022 - halves / n / 2, 0.002, halves / n]  # lost, won, half lost: 2 points in the mean
    for _ in range(3000):
        lost, won, half = counts = tuple(rng.multinomial(n, [*chances, 1 - sum(chances)])[:3])
        if counts not in known:
            first = np.repeat([1.0, 0.0, 1.0, 1.0], [lost, won, half, n - sum(counts)])
            second = np.repeat([0.0, 1.0, 0.5, 1.0], [lost, won, half, n - sum(counts)])
            known[counts] = Evidence.of([pairs("t", first, second)]).p_above(0.02) <= 0.05
        passed += known[counts]
    assert passed / 3000 <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 3000)


def test_metrics_from_0_to_100_are_bounded_where_they_are_known_for_it():
    rng = np.random.default_rng(0)
    base, lost = rng.uniform(20, 90, 400), rng.random(400) < 0.05
    rouge, length = (pairs("t", base, base - 10 * lost, metric=m) for m in ("rougeL", "length"))
    assert (rouge.most, length.most) == (100.0, None)
    found = [Evidence.of([p]) for p in (rouge, length)]
    assert [e.method for e in found] == ["Gaffke", "Student's t"]
    share = Evidence.of([pairs("t", base / 100, base / 100 - 0.1 * lost, metric="f1")])
    assert found[0].bound(0.95, True) == pytest.approx(100 * share.bound(0.95, True), abs=1e-4)
    assert not gate.judge([rouge], ["t"], 2).notes
    assert "approximate" in gate.judge([length], ["t"], 2).notes[0]
    assert pairs("t", [1, 2], [-1, 2], metric="f1").most is None


def test_match_carries_clusters_only_where_the_user_named_them(passages, tmp_path):
    passages(1)
    named, plain = (
        match(*runs.load_all([f"{tmp_path}/a", f"{tmp_path}/b"], selection=Selection.parse(cluster=by)))[0]
        for by in ("squad=context", None)
    )
    assert len(set(named.clusters)) == 200 and plain.clusters is None
    with pytest.raises(AdaInferError, match="cluster: all tasks has two, a and b"):
        Selection.parse(cluster=["a", "b"])
