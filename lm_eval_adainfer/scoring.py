"""Early exit of whole documents: which rows decide, at which block they leave, and what is scored there.

A document is all requests that lm-eval compares with each other. It has one exit block, decided at the last tokens
of its distinct contexts (docs/numbers.md, "One decision per document").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lm_eval_adainfer import features
from lm_eval_adainfer.anatomy import Anatomy, BatchRule
from lm_eval_adainfer.answers import ExitTrace
from lm_eval_adainfer.counting import FlopCounter
from lm_eval_adainfer.errors import UnsupportedModelError
from lm_eval_adainfer.forward import BlockState, run_blocks
from lm_eval_adainfer.prefixes import Continued, Load, Prefix, contexts
from lm_eval_adainfer.strategies.base import Schedule, Stopper

CHUNK_ELEMENTS = 2**25  # logits held at once when scoring many positions (128 MiB in float32)


@dataclass
class Answer:
    """One request's result, filled position by position: log-probability, greedy match, top token at the first."""

    request: int
    continuation: list[int]
    logprob: float = 0.0
    is_greedy: bool = True
    top1: bool = False


@dataclass
class Row:
    """One token row; it answers every request of its document with this context and this continuation[:-1].

    Attributes:
        tokens: The input: context + continuation[:-1], left-truncated to the model's window.
        scored: How many positions at the end are scored (the continuation's length).
        context: Which of the document's distinct contexts it has (index into the deciders); -1 for an empty one.
        answers: The requests it answers; their continuations have ``scored`` tokens.
        skip: How many of its first tokens a prefix has run.
    """

    tokens: list[int]
    scored: int
    context: int = -1
    answers: list[Answer] = field(default_factory=list)
    skip: int = 0

    @property
    def decision(self) -> int:
        """The position of the last context token."""
        return len(self.tokens) - self.scored


@dataclass
class Document:
    """The rows of one document, and what its run came to.

    Attributes:
        rows: Its token rows.
        deciders: Indices of the rows that decide: one per distinct context. Empty: it has no decision and, unless
            the strategy needs none, runs dense.
        exit_layer: The block it leaves after; None until decided.
        head_rows: Head rows computed for it (checks and scores).
        decisions: Times the stopper was asked for it.
        extra_flops: Operations of a deciding pass made before the scoring one.
        extra_block_tokens: Block executions x tokens of that pass.
        logged: With ``log_features``: per decider, ``layer`` and feature values.
        carried: Per decider, what the stopper keeps from one asked block to the next.
    """

    rows: list[Row]
    deciders: list[int]
    exit_layer: int | None = None
    head_rows: int = 0
    decisions: int = 0
    extra_flops: float = 0.0
    extra_block_tokens: int = 0
    logged: list[dict[str, list[float]]] = field(default_factory=list)
    carried: dict[int, Tensor] = field(default_factory=dict)

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(len(row.tokens) for row in self.rows)


