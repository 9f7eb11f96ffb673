"""Texts that were really generated, dense or with early exit, for a split's documents; finished parts stay on disk.

Everything here is *counted* or observed on real runs; nothing is simulated. A run that is made again with the same
model, strategy and documents takes over what an earlier one has finished.
"""

from __future__ import annotations

import json
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from lm_eval.api.model import hash_args
from lm_eval.models.utils import normalize_gen_kwargs

from lm_eval_adainfer import container
from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.fitting.risk import NET
from lm_eval_adainfer.harness import asides, pilot
from lm_eval_adainfer.harness.asking import Asking
from lm_eval_adainfer.readers.base import HEAD
from lm_eval_adainfer.strategies.base import Stopper
from lm_eval_adainfer.tasks.qa import stable_hash
from lm_eval_adainfer.traces import recording
from lm_eval_adainfer.traces.splits import documents_of
from lm_eval_adainfer.traces.texts import Tokens
from lm_eval_adainfer.tuning.settings import Settings

if TYPE_CHECKING:
    from lm_eval_adainfer.harness.model import AdaInferLM


@dataclass(frozen=True)
class Exits:
    """With what a run exits early.

    Attributes:
        stopper: The strategy; it knows its reader.
        blocks: After which it is asked.
        kv_policy: A key of ``generation.policies.KV_POLICIES``.
    """

    stopper: Stopper
    blocks: tuple[int, ...]
    kv_policy: str


@dataclass
class Documents:
    """Of one task and split, as they are asked.

    Attributes:
        task: lm-eval's.
        name: The task's.
        split: The split.
        shots: The number of shots.
        doc_ids: [D], the index of each in its split.
        instances: [D], their requests.
    """

    task: Any
    name: str
    split: str
    shots: int
    doc_ids: list[int]
    instances: list[Any] = field(repr=False)

    @property
    def requests(self) -> str:
        """A hash of all prompts."""
        return f"{stable_hash(*(str(text) for i in self.instances for text in i.args)):x}"[:16]


@dataclass
class Ran:
    """What came of one task's documents, [D] each.

    Attributes:
        documents: The documents.
        texts: What was generated.
        flops: Counted, prompts and new tokens together.
        flops_dense: The same of a dense run of these texts.
        layers: Of every document, the exit blocks of its new tokens.
        prompt_exit: The block after which the prompt left; 0 where that was not decided.
        tokens: Of every document, the tokens of prompt and text; empty for early runs.
    """

    documents: Documents
    texts: list[str]
    flops: np.ndarray
    flops_dense: np.ndarray
    layers: list[list[int]]
    prompt_exit: np.ndarray
    tokens: list[Tokens]

    def scores(self) -> tuple[str | None, np.ndarray]:
        """The task's metric of single documents, and its values (NaN where it has none)."""
        found = pilot.judged(
            self.documents.task, [[i] for i in self.documents.instances], [[text] for text in self.texts]
        )
        names = {metric for _, metric, _ in found}
        name = names.pop() if len(names) == 1 else None
        return name, np.array([value if name else np.nan for _, _, value in found])


