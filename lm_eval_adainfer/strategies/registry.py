"""The registry: one declaration per exit strategy, which every list of strategies is made from.

``stopper=`` (``specs``), stopper files (``files``), ``adainfer fit``, recipes, help texts and the table in
``docs/strategies.md`` read it. Classes are named, not imported, because the command's ``--help`` reads it too and must
not load torch. The functions that fit a strategy are in ``fitting.fit.FITTERS``, by the names given here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lm_eval_adainfer.strategies.base import Stopper


PAPER_FEATURES = ("gap", "top_prob")  # what the paper's classifiers read
_PAPER_LABELS = ("final", "gold")
_LABELS = (*_PAPER_LABELS, "stable")


@dataclass(frozen=True)
class Fit:
    """How a strategy is fitted on traces, as far as its command and its documentation need to know.

    Attributes:
        title: What is fitted, for help texts; it continues "Fit ...".
        labels: The labels that ``adainfer fit`` offers.
        features: The features that it reads by default; None for all that the traces have.
        threshold: The default threshold.
        most: How many examples (for the crf: sequences) are used at most by default.
    """

    title: str
    labels: tuple[str, ...]
    features: tuple[str, ...] | None
    threshold: float
    most: int


@dataclass(frozen=True)
class Strategy:
    """What is known of a strategy without loading it.

    Attributes:
        name: What ``stopper=`` and stopper files call it: the ``kind`` of its class.
        where: Its class, ``module:Class``; a module that begins with a dot lies in this folder.
        stops: When it stops: it continues "It stops ..." and explains the examples in ``specs``.
        specs: What ``stopper=`` may say, by example, the usual form first; empty where only a file can name it. A
            strategy whose bare name is among them may be given without a value, and then means the first.
        read: Makes arguments of its class from what a spec says after the colon, and raises ValueError where it can't;
            None where nothing may follow. The argument ``file``, if there is one, names the stopper file whose arrays
            are taken.
        wrong: What is wrong with a spec that ``read`` refuses: it continues "stopper: 'gap:x' ...".
        savable: Whether a stopper file can hold it.
        measured_by: The command that writes a file of it, where that is not ``adainfer fit``.
        fit: How it is fitted on traces; None where it is not.
    """

    name: str
    where: str
    stops: str
    specs: tuple[str, ...] = ()
    read: Callable[[str], dict[str, Any]] | None = None
    wrong: str = ""
    savable: bool = True
    measured_by: str = ""
    fit: Fit | None = None

    def stopper_class(self) -> type[Stopper]:
        """Its class, imported now: this loads torch."""
        module, _, name = self.where.partition(":")
        return getattr(import_module(module, __package__), name)

    @property
    def command(self) -> str:
        """The command that writes a stopper file of it; empty where there is none."""
        return f"adainfer fit {self.name}" if self.fit else self.measured_by

    @property
    def features(self) -> tuple[str, ...] | None:
        """The features that it reads; None where every fitted one names its own."""
        return None if self.fit else self.stopper_class().features


def specs() -> tuple[str, ...]:
    """An example of every strategy that ``stopper=`` can name without a file."""
    return tuple(strategy.specs[0] for strategy in STRATEGIES.values() if strategy.specs)


def savable() -> tuple[str, ...]:
    """The names of the strategies that a stopper file can hold."""
    return tuple(strategy.name for strategy in STRATEGIES.values() if strategy.savable)


def fitted() -> dict[str, Fit]:
    """Name to how it is fitted, of every strategy that ``adainfer fit`` can make."""
    return {strategy.name: strategy.fit for strategy in STRATEGIES.values() if strategy.fit}


# ------------------------------------------------------------------------------- what specs say after the colon
def _threshold(text: str) -> dict[str, Any]:
    return {"threshold": float(text)}


def _threshold_and_blocks(text: str) -> dict[str, Any]:
    """``0.5``, or ``0.5:3`` with a number of blocks."""
    threshold, colon, blocks = text.partition(":")
    return {**_threshold(threshold), **(_number_of_blocks(blocks) if colon else {})}


def _number_of_blocks(text: str) -> dict[str, Any]:
    if not text.strip().isdecimal() or int(text) < 1:
        raise ValueError(text)
    return {"blocks": int(text)}


def _block_number(text: str) -> dict[str, Any]:
    if not text.strip().isdecimal():
        raise ValueError(text)
    return {"layer": int(text)}


def _dropped_blocks(text: str) -> dict[str, Any]:
    """``last5``, or ``bi:8:FILE`` with a file of ``adainfer influence``."""
    found = re.fullmatch(r"last(\d+)|bi:(\d+):(.+)", text, re.DOTALL)
    if found is None:
        raise ValueError(text)
    last, drop, file = found.groups()
    return {"last": int(last)} if last else {"drop": int(drop), "file": file}


# ------------------------------------------------------------------------------- the strategies
_NO_THRESHOLD = "has no number after {name}:; give a threshold between 0 and 1, as in {name}:0.9"

# In the order in which lists and tables name them. To add a strategy, add its declaration here.
_DECLARED = (
    Strategy("none", ".rules:NoStopper", "never: the dense model", specs=("none",)),
    Strategy(
        "gap",
        ".rules:GapStopper",
        "where P(top 1) - P(top 2) exceeds 0.8, the paper's GAP rule",
        specs=("gap:0.8", "gap"),
        read=_threshold,
        wrong=_NO_THRESHOLD,
    ),
    Strategy(
        "softmax",
        ".rules:SoftmaxStopper",
        "where CALM's softmax measure exceeds 0.9: the rule of `gap` under its other name",
        specs=("softmax:0.9",),
        read=_threshold,
        wrong=_NO_THRESHOLD,
    ),
    Strategy(
        "saturation",
        ".rules:SaturationStopper",
        "where the hidden state's cosine with the block before exceeds 0.98 (CALM)",
        specs=("saturation:0.98",),
        read=_threshold,
        wrong=_NO_THRESHOLD,
    ),
    Strategy(
        "patience",
        ".rules:PatienceStopper",
        "where 3 asked blocks in a row have the same top token (PABEE)",
        specs=("patience:3",),
        read=_number_of_blocks,
        wrong="has no number of blocks of 1 or more; give patience:3, say",
    ),
    Strategy(
        "choice_gap",
        ".rules:ChoiceGapStopper",
        "where P(best) - P(second) among choices of one token each exceeds 0.5, after 3 asked blocks in a row where a "
        "number follows",
        specs=("choice_gap:0.5", "choice_gap:0.5:3"),
        read=_threshold_and_blocks,
        wrong="is neither choice_gap:0.5, say, nor choice_gap:0.5:3 with a number of blocks",
    ),
    Strategy(
        "fixed",
        ".rules:FixedStopper",
        "always after block 24",
        specs=("fixed:24",),
        read=_block_number,
        wrong="has no block number; give fixed:24 to stop after block 24",
    ),
    Strategy(
        "svm",
        ".svm:SVMStopper",
        "where the decision function of the paper's classifier exceeds the threshold",
        fit=Fit("the paper's support vector machine", _PAPER_LABELS, PAPER_FEATURES, threshold=0.0, most=5000),
    ),
    Strategy(
        "crf",
        ".crf:CRFStopper",
        'where a conditional random field along the blocks gives "stop" a probability above the threshold, from the '
        "blocks seen so far",
        fit=Fit("a conditional random field along the blocks", _PAPER_LABELS, PAPER_FEATURES, threshold=0.5, most=5000),
    ),
    Strategy(
        "logistic",
        ".network:LogisticStopper",
        "where logistic regression gives the answer's being there a calibrated probability above the threshold",
        fit=Fit("logistic regression", _LABELS, None, threshold=0.95, most=20000),
    ),
    Strategy(
        "mlp",
        ".network:MLPStopper",
        "where a small multilayer perceptron gives such a probability",
        fit=Fit("a small multilayer perceptron", _LABELS, None, threshold=0.95, most=20000),
    ),
    Strategy(
        "boosted",
        ".trees:BoostedStopper",
        "where gradient-boosted trees give such a probability",
        fit=Fit("gradient-boosted trees", _LABELS, None, threshold=0.95, most=20000),
    ),
    Strategy(
        "shortgpt",
        ".shortgpt:ShortGPTStopper",
        "always before the last 5 blocks (ShortGPT in the paper); with `bi` or a file not at all, but the 8 blocks of "
        "least Block Influence are taken out of the model",
        specs=("shortgpt:last5", "shortgpt:bi:8:FILE"),
        read=_dropped_blocks,
        wrong="is neither shortgpt:last5, say, nor shortgpt:bi:8:FILE, where adainfer influence has written FILE",
        measured_by="adainfer influence",
    ),
)
STRATEGIES: dict[str, Strategy] = {strategy.name: strategy for strategy in _DECLARED}
