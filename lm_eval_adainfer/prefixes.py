"""Prefixes that documents share (few-shot examples, system prompts): run once, their keys and values read by all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from lm_eval_adainfer.anatomy import Anatomy, BatchRule, hidden_of, tolerance
from lm_eval_adainfer.forward import AllRowsLeft, BlockState, bypassed, run_blocks
from lm_eval_adainfer.scoring import Document

_LEAST = 16  # tokens; less is not worth a forward of its own


class _PrefixCache(DynamicCache):
    """Keys and values of one token row; rows that continue it read them and store nothing."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length, self.filling = length, False
        self.stored: dict[int, tuple[Tensor, Tensor]] = {}

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many tokens the model may take for cached."""
        return 0 if self.filling else self.length

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """The slot of the first query."""
        return self.get_seq_length()

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:  # type: ignore[override]
        """(keys, offset)."""
        return self.get_seq_length() + query_length, 0

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """While filling: store. Else: the prefix's in front of the new ones."""
        if self.filling:
            self.stored[layer_idx] = (key_states, value_states)
            return key_states, value_states
        pairs = zip(self.stored[layer_idx], (key_states, value_states), strict=True)
        return tuple(torch.cat([old.expand(new.shape[0], -1, -1, -1), new], dim=-2) for old, new in pairs)


class Prefix:
    """A shared prefix, run only as deep as some document needs it.

    Args:
        anatomy: The model.
        tokens: P token ids.
        rule: How the blocks' arguments follow the batch where a cache is used (``slots.Windows.rows``).
        stages: Blocks up to which it is run at once, in order: those after which rows can leave, and L.
    """

    def __init__(self, anatomy: Anatomy, tokens: Sequence[int], rule: BatchRule, stages: Sequence[int]):
        self.anatomy, self.tokens, self.rule, self.stages = anatomy, list(tokens), rule, list(stages)
        self.cache = _PrefixCache(len(tokens))
        self.depth = 0
        self._hidden: Tensor | None = None

    def require(self, k: int) -> None:
        """Run the prefix's blocks up to the first stage that covers block k; the weights' hooks stay silent."""
        if k <= self.depth:
            return
        anatomy, first = self.anatomy, self.depth + 1
        to = min(stage for stage in self.stages if stage >= k)
        carried = self._hidden

        def enter(module: Any, args: tuple, kwargs: dict) -> Any:
            if carried is None:
                return None
            if args:
                return (carried.to(args[0].device), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": carried.to(kwargs["hidden_states"].device)}

        def leave(module: Any, args: tuple, output: Any) -> None:
            self._hidden = hidden_of(output)
            raise AllRowsLeft

        handles = [
            anatomy.blocks[first - 1].register_forward_pre_hook(enter, with_kwargs=True),
            anatomy.blocks[to - 1].register_forward_hook(leave),
        ]
        self.cache.filling = True
        ids = torch.tensor([self.tokens], device=anatomy.input_device)
        positions = torch.arange(len(self.tokens), device=ids.device)[None]
        try:
            with bypassed(anatomy, anatomy.blocks[: first - 1]):
                anatomy.model(
                    input_ids=ids,
                    past_key_values=self.cache,
                    use_cache=True,
                    **({"position_ids": positions} if anatomy.takes_position_ids else {}),
                )
        except AllRowsLeft:
            pass
        finally:
            self.cache.filling = False
            for handle in handles:
                handle.remove()
        self.depth = to
        if to == anatomy.n_blocks:
            self._hidden = None


def groups(documents: Sequence[Document], rows: int, most: int) -> list[tuple[list[Document], list[int]]]:
    """Group documents that share a prefix worth running once.

    Args:
        documents: All of them.
        rows: The batch size: smaller groups pay only where the prefix is most of what they have.
        most: Tokens of a prefix at most.

    Returns:
        (documents, prefix) pairs; those that share nothing come together, with an empty prefix.
    """
    keys = {id(d): _common([row.tokens[: row.decision] for row in d.rows]) for d in documents}
    ordered = sorted(documents, key=lambda d: keys[id(d)])
    found: list[tuple[list[Document], list[int]]] = []
    for document in ordered:
        key = keys[id(document)][:most]
        if found:
            members, prefix = found[-1]
            shared = _common([prefix, key])
            # joining shortens everybody's prefix; it pays where what is saved in all does not shrink
            if len(shared) >= _LEAST and len(shared) * len(members) >= len(prefix) * (len(members) - 1):
                found[-1] = ([*members, document], shared)
                continue
        found.append(([document], key))
    alone: list[Document] = []
    kept = []
    for members, prefix in found:
        tokens = sum(len(row.tokens) for d in members for row in d.rows)
        count = sum(len(d.rows) for d in members)
        saved = (count - 1) * len(prefix)
        if len(members) > 1 and (count >= rows or 2 * saved >= tokens) and 10 * saved >= tokens:
            kept.append((members, prefix))
        else:
            alone += members
    return [*kept, (alone, [])] if alone else kept


def _common(lists: Sequence[list[int]]) -> list[int]:
    """The longest common beginning (of the least and the greatest, as everything lies in between)."""
    low, high = min(lists), max(lists)
    end = next((n for n, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
    return list(low[:end])


@torch.no_grad()
def works(anatomy: Anatomy, rule: BatchRule) -> bool:
    """Whether rows that continue a stored prefix get a plain forward's states after every block, leaving in between."""
    ids = anatomy.probe_ids(3)
    start, shared = 3, ids[:1, :3].expand(3, 3)
    ids = torch.cat([shared, ids[:, start:]], dim=1)
    n = anatomy.n_blocks
    plain: list[Tensor] = []

    def record(state: BlockState) -> Tensor | None:
        plain.append(state.hidden[:, -1].clone())
        return torch.empty(0, dtype=torch.long) if state.block == n else None

    run_blocks(anatomy, ids, record)
    prefix = Prefix(anatomy, ids[0, :start].tolist(), rule, [max(1, n // 2), n])
    rows, good = [0, 1, 2], True

    def compare(state: BlockState) -> Tensor | None:
        nonlocal rows, good
        expected = plain[state.block - 1][rows]
        good = good and bool((state.hidden[:, -1] - expected).abs().max() <= tolerance(expected))
        keep = [i for i, row in enumerate(rows) if state.block < (n, 1, max(1, n - 1))[row]]
        rows = [rows[i] for i in keep]
        return torch.tensor(keep, dtype=torch.long)

    try:
        run_blocks(anatomy, ids[:, start:], compare, prefix=prefix)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return False
    return good
