"""Readers that let tokens go on: what the model would answer if the prompt left after a block (``copy`` and ``sim``).

The last W tokens of a prompt run on through the later blocks. With ``copy`` they see what these blocks store of the
other tokens' states as they are now (CALM's state copy, arXiv 2207.07061, section 3.3, for the prompt); with ``sim``
they see the first token, which runs on too, and each other (after SimLens, arXiv 2507.17618). What follows the prompt,
the tokens of a continuation, runs on behind them. What prompts share is copied once for all of them (``prefixes``).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lm_eval_adainfer.errors import UnsupportedModelError
from lm_eval_adainfer.prefill.attention import ApartBehind
from lm_eval_adainfer.prefill.documents import Row
from lm_eval_adainfer.prefill.forward import Forward, padded
from lm_eval_adainfer.prefill.prefixes import Continued, ContinuedCache, Copies, Pair, Prefix
from lm_eval_adainfer.readers.base import Reader
from lm_eval_adainfer.structure.anatomy import Anatomy
from lm_eval_adainfer.structure.arguments import BatchRule, walk
from lm_eval_adainfer.structure.rounding import hidden_distance, probed
from lm_eval_adainfer.structure.storing import Storing, watch_storing
from lm_eval_adainfer.structure.windows import NoPlainCacheError, watch_windows


class Spot(NamedTuple):
    """A row to be read, and where.

    Attributes:
        flow: Its number among a batch's rows in flow.
        row: The row.
        skip: Tokens that a prefix runs.
        positions: Positions to read: the decision's and those of continuation tokens behind it.
    """

    flow: int
    row: Row
    skip: int
    positions: int = 1


class _Past:
    """Keys and values that a window sees, block after block (a ``prefixes.Source``)."""

    def __init__(self, width: int):
        self.width = width
        self.stored: defaultdict[int, Pair] = defaultdict(self._of_now)  # whatever the layer's number is
        self._now: Pair | None = None

    def _of_now(self) -> Pair:
        assert self._now is not None
        return self._now

    def provide(self, pair: Pair) -> None:
        """These are the keys and values of the block that is next."""
        self.stored.clear()
        self._now = pair


class Reading:
    """Reads prompts of one model under ``copy`` or ``sim``.

    Args:
        anatomy: The model.
        reader: The reader.
        storing: For ``copy``: what blocks have to compute for their keys and values.

    Attributes:
        block_tokens: Block executions x tokens.
        copied_tokens: Block executions for keys and values alone x tokens.
        block_calls: Block executions.
    """

    def __init__(self, anatomy: Anatomy, reader: Reader, storing: Storing | None = None):
        self.anatomy, self.reader, self.storing = anatomy, reader, storing
        self.block_tokens = self.copied_tokens = self.block_calls = 0

    @torch.no_grad()
    def read(
        self,
        k: int,
        hidden: Tensor,
        continued: Continued | None,
        spots: Sequence[Spot],
        store: dict[int, Pair] | None = None,
    ) -> Tensor:
        """Read rows of a batch after block k.

        Args:
            k: The block.
            hidden: [rows, S, h], the states of the rows in flow after it.
            continued: What the rows continue; its prefix has kept its states after block k.
            spots: Which rows to read, and where.
            store: Where to put the later blocks' keys and values, by layer: [spots, heads, slots, d]. With ``copy``
                these are all tokens' up to the last read, with padding in front to the longest row in front of its
                window; with ``sim`` those of the tokens that run on alone.

        Returns:
            [n, h], the states after block L at the positions of all spots, one spot's after the other's: what norm and
            head read.
        """
        self._require_fixed(spots)
        copies = self.reader.kind == "copy"
        run = [_tokens(self.reader, spot) for spot in spots]
        ids = padded(self.anatomy, [[spot.row.tokens[t] for t in some] for spot, some in zip(spots, run, strict=True)])
        length = torch.tensor([len(some) for some in run])
        states = _gathered(k, hidden, continued, spots, run)
        if copies:
            forward, past = self._among_copies(k, hidden, continued, spots, run, ids, store)
        else:
            places = torch.zeros_like(ids)
            for r, some in enumerate(run):
                places[r, : len(some)] = torch.tensor(some)
                places[r, len(some) :] = some[-1]
            # with a mask the model does not take gaps between positions for the borders of packed texts
            given: dict[str, Any] = {"position_ids": places, "attention_mask": torch.ones_like(ids)}
            given |= {"use_cache": store is not None}
            if store is not None:
                given |= self.anatomy.with_cache(ContinuedCache(None, store=store))
            forward, past = Forward(self.anatomy, ids, rule=BatchRule(), given=given), None
        forward.go_on_from(k, states)
        for j in range(k + 1, self.anatomy.n_blocks + 1):
            if past is not None:
                past.provide(j)
            with nullcontext() if past is None or past.apart is None else past.apart.used():
                forward.advance()
            self.block_calls += 1
        self.block_tokens += int(length.sum()) * (self.anatomy.n_blocks - k)
        numbered = enumerate(zip(spots, run, strict=True))
        at = [(r, len(some) - spot.positions + j) for r, (spot, some) in numbered for j in range(spot.positions)]
        rows, places = torch.tensor(at, device=forward.hidden.device).T
        return forward.hidden[rows, places]

    def _require_fixed(self, spots: Sequence[Spot]) -> None:
        limit, longest = self.anatomy.fixed_positions, max(len(spot.row.tokens) for spot in spots)
        if limit is not None and longest > limit:
            raise UnsupportedModelError(
                f"reader: beyond {limit} tokens the rotary embeddings of {self.anatomy.name} depend on the longest "
                f"text, so {self.reader.name} can't read one of {longest}; use reader=head, or a shorter max_length"
            )

    def _among_copies(
        self,
        k: int,
        hidden: Tensor,
        continued: Continued | None,
        spots: Sequence[Spot],
        run: Sequence[Sequence[int]],
        ids: Tensor,
        store: dict[int, Pair] | None,
    ) -> tuple[Forward, _Copied]:
        """The forward of the tokens that run on, behind the copies that they see."""
        # what is read apart from a window's own is not stored with it
        new = ids.shape[1] if store is None else 0
        past = _Copied(self, k, hidden, continued, spots, [some[0] for some in run], new)
        cache = ContinuedCache(past.source if past.source.width else None, store=store)
        cache.apart = past.apart
        given = self.anatomy.with_cache(cache)
        before = torch.tensor(past.lengths)[:, None]
        if min(past.lengths) < past.source.width:
            slots = torch.arange(past.source.width + ids.shape[1])[None]
            given["attention_mask"] = (slots >= past.source.width - before).long().to(ids.device)
        if self.anatomy.takes_position_ids:
            given["position_ids"] = (before + torch.arange(ids.shape[1])).to(ids.device)
        return Forward(self.anatomy, ids, rule=BatchRule(), given=given, masks=True), past


class _Copied:
    """Keys and values, in later blocks, of the tokens in front of windows, made of their states after one block.

    Args:
        reading: Whose storing is used, and whose counts go up.
        k: The block.
        hidden: As :meth:`Reading.read`'s, and so are ``continued`` and ``spots``.
        continued: What the rows continue.
        spots: The rows.
        lengths: Per spot, how many tokens stand in front of its window.
        new: Tokens of a window that attends to the prefix apart from its own row's (``attention``), where the rows of
            the batch do, too; 0 for none.

    Attributes:
        source: What windows continue.
        apart: How they read it, where that is apart.
    """

    def __init__(
        self,
        reading: Reading,
        k: int,
        hidden: Tensor,
        continued: Continued | None,
        spots: Sequence[Spot],
        lengths: Sequence[int],
        new: int = 0,
    ):
        assert reading.storing is not None
        self.reading, self.lengths, self.source = reading, list(lengths), _Past(max(lengths))
        anatomy, storing = reading.anatomy, reading.storing
        self.prefix: Prefix | None = None
        self.copies: Copies | None = None
        self.owner: Tensor | None = None
        skip, pad = [spot.skip for spot in spots], [0] * len(spots)
        if continued is not None:
            self.prefix, owner = continued.prefix, continued.cache.owner
            assert owner is not None
            self.owner = owner[[spot.flow for spot in spots]]
            self.copies = self.prefix.copies(k, storing)
            pad = [self.prefix.width - n for n in skip]
        own = [max(0, n - s) for n, s in zip(lengths, skip, strict=True)]
        self.apart: ApartBehind | None = None
        begins_inside = any(n < s for n, s in zip(lengths, skip, strict=True))  # a window, of the prefix
        if new and continued is not None and continued.cache.apart is not None and not begins_inside:
            self.apart = ApartBehind(skip[0], own, new)
        self.tokens, self.forward = sum(own), None
        self.store: dict[int, Pair] = {}
        width = max(own)
        if width:  # tokens of the rows themselves, in front of their windows
            rows = [spot.row.tokens[spot.skip : spot.skip + n] for spot, n in zip(spots, own, strict=True)]
            ids = padded(anatomy, rows)
            cache = ContinuedCache(self.copies, self.owner, self.store, True, self.apart is not None)
            given = anatomy.with_cache(cache)
            if anatomy.takes_position_ids:
                given["position_ids"] = (torch.tensor(skip)[:, None] + torch.arange(width)).to(ids.device)
            self.forward = Forward(anatomy, ids, rule=BatchRule(), given=given)
            flow = torch.tensor([spot.flow for spot in spots], device=hidden.device)
            self.hidden = hidden[flow, :width]
        # behind the last slot that a window sees, and how many slots there are
        ends = own if self.apart is not None else [p + n for p, n in zip(pad, lengths, strict=True)]
        self.width = width if self.apart is not None else self.source.width
        self.end = ends[0] if len(set(ends)) == 1 else None
        self.slots = (torch.tensor(ends)[:, None] - self.width + torch.arange(self.width)).clamp(min=0)

    def provide(self, k: int) -> None:
        """Have block k's at hand."""
        if not self.source.width:
            return
        before = 0 if self.prefix is None else _copied(self.prefix)
        if self.copies is not None:
            found = shared = self.copies.of(k)
        if self.forward is not None:
            self.store.clear()
            self.forward.store(k, self.hidden, self.reading.storing)  # type: ignore[arg-type]
            (found,) = self.store.values()
            self.reading.copied_tokens += self.tokens
        elif self.owner is not None and len(found[0]) > 1:
            found = (found[0][self.owner.to(found[0].device)], found[1][self.owner.to(found[1].device)])
        self.reading.copied_tokens += 0 if self.prefix is None else _copied(self.prefix) - before
        if self.apart is None:
            self.source.provide((self._aligned(found[0]), self._aligned(found[1])))
            return
        self.source.provide(shared)
        if self.forward is not None:
            self.apart.between = self._aligned(found[0]), self._aligned(found[1])

    def _aligned(self, whole: Tensor) -> Tensor:
        """[spots, heads, slots, d], what each window sees, up to the last slot."""
        if self.end is not None:
            return whole[:, :, self.end - self.width : self.end].expand(len(self.lengths), -1, -1, -1)
        whole = whole.expand(len(self.lengths), -1, -1, -1)
        index = self.slots.to(whole.device)[:, None, :, None].expand(-1, whole.shape[1], -1, whole.shape[-1])
        return whole.gather(2, index)


