"""A dense pass over documents that records what every block would have said: the data that stoppers are fitted on.

One instance of a trace (``file.py`` describes what it holds) is one decision: a document's distinct context, or a
token of a generated text.

While a file is being made, its finished documents lie in parts beside it (a folder, removed at the end), so a killed
run goes on from there.
"""

from __future__ import annotations

import logging
import shutil
from collections import defaultdict, deque
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lm_eval.api.model import hash_args
from torch import Tensor
from tqdm import tqdm

from lm_eval_adainfer import container
from lm_eval_adainfer._version import __version__
from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.harness.asking import Asking
from lm_eval_adainfer.harness.gold import right_requests
from lm_eval_adainfer.harness.identity import generation_settings, tokenizer_hash
from lm_eval_adainfer.prefill.documents import Answer, Document, Row
from lm_eval_adainfer.prefill.feature_log import available_features
from lm_eval_adainfer.prefill.forward import padded, run_blocks
from lm_eval_adainfer.prefill.observing import score_all
from lm_eval_adainfer.prefill.scoring import positions_at_once
from lm_eval_adainfer.strategies import features
from lm_eval_adainfer.strategies.features import Observation
from lm_eval_adainfer.structure.anatomy import Anatomy
from lm_eval_adainfer.structure.state import BlockState
from lm_eval_adainfer.tasks.qa import stable_hash
from lm_eval_adainfer.traces.file import OUTPUT_TYPES, VERSION, not_finite, read
from lm_eval_adainfer.traces.splits import SPLITS, documents_of

if TYPE_CHECKING:
    from lm_eval_adainfer.harness.model import AdaInferLM

PART_DOCUMENTS = 128  # a killed run loses at most so many finished ones
_logger = logging.getLogger(__name__)


class Recorder:
    """Keeps every block's features, top token and scores of documents that run dense (an ``observing.Observer``)."""

    def __init__(self, lm: AdaInferLM, progress: Any = None):
        self.anatomy, self.softmax_dtype = lm.anatomy, lm.softmax_dtype
        self.names = available_features(lm.anatomy)
        self.parts: Sequence[str] = features.needed_parts(self.names)
        self.progress = progress
        self.records: dict[int, dict[str, Any]] = {}  # id of a document's first request -> its record

    def after_block(self, state: BlockState, flow: Sequence[tuple[Document, Row]]) -> None:
        """Keep what the block says of these rows."""
        deciding = [(r, document, row) for r, (document, row) in enumerate(flow) if document.decides(row)]
        if deciding:
            device = state.hidden.device
            at = torch.tensor([r for r, _, _ in deciding], device=device)
            positions = torch.tensor([row.decision for _, _, row in deciding], device=device)
            choices = [row.choices or () for _, _, row in deciding]
            values, tops = _read(self.anatomy, self.names, state, at, positions, choices)
            for (_, document, row), value, top in zip(deciding, values, tops, strict=True):
                record = self._record(document)
                record["features"][row.context].append(value)
                record["top"][row.context].append(top)
        rows = [row for _, row in flow]
        if state.block < self.anatomy.n_blocks:  # the last block's scores are the requests' answers
            rows = [
                Row(row.tokens, row.scored, row.context, [Answer(a.request, a.continuation) for a in row.answers])
                for row in rows
            ]
            score_all(self.anatomy, state, rows, self.softmax_dtype)
        for (document, _), row in zip(flow, rows, strict=True):
            record = self._record(document)
            for answer in row.answers:
                record["scores"].setdefault(answer.request, []).append(answer.logprob)
                record["greedy"].setdefault(answer.request, []).append(answer.is_greedy)

    def finished(self, documents: Sequence[Document]) -> None:
        """Tell the progress bar."""
        if self.progress is not None:
            self.progress.update(len(documents))

    def _record(self, document: Document) -> dict[str, Any]:
        key = document.rows[0].answers[0].request
        if key not in self.records:
            self.records[key] = {
                "document": document,
                "features": [[] for _ in document.deciders],
                "top": [[] for _ in document.deciders],
                "scores": {},
                "greedy": {},
            }
        return self.records[key]


