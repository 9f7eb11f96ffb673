"""What exits come to over the documents of some traces, with intervals over documents: all of it *simulated*."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lm_eval_adainfer.bounded import gaffke_interval
from lm_eval_adainfer.counting import flops_ratio
from lm_eval_adainfer.statistics import tango_interval, wilson_interval
from lm_eval_adainfer.traces.documents import TracedDocuments, at_exit, exits

RESAMPLES = 1000
SMALL = 10  # tasks of fewer units are resampled together: alone, so few would hardly vary
# what is known of a document's exit; of_stable and of_first start as the exits of the oracles
_COLUMNS = ("acc", "acc_change", "top1_acc", "agreement", "exit_layer", "flops_ratio", "of_stable", "of_first")


def evaluate(
    traces: Sequence[TracedDocuments],
    found: Sequence[np.ndarray],
    threshold: float = 0.0,
    seed: int = 0,
    clusters: Sequence[np.ndarray] | None = None,
) -> dict[str, Any]:
    """What exits at these margins come to over the documents of some traces; *simulated*.

    Documents weigh the same, so a task weighs by their number; the tasks and these numbers are taken as given, and
    intervals are over the documents within tasks.

    Args:
        traces: The documents; one with several shot counts counts once per count.
        found: Per trace, its [D, L] margins.
        threshold: Stop where the margin exceeds it.
        seed: Of the bootstrap.
        clusters: Per trace, [D] numbers that are equal where documents belong together (``clustering.of_documents``);
            None where each stands for itself.

    Returns:
        ``documents``, ``distinct_documents``, ``tasks``, ``weighs``, with clusters ``clusters``, ``acc``,
        ``acc_change`` (against the dense answer), ``top1_acc``, ``agreement`` (with the dense answer), ``exit_layer``,
        ``exit_layer_var``, ``pruning_ratio``, ``flops_ratio`` (Eq. 2), ``of_stable`` and ``of_first`` (the share of the
        oracle's saving), and under ``*_low``/``*_high`` 95% intervals: for shares Wilson's over distinct documents, at
        the number that has their variance within tasks; for ``acc_change`` Tango's paired score interval over distinct
        documents; with clusters Gaffke's for both; for the others the paired bootstrap within tasks, of distinct
        documents or clusters. None where nothing tells.
    """
    parts: list[np.ndarray] = []
    documents: list[tuple[str, str, int]] = []
    units: list[Any] = []
    tasks: list[str] = []
    for number, (trace, said) in enumerate(zip(traces, found, strict=True)):
        left = exits(said, threshold)
        right, dense = at_exit(trace.right, left), trace.right[:, -1]
        columns = {
            "acc": right,
            "acc_change": right - dense,
            "top1_acc": at_exit(trace.top1, left),
            "agreement": at_exit(trace.answers, left) == trace.answers[:, -1],
            "exit_layer": left,
            "flops_ratio": _flops_ratio(trace, left),
            "of_stable": exits(trace.oracle("oracle:stable")),
            "of_first": exits(trace.oracle("oracle:first")),
        }
        parts.append(np.stack([columns[name].astype(float) for name in _COLUMNS], axis=1))
        keys = [(trace.meta["task"], trace.meta["split"], int(i)) for i in trace.doc_ids]
        documents += keys
        units += keys if clusters is None else clusters[number].tolist()
        tasks += [trace.meta["task"]] * len(keys)
    values, n_blocks = np.concatenate(parts), traces[0].n_blocks
    unit = _numbered(units)
    known = ~np.isnan(values)
    sums, sizes = (np.zeros((unit.max() + 1, values.shape[1])) for _ in range(2))
    np.add.at(sums, unit, np.where(known, values, 0.0))
    np.add.at(sizes, unit, known)

    mean = _means(sums.sum(0), sizes.sum(0))
    stratum = _strata(_numbered(tasks), unit)
    draws = _draws(stratum, seed)
    resampled = _means(draws @ sums, draws @ sizes)
    # Answers to one document at several shots may all be alike, so together they count as one document. Where some
    # documents are asked at more shots than others, the mean is worth this many (Kish's effective sample size).
    distinct = sizes.sum(0) ** 2 / np.maximum((sizes**2).sum(0), 1)

    row: dict[str, Any] = {
        "documents": len(values),
        "distinct_documents": len(set(documents)),
        **({} if clusters is None else {"clusters": len(sums)}),
        "tasks": len(set(tasks)),
        "weighs": "documents",
    }
    for name in ("acc", "top1_acc", "agreement"):
        i = _COLUMNS.index(name)
        if clusters is None:
            worth = distinct[i] * _gain(sums[:, i], sizes[:, i], stratum)
            interval: tuple[Any, Any] = wilson_interval(mean[i], worth)
        else:
            interval = _gaffke(2 * sums[:, i] - sizes[:, i], sizes[:, i])
            interval = (interval[0] + 1) / 2, (interval[1] + 1) / 2
        row |= _with_interval(name, mean[i], *interval)
    change, layer, eq2 = (_COLUMNS.index(name) for name in ("acc_change", "exit_layer", "flops_ratio"))
    if clusters is None:
        interval = _paired(values[known[:, change], change], distinct[change])
    else:
        interval = _gaffke(sums[:, change], sizes[:, change])
    row |= _with_interval("acc_change", mean[change], *interval)
    row |= _bootstrapped("exit_layer", mean[layer], resampled[:, layer])
    row["exit_layer_var"] = float(values[:, layer].var())
    row |= _bootstrapped("pruning_ratio", 1 - mean[layer] / n_blocks, 1 - resampled[:, layer] / n_blocks)
    row |= _bootstrapped("flops_ratio", mean[eq2], resampled[:, eq2])
    for name in ("of_stable", "of_first"):
        i = _COLUMNS.index(name)
        saved, resampled_saved = (_share(x[..., layer], x[..., i], n_blocks) for x in (mean, resampled))
        row |= _bootstrapped(name, saved, resampled_saved)
    return row


def _numbered(keys: Sequence[Any]) -> np.ndarray:
    """Numbers from 0, equal where the keys are."""
    number = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    return np.array([number[key] for key in keys])


def _strata(task: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """[units], within which they are resampled: a task; tasks that share a cluster, and small ones, together."""
    stratum = np.arange(task.max() + 1)
    first = np.full(unit.max() + 1, -1)
    for t, u in dict.fromkeys(zip(task.tolist(), unit.tolist(), strict=True)):
        if first[u] < 0:
            first[u] = t
        else:
            stratum[stratum == stratum[t]] = stratum[first[u]]
    of = stratum[first]
    sizes = np.bincount(of)
    small = sizes[of] < SMALL
    of[small] = len(sizes)
    return of


def _draws(stratum: np.ndarray, seed: int) -> np.ndarray:
    """[RESAMPLES, units], how often each is drawn."""
    generator, found = np.random.default_rng(seed), np.zeros((RESAMPLES, len(stratum)), dtype=int)
    for number in dict.fromkeys(stratum.tolist()):
        mine = np.flatnonzero(stratum == number)
        found[:, mine] = generator.multinomial(len(mine), np.full(len(mine), 1 / len(mine)), RESAMPLES)
    return found


def _gain(sums: np.ndarray, sizes: np.ndarray, stratum: np.ndarray) -> float:
    """A share's variance over that within strata: how many times as many documents it is worth for being stratified.

    Wilson's interval at such an effective number is Korn and Graubard's idea (Survey Methodology 24, 1998). Strata are
    pulled towards the whole by one document, so that those of a single document do not pass for ones without variance.
    """
    if not sizes.sum():
        return 1.0
    share = sums.sum() / sizes.sum()
    hits, weights = np.bincount(stratum, sums), np.bincount(stratum, sizes)
    shares = (hits + share) / (weights + 1)
    within = float(np.average(shares * (1 - shares), weights=weights))
    return max(1.0, share * (1 - share) / within) if within > 0 else 1.0


def _gaffke(totals: np.ndarray, sizes: np.ndarray) -> tuple[float, float]:
    """Gaffke's 95% interval of a mean whose values are from -1 to 1, from the totals and sizes of clusters."""
    known = sizes > 0
    if not known.any():
        return np.nan, np.nan
    found = gaffke_interval(totals[known], sizes[known])
    return found.lower, found.upper


def _means(sums: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    return np.where(sizes > 0, sums / np.maximum(sizes, 1), np.nan)


def _share(exit_layer: np.ndarray, oracles: np.ndarray, n_blocks: int) -> np.ndarray:
    """The strategy's saving over the oracle's; NaN where the oracle saves nothing."""
    possible = n_blocks - oracles
    return np.where(possible > 0, (n_blocks - exit_layer) / np.where(possible > 0, possible, 1), np.nan)


def _with_interval(name: str, value: Any, low: Any, high: Any) -> dict[str, float | None]:
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


def _flops_ratio(trace: TracedDocuments, layer: np.ndarray) -> np.ndarray:
    """[D], the paper's Eq. 2 at these exits."""
    hidden = trace.meta.get("block_hidden_size", trace.meta["hidden_size"])
    return flops_ratio(layer, trace.n_blocks, hidden, trace.prompt_tokens, trace.meta["vocab_size"])
