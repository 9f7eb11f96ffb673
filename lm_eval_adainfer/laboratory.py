"""The ``adainfer`` subcommands of the stopper laboratory: ``replay`` and ``recipe``."""

from __future__ import annotations

import argparse
from typing import Any


def add_commands(commands: Any, formatter: Any) -> None:
    """Add ``replay`` and ``recipe`` to the parser; heavy packages are imported when they run."""
    replay = commands.add_parser(
        "replay",
        formatter_class=formatter,
        help="what strategies would have done on traced documents, in seconds",
        description="Evaluate exit strategies on traces: accuracy, agreement with the dense answer, exit blocks, saving, "
        "and its share of what an oracle saves, per task and pooled. All figures are simulated from the traces; on "
        "loglikelihood tasks they are those of a real run.",
        epilog="example: adainfer replay traces/ --stopper none --stopper gap:0.8 --stopper svm --stopper oracle:stable",
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


def _replay(arguments: argparse.Namespace) -> None:
    from lm_eval_adainfer import fitting, replay, tables

    traces = replay.load(fitting.find(arguments.traces), arguments.split)
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
