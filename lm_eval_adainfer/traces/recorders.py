"""Recorders: what readers say of documents and generated texts, block by block, and the arrays that a trace holds.

A record is a document's or a token's. Under each reader's name it holds what the reader says after each of its blocks.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lm_eval.api.model import hash_args
from torch import Tensor
from tqdm import tqdm

from lm_eval_adainfer.harness.gold import right_requests
from lm_eval_adainfer.prefill.documents import Answer, Document, Row
from lm_eval_adainfer.prefill.forward import padded, run_blocks
from lm_eval_adainfer.prefill.observing import Read
from lm_eval_adainfer.prefill.scoring import positions_at_once, score_points
from lm_eval_adainfer.readers.base import HEAD, Reader
from lm_eval_adainfer.strategies import features
from lm_eval_adainfer.strategies.features import Observation
from lm_eval_adainfer.structure.state import BlockState
from lm_eval_adainfer.traces.plan import Plan

if TYPE_CHECKING:
    from lm_eval_adainfer.harness.model import AdaInferLM


class Recorder:
    """Keeps what readers say of documents that run dense, block by block (an ``observing.Observer``)."""

    def __init__(self, lm: AdaInferLM, plan: Plan, progress: Any = None):
        self.anatomy, self.softmax_dtype, self.plan = lm.anatomy, lm.softmax_dtype, plan
        self.parts: Sequence[str] = features.needed_parts(plan.features)
        self.readings = plan.readings
        self.progress = progress
        self.records: dict[int, dict[str, Any]] = {}  # id of a document's first request -> its record

    def after_block(self, state: BlockState, flow: Sequence[tuple[Document, Row]], read: Read) -> None:
        """Keep what the block says of these rows."""
        for reader, blocks in self.plan.readers:
            if state.block in blocks:
                self._note(reader, state, flow, read)
        if self.plan.hidden:
            deciding = [(r, document, row) for r, (document, row) in enumerate(flow) if document.decides(row)]
            states = [state.hidden[r, row.decision].to(torch.float16).cpu().numpy() for r, _, row in deciding]
            for (_, document, row), found in zip(deciding, states, strict=True):
                self._record(document)["hidden"][row.context].append(found)

    def _note(self, reader: Reader, state: BlockState, flow: Sequence[tuple[Document, Row]], read: Read) -> None:
        """Keep what one reader says: features and top tokens at decisions, scores at all scored positions."""
        names = self.plan.features if reader.same(HEAD) else self.plan.reader_features
        is_last = state.block == self.anatomy.n_blocks
        decides = [document.decides(row) for document, row in flow]
        rows = [row for _, row in flow]
        if not is_last:  # the last block's scores are the requests' answers, which are there
            rows = [
                Row(row.tokens, row.scored, row.context, [Answer(a.request, a.continuation) for a in row.answers])
                for row in rows
            ]
        places = [
            (r, j) for r, row in enumerate(rows) for j in range(row.scored) if not is_last or (decides[r] and j == 0)
        ]
        hidden = read(reader, places) if places else None
        chunk = positions_at_once(self.anatomy)
        for start in range(0, len(places), chunk):
            assert hidden is not None  # there are places
            some = places[start : start + chunk]
            logits = self.anatomy.logits(hidden[start : start + chunk])
            if not is_last:
                score_points(logits, [(rows[r], j) for r, j in some], self.softmax_dtype)
            deciding = [(n, r) for n, (r, j) in enumerate(some) if decides[r] and j == 0]
            if not deciding:
                continue
            device = state.hidden.device
            at = torch.tensor([r for _, r in deciding], device=device)
            positions = torch.tensor([rows[r].decision for _, r in deciding], device=device)
            choices = [flow[r][1].choices or () for _, r in deciding]
            values, tops = _read(names, state, at, positions, logits[[n for n, _ in deciding]], choices)
            for (_, r), value, top in zip(deciding, values, tops, strict=True):
                said = self._record(flow[r][0])["said"][reader.name]
                said["features"][rows[r].context].append(value)
                said["top"][rows[r].context].append(top)
        for (document, _), row in zip(flow, rows, strict=True):
            said = self._record(document)["said"][reader.name]
            for answer in row.answers:
                said["scores"].setdefault(answer.request, []).append(answer.logprob)
                said["greedy"].setdefault(answer.request, []).append(answer.is_greedy)

    def finished(self, documents: Sequence[Document]) -> None:
        """Tell the progress bar."""
        if self.progress is not None:
            self.progress.update(len(documents))

    def _record(self, document: Document) -> dict[str, Any]:
        key = document.rows[0].answers[0].request
        if key not in self.records:
            n = len(document.deciders)
            self.records[key] = {
                "document": document,
                "said": {name: _nothing_said(n) for name in self.plan.names},
                "hidden": [[] for _ in range(n)],
            }
        return self.records[key]


def _nothing_said(decisions: int) -> dict[str, Any]:
    """What a reader says: per decision features and top tokens, per request scores and greedy flags, block by block."""
    features_of, tops = ([[] for _ in range(decisions)] for _ in range(2))  # type: ignore[var-annotated]
    return {"features": features_of, "top": tops, "scores": {}, "greedy": {}}


class TextRecorder:
    """Keeps what a model generates dense, and then runs it once more to see every block at every new token."""

    def __init__(self, lm: AdaInferLM, plan: Plan):
        self.lm, self.plan = lm, plan
        self.texts: defaultdict[str, deque[tuple[list[int], list[int]]]] = defaultdict(deque)

    def text(self, arguments: Any, prompt: list[int], new: list[int]) -> None:
        """Keep the token ids of the prompt and the text of a request with these arguments."""
        self.texts[hash_args("generate_until", arguments)].append((prompt, new))

    @torch.no_grad()
    def records(self, instances: Sequence[Any]) -> list[dict[str, Any]]:
        """A record per new token of these instances' texts, in order."""
        texts = [self.texts[hash_args("generate_until", i.args)].popleft() for i in instances]
        records: list[dict[str, Any]] = [
            {"instance": i, "position": j, "prompt_tokens": len(prompt) + j, "hidden": [],
             "said": {name: {"features": [], "top": []} for name in self.plan.names}}
            for i, (prompt, new) in zip(instances, texts, strict=True)
            for j in range(len(new))
        ]  # fmt: skip
        starts = np.cumsum([0] + [len(new) for _, new in texts]).tolist()
        order = sorted(range(len(texts)), key=lambda n: -len(texts[n][0]) - len(texts[n][1]))
        size = int(self.lm.batch_size) if str(self.lm.batch_size).isdecimal() else 1
        anatomy, parts = self.lm.anatomy, features.needed_parts(self.plan.features)
        chunk = positions_at_once(anatomy)
        for begin in tqdm(range(0, len(order), size), desc="Tracing generated texts", disable=self.lm.rank != 0):
            batch = order[begin : begin + size]
            points = [(r, len(texts[n][0]) - 1 + j, starts[n] + j) for r, n in enumerate(batch)
                      for j in range(len(texts[n][1]))]  # fmt: skip

            def after_block(state: BlockState, points: Any = points) -> Tensor | None:
                device = state.hidden.device
                for some in (points[i : i + chunk] for i in range(0, len(points), chunk)):
                    at, positions = (torch.tensor([p[i] for p in some], device=device) for i in (0, 1))
                    hidden = state.hidden[at, positions]
                    for reader, blocks in self.plan.readers:
                        if state.block not in blocks:
                            continue
                        names = self.plan.features if reader.same(HEAD) else self.plan.reader_features
                        logits = anatomy.logits(reader.translate(state.block, hidden))
                        values, tops = _read(names, state, at, positions, logits)
                        for (_, _, n), row, top in zip(some, values, tops, strict=True):
                            records[n]["said"][reader.name]["features"].append(row)
                            records[n]["said"][reader.name]["top"].append(top)
                    if self.plan.hidden:
                        for (_, _, n), found in zip(some, hidden.to(torch.float16).cpu().numpy(), strict=True):
                            records[n]["hidden"].append(found)
                return torch.empty(0, dtype=torch.long) if state.block == anatomy.n_blocks else None

            tokens = [[*texts[n][0], *texts[n][1][:-1]] for n in batch]
            with self.lm._autocast():
                run_blocks(anatomy, padded(anatomy, tokens), after_block, parts)
        return records