class TextRecorder:
    """Keeps what a model generates dense, and then runs it once more to see every block at every new token."""

    def __init__(self, lm: AdaInferLM):
        self.lm, self.names = lm, available_features(lm.anatomy)
        self.texts: defaultdict[str, deque[tuple[list[int], list[int]]]] = defaultdict(deque)

    def text(self, arguments: Any, prompt: list[int], new: list[int]) -> None:
        """Keep the token ids of the prompt and the text of a request with these arguments."""
        self.texts[hash_args("generate_until", arguments)].append((prompt, new))

    @torch.no_grad()
    def records(self, instances: Sequence[Any]) -> list[dict[str, Any]]:
        """A record per new token of these instances' texts, in order."""
        texts = [self.texts[hash_args("generate_until", i.args)].popleft() for i in instances]
        records: list[dict[str, Any]] = [
            {"instance": i, "position": j, "prompt_tokens": len(prompt) + j, "features": [], "top_token": []}
            for i, (prompt, new) in zip(instances, texts, strict=True)
            for j in range(len(new))
        ]
        starts = np.cumsum([0] + [len(new) for _, new in texts]).tolist()
        order = sorted(range(len(texts)), key=lambda n: -len(texts[n][0]) - len(texts[n][1]))
        size = int(self.lm.batch_size) if str(self.lm.batch_size).isdecimal() else 1
        anatomy, parts = self.lm.anatomy, features.needed_parts(self.names)
        chunk = positions_at_once(anatomy)
        for begin in tqdm(range(0, len(order), size), desc="Tracing generated texts", disable=self.lm.rank != 0):
            batch = order[begin : begin + size]
            points = [(r, len(texts[n][0]) - 1 + j, starts[n] + j) for r, n in enumerate(batch)
                      for j in range(len(texts[n][1]))]  # fmt: skip

            def after_block(state: BlockState, points: Any = points) -> Tensor | None:
                device = state.hidden.device
                for some in (points[i : i + chunk] for i in range(0, len(points), chunk)):
                    at, positions = (torch.tensor([p[i] for p in some], device=device) for i in (0, 1))
                    values, tops = _read(anatomy, self.names, state, at, positions)
                    for (_, _, n), row, top in zip(some, values, tops, strict=True):
                        records[n]["features"].append(row)
                        records[n]["top_token"].append(top)
                return torch.empty(0, dtype=torch.long) if state.block == anatomy.n_blocks else None

            tokens = [[*texts[n][0], *texts[n][1][:-1]] for n in batch]
            with self.lm._autocast():
                run_blocks(anatomy, padded(anatomy, tokens), after_block, parts)
        return records


def _read(
    anatomy: Anatomy,
    names: Sequence[str],
    state: BlockState,
    rows: Tensor,
    positions: Tensor,
    choices: Sequence[Sequence[int]] | None = None,
) -> tuple[list[list[float]], list[int]]:
    """The features and the top tokens at some positions ([n] rows of the state and places in them) after a block.

    ``choices`` are the tokens of their choices, where they have any.
    """
    logits = anatomy.logits(state.hidden[rows, positions])
    of_choices = features.choices_of(logits, choices or [()] * len(rows))
    values = features.compute(names, Observation(state, rows, positions, logits, choices=of_choices)).tolist()
    return values, logits.argmax(-1).tolist()


