"""The colour and the mark of a run, by its place in the whole list: one place assigns them, for pictures and tables."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

# Okabe & Ito (2008), without black and yellow, which vanish on a dark and a light ground
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
# how matplotlib names a mark, and the character that looks like it; a star is left for what is simulated
_SHAPES = (("o", "●"), ("D", "◆"), ("^", "▲"), ("v", "▼"), ("P", "✚"), ("X", "✖"))
_DASHES = ("-", "--", "-.", ":")


@dataclass(frozen=True)
class Mark:
    """How one run is drawn everywhere.

    Attributes:
        colour: ``#rrggbb``.
        marker: Of points, as matplotlib names it.
        dash: Of lines without points, as matplotlib names it.
        sign: The marker as a character, for tables.
    """

    colour: str
    marker: str
    dash: str
    sign: str


DENSE = Mark("#8a8f96", "s", "-", "■")  # what no candidate is; grey, so that it shares its colour with none


def of(place: int) -> Mark:
    """The mark of what stands at a place, from 0; equal only for places that are 36 apart.

    Where colours start again, marks and dashes are moved on by one.
    """
    shape = _SHAPES[(place + place // len(COLOURS)) % len(_SHAPES)]
    return Mark(COLOURS[place % len(COLOURS)], shape[0], _DASHES[(place + place // len(COLOURS)) % 4], shape[1])


def of_all(names: Iterable[str], dense: str | None = None) -> dict[str, Mark]:
    """Name to mark, in the order of a whole list.

    Args:
        names: All runs, or all readers; whatever a single picture leaves out.
        dense: The one among them that is the dense model, or what others are compared with.
    """
    others = (name for name in dict.fromkeys(names) if name != dense)
    found = {name: of(place) for place, name in enumerate(others)}
    return found if dense is None else {dense: DENSE, **found}
