"""Early exit of whole documents: which rows decide, at which block they leave, and what is scored there.

A document is all requests that lm-eval compares with each other. It has one exit block, decided at the last tokens
of its distinct contexts (docs/numbers.md, "One decision per document").
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from lm_eval_adainfer.prefill.dense_too import DenseToo, InFlow
from lm_eval_adainfer.prefill.documents import Document, Row
from lm_eval_adainfer.prefill.feature_log import FeatureLog
from lm_eval_adainfer.prefill.forward import Forward, padded, run_blocks
from lm_eval_adainfer.prefill.observing import Observer, run_observed
from lm_eval_adainfer.prefill.planning import Batch
from lm_eval_adainfer.prefill.prefixes import Continued, Prefix
from lm_eval_adainfer.prefill.reading import Reading, Spot
from lm_eval_adainfer.prefill.rolling import TokenExits
from lm_eval_adainfer.prefill.scoring import positions_at_once, score_points
from lm_eval_adainfer.readers.base import HEAD, Reader
from lm_eval_adainfer.strategies import features
from lm_eval_adainfer.strategies.asking import Carried, ask, reads_head
from lm_eval_adainfer.strategies.base import Schedule, Stopper
from lm_eval_adainfer.structure.anatomy import Anatomy
from lm_eval_adainfer.structure.state import BlockState
from lm_eval_adainfer.structure.weights import kept_loaded

Place = tuple[int, int, int]  # of a row in flow: its batch, its number among the batch's rows, where it decides there


class _Read(NamedTuple):
    """What a check has read at rows' decision positions.

    Attributes:
        logits: Row -> [V].
        states: Row -> [h], what norm and head read.
    """

    logits: dict[Row, Tensor]
    states: dict[Row, Tensor]


class _Underway:
    """Documents, or a piece of one, on their way through the blocks as one batch.

    Attributes:
        forward: The way.
        flow: The rows that have not left: (document, row, how many of its first tokens a prefix runs).
        state: After the block that was run last.
    """

    state: BlockState

    def __init__(
        self,
        anatomy: Anatomy,
        parts: Sequence[str],
        documents: Sequence[Document],
        prefix: Prefix | None,
        owner: Sequence[int],
    ):
        self.documents, self.prefix = documents, prefix
        rows = [(d, row) for d in documents for row in d.rows]
        skip = [0] * len(rows) if prefix is None else [prefix.lengths[o] for o in owner]
        self._owner = {} if prefix is None else {row: o for (_, row), o in zip(rows, owner, strict=True)}
        self.flow = [(d, row, n) for (d, row), n in zip(rows, skip, strict=True)]
        ids = padded(anatomy, [row.tokens[n:] for _, row, n in self.flow])
        self.continued = None if prefix is None else Continued(prefix, owner)
        self.forward = Forward(anatomy, ids, parts, self.continued)

    def owners(self, rows: Iterable[Row]) -> set[int]:
        """Which of the prefix's rows some rows continue."""
        return {self._owner[row] for row in rows}


