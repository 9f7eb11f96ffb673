"""Which tasks of a run are compared, and by which metric and filter each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from lm_eval_adainfer import clusters
from lm_eval_adainfer.errors import AdaInferError

_LISTED = 12  # names in a message


@dataclass(frozen=True)
class Wanted:
    """A metric, and perhaps a filter, for some tasks; for all where ``tasks`` is empty."""

    tasks: str
    metric: str
    filter: str | None


@dataclass(frozen=True)
class Selection:
    """What the user asked for; everything and each task's own by default.

    Attributes:
        tasks: Names or globs of tasks and groups; empty means all.
        exclude: Likewise, taken away from these.
        wanted: Metrics and filters, for all tasks or for some.
        filter: For all tasks for which ``wanted`` names none.
        clusters: Tasks, and the field or template that says which of their documents belong together.
    """

    tasks: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    wanted: tuple[Wanted, ...] = ()
    filter: str | None = None
    clusters: tuple[tuple[str, str], ...] = ()

    @classmethod
    def parse(
        cls,
        tasks: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        metric: str | Sequence[str] | None = None,
        filter: str | None = None,
        cluster: str | Sequence[str] | None = None,
    ) -> Selection:
        """From the arguments of a command, each a text or several, with commas between names (but in ``cluster``).

        Raises:
            AdaInferError: On a metric or cluster that names nothing, or two for the same tasks.
        """
        wanted: list[Wanted] = []
        for text in _names(metric):
            where, equals, what = text.rpartition("=")
            name, colon, its_filter = what.partition(":")
            if not name or (equals and not where) or (colon and not its_filter):
                raise AdaInferError(
                    f"metric: {text!r} is neither METRIC, METRIC:FILTER, TASK=METRIC nor TASK=METRIC:FILTER; give one"
                )
            found = Wanted(where, name, its_filter or None)
            twin = next((w for w in wanted if w.tasks == where), None)
            if twin is not None and where:
                raise AdaInferError(f"metric: {where} has two, {twin.metric} and {name}; give one")
            if twin is not None:
                raise AdaInferError(
                    f"metric: {twin.metric} and {name} are two for all tasks; lm-eval names results METRIC,FILTER, so "
                    f"if {name} is a filter, give --metric {twin.metric} --filter {name}, else TASK=METRIC for each"
                )
            wanted.append(found)
        return cls(_names(tasks), _names(exclude), tuple(wanted), filter, clusters.parse(cluster))

    def choose(self, names: Sequence[str], groups: Mapping[str, Sequence[str]], where: str) -> list[str]:
        """The tasks among ``names``, in their order.

        Raises:
            AdaInferError: Where a name selects none of them, or nothing is left.
        """
        chosen = set(names)
        if self.tasks:
            chosen = set()
            for pattern in self.tasks:
                found = _matching(pattern, names, groups)
                if not found:
                    raise AdaInferError(
                        f"tasks: {pattern!r} is no task or group of {where}; it holds {listing([*groups, *names])}"
                    )
                chosen |= found
        for pattern in self.exclude:
            chosen -= _matching(pattern, names, groups)
        if not chosen and names:
            raise AdaInferError(f"exclude: nothing is left of {where}; it holds {listing([*groups, *names])}")
        return [name for name in names if name in chosen]

    def for_task(self, task: str, names: Sequence[str], groups: Mapping[str, Sequence[str]]) -> Wanted:
        """What is wanted of a task: by its own name, else by a group or glob (the last given), else of all."""
        fitting = [w for w in self.wanted if not w.tasks or task in _matching(w.tasks, names, groups)]
        best = max(fitting, key=lambda w: (w.tasks == task, bool(w.tasks), fitting.index(w)), default=None)
        if best is None:
            return Wanted(task, "", self.filter)
        return Wanted(task, best.metric, best.filter or self.filter)

    def cluster_of(self, task: str, names: Sequence[str], groups: Mapping[str, Sequence[str]]) -> str | None:
        """What says which documents of a task belong together: by its own name, else by a group or glob, else of all.

        None where nothing was said of this task.
        """
        fitting = [(where, by) for where, by in self.clusters if not where or task in _matching(where, names, groups)]
        best = max(fitting, key=lambda f: (f[0] == task, bool(f[0]), fitting.index(f)), default=None)
        return None if best is None else best[1]

    def require_known(self, held: Sequence[tuple[str, Sequence[str], Mapping[str, Sequence[str]]]]) -> None:
        """Refuse names that fit nothing in any of the runs.

        Args:
            held: Of every run its label, its tasks (before any selection) and its groups.

        Raises:
            AdaInferError: On such a name.
        """
        named = {
            "exclude": self.exclude,
            "metric": [w.tasks for w in self.wanted if w.tasks],
            "cluster": [where for where, _ in self.clusters if where],
        }
        for argument, patterns in named.items():
            for pattern in patterns:
                if not any(_matching(pattern, names, groups) for _, names, groups in held):
                    holding = "; ".join(f"{label} holds {listing([*groups, *names])}" for label, names, groups in held)
                    raise AdaInferError(f"{argument}: {pattern!r} is no task or group of these runs; {holding}")


def listing(names: Iterable[str]) -> str:
    """Some names, and how many more there are."""
    found = list(dict.fromkeys(names))
    more = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
    return ", ".join(found[:_LISTED]) + more


def _matching(pattern: str, names: Sequence[str], groups: Mapping[str, Sequence[str]]) -> set[str]:
    if pattern in names:
        return {pattern}
    if pattern in groups:
        return set(groups[pattern])
    found = {name for name in names if fnmatchcase(name, pattern)}
    return found.union(*(members for group, members in groups.items() if fnmatchcase(group, pattern)))


def _names(given: str | Sequence[str] | None) -> tuple[str, ...]:
    texts = [given] if isinstance(given, str) else given or []
    return tuple(name.strip() for text in texts for name in text.split(",") if name.strip())
