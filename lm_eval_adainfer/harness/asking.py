"""How documents are asked: the options that the commands which load a model share, with the meaning ``lm_eval`` gives.

The options are those of lm-eval 0.4.13's own command, read by its parsers (``lm_eval._cli``), and what they lead to is
what its ``EvaluatorConfig`` and ``simple_evaluate`` make of them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.harness import private

# the option of a YAML file -> what it takes there
FROM_YAML = {
    "apply_chat_template": "true, false or the name of a template",
    "fewshot_as_multiturn": "true or false",
    "gen_kwargs": "a mapping, or a text like temperature=0.8,do_sample=true",
    "metadata": "a mapping, or a text like shots=per_task",
}


@dataclass
class Asking:
    """What besides the task and its shots makes a prompt.

    Attributes:
        apply_chat_template: Whether prompts go through the tokenizer's chat template, or the name of one.
        system_instruction: A text that prompts begin with.
        fewshot_as_multiturn: Whether shots are turns of the conversation; None: with a chat template they are.
        gen_kwargs: Arguments of generation, which go before those of ``generate_until`` tasks.
        metadata: What the task manager hands on to tasks, besides the model's arguments.

    Raises:
        AdaInferError: On turns without a chat template.
    """

    apply_chat_template: bool | str = False
    system_instruction: str | None = None
    fewshot_as_multiturn: bool | None = None
    gen_kwargs: Mapping[str, Any] | None = None
    metadata: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.fewshot_as_multiturn and not self.apply_chat_template:
            raise AdaInferError(
                "fewshot_as_multiturn: there are no turns without a chat template; give --apply_chat_template, too"
            )
        if self.fewshot_as_multiturn is None and self.apply_chat_template:
            self.fewshot_as_multiturn = True

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Asking:
        """What the options of :func:`add_arguments` say; as with ``lm_eval``, empty ones are left out."""
        return cls(
            apply_chat_template=arguments.apply_chat_template or False,
            system_instruction=arguments.system_instruction or None,
            fewshot_as_multiturn=arguments.fewshot_as_multiturn,
            gen_kwargs=arguments.gen_kwargs or None,
            metadata=arguments.metadata or None,
        )

    def chat_template(self, lm: Any) -> str | None:
        """The chat template's text; None where none is asked for.

        Raises:
            AdaInferError: Where the tokenizer has none, or none of that name.
        """
        if not self.apply_chat_template:
            return None
        try:
            template = lm.chat_template(self.apply_chat_template)
        except ValueError as error:
            raise AdaInferError(f"apply_chat_template: {' '.join(str(error).split())}") from None
        if not template:
            raise AdaInferError(
                f"apply_chat_template: the tokenizer of {lm._model_name()} has no chat template; leave the option out, "
                "or name a tokenizer that has one with tokenizer= in --model_args"
            )
        return template

    def build_requests(self, lm: Any, task: Any) -> None:
        """Make a task's requests as ``simple_evaluate`` and ``evaluate`` do."""
        if self.gen_kwargs and task.OUTPUT_TYPE == "generate_until":
            task.set_config(key="generation_kwargs", value=dict(self.gen_kwargs), update=True)
        templated = self.chat_template(lm) is not None
        task.build_all_requests(
            limit=None,
            rank=0,
            world_size=1,
            system_instruction=self.system_instruction,
            apply_chat_template=templated,
            fewshot_as_multiturn=bool(self.fewshot_as_multiturn),
            chat_template=lm.apply_chat_template if templated else None,
            tokenizer_name=lm.tokenizer_name if templated else "",
        )

    def identity(self, lm: Any, output_type: str) -> dict[str, Any]:
        """What a trace of this output type says about how it was asked, JSON-serialisable; None: not given."""
        template = self.chat_template(lm)
        said = json.dumps([template, lm.chat_template_args], sort_keys=True, default=str)
        generates = output_type == "generate_until"
        return {
            "chat_template": None if template is None else hashlib.sha256(said.encode()).hexdigest()[:16],
            "system_instruction": self.system_instruction,
            "fewshot_as_multiturn": None if template is None else self.fewshot_as_multiturn,
            "gen_kwargs": _plain(self.gen_kwargs) if generates else None,
            "metadata": _plain(self.metadata),
        }


def _plain(values: Mapping[str, Any] | None) -> Any:
    """A mapping as JSON gives it back; None where it is empty."""
    return json.loads(json.dumps(dict(values), sort_keys=True, default=str)) if values else None


