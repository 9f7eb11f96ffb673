"""``adainfer influence``: which blocks change the hidden states least (ShortGPT), as a stopper file."""

from __future__ import annotations

import argparse
from typing import Any

from lm_eval_adainfer.cli import options


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the command to ``adainfer``'s."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "influence",
        parents=[options.documents()],
        formatter_class=options.Help,
        help="measure Block Influence (ShortGPT), for stopper=shortgpt:bi:N:FILE",
        description="Measure every block's Block Influence, 1 - E[cos(input, output)] over all tokens of prompts of "
        "training documents, and write a stopper file: with it the least influential blocks never run.",
        epilog="example: adainfer influence --model_args pretrained=adainfer-demo,dtype=float32 "
        "--tasks adainfer_demo --limit 50 -o bi.stopper",
    )
    options.add_draws(parser)
    parser.add_argument("--drop", type=int, help="blocks that stopper=FILE drops (default: a quarter)")
    parser.add_argument("--output", "-o", required=True, help="the stopper file")
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Measure, save the stopper, and print every block's influence."""
    from lm_eval_adainfer.fitting import influence
    from lm_eval_adainfer.strategies import files
    from lm_eval_adainfer.traces import recording

    recording.check_arguments("train", arguments.limit, arguments.num_fewshot)
    asked = options.asking(arguments)
    lm, tasks = options.load_model_and_tasks(arguments)
    stopper = influence.of_tasks(
        lm,
        tasks,
        num_fewshot=arguments.num_fewshot,
        limit=arguments.limit,
        seed=arguments.seed,
        fewshot_seed=arguments.fewshot_seed,
        drop=arguments.drop,
        asked=asked,
    )
    files.save(stopper, arguments.output)
    print("block  Block Influence (measured)")
    for k, value in enumerate(stopper.arrays["influence"], start=1):
        print(f"{k:5d}  {value:.4f}{'  <- dropped' if k in stopper.dropped_blocks else ''}")
    print(
        f"{arguments.output}: {stopper.info['tokens']} tokens of {stopper.info['prompts']} prompts; "
        f"stopper={arguments.output} runs without blocks {', '.join(map(str, stopper.dropped_blocks))}"
    )
