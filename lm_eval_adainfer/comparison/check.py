"""What ``adainfer check`` says: exit status, text, JUnit XML, a GitHub step summary; and the check of a dense run."""

from __future__ import annotations

import os
import re
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

from lm_eval_adainfer import container
from lm_eval_adainfer.comparison.gate import FAIL, INCONCLUSIVE, PASS, Verdict
from lm_eval_adainfer.comparison.matching import default_metric, documents_of
from lm_eval_adainfer.comparison.runs import Run
from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.output.comparison_tables import escape_markdown

EXIT = {PASS: 0, FAIL: 1, INCONCLUSIVE: 3}
_MARK = {PASS: "passed", FAIL: "failed", INCONCLUSIVE: "inconclusive"}


@dataclass(frozen=True)
class Case:
    """One thing that was checked."""

    name: str
    status: str
    message: str


def cases(verdict: Verdict) -> list[Case]:
    """The pool, every guard, and pruning."""
    alone = FAIL if verdict.dropped else PASS if verdict.within else INCONCLUSIVE
    found = [
        Case(
            f"drop of {verdict.pool}",
            alone,
            f"{_metric(verdict)} {verdict.baseline:.4f} -> {verdict.candidate:.4f}, drop {verdict.drop:+.4f} "
            f"(one-sided bounds {verdict.lower:+.4f} and {verdict.upper:+.4f}), allowed {verdict.max_drop:g}",
        )
    ]
    found += [
        Case(
            f"guard of {guard.task}",
            FAIL if guard.failed else PASS,
            f"{guard.metric} drop {guard.drop:+.4f} (95% interval {guard.lower:+.4f} to {guard.upper:+.4f}), "
            f"Holm's p of a drop above {verdict.max_drop:g}: {guard.p_holm:.2g}",
        )
        for guard in verdict.guards
    ]
    if verdict.min_pruning is not None and verdict.pruning_ratio is not None:
        status = FAIL if verdict.pruning_ratio < verdict.min_pruning - 1e-12 else PASS
        message = f"pruning_ratio {verdict.pruning_ratio:.4f}, at least {verdict.min_pruning:g} wanted"
        found.append(Case("pruning", status, message))
    return found


def _metric(verdict: Verdict) -> str:
    return f"{verdict.metric} in {verdict.unit}" if verdict.unit else verdict.metric


def text(verdict: Verdict, baseline: str, candidate: str) -> str:
    """For people."""
    levels = f"{verdict.lower_level:.0%} and {verdict.upper_level:.0%} one-sided"
    flips = "" if verdict.discordant is None else f", {verdict.discordant} of them discordant"
    lines = [
        f"{verdict.status.upper()}: {verdict.reasons[0]}",
        *(f"  also: {reason}" for reason in verdict.reasons[1:]),
        "",
        f"baseline {baseline}, candidate {candidate}; {verdict.documents} documents of {verdict.pool}{flips}",
        f"{_metric(verdict)}: {verdict.baseline:.4f} -> {verdict.candidate:.4f}, drop {verdict.drop:+.4f}, "
        f"bounds {verdict.lower:+.4f} and {verdict.upper:+.4f} ({levels}), allowed {verdict.max_drop:g}",
    ]
    if verdict.pruning_ratio is not None:
        least = "" if verdict.min_pruning is None else f", at least {verdict.min_pruning:g} wanted"
        lines.append(f"pruning_ratio (counted): {verdict.pruning_ratio:.4f}{least}")
    if verdict.guards:
        width = max(len(g.task) for g in verdict.guards)
        lines += ["", f"{'task'.ljust(width)}   docs     drop        95% interval   Holm's p"]
        lines += [
            f"{g.task.ljust(width)}  {g.documents:5d}  {g.drop:+.4f}  [{g.lower:+.4f}, {g.upper:+.4f}]"
            f"  {g.p_holm:9.2g}{'  FAIL' if g.failed else ''}"
            for g in verdict.guards
        ]
    return "\n".join(lines)


def summary(title: str, found: list[Case], notes: list[str]) -> str:
    """GitHub-flavoured Markdown."""
    lines = [f"### adainfer check: {escape_markdown(title)}", "", "| check | result | |", "|---|---|---|"]
    lines += [f"| {escape_markdown(c.name)} | {_MARK[c.status]} | {escape_markdown(c.message)} |" for c in found]
    lines += ["", *(f"{escape_markdown(note)}\n" for note in notes)]
    return "\n".join(lines) + "\n"


def junit(found: list[Case], inconclusive_is: str) -> bytes:
    """JUnit XML, a test case per check; inconclusive is a failure unless it counts as passed."""
    red = [c for c in found if c.status == FAIL or (c.status == INCONCLUSIVE and inconclusive_is != PASS)]
    skipped = sum(c.status == INCONCLUSIVE for c in found) if inconclusive_is == PASS else 0
    counts = {"tests": str(len(found)), "failures": str(len(red)), "errors": "0", "skipped": str(skipped)}
    suites = ET.Element("testsuites", counts)
    suite = ET.SubElement(suites, "testsuite", {"name": "adainfer check", **counts})
    for case in found:
        element = ET.SubElement(suite, "testcase", {"classname": "adainfer.check", "name": _xml(case.name)})
        if case in red:
            kind = "failure"
        elif case.status == INCONCLUSIVE:
            kind = "skipped"
        else:
            ET.SubElement(element, "system-out").text = _xml(case.message)
            continue
        ET.SubElement(element, kind, {"type": case.status, "message": _xml(case.message)})
    return bytes(ET.tostring(suites, encoding="utf-8", xml_declaration=True)) + b"\n"


def _xml(text: str) -> str:
    """Without the characters that XML can't hold even escaped."""
    return re.sub("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "?", text)


def write_reports(
    title: str,
    found: list[Case],
    notes: list[str],
    inconclusive_is: str,
    junit_file: str | None,
    summary_file: str | None,
) -> None:
    """Write the JUnit file, and append to the summary file (by default GitHub's, where the job has one)."""
    if junit_file:
        container.write_atomically(Path(junit_file), junit(found, inconclusive_is))
    target = summary_file or os.environ.get("GITHUB_STEP_SUMMARY")
    if target:
        try:
            Path(target).parent.mkdir(parents=True, exist_ok=True)
            with open(target, "a", encoding="utf-8", errors="replace") as file:
                file.write(summary(title, found, notes))
        except OSError as error:
            raise AdaInferError(f"summary: {target} can't be written: {error.strerror or error}") from None


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


