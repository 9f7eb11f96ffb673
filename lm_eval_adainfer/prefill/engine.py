"""Early exit of whole documents: which rows decide, at which block they leave, and what is scored there.

A document is all requests that lm-eval compares with each other. It has one exit block, decided at the last tokens
of its distinct contexts (docs/numbers.md, "One decision per document").
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from lm_eval_adainfer.counting import FlopCounter
from lm_eval_adainfer.errors import UnsupportedModelError
from lm_eval_adainfer.prefill.documents import Document, Row
from lm_eval_adainfer.prefill.forward import Forward, run_blocks
from lm_eval_adainfer.prefill.planning import Load, contexts
from lm_eval_adainfer.prefill.prefixes import Continued, Prefix
from lm_eval_adainfer.prefill.scoring import CHUNK_ELEMENTS, score_points
from lm_eval_adainfer.records import ExitRecord
from lm_eval_adainfer.strategies import features
from lm_eval_adainfer.strategies.base import Schedule, Stopper
from lm_eval_adainfer.structure.anatomy import Anatomy
from lm_eval_adainfer.structure.arguments import BatchRule
from lm_eval_adainfer.structure.state import BlockState

TOGETHER_ROWS = 64  # of batches that go through the blocks together: a check costs little more than one of few rows
TOGETHER_TOKENS = 2**14  # of these batches, which bounds the memory that their hidden states take


@dataclass
class _Batch:
    """Documents that are run as one batch, and what their rows continue.

    Attributes:
        documents: Whole documents, or a piece of one.
        prefix: What the rows continue.
        owner: Per row, which of the prefix's rows.
        flow: The rows that have not left, with their documents.
        forward: Their way through the blocks.
    """

    documents: Sequence[Document]
    prefix: Prefix | None
    owner: Sequence[int]
    flow: list[tuple[Document, Row]] = field(init=False)
    forward: Forward = field(init=False)

    def __post_init__(self) -> None:
        self.flow = [(d, row) for d in self.documents for row in d.rows]


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
    def run(self, batches: Sequence[Sequence[Document]], batch_size: int) -> None:
        """Decide and score batches of whole documents that go through the blocks together (see :meth:`together`)."""
        first = batches[0]
        whole = self.load(first).fits(batch_size, max(d.longest for d in first), self.prefix is not None)
        if len(batches) == len(first) == 1 and not whole:
            self._run_in_pieces(first[0], batch_size)
            return
        self._run([_Batch(b, *self._shared(b, self.load(b).shares, stays=False)) for b in batches])

    def together(self, batches: Iterable[tuple[list[Document], int]]) -> Iterator[tuple[list[list[Document]], int]]:
        """Put neighbouring batches (with the batch size that they were made for) together, as far as this pays.

        A check reads the whole output head, whether for one row or for many; batches that go through the blocks side
        by side read it once. So it pays until a check has enough rows, and only where its cost can be seen at all.
        """
        found: list[list[Document]] = []
        rows = tokens = last = 0
        for batch, size in batches:
            load, longest = self.load(batch), batch[0].longest
            whole = load.fits(size, longest, self.prefix is not None)
            more = load.tokens(longest)
            if found and (not whole or rows + load.rows > TOGETHER_ROWS or tokens + more > TOGETHER_TOKENS):
                yield found, last
                found, rows, tokens = [], 0, 0
            if not whole:
                yield [batch], size
                continue
            found, rows, tokens, last = [*found, batch], rows + load.rows, tokens + more, size
        if found:
            yield found, last

    def _run_in_pieces(self, document: Document, batch_size: int) -> None:
        """A document that is larger than a batch is decided first and scored second.

        Where its deciding rows fit one batch, they are scored in the pass that decides; else the deciding passes are
        counted on top.
        """
        load, longest = self.load([document]), document.longest
        once = load.shares and load.contexts <= batch_size
        once = once and load.contexts * load.longest_context <= self.prefix_tokens
        prefix, owner = self._shared([document], once, stays=True)
        order = [*document.deciders, *(i for i in range(len(document.rows)) if i not in document.deciders)]
        if len(document.deciders) > batch_size:
            self._decide_in_parts(document, batch_size)
        rows = max(1, batch_size * longest // load.longest_rest) if once else batch_size
        for start in range(0, len(order), rows):
            part = order[start : start + rows]
            deciders = list(range(len(document.deciders))) if start == 0 and document.exit_layer is None else []
            piece = Document([document.rows[i] for i in part], deciders, document.exit_layer)
            self._run([_Batch([piece], prefix, [owner[i] for i in part])])
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
    def _run(self, batches: Sequence[_Batch]) -> None:
        """Take batches through the blocks side by side; every document leaves at its own block."""
        anatomy, n_blocks = self.anatomy, self.anatomy.n_blocks
        prefixes = {id(p): p for batch in batches for p in _lineage(batch.prefix)}.values()
        ran = sum(p.executed for p in prefixes)
        for batch in batches:
            self.tokens += sum(len(row.tokens) for _, row in batch.flow)
            ids = self.pad([row.tokens[row.skip :] for _, row in batch.flow])
            continued = None if batch.prefix is None else Continued(batch.prefix, batch.owner)
            batch.forward = Forward(anatomy, ids, self._parts, continued)
            for document in batch.documents:
                document.logged = [{"layer": []} for _ in document.deciders] if self.logged_features else []
        for k in range(1, n_blocks + 1):
            states = [batch.forward.advance() for batch in batches]
            self.block_calls += len(batches)
            self.block_tokens += sum(len(row.tokens) - row.skip for batch in batches for _, row in batch.flow)
            at = {id(row): (n, r) for n, batch in enumerate(batches) for r, (_, row) in enumerate(batch.flow)}
            documents = list({id(d): d for batch in batches for d, _ in batch.flow}.values())
            ready: dict[int, Tensor] = {}  # id of a row -> logits at its decision position
            undecided = [d for d in documents if d.exit_layer is None or (self.logged_features and k == n_blocks)]
            if k == n_blocks:
                for document in documents:
                    document.exit_layer = n_blocks
            if undecided and (k in self.checked or self.logged_features):
                ready = self._check(states, undecided, at)
            leaving = {id(d) for d in documents if d.exit_layer == k}
            if not leaving:
                continue
            self._score(states, [d for d in documents if id(d) in leaving], at, ready)
            for batch in batches:
                keep = [r for r, (d, _) in enumerate(batch.flow) if id(d) not in leaving]
                if keep and len(keep) < len(batch.flow):
                    batch.forward.keep(torch.tensor(keep, dtype=torch.long))
                batch.flow = [batch.flow[r] for r in keep]
            batches = [batch for batch in batches if batch.flow]
            if not batches:
                break
        self.block_tokens += sum(p.executed for p in prefixes) - ran

    def pad(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """[B, S] token ids, right-padded with 0 (causal attention never looks there)."""
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row, dtype=torch.long)
        return ids.to(self.anatomy.input_device)

    def _check(
        self,
        states: Sequence[BlockState],
        documents: Sequence[Document],
        at: dict[int, tuple[int, int]],
        ask: bool = True,
    ) -> dict[int, Tensor]:
        """Ask the stopper for every decider of ``documents``; set ``exit_layer`` of those that stop.

        Args:
            states: Of the batches, after the same block.
            documents: Batch by batch.
            at: Id of a row -> (batch, row in flow).
            ask: Else features are only logged.

        Returns:
            Logits at the decision positions, by id of the row, for scoring to use again.
        """
        k = states[0].block
        asked = ask and k in self.checked and k < self.anatomy.n_blocks
        points = [(d, j, d.rows[i]) for d in documents for j, i in enumerate(d.deciders)]
        needs_head = asked and features.needs_head(self.stopper.features)
        logits = None
        stops: list[bool] = []
        if points and ((asked and self.stopper.features) or self.logged_features):
            state = BlockState.at(states, [(*at[id(row)], row.decision - row.skip) for _, _, row in points])
            device = state.hidden.device
            rows = torch.arange(len(points), device=device)
            positions = torch.zeros_like(rows)
            if needs_head or self.logged_features:
                logits = self.anatomy.logits(state.hidden[:, 0])
            carried = self._carried(points, device) if asked else None
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
        return {id(row): logits[n] for n, (_, _, row) in enumerate(points)}

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

    def _score(
        self,
        states: Sequence[BlockState],
        documents: Sequence[Document],
        at: dict[int, tuple[int, int]],
        ready: dict[int, Tensor],
    ) -> None:
        """Score the rows in flow of these documents; a decision's logits are not computed twice."""
        rows = [(d, row) for d in documents for row in d.rows if id(row) in at]
        known = [row for _, row in rows if id(row) in ready]
        fresh = [(row, j) for _, row in rows for j in range(row.scored) if j > 0 or id(row) not in ready]
        for document, row in rows:
            document.head_rows += row.scored - (id(row) in ready)
        self.head_rows += len(fresh)
        if known:
            score_points(
                torch.stack([ready[id(row)] for row in known]), [(row, 0) for row in known], self.softmax_dtype
            )
        self.score_fresh(states, [(*at[id(row)], row.decision - row.skip + j, row, j) for row, j in fresh])

    def score_fresh(self, states: Sequence[BlockState], points: Sequence[tuple[int, int, int, Row, int]]) -> None:
        """Score positions after this block: the head's logits of all of them, so many at a time as memory allows.

        Args:
            states: Of the batches.
            points: (batch, row in flow, position, row, index among its scored positions), batch by batch.
        """
        size = max(1, CHUNK_ELEMENTS // self.anatomy.vocab_size)
        for start in range(0, len(points), size):
            chunk = points[start : start + size]
            hidden = BlockState.at(states, [p[:3] for p in chunk]).hidden[:, 0]
            score_points(self.anatomy.logits(hidden), [p[3:] for p in chunk], self.softmax_dtype)

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
        at = {id(row): (0, r) for r, row in enumerate(document.rows)}
        found: list[int] = []
        depth = candidates[-1] if candidates else 0  # what deciding needs; logging goes on to the end
        end = self.anatomy.n_blocks if self.logged_features else depth

        def after_block(state: BlockState) -> Tensor | None:
            self.block_calls += 1
            self.block_tokens += sum(len(row.tokens) for row in document.rows)
            asks = state.block in candidates or bool(self.stopper.carries and state.block in self.checked)
            if asks or self.logged_features:
                self._check([state], [document], at, ask=asks)
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

    def record(self, document: Document, fingerprint: str) -> ExitRecord:
        """The exit record of a document that was run."""
        layer = document.exit_layer
        assert layer is not None
        lengths = [len(row.tokens) for row in document.rows]
        deciders = [document.rows[i] for i in document.deciders] or document.rows
        prompt = sum(row.decision + 1 for row in deciders) / len(deciders)
        scored = sum(row.scored for row in document.rows)
        return ExitRecord(
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
                        [chunk[n][2:] for n in done],
                        self.softmax_dtype,
                    )
                elif done:
                    assert logits is not None
                    score_points(logits[done], [chunk[n][2:] for n in done], self.softmax_dtype)
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

    def record_of_tokens(self, windows: Sequence[tuple[Row, list[int]]], fingerprint: str) -> ExitRecord:
        """The exit record of a text made of windows, each with its scored tokens' exits; counted as if run.

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
        return ExitRecord(mean, count.n_whole, eq2 / len(layers), mean, flops, dense, fingerprint)


def _lineage(prefix: Prefix | None) -> Iterator[Prefix]:
    """A prefix and what it continues."""
    while prefix is not None:
        yield prefix
        prefix = prefix.parent


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


