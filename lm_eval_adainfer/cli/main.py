"""The ``adainfer`` command: its parser, and how a command's errors are told and become exit statuses."""

from __future__ import annotations

import argparse
import logging
import sys

from lm_eval_adainfer._version import __version__
from lm_eval_adainfer.cli import (
    calibrate,
    check,
    compare,
    fit,
    influence,
    layers,
    recipe,
    replay,
    report,
    terminal,
    trace,
    tune,
    verify,
)
from lm_eval_adainfer.errors import AdaInferError

# in the order of `adainfer --help`; what a command needs is imported when it runs, so that help is there at once
_COMMANDS = (verify, tune, trace, fit, calibrate, layers, influence, replay, recipe, compare, check, report)


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand; a user's mistake is one sentence on stderr and exit status 2."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        status = arguments.function(arguments) or 0
        sys.stdout.flush()
        return status
    except AdaInferError as error:
        return _refuse(str(error))
    except OSError as error:  # a full disk, say, wherever it was met
        where = f"{error.filename}: " if error.filename else ""
        _refuse(f"{where}{error.strerror or error}")
        try:
            sys.stdout.flush()
        except OSError:
            terminal.drop_output()
        return 2
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        found = f" ({str(error).splitlines()[0]:.120})" if str(error) else ""
        return _refuse(f"batch_size: there is not enough memory{found}; give a smaller one")
    except KeyboardInterrupt:
        makes_traces = arguments.command in ("trace", "tune")
        what = "traces" if makes_traces else "blocks" if vars(arguments).get("kind") == "reader" else ""
        kept = f"; finished {what} are kept, and the same command goes on" if what else ""
        print(f"\nadainfer: interrupted{kept}", file=sys.stderr)  # behind the progress bar
        return 130


def _refuse(sentence: str) -> int:
    print(f"adainfer: error: {sentence}", file=sys.stderr)
    return 2


def _out_of_memory(error: BaseException) -> bool:
    """Whether this is what torch or Python raise where memory is short."""
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="adainfer",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="What belongs to `lm_eval --model adainfer`: stoppers are fitted before, runs are compared after.",
        epilog="in order:\n"
        "  adainfer verify --model_args pretrained=MODEL\n"
        "  adainfer tune   --model_args pretrained=MODEL --tasks TASKS -o tuned/     (the next three in one, or:)\n"
        "  adainfer trace  --model_args pretrained=MODEL --tasks TASKS -o traces/\n"
        "  adainfer fit svm traces/ -o svm.stopper\n"
        "  adainfer layers traces/ --stopper svm.stopper\n"
        "  lm_eval --model adainfer --model_args pretrained=MODEL,stopper=svm.stopper --tasks TASKS \\\n"
        "    --log_samples --output_path runs/early       (and stopper=none, runs/dense)\n"
        "  adainfer compare dense=runs/dense early=runs/early\n\n"
        "`adainfer COMMAND --help` explains each; pretrained=adainfer-demo, tasks adainfer_demo: to try it offline.",
    )
    parser.add_argument("--version", action="version", version=f"lm-eval-adainfer {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add_parser(commands).set_defaults(function=command.run)
    return parser


if __name__ == "__main__":
    sys.exit(main())
