"""What an early exit saves where weights lie on disk: ``python -m benchmarks.offload`` (measured, one core).

A freshly initialised Llama (16 blocks, hidden size 1024, float32), offloaded by accelerate but for its embeddings; one
document of 32 tokens at a time. All variants take turns; medians.
"""

from __future__ import annotations

import statistics
import tempfile
import time

import accelerate
import torch
from accelerate.utils.offload import OffloadedWeightsLoader
from transformers import AutoConfig, AutoModelForCausalLM

from lm_eval_adainfer.prefill.documents import Answer, Document, Row
from lm_eval_adainfer.prefill.engine import Engine
from lm_eval_adainfer.prefill.planning import make_batch
from lm_eval_adainfer.strategies.base import Schedule
from lm_eval_adainfer.strategies.specs import parse
from lm_eval_adainfer.structure.anatomy import Anatomy

BLOCKS, ROUNDS = 16, 7
# name, stopper, whether the head stays loaded; gap:1 asks after every block and never stops
VARIANTS = [("dense", "none", True), ("fixed:12", "fixed:12", True), ("fixed:8", "fixed:8", True),
            ("fixed:4", "fixed:4", True), ("15 checks", "gap:1", True),
            ("15 checks, head on disk, too", "gap:1", False)]  # fmt: skip


def main() -> None:
    """Print a table."""
    torch.set_num_threads(1)
    reads: list[int] = []
    fetch = OffloadedWeightsLoader.__getitem__

    def counted(self, name):
        value = fetch(self, name)
        reads.append(value.numel() * value.element_size())
        return value

    OffloadedWeightsLoader.__getitem__ = counted
    config = AutoConfig.for_model("llama", hidden_size=1024, intermediate_size=2816, num_hidden_layers=BLOCKS,
                                  num_attention_heads=16, num_key_value_heads=16, vocab_size=32000)  # fmt: skip
    engines = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, stopper, stays in VARIANTS:
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config).eval()
            embeddings = model.get_input_embeddings()
            accelerate.disk_offload(model, folder, execution_device="cpu")
            accelerate.hooks.remove_hook_from_module(embeddings)
            anatomy, strategy = Anatomy(model), parse(stopper)
            strategy.bind(BLOCKS)
            if stays:
                anatomy.keep_head_loaded()
            engines[name] = Engine(anatomy, strategy, Schedule(BLOCKS, strategy))
        seconds: dict[str, list[float]] = {name: [] for name in engines}
        loaded: dict[str, int] = {}
        for _ in range(ROUNDS):
            for name, engine in engines.items():
                row = Row([(7 * n) % 32000 for n in range(32)], 1, 0, [Answer(0, [5])])
                reads.clear()
                started = time.perf_counter()
                engine.run([make_batch([Document([row], [0])], 1)])
                seconds[name].append(time.perf_counter() - started)
                loaded[name] = sum(reads)
    dense = statistics.median(seconds["dense"])
    print("| | loaded, MB (counted) | ms (measured) | of dense |\n|---|---|---|---|")
    for name, found in seconds.items():
        middle = statistics.median(found)
        print(f"| {name} | {loaded[name] / 1e6:.0f} | {1000 * middle:.0f} | {middle / dense:.2f} |")


if __name__ == "__main__":
    main()
