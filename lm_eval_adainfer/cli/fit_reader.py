"""``adainfer fit reader``: fit a tuned lens on texts, or on traces that hold states."""

from __future__ import annotations

import argparse
from typing import Any

from lm_eval_adainfer.cli import options
from lm_eval_adainfer.errors import AdaInferError


def add_parser(kinds: Any) -> None:
    """Add the kind to ``adainfer fit``'s."""
    parser = kinds.add_parser(
        "reader",
        parents=[options.model()],
        formatter_class=options.Help,
        help="a tuned lens: affine maps of the blocks' states, for reader=tuned:FILE",
        description="Fit an affine map for each block, from the identity, so that the model's own norm and head say "
        "after it what they say after the last block (arXiv 2303.08112): least squares towards the final states, then "
        "the KL divergence of the two distributions; of these and the identity, what reads held-out examples best is "
        "kept. A killed command goes on where it was when it "
        "is given again; until it ends, states and finished blocks lie in OUTPUT.parts.",
        epilog="example: adainfer fit reader --model_args pretrained=MODEL --text corpus.txt -o MODEL.reader",
    )
    parser.add_argument("traces", nargs="*", help=".trace files made with adainfer trace --hidden, or folders of them")
    parser.add_argument(
        "--text", nargs="+", metavar="FILE", help="instead of traces: .txt files, or .jsonl with a text in each line"
    )
    parser.add_argument("--examples", type=int, default=4096, help="use at most so many positions or decisions")
    parser.add_argument("--epochs", type=int, default=1, help="how often KL sees an example; 0: least squares alone")
    parser.add_argument("--learning-rate", type=float, default=0.1, help="of the KL, in units of what states vary by")
    parser.add_argument(
        "--rank",
        type=int,
        help="make each matrix of two narrow ones of this rank; 0: whole (default: whole up to a width of 1,024, above "
        "that 128)",
    )
    parser.add_argument("--batch_size", "-b", type=int, default=8, help="windows of text per forward")
    parser.add_argument("--seed", type=int, default=0, help="of the examples, their order and narrow matrices")
    parser.add_argument("--output", "-o", required=True, help="the reader file (safetensors, whatever its extension)")


def run(arguments: argparse.Namespace) -> None:
    """Fit the maps, save them, and print what each block's is worth on held-out examples."""
    from lm_eval_adainfer.fitting import reader, reader_examples
    from lm_eval_adainfer.fitting.reader_maps import Training
    from lm_eval_adainfer.harness import loading
    from lm_eval_adainfer.readers import files

    if bool(arguments.traces) == bool(arguments.text):
        raise AdaInferError("traces: give either trace files or --text, one of the two")
    for name, least in (("examples", 20), ("batch_size", 1)):
        if getattr(arguments, name) < least:
            raise AdaInferError(f"{name}: {getattr(arguments, name)} is too few; give {least} or more")
    how = Training(arguments.rank, arguments.epochs, arguments.learning_rate, seed=arguments.seed)
    lm = loading.load_model(arguments.model_args, arguments.device)
    if arguments.text:
        size, draw = arguments.batch_size, (arguments.examples, arguments.seed)
        examples = reader_examples.of_texts(lm, arguments.text, *draw, batch_size=size)
    else:
        examples = reader_examples.of_traces(lm, arguments.traces, arguments.examples, arguments.seed)
    maps = reader.fit(lm, examples, arguments.output, how)
    files.save(maps, arguments.output)
    reader.forget_parts(arguments.output)
    info = maps.info
    print(f"{info['examples_held_out']} held-out examples (measured): KL to the final distribution, same top token")
    print("block  KL before  after  same before  after  kept")
    for row in info["held_out"]:
        print(
            f"{row['block']:5d}  {row['kl_before']:9.3f}  {row['kl_after']:5.3f}  {row['agreement_before']:11.3f}  "
            f"{row['agreement_after']:5.3f}  {row['kept']}"
        )
    which = f"maps of rank {maps.rank}" if maps.rank else "whole maps"
    about = f"{which}, fitted on {info['examples']} examples"
    print(f"{arguments.output}: {about}; read with reader=tuned:{arguments.output}")
