"""How many documents of each task and split: every split has the same mix of tasks.

A promise holds for documents like those that it was calibrated on, in their mix of tasks, so what is chosen on and what
is reported must have that mix, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction


def most_each(held: Sequence[int], wanted: int) -> int:
    """At most how many documents of each task make so many together, where tasks hold so many."""
    most = -(-wanted // len(held))
    while most < max(held) and sum(min(most, n) for n in held) < wanted:
        most += 1
    return most


def mixed(held: Mapping[str, Mapping[str, int]], wanted: int) -> dict[str, dict[str, int]]:
    """How many documents of each task make up each split, the tasks' shares being the same in all of them.

    Tasks have equal shares as far as their smallest split goes; one whose smallest split holds fewer documents leaves
    its share to the others. Every split then takes as many documents as it can hold in that mix.

    Args:
        held: Split to task to how many documents it holds, 1 or more.
        wanted: Documents of a split, all tasks together; as many more, at most, as there are tasks.

    Returns:
        Split to task to a number, 1 or more. Shares differ between splits by less than one document of each task.
    """
    names = list(next(iter(held.values())))
    fewest = {name: min(of[name] for of in held.values()) for name in names}
    most = most_each(list(fewest.values()), wanted)
    mix = {name: min(most, n) for name, n in fewest.items()}
    more = Fraction(max(wanted, sum(mix.values())), sum(mix.values()))
    found = {}
    for split, of in held.items():
        times = min(more, *(Fraction(of[name], mix[name]) for name in names))
        found[split] = {name: int(times * mix[name]) for name in names}
    return found
