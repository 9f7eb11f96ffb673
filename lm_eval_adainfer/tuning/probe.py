"""A few documents under every reader: which are hopeless, after which blocks to record the others, how long it takes.

A reader is hopeless where even an oracle, which knows at every block whether the answer there is the final one, would
save next to nothing with it once reading is paid for. What is decided is kept (``plan.json``), so that a command
that was killed goes on with the same plan. All savings are *simulated*; the seconds are *measured*.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lm_eval_adainfer.readers.base import HEAD, Reader
from lm_eval_adainfer.strategies.rules import GapStopper
from lm_eval_adainfer.traces.documents import TracedDocuments
from lm_eval_adainfer.tuning.search import Choice, search
from lm_eval_adainfer.tuning.work import Work

READERS = ("copy:1", "copy:32", "sim:1", "sim:32")  # besides the head
DOCUMENTS = 24  # that are probed, of all tasks together
LEAST = 0.02  # of the dense work: what an oracle must save with a reader
SHARE = 0.5  # of what it saves with the best reader
BLOCKS = 6  # after which a reader that runs tokens is recorded, at most
_PROBED = 8  # after which it is probed


@dataclass(frozen=True)
class Probed:
    """What a reader is worth, *simulated*.

    Attributes:
        reader: The reader.
        blocks: After which blocks it may pay to ask.
        agreement: Block to the share of documents whose answer there is the final one.
        saved: The share of the dense work that an oracle would save, reading paid for.
        work: Recording it over the work of a dense pass.
        hopeless: Whether it is dropped.
    """

    reader: Reader
    blocks: tuple[int, ...]
    agreement: dict[int, float]
    saved: float
    work: float
    hopeless: bool = False


def places(n_blocks: int) -> tuple[int, ...]:
    """After which blocks readers that run tokens are probed."""
    spread = np.linspace(max(1, n_blocks / 4), n_blocks - 1, _PROBED)
    return tuple(sorted({round(k) for k in spread if 1 <= round(k) < n_blocks}))


def oracle(views: Sequence[TracedDocuments], reader: Reader) -> Choice:
    """What somebody who knows which answers are final already would save under a reader; asking costs what it costs."""
    said = np.concatenate([np.where(view.answers == view.answers[:, -1:], 1.0, -1.0) for view in views])
    known = np.zeros(said.shape[1], dtype=bool)
    known[views[0].at] = True
    said[:, ~known] = np.nan
    nothing = np.zeros_like(said)
    return search(said, nothing, Work.of(views, reader, GapStopper(0.5)), None, [0.0])


def judge(traces: Sequence[TracedDocuments], readers: Sequence[Reader]) -> list[Probed]:
    """Judge readers by probed documents, the head among them."""
    found = [_probed([trace.under(reader.name) for trace in traces], reader) for reader in readers]
    best = max(one.saved for one in found)
    bar = max(LEAST, SHARE * best)
    return [Probed(o.reader, o.blocks, o.agreement, o.saved, o.work, o.saved < bar or not o.blocks) for o in found]


def _probed(views: Sequence[TracedDocuments], reader: Reader) -> Probed:
    n_blocks = views[0].n_blocks
    recorded = [k for k in views[0].blocks if k < n_blocks]
    answers = np.concatenate([view.answers for view in views])
    agrees = answers == answers[:, -1:]
    work = Work.of(views, reader, GapStopper(0.5))
    dense = work.dense.sum()
    asking = {k: float(work.ask[:, k - 1].sum() / dense) for k in recorded}
    saves = {k: 1 - work.ratio(np.where(agrees[:, k - 1], k, n_blocks), [k]) for k in recorded}
    blocks = around_the_best(saves) if reader.runs_tokens else tuple(k for k in recorded if saves[k] > LEAST / 2)
    if reader.runs_tokens:  # also after blocks between those that were probed
        asking.update(zip(blocks, np.interp(blocks, recorded, [asking[k] for k in recorded]).tolist(), strict=True))
    recording = sum(asking[k] for k in (blocks if reader.runs_tokens else recorded))
    agreement = {k: float(agrees[:, k - 1].mean()) for k in recorded}
    return Probed(reader, blocks, agreement, 1 - oracle(views, reader).cost, recording)


def around_the_best(saves: dict[int, float]) -> tuple[int, ...]:
    """At most ``BLOCKS`` blocks, evenly spread over those that may save half of what the best one saves, or more.

    Args:
        saves: What asking after some blocks, each alone, would save; between them it is taken to be linear.
    """
    known = sorted(saves)
    if not known:
        return ()
    every = range(known[0], known[-1] + 1)
    between = np.interp(every, known, [saves[k] for k in known])
    bar = max(LEAST / 2, between.max() / 2)
    good = [k for k, saved in zip(every, between, strict=True) if saved > bar]
    if not good:
        return ()
    return tuple(sorted({good[i] for i in np.linspace(0, len(good) - 1, min(BLOCKS, len(good))).round().astype(int)}))


def kept(found: Sequence[Probed]) -> list[Probed]:
    """Those that are recorded besides the head."""
    return [one for one in found if not one.hopeless and not one.reader.same(HEAD)]


def told(found: Sequence[Probed]) -> list[dict[str, Any]]:
    """JSON-serialisable."""
    return [
        {
            "reader": one.reader.name,
            "blocks": list(one.blocks),
            "agreement": {str(k): share for k, share in one.agreement.items()},
            "oracle_saves": one.saved,
            "work": one.work,
            "hopeless": one.hopeless,
        }
        for one in found
    ]
