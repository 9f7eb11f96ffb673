"""This package, ``--model adainfer``: dense, as the paper reads blocks, or with a tuned stopper.

    python -m benchmarks.peers.ours --stopper none
    python -m benchmarks.peers.ours --stopper gap:0.8
    python -m benchmarks.peers.ours --stopper words/tuned.stopper

The last is a file that ``adainfer tune`` made; it names its reader and the blocks after which it is asked. The pilot,
which answers 16 documents of a task a second time in order to warn, is left out: it would be a quarter of so few.
"""

from __future__ import annotations

import argparse

from benchmarks.peers import measuring
from lm_eval_adainfer.harness.model import AdaInferLM


def maker(options: argparse.Namespace):
    def make(loaded: measuring.Loaded) -> AdaInferLM:
        given = {key: getattr(options, key) for key in ("reader", "check_layers") if getattr(options, key)}
        return AdaInferLM(**loaded.given, stopper=options.stopper, pilot=0, **given)

    return make


if __name__ == "__main__":
    parser = measuring.parser("python -m benchmarks.peers.ours", __doc__)
    parser.add_argument("--stopper", default="none", help="as in --model_args")
    parser.add_argument("--reader", help="as in --model_args")
    parser.add_argument("--check_layers", help="as in --model_args")
    parser.add_argument("--name", help="in the table (default: adainfer, and the stopper)")
    options = parser.parse_args()
    measuring.main(options.name or f"adainfer, {options.stopper}", maker(options), options)
