"""One pass for both sides: a model that exits early, and the same model dense, whose answers come from its passes.

The end of an early-exit forward, if its rows run on to it, is the dense answer. So where the early side has been
evaluated, the dense side's evaluation finds the answers to all loglikelihood requests waiting, and runs nothing. Texts
and rolling requests it answers by itself.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lm_eval.api.model import CacheHook, hash_args

from lm_eval_adainfer.harness.answers import LogLikelihood
from lm_eval_adainfer.harness.caveats import Caveats
from lm_eval_adainfer.harness.options import Options
from lm_eval_adainfer.harness.texts import Texts
from lm_eval_adainfer.prefill.dense_too import DenseToo
from lm_eval_adainfer.prefill.documents import Document
from lm_eval_adainfer.prefill.exit_records import record_of_document
from lm_eval_adainfer.strategies import specs

# what a run without exits has no use for
_OF_EXITS = ("stopper", "stopper_dir", "token_stopper")


def dense_args(model_args: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the same model without exits."""
    return {**{key: value for key, value in model_args.items() if key not in _OF_EXITS}, "stopper": "none"}


def hindered(model_args: Mapping[str, Any]) -> str:
    """Why a model with these arguments can't give both sides' answers in one pass; empty where it can.

    Raises:
        AdaInferError: On a stopper that makes no sense.
    """
    name = str(model_args.get("stopper") or "none").strip()
    if name != "auto" and specs.parse(name).removes_blocks:
        return f"stopper={name} takes blocks out of the model"
    if str(model_args.get("log_features") or "false").strip().lower() in ("true", "1", "yes"):
        return "log_features logs what the dense side says after every block"
    return ""


class OnePass:
    """The dense side of an early-exit model, which is told of it (``AdaInferLM.one_pass``).

    Args:
        lm: The early-exit ``AdaInferLM``.

    Attributes:
        dense: The same model without exits, as ``stopper=none`` would make it, with the same weights in memory.
        too: What the engine of ``lm`` is given.
    """

    def __init__(self, lm: Any):
        self.too = DenseToo(lm.anatomy, lm.softmax_dtype)
        self.dense = _twin(lm)
        self._early = lm
        self._waiting: dict[Hashable, LogLikelihood] = {}
        lm.one_pass, self.dense.answered = self, self

    def keep(self, document: Document, requests: Sequence[Any], keys: Sequence[Hashable]) -> None:
        """Keep the dense answers of a document that the early side has run.

        Args:
            document: It.
            requests: All that it is among, as :meth:`AdaInferLM.documents` takes them.
            keys: Per request, what it has in common with the other requests of its document.
        """
        found = self.too.take(document)
        record = record_of_document(found, self.dense.counter, "")
        for answer in (a for row in found.rows for a in row.answers):
            key = keys[answer.request], hash_args("loglikelihood", requests[answer.request][0])
            self._waiting[key] = LogLikelihood(answer.logprob, answer.is_greedy, record, answer.top1, answer.top)

    def answers(self, requests: Sequence[Any], keys: Sequence[Hashable]) -> list[LogLikelihood | None]:
        """The answers that are waiting for requests of lm-eval; None where there is none."""
        dense, own, found = self.dense, self.too.own, list[LogLikelihood | None]()
        for request, key in zip(requests, keys, strict=True):
            answer = self._waiting.get((key, hash_args("loglikelihood", request.args)))
            if answer is not None:
                record = replace(answer.exit_record, fingerprint=dense.fingerprint)
                answer = LogLikelihood(answer[0], answer[1], record, answer.top1, answer.top)
            found.append(answer)
        for count, value in vars(own).items():
            setattr(dense.engine, count, getattr(dense.engine, count) + value)
            setattr(own, count, 0)
        dense.found_sharing, dense.batch_sizes = self._early.found_sharing, dict(self._early.batch_sizes)
        return found

    def forget(self) -> None:
        """Forget the answers that are waiting."""
        self._waiting.clear()

    def totals(self) -> dict[str, Any]:
        """What the early side has come to with what the dense answers added: measured seconds, and counts."""
        early, more = self._early, self.too.more
        return {
            "one_pass_seconds_measured": early.seconds - early.generating_seconds,
            **{f"one_pass_{name}_counted": getattr(early.engine, name) + value for name, value in vars(more).items()},
        }


def _twin(lm: Any) -> Any:
    """The same model without exits."""
    twin = copy.copy(lm)
    *others, _ = lm.arguments_read  # without the token stopper
    twin.options = Options.read("none", *others)
    twin.stopper_name, twin._auto, twin.auto_record = "none", None, None
    twin.use(*lm.asked_after)
    twin.seconds = twin.generating_seconds = 0.0
    twin.generated_tokens = 0
    twin._document_keys, twin.run_totals = [], {}
    twin.pilot_record = twin.promise_record = None
    twin.caveats, twin.texts, twin.found_sharing = Caveats(twin), Texts(twin, lm.texts.known_windows), None
    twin.set_cache_hook(CacheHook(None))
    return twin
