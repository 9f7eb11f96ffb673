"""``adainfer layers``: after which blocks asking a stopper pays."""

from __future__ import annotations

import argparse
from typing import Any

from lm_eval_adainfer.cli import options


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the command to ``adainfer``'s."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "layers",
        parents=[options.traces()],
        formatter_class=options.Help,
        help="choose check_layers: after which blocks asking a stopper pays",
        description="Show after which blocks a stopper's exits happen in traces, and choose the few blocks at which "
        "asking it pays: a check reads the output head, which costs up to a block when decoding. The last line goes "
        "into --model_args. All figures are simulated from the traces.",
        epilog="example: adainfer layers traces/ --stopper gap:0.8 --count 4",
    )
    parser.add_argument(
        "--stopper", "-s", required=True, help="as stopper= of lm_eval --model adainfer: gap:0.8, svm, a file, ..."
    )
    options.add_reader(parser)
    parser.add_argument("--count", "-n", type=int, help="at most so many blocks (default: as many as pay)")
    parser.add_argument(
        "--output", "-o", help="write a stopper file that names its reader and, under copy or sim, these blocks"
    )
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Print where the stopper leaves, and the ``check_layers`` that pay."""
    from lm_eval_adainfer.fitting import check_layers, fit
    from lm_eval_adainfer.readers import specs as readers
    from lm_eval_adainfer.strategies import files, specs

    stopper = specs.parse(arguments.stopper)
    reader = readers.resolve(arguments.reader, stopper.reader)
    shares, everywhere, chosen = check_layers.choose(fit.find(arguments.traces), stopper, arguments.count, reader)
    print("block  leaves here (simulated, every block checked)")
    for k, share in enumerate(shares, start=1):
        print(f"{k:5d}  {share:6.1%} {'#' * round(60 * share)}{'  <- check' if k in chosen.blocks else ''}")
    for name, choice in (("all", everywhere), ("chosen", chosen)):
        print(
            f"{name}: exit_layer {choice.exit_layer:.2f}, {choice.checks:.2f} checks a decision, cost {choice.cost:.3f}"
            f" of dense, same token as the last block {choice.agreement:.1%} (simulated)"
        )
    if arguments.output and chosen.blocks:
        stopper.reader = reader
        if reader.runs_tokens:
            stopper.info = {**stopper.info, "check_layers": list(chosen.blocks)}
        files.save(stopper, arguments.output)
    if chosen.blocks:
        print(f"check_layers={'+'.join(map(str, chosen.blocks))}")
    else:
        print("no check pays for itself with this stopper: run stopper=none, or move its threshold")
