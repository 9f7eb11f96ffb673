"""What stands around a model: wrappers, which must add nothing.

The engine calls a causal LM's blocks one by one, outside of any wrapper (a PEFT model, a module of the user's). So a
wrapper is fine as long as it hands its inputs to the model inside and the model's logits back. Whether it does is
seen in a few forwards when the model is loaded, because no list of wrappers could be complete.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from lm_eval_adainfer.errors import UnsupportedModelError
from lm_eval_adainfer.structure import private
from lm_eval_adainfer.structure.rounding import logits_distance, probed

if TYPE_CHECKING:
    from lm_eval_adainfer.structure.anatomy import Anatomy

_CHUNK = 2048  # token ids in one stubbed forward
_HELP = "pass the model inside, or one whose adapters change weights alone (merged, if need be)"


@torch.no_grad()
def require_nothing_around(anatomy: Anatomy) -> None:
    """Check that the model as lm-eval would run it, wrapper and all, is the causal LM that was taken apart.

    First, nothing may change a module while a forward runs, such as PEFT's hooks of an activated LoRA: blocks are
    called when that is over. Then every token of the vocabulary goes through the wrapper, with a stub in place of the
    model inside, which has to be given the same ids and nothing else, and whose logits have to come back. At last the
    logits of the whole are compared.

    Raises:
        UnsupportedModelError: Where a wrapper does more than that.
    """
    outer, base, ids = anatomy.outer, anatomy.model, anatomy.probe_ids(3)
    before: dict[int, Any] = {}
    changed: list[str | None] = []
    first = anatomy.blocks[0].forward

    def look(*args: Any, **kwargs: Any) -> Any:
        changed.append(_changed(base, before, hooks_alone=True))  # rotary embeddings keep notes of their own
        return first(*args, **kwargs)

    with _replaced(anatomy.blocks[0], "forward", look):
        before = _state(base)
        outer(ids) if outer is not base else outer(ids, use_cache=False)
    _refuse(outer, changed)
    if outer is base:
        return
    vocabulary = torch.arange(int(base.get_input_embeddings().weight.shape[0]), device=ids.device)
    for some in (ids, *(x[None] for x in vocabulary.split(_CHUNK))):
        _hand_through(anatomy, some)

    def off_by() -> float:
        return logits_distance(outer(ids).logits, base(input_ids=ids, use_cache=False).logits)

    difference = probed(anatomy, "logits", off_by)
    if not difference.is_rounding:
        raise _lost(outer, f"gives other logits than the {anatomy.name} inside (these are {difference})")


def require_same_generation(anatomy: Anatomy) -> None:
    """Check that a wrapper's ``generate`` is the ``generate`` of the causal LM inside.

    Raises:
        UnsupportedModelError: Where it does more, or something else.
    """
    outer, base = anatomy.outer, anatomy.model
    if outer is base or getattr(outer.generate, "__self__", None) is base:
        return
    ids = anatomy.probe_ids(2)
    given = {"attention_mask": torch.ones_like(ids), "max_length": ids.shape[1] + 1, "use_cache": True}
    calls: list[tuple[tuple, dict]] = []
    before: dict[int, Any] = {}
    changed: list[str | None] = []

    def stub(*args: Any, **kwargs: Any) -> Tensor:
        calls.append((args, kwargs))
        changed.append(_changed(base, before))
        return ids

    with _replaced(base, "generate", stub):
        before = _state(base)
        found = outer.generate(input_ids=ids, **given)
    _refuse(outer, changed, "generation", "pass generation=dense")
    kwargs = calls[0][1] if len(calls) == 1 else {}
    same = found is ids and kwargs.get("input_ids") is ids and all(kwargs.get(k) is v for k, v in given.items())
    if not same or set(kwargs) != {"input_ids", *given} or calls[0][0]:
        why = f"has a generate of its own beside the {anatomy.name}'s"
        raise _lost(outer, why, "generation", "pass generation=dense")


def _refuse(outer: nn.Module, changed: list[str | None], argument: str = "pretrained", help: str = _HELP) -> None:
    """Nothing is raised in a wrapper's forward, since PEFT would leave its hooks behind."""
    if found := [x for x in changed if x is not None]:
        raise _lost(outer, f"changes {found[0]} while it runs", argument, help)


