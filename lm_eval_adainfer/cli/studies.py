"""The ``adainfer`` subcommands of the stopper laboratory: ``replay`` and ``recipe``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.harness import asking


def add_commands(commands: Any, formatter: Any) -> None:
    """Add ``replay`` and ``recipe`` to the parser; heavy packages are imported when they run."""
    replay = commands.add_parser(
        "replay",
        formatter_class=formatter,
        help="what strategies would have done on traced documents, in seconds",
        description="Evaluate exit strategies on traces: accuracy, agreement with the dense answer, exit blocks, "
        "saving and its share of what an oracle saves, per task and pooled. All figures are simulated from traces; on "
        "loglikelihood tasks they are those of a real run.",
        epilog="example: adainfer replay traces/ --stopper none -s gap:0.8 -s svm -s oracle:stable",
    )
    replay.add_argument("traces", nargs="+", help=".trace files, or folders of them, of one model")
    replay.add_argument(
        "--stopper",
        "-s",
        action="append",
        required=True,
        help="as stopper= of lm_eval --model adainfer; or oracle:stable (leaves at the earliest block from which the "
        "answer never changes again), oracle:first (the first block that agrees with the final answer), "
        "shortgpt:lastN (skips the last N blocks); may be given several times",
    )
    replay.add_argument("--check_layers", default="all", help="as the model argument: all, every:2, 8+12+16")
    replay.add_argument("--min_layer", default="1", help="no exit before this block")
    replay.add_argument("--split", choices=["train", "test"], help="only traces of this split (default: all, apart)")
    replay.add_argument(
        "--sweep", action="store_true", help="move each stopper's threshold over the quantiles of its margins"
    )
    replay.add_argument("--seed", type=int, default=0, help="of the bootstrap intervals")
    replay.add_argument("--format", default="table", choices=["table", "markdown", "csv", "json"], help="of the output")
    replay.set_defaults(run=_replay)

    recipe = commands.add_parser(
        "recipe",
        formatter_class=formatter,
        help="the paper's tables and figures, each one command",
        description="Trace a model (what an interrupted run finished is kept), fit, replay and write one of the "
        "paper's studies as Markdown and CSV, figures as PNG too (extra [report]). All of it is simulated.",
        epilog="example: adainfer recipe table2 --model_args pretrained=adainfer-demo,dtype=float32 "
        "--tasks adainfer_demo --limit 100 -o table2/",
    )
    recipe.add_argument("name", help="table2, table4, table5, table6, draws, figure1, figure3, or a YAML file")
    asking.add_arguments(
        recipe,
        required=("model_args",),
        tasks_help="task or group names, separated by commas (default: the recipe's)",
        shots=str,
        shots_help="numbers of shots, separated by commas (default: the recipe's)",
        limit_help="at most so many documents per task and split",
    )
    recipe.add_argument("--seed", type=int, default=0, help="of documents, drawn training sets, fits and intervals")
    recipe.add_argument("--other_model", help="for table5: a folder of training traces of another model")
    recipe.add_argument("--output", "-o", required=True, help="the folder for tables, figures and traces/")
    recipe.set_defaults(run=_recipe)


def _replay(arguments: argparse.Namespace) -> None:
    from lm_eval_adainfer.fitting import fit
    from lm_eval_adainfer.output import tables
    from lm_eval_adainfer.traces import replay

    traces = replay.load(fit.find(arguments.traces), arguments.split)
    rows = replay.replay(
        traces,
        arguments.stopper,
        min_layer=arguments.min_layer,
        check_layers=arguments.check_layers,
        sweep=arguments.sweep,
        seed=arguments.seed,
    )
    meta = traces[0].meta
    print(tables.render(rows, arguments.format, f"{meta['model']}, {meta['n_blocks']} blocks"), end="")


def _recipe(arguments: argparse.Namespace) -> None:
    from lm_eval_adainfer.harness.loading import load_model_and_tasks
    from lm_eval_adainfer.studies import recipes
    from lm_eval_adainfer.traces import recording

    recipe = recipes.read(arguments.name)
    if arguments.num_fewshot:
        recipe.shots = _numbers(arguments.num_fewshot)
    recording.check_arguments("test", arguments.limit, recipe.shots)
    if recipe.study == "table" and arguments.other_model and not Path(arguments.other_model).exists():
        raise AdaInferError(f"other_model: {arguments.other_model} does not exist; give a folder of .trace files")
    asked = asking.Asking.of(arguments)
    arguments.tasks = arguments.tasks or ",".join(recipe.tasks)
    lm, tasks = load_model_and_tasks(arguments)

    def tracer(shots: Sequence[int], split: str) -> list[Path]:
        folder = Path(arguments.output) / "traces"
        return recording.trace(lm, tasks, folder, shots, split, arguments.limit, arguments.seed, asked=asked)

    for file in recipes.run(recipe, tracer, arguments.output, arguments.seed, arguments.other_model):
        print(file)


def _numbers(text: str) -> list[int]:
    if not all(part.strip().isdecimal() for part in text.split(",")):
        raise AdaInferError(f"num_fewshot: {text!r} is no list of numbers; give 0,5,10, say")
    return [int(part) for part in text.split(",")]
