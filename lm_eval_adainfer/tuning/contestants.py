"""Every reader with every kind of stopper, on fitting documents alone, each judged on documents it was not fitted on.

Documents are dealt into folds; what a fold's documents are told comes from a stopper that was fitted on the others, so
that a flexible classifier has no advantage. The features are those that do not depend on which blocks were asked
before, so that blocks can be chosen after the scores are known.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lm_eval_adainfer import container
from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.fitting import fit
from lm_eval_adainfer.readers.base import Reader
from lm_eval_adainfer.strategies.base import Stopper
from lm_eval_adainfer.strategies.features import FEATURES, past_width
from lm_eval_adainfer.strategies.registry import PAPER_FEATURES
from lm_eval_adainfer.strategies.rules import ChoiceGapStopper, GapStopper
from lm_eval_adainfer.traces.documents import TracedDocuments
from lm_eval_adainfer.traces.file import VERSION, read, without_choices
from lm_eval_adainfer.traces.margins import margins
from lm_eval_adainfer.tuning.allowance import Allowance
from lm_eval_adainfer.tuning.search import Choice, search
from lm_eval_adainfer.tuning.work import Work

KINDS = ("gap", "choice_gap", "logistic", "boosted", "svm")
FOLDS = 5
_EXAMPLES = {"logistic": 20000, "boosted": 8000, "svm": 3000}
_RULES: dict[str, type[GapStopper]] = {"gap": GapStopper, "choice_gap": ChoiceGapStopper}


@dataclass
class Contestant:
    """A reader with a kind of stopper, as far as fitting documents tell; all figures are *simulated*.

    Attributes:
        reader: The reader.
        kind: Of ``KINDS``.
        scores: [D, L], what is said after every block by stoppers that have not seen the document; NaN elsewhere.
        lost: [D, L], 1 where a document that leaves there loses its answer, -1 where it wins one.
        work: Of these documents.
        choice: After which blocks it is asked, and what that comes to.
        right: [D, L], whether the answers are right; NaN where nothing tells.
        stopper: Fitted on all documents, where it became a candidate.
    """

    reader: Reader
    kind: str
    scores: np.ndarray = field(repr=False)
    lost: np.ndarray = field(repr=False)
    work: Work = field(repr=False)
    choice: Choice
    right: np.ndarray = field(repr=False)
    stopper: Stopper | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """Reader and kind."""
        return f"{self.reader.name} {self.kind}"

    @property
    def expected(self) -> float:
        """The share of the dense work that is expected to be saved after calibration."""
        return 1 - self.choice.expected


class Fitter:
    """Fits kinds of stoppers on the fitting documents, and on all of them but a fold.

    Args:
        files: The fitting documents' traces.
        seed: Of the folds and the fits.
    """

    def __init__(self, files: Sequence[Path], seed: int = 0):
        self.files, self.seed = list(files), seed
        self._whole = [read(path) for path in self.files]
        self.has_choices = all(_has_choices(meta, arrays) for meta, arrays in self._whole)
        self._folds = [_dealt(arrays["doc_id"], seed + i) for i, (_, arrays) in enumerate(self._whole)]

    def kinds(self) -> tuple[str, ...]:
        """What there is to fit: rules among the choices only where every decision has such choices."""
        return tuple(kind for kind in KINDS if kind != "choice_gap" or self.has_choices)

    def views(self, reader: Reader) -> list[TracedDocuments]:
        """The documents under a reader."""
        return [
            TracedDocuments(path, meta, arrays).under(reader.name)
            for path, (meta, arrays) in zip(self.files, self._whole, strict=True)
        ]

    def fitted(self, kind: str, reader: Reader, files: Sequence[Path] | None = None) -> Stopper:
        """A stopper that was fitted on all documents, or on those of some files; its threshold does not matter.

        Raises:
            AdaInferError: Where these documents don't allow it.
        """
        if kind in _RULES:
            rule = _RULES[kind](0.5)
            rule.reader = reader
            return rule
        options: dict[str, Any] = {"label": "stable", "features": self._features()}
        if kind == "svm":
            options = {"label": "final", "features": PAPER_FEATURES}
        options["max_examples"] = _EXAMPLES[kind]
        return fit.fit(kind, self.files if files is None else files, seed=self.seed, reader=reader, **options)

    def contestant(
        self, kind: str, reader: Reader, loss: str, allowance: Allowance, folder: Path
    ) -> Contestant:
        """Judge a kind under a reader, and choose its blocks.

        Args:
            kind: Of ``KINDS``.
            reader: The reader.
            loss: Of ``TracedDocuments.losses``.
            allowance: What calibration documents will allow.
            folder: Where :meth:`write_folds` put the folds.

        Raises:
            AdaInferError: Where it can't be fitted on these documents.
        """
        views = self.views(reader)
        found, stopper = self.scored(kind, reader, folder)
        lost, work = losses(views, loss), Work.of(views, reader, stopper)
        right = np.concatenate([view.hits for view in views])
        choice = search(found, lost, work, allowance)
        return Contestant(reader, kind, found, lost, work, choice, right)

    def scored(self, kind: str, reader: Reader, folder: Path) -> tuple[np.ndarray, Stopper]:
        """[D, L], what is said of every document by stoppers that have not seen it; and one of these.

        Args:
            kind: Of ``KINDS``.
            reader: The reader.
            folder: Where :meth:`write_folds` put the folds.

        Raises:
            AdaInferError: Where it can't be fitted on these documents.
        """
        views = self.views(reader)
        parts = [np.full((len(view.doc_ids), view.n_blocks), np.nan) for view in views]
        if kind in _RULES:
            stopper = self.fitted(kind, reader)
            for part, view in zip(parts, views, strict=True):
                part[:] = scores(stopper, view)
        else:
            for fold in range(FOLDS):
                stopper = self.fitted(kind, reader, sorted((folder / str(fold)).glob("*.trace")))
                for part, view, dealt in zip(parts, views, self._folds, strict=True):
                    mine = np.array([dealt[i] == fold for i in view.doc_ids.tolist()], dtype=bool)
                    if mine.any():
                        part[mine] = scores(stopper, _only(view, view.doc_ids[mine]))
        return np.concatenate(parts), stopper

    def write_folds(self, folder: Path) -> None:
        """Write, for every fold, the traces of the other folds' documents."""
        for fold in range(FOLDS):
            for path, (meta, arrays), dealt in zip(self.files, self._whole, self._folds, strict=True):
                keep = np.array([dealt[i] != fold for i in arrays["doc_id"].tolist()], dtype=bool)
                if keep.any():
                    some = {key: array[keep] for key, array in arrays.items()}
                    about = {**meta, "documents": len(np.unique(some["doc_id"]))}
                    container.write(folder / str(fold) / path.name, "trace", VERSION, about, some)

    def _features(self) -> list[str]:
        recorded = [set(meta["features"]) for meta, _ in self._whole]
        names = [n for n, f in FEATURES.items() if not f.recorded or all(n in known for known in recorded)]
        return [n for n in names if not past_width([n]) and (self.has_choices or not FEATURES[n].choices)]


