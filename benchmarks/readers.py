"""What checks cost under readers that let tokens go on: measured beside counted, nobody leaving.

Asked after two thirds of the blocks, and then after every second block, three times in all (20, 22 and 24 of 30), of
prompts that share nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from transformers import LlamaForCausalLM

from benchmarks.models import summary
from lm_eval_adainfer.counting import FlopCounter
from lm_eval_adainfer.prefill.documents import Row
from lm_eval_adainfer.prefill.forward import Forward, padded
from lm_eval_adainfer.prefill.reading import Reading, Spot, prepared
from lm_eval_adainfer.readers.specs import parse
from lm_eval_adainfer.strategies.rules import NoStopper
from lm_eval_adainfer.structure.anatomy import Anatomy

WHAT = "*measured* time of all checks over the time of the forward that they interrupt, beside the *counted* ratio"
READERS = ("copy:1", "copy:32", "sim:1", "sim:32")


def measure(model: LlamaForCausalLM, lengths: list[int], batch_sizes: list[int], repeats: int) -> Iterator[dict]:
    """A row per reader, prompt length and batch size."""
    anatomy = Anatomy(model)
    first = round(anatomy.n_blocks * 2 / 3)
    asked = [k for k in (first, first + 2, first + 4) if k < anatomy.n_blocks]
    for spec in READERS:
        reading = prepared(anatomy, parse(spec))
        counter = FlopCounter(anatomy, NoStopper(), reading.reader)
        counter.copied_weights = reading.storing.weights if reading.storing else []
        for length in lengths:
            counted = sum(counter.read(k, length, 1) + counter.head(1) for k in asked)
            counted /= counter.dense(length) + counter.head(1)
            for size in batch_sizes:
                found = [checks_over_forward(anatomy, reading, asked, length, size) for _ in range(repeats + 1)]
                yield {
                    "reader": spec,
                    "asked after": "+".join(map(str, asked)),
                    "prompt": length,
                    "batch size": size,
                    "checks / forward, measured": summary(found[1:]),  # the first one warms up
                    "checks / forward, counted": counted,
                    "measured / counted": summary([ratio / counted for ratio in found[1:]]),
                }


@torch.no_grad()
def checks_over_forward(anatomy: Anatomy, reading: Reading, asked: list[int], length: int, size: int) -> float:
    """Time of the checks over that of the blocks and the last head, in one forward of a batch of random prompts."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(anatomy.vocab_size, (size, length), generator=draw).tolist()
    rows = [Row(row, 1) for row in ids]
    spots = [Spot(r, row, 0) for r, row in enumerate(rows)]
    clock = _Clock(anatomy.input_device)
    forward = Forward(anatomy, padded(anatomy, ids))
    of_blocks = clock.passed()
    of_checks = 0.0
    for k in range(1, anatomy.n_blocks + 1):
        state = forward.advance()
        of_blocks += clock.passed()
        if k in asked:
            anatomy.logits(reading.read(k, state.hidden, None, spots))
            of_checks += clock.passed()
    anatomy.logits(state.hidden[:, -1])
    return of_checks / (of_blocks + clock.passed())


class _Clock:
    """Seconds since it was last looked at, once the device has done its work."""

    def __init__(self, device: torch.device):
        self.device, self.last = device, time.perf_counter()

    def passed(self) -> float:
        """Seconds."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        before, self.last = self.last, time.perf_counter()
        return self.last - before
