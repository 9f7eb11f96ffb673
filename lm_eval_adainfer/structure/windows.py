"""How the arguments of a model's blocks follow a step with a KV cache, as seen in two small forwards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from lm_eval_adainfer.errors import UnsupportedModelError
from lm_eval_adainfer.structure import opaque
from lm_eval_adainfer.structure.anatomy import Anatomy
from lm_eval_adainfer.structure.arguments import BatchRule, batch_factors, walk
from lm_eval_adainfer.structure.calls import explicit_masks
from lm_eval_adainfer.structure.weights import is_linear, linear_size


@dataclass
class Windows:
    """How the blocks' arguments follow a decoding step, as seen in two small forwards.

    Attributes:
        queries: (block, path) -> the dimensions that followed the number of queries.
        rows: How they follow the batch (position ids are given per row here, unlike in a plain forward).
        stored_weights: Per block, weights of the linear maps that a token meets before its keys and values are there.
        packs: Whether every argument is of a kind that the packed layout understands.
        layout: How tokens are laid out (a key of ``generation.layouts.LAYOUTS``).
        missed: Why no better layout, with the figure that decided; or empty.
    """

    queries: dict[tuple[int, str], tuple[int, ...]]
    rows: BatchRule
    stored_weights: list[int]
    packs: bool
    layout: str = "padded"
    missed: str = ""


@torch.no_grad()
def watch_windows(anatomy: Anatomy) -> Windows:
    """Watch two decoding steps of different batch, cache and window sizes.

    Raises:
        UnsupportedModelError: Where the model does not use a key-value cache the common way.
    """
    sizes = ((3, 5, 2), (5, 6, 4))  # batch, cached, window: no size is another's, and both change
    (first, _), (second, weights) = (_watch_step(anatomy, *size) for size in sizes)
    both = {key: (shape, second[key]) for key, shape in first.items() if len(second.get(key, ())) == len(shape)}
    queries = {
        key: tuple(d for d, pair in enumerate(zip(*shapes, strict=True)) if pair == (2, 4))
        for key, shapes in both.items()
    }
    factors = batch_factors(first, second, (3, 5))
    # constants, what has an entry per query, and masks [rows, heads, queries, keys]
    packs = set(first) == set(second) and all(
        (dims == () and factors.get(key) == 0) or dims == (1,) or (dims == (2,) and len(first[key]) == 4)
        for key, dims in queries.items()
    )
    return Windows(queries, BatchRule(factors), weights, packs)


class _WatchedCache(DynamicCache):
    """Notes how many weights a token has met when a block stores its keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.met = 0
        self.weights: list[int] = []

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        self.weights.append(self.met)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def _watch_step(
    anatomy: Anatomy, batch: int, cached: int, width: int
) -> tuple[dict[tuple[int, str], tuple[int, ...]], list[int]]:
    """Shapes of all blocks' arguments in a step of ``width`` tokens after ``cached`` ones, and weights met."""
    vocab = int(anatomy.model.get_input_embeddings().weight.shape[0])
    ids = (torch.arange(batch * (cached + width)).reshape(batch, -1) % vocab).to(anatomy.input_device)
    attend = torch.ones_like(ids)
    attend[0, 0] = 0
    positions = (attend.cumsum(-1) - 1).clamp(min=0)
    cache, handles = _WatchedCache(), []
    shapes: dict[tuple[int, str], tuple[int, ...]] = {}
    for k, block in enumerate(anatomy.blocks, start=1):

        def begin(m: Any, args: Any, kwargs: Any, k: int = k) -> None:
            cache.met = 0
            if (found := opaque.opaque((list(args), kwargs))) is not None:
                raise no_cache(anatomy, opaque.refusal(found))
            walk([list(args), kwargs], lambda path, x: shapes.__setitem__((k, path), tuple(x.shape)))

        def met(m: Any, args: Any, output: Any) -> None:
            cache.met += linear_size(m)

        handles.append(block.register_forward_pre_hook(begin, with_kwargs=True))
        handles += [m.register_forward_hook(met) for m in block.modules() if is_linear(m)]
    try:
        with explicit_masks():
            for start, end in ((0, cached), (cached, cached + width)):
                shapes.clear()
                cache.weights.clear()
                anatomy.model(
                    input_ids=ids[:, start:end],
                    attention_mask=attend[:, :end],
                    **anatomy.with_cache(cache),
                    **({"position_ids": positions[:, start:end]} if anatomy.takes_position_ids else {}),
                )
        in_every_block = len(cache.weights) == anatomy.n_blocks and all(
            layer in (0, cached + width) for layer in map(cache.get_seq_length, range(len(cache)))
        )
    except UnsupportedModelError:
        raise
    except Exception as error:  # whatever a family does with a cache that it does not expect
        raise no_cache(anatomy, _why(anatomy, f"its forward fails with one: {type(error).__name__}")) from error
    finally:
        for handle in handles:
            handle.remove()
    if not in_every_block:
        raise no_cache(anatomy, _why(anatomy, "its blocks don't keep one set of keys and values each"))
    return shapes, cache.weights


def _why(anatomy: Anatomy, otherwise: str) -> str:
    """Recurrent states, where the model's own cache has them; otherwise what was seen."""
    try:
        layers = DynamicCache(config=anatomy.config).layers
    except Exception:  # a config that says nothing of caches
        return otherwise
    recurrent = any(hasattr(layer, "recurrent_states") for layer in layers)
    return "blocks keep a recurrent state" if recurrent else otherwise


class NoPlainCacheError(UnsupportedModelError):
    """A model whose cache can't be driven by slots; ``why`` is a clause that says what it has instead."""

    def __init__(self, why: str, sentence: str):
        super().__init__(sentence)
        self.why = why


def no_cache(anatomy: Anatomy, why: str) -> NoPlainCacheError:
    """What is said of a model whose cache can't be driven by slots."""
    return NoPlainCacheError(
        why,
        f"generation: {anatomy.name} does not use a plain key-value cache ({why}), so it can't exit early while "
        "generating; pass generation=dense to generate without early exit",
    )
