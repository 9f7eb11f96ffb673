"""The adapter of lm-eval's releases: both shapes of a task report the same, and leave no trace.

The installed release has one of the shapes; of the other there is a stand-in here, so that both are tested on either.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import SimpleNamespace

import pytest
from helpers.synthetic_runs import sample, write
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api.metrics import mean

from lm_eval_adainfer import releases
from lm_eval_adainfer.comparison import compare, names, runs

BETTER = {"depth": False, "sound": True}


def numbers(doc_id, true_id):
    return {"depth": 10.0 * doc_id + true_id, "sound": 1.0}


class Whole:
    """A task of 0.4.13's shape: it makes the numbers of a document itself."""

    def doc_iterator(self, *, samples=None):
        chosen = samples if samples is not None else range(4)
        return enumerate({"n": i} for i in chosen)

    def process_results(self, doc, results):
        return {"acc": float(doc["n"] % 2)}

    def aggregation(self):
        return {"acc": mean}

    def higher_is_better(self):
        return {"acc": True}

    def evaluated(self, samples=None):
        """As lm-eval 0.4.13 does: numbers of every document, by its number among all, and their aggregates."""
        rows = {}
        for place, doc in self.doc_iterator(samples=samples):
            rows[samples[place] if samples else place] = self.process_results(doc, [])
        return rows, {name: f([row[name] for row in rows.values()]) for name, f in self.aggregation().items() if name in rows[min(rows)]}


@dataclass(frozen=True)
class Scored:
    doc_id: int
    reference: object
    scores: dict


class Scorer:
    def __init__(self, name):
        self.name, self.reduced = name, {}

    def set_results(self, scored):
        self.reduced = {n: {name: values[0] for name, values in one.scores.items()} for n, one in scored.items()}

    def aggregate(self, reduced, bootstrap_iters=None, aggregation_overrides=None):
        given = {"acc": mean, **(aggregation_overrides or {})}
        return {name: given[name]([row[name] for row in reduced.values()]) for name in next(iter(reduced.values()))}


class Parts:
    """A task of 0.5.0.dev1's shape: scorers make the numbers, of all documents at once."""

    def __init__(self, *filters):
        self.scorers = [Scorer(name) for name in filters or ("none",)]
        self.instances = [SimpleNamespace(doc_id=i, repeats=1, resps=["a"]) for i in range(4)]

    def higher_is_better(self):
        return {"acc": True}

    def process_instances(self):
        assert all(len(i.resps) == 1 for i in self.instances)
        for scorer in self.scorers:
            scorer.set_results({i.doc_id: Scored(i.doc_id, None, {"acc": [float(i.doc_id % 2)]}) for i in self.instances})

    def evaluated(self):
        self.process_instances()
        return self.scorers[0].reduced, self.scorers[0].aggregate(self.scorers[0].reduced)


@pytest.mark.parametrize("task", [Whole(), Parts(), Parts("strict", "loose")], ids=["0.4.13", "0.5.0.dev1", "filters"])
def test_numbers_stand_beside_the_tasks_own_for_a_while(task):
    before, attributes = task.evaluated(), set(vars(task))
    with releases.with_numbers(task, numbers, BETTER):
        rows, means = task.evaluated()
        assert rows == {i: {"acc": float(i % 2), "depth": 11.0 * i, "sound": 1.0} for i in range(4)}
        assert means == {"acc": 0.5, "depth": 11 * 1.5, "sound": 1.0}
        assert task.higher_is_better() == {"acc": True, **BETTER}
    assert task.evaluated() == before and set(vars(task)) == attributes and "acc" in before[1]
    for scorer in getattr(task, "scorers", ()):
        assert "set_results" not in vars(scorer) and "aggregate" not in vars(scorer)


def test_chosen_documents_are_told_by_both_their_numbers():
    task = Whole()
    with releases.with_numbers(task, numbers, BETTER):
        rows, _ = task.evaluated(samples=[7, 3])
    assert [row["depth"] for row in rows.values()] == [7.0, 13.0] and list(rows) == [7, 3]


def test_an_answer_that_only_pads_a_process_is_no_response():
    task = Parts()
    task.instances[-1].resps += ["a", "a"]
    with releases.with_numbers(task, numbers, BETTER):
        task.process_instances()  # which would refuse them
    assert task.instances[-1].resps == ["a"]


@given(st.lists(st.integers(0, 99), min_size=1, unique=True))
def test_chosen_documents_keep_their_numbers_where_lm_eval_looks_them_up_by_themselves(chosen):
    how = {"samples": {"t": chosen}}
    releases.choose_documents({"t": Parts()}, how)
    found = how["samples"]["t"]
    assert [found[n] for n in found] == list(found) == chosen and len(found) == len(chosen)
    releases.choose_documents({"t": Whole()}, untouched := {"samples": {"t": chosen}})
    assert untouched["samples"]["t"] is chosen


def test_two_groups_ask_one_task_under_two_names():
    def built():
        task = SimpleNamespace(task_name="t", instances=[])

        def build_all_requests(**options):
            task.instances = [SimpleNamespace(task_name="t") for _ in range(2)]

        task.build_all_requests = build_all_requests
        return task

    tasks = {"a::t": built(), "b::t": built()}
    for name, task in tasks.items():
        build = task.build_all_requests
        with releases.requests_named(task, name):
            task.build_all_requests()
        assert {i.task_name for i in task.instances} == {name} and task.build_all_requests is build
    assert list(releases.by_own_name(tasks)) == ["t"]
    group = SimpleNamespace(get_all_tasks=lambda: [tasks["b::t"], object()])
    assert releases.members(group, tasks) == ["b::t"]
    asked = releases.asked_by_own_name({"a::t": tasks["a::t"]}, {"limit": None, "samples": {"a::t": [1], "x": [2]}})
    assert asked == {"limit": None, "samples": {"t": [1]}}