def copies(
    anatomy: Anatomy, storing: Storing, k: int, hidden: Tensor, continued: Continued | None, spots: Sequence[Spot]
) -> Iterator[dict[int, Pair]]:
    """What later blocks store of whole prompts that go no further than block k, by layer, padding in front.

    Args:
        anatomy: The model.
        storing: What blocks have to compute for that.
        k: The block.
        hidden: [rows, S, h], the states of the rows in flow after it.
        continued: What the rows continue; its prefix has kept its states after block k.
        spots: The rows.
    """
    lengths = [spot.row.decision + 1 for spot in spots]
    whole = _Copied(Reading(anatomy, Reader("copy", 1), storing), k, hidden, continued, spots, lengths)
    for j in range(k + 1, anatomy.n_blocks + 1):
        whole.provide(j)
        (layer,) = whole.store
        yield {layer: whole.source.stored[layer]}


def tokens_that_run(reader: Reader, row: Row) -> list[int]:
    """Which tokens of a prompt run on where it is read at its last one."""
    return _tokens(reader, Spot(0, row, 0))


def _copied(prefix: Prefix) -> int:
    """Tokens x blocks whose keys and values alone were made, of a prefix and what it continues."""
    return prefix.copied + (0 if prefix.parent is None else _copied(prefix.parent))


