"""The tuned lens (arXiv 2303.08112): an affine map per block, A_k x + b_k, before final norm and output head.

A_k is the identity plus a matrix, which is either whole or a product of two narrow ones. After the last block nothing
is mapped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lm_eval_adainfer.errors import AdaInferError


class Maps:
    """The affine maps of a model's blocks but the last.

    Args:
        arrays: ``bias`` [L - 1, h], and either ``weight`` [L - 1, h, h] (A_k minus the identity) or ``down``
            [L - 1, r, h] and ``up`` [L - 1, h, r] (their product is A_k minus the identity).
        info: Where they come from: model, L, ``head_hash``, ``signs_hash``, the texts or tasks.

    Raises:
        AdaInferError: Where arrays are missing, do not fit each other, or are not finite.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], info: Mapping[str, Any] | None = None):
        self.arrays = {name: np.ascontiguousarray(array) for name, array in sorted(arrays.items())}
        self.info = dict(info or {})
        names = set(self.arrays)
        if names not in ({"bias", "weight"}, {"bias", "down", "up"}):
            raise AdaInferError(
                f"reader: a tuned one holds bias and weight, or bias, down and up, not {', '.join(sorted(names))}"
            )
        bias = self.arrays["bias"]
        if bias.ndim != 2:
            raise AdaInferError(f"reader: the array bias of a tuned one has the shape {bias.shape}, not (L - 1, h)")
        n, h = bias.shape
        rank = self.arrays["down"].shape[1] if "down" in names and self.arrays["down"].ndim == 3 else 0
        shapes = {"bias": (n, h), "weight": (n, h, h), "down": (n, rank, h), "up": (n, h, rank)}
        for name, array in self.arrays.items():
            if array.shape != shapes[name] or array.dtype.kind != "f":
                raise AdaInferError(
                    f"reader: the array {name} of a tuned one is {array.dtype} of shape {array.shape}, not floats of "
                    f"shape {shapes[name]}"
                )
            if not np.isfinite(array).all():
                raise AdaInferError("reader: this tuned one holds NaN or infinite numbers; fit it again")
        self.n_blocks, self.hidden_size, self.rank = n + 1, h, rank
        self._loaded: dict[tuple[int, torch.device, torch.dtype], tuple[Tensor, ...]] = {}

    @cached_property
    def fingerprint(self) -> str:
        """8 hex digits of the maps."""
        digest = hashlib.sha256()
        for name, array in self.arrays.items():
            digest.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
        return digest.hexdigest()[:8]

    def apply(self, block: int, hidden: Tensor) -> Tensor:
        """[n, h] of states [n, h] after a block; those after the last one are as they are."""
        if block >= self.n_blocks:
            return hidden
        key = (block, hidden.device, hidden.dtype)
        if key not in self._loaded:
            names = [name for name in ("bias", "weight", "down", "up") if name in self.arrays]
            tensors = (torch.from_numpy(self.arrays[name][block - 1]) for name in names)
            self._loaded[key] = tuple(x.to(hidden.device, hidden.dtype) for x in tensors)
        bias, *matrices = self._loaded[key]
        moved = hidden
        for matrix in matrices:
            moved = moved @ matrix.T
        return hidden + moved + bias

    def flops(self, block: int) -> int:
        """Floating-point operations for one position after a block."""
        if block >= self.n_blocks:
            return 0
        return 2 * self.hidden_size * (2 * self.rank if self.rank else self.hidden_size)

    def require_model(self, n_blocks: int, hidden_size: int, head_hash: str, signs_hash: str = "") -> None:
        """Raise AdaInferError where these maps were not made for such a model, in whatever dtype it is loaded.

        Args:
            n_blocks: L, of the whole model.
            hidden_size: h, of its blocks.
            head_hash: ``Anatomy.head_hash``, which counts where there is no other hash.
            signs_hash: ``structure.hashes.signs_hash``, of head and blocks.
        """
        if (self.n_blocks, self.hidden_size) != (n_blocks, hidden_size):
            raise AdaInferError(
                f"reader: it was fitted on a model of {self.n_blocks} blocks of width {self.hidden_size}, this one has "
                f"{n_blocks} of width {hidden_size}; fit one on this model with adainfer fit reader"
            )
        # rounded twice, from float32 to float16 and then to bfloat16, a head may have another hash; signs stay
        both = bool(signs_hash and self.info.get("signs_hash"))
        mine, theirs = (signs_hash, self.info["signs_hash"]) if both else (head_hash, self.info.get("head_hash"))
        if theirs and mine and theirs != mine:
            what = "another output head" if self.info.get("head_hash") not in ("", None, head_hash) else "other weights"
            raise AdaInferError(
                f"reader: it was fitted on {self.info.get('model', 'another model')!s:.200}, which has {what}; "
                "fit one on this model with adainfer fit reader"
            )
