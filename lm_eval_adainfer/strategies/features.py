"""The features that a stopper may read after a block (``docs/numbers.md``, paper section 4.1): one function each.

A function under ``@recorded`` or ``@derived`` is a feature: its name is the feature's, its docstring begins with the
definition, and the decorator says what has to be there for it, so that nothing else is computed. All are computed at
the decision positions only. *Recorded* features stand in traces. *Derived* ones follow from the recorded ones, the top
token or choice and what the blocks asked before had said, so a trace has them too.

Features *among the choices* are of the probabilities of a decision's choices alone, where these are two or more and one
token each. They need so many rows of the output head instead of all, and are NaN where there are no such choices, so
that no stopper that reads one stops there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.structure.state import BlockState

_Compute = TypeVar("_Compute", bound=Callable[..., Tensor])


class Choices(NamedTuple):
    """The choices at n decision positions, as one block sees them.

    Attributes:
        logits: [n, C], float32: -inf beyond a decision's last choice, NaN where it has no choices of one token each.
        counts: [n], how many choices there are; 0 where there are none.
    """

    logits: Tensor
    counts: Tensor


class Observation:
    """What can be seen after one block at n decision positions.

    Args:
        state: The block's state.
        rows: [n], indices into the state's rows.
        positions: [n], token positions in these rows.
        logits: [n, V], final norm and head of the hidden states there; None where no feature needs them.
        n_blocks: L.
        past: [n, PAST], what the blocks asked before had said (zeros at the first); None where no feature needs it.
        choices: The choices there; None where no feature needs them.
        choice_past: [n, CHOICE_PAST], what the blocks asked before had said of the choices, likewise.
    """

    def __init__(
        self,
        state: BlockState,
        rows: Tensor,
        positions: Tensor,
        logits: Tensor | None,
        n_blocks: int = 0,
        past: Tensor | None = None,
        choices: Choices | None = None,
        choice_past: Tensor | None = None,
    ):
        self.state, self.rows, self.positions, self.logits = state, rows, positions, logits
        self.block, self.n_blocks, self.past = state.block, n_blocks, past
        self.choices, self.choice_past = choices, choice_past

    @cached_property
    def probabilities(self) -> Tensor:
        """[n, V], float32."""
        assert self.logits is not None
        return self.logits.float().softmax(dim=-1)

    @cached_property
    def top2(self) -> Tensor:
        """[n, 2], the two greatest probabilities over the full vocabulary, float32."""
        return self.probabilities.topk(2, dim=-1).values

    @property
    def best_prob(self) -> Tensor:
        """[n], P(top 1)."""
        return self.top2[:, 0]

    @cached_property
    def best_token(self) -> Tensor:
        """[n], the top token."""
        assert self.logits is not None
        return self.logits.argmax(dim=-1)

    @cached_property
    def choice_probabilities(self) -> Tensor:
        """[n, C], among the choices alone: the reader's probabilities of these, divided by their sum."""
        assert self.choices is not None
        return self.choices.logits.softmax(dim=-1)

    @cached_property
    def choice_top2(self) -> Tensor:
        """[n, 2], the two greatest probabilities among the choices."""
        return self.choice_probabilities.topk(2, dim=-1).values

    @property
    def best_choice_prob(self) -> Tensor:
        """[n], that of the best choice; NaN where there are no choices."""
        return self.choice_top2[:, 0]

    @cached_property
    def best_choice(self) -> Tensor:
        """[n], which of the choices is the best, the first of equals; meaningless where there are none."""
        assert self.choices is not None
        return self.choices.logits.argmax(dim=-1)

    def at(self, tensor: Tensor) -> Tensor:
        """[n, h] of a [rows, S, h] tensor, at the decision positions."""
        return tensor[self.rows.to(tensor.device), self.positions.to(tensor.device)]

    def part_cosine(self, which: str) -> Tensor:
        """[n], cosine between this block's and the previous block's part; 0 for block 1 (it has no previous one)."""
        now = self.at(self.state.parts[which])
        if which not in self.state.parts_before:
            return now.new_zeros(now.shape[0], dtype=torch.float32)
        return cosine(now, self.at(self.state.parts_before[which]))


