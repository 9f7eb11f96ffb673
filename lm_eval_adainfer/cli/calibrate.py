"""``adainfer calibrate``: a stopper's threshold, chosen so that a promise about lost answers holds."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_adainfer.cli import options
from lm_eval_adainfer.errors import AdaInferError

if TYPE_CHECKING:
    from lm_eval_adainfer.fitting.calibration import Calibration
    from lm_eval_adainfer.strategies.base import Stopper

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
    parser.add_argument(
        "--stopper",
        "-s",
        action="append",
        required=True,
        help="a stopper file, or a rule like gap:0.8; may be given several times",
    )
    parser.add_argument("--max-drop", "--max_drop", type=float, default=0.01, help="share of documents lost, at most")
    parser.add_argument("--confidence", type=float, default=0.95, help="that the promise holds")
    parser.add_argument(
        "--loss",
        default="gold",
        choices=["gold", "agreement", "accuracy"],
        help="a document is lost where the dense answer was right and the early one is not (gold), or where they "
        "differ (agreement, which needs no gold answers); accuracy sets those that only the early answer gets right "
        "against the lost ones, so that the promise is about the accuracy's drop",
    )
    options.add_reader(parser)
    parser.add_argument(
        "--check_layers",
        help="as in the runs that will use the stopper (default: all that were recorded under the reader, or those "
        "that a file under copy or sim names)",
    )
    parser.add_argument("--min_layer", default="1", help="as in the runs that will use the stopper")
    parser.add_argument(
        "--grid-from",
        "--grid_from",
        nargs="+",
        metavar="TRACES",
        help="the thresholds that are tested are quantiles of the scores in these traces, of other documents (default: "
        "those of the fitting documents, where the stopper's file holds them, else round numbers)",
    )
    options.add_cluster(
        parser,
        "the recorded field of a task's documents that is the same where they belong together: whole clusters are "
        "bounded, as their answers are not independent",
    )
    parser.add_argument(
        "--test-size",
        "--test_size",
        type=int,
        metavar="N",
        help="the promise is about N documents, of which the calibration documents are a draw without replacement "
        "(default: about all documents like these)",
    )
    parser.add_argument(
        "--by-task", "--by_task", action="store_true", help="a threshold and a promise for every task of the traces"
    )
    parser.add_argument(
        "--joint",
        action="store_true",
        help="several stoppers or tasks divide the error among them, so that with the given confidence all their "
        "promises hold, and the best may be taken",
    )
    parser.add_argument(
        "--output", "-o", required=True, help="the stopper file; of several stoppers or with --by-task, their folder"
    )
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Choose the thresholds, save the stoppers, and print what is promised of them."""
    from lm_eval_adainfer import clusters
    from lm_eval_adainfer.fitting import calibration, fit, grids
    from lm_eval_adainfer.readers import specs as readers
    from lm_eval_adainfer.strategies import files, specs
    from lm_eval_adainfer.traces import clustering, file

    given = [specs.parse(spec) for spec in arguments.stopper]
    for stopper in given:
        grids.require_threshold(stopper)  # what has no threshold, or could not be saved, is refused before the work
        files.require_savable(stopper)
    wanted = clusters.parse(arguments.cluster)
    pools: dict[str, list[Path]] = {"": fit.find(arguments.traces)}
    if arguments.by_task:
        of = [(str(file.read(path)[0]["task"]), path) for path in pools[""]]
        pools = {task: [path for name, path in of if name == task] for task, _ in of}
        clustering.require_known(wanted, pools)
    jobs = [(s, g, task) for s, g in zip(arguments.stopper, given, strict=True) for task in pools]
    outputs = _outputs(arguments, [(spec, task) for spec, _, task in jobs])
    found = []
    for (_, stopper, task), output in zip(jobs, outputs, strict=True):
        chosen, result = calibration.calibrate(
            pools[task],
            stopper,
            arguments.max_drop,
            arguments.confidence,
            arguments.loss,
            arguments.check_layers,
            readers.resolve(arguments.reader, stopper.reader),
            arguments.min_layer,
            fit.find(arguments.grid_from) if arguments.grid_from else (),
            clustering.of_task(wanted, task) if task else wanted,
            arguments.test_size,
            len(jobs) if arguments.joint else 1,
        )
        _warn(result, fitted=bool(chosen.arrays))
        _write(arguments, chosen, result, output)
        found.append((output, result))
    if len(found) > 1:
        print(_together(arguments, found))


