"""How documents are asked: chat template, system instruction and the like, with the meaning that ``lm_eval`` gives.

What they lead to is what ``EvaluatorConfig`` and ``simple_evaluate`` of lm-eval 0.4.13 make of them; ``cli/options.py``
reads them from a command line.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.harness import private


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


def generation_of(tasks: Mapping[str, Any]) -> dict[str, Any]:
    """Task to how its texts are generated, of tasks that generate texts, as JSON gives it back."""
    found = {n: t.get_config("generation_kwargs") for n, t in tasks.items() if t.OUTPUT_TYPE == "generate_until"}
    return json.loads(json.dumps(found, sort_keys=True, default=str))


def _plain(values: Mapping[str, Any] | None) -> Any:
    """A mapping as JSON gives it back; None where it is empty."""
    return json.loads(json.dumps(dict(values), sort_keys=True, default=str)) if values else None


def key_values(text: str, argument: str = "model_args") -> dict[str, Any]:
    """``key=value`` pairs with commas between them, or a JSON object, as ``lm_eval``'s command reads them.

    Raises:
        AdaInferError: Where it is neither.
    """
    try:
        return json.loads(text) if text.lstrip().startswith("{") else private.key_val_to_dict(text)
    except ValueError as error:
        raise AdaInferError(f"{argument}: {text!r:.200} is not like key=value,key=value ({error})") from None
