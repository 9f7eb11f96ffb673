"""``adainfer check``: its error rates, its exit statuses and what it writes."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from helpers.synthetic_runs import flips, sample, write
from scipy import stats

from lm_eval_adainfer import statistics
from lm_eval_adainfer.cli.main import main
from lm_eval_adainfer.comparison import gate
from lm_eval_adainfer.comparison.matching import Pairs

N, LIMIT = 1000, 0.01


def passes(b, c):
    far = LIMIT + gate.FAR
    return statistics.exact_p(b, c, N, LIMIT) <= gate.ERROR and statistics.exact_p(b, c, N, far) <= gate.FAR_ERROR


def fails(b, c, level):
    return statistics.exact_p(c, b, N, -LIMIT) <= level


def probability(rule, share, drop, n=N):
    """Of an outcome that the rule accepts, summed over all outcomes that can be expected to occur.

    Both rules accept an interval of outcomes at every number of discordant documents, so its end is searched.
    """
    spread = 5 * np.sqrt(n * share * (1 - share)) + 3
    total, win = 0.0, (share - drop) / (2 * share)
    for m in range(max(0, int(n * share - spread)), min(n, int(n * share + spread)) + 1):
        more_wins = rule is passes
        low, high = -1, m + 1  # of the losses (failing) or the wins (passing): low is too few, high is enough
        while high - low > 1:
            k = (low + high) // 2
            enough = rule(m - k, k) if more_wins else rule(k, m - k)
            low, high = (low, k) if enough else (k, high)
        chance = stats.binom.sf(high - 1, m, win if more_wins else 1 - win)
        total += stats.binom.pmf(m, n, share) * chance
    return total


@pytest.mark.parametrize("share", [0.01, 0.0115, 0.02, 0.04, 0.0825])
def test_a_drop_of_exactly_the_limit_passes_at_most_5_percent_of_the_time(share):
    assert probability(passes, share, 0.01) <= 0.05


@pytest.mark.parametrize("share", [0.03, 0.05, 0.1])
def test_a_drop_of_three_points_practically_never_passes(share):
    assert probability(passes, share, 0.03) < 0.005


def test_a_drop_of_three_points_practically_never_passes_however_often_answers_flip():
    """At large discordance the exact test is the normal one; the second condition is what holds there."""
    for share in (0.5, 0.7, 1.0):
        spread = np.sqrt(N * (share - 0.03**2))
        m = int(N * share)
        net = next(d for d in range(m, -m - 1, -1) if (m + d) % 2 == 0 and passes((m + d) // 2, (m - d) // 2))
        assert stats.norm.cdf((net - 30) / spread) < 0.0055  # the normal distribution, about


@pytest.mark.parametrize("share", [0.01, 0.04, 0.1])
def test_no_drop_fails_at_most_5_percent_of_the_time(share):
    assert probability(lambda b, c: fails(b, c, gate.ERROR), share, 0.0) <= 0.05


def test_three_points_at_4_percent_discordance_fail_nine_times_in_ten_also_beside_guards():
    level = gate.ERROR * gate.POOL_SHARE
    assert probability(lambda b, c: fails(b, c, level), 0.04, 0.03) >= 0.9


def test_no_drop_at_small_discordance_usually_passes():
    """Power: a gate that never passes would hold every error rate."""
    assert probability(passes, 0.005, 0.0) > 0.95
    assert probability(passes, 0.01, 0.0) > 0.85


def test_the_guide_says_these_probabilities():
    """docs/comparing.md, to a point; docs/ci.md repeats one of them."""
    page = (Path(__file__).resolve().parents[1] / "docs" / "comparing.md").read_text()
    fail = [probability(lambda b, c, share=share: fails(b, c, gate.ERROR * share), 0.04, 0.03) for share in (1, gate.POOL_SHARE)]
    assert "| 3 points | 4% | fail | {:.0%} (one task), {:.0%} (several) |".format(*fail) in page
    for share in ("0.5%", "1%", "4%"):
        chance = probability(passes, float(share.rstrip("%")) / 100, 0.0)
        assert f"| 0 | {share} | pass | {chance:.0%} |" in page


def pairs(task, baseline, candidate):
    return Pairs(task, "acc", False, np.array(baseline, float), np.array(candidate, float), [])


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (3, 0), (4, 0), (5, 0), (20, 20), (8, 20), (30, 12), (40, 12), (180, 200)])
def test_the_verdict_follows_the_two_tests(lost, won):
    found = gate.judge([pairs("t", *flips(N, lost, won))], ["t"], LIMIT)
    expected = "pass" if passes(lost, won) else "fail" if fails(lost, won, gate.ERROR) else "inconclusive"
    assert found.status == expected
    assert (found.documents_needed is not None) == (expected == "inconclusive" and lost - won != 10)


def test_pool_and_guards_together_fail_wrongly_at_most_5_percent_of_the_time():
    """Four tasks of 250 documents, each dropped by exactly the limit, where the error is largest."""
    pool = probability(lambda b, c: fails(b, c, gate.ERROR * gate.POOL_SHARE), 0.06, LIMIT)
    level = gate.ERROR * (1 - gate.POOL_SHARE) / 4
    guard = probability(lambda b, c: statistics.exact_p(c, b, 250, -LIMIT) <= level, 0.06, LIMIT, n=250)
    assert 0 < pool <= 0.04 and 0 < guard <= level
    assert pool + 4 * guard <= 0.05
    found = gate.judge([pairs(f"t{i}", *flips(250, 9, 1)) for i in range(4)], ["t0", "t1", "t2", "t3"], LIMIT)
    assert found.lower_level == pytest.approx(0.96)
    raw = statistics.exact_p(1, 9, 250, -LIMIT)
    assert [g.p_holm for g in found.guards] == pytest.approx([4 * raw] * 4)
    assert [g.failed for g in found.guards] == [4 * raw <= 0.01] * 4


def test_a_guard_catches_a_task_that_the_pool_hides():
    good = [pairs(f"t{i}", *flips(1000, 0, 2)) for i in range(9)]
    bad = pairs("bad", *flips(100, 20, 0))
    found = gate.judge([*good, bad], [p.task for p in [*good, bad]], LIMIT)
    assert found.status == "fail" and [g.task for g in found.guards if g.failed] == ["bad"]
    assert found.upper < LIMIT  # the pool alone is fine
    assert gate.judge(good, [p.task for p in good], LIMIT).status == "pass"


def test_many_small_tasks_do_not_fail_by_chance_alone():
    """57 subjects, some a few documents down: Holm's correction keeps them from failing."""
    found = [pairs(f"s{i}", *flips(17, *((2, 0) if i == 0 else (1, 1)))) for i in range(57)]
    assert gate.judge(found, [p.task for p in found], LIMIT).status == "inconclusive"


