"""The packaged tasks: their prompts, where their shots come from, their splits and their scores. No network."""

import importlib.util
import json
import random
import re
import shutil
from pathlib import Path

import datasets
import huggingface_hub
import lm_eval.tasks
import pytest
import yaml
from helpers.tasks import OFFLINE, our_tasks, own_names
from hypothesis import given
from hypothesis import strategies as st
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from lm_eval_adainfer import releases
from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.harness import loading
from lm_eval_adainfer.paths import task_configs
from lm_eval_adainfer.tasks import mmlu
from lm_eval_adainfer.tasks.qa import DocumentSeededSampler, QATask, TaskSeededSampler
from lm_eval_adainfer.tasks.squad import generation_scores
from lm_eval_adainfer.tasks.word import hash_split, load_words

REPO = Path(__file__).resolve().parents[1]
SHARED_HF = REPO.parent / "shared" / "hf"
needs_shared_data = pytest.mark.skipif(not SHARED_HF.is_dir(), reason="no ../shared/hf")


# ------------------------------------------------------------------------------------------------ the sampler

docs = st.integers(0, 60).map(lambda i: {"id": i, "text": f"question {i}"})
pools = st.lists(docs, min_size=1, max_size=40)  # with duplicates


def text(doc):
    return doc["text"]


def room(pool, doc):
    return len({text(shot) for shot in pool} - {text(doc)})


@given(pool=pools, doc=docs, seed=st.one_of(st.none(), st.integers(0, 9999)), others=st.lists(docs, max_size=5))
def test_shots_depend_on_seed_and_document_alone(pool, doc, seed, others):
    n = min(5, room(pool, doc))
    expected = DocumentSeededSampler(pool).set_rnd(seed).sample(n, doc, question=text)
    busy = DocumentSeededSampler(pool, rnd=99).set_rnd(seed)
    for other in others:
        busy.sample(min(3, room(pool, other)), other, question=text)
    random.random()
    reordered_keys = dict(reversed(doc.items()))
    assert busy.sample(n, reordered_keys, question=text) == expected


@given(pool=pools, doc=docs, seed=st.integers(0, 99))
def test_shots_are_distinct_come_from_the_pool_and_never_are_the_document(pool, doc, seed):
    everything = DocumentSeededSampler(pool).set_rnd(seed).sample(room(pool, doc), doc, question=text)
    assert {text(shot) for shot in everything} == {text(shot) for shot in pool} - {text(doc)}
    assert len(everything) == room(pool, doc)


@given(pool=pools, doc=docs, seed=st.integers(0, 99), more=st.lists(docs, max_size=9))
def test_fewer_shots_are_the_first_of_more_shots_even_beyond_the_first_pool(pool, doc, seed, more):
    sampler = DocumentSeededSampler().set_rnd(seed)

    def sample(n):
        return sampler.sample(n, doc, pools=[("first", pool), ("second", more)], question=text)

    full = sample(room(pool + more, doc))
    assert all(sample(n) == full[:n] for n in range(len(full)))
    assert {text(shot) for shot in full[: room(pool, doc)]} <= {text(shot) for shot in pool}


@given(pool=pools, doc=docs)
def test_too_small_a_pool_is_one_sentence_about_num_fewshot(pool, doc):
    n = room(pool, doc) + 1
    with pytest.raises(AdaInferError, match=rf"^num_fewshot={n} is more .* there are {n - 1} few-shot documents"):
        DocumentSeededSampler(pool).sample(n, doc, question=text)


def test_a_copy_with_another_id_and_label_is_no_shot():
    doc = {"id": 1, "text": "good film", "label": 1}
    pool = [{"id": 2, "text": "good film", "label": 0}, {"id": 3, "text": "bad film", "label": 0}]
    assert DocumentSeededSampler(pool).sample(1, doc, question=text) == [pool[1]]


def test_draws_are_the_same_in_every_process():
    """Pinned: a change here changes every few-shot number measured before."""
    sampler = DocumentSeededSampler([{"id": i} for i in range(100_000)]).set_rnd(1234)
    assert [doc["id"] for doc in sampler.sample(5, {"text": "é", "label": 1})] == [
        12967,
        89888,
        38060,
        97481,
        55059,
    ]


