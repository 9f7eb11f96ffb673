"""The record of a run, which stands in lm-eval's results: what identifies it, and what it came to."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import torch
import transformers

from lm_eval_adainfer._version import __version__
from lm_eval_adainfer.generation.policies import KV_POLICIES
from lm_eval_adainfer.prefill.probes import Sharing
from lm_eval_adainfer.structure.windows import Windows


def of(lm: Any, sharing: Sharing | None, windows: Windows | None) -> dict[str, Any]:
    """JSON-serialisable: identity (stopper, L, checked blocks, device, versions) and totals (docs/numbers.md).

    Args:
        lm: The ``AdaInferLM``.
        sharing: How prompts share what they begin with, where the run has found that out.
        windows: How tokens are laid out while generating, where the run has found that out.
    """
    totals = lm.run_totals or lm.totals()
    tokens, seconds = totals["generated_tokens_counted"], totals["seconds_generating_measured"]
    policy, checks = lm.options.kv_policy, ((n, getattr(lm.options, n)) for n in ("shortlist", "screen"))
    how = {
        "kv_policy": policy + ("" if KV_POLICIES[policy].exact else " (approximate)"),
        **({"token_stopper": lm.token_stopper.describe()} if lm.reader.runs_tokens else {}),
        "head_check": next((f"{name}:{tokens}" for name, tokens in checks if tokens), "exact"),
    }
    return {
        "stopper": lm.stopper.describe(),
        **lm.reader.describe(),
        "fingerprint": lm.fingerprint,
        "n_blocks": lm.n_blocks,
        **({"dropped_blocks": list(lm.stopper.dropped_blocks)} if lm.stopper.dropped_blocks else {}),
        **lm.schedule.describe(),
        "device": str(lm.device),
        "dtype": str(next(lm.model.parameters()).dtype),
        "generation": lm.generation,
        **(how if lm.generation == "early" else {}),
        "loglikelihood_rolling": "counted as if each token had been run to its exit block only",
        **({} if sharing is None else {"shared_prefixes": _with_reason(sharing.how, sharing.missed)}),
        **({} if windows is None else {"generation_layout": _with_reason(windows.layout, windows.missed)}),
        **({"one_pass": True} if lm.one_pass or lm.answered else {}),
        **totals,
        **({} if lm.auto_record is None else {"stopper_auto": lm.auto_record}),
        **({} if lm.pilot_record is None else {"pilot": lm.pilot_record}),
        **(lm.promise_record or {}),
        **(lm.seen_record or {}),
        **({"generated_tokens_per_second_measured": tokens / seconds} if tokens and seconds else {}),
        "versions": {
            "lm_eval_adainfer": __version__,
            "lm_eval": version("lm_eval"),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def totals(lm: Any) -> dict[str, Any]:
    """A process's totals since its model was built: measured seconds, counted tokens, head rows and block calls.

    The record of a run holds what one evaluation added to them (``metrics``). Of a pass that gave two sides' answers
    neither side has seconds of its own.

    Args:
        lm: The ``AdaInferLM``.
    """
    engine = lm.engine
    return {
        **({} if lm.one_pass or lm.answered else {"seconds_in_model_measured": lm.seconds}),
        **({} if lm.one_pass is None else lm.one_pass.totals()),
        "tokens_counted": engine.tokens,
        "block_tokens_counted": engine.block_tokens,
        "block_calls_counted": engine.block_calls,
        "head_rows_counted": engine.head_rows,
        **({"copied_tokens_counted": engine.copied_tokens} if lm.reader.kind == "copy" else {}),
        "generated_tokens_counted": lm.generated_tokens,
        "seconds_generating_measured": lm.generating_seconds,
    }


def _with_reason(how: str, missed: str) -> str:
    return f"{how} ({missed})" if missed else how
