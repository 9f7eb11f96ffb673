"""``adainfer tune`` for tasks whose texts are generated: chosen on traces, calibrated and reported on real runs.

Reader, stopper, blocks, KV policy and a short ladder of thresholds are chosen on fitting documents, *simulated* from
their dense texts. No trace can tell what a text turns into once it differs, so calibration documents are really
generated at each threshold, from the strictest on, until the first whose promise fails (fixed-sequence testing), and
test documents are generated dense and early: figures there are *counted* on real runs. ``docs/tune.md`` has the story.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lm_eval_adainfer import container
from lm_eval_adainfer._version import __version__
from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.harness import asides, auto
from lm_eval_adainfer.harness.asking import generation_of
from lm_eval_adainfer.readers import specs as readers
from lm_eval_adainfer.readers.base import HEAD, Reader
from lm_eval_adainfer.strategies import files as stopper_files
from lm_eval_adainfer.strategies.base import Stopper
from lm_eval_adainfer.strategies.rules import GapStopper
from lm_eval_adainfer.traces import documents, recording
from lm_eval_adainfer.traces.documents import TracedDocuments
from lm_eval_adainfer.traces.plan import Plan
from lm_eval_adainfer.traces.texts import PROMPTS, TOKENS, trace_texts
from lm_eval_adainfer.tuning import probe, real, text_contestants
from lm_eval_adainfer.tuning.allowance import Allowance
from lm_eval_adainfer.tuning.choosing import WORTH
from lm_eval_adainfer.tuning.contestants import Fitter
from lm_eval_adainfer.tuning.probe import Probed
from lm_eval_adainfer.tuning.runs import Exits, Ran, Runs, values
from lm_eval_adainfer.tuning.search import search
from lm_eval_adainfer.tuning.text_contestants import BEYOND, PROPAGATE, RECOMPUTE, RUNGS, TextContestant
from lm_eval_adainfer.tuning.text_work import TokenWork, texts_of, with_new_tokens
from lm_eval_adainfer.tuning.tune import RESULT, STOPPER, Tuned, Tuning
from lm_eval_adainfer.tuning.work import Work

CANDIDATES = 2  # that are calibrated, at most: every threshold of each is a run
_PASSES = {"train": 2, "calibrate": 8, "test": 2}  # dense passes over a split, about, in all of the command
_FEWEST = 30  # documents of a split, whatever the budget
_SECOND = 0.5  # of the first candidate's expected saving: what a second one must be expected to save
_logger = logging.getLogger(__name__)


def tuning_of(tasks: dict[str, Any]) -> type[Tuning]:
    """What tunes for these tasks; tasks of both kinds together are refused when it is made."""
    types = {task.OUTPUT_TYPE for task in tasks.values()}
    return TextTuning if types == {"generate_until"} else Tuning


class TextTuning(Tuning):
    """One command's work in one folder, for ``generate_until`` tasks."""

    output_types = ("generate_until",)

    def run(self) -> Tuned:
        """Do all of it; what an equal command that was killed has finished is kept.

        Raises:
            AdaInferError: On tasks whose texts can't be compared, or a folder of an unequal command.
        """
        if self.lm.options.generation == "dense":
            raise AdaInferError("generation: dense exits nowhere in texts, so there is nothing to tune; leave it out")
        self._runs = Runs(self.lm, self.tasks, self.folder / "runs", self.settings, self.asked)
        probed, documents_each, stored, seconds = self._probe()
        self._pace = documents_each, seconds
        self._say(1, f"generating the fitting documents dense, and tracing them{self._about(_PASSES)}")
        dense = self._runs.run("train", self._numbers("train", documents_each))
        worth = self._worth(dense)
        prompt_readers = [o for o in probed if o.reader.runs_tokens and not o.hopeless]
        traced = self._traced(dense, [(o.reader, o.blocks) for o in prompt_readers], self.folder / "traces")
        of_task = self._numbers("calibrate", documents_each)
        waiting = sum(of_task.values())
        # simulated texts never win: one that changes loses what it had
        drop, confidence = self.settings.max_drop, self.settings.confidence
        allowance = Allowance.divided(waiting, drop, confidence, "agreement", CANDIDATES)
        allowed, most_lost = allowance.most_lost(), allowance.share
        self._say(2, f"choosing what leaves, readers and stoppers; {max(allowed, 0)} of {waiting} may be lost later")
        rivals, without = self._rivals(traced, dense, allowance, stored, worth, prompt_readers)
        candidates = self._candidates(rivals, allowance.candidates)
        result = {
            "version": __version__,
            "texts": True,
            "model": {k: v for k, v in recording.model_identity(self.lm).items() if k in _MODEL},
            "settings": self.named,
            "shots": {ran.documents.name: ran.documents.shots for ran in dense},
            "readers": probe.told(probed),
            "fitting": {"documents": sum(len(ran.texts) for ran in dense), "may_lose": most_lost},
            "contestants": [rival.figures(self.settings.seed) for rival in rivals],
            "not_fitted": without,
            "oracles": {one.reader.name: one.saved for one in probed},
            "calibration": {
                "documents": waiting,
                "of_task": of_task,
                "error_divided_by": allowance.candidates,
                "may_lose": max(allowed, 0),
            },
        }
        tuned = Tuned(result, [], list(rivals))
        if candidates and allowed >= 0:
            chosen = self._calibrated_on_runs(candidates, most_lost, allowance.confidence, documents_each, result)
            if chosen is not None:
                self._report_runs(*chosen, documents_each, tuned)
        if "chosen" not in result:
            self._nothing(candidates, allowed, waiting, result)
        text = json.dumps(result, indent=1, sort_keys=True)
        container.write_atomically(self.folder / RESULT, text.encode())
        return tuned

    def _about(self, passes: Mapping[str, int]) -> str:
        """How long it takes to generate the documents that there are of each split dense so many times."""
        documents_each, seconds = self._pace
        count = sum(times * sum(self._numbers(split, documents_each).values()) for split, times in passes.items())
        return f", at most about {count * seconds / 60:.1f} minutes more"

    # ------------------------------------------------------------------ the probe and traces

    def _probe(self) -> tuple[list[Probed], int, dict[str, list[float]], float]:
        """What readers are worth, documents of each split, weights that make keys and values, seconds of a document."""
        plan, place = self.folder / "plan.json", self.folder / "probe"
        Plan.of(self.lm.anatomy, self.settings.readers)  # which refuses what is no reader of this model
        decided = self._decided(plan)
        limit = -(-probe.DOCUMENTS // len(self.tasks))
        if decided is None:
            shutil.rmtree(place, ignore_errors=True)  # its seconds are not known
        runs = Runs(self.lm, self.tasks, place / "runs", self.settings, self.asked)
        started = time.monotonic()
        dense = runs.run("train", dict.fromkeys(self.tasks, limit))
        took = time.monotonic() - started
        count = sum(len(ran.texts) for ran in dense)
        self._worth(dense)  # a metric that can't be a loss is refused before more is generated
        if decided is None:
            stores = self._stored_weights(dense[0].documents.instances[0])
            decided = {"settings": self.named, "seconds": took / count, "documents": self.settings.documents}
            decided |= {"stored_weights": stores}
        each = float(decided["seconds"])
        stored = {key: [float(weight) for weight in of] for key, of in decided["stored_weights"].items()}
        blocks = probe.places(self.lm.n_blocks)
        prompts = [reader for reader in self._readers() if reader.runs_tokens] if blocks else []
        traced = self._traced(dense, [(reader, blocks) for reader in prompts], place / "traces")
        probed = self._judged(traced, dense, prompts, stored)
        if not plan.exists():
            if self.settings.budget is not None:
                seconds = 60 * self.settings.budget - (time.monotonic() - started)
                affordable = int(seconds / (sum(_PASSES.values()) * each))
                decided["documents"] = max(_FEWEST, min(self.settings.documents, affordable))
                if decided["documents"] < self.settings.documents:
                    _logger.info("budget: it allows about %d documents of each split", decided["documents"])
            container.write_atomically(plan, json.dumps(decided, indent=1, sort_keys=True).encode())
        return probed, int(decided["documents"]), stored, each

    def _readers(self) -> list[Reader]:
        """The head, and those that were named."""
        named = [readers.parse(spec) for spec in self.settings.readers]
        return [HEAD, *(reader for reader in named if not reader.same(HEAD))]

    def _stored_weights(self, instance: Any) -> dict[str, list[float]]:
        """Per block, the weights that make keys and values: of new tokens, and of a prompt that has left.

        A model that can't exit early in texts, or can't be read so, is refused here.
        """
        found = {"tokens": [0.0] * self.lm.n_blocks, "prompts": [0.0] * self.lm.n_blocks}
        running = [reader for reader in self._readers() if reader.runs_tokens]
        for reader, policy in [(HEAD, RECOMPUTE), *((reader, PROPAGATE) for reader in running[:1])]:
            if self.lm.n_blocks < 2:
                break
            options = replace(
                self.lm.options, stopper=GapStopper(1.0), reader=reader, kv_policy=policy, generation="early"
            )
            with asides.using(self.lm, options, [self.lm.n_blocks - 1]):
                self.lm.generate_until([instance], disable_tqdm=True)
                counter = self.lm.token_counter
                if reader.runs_tokens:
                    found["prompts"] = list(counter.copied_weights)
                else:
                    found["tokens"] = list(counter.stored_weights)
        return found


    def _traced(
        self, dense: Sequence[Ran], prompts: Sequence[tuple[Reader, tuple[int, ...]]], folder: Path
    ) -> dict[str, list[Path]]:
        """The traces of dense texts: of their prompts, where readers run tokens, and of their tokens."""
        every, early = tuple(range(1, self.lm.n_blocks + 1)), tuple(range(1, self.lm.n_blocks))
        alone = [(r, every if r.same(HEAD) else early) for r in self._readers() if not r.runs_tokens]
        plans = {TOKENS: alone, **({PROMPTS: [(HEAD, every), *prompts]} if prompts else {})}
        found: dict[str, list[Path]] = {PROMPTS: [], TOKENS: []}
        for ran in dense:
            of = ran.documents
            for what, wanted in plans.items():
                plan = Plan(self.lm.anatomy, tuple(wanted))
                path = folder / what / f"{of.name}_{of.shots}shot_{of.split}.trace"
                identity = {
                    "task": of.name,
                    "task_version": str(of.task.VERSION),
                    "num_fewshot": of.shots,
                    "split": of.split,
                    "limit": len(of.doc_ids),
                    "seed": self.settings.seed,
                    "fewshot_seed": self.settings.fewshot_seed,
                    **self.asked.identity(self.lm, "generate_until"),
                    "requests": of.requests,
                }
                found[what].append(
                    trace_texts(self.lm, what, plan, of.instances, ran.tokens, of.doc_ids, path, identity)
                )
        return found

    def _judged(
        self,
        traced: dict[str, list[Path]],
        dense: Sequence[Ran],
        prompts: Sequence[Reader],
        stored: dict[str, list[float]],
    ) -> list[Probed]:
        """What an oracle would save under every reader: that of new tokens under the head, those of prompts."""
        tokens = documents.read(traced[TOKENS])
        found = []
        for reader in [reader for reader in self._readers() if not reader.runs_tokens]:
            views = [view.under(reader.name) for view in tokens]
            found.append(_probed_tokens(views, reader, stored["tokens"]))
        if prompts:
            views = documents.read(traced[PROMPTS])
            judged = probe.judge(views, prompts)
            new = _new_tokens(dense)
            for one in judged:
                seen = [view.under(one.reader.name) for view in views]
                work = Work.of(seen, one.reader, _ASKING)
                whole = with_new_tokens(work, seen, one.reader, new, stored["prompts"])
                saved = one.saved * float(work.dense.sum() / whole.dense.sum())
                found.append(replace(one, saved=saved, hopeless=one.hopeless or saved < probe.LEAST))
        for one in found:
            if one.hopeless:
                _logger.info(
                    "reader %s is dropped: even an oracle would save %.1f%% with it (simulated)",
                    one.reader.name, 100 * one.saved,
                )  # fmt: skip
        return found

    # ------------------------------------------------------------------ choosing

    def _worth(self, dense: Sequence[Ran]) -> dict[tuple[str, int], float] | None:
        """What every document loses at most if its text differs; None for 1."""
        if self.settings.loss == "agreement":
            return None
        return {
            (ran.documents.name, i): float(value)
            for ran in dense
            for i, value in zip(ran.documents.doc_ids, values(ran, self.settings.loss), strict=True)
        }

    def _rivals(
        self,
        traced: dict[str, list[Path]],
        dense: Sequence[Ran],
        allowance: Allowance,
        stored: dict[str, list[float]],
        worth: dict[tuple[str, int], float] | None,
        prompts: Sequence[Probed],
    ) -> tuple[list[TextContestant], dict[str, str]]:
        """All contestants, the one first of which most is expected to be left."""
        seed, alone = self.settings.seed, [reader for reader in self._readers() if not reader.runs_tokens]
        found, without = text_contestants.of_tokens(
            Fitter(traced[TOKENS], seed), alone, allowance, stored["tokens"], worth
        )
        if prompts:
            more, others = text_contestants.of_prompts(
                Fitter(traced[PROMPTS], seed), [o.reader for o in prompts], allowance,
                _new_tokens(dense), stored["prompts"], worth,
            )  # fmt: skip
            found, without = found + more, {**without, **others}
        return sorted(found, key=lambda c: (c.choice.expected, c.choice.cost, c.kv_policy == PROPAGATE)), without

    def _candidates(self, rivals: Sequence[TextContestant], count: int) -> list[TextContestant]:
        """The best one, and the best one of which something else leaves, if it may be as good."""
        good = [rival for rival in rivals if rival.expected >= WORTH]
        others = [
            rival for rival in good[1:] if rival.exits != good[0].exits and rival.expected >= _SECOND * good[0].expected
        ]
        return [*good[:1], *others[:1]][:count]

    # ------------------------------------------------------------------ calibrating and reporting on real runs

    def _calibrated_on_runs(
        self,
        candidates: Sequence[TextContestant],
        most_lost: float,
        confidence: float,
        documents_each: int,
        result: dict[str, Any],
    ) -> tuple[TextContestant, Stopper, Exits] | None:
        """The candidate that saves most at its loosest threshold that passed, with its stopper and how to run it."""
        numbers = self._numbers("calibrate", documents_each)
        most = self._about({"calibrate": 1 + len(candidates) * (len(RUNGS) + len(BEYOND)), "test": 2})
        self._say(3, f"generating calibration documents dense, and with {', '.join(c.name for c in candidates)}{most}")
        dense = self._runs.run("calibrate", numbers)
        found: list[tuple[float, int, TextContestant, Stopper, Exits]] = []
        told = []
        for candidate in candidates:
            assert candidate.fitter is not None
            bare = candidate.fitter.fitted(candidate.kind, candidate.reader)
            rungs: list[dict[str, Any]] = []
            for threshold in candidate.ladder(most_lost):
                exits = Exits(real.at(bare, candidate, threshold), candidate.choice.blocks, candidate.kv_policy)
                early = self._runs.run("calibrate", numbers, exits)
                rungs.append(real.rung(threshold, dense, early, self.settings, confidence))
                self._say_rung(candidate, rungs[-1])
                if not rungs[-1]["passed"]:
                    break
            passed = [rung for rung in rungs if rung["passed"]]
            last = passed[-1] if passed else None
            told.append(
                {
                    "name": candidate.name,
                    "check_layers": "+".join(map(str, candidate.choice.blocks)),
                    "threshold": last["threshold"] if last else None,
                    "stops": last is not None,
                    "documents": sum(len(ran.texts) for ran in dense),
                    "losses": last["losses"] if last else None,
                    "saved_on_calibration": last["saved"] if last else None,
                    "needed": None if last or not rungs else rungs[0]["needed"],
                    "confidence": confidence,
                    "rungs": rungs,
                }
            )
            if last is not None and last["saved"] >= WORTH:
                stopper = real.at(bare, candidate, last["threshold"])
                stopper.info["promise"] = real.promise(
                    candidate, rungs, last, confidence, dense, self.settings, self.lm, self.asked
                )
                exits = Exits(stopper, candidate.choice.blocks, candidate.kv_policy)
                found.append((last["saved"], -len(found), candidate, stopper, exits))
        result["candidates"] = told
        if not found:
            return None
        _, _, chosen, stopper, exits = max(found, key=lambda one: one[:2])
        return chosen, stopper, exits

    def _say_rung(self, candidate: TextContestant, rung: dict[str, Any]) -> None:
        _logger.info(
            "%s above %.4g: saves %.1f%% (counted), loses %d calibration documents: %s",
            candidate.name, rung["threshold"], 100 * rung["saved"], rung["losses"],
            "passed" if rung["passed"] else "failed",
        )  # fmt: skip

    def _report_runs(
        self, chosen: TextContestant, stopper: Stopper, exits: Exits, documents_each: int, tuned: Tuned
    ) -> None:
        """Generate the test documents, once each way; note the recommendation, and write the stopper's file."""
        self._say(4, f"generating test documents dense, and with {chosen.name}{self._about({'test': 2})}")
        numbers = self._numbers("test", documents_each)
        dense, early = self._runs.run("test", numbers), self._runs.run("test", numbers, exits)
        blocks = list(exits.blocks)
        described = auto.described(self.lm, self.asked, tuned.found["shots"], chosen.reader, blocks)
        stopper.info["tuned"] = {
            **described, "kv_policy": exits.kv_policy, "generation_kwargs": generation_of(self.tasks)
        }  # fmt: skip
        tuned.found["chosen"] = {
            "name": chosen.name,
            "reader": chosen.reader.name,
            "stopper": chosen.kind,
            "exits": chosen.exits,
            "kv_policy": exits.kv_policy,
            "file": STOPPER,
            "check_layers": blocks,
            "threshold": stopper.threshold,  # type: ignore[attr-defined]
            "promise": stopper.info["promise"],
        }
        tuned.exits = {ran.documents.name: real.left(ran, chosen.exits) for ran in early}
        rows = [real.row(ran.documents.name, [ran], [other]) for ran, other in zip(dense, early, strict=True)]
        if len(rows) > 1:
            rows.append(real.row("pooled", dense, early))
        tuned.found["test"] = {
            "rows": rows,
            **real.figures(dense, early, self.settings.loss, self.settings.seed, chosen.exits),
            "used_elsewhere": self._used(documents_each),
        }
        stopper_files.save(stopper, self.folder / STOPPER)


_ASKING = GapStopper(0.5)  # for what asking costs
_MODEL = ("model", "n_blocks", "head_hash", "weights_hash", "tokenizer_hash", "dtype", "autocast")


def _new_tokens(dense: Sequence[Ran]) -> dict[tuple[str, int], int]:
    """Task and document to the number of new tokens of its text."""
    return {
        (ran.documents.name, i): len(new)
        for ran in dense
        for i, (_, new) in zip(ran.documents.doc_ids, ran.tokens, strict=True)
    }


def _probed_tokens(views: Sequence[TracedDocuments], reader: Reader, stored: Sequence[float]) -> Probed:
    """What an oracle would save that knows at every block whether a new token is the final one there."""
    agrees = np.concatenate([view.answers == view.answers[:, -1:] for view in views])
    said, n_blocks = np.where(agrees, 1.0, -1.0), agrees.shape[1]
    said[:, -1] = np.nan
    work = TokenWork.of_tokens(views, reader, _ASKING, stored)
    best = search(said, np.zeros_like(said), work, None, [0.0], text=texts_of(views))
    agreement = {k: float(agrees[:, k - 1].mean()) for k in range(1, n_blocks)}
    asking = float(work.ask[:, : n_blocks - 1].sum() / work.dense.sum())
    return Probed(reader, tuple(range(1, n_blocks)), agreement, 1 - best.cost, asking)
