"""Ways to leave early in generated texts, judged on fitting documents: prompts that leave, or new tokens that do.

All of it is *simulated* from dense texts (teacher forcing): a document is lost where its text would differ. That is
what a greedy run does, but for two *approximations*: under ``propagate`` early tokens change what later ones see, and
under ``sim`` new tokens see all of a prompt's keys and values, while a trace's see those that ran on. With a metric as
the loss, a text that differs loses what the dense text has, which is the most it can lose.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.readers.base import Reader
from lm_eval_adainfer.traces.documents import TracedDocuments
from lm_eval_adainfer.tuning.allowance import Allowance
from lm_eval_adainfer.tuning.contestants import Contestant, Fitter, contestants
from lm_eval_adainfer.tuning.savings import losing, saving
from lm_eval_adainfer.tuning.search import left, lost_by, search
from lm_eval_adainfer.tuning.text_work import TokenWork, texts_of, with_new_tokens

TOKEN_KINDS = ("gap", "logistic", "boosted")  # an SVM's support vectors are dear at every token
PROPAGATE, RECOMPUTE = "propagate", "recompute"
RUNGS = (0.25, 0.5, 0.75, 1.0)  # of the saving within the drop: the first thresholds that are run
BEYOND = (2.0, 4.0)  # times the drop: the thresholds after these, which pass where less is lost than simulated
_QUANTILES = 400

Weighed = Mapping[tuple[str, int], float]  # task and document to something of it


@dataclass
class TextContestant(Contestant):
    """A reader with a kind of stopper, for prompts or for new tokens; all figures are *simulated*.

    Attributes:
        exits: ``prompt`` or ``token``.
        kv_policy: What later tokens find of those that left.
        text: [D], where rows are tokens, the text of each; None where they are prompts.
        fitter: Of these documents, as rows of this kind.
    """

    exits: str = "prompt"
    kv_policy: str = PROPAGATE
    text: np.ndarray | None = field(default=None, repr=False)
    fitter: Fitter | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """Reader, kind, and what leaves."""
        what = "prompts" if self.exits == "prompt" else f"tokens, {self.kv_policy}"
        return f"{super().name} ({what})"

    def figures(self, seed: int) -> dict[str, Any]:
        """What its exits save and lose, with 95% intervals over documents, JSON-serialisable."""
        exit_layer = self.choice.exit_layer
        cost, dense = self.work.at(exit_layer, self.choice.blocks), self.work.dense
        return {
            "name": self.name,
            "reader": self.reader.name,
            "stopper": self.kind,
            "exits": self.exits,
            "kv_policy": self.kv_policy,
            "check_layers": list(self.choice.blocks),
            "threshold": self.choice.threshold if np.isfinite(self.choice.threshold) else None,
            "expected": self.expected,
            **saving(self.by_document(cost), self.by_document(dense), seed),
            **losing(lost_by(self.lost, exit_layer, self.text)),  # simulated texts never win
            "exit_layer": float(exit_layer.mean()),
            "acc": None,
        }

    def by_document(self, rows: np.ndarray) -> np.ndarray:
        """[documents], the sums of [D] rows."""
        return rows if self.text is None else np.bincount(self.text, rows)

    def ladder(self, most_lost: float) -> list[float]:
        """The thresholds that are worth a run, from the strictest to the loosest.

        The first ones save, simulated, about the shares ``RUNGS`` of what can be saved within the drop; those behind
        lose the multiples ``BEYOND`` of it. Thresholds at which the same rows leave after the same blocks are one.

        Args:
            most_lost: The share of documents that may be lost.
        """
        asked = self.scores[:, [k - 1 for k in self.choice.blocks]]
        known = asked[np.isfinite(asked)]
        if not len(known):
            return []
        tried = np.unique(np.quantile(known, np.linspace(0, 1, _QUANTILES), method="lower").astype(np.float32))[::-1]
        exits = [left(self.scores, self.choice.blocks, float(t)) for t in tried]
        saved = np.maximum.accumulate([1 - self.work.ratio(of, self.choice.blocks) for of in exits])
        lost = np.maximum.accumulate([lost_by(self.lost, of, self.text).mean() for of in exits])
        within = int(np.searchsorted(lost, most_lost + 1e-9, side="right")) - 1  # the loosest that keeps the drop
        rungs: list[int] = []
        if within >= 0 and saved[within] > 0:
            rungs += [int(np.searchsorted(saved[: within + 1], share * saved[within])) for share in RUNGS]
        least = 1 / len(lost_by(self.lost, exits[0], self.text))
        for times in BEYOND:
            rungs.append(int(np.searchsorted(lost, times * max(most_lost, least) + 1e-9, side="right")) - 1)
        found: list[float] = []
        before: np.ndarray | None = None
        for rung in sorted({r for r in rungs if r >= 0 and saved[r] > 0}):
            if before is None or not np.array_equal(before, exits[rung]):
                found.append(float(tried[rung]))
                before = exits[rung]
        return found


def of_prompts(
    fitter: Fitter,
    readers: Sequence[Reader],
    allowance: Allowance,
    new: Mapping[tuple[str, int], int],
    stored: Sequence[float],
    worth: Weighed | None,
) -> tuple[list[TextContestant], dict[str, str]]:
    """Contestants whose prompts leave, and why others can't be fitted.

    Args:
        fitter: Of the prompts' traces.
        readers: That run tokens.
        allowance: What calibration documents will allow.
        new: The number of every document's new tokens.
        stored: Per block, the weights of the maps that make keys and values.
        worth: What every document loses if its text differs; None for 1.
    """
    found, without = contestants(fitter, readers, "agreement", allowance)
    rivals = []
    for one in found:
        views = fitter.views(one.reader)
        work, lost = with_new_tokens(one.work, views, one.reader, new, stored), one.lost * _worth(views, worth)[:, None]
        choice = search(one.scores, lost, work, allowance)
        rivals.append(TextContestant(one.reader, one.kind, one.scores, lost, work, choice, one.right, fitter=fitter))
    return rivals, without


def of_tokens(
    fitter: Fitter,
    readers: Sequence[Reader],
    allowance: Allowance,
    stored: Sequence[float],
    worth: Weighed | None,
) -> tuple[list[TextContestant], dict[str, str]]:
    """Contestants whose new tokens leave, under both KV policies, and why others can't be fitted.

    Args:
        fitter: Of the tokens' traces.
        readers: That read every token on its own.
        allowance: As :func:`of_prompts`'.
        stored: As :func:`of_prompts`'.
        worth: As :func:`of_prompts`'.
    """
    rivals, without = [], {}
    with tempfile.TemporaryDirectory() as folder:
        fitter.write_folds(Path(folder))
        for reader in readers:
            views = fitter.views(reader)
            differs = np.concatenate([view.answers != view.answers[:, -1:] for view in views]).astype(float)
            lost, text = differs * _worth(views, worth)[:, None], texts_of(views)
            for kind in TOKEN_KINDS:
                try:
                    found, stopper = fitter.scored(kind, reader, Path(folder))
                except AdaInferError as error:
                    without[f"{reader.name} {kind} (tokens)"] = str(error)
                    continue
                for policy in (PROPAGATE, RECOMPUTE):
                    work = TokenWork.of_tokens(views, reader, stopper, stored if policy == PROPAGATE else None)
                    choice = search(found, lost, work, allowance, text=text)
                    right = np.full(found.shape, np.nan)
                    rivals.append(
                        TextContestant(
                            reader, kind, found, lost, work, choice, right, None, "token", policy, text, fitter
                        )
                    )
    return rivals, without


def _worth(views: Sequence[TracedDocuments], worth: Weighed | None) -> np.ndarray:
    """[D], what each row's document loses if its text differs."""
    if worth is None:
        return np.ones(sum(len(view.doc_ids) for view in views))
    return np.concatenate([[worth[view.meta["task"], i] for i in view.doc_ids.tolist()] for view in views])
