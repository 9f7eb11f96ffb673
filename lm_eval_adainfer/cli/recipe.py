"""``adainfer recipe``: the paper's tables and figures, each by one command."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_adainfer.cli import options
from lm_eval_adainfer.errors import AdaInferError

if TYPE_CHECKING:
    from lm_eval_adainfer.studies.recipes import Recipe


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the command to ``adainfer``'s."""
    documents = options.documents(
        required=("model_args",),
        tasks_help="task or group names, separated by commas (default: the recipe's)",
        shots=str,
        shots_help="numbers of shots, separated by commas (default: the recipe's)",
        limit_help="at most so many documents per task and split",
    )
    parser: argparse.ArgumentParser = commands.add_parser(
        "recipe",
        parents=[documents],
        formatter_class=options.Help,
        help="the paper's tables and figures, each one command",
        description="Trace a model (what an interrupted run finished is kept), fit, replay and write one of the "
        "paper's studies as Markdown and CSV, figures as PNG too (extra [report]); with --readers once "
        "under each. All of it is simulated.",
        epilog="example: adainfer recipe table2 --model_args pretrained=adainfer-demo,dtype=float32 "
        "--tasks adainfer_demo --limit 100 -o table2/",
    )
    parser.add_argument("name", help="table2, table4, table5, table6, draws, figure1, figure3, or a YAML file")
    options.add_readers(parser)
    parser.add_argument("--seed", type=int, default=0, help="of documents, drawn training sets, fits and intervals")
    parser.add_argument("--other_model", help="for table5: a folder of training traces of another model")
    parser.add_argument("--output", "-o", required=True, help="the folder for tables, figures and traces/")
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Do what the recipe says and print the files that were written."""
    from lm_eval_adainfer.studies import recipes
    from lm_eval_adainfer.traces import recording
    from lm_eval_adainfer.traces.plan import Plan

    recipe = recipes.read(arguments.name)
    if arguments.num_fewshot:
        recipe.shots = _numbers(arguments.num_fewshot)
    recording.check_arguments("test", arguments.limit, recipe.shots)
    if arguments.other_model and not _fits_on_other_model(recipe):
        raise AdaInferError(f"other_model: {recipe.name} fits nothing on another model's traces; leave it out")
    if arguments.other_model and not Path(arguments.other_model).exists():
        raise AdaInferError(f"other_model: {arguments.other_model} does not exist; give a folder of .trace files")
    asked = options.asking(arguments)
    arguments.tasks = arguments.tasks or ",".join(recipe.tasks)
    lm, tasks = options.load_model_and_tasks(arguments)
    plan = Plan.of(lm.anatomy, arguments.readers, arguments.at)

    def tracer(shots: Sequence[int], split: str) -> list[Path]:
        folder = Path(arguments.output) / "traces"
        return recording.trace(
            lm, tasks, folder, shots, split, arguments.limit, arguments.seed, asked=asked, plan=plan
        )

    readers = [reader for reader, _ in plan.readers]
    for file in recipes.run(recipe, tracer, arguments.output, arguments.seed, arguments.other_model, readers):
        print(file)


def _fits_on_other_model(recipe: Recipe) -> bool:
    fits = [how for how in recipe.stoppers.values() if isinstance(how, dict)] if recipe.study == "table" else []
    return any(how.get("train") == "other_model" for how in fits)


def _numbers(text: str) -> list[int]:
    if not all(part.strip().isdecimal() for part in text.split(",")):
        raise AdaInferError(f"num_fewshot: {text!r} is no list of numbers; give 0,5,10, say")
    return [int(part) for part in text.split(",")]