def test_documents_and_seeds_get_different_shots_and_the_task_seeded_sampler_the_same_ones():
    pool = [{"text": f"{i}"} for i in range(1000)]
    one, two = {"text": "one"}, {"text": "two"}
    sampler = DocumentSeededSampler(pool).set_rnd(1)
    assert sampler.sample(5, one) != sampler.sample(5, two)
    assert sampler.sample(5, one) != sampler.set_rnd(2).sample(5, one)
    fixed = TaskSeededSampler(pool).set_rnd(1)
    shots = fixed.sample(5, one)
    assert shots == fixed.sample(5, two) != fixed.set_rnd(2).sample(5, one)
    fixed.set_rnd(1)
    assert fixed.sample(5, shots[1]) == [shots[0], *fixed.sample(6, one)[2:]]


def test_without_the_document_the_sampler_says_what_to_write_in_the_yaml():
    with pytest.raises(AdaInferError, match=r"class: !function lm_eval_adainfer\.tasks\.qa\.QATask"):
        DocumentSeededSampler([{"text": "a"}]).sample(1)


# -------------------------------------------------------------------------------------- the YAMLs on toy data


def toy_rows(path, name, split, n):
    """Rows with the columns of the real data sets; every text names its data set, split and number."""
    tags = [f"{name or path.split('/')[-1]} {split} {i}" for i in range(n)]
    letters = ["A", "B", "C", "D", "E"]
    if path == "nyu-mll/glue":
        return [{"sentence": f"{tag} ", "label": i % 2, "idx": i} for i, tag in enumerate(tags)]
    if path == "fancyzhx/ag_news":
        return [{"text": tag, "label": i % 4} for i, tag in enumerate(tags)]
    if path == "tau/commonsense_qa":
        choices = {"label": letters, "text": ["one", "two", "three", "four", "five"]}
        return [
            {"id": tag, "question": tag, "choices": choices, "answerKey": letters[i % 5]} for i, tag in enumerate(tags)
        ]
    if path == "cais/mmlu":
        return [{"question": tag, "choices": ["1", " 2", "[3]", "4"], "answer": i % 4} for i, tag in enumerate(tags)]
    assert path == "rajpurkar/squad_v2"
    return [
        {
            "id": tag,
            "context": f"context of {tag}. ",
            "question": f"{tag}?",
            "answers": {"text": [f"answer {i}", "x"], "answer_start": [0, 1]}
            if i % 2
            else {"text": [], "answer_start": []},
        }
        for i, tag in enumerate(tags)
    ]


@pytest.fixture
def toy_data(monkeypatch, tmp_path):
    """Every data set of the packaged tasks in small. Returns the sizes, to be changed by a test."""
    sizes = {path: {"train": 8, "validation": 6, "test": 6} for path in ("nyu-mll/glue", "rajpurkar/squad_v2")}
    sizes |= {path: {"train": 8, "validation": 6, "test": 6} for path in ("fancyzhx/ag_news", "tau/commonsense_qa")}
    sizes["cais/mmlu"] = {"dev": 5, "validation": 3, "test": 6}

    def load_dataset(path, name=None, split=None, **kwargs):
        rows = {s: toy_rows(path, name, s, n) for s, n in sizes[path].items()}
        loaded = datasets.DatasetDict({s: datasets.Dataset.from_list(r) for s, r in rows.items()})
        if isinstance(split, list):  # as lm-eval 0.5.0.dev1 asks: "validation[:]"
            names = [one.partition("[")[0] for one in split]
            if missing := set(names) - set(loaded):
                raise ValueError(f"Unknown split {missing}")  # as datasets says it
            return [loaded[one] for one in names]
        return loaded[split] if split else loaded

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    pairs = [{"input": f"word {i}", "output": f"answer {i}"} for i in range(60)]
    for file in (task_configs() / "word").glob("[!_]*.yaml"):
        (tmp_path / f"{file.stem}.json").write_text(json.dumps(pairs))
    monkeypatch.setenv("ADAINFER_DATA", str(tmp_path))
    dev_examples = mmlu.dev_examples
    dev_examples.cache_clear()
    yield sizes
    dev_examples.cache_clear()


