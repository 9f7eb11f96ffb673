"""Tasks of a run by their own names, where lm-eval (0.5.0.dev1) put that of their group before it.

``group::task`` and ``task`` are the same task, and ask the same documents; a run of the one is comparable with a run of
the other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

_BY_TASK = ("results", "configs", "versions", "n-shot", "higher_is_better", "n-samples")


def own_names(configs: Mapping[str, Any]) -> dict[str, str]:
    """The own names of tasks that bear a group's, by that longer name.

    A task keeps its longer name where two would have the same.

    Args:
        configs: Task to its configuration, as a results file holds them.
    """
    found = {}
    for name, config in configs.items():
        own = config.get("task") if isinstance(config, dict) else None
        if isinstance(own, str) and own and name.endswith(f"::{own}"):
            found[name] = own
    taken = Counter([*found.values(), *(name for name in configs if name not in found)])
    return {name: own for name, own in found.items() if taken[own] == 1}


def renamed(results: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """A results file's content with these names in place of the longer ones; the content is left as it is."""
    if not names:
        return results
    found = dict(results)
    for section in _BY_TASK:
        if isinstance(part := results.get(section), dict):
            found[section] = {names.get(name, name): value for name, value in part.items()}
    if isinstance(groups := results.get("group_subtasks"), dict):
        found["group_subtasks"] = {group: _each(members, names) for group, members in groups.items()}
    return found


def _each(members: Any, names: Mapping[str, str]) -> Any:
    """The members of a group; whatever else stands there is left to whoever reads it."""
    if not isinstance(members, list):
        return members
    return [names.get(member, member) if isinstance(member, str) else member for member in members]
