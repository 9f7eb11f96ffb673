"""The ``adainfer`` command: thin subcommands around ``tracing`` and ``fitting``."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import Any

from lm_eval_adainfer._version import __version__
from lm_eval_adainfer.cli import stoppers, studies
from lm_eval_adainfer.cli.comparison import add_parsers as add_comparison_parsers
from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.harness import asking
from lm_eval_adainfer.harness.loading import load_model, load_model_and_tasks


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand; a user's mistake is one sentence on stderr and exit status 2."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        status = arguments.run(arguments) or 0
        sys.stdout.flush()
        return status
    except AdaInferError as error:
        print(f"adainfer: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, say, wherever it was met
        where = f"{error.filename}: " if error.filename else ""
        print(f"adainfer: error: {where}{error.strerror or error}", file=sys.stderr)
        try:
            sys.stdout.flush()
        except OSError:  # Python would try again when it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 2
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        found = f" ({str(error).splitlines()[0]:.120})" if str(error) else ""
        print(f"adainfer: error: batch_size: there is not enough memory{found}; give a smaller one", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        kept = "; finished traces are kept, and the same command goes on" if arguments.command == "trace" else ""
        print(f"\nadainfer: interrupted{kept}", file=sys.stderr)  # behind the progress bar
        return 130


def _out_of_memory(error: BaseException) -> bool:
    """Whether this is what torch or Python raise where memory is short."""
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="adainfer",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="What belongs to `lm_eval --model adainfer`: stoppers are fitted before, runs are compared after.",
        epilog="in order:\n"
        "  adainfer verify --model_args pretrained=MODEL\n"
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
    how = _Help

    verify = commands.add_parser(
        "verify",
        formatter_class=how,
        help="check early exit on your model against plain forwards of it",
        description="Run a few random prompts through a model, leaving after every block, in batches, with shared "
        "prefixes and while generating, and compare all answers with plain forwards of the whole model, one row at a "
        "time. Exit status 0: nothing differs, 1: something does.",
        epilog="example: adainfer verify --model_args pretrained=adainfer-demo,dtype=float32,stopper=svm",
    )
    asking.add_model_arguments(verify, model_help="pretrained=...,stopper=...,dtype=...")
    verify.add_argument("--json", metavar="FILE", help="write the findings there, too")
    verify.set_defaults(run=_verify)

    trace = commands.add_parser(
        "trace",
        formatter_class=how,
        help="record every block's features on training documents",
        description="Run a dense pass over documents and record every block's features, top token and scores: one "
        ".trace file per task and number of shots. Of generate_until tasks every new token is recorded. A document is "
        "never among its own shots. What is finished is kept when interrupted: the same command goes on.",
        epilog="example: adainfer trace --model_args pretrained=adainfer-demo,dtype=float32 "
        "--tasks adainfer_demo --num_fewshot 3 --limit 300 -o traces/",
    )
    asking.add_arguments(
        trace,
        shots=_shots,
        shots_help="shots per document, or several numbers: 0,5,10,15,20 makes a file each (default: the task's own)",
    )
    trace.add_argument(
        "--split",
        default="train",
        choices=["train", "test"],
        help="train: the training split, or the 30%% of the evaluation documents that a fixed hash sets apart where "
        "there is none; test: the evaluation documents without these",
    )
    trace.add_argument("--seed", type=int, default=0, help="of the drawn documents")
    trace.add_argument("--fewshot_seed", type=int, default=1234, help="of the shots, as lm_eval's")
    trace.add_argument("--output", "-o", required=True, help="the folder for the .trace files")
    trace.set_defaults(run=_trace)

    fit = commands.add_parser(
        "fit",
        help="fit a stopper on traces",
        description="Fit a stopper on what adainfer trace recorded; `adainfer fit KIND --help` explains each kind. The "
        "file goes into stopper= of lm_eval --model adainfer.",
    )
    kinds = fit.add_subparsers(dest="kind", required=True, metavar="KIND")
    svm = kinds.add_parser(
        "svm",
        formatter_class=how,
        help="the paper's support vector machine",
        description="Fit scikit-learn's SVC (default settings, as in the paper) on one example per (instance, block): "
        "the block's features, and whether to stop there. Then evaluate with stopper=svm.stopper, beside stopper=none.",
        epilog="example: adainfer fit svm traces/ --threshold 1 -o svm.stopper",
    )
    svm.add_argument("traces", nargs="+", help=".trace files, or folders of them")
    svm.add_argument(
        "--label",
        default="final",
        choices=["final", "gold"],
        help="positive where the block's top token is the last block's (final, Eq. 1) or the gold answer's (gold)",
    )
    svm.add_argument(
        "--features",
        default="gap,top_prob",
        help="separated by commas, of gap, top_prob, entropy, cos_attn, cos_mlp, cos_hidden, depth, agreement, "
        "top_prob_change",
    )
    svm.add_argument(
        "--max_examples", type=int, default=5000, help="SVC is quadratic: use at most so many (instance, block) pairs"
    )
    svm.add_argument("--seed", type=int, default=0, help="of the pairs that are used")
    svm.add_argument(
        "--threshold",
        type=float,
        default=0.0,
        help="stop when the decision function exceeds it: 0 is the paper's, higher stops later (1: outside the margin)",
    )
    svm.add_argument("--output", "-o", required=True, help="the stopper file (safetensors, whatever its extension)")
    svm.set_defaults(run=_fit_svm)
    _crf_parser(kinds)

    stoppers.add_fits(kinds, how)
    stoppers.add_calibrate(commands, how)

    layers = commands.add_parser(
        "layers",
        formatter_class=how,
        help="choose check_layers: after which blocks asking a stopper pays",
        description="Show after which blocks a stopper's exits happen in traces, and choose the few blocks at which "
        "asking it pays: a check reads the output head, which costs up to a block when decoding. The last line goes "
        "into --model_args. All figures are simulated from the traces.",
        epilog="example: adainfer layers traces/ --stopper gap:0.8 --count 4",
    )
    layers.add_argument("traces", nargs="+", help=".trace files, or folders of them")
    layers.add_argument(
        "--stopper", "-s", required=True, help="as stopper= of lm_eval --model adainfer: gap:0.8, svm, a file, ..."
    )
    layers.add_argument("--count", "-n", type=int, help="at most so many blocks (default: as many as pay)")
    layers.set_defaults(run=_layers)
    _influence_parser(commands)
    studies.add_commands(commands, how)
    add_comparison_parsers(commands)
    return parser


def _influence_parser(commands: Any) -> None:
    influence = commands.add_parser(
        "influence",
        formatter_class=_Help,
        help="measure Block Influence (ShortGPT), for stopper=shortgpt:bi:N:FILE",
        description="Measure every block's Block Influence, 1 - E[cos(input, output)] over all tokens of prompts of "
        "training documents, and write a stopper file: with it the least influential blocks never run.",
        epilog="example: adainfer influence --model_args pretrained=adainfer-demo,dtype=float32 "
        "--tasks adainfer_demo --limit 50 -o bi.stopper",
    )
    asking.add_arguments(influence)
    influence.add_argument("--seed", type=int, default=0, help="of the drawn documents")
    influence.add_argument("--fewshot_seed", type=int, default=1234, help="of the shots, as lm_eval's")
    influence.add_argument("--drop", type=int, help="blocks that stopper=FILE drops (default: a quarter)")
    influence.add_argument("--output", "-o", required=True, help="the stopper file")
    influence.set_defaults(run=_influence)


def _verify(arguments: argparse.Namespace) -> int:
    from lm_eval_adainfer import container, verification

    findings = verification.verify_model(load_model(arguments.model_args, arguments.device))
    print(verification.render(findings))
    if arguments.json:
        container.write_atomically(Path(arguments.json), verification.as_json(findings).encode(), "json")
    return int(any(f.status == verification.FAILED for f in findings))


def _influence(arguments: argparse.Namespace) -> None:
    from lm_eval_adainfer.fitting import influence
    from lm_eval_adainfer.strategies import files
    from lm_eval_adainfer.traces import recording

    recording.check_arguments("train", arguments.limit, arguments.num_fewshot)
    asked = asking.Asking.of(arguments)
    lm, tasks = load_model_and_tasks(arguments)
    stopper = influence.of_tasks(
        lm,
        tasks,
        num_fewshot=arguments.num_fewshot,
        limit=arguments.limit,
        seed=arguments.seed,
        fewshot_seed=arguments.fewshot_seed,
        drop=arguments.drop,
        asked=asked,
    )
    files.save(stopper, arguments.output)
    print("block  Block Influence (measured)")
    for k, value in enumerate(stopper.arrays["influence"], start=1):
        print(f"{k:5d}  {value:.4f}{'  <- dropped' if k in stopper.dropped_blocks else ''}")
    print(
        f"{arguments.output}: {stopper.info['tokens']} tokens of {stopper.info['prompts']} prompts; "
        f"stopper={arguments.output} runs without blocks {', '.join(map(str, stopper.dropped_blocks))}"
    )


def _crf_parser(kinds: Any) -> None:
    crf = kinds.add_parser(
        "crf",
        formatter_class=_Help,
        help="a conditional random field along the blocks (needs the extra [crf])",
        description="Fit a linear-chain CRF along the blocks with CRFsuite (default settings), one sequence per "
        "instance. It stops by filtering: when the probability of stopping, given the blocks seen so far, exceeds "
        "the threshold.",
        epilog="example: adainfer fit crf traces/ -o crf.pkl",
    )
    crf.add_argument("traces", nargs="+", help=".trace files, or folders of them")
    crf.add_argument("--label", default="final", choices=["final", "gold"], help="as adainfer fit svm's")
    crf.add_argument("--features", default="gap,top_prob", help="feature names, separated by commas")
    crf.add_argument("--max_instances", type=int, default=5000, help="use at most so many sequences")
    crf.add_argument("--seed", type=int, default=0, help="of the sequences that are used")
    crf.add_argument("--threshold", type=float, default=0.5, help="stop when the filtered probability exceeds it")
    crf.add_argument(
        "--prefixes",
        action="store_true",
        help="train on every prefix of a sequence: filtering asks about prefixes, and trained on whole sequences the "
        "probabilities at the first blocks are far too high (move --threshold then)",
    )
    crf.add_argument("--output", "-o", required=True, help="the stopper file (safetensors, whatever its extension)")
    crf.set_defaults(run=_fit_crf)


def _shots(text: str) -> int | list[int]:
    """One number, or several separated by commas."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of shots; give 5, say, or 0,5,10") from None
    return numbers[0] if len(numbers) == 1 else numbers


