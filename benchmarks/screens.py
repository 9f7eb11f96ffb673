"""How often a screen misses an exit: ``python -m benchmarks.screens --pretrained MODEL``.

The dense model's own greedy texts are read after some blocks, once over the full vocabulary and once over the tokens
that ``head_check=screen:N`` reads. *Counted*: of the checks at which the full vocabulary says stop, those at which the
screen does not; and stops of the screen that the full vocabulary does not confirm, of all checks.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.models import table
from benchmarks.texts import _english
from lm_eval_adainfer import container
from lm_eval_adainfer.generation.screen import Screen
from lm_eval_adainfer.structure.anatomy import Anatomy

SIZES, THRESHOLDS, NEW = (1024, 2048, 4096, 8192), (0.5, 0.8, 0.95), 60
PROSE = (
    "The history of the city begins with", "In biology, a cell is", "Once upon a time there was a small",
    "The main advantage of solar power is", "To bake bread you first need", "The president said on Tuesday that",
    "Machine learning models are trained", "My favourite book is about", "The river flows through the valley and",
    "In 1969, astronauts", "A good way to learn a language is", "The price of oil rose because",
    "def fibonacci(n):", "import numpy as np\n", "The theorem states that every", "Doctors recommend that patients",
    "The recipe calls for two cups of", "When the war ended, the", "Light travels faster than",
    "The company announced that its new",
)  # fmt: skip


def _gap(logits: torch.Tensor) -> float:
    first, second = logits.softmax(-1).topk(2).values.tolist()
    return first - second


@torch.no_grad()
def counted(model: torch.nn.Module, prompt: torch.Tensor, blocks: list[int], found: Counter) -> None:
    """Count one prompt's checks into ``found``: keys are (threshold, N, whether own tokens are read, what)."""
    anatomy, start = Anatomy(model), prompt.shape[1]
    whole = model.generate(prompt, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
    states = model(whole, output_hidden_states=True, use_cache=False).hidden_states
    screens = {(size, own): Screen(size) for size in SIZES for own in (True, False)}
    for n in range(start, whole.shape[1]):
        logits = anatomy.logits(torch.stack([states[k][0, n - 1] for k in blocks]))
        for (size, own), screen in screens.items():
            some = [*range(size), *(screen.own(0, whole[0, :n]).tolist() if own else ())]
            for row in logits:
                full, few = _gap(row), _gap(row[some])
                for threshold in THRESHOLDS:
                    key = threshold, size, own
                    found[*key, "checks"] += 1
                    found[*key, "stops"] += full > threshold
                    found[*key, "missed"] += full > threshold >= few
                    found[*key, "vain"] += few > threshold >= full


def main() -> None:
    """Count, and write ``results/screens-NAME.md``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.screens", description=__doc__)
    parser.add_argument("--pretrained", required=True)
    parser.add_argument("--name", help="in the result file (default: of the checkpoint)")
    parser.add_argument("--prompts", type=int, default=20, help="of each kind; behind shots half as many")
    parser.add_argument("--output", "-o", default="benchmarks/results", help="folder")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.pretrained)
    model = AutoModelForCausalLM.from_pretrained(options.pretrained, dtype=torch.float32).eval()
    last = model.config.num_hidden_layers
    blocks = [k for k in (*range(6, last - 3, 6), last - 3, last - 1) if 0 < k < last]
    kinds = {"8 shots": _english(8)[0][: options.prompts // 2], "alone": _english(0)[0][: options.prompts],
             "prose": list(PROSE[: options.prompts])}  # fmt: skip
    rows = []
    for kind, prompts in kinds.items():
        found: Counter = Counter()
        for prompt in prompts:
            counted(model, tokenizer(prompt, return_tensors="pt").input_ids, blocks, found)
        for key in sorted({key[:3] for key in found}, key=lambda key: (key[0], key[1], not key[2])):
            checks, stops, missed, vain = (found[*key, what] for what in ("checks", "stops", "missed", "vain"))
            rows.append({
                "prompts": kind, "stopper": f"gap:{key[0]:g}",
                "screen": f"{key[1]}{'' if key[2] else ', no own tokens'}",
                "checks": checks, "stops": stops, "missed, %": 100 * missed / max(1, stops),
                "in vain, % of checks": 100 * vain / checks,
            })  # fmt: skip
    name = options.name or Path(options.pretrained).name
    head = (
        f"screens: {name}, float32, asked after blocks {', '.join(map(str, blocks))} of {last}, {NEW} new tokens of "
        "every prompt; *counted*: exits that a screen misses, of those that the full vocabulary allows."
    )
    target = Path(options.output) / f"screens-{name}.md"
    container.write_atomically(target, f"{head}\n\n{table(rows)}".encode())


if __name__ == "__main__":
    main()