def _read(
    names: Sequence[str],
    state: BlockState,
    rows: Tensor,
    positions: Tensor,
    logits: Tensor,
    choices: Sequence[Sequence[int]] | None = None,
) -> tuple[list[list[float]], list[int]]:
    """The features and the top tokens at some positions ([n] rows of the state and places in them) after a block.

    ``logits`` are a reader's there, [n, V], and ``choices`` the tokens of their choices, where they have any.
    """
    of_choices = features.choices_of(logits, choices or [()] * len(rows))
    values = features.compute(names, Observation(state, rows, positions, logits, choices=of_choices)).tolist()
    return values, logits.argmax(-1).tolist()


def arrays_of(
    task: Any, recorder: Recorder, instances: Sequence[Any], doc_ids: Sequence[int], plan: Plan
) -> dict[str, np.ndarray]:
    """A trace's arrays of documents that were recorded.

    Args:
        task: lm-eval's.
        recorder: It has seen them.
        instances: Their requests.
        doc_ids: The index in its split of every document of the task.
        plan: The recorder's.
    """
    rows, said, hidden = [], [], []
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
                    "request": numbers,
                    "right": [n in golds for n in numbers],
                    "gold": gold,
                    "gold_token": starts[0] if starts else -1,
                    "prompt_tokens": document.rows[decider].decision + 1,
                    "doc_id": doc_ids[first.doc_id],
                }
            )
            said.append(
                {
                    name: {
                        "features": of["features"][j],
                        "top": of["top"][j],
                        "scores": [of["scores"][a.request] for a in answers],
                        "greedy": [of["greedy"][a.request] for a in answers],
                    }
                    for name, of in record["said"].items()
                }
            )
            hidden.append(record["hidden"][j])
    width = max((len(row["request"]) for row in rows), default=0)
    request = np.full((len(rows), width), -1, dtype=np.int16)
    right = np.zeros((len(rows), width), dtype=np.uint8)
    for n, row in enumerate(rows):
        count = len(row["request"])
        request[n, :count], right[n, :count] = row["request"], row["right"]
    kinds = {"gold": np.int16, "gold_token": np.int32, "prompt_tokens": np.int32, "doc_id": np.int64}
    plain = {name: np.array([row[name] for row in rows], dtype=kind) for name, kind in kinds.items()}
    position = np.zeros(len(rows), dtype=np.int32)
    spoken = _said_arrays(said, hidden, plan, width)
    return {**plain, **spoken, "request": request, "right": right, "position": position}