def _layers(arguments: argparse.Namespace) -> None:
    from lm_eval_adainfer.fitting import check_layers, fit
    from lm_eval_adainfer.strategies import specs

    stopper = specs.parse(arguments.stopper)
    shares, everywhere, chosen = check_layers.choose(fit.find(arguments.traces), stopper, arguments.count)
    print("block  leaves here (simulated, every block checked)")
    for k, share in enumerate(shares, start=1):
        print(f"{k:5d}  {share:6.1%} {'#' * round(60 * share)}{'  <- check' if k in chosen.blocks else ''}")
    for name, choice in (("all", everywhere), ("chosen", chosen)):
        print(
            f"{name}: exit_layer {choice.exit_layer:.2f}, {choice.checks:.2f} checks a decision, cost {choice.cost:.3f}"
            f" of dense, same token as the last block {choice.agreement:.1%} (simulated)"
        )
    if chosen.blocks:
        print(f"check_layers={'+'.join(map(str, chosen.blocks))}")
    else:
        print("no check pays for itself with this stopper: run stopper=none, or move its threshold")


def _trace(arguments: argparse.Namespace) -> None:
    from lm_eval_adainfer.traces import recording

    recording.check_arguments(arguments.split, arguments.limit, arguments.num_fewshot)
    asked = asking.Asking.of(arguments)
    lm, tasks = load_model_and_tasks(arguments)
    files = recording.trace(
        lm,
        tasks,
        arguments.output,
        num_fewshot=arguments.num_fewshot,
        split=arguments.split,
        limit=arguments.limit,
        seed=arguments.seed,
        fewshot_seed=arguments.fewshot_seed,
        asked=asked,
    )
    for file in files:
        print(file)


