"""What a decoder keeps from token to token: the rows' tokens, what every block has filled, and the KV cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lm_eval_adainfer.generation.cache import SlotCache
from lm_eval_adainfer.generation.decoded import Decoded
from lm_eval_adainfer.generation.policies import KV_POLICIES
from lm_eval_adainfer.generation.tokens import Tokens
from lm_eval_adainfer.readers.base import HEAD, Reader
from lm_eval_adainfer.strategies import features
from lm_eval_adainfer.strategies.base import Schedule, Stopper
from lm_eval_adainfer.structure.anatomy import Anatomy
from lm_eval_adainfer.structure.windows import Windows


class DecoderState:
    """A batch of rows between two steps, and how it is decoded.

    Args:
        anatomy: The model.
        stopper: Says after a block whether a new token leaves.
        schedule: After which blocks it is asked.
        windows: How the blocks' arguments follow a step (``probes.prepare``).
        prompts: Token ids of the rows.
        max_new_tokens: Room to make.
        kv_policy: A key of ``policies.KV_POLICIES``.
        shortlist: Candidates per token for screening (``head_check=shortlist``); 0 reads the full vocabulary at
            every check.
        reader: How blocks are read at the newest tokens, each on its own; the cache holds states as they are.

    Attributes:
        checked: Blocks after which the stopper is asked.
        parts: The parts of a block whose output the stopper reads.
        deepest: The last block that any token can need.
        prompt_end: One behind the last slot of the prompts.
        rows: The rows still being decoded, by their number in the batch; all other lists have an entry for each.
        pad: Slots of padding in front of a row.
        slots: [rows, capacity] token ids.
        length: How many slots have a token.
        known: ``known[k - 1][r]`` is the first slot that block k has not filled for row r.
        pending: [rows, capacity, h], of every token the output of its deepest block; None until one leaves early.
        results: What was decoded, for every row of the batch.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        stopper: Stopper,
        schedule: Schedule,
        windows: Windows,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        kv_policy: str = "recompute",
        shortlist: int = 0,
        reader: Reader = HEAD,
    ):
        self.anatomy, self.stopper, self.checked = anatomy, stopper, frozenset(schedule.blocks)
        self.reader = reader
        self.windows, self.policy = windows, KV_POLICIES[kv_policy]()
        self.shortlist = min(shortlist, anatomy.vocab_size) if features.needs_head(stopper.features) else 0
        self.parts = features.needed_parts(stopper.features) if self.checked else []
        # a strategy that asks nothing stops every token at its one block; deeper ones are never needed
        self.deepest = schedule.blocks[0] if schedule.blocks and not stopper.features else anatomy.n_blocks
        self.length = self.prompt_end = max(map(len, prompts))
        self.device = anatomy.input_device
        capacity = self.length + max_new_tokens
        self.pad = [self.length - len(p) for p in prompts]
        self.slots = torch.zeros(len(prompts), capacity, dtype=torch.long)
        for r, prompt in enumerate(prompts):
            self.slots[r, self.pad[r] : self.length] = torch.tensor(list(prompt), dtype=torch.long)
        self.known = [list(self.pad) for _ in range(anatomy.n_blocks)]
        self.pending: Tensor | None = None
        self.cache = SlotCache(capacity)
        self.rows = list(range(len(prompts)))
        n = anatomy.n_blocks
        self.results = [Decoded(block_tokens=[0] * n, pairs=[0] * n, stored_tokens=[0] * n) for _ in prompts]

    def append(self, tokens: Sequence[int], finished: Sequence[bool]) -> None:
        """Add each row's chosen token; rows that are finished leave the batch."""
        for row, token in zip(self.rows, tokens, strict=True):
            self.results[row].tokens.append(token)
        keep = [n for n, done in enumerate(finished) if not done]
        if len(keep) < len(self.rows):
            index = torch.tensor(keep, dtype=torch.long)
            self.slots = self.slots[index]
            self.pad = [self.pad[n] for n in keep]
            self.known = [[row[n] for n in keep] for row in self.known]
            if self.pending is not None:
                self.pending = self.pending[index.to(self.pending.device)]
            self.cache.keep_rows(index)
            self.rows = [self.rows[n] for n in keep]
        if self.rows:
            self.slots[:, self.length] = torch.tensor([tokens[n] for n in keep])
            self.length += 1

    def keep(self, tokens: Tokens, hidden: Tensor) -> None:
        """Remember the states ([n, h]) of tokens that leave, for deeper blocks to fill in later."""
        if self.deepest < self.anatomy.n_blocks:  # nobody will ever go deeper
            return
        if self.pending is None:
            self.pending = hidden.new_zeros(len(self.rows), self.cache.capacity, hidden.shape[-1])
        device = self.pending.device
        self.pending[tokens.row.to(device), tokens.slot.to(device)] = hidden.to(device)

    def kept(self, tokens: Tokens, device: torch.device) -> Tensor:
        """[n, h] states of tokens that left."""
        assert self.pending is not None
        where = self.pending.device
        return self.pending[tokens.row.to(where), tokens.slot.to(where)].to(device)
