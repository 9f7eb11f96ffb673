"""``adainfer tune``: from a model and tasks to a stopper file, a page, and the command that runs it."""

from __future__ import annotations

import argparse
from typing import Any

from lm_eval_adainfer.cli import options, terminal


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the command to ``adainfer``'s."""
    documents = options.documents(limit=False)
    parser: argparse.ArgumentParser = commands.add_parser(
        "tune",
        parents=[documents],
        formatter_class=options.Help,
        help="which reader, stopper and blocks to run a model's tasks with, and the command",
        description="Trace documents under several readers, choose reader, stopper and check_layers on fitting "
        "documents alone by what is saved within --max-drop (reading and checks counted), move the threshold on "
        "calibration documents so that the drop is promised, and report on test documents. Recommends the dense model "
        "(stopper=none) where nothing saves 1% of its work. Writes tuned.stopper, tune.json and index.html. What is "
        "finished is kept when interrupted: the same command goes on. For loglikelihood tasks exits and savings are "
        "simulated from traces; for generate_until ones calibration and test documents are really generated.",
        epilog="example: adainfer tune --model_args pretrained=adainfer-demo,dtype=float32 --tasks adainfer_demo "
        "--num_fewshot 3 --max-drop 0.02 -o tuned/",
    )
    parser.add_argument("--max-drop", "--max_drop", type=float, default=0.01, help="the loss that is allowed")
    parser.add_argument("--confidence", type=float, default=0.95, help="that the promise holds")
    parser.add_argument(
        "--loss",
        default="accuracy",
        choices=["accuracy", "gold", "agreement"],
        help="what is lost: accuracy, so documents that lose their right answer less those that win one; gold, those "
        "that lose it alone; agreement, those whose answers differ (needs no gold answers)",
    )
    parser.add_argument(
        "--documents",
        "-n",
        type=int,
        default=500,
        metavar="N",
        help="to fit on, to calibrate on and to test on, each, of all tasks together",
    )
    parser.add_argument("--budget", type=float, metavar="MINUTES", help="that tracing may take, about")
    parser.add_argument(
        "--readers", default="copy:1,copy:32,sim:1,sim:32", help="that are tried besides head, separated by commas"
    )
    options.add_draws(parser)
    parser.add_argument("--output", "-o", required=True, help="the folder")
    return parser


def refuse_found(model_args: str) -> None:
    """Raise AdaInferError where the model's arguments say what is to be found."""
    from lm_eval_adainfer.errors import AdaInferError
    from lm_eval_adainfer.harness.asking import key_values

    given = key_values(model_args)
    for name in ("stopper", "stopper_dir", "reader", "check_layers", "min_layer", "token_stopper", "kv_policy"):
        if name in given:
            raise AdaInferError(f"model_args: {name} is what adainfer tune finds; leave it out")


def run(arguments: argparse.Namespace) -> None:
    """Tune, write the files, and print the recommendation."""
    from lm_eval_adainfer.tuning import page, told
    from lm_eval_adainfer.tuning.generated import tuning_of
    from lm_eval_adainfer.tuning.settings import Settings

    settings = Settings(
        max_drop=arguments.max_drop,
        confidence=arguments.confidence,
        loss=arguments.loss,
        documents=arguments.documents,
        budget=arguments.budget,
        readers=tuple(name for name in arguments.readers.split(",") if name),
        num_fewshot=arguments.num_fewshot,
        seed=arguments.seed,
        fewshot_seed=arguments.fewshot_seed,
    )
    refuse_found(arguments.model_args)
    asked = options.asking(arguments)
    lm, tasks = options.load_model_and_tasks(arguments)
    named = {"model_args": arguments.model_args, "asked": told.asking(vars(arguments))}
    tuned = tuning_of(tasks)(lm, tasks, arguments.output, settings, asked, named).run()
    command = told.recommended(tuned.found, arguments.output, vars(arguments))
    where = page.write(tuned, arguments.output, command)
    terminal.show("\n".join(told.lines(tuned.found, arguments.output, command, where)))