def trace(
    lm: AdaInferLM,
    tasks: dict[str, Any],
    output: str | Path,
    num_fewshot: int | Sequence[int] | None = None,
    split: str = "train",
    limit: int | None = None,
    seed: int = 0,
    fewshot_seed: int = 1234,
    asked: Asking | None = None,
) -> list[Path]:
    """Trace tasks, a file for each and each number of shots; what an earlier, equal call finished is kept.

    Args:
        lm: The model; its stopper does not matter.
        tasks: Name to lm-eval task, as ``TaskManager.load(...)["tasks"]``.
        output: The folder.
        num_fewshot: Shots per document, or several such numbers; None takes the task's own.
        split: ``train``: the task's training split, or, where it has none, the 30% of its evaluation documents that a
            fixed hash sets apart for fitting. ``test``: its evaluation documents without these.
        limit: At most so many documents, drawn with ``seed``.
        seed: Of that draw.
        fewshot_seed: Of the shots, as ``lm_eval``'s.
        asked: Chat template, system instruction and the like; by default none.

    Returns:
        The files.

    Raises:
        AdaInferError: On a task that can't be traced, or a file there that an unequal call made.
    """
    check_arguments(split, limit, num_fewshot)
    for name, task in tasks.items():
        if task.OUTPUT_TYPE not in OUTPUT_TYPES:
            raise AdaInferError(f"tasks: {name} is a {task.OUTPUT_TYPE} task; traced are {', '.join(OUTPUT_TYPES)}")
    asked = asked or Asking()
    files: list[Path] = []
    model = model_identity(lm)
    numbers = list(num_fewshot) if isinstance(num_fewshot, Sequence) else [num_fewshot]
    for number in numbers:
        for name, task in tasks.items():
            shots = number if number is not None else task.get_config("num_fewshot") or 0
            path = Path(output) / f"{name}_{shots}shot_{split}.trace"
            files.append(path)
            if len(numbers) > 1:
                _logger.info("%s: file %d of %d", path, len(files), len(numbers) * len(tasks))
            with documents_of(task, name, split, limit, seed, shots) as doc_ids:
                task.set_fewshot_seed(seed=fewshot_seed)
                asked.build_requests(lm, task)
                instances = _traced_instances(task, name)
                identity = {
                    **model,
                    "task": name,
                    "output_type": task.OUTPUT_TYPE,
                    "task_version": str(task.VERSION),
                    "num_fewshot": shots,
                    "split": split,
                    "limit": limit,
                    "seed": seed,
                    "fewshot_seed": fewshot_seed,
                    **asked.identity(lm, task.OUTPUT_TYPE),
                    "requests": f"{stable_hash(*(text for i in instances for text in i.args)):x}"[:16],
                }
                if path.exists():
                    found, _ = read(path)
                    different = [key for key, value in identity.items() if found.get(key) != value]
                    if different:
                        raise AdaInferError(
                            f"output: {path} was made with other settings ({different[0]} was "
                            f"{found.get(different[0])!r}, not {identity[different[0]]!r}); give another folder"
                        )
                    _logger.info("%s is there already, made with the same settings", path)
                    shutil.rmtree(_parts_folder(path), ignore_errors=True)
                    continue
                arrays = _in_parts(lm, task, name, instances, path, identity, doc_ids)
            meta = {
                **identity,
                "features": list(available_features(lm.anatomy)),
                "documents": len(doc_ids),
                "block_hidden_size": lm.anatomy.block_hidden_size,
                "version": __version__,
            }
            whole = _parts_folder(path) / "whole"  # there, what a kill leaves half written is removed with the parts
            container.write(whole, "trace", VERSION, meta, arrays)
            whole.replace(path)
            shutil.rmtree(_parts_folder(path), ignore_errors=True)
    return files


def _traced_instances(task: Any, name: str) -> list[Any]:
    """The requests that a task's file holds: where documents mix kinds, those of the task's own output type.

    Raises:
        AdaInferError: Where it has none of these.
    """
    kind = "generate_until" if task.OUTPUT_TYPE == "generate_until" else "loglikelihood"
    chosen = [i for i in task.instances if i.request_type == kind]
    others = ", ".join(sorted({i.request_type for i in task.instances} - {kind}))
    if others and not chosen:
        raise AdaInferError(
            f"tasks: {name} is a {task.OUTPUT_TYPE} task, but its documents make {others} requests alone, so there is "
            "nothing of its kind to trace"
        )
    if others:
        _logger.warning("tasks: documents of %s also make %s requests; only those of %s are traced", name, others, kind)
    return chosen


def _parts_folder(path: Path) -> Path:
    return path.with_name(f"{path.name}.parts")


