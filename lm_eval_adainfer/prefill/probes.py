"""Probes of the prefill: do rows that leave, and rows that continue a prefix, get a plain forward's hidden states?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from lm_eval_adainfer.prefill.forward import run_blocks
from lm_eval_adainfer.prefill.prefixes import Continued, Prefix
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
def sharing(anatomy: Anatomy) -> Sharing:
    """How rows can continue prefixes: apart from their keys (a CPU alone has that kernel), behind them, or not at all.

    It is seen on a prefix that continues a prefix, and on rows that continue one row: they have to get a plain
    forward's hidden states after every block, also where rows have left.
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
