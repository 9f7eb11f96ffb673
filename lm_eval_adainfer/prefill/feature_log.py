"""The features after every block up to a document's exit, which ``log_features`` puts into the samples."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lm_eval_adainfer.errors import UnsupportedModelError
from lm_eval_adainfer.prefill.documents import Document
from lm_eval_adainfer.strategies import features
from lm_eval_adainfer.strategies.features import Observation
from lm_eval_adainfer.structure.anatomy import Anatomy
from lm_eval_adainfer.structure.state import BlockState


def available_features(anatomy: Anatomy) -> tuple[str, ...]:
    """Every recorded feature that this model's blocks allow (a block without an attention part has no ``cos_attn``)."""
    names = []
    for name in features.RECORDED:
        try:
            for part in features.needed_parts([name]):
                for block in anatomy.blocks:
                    anatomy.part(block, part)
        except UnsupportedModelError:
            continue
        names.append(name)
    return tuple(names)


class FeatureLog:
    """Logs features into ``Document.logged``; a diagnostic, which is not counted.

    Args:
        anatomy: The model.
        is_on: Else no feature is logged.

    Attributes:
        names: The features; none where the log is off.
    """

    def __init__(self, anatomy: Anatomy, is_on: bool):
        self.names = available_features(anatomy) if is_on else ()

    def begin(self, document: Document) -> None:
        """Begin a document's log."""
        document.logged = [{"layer": []} for _ in document.deciders] if self.names else []

    def note(
        self,
        deciding: Sequence[tuple[Document, int]],
        state: BlockState,
        points: tuple[Tensor, Tensor],
        logits: Tensor,
    ) -> None:
        """Log the features after a block; those among the choices where there are choices of one token each.

        Args:
            deciding: n of (document, which of its deciders).
            state: The block's.
            points: Rows of the state and positions in them, [n] each.
            logits: [n, V] there.
        """
        choices = features.choices_of(logits, [document.choices(j) for document, j in deciding])
        values = features.compute(self.names, Observation(state, *points, logits, choices=choices)).tolist()
        for (document, j), row in zip(deciding, values, strict=True):
            document.logged[j]["layer"].append(state.block)
            for name, value in zip(self.names, row, strict=True):
                if document.choices(j) or not features.needs_choices([name]):
                    document.logged[j].setdefault(name, []).append(value)

    def cut(self, document: Document, depth: int) -> None:
        """Forget what was logged in blocks that the document does not run: a deciding pass may have gone deeper."""
        for logged in document.logged:
            count = sum(k <= depth for k in logged["layer"])
            logged.update({name: values[:count] for name, values in logged.items()})
