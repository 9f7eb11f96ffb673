"""One table, drawn as terminal text, Markdown, LaTeX or CSV, with whatever a format can't hold escaped."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Table:
    """Texts in columns.

    Attributes:
        headings: A text per column.
        cells: Rows of as many texts.
        left: Indices of the columns that are aligned to the left; numbers stand right.
        ruled: Indices of the rows that a rule stands above; None for a table without rules.
    """

    headings: Sequence[str]
    cells: Sequence[Sequence[str]]
    left: Collection[int] = (0,)
    ruled: Collection[int] | None = None


def terminal(table: Table) -> list[str]:
    """Lines for people; a table that has rules has one under its headings, too."""
    widths = [max(map(len, column)) for column in zip(table.headings, *table.cells, strict=True)]

    def line(texts: Sequence[str]) -> str:
        sized = enumerate(zip(texts, widths, strict=True))
        return "  ".join(text.ljust(w) if i in table.left else text.rjust(w) for i, (text, w) in sized)

    rule = "  ".join("-" * w for w in widths)
    if table.ruled is None:
        return [line(texts).rstrip() for texts in (table.headings, *table.cells)]
    lines = [line(table.headings), rule]
    for i, texts in enumerate(table.cells):
        lines += [rule, line(texts)] if i in table.ruled else [line(texts)]
    return lines


def markdown(table: Table) -> list[str]:
    """Lines of a GitHub-flavoured table."""
    rules = ("---" if i in table.left else "---:" for i in range(len(table.headings)))
    rows = ([escape_markdown(text) for text in texts] for texts in (table.headings, *table.cells))
    headings, *cells = ("| " + " | ".join(texts) + " |" for texts in rows)
    return [headings, "|" + "|".join(rules) + "|", *cells]


def latex(table: Table) -> list[str]:
    """Lines of a ``tabular``."""
    columns = "".join("l" if i in table.left else "r" for i in range(len(table.headings)))
    lines = [f"\\begin{{tabular}}{{{columns}}}", "\\hline", _latex_row(table.headings)]
    for i, texts in enumerate(table.cells):
        lines += [*(["\\hline"] if i in (table.ruled or ()) or i == 0 else []), _latex_row(texts)]
    return [*lines, "\\hline", "\\end{tabular}"]


def _latex_row(texts: Iterable[str]) -> str:
    return " & ".join(escape_latex(text) for text in texts) + " \\\\"


def to_csv(headings: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Values in full; None is empty, and a text that a spreadsheet would run as a formula gets a quote in front."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(headings)
    writer.writerows([_plain(value) for value in row] for row in rows)
    return out.getvalue()


def _plain(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value[:1] in "=+-@\t\r" and value else value


def number(value: float | None, form: str, missing: str = "") -> str:
    """A number in a form of Python's; ``missing`` where there is none."""
    return missing if value is None else format(value, form)


def escape_markdown(text: str) -> str:
    """Names come from files: nothing in them may end a table cell or start HTML."""
    text = " ".join(text.split())
    for character, safe in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "\\|"), ("`", "\\`"), ("*", "\\*")):
        text = text.replace(character, safe)
    return text


def escape_latex(text: str) -> str:
    """The same for LaTeX, where many characters are commands."""
    special = {
        "\\": "\\textbackslash{}", "&": "\\&", "%": "\\%", "$": "\\$", "#": "\\#", "_": "\\_", "{": "\\{", "}": "\\}",
        "~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "±": "\\ensuremath{\\pm}",
    }  # fmt: skip
    return "".join(special.get(character, character) for character in " ".join(text.split()))