def _fit_svm(arguments: argparse.Namespace) -> None:
    from lm_eval_adainfer.fitting import fit
    from lm_eval_adainfer.strategies import files

    stopper = fit.fit_svm(
        arguments.traces,
        label=arguments.label,
        features=[name for name in arguments.features.split(",") if name],
        max_examples=arguments.max_examples,
        seed=arguments.seed,
        threshold=arguments.threshold,
    )
    files.save(stopper, arguments.output)
    info = stopper.info
    print(
        f"{arguments.output}: {stopper.arrays['support_vectors'].shape[0]} support vectors, fitted on "
        f"{info['examples']} of {info['examples_available']} examples ({info['positive_share']:.0%} stop) from "
        f"{info['documents']} documents"
    )


def _fit_crf(arguments: argparse.Namespace) -> None:
    from lm_eval_adainfer.fitting import fit
    from lm_eval_adainfer.strategies import files

    stopper = fit.fit_crf(
        arguments.traces,
        label=arguments.label,
        features=[name for name in arguments.features.split(",") if name],
        max_instances=arguments.max_instances,
        seed=arguments.seed,
        threshold=arguments.threshold,
        prefixes=arguments.prefixes,
    )
    files.save(stopper, arguments.output)
    info = stopper.info
    print(
        f"{arguments.output}: a crf on {', '.join(stopper.features)}, fitted on {info['examples']} of "
        f"{info['examples_available']} examples ({info['positive_share']:.0%} stop) from {info['documents']} documents"
    )


if __name__ == "__main__":
    sys.exit(main())