def _tokens(reader: Reader, spot: Spot) -> list[int]:
    """Which of a row's tokens run on: the window, what a continuation has behind it, and with ``sim`` the first."""
    end = spot.row.decision + 1
    start = max(0, end - reader.window)
    first = [0] if reader.kind == "sim" and start else []
    return [*first, *range(start, end + spot.positions - 1)]


def _gathered(
    k: int, hidden: Tensor, continued: Continued | None, spots: Sequence[Spot], run: Sequence[Sequence[int]]
) -> Tensor:
    """[spots, T, h] states after block k of some of the rows' tokens, from wherever they were run; zeros behind."""
    found = hidden.new_zeros(len(spots), max(map(len, run)), hidden.shape[-1])
    numbered = enumerate(zip(spots, run, strict=True))
    wanted = [(i, j, spot, t) for i, (spot, some) in numbered for j, t in enumerate(some)]
    _put(found, hidden, [(i, j, spot.flow, t - spot.skip) for i, j, spot, t in wanted if t >= spot.skip])
    if continued is None:
        return found
    prefix, owner = continued.prefix, continued.cache.owner
    assert owner is not None
    own = owner.tolist()
    of = [(i, j, own[spot.flow], t) for i, j, spot, t in wanted if t < spot.skip]
    # the rows of a prefix end together
    ends = [prefix.longest - prefix.length(r) for r in range(max((r for _, _, r, _ in of), default=-1) + 1)]
    _put(found, prefix.after[k], [(i, j, r, ends[r] + t) for i, j, r, t in of if t >= prefix.shared])
    if prefix.parent is not None:
        _put(found, prefix.parent.after[k], [(i, j, 0, t) for i, j, _, t in of if t < prefix.shared])
    return found


