"""What any strategy would have done on traced documents, in seconds: every number made here is *simulated*.

A document leaves after the first asked block at which the strategy says stop at each of its decisions
(``docs/numbers.md``, "One decision per document"), and its answer is read off the trace there. In generated text every
token is a decision of its own and there is no gold answer: exits and agreement only.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.statistics import tango_interval
from lm_eval_adainfer.strategies import specs
from lm_eval_adainfer.strategies.base import Schedule, Stopper
from lm_eval_adainfer.strategies.fitted import warn_if_foreign
from lm_eval_adainfer.strategies.rules import FixedStopper, GapStopper
from lm_eval_adainfer.traces import recording
from lm_eval_adainfer.traces.margins import margins
from lm_eval_adainfer.traces.outcomes import exits, stable

ORACLES = ("oracle:stable", "oracle:first")
RESAMPLES = 1000
SWEEP_POINTS = 20
_CONFIDENCE_Z = 1.959963984540054  # of a two-sided 95% interval
_logger = logging.getLogger(__name__)


@dataclass
class Trace:
    """A trace, seen as documents. D documents, N decisions, L blocks.

    Attributes:
        path: The file.
        meta: The file's.
        arrays: The file's.
        document: [N], the number of the document that each decision belongs to.
        doc_ids: [D].
    """

    path: Path
    meta: dict[str, Any]
    arrays: dict[str, np.ndarray]
    document: np.ndarray
    doc_ids: np.ndarray

    @property
    def generated(self) -> bool:
        """Whether these are the tokens of generated texts."""
        return self.meta["output_type"] == "generate_until"

    @property
    def setting(self) -> tuple[str, int, str]:
        """Task, shots, split."""
        return self.meta["task"], self.meta["num_fewshot"], self.meta["split"]

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.meta['task']} at {self.meta['num_fewshot']} shots, split {self.meta['split']}"

    @property
    def n_blocks(self) -> int:
        """L."""
        return self.meta["n_blocks"]

    @cached_property
    def scores(self) -> np.ndarray:
        """[D, L, R], log-probability of request r of the document after every block; -inf where there is none."""
        request, scores = self.arrays["request"], self.arrays["scores"]
        found = np.full((len(self.doc_ids), self.n_blocks, max(1, int(request.max(initial=0)) + 1)), -np.inf)
        for column in range(request.shape[1]):
            has = request[:, column] >= 0
            found[self.document[has], :, request[has, column]] = scores[has, :, column]
        return found

    @cached_property
    def answers(self) -> np.ndarray:
        """[D, L], what would be answered after every block, as a number that is equal where the answers are.

        The choice of best score; without choices the top token, and whether greedy decoding gives the gold answer
        (a trace does not hold what else it might give).
        """
        if self.meta["output_type"] == "multiple_choice":
            return self.scores.argmax(axis=-1)  # the first of equals, as lm-eval takes it
        first = np.zeros(len(self.doc_ids), dtype=int)
        first[self.document[::-1]] = np.arange(len(self.document))[::-1]
        top = self.arrays["top_token"].astype(np.int64)
        if "greedy" in self.arrays and not self.generated:
            top = 2 * top + self.arrays["greedy"][:, :, 0]
        return top[first]

    @cached_property
    def right(self) -> np.ndarray:
        """[D, L] float, whether the task's ``acc`` would count the answer; NaN where nothing tells."""
        unknown = np.full(self.answers.shape, np.nan)
        request = self.arrays.get("request")
        if self.generated or request is None:
            return unknown
        if self.meta["output_type"] == "loglikelihood":  # acc: greedy decoding gives the whole continuation
            if "greedy" not in self.arrays:
                return unknown
            greedy = unknown.copy()
            greedy[self.document] = self.arrays["greedy"][:, :, 0]
            return greedy
        flags = self.arrays.get("right", (request == self.arrays["gold"][:, None]) & (request >= 0))
        good = np.zeros((len(self.doc_ids), self.scores.shape[-1]), dtype=bool)
        for column in range(request.shape[1]):
            good[self.document, request[:, column]] |= flags[:, column].astype(bool) & (request[:, column] >= 0)
        if not good.any():
            return unknown
        return np.take_along_axis(good, self.answers, axis=1).astype(float)

    @cached_property
    def top1(self) -> np.ndarray:
        """[D, L] float, whether the top token is the gold answer's first; NaN where nothing tells."""
        gold, unknown = self.arrays["gold_token"], np.full(self.answers.shape, np.nan)
        several = len(self.document) != len(self.doc_ids)  # choices that are contexts share one continuation
        if self.generated or several:
            return unknown
        found = (self.arrays["top_token"] == gold[:, None]).astype(float)
        found[gold < 0] = np.nan
        unknown[self.document] = found
        return unknown

    @cached_property
    def prompt_tokens(self) -> np.ndarray:
        """[D], mean over the document's decisions."""
        return np.bincount(self.document, self.arrays["prompt_tokens"]) / np.bincount(self.document)

    def oracle(self, name: str) -> np.ndarray:
        """[D, L], 1 where the oracle stops, -1 elsewhere."""
        agrees = stable(self.answers) if name == "oracle:stable" else self.answers == self.answers[:, -1:]
        return np.where(agrees, 1.0, -1.0)


