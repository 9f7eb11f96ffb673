"""Times ``--model adainfer`` against stock ``--model hf`` and against models physically cut to the exit's depth.

Every figure is a ratio of two *measured* wall-clock times, taken alternately in one run; the median of several
repeats is reported with the lowest and the highest. Weights are random (speed does not depend on them); exits are
scripted with ``fixed:k``, so that both sides run the same blocks.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import random
import statistics
import time
from datetime import date
from pathlib import Path

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lm_eval_adainfer import __version__
from lm_eval_adainfer.model import AdaInferLM

SHAPES = {
    "tiny": {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 8, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 4096},
    "llama-16x512": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 16,
                     "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 32000},
    "135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
             "num_key_value_heads": 3, "vocab_size": 49152},
    "llama-2-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
                   "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000},
}  # fmt: skip


def make_model(shape: str, dtype: torch.dtype, device: str) -> LlamaForCausalLM:
    """Random weights in a real shape, made on the device."""
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=4096, dtype=dtype)
    with torch.device(device):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).to(dtype).eval()


def cut(model: LlamaForCausalLM, blocks: int) -> LlamaForCausalLM:
    """The same model with only its first blocks: what an early exit can reach at best."""
    layers, model.model.layers = model.model.layers, None
    smaller = copy.copy(model)
    smaller._modules = dict(model._modules)
    smaller.model = copy.copy(model.model)
    smaller.model._modules = dict(model.model._modules)
    model.model.layers = layers
    smaller.model.layers = torch.nn.ModuleList(layers[:blocks])
    smaller.config = copy.deepcopy(model.config)
    smaller.config.num_hidden_layers = blocks
    smaller.model.config = smaller.config
    return smaller


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word of the prompts is a token."""
    core = Tokenizer(models.WordLevel({"<s>": 0, **{f"w{i}": i + 1 for i in range(1000)}}, unk_token="<s>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="<s>", pad_token="<s>")


def requests(documents: int, tokens: int) -> list[Instance]:
    """Documents of two one-token choices, all of one length."""
    rng = random.Random(0)
    found = []
    for doc in range(documents):
        context = " ".join(f"w{rng.randrange(1000)}" for _ in range(tokens))
        found += [Instance("loglikelihood", {}, (context, f" w{c}"), c, ("bench", doc, 1)) for c in (0, 1)]
    return found


def timed(lm: HFLM, asked: list[Instance]) -> float:
    """Seconds of one evaluation's model part, tokenisation included, as a user sees it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    lm.loglikelihood(asked, disable_tqdm=True)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def ratio(a: HFLM, b: HFLM, asked: list[Instance], repeats: int) -> dict[str, float]:
    """Time of ``a`` over time of ``b``, alternating, after one warm-up each."""
    timed(a, asked), timed(b, asked)
    pairs = [(timed(a, asked), timed(b, asked)) for _ in range(repeats)]
    ratios = [x / y for x, y in pairs]
    return {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}


def main() -> None:
    """Run the benchmark and write ``speed-SHAPE-DTYPE-DEVICE`` as JSON and Markdown."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--shape", default="llama-16x512", choices=SHAPES)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--lengths", default="64,256", help="prompt tokens, separated by commas")
    parser.add_argument("--batch_sizes", default="1,8", help="separated by commas")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", "-o", default="benchmarks/results", help="folder for JSON and Markdown")
    options = parser.parse_args()

    model = make_model(options.shape, getattr(torch, options.dtype), options.device)
    n_blocks, half = model.config.num_hidden_layers, model.config.num_hidden_layers // 2
    rows = []
    for tokens in map(int, options.lengths.split(",")):
        for batch in map(int, options.batch_sizes.split(",")):
            common = {"tokenizer": make_tokenizer(), "batch_size": batch, "max_length": 4096}
            stock = HFLM(pretrained=model, **common)
            dense = AdaInferLM(pretrained=model, **common)
            checks = AdaInferLM(pretrained=model, stopper="gap:1", **common)  # a gap never exceeds 1
            early = AdaInferLM(pretrained=model, stopper=f"fixed:{half}", **common)
            limit = AdaInferLM(pretrained=cut(model, half), **common)
            asked = requests(max(2, 2 * batch), tokens)
            rows.append(
                {
                    "prompt_tokens": tokens,
                    "batch_size": batch,
                    "stock hf / dense adainfer": ratio(stock, dense, asked, options.repeats),
                    "stock hf / exit at half depth": ratio(stock, early, asked, options.repeats),
                    "exit at half depth / model cut to half": ratio(early, limit, asked, options.repeats),
                    "dense with a head check at every block / dense": ratio(checks, dense, asked, options.repeats),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    machine = torch.cuda.get_device_name() if options.device.startswith("cuda") else platform.processor() or "CPU"
    record = {
        "measured": "wall-clock ratios, timed alternately in one run, median of several",
        "date": date.today().isoformat(),
        "machine": f"{machine}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "lm_eval_adainfer": __version__,
        "shape": {"name": options.shape, **SHAPES[options.shape]},
        "blocks": n_blocks,
        "exit_block": half,
        "dtype": options.dtype,
        "repeats": options.repeats,
        "rows": rows,
    }
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    name = f"speed-{options.shape}-{options.dtype}-{options.device.partition(':')[0]}"
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    (folder / f"{name}.md").write_text(table(record))


def table(record: dict) -> str:
    """The record as a Markdown table: medians, with the range behind."""
    columns = list(record["rows"][0])
    lines = [
        f"{record['shape']['name']} ({record['blocks']} blocks, exit after {record['exit_block']}), {record['dtype']}, "
        f"{record['machine']}, torch {record['torch']}, {record['date']}; measured ratios, median of "
        f"{record['repeats']} (lowest-highest)",
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
    ]
    for row in record["rows"]:
        lines.append("| " + " | ".join(map(cell, row.values())) + " |")
    return "\n".join(lines) + "\n"


def cell(value: dict | int) -> str:
    """A ratio with its range, or a plain number."""
    return f"{value['median']:.2f} ({value['low']:.2f}-{value['high']:.2f})" if isinstance(value, dict) else str(value)


if __name__ == "__main__":
    main()
