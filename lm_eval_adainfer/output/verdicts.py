"""The gate's verdict as text, as a Markdown summary and as JUnit XML."""

from __future__ import annotations

import os
import re
import xml.etree.ElementTree as ET
from pathlib import Path

from lm_eval_adainfer import container
from lm_eval_adainfer.comparison.check import Case, metric_name
from lm_eval_adainfer.comparison.evidence import BETTING
from lm_eval_adainfer.comparison.gate import FAIL, INCONCLUSIVE, PASS, Pool, Verdict, percent
from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.output.rendering import escape_markdown

_MARK = {PASS: "passed", FAIL: "failed", INCONCLUSIVE: "inconclusive"}
WITHIN, BEYOND = "within", "beyond"
# a verdict on a drop alone, beside a run
OF_DROP = {PASS: WITHIN, FAIL: BEYOND, INCONCLUSIVE: "inconclusive"}


def text(verdict: Verdict, baseline: str, candidate: str) -> str:
    """For people: the verdict on a drop, with its reasons and guards."""
    lines = [
        f"{verdict.status.upper()}: {verdict.reasons[0]}",
        *(f"  also: {reason}" for reason in verdict.reasons[1:]),
        "",
        f"baseline {baseline}, candidate {candidate}; " + "; ".join(_asked(pool) for pool in verdict.pools),
        *(_line(pool, verdict) for pool in verdict.pools),
    ]
    if verdict.pruning_ratio is not None:
        least = "" if verdict.min_pruning is None else f", at least {verdict.min_pruning:g} wanted"
        lines.append(f"pruning_ratio (counted): {verdict.pruning_ratio:.4f}{least}")
    if verdict.flops_saved is not None:
        least = "" if verdict.min_flops_saved is None else f", at least {verdict.min_flops_saved:g} wanted"
        lines.append(f"flops saved, 1 - flops_ratio_total (counted): {verdict.flops_saved:.4f}{least}")
    if verdict.guards:
        early = verdict.pools[0].method == BETTING  # what it sees depends on when it stops
        width = max(len(g.task) for g in verdict.guards)
        sees = ["" if early else f"  {'nothing' if g.sees is None else f'{g.sees:.4f}':>7}" for g in verdict.guards]
        heading = f"{'task'.ljust(width)}   docs     drop        95% interval   Holm's p"
        lines += ["", heading if early else f"{heading}     sees"]
        lines += [
            f"{g.task.ljust(width)}  {g.documents:5d}  {g.drop:+.4f}  [{g.lower:+.4f}, {g.upper:+.4f}]"
            f"  {g.p_holm:9.2g}{seen}{'  FAIL' if g.failed else ''}"
            for g, seen in zip(verdict.guards, sees, strict=True)
        ]
        if not early:
            lines.append("sees: the drop that this task's guard would reveal with 80% probability")
    return "\n".join(lines)


def _asked(pool: Pool) -> str:
    flips = "" if pool.discordant is None else f", {pool.discordant} of them discordant"
    clusters = "" if pool.clusters is None else f", in {pool.clusters} clusters"
    return f"{pool.documents} documents of {pool.name}{flips}{clusters}"


def _line(pool: Pool, verdict: Verdict) -> str:
    levels = f"{percent(verdict.lower_level)} and {percent(verdict.upper_level)} one-sided, {pool.method}"
    return (
        f"{metric_name(pool, verdict)}: {pool.baseline:.4f} -> {pool.candidate:.4f}, drop {pool.drop:+.4f}, "
        f"bounds {pool.lower:+.4f} and {pool.upper:+.4f} ({levels}), allowed {verdict.max_drop:g}"
    )


def text_of_cases(status: str, found: list[Case]) -> str:
    """For people: what was checked one by one, where there is no verdict on a drop."""
    return "\n".join([status.upper(), *(f"{c.name}: {c.status} ({c.message})" for c in found)])


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
