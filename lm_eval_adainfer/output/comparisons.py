"""Comparisons as a terminal table, Markdown, LaTeX, CSV or JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from lm_eval_adainfer.comparison.compare import Comparison, Row
from lm_eval_adainfer.comparison.evidence import TASKS
from lm_eval_adainfer.output import rendering
from lm_eval_adainfer.output.rendering import Table, escape_markdown, number

FORMATS = ("table", "markdown", "latex", "csv", "json")
_LEGEND = (
    "diff: candidate minus baseline, with a 95% interval over documents (right-or-wrong metrics: Tango's score "
    "interval, exact McNemar p; metrics from 0 to 1, clusters and tasks that weigh the same: Gaffke's, sign-flip "
    "permutation p; unbounded ones, approximate: t, for ratios of sums resampled documents). agree: same answer. "
    "weighs the same: tasks, where a group's own score weighs these and not documents. exit layer, pruned, FLOPs "
    "(flops_ratio_total): counted, of the candidate."
)


def render(comparisons: Sequence[Comparison], form: str) -> str:
    """All comparisons in one of :data:`FORMATS`."""
    if form == "json":
        return json.dumps([c.as_dict() for c in comparisons], indent=2)
    if form == "csv":
        return _csv(comparisons)
    draw = {"table": _terminal, "markdown": _markdown, "latex": _latex}[form]
    return "\n\n".join(draw(c) for c in comparisons)


def _table(comparison: Comparison) -> Table:
    rows = comparison.rows
    columns = {
        "task": lambda r: r.name,
        "metric": lambda r: f"{r.metric}, {r.unit}" if r.unit else r.metric,
        "docs": lambda r: str(r.documents),
        "clusters": lambda r: "" if r.clusters is None else str(r.clusters),
        "weighs the same": lambda r: r.equal_weight if r.equal_weight == TASKS else "",
        "baseline": lambda r: number(r.baseline, ".4f"),
        "candidate": lambda r: number(r.candidate, ".4f"),
        "diff": lambda r: number(r.difference, "+.4f"),
        "95% interval": lambda r: f"[{r.lower:+.4f}, {r.upper:+.4f}]",
        "p": lambda r: f"{r.p:.2g}",
        "lost/won": _flips,
        "agree": lambda r: number(r.agreement, ".1%"),
        "exit layer": lambda r: number(r.exit_layer, ".2f"),
        "pruned": lambda r: number(r.pruning_ratio, ".1%"),
        "FLOPs": lambda r: number(r.flops_ratio_total, ".1%"),
    }
    cells = [[show(r) for show in columns.values()] for r in rows]
    used = [i for i in range(len(columns)) if any(line[i] for line in cells)]
    kinds = ["task", *(r.kind for r in rows)]
    ruled = [i for i in range(len(rows)) if kinds[i + 1] != kinds[i]]  # above the groups, and above the pool
    headings = [list(columns)[i] for i in used]
    return Table(headings, [[line[i] for i in used] for line in cells], left=(0, 1), ruled=ruled)


def _flips(row: Row) -> str:
    return "" if row.only_baseline_right is None else f"{row.only_baseline_right}/{row.only_candidate_right}"


def _tail(comparison: Comparison) -> list[str]:
    lines = [
        f"seconds {kind}, measured once each: {a:.2f} and {b:.2f}, speed-up {a / b:.2f}x"
        for kind, (a, b) in comparison.seconds.items()
    ]
    return [*lines, *(f"note: {note}" for note in comparison.notes)]


def _terminal(comparison: Comparison) -> str:
    title = f"baseline: {comparison.baseline}   candidate: {comparison.candidate}"
    return "\n".join([title, "", *rendering.terminal(_table(comparison)), "", *_tail(comparison), _LEGEND])


def _markdown(comparison: Comparison) -> str:
    lines = [
        f"**{escape_markdown(comparison.candidate)}** against **{escape_markdown(comparison.baseline)}**",
        "",
        *rendering.markdown(_table(comparison)),
        "",
        *(f"{escape_markdown(line)}\n" for line in [*_tail(comparison), _LEGEND]),
    ]
    return "\n".join(lines).rstrip()


def _latex(comparison: Comparison) -> str:
    title = f"{comparison.candidate} against {comparison.baseline}"
    comments = [f"% {' '.join(line.split())}" for line in [title, *_tail(comparison), _LEGEND]]
    return "\n".join([comments[0], *rendering.latex(_table(comparison)), *comments[1:]])


def _csv(comparisons: Sequence[Comparison]) -> str:
    timed = ["seconds_kind", "baseline_seconds_measured", "candidate_seconds_measured", "speed_up_measured"]
    lines = []
    for c in comparisons:
        kind, seconds = next(iter(c.seconds.items()), ("", None))
        timing = [kind, *seconds, seconds[0] / seconds[1]] if seconds else [""] * 4
        for row in c.rows:
            whole = row is c.rows[-1]  # seconds are of the whole run
            lines.append([c.baseline, c.candidate, *asdict(row).values(), *(timing if whole else [""] * 4)])
    headings = ["baseline_run", "candidate_run", *Row.__dataclass_fields__, *timed]
    return rendering.to_csv(headings, lines).rstrip("\n")
