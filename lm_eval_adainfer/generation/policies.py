"""KV policies: what a deeper block does about tokens that left before it, when a later token of their row gets there.

In every block the cache holds a *prefix* of a row's tokens, and it never holds more in a later block than in an earlier
one. A token that left after block e has keys and values in blocks 1..e alone; its hidden state after block e is kept
(one per token, since a token is pending after one block only). A policy says what happens to the tokens that a block
misses. A new policy is a subclass of :class:`KVPolicy` and an entry of :data:`KV_POLICIES`, and nothing else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from lm_eval_adainfer.generation.tokens import Tokens


class KVPolicy(ABC):
    """Splits the tokens that a block misses into those that it runs and those whose keys and values it only stores.

    Attributes:
        exact: Whether a token that runs to the end sees the dense model's keys and values; a run's record calls the
            other policies approximate.
    """

    exact: bool

    @abstractmethod
    def split(
        self, rows: list[int], missing: list[int], first_exits: list[int], newest: int
    ) -> tuple[Tokens, Tokens | None]:
        """What a block does in this step.

        Every slot from the first missing one to the newest has to be in one of the two parts, because the block counts
        as filled afterwards. A part has one stretch of slots of a row, and the part to run has the newest one too. The
        prompt's tokens before the first exit are always run, since they have no exits of their own.

        Args:
            rows: The rows whose newest token got here.
            missing: Per row, the first slot that the block has not filled; the newest where only that is missing.
            first_exits: Per row, the first slot whose token may have left early, which is the last one of the prompt.
            newest: The newest slot.

        Returns:
            The tokens to run, the newest of each row among them, and those to store: their kept hidden states are
            projected into the block's keys and values, and nothing else of the block is computed. None stores nothing.
        """


class Recompute(KVPolicy):
    """The kept hidden states are run along with the newest token, so the block fills what it misses in one call."""

    exact = True

    def split(
        self, rows: list[int], missing: list[int], first_exits: list[int], newest: int
    ) -> tuple[Tokens, Tokens | None]:
        """Everything is run."""
        return Tokens(rows, missing, [newest] * len(rows), newest), None


class Propagate(KVPolicy):
    """The kept hidden states are projected as they are (CALM's state copy, arXiv 2207.07061, section 3.3).

    This is cheaper and approximate. The prompt has no exits of its own and is always filled exactly.
    """

    exact = False

    def split(
        self, rows: list[int], missing: list[int], first_exits: list[int], newest: int
    ) -> tuple[Tokens, Tokens | None]:
        """The prompt and the newest token are run; what lies between is stored."""
        exits = list(map(max, missing, first_exits))
        stored = Tokens(rows, exits, [newest] * len(rows), newest, with_newest=False)
        prompt = [slot if slot < first else newest for slot, first in zip(missing, first_exits, strict=True)]
        return Tokens(rows, prompt, first_exits, newest), stored if stored.n else None


KV_POLICIES: dict[str, type[KVPolicy]] = {"recompute": Recompute, "propagate": Propagate}
