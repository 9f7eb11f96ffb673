"""Traces of texts that are there already: what readers say at their prompts' ends, and at every new token.

A prompt's trace is that of a task of one continuation, which is the dense text: ``greedy`` after a block tells whether
a prompt that leaves there is followed by the same text (under ``sim`` nearly so). A trace of tokens is what
``recording.trace`` makes of a ``generate_until`` task. While a file is being made, its parts lie beside it.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from lm_eval_adainfer import container
from lm_eval_adainfer._version import __version__
from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.traces import recording
from lm_eval_adainfer.traces.file import VERSION, read
from lm_eval_adainfer.traces.plan import Plan
from lm_eval_adainfer.traces.recorders import Recorder, TextRecorder, arrays_of, text_arrays_of

if TYPE_CHECKING:
    from lm_eval_adainfer.harness.model import AdaInferLM

PROMPTS, TOKENS = "prompts", "tokens"
Tokens = tuple[list[int], list[int]]  # of a prompt, and of the text that follows it


def trace_texts(
    lm: AdaInferLM,
    what: str,
    plan: Plan,
    instances: Sequence[Any],
    texts: Sequence[Tokens],
    doc_ids: Sequence[int],
    path: Path,
    identity: Mapping[str, Any],
) -> Path:
    """Trace the texts of a task's documents; an equal file that is there is kept, and so are parts of one.

    Args:
        lm: The model, dense.
        what: ``prompts`` or ``tokens``.
        plan: Which readers are recorded.
        instances: The ``generate_until`` requests, one for each document.
        texts: The dense text of each.
        doc_ids: The index in its split of every document, by an instance's ``doc_id``.
        path: The file.
        identity: What besides model and plan tells this trace from others, JSON-serialisable; ``task``,
            ``num_fewshot`` and ``split`` among it.

    Returns:
        The file.

    Raises:
        AdaInferError: Where no text holds a token.
    """
    plan = plan.ready(lm)
    kind = "generate_until" if what == TOKENS else "loglikelihood"
    identity = {**recording.model_identity(lm), **identity, "output_type": kind, "readers": plan.names}
    identity |= {"hidden": False, "cluster": None}
    if path.exists():
        found = read(path)[0]
        if all(found.get(key) == value for key, value in identity.items()):
            return path
    parts, folder = [], path.with_name(f"{path.name}.parts")
    recorded = _of_tokens if what == TOKENS else _of_prompts
    # prompts are scored: the weights are read once for that, and not for every part
    with lm.identified() if what == PROMPTS else nullcontext():
        for start in range(0, len(instances), recording.PART_DOCUMENTS):
            some = slice(start, start + recording.PART_DOCUMENTS)
            pairs = [(i, t) for i, t in zip(instances[some], texts[some], strict=True) if t[1]]
            file, mine = folder / f"{start:08d}.part", {**identity, "documents": [i.doc_id for i, _ in pairs]}
            arrays = recording.read_part(file, mine)
            if arrays is None and pairs:
                arrays = recorded(lm, plan, pairs, doc_ids)
                container.write(file, "part", VERSION, mine, arrays)
            if arrays is not None:
                parts.append(arrays)
    if not parts:
        raise AdaInferError(f"tasks: {identity['task']} generated no token, so there is no decision to trace")
    whole = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    meta = {
        **identity,
        **plan.extra_meta(),
        "features": list(plan.features),
        "documents": len(np.unique(whole["doc_id"])),
        "block_hidden_size": lm.anatomy.block_hidden_size,
        "version": __version__,
    }
    container.write(path, "trace", VERSION, meta, whole)
    shutil.rmtree(folder, ignore_errors=True)
    return path


def _of_tokens(
    lm: AdaInferLM, plan: Plan, pairs: Sequence[tuple[Any, Tokens]], doc_ids: Sequence[int]
) -> dict[str, np.ndarray]:
    recorder = TextRecorder(lm, plan)
    for instance, (prompt, new) in pairs:
        recorder.text(instance.args, prompt, new)
    return text_arrays_of(recorder.records([instance for instance, _ in pairs]), doc_ids, plan)


def _of_prompts(
    lm: AdaInferLM, plan: Plan, pairs: Sequence[tuple[Any, Tokens]], doc_ids: Sequence[int]
) -> dict[str, np.ndarray]:
    recorder = Recorder(lm, plan)
    with lm.engine.observed(recorder):
        lm.score_tokens([tokens for _, tokens in pairs], [instance.doc_id for instance, _ in pairs])
    one = SimpleNamespace(OUTPUT_TYPE="loglikelihood")  # a task of one continuation, which is right
    return arrays_of(one, recorder, [instance for instance, _ in pairs], doc_ids, plan)
