"""What the documents of some tasks say about one drop: its tests, its bounds, and what these rest on.

- *exact*: documents are right or wrong and independent, so the exact unconditional test holds (``statistics.exact_p``).
  One document whose difference is no whole number changes nothing: it is rounded against whatever is to be shown.
- *Gaffke*: documents score from 0 to 1 (or 100), belong to clusters, or weigh by their tasks (``bounded.gaffke_p``).
- *betting*: documents came in random order, and whoever adds them may stop at any time (``anytime.betting_p``).
- *resampled*, *Student's t*: nothing bounds what a document can lose, as in perplexities; both are approximate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from lm_eval_adainfer import anytime, bounded, powers, statistics
from lm_eval_adainfer.comparison.matching import Pairs
from lm_eval_adainfer.errors import AdaInferError

EXACT, GAFFKE, BETTING, RESAMPLED, STUDENT = "exact", "Gaffke", "betting", "resampled", "Student's t"
MCNEMAR = "exact McNemar"  # a test's name
APPROXIMATE = (RESAMPLED, STUDENT)
DOCUMENTS, TASKS, WORDS = "documents", "tasks", "words or bytes"  # what weighs the same


@dataclass(frozen=True)
class Evidence:
    """The drops of some tasks' documents, of one scale.

    Attributes:
        drops: [documents].
        weights: [documents]; None where all weigh the same.
        clusters: [documents], equal where documents belong together; None where each stands for itself.
        most: What a document can score at most; None where nothing bounds it.
        reach: The largest drop that a document can show; where it is not bounded, the range seen.
        equal: What weighs the same: documents, tasks, or words or bytes.
        seed: Of what is drawn.
        in_order: The documents are in the random order in which they came, and more would have come if these could not
            tell.
    """

    drops: np.ndarray
    weights: np.ndarray | None
    clusters: np.ndarray | None
    most: float | None
    reach: float
    equal: str = DOCUMENTS
    seed: int = 0
    in_order: bool = False

    @classmethod
    def of(
        cls,
        pairs: Sequence[Pairs],
        by_task: bool = False,
        seed: int = 0,
        places: Mapping[tuple[str, int], int] | None = None,
    ) -> Evidence:
        """Of all documents of some tasks of one scale.

        Args:
            pairs: The tasks.
            by_task: Tasks weigh the same, whatever their sizes; not in perplexities, whose mean over tasks is no
                mean of the nats that are compared.
            seed: Of what is drawn.
            places: Task and document to its place in the random order in which documents came, where they were added
                until they could tell.

        Raises:
            AdaInferError: Where nothing holds for documents that are added until they can tell.
        """
        weights, equal = weights_of(pairs), DOCUMENTS
        if weights is not None:
            equal = WORDS
        elif by_task and len(pairs) > 1 and not pairs[0].unit:
            sizes = np.array([len(p.drops) for p in pairs])
            equal = TASKS
            if len(set(sizes.tolist())) > 1:
                weights = np.repeat(sizes.mean() / sizes, sizes)
        bounds = [p.most for p in pairs]
        most = None if any(b is None for b in bounds) else max(b for b in bounds if b is not None)
        if places is not None:
            return cls(_in_order(pairs, weights, most, places), None, None, most, most or 1.0, equal, seed, True)
        return cls(
            np.concatenate([p.drops for p in pairs]),
            weights,
            _clusters(pairs),
            most,
            max(reach(p.baseline, p.candidate, p.unit) for p in pairs) if most is None else most,
            equal,
            seed,
        )

    @cached_property
    def units(self) -> tuple[np.ndarray, np.ndarray]:
        """Totals and sizes of what is independent, clusters or documents (``bounded.by_cluster``)."""
        return bounded.by_cluster(self.drops, self.weights, self.clusters)

    @cached_property
    def method(self) -> str:
        """What the tests and bounds are."""
        if self.in_order:
            return BETTING
        if self.most is not None:
            broken = np.count_nonzero(self.drops != np.round(self.drops))
            plain = self.most == 1 and self.weights is None and self.clusters is None
            return EXACT if plain and broken <= 1 else GAFFKE
        return STUDENT if self.weights is None and self.clusters is None else RESAMPLED

    @property
    def mean(self) -> float:
        """The drop seen."""
        return float(np.average(self.drops, weights=self.weights))

    @property
    def clustered(self) -> int | None:
        """How many clusters there are; None where documents stand for themselves."""
        return None if self.clusters is None else len(self.units[0])

    @property
    def mirrored(self) -> Evidence:
        """The same documents, their gains as drops."""
        return replace(self, drops=-self.drops)

    @cached_property
    def draws(self) -> np.ndarray:
        """Of the bootstrap over units, sorted."""
        totals, sizes = self.units
        return statistics.ratio_draws(totals / sizes, sizes, self.reach, self.seed)

    @property
    def flips(self) -> tuple[int, int]:
        """Documents lost and won; one that is neither whole is rounded so that more is lost."""
        worst = np.ceil(self.drops)
        return int((worst > 0).sum()), int((worst < 0).sum())

    def p_above(self, limit: float) -> float:
        """P of "the true drop is ``limit`` or more"."""
        if self.method == EXACT:
            return statistics.exact_p(*self.flips, len(self.drops), limit)
        if self.method == BETTING:
            return anytime.betting_p(self.drops, limit, self.reach)
        if self.method == GAFFKE:
            return bounded.gaffke_p(*self.units, limit, self.reach)
        if self.method == RESAMPLED:
            return statistics.draws_p(self.draws, limit)
        return statistics.t_p(self.drops, limit, self.reach)

    def p_below(self, limit: float) -> float:
        """P of "the true drop is ``limit`` or less"."""
        if self.method == RESAMPLED:
            return statistics.draws_p(-self.draws, -limit)
        return self.mirrored.p_above(-limit)

    def bound(self, level: float, upper: bool, at: float | None = None) -> float:
        """One-sided bound; ``at`` is where a test is made that it must agree with."""
        if self.method == EXACT and upper:
            return statistics.exact_bound(*self.flips, len(self.drops), level, True, at)
        if self.method == EXACT:
            lost, won = self.mirrored.flips
            return -statistics.exact_bound(lost, won, len(self.drops), level, True, None if at is None else -at)
        if self.method == BETTING:
            return anytime.betting_bound(self.drops, level, upper, self.reach, at)
        if self.method == GAFFKE:
            return bounded.gaffke_bound(*self.units, level, upper, self.reach, at)
        if self.method == RESAMPLED:
            return statistics.draws_bound(self.draws, level, upper)
        found = statistics.t_interval(self.drops, 2 * level - 1, self.reach)
        return found.upper if upper else found.lower

    def interval(self) -> statistics.Interval:
        """Two-sided, 95%, to look at: Tango's where documents are right or wrong, else of the bounds' own kind."""
        if self.method == EXACT:
            lost, won = float(self.drops[self.drops > 0].sum()), float(-self.drops[self.drops < 0].sum())
            return statistics.tango_interval(lost, won, len(self.drops))
        return statistics.Interval(self.mean, self.bound(0.975, False), self.bound(0.975, True))

    def p_of_no_change(self) -> tuple[float, str]:
        """Two-sided p of "nothing changed", exact where each unit's loss is as likely to be a gain; and its name."""
        totals, _ = self.units
        whole = self.method == EXACT and bool(np.all(self.drops == np.round(self.drops)))
        if whole:
            return statistics.mcnemar_p(*self.flips), MCNEMAR
        name = "sign-flip permutation"
        return statistics.sign_flip_p(totals, self.seed), name if self.clusters is None else f"{name} of clusters"

    def sees(self, limit: float, error: float) -> float | None:
        """The least true drop that would be established to be above ``limit`` with 80% probability; None where none is.

        Right-or-wrong documents are taken to be won as often as they were seen to be. Elsewhere it is the normal
        approximation, with the spread that was seen.
        """
        n = len(self.drops)
        if self.method == BETTING:
            return None  # it depends on when one stops
        if self.method == EXACT:
            return powers.visible_drop(self.flips[1] / n, n, limit, error)
        totals, sizes = self.units
        spread = float(np.sum((totals - self.mean * sizes) ** 2)) / float(np.sum(sizes)) ** 2
        spread = max(spread, (float(np.max(sizes) / np.sum(sizes)) * self.reach) ** 2)  # as if one had lost all
        unseen = float(np.max(sizes) / np.sum(sizes)) * self.reach if self.method == GAFFKE else 0.0
        found = limit + statistics.deviations(error) * spread**0.5 + unseen
        return found if found <= self.reach else None

    def needed(
        self, max_drop: float, error: float, far: float, far_error: float, error_of_failing: float | None = None
    ) -> int | None:
        """Documents that would settle it; None where no number would.

        Args:
            max_drop: The limit.
            error: Of passing wrongly.
            far: A drop that has to be ruled out to pass.
            far_error: With this error.
            error_of_failing: Of failing wrongly; by default that of passing.
        """
        if self.method == BETTING:
            return None
        failing = error if error_of_failing is None else error_of_failing
        error = failing if self.mean >= max_drop else error
        if self.method == EXACT:
            lost, won = self.flips
            if self.mean >= max_drop:
                return powers.documents_needed(won, lost, len(self.drops), [(-max_drop, failing)])
            return powers.documents_needed(lost, won, len(self.drops), [(max_drop, error), (far, far_error)])
        totals, sizes = self.units
        n, drop = len(self.drops), self.mean
        spread = float(np.sum((totals - drop * sizes) ** 2))
        if self.clusters is not None:  # about what one cluster that lost all would give
            spread = max(spread, float(np.max(sizes) * self.reach) ** 2)
        variance = n * spread / float(np.sum(sizes)) ** 2
        unseen = n * float(np.max(sizes) / np.sum(sizes)) * self.reach if self.method == GAFFKE else 0.0
        needed = statistics.documents_needed(n, drop, variance, max_drop, error, unseen=unseen)
        if drop >= max_drop or needed is None:
            return needed
        also = statistics.documents_needed(n, drop, variance, far, far_error, unseen=unseen)
        return None if also is None else max(needed, also)