class Engine:
    """Runs documents through the early-exit forward.

    Args:
        anatomy: The model.
        stopper: The strategy.
        schedule: After which blocks it is asked.
        softmax_dtype: As HFLM's; None keeps the logits' dtype.
        log_features: Record the features after every block up to the exit (diagnostic: not counted as FLOPs).
        reader: How blocks are read.
        reading: For a reader that lets tokens go on: it, made ready for the model (``reading.prepared``).

    Attributes:
        observer: What is shown every block; then documents run dense. None where nothing watches.
        dense: What is given the dense answers of all documents, too: those that leave run on to the end. None where
            rows that leave are gone.
        tokens: Tokens of all rows that were run, each counted once.
        block_tokens: Block executions x tokens.
        block_calls: Block executions of batches.
        copied_tokens: Block executions x tokens that computed keys and values alone.
        head_rows: Head rows computed (checks and scores).
    """

    def __init__(
        self,
        anatomy: Anatomy,
        stopper: Stopper,
        schedule: Schedule,
        softmax_dtype: torch.dtype | None = None,
        log_features: bool = False,
        reader: Reader = HEAD,
        reading: Reading | None = None,
    ):
        self.anatomy, self.stopper, self.schedule, self.reader = anatomy, stopper, schedule, reader
        self.softmax_dtype = softmax_dtype
        self.checked = frozenset(schedule.blocks)
        self.log = FeatureLog(anatomy, log_features)
        self._parts = features.needed_parts(stopper.features) if self.checked else []
        self._parts += [p for p in features.needed_parts(self.log.names) if p not in self._parts]
        self.observer: Observer | None = None
        self.dense: DenseToo | None = None
        self.reading = reading
        self.head_rows = 0
        self.copied_tokens = 0
        self.tokens = 0
        self.block_tokens = 0
        self.block_calls = 0

    @contextmanager
    def observed(self, observer: Observer) -> Iterator[None]:
        """Run documents dense for a while, and show an observer every block."""
        before, self.observer = self.observer, observer
        try:
            yield
        finally:
            self.observer = before

    # ------------------------------------------------------------------ documents
    def run(self, batches: Sequence[Batch]) -> None:
        """Decide and score batches that go through the blocks together (``planning.together``)."""
        first = batches[0]
        if self.observer is not None:
            documents = [document for batch in batches for document in batch.documents]
            run_observed(self.anatomy, documents, batches[-1].size, self.observer, self.softmax_dtype)
        elif first.rows_at_once is not None:
            self._run_in_pieces(first, first.rows_at_once)
        else:
            self._run([self._begun(batch.documents, batch.prefix, batch.owner) for batch in batches])

    def _begun(self, documents: Sequence[Document], prefix: Prefix | None, owner: Sequence[int]) -> _Underway:
        return _Underway(self.anatomy, self._parts, documents, prefix, owner)

    def _run_in_pieces(self, batch: Batch, rows: int) -> None:
        """A document that is larger than a batch is decided first and scored second, so many rows at once.

        Where its deciding rows fit one batch, they are scored in the pass that decides; else the deciding passes are
        counted on top.
        """
        (document,) = batch.documents
        order = [*document.deciders, *(i for i in range(len(document.rows)) if i not in document.deciders)]
        if len(document.deciders) > batch.size:
            self._decide_in_parts(document, batch.size)
        for start in range(0, len(order), rows):
            part = order[start : start + rows]
            deciders = list(range(len(document.deciders))) if start == 0 and document.exit_layer is None else []
            piece = Document([document.rows[i] for i in part], deciders, document.exit_layer)
            self._run([self._begun([piece], batch.prefix, [batch.owner[i] for i in part])])
            document.exit_layer = piece.exit_layer
            document.head_rows += piece.head_rows
            document.choice_rows += piece.choice_rows
            document.decisions += piece.decisions
            document.reads += piece.reads
            document.logged += piece.logged

    @torch.no_grad()
    def _run(self, batches: Sequence[_Underway]) -> None:
        """Take batches through the blocks side by side; every document leaves at its own block."""
        n_blocks, carried = self.anatomy.n_blocks, Carried(self.stopper.carries)
        prefixes = dict.fromkeys(p for batch in batches for p in _lineage(batch.prefix))
        ran = sum(p.executed for p in prefixes), sum(p.idle_copies for p in prefixes)
        wanted = 0
        for batch in batches:
            self.tokens += sum(len(row.tokens) for _, row, _ in batch.flow)
            for document in batch.documents:
                self.log.begin(document)
        for k in range(1, n_blocks + 1):
            several = len(batches) > 1 or bool(prefixes)  # else it is loaded once anyhow, and part by part
            with kept_loaded(self.anatomy.blocks[k - 1]) if several else nullcontext():
                for batch in batches:
                    batch.state = batch.forward.advance()
            flow = [
                InFlow(d, row, (n, r, row.decision - skip), (d.exit_layer or n_blocks) < k, len(row.tokens) - skip)
                for n, batch in enumerate(batches)
                for r, (d, row, skip) in enumerate(batch.flow)
            ]
            going = [x for x in flow if not x.has_left]
            wanted += self._count(k, batches, going)
            at: dict[Row, Place] = {x.row: x.place for x in flow}
            documents = list(dict.fromkeys(x.document for x in going))
            ready = _Read({}, {})
            undecided = [d for d in documents if d.exit_layer is None or (self.log.names and k == n_blocks)]
            if k == n_blocks:
                for document in documents:
                    document.exit_layer = n_blocks
            if undecided and (k in self.checked or self._logs(k)):
                ready = self._check(batches, undecided, at, carried)
            leaving = {d for d in documents if d.exit_layer == k}
            if leaving:
                self._score(batches, [d for d in documents if d in leaving], at, ready)
            if self.dense is not None:
                self.dense.after_block([batch.state for batch in batches], flow)
            elif leaving:
                batches = _without(batches, leaving)
                if not batches:
                    break
        self.block_tokens += wanted
        if self.dense is not None:
            executed, idle = sum(p.executed for p in prefixes), sum(p.idle_copies for p in prefixes)
            self.dense.prefixes(executed - ran[0], wanted, idle - ran[1])

    def _count(self, k: int, batches: Sequence[_Underway], going: Sequence[InFlow]) -> int:
        """Count block k of the rows whose documents have not left.

        Returns:
            Tokens of prefixes that it ran for these rows.
        """
        by_batch: dict[int, list[Row]] = {}
        for x in going:
            by_batch.setdefault(x.place[0], []).append(x.row)
        self.block_calls += len(by_batch)
        self.block_tokens += sum(x.length for x in going)
        found = 0
        for n, rows in by_batch.items():
            if (prefix := batches[n].prefix) is not None:
                found += prefix.wanted(k, batches[n].owners(rows))
        return found

    def _check(
        self,
        batches: Sequence[_Underway],
        documents: Sequence[Document],
        at: Mapping[Row, Place],
        carried: Carried,
        asks: bool = True,
    ) -> _Read:
        """Ask the stopper for every decider of ``documents``; set ``exit_layer`` of those that stop.

        Args:
            batches: After the same block.
            documents: Batch by batch.
            at: The rows in flow.
            carried: What the stopper keeps of the deciding rows from block to block.
            asks: Else features are only logged.

        Returns:
            What was read at the decision positions, for scoring to use again.
        """
        states = [batch.state for batch in batches]
        k, logits = states[0].block, None
        asks = asks and k in self.checked and k < self.anatomy.n_blocks
        decides, logs = asks and bool(self.stopper.features), self._logs(k)
        deciding = [(d, d.rows[i]) for d in documents for i in d.deciders]
        stops: list[bool] = []
        needs_head = reads_head(self.stopper, self.anatomy)
        needs_choices = features.needs_choices(self.stopper.features) and not needs_head
        read: Tensor | None = None
        if deciding and (decides or logs):
            rows = [row for _, row in deciding]
            state = BlockState.at(states, [at[row] for row in rows])
            number = torch.arange(len(rows), device=state.hidden.device)
            points = number, torch.zeros_like(number)
            if logs or needs_head or needs_choices:
                read = self._read(batches, k, [(document, row, 1) for document, row in deciding], at, counts=decides)
            if logs:
                assert read is not None
                logits = self.anatomy.logits(read)
                self.log.note([(d, j) for d in documents for j in range(len(d.deciders))], state, points, logits)
            if decides:
                kept = carried.of(rows, state.hidden.device)
                choices = [row.choices or () for row in rows]
                stops, logits = ask(self.stopper, self.anatomy, state, points, kept, logits, choices=choices, read=read)
                carried.keep(rows, kept)
        if not asks:
            return _Read({}, {})
        if not decides:  # fixed:N asks nothing, so documents without a decision follow it too
            for document in documents:
                document.exit_layer = k
            return _Read({}, {})
        verdict: dict[Document, bool] = {}
        for (document, row), stop in zip(deciding, stops, strict=True):
            verdict[document] = verdict.get(document, True) and stop
            document.decisions += 1
            document.head_rows += needs_head
            document.choice_rows += needs_choices * len(row.choices or ())
        self.head_rows += len(deciding) * needs_head
        for document, stop in verdict.items():
            if stop:
                document.exit_layer = k
        rows = [row for _, row in deciding]
        return _Read(
            {row: logits[n] for n, row in enumerate(rows)} if needs_head and logits is not None else {},
            {row: read[n] for n, row in enumerate(rows)} if read is not None else {},
        )

    def _score(
        self,
        batches: Sequence[_Underway],
        documents: Sequence[Document],
        at: Mapping[Row, Place],
        ready: _Read,
    ) -> None:
        """Score the rows in flow of these documents; what a decision has read and computed is not done twice."""
        rows = [(d, row) for d in documents for row in d.rows if row in at]
        known = [row for _, row in rows if row in ready.logits]
        if known:
            logits = torch.stack([ready.logits[row] for row in known])
            score_points(logits, [(row, 0) for row in known], self.softmax_dtype)
        for document, row in rows:
            document.head_rows += row.scored - (row in ready.logits)
        points, parts = [], []
        there = [row for _, row in rows if row.scored == 1 and row in ready.states and row not in ready.logits]
        if there:
            points, parts = [(row, 0) for row in there], [torch.stack([ready.states[row] for row in there])]
        fresh = [(d, row) for d, row in rows if row.scored > 1 or row not in ready.states]
        if fresh:
            points += [(row, j) for _, row in fresh for j in range(row.scored)]
            parts.append(self._read(batches, batches[0].state.block, [(d, row, row.scored) for d, row in fresh], at))
        new = [n for n, (row, j) in enumerate(points) if j > 0 or row not in ready.logits]
        if not new:
            return
        read = torch.cat(parts)
        self.head_rows += len(new)
        size = positions_at_once(self.anatomy)
        for start in range(0, len(new), size):
            chunk = new[start : start + size]
            score_points(self.anatomy.logits(read[chunk]), [points[n] for n in chunk], self.softmax_dtype)

    def _logs(self, k: int) -> bool:
        """Whether features are logged after block k: under a reader that runs tokens only where it is asked."""
        return bool(self.log.names) and (self.reading is None or k in self.checked or k == self.anatomy.n_blocks)

    def _read(
        self,
        batches: Sequence[_Underway],
        k: int,
        wanted: Sequence[tuple[Document, Row, int]],
        at: Mapping[Row, Place],
        counts: bool = True,
    ) -> Tensor:
        """What norm and head read of rows after a block.

        Args:
            batches: After block k.
            k: The block.
            wanted: (document, row, how many positions from the decision on), batch by batch.
            at: The rows in flow.
            counts: Whether the documents pay for it.

        Returns:
            [n, h], one row's positions after the other's.
        """
        last = k == self.anatomy.n_blocks
        if counts and not last:
            for document, row, positions in wanted:
                document.reads.append((k, row.decision + 1, positions))
        if self.reading is None or last:
            points = [(*at[row][:2], at[row][2] + j) for _, row, positions in wanted for j in range(positions)]
            hidden = BlockState.at([batch.state for batch in batches], points).hidden[:, 0]
            return hidden if last else self.reader.translate(k, hidden)
        spots: dict[int, list[Spot]] = {}
        for _, row, positions in wanted:
            batch, r, decision = at[row]
            spots.setdefault(batch, []).append(Spot(r, row, row.decision - decision, positions))
        reading, found = self.reading, []
        for n, some in spots.items():
            found.append(reading.read(k, batches[n].state.hidden, batches[n].continued, some))
        self.count_reading()
        return torch.cat(found)

    def count_reading(self) -> None:
        """Count what the reader has run since this was last done."""
        if (reading := self.reading) is not None:
            self.block_tokens += reading.block_tokens
            self.block_calls += reading.block_calls
            self.copied_tokens += reading.copied_tokens
            reading.block_tokens = reading.block_calls = reading.copied_tokens = 0

    @torch.no_grad()
    def _decide_in_parts(self, document: Document, batch_size: int) -> None:
        """Decide a document whose distinct contexts don't fit one batch: the first block where all say stop."""
        candidates = list(self.schedule.blocks)
        if not self.stopper.features:  # fixed:N asks nothing
            document.exit_layer = candidates[0] if candidates else self.anatomy.n_blocks
            return
        for start in range(0, len(document.deciders), batch_size):
            if not candidates and not self.log.names:
                break
            rows = [document.rows[i] for i in document.deciders[start : start + batch_size]]
            rows = [Row(row.tokens[: row.decision + 1], 1, choices=row.choices) for row in rows]  # nothing behind it
            probe = Document(rows, list(range(len(rows))))
            self.log.begin(probe)
            candidates = self._stopping_blocks(probe, candidates)
            document.logged += probe.logged
            document.decisions += probe.decisions
            document.head_rows += probe.head_rows
            document.reads += probe.reads
            document.choice_rows += probe.choice_rows
            document.decided_by += [(probe.exit_layer or 0, len(row.tokens)) for row in rows]
        document.exit_layer = candidates[0] if candidates else self.anatomy.n_blocks
        self.log.cut(document, document.exit_layer)  # these passes may have gone deeper than the document does

    def _stopping_blocks(self, document: Document, candidates: Sequence[int]) -> list[int]:
        """Of the candidate blocks, those after which every decider of the document says stop."""
        at = {row: (0, r, row.decision) for r, row in enumerate(document.rows)}
        found: list[int] = []
        depth = candidates[-1] if candidates else 0  # what deciding needs; logging goes on to the end
        end = self.anatomy.n_blocks if self.log.names else depth
        carried = Carried(self.stopper.carries)

        batch = self._begun([document], None, [])
        self.tokens += sum(len(row.tokens) for row in document.rows)
        while batch.forward.block < end:
            batch.state = batch.forward.advance()
            k = batch.state.block
            self.block_calls += 1
            self.block_tokens += sum(len(row.tokens) for row in document.rows)
            asks = k in candidates or bool(self.stopper.carries and k in self.checked)
            if asks or self._logs(k):
                self._check([batch], [document], at, carried, asks)
                if document.exit_layer == k and k in candidates:
                    found.append(k)
                document.exit_layer = None
        document.exit_layer = depth  # how deep this pass had to go, for counting
        return found

    # ------------------------------------------------------------------ token by token
    @torch.no_grad()
    def run_tokens(self, rows: Sequence[Row]) -> list[list[int]]:
        """Score rows with a decision of its own for every scored token (``loglikelihood_rolling``).

        The values are those of each token's exit block; the saving is counted as if each token had been run only so
        far, since the rows themselves run on until their last token has stopped.

        Returns:
            Per row, the exit block of every scored position.
        """
        run = TokenExits(self.anatomy, self.stopper, self.checked, self.softmax_dtype, rows, self.reader)
        run_blocks(self.anatomy, padded(self.anatomy, [row.tokens for row in rows]), run.after_block, self._parts)
        self.tokens += sum(len(row.tokens) for row in rows)
        self.block_calls += run.block_calls
        self.block_tokens += run.block_tokens
        self.head_rows += run.head_rows
        return run.exits


def _without(batches: Sequence[_Underway], leaving: set[Document]) -> list[_Underway]:
    """The batches that have rows left when these documents' have gone."""
    for batch in batches:
        keep = [r for r, (d, *_) in enumerate(batch.flow) if d not in leaving]
        if keep and len(keep) < len(batch.flow):
            batch.forward.keep(torch.tensor(keep, dtype=torch.long))
        batch.flow = [batch.flow[r] for r in keep]
    return [batch for batch in batches if batch.flow]


def _lineage(prefix: Prefix | None) -> Iterator[Prefix]:
    """A prefix and what it continues."""
    while prefix is not None:
        yield prefix
        prefix = prefix.parent