def _lost(outer: nn.Module, why: str, argument: str = "pretrained", help: str = _HELP) -> UnsupportedModelError:
    if argument == "pretrained" and hasattr(type(outer), "peft_config"):
        argument = "peft"
    return UnsupportedModelError(f"{argument}: {type(outer).__name__} {why}, so early exit would lose it; {help}")


@contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """Another value of an attribute, for a while."""
    before = module.__dict__.get(name, value)
    setattr(module, name, value)
    try:
        yield
    finally:
        delattr(module, name) if before is value else setattr(module, name, before)


def _hand_through(anatomy: Anatomy, ids: Tensor) -> None:
    """One forward of the wrapper around a stub."""
    outer, base = anatomy.outer, anatomy.model
    signature = inspect.signature(base.forward)
    rest = next((name for name, p in signature.parameters.items() if p.kind is p.VAR_KEYWORD), "")
    pattern = torch.linspace(-1, 1, anatomy.vocab_size, device=ids.device, dtype=next(base.parameters()).dtype)
    calls: list[dict[str, Any]] = []
    changed: list[str | None] = []
    logits = pattern.expand(*ids.shape, -1)

    def stub(*args: Any, **kwargs: Any) -> CausalLMOutput:
        changed.append(_changed(base, before))
        bound = signature.bind(*args, **kwargs).arguments
        calls.append({**bound.pop(rest, {}), **bound})
        return CausalLMOutput(logits=logits)  # type: ignore[arg-type]

    # adaption prompts keep the model's forward as their own
    holders = [m for m in outer.modules() if getattr(m.__dict__.get("forward"), "__self__", None) is base]
    with ExitStack() as stack:
        for module in {id(m): m for m in (base, *holders)}.values():
            stack.enter_context(_replaced(module, "forward", stub))
        before = _state(base)
        try:
            found = outer(ids).logits
        except Exception as error:  # it changes the stub's logits in place, say
            raise _lost(outer, f"needs more of the {anatomy.name} inside than logits ({error!s:.80})") from error
    _refuse(outer, changed)
    if len(calls) != 1:
        raise _lost(outer, f"calls the {anatomy.name} inside {len(calls)} times in a forward")
    given = calls[0].pop("input_ids", None)
    if not isinstance(given, Tensor) or given.shape != ids.shape or not torch.equal(given, ids):
        raise _lost(outer, f"gives the {anatomy.name} inside other token ids than it is given")
    for name, value in calls[0].items():
        ones = name == "attention_mask" and isinstance(value, Tensor) and bool((value == 1).all())
        if not (value is None or isinstance(value, bool) or ones or (type(value) is int and value == 0)):
            raise _lost(outer, f"gives the {anatomy.name} inside {name} as well as token ids")
    if found.dtype != logits.dtype or found.shape != logits.shape or not torch.equal(found, logits):
        raise _lost(outer, f"changes the logits of the {anatomy.name} inside")


def _state(model: nn.Module) -> dict[int, Any]:
    """Of every module: its hooks, a forward that was put in place, flags, and the versions of its parameters."""
    return {id(module): (*_marks(module),) for module in model.modules()}


def _marks(module: nn.Module) -> Iterator[Any]:
    own = module.__dict__
    before, after = private.hooks_of(module)
    yield tuple(before), tuple(after), id(own.get("forward"))
    yield tuple((name, value) for name, value in own.items() if type(value) in (bool, int, float, str))
    yield tuple((name, tuple(map(str, value))) for name, value in own.items() if type(value) is list)
    weights = [(name, x) for name, x in private.parameters_of(module).items() if x is not None]
    yield tuple((name, id(x), private.version_of(x)) for name, x in weights)


def _changed(model: nn.Module, before: dict[int, Any], hooks_alone: bool = False) -> str | None:
    """What differs from before, in words."""
    for name, module in model.named_modules():
        old, now = before.get(id(module)), (*_marks(module),)
        where = name or type(module).__name__
        if old is None or old[0] != now[0]:
            return f"the hooks of {where}"
        if old != now and not hooks_alone:
            return f"the state of {where}"
    return None