class Engine:
    """Runs documents through the early-exit forward.

    Args:
        anatomy: The model.
        stopper: The strategy.
        schedule: After which blocks it is asked.
        softmax_dtype: As HFLM's; None keeps the logits' dtype.
        log_features: Record the features after every block up to the exit (diagnostic: not counted as FLOPs).
    """

    def __init__(
        self,
        anatomy: Anatomy,
        stopper: Stopper,
        schedule: Schedule,
        softmax_dtype: torch.dtype | None = None,
        log_features: bool = False,
    ):
        self.anatomy, self.stopper, self.schedule = anatomy, stopper, schedule
        self.softmax_dtype = softmax_dtype
        self.counter = FlopCounter(anatomy, stopper)
        self.checked = frozenset(schedule.blocks)
        self.logged_features = available_features(anatomy) if log_features else ()
        self._parts = features.needed_parts(stopper.features) if self.checked else []
        self._parts += [p for p in features.needed_parts(self.logged_features) if p not in self._parts]
        self.prefix: Prefix | None = None  # of the documents that are run next
        self.rule: BatchRule | None = None  # set where rows can continue prefixes: then contexts are run once
        self.prefix_tokens = 0  # tokens of which keys and values may stay
        self.head_rows = 0
        self.tokens = 0
        self.block_tokens = 0
        self.block_calls = 0

    # ------------------------------------------------------------------ documents
    def run(self, documents: Sequence[Document], batch_size: int) -> None:
        """Decide and score whole documents that are run together, or one that is larger than a batch.

        A larger one is decided first and scored second. Where its deciding rows fit one batch, they are scored in
        the pass that decides; else the deciding passes are counted on top.
        """
        load = self.load(documents)
        longest = max(d.longest for d in documents)
        if len(documents) > 1 or load.fits(batch_size, longest, self.prefix is not None):
            self._forward(documents, *self._shared(documents, load.shares, stays=False))
            return
        (document,) = documents
        once = load.shares and load.contexts <= batch_size
        once = once and load.contexts * load.longest_context <= self.prefix_tokens
        prefix, owner = self._shared(documents, once, stays=True)
        order = [*document.deciders, *(i for i in range(len(document.rows)) if i not in document.deciders)]
        if len(document.deciders) > batch_size:
            self._decide_in_parts(document, batch_size)
        rows = max(1, batch_size * longest // load.longest_rest) if once else batch_size
        for start in range(0, len(order), rows):
            part = order[start : start + rows]
            deciders = list(range(len(document.deciders))) if start == 0 and document.exit_layer is None else []
            piece = Document([document.rows[i] for i in part], deciders, document.exit_layer)
            self._forward([piece], prefix, [owner[i] for i in part])
            document.exit_layer = piece.exit_layer
            document.head_rows += piece.head_rows
            document.decisions += piece.decisions
            document.logged += piece.logged

    def load(self, documents: Sequence[Document]) -> Load:
        """What these come to when they are run together: their rows alone, where nothing can be run once."""
        if self.rule is None:
            return Load(sum(len(d.rows) for d in documents))
        return reduce(Load.and_also, (Load.of(d, self._skip) for d in documents))

    @property
    def _skip(self) -> int:
        """Tokens of the documents' prefix."""
        return 0 if self.prefix is None else self.prefix.lengths[0]

    def _shared(self, documents: Sequence[Document], once: bool, stays: bool) -> tuple[Prefix | None, list[int]]:
        """What the rows of these documents continue, and which of its rows each; sets their ``skip``.

        Args:
            documents: They begin with ``self.prefix``.
            once: Run every distinct context once.
            stays: For several forwards.
        """
        rows = [row for d in documents for row in d.rows]
        if not once:
            for row in rows:
                row.skip = self._skip
            return self.prefix, [0] * len(rows)
        assert self.rule is not None
        found, owner = contexts(documents, self._skip)
        for row in rows:
            row.skip = row.decision
        return Prefix(self.anatomy, found, self.rule, self.prefix, stays), owner

    @torch.no_grad()
    def _forward(self, documents: Sequence[Document], prefix: Prefix | None, owner: Sequence[int]) -> None:
        """One forward over the rows of these documents; each leaves at its own block."""
        flow = [(d, i) for d in documents for i in range(len(d.rows))]
        n_blocks = self.anatomy.n_blocks
        ran = _executed(prefix)
        for document in documents:
            document.logged = [{"layer": []} for _ in document.deciders] if self.logged_features else []

        def after_block(state: BlockState) -> Tensor | None:
            nonlocal flow
            k = state.block
            self.block_calls += 1
            self.block_tokens += sum(len(d.rows[i].tokens) - d.rows[i].skip for d, i in flow)
            at = {(id(d), i): r for r, (d, i) in enumerate(flow)}
            open_documents = list({id(d): d for d, _ in flow}.values())
            ready: dict[int, Tensor] = {}  # row in flow -> logits at its decision position
            for document in open_documents:
                if k == n_blocks:
                    document.exit_layer = n_blocks
            undecided = [d for d in open_documents if d.exit_layer is None or (self.logged_features and k == n_blocks)]
            if undecided and (k in self.checked or self.logged_features):
                ready = self._check(state, undecided, at)
            leaving = {id(d) for d in open_documents if d.exit_layer == k}
            if not leaving:
                return None
            self._score(state, [(r, d, d.rows[i]) for r, (d, i) in enumerate(flow) if id(d) in leaving], ready)
            keep = [r for r, (d, _) in enumerate(flow) if id(d) not in leaving]
            flow = [flow[r] for r in keep]
            return torch.tensor(keep, dtype=torch.long)

        self.tokens += sum(len(d.rows[i].tokens) for d, i in flow)
        rows = self.pad([d.rows[i].tokens[d.rows[i].skip :] for d, i in flow])
        run_blocks(
            self.anatomy, rows, after_block, self._parts, None if prefix is None else Continued(prefix, owner)
        )
        self.block_tokens += _executed(prefix) - ran

    def pad(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """[B, S] token ids, right-padded with 0 (causal attention never looks there)."""
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row, dtype=torch.long)
        return ids.to(self.anatomy.input_device)

    def _check(self, state: BlockState, documents: Sequence[Document], at: dict, ask: bool = True) -> dict[int, Tensor]:
        """Ask the stopper for every decider of ``documents``; set ``exit_layer`` of those that stop.

        With ``ask=False`` features are only logged.

        Returns:
            Logits at the decision positions, by row in flow, for scoring to use again.
        """
        k = state.block
        asked = ask and k in self.checked and k < self.anatomy.n_blocks
        points = [
            (d, j, at[id(d), i], d.rows[i].decision - d.rows[i].skip)
            for d in documents
            for j, i in enumerate(d.deciders)
        ]
        needs_head = asked and features.needs_head(self.stopper.features)
        logits = None
        stops: list[bool] = []
        if points and ((asked and self.stopper.features) or self.logged_features):
            rows = torch.tensor([p[2] for p in points], device=state.hidden.device)
            positions = torch.tensor([p[3] for p in points], device=state.hidden.device)
            if needs_head or self.logged_features:
                logits = self.anatomy.logits(state.hidden[rows, positions])
            carried = self._carried(points, state.hidden.device) if asked else None
            n_blocks = self.anatomy.n_blocks
            seen = features.observe(self.stopper.features, state, rows, positions, logits, n_blocks, carried)
            if self.logged_features:
                self._log(k, points, features.compute(self.logged_features, seen).tolist())
            if asked:
                stops = (self.stopper.ask(seen, features.compute(self.stopper.features, seen), carried) > 0).tolist()
                if carried is not None:
                    for (document, j, *_), kept in zip(points, carried, strict=True):
                        document.carried[j] = kept
        if not asked:
            return {}
        if not self.stopper.features:  # fixed:N asks nothing, so documents without a decision follow it too
            for document in documents:
                document.exit_layer = k
            return {}
        verdict: dict[int, bool] = {}
        for (document, *_), stop in zip(points, stops, strict=True):
            verdict[id(document)] = verdict.get(id(document), True) and stop
            document.decisions += 1
            document.head_rows += needs_head
        self.head_rows += len(points) * needs_head
        for document in documents:
            if verdict.get(id(document), False):
                document.exit_layer = k
        if not needs_head or logits is None:
            return {}
        return {p[2]: logits[n] for n, p in enumerate(points)}

    def _carried(self, points: Sequence[Any], device: torch.device) -> Tensor | None:
        """[points, carries] of what the stopper keeps from block to block; None where it keeps nothing."""
        if not self.stopper.carries:
            return None
        fresh = torch.zeros(self.stopper.carries)
        return torch.stack([document.carried.get(j, fresh).to(device) for document, j, *_ in points])

    def _log(self, k: int, points: Sequence[Any], values: list[list[float]]) -> None:
        for (document, j, *_), row in zip(points, values, strict=True):
            document.logged[j]["layer"].append(k)
            for name, value in zip(self.logged_features, row, strict=True):
                document.logged[j].setdefault(name, []).append(value)

    def _score(self, state: BlockState, rows: Sequence[tuple[int, Document, Row]], ready: dict[int, Tensor]) -> None:
        """Score these rows at this block; a decision's logits are not computed twice."""
        points = [(r, row.decision - row.skip + j, row, j) for r, _, row in rows for j in range(row.scored)]
        known = [p for p in points if p[3] == 0 and p[0] in ready]
        fresh = [p for p in points if not (p[3] == 0 and p[0] in ready)]
        for _, document, row in rows:
            document.head_rows += row.scored
        for r, document, _ in rows:
            document.head_rows -= r in ready
        self.head_rows += len(fresh)
        if known:
            score_points(torch.stack([ready[p[0]] for p in known]), known, self.softmax_dtype)
        self.score_fresh(state, fresh)

    def score_fresh(self, state: BlockState, points: Sequence[tuple[int, int, Row, int]]) -> None:
        """Score positions at this block: the head's logits of all of them, so many at a time as memory allows."""
        size = max(1, CHUNK_ELEMENTS // self.anatomy.vocab_size)
        for start in range(0, len(points), size):
            chunk = points[start : start + size]
            hidden = state.hidden[[p[0] for p in chunk], [p[1] for p in chunk]]
            score_points(self.anatomy.logits(hidden), chunk, self.softmax_dtype)

    @torch.no_grad()
    def _decide_in_parts(self, document: Document, batch_size: int) -> None:
        """Decide a document whose distinct contexts don't fit one batch: the first block where all say stop."""
        candidates = list(self.schedule.blocks)
        if not self.stopper.features:  # fixed:N asks nothing
            document.exit_layer = candidates[0] if candidates else self.anatomy.n_blocks
            return
        for start in range(0, len(document.deciders), batch_size):
            if not candidates and not self.logged_features:
                break
            rows = [document.rows[i] for i in document.deciders[start : start + batch_size]]
            rows = [Row(row.tokens[: row.decision + 1], 1) for row in rows]  # the decision reads nothing behind it
            probe = Document(rows, list(range(len(rows))))
            if self.logged_features:
                probe.logged = [{"layer": []} for _ in rows]
            candidates = self._stopping_blocks(probe, candidates)
            document.logged += probe.logged
            document.decisions += probe.decisions
            document.head_rows += probe.head_rows
            for row in rows:
                document.extra_flops += self.counter.blocks(probe.exit_layer or 0, len(row.tokens))
                document.extra_block_tokens += (probe.exit_layer or 0) * len(row.tokens)
        document.exit_layer = candidates[0] if candidates else self.anatomy.n_blocks
        for logged in document.logged:  # these passes may have gone deeper than the document does
            count = sum(k <= document.exit_layer for k in logged["layer"])
            logged.update({name: values[:count] for name, values in logged.items()})

    def _stopping_blocks(self, document: Document, candidates: Sequence[int]) -> list[int]:
        """Of the candidate blocks, those after which every decider of the document says stop."""
        at = {(id(document), i): i for i in range(len(document.rows))}
        found: list[int] = []
        depth = candidates[-1] if candidates else 0  # what deciding needs; logging goes on to the end
        end = self.anatomy.n_blocks if self.logged_features else depth

        def after_block(state: BlockState) -> Tensor | None:
            self.block_calls += 1
            self.block_tokens += sum(len(row.tokens) for row in document.rows)
            asks = state.block in candidates or bool(self.stopper.carries and state.block in self.checked)
            if asks or self.logged_features:
                self._check(state, [document], at, ask=asks)
                if document.exit_layer == state.block and state.block in candidates:
                    found.append(state.block)
                document.exit_layer = None
            if state.block < end:
                return None
            document.exit_layer = depth  # how deep this pass had to go, for counting
            return torch.empty(0, dtype=torch.long)

        self.tokens += sum(len(row.tokens) for row in document.rows)
        run_blocks(self.anatomy, self.pad([row.tokens for row in document.rows]), after_block, self._parts)
        return found

    def trace(self, document: Document, fingerprint: str) -> ExitTrace:
        """The exit trace of a document that was run."""
        layer = document.exit_layer
        assert layer is not None
        lengths = [len(row.tokens) for row in document.rows]
        deciders = [document.rows[i] for i in document.deciders] or document.rows
        prompt = sum(row.decision + 1 for row in deciders) / len(deciders)
        scored = sum(row.scored for row in document.rows)
        return ExitTrace(
            exit_layer=layer,
            n_blocks=self.counter.n_whole,
            flops_ratio=self.counter.flops_ratio(layer, prompt),
            layers_run=layer + document.extra_block_tokens / sum(lengths),
            flops=sum(self.counter.blocks(layer, s) for s in lengths)
            + document.extra_flops
            + self.counter.head(document.head_rows)
            + self.counter.decisions(document.decisions),
            flops_dense=sum(self.counter.dense(s) for s in lengths) + self.counter.head(scored),
            fingerprint=fingerprint,
            features=tuple(document.logged) if self.logged_features else None,
        )

    # ------------------------------------------------------------------ token by token
    @torch.no_grad()
    def run_tokens(self, rows: Sequence[Row]) -> list[list[int]]:
        """Score rows with a decision of its own for every scored token (``loglikelihood_rolling``).

        The values are those of each token's exit block; the saving is counted as if each token had been run only so
        far, since the rows themselves run on until their last token has stopped.

        Returns:
            Per row, the exit block of every scored position.
        """
        n_blocks = self.anatomy.n_blocks
        exits = [[n_blocks] * row.scored for row in rows]
        flow = list(range(len(rows)))
        points = [(r, row.decision + j, row, j) for r, row in enumerate(rows) for j in range(row.scored)]
        number = {id(row): r for r, row in enumerate(rows)}
        size = max(1, CHUNK_ELEMENTS // self.anatomy.vocab_size)
        carried: dict[tuple[int, int], Tensor] = {}  # (row, scored position) -> what the stopper keeps

        def after_block(state: BlockState) -> Tensor | None:
            nonlocal points, flow
            self.block_calls += 1
            self.block_tokens += sum(len(rows[r].tokens) for r in flow)
            if state.block not in self.checked and state.block < n_blocks:
                return None
            place = {r: n for n, r in enumerate(flow)}
            left = []
            for start in range(0, len(points), size):
                chunk = points[start : start + size]
                at = torch.tensor([place[p[0]] for p in chunk], device=state.hidden.device)
                positions = torch.tensor([p[1] for p in chunk], device=state.hidden.device)
                asks = state.block < n_blocks
                needs_head = features.needs_head(self.stopper.features) if asks else True
                logits = self.anatomy.logits(state.hidden[at, positions]) if needs_head else None
                stops = [True] * len(chunk)
                if asks:
                    keys, kept = [(p[0], p[3]) for p in chunk], None
                    if self.stopper.carries:
                        fresh = torch.zeros(self.stopper.carries, device=state.hidden.device)
                        kept = torch.stack([carried.get(key, fresh).to(fresh.device) for key in keys])
                    seen = features.observe(self.stopper.features, state, at, positions, logits, n_blocks, kept)
                    values = features.compute(self.stopper.features, seen)
                    stops = (self.stopper.ask(seen, values, kept) > 0).tolist()
                    if kept is not None:
                        carried.update(zip(keys, kept, strict=True))
                done = [n for n, stop in enumerate(stops) if stop]
                self.head_rows += len(chunk) if needs_head else len(done)
                if done and logits is None:
                    score_points(
                        self.anatomy.logits(state.hidden[at[done], positions[done]]),
                        [chunk[n] for n in done],
                        self.softmax_dtype,
                    )
                elif done:
                    assert logits is not None
                    score_points(logits[done], [chunk[n] for n in done], self.softmax_dtype)
                for n in done:
                    exits[number[id(chunk[n][2])]][chunk[n][3]] = state.block
                left += [p for p, stop in zip(chunk, stops, strict=True) if not stop]
            points = left
            going = {p[0] for p in points}
            keep = [n for n, r in enumerate(flow) if r in going]
            flow = [flow[n] for n in keep]
            return torch.tensor(keep, dtype=torch.long)

        self.tokens += sum(len(row.tokens) for row in rows)
        run_blocks(self.anatomy, self.pad([row.tokens for row in rows]), after_block, self._parts)
        return exits

    def trace_tokens(self, windows: Sequence[tuple[Row, list[int]]], fingerprint: str) -> ExitTrace:
        """The exit trace of a text made of windows, each with its scored tokens' exits; counted as if run.

        Tokens that are context only (a window's overlap) count to the last block on both sides.
        """
        n_blocks, count = self.anatomy.n_blocks, self.counter
        flops = dense = eq2 = 0.0
        layers: list[int] = []
        for row, exits in windows:
            depths = [n_blocks] * row.decision + exits
            for position, depth in enumerate(depths):
                flops += count.blocks(depth, 1, position + 1)
            dense += count.dense(len(row.tokens)) + count.head(row.scored)
            checks = sum(sum(k < depth for k in self.schedule.blocks) for depth in exits)
            asked = sum(sum(k <= depth for k in self.schedule.blocks) for depth in exits)
            if features.needs_head(self.stopper.features):  # the exit's own check is its score
                flops += count.head(checks)
            flops += count.head(row.scored) + (count.decisions(asked) if self.stopper.features else 0.0)
            eq2 += sum(count.flops_ratio(depth, row.decision + j + 1) for j, depth in enumerate(exits))
            layers += exits
        mean = sum(layers) / len(layers)
        return ExitTrace(mean, count.n_whole, eq2 / len(layers), mean, flops, dense, fingerprint)


def _executed(prefix: Prefix | None) -> int:
    """Block executions x tokens of a prefix and of what it continues."""
    return 0 if prefix is None else prefix.executed + _executed(prefix.parent)


def available_features(anatomy: Anatomy) -> tuple[str, ...]:
    """Every recorded feature that this model's blocks allow (a block without an attention part has no ``cos_attn``)."""
    names = []
    for name in features.RECORDED:
        try:
            for part in features.needed_parts([name]):
                for block in anatomy.blocks:
                    anatomy.part(block, part)
        except UnsupportedModelError:
            continue
        names.append(name)
    return tuple(names)


def score_points(
    logits: Tensor, points: Sequence[tuple[int, int, Row, int]], softmax_dtype: torch.dtype | None
) -> None:
    """Add the log-probabilities at some scored positions to their rows' answers.

    Args:
        logits: [n, V].
        points: n of (row in flow, position, row, index among the row's scored positions).
        softmax_dtype: Of the log-softmax; None keeps the logits' dtype (as HFLM).
    """
    if not points:
        return
    logprobs = F.log_softmax(logits, dim=-1, dtype=softmax_dtype)
    pairs = [(n, a, a.continuation[j]) for n, (_, _, row, j) in enumerate(points) for a in row.answers]
    index = torch.tensor([[n, token] for n, _, token in pairs], device=logits.device)
    values = logprobs[index[:, 0], index[:, 1]].tolist()
    top = logits.argmax(dim=-1).tolist()
    for (n, answer, token), value in zip(pairs, values, strict=True):
        answer.logprob += value
        answer.is_greedy = answer.is_greedy and top[n] == token
        if points[n][3] == 0:
            answer.top1 = top[n] == token