def _in_parts(
    lm: AdaInferLM,
    task: Any,
    name: str,
    asked: Sequence[Any],
    path: Path,
    identity: dict[str, Any],
    doc_ids: Sequence[int],
) -> dict[str, np.ndarray]:
    """Arrays of a task's documents, made and kept so many at a time; parts that an equal call left are taken over."""
    by_document: dict[int, list[Any]] = defaultdict(list)
    for instance in asked:
        by_document[instance.doc_id].append(instance)
    order = list(by_document)
    parts: list[dict[str, np.ndarray]] = []
    warned = False
    with tqdm(total=len(order), desc=f"Tracing {path.stem}", unit="doc", disable=lm.rank != 0) as progress:
        for start in range(0, len(order), PART_DOCUMENTS):
            chosen = order[start : start + PART_DOCUMENTS]
            file = _parts_folder(path) / f"{start:08d}.part"
            mine = {**identity, "documents": chosen}
            found = _read_part(file, mine)
            if found is None:
                instances = [i for doc in chosen for i in by_document[doc]]
                found = _record(lm, task, name, instances, doc_ids, progress)
                container.write(file, "part", VERSION, mine, found)
            else:
                progress.update(len(chosen))
            if len(found["top_token"]):
                parts.append(found)
                odd = not_finite(found["features"], available_features(lm.anatomy)).any(axis=(0, 2))
                if odd.any() and not warned:
                    warned = True
                    _logger.warning(
                        "traces: %s will hold NaN or infinite features (from block %d on), and fit, calibrate and "
                        "replay refuse such a trace; trace in a dtype that does not overflow",
                        path, odd.argmax() + 1,
                    )  # fmt: skip
    if not parts:
        why = "generated no token" if task.OUTPUT_TYPE == "generate_until" else "has no document with a context"
        raise AdaInferError(f"tasks: {name} {why}, so there is no decision to trace")
    width = max(part["request"].shape[1] for part in parts)
    for part in parts:  # documents of one part may have fewer requests than those of another
        more = width - part["request"].shape[1]
        for key, nothing in (("request", -1), ("right", 0), ("scores", np.nan), ("greedy", 0)):
            space = [(0, 0)] * (part[key].ndim - 1) + [(0, more)]
            part[key] = np.pad(part[key], space, constant_values=nothing)
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def _read_part(file: Path, identity: dict[str, Any]) -> dict[str, np.ndarray] | None:
    """A part that an equal call finished; None where there is none, or another call's."""
    if not file.exists():
        return None
    try:
        found, arrays = container.read(file, "part", VERSION, "output")
    except AdaInferError:
        return None
    return arrays if found == identity else None


def _record(
    lm: AdaInferLM, task: Any, name: str, instances: Sequence[Any], doc_ids: Sequence[int], progress: Any
) -> dict[str, np.ndarray]:
    """Arrays of some documents' instances."""
    if task.OUTPUT_TYPE == "generate_until":
        texts = TextRecorder(lm)
        with lm.observed_texts(texts):
            lm.generate_until(list(instances), disable_tqdm=True)
        records = texts.records(instances)
        progress.update(len({i.doc_id for i in instances}))
        return _text_arrays(records, doc_ids, lm.anatomy.n_blocks, len(texts.names))
    recorder = Recorder(lm, progress)
    with lm.engine.observed(recorder):
        lm.loglikelihood(list(instances), disable_tqdm=True)
    return _arrays(task, recorder, instances, doc_ids, lm.anatomy.n_blocks)


def check_arguments(split: str, limit: int | None, num_fewshot: int | Sequence[int] | None) -> None:
    """Raise AdaInferError where these make no sense; no model is needed for that."""
    if split not in SPLITS:
        raise AdaInferError(f"split: {split!r} is none of {', '.join(SPLITS)}")
    if limit is not None and limit < 1:
        raise AdaInferError(f"limit: {limit} documents are none; give 1 or more")
    shots = [num_fewshot] if isinstance(num_fewshot, int) else num_fewshot or []
    if num_fewshot is not None and not shots:
        raise AdaInferError("num_fewshot: no number is given; give 5, say, or 0,5,10")
    for number in shots:
        if number < 0:
            raise AdaInferError(f"num_fewshot: {number} is negative; give 0 or more")
    if len(set(shots)) < len(shots):
        raise AdaInferError(f"num_fewshot: {','.join(map(str, shots))} names a number twice; give each once")


