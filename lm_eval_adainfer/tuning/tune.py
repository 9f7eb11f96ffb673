"""From a model and tasks to a recommendation: probe readers, fit, choose, calibrate, and report on fresh documents.

Reader, stopper and blocks are chosen on fitting documents alone (``contestants``). Calibration documents move the
thresholds of at most three candidates, among which the error is divided, and say whether these save anything worth
having; which of those that pass is taken is decided by what they save on fitting documents at these thresholds. Test
documents are looked at once, at the end. Everything about early exits is *simulated* from traces; ``docs/tune.md`` has
the whole story.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lm_eval_adainfer import container
from lm_eval_adainfer._version import __version__
from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.fitting.risk import NET
from lm_eval_adainfer.harness import auto
from lm_eval_adainfer.harness.asking import Asking
from lm_eval_adainfer.readers import specs as readers
from lm_eval_adainfer.readers.base import HEAD, Reader
from lm_eval_adainfer.strategies import files as stopper_files
from lm_eval_adainfer.strategies.rules import GapStopper
from lm_eval_adainfer.traces import documents, recording, replay
from lm_eval_adainfer.traces.documents import TracedDocuments
from lm_eval_adainfer.traces.plan import Plan
from lm_eval_adainfer.traces.splits import SPLITS, documents_of
from lm_eval_adainfer.tuning import probe
from lm_eval_adainfer.tuning.allowance import documents_for
from lm_eval_adainfer.tuning.choosing import WORTH, Calibrated, allowed, calibrated, candidates
from lm_eval_adainfer.tuning.contestants import Contestant, Fitter, losses, scores
from lm_eval_adainfer.tuning.mix import mixed
from lm_eval_adainfer.tuning.probe import Probed
from lm_eval_adainfer.tuning.savings import losing, saving, wilson
from lm_eval_adainfer.tuning.search import left, lost_by
from lm_eval_adainfer.tuning.settings import Settings
from lm_eval_adainfer.tuning.work import Work

if TYPE_CHECKING:
    from lm_eval_adainfer.harness.model import AdaInferLM

STOPPER, RESULT = "tuned.stopper", "tune.json"
_FEWEST = 30  # documents of a split, whatever the budget
_logger = logging.getLogger(__name__)


@dataclass
class Tuned:
    """What came of it.

    Attributes:
        found: What ``tune.json`` holds.
        fitting: The fitting documents' traces.
        contestants: All, the most promising first.
        exits: Task to the exit layers of test documents, where something is recommended.
    """

    found: dict[str, Any]
    fitting: list[TracedDocuments]
    contestants: list[Contestant]
    exits: dict[str, np.ndarray] = field(default_factory=dict)


class Tuning:
    """One command's work in one folder, for loglikelihood tasks (``generated.TextTuning``: for texts).

    Args:
        lm: The model; it runs dense.
        tasks: Name to lm-eval task.
        output: The folder.
        settings: What is asked for.
        asked: Chat template, system instruction and the like.
        named: What else identifies the command; the folder is its own.
    """

    output_types: Sequence[str] = ("loglikelihood", "multiple_choice")

    def __init__(
        self,
        lm: AdaInferLM,
        tasks: dict[str, Any],
        output: str | Path,
        settings: Settings,
        asked: Asking | None = None,
        named: dict[str, Any] | None = None,
    ):
        require_tasks(tasks, self.output_types)
        self.lm, self.tasks, self.folder, self.settings = lm, tasks, Path(output), settings
        self.asked = asked or Asking()
        self.named = {**(named or {}), "tasks": sorted(tasks), **settings.described()}
        self._started = time.monotonic()
        self._sizes: dict[str, dict[str, int]] = {}  # split -> task -> documents that it holds
        self._seen: dict[str, set[int]] = {}  # "task/split" -> documents by which it chooses

    def run(self) -> Tuned:
        """Do all of it; what an equal command that was killed has finished is kept.

        Raises:
            AdaInferError: On tasks that can't be traced, or a folder of an unequal command.
        """
        probed, documents_each, seconds = self._plan()
        wanted = [(HEAD, self._every_block()), *((one.reader, one.blocks) for one in probe.kept(probed))]
        work = 1 + sum(one.work for one in probed if not one.hopeless or one.reader.same(HEAD))
        # at most: later splits need fewer readers
        took = {name: sum(self._numbers(name, documents_each).values()) * seconds * work for name in SPLITS}
        self._say(1, f"tracing fitting documents under {', '.join(r.name for r, _ in wanted)}", sum(took.values()))
        fitting_files = self._trace("train", wanted, documents_each)
        waiting = sum(self._numbers("calibrate", documents_each).values())
        allowance = allowed(waiting, self.settings)
        may_lose = max(allowance.most_lost(), 0)
        self._say(2, f"choosing among readers and stoppers; {may_lose} of {waiting} may be lost later")
        fitter = Fitter(fitting_files, self.settings.seed)
        fitted_under = [one.reader for one in probed if not one.hopeless]
        rivals, chosen, without = candidates(fitter, fitted_under, allowance, self.settings)
        fitting = self._noted(documents.read(fitting_files))
        result = self._described(probed, fitting, rivals, without, allowance.share)
        tuned = Tuned(result, fitting, rivals)
        result["calibration"] = {
            "documents": waiting, "of_task": self._numbers("calibrate", documents_each),
            "error_divided_by": allowance.candidates, "may_lose": may_lose,
        }  # fmt: skip
        if chosen and allowance.can_promise:
            self._say(3, f"calibrating {', '.join(c.name for c in chosen)}", took["calibrate"] + took["test"])
            files = self._trace("calibrate", self._under(chosen), documents_each)
            best, result["candidates"] = calibrated(chosen, files, allowance, self.settings)
            if best:
                self._report(best, took["test"], documents_each, tuned)
        if "chosen" not in result:
            self._nothing(chosen, allowance.most_lost(), waiting, result)
        text = json.dumps(result, indent=1, sort_keys=True)
        container.write_atomically(self.folder / RESULT, text.encode())
        return tuned

    # ------------------------------------------------------------------ the probe

    def _plan(self) -> tuple[list[Probed], int, float]:
        """What the probe found, how many documents of each split, and seconds of a dense document."""
        plan = self.folder / "plan.json"
        place = self.folder / "probe"
        blocks = probe.places(self.lm.n_blocks)
        if blocks:
            Plan.of(self.lm.anatomy, self.settings.readers)  # which refuses what is no reader of this model
        named = [readers.parse(spec) for spec in self.settings.readers]
        every = [HEAD, *(reader for reader in named if not reader.same(HEAD))]
        limit = -(-probe.DOCUMENTS // len(self.tasks))
        decided = self._decided(plan)
        if decided is None:
            shutil.rmtree(place, ignore_errors=True)  # its seconds are not known
            _logger.info("probing %s on %d documents", ", ".join(r.name for r in every), limit * len(self.tasks))
        started = time.monotonic()
        some = [(reader, blocks) for reader in every[1:]] if blocks else []
        found = self._trace("train", [(HEAD, self._every_block()), *some], limit, place)
        took = time.monotonic() - started
        traces = self._noted(documents.read(found))
        probed = probe.judge(traces, [HEAD, *(reader for reader, _ in some)])
        for one in probed:
            if one.hopeless and decided is None:
                _logger.info(
                    "reader %s is dropped: even an oracle would save %.1f%% with it (simulated)",
                    one.reader.name, 100 * one.saved,
                )  # fmt: skip
        if decided is None:
            work = sum(len(trace.doc_ids) for trace in traces) * (1 + self._probing(traces, some))
            decided = {"settings": self.named, "seconds": took / work, "documents": self.settings.documents}
            if self.settings.budget is not None:
                each = sum(one.work for one in probed if not one.hopeless or one.reader.same(HEAD))
                affordable = (60 * self.settings.budget - took) / (3 * decided["seconds"] * (1 + each))
                decided["documents"] = max(_FEWEST, min(self.settings.documents, int(affordable)))
                if decided["documents"] < self.settings.documents:
                    _logger.info("budget: it allows about %d documents of each split", decided["documents"])
            container.write_atomically(plan, json.dumps(decided, indent=1, sort_keys=True).encode())
        return probed, int(decided["documents"]), float(decided["seconds"])

    def _decided(self, plan: Path) -> dict[str, Any] | None:
        if not plan.exists():
            return None
        try:
            found = json.loads(plan.read_text())
            settings = found["settings"]
            float(found["seconds"]), int(found["documents"])
        except (OSError, ValueError, TypeError, KeyError):
            raise AdaInferError(f"output: {plan} is damaged; give another folder") from None
        mine = json.loads(json.dumps(self.named))
        if different := [key for key in mine if settings.get(key) != mine[key]]:
            key = different[0]
            raise AdaInferError(
                f"output: {self.folder} is of a command with other settings ({key} was {settings.get(key)!r:.80}, not "
                f"{mine[key]!r:.80}); give another folder"
            )
        return found

    def _probing(self, traces: Sequence[TracedDocuments], some: Sequence[tuple[Reader, Sequence[int]]]) -> float:
        """The probe's work besides the dense pass, over that."""
        total = 0.0
        for reader, blocks in [(HEAD, range(1, self.lm.n_blocks)), *some]:
            work = Work.of([t.under(reader.name) for t in traces], reader, _ASKING)
            total += float(sum(work.ask[:, k - 1].sum() for k in blocks) / work.dense.sum())
        return total

    # ------------------------------------------------------------------ traces

    def _every_block(self) -> tuple[int, ...]:
        return tuple(range(1, self.lm.n_blocks + 1))

    def _trace(
        self, split: str, wanted: Sequence[tuple[Reader, tuple[int, ...]]], count: int, place: Path | None = None
    ) -> list[Path]:
        """Of the probe (``place``), so many documents of each task; else so many of all tasks in their mix."""
        return recording.trace(
            self.lm,
            self.tasks,
            place or self.folder / "traces",
            num_fewshot=self.settings.num_fewshot,
            split=split,
            limit=self._numbers(split, count) if place is None else count,
            seed=self.settings.seed,
            fewshot_seed=self.settings.fewshot_seed,
            asked=self.asked,
            plan=Plan(self.lm.anatomy, tuple(wanted)),
        )

    def _held(self, split: str) -> dict[str, int]:
        """How many documents every task's split holds."""
        if split not in self._sizes:
            sizes = self._sizes[split] = {}
            for name, task in self.tasks.items():
                with documents_of(task, name, split, None, self.settings.seed, self.settings.num_fewshot or 0) as all_:
                    sizes[name] = len(all_)
        return self._sizes[split]

    def _numbers(self, split: str, count: int) -> dict[str, int]:
        """Task to how many of its documents a split has, where so many of all tasks are wanted."""
        return mixed({name: self._held(name) for name in SPLITS}, count)[split]

    def _noted(self, traces: list[TracedDocuments]) -> list[TracedDocuments]:
        """The traces, whose documents are noted as seen: a rule's blocks are chosen by them, too."""
        for trace in traces:
            place = f"{trace.meta['task']}/{trace.meta['split']}"
            self._seen.setdefault(place, set()).update(trace.doc_ids.tolist())
        return traces

    def _say(self, step: int, what: str, seconds: float = 0.0) -> None:
        """Where it is, and about how many seconds tracing will take yet, at most."""
        about = f"; at most about {seconds / 60:.1f} minutes of tracing left" if seconds else ""
        passed = (time.monotonic() - self._started) / 60
        _logger.info("step %d of 4: %s (%.1f minutes passed%s)", step, what, passed, about)

    # ------------------------------------------------------------------ choosing, calibrating, reporting

    def _described(
        self,
        probed: Sequence[Probed],
        fitting: Sequence[TracedDocuments],
        rivals: Sequence[Contestant],
        without: dict[str, str],
        most_lost: float,
    ) -> dict[str, Any]:
        return {
            "version": __version__,
            "model": {key: value for key, value in recording.model_identity(self.lm).items() if key in _MODEL},
            "settings": self.named,
            "shots": {trace.meta["task"]: trace.meta["num_fewshot"] for trace in fitting},
            "readers": probe.told(probed),
            "fitting": {"documents": sum(len(t.doc_ids) for t in fitting), "may_lose": most_lost},
            "contestants": [_told(rival, self.settings.loss, self.settings.seed) for rival in rivals],
            "not_fitted": without,
            "oracles": {
                one.reader.name: 1 - probe.oracle([t.under(one.reader.name) for t in fitting], one.reader).cost
                for one in probed
                if not one.hopeless or one.reader.same(HEAD)
            },
        }

    def _under(self, candidates: Sequence[Contestant]) -> list[tuple[Reader, tuple[int, ...]]]:
        """What calibration and test documents are traced under: the candidates' readers, after their blocks."""
        asked: dict[str, tuple[Reader, set[int]]] = {}
        for candidate in candidates:
            if not candidate.reader.same(HEAD):
                asked.setdefault(candidate.reader.name, (candidate.reader, set()))[1].update(candidate.choice.blocks)
        return [(HEAD, self._every_block()), *((reader, tuple(sorted(blocks))) for reader, blocks in asked.values())]

    def _report(self, best: Calibrated, seconds: float, documents_each: int, tuned: Tuned) -> None:
        """Look at the test documents, once; note the recommendation, and write the stopper's file."""
        chosen, stopper, came = best.contestant, best.stopper, best.came
        self._say(4, f"{chosen.name} on test documents", seconds)
        wanted = self._under([chosen])
        files = self._trace("test", wanted, documents_each)
        blocks = chosen.choice.blocks
        stopper.seen = {place: sorted(seen) for place, seen in self._seen.items()}
        stopper.info["tuned"] = auto.described(
            self.lm, self.asked, tuned.found["shots"], stopper.reader or HEAD, blocks
        )
        views = replay.load(files)
        rows = replay.replay(
            views, [stopper], check_layers="+".join(map(str, blocks)), seed=self.settings.seed, reader=chosen.reader
        )
        seen = [view.under(chosen.reader.name) for view in views]
        exits = [left(scores(stopper, view), blocks, came.threshold) for view in seen]
        lost, work = losses(seen, self.settings.loss), Work.of(seen, chosen.reader, stopper)
        whole = np.concatenate(exits)
        tuned.exits = {view.meta["task"]: of for view, of in zip(seen, exits, strict=True)}
        tuned.found["chosen"] = {
            "name": chosen.name,
            "reader": chosen.reader.name,
            "stopper": chosen.kind,
            "file": STOPPER,
            "check_layers": list(blocks),
            "threshold": came.threshold,
            "promise": stopper.info["promise"],
        }
        tuned.found["test"] = {
            "rows": rows,
            **_figures(whole, blocks, lost, work, self.settings.loss, self.settings.seed),
            "checks": _checks(whole, blocks, work),
            "used_elsewhere": self._used(documents_each),
        }
        stopper_files.save(stopper, self.folder / STOPPER)

    def _used(self, documents_each: int) -> dict[str, int]:
        """Task to how many of its evaluation documents were fitted or calibrated on, where it has no training split."""
        return {
            name: sum(self._numbers(split, documents_each)[name] for split in ("train", "calibrate"))
            for name, task in self.tasks.items()
            if not task.has_training_docs()
        }

    def _nothing(self, candidates: Sequence[Contestant], allowed: int, waiting: int, result: dict[str, Any]) -> None:
        """Say why nothing is recommended, and whether more documents would help."""
        (self.folder / STOPPER).unlink(missing_ok=True)
        asked = self.settings.max_drop, self.settings.confidence, self.settings.loss
        needed = [documents_for(n, *asked) for n in (0, 1)]
        at = f"{self.settings.max_drop:.2%} at {self.settings.confidence:.0%}"
        most = f"{at} needs {needed[0]} calibration documents without a loss, {needed[1]} with one"
        if not candidates:
            why = f"nothing is expected to save {WORTH:.0%} of the dense work within the drop, so use the dense model"
            more, helps = "more documents would hardly help", False
        elif allowed < 0:
            why, helps = f"{waiting} calibration documents can't carry the promise", True
            more = f"more documents may help: {most}"
            if waiting < self.settings.documents:
                more += "; these tasks hold no more, so pool further ones of their kind, or give a greater --max-drop"
        else:
            more_needed = [c["needed"] for c in result.get("candidates", ()) if not c["stops"]]
            known = [n for n in more_needed if n is not None]
            helps = bool(known)
            why = "no candidate's threshold passed on the calibration documents"
            more = f"about {min(known)} calibration documents might do" if known else "more documents would hardly help"
            more = f"{more} ({most})"
            if passed := [c for c in result["candidates"] if c["stops"]]:
                saved, name = max((c["saved_on_calibration"], c["name"]) for c in passed)
                why = (
                    f"nothing saves {WORTH:.0%} of the dense work ({name} saves {saved:.2%} on calibration documents, "
                    "at its calibrated threshold), so use the dense model"
                )
                more, helps = f"more documents, or a greater --max-drop, may allow a looser threshold ({most})", True
        result["nothing"] = {"why": why, "more_documents_would_help": helps, "more": more}


