"""Finds the decoder blocks, the tail (final norm) and the output head of any decoder-only model, by structure.

No class names and no attribute names of families: one short *probe* forward is watched through hooks, and what was
seen decides. The blocks are the outermost module list whose modules ran one after the other, each fed by its
predecessor; the tail is the chain of modules that led from the last block's output to the base model's output; the
head is whatever the model's own forward does with that. Everything is checked against the model's own logits when
it is built, so a model that does not fit is refused in one sentence instead of giving wrong numbers.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from lm_eval_adainfer.errors import UnsupportedModelError
from lm_eval_adainfer.structure import hashes, opaque, private
from lm_eval_adainfer.structure.arguments import BatchRule, _tensors, batch_factors, hidden_of
from lm_eval_adainfer.structure.few_rows import few_rows_linear, wide_is_slow
from lm_eval_adainfer.structure.head import _some_logits
from lm_eval_adainfer.structure.hooks import _Call, _recorded, replaced_forward
from lm_eval_adainfer.structure.rounding import (
    Rounding,
    hidden_distance,
    in_float32,
    logits_distance,
    probed,
    unmeasured,
)
from lm_eval_adainfer.structure.unwrapping import base_of
from lm_eval_adainfer.structure.weights import (
    _expert_count,
    _has_weights,
    input_device,
    is_linear,
    linear_size,
    values_of,
)

_PROBE_TOKENS = 5


class _HeadInput(BaseModelOutputWithPast):
    """What a stubbed base model returns: a last hidden state, and None for whatever else a head asks for."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


