"""Block Influence (ShortGPT, arXiv 2403.03853, equation 1), measured on the prompts of tasks' training documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from lm_eval_adainfer._version import __version__
from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.harness.asking import Asking
from lm_eval_adainfer.prefill.forward import padded, run_blocks
from lm_eval_adainfer.strategies.features import cosine
from lm_eval_adainfer.strategies.shortgpt import ShortGPTStopper
from lm_eval_adainfer.structure.state import BlockState
from lm_eval_adainfer.traces import recording
from lm_eval_adainfer.traces.splits import documents_of

if TYPE_CHECKING:
    from lm_eval_adainfer.harness.model import AdaInferLM


@torch.no_grad()
def measure(lm: AdaInferLM, texts: Sequence[Sequence[int]], batch_size: int = 1) -> np.ndarray:
    """[L] float64: BI_k = 1 - E[cos(block k's input, block k's output)], over all tokens of all texts.

    Args:
        lm: The model.
        texts: Token ids.
        batch_size: Texts per forward.
    """
    anatomy = lm.anatomy
    total, tokens = np.zeros(anatomy.n_blocks), 0
    order = sorted(texts, key=len, reverse=True)
    for start in tqdm(range(0, len(order), batch_size), desc="Measuring Block Influence", disable=lm.rank != 0):
        batch = order[start : start + batch_size]
        real = torch.zeros(len(batch), len(batch[0]), dtype=torch.bool)
        for row, text in enumerate(batch):
            real[row, : len(text)] = True

        def after_block(state: BlockState, real: Tensor = real) -> Tensor | None:
            here = real.to(state.hidden.device)
            total[state.block - 1] += cosine(state.before[here], state.hidden[here]).double().sum().item()
            return torch.empty(0, dtype=torch.long) if state.block == anatomy.n_blocks else None

        with lm._autocast():
            run_blocks(anatomy, padded(anatomy, batch), after_block)
        tokens += sum(map(len, batch))
    return 1 - total / tokens


def of_tasks(
    lm: AdaInferLM,
    tasks: dict[str, Any],
    num_fewshot: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    fewshot_seed: int = 1234,
    drop: int | None = None,
    asked: Asking | None = None,
) -> ShortGPTStopper:
    """Measure Block Influence on the prompts of tasks' training documents (those that ``adainfer trace`` takes).

    Args:
        lm: The whole model (stopper ``none``).
        tasks: Name to lm-eval task.
        num_fewshot: Shots per document; None takes the task's own number.
        limit: At most so many documents per task, drawn with ``seed``.
        seed: Of that draw.
        fewshot_seed: Of the shots.
        drop: How many blocks the strategy drops; None for a quarter.
        asked: Chat template, system instruction and the like; by default none.

    Raises:
        AdaInferError: Where no task has a prompt, or an argument is out of range.
    """
    recording.check_arguments("train", limit, num_fewshot)
    if drop is not None and not 1 <= drop < lm.anatomy.n_blocks:
        raise AdaInferError(
            f"drop: {drop} of {lm.anatomy.n_blocks} blocks can't be dropped; give 1 to {lm.anatomy.n_blocks - 1}"
        )
    asked = asked or Asking()
    texts: list[list[int]] = []
    for name, task in tasks.items():
        shots = num_fewshot if num_fewshot is not None else task.get_config("num_fewshot") or 0
        with documents_of(task, name, "train", limit, seed, shots):
            task.set_fewshot_seed(seed=fewshot_seed)
            asked.build_requests(lm, task)
            prompts = dict.fromkeys(i.args[0] for i in task.instances if i.args[0])
        texts += [lm.tok_encode(prompt)[-lm.max_length :] for prompt in prompts]
    texts = [text for text in texts if text]
    if not texts:
        raise AdaInferError(f"tasks: no document of {', '.join(tasks)} has a prompt to measure Block Influence on")
    size = int(lm.batch_size) if str(lm.batch_size).isdecimal() else 1
    identity = recording.model_identity(lm)
    info = {
        **{key: identity[key] for key in ("model", "n_blocks", "head_hash")},
        "tasks": sorted(tasks),
        "num_fewshot": num_fewshot,
        "split": "train",
        "prompts": len(texts),
        "tokens": sum(map(len, texts)),
        "seed": seed,
        **{key: value for key, value in asked.identity(lm, "loglikelihood").items() if value is not None},
        "versions": {"lm_eval_adainfer": __version__},
    }
    return ShortGPTStopper({"influence": measure(lm, texts, size)}, drop, info)
