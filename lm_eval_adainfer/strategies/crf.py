"""A conditional random field along the blocks (paper, Table 4), fitted by CRFsuite, decided by filtering as tensors.

A linear chain of two labels, go on and stop, one per asked block. Decoding a chain (Viterbi, or marginals of the whole
sequence) would read blocks that have not run, so the decision is filtered: p(y_k = stop | x_1..x_k) from the forward
recursion, which is the exact marginal of the chain that ends at block k.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.strategies.features import check_names
from lm_eval_adainfer.strategies.fitted import FittedStopper, checked_arrays

LABELS = ("go", "stop")
BIAS = "bias"  # an attribute that is always 1


class CRFStopper(FittedStopper):
    """``crf``: stop when the filtered probability of the label stop exceeds ``threshold``.

    Args:
        arrays: ``state`` [2, F] and ``bias`` [2], what a feature's value and each block add to a label's score, and
            ``transition`` [2, 2], from the label of the asked block before (rows) to this one's; labels are go, stop.
        features: The F feature names, in the order of the columns.
        threshold: In [0, 1).
        info: Where it comes from.

    Raises:
        AdaInferError: Where shapes, features or numbers don't fit together.
    """

    kind = "crf"
    memory = 2  # log p(go), log p(stop) after the asked block before; both 0, which no distribution is, at the first

    def __init__(
        self,
        arrays: Mapping[str, np.ndarray],
        features: Sequence[str],
        threshold: float = 0.5,
        info: Mapping[str, Any] | None = None,
    ):
        check_names(features, "stopper")
        if not 0.0 <= float(threshold) < 1.0:
            raise AdaInferError(f"threshold: {threshold} is no probability that a crf can exceed; give 0 to 0.999")
        shapes = {"state": (2, len(features)), "bias": (2,), "transition": (2, 2)}
        self.arrays = checked_arrays(arrays, shapes, self.kind)
        self.features, self.threshold = tuple(features), float(threshold)
        self.info: dict[str, Any] = dict(info or {})

    @classmethod
    def from_crfsuite(
        cls, model: bytes, features: Sequence[str], threshold: float = 0.5, info: Mapping[str, Any] | None = None
    ) -> CRFStopper:
        """A stopper from a CRFsuite model with the labels ``go`` and ``stop`` and an attribute per feature.

        CRFsuite shows its weights with six decimals; weights that it left out are 0.

        Raises:
            AdaInferError: Where the model has other labels or attributes.
        """
        import pycrfsuite

        tagger = pycrfsuite.Tagger()
        tagger.open_inmemory(model)
        if set(tagger.labels()) != set(LABELS):
            raise AdaInferError(f"crf: its labels are {', '.join(tagger.labels())}; {' and '.join(LABELS)} are needed")
        found = tagger.info()
        if unknown := {name for name, _ in found.state_features} - {*features, BIAS}:
            raise AdaInferError(f"crf: it reads the attribute {min(unknown)!r}, which is none of {', '.join(features)}")
        arrays = {
            "state": np.array([[found.state_features.get((name, y), 0.0) for name in features] for y in LABELS]),
            "bias": np.array([found.state_features.get((BIAS, y), 0.0) for y in LABELS]),
            "transition": np.array([[found.transitions.get((y, z), 0.0) for z in LABELS] for y in LABELS]),
        }
        return cls(arrays, features, threshold, info)

    def margin(self, block: int, values: Tensor, memory: Tensor | None = None) -> Tensor:
        """Filtered probability minus threshold, float64."""
        assert memory is not None
        device = values.device if values.device.type != "mps" else torch.device("cpu")  # MPS has no float64
        state, bias, transition = (torch.from_numpy(self.arrays[n]).to(device) for n in ("state", "bias", "transition"))
        before = memory.to(device, torch.float64)
        reached = torch.logsumexp(before[:, :, None] + transition, dim=1)
        first = (before == 0).all(dim=1, keepdim=True)
        now = values.to(device, torch.float64) @ state.T + bias + torch.where(first, 0.0, reached)
        now = now.log_softmax(dim=1)
        memory[:] = now.to(memory)
        return (now[:, 1].exp() - self.threshold).to(values.device)

    @property
    def flops(self) -> int:
        """4F for the two labels' scores, and about 24 for the recursion."""
        return 4 * len(self.features) + 24

    def parameters(self) -> dict[str, Any]:
        """Features and threshold."""
        return {"features": list(self.features), "threshold": self.threshold}


def train(x: np.ndarray, y: np.ndarray, features: Sequence[str], prefixes: bool = False) -> bytes:
    """Train a linear-chain CRF with CRFsuite's default settings (L-BFGS, L2) and all transitions.

    Args:
        x: [N, L, F] features, a sequence per instance.
        y: [N, L] labels, 1 = stop.
        features: The F attribute names.
        prefixes: Train on every prefix of every sequence instead. Filtering asks about prefixes, but a chain that was
            trained on whole sequences explains early labels by later ones too and is far too sure at the first blocks.

    Returns:
        CRFsuite's model file.

    Raises:
        AdaInferError: Where python-crfsuite is not installed.
    """
    import tempfile
    from pathlib import Path

    try:
        import pycrfsuite
    except ImportError:
        raise AdaInferError("crf: fitting one needs python-crfsuite; install lm-eval-adainfer[crf]") from None
    trainer = pycrfsuite.Trainer(verbose=False)
    trainer.set_params({"feature.possible_transitions": True, "feature.possible_states": True})
    for sequence, labels in zip(x.tolist(), y.tolist(), strict=True):
        items, names = attributes(sequence, features), [LABELS[label] for label in labels]
        for end in range(1 if prefixes else len(items), len(items) + 1):
            trainer.append(items[:end], names[:end])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        trainer.train(str(path))
        return path.read_bytes()


def attributes(sequence: Sequence[Sequence[float]], features: Sequence[str]) -> list[dict[str, float]]:
    """A sequence's items as CRFsuite takes them: real-valued attributes, and the bias."""
    return [{**dict(zip(features, row, strict=True)), BIAS: 1.0} for row in sequence]
