"""What a trace records: which readers, after which blocks, whether states too, and what that costs (*counted*)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lm_eval_adainfer.counting import FlopCounter
from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.prefill.feature_log import available_features
from lm_eval_adainfer.prefill.reading import Reading, prepared
from lm_eval_adainfer.readers import specs
from lm_eval_adainfer.readers.base import HEAD, Reader, default_blocks
from lm_eval_adainfer.strategies.features import depends_on_reader
from lm_eval_adainfer.structure.anatomy import Anatomy
from lm_eval_adainfer.structure.hashes import signs_hash

if TYPE_CHECKING:
    from lm_eval_adainfer.harness.model import AdaInferLM

_SAMPLED = 64  # prompts that an estimate measures


@dataclass(frozen=True)
class Plan:
    """What is recorded.

    Attributes:
        anatomy: The model.
        readers: Every reader, and the blocks after which it is recorded; the head is the first, after every block.
        hidden: Whether the decision positions' states are kept.
        readings: By name, the readers that let tokens go on, made ready for the model (:meth:`ready`).
    """

    anatomy: Anatomy
    readers: tuple[tuple[Reader, tuple[int, ...]], ...]
    hidden: bool = False
    readings: Mapping[str, Reading] = field(default_factory=dict)

    @classmethod
    def of(cls, anatomy: Anatomy, readers: Any = None, at: Any = None, hidden: bool = False) -> Plan:
        """A plan from what a command or a script says.

        Args:
            anatomy: The model.
            readers: ``head,copy:1,sim:32,tuned:FILE``, or a sequence of these or of readers; None for the head. The
                head is recorded whether it is named or not.
            at: After which blocks ``copy`` and ``sim`` are recorded: ``16+20+22+24``, or a sequence of ints; None for
                ``readers.base.default_blocks``.
            hidden: As the attribute.

        Raises:
            AdaInferError: On a reader or a block that does not exist.
        """
        named = readers.split(",") if isinstance(readers, str) else list(readers or [])
        found = [specs.parse(spec) for spec in named]
        names = [reader.name for reader in found]
        if len(set(names)) < len(names):
            raise AdaInferError(f"readers: {','.join(names)} names a reader twice; give each once")
        early = tuple(range(1, anatomy.n_blocks))
        blocks = default_blocks(anatomy.n_blocks) if at is None else _numbers(at, anatomy.n_blocks)
        for reader in found:
            if reader.maps is not None:
                width, signs = anatomy.block_hidden_size, signs_hash(anatomy.model)
                reader.maps.require_model(anatomy.n_blocks, width, anatomy.head_hash(), signs)
            if reader.runs_tokens and not blocks:
                raise AdaInferError(
                    f"readers: {reader.name} can't be recorded of a model of {anatomy.n_blocks} blocks, since there is "
                    "no block in front of the last"
                )
        others = [reader for reader in found if not reader.same(HEAD)]
        if at is not None and not any(reader.runs_tokens for reader in others):
            raise AdaInferError("at: only copy and sim are recorded after some blocks; name one of them in readers")
        placed = [(reader, blocks if reader.runs_tokens else early) for reader in others]
        return cls(anatomy, ((HEAD, (*early, anatomy.n_blocks)), *placed), hidden)

    def ready(self, lm: AdaInferLM) -> Plan:
        """The plan with its readings.

        Raises:
            UnsupportedModelError: Where the model can't be read so.
        """
        with lm._autocast():
            found = {reader.name: prepared(self.anatomy, reader) for reader, _ in self.readers if reader.runs_tokens}
        return replace(self, readings=found)

    @property
    def stored_weights(self) -> list[int]:
        """Per block, weights of the maps that make its keys and values; empty where nothing is copied."""
        storing = [reading.storing for reading in self.readings.values() if reading.storing is not None]
        return storing[0].weights if storing else []

    @cached_property
    def features(self) -> tuple[str, ...]:
        """The recorded features."""
        return available_features(self.anatomy)

    @cached_property
    def reader_features(self) -> tuple[str, ...]:
        """Those of them that depend on the reader."""
        return tuple(name for name in self.features if depends_on_reader(name))

    @property
    def names(self) -> dict[str, list[int]]:
        """Name to recorded blocks, as a trace's meta holds them."""
        return {reader.name: list(blocks) for reader, blocks in self.readers}

    def require_texts(self, name: str) -> None:
        """Raise AdaInferError where a reader can't be recorded of a task whose texts are generated."""
        for reader, _ in self.readers:
            if reader.runs_tokens:
                raise AdaInferError(
                    f"readers: {reader.name} reads prompts, but {name} is a generate_until task, whose every new token "
                    "is recorded; leave it out there (head and tuned read both)"
                )

    def extra_meta(self) -> dict[str, Any]:
        """What a trace's meta holds besides ``readers``, so that others can read the arrays and count the work."""
        if len(self.readers) == 1:
            return {}
        found: dict[str, Any] = {"reader_features": list(self.reader_features)}
        if self.stored_weights:
            found["stored_weights"] = self.stored_weights
        return found


