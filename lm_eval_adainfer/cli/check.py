"""``adainfer check``: whether early exit lost too much, as an exit status for CI."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_adainfer.cli import check_config, options, terminal
from lm_eval_adainfer.errors import AdaInferError

if TYPE_CHECKING:
    from lm_eval_adainfer.comparison.gate import Verdict
    from lm_eval_adainfer.comparison.running import Made
    from lm_eval_adainfer.comparison.runs import Run
    from lm_eval_adainfer.comparison.selection import Selection

# set when the config file has been read, which may give what the command line left open
_DEFAULTS: dict[str, Any] = {"on_inconclusive": "inconclusive", "format": "text", "batch_size": "8", "tolerance": 1e-4}
# --reproduces does without them
_FOR_DROPS = ("max_drop", "min_pruning", "min_flops_saved", "group", "on_inconclusive", "cluster")


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the command to ``adainfer``'s."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "check",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        help="a regression gate for CI: pass, fail or inconclusive",
        description="Did early exit lose more than --max-drop? Compares a candidate with a baseline, document by\n"
        "document. --tasks and --exclude keep to some tasks; with --run, --tasks is what is evaluated.\n\n"
        "exit status:\n"
        "  0  pass: the drop is established to be at most --max-drop (one-sided 95%)\n"
        "  1  fail: it is established to be larger, in all or in some task, or too little was pruned or saved\n"
        "  3  inconclusive: these documents can't tell; how many could is printed\n"
        "  2  usage error",
        epilog="examples:\n"
        "  adainfer check --baseline runs/dense --candidate runs/early --max-drop 0.01 --min-pruning 0.15\n"
        "  adainfer check --run --model_args pretrained=adainfer-demo,stopper=svm --tasks adainfer_demo \\\n"
        "    --max-drop 0.01\n"
        "  adainfer check --baseline runs/hf --candidate runs/none --reproduces\n"
        "  adainfer check --config gate.yaml        (keys: these options; the command line goes before the file)",
    )
    for_all = [*_add_gate(parser), *options.add_matching(parser), *_add_writing(parser)]
    for_run = _add_running(parser)
    parser.set_defaults(keys=[*for_all, *for_run], for_run=[a.dest for a in for_run])
    return parser


def _add_gate(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    gate = parser.add_argument_group("the gate")
    found = [
        gate.add_argument("--baseline", metavar="RUN", help=options.RUN),
        gate.add_argument("--candidate", metavar="RUN", help="likewise"),
        gate.add_argument(
            "--max-drop",
            type=float,
            metavar="X",
            help="the largest drop allowed: 0.01 is one point; for perplexities it is in nats",
        ),
        gate.add_argument("--min-pruning", type=float, metavar="X", help="the least mean pruning_ratio: 0.15 is 15%%"),
        gate.add_argument(
            "--min-flops-saved",
            type=float,
            metavar="X",
            help="the least that 1 - mean flops_ratio_total, checks included, may be: 0.15 is 15%%",
        ),
        gate.add_argument("--group", help="the group or task whose documents are pooled (default: all)"),
        gate.add_argument(
            "--on-inconclusive",
            choices=["inconclusive", "fail", "pass"],
            help="exit status where the documents can't tell: 3 (the default), 1 or 0",
        ),
    ]
    gate.add_argument("--config", metavar="YAML", help="a file with any of these options")
    return [
        *found,
        gate.add_argument(
            "--reproduces",
            action="store_true",
            default=None,
            help="check instead that the candidate, of stopper=none, gives the baseline's answers",
        ),
        gate.add_argument("--tolerance", type=float, help="of log-probabilities, for --reproduces (default: 1e-4)"),
    ]


def _add_writing(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    out = parser.add_argument_group("what it writes")
    return [
        out.add_argument("--format", choices=["text", "json"], help="of the verdict on the terminal (default: text)"),
        out.add_argument("--junit", metavar="FILE", help="JUnit XML"),
        out.add_argument(
            "--summary", metavar="FILE", help="Markdown, appended (default: $GITHUB_STEP_SUMMARY, if set)"
        ),
    ]


def _add_running(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    group = parser.add_argument_group("run both sides here")
    return [
        group.add_argument(
            "--run",
            action="store_true",
            default=None,
            help="evaluate the candidate, and in the same pass stopper=none, unless --baseline is given (with "
            "--reproduces: and --model hf)",
        ),
        *options.add_documents(
            group,
            required=(),
            model_help="pretrained=...,stopper=... (the candidate's)",
            limit_help="documents per task",
            batch_size=None,
        ),
        group.add_argument(
            "--stop-early",
            action="store_true",
            default=None,
            help="add documents in a seeded random order until they can tell; error rates hold at whatever number",
        ),
        group.add_argument("--seed", type=int, help="of that order (default: 0)"),
        group.add_argument("--output", "-o", help="a folder that keeps the two runs (default: they are thrown away)"),
    ]


def run(arguments: argparse.Namespace) -> int:
    """Judge two runs, which ``--run`` makes first; the exit status is the verdict."""
    if arguments.config:
        check_config.fill(arguments, arguments.keys)
    _require(arguments)
    for key, value in _DEFAULTS.items():
        if getattr(arguments, key) is None:
            setattr(arguments, key, value)
    selection = options.selection(arguments)
    from lm_eval_adainfer.comparison import adding, running

    if not arguments.run:
        return _judge(arguments, selection, running.Made(arguments.baseline, arguments.candidate))
    selection, exclude = _selection_to_run(arguments, selection), selection.exclude
    asked = options.asking(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        if arguments.stop_early:
            made = adding.run_until(
                partial(_settled, arguments, selection),
                arguments.model_args,
                arguments.tasks,
                Path(arguments.output or temporary),
                include_path=arguments.include_path,
                asked=asked,
                num_fewshot=arguments.num_fewshot,
                limit=arguments.limit,
                batch_size=arguments.batch_size,
                device=arguments.device,
                seed=arguments.seed or 0,
                exclude=exclude,
            )
            return _judge(arguments, selection, made)
        made = running.run_both(
            arguments.model_args,
            arguments.tasks,
            Path(arguments.output or temporary),
            stock_baseline=bool(arguments.reproduces),
            include_path=arguments.include_path,
            baseline=arguments.baseline,
            asked=asked,
            num_fewshot=arguments.num_fewshot,
            limit=arguments.limit,
            batch_size=arguments.batch_size,
            device=arguments.device,
        )
        return _judge(arguments, selection, made)


def _require(arguments: argparse.Namespace) -> None:
    """Raise AdaInferError where an option is missing, or one is given that would do nothing."""
    if arguments.run:
        if not arguments.model_args or not arguments.tasks:
            raise AdaInferError("run: it needs --model_args and --tasks; see adainfer check --help")
        if arguments.candidate:
            raise AdaInferError("candidate: --run makes the candidate itself; leave out one of the two")
        if arguments.limit is not None and arguments.limit < 1:
            raise AdaInferError(f"limit: {arguments.limit} documents are none; give 1 or more")
    else:
        if not arguments.baseline or not arguments.candidate:
            raise AdaInferError("check: it needs --baseline and --candidate, or --run; see adainfer check --help")
        for name in _given(arguments, arguments.for_run):
            if name != "tasks":  # without --run, it keeps to some tasks
                raise AdaInferError(f"{name}: only --run evaluates anything; give --run, or leave {name} out")
    if arguments.stop_early and (arguments.baseline or arguments.cluster or arguments.reproduces):
        raise AdaInferError("stop-early: it can't go with --baseline, --cluster or --reproduces; leave one of them out")
    if arguments.seed is not None and not arguments.stop_early:
        raise AdaInferError("seed: only --stop-early draws an order; give --stop-early, or leave it out")
    if arguments.seed is not None and arguments.seed < 0:
        raise AdaInferError(f"seed: {arguments.seed} is below 0; give 0 or more")
    if arguments.reproduces:
        for name in _given(arguments, _FOR_DROPS):
            raise AdaInferError(f"{name.replace('_', '-')}: --reproduces does not use it; leave out one of the two")
    elif arguments.max_drop is None:
        raise AdaInferError("max-drop: it is missing; --max-drop 0.01 allows a drop of one point")
    elif arguments.tolerance is not None:
        raise AdaInferError("tolerance: only --reproduces uses it; give --reproduces, or leave it out")


def _given(arguments: argparse.Namespace, names: Any) -> list[str]:
    return [name for name in names if getattr(arguments, name) is not None]


def _selection_to_run(arguments: argparse.Namespace, selection: Selection) -> Selection:
    """What is compared of the runs that ``--run`` makes of ``--tasks``: all of it, so names are lm-eval's, tags too.

    What ``--stop-early`` leaves out is not even run.

    Raises:
        AdaInferError: On a name in the other options that lm-eval does not know, before anything runs.
    """
    from dataclasses import replace

    named = {*selection.exclude, *(w.tasks for w in selection.wanted), *(tasks for tasks, _ in selection.clusters)}
    named.discard("")  # what is said of all tasks
    if named:
        from lm_eval_adainfer.harness.loading import task_manager
        from lm_eval_adainfer.releases import matched

        manager = task_manager({}, arguments.include_path, names=sorted(named))
        for name in sorted(named):
            if not matched(manager, [name]):
                raise AdaInferError(
                    f"check: {name!r} in --exclude, --metric or --cluster is no task or group that lm-eval knows"
                )
    return replace(selection, tasks=(), exclude=() if arguments.stop_early else selection.exclude)


def _settled(
    arguments: argparse.Namespace,
    selection: Selection,
    baseline_path: str,
    candidate_path: str,
    places: dict[tuple[str, int], int],
    seen: Sequence[tuple[str, int]],
) -> bool:
    """Whether the documents so far can tell whether the drop is too large."""
    if {task for task, _ in places} != {task for task, _ in seen}:
        return False  # all guards share one error, so none is asked before all tasks are there
    baseline, candidate = _load(arguments, selection, baseline_path, candidate_path)
    verdict = _verdict(arguments, baseline, candidate, [], places)
    return verdict.within or verdict.dropped or any(guard.failed for guard in verdict.guards)


def _verdict(
    arguments: argparse.Namespace,
    baseline: Run,
    candidate: Run,
    said: list[str],
    places: dict[tuple[str, int], int] | None,
) -> Verdict:
    from lm_eval_adainfer.comparison import gate
    from lm_eval_adainfer.comparison.matching import match

    return gate.judge_runs(
        baseline,
        candidate,
        match(baseline, candidate, None, bool(arguments.other_prompts), said),
        arguments.max_drop,
        arguments.min_pruning,
        arguments.min_flops_saved,
        arguments.group,
        places,
    )


def _judge(arguments: argparse.Namespace, selection: Selection, made: Made) -> int:
    """Compare the two runs, write and print the verdict, and return the exit status."""
    import json

    from lm_eval_adainfer.comparison import check, gate
    from lm_eval_adainfer.output import verdicts

    baseline, candidate = _load(arguments, selection, made.baseline, made.candidate)
    said = [*made.said, *(f"{run.label}: {note}" for run in (baseline, candidate) for note in run.notes)]
    other_prompts = bool(arguments.other_prompts)
    if arguments.reproduces:
        found = check.reproduces(baseline, candidate, arguments.tolerance, None, other_prompts)
        status = gate.FAIL if any(c.status == gate.FAIL for c in found) else gate.PASS
        as_json: dict[str, Any] = {"status": status, "checks": [vars(c) for c in found]}
        text, reasons = verdicts.text_of_cases(status, found), []
    else:
        verdict = _verdict(arguments, baseline, candidate, said, made.places)
        if made.places is not None:
            said.append(
                f"documents came in a random order (seed {arguments.seed or 0}), {verdict.documents:,} of "
                f"{len(made.places):,} were used; the bounds hold at whatever number one stops"
            )
        found, status, as_json = check.cases(verdict), verdict.status, verdict.as_dict()
        said += verdict.notes
        text, reasons = verdicts.text(verdict, baseline.label, candidate.label), verdict.reasons
    notes = [f"note: {note}" for note in said]
    verdicts.write_reports(
        f"{candidate.label} against {baseline.label}",
        found,
        [*reasons, *notes],
        arguments.on_inconclusive,
        arguments.junit,
        arguments.summary,
    )
    if arguments.format == "json":
        labels = {"baseline_run": baseline.label, "candidate_run": candidate.label}
        terminal.show(json.dumps({**as_json, "notes": said, **labels}, indent=2))
    else:
        terminal.show("\n".join([text, *notes]))
    return check.EXIT[arguments.on_inconclusive if status == gate.INCONCLUSIVE else status]


def _load(
    arguments: argparse.Namespace, selection: Selection, baseline_path: str, candidate_path: str
) -> tuple[Run, Run]:
    from dataclasses import replace

    from lm_eval_adainfer.comparison import runs

    if arguments.run:  # of a baseline that was there before, the tasks that have just been run
        candidate = runs.load(candidate_path, "candidate", selection=selection)
        its_tasks = replace(selection, tasks=tuple(candidate.tasks))
        baseline = runs.load(baseline_path, "baseline", selection=its_tasks)
    else:
        baseline = runs.load(baseline_path, "baseline", selection=selection)
        candidate = runs.load(candidate_path, "candidate", selection=selection)
    runs.require_known(selection, [baseline, candidate])
    return baseline, candidate
