"""The class behind the packaged task YAMLs: few-shot examples that depend on the seed and the document alone.

lm-eval's own samplers draw from one running generator, so a document's shots depend on every document before it: on
``--limit``, on the number of processes, on the order. Exit layers depend on the shots, so a trace written in one run
would not belong to the documents of another. Here each document seeds its own draw, or a task draws once for all of
its documents (task_configs/README.md).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from random import Random
from typing import Any

from lm_eval import utils
from lm_eval.api.samplers import ContextSampler
from lm_eval.api.task import ConfigurableTask

from lm_eval_adainfer import releases
from lm_eval_adainfer.errors import AdaInferError

Doc = Mapping[str, Any]
Pools = Iterable[tuple[str, Sequence[Doc]]]


def canonical_json(doc: Doc) -> str:
    """The document as one string that is the same in every process, whatever the order of its keys."""
    return json.dumps(doc, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def stable_hash(*parts: object) -> int:
    """256 bits of SHA-256 over the parts; unlike ``hash``, the same in every process."""
    return int.from_bytes(hashlib.sha256("\0".join(map(str, parts)).encode()).digest(), "big")


class DocumentSeededSampler(ContextSampler):
    """Draws a document's shots with a generator seeded by (few-shot seed, document content), nothing else.

    - A shot never is the evaluated document or a copy of it: not its question with another row id or answer, either.
      No two shots share a question.
    - The shots for n are the first n of the shots for n + 1: 5-shot prompts are nested in 10-shot prompts.
    - Any n up to what the pools hold. A pool is indexed, never copied or shuffled: drawing 20 of 100,000 costs 20.

    Made for :class:`QATask`, which always names the evaluated document; a plain lm-eval task names it only where the
    few-shot split is the evaluated split.
    """

    def __init__(self, df: Sequence[Doc] | None = None, *, rnd: int | None = None, **kwargs: Any) -> None:
        super().__init__(df, rnd=rnd, **kwargs)  # type: ignore[arg-type]
        self.seed = rnd

    def set_rnd(self, rnd: int | None) -> DocumentSeededSampler:
        """Take lm-eval's ``fewshot_random_seed``. ``None`` is a seed like any other: draws stay repeatable."""
        super().set_rnd(rnd)
        self.seed = rnd
        return self

    def draw_seed(self, eval_doc: Doc) -> int:
        """The seed of the draw for one document."""
        return stable_hash("shots", self.seed, canonical_json(eval_doc))

    def sample(
        self,
        n: int,
        eval_doc: Doc | None = None,
        df: Sequence[Doc] | None = None,
        *,
        pools: Pools | None = None,
        question: Callable[[Doc], str] = canonical_json,
        **kwargs: Any,
    ) -> list[Doc]:
        """Draw the shots of one document.

        Args:
            n: number of shots.
            eval_doc: the evaluated document.
            df: replaces the pool, as in lm-eval.
            pools: (name, documents) pairs; a later one is touched only when the earlier ones are used up. Default:
                the task's few-shot split.
            question: what identifies a document; two documents with one question are never in one prompt.
            **kwargs: ignored, as in lm-eval.

        Returns:
            n documents, in the order of the draw.

        Raises:
            AdaInferError: if the pools hold fewer than n usable documents, or ``eval_doc`` is missing.
        """
        if n == 0:
            return []
        if eval_doc is None:
            raise AdaInferError(
                f"{type(self).__name__} needs the evaluated document, which lm-eval hands over only to tasks with "
                "`class: !function lm_eval_adainfer.tasks.qa.QATask` in their YAML."
            )
        if df:
            self.df = df
        random = Random(self.draw_seed(eval_doc))
        in_prompt, shots = {question(eval_doc)}, []
        for _, pool in pools if pools is not None else [("fewshot", self.df)]:
            for shot in _draw(pool, random):
                if question(shot) not in in_prompt:
                    in_prompt.add(question(shot))
                    shots.append(shot)
                    if len(shots) == n:
                        return shots
        raise AdaInferError(
            f"num_fewshot={n} is more than there is: besides the evaluated document there are "
            f"{len(shots)} few-shot documents to draw from."
        )


class TaskSeededSampler(DocumentSeededSampler):
    """Draws the shots once for all documents of a task, so that their prompts share a long prefix.

    The draw depends on the seed and the pools alone. A document that is among the shots itself is left out of its own
    prompt: the others keep their order, and the next of the draw comes last.
    """

    def draw_seed(self, eval_doc: Doc) -> int:
        """The same for every document."""
        return stable_hash("shots", self.seed)


SAMPLERS: dict[str, type[DocumentSeededSampler]] = {
    "per_document": DocumentSeededSampler,
    "per_task": TaskSeededSampler,
}


def _with_sampler(config: dict[str, Any], shots: Any) -> dict[str, Any]:
    """A task's ``fewshot_config`` with the sampler that ``metadata.shots`` asks for."""
    fewshot = config.get("fewshot_config") or {}
    found = fewshot.get("sampler", "default")
    if shots not in SAMPLERS:
        raise AdaInferError(f"metadata: shots={shots!r} is neither {' nor '.join(SAMPLERS)}")
    if found not in SAMPLERS.values():
        raise AdaInferError(
            f"metadata: shots={shots} needs one of this package's samplers, but {config.get('task')} has {found!r}; "
            "leave it out"
        )
    return {**fewshot, "sampler": SAMPLERS[shots]}


def _draw(pool: Sequence[Doc], random: Random) -> Iterator[Doc]:
    """The pool in random order, lazily; ``Random.sample(range(N), k)`` would give other firsts for another k."""
    seen: set[int] = set()
    while len(seen) < len(pool):
        i = random.randrange(len(pool))
        if i not in seen:
            seen.add(i)
            yield pool[i]