@dataclass(frozen=True)
class Estimate:
    """What recording comes to.

    Attributes:
        work: Floating-point operations over those of a dense pass; counted, on average prompts.
        size: Bytes of the file; at most, where texts are generated.
    """

    work: float
    size: int


def estimate(lm: AdaInferLM, plan: Plan, instances: Sequence[Any]) -> Estimate:
    """Estimate what recording documents comes to, from some of their prompts.

    Args:
        lm: The model.
        plan: What is recorded.
        instances: Their requests.
    """
    asked = [i for i in instances if i.args[0]] or instances
    some = asked[:: max(1, len(asked) // _SAMPLED)]
    generated = instances[0].request_type == "generate_until"
    if generated:
        lengths = [(len(lm.tok_encode(i.args[0])), _most_new(lm, i)) for i in some]
    else:
        tokens = [[len(lm.tok_encode(text)) for text in (i.args[0], "".join(i.args))] for i in some]
        lengths = [(context, max(1, whole - context)) for context, whole in tokens]
    prompt, scored = (max(1, round(sum(pair[n] for pair in lengths) / len(lengths))) for n in (0, 1))
    prompt = min(prompt, max(1, lm.max_length - scored + 1))
    counter, n_blocks = lm.counter, plan.anatomy.n_blocks
    dense = counter.dense(prompt + scored - 1) + counter.head(scored)
    work = 2 * dense if generated else dense  # texts are generated first
    for reader, blocks in plan.readers:
        costs = FlopCounter(plan.anatomy, lm.stopper, reader)
        costs.copied_weights = plan.stored_weights
        work += sum(counter.head(scored) + costs.read(k, prompt, scored) for k in blocks if k < n_blocks)
    requests: dict[tuple[int, str], int] = {}
    for instance in instances:
        key = (instance.doc_id, instance.args[0])
        requests[key] = requests.get(key, 0) + 1
    decisions = len(requests) * (scored if generated else 1)
    width = 0 if generated else max(requests.values())
    said = [(n_blocks, len(plan.features)), *((len(b), len(plan.reader_features)) for _, b in plan.readers[1:])]
    bytes_each = sum(length * (4 * features + 4 + 5 * width) for length, features in said) + 3 * width + 22
    bytes_each += plan.hidden * 2 * n_blocks * plan.anatomy.block_hidden_size
    return Estimate(work / dense, decisions * bytes_each)


def _most_new(lm: AdaInferLM, instance: Any) -> int:
    """The most new tokens that a generate_until request allows."""
    most = instance.args[1].get("max_gen_toks", lm.max_gen_toks) if isinstance(instance.args[1], dict) else None
    return most if isinstance(most, int) and most > 0 else lm.max_gen_toks


def _numbers(at: Any, n_blocks: int) -> tuple[int, ...]:
    """The blocks that ``--at`` names."""
    items = list(at) if isinstance(at, (list, tuple)) else str(at).split("+")
    texts = [str(item).strip() for item in items]
    if not texts or any(not text.isdecimal() or not 1 <= int(text) < n_blocks for text in texts):
        raise AdaInferError(f"at: {at!r} is no list of blocks like 16+20+22, each from 1 to {n_blocks - 1}")
    return tuple(sorted(set(map(int, texts))))