def load(files: Sequence[str | Path], split: str | None = None) -> list[Trace]:
    """Read traces of one model.

    Args:
        files: Trace files.
        split: Only those of this split.

    Raises:
        AdaInferError: On damaged or empty traces, NaN features or scores, traces of two models, the same task at the
            same shots twice, or where none is of the split.
    """
    traces: list[Trace] = []
    first: Trace | None = None
    seen: dict[tuple[str, int, str], Path] = {}
    for file in map(Path, files):
        meta, arrays = recording.read(file)
        if len(arrays["top_token"]) == 0:
            raise AdaInferError(f"traces: {file} is empty: it has no decision; trace documents that have a context")
        recording.require_finite(file, arrays["features"])
        if missing := [name for name in ("scores", "request", "gold", "doc_id") if name not in arrays]:
            raise AdaInferError(f"traces: {file} is incomplete: it has no array {missing[0]}; trace again")
        if np.isnan(arrays["scores"].transpose(0, 2, 1)[arrays["request"] >= 0]).any():
            raise AdaInferError(f"traces: {file} holds NaN scores; trace in a dtype that does not overflow")
        if meta["output_type"] == "generate_until":
            doc_ids, document = arrays["doc_id"], np.arange(len(arrays["top_token"]))
        else:
            doc_ids, document = np.unique(arrays["doc_id"], return_inverse=True)
        trace = Trace(file, meta, arrays, document, doc_ids)
        first = first or trace
        recording.require_one_model(file, meta, first.meta)
        if trace.setting in seen:
            raise AdaInferError(f"traces: {seen[trace.setting]} and {file} are both of {trace.name}; give one of them")
        seen[trace.setting] = file
        if split is None or meta["split"] == split:
            traces.append(trace)
    if not traces:
        raise AdaInferError(f"split: none of these {len(files)} traces is of split {split}; give another, or leave out")
    return traces


def parse(spec: Any, n_blocks: int) -> Stopper | str:
    """A strategy: whatever ``stopper=`` takes, an oracle's name, or ``shortgpt:lastN``.

    Skipping the last N blocks is leaving after block L - N, so that one needs no run of its own.

    Raises:
        AdaInferError: Where it is unknown, or can't be replayed.
    """
    text = str(spec).strip() if not isinstance(spec, Stopper) else ""
    if text in ORACLES:
        return text
    if text.startswith("oracle"):
        raise AdaInferError(f"stopper: {text!r} is no oracle; there are {' and '.join(ORACLES)}")
    if text.startswith("shortgpt:"):
        last = text.removeprefix("shortgpt:last")
        if not last.isdecimal() or not 1 <= int(last) < n_blocks:
            raise AdaInferError(
                f"stopper: {text!r} can't be replayed: dropping blocks in between changes what later ones say; "
                f"shortgpt:lastN can, for N from 1 to {n_blocks - 1}"
            )
        return FixedStopper(n_blocks - int(last))
    stopper = specs.parse(spec)
    if stopper.kind == "shortgpt" and not isinstance(stopper, FixedStopper):  # it changes the model, so it needs a run
        raise AdaInferError(
            f"stopper: {spec} can't be replayed: dropping blocks in between changes what later ones say; run it"
        )
    return stopper


