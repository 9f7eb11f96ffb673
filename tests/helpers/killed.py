"""Runs that other processes make and that are killed in the middle; for ``test_faults``.

Children come from a fork server that has imported this module once, so each costs no more than its run.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import lm_eval.tasks
import pytest
from lm_eval import evaluator
from lm_eval.api.model import CachingLM
from sqlitedict import SqliteMultithread

from helpers.models import tiny_lm
from helpers.tasks import KINDS, documents, make_task, our_tasks
from helpers.traces import lens
from lm_eval_adainfer import container
from lm_eval_adainfer.cli import main
from lm_eval_adainfer.harness.model import AdaInferLM
from lm_eval_adainfer.prefill import planning
from lm_eval_adainfer.traces import recording
from lm_eval_adainfer.traces.plan import Plan

STOPPER = "gap:0.3"
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["helpers.killed"])


def make_lm(stopper: str = STOPPER) -> AdaInferLM:
    lm = tiny_lm()
    return AdaInferLM(pretrained=lm.model, tokenizer=lm.tokenizer, stopper=stopper, batch_size=4, max_length=400, pilot=0)


def make_tasks() -> dict:
    """Every kind of request: choices that share a context, choices that are contexts, whole texts, generated ones."""
    generated = {"doc_to_choice": None, "doc_to_target": "{{choices[answer]}}", "output_type": "generate_until"}
    whole = {"doc_to_choice": None, "doc_to_text": "", "output_type": "loglikelihood_rolling"}
    docs = {"train": documents(9, 1), "test": documents(12, 2)}
    return {
        "choices": make_task(docs, "choices"),
        "inputs": make_task(docs, "inputs", **KINDS["many inputs"]),
        "texts": make_task(
            docs,
            "texts",
            **generated,
            generation_kwargs={"until": ["\n"], "do_sample": False, "max_gen_toks": 5},
            metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        ),
        "rolling": make_task(
            docs,
            "rolling",
            **whole,
            doc_to_target="{{question * 40}}",
            metric_list=[{"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}],
        ),
    }


@contextmanager
def every_sql_step(act):
    """Connections that are opened meanwhile call ``act()`` at every step of SQLite's."""
    connect = SqliteMultithread._connect

    def watched(self):
        connection, cursor = connect(self)
        connection.set_progress_handler(act, 1)
        return connection, cursor

    SqliteMultithread._connect = watched
    try:
        yield
    finally:
        SqliteMultithread._connect = connect


def evaluate(cache: str | None, count=lambda what: None) -> tuple[dict, dict, int]:
    """(results, samples by task and document, tokens that were run); ``count`` is told of forwards and of SQL steps."""
    lm = make_lm()

    def forward(*_):
        if (answers := lm.cache_hook.dbdict) is not None:
            answers.conn.select_one("SELECT 1")  # its writer is a thread of its own: wait until all is on the disk
        count("forward")

    lm.anatomy.blocks[0].register_forward_pre_hook(forward)
    with every_sql_step(lambda: count("sql")):
        model = CachingLM(lm, cache) if cache else lm
        found = evaluator.evaluate(model, make_tasks(), bootstrap_iters=0, log_samples=True)
        if cache:
            model.dbdict.close()
    samples = {
        task: {
            sample["doc_id"]: {k: v for k, v in sample.items() if k not in ("arguments", "doc", "resps")}
            | {"scores": [float(r[0]) for rs in sample["resps"] for r in rs] if task in ("choices", "inputs") else []}
            for sample in found
        }
        for task, found in found["samples"].items()
    }
    return found["results"], samples, lm.engine.tokens


def killer(what: str, number: int):
    """A ``count`` that kills this process at the number-th time of something."""
    seen = 0

    def count(kind: str) -> None:
        nonlocal seen
        seen += kind == what
        if seen == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return count


def run_evaluation(cache: str, what: str, number: int) -> None:
    """In a child: an evaluation that kills itself."""
    evaluate(cache, killer(what, number))


