"""What really came of documents that left early: a threshold's loss with its p-value, and figures with intervals.

Losses, exits and counted work are those of real runs (``runs.py``); nothing here is simulated.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from lm_eval_adainfer import bounded
from lm_eval_adainfer.fitting.risk import NET, Risk
from lm_eval_adainfer.harness.asking import Asking, generation_of
from lm_eval_adainfer.strategies.base import Stopper
from lm_eval_adainfer.traces import recording
from lm_eval_adainfer.traces.file import ASKED
from lm_eval_adainfer.tuning.runs import Ran, losses
from lm_eval_adainfer.tuning.savings import losing, saving
from lm_eval_adainfer.tuning.settings import Settings
from lm_eval_adainfer.tuning.text_contestants import TextContestant


def risk_of(lost: np.ndarray, max_drop: float, loss: str) -> Risk:
    """What is tested of documents' losses: exact tails where every one is lost, kept or won.

    Where losses lie between (the task's metric is no share of right and wrong), it is Gaffke's bound of their mean.

    Args:
        lost: [documents], from -1 to 1.
        max_drop: The greatest mean that is allowed.
        loss: Of ``risk.LOSSES``.
    """
    whole = bool(np.isin(lost, (-1.0, 0.0, 1.0)).all())
    return Risk(max_drop, loss in NET, None if whole else np.arange(len(lost)))


def rung(
    threshold: float, dense: Sequence[Ran], early: Sequence[Ran], settings: Settings, confidence: float
) -> dict[str, Any]:
    """What came of calibration documents at a threshold, and whether it passes, JSON-serialisable.

    Args:
        threshold: The threshold.
        dense: Their dense run.
        early: Their run at the threshold.
        settings: Whose ``loss`` and ``max_drop`` count.
        confidence: Of this test.
    """
    lost = losses(dense, early, settings.loss)
    risk, level = risk_of(lost, settings.max_drop, settings.loss), 1 - confidence
    p = risk.p(lost)
    return {
        "threshold": threshold,
        "losses": int((lost > 0).sum()),
        "wins": int((lost < 0).sum()),
        "lost": float(lost.mean()),
        "p": float(p),
        "passed": bool(p <= level),
        "saved": saved(early),
        "needed": risk.needed(lost, level),
    }


def promise(
    candidate: TextContestant,
    rungs: Sequence[dict[str, Any]],
    last: dict[str, Any],
    confidence: float,
    dense: Sequence[Ran],
    settings: Settings,
    lm: Any,
    asked: Asking,
) -> dict[str, Any]:
    """What goes into the stopper's file (``harness.promise`` compares it with a run).

    Args:
        candidate: What was calibrated.
        rungs: All thresholds that were tested.
        last: The loosest that passed.
        confidence: Of each test.
        dense: The dense run of the calibration documents.
        settings: What was asked for.
        lm: The model.
        asked: How documents were asked.
    """
    all_of = [ran.documents for ran in dense]
    used = {f"{of.name}/{of.split}": sorted(of.doc_ids) for of in all_of}
    model, how = recording.model_identity(lm), asked.identity(lm, "generate_until")
    blocks = list(candidate.choice.blocks)
    return {
        "max_drop": settings.max_drop,
        "confidence": confidence,
        "together_confidence": settings.confidence,
        "loss": settings.loss,
        "documents": sum(len(ran.texts) for ran in dense),
        "losses": last["losses"],
        **({"wins": last["wins"]} if settings.loss in NET else {}),
        "tasks": sorted(of.name for of in all_of),
        "num_fewshot": sorted({of.shots for of in all_of}),
        "shots": {of.name: of.shots for of in all_of},
        "fewshot_seed": [settings.fewshot_seed],
        "generated": True,
        "real_runs": True,
        "kv_policy": candidate.kv_policy,
        "shortlist": lm.options.shortlist,
        "screen": lm.options.screen,
        "generation_kwargs": generation_of({of.name: of.task for of in all_of}),
        "reader": candidate.reader.name,
        "min_layer": 1,
        "check_layers": "+".join(map(str, blocks)),
        "checked_blocks": blocks,
        **{key: model.get(key) for key in ("n_blocks", "head_hash", "dtype", "weights_hash")},
        **{key: how.get(key) for key in ASKED},
        "grid": "thresholds of fitting documents",
        "documents_sha256": hashlib.sha256(json.dumps(used, sort_keys=True).encode()).hexdigest()[:16],
        "thresholds": [last["threshold"], rungs[0]["threshold"]],
        "stops": True,
    }


def at(bare: Stopper, candidate: TextContestant, threshold: float) -> Stopper:
    """The candidate's stopper with a threshold.

    Args:
        bare: The stopper; its own threshold does not matter.
        candidate: Whose reader and blocks the stopper is told.
        threshold: Stop where its score exceeds it.
    """
    stopper = copy.copy(bare)
    stopper.threshold = threshold  # type: ignore[attr-defined]
    stopper.reader, stopper.info = candidate.reader, dict(bare.info)
    stopper.bind(candidate.scores.shape[1])
    if candidate.reader.runs_tokens:
        stopper.info["check_layers"] = list(candidate.choice.blocks)
    return stopper


def saved(early: Sequence[Ran]) -> float:
    """The share of the counted work that was saved, prompts and new tokens together."""
    return float(1 - sum(ran.flops.sum() for ran in early) / sum(ran.flops_dense.sum() for ran in early))


def left(ran: Ran, exits: str) -> np.ndarray:
    """Where prompts, or all new tokens, left."""
    return ran.prompt_exit if exits == "prompt" else np.array([k for layers in ran.layers for k in layers])


def row(name: str, dense: Sequence[Ran], early: Sequence[Ran]) -> dict[str, Any]:
    """What really came of a task's documents, or of all of them."""
    scored = [(a.scores(), b.scores()) for a, b in zip(dense, early, strict=True)]
    metrics = sorted({metric for pair in scored for metric, _ in pair if metric})
    change = np.concatenate([b - a for (_, a), (_, b) in scored])
    score = np.concatenate([b for _, (_, b) in scored])
    same = np.concatenate([[a == b for a, b in zip(x.texts, y.texts, strict=True)] for x, y in zip(dense, early,
                           strict=True)])  # fmt: skip
    found: dict[str, Any] = {
        "task": name,
        "documents": len(same),
        "metric": "/".join(metrics) or None,
        "acc": None,
        "acc_change": None,
        "acc_change_low": None,
        "acc_change_high": None,
        "agreement": float(same.mean()),
        "exit_layer": float(np.mean([np.mean(layers) for ran in early for layers in ran.layers])),
    }
    if np.isfinite(change).all():
        found["acc"], found["acc_change"] = float(score.mean()), float(change.mean())
        if (np.abs(change) <= 1).all():
            interval = bounded.gaffke_interval(change, np.ones(len(change)))
            found["acc_change_low"], found["acc_change_high"] = interval.lower, interval.upper
        else:
            found["acc_change_low"] = found["acc_change_high"] = found["acc_change"]
    return found


def figures(dense: Sequence[Ran], early: Sequence[Ran], loss: str, seed: int, exits: str) -> dict[str, Any]:
    """What was really saved and lost, with 95% intervals over documents."""
    cost, whole = (np.concatenate([getattr(ran, name) for ran in early]) for name in ("flops", "flops_dense"))
    lost = losses(dense, early, loss)
    if np.isin(lost, (0.0, 1.0)).all():
        share = losing(lost)
    else:
        interval = bounded.gaffke_interval(lost, np.ones(len(lost)))
        share = {"lost": float(lost.mean()), "lost_low": interval.lower, "lost_high": interval.upper}
    return {
        **saving(cost, whole, seed),
        "of_dense_run": float(cost.sum() / sum(ran.flops.sum() for ran in dense)),
        **share,
        "exit_layer": float(np.mean(np.concatenate([left(ran, exits) for ran in early]))),
    }
