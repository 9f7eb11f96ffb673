"""What a user is warned of once, however many documents it concerns."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from lm_eval_adainfer.prefill.documents import Document
from lm_eval_adainfer.prefill.exit_records import share_of_checks
from lm_eval_adainfer.prefill.forward import first_not_finite
from lm_eval_adainfer.strategies import features

_DEAR = 0.1  # of the dense work: checks that cost more are warned of
_logger = logging.getLogger(__name__)


class Caveats:
    """The warnings of one model, each given once.

    Args:
        lm: The ``AdaInferLM``.
    """

    def __init__(self, lm: Any):
        self._lm = lm
        self._said: set[str] = set()

    def _is_new(self, what: str) -> bool:
        if what in self._said:
            return False
        self._said.add(what)
        return True

    def not_finite(self, tokens: Sequence[int]) -> None:
        """Say that a row of tokens led to NaN, and where."""
        if not self._is_new("not finite"):
            return
        with self._lm._autocast():
            block = first_not_finite(self._lm.anatomy, tokens)
        where = "the output head gives" if block is None else f"block {block} gives" if block else "the embeddings give"
        _logger.warning(
            f"dtype: {where} NaN or infinite numbers in {self._lm._dtype()}, so a document of {len(tokens)} tokens "
            "(and maybe others) runs all blocks and has NaN scores; another dtype may help"
        )

    def without_choices(self, without: int, total: int, what: str) -> None:
        """Say where the stopper reads choices that some of the documents, or texts, do not have."""
        named = [name for name in self._lm.stopper.features if features.FEATURES[name].choices]
        if not named or not without or not self._lm.schedule.blocks or not self._is_new(f"without choices: {what}"):
            return
        _logger.warning(
            f"stopper: it reads {', '.join(named)}, which {without} of {total} {what} do not have (it takes two or "
            "more choices of one token each); they run dense"
        )

    def dear_checks(self, documents: Sequence[Document]) -> None:
        """Say where asking a reader that runs tokens may cost more than it is likely to save.

        A tuned stopper's blocks were chosen with that cost counted.
        """
        lm = self._lm
        if not (lm.reader.runs_tokens and lm.stopper.features) or "dear checks" in self._said:
            return
        if lm.stopper.info.get("tuned", {}).get("check_layers") == list(lm.schedule.blocks):
            return
        share = share_of_checks(documents, lm.counter, lm.schedule)
        if share > _DEAR and self._is_new("dear checks"):
            blocks = ", ".join(map(str, lm.schedule.blocks))
            _logger.warning(
                f"check_layers: asking under reader={lm.reader.name} after block {blocks} costs {share:.0%} of the "
                "dense work of a document that does not leave (counted); fewer or later blocks cost less"
            )
