"""``adainfer verify``: whether early exit gives on a model what plain forwards of it give."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lm_eval_adainfer.cli import options


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the command to ``adainfer``'s."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "verify",
        parents=[options.model("pretrained=...,stopper=...,dtype=...")],
        formatter_class=options.Help,
        help="check early exit on your model against plain forwards of it",
        description="Run a few random prompts through a model, leaving after every block, in batches, with shared "
        "prefixes, while generating, and under the reader that is named, and compare all answers with plain forwards "
        "of the whole model, one row at a time. Exit status 0: nothing differs, 1: something does.",
        epilog="example: adainfer verify --model_args pretrained=adainfer-demo,dtype=float32,stopper=svm",
    )
    parser.add_argument(
        "--reader", metavar="READER", help="check what this reader reads, too: head, copy:W, sim:W or tuned:FILE"
    )
    parser.add_argument("--json", metavar="FILE", help="write the findings there, too")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Verify the model, print the findings, and return 1 where something differs."""
    from lm_eval_adainfer import container, verification
    from lm_eval_adainfer.errors import AdaInferError
    from lm_eval_adainfer.harness import asking
    from lm_eval_adainfer.harness.loading import load_model

    named = asking.key_values(arguments.model_args).get("reader")
    if arguments.reader and named is not None and named != arguments.reader:
        raise AdaInferError(f"reader: --reader says {arguments.reader}, and model_args {named}; give one of the two")
    options = {"reader": arguments.reader} if arguments.reader else {}
    findings = verification.verify_model(load_model(arguments.model_args, arguments.device, **options))
    print(verification.render(findings))
    if arguments.json:
        container.write_atomically(Path(arguments.json), verification.as_json(findings).encode(), "json")
    return int(any(f.status == verification.FAILED for f in findings))
