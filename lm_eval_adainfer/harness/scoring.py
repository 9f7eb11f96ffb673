"""Loglikelihood requests, whole documents and rolling windows: run, scored, and answered with an exit record."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lm_eval import utils
from lm_eval.api.model import hash_args
from tqdm import tqdm

from lm_eval_adainfer.harness import answer_cache
from lm_eval_adainfer.harness.answers import LogLikelihood, rolling
from lm_eval_adainfer.harness.batch_sizes import Shapes
from lm_eval_adainfer.harness.requests import TokenRequest
from lm_eval_adainfer.prefill import planning
from lm_eval_adainfer.prefill.documents import Answer, Document, Row
from lm_eval_adainfer.prefill.exit_records import record_of_document, record_of_windows
from lm_eval_adainfer.prefill.planning import Batch

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance


def loglikelihoods(
    lm: Any, requests: Sequence[TokenRequest], keys: Sequence[Any], quiet: bool, batch_size: int | None
) -> list[Any]:
    """A ``LogLikelihood`` for each request; those of a finished document are kept in the response cache at once.

    Args:
        lm: The ``AdaInferLM``.
        requests: Tokenised.
        keys: Per request, what it has in common with the other requests of its document.
        quiet: Whether no progress is shown.
        batch_size: None for the model's.
    """
    documents = lm.documents(requests, keys)
    if lm.engine.observer is None:
        lm.caveats.without_choices(sum(not d.has_choices for d in documents), len(documents), "documents")
    lm.caveats.dear_checks(documents)
    results: list[LogLikelihood | None] = [None] * len(requests)
    progress = tqdm(total=len(requests), disable=quiet, desc="Running loglikelihood requests")
    lm.engine.dense = None if lm.one_pass is None else lm.one_pass.too
    try:
        for some in batches(lm, documents, batch_size):
            started = time.perf_counter()
            with lm._autocast():
                lm.engine.run(some)
            lm.seconds += time.perf_counter() - started
            for document in (document for batch in some for document in batch.documents):
                record = record_of_document(document, lm.counter, lm.fingerprint, lm.options.log_features)
                finished = {}
                for row, answer in [(r, a) for r in document.rows for a in r.answers]:
                    result = LogLikelihood(answer.logprob, answer.is_greedy, record, answer.top1, answer.top)
                    results[answer.request] = result
                    if (strings := requests[answer.request][0]) is not None:
                        finished[hash_args("loglikelihood", strings)] = result
                    if math.isnan(answer.logprob):
                        lm.caveats.not_finite(row.tokens)
                    progress.update(1)
                answer_cache.remember(lm.cache_hook.dbdict, finished)
                if lm.one_pass is not None:
                    lm.one_pass.keep(document, requests, keys)
    finally:
        progress.close()
    return results


def batches(lm: Any, documents: Sequence[Document], batch_size: int | None) -> Iterator[list[Batch]]:
    """Batches of all documents, as lists of those that are run together.

    Args:
        lm: The ``AdaInferLM``.
        documents: All of them.
        batch_size: None for the model's.
    """

    def automatic(position: int, rows: Sequence[Row]) -> int:
        return int(lm._batch_scheduler(position, Shapes(rows)))

    size: int | planning.SizeAt = automatic if lm.batch_size == "auto" else int(lm.batch_size)
    lm.batch_sizes = {}
    budget = 0 if lm.engine.observer is not None else lm.options.prefix_cache  # what is observed is run whole
    return planning.plan(
        lm.anatomy, documents, size if batch_size is None else batch_size, lambda: lm._sharing().rule, budget,
        lm.schedule.blocks if lm.reader.runs_tokens else (),
    )  # fmt: skip


def rolled(lm: Any, requests: Sequence[Instance], batch_size: int, quiet: bool) -> list[Any]:
    """The log-probability of every text, each token scored at its own exit block.

    Args:
        lm: The ``AdaInferLM``.
        requests: Of texts behind an empty context, or alone.
        batch_size: Windows that are run together.
        quiet: Whether no progress is shown.
    """
    texts: list[list[Row]] = [[] for _ in requests]  # their windows
    for n, (*_, text) in enumerate([r.args for r in requests]):
        pairs = utils.get_rolling_token_windows(
            token_list=lm.tok_encode(text), prefix_token=lm.prefix_token_id, max_seq_len=lm.max_length, context_len=1
        )
        for context, continuation in map(utils.make_disjoint_window, pairs):
            row = Row((context + continuation)[:-1], len(continuation))
            row.answers.append(Answer(n, continuation))
            texts[n].append(row)
    finished: list[list[tuple[Row, list[int]]]] = [[] for _ in requests]
    results: list[Any] = [
        None if windows else rolling(r.args, 0.0, lm.texts.dense_record())
        for r, windows in zip(requests, texts, strict=True)
    ]
    # a text's windows stay together, so that it is finished, and kept, before many others are begun
    order = sorted(range(len(texts)), key=lambda n: -max((len(row.tokens) for row in texts[n]), default=0))
    windows = [(n, row) for n in order for row in texts[n]]
    progress = tqdm(total=len(windows), disable=quiet, desc="Running rolling windows")
    for start in range(0, len(windows), batch_size):
        batch = windows[start : start + batch_size]
        started = time.perf_counter()
        with lm._autocast():
            layers = lm.engine.run_tokens([row for _, row in batch])
        lm.seconds += time.perf_counter() - started
        for (n, row), found in zip(batch, layers, strict=True):
            finished[n].append((row, found))
            if len(finished[n]) == len(texts[n]):
                results[n] = _of_windows(lm, requests[n].args, finished[n])
                key = hash_args("loglikelihood_rolling", requests[n].args)
                answer_cache.remember(lm.cache_hook.dbdict, {key: results[n]})
        progress.update(len(batch))
    progress.close()
    return results


def _of_windows(lm: Any, arguments: Sequence[str], parts: Sequence[tuple[Row, list[int]]]) -> Any:
    """The answer of a text from all its windows."""
    for row, _ in parts:
        if any(math.isnan(answer.logprob) for answer in row.answers):
            lm.caveats.not_finite(row.tokens)
    logprob = sum(answer.logprob for row, _ in parts for answer in row.answers)
    record = record_of_windows(parts, lm.counter, lm.stopper, lm.schedule, lm.fingerprint, lm.reader)
    return rolling(arguments, logprob, record)