@pytest.fixture(scope="module")
def manager():
    return our_tasks()


def changed(name, overrides):
    """What a user's group writes to run a packaged task with other settings."""
    return {"group": "own", "task": [{"task": name, **overrides}]}


def load(manager, name, **overrides):
    task = releases.by_own_name(manager.load([changed(name, overrides)])["tasks"])[name]
    task.set_fewshot_seed(1234)
    return task


def requests(task, num_fewshot=2, **kwargs):
    """[(context, continuation)] of all documents."""
    task.set_config("num_fewshot", num_fewshot)
    task.build_all_requests(**kwargs)
    return [instance.arguments for instance in task.instances]


# task: (the first document's question part, its continuations, any shot as a pattern)
EXPECTED = {
    "adainfer_sst2": (
        "Q: sst2 validation 0\nA:",
        [" negative", " positive"],
        r"Q: sst2 train \d\nA: (negative|positive)\n\n",
    ),
    "adainfer_ag_news": (
        "Q: ag_news test 0\nA:",
        [" World", " Sports", " Business", " Technology"],
        r"Q: ag_news train \d\nA: (World|Sports|Business|Technology)\n\n",
    ),
    "adainfer_commonsense_qa": (
        "Q: commonsense_qa validation 0\nA. one\nB. two\nC. three\nD. four\nE. five\nA:",
        [" A", " B", " C", " D", " E"],
        r"Q: commonsense_qa train \d\nA. one\nB. two\nC. three\nD. four\nE. five\nA: [A-E]\n\n",
    ),
    "adainfer_mmlu_anatomy": (
        "Q: anatomy test 0\nA. 1\nB. 2\nC. [3]\nD. 4\nA:",
        [" A", " B", " C", " D"],
        r"Q: anatomy dev \d\nA. 1\nB. 2\nC. \[3\]\nD. 4\nA: [A-D]\n\n",
    ),
    "adainfer_squad": (
        "Q: context of squad_v2 validation 0.\nsquad_v2 validation 0?\nA:",
        [" unanswerable"],
        r"Q: context of squad_v2 train \d.\nsquad_v2 train \d\?\nA: (answer \d|unanswerable)\n\n",
    ),
    "adainfer_word_antonym": ("Q: word 1\nA:", [" answer 1"], r"Q: word \d+\nA: answer \d+\n\n"),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_prompts_are_the_papers_template(name, manager, toy_data):
    question, continuations, shot = EXPECTED[name]
    task = load(manager, name)
    if name == "adainfer_word_antonym":
        question = f"Q: {task.eval_docs[0]['input']}\nA:"
        continuations = [" " + task.eval_docs[0]["output"]]
    assert requests(task, 0)[: len(continuations)] == [(question, answer) for answer in continuations]
    context = requests(task, 2)[0][0]
    assert context.endswith(question)
    assert re.fullmatch(f"({shot}){{2}}", context.removesuffix(question))


def test_shots_show_the_right_answer(manager, toy_data):
    context = requests(load(manager, "adainfer_sst2"), 8)[0][0]
    assert {f"Q: sst2 train {i}\nA: {['negative', 'positive'][i % 2]}" for i in range(8)} < set(context.split("\n\n"))


@pytest.mark.parametrize("name", [*EXPECTED, "adainfer_squad_generate"])
def test_prompts_do_not_depend_on_limit_rank_or_order(name, manager, toy_data):
    everything = requests(load(manager, name))
    task = load(manager, name)
    assert requests(task, limit=2) == everything[: len(task.instances)]
    by_rank = [requests(load(manager, name), rank=rank, world_size=2) for rank in (1, 0)]
    assert sorted(map(str, by_rank[0] + by_rank[1])) == sorted(map(str, everything))


@pytest.mark.parametrize("name", [name for name in EXPECTED if "mmlu" not in name])
def test_a_training_document_that_is_evaluated_is_not_among_its_own_shots(name, manager, toy_data):
    task = load(manager, name)
    task.config.test_split = task.config.training_split
    n = len(task.eval_docs) - 1
    for doc in task.eval_docs:
        assert task.fewshot_context(doc, num_fewshot=n).count(task.doc_to_text(doc)) == 1
    with pytest.raises(AdaInferError, match=f"num_fewshot={n + 1}"):
        task.fewshot_context(task.eval_docs[0], num_fewshot=n + 1)


def test_text_is_rendered_as_lm_eval_renders_it(manager, toy_data):
    for name in EXPECTED:
        task = load(manager, name)
        for doc in task.eval_docs:
            stock = super(QATask, task)
            assert task.doc_to_text(doc) == stock.doc_to_text(doc)
            assert task.doc_to_text(doc, "{{7}}") == stock.doc_to_text(doc, "{{7}}")
            for template in (None, 1, ["a"], " {{7}}", "{{7}}", "", "[", "[7", "[1, 'a']", "[x]", "['{{7}}']", "{% if 1 %}yes{% endif %}"):
                assert task.doc_to_target(doc, template) == stock.doc_to_target(doc, template)


@pytest.fixture(scope="module")
def once():
    """What ``lm_eval --metadata shots=per_task`` makes."""
    return our_tasks({"shots": "per_task"})


@pytest.mark.parametrize("name", [*EXPECTED, "adainfer_squad_generate"])
def test_shots_per_task_are_the_same_for_all_documents_and_follow_the_seed(name, once, toy_data):
    task = load(once, name)
    question = task.doc_to_text

    def shots(n):
        """The prompts without what is asked."""
        task.set_config("num_fewshot", n)
        contexts = [(task.fewshot_context(doc, num_fewshot=n), question(doc)) for doc in task.eval_docs]
        assert all(context.endswith(asked) for context, asked in contexts)
        return {context.removesuffix(asked) for context, asked in contexts}

    (four,) = shots(4)
    assert four.count("Q: ") == 4
    assert {load(once, name).fewshot_context(task.eval_docs[0], num_fewshot=4).startswith(four)} == {True}
    (five,) = shots(5)
    assert five.startswith(four)
    task.set_fewshot_seed(4321)
    (others,) = shots(4)
    assert others != four


def test_mmlu_per_task_has_the_five_dev_examples_then_the_next_source(once, toy_data):
    contexts = {context.rsplit("Q:", 1)[0] for context, _ in requests(load(once, "adainfer_mmlu_anatomy"), 7)}
    (context,) = contexts
    assert set(re.findall(r"Q: anatomy (dev \d)", context)) == {f"dev {i}" for i in range(5)}
    assert context.count("Q: anatomy validation") == 2


def test_per_task_a_document_among_the_shots_leaves_its_place_to_the_next_of_the_draw(once, toy_data):
    task = load(once, "adainfer_sst2")
    task.config.validation_split = task.config.training_split  # as where a task has one split only
    drawn = TaskSeededSampler(list(task.eval_docs)).set_rnd(1234)
    order = drawn.sample(8, {"sentence": "none of them"}, question=task.question)
    prompts = {task.question(doc): task.fewshot_context(doc, num_fewshot=3) for doc in task.eval_docs}
    for place, doc in enumerate(order):
        expected = [shot for n, shot in enumerate(order[:4]) if n != place][:3]
        shown = re.findall(r"Q: (.*)\nA: ", prompts[task.question(doc)])
        assert shown == [task.question(shot) for shot in expected]


@pytest.mark.parametrize("kind", ["yaml", "group"])
def test_shots_can_be_set_in_a_group_or_a_yaml_of_ones_own(kind, manager, toy_data, tmp_path):
    """The example of task_configs/README.md, and a group's override."""
    if kind == "yaml":
        example = (task_configs() / "README.md").read_text().split("```yaml\n")[1].split("```")[0]
        (tmp_path / "mine.yaml").write_text(example.replace("/path/to/task_configs", str(task_configs())))
        task = manager.load([str(tmp_path / "mine.yaml")])["tasks"]["my_sst2"]
        task.set_fewshot_seed(1234)
    else:
        task = load(manager, "adainfer_sst2", metadata={"shots": "per_task"})
    assert len({context.rsplit("Q:", 1)[0] for context, _ in requests(task, 4)}) == 1
    assert task.dump_config()["metadata"]["shots"] == "per_task"


def test_a_wrong_way_to_draw_shots_is_one_sentence(manager, toy_data):
    with pytest.raises(AdaInferError, match=r"^metadata: shots='once' is neither per_document nor per_task$"):
        load(manager, "adainfer_sst2", metadata={"shots": "once"})
    with pytest.raises(AdaInferError, match=r"^metadata: shots=per_task needs .* adainfer_sst2 has 'first_n'; leave"):
        load(manager, "adainfer_sst2", metadata={"shots": "per_task"}, fewshot_config={"sampler": "first_n"})


@pytest.mark.parametrize("sampler", ["first_n", "default"])
def test_other_samplers_work_too(sampler, manager, toy_data):
    task = load(manager, "adainfer_sst2", fewshot_config={"sampler": sampler})
    contexts = {context.rsplit("Q:", 1)[0] for context, _ in requests(task, 3)}
    assert all(context.count("Q: sst2 train") == 3 for context in contexts)
    assert len(contexts) == (6 if sampler == "default" else 1)
    json.dumps(task.dump_config())


# ------------------------------------------------------------------------------------------ MMLU's many shots


def test_mmlu_shots_beyond_dev_come_from_validation_then_from_other_subjects(manager, toy_data, caplog):
    task = load(manager, "adainfer_mmlu_anatomy")
    context = requests(task, 5)[0][0]
    assert context.count("Q: anatomy dev") == 5 and "validation split" not in caplog.text
    context = requests(task, 20)[0][0]
    shots = [shot for shot in context.split("\n\n") if shot.startswith("Q: ")][:-1]
    assert [shot.split()[2] for shot in shots[5:8]] == ["validation"] * 3
    assert all(" dev " in shot and "anatomy" not in shot for shot in shots[8:]) and len(shots) == 20
    assert [record.getMessage() for record in caplog.records if "validation split" in record.getMessage()] == [
        "adainfer_mmlu_anatomy: a subject has 5 dev examples; further shots come from its validation split, then from "
        "other subjects' dev (the results say how many: metadata.fewshot_sources)."
    ]
    sources = task.dump_config()["metadata"]["fewshot_sources"]
    assert sources == {"dev": 5, "validation": 3, "dev of other subjects": 12}


def test_other_subjects_are_loaded_only_when_they_are_needed(manager, toy_data, monkeypatch):
    asked = []
    monkeypatch.setattr(mmlu, "dev_examples", lambda path, subject: asked.append(subject) or ())
    task = load(manager, "adainfer_mmlu_anatomy")
    requests(task, 8)
    assert task.dump_config()["metadata"]["fewshot_sources"] == {"dev": 5, "validation": 3} and not asked
    with pytest.raises(AdaInferError, match="num_fewshot=9"):
        requests(task, 9)
    assert sorted(asked) == sorted(set(mmlu.SUBJECTS) - {"anatomy"})


def test_mmlu_without_a_validation_split_says_so(manager, toy_data):
    del toy_data["cais/mmlu"]["validation"]
    task = load(manager, "adainfer_mmlu_virology")
    assert requests(task, 10)[0][0].count("Q: ") == 11
    assert task.dump_config()["metadata"]["fewshot_sources"] == {
        "dev": 5,
        "validation (not available)": 0,
        "dev of other subjects": 5,
    }


def index_of(manager):
    """A task manager's entries by name; 0.5.0.dev1 keeps them to itself."""
    return manager._task_index if hasattr(manager, "_task_index") else manager.task_index


class Oracle(LM):
    """Knows the answers it was given, whatever the question."""

    def __init__(self, answers=()):
        super().__init__()
        self.answers = list(answers)

    def loglikelihood(self, requests):
        return [(-float(len(request.args[1])), True) for request in requests]

    def loglikelihood_rolling(self, requests):
        raise NotImplementedError

    def generate_until(self, requests):
        return self.answers[: len(requests)]


def evaluate(manager, tasks, lm=None, **kwargs):
    return own_names(
        simple_evaluate(lm or Oracle(), tasks=tasks, task_manager=manager, bootstrap_iters=0, **kwargs)
    )


def test_the_results_file_says_where_shots_came_from_and_is_plain_json(manager, toy_data):
    results = evaluate(manager, ["adainfer_mmlu_anatomy", *EXPECTED], num_fewshot=7)
    configs = json.loads(json.dumps(results["configs"]))
    assert configs["adainfer_mmlu_anatomy"]["metadata"]["fewshot_sources"] == {"dev": 5, "validation": 2}
    assert configs["adainfer_sst2"]["metadata"]["fewshot_sources"] == {"train": 7}
    samplers = {config["fewshot_config"]["sampler"] for config in configs.values()}
    assert samplers == {"lm_eval_adainfer.tasks.qa.DocumentSeededSampler"}
    assert {config["metadata"]["shots"] for config in configs.values()} == {"per_document"}
    assert all(results["n-shot"][name] == 7 and results["versions"][name] == 1.0 for name in EXPECTED)


def test_mmlu_is_weighted_by_documents_and_has_stock_categories(manager, toy_data):
    loaded = manager.load(["adainfer_mmlu"])
    leaves = {name.removeprefix("adainfer_mmlu_") for name in releases.by_own_name(loaded["tasks"])}
    assert leaves == set(mmlu.SUBJECTS) and len(leaves) == 57
    assert set(loaded["groups"]) == {
        "adainfer_mmlu",
        *(f"adainfer_mmlu_{category}" for category in ("stem", "humanities", "social_sciences", "other")),
    }
    for group in loaded["groups"].values():
        assert [(m.metric, m.weight_by_size) for m in group.aggregate_metric_list] == [("acc", True)]
    stock_folder = Path(lm_eval.tasks.__file__).parent / "mmlu" / "default"
    stock = TaskManager(include_path=str(stock_folder), include_defaults=False)
    for category in mmlu.CATEGORIES:
        ours = index_of(manager)[f"adainfer_mmlu_{category}_tasks"].tags
        theirs = index_of(stock)[f"mmlu_{category}_tasks"].tags
        assert {f"adainfer_{name}" for name in theirs} == ours


def test_the_papers_group_holds_everything_and_no_common_score(manager, toy_data):
    results = evaluate(manager, ["adainfer_paper"], limit=1)
    leaves = results["results"].keys() - results["groups"].keys() - {"adainfer_paper"}
    assert len(leaves) == 57 + 27 + 4
    assert "acc,none" in results["groups"]["adainfer_mmlu"] and "acc,none" in results["groups"]["adainfer_word"]
    assert not any(key.startswith("acc") for key in results["results"]["adainfer_paper"])


# -------------------------------------------------------------------------------------------------- the files


def yaml_files():
    return [file for file in task_configs().rglob("*.yaml") if "demo" not in file.parts]


def test_every_yaml_is_indexed_and_every_name_is_ours(manager):
    indexed = {entry.yaml_path for entry in index_of(manager).values() if entry.yaml_path}
    assert {file.resolve() for file in yaml_files()} <= {path.resolve() for path in indexed}
    assert [name for name in manager.all_tasks if not name.startswith("adainfer_")] == []
    assert len([name for name in manager.all_subtasks if name.startswith("adainfer_word_")]) == 27
    of_groups = [index_of(manager)[name].cfg["task"] for name in manager.all_groups]
    assert {member for members in of_groups for member in members} <= set(manager.all_tasks)


@pytest.mark.parametrize(
    ("names", "path", "alone"),
    [
        (["adainfer_sst2", "adainfer_mmlu", "adainfer_mmlu_stem_tasks", "adainfer_word_*"], None, True),
        (["adainfer_sst2", "sst2"], None, False),
        (["adainfer_nothing"], None, False),
        (["*"], None, False),
        ([], None, False),
        (["adainfer_sst2"], "a folder", False),  # whose YAMLs may name any task
    ],
    ids=str,
)
def test_lm_evals_own_tasks_are_read_only_where_a_name_may_be_theirs(names, path, alone, monkeypatch, tmp_path):
    made = []

    def maker(include_path=None, include_defaults=True, metadata=None):
        made.append((include_path, include_defaults, metadata))
        return our_tasks(metadata)

    monkeypatch.setattr("lm_eval.tasks.TaskManager", maker)
    path = path and str(tmp_path)
    loading.task_manager({"a": 1}, path, {"b": 2}, names)
    told = {"a": 1, "b": 2}
    assert made[-1] == ((str(task_configs()), False, told) if alone else (path, True, told))


def test_no_task_blocks_num_fewshot():
    for file in [*yaml_files(), *task_configs().rglob("_*_yaml")]:
        values = {key.value: node.value for key, node in yaml.compose(file.read_text()).value}
        assert values.get("num_fewshot") != "0", file  # lm-eval would then ignore --num_fewshot


def test_generated_files_are_what_the_generator_writes():
    spec = importlib.util.spec_from_file_location("_generate", task_configs() / "_generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    files = generate.files()
    assert len(files) == 57 + 5 + 27 + 1
    for name, content in files.items():
        assert (task_configs() / name).read_text(encoding="utf-8") == content


# ------------------------------------------------------------------------------------------------- word tasks


def test_hash_split_is_fixed_and_has_the_shares_of_the_metrics_page():
    splits = [hash_split(f"word {i}") for i in range(20_000)]
    shares = {split: splits.count(split) / len(splits) for split in set(splits)}
    assert shares == pytest.approx({"train": 0.3, "validation": 0.2, "test": 0.5}, abs=0.02)
    assert [hash_split(word) for word in ("good", "été", "New York")] == ["train", "validation", "train"]
    assert hash_split(" good ") == hash_split("good")


def test_word_pairs_are_stripped_split_once_and_the_first_output_counts(monkeypatch, tmp_path):
    pairs = [{"input": f"w{i}", "output": f" o{i} "} for i in range(200)] + [{"input": "w0 ", "output": "other"}]
    (tmp_path / "mine.json").write_text(json.dumps(pairs))
    monkeypatch.setenv("ADAINFER_DATA", str(tmp_path))
    words = load_words("mine")
    assert all(hash_split(doc["input"]) == split for split, rows in words.items() for doc in rows)
    loaded = {doc["input"]: doc["output"] for rows in words.values() for doc in rows}
    assert loaded == {f"w{i}": f"o{i}" for i in range(200)} and sum(map(len, words.values())) == 200


def test_a_missing_word_file_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("ADAINFER_DATA", str(tmp_path))
    with pytest.raises(AdaInferError, match=r"^ADAINFER_DATA=.* has no readable antonym\.json; unset it"):
        load_words("antonym")


def test_words_come_from_their_public_address_and_an_unreachable_one_names_adainfer_data(monkeypatch):
    asked = []

    def load_dataset(path, data_files, split):
        asked.append((path, data_files, split))
        return datasets.Dataset.from_list([{"input": f"{i}", "output": f"{i + 1}"} for i in range(50)])

    monkeypatch.delenv("ADAINFER_DATA", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert sum(map(len, load_words("next_item").values())) == 50
    address = "https://raw.githubusercontent.com/ericwtodd/function_vectors/main/dataset_files/abstractive/"
    assert asked == [("json", address + "next_item.json", "train")]

    def offline(*args, **kwargs):
        raise ConnectionError

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(AdaInferError, match=r"set ADAINFER_DATA to a folder that holds next_item\.json\.$"):
        load_words("next_item")


# ------------------------------------------------------------------------------------------------------ SQuAD


@pytest.mark.parametrize(
    ("gold", "answer", "exact_match", "f1"),
    [
        (["Normandy", "in Normandy"], " The normandy.", 1, 1),
        (["Normandy", "in Normandy"], "the coast in Normandy", 0, 0.8),  # best of two: 2 of 3 words, 2 of 2
        (["Normandy"], "unanswerable", 0, 0),
        (["Normandy"], "", 0, 0),
        ([], " Unanswerable.", 1, 1),
        ([], "it is unanswerable", 0, 0),
        ([], "Normandy", 0, 0),
        ([], "", 0, 0),
    ],
)
def test_squad_scores(gold, answer, exact_match, f1):
    pytest.importorskip("torchmetrics")
    doc = {"answers": {"text": gold, "answer_start": [0] * len(gold)}}
    scores = generation_scores(doc, [answer])
    assert scores == {"exact_match": exact_match, "f1": pytest.approx(f1)}


def test_squad_on_documents_of_our_own(manager, tmp_path):
    """Through lm-eval from JSON files: one forward for `adainfer_squad`, exact match and F1 for the other."""
    pytest.importorskip("torchmetrics")
    answers = [["Rollo"], [], ["the Seine", "Seine"]]
    rows = [
        {
            "id": f"{i}",
            "title": "Normandy",
            "context": f"Passage {i}.\nSecond line.",
            "question": f"Question {i}?",
            "answers": {"text": texts, "answer_start": [0] * len(texts)},
        }
        for i, texts in enumerate(answers)
    ]
    for split, chosen in (
        ("validation", rows),
        ("train", [dict(row, question="T" + row["id"]) for row in rows]),
    ):
        (tmp_path / f"{split}.json").write_text("\n".join(map(json.dumps, chosen)))
    data_files = {split: str(tmp_path / f"{split}.json") for split in ("train", "validation")}
    own = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": data_files, "cache_dir": str(tmp_path / "cache")},
    }

    results = evaluate(manager, [changed("adainfer_squad", own)], num_fewshot=2, log_samples=True)
    samples = results["samples"]["adainfer_squad"]
    assert [[answer for _, answer in sample["arguments"]] for sample in samples] == [
        [" Rollo"],
        [" unanswerable"],
        [" the Seine"],
    ]
    assert samples[0]["arguments"][0][0].endswith("\n\nQ: Passage 0.\nSecond line.\nQuestion 0?\nA:")

    lm = Oracle([" rollo", " unanswerable", " river Seine"])
    results = evaluate(manager, [changed("adainfer_squad_generate", own)], lm, num_fewshot=1, log_samples=True)
    row = results["results"]["adainfer_squad_generate"]
    assert row["exact_match,none"] == pytest.approx(2 / 3)
    assert row["f1,none"] == pytest.approx((1 + 1 + 2 / 3) / 3)
    assert results["samples"]["adainfer_squad_generate"][0]["arguments"][0][1]["until"] == ["\n"]
    json.dumps(results["configs"])


# -------------------------------------------------------------------------------------------------- real data


@pytest.fixture
def real_data(monkeypatch, tmp_path):
    # a copy, as datasets writes lock files beside the data
    shutil.copytree(SHARED_HF / "datasets", tmp_path / "datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(datasets.config, OFFLINE, True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("ADAINFER_DATA", str(SHARED_HF / "function_vectors"))
    mmlu.dev_examples.cache_clear()
    yield
    mmlu.dev_examples.cache_clear()


@needs_shared_data
def test_real_documents_give_the_expected_prompts(manager, real_data):
    task = load(manager, "adainfer_sst2")
    assert task.fewshot_context(task.eval_docs[0], num_fewshot=0) == (
        "Q: it 's a charming and often affecting journey .\nA:"
    )
    assert task.fewshot_context(task.eval_docs[0], num_fewshot=20).count("\n\n") == 20
    task = load(manager, "adainfer_mmlu_anatomy")
    assert task.fewshot_context(task.eval_docs[0], num_fewshot=20).count("\n\n") >= 20
    task.set_config("num_fewshot", 20)
    assert sum(task.dump_config()["metadata"]["fewshot_sources"].values()) == 20


@needs_shared_data
def test_all_real_word_tasks_load_and_have_twenty_shots(manager, real_data):
    for name, task in manager.load(["adainfer_word"])["tasks"].items():
        sizes = {split: len(rows) for split, rows in task.dataset.items()}
        total = sum(sizes.values())
        assert sizes["train"] > 50 and sizes["test"] > 90, name
        assert sizes["test"] / total == pytest.approx(0.5, abs=0.06), name
        assert len(set(task.dataset["test"]["input"])) == sizes["test"], name