def _said_arrays(
    said: Sequence[dict[str, Any]], hidden: Sequence[list[np.ndarray]], plan: Plan, width: int
) -> dict[str, np.ndarray]:
    """The arrays of what every reader says about N decisions, of at most ``width`` requests each, and their states."""
    found: dict[str, np.ndarray] = {}
    n = len(said)
    for reader, blocks in plan.readers:
        is_head = reader.same(HEAD)
        before = "" if is_head else f"{reader.name}/"
        names = plan.features if is_head else plan.reader_features
        mine = [of[reader.name] for of in said]
        values, tops = np.array([of["features"] for of in mine]), np.array([of["top"] for of in mine])
        found[f"{before}features"] = values.astype(np.float32).reshape(n, len(blocks), len(names))
        found[f"{before}top_token"] = tops.astype(np.int32).reshape(n, len(blocks))
        scores = np.full((n, len(blocks), width), np.nan, dtype=np.float32)
        greedy = np.zeros((n, len(blocks), width), dtype=np.uint8)
        for i, of in enumerate(mine):
            if count := len(of.get("scores", ())):
                scores[i, :, :count], greedy[i, :, :count] = np.array(of["scores"]).T, np.array(of["greedy"]).T
        found[f"{before}scores"], found[f"{before}greedy"] = scores, greedy
    if plan.hidden:
        shape = (n, plan.anatomy.n_blocks, plan.anatomy.block_hidden_size)
        found["hidden"] = np.array(hidden, dtype=np.float16).reshape(shape)
    return found


def text_arrays_of(records: Sequence[dict[str, Any]], doc_ids: Sequence[int], plan: Plan) -> dict[str, np.ndarray]:
    """A trace's arrays of generated texts, of which :meth:`TextRecorder.records` has made the records."""
    n = len(records)
    nothing = np.full(n, -1)
    return {
        **_said_arrays([r["said"] for r in records], [r["hidden"] for r in records], plan, 0),
        "request": np.zeros((n, 0), dtype=np.int16),
        "right": np.zeros((n, 0), dtype=np.uint8),
        "gold": nothing.astype(np.int16),
        "gold_token": nothing.astype(np.int32),
        "prompt_tokens": np.array([r["prompt_tokens"] for r in records], dtype=np.int32),
        "doc_id": np.array([doc_ids[r["instance"].doc_id] for r in records], dtype=np.int64),
        "position": np.array([r["position"] for r in records], dtype=np.int32),
    }
