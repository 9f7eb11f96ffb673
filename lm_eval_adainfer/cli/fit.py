"""``adainfer fit KIND``: fit a stopper on traces, whichever kind it is, or a reader."""

from __future__ import annotations

import argparse
from typing import Any

from lm_eval_adainfer.cli import fit_reader, options

_CLASSIFIERS = {
    "logistic": "logistic regression",
    "mlp": "a small multilayer perceptron",
    "boosted": "gradient-boosted trees",
}


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the command to ``adainfer``'s, with a subcommand per kind."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "fit",
        help="fit a stopper on traces, or a reader",
        description="Fit a stopper on what adainfer trace recorded; `adainfer fit KIND --help` explains each kind. The "
        "file goes into stopper= of lm_eval --model adainfer. The kind reader makes a file for reader=tuned:FILE.",
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    _add_svm(kinds)
    _add_crf(kinds)
    for kind, name in _CLASSIFIERS.items():
        _add_classifier(kinds, kind, name)
    fit_reader.add_parser(kinds)
    return parser


def _add_svm(kinds: Any) -> None:
    parser = kinds.add_parser(
        "svm",
        parents=[options.traces()],
        formatter_class=options.Help,
        help="the paper's support vector machine",
        description="Fit scikit-learn's SVC (default settings, as in the paper) on one example per (instance, block): "
        "the block's features, and whether to stop there. Then evaluate with stopper=svm.stopper, beside stopper=none.",
        epilog="example: adainfer fit svm traces/ --threshold 1 -o svm.stopper",
    )
    parser.add_argument(
        "--label",
        default="final",
        choices=["final", "gold"],
        help="positive where the block's top token is the last block's (final, Eq. 1) or the gold answer's (gold)",
    )
    parser.add_argument(
        "--features",
        default="gap,top_prob",
        help="separated by commas, of gap, top_prob, entropy, cos_attn, cos_mlp, cos_hidden, depth, agreement, "
        "top_prob_change; and, where choices have one token each, of choice_gap, choice_top_prob, choice_entropy, "
        "choice_agreement",
    )
    parser.add_argument(
        "--max_examples", type=int, default=5000, help="SVC is quadratic: use at most so many (instance, block) pairs"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the pairs that are used")
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.0,
        help="stop when the decision function exceeds it: 0 is the paper's, higher stops later (1: outside the margin)",
    )
    parser.add_argument("--output", "-o", required=True, help="the stopper file (safetensors, whatever its extension)")
    _add_reader(parser)
    parser.set_defaults(own_options=("max_examples",))


def _add_crf(kinds: Any) -> None:
    parser = kinds.add_parser(
        "crf",
        parents=[options.traces()],
        formatter_class=options.Help,
        help="a conditional random field along the blocks (needs the extra [crf])",
        description="Fit a linear-chain CRF along the blocks with CRFsuite (default settings), one sequence per "
        "instance. It stops by filtering: when the probability of stopping, given the blocks seen so far, exceeds "
        "the threshold.",
        epilog="example: adainfer fit crf traces/ -o crf.pkl",
    )
    parser.add_argument("--label", default="final", choices=["final", "gold"], help="as adainfer fit svm's")
    parser.add_argument("--features", default="gap,top_prob", help="feature names, separated by commas")
    parser.add_argument("--max_instances", type=int, default=5000, help="use at most so many sequences")
    parser.add_argument("--seed", type=int, default=0, help="of the sequences that are used")
    parser.add_argument("--threshold", type=float, default=0.5, help="stop when the filtered probability exceeds it")
    parser.add_argument(
        "--prefixes",
        action="store_true",
        help="train on every prefix of a sequence: filtering asks about prefixes, and trained on whole sequences the "
        "probabilities at the first blocks are far too high (move --threshold then)",
    )
    parser.add_argument("--output", "-o", required=True, help="the stopper file (safetensors, whatever its extension)")
    _add_reader(parser)
    parser.set_defaults(own_options=("max_instances", "prefixes"))


def _add_classifier(kinds: Any, kind: str, name: str) -> None:
    parser = kinds.add_parser(
        kind,
        parents=[options.traces()],
        formatter_class=options.Help,
        help=f"{name}, with calibrated probabilities",
        description=f"Fit {name} (scikit-learn) on one example per (instance, block), and make its scores "
        "probabilities by Platt scaling on a fifth of the documents, which it does not see in fitting.",
        epilog=f"example: adainfer fit {kind} traces/ -o {kind}.stopper",
    )
    parser.add_argument(
        "--label",
        default="final",
        choices=["final", "gold", "stable"],
        help="positive where the block's top token is the last block's (final, Eq. 1) or the gold answer's (gold), "
        "or where the document's answer never changes again (stable)",
    )
    parser.add_argument("--features", default="all", help="feature names, separated by commas, or all")
    parser.add_argument("--max_examples", type=int, default=20000, help="use at most so many examples")
    parser.add_argument("--seed", type=int, default=0, help="of the examples, the held-out fifth and the model")
    parser.add_argument("--threshold", type=float, default=0.95, help="stop when the probability exceeds it")
    parser.add_argument("--output", "-o", required=True, help="the stopper file")
    _add_reader(parser)
    parser.set_defaults(own_options=("max_examples",))


def _add_reader(parser: Any) -> None:
    parser.add_argument(
        "--reader",
        default="head",
        help="fit under this reader, as reader= of lm_eval --model adainfer; the traces must hold what it says ("
        "adainfer trace --readers), and the stopper's file holds the reader",
    )


def run(arguments: argparse.Namespace) -> None:
    """Fit the stopper, save it, and print what it was fitted on."""
    if arguments.kind == "reader":
        fit_reader.run(arguments)
        return
    from lm_eval_adainfer.fitting import fit
    from lm_eval_adainfer.readers import specs as readers
    from lm_eval_adainfer.strategies import files

    features: list[str] | None = [name for name in arguments.features.split(",") if name]
    if arguments.kind in _CLASSIFIERS and arguments.features.strip() == "all":
        features = None  # which there are, the traces tell
    stopper = fit.fit(
        arguments.kind,
        arguments.traces,
        label=arguments.label,
        features=features,
        seed=arguments.seed,
        threshold=arguments.threshold,
        reader=readers.parse(arguments.reader),
        **{name: getattr(arguments, name) for name in arguments.own_options},
    )
    files.save(stopper, arguments.output)
    info = stopper.info
    if arguments.kind == "svm":
        about = f"{stopper.arrays['support_vectors'].shape[0]} support vectors"
    else:
        about = f"{'a ' if arguments.kind == 'crf' else ''}{arguments.kind} on {', '.join(stopper.features)}"
    if arguments.reader != "head":
        asked = info.get("check_layers")
        about += f", under {arguments.reader}" + (f", asked after {'+'.join(map(str, asked))}" if asked else "")
    held_out = info.get("held_out_log_loss")
    measured = "" if held_out is None else f"; on the held-out fifth, log-loss {held_out:.3f} (measured)"
    print(
        f"{arguments.output}: {about}, fitted on {info['examples']} of {info['examples_available']} examples "
        f"({info['positive_share']:.0%} stop) from {info['documents']} documents{measured}"
    )