@dataclass
class Recorded:
    """What of an :class:`Observation` derived features read, from a trace.

    Attributes:
        block: k.
        n_blocks: L.
        best_prob: [n], P(top 1).
        best_token: [n], the top token.
        past: [n, PAST].
        best_choice_prob: [n], the best choice's probability among the choices; NaN where there are none.
        best_choice: [n], which of the choices is the best.
        choice_past: [n, CHOICE_PAST].
    """

    block: int
    n_blocks: int
    best_prob: Tensor
    best_token: Tensor
    past: Tensor | None
    best_choice_prob: Tensor
    best_choice: Tensor
    choice_past: Tensor | None


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """[n], cosine similarity of the rows of two [n, h] tensors, in float32."""
    return torch.nn.functional.cosine_similarity(a.float(), b.to(a.device).float(), dim=-1)


@dataclass(frozen=True)
class Feature:
    """A feature: how it is computed, and what for.

    Attributes:
        compute: From an :class:`Observation`, or for a derived feature also a :class:`Recorded`, to [n].
        recorded: Whether traces hold it; if not, it is derived from what they hold.
        head: Whether it reads the output head's logits, of the whole vocabulary.
        part: The part of the block that it reads (``attn``, ``mlp``), if any.
        past: Whether it reads what the blocks asked before had said.
        choices: Whether it reads the logits of the choices alone; its past is then that of the choices.
    """

    compute: Callable[..., Tensor]
    recorded: bool
    head: bool = False
    part: str | None = None
    past: bool = False
    choices: bool = False

    @property
    def name(self) -> str:
        """What stoppers and traces call it."""
        return self.compute.__name__

    @property
    def definition(self) -> str:
        """One sentence that says what it is."""
        return (self.compute.__doc__ or "").strip().splitlines()[0]

    def __call__(self, seen: Observation | Recorded) -> Tensor:
        """[n], its values."""
        return self.compute(seen)


FEATURES: dict[str, Feature] = {}  # in the order in which traces hold and lists name them; the decorators fill it
PAST = 3  # numbers that are kept per decision for features that read the past (``remember``)
CHOICE_PAST = 2  # and for those that read the past of the choices


def recorded(
    head: bool = False, part: str | None = None, choices: bool = False
) -> Callable[[_Compute], _Compute]:
    """Declare a function as a feature that traces record; the arguments are those of :class:`Feature`."""

    def declare(compute: _Compute) -> _Compute:
        FEATURES[compute.__name__] = Feature(compute, True, head, part, choices=choices)
        return compute

    return declare


def derived(head: bool = False, past: bool = False, choices: bool = False) -> Callable[[_Compute], _Compute]:
    """Declare a function as a feature that follows from what traces record; the arguments are :class:`Feature`'s."""

    def declare(compute: _Compute) -> _Compute:
        FEATURES[compute.__name__] = Feature(compute, False, head, past=past, choices=choices)
        return compute

    return declare


@recorded(head=True)
def gap(seen: Observation) -> Tensor:
    """P(top 1) - P(top 2), in [0, 1]."""
    return seen.top2[:, 0] - seen.top2[:, 1]


@recorded(head=True)
def top_prob(seen: Observation) -> Tensor:
    """P(top 1), in (0, 1]."""
    return seen.top2[:, 0]


@recorded(head=True)
def entropy(seen: Observation) -> Tensor:
    """Entropy of the full vocabulary's probabilities over its maximum log V, in [0, 1]."""
    p = seen.probabilities
    return -torch.xlogy(p, p).sum(dim=-1) / math.log(p.shape[-1])


@recorded(part="attn")
def cos_attn(seen: Observation) -> Tensor:
    """Cosine of the attention output and the previous block's, before the residual addition; 0 for block 1."""
    return seen.part_cosine("attn")


@recorded(part="mlp")
def cos_mlp(seen: Observation) -> Tensor:
    """Cosine of the MLP output and the previous block's, before the residual addition; 0 for block 1."""
    return seen.part_cosine("mlp")