def add_model_arguments(where: Any, required: bool = True, model_help: str = "pretrained=...,dtype=...") -> None:
    """Add the options that name a model: ``--model_args`` and ``--device``.

    Args:
        where: A parser, or a group of its options.
        required: Whether ``--model_args`` is.
        model_help: What it may look like.
    """
    where.add_argument("--model_args", "-a", required=required, help=f"as lm_eval's: {model_help}")
    where.add_argument("--device", help="as lm_eval's: cuda, cpu, ...")


def add_arguments(
    where: Any,
    required: tuple[str, ...] = ("model_args", "tasks"),
    model_help: str = "pretrained=...,dtype=...",
    tasks_help: str = "task or group names, separated by commas",
    shots: Any = int,
    shots_help: str = "shots per document (default: the task's own)",
    limit_help: str = "at most so many documents per task, drawn with --seed",
    batch_size: str | None = "8",
) -> None:
    """Add the options that say which documents are asked of which model, and how.

    Args:
        where: A parser, or a group of its options.
        required: Which options have to be given.
        model_help: What ``--model_args`` may look like.
        tasks_help: Of ``--tasks``.
        shots: The type of ``--num_fewshot``.
        shots_help: Of ``--num_fewshot``.
        limit_help: Of ``--limit``.
        batch_size: The default; None where the command sets one later (8).
    """
    add_model_arguments(where, "model_args" in required, model_help)
    where.add_argument("--tasks", "-t", required="tasks" in required, help=tasks_help)
    where.add_argument("--num_fewshot", "-f", type=shots, help=shots_help)
    where.add_argument("--limit", "-L", type=int, help=limit_help)
    size_help = "as lm_eval's: a number or auto" + (" (default: 8)" if batch_size is None else "")
    where.add_argument("--batch_size", "-b", default=batch_size, help=size_help)
    where.add_argument("--include_path", help="a folder of further task YAMLs")
    where.add_argument(
        "--apply_chat_template",
        nargs="?",
        const=True,
        metavar="TEMPLATE",
        help="as lm_eval's: put prompts into the tokenizer's chat template, or into the one of this name",
    )
    where.add_argument("--system_instruction", metavar="TEXT", help="as lm_eval's: a text that prompts begin with")
    where.add_argument(
        "--fewshot_as_multiturn",
        type=_boolean,
        nargs="?",
        const=True,
        metavar="BOOL",
        help="as lm_eval's: shots are turns of a conversation (default: they are with --apply_chat_template)",
    )
    where.add_argument(
        "--gen_kwargs",
        nargs="+",
        action=_MergeDict,
        metavar="KEY=VALUE",
        help="as lm_eval's: of generate_until tasks, temperature=0.8,do_sample=true",
    )
    where.add_argument(
        "--metadata",
        nargs="+",
        action=_MergeDict,
        metavar="KEY=VALUE",
        help="as lm_eval's: what tasks are told, shots=per_task, say, or a JSON object",
    )


def _boolean(text: str) -> bool:
    """As ``lm_eval`` reads ``--fewshot_as_multiturn``."""
    return text.lower() in ("true", "1", "yes")


class _MergeDict(argparse.Action):
    """lm-eval's ``MergeDictAction``, which is imported when an option is used; what it can't read ends the command."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: Any = None) -> None:
        action = private.merge_dict_action()(self.option_strings, self.dest, nargs="+")
        try:
            action(parser, namespace, values, option_string)
        except ValueError as error:
            parser.error(f"argument {option_string}: {error}")


def from_yaml(name: str, value: Any) -> Any:
    """The value of an option in ``FROM_YAML`` as the command line gives it; None where it is of a wrong kind."""
    if name == "apply_chat_template":
        return value if isinstance(value, (bool, str)) else None
    if name == "fewshot_as_multiturn":
        return value if isinstance(value, bool) else None
    if isinstance(value, str):
        try:
            return key_values(value, name)
        except AdaInferError:
            return None
    return value if isinstance(value, dict) and all(isinstance(key, str) for key in value) else None


def key_values(text: str, argument: str = "model_args") -> dict[str, Any]:
    """``key=value`` pairs with commas between them, or a JSON object, as ``lm_eval``'s command reads them.

    Raises:
        AdaInferError: Where it is neither.
    """
    try:
        return json.loads(text) if text.lstrip().startswith("{") else private.key_val_to_dict(text)
    except ValueError as error:
        raise AdaInferError(f"{argument}: {text!r:.200} is not like key=value,key=value ({error})") from None
