"""``adainfer calibrate``: a stopper's threshold, chosen so that a promise about lost answers holds."""

from __future__ import annotations

import argparse
import logging
from typing import TYPE_CHECKING, Any

from lm_eval_adainfer.cli import options
from lm_eval_adainfer.errors import AdaInferError

if TYPE_CHECKING:
    from lm_eval_adainfer.fitting.calibration import Calibration

_logger = logging.getLogger(__name__)


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the command to ``adainfer``'s."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "calibrate",
        parents=[options.traces()],
        formatter_class=options.Help,
        help="choose a stopper's threshold with a guarantee",
        description="Choose the loosest threshold at which, with the given confidence, at most a share of "
        "--max-drop of all documents loses its right answer (Learn-then-Test). The documents must be like those that "
        "will be evaluated and must not have been used in fitting (adainfer "
        "trace --split calibrate). Where no threshold qualifies, the file that is "
        "written never stops, and the exit status is 0 all the same: that is a result. A crf can't be told never to "
        "stop: there, nothing is written and the exit status is 2.",
        epilog="example: adainfer calibrate traces/ --stopper svm.pkl --max-drop 0.01 --confidence 0.95 -o safe.pkl",
    )
    parser.add_argument("--stopper", "-s", required=True, help="a stopper file, or a rule like gap:0.8")
    parser.add_argument("--max-drop", "--max_drop", type=float, default=0.01, help="share of documents lost, at most")
    parser.add_argument("--confidence", type=float, default=0.95, help="that the promise holds")
    parser.add_argument(
        "--loss",
        default="gold",
        choices=["gold", "agreement"],
        help="a document is lost where the dense answer was right and the early one is not (gold), or where they "
        "differ (agreement, which needs no gold answers)",
    )
    options.add_reader(parser)
    parser.add_argument(
        "--check_layers",
        help="as in the runs that will use the stopper (default: all that were recorded under the reader, or those "
        "that a file under copy or sim names)",
    )
    parser.add_argument("--output", "-o", required=True, help="the stopper file")
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Choose the threshold, save the stopper, and print what is promised of it."""
    from lm_eval_adainfer.fitting import calibration, fit
    from lm_eval_adainfer.readers import specs as readers
    from lm_eval_adainfer.strategies import files, specs

    given = specs.parse(arguments.stopper)
    calibration.grid(given)  # what has no threshold, or could not be saved, is refused before the work
    files.require_savable(given)
    stopper, found = calibration.calibrate(
        fit.find(arguments.traces),
        given,
        arguments.max_drop,
        arguments.confidence,
        arguments.loss,
        arguments.check_layers,
        readers.resolve(arguments.reader, given.reader),
    )
    _warn(found, fitted=bool(stopper.arrays))
    promised = f"at most {arguments.max_drop:.2%} lost ({arguments.loss}) at {arguments.confidence:.0%} confidence"
    if found.stops:
        files.save(stopper, arguments.output)
        print(
            f"{arguments.output}: threshold {found.threshold:.6g}, {promised}; {found.losses} of {found.documents} "
            f"calibration documents lost, pruning_ratio {found.pruning:.3f} (simulated)"
        )
        return
    needed = _needed(found, arguments.max_drop, arguments.confidence)
    try:
        files.require_savable(stopper)
    except AdaInferError:  # a crf has no threshold that it can't exceed
        raise AdaInferError(
            f"stopper: no threshold of this {stopper.kind} qualifies for {promised} ({needed}), and a {stopper.kind} "
            "can't be told never to stop, so nothing is written; run stopper=none instead"
        ) from None
    files.save(stopper, arguments.output)
    print(f"{arguments.output}: never stops, since no threshold qualifies for {promised}: {needed}")


def _warn(found: Calibration, fitted: bool) -> None:
    """Say where the promise does not hold, or not as a reader may think."""
    if found.overlap:
        _logger.warning(
            "traces: %d of the %d documents were used in fitting this stopper, so the promise does not hold; calibrate "
            "on others",
            found.overlap,
            found.documents,
        )
    elif found.overlap is None and fitted:
        _logger.warning("stopper: its file does not tell which documents it was fitted on; make sure they are others")
    if found.first_token_only:
        _logger.info("traces: some know the first token of an answer alone, and so does the promise; trace again")


def _needed(found: Calibration, max_drop: float, confidence: float) -> str:
    """Why no threshold qualified, and how many documents might let one qualify."""
    from lm_eval_adainfer.fitting import calibration

    least = calibration.documents_needed(max_drop, confidence)
    assert least is not None
    if found.documents < least:
        return f"with {found.documents} documents none can; at least {least} are needed"
    if found.needed is None:
        lost = f"{max_drop:.2%} or more of the {found.documents} documents"
        return f"even the strictest threshold that stops loses {lost}"
    return f"with {found.documents} documents none passed; about {found.needed} would be needed"