class Anatomy:
    """A decoder-only model taken apart without changing it.

    Attributes:
        outer: The model as it was given; a wrapper (PEFT's, say) has to add nothing (``wrappers``).
        model: The causal LM inside (adapters unwrapped), in charge of its own forward.
        blocks: The L decoder blocks, in order; block numbers start at 1, so block k is ``blocks[k - 1]``.
        vocab_size: V, the width of the logits.
        hidden_size: h, the width of what the head reads.
        block_weights: Per block, the weights of its linear maps that one token meets (experts: the active share).
        attention_width: Per block, heads x head size (0 where there is no attention module).
        whole_weights: ``block_weights`` before blocks were taken out of the model (``dropping``); the dense model's.
        whole_widths: ``attention_width`` before that.
        tail: What leads from a block's output to the head: final norm, and a projection where there is one.
        batch_rule: How the blocks' arguments follow the batch.
        returned: Per block, how many things it returns in a tuple, hidden states first; 0 for a tensor.
        handed_on: Per block, which of its arguments the block before returned besides hidden states: pairs of the
            argument (its place or name) and its place behind the hidden states.
        rounding: What rounding does to the model's numbers, with float32 copies of its weights (True) and as it is
            (False), once it was measured (:func:`rounding.measured`).
    """

    def __init__(self, model: nn.Module):
        """Take ``model`` apart and check the result against the model's own logits.

        Raises:
            UnsupportedModelError: Where the structure does not allow early exit, saying why.
        """
        adapter = getattr(model, "active_peft_config", None)
        if getattr(adapter, "is_prompt_learning", False):  # its virtual tokens live outside the base model
            raise UnsupportedModelError(
                f"peft: {type(adapter).__name__} is prompt learning, which adainfer does not support; use an adapter "
                "that changes layers, like LoRA"
            )
        self.outer: Any = model
        self.model: Any = base_of(model)
        config: Any = getattr(self.model, "config", None)
        self.config: Any = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
        self.name = type(self.model).__name__
        self._offloaded_hashes: dict[tuple[str, str], str] = {}  # of parameters, by module and name
        if getattr(config, "is_encoder_decoder", False):
            raise UnsupportedModelError(
                f"pretrained: {self.name} is an encoder-decoder model, but adainfer needs a decoder-only one"
            )
        self.rounding: dict[bool, Rounding] = {}
        with in_float32(self.model) as copied:
            self._find()
        if copied:  # a coarser dtype may overflow where the copies did not
            with torch.no_grad():
                self._require_finite(self.model(input_ids=self.probe_ids(2), use_cache=False).logits)
        self.block_weights = [self._linear_weights(block) for block in self.blocks]
        self.attention_width = [self._attention_width(block) for block in self.blocks]
        self.whole_weights, self.whole_widths = self.block_weights, self.attention_width

    @property
    def n_blocks(self) -> int:
        """L, the number of decoder blocks."""
        return len(self.blocks)

    # ------------------------------------------------------------------ finding
    def _unsupported(self, why: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"pretrained: {self.name} is not supported for early exit: {why}")

    @torch.no_grad()
    def _find(self) -> None:
        candidates = self._candidate_lists()
        watched = {id(m): m for _, blocks in candidates for m in blocks}
        prefixes = {prefix for name, _ in candidates for prefix in _ancestors(name)}
        holders = {id(m): (name, m) for name, m in self.model.named_modules() if name in prefixes}
        children = {id(c): c for _, h in holders.values() for c in h.children() if id(c) not in watched}

        calls: list[_Call] = []  # in order of completion
        shapes: dict[int, dict[tuple[int, str], tuple[int, ...]]] = {2: {}, 3: {}}
        lasts: list[Tensor] = []  # the last block's outputs
        given: list[list[Any]] = []  # per batch, each block's arguments
        for batch, tokens in ((2, _PROBE_TOKENS - 1), (3, _PROBE_TOKENS)):
            calls.clear()
            with ExitStack() as stack:
                for module in {**watched, **{i: m for i, (_, m) in holders.items()}, **children}.values():
                    stack.enter_context(_recorded(module, calls))
                ids = self.probe_ids(batch)[:, :tokens]
                logits = self.model(input_ids=ids, use_cache=False).logits
            self._require_finite(logits)
            if batch == 2:
                self.blocks = self._choose_blocks(candidates, calls)
            number = {id(block): k for k, block in enumerate(self.blocks, start=1)}
            given.append([arguments for i, arguments, _ in calls if i in number])
            self._require_tensors(given)
            for module_id, arguments, _ in calls:
                if (k := number.get(module_id)) is not None:
                    shapes[batch].update({(k, path): tuple(x.shape) for path, x in _tensors(list(arguments))})
            lasts.append(hidden_of(next(o for i, _, o in reversed(calls) if i in number)))
        self.batch_rule = BatchRule(batch_factors(shapes[2], shapes[3], (2, 3)))

        short, last = lasts
        base, end = next(
            (holders[i][1], x) for i, _, o in reversed(calls) if i in holders and (x := _last_hidden(o)) is not None
        )
        self._base = base
        self.tail = self._chain(last, end, [(children[i], a, o) for i, a, o in calls if i in children])
        self.vocab_size = int(logits.shape[-1])
        self.hidden_size = int(end.shape[-1])
        mine = [(a, o) for i, a, o in calls if i in number]
        self.returned = [0 if isinstance(o, Tensor) else len(o) for _, o in mine]
        self.handed_on = [[], *(_handed_on(o, a) for (_, o), (a, _) in pairwise(mine))]
        self.block_hidden_size = int(last.shape[-1])

        # every batch of rows of different lengths relies on it, since right padding has no mask
        allowed = unmeasured(self.model)
        if not hidden_distance(last[: len(short), : short.shape[1]], short) <= allowed:
            raise self._unsupported("its tokens see later ones, so it is no decoder")
        again = self.logits(last[:, -1, :])
        worst = logits_distance(again, logits[:, -1, :])
        if not worst <= allowed:
            raise self._unsupported(
                f"its final norm and output head could not be separated (logits off by {worst:.2g} of their size, "
                f"allowed {allowed:.2g})"
            )

    def _require_finite(self, logits: Tensor) -> None:
        if not bool(torch.isfinite(logits).all()):
            raise UnsupportedModelError(
                f"dtype: the logits of {self.name} are not finite in {logits.dtype}; try another dtype"
            )

    def _require_tensors(self, given: Sequence[Sequence[Any]]) -> None:
        """Refuse a model whose blocks are given something else than tensors that holds a batch."""
        found = next((x for arguments in given[-1] if (x := opaque.opaque(arguments)) is not None), None)
        if found is not None:
            said = opaque.refusal(found)
            raise UnsupportedModelError(said) if said.startswith("attn") else self._unsupported(said)
        if len(given) == 2:
            paths = [opaque.per_row(two, three) for two, three in zip(*given, strict=True)]
            if found := next((path for path in paths if path is not None), None):
                raise self._unsupported(
                    f"its blocks are given a list with an entry per row ({found.rpartition('.')[2]}), which is not cut "
                    "when rows leave"
                )

    def probe_ids(self, batch: int) -> Tensor:
        """Token ids [batch, 5] for a probe forward: different rows, deterministic, valid for any vocabulary."""
        vocab = int(self.model.get_input_embeddings().weight.shape[0])
        ids = torch.arange(batch * _PROBE_TOKENS).reshape(batch, -1) * 7 + 3
        return (ids % vocab).to(self.input_device)

    @property
    def input_device(self) -> torch.device:
        """Where token ids go."""
        return input_device(self.model)

    @cached_property
    def takes_position_ids(self) -> bool:
        """Whether the model's forward has the argument (families with alibi have none)."""
        return "position_ids" in inspect.signature(self.model.forward).parameters

    @cached_property
    def cache_argument(self) -> str:
        """What the model calls its key-value cache: ``cache``, as most of transformers since 5.24, or as before."""
        names = (inspect.signature(module.forward).parameters for module in self.model.modules())
        named = next((found for found in names if "past_key_values" in found or "cache" in found), ())
        return "cache" if "cache" in named and "past_key_values" not in named else "past_key_values"

    def with_cache(self, cache: Any) -> dict[str, Any]:
        """Arguments with which the model's forward uses a cache."""
        return {self.cache_argument: cache, "use_cache": True}

    @cached_property
    def fixed_positions(self) -> int | None:
        """Up to so many tokens a position's embedding depends on the position alone; None: always.

        Dynamic and longrope scaling change the frequencies with the longest text of a batch beyond that.
        """
        found = getattr(self.config, "rope_parameters", None) or getattr(self.config, "rope_scaling", None) or {}
        limits = []
        for rope in (found, *(x for x in found.values() if isinstance(x, dict))):
            if rope.get("rope_type", rope.get("type")) in ("dynamic", "longrope"):
                limits.append(
                    rope.get("original_max_position_embeddings")
                    or getattr(self.config, "original_max_position_embeddings", None)
                    or self.config.max_position_embeddings
                )
        return min(limits) if limits else None

    def _candidate_lists(self) -> list[tuple[str, nn.ModuleList]]:
        """Module lists, those as long as the config's number of layers first, outermost first.

        Some configs count layers otherwise (LongCat's blocks have two attention layers each).
        """
        n_layers = getattr(self.config, "num_hidden_layers", None)
        lists = [(n, m) for n, m in self.model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 0]
        found = [(n, m) for n, m in lists if n_layers is None or len(m) == n_layers] or lists
        if not found:
            raise self._unsupported("it has no list of decoder blocks")
        return sorted(found, key=lambda item: (item[0].count("."), -len(item[1])))

    def _choose_blocks(
        self, candidates: Sequence[tuple[str, nn.ModuleList]], calls: Sequence[_Call]
    ) -> list[nn.Module]:
        """The first candidate whose modules each ran once, in order, each on its predecessor's output.

        A few may not run at all: text passes by blocks that attend to images.
        """
        why = "its decoder blocks do not run once each, in order, on the previous block's output"
        for _, blocks in candidates:
            ids = [id(block) for block in blocks]
            mine = [(i, a, o) for i, a, o in calls if i in set(ids)]
            ran = {i for i, _, _ in mine}
            if [i for i, _, _ in mine] != [i for i in ids if i in ran] or 2 * len(ran) <= len(ids):
                continue
            inputs, outputs = [_hidden_argument(a) for _, a, _ in mine], [hidden_of(o) for _, _, o in mine]
            if any(y.shape != outputs[0].shape or y.dim() < 3 for y in outputs):
                continue
            if all(x is not None and torch.equal(x, y) for x, y in zip(inputs[1:], outputs[:-1], strict=True)):
                if outputs[0].dim() == 3:
                    return [block for block in blocks if id(block) in ran]
                why = "its decoder blocks hand on several hidden states per token, of which none is the answer so far"
        raise self._unsupported(why)

    def _chain(self, start: Tensor, end: Tensor, calls: Sequence[tuple[nn.Module, Any, Any]]) -> list[nn.Module]:
        """The modules that led from the last block's output to the base model's output (final norm, projection)."""
        chain, current = [], start
        for module, arguments, output in calls:
            x = _hidden_argument(arguments)
            if x is not None and isinstance(output, Tensor) and x.shape == current.shape and torch.equal(x, current):
                chain.append(module)
                current = output
        if current.shape != end.shape or not torch.equal(current, end):
            raise self._unsupported("its final norm is not a chain of modules after the last block")
        return chain

    # ------------------------------------------------------------------ use
    @torch.no_grad()
    def logits(self, hidden: Tensor, candidates: Tensor | None = None, first: int = 0) -> Tensor:
        """Final norm and output head, by the model's own code (soft-caps, scales and biases included).

        Args:
            hidden: [n, block width], outputs of any block at n positions.
            candidates: [n, C] token ids; only their logits are computed (see :meth:`require_candidates`).
            first: Only the logits of so many first token ids are computed, and then those of the candidates; 0: none.

        Returns:
            [n, V] (or [n, first + C]) logits in the model's dtype.
        """
        return self._read(hidden, candidates, first)

    def differentiable_logits(self, hidden: Tensor) -> Tensor:
        """As :meth:`logits`, on the way of which gradients reach ``hidden``."""
        with torch.enable_grad():
            return self._read(hidden, None)

    def _read(self, hidden: Tensor, candidates: Tensor | None, first: int = 0) -> Tensor:
        x = hidden.unsqueeze(1)
        for module in self.tail:
            x = module(x)
        stub = _HeadInput(last_hidden_state=x)
        ids = torch.zeros(x.shape[0], 1, dtype=torch.long, device=x.device)
        with ExitStack() as stack:
            stack.enter_context(replaced_forward(self._base, lambda *args, **kwargs: stub))
            head = self.model.get_output_embeddings()
            slow = not torch.is_grad_enabled() and wide_is_slow(head, len(x))
            linear: Any = few_rows_linear if slow else nn.functional.linear
            if candidates is not None or first:
                stack.enter_context(replaced_forward(head, lambda y: _some_logits(head, y, candidates, first, linear)))
            elif slow:
                stack.enter_context(replaced_forward(head, lambda y: linear(y, head.weight, head.bias)))
            return self.model(input_ids=ids, use_cache=False).logits[:, -1, :]

    def keep_head_loaded(self) -> None:
        """Load the final norm and the head for good where accelerate offloads them: every check reads them."""
        head = self.model.get_output_embeddings()
        for module in (m for part in (*self.tail, head) if part is not None for m in part.modules()):
            hook = private.offload_hook(module)
            if getattr(hook, "offload", False):
                hook.pre_forward(module)
                hook.offload = False

    @cached_property
    def reads_few_tokens(self) -> bool:
        """Whether :meth:`logits` of a few candidates alone are those of the full head; found out when first asked."""
        try:
            with torch.no_grad():
                self.require_candidates()
        except UnsupportedModelError:
            return False
        return True

    def require_candidates(self) -> None:
        """Check that logits of a few candidates alone are those of the full head.

        Raises:
            UnsupportedModelError: Where the head is no plain linear map, or the model mixes its logits.
        """
        x = torch.linspace(-1, 1, 3 * self.block_hidden_size).reshape(3, -1)
        x = x.to(self.input_device)
        some = (torch.arange(6).reshape(3, 2) * 7 + 1).to(x.device) % self.vocab_size

        def probe() -> float:
            states = x.to(self.model.get_input_embeddings().weight.dtype)
            whole, first = self.logits(states), min(5, self.vocab_size)
            expected = torch.cat([whole[:, :first], whole.gather(1, some)], dim=1)
            return logits_distance(self.logits(states, some, first), expected)

        try:
            good = probed(self, "logits", probe).is_rounding
        except (AttributeError, RuntimeError, IndexError, TypeError):
            good = False
        if not good:
            raise UnsupportedModelError(
                f"head_check: the output head of {self.name} can't be read for a few tokens alone, so shortlist and "
                "screen do not work with it; use head_check=exact"
            )

    def head_hash(self) -> str:
        """A short hash of the output head, which ties a stopper to the model it was fitted on.

        At most 256 rows, evenly spread and rounded to bfloat16, so that it is quick and does not depend on the dtype
        that the model was loaded in. ``""`` where the head has no weights in a floating-point dtype.
        """
        head = self.model.get_output_embeddings()
        weight = None if head is None else values_of(head, "weight")
        if weight is None or not weight.is_floating_point():
            return ""
        rows = weight.detach()[:: max(1, weight.shape[0] // 256)].to(torch.bfloat16).float().cpu()
        digest = hashlib.sha256(repr(tuple(weight.shape)).encode())
        digest.update(rows.numpy().tobytes())
        return digest.hexdigest()[:16]

    def weights_hash(self, model: nn.Module | None = None) -> str:
        """A short hash of every bit of every parameter and buffer, adapters included, as they are now.

        It costs one reading of the weights (see :func:`hashes.tensor_hash`). Offloaded weights, which nothing trains
        in place, are read for the first hash only. Buffers that follow the texts a model has seen are left out.

        Args:
            model: The model with what is wrapped around it; by default what was taken apart.
        """
        digest, known = hashlib.sha256(), dict[int, str]()  # tied weights are read once
        for path, module in (model or self.model).named_modules():
            for name, tensor in _state_of(module):
                digest.update(f"{path}.{name} {self._hash_of(path, module, name, tensor, known)}".encode())
        return digest.hexdigest()[:16]

    def _hash_of(self, path: str, module: nn.Module, name: str, tensor: Tensor, known: dict[int, str]) -> str:
        if tensor.device.type == "meta":
            key = (path, name)
            if key not in self._offloaded_hashes:
                values = values_of(module, name)
                self._offloaded_hashes[key] = "" if values is None else hashes.tensor_hash(values)
            return self._offloaded_hashes[key]
        if id(tensor) not in known:
            values = tensor if name not in private.parameters_of(module) else values_of(module, name)
            known[id(tensor)] = "" if values is None else hashes.tensor_hash(values)
        return known[id(tensor)]

    def part(self, block: nn.Module, which: str) -> nn.Module:
        """The attention or feed-forward part of a block whose output is compared along the blocks.

        Args:
            block: A decoder block.
            which: ``"attn"`` or ``"mlp"``.

        Returns:
            The block's direct child for that part; for families without an MLP module (OPT) the last linear map of
            the feed-forward part.

        Raises:
            UnsupportedModelError: Where the block has no such part.
        """
        hints = {"attn": ("attn", "attention"), "mlp": ("mlp", "ffn", "feed_forward", "moe")}[which]
        others = ("norm", "mamba", "linear_att", "delta")  # recurrences that are called attention, or sit in its place
        for hint in hints:
            for name, child in block.named_children():
                both = f"{name} {type(child).__name__}".lower()
                if hint in both and not any(other in both for other in others) and _has_weights(child):
                    return child
        linear = [child for child in block.children() if is_linear(child)]
        if which == "mlp" and linear:
            return linear[-1]
        raise self._unsupported(f"its blocks have no {which} part, so the feature cos_{which} can't be computed")

    # ------------------------------------------------------------------ counting
    def _linear_weights(self, block: nn.Module) -> int:
        """Weights of the block's linear maps that one token meets; routed experts count with their active share."""
        active = getattr(self.config, "num_experts_per_tok", None)
        total = 0.0
        for name, module in block.named_modules():
            routed = active if "experts" in name.split(".") else None
            if is_linear(module):
                siblings = _expert_count(self.config)
                total += linear_size(module) * (routed / siblings if routed and siblings else 1.0)
            elif routed:  # fused experts: one parameter [experts, in, out]
                for parameter in module.parameters(recurse=False):
                    if parameter.dim() == 3:
                        total += parameter.numel() * routed / parameter.shape[0]
            elif not isinstance(module, nn.Embedding):  # a matrix of its own: a router applied as a linear map
                total += sum(p.numel() for p in module.parameters(recurse=False) if p.dim() == 2)
        return round(total)

    def _attention_width(self, block: nn.Module) -> int:
        try:
            part = self.part(block, "attn")
        except UnsupportedModelError:
            return 0
        heads = getattr(self.config, "num_attention_heads", None)
        if not heads:
            return 0
        nope, rope = (getattr(self.config, f"qk_{p}_head_dim", None) for p in ("nope", "rope"))
        if nope and rope:  # latent attention: queries and keys are wider than values
            return heads * (nope + rope + self.config.v_head_dim) // 2
        # the part's own first: it may differ between blocks, and then the config has no answer
        size = getattr(part, "head_dim", None) or getattr(self.config, "head_dim", None)
        size = size or self.config.hidden_size // heads
        return heads * size


def _state_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's own parameters and buffers, and what its state holds besides (scales of quantised weights)."""
    buffers = private.buffers_of(module)
    found = {**private.parameters_of(module), **({} if hashes.changes_by_itself(module) else buffers)}
    stored = {name: value for name, value in private.saved_state(module).items() if name not in buffers}
    for name, value in {**stored, **found}.items():
        if isinstance(value, Tensor):
            yield name, value


def _handed_on(output: Any, arguments: tuple[list, dict]) -> list[tuple[int | str, int]]:
    """Which arguments of a block are what the block before returned besides hidden states."""
    beside = () if isinstance(output, Tensor) else output[1:]
    given: list[tuple[int | str, Any]] = [*enumerate(arguments[0]), *arguments[1].items()]
    return [(at, n) for at, x in given for n, y in enumerate(beside) if isinstance(y, Tensor) and x is y]


def _ancestors(name: str) -> Iterator[str]:
    """``model.decoder.layers`` -> ``model.decoder``, ``model`` (the model itself, ``""``, is left out)."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _last_hidden(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output if output.dim() == 3 else None
    if (value := getattr(output, "last_hidden_state", None)) is not None:
        return value
    return output[0] if isinstance(output, tuple) and isinstance(output[0], Tensor) else None


def _hidden_argument(arguments: Sequence[Any]) -> Tensor | None:
    args, kwargs = arguments
    value = args[0] if args else kwargs.get("hidden_states")
    return value if isinstance(value, Tensor) else None


