"""Comparisons as a terminal table, Markdown, LaTeX, CSV or JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict

from lm_eval_adainfer.comparison.compare import Comparison, Row
from lm_eval_adainfer.comparison.evidence import TASKS
from lm_eval_adainfer.output import rendering
from lm_eval_adainfer.output.rendering import Table, escape_markdown, number

FORMATS = ("table", "markdown", "latex", "csv", "json")
_LEGEND = (
    "diff: candidate minus baseline, with a 95% interval over documents (right-or-wrong metrics: Tango's score "
    "interval, exact McNemar p; metrics from 0 to 1, clusters and tasks that weigh the same: Gaffke's, sign-flip "
    "permutation p; unbounded ones, approximate: t, for ratios of sums resampled documents). mid-p: McNemar's. "
    "Holm's p: p, adjusted over the tasks. agree: same answer. weighs the same: tasks, where a group's own score "
    "weighs these and not documents. exit layer, pruned, FLOPs (flops_ratio_total): counted, of the candidate; "
    "behind ± the half of a 95% interval by t over documents. var: of the exit layer over documents, with its standard "
    "error in brackets."
)

_BETWEEN = "every two candidates, paired document by document: the later one minus the earlier"


def render(comparisons: Sequence[Comparison], form: str) -> str:
    """All comparisons in one of :data:`FORMATS`."""
    if form == "json":
        return json.dumps([c.as_dict() for c in comparisons], indent=2)
    if form == "csv":
        return _csv(comparisons)
    draw = {"table": _terminal, "markdown": _markdown, "latex": _latex}[form]
    shown = [draw(c) for c in comparisons if not c.between_candidates]
    if between := [c for c in comparisons if c.between_candidates]:
        title, lines = _BETWEEN, {"table": rendering.terminal, "markdown": rendering.markdown, "latex": rendering.latex}
        opening = {"table": [title, ""], "markdown": [title, ""], "latex": [f"% {title}"]}[form]
        shown.append("\n".join([*opening, *lines[form](_pairs(between))]))
    return "\n\n".join(shown)


def _pairs(comparisons: Sequence[Comparison]) -> Table:
    """The differences of every two candidates, a row for each task, group and pool."""
    columns: dict[str, Callable[[Row], str]] = {
        "task": lambda r: r.name,
        "metric": lambda r: f"{r.metric}, {r.unit}" if r.unit else r.metric,
        "diff": lambda r: number(r.difference, "+.4f"),
        "95% interval": lambda r: f"[{r.lower:+.4f}, {r.upper:+.4f}]",
        "p": lambda r: f"{r.p:.2g}",
        "mid-p": lambda r: number(r.p_mid, ".2g"),
        "Holm's p": lambda r: number(r.p_holm, ".2g"),
        "exit layer, diff": lambda r: _with_ends(r, "exit_layer_difference", "+.2f"),
        "pruned, diff": lambda r: _with_ends(r, "pruning_ratio_difference", "+.1%"),
    }
    named = [(f"{c.candidate} minus {c.baseline}", row) for c in comparisons for row in c.rows]
    cells = [[name, *(show(row) for show in columns.values())] for name, row in named]
    ruled = [i for i in range(len(named)) if i and named[i][0] != named[i - 1][0]]
    return _used(["candidates", *columns], cells, (0, 1, 2), ruled)


def _with_ends(row: Row, key: str, form: str) -> str:
    value, upper = getattr(row, key), getattr(row, f"{key}_upper")
    if value is None or upper is None:
        return number(value, form)
    return f"{value:{form}} ±{upper - value:{form.lstrip('+')}}"


def _used(headings: Sequence[str], cells: Sequence[Sequence[str]], left: Sequence[int], ruled: Sequence[int]) -> Table:
    """A table without the columns that hold nothing."""
    used = [i for i in range(len(headings)) if any(line[i] for line in cells)]
    return Table([headings[i] for i in used], [[line[i] for i in used] for line in cells], left=left, ruled=ruled)


def _table(comparison: Comparison) -> Table:
    rows = comparison.rows
    several = sum(r.kind == "task" for r in rows) > 1  # of one p nothing is adjusted
    columns: dict[str, Callable[[Row], str]] = {
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
        "mid-p": lambda r: number(r.p_mid, ".2g"),
        "Holm's p": lambda r: number(r.p_holm, ".2g") if several else "",
        "lost/won": _flips,
        "agree": lambda r: number(r.agreement, ".1%"),
        "exit layer": lambda r: _with_ends(r, "exit_layer", ".2f"),
        "var": _variance,
        "pruned": lambda r: _with_ends(r, "pruning_ratio", ".1%"),
        "FLOPs": lambda r: number(r.flops_ratio_total, ".1%"),
    }
    cells = [[show(r) for show in columns.values()] for r in rows]
    kinds = ["task", *(r.kind for r in rows)]
    ruled = [i for i in range(len(rows)) if kinds[i + 1] != kinds[i]]  # above the groups, and above the pool
    return _used(list(columns), cells, (0, 1), ruled)


def _variance(row: Row) -> str:
    if row.exit_layer_var_stderr is None:
        return number(row.exit_layer_var, ".2f")
    return f"{row.exit_layer_var:.2f} ({row.exit_layer_var_stderr:.2f})"


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
            rest = [c.between_candidates, *(timing if whole else [""] * 4)]
            lines.append([c.baseline, c.candidate, *asdict(row).values(), *rest])
    headings = ["baseline_run", "candidate_run", *Row.__dataclass_fields__, "between_candidates", *timed]
    return rendering.to_csv(headings, lines).rstrip("\n")
