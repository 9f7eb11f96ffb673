"""The exit records of documents and of rolling texts, counted from what their runs have come to."""

from __future__ import annotations

from collections.abc import Sequence

from lm_eval_adainfer.counting import FlopCounter
from lm_eval_adainfer.prefill.documents import Document, Row
from lm_eval_adainfer.readers.base import HEAD, Reader
from lm_eval_adainfer.records import ExitRecord
from lm_eval_adainfer.strategies import features
from lm_eval_adainfer.strategies.base import Schedule, Stopper


def record_of_document(
    document: Document, counter: FlopCounter, fingerprint: str, with_features: bool = False
) -> ExitRecord:
    """The exit record of a document that was run, with its logged features where they were asked for."""
    layer = document.exit_layer
    assert layer is not None
    lengths = [len(row.tokens) for row in document.rows]
    deciders = [document.rows[i] for i in document.deciders] or document.rows
    prompt = sum(row.decision + 1 for row in deciders) / len(deciders)
    scored = sum(row.scored for row in document.rows)
    run_on = sum((counter.n_blocks - k) * counter.run_on(*read) for k, *read in document.reads)
    return ExitRecord(
        exit_layer=layer,
        n_blocks=counter.n_whole,
        flops_ratio=counter.flops_ratio(layer, prompt),
        layers_run=layer + (sum(depth * tokens for depth, tokens in document.decided_by) + run_on) / sum(lengths),
        flops=sum(counter.blocks(layer, s) for s in lengths)
        + sum(counter.read(*read) for read in document.reads)
        + sum(counter.blocks(depth, tokens) for depth, tokens in document.decided_by)
        + counter.head(document.head_rows)
        + counter.screened(document.choice_rows)
        + counter.decisions(document.decisions),
        flops_dense=sum(counter.dense(s) for s in lengths) + counter.head(scored),
        fingerprint=fingerprint,
        features=tuple(document.logged) if with_features else None,
    )


def share_of_checks(documents: Sequence[Document], counter: FlopCounter, schedule: Schedule) -> float:
    """What asking about all of these documents costs, over their dense work, where none of them leaves; counted."""
    dense = checks = 0.0
    for document in documents:
        dense += sum(counter.dense(len(row.tokens)) + counter.head(row.scored) for row in document.rows)
        for row in (document.rows[i] for i in document.deciders):
            checks += sum(counter.read(k, row.decision + 1, 1) + counter.head(1) for k in schedule.blocks)
    return checks / dense if dense else 0.0


def record_of_windows(
    windows: Sequence[tuple[Row, list[int]]],
    counter: FlopCounter,
    stopper: Stopper,
    schedule: Schedule,
    fingerprint: str,
    reader: Reader = HEAD,
) -> ExitRecord:
    """The exit record of a text made of windows, each with its scored tokens' exits; counted as if run.

    Tokens that are context only (a window's overlap) count to the last block on both sides.
    """
    flops = dense = eq2 = 0.0
    layers: list[int] = []
    for row, exits in windows:
        depths = [counter.n_blocks] * row.decision + exits
        for position, depth in enumerate(depths):
            flops += counter.blocks(depth, 1, position + 1)
        dense += counter.dense(len(row.tokens)) + counter.head(row.scored)
        checks = sum(sum(k < depth for k in schedule.blocks) for depth in exits)
        asked = sum(sum(k <= depth for k in schedule.blocks) for depth in exits)
        if features.needs_head(stopper.features):  # the exit's own check is its score
            flops += counter.head(checks)
        flops += counter.head(row.scored) + (counter.decisions(asked) if stopper.features else 0.0)
        for depth in exits:  # a translated position is read once, for the check and the score
            read = {k for k in schedule.blocks if k < depth} if features.needs_head(stopper.features) else set()
            flops += sum(map(reader.flops, {*read, depth} - {counter.n_blocks}))
        eq2 += sum(counter.flops_ratio(depth, row.decision + j + 1) for j, depth in enumerate(exits))
        layers += exits
    mean = sum(layers) / len(layers)
    return ExitRecord(mean, counter.n_whole, eq2 / len(layers), mean, flops, dense, fingerprint)
