"""A recommendation in words: about ten lines, and the ``lm_eval`` command that runs it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LOST = {
    "accuracy": "of accuracy lost",
    "gold": "of documents lose their right answer",
    "agreement": "of documents change their answer",
}  # what a loss means, behind a share
_SHOWN = 4  # contestants that are named in the lines


def asking(options: Mapping[str, Any]) -> dict[str, Any]:
    """What of a command's options says how documents are asked, JSON-serialisable."""
    names = ("apply_chat_template", "system_instruction", "fewshot_as_multiturn", "gen_kwargs", "metadata")
    return {name: options.get(name) for name in names}


def command(options: Mapping[str, Any], model_args: str = "") -> str:
    """``lm_eval`` with the options that ``adainfer tune`` was given.

    Args:
        options: Name to value.
        model_args: What goes behind ``--model_args``; by default what was given there.
    """
    words = ["lm_eval", "--model", "adainfer", "--model_args", model_args or str(options["model_args"])]
    words += ["--tasks", str(options["tasks"])]
    for name in ("device", "num_fewshot", "batch_size", "include_path", "system_instruction"):
        if options.get(name) not in (None, ""):
            words += [f"--{name}", str(options[name])]
    template, turns = options.get("apply_chat_template"), options.get("fewshot_as_multiturn")
    if template:
        words += ["--apply_chat_template", *([] if template is True else [str(template)])]
    if turns is not None:
        words += ["--fewshot_as_multiturn", str(turns)]
    for name in ("gen_kwargs", "metadata"):
        if options.get(name):
            words += [f"--{name}", json.dumps(options[name])]
    return shlex.join(words)


def recommended(found: Mapping[str, Any], output: str | Path, options: Mapping[str, Any]) -> str:
    """The command that runs what is recommended."""
    given = str(options["model_args"]).strip()
    more = {"stopper": "none"}
    if "chosen" in found:
        blocks = "+".join(map(str, found["chosen"]["check_layers"]))
        more = {"stopper": str(Path(output) / found["chosen"]["file"]), "check_layers": blocks}
        if "kv_policy" in found["chosen"]:
            more["kv_policy"] = found["chosen"]["kv_policy"]
    if given.startswith("{"):
        return command(options, json.dumps({**json.loads(given), **more}))
    return command(options, ",".join(part for part in (given, *(f"{k}={v}" for k, v in more.items())) if part))


def lines(found: Mapping[str, Any], output: str | Path, run: str, page: Path | None) -> list[str]:
    """What is printed.

    Args:
        found: What ``tune.json`` holds.
        output: The folder.
        run: The command that runs what is recommended.
        page: Where the page lies; None where there is none.
    """
    settings, n_blocks = found["settings"], found["model"]["n_blocks"]
    dropped = [one for one in found["readers"] if one["hopeless"]]
    most = f"at most {settings['max_drop']:.2%} {LOST[settings['loss']]}"
    said = [f"{found['model']['model']}, {', '.join(found['shots'])}: {most}"]
    if dropped:
        told = ", ".join(f"{one['reader']} (an oracle saves {one['oracle_saves']:.1%})" for one in dropped)
        said.append(f"dropped after {n_probed(found)} blocks probed: {told}")
    said.append(f"on {found['fitting']['documents']} fitting documents, judged on others than they were fitted on:")
    for rival in found["contestants"][:_SHOWN]:
        said.append(f"  {rival['name']}: saves {_share(rival, 'saved')}, loses {_share(rival, 'lost')}")
    if "chosen" not in found:
        nothing = found["nothing"]
        best, saved = max(found["oracles"].items(), key=lambda one: one[1])
        said += [
            f"recommended: stopper=none; {nothing['why']}",
            f"an oracle that knows which answers are final would save {saved:.1%} ({best}, simulated)",
            nothing["more"],
        ]
    else:
        chosen, test = found["chosen"], found["test"]
        promise, blocks = chosen["promise"], "+".join(map(str, chosen["check_layers"]))
        won = f" and {promise['wins']} won one" if "wins" in promise else ""
        who = {"prompt": "prompts leave, ", "token": "new tokens leave, "}.get(chosen.get("exits", ""), "")
        said.append(
            f"recommended: {who}reader={chosen['reader']}, {chosen['stopper']} above {chosen['threshold']:.4g}, asked "
            f"after block{'s' if '+' in blocks else ''} {blocks} of {n_blocks}"
        )
        said.append(
            f"promise: {most} at {settings['confidence']:.0%} confidence (of {promise['documents']} calibration "
            f"documents {promise['losses']} lost their answer{won})"
        )
        row, how = test["rows"][-1], "generated dense and early" if found.get("texts") else "simulated"
        metric = row.get("metric") or "acc"
        change = "" if row["acc"] is None else f", {metric} {row['acc'] - row['acc_change']:.3f} -> {row['acc']:.3f}"
        said.append(
            f"on {test['documents']} test documents ({how}): saves {_share(test, 'saved')} of the counted work, "
            f"reading and checks included, loses {_share(test, 'lost')}{change}, exit block {test['exit_layer']:.1f}"
        )
        if row["task"] == "pooled" and row["acc"] is not None:
            worst = min(test["rows"][:-1], key=lambda one: one["acc_change"])
            said.append(
                f"the task that loses most: {worst['task']}, {worst['acc'] - worst['acc_change']:.3f} -> "
                f"{worst['acc']:.3f} ({worst['documents']} of these documents); the promise is about all together, in "
                "this mix"
            )
        for task, used in test["used_elsewhere"].items():
            said.append(f"{task} has no training split: {used} of its evaluation documents were fitted and tuned on")
    said.append(f"{Path(output) / 'tune.json'}" + (f", {page}" if page else "; no page: pip install "
                "'lm-eval-adainfer[report]'"))  # fmt: skip
    said.append(run)
    return said


def n_probed(found: Mapping[str, Any]) -> int:
    """After how many blocks readers that run tokens were probed."""
    return max(len(one["agreement"]) for one in found["readers"][1:]) if len(found["readers"]) > 1 else 0


def _share(of: Mapping[str, Any], name: str) -> str:
    return f"{of[name]:.1%} ({of[f'{name}_low']:.1%} to {of[f'{name}_high']:.1%})"
