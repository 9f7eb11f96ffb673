"""``adainfer report``: an HTML page with tables and pictures of runs and traces."""

from __future__ import annotations

import argparse
from typing import Any

from lm_eval_adainfer.cli import options, terminal

MAX_DROP = 0.01


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the command to ``adainfer``'s."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "report",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        help="an HTML page with tables and pictures",
        description="One self-contained page and its pictures as PNG and SVG: leaderboard, accuracy against compute,\n"
        "exit layers, and from traces accuracy and features per block. Needs: pip install 'lm-eval-adainfer[report]'",
        epilog="example:\n  adainfer report dense=runs/dense svm=runs/svm --traces traces/ -o report/",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help=options.RUN + "; the first is the baseline")
    parser.add_argument("--traces", metavar="FOLDER", help="of adainfer trace, of the same model")
    parser.add_argument("--output", "-o", required=True, help="the folder for the page and the pictures")
    parser.add_argument(
        "--max-drop",
        type=float,
        default=MAX_DROP,
        metavar="X",
        help="the drop that the leaderboard judges runs by, as adainfer check does: 0.01 is one point (default: 0.01)",
    )
    parser.add_argument("--title", default="Early exit, measured", help="of the page")
    options.add_tasks(parser)
    options.add_matching(parser)
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Write the page and print where it lies."""
    from lm_eval_adainfer.comparison import runs
    from lm_eval_adainfer.output import report

    report.require()
    found = runs.load_all(arguments.runs, "runs", prompts=True, selection=options.selection(arguments))
    page = report.write(
        found,
        arguments.output,
        arguments.traces,
        arguments.title,
        None,
        bool(arguments.other_prompts),
        arguments.max_drop,
    )
    terminal.show(str(page))