@pytest.mark.parametrize("gives_back", [True, False], ids=["0.5.0.dev1", "0.4.13"])
def test_only_known_names_match(gives_back):
    known = ["a_1", "a_2", "b"]

    def match_tasks(patterns):
        found = [(p, [k for k in known if fnmatchcase(k, p.partition("@")[0])]) for p in patterns]
        return sorted({n for p, names in found for n in (names or ([p] if gives_back else []))})

    manager = SimpleNamespace(all_tasks=known, match_tasks=match_tasks)
    assert releases.matched(manager, ["a*", "nothing", "no*"]) == ["a_1", "a_2"]
    assert releases.matched(manager, ["nothing"]) == []


def test_a_task_is_made_by_its_own_class_or_by_one_for_its_output_type(monkeypatch):
    class Base:
        pass

    class Choices(Base):
        def kind(self):
            return "choices"

    class Ours(Base):
        def kind(self):
            return f"our {super().kind()}"

    for name in releases._CLASSES.values():
        monkeypatch.delattr(releases._tasks, name, raising=False)
    assert releases.class_for(Ours, "multiple_choice") is Ours
    monkeypatch.setattr(releases._tasks, "MultipleChoiceTask", Choices, raising=False)
    assert releases.class_for(Ours, "multiple_choice")().kind() == "our choices"
    assert issubclass(releases.class_for(Ours, "multiple_choice"), Ours)
    assert releases.class_for(Ours, "generate_until") is Ours
    assert releases.class_for(Choices, "multiple_choice") is releases.class_for(Base, "multiple_choice") is Choices


# ------------------------------------------------------------------------------------------------ runs on disk
def as_0_5(folder):
    """A run of 0.4.13's form in that of 0.5.0.dev1: names behind the group's, responses in lists of their own."""
    (file,) = folder.rglob("results_*.json")
    results = json.loads(file.read_text())
    longer = {name: f"g::{name}" for name in ("t", "u")}
    for section in ("results", "configs", "versions", "n-shot", "higher_is_better", "n-samples"):
        if section in results:
            results[section] = {longer.get(name, name): value for name, value in results[section].items()}
    for name, config in results["configs"].items():
        config["task"] = name.removeprefix("g::")
    results["group_subtasks"] = {"g": list(longer.values())}
    file.write_text(json.dumps(results))
    for samples in folder.rglob("samples_*.jsonl"):
        lines = [json.loads(line) for line in samples.read_text().splitlines()]
        for line in lines:
            line["filtered_resps"] = [[response] for response in line["filtered_resps"]]
        samples.write_text("".join(json.dumps(line) + "\n" for line in lines))
        samples.rename(samples.with_name(samples.name.replace("samples_", "samples_g::")))
    return folder


def test_runs_of_both_releases_are_the_same_tasks_with_the_same_answers(tmp_path):
    tasks = {"t": [1, 0, 1, 1, 0], "u": [0, 1, 1]}
    for name, exits in (("dense", {}), ("early", {"exit_layer": 5.0})):
        for form in ("old", "new"):
            write(tmp_path / f"{name}-{form}", {t: [sample(t, i, v, **exits) for i, v in enumerate(vs)] for t, vs in tasks.items()},
                  groups={"g": ["t", "u"]})  # fmt: skip
        as_0_5(tmp_path / f"{name}-new")
    old, new = (runs.load(tmp_path / f"dense-{form}") for form in ("old", "new"))
    assert list(new.tasks) == list(old.tasks) == ["t", "u"] and new.groups == old.groups
    for name, task in old.tasks.items():
        assert new.tasks[name].documents == task.documents
    for form in ("old", "new"):
        rows = compare.compare(old, runs.load(tmp_path / f"early-{form}")).rows
        assert [row.difference for row in rows] == [0] * len(rows)


@given(st.dictionaries(st.sampled_from(["t", "u", "a::t", "b::t", "a::u", "::t", "a::b::t"]), st.one_of(
    st.none(), st.fixed_dictionaries({"task": st.one_of(st.none(), st.sampled_from(["t", "u", "a::t", "b::t", ""]))}),
)))  # fmt: skip
def test_shorter_names_are_ends_of_the_longer_ones_and_never_two_tasks(configs):
    short = names.own_names(configs)
    assert all(long.endswith(f"::{own}") and configs[long]["task"] == own for long, own in short.items())
    renamed = names.renamed({"configs": configs, "results": configs, "group_subtasks": {"g": [*configs, 3], "h": 7}}, short)
    assert len(renamed["configs"]) == len(renamed["results"]) == len(configs)
    assert renamed["group_subtasks"] == {"g": [*(short.get(n, n) for n in configs), 3], "h": 7}


def test_a_run_that_has_a_task_twice_keeps_both_names():
    configs = {"a::t": {"task": "t"}, "b::t": {"task": "t"}, "a::u": {"task": "u"}}
    assert names.own_names(configs) == {"a::u": "u"}
    assert names.own_names({"a::t": {"task": "t"}, "t": {"task": "t"}}) == {}
