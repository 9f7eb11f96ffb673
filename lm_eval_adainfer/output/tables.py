"""Numbers that were simulated from traces as a plain table, Markdown, CSV or JSON; each says what they are."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval_adainfer.output import rendering

FORMATS = ("table", "markdown", "csv", "json")
LABEL = "simulated from traces"
# column -> (heading, how a number is shown); shares are in percent, as in the paper
_SHOWN: dict[str, tuple[str, str]] = {
    "task": ("task", ""),
    "shots": ("shots", ""),
    "stopper": ("stopper", ""),
    "reader": ("reader", ""),
    "threshold": ("threshold", ".4g"),
    "picked_on": ("picked on", ""),
    "documents": ("n", "d"),
    "clusters": ("clusters", "d"),
    "acc": ("acc %", "%"),
    "constant": ("best constant %", "%"),
    "acc_change": ("change", "+%"),
    "top1_acc": ("top1_acc %", "%"),
    "agreement": ("agreement %", "%"),
    "exit_layer": ("exit_layer", ".2f"),
    "exit_layer_var": ("var", ".2f"),
    "pruning_ratio": ("pruning %", "%"),
    "flops_ratio": ("flops_ratio", ".3f"),
    "of_stable": ("of oracle:stable %", "%"),
    "of_first": ("of oracle:first %", "%"),
}
_INTERVALS = ("acc", "acc_change", "agreement", "pruning_ratio")  # shown in tables; CSV and JSON have all of them


def render(
    rows: Sequence[Mapping[str, Any]],
    form: str,
    title: str,
    columns: Sequence[str] | None = None,
    notes: Sequence[str] = (),
) -> str:
    """The rows as text.

    Args:
        rows: :func:`lm_eval_adainfer.traces.replay.replay`'s, or others with some of its keys.
        form: One of ``FORMATS``.
        title: What they are of; tables open with it and with their label.
        columns: Which columns tables show; by default all that some row has. CSV and JSON hold everything.
        notes: Sentences that go below; JSON holds them, CSV does not.
    """
    if form == "json":
        said = {"notes": list(notes)} if notes else {}
        return json.dumps({"basis": LABEL, "title": title, **said, "rows": list(rows)}, indent=1) + "\n"
    if form == "csv":
        return to_csv(rows)
    shown = [c for c in columns or _SHOWN if any(row.get(c) is not None for row in rows)]
    headings = [_SHOWN.get(c, (c, ""))[0] for c in shown]
    left = [i for i, c in enumerate(shown) if c in ("task", "shots", "stopper", "reader", "picked_on")]
    table = rendering.Table(headings, [[_cell(row, c) for c in shown] for row in rows], left)
    if form == "markdown":
        lines = [f"{title} (*{LABEL}*; 95% intervals in brackets)", "", *rendering.markdown(table)]
    else:
        lines = [f"{title} ({LABEL}; 95% intervals in brackets)", *rendering.terminal(table)]
    if notes:
        lines += ["", *(f"{note[:1].upper()}{note[1:]}." for note in notes)]
    return "\n".join(lines) + "\n"


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """All numbers in full, and a column that says what they are."""
    names = list(dict.fromkeys(key for row in rows for key in row))
    return rendering.to_csv([*names, "basis"], ([*(row.get(name) for name in names), LABEL] for row in rows))


def _cell(row: Mapping[str, Any], column: str) -> str:
    value, how = row.get(column), _SHOWN.get(column, ("", ""))[1]
    if value is None:
        return "-"
    text = _number(value, how)
    if column in _INTERVALS and row.get(f"{column}_low") is not None:
        text += f" [{_number(row[f'{column}_low'], how)}, {_number(row[f'{column}_high'], how)}]"
    return text


def _number(value: Any, how: str) -> str:
    if isinstance(value, str) or not how:
        return str(value)
    if how.endswith("%"):
        return rendering.number(100 * value, f"{how[:-1]}.1f")
    return rendering.number(value, how)
