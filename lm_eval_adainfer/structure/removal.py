"""Blocks taken out of a model for good (ShortGPT, arXiv 2403.03853): the weights that stay are as they were.

The blocks leave the model's own module list, and what counts blocks is counted anew: the modules' ``layer_idx`` (under
which they keep their keys and values), the config's number of layers, and its lists with an entry per layer. The model
is then checked against the whole one with these blocks bypassed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lm_eval_adainfer.errors import UnsupportedModelError
from lm_eval_adainfer.structure.anatomy import Anatomy
from lm_eval_adainfer.structure.calls import bypassed
from lm_eval_adainfer.structure.hooks import without_hooks
from lm_eval_adainfer.structure.rounding import in_float32, logits_distance, unmeasured

_NUMBERS = ("layer_idx", "layer_id", "layer_index", "layer_number", "block_idx")


@torch.no_grad()
def drop(anatomy: Anatomy, dropped: Sequence[int]) -> None:
    """Take blocks out of ``anatomy.model``, in place; the anatomy is that of the whole model and no longer true.

    Args:
        anatomy: Of the whole model.
        dropped: Block numbers, from 1.

    Raises:
        UnsupportedModelError: Where the model without these blocks is not the model with these blocks bypassed; it
            can't be used any more then.
    """
    with in_float32(anatomy.model):
        _drop(anatomy, dropped)


def _drop(anatomy: Anatomy, dropped: Sequence[int]) -> None:
    model, whole = anatomy.model, anatomy.n_blocks
    config, kept = anatomy.config, [k - 1 for k in range(1, whole + 1) if k not in set(dropped)]
    expected = _bypassed(anatomy, dropped)
    numbers = [*map(id, anatomy.blocks)]
    blocks = next((m for m in model.modules() if isinstance(m, nn.ModuleList) and [*map(id, m)] == numbers), None)
    if blocks is None:
        raise _refusal(anatomy, dropped, "it has more blocks than a text runs")
    for k in sorted(dropped, reverse=True):
        del blocks[k - 1]
    for new, old in enumerate(kept):
        for module in anatomy.blocks[old].modules():
            for name in _NUMBERS:
                if (number := module.__dict__.get(name)) is not None and type(number) is int:
                    setattr(module, name, number + new - old)
    try:
        config.num_hidden_layers = len(kept)
        for name, value in list(vars(config).items()):
            if isinstance(value, (list, tuple)) and len(value) == whole:
                setattr(config, name, type(value)(value[old] for old in kept))
        worst = max(map(logits_distance, _with_and_without_cache(anatomy), expected))
    except Exception as error:  # whatever a family does when layers are missing
        raise _refusal(anatomy, dropped, type(error).__name__) from error
    allowed = unmeasured(model)
    if not worst <= allowed:
        raise _refusal(anatomy, dropped, f"logits off by {worst:.2g} of their size, allowed {allowed:.2g}")


def _refusal(anatomy: Anatomy, dropped: Sequence[int], why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"stopper: blocks {', '.join(map(str, dropped))} can't be taken out of {anatomy.name} ({why}); drop only the "
        "last blocks, with shortgpt:lastN"
    )


def _bypassed(anatomy: Anatomy, dropped: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The whole model's probe logits where these blocks hand on what they get: all, and the last position's."""
    blocks = [anatomy.blocks[k - 1] for k in dropped]
    with without_hooks(blocks), bypassed(anatomy, blocks):
        logits = anatomy.model(input_ids=anatomy.probe_ids(2), use_cache=False).logits.float()
    return logits, logits[:, -1]


def _with_and_without_cache(anatomy: Anatomy) -> tuple[Tensor, Tensor]:
    """The cut model's probe logits: all at once, and the last position's token by token, where there is a cache."""
    model, ids = anatomy.model, anatomy.probe_ids(2)
    logits = model(input_ids=ids, use_cache=False).logits.float()
    last, cache = logits[:, -1], None
    for n in range(ids.shape[1]):
        step = model(input_ids=ids[:, n : n + 1], **anatomy.with_cache(cache)) if n == 0 or cache else None
        cache = getattr(step, anatomy.cache_argument, None)
        if step is None or cache is None:  # a recurrence keeps its state in its own way
            return logits, last
    assert step is not None
    return logits, step.logits[:, -1].float()
