"""Screens: the few rows of the head that a check reads before all of it (``head_check=screen``).

These are the rows of the first token ids, which byte-pair vocabularies number by how common they are and which lie side
by side, and of the tokens of the row's own prompt and text, which a model likes to repeat. Both follow from the row
alone, never from its neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MOST_OWN = 256  # distinct tokens of a row's own, the newest ones; picking rows out of the head copies them


class Screen:
    """Which rows of the head are read for each decoded row.

    Args:
        first: The rows of so many first token ids.
    """

    def __init__(self, first: int):
        self.first = first
        # row -> how many of its tokens were seen, the distinct ones beyond the first in order of their last place, and
        # the newest of these
        self._seen: dict[int, tuple[int, dict[int, None], Tensor]] = {}

    def own(self, row: int, text: Tensor) -> Tensor:
        """[C] the distinct token ids of a row that are none of the first ones, at most the ``MOST_OWN`` newest.

        Args:
            row: Its number.
            text: [n] its tokens so far.
        """
        seen, ids, found = self._seen.get(row, (0, {}, torch.empty(0, dtype=torch.long)))
        if len(text) > seen:
            new = [token for token in text[seen:].tolist() if token >= self.first]
            for token in new:
                ids.pop(token, None)
                ids[token] = None
            if new:
                found = torch.tensor(list(ids)[-MOST_OWN:])
            self._seen[row] = len(text), ids, found
        return found

    def forget(self, row: int) -> None:
        """A row is finished."""
        self._seen.pop(row, None)


def side_by_side(own: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Rows' own tokens as [n, C], and which of these are only there to fill a shorter row; None where none is."""
    counts = [len(ids) for ids in own]
    candidates = torch.nn.utils.rnn.pad_sequence(list(own), batch_first=True)
    if min(counts) == max(counts):
        return candidates.to(device), None
    beyond = torch.arange(max(counts))[None] >= torch.tensor(counts)[:, None]
    return candidates.to(device), beyond.to(device)
