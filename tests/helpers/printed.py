"""What pages print: tables in Markdown, and their figures, as far as another processor may round them."""

from __future__ import annotations

from pathlib import Path

CLOSE = 0.005


def table_below(page: Path, head: str) -> list[list[str]]:
    """The cells of the table whose first row begins so, without the two rows of its head."""
    lines = page.read_text().splitlines()
    rows = []
    for line in lines[lines.index(next(one for one in lines if one.startswith(head))) + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def as_printed(cell: str, value: float) -> bool:
    """Whether a cell of a table is this value, as far as ``CLOSE`` asks and half of its last digit allows."""
    share = cell.endswith("%")
    printed = cell.strip("%*")
    digits = len(printed.partition(".")[2]) + 2 * share
    return abs(float(printed) / (100 if share else 1) - value) <= CLOSE + 0.5 * 10**-digits
