"""LayerSkip's way of evaluating (arXiv 2404.16710): every document leaves after the same block, read by norm and head.

    python -m benchmarks.peers.layerskip --exit_layer 22

LayerSkip's code is a repository (facebookresearch/LayerSkip, read at commit 35858ba), not a package of the index, so
its way is reproduced here in a few lines. In its own ``eval.py`` the exit acts when text is generated, while choices
are scored by the whole model; what is reproduced is the paper's accuracy by exit layer. Its models are trained for it
(layer dropout, and a loss after every block), which SmolLM2 was not: on a model that was, it does better than here. It
recommends no block for others; by default a quarter of the blocks is left out, as in ``benchmarks.peers.shortgpt``.
"""

from __future__ import annotations

from typing import Any

from lm_eval.models.huggingface import HFLM

from benchmarks.peers import measuring


class Without(HFLM):
    """Stock ``hf`` that runs these blocks alone; between two calls the model is whole."""

    def __init__(self, blocks: list[int], **given: Any):
        super().__init__(**given)
        self.kept = type(self.model.model.layers)([self.model.model.layers[k] for k in blocks])

    def _model_call(self, *args: Any, **kwargs: Any) -> Any:
        whole, self.model.model.layers = self.model.model.layers, self.kept
        try:
            return super()._model_call(*args, **kwargs)
        finally:
            self.model.model.layers = whole


if __name__ == "__main__":
    parser = measuring.parser("python -m benchmarks.peers.layerskip", __doc__)
    parser.add_argument("--exit_layer", type=int, default=22, help="the block after which all documents leave")
    options = parser.parse_args()
    measuring.main(
        f"LayerSkip's way, exit {options.exit_layer}",
        lambda loaded: Without(list(range(options.exit_layer)), **loaded.given),
        options,
    )
