"""Peak memory of few-shot prompts (600 + 120 tokens, one-token choices), of a fresh process per side.

The growth of the peak while the requests run, the model being loaded: of the process's resident memory (Linux), or on
a GPU of what torch allocated. ``--lengths``, ``--batch_sizes`` and ``--repeats`` don't apply.
"""

from __future__ import annotations

import multiprocessing
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from lm_eval.models.huggingface import HFLM
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.models import asking, from_config
from benchmarks.shared import Case, requests
from lm_eval_adainfer.harness.model import AdaInferLM

WHAT = "*measured* growth of the peak while the requests run, in MiB, each side once in a process of its own"
CASES = [Case("shared shots", 600, 120, 4, 1, 64, 32), Case("nothing shared", 0, 720, 4, 1, 64, 32)]
SIDES = {
    "stock hf": (HFLM, {}),
    "prefix_cache=0": (AdaInferLM, {"prefix_cache": 0}),
    "stopper=none": (AdaInferLM, {}),
}


def resident(line: str) -> int:
    """Bytes of this process: ``VmRSS``, now; ``VmHWM``, the peak. (``ru_maxrss`` would begin at the parent's size.)"""
    return int(re.search(rf"{line}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def growth(config: LlamaConfig, dtype: torch.dtype, device: str, case: Case, side: str) -> float:
    """MiB, by one side's run in this process, which should be fresh."""
    kind, arguments = SIDES[side]
    act = asking(requests(case), case.batch_size)(kind, from_config(config, dtype, device), **arguments)
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        act()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = resident("VmRSS")
    act()
    return (resident("VmHWM") - before) / 2**20


def measure(model: LlamaForCausalLM, lengths: list[int], batch_sizes: list[int], repeats: int) -> Iterator[dict]:
    """A row per case."""
    for case in CASES:
        found = {}
        for side in SIDES:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                found[side] = pool.apply(growth, (model.config, model.dtype, str(model.device), case, side))
        yield {
            "prompts": case.name,
            "shared tokens": case.shared,
            "own tokens": case.own,
            "documents": case.documents,
            "batch size": case.batch_size,
            **{f"{side}, MiB": round(value) for side, value in found.items()},
            **{f"{side} / stock hf": found[side] / found["stock hf"] for side in SIDES if side != "stock hf"},
        }