def trace(folder: str, count=lambda what: None) -> dict[str, bytes]:
    """Name to content of the trace files of two tasks; ``count`` is told of forwards, half-written files and renames."""
    lm = make_lm("none")
    lm.anatomy.blocks[0].register_forward_pre_hook(lambda *_: count("forward"))
    part_documents, recording.PART_DOCUMENTS = recording.PART_DOCUMENTS, 2
    open_temporary, replace, rmtree = tempfile.NamedTemporaryFile, os.replace, shutil.rmtree

    def opened(*args, **kwargs):
        file = open_temporary(*args, **kwargs)
        write = file.write

        def in_two(data):
            write(data[: len(data) // 2])
            file.flush()
            count("write")
            write(data[len(data) // 2 :])

        file.write = in_two
        return file

    def counted(what, function):
        return lambda *args, **kwargs: (count(what), function(*args, **kwargs))[1]

    tempfile.NamedTemporaryFile, os.replace = opened, counted("replace", replace)
    shutil.rmtree = counted("rmtree", rmtree)
    try:
        tasks = make_tasks()
        plan = Plan.of(lm.anatomy, [lens(lm.anatomy)], hidden=True)
        chosen = {name: tasks[name] for name in ("choices", "texts")}
        files = recording.trace(lm, chosen, folder, split="test", limit=9, plan=plan)
    finally:
        tempfile.NamedTemporaryFile, os.replace, shutil.rmtree = open_temporary, replace, rmtree
        recording.PART_DOCUMENTS = part_documents
    return {file.name: file.read_bytes() for file in files}


def run_trace(folder: str, what: str, number: int) -> None:
    """In a child: a trace that kills itself."""
    trace(folder, killer(what, number))


def stopped_trace_command(folder: str, number: int) -> None:
    """In a child: ``adainfer trace``, which gets a signal when its second part is written; what it shows is kept."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's children ignore it
    manager = our_tasks()
    lm_eval.tasks.TaskManager = lambda *args, **kwargs: manager
    shown = os.open(f"{folder}/shown", os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(shown, stream)
    write, recording.PART_DOCUMENTS, made = container.write, 2, []

    def watched(path, *rest):
        write(path, *rest)
        made.append(path)
        if len(made) == 2:
            os.kill(os.getpid(), number)

    container.write = watched
    arguments = ["trace", "-a", "pretrained=adainfer-demo,dtype=float32", "-t", "adainfer_demo_topic", "-L", "6"]
    sys.exit(main.main([*arguments, "--device", "cpu", "-o", folder]))


def evaluate_topics(cache: str | None, dies: bool = False) -> tuple[list, int] | None:
    """(document, acc, exit_layer) of 40 documents and the tokens run, on the main process; rank 1 may kill itself."""

    class Watched(AdaInferLM):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            if dies:
                planning.TOGETHER_ROWS = 4  # else it would be killed before anything is finished
            if dies and self.rank == 1:
                count = killer("forward", 5)
                self.anatomy.blocks[0].register_forward_pre_hook(lambda *_: count("forward"))

    lm = Watched(pretrained="adainfer-demo", dtype="float32", stopper="gap:0.8", pilot=0, batch_size=4, device="cpu")
    found = lm_eval.simple_evaluate(
        model=lm, tasks=["adainfer_demo_topic"], limit=40, bootstrap_iters=0, use_cache=cache, task_manager=our_tasks()
    )  # fmt: skip
    if found is None:
        return None
    samples = sorted([s["doc_id"], s["acc"], s["exit_layer"]] for s in found["samples"]["adainfer_demo_topic"])
    return samples, lm.run_totals["tokens_counted"]


def child(target, *arguments, kill_after: float | None = None) -> int:
    """The exit code of a function in a process of its own; negative: the signal that ended it."""
    here = Path(__file__).parents[1]
    process = _processes.Process(target=target, args=arguments)
    with pytest.MonkeyPatch.context() as patch:  # for the fork server, and not for whatever other tests start
        patch.setenv("PYTHONPATH", os.pathsep.join([str(here), str(here.parent)]), prepend=os.pathsep)
        process.start()
    process.join(kill_after)
    if process.exitcode is None:
        process.kill()
        process.join()
    assert process.exitcode is not None
    return process.exitcode
