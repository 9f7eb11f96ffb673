"""The samples of one run: JSON lines read one by one, and of every document what a comparison needs.

Files are other people's: only JSON is read, and whatever is not as lm-eval writes it ends in one sentence.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lm_eval_adainfer.clusters import Key
from lm_eval_adainfer.errors import AdaInferError

DATE = r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d(?:\.\d+)?"  # in the names of files that lm-eval and lighteval write
_NO_METRICS = frozenset(("doc", "arguments", "resps", "filtered_resps", "target"))
_PROMPT, _TARGET = 1500, 300  # characters kept; of a prompt the last, since the question is there


@dataclass
class Document:
    """What is kept of one logged sample."""

    doc_id: int
    doc_hash: str
    prompt_hash: str
    metrics: dict[str, float]  # as logged, so that a broken run's may be NaN
    answer: Any  # the chosen index, whether greedy decoding gives the answer, or the text; None where unknown
    scores: tuple[float, ...]  # log-probabilities, where there are any
    prompt: str
    target: str
    pairs: dict[str, tuple[float, float]] = field(default_factory=dict)  # metrics that log (log-likelihood, weight)
    cluster: str | None = None  # the same for documents that belong together; None where nothing says so


def read_json(file: Path, argument: str) -> Any:
    """A JSON file's content, or one sentence."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise AdaInferError(f"{argument}: {file} can't be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise AdaInferError(f"{argument}: {file} is no text; give a results file of lm-eval") from None
    except (ValueError, RecursionError) as error:
        reason = _first_line(error)
        raise AdaInferError(f"{argument}: {file} is damaged, it is no JSON ({reason}); run it again") from None


def samples(file: Path, argument: str) -> Iterator[tuple[int, Any]]:
    """Line number and content of every sample."""
    number = 0
    try:
        with file.open(encoding="utf-8") as lines:
            start = lines.read(1)
            lines.seek(0)
            if start == "[":  # lm-eval before 0.4.3 wrote one indented array
                yield from enumerate(json.loads(lines.read()), 1)
                return
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, json.loads(line)
    except OSError as error:
        raise AdaInferError(f"{argument}: {file} can't be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise AdaInferError(f"{argument}: {file} is no text; run it again with --log_samples") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, AdaInferError):
            raise
        raise AdaInferError(
            f"{argument}: {file}, line {number}, is damaged, it is no JSON ({_first_line(error)}); run it again"
        ) from None


def read_document(
    sample: dict[str, Any], where: str, prompts: bool, rolling: bool = False, key: Key | None = None
) -> Document:
    """Keep of a sample what a comparison needs.

    Args:
        sample: As lm-eval logs it.
        where: Names it in messages.
        prompts: Keep the prompt and the target.
        rolling: It is of ``loglikelihood_rolling``, whose response is a number and no text.
        key: Says which documents belong together.

    Raises:
        AdaInferError: Where the document can't be told from others, or does not have what ``key`` asks for.
    """
    doc_id = sample["doc_id"]
    listed = sample.get("metrics")
    names = (
        [m for m in listed if isinstance(m, str)]
        if isinstance(listed, list)
        else [  # older lm-eval
            k for k, v in sample.items()
            if k != "doc_id" and (type(v) in (int, float, bool) or (isinstance(v, list) and k not in _NO_METRICS))
        ]
    )  # fmt: skip
    metrics, pairs = {}, {}
    for name in names:
        value = sample.get(name)
        if isinstance(value, (int, float)):  # corpus metrics log what they need, in any form
            metrics[name] = _float(value)
        elif isinstance(value, list) and len(value) == 2 and all(type(v) in (int, float) for v in value):
            pairs[name] = (_float(value[0]), _float(value[1]))
    responses = _once(sample.get("filtered_resps"))
    if rolling and isinstance(responses, list):
        numbers = [r[0] if isinstance(r, list) and len(r) == 2 else r for r in responses]  # 0.5.0.dev1: (number, False)
        answer, scores = None, tuple(s for s in map(finite, numbers) if s is not None)
    else:
        answer, scores = _answer(responses)
    prompt = _prompt(sample.get("arguments"))
    doc_hash, prompt_hash = sample.get("doc_hash"), sample.get("prompt_hash")
    if not isinstance(doc_hash, str):
        if "doc" not in sample:
            raise AdaInferError(f"{where} has neither doc_hash nor doc, so documents can't be matched; run it again")
        # as lm-eval since 0.4.3 does
        doc_hash = _hash(json.dumps(sample["doc"], indent=2, ensure_ascii=False))
    if not isinstance(prompt_hash, str):
        prompt_hash = _hash(prompt) if prompt is not None else ""
    shown = (prompt or "")[-_PROMPT:] if prompts else ""
    target = str(sample.get("target", ""))[:_TARGET] if prompts else ""
    cluster = None if key is None else key.of(sample.get("doc"), f"{where}, the document {doc_id},")
    return Document(doc_id, doc_hash, prompt_hash, metrics, answer, scores, shown, target, pairs, cluster)


def _float(value: int | float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _once(responses: Any) -> Any:
    """Filtered responses, where every request has a list of one (lm-eval 0.5.0.dev1) without these lists."""
    if not isinstance(responses, list):
        return responses
    alone = all(isinstance(r, list) and len(r) == 1 and isinstance(r[0], (list, str)) for r in responses)
    return [r[0] for r in responses] if alone else responses


def _answer(responses: Any) -> tuple[Any, tuple[float, ...]]:
    """What the model answered: choices compared by log-probability, one continuation by greediness, else the text."""
    if not isinstance(responses, list) or not responses:
        return None, ()
    pairs = [r for r in responses if isinstance(r, list) and len(r) == 2]
    if len(pairs) == len(responses):
        scores = tuple(finite(r[0]) for r in pairs)
        if any(s is None for s in scores):
            return None, ()
        known = tuple(s for s in scores if s is not None)
        return (known.index(max(known)) if len(known) > 1 else str(pairs[0][1])), known
    if all(isinstance(r, str) for r in responses):
        return tuple(responses), ()
    if all(isinstance(r, (int, float)) for r in responses):
        return None, tuple(float(r) for r in responses)
    return json.dumps(responses, sort_keys=True), ()


def _prompt(arguments: Any) -> str | None:
    if isinstance(arguments, dict):
        arguments = arguments.get("gen_args_0")
        found = arguments.get("arg_0") if isinstance(arguments, dict) else None
    else:  # older lm-eval
        found = arguments[0] if isinstance(arguments, list) and arguments else None
        found = found[0] if isinstance(found, list) and found else None
    return found if isinstance(found, str) else None


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def finite(value: Any) -> float | None:
    """The number that this is or spells; None where it is none, or not finite."""
    if isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