def _outputs(arguments: argparse.Namespace, jobs: Sequence[tuple[str, str]]) -> list[Path]:
    """A file for each stopper and task: the one that was named, or those of a folder."""
    if len(arguments.stopper) == 1 and not arguments.by_task:
        return [Path(arguments.output)]
    folder = Path(arguments.output)
    if folder.exists() and not folder.is_dir():
        raise AdaInferError(f"output: {folder} is a file; several stoppers are written into a folder")
    names = []
    for spec, task in jobs:
        stopper = (Path(spec).stem if Path(spec).exists() else spec).replace(":", "-").replace("/", "-")
        names.append("-".join(part for part in (stopper if len(arguments.stopper) > 1 else "", task) if part))
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise AdaInferError(f"stopper: two are called {twice}, which would be one file; give them other names")
    folder.mkdir(parents=True, exist_ok=True)
    return [folder / f"{name}.stopper" for name in names]


def _promised(arguments: argparse.Namespace, found: Calibration) -> str:
    """What is promised, with what probability."""
    most = f"{arguments.max_drop:.2%}"
    what = f"accuracy falls by at most {most}" if arguments.loss == "accuracy" else f"at most {most} lost"
    of = "" if arguments.test_size is None else f" of these {arguments.test_size} documents"
    others = found.promise.get("together_with", 0)
    joint = f", together with {others} other promise{'s' if others > 1 else ''}" if others else ""
    return f"{what}{of} ({arguments.loss}) at {arguments.confidence:.0%} confidence{joint}"


def _write(arguments: argparse.Namespace, stopper: Stopper, found: Calibration, output: Path) -> None:
    from lm_eval_adainfer.strategies import files

    promised = _promised(arguments, found)
    if found.stops:
        files.save(stopper, output)
        won = f", {found.wins} won" if "wins" in found.promise else ""
        grouped = f" in {found.seen} clusters" if "clusters" in found.promise else ""
        print(
            f"{output}: threshold {found.threshold:.6g}, {promised}; {found.losses} of {found.documents} "
            f"calibration documents{grouped} lost{won}, pruning_ratio {found.pruning:.3f} (simulated); "
            f"thresholds tested: {found.grid}"
        )
        return
    needed = _needed(found, arguments.max_drop)
    try:
        files.require_savable(stopper)
    except AdaInferError:  # a crf has no threshold that it can't exceed
        raise AdaInferError(
            f"stopper: no threshold of this {stopper.kind} qualifies for {promised} ({needed}), and a {stopper.kind} "
            "can't be told never to stop, so nothing is written; run stopper=none instead"
        ) from None
    files.save(stopper, output)
    print(f"{output}: never stops, since no threshold qualifies for {promised}: {needed}")


def _together(arguments: argparse.Namespace, found: Sequence[tuple[Path, Calibration]]) -> str:
    """What several promises are worth together."""
    best, most = max(found, key=lambda one: one[1].pruning)
    n = len(found)
    pruning = f"most pruned: {best}, {most.pruning:.3f} (simulated)"
    if arguments.joint:
        return (
            f"with {arguments.confidence:.0%} confidence all {n} promises hold (each has an error of "
            f"{(1 - arguments.confidence) / n:.3g}), so any of these stoppers may be taken; {pruning}"
        )
    return (
        f"each of these {n} promises holds with {arguments.confidence:.0%} confidence on its own; if they were "
        f"independent, all {n} would hold together with {arguments.confidence**n:.0%}, and a stopper that is taken "
        f"because it looks best has no promise: --joint divides the error among them; {pruning}"
    )


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
    if found.repeated:
        _logger.warning("traces: %s", found.repeated)
    if found.first_token_only:
        _logger.info("traces: some know the first token of an answer alone, and so does the promise; trace again")


def _needed(found: Calibration, max_drop: float) -> str:
    """Why no threshold qualified, and how many documents might let one qualify."""
    what = "clusters" if "clusters" in found.promise else "documents"
    if found.least is None:
        return f"with none of its {what} lost none can"
    if found.seen < found.least:
        return f"with {found.seen} {what} none can; at least {found.least} are needed"
    if found.needed is None:
        lost = f"{max_drop:.2%} or more of the {found.documents} documents, or so nearly that no number would tell"
        return f"even the strictest threshold that stops loses {lost}"
    return f"with {found.documents} documents none passed; about {found.needed} would be needed"