def test_a_metric_between_right_and_wrong_is_judged_by_its_differences():
    generator = np.random.default_rng(0)
    base = generator.uniform(0.2, 0.9, 3000)
    down = [Pairs("t", "f1", False, base, base - shift - generator.normal(0, 0.02, 3000), []) for shift in (0, 0.01, 0.05)]
    assert [gate.judge([p], ["t"], LIMIT).status for p in down] == ["pass", "inconclusive", "fail"]
    mirrored = Pairs("t", "loss", True, base, base + 0.05 + generator.normal(0, 0.02, 3000), [])
    assert gate.judge([mirrored], ["t"], LIMIT).status == "fail"  # more of what should be less


@pytest.mark.parametrize(("n", "limit"), [(29, 0.1), (59, 0.05), (149, 0.02), (299, 0.01), (598, 0.005)])
def test_as_many_equal_answers_as_the_rule_of_three_wants_pass(n, limit):
    """(1 - limit)^n is just under 5%: fewer can't pass, and nothing else may be asked of these."""
    equal = [pairs("t", *flips(k, 0, 0)) for k in (n, n - 10)]
    assert [gate.judge([p], ["t"], limit).status for p in equal] == ["pass", "inconclusive"]


@pytest.fixture
def runs(tmp_path):
    def make(lost, won, n=1000, exit_layer=6, **options):
        first, second = flips(n, lost, won)
        write(tmp_path / "base", {"t": first})
        write(tmp_path / "cand", {"t": second}, exit_layer=exit_layer, kind="adainfer", stopper="svm", **options)
        return ["check", "--baseline", str(tmp_path / "base"), "--candidate", str(tmp_path / "cand")]

    return make