@recorded()
def cos_hidden(seen: Observation) -> Tensor:
    """Cosine of the block's output and its input (block 1: the embedding output), in [-1, 1]."""
    return cosine(seen.at(seen.state.hidden), seen.at(seen.state.before))


@recorded(choices=True)
def choice_gap(seen: Observation) -> Tensor:
    """P(best choice) - P(second) among the choices, in [0, 1].

    NaN where there are no choices of one token each; so are the others of its kind.
    """
    return seen.choice_top2[:, 0] - seen.choice_top2[:, 1]


@recorded(choices=True)
def choice_top_prob(seen: Observation) -> Tensor:
    """P(best choice) among the choices, in [1/C, 1]."""
    return seen.best_choice_prob


@recorded(choices=True)
def choice_entropy(seen: Observation) -> Tensor:
    """Entropy of the probabilities among the C choices over its maximum log C, in [0, 1]."""
    assert seen.choices is not None
    p = seen.choice_probabilities
    return -torch.xlogy(p, p).sum(dim=-1) / seen.choices.counts.float().log()


@derived()
def depth(seen: Observation | Recorded) -> Tensor:
    """How deep the block lies in the model: k / L."""
    n = len(seen.rows) if isinstance(seen, Observation) else len(seen.best_prob)
    return torch.full((n,), seen.block / seen.n_blocks)


@derived(head=True, past=True)
def agreement(seen: Observation | Recorded) -> Tensor:
    """How many of the blocks asked last, this one included, have this top token without a break; 1 at the first.

    NaN where the probabilities are: there is no top token then.
    """
    assert seen.past is not None
    same = seen.past[:, 0] == seen.best_token + 1
    return torch.where(seen.best_prob.isnan(), torch.nan, torch.where(same, seen.past[:, 1], 0.0) + 1)


@derived(head=True, past=True)
def top_prob_change(seen: Observation | Recorded) -> Tensor:
    """P(top 1) minus that of the block asked before (0 at the first), in (-1, 1]."""
    assert seen.past is not None
    return torch.where(seen.past[:, 0] > 0, seen.best_prob - seen.past[:, 2], 0.0)


@derived(past=True, choices=True)
def choice_agreement(seen: Observation | Recorded) -> Tensor:
    """How many of the blocks asked last, this one included, have this best choice without a break; 1 at the first."""
    assert seen.choice_past is not None
    same = seen.choice_past[:, 0] == seen.best_choice + 1
    return torch.where(seen.best_choice_prob.isnan(), torch.nan, torch.where(same, seen.choice_past[:, 1], 0.0) + 1)


def remember(seen: Observation | Recorded) -> None:
    """Note this block for the next one, in place.

    In ``seen.past``: top token + 1, agreement, P(top 1). In ``seen.choice_past``: best choice + 1, its agreement.
    """
    if seen.past is not None:
        seen.past[:] = torch.stack([(seen.best_token + 1).float(), agreement(seen), seen.best_prob], dim=-1)
    if seen.choice_past is not None:
        seen.choice_past[:] = torch.stack([(seen.best_choice + 1).float(), choice_agreement(seen)], dim=-1)


def depends_on_reader(name: str) -> bool:
    """Whether a recorded feature is of what a reader says; cosines are of the states themselves."""
    return not name.startswith("cos_")


RECORDED = {name: feature for name, feature in FEATURES.items() if feature.recorded}
DERIVED = {name: feature for name, feature in FEATURES.items() if not feature.recorded}


def needs_past(names: Sequence[str]) -> bool:
    """Whether any of these features reads what earlier blocks had said of the vocabulary."""
    return any(FEATURES[name].past and not FEATURES[name].choices for name in names)


def needs_choice_past(names: Sequence[str]) -> bool:
    """Whether any of these features reads what earlier blocks had said of the choices."""
    return any(FEATURES[name].past and FEATURES[name].choices for name in names)


