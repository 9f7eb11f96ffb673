"""The record of how deep a document or a text went, which its answers carry."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ExitRecord:
    """How deep one document went (``docs/numbers.md``, "Per document").

    Attributes:
        exit_layer: The decided block, 1 to L; where every token decides, the mean over its tokens.
        n_blocks: L.
        flops_ratio: The paper's Eq. 2.
        layers_run: Mean blocks executed per token position.
        flops: Counted floating-point operations.
        flops_dense: The same count with stopper ``none``.
        fingerprint: Of the model and the stopper that made it.
        features: Where ``log_features=True``: one dict per distinct context, ``layer`` and the features' values
            after every block up to the exit.
        layers: Of generated text, every new token's exit block.
        prompt_exit_layer: Of generated text, the block after which the prompt left, where a reader decided that.
    """

    exit_layer: float
    n_blocks: int
    flops_ratio: float
    layers_run: float
    flops: float
    flops_dense: float
    fingerprint: str
    features: tuple[dict[str, list[float]], ...] | None = None
    layers: tuple[int, ...] | None = None
    prompt_exit_layer: int | None = None

    @property
    def pruning_ratio(self) -> float:
        """1 - exit_layer / L."""
        return 1.0 - self.exit_layer / self.n_blocks

    @property
    def flops_ratio_total(self) -> float:
        """Counted over dense."""
        return self.flops / self.flops_dense
