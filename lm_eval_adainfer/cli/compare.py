"""``adainfer compare``: two or more runs of lm-eval, document by document."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lm_eval_adainfer.cli import options, terminal
from lm_eval_adainfer.errors import AdaInferError


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the command to ``adainfer``'s."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "compare",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        help="two or more runs, document by document",
        description="Compare runs of lm_eval with the first of them: accuracy, difference with a paired interval,\n"
        "p, agreement of answers, exit layers, cost; and several candidates with each other. Runs that did not do\n"
        "the same thing are refused, with the reason. A legend stands under the table; docs/comparing.md explains\n"
        "every column.",
        epilog="example:\n  lm_eval --model hf ... --tasks sst2 --log_samples --output_path runs/dense\n"
        "  lm_eval --model adainfer ... --tasks sst2 --log_samples --output_path runs/early\n"
        "  adainfer compare dense=runs/dense early=runs/early --format markdown",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help=options.RUN)
    parser.add_argument(
        "--format",
        default="table",
        choices=["table", "markdown", "latex", "csv", "json"],
        help="of the output (default: table, for the terminal; csv and json hold every number)",
    )
    parser.add_argument("--output", "-o", help="a file for it (default: the terminal)")
    parser.add_argument("--seed", type=int, default=0, help="of permutation tests (default: 0)")
    options.add_tasks(parser)
    options.add_matching(parser)
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Compare the runs with the first, and print or write the table."""
    from lm_eval_adainfer import container
    from lm_eval_adainfer.comparison import runs
    from lm_eval_adainfer.comparison.compare import compare_all
    from lm_eval_adainfer.output import comparisons

    if len(arguments.runs) < 2:
        raise AdaInferError("runs: one run has nothing to be compared with; give two or more")
    loaded = runs.load_all(arguments.runs, "runs", selection=options.selection(arguments))
    found = compare_all(loaded, None, bool(arguments.other_prompts), arguments.seed)
    text = comparisons.render(found, arguments.format)
    if arguments.output:
        container.write_atomically(Path(arguments.output), (text + "\n").encode("utf-8", "replace"))
    else:
        terminal.show(text)
