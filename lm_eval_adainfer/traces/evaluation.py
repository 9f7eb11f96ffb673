"""What exits come to over the documents of some traces, with intervals over documents: all of it *simulated*."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lm_eval_adainfer.counting import flops_ratio
from lm_eval_adainfer.statistics import tango_interval, wilson_interval
from lm_eval_adainfer.traces.documents import TracedDocuments, at_exit, exits

RESAMPLES = 1000
# what is known of a document's exit; of_stable and of_first start as the exits of the oracles
_COLUMNS = ("acc", "acc_change", "top1_acc", "agreement", "exit_layer", "flops_ratio", "of_stable", "of_first")


def evaluate(
    traces: Sequence[TracedDocuments], found: Sequence[np.ndarray], threshold: float = 0.0, seed: int = 0
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
    for name in ("acc", "top1_acc", "agreement"):
        i = _COLUMNS.index(name)
        row |= _with_interval(name, mean[i], *wilson_interval(mean[i], distinct[i]))
    change, layer, eq2 = (_COLUMNS.index(name) for name in ("acc_change", "exit_layer", "flops_ratio"))
    row |= _with_interval("acc_change", mean[change], *_paired(values[known[:, change], change], distinct[change]))
    row |= _bootstrapped("exit_layer", mean[layer], resampled[:, layer])
    row["exit_layer_var"] = float(values[:, layer].var())
    row |= _bootstrapped("pruning_ratio", 1 - mean[layer] / n_blocks, 1 - resampled[:, layer] / n_blocks)
    row |= _bootstrapped("flops_ratio", mean[eq2], resampled[:, eq2])
    for name in ("of_stable", "of_first"):
        i = _COLUMNS.index(name)
        saved, resampled_saved = (_share(x[..., layer], x[..., i], n_blocks) for x in (mean, resampled))
        row |= _bootstrapped(name, saved, resampled_saved)
    return row


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