def contestants(
    fitter: Fitter, readers: Sequence[Reader], loss: str, allowance: Allowance
) -> tuple[list[Contestant], dict[str, str]]:
    """All that can be fitted, the one first of which most is expected to be left, and why others can't.

    Args:
        fitter: Of the fitting documents.
        readers: The readers.
        loss: Of ``TracedDocuments.losses``.
        allowance: What calibration documents will allow.
    """
    found, without = [], {}
    with tempfile.TemporaryDirectory() as folder:
        fitter.write_folds(Path(folder))
        for reader in readers:
            for kind in fitter.kinds():
                try:
                    found.append(fitter.contestant(kind, reader, loss, allowance, Path(folder)))
                except AdaInferError as error:
                    without[f"{reader.name} {kind}"] = str(error)
    return sorted(found, key=lambda c: (c.choice.expected, c.choice.cost)), without


def scores(stopper: Stopper, view: TracedDocuments) -> np.ndarray:
    """[D, L], what a stopper says of documents after every recorded block but the last, its threshold left out."""
    free = copy.copy(stopper)
    free.threshold = 0.0  # type: ignore[attr-defined]
    return view.together(margins(free, view.meta, view.arrays, [k for k in view.blocks if k < view.n_blocks]))


def losses(views: Sequence[TracedDocuments], loss: str) -> np.ndarray:
    """[D, L], ``TracedDocuments.losses`` after every block; meaningless where none was recorded."""
    return np.concatenate(
        [
            np.stack([view.losses(loss, np.full(len(view.doc_ids), k)) for k in range(1, view.n_blocks + 1)], axis=1)
            for view in views
        ]
    )


def _only(view: TracedDocuments, documents: np.ndarray) -> TracedDocuments:
    keep = np.isin(view.arrays["doc_id"], documents)
    return TracedDocuments(view.path, view.meta, {key: array[keep] for key, array in view.arrays.items()})


def _dealt(doc_ids: np.ndarray, seed: int) -> dict[int, int]:
    """Document to fold; what one document was asked at several shots stays together."""
    documents = np.unique(doc_ids)
    return dict(zip(documents.tolist(), (np.random.default_rng(seed).permutation(len(documents)) % FOLDS).tolist(),
                    strict=True))  # fmt: skip


def _has_choices(meta: dict[str, Any], arrays: dict[str, np.ndarray]) -> bool:
    """Whether every decision has choices of one token each."""
    of_choices = [name for name in meta["features"] if name in FEATURES and FEATURES[name].choices]
    return bool(of_choices) and not without_choices(arrays["features"], meta["features"]).any()