def weights_of(pairs: Sequence[Pairs]) -> np.ndarray | None:
    """The documents' weights in a ratio of sums; None where all weigh the same."""
    found = [p.weights for p in pairs if p.weights is not None]
    return np.concatenate(found) if found else None


def _in_order(
    pairs: Sequence[Pairs], weights: np.ndarray | None, most: float | None, places: Mapping[tuple[str, int], int]
) -> np.ndarray:
    """The drops in the order in which the documents came."""
    if weights is not None or most is None or any(p.clusters is not None for p in pairs):
        raise AdaInferError(
            f"stop-early: {pairs[0].task} can't be judged by it: it is proven for independent documents of equal "
            f"weight and of a metric from 0 to 1 (or 100), and {pairs[0].metric} is no such; leave --stop-early out"
        )
    ranks = [places[p.task, a.doc_id] for p in pairs for a, _ in p.documents]
    return np.concatenate([p.drops for p in pairs])[np.argsort(ranks)]


def reach(baseline: np.ndarray, candidate: np.ndarray, unit: str = "") -> float:
    """The largest difference a document can show: 1 for metrics between 0 and 1, else the range seen."""
    both = np.concatenate([baseline, candidate])
    if not unit and both.min() >= 0 and both.max() <= 1:
        return 1.0
    return float(both.max() - both.min()) or 1.0


def _clusters(pairs: Sequence[Pairs]) -> np.ndarray | None:
    """One name per document; a passage that several tasks ask about is one cluster. None where none has two."""
    if all(p.clusters is None for p in pairs):
        return None
    names: list[str] = []
    for pair in pairs:
        own = (f"{pair.task} {i}" for i in range(len(pair.drops)))
        names += own if pair.clusters is None else [str(name) for name in pair.clusters]
    return np.array(names) if len(set(names)) < len(names) else None
