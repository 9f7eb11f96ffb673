"""Probes of the prefill: do rows that leave, and rows that continue a prefix, get a plain forward's hidden states?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from lm_eval_adainfer.prefill.documents import Row
from lm_eval_adainfer.prefill.forward import Forward, padded, run_blocks
from lm_eval_adainfer.prefill.prefixes import Continued, Prefix
from lm_eval_adainfer.prefill.reading import Reading, Spot, slowly
from lm_eval_adainfer.readers.base import Reader
from lm_eval_adainfer.structure.anatomy import Anatomy
from lm_eval_adainfer.structure.arguments import BatchRule
from lm_eval_adainfer.structure.rounding import hidden_distance, probed
from lm_eval_adainfer.structure.state import BlockState
from lm_eval_adainfer.structure.windows import NoPlainCacheError, watch_windows

_WHOLE = "every prompt is run whole"


@dataclass(frozen=True)
class Sharing:
    """Whether rows can continue prefixes, and how.

    Attributes:
        rule: How the blocks' arguments follow the batch then; None where every prompt has to be run whole.
        how: A clause for the run's record.
        missed: What this machine could do and this model does not allow, with the figure that decided; or empty.
    """

    rule: BatchRule | None
    how: str
    missed: str = ""


@torch.no_grad()
def sharing(anatomy: Anatomy, reading: Reading | None = None) -> Sharing:
    """How rows can continue prefixes: apart from their keys (a CPU alone has that kernel), behind them, or not at all.

    It is seen on a prefix that continues a prefix, and on rows that continue one row: they have to get a plain
    forward's hidden states after every block, also where rows have left, and a reader has to read them as whole rows.

    Args:
        anatomy: The model.
        reading: The run's reader, where it lets tokens go on.
    """
    try:
        rule = watch_windows(anatomy).rows
    except NoPlainCacheError as error:
        return Sharing(None, _WHOLE, error.why)
    ways = {"what prompts share is attended to together": True, "shared keys are put in front of every row's": False}
    failures = []
    for how, apart in ways.items():
        if apart and anatomy.input_device.type != "cpu":
            continue
        found = replace(rule, apart=apart)
        try:
            difference = probed(anatomy, "hidden", partial(_off_by, anatomy, found))
            if difference.is_rounding and reading is not None:
                difference = probed(anatomy, "hidden", partial(_read_off_by, reading, found))
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            failures.append(f"if {how}, {str(error).splitlines()[0] if str(error) else type(error).__name__}")
            continue
        if difference.is_rounding:
            return Sharing(found, how, "; ".join(failures))
        failures.append(f"if {how}, hidden states are {difference}")
    return Sharing(None, _WHOLE, "; ".join(failures))


def _off_by(anatomy: Anatomy, rule: BatchRule) -> float:
    """How far rows that continue prefixes are from a plain forward's hidden states (``rounding.hidden_distance``)."""
    probe = anatomy.probe_ids(3)
    ids = torch.cat([probe[:1, :3].expand(3, 3), probe[:, 1:]], dim=1)  # 3 shared, 4 of their own
    plain: list[Tensor] = []

    def record(state: BlockState) -> Tensor | None:
        plain.append(state.hidden[:, 5:7].clone())
        return torch.empty(0, dtype=torch.long) if state.block == anatomy.n_blocks else None

    run_blocks(anatomy, ids, record)
    starts = [5, 4, 5]  # tokens that prefixes of several rows have of each
    own = [ids[r, 3 : starts[r]].tolist() for r in (1, 0, 2)]
    first = Prefix(anatomy, [ids[0, :3].tolist()], rule)
    second = Prefix(anatomy, own, rule, first, stays=False)
    return max(
        _continued_off_by(plain, ids, Continued(second, [1, 0, 2]), starts),
        _continued_off_by(plain, ids, Continued(first, [0, 0, 0]), [3, 3, 3]),
    )


def _read_off_by(reading: Reading, rule: BatchRule) -> tuple[float, float]:
    """How far rows that continue prefixes are read from whole rows, and how far these are with tokens behind them."""
    anatomy = reading.anatomy
    narrow = Reading(anatomy, Reader(reading.reader.kind, min(reading.reader.window, 2)), reading.storing)
    probe = anatomy.probe_ids(4).tolist()
    shared, k = probe[3][:4], max(1, anatomy.n_blocks // 2)
    if k == anatomy.n_blocks:
        return 0.0, 0.0
    # windows begin inside the prefix, at its end and behind it; behind contexts that continue it
    rows = [Row([*shared, *own[:n]], scored) for own, n, scored in zip(probe, (1, 2, 5), (1, 1, 2), strict=False)]
    first = Prefix(anatomy, [shared], rule, asked=[k])
    contexts = Prefix(anatomy, [row.tokens[4 : row.decision] for row in rows[1:]], rule, first, False, [k])
    worst = own = 0.0
    for prefix, some, owner in ((first, rows, [0, 0, 0]), (contexts, rows[1:], [0, 1])):
        skip = [prefix.lengths[o] for o in owner]
        continued = Continued(prefix, owner)
        ids = padded(anatomy, [row.tokens[n:] for row, n in zip(some, skip, strict=True)])
        forward = Forward(anatomy, ids, prefix=continued)
        for _ in range(k):
            forward.advance()
        spots = [Spot(r, row, n, row.scored) for r, (row, n) in enumerate(zip(some, skip, strict=True))]
        found = narrow.read(k, forward.hidden, continued, spots)
        expected = torch.cat([slowly(anatomy, narrow.reader, k, row) for row in some]).to(found.device)
        longer = [Row([*row.tokens, *shared], row.scored + 4) for row in some]
        same = torch.cat([slowly(anatomy, narrow.reader, k, row)[:-4] for row in longer]).to(found.device)
        worst, own = max(worst, hidden_distance(found, expected)), max(own, hidden_distance(same, expected))
    return worst, own


def _continued_off_by(plain: Sequence[Tensor], ids: Tensor, continued: Continued, starts: Sequence[int]) -> float:
    """How far 3 rows ([3, 7] ids) that go on behind so many tokens are from the ``plain`` states of their last two.

    Rows leave in between.
    """
    anatomy, n = continued.prefix.anatomy, len(plain)
    rest = torch.zeros(3, 7 - min(starts), dtype=torch.long, device=ids.device)
    for r, start in enumerate(starts):
        rest[r, : 7 - start] = ids[r, start:]
    rows, worst = [0, 1, 2], 0.0

    def compare(state: BlockState) -> Tensor | None:
        nonlocal rows, worst
        found = torch.stack([state.hidden[i, 5 - starts[r] : 7 - starts[r]] for i, r in enumerate(rows)])
        worst = max(worst, hidden_distance(found, plain[state.block - 1][rows]))
        keep = [i for i, row in enumerate(rows) if state.block < (n, 1, max(1, n - 1))[row]]
        rows = [rows[i] for i in keep]
        return torch.tensor(keep, dtype=torch.long)

    run_blocks(anatomy, rest, compare, prefix=continued)
    return worst
