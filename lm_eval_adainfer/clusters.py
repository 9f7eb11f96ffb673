"""Documents that belong together, such as the questions about one passage: what names it, and which tasks repeat it.

The answers to questions about one passage are not independent, and bounds that take them for independent are too
narrow: with 5 questions each and an intra-class correlation of 0.3, a gate with 5% of error passes a real drop in about
13% of runs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from lm_eval_adainfer.errors import AdaInferError

# Tasks that ask several questions about one passage, by lm-eval's names, and the field of a document that holds it.
PASSAGES = (
    ("*quad*", "context"),  # squadv2, squad_completion, adainfer_squad, xquad_*, jsquad, norquad, ...
    ("*mlqa*", "context"),
    ("*tydiqa*", "context"),
    ("*qasper*", "abstract"),
    ("*belebele*", "flores_passage"),
    ("*kobest_boolq*", "paragraph"),
    ("*boolq*", "passage"),
    ("*multirc*", "paragraph"),
    ("*record*", "passage"),
    ("*drop*", "passage"),
    ("*race*", "article"),
    ("*coqa*", "story"),
    ("*quac*", "context"),
    ("*catalanqa*", "context"),
    ("*eus_reading*", "context"),
    ("*logiqa*", "context"),
    ("*mc_taco*", "sentence"),
    ("*longbench*", "context"),
)
_MANY = 2  # tasks that a hint names


def parse(given: str | Sequence[str] | None) -> tuple[tuple[str, str], ...]:
    """Tasks and fields from ``[TASK=]FIELD`` arguments; the task is empty where the field is named for all.

    Raises:
        AdaInferError: On an argument that names nothing, or two for the same tasks.
    """
    found: dict[str, str] = {}
    for text in [given] if isinstance(given, str) else given or []:
        task, equals, field = text.partition("=")
        if not equals or "{" in task:
            task, field = "", text
        if not field.strip() or text.startswith("="):
            raise AdaInferError(f"cluster: {text!r} is neither FIELD nor TASK=FIELD; give a field of the documents")
        if task in found:
            raise AdaInferError(f"cluster: {task or 'all tasks'} has two, {found[task]} and {field}; give one")
        found[task.strip()] = field.strip()
    return tuple(found.items())


class Key:
    """Says which cluster a document is in: by a field of it, or by a template over its fields, as lm-eval's are.

    Args:
        field: A field's name, or a Jinja template such as ``{{title}} {{idx.paragraph}}``.

    Raises:
        AdaInferError: On a text that is no template of Jinja.
    """

    def __init__(self, field: str):
        self.field, self._template = field, None
        if "{{" in field or "{%" in field:
            from jinja2 import StrictUndefined, TemplateError
            from jinja2.sandbox import SandboxedEnvironment

            try:
                self._template = SandboxedEnvironment(undefined=StrictUndefined).from_string(field)
            except TemplateError as error:
                raise AdaInferError(f"cluster: {field!r} is no template of Jinja: {_line(error)}") from None

    def of(self, doc: Any, where: str) -> str:
        """A short text that is the same for documents of one cluster, and for these only.

        Args:
            doc: The document, as lm-eval logs it.
            where: Names it in messages.

        Raises:
            AdaInferError: Where the document does not have the field.
        """
        fields = doc if isinstance(doc, Mapping) else {}
        if self._template is None:
            if self.field not in fields:
                raise AdaInferError(_missing(self.field, fields, where))
            text = json.dumps(fields[self.field], sort_keys=True, ensure_ascii=False)
        else:
            from jinja2 import TemplateError

            try:
                text = self._template.render(**{str(name): value for name, value in fields.items()})
            except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
                raise AdaInferError(f"{_missing(self.field, fields, where)} ({_line(error)})") from None
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def passage_field(task: str) -> str | None:
    """The field that names the passage in a task which is known to ask several questions about one."""
    return next((field for pattern, field in PASSAGES if fnmatchcase(task, pattern)), None)


def hint(repeated: Mapping[str, tuple[int, int]]) -> str:
    """The sentence about tasks that repeat passages while nothing was said about clusters.

    Args:
        repeated: Task to its number of documents and of passages.
    """
    shown = ", ".join(
        f"{task} ({n} documents, {passages} of {passage_field(task)})"
        for task, (n, passages) in list(repeated.items())[:_MANY]
    )
    more = f" and {len(repeated) - _MANY} more" if len(repeated) > _MANY else ""
    first = next(iter(repeated))
    return (
        f"passages repeat in {shown}{more}; such documents are not independent, and what is said here takes them for "
        f"that: --cluster {first}={passage_field(first)} takes passages together"
    )


def _missing(field: str, fields: Mapping[str, Any], where: str) -> str:
    known = ", ".join(str(name) for name in list(fields)[:12]) or "none"
    return f"cluster: {where} has no {field!r}; its fields are {known}; name another, or TASK=FIELD for some tasks"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