class _SamplerForDocument:
    """The task's sampler, told which document is asked about and where shots may come from."""

    def __init__(self, task: QATask, doc: Doc) -> None:
        self.task, self.sampler, self.doc = task, task.sampler, doc
        self.df = task.sampler.df

    def sample(self, n: int, eval_doc: Doc | None = None, **kwargs: Any) -> Sequence[Doc]:
        pools, question = self.task.shot_pools(), self.task.question
        return self.sampler.sample(n, eval_doc=self.doc, pools=pools, question=question, **kwargs)  # type: ignore[arg-type]


@lru_cache(maxsize=256)
def _compiled(template: str) -> Any:
    return utils.env.from_string(template)


class QATask(ConfigurableTask):
    """A YAML task whose sampler always learns which document is evaluated.

    YAML: ``class: !function lm_eval_adainfer.tasks.qa.QATask`` with ``fewshot_config.sampler`` set to
    :class:`DocumentSeededSampler` (lm-eval's own samplers work, too). ``metadata.shots``, in the YAML or as
    ``--metadata shots=per_task``, chooses between it and :class:`TaskSeededSampler`. The text that identifies a
    document is lm-eval's ``doc_to_decontamination_query``: a field's name or a template.

    Wherever the results hold the task's configuration, ``metadata.shots`` says how its shots were drawn, and
    ``metadata.fewshot_sources`` from where they came.

    Raises:
        AdaInferError: if ``metadata.shots`` is neither ``per_document`` nor ``per_task``, or the YAML's sampler none of
            these two.
    """

    sampler: ContextSampler

    def __new__(cls, config: dict[str, Any] | None = None, **kwargs: Any) -> QATask:
        """A task of the class that makes requests of its output type."""
        return object.__new__(releases.class_for(cls, (config or {}).get("output_type", "generate_until")))

    def __init__(self, config: dict[str, Any] | None = None, **kwargs: Any) -> None:
        config = {key: value for key, value in (config or {}).items() if key != "class"}
        shots = (config.get("metadata") or {}).get("shots")
        if shots is not None:
            config["fewshot_config"] = _with_sampler(config, shots)
        super().__init__(config=config, **kwargs)

    def question(self, doc: Doc) -> str:
        """The text that identifies a document: two documents with one question count as copies."""
        text = releases.value_of(doc, self.config.doc_to_decontamination_query)
        return canonical_json(doc) if text is None else str(text).strip()

    def doc_to_text(self, doc: Any, doc_to_text: Any = None) -> Any:
        """As in lm-eval, which (0.4.13) compiles the template anew for every shot of every document; here once."""
        template = doc_to_text if doc_to_text is not None else self.config.doc_to_text
        if self._compiled_here(template):
            text = _compiled(template).render(**doc)
            if not text.isdigit():  # lm-eval makes numbers of those
                return text
        return super().doc_to_text(doc, doc_to_text)

    def doc_to_target(self, doc: Any, doc_to_target: Any = None) -> Any:
        """As in lm-eval, its template compiled once as that of ``doc_to_text``."""
        template = doc_to_target if doc_to_target is not None else self.config.doc_to_target
        if self._compiled_here(template):
            text = _compiled(template).render(**doc)
            if not text.isdigit() and not (text[:1] == "[" and text[-1:] == "]"):  # which lm-eval reads as Python's
                return text
        return super().doc_to_target(doc, doc_to_target)

    def _compiled_here(self, template: Any) -> bool:
        if releases.compiles_templates() or not isinstance(template, str):
            return False
        return self.prompt is None and template not in self.features

    def shot_pools(self) -> Iterator[tuple[str, Sequence[Doc]]]:
        """Where shots come from, first choice first: (name for the results, documents)."""
        yield self.config.fewshot_config.split or "fewshot", self.sampler.df

    def fewshot_sources(self, num_fewshot: int) -> dict[str, int]:
        """How many of a document's shots come from which pool (a document that is in one of them: one less there).

        Pools that had to be asked but gave nothing are listed with 0.
        """
        sources: dict[str, int] = {}
        for name, pool in self.shot_pools():
            sources[name] = min(len(pool), num_fewshot - sum(sources.values()))
            if sum(sources.values()) == num_fewshot:
                break
        return sources

    def fewshot_context(self, doc: Doc, num_fewshot: int, **kwargs: Any) -> str | list[str]:
        """The prompt. lm-eval names ``doc`` to the sampler only if the splits coincide; here it always is named."""
        if num_fewshot == 0:
            return super().fewshot_context(doc, num_fewshot=num_fewshot, **kwargs)
        sampler = self.sampler
        self.sampler = _SamplerForDocument(self, doc)  # type: ignore[assignment]
        try:
            return super().fewshot_context(doc, num_fewshot=num_fewshot, **kwargs)
        finally:
            self.sampler = sampler

    def dump_config(self) -> dict[str, Any]:
        """lm-eval's dump for ``results["configs"]``, with the sampler by name, how shots are drawn and from where."""
        config = super().dump_config()
        if isinstance(sampler := self.config.fewshot_config.sampler, type):
            config["fewshot_config"]["sampler"] = f"{sampler.__module__}.{sampler.__qualname__}"
        if self.config.num_fewshot and isinstance(self.sampler, DocumentSeededSampler):
            sources = self.fewshot_sources(self.config.num_fewshot)
            drawn = "per_task" if isinstance(self.sampler, TaskSeededSampler) else "per_document"
            config["metadata"] = {**config.get("metadata", {}), "shots": drawn, "fewshot_sources": sources}
        return config
