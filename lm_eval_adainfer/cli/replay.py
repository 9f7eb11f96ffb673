"""``adainfer replay``: what strategies would have done on traced documents."""

from __future__ import annotations

import argparse
import logging
from typing import Any

from lm_eval_adainfer.cli import options

_logger = logging.getLogger(__name__)


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the command to ``adainfer``'s."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "replay",
        parents=[options.traces(", of one model")],
        formatter_class=options.Help,
        help="what strategies would have done on traced documents, in seconds",
        description="Evaluate exit strategies on traces: accuracy, agreement with the dense answer, exit blocks, "
        "saving and its share of what an oracle saves, per task and pooled. All figures are simulated from traces; on "
        "loglikelihood tasks they are those of a real run.",
        epilog="example: adainfer replay traces/ --stopper none -s gap:0.8 -s svm -s oracle:stable",
    )
    parser.add_argument(
        "--stopper",
        "-s",
        action="append",
        required=True,
        help="as stopper= of lm_eval --model adainfer; or oracle:stable (leaves at the earliest block from which the "
        "answer never changes again), oracle:first (the first block that agrees with the final answer), "
        "shortgpt:lastN (skips the last N blocks); may be given several times",
    )
    options.add_reader(parser)
    parser.add_argument(
        "--check_layers",
        help="as the model argument: all, every:2, 8+12+16 (default: all that were recorded under the reader, or those "
        "that a file under copy or sim names)",
    )
    parser.add_argument("--min_layer", default="1", help="no exit before this block")
    parser.add_argument(
        "--split", choices=["train", "calibrate", "test"], help="only traces of this split (default: all, apart)"
    )
    parser.add_argument(
        "--sweep",
        action="store_true",
        help="move each stopper's threshold over the quantiles of its margins; to look at: a threshold that is picked "
        "from it was picked on the documents that it is reported on (adainfer calibrate chooses on others)",
    )
    options.add_cluster(
        parser,
        "the recorded field of a task's documents that is the same where they belong together: intervals are over "
        "whole clusters, as their answers are not independent",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap intervals")
    parser.add_argument("--format", default="table", choices=["table", "markdown", "csv", "json"], help="of the output")
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Print the table of strategies."""
    from lm_eval_adainfer import clusters
    from lm_eval_adainfer.fitting import fit
    from lm_eval_adainfer.output import tables
    from lm_eval_adainfer.traces import clustering, replay

    wanted = clusters.parse(arguments.cluster)
    traces = replay.load(fit.find(arguments.traces), arguments.split)
    rows = replay.replay(
        traces,
        arguments.stopper,
        min_layer=arguments.min_layer,
        check_layers=arguments.check_layers,
        sweep=arguments.sweep,
        seed=arguments.seed,
        reader=arguments.reader,
        cluster=wanted,
    )
    if repeated := clustering.repeated(traces, wanted):
        _logger.warning("traces: %s", repeated)
    meta = traces[0].meta
    title = f"{meta['model']}, {meta['n_blocks']} blocks"
    print(tables.render(rows, arguments.format, title, notes=replay.notes(rows)), end="")
