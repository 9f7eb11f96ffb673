"""How a model's forward is led past its blocks, or watched at each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Protocol

from torch import Tensor, nn

from lm_eval_adainfer.structure import private
from lm_eval_adainfer.structure.anatomy import Anatomy
from lm_eval_adainfer.structure.arguments import hidden_of
from lm_eval_adainfer.structure.hooks import replaced_forward


class AllRowsLeft(Exception):  # noqa: N818 - control flow, never seen by users
    """Leaves the model's forward when nothing is needed of what follows."""


def part_output(output: Any, block_input: Tensor) -> Tensor:
    """[n, S, h] output of a block's attention or feed-forward part, kept apart from what the block does with it."""
    hidden = hidden_of(output).reshape(*block_input.shape[:2], -1)  # some families flatten here
    return hidden.clone()  # and some add the other part in place afterwards


@contextmanager
def explicit_masks(active: bool = True) -> Iterator[None]:
    """Let transformers build every causal mask.

    It leaves masks out ("is causal") where a plain forward allows that, but a block that runs some tokens against
    more keys needs one.
    """
    with private.every_mask_built() if active else nullcontext():
        yield


@contextmanager
def bypassed(
    anatomy: Anatomy, blocks: Iterable[nn.Module], note: Callable[[tuple, dict], None] | None = None
) -> Iterator[None]:
    """Let these blocks hand their hidden states on, in the form in which the family's blocks do.

    ``note`` is told of every call's arguments.
    """
    returned = {id(block): n for block, n in zip(anatomy.blocks, anatomy.returned, strict=True)}

    def passing(block: nn.Module) -> Callable:
        beside = (None,) * (returned[id(block)] - 1)

        def forward(*args: Any, **kwargs: Any) -> Any:
            if note is not None:
                note(args, kwargs)
            hidden = args[0] if args else kwargs["hidden_states"]
            return (hidden, *beside) if returned[id(block)] else hidden

        return forward

    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(replaced_forward(block, passing(block)))
        yield


class BlockHooks(Protocol):
    """What watches a forward's blocks (numbered k, from 1) and their parts."""

    def pre_hook(self, k: int, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Before block k: its arguments, as they are to be (None: as they are)."""

    def part_hook(self, which: str, output: Any) -> None:
        """After the attention or feed-forward part of a block."""

    def post_hook(self, k: int, output: Any) -> Any:
        """After block k: its output, as it is to be (None: as it is); or raises AllRowsLeft."""


@contextmanager
def hooked(anatomy: Anatomy, hooks: BlockHooks, capture: Sequence[str]) -> Iterator[None]:
    """Attach ``hooks`` to every block and to its captured parts, for a while.

    Somebody else's hooks on the blocks act in between, on what a block is really given and on what it gives.
    """
    handles: list[Any] = []
    try:
        for k, block in enumerate(anatomy.blocks, start=1):
            handles.append(
                block.register_forward_pre_hook(
                    lambda m, args, kwargs, k=k: hooks.pre_hook(k, args, kwargs), with_kwargs=True, prepend=True
                )
            )
            for which in capture:
                handles.append(
                    anatomy.part(block, which).register_forward_hook(
                        lambda m, args, output, which=which: hooks.part_hook(which, output)
                    )
                )
            handles.append(block.register_forward_hook(lambda m, args, output, k=k: hooks.post_hook(k, output)))
        yield
    finally:
        for handle in handles:
            handle.remove()
