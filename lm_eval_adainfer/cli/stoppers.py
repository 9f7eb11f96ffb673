"""The subcommands ``adainfer fit logistic|mlp|boosted`` and ``adainfer calibrate``; heavy imports are lazy."""

from __future__ import annotations

import logging
from argparse import Namespace
from typing import Any

from lm_eval_adainfer.errors import AdaInferError

_logger = logging.getLogger(__name__)

_KINDS = {
    "logistic": "logistic regression",
    "mlp": "a small multilayer perceptron",
    "boosted": "gradient-boosted trees",
}


def add_fits(kinds: Any, how: Any) -> None:
    """Add ``adainfer fit KIND`` of these kinds."""
    for kind, name in _KINDS.items():
        command = kinds.add_parser(
            kind,
            formatter_class=how,
            help=f"{name}, with calibrated probabilities",
            description=f"Fit {name} (scikit-learn) on one example per (instance, block), and make its scores "
            "probabilities by Platt scaling on a fifth of the documents, which it does not see in fitting.",
            epilog=f"example: adainfer fit {kind} traces/ -o {kind}.stopper",
        )
        command.add_argument("traces", nargs="+", help=".trace files, or folders of them")
        command.add_argument(
            "--label",
            default="final",
            choices=["final", "gold", "stable"],
            help="positive where the block's top token is the last block's (final, Eq. 1) or the gold answer's (gold), "
            "or where the document's answer never changes again (stable)",
        )
        command.add_argument("--features", default="all", help="feature names, separated by commas, or all")
        command.add_argument("--max_examples", type=int, default=20000, help="use at most so many examples")
        command.add_argument("--seed", type=int, default=0, help="of the examples, the held-out fifth and the model")
        command.add_argument("--threshold", type=float, default=0.95, help="stop when the probability exceeds it")
        command.add_argument("--output", "-o", required=True, help="the stopper file")
        command.set_defaults(run=_fit)


def _fit(arguments: Namespace) -> None:
    from lm_eval_adainfer.fitting import fit
    from lm_eval_adainfer.strategies import files

    names = arguments.features.strip()
    stopper = fit.fit_classifier(
        arguments.kind,
        arguments.traces,
        label=arguments.label,
        features=None if names == "all" else [name for name in names.split(",") if name],
        max_examples=arguments.max_examples,
        seed=arguments.seed,
        threshold=arguments.threshold,
    )
    files.save(stopper, arguments.output)
    info = stopper.info
    print(
        f"{arguments.output}: {arguments.kind} on {', '.join(stopper.features)}, fitted on {info['examples']} of "
        f"{info['examples_available']} examples ({info['positive_share']:.0%} stop) from {info['documents']} "
        f"documents; on the held-out fifth, log-loss {info['held_out_log_loss']:.3f} (measured)"
    )


def add_calibrate(commands: Any, how: Any) -> None:
    """Add ``adainfer calibrate``."""
    command = commands.add_parser(
        "calibrate",
        formatter_class=how,
        help="choose a stopper's threshold with a guarantee",
        description="Choose the loosest threshold at which, with the given confidence, at most a share of "
        "--max-drop of all documents loses its right answer (Learn-then-Test). The documents must be like those that "
        "will be evaluated and must not have been used in fitting. Where no threshold qualifies, the file that is "
        "written never stops, and the exit status is 0 all the same: that is a result. A crf can't be told never to "
        "stop: there, nothing is written and the exit status is 2.",
        epilog="example: adainfer calibrate traces/ --stopper svm.pkl --max-drop 0.01 --confidence 0.95 -o safe.pkl",
    )
    command.add_argument("traces", nargs="+", help=".trace files, or folders of them")
    command.add_argument("--stopper", "-s", required=True, help="a stopper file, or a rule like gap:0.8")
    command.add_argument("--max-drop", "--max_drop", type=float, default=0.01, help="share of documents lost, at most")
    command.add_argument("--confidence", type=float, default=0.95, help="that the promise holds")
    command.add_argument(
        "--loss",
        default="gold",
        choices=["gold", "agreement"],
        help="a document is lost where the dense answer was right and the early one is not (gold), or where they "
        "differ (agreement, which needs no gold answers)",
    )
    command.add_argument("--check_layers", default="all", help="as in the runs that will use the stopper")
    command.add_argument("--output", "-o", required=True, help="the stopper file")
    command.set_defaults(run=_calibrate)


def _calibrate(arguments: Namespace) -> None:
    from lm_eval_adainfer.fitting import calibration, fit
    from lm_eval_adainfer.strategies import files, specs

    max_drop, confidence = arguments.max_drop, arguments.confidence
    given = specs.parse(arguments.stopper)
    calibration.grid(given)  # what has no threshold, or could not be saved, is refused before the work
    files.require_savable(given)
    stopper, found = calibration.calibrate(
        fit.find(arguments.traces),
        given,
        max_drop,
        confidence,
        arguments.loss,
        arguments.check_layers,
    )
    if found.overlap:
        _logger.warning(
            "traces: %d of the %d documents were used in fitting this stopper, so the promise does not hold; calibrate "
            "on others",
            found.overlap,
            found.documents,
        )
    elif found.overlap is None and stopper.arrays:
        _logger.warning("stopper: its file does not tell which documents it was fitted on; make sure they are others")
    if found.first_token_only:
        _logger.info("traces: some know the first token of an answer alone, and so does the promise; trace again")
    promised = f"at most {max_drop:.2%} lost ({arguments.loss}) at {confidence:.0%} confidence"
    if found.stops:
        files.save(stopper, arguments.output)
        print(
            f"{arguments.output}: threshold {found.threshold:.6g}, {promised}; {found.losses} of {found.documents} "
            f"calibration documents lost, pruning_ratio {found.pruning:.3f} (simulated)"
        )
        return
    least = calibration.documents_needed(max_drop, confidence)
    assert least is not None
    if found.documents < least:
        needed = f"with {found.documents} documents none can; at least {least} are needed"
    elif found.needed is None:
        needed = (
            f"even the strictest threshold that stops loses {max_drop:.2%} or more of the {found.documents} documents"
        )
    else:
        needed = f"with {found.documents} documents none passed; about {found.needed} would be needed"
    try:
        files.require_savable(stopper)
    except AdaInferError:  # a crf has no threshold that it can't exceed
        raise AdaInferError(
            f"stopper: no threshold of this {stopper.kind} qualifies for {promised} ({needed}), and a {stopper.kind} "
            "can't be told never to stop, so nothing is written; run stopper=none instead"
        ) from None
    files.save(stopper, arguments.output)
    print(f"{arguments.output}: never stops, since no threshold qualifies for {promised}: {needed}")