def document_margins(
    strategy: Stopper | str, trace: Trace, min_layer: Any = 1, check_layers: Any = "all"
) -> np.ndarray:
    """[D, L] margins of whole documents (the least of their decisions'; positive: stop), NaN where none is asked.

    Args:
        strategy: A :class:`Stopper` or an oracle's name.
        trace: The documents.
        min_layer: As the model's argument.
        check_layers: As the model's argument.
    """
    found = np.full((len(trace.doc_ids), trace.n_blocks), np.nan)
    if isinstance(strategy, str):
        asked = Schedule(trace.n_blocks, GapStopper(), min_layer, check_layers).blocks  # it may stop after any block
        at = [k - 1 for k in asked]
        found[:, at] = trace.oracle(strategy)[:, at]
        return found
    blocks = Schedule(trace.n_blocks, strategy, min_layer, check_layers).blocks
    said = margins(strategy, trace.meta, trace.arrays, blocks)
    if blocks:
        at = [k - 1 for k in blocks]
        least = np.full((len(trace.doc_ids), len(at)), np.inf)
        np.minimum.at(least, trace.document, said[:, at])
        found[:, at] = least
    return found


def evaluate(
    traces: Sequence[Trace], found: Sequence[np.ndarray], threshold: float = 0.0, seed: int = 0
) -> dict[str, Any]:
    """What exits at these margins come to over the documents of some traces; *simulated*.

    Args:
        traces: The documents; one with several shot counts counts once per count.
        found: Per trace, its [D, L] margins.
        threshold: Stop where the margin exceeds it.
        seed: Of the bootstrap.

    Returns:
        ``documents``, ``acc``, ``acc_change`` (against the dense answer), ``top1_acc``, ``agreement`` (with the dense
        answer), ``exit_layer``, ``exit_layer_var``, ``pruning_ratio``, ``flops_ratio`` (Eq. 2), ``of_stable`` and
        ``of_first`` (the share of the oracle's saving), and under ``*_low``/``*_high`` 95% intervals: Wilson's over
        distinct documents for shares, Tango's paired score interval over distinct documents for ``acc_change``, the
        paired bootstrap over distinct documents for the others. None where nothing tells.
    """
    parts, clusters = [], []
    for trace, said in zip(traces, found, strict=True):
        layer = exits(said, threshold)
        at = (np.arange(len(layer)), layer - 1)
        right, answers = trace.right, trace.answers
        parts.append(
            np.stack(
                [
                    right[at],
                    right[at] - right[:, -1],
                    trace.top1[at],
                    (answers[at] == answers[:, -1]).astype(float),
                    layer.astype(float),
                    _flops_ratio(trace, layer),
                    exits(trace.oracle("oracle:stable")).astype(float),
                    exits(trace.oracle("oracle:first")).astype(float),
                ],
                axis=1,
            )
        )
        clusters += [(trace.meta["task"], trace.meta["split"], int(i)) for i in trace.doc_ids]
    values, n_blocks = np.concatenate(parts), traces[0].n_blocks
    number = {key: i for i, key in enumerate(dict.fromkeys(clusters))}
    cluster = np.array([number[key] for key in clusters])
    known = ~np.isnan(values)
    sums, sizes = (np.zeros((len(number), values.shape[1])) for _ in range(2))
    np.add.at(sums, cluster, np.where(known, values, 0.0))
    np.add.at(sizes, cluster, known)

    mean = _means(sums.sum(0), sizes.sum(0))
    draws = np.random.default_rng(seed).multinomial(len(number), np.full(len(number), 1 / len(number)), RESAMPLES)
    resampled = _means(draws @ sums, draws @ sizes)
    # Answers to one document at several shots may all be alike, so together they count as one document. Where some
    # documents are asked at more shots than others, the mean is worth this many (Kish's effective sample size).
    distinct = sizes.sum(0) ** 2 / np.maximum((sizes**2).sum(0), 1)

    row: dict[str, Any] = {"documents": len(values), "distinct_documents": len(number)}
    for i, name in ((0, "acc"), (2, "top1_acc"), (3, "agreement")):
        row |= _with_interval(name, mean[i], *_wilson(mean[i], distinct[i]))
    row |= _with_interval("acc_change", mean[1], *_paired(values[known[:, 1], 1], distinct[1]))
    row |= _bootstrapped("exit_layer", mean[4], resampled[:, 4])
    row["exit_layer_var"] = float(values[:, 4].var())
    row |= _bootstrapped("pruning_ratio", 1 - mean[4] / n_blocks, 1 - resampled[:, 4] / n_blocks)
    row |= _bootstrapped("flops_ratio", mean[5], resampled[:, 5])
    for i, name in ((6, "of_stable"), (7, "of_first")):
        row |= _bootstrapped(name, _share(mean, i, n_blocks), _share(resampled, i, n_blocks))
    return row