def _put(into: Tensor, source: Tensor, places: Sequence[tuple[int, int, int, int]]) -> None:
    """Copy states: (row, place) in ``into`` from (row, place) in ``source``."""
    if places:
        i, j, r, t = torch.tensor(places, device=into.device).T
        into[i, j] = source[r.to(source.device), t.to(source.device)].to(into.device)


@torch.no_grad()
def prepared(anatomy: Anatomy, reader: Reader) -> Reading:
    """A reader that lets tokens go on, made ready for a model and checked on a few tokens.

    Raises:
        UnsupportedModelError: Where the model can't be read so, in one sentence.
    """
    if any(anatomy.handed_on):
        raise _unsupported(anatomy, reader, "its blocks hand on more than hidden states")
    if reader.kind == "sim" and not anatomy.takes_position_ids:
        raise _unsupported(anatomy, reader, "its forward takes no position ids")
    if reader.kind == "copy":
        try:
            watch_windows(anatomy)
        except NoPlainCacheError as error:
            raise _unsupported(anatomy, reader, f"it does not use a plain key-value cache: {error.why}") from error
    try:
        storing = watch_storing(anatomy) if reader.kind == "copy" else None
        unplaced = reader.kind == "sim" and _follows_order(anatomy)
        difference = probed(anatomy, "hidden", partial(_off_by, anatomy, reader, storing))
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        said = str(error).splitlines()[0] if str(error) else ""
        raise _unsupported(anatomy, reader, f"its forward fails so ({type(error).__name__}: {said})") from error
    if unplaced:
        raise _unsupported(anatomy, reader, "where tokens stand follows from their order there, not from position ids")
    if not difference.is_rounding:
        raise _unsupported(anatomy, reader, f"hidden states are {difference}")
    return Reading(anatomy, reader, storing)


def _unsupported(anatomy: Anatomy, reader: Reader, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"reader: {anatomy.name} can't be read by {reader.kind} ({why}); use head or tuned")