def model_identity(lm: AdaInferLM) -> dict[str, Any]:
    """What a trace or a stopper says about its model."""
    return {
        "model": lm._model_name(),
        "n_blocks": lm.anatomy.n_blocks,
        "head_hash": lm.anatomy.head_hash(),
        "weights_hash": lm.anatomy.weights_hash(),
        "tokenizer_hash": tokenizer_hash(lm.tokenizer),
        "generation_config": generation_settings(lm.model),
        "max_length": lm.max_length,
        "dtype": str(lm._dtype()),
        "autocast": str(lm.mixed_precision_dtype),
        "add_bos_token": str(lm.add_bos_token),
        "hidden_size": lm.anatomy.hidden_size,
        "vocab_size": lm.anatomy.vocab_size,
        "block_weights": lm.anatomy.block_weights,
    }


def _arrays(
    task: Any, recorder: Recorder, instances: Sequence[Any], doc_ids: Sequence[int], n_blocks: int
) -> dict[str, np.ndarray]:
    rows = []
    for key in sorted(recorder.records):
        record = recorder.records[key]
        document: Document = record["document"]
        first = instances[key]
        golds = [g for g in right_requests(task, first.doc) if g >= 0]
        gold = golds[0] if golds else -1
        for j, decider in enumerate(document.deciders):
            answers = sorted(
                (a for row in document.rows if row.context == j for a in row.answers), key=lambda a: a.request
            )
            numbers = [instances[a.request].idx for a in answers]
            starts = [a.continuation[0] for a, n in zip(answers, numbers, strict=True) if n == gold]
            rows.append(
                {
                    "features": record["features"][j],
                    "top_token": record["top"][j],
                    "scores": [record["scores"][a.request] for a in answers],
                    "greedy": [record["greedy"][a.request] for a in answers],
                    "request": numbers,
                    "right": [n in golds for n in numbers],
                    "gold": gold,
                    "gold_token": starts[0] if starts else -1,
                    "prompt_tokens": document.rows[decider].decision + 1,
                    "doc_id": doc_ids[first.doc_id],
                }
            )
    width = max((len(row["request"]) for row in rows), default=0)
    scores = np.full((len(rows), n_blocks, width), np.nan, dtype=np.float32)
    greedy = np.zeros((len(rows), n_blocks, width), dtype=np.uint8)
    request = np.full((len(rows), width), -1, dtype=np.int16)
    right = np.zeros((len(rows), width), dtype=np.uint8)
    for n, row in enumerate(rows):
        count = len(row["request"])
        scores[n, :, :count], greedy[n, :, :count] = np.array(row["scores"]).T, np.array(row["greedy"]).T
        request[n, :count], right[n, :count] = row["request"], row["right"]
    kinds: dict[str, tuple[Any, tuple[int, ...]]] = {
        "features": (np.float32, (n_blocks, len(recorder.names))), "top_token": (np.int32, (n_blocks,)),
        "gold": (np.int16, ()), "gold_token": (np.int32, ()), "prompt_tokens": (np.int32, ()), "doc_id": (np.int64, ()),
    }  # fmt: skip
    plain = {
        name: np.array([row[name] for row in rows], dtype=kind).reshape(len(rows), *shape)
        for name, (kind, shape) in kinds.items()
    }
    position = np.zeros(len(rows), dtype=np.int32)
    return {**plain, "scores": scores, "greedy": greedy, "request": request, "right": right, "position": position}


def _text_arrays(
    records: Sequence[dict[str, Any]], doc_ids: Sequence[int], n_blocks: int, n_features: int
) -> dict[str, np.ndarray]:
    n = len(records)
    nothing = np.full(n, -1)
    return {
        "features": np.array([r["features"] for r in records], dtype=np.float32).reshape(n, n_blocks, n_features),
        "top_token": np.array([r["top_token"] for r in records], dtype=np.int32).reshape(n, n_blocks),
        "scores": np.zeros((n, n_blocks, 0), dtype=np.float32),
        "greedy": np.zeros((n, n_blocks, 0), dtype=np.uint8),
        "request": np.zeros((n, 0), dtype=np.int16),
        "right": np.zeros((n, 0), dtype=np.uint8),
        "gold": nothing.astype(np.int16),
        "gold_token": nothing.astype(np.int32),
        "prompt_tokens": np.array([r["prompt_tokens"] for r in records], dtype=np.int32),
        "doc_id": np.array([doc_ids[r["instance"].doc_id] for r in records], dtype=np.int64),
        "position": np.array([r["position"] for r in records], dtype=np.int32),
    }