@pytest.mark.parametrize(("lost", "won", "status"), [(1, 0, 0), (40, 2, 1), (12, 6, 3)])
def test_exit_statuses(runs, capsys, lost, won, status):
    assert main([*runs(lost, won), "--max-drop", "0.01"]) == status
    out = capsys.readouterr().out
    assert out.startswith({0: "PASS", 1: "FAIL", 3: "INCONCLUSIVE"}[status])
    assert ("documents would settle it" in out) == (status == 3)


@pytest.mark.parametrize(("value", "status"), [("pass", 0), ("fail", 1), ("inconclusive", 3)])
def test_the_user_says_what_inconclusive_means(runs, value, status):
    assert main([*runs(12, 6), "--max-drop", "0.01", "--on-inconclusive", value]) == status


def test_too_little_pruning_fails(runs, capsys):
    arguments = [*runs(0, 0), "--max-drop", "0.01", "--min-pruning"]
    assert main([*arguments, "0.5"]) == 0
    assert main([*arguments, "0.51"]) == 1
    assert "pruning_ratio is 0.5000, under 0.51" in capsys.readouterr().out


def test_too_few_operations_saved_fail(runs, tmp_path, capsys):
    """Blocks are pruned, but reading them costs more than that."""
    arguments = runs(0, 0)
    samples = next((tmp_path / "cand").rglob("samples_*.jsonl"))
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    ratios = [0.2 + 1.2 * (i % 2) for i in range(len(rows))]  # 0.8 on average
    samples.write_text("".join(json.dumps({**r, "flops_ratio_total": x}) + "\n" for r, x in zip(rows, ratios, strict=True)))
    arguments += ["--max-drop", "0.01", "--min-pruning", "0.5", "--min-flops-saved"]
    assert main([*arguments, "0.2"]) == 0
    assert "flops saved, 1 - flops_ratio_total (counted): 0.2000, at least 0.2 wanted" in capsys.readouterr().out
    assert main([*arguments, "0.21"]) == 1
    assert "FAIL: flops saved are 0.2000, under 0.21" in capsys.readouterr().out
    file = tmp_path / "gate.yaml"
    file.write_text("max_drop: 0.01\nmin_flops_saved: 0.3\n")
    assert main([*arguments[:5], "--config", str(file), "--format", "json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["flops_saved"] == pytest.approx(0.2) and found["min_flops_saved"] == 0.3
    assert main([*arguments[:5], "--config", str(file), "--min-flops-saved", "0.1"]) == 0


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ([], "max-drop: it is missing"),
        (["--max-drop", "1"], "max-drop: 1 is no share"),
        (["--max-drop", "-0.1"], "max-drop: -0.1 is no share"),
        (["--max-drop", "nan"], "max-drop: nan is no share"),
        (["--max-drop", "0.01", "--min-pruning", "15"], "min-pruning: 15 is no share"),
        (["--max-drop", "0.01", "--min-flops-saved", "-1"], "min-flops-saved: -1 is no share"),
        (["--min-flops-saved", "0.1", "--reproduces"], "min-flops-saved: --reproduces does not use it"),
        (["--max-drop", "0.01", "--group", "mmlu"], "group: 'mmlu' is no group or task"),
        (["--max-drop", "0.01", "--metric", "f1"], "metric: the samples of t have no number 'f1'"),
        (["--max-drop", "0.01", "--filter", "strict"], "filter: the samples of t have no filter 'strict'"),
        (["--max-drop", "0.01", "--config", "none.yaml"], "config: none.yaml can't be read"),
        (["--max-drop", "0.01", "--run"], "run: it needs --model_args"),
        (["--reproduces"], "reproduces: adainfer svm ran with the stopper 'svm'"),
    ],
)
def test_usage_errors_are_one_sentence_and_status_2(runs, capsys, extra, words):
    assert main([*runs(0, 0), *extra]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("adainfer: error: ") and words in error


def test_min_pruning_needs_a_run_that_prunes(runs, capsys):
    assert main([*runs(0, 0, exit_layer=None), "--max-drop", "0.01", "--min-pruning", "0.1"]) == 2
    assert "logged no pruning_ratio" in capsys.readouterr().err
    assert main([*runs(0, 0, exit_layer=None), "--max-drop", "0.01", "--min-flops-saved", "0.1"]) == 2
    assert "logged no flops_ratio_total" in capsys.readouterr().err


def test_a_group_names_the_pool(tmp_path, capsys):
    good, bad = flips(1000, 0, 0), flips(1000, 12, 6)
    groups = {"all": ["some", "b"], "some": ["a"]}
    for side, name in enumerate(("base", "cand")):
        write(tmp_path / name, {"a": good[side], "b": bad[side]}, groups=groups)
    both = ["check", "--baseline", str(tmp_path / "base"), "--candidate", str(tmp_path / "cand"), "--max-drop", "0.007"]
    assert main([*both, "--group", "some"]) == 0
    assert main([*both, "--group", "b"]) == 3
    assert main([*both, "--group", "all"]) == main(both)
    assert "2000 documents of all, 18 of them discordant" in capsys.readouterr().out


def test_a_config_file_holds_the_options_and_the_command_line_goes_before_it(runs, tmp_path, capsys):
    file = tmp_path / "gate.yaml"
    file.write_text("max-drop: 0.01\non_inconclusive: fail\nreproduces: false\n")
    assert main([*runs(12, 6), "--config", str(file)]) == 1
    assert main([*runs(12, 6), "--config", str(file), "--on-inconclusive", "pass"]) == 0
    for text, words in (
        ("max_dorp: 1", "unknown key 'max_dorp'"),
        ("max_drop: a lot", "max_drop is 'a lot'; it takes a number"),
        ("on_inconclusive: perhaps", "it takes inconclusive or fail or pass"),
        ("limit: 1.5", "it takes a whole number"),
        ("reproduces: 1", "it takes true or false"),
        ("[1, 2]", "holds no options"),
        ("a: [", "is no YAML"),
        ("!!python/object/apply:os.system ['true']", "is no YAML"),
    ):
        file.write_text(text)
        assert main([*runs(0, 0), "--config", str(file)]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lost", "won", "extra", "expected"),
    [
        (0, 0, [], {}),
        (40, 0, [], {"drop of all documents": "failure"}),
        (12, 6, [], {"drop of all documents": "failure"}),
        (12, 6, ["--on-inconclusive", "pass"], {"drop of all documents": "skipped"}),
        (0, 0, ["--min-pruning", "0.9"], {"pruning": "failure"}),
        (0, 0, ["--min-flops-saved", "0.9"], {"flops saved": "failure"}),
        (0, 0, ["--min-flops-saved", "0.1"], {}),
    ],
)
def test_junit_and_summary_say_what_the_exit_status_says(runs, tmp_path, monkeypatch, lost, won, extra, expected):
    step = tmp_path / "step.md"
    step.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(step))
    code = main([*runs(lost, won), "--max-drop", "0.01", "--junit", str(tmp_path / "j.xml"), *extra])
    suites = ET.parse(tmp_path / "j.xml").getroot()
    cases = {c.get("name"): [e.tag for e in c] for c in suites.iter("testcase")}
    assert {name: tags[0] for name, tags in cases.items() if tags[0] != "system-out"} == expected
    red = sum(tags[0] == "failure" for tags in cases.values())
    assert int(suites.get("failures")) == red and (red > 0) == (code != 0)
    assert int(suites.get("tests")) == len(cases)
    text = step.read_text()
    assert text.startswith("before\n### adainfer check") and "| drop of all documents |" in text


