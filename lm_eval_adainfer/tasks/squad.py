"""Exact match and F1 of SQuAD 2.0 for generated answers, through torchmetrics' SQuAD score."""

from __future__ import annotations

from typing import Any

from lm_eval.api.metrics import mean

from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.tasks.qa import QATask

UNANSWERABLE = "unanswerable"


def generation_scores(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Score one generated answer against a document's gold answers (the best of them counts).

    Answers are compared as in the official script: lower case, without punctuation and articles. For a question
    without answer the word ``unanswerable`` is right, anything else wrong: F1 is exact match there, as in SQuAD 2.0
    (arXiv 1806.03822), and for an answerable question the word ``unanswerable`` is wrong.

    Args:
        doc: a row of ``rajpurkar/squad_v2``.
        results: the generated text, as the only entry.

    Returns:
        ``exact_match`` and ``f1``, 0 to 1.

    Raises:
        AdaInferError: if torchmetrics is not installed.
    """
    try:
        from torchmetrics.functional.text import squad
    except ImportError as error:
        raise AdaInferError("adainfer_squad_generate needs torchmetrics: pip install torchmetrics.") from error

    gold = doc["answers"]["text"] or [UNANSWERABLE]
    answers = {"text": gold, "answer_start": [0] * len(gold)}  # the start positions are not looked at
    scores = squad({"prediction_text": str(results[0]), "id": "0"}, {"answers": answers, "id": "0"})
    exact_match, f1 = (float(scores[key]) / 100 for key in ("exact_match", "f1"))
    return {"exact_match": exact_match, "f1": f1 if doc["answers"]["text"] else exact_match}


class SQuADTexts(QATask):
    """Generated answers, whose ``f1`` is a mean over documents.

    A YAML can't say so: lm-eval 0.5.0.dev1 takes the name for its own metric, which is one of choices.
    """

    def aggregation(self) -> dict[str, Any]:
        """As the YAML has it, and ``f1``."""
        return {**super().aggregation(), "f1": mean}

    def higher_is_better(self) -> dict[str, Any]:
        """As the YAML has it, and ``f1``."""
        return {**super().higher_is_better(), "f1": True}

    def dump_config(self) -> dict[str, Any]:
        """As any task's, with ``f1`` among the metrics."""
        config = super().dump_config()
        own = {"metric": "f1", "aggregation": "mean", "higher_is_better": True}
        return {**config, "metric_list": [*config["metric_list"], own]}
