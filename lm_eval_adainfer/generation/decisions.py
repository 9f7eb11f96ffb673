"""Decisions: which rows' newest tokens leave after a block, over the full vocabulary or screened by candidates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lm_eval_adainfer.generation.screen import Screen, side_by_side
from lm_eval_adainfer.generation.state import DecoderState
from lm_eval_adainfer.strategies import features
from lm_eval_adainfer.strategies.asking import ask
from lm_eval_adainfer.structure.state import BlockState


class Decisions:
    """The decisions of one step: what is seen of the newest tokens, which of them go on, and the logits of the others.

    Args:
        decoder: Whose.
        places: Of the rows that are stepped.

    Attributes:
        results: Of these rows, what was decoded.
        flow: The rows whose newest token goes on, by their place among these.
        before: [flow, h], the current block's input at the newest tokens, where the stopper needs it.
        parts: ``"attn"`` / ``"mlp"`` -> [flow, h], output of that part of the current block.
        parts_before: The same of the previous block.
    """

    def __init__(self, decoder: DecoderState, places: Sequence[int]):
        self.decoder, self.anatomy = decoder, decoder.anatomy
        self.n_rows, self.places = len(places), places
        self.results = [decoder.results[decoder.rows[place]] for place in places]
        self.flow = list(range(self.n_rows))
        self.before: Tensor | None = None
        self.parts: dict[str, Tensor] = {}
        self.parts_before: dict[str, Tensor] = {}
        self.carried_over: Tensor | None = None  # [n_rows, carries], what the stopper keeps from block to block
        self._candidates: Tensor | None = None  # [n_rows, C], of ``shortlist``
        self._own: tuple[Tensor, Tensor | None, list[int]] | None = None  # of ``screen``, per row: ids, fill, how many
        self._logits: list[Tensor | None] = [None] * self.n_rows
        self._left: dict[int, Tensor] = {}  # row -> [h] where it left, if no check has computed its logits

    def leaving(self, k: int, newest: Tensor) -> list[int]:
        """Indices (among the rows in flow) of the tokens that leave after block k.

        Args:
            k: The block.
            newest: [flow, h], its output at the newest tokens.
        """
        decoder, everyone = self.decoder, list(range(len(self.flow)))
        logits = None
        if k == self.anatomy.n_blocks or not decoder.stopper.features:
            leaves = everyone
        elif not features.needs_head(decoder.stopper.features):
            leaves = self._stopping(k, newest, everyone, None)
        else:
            read = self._read(k, newest, everyone)
            asked = self._screened(k, newest, read, everyone)
            if not asked:
                return []
            logits = self._head(read, asked)
            if decoder.shortlist:
                self._note_candidates(asked, logits)
            stops = self._stopping(k, newest, asked, logits)
            logits = logits[stops]
            leaves = [asked[n] for n in stops]
        left = self._read(k, newest[leaves], leaves) if logits is None and leaves else newest
        for n, i in enumerate(leaves):
            row = self.flow[i]
            if logits is None:
                self._left[row] = left[n]
            else:
                self._logits[row] = logits[n]
            self.results[row].layers.append(k)
        return leaves

    def end_block(self) -> None:
        """What was seen of the current block's parts is now that of the previous one."""
        if self.decoder.parts:
            self.parts_before, self.parts = self.parts, {}

    def go_on(self, stay: Sequence[bool], device: torch.device) -> None:
        """Only these rows in flow go on.

        Args:
            stay: Whether each does.
            device: Where the block is.
        """
        self.flow = [row for row, stays in zip(self.flow, stay, strict=True) if stays]
        if self.parts_before:
            index = torch.tensor([n for n, stays in enumerate(stay) if stays], dtype=torch.long, device=device)
            self.parts_before = {name: x[index.to(x.device)] for name, x in self.parts_before.items()}

    def logits(self) -> Tensor:
        """[n_rows, V] float32 logits of every row where it left.

        Where no check has computed them, the head's weights are read once for all rows, whatever block they left after.
        """
        device = self.decoder.device
        rows = sorted(self._left)
        if rows:
            logits = self.anatomy.logits(torch.stack([self._left[row].to(device) for row in rows]))
            for row, x in zip(rows, logits, strict=True):
                self._logits[row] = x
                self.results[row].head_rows += 1
        return torch.stack([x.to(device) for x in self._logits if x is not None]).float()

    def _read(self, k: int, newest: Tensor, rows: list[int]) -> Tensor:
        """[len(rows), h], what norm and head read of these rows' states after block k."""
        if k == self.anatomy.n_blocks:
            return newest
        for i in rows:
            self.results[self.flow[i]].reading += self.decoder.reader.flops(k)
        return self.decoder.reader.translate(k, newest)

    def _head(self, read: Tensor, rows: list[int]) -> Tensor:
        """[len(rows), V] logits of the newest token."""
        for i in rows:
            self.results[self.flow[i]].head_rows += 1
        return self.anatomy.logits(read if len(rows) == len(self.flow) else read[rows])

    def _stopping(self, k: int, newest: Tensor, rows: list[int], logits: Tensor | None) -> list[int]:
        """Of these rows, by their place in ``rows``, those at which the stopper says stop."""
        stopper, device = self.decoder.stopper, newest.device
        before = newest if self.before is None else self.before
        parts, parts_before = ({n: x[:, None] for n, x in p.items()} for p in (self.parts, self.parts_before))
        state = BlockState(k, newest[:, None], before[:, None], parts, parts_before)
        at, position = torch.tensor(rows, device=device), torch.zeros(len(rows), dtype=torch.long, device=device)
        mine = [self.flow[i] for i in rows]
        carried = None
        if stopper.carries:
            if self.carried_over is None:
                self.carried_over = torch.zeros(self.n_rows, stopper.carries, device=device)
            self.carried_over = self.carried_over.to(device)
            carried = self.carried_over[mine]
        stops = ask(stopper, self.anatomy, state, (at, position), carried, logits).stops
        if carried is not None and self.carried_over is not None:
            self.carried_over[mine] = carried
        for row in mine:
            self.results[row].decisions += 1
        return [n for n, stop in enumerate(stops) if stop]

    def _screened(self, k: int, newest: Tensor, read: Tensor, rows: list[int]) -> list[int]:
        """The rows that the full vocabulary has to decide: all, or those that a few tokens speak for.

        With ``shortlist`` these are the top tokens of the last full head that was computed for the row's newest token,
        with ``screen`` the same ones at every check (:class:`Screen`). Among them alone ``gap`` and ``top_prob`` are at
        least as large as over the full vocabulary wherever the top token is one of them; where it is not, a stop can be
        missed at this block, but none is made that the full vocabulary does not confirm.
        """
        if self.decoder.screen is not None:
            return self._stopping(k, newest, rows, self._screen_logits(self.decoder.screen, read))
        if not self.decoder.shortlist or self._candidates is None:
            return rows
        mine = self._candidates[self.flow].to(newest.device)
        for i in rows:
            self.results[self.flow[i]].screened += mine.shape[1]
        return self._stopping(k, newest, rows, self.anatomy.logits(read, mine))

    def _screen_logits(self, screen: Screen, read: Tensor) -> Tensor:
        """[flow, first + C] logits of the first token ids and of the rows' own tokens, -inf where a row has fewer."""
        decoder = self.decoder
        if self._own is None:
            own = [screen.own(decoder.rows[place], decoder.text(place)) for place in self.places]
            self._own = *side_by_side(own, read.device), [len(ids) for ids in own]
        candidates, fill, counts = self._own
        logits = self.anatomy.logits(read, candidates[self.flow].to(read.device), screen.first)
        if fill is not None:
            logits[:, screen.first :].masked_fill_(fill[self.flow].to(read.device), -torch.inf)
        for row in self.flow:
            self.results[row].screened += screen.first + counts[row]
        return logits

    def _note_candidates(self, rows: list[int], logits: Tensor) -> None:
        top = logits.topk(self.decoder.shortlist, dim=-1).indices
        if self._candidates is None:  # the first check of a token is always a full one, for every row
            self._candidates = top.new_zeros(self.n_rows, top.shape[1])
        self._candidates[[self.flow[i] for i in rows]] = top.to(self._candidates.device)
