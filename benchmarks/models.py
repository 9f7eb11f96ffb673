"""Random models in real shapes, a tokenizer for them, and how two things are timed against each other."""

from __future__ import annotations

import copy
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lm_eval_adainfer import __version__

WARM_UP = 60  # seconds

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
    return from_config(LlamaConfig(**SHAPES[shape], max_position_embeddings=4096, dtype=dtype), dtype, device)


def from_config(config: LlamaConfig, dtype: torch.dtype, device: str) -> LlamaForCausalLM:
    """Random weights, made on the device and in the dtype."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            torch.manual_seed(0)
            return LlamaForCausalLM(config).to(dtype).eval()
    finally:
        torch.set_default_dtype(usual)


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


def seconds(act: Callable[[], object]) -> float:
    """Wall-clock of one call, the device's work included."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    act()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def ratio(a: Callable[[], object], b: Callable[[], object], repeats: int) -> dict[str, float]:
    """Time of ``a`` over time of ``b``, taken :func:`alternately`."""
    return over(alternately({"a": a, "b": b}, repeats), "a", "b")


def alternately(sides: dict[str, Callable[[], object]], repeats: int) -> list[dict[str, float]]:
    """Seconds of every side in every round; all sides take turns.

    A round before them is the warm-up; where it took longer than ``WARM_UP`` seconds, it counts as the first.
    """
    first = {name: seconds(act) for name, act in sides.items()}
    rounds = [first] if sum(first.values()) > WARM_UP else []
    while len(rounds) < repeats:
        rounds.append({name: seconds(act) for name, act in sides.items()})
    return rounds


def over(rounds: list[dict[str, float]], a: str, b: str) -> dict[str, float]:
    """Time of side ``a`` over time of side ``b``."""
    return summary([found[a] / found[b] for found in rounds])


def asking(requests: list[Instance], batch_size: int) -> Callable[..., Callable[[], None]]:
    """Makes sides that answer these requests: ``ask(HFLM, model)``, ``ask(AdaInferLM, model, stopper="gap:1")``.

    With ``keep=[]`` the answers of the last call are put there.
    """
    tokenizer = make_tokenizer()

    def ask(kind: type[HFLM], model: LlamaForCausalLM, keep: list | None = None, **arguments: object):
        lm = kind(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=4096, **arguments)

        def act() -> None:
            found = lm.loglikelihood(requests, disable_tqdm=True)
            if keep is not None:
                keep[:] = found

        return act

    return ask


def summary(values: list[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def about(shape: str, dtype: str, device: str, repeats: int) -> dict:
    """What was measured, and on which machine."""
    machine = torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor() or "CPU"
    return {
        "date": date.today().isoformat(),
        "machine": f"{machine}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "lm_eval_adainfer": __version__,
        "shape": {"name": shape, **SHAPES.get(shape, {})},
        "dtype": dtype,
        "repeats": repeats,
    }


def table(rows: list[dict]) -> str:
    """Rows as a Markdown table: medians, with the range behind."""
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(map(cell, row.values())) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def cell(value: object) -> str:
    """A ratio with its range, or a plain value."""
    if isinstance(value, dict):
        return f"{value['median']:.2f} ({value['low']:.2f}-{value['high']:.2f})"
    if isinstance(value, float):
        return f"{value:.1e}" if 0 < abs(value) < 0.01 else f"{value:.2f}"
    return str(value)