_ASKING = GapStopper(0.5)  # for what asking costs
_MODEL = ("model", "n_blocks", "head_hash", "weights_hash", "tokenizer_hash", "dtype", "autocast")


def require_tasks(tasks: dict[str, Any], output_types: Sequence[str]) -> None:
    """Raise AdaInferError on a task that can't be tuned for together with these."""
    for name, task in tasks.items():
        if task.OUTPUT_TYPE not in output_types:
            raise AdaInferError(
                f"tasks: {name} is a {task.OUTPUT_TYPE} task; adainfer tune takes multiple_choice and loglikelihood "
                "ones together, or generate_until ones alone"
            )


def _told(rival: Contestant, loss: str, seed: int) -> dict[str, Any]:
    """A contestant, JSON-serialisable."""
    choice = rival.choice
    right = rival.right[np.arange(len(rival.right)), choice.exit_layer - 1]
    known = ~np.isnan(right)
    n = int(known.sum())
    accuracy = float(right[known].mean()) if n else None
    spread = wilson(accuracy, n) if accuracy is not None else (None, None)
    dense = rival.right[:, -1]
    return {
        "name": rival.name,
        "reader": rival.reader.name,
        "stopper": rival.kind,
        "check_layers": list(choice.blocks),
        "threshold": choice.threshold if np.isfinite(choice.threshold) else None,
        "expected": rival.expected,
        **_figures(choice.exit_layer, choice.blocks, rival.lost, rival.work, loss, seed),
        "acc": accuracy,
        "acc_low": spread[0],
        "acc_high": spread[1],
        "acc_dense": float(dense[~np.isnan(dense)].mean()) if n else None,
    }


def _figures(
    exit_layer: np.ndarray, blocks: Sequence[int], lost: np.ndarray, work: Work, loss: str, seed: int
) -> dict[str, Any]:
    """What exits save and lose, with 95% intervals over documents."""
    return {
        **saving(work.at(exit_layer, blocks), work.dense, seed),
        **losing(lost_by(lost, exit_layer), loss in NET),
        "exit_layer": float(exit_layer.mean()),
    }


def _checks(exit_layer: np.ndarray, blocks: Sequence[int], work: Work) -> list[dict[str, Any]]:
    """Per asked block: the share of documents that are asked and that leave there, and its share of the dense work."""
    dense = work.dense.sum()
    return [
        {
            "block": k,
            "asked": float((exit_layer >= k).mean()),
            "leave": float((exit_layer == k).mean()),
            "cost": float(work.ask[exit_layer >= k, k - 1].sum() / dense),
        }
        for k in blocks
    ]