def _follows_order(anatomy: Anatomy) -> bool:
    """Whether position ids change nothing, but blocks are given something else that says where tokens stand (alibi).

    That is numbers which differ from place to place and are the same for other tokens; masks hold none.
    """
    ids = anatomy.probe_ids(2)
    places = torch.arange(ids.shape[1], device=ids.device)[None].expand_as(ids)
    (given, logits), (moved, others), (same, _) = (
        _given_to_blocks(anatomy, tokens, at)
        for tokens, at in ((ids, places), (ids, (places - 1).clamp(min=0)), (ids.flip(1), places))
    )
    if not torch.equal(logits, others):
        return False
    for x, y, z in zip(given, moved, same, strict=True):
        numbers = x[x > -1e4] if x.is_floating_point() else x[:0]
        if len(numbers) and bool((numbers != numbers.flatten()[0]).any()) and torch.equal(x, y) and torch.equal(x, z):
            return True
    return False


def _given_to_blocks(anatomy: Anatomy, ids: Tensor, places: Tensor) -> tuple[list[Tensor], Tensor]:
    """What blocks are given besides hidden states in a plain forward, and its logits."""
    found: list[Tensor] = []

    def note(module: Any, args: tuple, kwargs: dict) -> None:
        beside = {name: x for name, x in kwargs.items() if name != "hidden_states"}
        walk([list(args[1:]), beside], lambda _, x: found.append(x.clone()))

    handles = [block.register_forward_pre_hook(note, with_kwargs=True) for block in anatomy.blocks]
    try:
        given: dict[str, Any] = {"position_ids": places, "attention_mask": torch.ones_like(ids), "use_cache": False}
        return found, anatomy.model(input_ids=ids, **given).logits
    finally:
        for handle in handles:
            handle.remove()


def _off_by(anatomy: Anatomy, reader: Reader, storing: Storing | None) -> tuple[float, float]:
    """How far what is read of three rows together is from the rows alone, every later block run on all tokens.

    And how far these are from the same rows with more tokens behind them, which is rounding.
    """
    ids, worst, own = anatomy.probe_ids(3).tolist(), 0.0, 0.0
    rows = [Row(tokens[:n], scored) for tokens, n, scored in zip(ids, (5, 4, 2), (2, 1, 1), strict=True)]
    reading = Reading(anatomy, Reader(reader.kind, min(reader.window, 2)), storing)
    for k in sorted({1, max(1, anatomy.n_blocks // 2), max(1, anatomy.n_blocks - 1)}):
        if k == anatomy.n_blocks:
            continue
        forward = Forward(anatomy, padded(anatomy, [row.tokens for row in rows]))
        for _ in range(k):
            forward.advance()
        found = reading.read(k, forward.hidden, None, [Spot(r, row, 0, row.scored) for r, row in enumerate(rows)])
        expected = torch.cat([slowly(anatomy, reading.reader, k, row) for row in rows]).to(found.device)
        worst = max(worst, hidden_distance(found, expected))
        for more in (ids[0][:1], ids[0][:3]):
            longer = [Row([*row.tokens, *more], row.scored + len(more)) for row in rows]
            same = [slowly(anatomy, reading.reader, k, row)[: -len(more)] for row in longer]
            own = max(own, hidden_distance(torch.cat(same).to(found.device), expected))
    return worst, own


def slowly(anatomy: Anatomy, reader: Reader, k: int, row: Row) -> Tensor:
    """[scored, h] states after block L of one row alone, as ``copy`` and ``sim`` are defined (docs/readers.md)."""
    decision, tokens = row.decision, [row.tokens]
    if reader.kind == "sim":
        some = _tokens(reader, Spot(0, row, 0, row.scored))
        plain = Forward(anatomy, padded(anatomy, tokens))
        for _ in range(k):
            plain.advance()
        ids = padded(anatomy, [[row.tokens[t] for t in some]])
        places = torch.tensor([some], device=ids.device)
        given = {"use_cache": False, "position_ids": places, "attention_mask": torch.ones_like(ids)}
        forward = Forward(anatomy, ids, rule=BatchRule(), given=given)
        forward.go_on_from(k, plain.hidden[:, some])
        for _ in range(k, anatomy.n_blocks):
            forward.advance()
        return forward.hidden[0, -row.scored :]
    forward = Forward(anatomy, padded(anatomy, tokens))
    for _ in range(k):
        forward.advance()
    left, away = forward.hidden.clone(), max(0, decision + 1 - reader.window)
    for _ in range(k, anatomy.n_blocks):
        forward.advance()
        forward.hidden = torch.cat([left[:, :away], forward.hidden[:, away:]], dim=1)
    return forward.hidden[0, decision:]