def test_names_from_files_break_neither_xml_nor_markdown(tmp_path):
    name = 'x|<img src=a onerror=b>&"\x07'
    rows = [sample("t", i, 1) for i in range(5)]
    for run in ("base", "cand"):
        write(tmp_path / run, {"t": rows}, groups={name: ["t"]})
    arguments = ["check", "--baseline", f"{tmp_path}/base", "--candidate", f"{tmp_path}/cand", "--max-drop", "0.9"]
    files = ["--junit", str(tmp_path / "j.xml"), "--summary", str(tmp_path / "s.md")]
    assert main([*arguments, "--group", name, *files]) == 0
    assert ET.parse(tmp_path / "j.xml").getroot().find(".//testcase").get("name") == f"drop of {name[:-1]}?"
    text = (tmp_path / "s.md").read_text()
    assert "<img" not in text and "x\\|&lt;img" in text


def test_json_is_the_whole_verdict(runs, capsys):
    assert main([*runs(12, 6), "--max-drop", "0.01", "--format", "json"]) == 3
    found = json.loads(capsys.readouterr().out)
    assert found["status"] == "inconclusive" and found["documents"] == 1000 and found["discordant"] == 18
    assert found["drop"] == pytest.approx(0.006) and found["lower"] < 0.006 < found["upper"]
    assert found["documents_needed"] > 1000


