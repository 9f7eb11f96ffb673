"""``adainfer trace``: record what every block would answer on documents."""

from __future__ import annotations

import argparse
from typing import Any

from lm_eval_adainfer.cli import options


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the command to ``adainfer``'s."""
    documents = options.documents(
        shots=_shots,
        shots_help="shots per document, or several numbers: 0,5,10,15,20 makes a file each (default: the task's own)",
    )
    parser: argparse.ArgumentParser = commands.add_parser(
        "trace",
        parents=[documents],
        formatter_class=options.Help,
        help="record every block's features on training documents",
        description="Run a dense pass over documents and record every block's features, top token and scores, "
        "under one or more readers: one "
        ".trace file per task and number of shots. Of generate_until tasks every new token is recorded. A document is "
        "never among its own shots. What is finished is kept when interrupted: the same command goes on.",
        epilog="example: adainfer trace --model_args pretrained=adainfer-demo,dtype=float32 "
        "--tasks adainfer_demo --num_fewshot 3 --limit 300 -o traces/",
    )
    parser.add_argument(
        "--split",
        default="train",
        choices=["train", "calibrate", "test"],
        help="a fixed hash of the document divides the training documents into train (60%%) and calibrate (40%%), and "
        "test are the evaluation documents; without a training split it divides these into train (30%%, to fit on), "
        "calibrate (20%%) and test (50%%)",
    )
    options.add_readers(parser)
    parser.add_argument(
        "--hidden",
        action="store_true",
        help="keep the decision's states after every block, too (float16), for adainfer fit reader",
    )
    options.add_cluster(
        parser,
        "the field (or template, {{title}}) of a task's documents that is the same where they belong together, to be "
        "recorded for --cluster of replay and calibrate (default: that of tasks which are known to repeat passages)",
    )
    options.add_draws(parser)
    parser.add_argument("--output", "-o", required=True, help="the folder for the .trace files")
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Trace the documents and print the files."""
    from lm_eval_adainfer import clusters
    from lm_eval_adainfer.traces import recording
    from lm_eval_adainfer.traces.plan import Plan

    recording.check_arguments(arguments.split, arguments.limit, arguments.num_fewshot)
    asked, cluster = options.asking(arguments), clusters.parse(arguments.cluster)
    lm, tasks = options.load_model_and_tasks(arguments)
    files = recording.trace(
        lm,
        tasks,
        arguments.output,
        num_fewshot=arguments.num_fewshot,
        split=arguments.split,
        limit=arguments.limit,
        seed=arguments.seed,
        fewshot_seed=arguments.fewshot_seed,
        asked=asked,
        plan=Plan.of(lm.anatomy, arguments.readers, arguments.at, arguments.hidden),
        cluster=cluster,
    )
    for file in files:
        print(file)


def _shots(text: str) -> int | list[int]:
    """One number, or several separated by commas."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of shots; give 5, say, or 0,5,10") from None
    return numbers[0] if len(numbers) == 1 else numbers