def needs_recorded(names: Sequence[str]) -> list[str]:
    """The recorded features from which these follow, themselves included where they are recorded."""
    found = [name for name in names if name in RECORDED]
    found += ["top_prob"] if needs_past(names) else []
    found += ["choice_top_prob"] if needs_choice_past(names) else []
    return list(dict.fromkeys(found))


def past_width(names: Sequence[str]) -> int:
    """How many numbers are kept per decision for these features from one asked block to the next."""
    return PAST * needs_past(names) + CHOICE_PAST * needs_choice_past(names)


def pasts(names: Sequence[str], carried: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Views of the two pasts, the vocabulary's and the choices', in what is carried; None where none is needed.

    Args:
        names: The features.
        carried: [n, more], which begins with :func:`past_width` numbers for them; None where nothing is carried.
    """
    if carried is None:
        return None, None
    start = PAST * needs_past(names)
    past = carried[:, :PAST] if start else None
    return past, carried[:, start : start + CHOICE_PAST] if needs_choice_past(names) else None


def observe(
    names: Sequence[str],
    state: BlockState,
    rows: Tensor,
    positions: Tensor,
    logits: Tensor | None,
    n_blocks: int,
    carried: Tensor | None,
    choices: Choices | None = None,
) -> Observation:
    """An observation for these features; ``carried`` ([n, more]) begins with the past, where they need one."""
    past, choice_past = pasts(names, carried)
    return Observation(state, rows, positions, logits, n_blocks, past, choices, choice_past)


def read_choices(
    tokens: Sequence[Sequence[int]], read: Callable[[Tensor, Tensor], Tensor], device: torch.device
) -> Choices:
    """The choices at n decision positions.

    Args:
        tokens: Per decision, the token ids of its choices; empty where it has none of one token each.
        read: Called with indices of decisions ([m]) and token ids for them ([m, C]), to give the logits of these
            ([m, C]); not called where no decision has choices.
        device: Where the result is.
    """
    counts = torch.tensor([len(mine) for mine in tokens], dtype=torch.long, device=device)
    width = max([2, *map(len, tokens)])
    logits = torch.full((len(tokens), width), torch.nan, device=device)
    has = counts.nonzero()[:, 0]
    if len(has):
        padded = [[*mine, *[mine[0]] * (width - len(mine))] for mine in tokens if mine]
        found = read(has, torch.tensor(padded, device=device)).to(device).float()
        beyond = torch.arange(width, device=device) >= counts[has, None]
        logits[has] = found.masked_fill(beyond, -torch.inf)
    return Choices(logits, counts)


def choices_of(logits: Tensor, tokens: Sequence[Sequence[int]]) -> Choices:
    """The choices at n decision positions whose logits over the whole vocabulary ([n, V]) are there already."""
    return read_choices(tokens, lambda at, candidates: logits[at].gather(1, candidates), logits.device)


def check_names(names: Sequence[str], argument: str) -> None:
    """Raise AdaInferError where a name is not a feature's."""
    if not names:
        raise AdaInferError(f"{argument}: no feature is named; the features are {', '.join(FEATURES)}")
    for name in names:
        if name not in FEATURES:
            raise AdaInferError(f"{argument}: {name!r} is no feature; the features are {', '.join(FEATURES)}")


def needs_head(names: Sequence[str]) -> bool:
    """Whether any of these features reads the whole output head."""
    return any(FEATURES[name].head for name in names)


def needs_choices(names: Sequence[str]) -> bool:
    """Whether any of these features reads the logits of the choices."""
    return any(FEATURES[name].choices for name in names)


def needed_parts(names: Sequence[str]) -> list[str]:
    """Which parts of a block (``attn``, ``mlp``) these features read."""
    parts = (feature.part for name, feature in FEATURES.items() if name in names)
    return list(dict.fromkeys(part for part in parts if part is not None))


def compute(names: Sequence[str], seen: Observation) -> Tensor:
    """[n, len(names)] float32: the named features at the decision positions."""
    device = seen.state.hidden.device
    columns = [FEATURES[name](seen).to(device) for name in names]
    return torch.stack(columns, dim=-1) if columns else torch.empty(len(seen.rows), 0, device=device)
