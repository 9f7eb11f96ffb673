"""The demo's documents: the same in every process, split without overlap, and shaped as the model was trained."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys

import pytest

from lm_eval_adainfer.demo import data

DIGEST = """
import hashlib, json
from lm_eval_adainfer.demo import data
rows = {task: {split: list(docs) for split, docs in data.load(task).items()} for task in data.TASKS}
print(hashlib.sha256(json.dumps(rows).encode()).hexdigest())
"""


def _digest_elsewhere(hash_seed: str) -> str:
    """The digest of all documents, made in another process with another string hash."""
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    done = subprocess.run([sys.executable, "-c", DIGEST], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_documents_do_not_depend_on_the_process() -> None:
    rows = {task: {split: list(docs) for split, docs in data.load(task).items()} for task in data.TASKS}
    here = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    assert _digest_elsewhere("0") == _digest_elsewhere("1234") == here


@pytest.mark.parametrize("task", data.TASKS)
def test_no_question_is_repeated_and_no_test_question_is_in_train(task: str) -> None:
    splits = data.load(task)
    train, test = splits["train"]["question"], splits["test"]["question"]
    assert len(set(train)) == len(train)
    assert len(set(test)) == len(test)
    assert not set(train) & set(test)


@pytest.mark.parametrize("task", data.TASKS)
def test_there_are_enough_documents_to_tell_a_point_apart(task: str) -> None:
    splits = data.load(task)
    assert 200 <= len(splits["test"]) <= data.TEST_DOCUMENTS
    assert len(splits["train"]) >= 500


@pytest.mark.parametrize("task", data.TASKS)
def test_a_document_is_a_question_on_one_line_with_an_answer_among_its_choices(task: str) -> None:
    for docs in data.load(task).values():
        choice_counts = {len(row["choices"]) for row in docs}
        assert len(choice_counts) == 1, "either every document of a task has choices or none has"
        for row in docs:
            for text in (row["question"], row["answer"], *row["choices"]):
                assert text and text == text.strip() and "\n" not in text
            assert len(set(row["choices"])) == len(row["choices"])
            assert not row["choices"] or row["answer"] in row["choices"]


def test_the_prompt_is_the_one_the_model_was_trained_on() -> None:
    assert data.prompt("Which day comes one after Monday?") == "Q: Which day comes one after Monday?\nA:"


def test_rules_hold_out_the_case_in_every_wording() -> None:
    """A plural asked in `test` is asked of a noun that `train` never shows."""
    splits = data.load("plural")
    assert not set(splits["train"]["answer"]) & set(splits["test"]["answer"])


def test_odd_one_out_holds_out_the_set_of_words_and_not_only_its_order() -> None:
    splits = data.load("odd_one_out")
    train, test = ({frozenset(words) for words in splits[s]["choices"]} for s in ("train", "test"))
    assert not train & test


@pytest.mark.parametrize("task", data.TASKS)
def test_a_question_has_one_answer(task: str) -> None:
    """No question is asked twice with different answers before repeats are dropped."""
    answers: dict[str, str] = {}
    for question, answer, *_ in data._GENERATORS[task]():
        assert answers.setdefault(question, answer) == answer


def test_every_fact_of_the_test_split_is_asked_in_train_in_other_words() -> None:
    """A fact cannot be guessed: most of what `test` asks must have been told."""
    facts, homes = data.world()
    names = [*facts, *homes]
    splits = data.load("fact")

    def asked(split: str) -> set[tuple[str, str]]:
        pairs = zip(splits[split]["question"], splits[split]["answer"], strict=True)
        return {(name, answer) for question, answer in pairs for name in names if name in question}

    missing = asked("test") - asked("train")
    assert len(missing) <= 0.02 * len(asked("test"))


@pytest.mark.parametrize(
    ("noun", "expected"),
    [("fox", "foxes"), ("berry", "berries"), ("leaf", "leaves"), ("cat", "cats"), ("ash", "ashes")],
)
def test_plural_follows_the_english_rule(noun: str, expected: str) -> None:
    assert data.plural(noun) == expected


def test_an_unknown_task_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="fact"):
        data.load("no_such_task")
