"""Exact match and F1 of SQuAD 2.0 for generated answers, through torchmetrics' SQuAD score."""

from __future__ import annotations

from typing import Any

from lm_eval_adainfer.errors import AdaInferError

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
