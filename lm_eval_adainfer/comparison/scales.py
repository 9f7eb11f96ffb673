"""On which scale a metric is compared document by document, and which way is better.

lm-eval logs per document whatever the metric's aggregation takes, which need not be the metric: for perplexity it is a
log-likelihood, for BLEU a pair of texts. What the aggregation is, the task's config says; where the results hold the
aggregated value, the documents must give it, so that an aggregation of the task's own is not taken for a mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lm_eval_adainfer.comparison.samples import Document

_MEAN, _PERPLEXITY, _WEIGHTED, _BITS = "mean", "perplexity", "weighted_perplexity", "bits_per_byte"
_DEFAULTS = {  # of lm-eval's own metrics that are no means; a config need not repeat them
    "perplexity": _PERPLEXITY,
    "word_perplexity": _WEIGHTED,
    "byte_perplexity": _WEIGHTED,
    "bits_per_byte": _BITS,
    "brier_score": "brier_score",
    "mcc": "matthews_corrcoef",
    "bleu": "bleu",
    "chrf": "chrf",
    "chrf++": "chrf++",
    "ter": "ter",
    "bypass": "bypass",
}
_OF_ALL = frozenset((*_DEFAULTS.values(), "f1", "median")) - {_PERPLEXITY, _WEIGHTED, _BITS}
_HIGHER = frozenset(
    ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "acc_all", "exact_match", "f1", "em", "likelihood")
)
_LOWER = frozenset(("ter", "brier_score", "wer", "cer"))
_PERCENT = ("rouge", "bleu", "sacrebleu", "chrf", "meteor", "bertscore", "f1", "em", "exact", "acc")  # their beginnings
_UNITS = {"word_perplexity": "nats per word", "byte_perplexity": "nats per byte"}


OWN_AGGREGATION = "is no mean over documents"


@dataclass(frozen=True)
class Scale:
    """How the documents of one metric are compared.

    Attributes:
        lower_is_better: Which way is better.
        unit: Empty where a document's value is the metric's own; else of the cost that is compared in its place.
        aggregation: lm-eval's name of how the metric comes from the documents.
    """

    lower_is_better: bool = False
    unit: str = ""
    aggregation: str = _MEAN

    @property
    def weighted(self) -> bool:
        """Whether documents weigh by their words or bytes."""
        return self.aggregation in (_WEIGHTED, _BITS)

    def value(self, document: Document, metric: str) -> float:
        """The document's value on this scale."""
        if self.aggregation == _MEAN:
            return document.metrics[metric]
        if not self.weighted:
            return -document.metrics[metric]
        logprob, weight = document.pairs[metric]
        return -logprob / weight / (math.log(2) if self.aggregation == _BITS else 1.0)

    def weight(self, document: Document, metric: str) -> float:
        """How much the document counts."""
        return document.pairs[metric][1] if self.weighted else 1.0

    def metric_of(self, mean: float) -> float:
        """The metric as lm-eval reports it, from the documents' (weighted) mean on this scale."""
        if self.aggregation not in (_PERPLEXITY, _WEIGHTED):
            return mean
        return math.exp(mean) if mean < 700 else math.inf


def scale_of(
    metric: str, documents: Sequence[Document], declared: Any, higher_is_better: Any, reported: float | None
) -> Scale | str:
    """The scale of a metric, or why its documents can't be compared one by one.

    Args:
        metric: Its name.
        documents: All of a task and filter.
        declared: The aggregation that the task's config names, if it does.
        higher_is_better: What the results say; None where they don't.
        reported: The aggregated value in the results, if it is there.
    """
    name = declared if isinstance(declared, str) else _DEFAULTS.get(metric)
    numbers = all(metric in d.metrics for d in documents)
    pairs = all(metric in d.pairs and d.pairs[metric][1] > 0 for d in documents)
    lower = higher_is_better is False or (higher_is_better is None and metric in _LOWER)
    if name in _OF_ALL and name != declared and numbers:
        name = None  # a number per document is no corpus metric, whatever it is called
    if name in _OF_ALL:
        return f"is computed from all documents together ({name})"
    if not numbers and not pairs:
        return "has no number per document"
    if name == "nanmean":
        if any(math.isnan(d.metrics.get(metric, 0.0)) for d in documents):
            return "leaves out documents without a number (nanmean), which may be others in each run"
        name = _MEAN
    known = {
        _MEAN: Scale(lower),
        _PERPLEXITY: Scale(True, "nats per document", _PERPLEXITY),
        _WEIGHTED: Scale(True, _UNITS.get(metric, "nats per unit of weight"), _WEIGHTED),
        _BITS: Scale(True, "bits per byte", _BITS),
    }
    first = known.get(_MEAN if name is None and numbers else str(name))
    fitting = [s for s in known.values() if s.weighted != numbers]
    if first not in fitting:
        first = None
    if reported is None or not math.isfinite(reported):
        return first or f"is computed from all documents together ({_short(name)})"
    for scale in [first, *fitting] if first else fitting:
        if _gives(scale, metric, documents, reported):
            return scale
    if not all(math.isfinite(d.metrics.get(metric, 0.0)) for d in documents):
        return first or Scale(lower)  # damaged: whoever uses the metric is told which document it is
    return f"{OWN_AGGREGATION}: the results say {reported:.6g}, and the documents don't give that"


def most(metric: str, values: np.ndarray) -> float | None:
    """The most that a document can score: 1 or 100 (the least is 0); None where nothing says that it is bounded.

    Args:
        metric: Its name; those that are known as percentages may reach 100.
        values: Of documents; none above 1 is taken for a share, whatever the metric.
    """
    if values.min() < 0:
        return None
    if values.max() <= 1:
        return 1.0
    return 100.0 if values.max() <= 100 and metric.lower().startswith(_PERCENT) else None


def undirected(metric: str, higher_is_better: Any) -> bool:
    """Whether neither the results nor the metric's name tell which way is better."""
    return not isinstance(higher_is_better, bool) and metric not in (_HIGHER | _LOWER | set(_DEFAULTS))


def _gives(scale: Scale, metric: str, documents: Sequence[Document], reported: float) -> bool:
    values = np.array([scale.value(d, metric) for d in documents])
    weights = np.array([scale.weight(d, metric) for d in documents])
    if not np.isfinite(values).all():
        return False
    found = scale.metric_of(float(np.average(values, weights=weights)))
    return math.isclose(found, reported, rel_tol=1e-6, abs_tol=1e-9)


def _short(name: Any) -> str:
    return " ".join(str(name or "an aggregation of its own").split())[:40]