def reproduces(tmp_path, change, extra=()):
    rows = [sample("t", i, i % 2) for i in range(10)]
    write(tmp_path / "base", {"t": rows})
    for row in rows:
        change(row)
    write(tmp_path / "cand", {"t": rows}, kind="adainfer", stopper="none")
    return main(["check", "--baseline", f"{tmp_path}/base", "--candidate", f"{tmp_path}/cand", "--reproduces", *extra])


def shift(by, only=None):
    def change(row):
        if only is None or row["doc_id"] == only:
            row["filtered_resps"] = [[str(float(a) + by), b] for a, b in row["filtered_resps"]]

    return change


def test_a_dense_run_reproduces_the_baseline_or_not(tmp_path, capsys):
    assert reproduces(tmp_path, lambda row: None) == 0
    assert reproduces(tmp_path, shift(5e-5)) == 0
    assert reproduces(tmp_path, shift(5e-4, only=7)) == 1
    assert "1 of 10 documents differ (the first is 7)" in capsys.readouterr().out
    assert reproduces(tmp_path, shift(5e-4, only=7), ["--tolerance", "1e-3"]) == 0

    def other_score(row):
        if row["doc_id"] == 3:
            row["acc"] = 0

    assert reproduces(tmp_path, other_score) == 1
    assert reproduces(tmp_path, lambda row: None, ["--tolerance", "-1"]) == 2


def test_the_stock_baseline_gets_none_of_our_model_args(tmp_path, monkeypatch, only_our_tasks):
    from lm_eval_adainfer.comparison import running

    seen = []
    monkeypatch.setattr(running, "_evaluate", lambda model, args, *rest: seen.append((model, args)))
    ours = (
        "stopper=none,min_layer=2,check_layers=all,generation=early,kv_policy=recompute,head_check=exact,"
        "log_features=True,prefix_cache=0"
    )
    running.run_both(f"pretrained=m,dtype=float32,{ours}", "adainfer_demo_topic", tmp_path, stock_baseline=True)
    assert seen[0] == ("hf", {"pretrained": "m", "dtype": "float32"})
    assert seen[1][0] == "adainfer" and set(seen[1][1]) == {"pretrained", "dtype", *(k.split("=")[0] for k in ours.split(","))}


def test_all_of_our_arguments_are_ours_and_none_of_hfs_is(tmp_path, monkeypatch, only_our_tasks):
    """The reference: the arguments that the model's docstring explains, but the one that HFLM has too."""
    import inspect
    import re

    from lm_eval_adainfer.comparison import running
    from lm_eval_adainfer.harness.model import AdaInferLM

    # getdoc: Python 3.13 takes the indentation from a docstring, older ones leave it
    explained = re.findall(r"^    (\w+): ", inspect.getdoc(AdaInferLM).split("Raises:")[0], re.MULTILINE)
    assert running._ours() == set(explained) - {"pretrained"} and "prefix_cache" in explained
    seen = []
    monkeypatch.setattr(running, "_evaluate", lambda model, args, *rest: seen.append((model, args)))
    given = ",".join(f"{name}=1" for name in explained if name != "pretrained")
    running.run_both(f"{given},max_length=64", "adainfer_demo_topic", tmp_path, stock_baseline=True)
    assert seen[0][0] == "hf" and set(seen[0][1]) == {"pretrained", "max_length"}
    given = "stopper=gap:0.5,prefix_cache=0,log_features=True"  # which takes two runs
    running.run_both(given, "adainfer_demo_topic", tmp_path)
    ours = {"prefix_cache": 0, "log_features": True}
    assert seen[2:] == [("adainfer", {"stopper": "none", **ours}), ("adainfer", {"stopper": "gap:0.5", **ours})]
