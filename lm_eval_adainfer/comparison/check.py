"""What ``adainfer check`` says: exit status, text, JUnit XML, a GitHub step summary; and the check of a dense run."""

from __future__ import annotations

from dataclasses import dataclass

from lm_eval_adainfer.comparison.evidence import BETTING
from lm_eval_adainfer.comparison.gate import FAIL, INCONCLUSIVE, PASS, Guard, Pool, Verdict, too_little
from lm_eval_adainfer.comparison.matching import default_metric, documents_of
from lm_eval_adainfer.comparison.runs import Run
from lm_eval_adainfer.errors import AdaInferError

EXIT = {PASS: 0, FAIL: 1, INCONCLUSIVE: 3}


@dataclass(frozen=True)
class Case:
    """One thing that was checked."""

    name: str
    status: str
    message: str


def cases(verdict: Verdict) -> list[Case]:
    """The pools, every guard, pruning and the operations saved."""
    found = [
        Case(
            f"drop of {pool.name}",
            FAIL if pool.dropped else PASS if pool.within else INCONCLUSIVE,
            f"{metric_name(pool, verdict)} {pool.baseline:.4f} -> {pool.candidate:.4f}, drop {pool.drop:+.4f} "
            f"(one-sided bounds {pool.lower:+.4f} and {pool.upper:+.4f}), allowed {verdict.max_drop:g}",
        )
        for pool in verdict.pools
    ]
    early = any(pool.method == BETTING for pool in verdict.pools)  # what a guard sees depends on when it stops
    found += [
        Case(
            f"guard of {guard.task}",
            FAIL if guard.failed else PASS,
            f"{guard.metric} drop {guard.drop:+.4f} (95% interval {guard.lower:+.4f} to {guard.upper:+.4f}), "
            f"Holm's p of a drop above {verdict.max_drop:g}: {guard.p_holm:.2g}"
            + ("" if early else f"; {seen_by(guard)}"),
        )
        for guard in verdict.guards
    ]
    if verdict.min_pruning is not None and verdict.pruning_ratio is not None:
        status = FAIL if too_little(verdict.pruning_ratio, verdict.min_pruning) else PASS
        message = f"pruning_ratio {verdict.pruning_ratio:.4f}, at least {verdict.min_pruning:g} wanted"
        found.append(Case("pruning", status, message))
    if verdict.min_flops_saved is not None and verdict.flops_saved is not None:
        status = FAIL if too_little(verdict.flops_saved, verdict.min_flops_saved) else PASS
        message = f"flops saved {verdict.flops_saved:.4f}, at least {verdict.min_flops_saved:g} wanted"
        found.append(Case("flops saved", status, message))
    return found


def seen_by(guard: Guard) -> str:
    """What a guard would reveal, in words."""
    if guard.sees is None:
        return "no drop would be revealed with 80% probability"
    return f"a drop of {guard.sees:.4f} would be revealed with 80% probability"


def metric_name(pool: Pool, verdict: Verdict) -> str:
    """The name of a pool's metric, with the unit of the verdict's drops where it has one."""
    return f"{pool.metric} in {verdict.unit}" if verdict.unit else pool.metric


def reproduces(baseline: Run, candidate: Run, tolerance: float, metric: str | None, other_prompts: bool) -> list[Case]:
    """Check, task by task, that a dense run gives the baseline's answers.

    Args:
        baseline: Usually of ``--model hf``.
        candidate: A run of ``--model adainfer`` with ``stopper=none``.
        tolerance: Of log-probabilities, absolute and relative. Below a difference of that size between two choices,
            the other may win.
        metric: Compared besides the answers; where a task has none that can be, its answers are compared alone.
        other_prompts: Accept that prompts differ.

    Raises:
        AdaInferError: Where the candidate stops early, or the runs don't match.
    """
    stopper = candidate.adainfer.get("stopper")
    kind = stopper.get("kind") if isinstance(stopper, dict) else None
    if kind is not None and kind != "none":
        raise AdaInferError(
            f"reproduces: {candidate.label} ran with the stopper {kind!r}; give a run with stopper=none"
        )
    if not 0 <= tolerance < 1:
        raise AdaInferError(f"tolerance: {tolerance:g} is no number from 0 to below 1; 1e-4 is right for float32")
    found = []
    for first, second, documents in documents_of(baseline, candidate, other_prompts):
        name = metric or first.wanted or second.wanted or default_metric(first, second)
        if name is not None:
            first.require(name)
            second.require(name)
        elif any(a.answer is None and not a.scores for a, _ in documents):
            raise AdaInferError(
                f"reproduces: the samples of {first.name} hold neither answers nor numbers per document; leave that "
                "task out (--exclude)"
            )
        # a perplexity is the log-probability, which is compared with a tolerance anyway
        exact = name if name is not None and not first.scales[name].unit else None
        differing, largest = [], 0.0
        for a, b in documents:
            gaps = [abs(s - t) / max(1.0, abs(s)) for s, t in zip(a.scores, b.scores, strict=False)]
            largest = max([largest, *gaps])
            tie = a.answer != b.answer and len(a.scores) > 1 and _tie(a.scores, a.answer, b.answer, tolerance)
            equal = exact is None or a.metrics[exact] == b.metrics[exact]
            same = (a.answer == b.answer and equal) or tie
            if len(a.scores) != len(b.scores) or not same or any(g > tolerance for g in gaps):
                differing.append(a.doc_id)
        if differing:
            message = (
                f"{len(differing)} of {len(documents)} documents differ (the first is {differing[0]}); "
                f"log-probabilities by up to {largest:.2g}, allowed {tolerance:g}"
            )
        else:
            message = f"all {len(documents)} documents agree; log-probabilities differ by up to {largest:.2g}"
        found.append(Case(f"{first.name} is reproduced", FAIL if differing else PASS, message))
    return found


def _tie(scores: tuple[float, ...], first: int, second: int, tolerance: float) -> bool:
    """Whether two choices were level, so that rounding decided between them."""
    valid = all(isinstance(i, int) and 0 <= i < len(scores) for i in (first, second))
    return valid and abs(scores[first] - scores[second]) <= 2 * tolerance * max(1.0, abs(scores[first]))


