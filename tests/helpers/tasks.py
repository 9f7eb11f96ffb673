"""Requests, documents and lm-eval tasks over them, made in memory."""

from __future__ import annotations

import random

import datasets
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.config.task import TaskConfig
from lm_eval.tasks import TaskManager

from lm_eval_adainfer import paths, releases

# what keeps ``datasets`` off the network; the second name is that of releases before 2.21
OFFLINE = "HF_HUB_OFFLINE" if hasattr(datasets.config, "HF_HUB_OFFLINE") else "HF_DATASETS_OFFLINE"
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
        "target_delimiter": "",  # 0.5.0.dev1 wants a choice to be the same text after a context and after none
        "metric_list": [
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
            {"metric": "acc_mutual_info", "aggregation": "mean", "higher_is_better": True},
        ]
    },
    "many inputs": {},
}


def contexts(doc):
    return [f"{doc['question']} {choice}" for choice in doc["choices"]]


def ending(doc):
    return f"is {doc['question'][-2]}"


# as winogrande: the choices are contexts, the continuation is shared
if hasattr(TaskConfig, "multiple_inputs"):
    KINDS["many inputs"] = {
        "multiple_inputs": True,
        "doc_to_text": contexts,
        "doc_to_choice": lambda doc: [ending(doc)],
        "doc_to_target": lambda doc: doc["answer"],
    }
else:
    KINDS["many inputs"] = {"doc_to_text": lambda doc: doc["answer"], "doc_to_choice": contexts, "doc_to_target": ending}


def instance(context, continuation, doc_id, task="t", idx=0, kind="loglikelihood"):
    """One request, as lm-eval makes them of documents."""
    arguments = (context, continuation) if continuation is not None else (context,)
    if kind == "loglikelihood_rolling" and hasattr(Task, "scorers"):
        arguments = ("", context)
    return releases.request(kind, {"id": doc_id}, arguments, idx, task, doc_id)


def request_of(kind, doc, arguments, idx, task, metadata=None, doc_id=None, **_):
    """A request with what lm-eval hands to ``construct_requests`` besides the document."""
    return releases.request(kind, doc, arguments, idx, task, doc_id if metadata is None else metadata[1])


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
    return releases.class_for(ConfigurableTask, options["output_type"])(config=options)


class Tasks(TaskManager):
    """A task manager that takes task objects beside names, as that of 0.4.13; 0.5.0.dev1 takes names alone."""

    def load(self, specs, *args, **kwargs):
        objects = [spec for spec in specs if isinstance(spec, Task)]
        found = super().load([spec for spec in specs if not isinstance(spec, Task)], *args, **kwargs)
        return {**found, "tasks": {**found["tasks"], **{task.task_name: task for task in objects}}}


def our_tasks(metadata: dict | None = None) -> TaskManager:
    """The packaged tasks without lm-eval's thousands, through which it looks for five seconds."""
    return Tasks(include_path=str(paths.task_configs()), include_defaults=False, metadata=metadata)


def own_names(found):
    """Results with every task under its own name, where lm-eval (0.5.0.dev1) puts its group's before it."""
    if found is not None:
        for section in ("results", "samples", "configs", "n-shot", "versions", "n-samples"):
            if section in found:
                found[section] = {name.rpartition("::")[2]: value for name, value in found[section].items()}
    return found
