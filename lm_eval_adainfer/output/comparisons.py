"""Comparisons as a terminal table, Markdown, LaTeX, CSV or JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict

from lm_eval_adainfer.comparison.compare import Comparison, Row

FORMATS = ("table", "markdown", "latex", "csv", "json")
_LEGEND = (
    "diff: candidate minus baseline, with a 95% interval over documents (right-or-wrong metrics: Tango's score "
    "interval, exact McNemar p; others: t, for ratios of sums resampled documents, sign-flip permutation p). agree: "
    "same answer. exit layer, pruned, FLOPs (flops_ratio_total): counted, of the candidate."
)


def render(comparisons: Sequence[Comparison], form: str) -> str:
    """All comparisons in one of :data:`FORMATS`."""
    if form == "json":
        return json.dumps([c.as_dict() for c in comparisons], indent=2)
    if form == "csv":
        return _csv(comparisons)
    draw = {"table": _terminal, "markdown": _markdown, "latex": _latex}[form]
    return "\n\n".join(draw(c) for c in comparisons)


def number(value: float | None, form: str = ".4f") -> str:
    """A number, or nothing where there is none."""
    return "" if value is None else format(value, form)


def _cells(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    rows = comparison.rows
    columns = {
        "task": lambda r: r.name,
        "metric": lambda r: f"{r.metric}, {r.unit}" if r.unit else r.metric,
        "docs": lambda r: str(r.documents),
        "baseline": lambda r: number(r.baseline),
        "candidate": lambda r: number(r.candidate),
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
    return [list(columns)[i] for i in used], [[line[i] for i in used] for line in cells]


def _flips(row: Row) -> str:
    return "" if row.only_baseline_right is None else f"{row.only_baseline_right}/{row.only_candidate_right}"


def _tail(comparison: Comparison) -> list[str]:
    lines = [
        f"seconds {kind}, measured once each: {a:.2f} and {b:.2f}, speed-up {a / b:.2f}x"
        for kind, (a, b) in comparison.seconds.items()
    ]
    return [*lines, *(f"note: {note}" for note in comparison.notes)]


def _terminal(comparison: Comparison) -> str:
    header, cells = _cells(comparison)
    width = [max(len(line[i]) for line in [header, *cells]) for i in range(len(header))]

    def line(values: list[str]) -> str:
        padded = (v.ljust(w) if i < 2 else v.rjust(w) for i, (v, w) in enumerate(zip(values, width, strict=True)))
        return "  ".join(padded)

    lines = [line(header), "  ".join("-" * w for w in width)]
    last = "task"
    for row, values in zip(comparison.rows, cells, strict=True):
        if row.kind != last:
            lines.append("  ".join("-" * w for w in width))
            last = row.kind
        lines.append(line(values))
    title = f"baseline: {comparison.baseline}   candidate: {comparison.candidate}"
    return "\n".join([title, "", *lines, "", *_tail(comparison), _LEGEND])


def _markdown(comparison: Comparison) -> str:
    header, cells = _cells(comparison)
    lines = [
        f"**{escape_markdown(comparison.candidate)}** against **{escape_markdown(comparison.baseline)}**",
        "",
        "| " + " | ".join(header) + " |",
        "|" + "|".join("---" if i < 2 else "---:" for i in range(len(header))) + "|",
        *("| " + " | ".join(escape_markdown(v) for v in values) + " |" for values in cells),
        "",
        *(f"{escape_markdown(line)}\n" for line in [*_tail(comparison), _LEGEND]),
    ]
    return "\n".join(lines).rstrip()


def escape_markdown(text: str) -> str:
    """Names come from files: nothing in them may end a table cell or start HTML."""
    text = " ".join(text.split())
    for character, safe in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "\\|"), ("`", "\\`"), ("*", "\\*")):
        text = text.replace(character, safe)
    return text


def _latex(comparison: Comparison) -> str:
    header, cells = _cells(comparison)
    lines = [
        f"% {' '.join(comparison.candidate.split())} against {' '.join(comparison.baseline.split())}",
        f"\\begin{{tabular}}{{ll{'r' * (len(header) - 2)}}}",
        "\\hline",
        " & ".join(_tex(v) for v in header) + " \\\\",
    ]
    last = ""
    for row, values in zip(comparison.rows, cells, strict=True):
        if row.kind != last:
            lines.append("\\hline")
            last = row.kind
        lines.append(" & ".join(_tex(v) for v in values) + " \\\\")
    lines += ["\\hline", "\\end{tabular}", *(f"% {' '.join(line.split())}" for line in [*_tail(comparison), _LEGEND])]
    return "\n".join(lines)


def _tex(text: str) -> str:
    special = {
        "\\": "\\textbackslash{}", "&": "\\&", "%": "\\%", "$": "\\$", "#": "\\#", "_": "\\_", "{": "\\{", "}": "\\}",
        "~": "\\textasciitilde{}", "^": "\\textasciicircum{}",
    }  # fmt: skip
    return "".join(special.get(character, character) for character in " ".join(text.split()))


def _csv(comparisons: Sequence[Comparison]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    timed = ["seconds_kind", "baseline_seconds_measured", "candidate_seconds_measured", "speed_up_measured"]
    writer.writerow(["baseline_run", "candidate_run", *Row.__dataclass_fields__, *timed])
    for c in comparisons:
        kind, seconds = next(iter(c.seconds.items()), ("", None))
        timing = [kind, *seconds, seconds[0] / seconds[1]] if seconds else ["", "", "", ""]
        for row in c.rows:
            whole = row is c.rows[-1]  # seconds are of the whole run
            values = ["" if v is None else v for v in asdict(row).values()]
            writer.writerow([_plain(v) for v in [c.baseline, c.candidate, *values, *(timing if whole else [""] * 4)]])
    return out.getvalue().rstrip("\n")


def _plain(value: object) -> object:
    """A name that a spreadsheet would run as a formula gets a quote in front."""
    return f"'{value}" if isinstance(value, str) and value[:1] in "=+-@\t\r" and value else value