class Runs:
    """Runs documents, a part at a time, and keeps what is finished.

    Args:
        lm: The model; it runs dense by itself.
        tasks: Name to lm-eval task, all of them ``generate_until``.
        folder: Where parts lie.
        settings: Shots and seeds.
        asked: How documents are asked.
    """

    def __init__(self, lm: AdaInferLM, tasks: dict[str, Any], folder: Path, settings: Settings, asked: Asking):
        self.lm, self.tasks, self.folder, self.settings, self.asked = lm, tasks, folder, settings, asked
        self._documents: dict[tuple[str, tuple[int, ...]], list[Documents]] = {}

    def documents(self, split: str, numbers: Mapping[str, int]) -> list[Documents]:
        """The documents of every task's split: task to how many, at most.

        Raises:
            AdaInferError: On a task whose texts can't be compared.
        """
        key = split, tuple(numbers[name] for name in self.tasks)
        if key not in self._documents:
            self._documents[key] = [self._built(name, task, split, numbers[name]) for name, task in self.tasks.items()]
        return self._documents[key]

    def run(self, split: str, numbers: Mapping[str, int], exits: Exits | None = None) -> list[Ran]:
        """Generate the texts of a split's documents, of every task.

        Args:
            split: The split.
            numbers: Task to how many documents, at most.
            exits: How to exit early; None runs dense and keeps the tokens.
        """
        documents = self.documents(split, numbers)
        with self._with(exits), self.lm.identified():  # the weights are read once, and not for every part
            who = self.lm.fingerprint
            return [self._ran(of, who, keep_tokens=exits is None) for of in documents]

    def _with(self, exits: Exits | None) -> Any:
        if exits is None:
            return nullcontext()
        stopper = exits.stopper
        options = replace(
            self.lm.options, stopper=stopper, reader=stopper.reader or HEAD, kv_policy=exits.kv_policy,
            generation="early",
        )  # fmt: skip
        return asides.using(self.lm, options, list(exits.blocks))

    def _built(self, name: str, task: Any, split: str, limit: int) -> Documents:
        number = self.settings.num_fewshot
        shots = number if number is not None else task.get_config("num_fewshot") or 0
        with documents_of(task, name, split, limit, self.settings.seed, shots) as doc_ids:
            task.set_fewshot_seed(seed=self.settings.fewshot_seed)
            self.asked.build_requests(self.lm, task)
            instances = list(task.instances)
        if kinds := sorted({i.request_type for i in instances} - {"generate_until"}):
            raise AdaInferError(f"tasks: documents of {name} also make {kinds[0]} requests, which texts don't answer")
        if any((i.repeats or 1) != 1 for i in instances) or len(instances) != len(doc_ids):
            raise AdaInferError(f"tasks: {name} asks for several texts of a document; adainfer tune compares one")
        for settings in {str(i.args[1]): i.args[1] for i in instances}.values():
            if normalize_gen_kwargs(settings, self.lm.max_gen_toks).get("do_sample"):
                raise AdaInferError(
                    f"tasks: {name} draws its texts at random (do_sample), so they can't be compared; give "
                    "--gen_kwargs do_sample=False"
                )
        return Documents(task, name, split, shots, list(doc_ids), instances)

    def _ran(self, documents: Documents, who: str, keep_tokens: bool) -> Ran:
        rows: list[dict[str, Any]] = []
        size = recording.PART_DOCUMENTS
        for start in range(0, len(documents.instances), size):
            some = documents.instances[start : start + size]
            identity = {
                "fingerprint": who,
                "documents": documents.doc_ids[start : start + size],
                "requests": documents.requests,
                "tokens": keep_tokens,
            }
            file = self.folder / f"{documents.split}_{who}" / f"{documents.name}_{start:08d}.json"
            found = _read(file, identity)
            if found is None:
                found = self._generated(some, keep_tokens)
                text = json.dumps({"identity": identity, "rows": found})
                container.write_atomically(file, text.encode())
            rows += found
        return Ran(
            documents,
            [row["text"] for row in rows],
            np.array([row["flops"] for row in rows], dtype=float),
            np.array([row["flops_dense"] for row in rows], dtype=float),
            [row["layers"] for row in rows],
            np.array([row["prompt_exit"] for row in rows], dtype=int),
            [(row["prompt"], row["new"]) for row in rows] if keep_tokens else [],
        )

    def _generated(self, instances: Sequence[Any], keep_tokens: bool) -> list[dict[str, Any]]:
        kept = _KeptTokens()
        with self.lm.observed_texts(kept) if keep_tokens else nullcontext():
            texts = self.lm.generate_until(list(instances), disable_tqdm=True)
        rows = []
        for instance, text in zip(instances, texts, strict=True):
            record = text.exit_record
            row = {
                "text": str(text),
                "flops": record.flops,
                "flops_dense": record.flops_dense,
                "layers": list(record.layers or ()),
                "prompt_exit": record.prompt_exit_layer or 0,
            }
            if keep_tokens:
                row["prompt"], row["new"] = kept.found[hash_args("generate_until", instance.args)].popleft()
            rows.append(row)
        return rows


def losses(dense: Sequence[Ran], early: Sequence[Ran], loss: str) -> np.ndarray:
    """[documents], of all tasks one after the other, what each loses.

    Args:
        dense: A dense run.
        early: An early one of the same documents.
        loss: ``agreement``: 1 where the texts differ. ``gold``: by how much the document's own metric, from 0 to 1, is
            less. ``accuracy``: the same, and negative where it is more.

    Raises:
        AdaInferError: Where a metric is asked for, but a task has none that is a number from 0 to 1.
    """
    found: list[np.ndarray] = []
    for one, other in zip(dense, early, strict=True):
        if loss == "agreement":
            pairs = zip(one.texts, other.texts, strict=True)
            found.append(np.array([float(a != b) for a, b in pairs]))
            continue
        change = values(one, loss) - values(other, loss)
        found.append(change if loss in NET else np.maximum(change, 0.0))
    return np.concatenate(found)


def values(ran: Ran, loss: str) -> np.ndarray:
    """[D], the documents' own metric.

    Args:
        ran: A run.
        loss: For messages.

    Raises:
        AdaInferError: Where the task has none that is a number from 0 to 1.
    """
    metric, found = ran.scores()
    name = ran.documents.name
    if metric is None:
        raise AdaInferError(
            f"loss: {loss} needs a metric of single documents that is better the higher, which {name} does not have; "
            "give --loss agreement"
        )
    if not ((found >= 0) & (found <= 1)).all():
        odd = found[~((found >= 0) & (found <= 1))][0]
        raise AdaInferError(
            f"loss: {loss} needs a metric from 0 to 1, and {metric} of {name} is {odd:g} for a document; give --loss "
            "agreement"
        )
    return found


@dataclass
class _KeptTokens:
    """What ``AdaInferLM.observed_texts`` shows."""

    found: defaultdict[str, deque[Tokens]] = field(default_factory=lambda: defaultdict(deque))

    def text(self, arguments: Any, prompt: list[int], new: list[int]) -> None:
        """Keep the tokens of a text."""
        self.found[hash_args("generate_until", arguments)].append((prompt, new))


def _read(file: Path, identity: dict[str, Any]) -> list[dict[str, Any]] | None:
    """A part that an equal run finished; None where there is none."""
    try:
        found = json.loads(file.read_text())
        return found["rows"] if found["identity"] == identity else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