def _means(sums: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    return np.where(sizes > 0, sums / np.maximum(sizes, 1), np.nan)


def _share(mean: np.ndarray, oracle: int, n_blocks: int) -> np.ndarray:
    """The strategy's saving over the oracle's; NaN where the oracle saves nothing."""
    possible = n_blocks - mean[..., oracle]
    return np.where(possible > 0, (n_blocks - mean[..., 4]) / np.where(possible > 0, possible, 1), np.nan)


def _with_interval(name: str, value: float, low: float, high: float) -> dict[str, float | None]:
    numbers = {name: value, f"{name}_low": low, f"{name}_high": high}
    return {key: None if np.isnan(x) else float(x) for key, x in numbers.items()}


def _bootstrapped(name: str, value: Any, resampled: np.ndarray) -> dict[str, float | None]:
    fine = resampled[~np.isnan(resampled)]
    low, high = np.quantile(fine, [0.025, 0.975]) if len(fine) else (np.nan, np.nan)
    return _with_interval(name, float(value), float(low), float(high))


def _paired(changes: np.ndarray, n: float) -> tuple[float, float]:
    """Tango's 95% interval of a mean of changes that are -1, 0 or 1, worth ``n`` independent documents."""
    if not len(changes):
        return np.nan, np.nan
    won, lost = (n * float((changes == sign).mean()) for sign in (1, -1))
    found = tango_interval(won, lost, n)
    return found.lower, found.upper


def _wilson(share: float, n: float) -> tuple[float, float]:
    """Wilson's 95% interval of a share of n."""
    if n == 0 or np.isnan(share):
        return np.nan, np.nan
    z2 = _CONFIDENCE_Z**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _CONFIDENCE_Z / (1 + z2 / n) * np.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def _flops_ratio(trace: Trace, layer: np.ndarray) -> np.ndarray:
    """[D], the paper's Eq. 2."""
    hidden = trace.meta.get("block_hidden_size", trace.meta["hidden_size"])
    per_block = 2 * (6 * hidden + trace.prompt_tokens)
    return (layer * per_block + trace.meta["vocab_size"]) / (trace.n_blocks * per_block + trace.meta["vocab_size"])


def groups(traces: Sequence[Trace]) -> Iterator[tuple[str, str, str, list[Trace]]]:
    """(task, shots, split, traces) of every row: each trace, each task over its shots, everything pooled.

    Documents and generated tokens are never pooled with each other, nor is one split with another.
    """
    for task, split in dict.fromkeys((t.meta["task"], t.meta["split"]) for t in traces):
        mine = [t for t in traces if (t.meta["task"], t.meta["split"]) == (task, split)]
        mine.sort(key=lambda t: t.meta["num_fewshot"])
        for trace in mine:
            yield task, str(trace.meta["num_fewshot"]), split, [trace]
        if len(mine) > 1:
            yield task, "/".join(str(t.meta["num_fewshot"]) for t in mine), split, mine
    for split, generated in dict.fromkeys((t.meta["split"], t.generated) for t in traces):
        pool = [t for t in traces if (t.meta["split"], t.generated) == (split, generated)]
        if len({t.meta["task"] for t in pool}) > 1:
            shots = "/".join(map(str, sorted({t.meta["num_fewshot"] for t in pool})))
            yield "pooled" + (" (generated tokens)" if generated else ""), shots, split, pool


def replay(
    traces: Sequence[Trace],
    stoppers: Sequence[Any],
    min_layer: Any = 1,
    check_layers: Any = "all",
    sweep: bool = False,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """A row per group of traces and strategy; with ``sweep`` per threshold as well.

    Args:
        traces: Of one model.
        stoppers: What :func:`parse` takes.
        min_layer: As the model's argument.
        check_layers: As the model's argument.
        sweep: Move each strategy's threshold over the quantiles of its margins.
        seed: Of the bootstrap.

    Returns:
        Rows: ``task``, ``shots``, ``split``, ``stopper``, ``threshold`` (with ``sweep``), and :func:`evaluate`'s.

    Raises:
        AdaInferError: On a strategy that is unknown, does not fit the traces or has no threshold to sweep.
    """
    rows = []
    n_blocks = traces[0].n_blocks
    for spec in stoppers:
        strategy = parse(spec, n_blocks)
        name = spec.kind if isinstance(spec, Stopper) else str(spec).strip()
        if isinstance(strategy, Stopper):
            warn(strategy, traces)
        if sweep and (isinstance(strategy, str) or not strategy.features):
            raise AdaInferError(f"sweep: {name} has no threshold to move; give gap, svm or another stopper that has")
        found = {t.setting: document_margins(strategy, t, min_layer, check_layers) for t in traces}
        thresholds = _quantiles(found.values()) if sweep else [0.0]
        for threshold in thresholds:
            own = {"threshold": threshold + getattr(strategy, "threshold", 0.0)} if sweep else {}
            for task, shots, split, members in groups(traces):
                said = [found[t.setting] for t in members]
                numbers = evaluate(members, said, threshold, seed)
                rows.append({"task": task, "shots": shots, "split": split, "stopper": name, **own, **numbers})
    order = {group[:3]: i for i, group in enumerate(groups(traces))}
    return sorted(rows, key=lambda row: order[row["task"], row["shots"], row["split"]])


def _quantiles(found: Any) -> list[float]:
    """Thresholds from the strictest (never) to the loosest (always), the strategy's own among them."""
    everything = np.concatenate([m[~np.isnan(m)] for m in found])
    if len(everything) == 0:
        return [0.0]
    cuts = np.quantile(everything, np.linspace(1, 0, SWEEP_POINTS))
    below = everything.min() - 1e-6 * max(1.0, abs(everything.min()))
    return sorted({0.0, *map(float, cuts), float(below)}, reverse=True)


def warn(stopper: Stopper, traces: Sequence[Trace]) -> None:
    """Say so where a stopper was fitted on another model, or on the very split it is now tried on."""
    meta = traces[0].meta
    warn_if_foreign(stopper, meta["model"], meta["n_blocks"], meta["head_hash"])
    info = getattr(stopper, "info", None) or {}
    same = sorted(
        {t.meta["task"] for t in traces if t.meta["split"] in info.get("split", ()) and
         all(t.meta[key] == info.get(key) for key in ("n_blocks", "head_hash"))} & set(info.get("tasks", ()))
    )  # fmt: skip
    if same:
        _logger.warning(
            "stopper: it was fitted on this split of %s; replay documents that it has not seen (adainfer trace --split "
            "test)",
            ", ".join(same),
        )
