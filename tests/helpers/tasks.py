"""Requests, documents and lm-eval tasks over them, made in memory."""

from __future__ import annotations

import random

import datasets
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager

from lm_eval_adainfer import paths

WORDS = ["a", " be", " cat", " deer", " e.", " fox!", " goat", " hi"]
ANIMALS = ["cat", "dog", "emu", "fox", "gnu", "hen", "owl", "pig", "ram", "yak"]

# name -> what differs from ``make_task()``: every way in which lm-eval asks for choices
KINDS = {
    "shared context": {},
    "with shots": {"num_fewshot": 2},
    "loglikelihood": {
        "output_type": "loglikelihood",
        "doc_to_choice": None,
        "doc_to_target": "{{' ' + choices[answer]}}",
    },
    "mutual information": {
        "metric_list": [
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
            {"metric": "acc_mutual_info", "aggregation": "mean", "higher_is_better": True},
        ]
    },
    "many inputs": {  # as winogrande: the choices are contexts, the continuation is shared
        "doc_to_text": lambda doc: doc["answer"],
        "doc_to_choice": lambda doc: [f"{doc['question']} {choice}" for choice in doc["choices"]],
        "doc_to_target": lambda doc: f"is {doc['question'][-2]}",
    },
}


def instance(context, continuation, doc_id, task="t", idx=0, kind="loglikelihood"):
    """One request, as lm-eval makes them of documents."""
    arguments = (context, continuation) if continuation is not None else (context,)
    return Instance(kind, {"id": doc_id}, arguments, idx, (task, doc_id, 1))


def requests(seed=0, documents=9, shared_context=True):
    """Documents of 2-4 choices: contexts shared or not, of many lengths; one- and multi-token continuations."""
    rng = random.Random(seed)
    found = []
    for doc in range(documents):
        context = "".join(rng.choices(WORDS, k=rng.randint(1, 9)))
        for idx in range(rng.randint(2, 4)):
            text = context if shared_context else context + rng.choice(WORDS) * (idx + 1)
            continuation = rng.choice([" x", " y", " yes", " no way", " z"])
            found.append(instance(text, continuation, doc, idx=idx))
    return found


def documents(n, seed):
    """``n`` different documents; some with two-letter, some with long choices."""
    rng = random.Random(seed)
    found = []
    for i in range(n):
        choices = rng.sample(ANIMALS, 3) if i % 2 else rng.sample([" x", " y", " z", " w"], 3)
        question = f"{seed}.{i} {' '.join(rng.choices(ANIMALS, k=rng.randint(1, 5)))}?"
        found.append({"question": question, "choices": choices, "answer": rng.randrange(3)})
    return found


def make_task(splits=None, name="toy", **config):
    """An lm-eval task over documents in memory; by default with a training split."""
    splits = splits if splits is not None else {"train": documents(9, 1), "test": documents(6, 2)}
    options = {
        "task": name,
        "custom_dataset": lambda **_: {k: datasets.Dataset.from_list(v) for k, v in splits.items()},
        "output_type": "multiple_choice",
        "training_split": "train" if "train" in splits else None,
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "num_fewshot": 0,
        "metadata": {"version": 1.0},
        **config,
    }
    return ConfigurableTask(config=options)


def our_tasks(metadata: dict | None = None) -> TaskManager:
    """The packaged tasks without lm-eval's thousands, through which it looks for five seconds."""
    return TaskManager(include_path=str(paths.task_configs()), include_defaults=False, metadata=metadata)
