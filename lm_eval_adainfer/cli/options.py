"""The options that several commands share, each declared once, and what their values mean.

Those that a command's help begins with are argparse parents (:func:`model`, :func:`documents`, :func:`traces`); the
``add_*`` functions put theirs behind a command's own, or into a group, and return argparse's actions. As with
``lm_eval``, whose names they have, an option that is not given is None.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from lm_eval_adainfer.harness import private

if TYPE_CHECKING:
    from lm_eval_adainfer.comparison.selection import Selection
    from lm_eval_adainfer.harness.asking import Asking

RUN = (
    "a results_*.json of lm_eval or its --output_path, made with --log_samples, or what Inspect, HELM or lighteval "
    "wrote; NAME=PATH names it"
)


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


# ------------------------------------------------------------------------------------------------ parents


def model(model_help: str = "pretrained=...,dtype=...") -> argparse.ArgumentParser:
    """The options that name a model: ``--model_args``, which is required, and ``--device``."""
    parent = argparse.ArgumentParser(add_help=False)
    _add_model(parent, True, model_help)
    return parent


def documents(**how: Any) -> argparse.ArgumentParser:
    """The options that say which documents are asked of which model: those of :func:`add_documents`."""
    parent = argparse.ArgumentParser(add_help=False)
    add_documents(parent, **how)
    return parent


def traces(more: str = "") -> argparse.ArgumentParser:
    """The trace files that a command reads.

    Args:
        more: What its help says besides.
    """
    parent = argparse.ArgumentParser(add_help=False)
    parent.add_argument("traces", nargs="+", help=f".trace files, or folders of them{more}")
    return parent


def add_readers(parser: Any) -> None:
    """``--readers`` and ``--at`` of commands that trace."""
    parser.add_argument(
        "--readers",
        help="what besides head is recorded, separated by commas: copy:1, sim:32, tuned:FILE, ...; tuned after every "
        "block, copy and sim after those of --at",
    )
    parser.add_argument(
        "--at",
        metavar="BLOCKS",
        help="after which blocks copy and sim are recorded: 16+20+22+24, say (default: four of the last 40%%)",
    )


def add_reader(where: Any) -> None:
    """Add ``--reader``: under which reader traces are seen."""
    where.add_argument(
        "--reader",
        help="as reader= of lm_eval --model adainfer; the traces must hold what it says (adainfer trace --readers) "
        "(default: that of the stopper's file, else head)",
    )


def add_cluster(where: Any, cluster_help: str) -> None:
    """Add ``--cluster`` of what traces hold: which documents belong together."""
    where.add_argument("--cluster", action="append", metavar="[TASK=]FIELD", help=f"{cluster_help}; repeatable")


# ------------------------------------------------------------------------------------------------ models and documents


def _add_model(where: Any, required: bool, model_help: str) -> list[argparse.Action]:
    return [
        where.add_argument("--model_args", "-a", required=required, help=f"as lm_eval's: {model_help}"),
        where.add_argument("--device", help="as lm_eval's: cuda, cpu, ..."),
    ]


def add_documents(
    where: Any,
    required: tuple[str, ...] = ("model_args", "tasks"),
    model_help: str = "pretrained=...,dtype=...",
    tasks_help: str = "task or group names, separated by commas",
    shots: Any = int,
    shots_help: str = "shots per document (default: the task's own)",
    limit_help: str = "at most so many documents per task, drawn with --seed",
    batch_size: str | None = "8",
    limit: bool = True,
) -> list[argparse.Action]:
    """Add the options that say which documents are asked of which model, and how.

    Args:
        where: A parser, or a group of its options.
        required: Which options have to be given.
        model_help: What ``--model_args`` may look like.
        tasks_help: The help of ``--tasks``.
        shots: The type of ``--num_fewshot``.
        shots_help: The help of ``--num_fewshot``.
        limit_help: The help of ``--limit``.
        batch_size: The default; None where the command sets one later (8).
        limit: Whether there is ``--limit``.
    """
    size_help = "as lm_eval's: a number or auto" + (" (default: 8)" if batch_size is None else "")
    return [
        *_add_model(where, "model_args" in required, model_help),
        where.add_argument("--tasks", "-t", required="tasks" in required, help=tasks_help),
        where.add_argument("--num_fewshot", "-f", type=shots, help=shots_help),
        *([where.add_argument("--limit", "-L", type=int, help=limit_help)] if limit else []),
        where.add_argument("--batch_size", "-b", default=batch_size, help=size_help),
        where.add_argument("--include_path", help="a folder of further task YAMLs"),
        where.add_argument(
            "--apply_chat_template",
            nargs="?",
            const=True,
            metavar="TEMPLATE",
            help="as lm_eval's: put prompts into the tokenizer's chat template, or into the one of this name",
        ),
        where.add_argument("--system_instruction", metavar="TEXT", help="as lm_eval's: a text that prompts begin with"),
        where.add_argument(
            "--fewshot_as_multiturn",
            type=_boolean,
            nargs="?",
            const=True,
            metavar="BOOL",
            help="as lm_eval's: shots are turns of a conversation (default: they are with --apply_chat_template)",
        ),
        where.add_argument(
            "--gen_kwargs",
            nargs="+",
            action=_MergeDict,
            metavar="KEY=VALUE",
            help="as lm_eval's: of generate_until tasks, temperature=0.8,do_sample=true",
        ),
        where.add_argument(
            "--metadata",
            nargs="+",
            action=_MergeDict,
            metavar="KEY=VALUE",
            help="as lm_eval's: what tasks are told, shots=per_task, say, or a JSON object",
        ),
    ]


def add_draws(where: Any) -> None:
    """Add the seeds of what is drawn: ``--seed`` for documents, ``--fewshot_seed`` for shots."""
    where.add_argument("--seed", type=int, default=0, help="of the drawn documents")
    where.add_argument("--fewshot_seed", type=int, default=1234, help="of the shots, as lm_eval's")


def asking(arguments: argparse.Namespace) -> Asking:
    """How documents are asked, from the options of :func:`add_documents`; empty ones are left out, as by ``lm_eval``.

    Raises:
        AdaInferError: On options that contradict each other.
    """
    from lm_eval_adainfer.harness.asking import Asking

    return Asking(
        apply_chat_template=arguments.apply_chat_template or False,
        system_instruction=arguments.system_instruction or None,
        fewshot_as_multiturn=arguments.fewshot_as_multiturn,
        gen_kwargs=arguments.gen_kwargs or None,
        metadata=arguments.metadata or None,
    )


def load_model_and_tasks(arguments: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """The model and the tasks (name to task) that the options of :func:`add_documents` name.

    Raises:
        AdaInferError: On wrong arguments, in the words of whoever found it first.
    """
    from lm_eval_adainfer.harness import loading

    return loading.load_model_and_tasks(
        arguments.model_args,
        arguments.tasks,
        device=arguments.device,
        batch_size=arguments.batch_size,
        include_path=arguments.include_path,
        metadata=arguments.metadata,
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


# ------------------------------------------------------------------------------------------------ runs of lm-eval


def add_tasks(where: Any) -> None:
    """Add ``--tasks``: which tasks of the runs are looked at."""
    where.add_argument(
        "--tasks",
        "-t",
        action="append",
        metavar="NAMES",
        help="only these tasks or groups of the runs, separated by commas; * globs (default: all)",
    )


def add_matching(where: Any) -> list[argparse.Action]:
    """Add the options that say what is compared of the runs, and which documents may be paired."""
    return [
        where.add_argument(
            "--metric",
            action="append",
            metavar="[TASK=]METRIC[:FILTER]",
            help="of all tasks, or of a task, group or glob; repeatable, or with commas (default, per task: acc, "
            "exact_match or its first)",
        ),
        where.add_argument("--filter", help="of lm-eval, where a task has several (default: the first)"),
        where.add_argument(
            "--exclude",
            action="append",
            metavar="NAMES",
            help="tasks or groups to leave out, separated by commas; * globs",
        ),
        where.add_argument(
            "--other-prompts",
            action="store_true",
            default=None,
            help="accept that the same documents had other prompts",
        ),
        where.add_argument(
            "--cluster",
            action="append",
            metavar="[TASK=]FIELD",
            help="documents in which this field (or template, {{title}}) is the same belong together: their answers "
            "are not independent; of all tasks, or of a task, group or glob; repeatable",
        ),
    ]


def selection(arguments: argparse.Namespace) -> Selection:
    """What is compared of the runs, from ``--tasks`` and the options of :func:`add_matching`.

    Raises:
        AdaInferError: On a metric that names nothing, or two for the same tasks.
    """
    from lm_eval_adainfer.comparison.selection import Selection

    return Selection.parse(arguments.tasks, arguments.exclude, arguments.metric, arguments.filter, arguments.cluster)
