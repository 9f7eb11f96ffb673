"""The subcommands ``adainfer compare``, ``check`` and ``report``: arguments, and what they call."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.harness import asking

_RUN = "a results_*.json of lm_eval or its --output_path, made with --log_samples; NAME=PATH names it"
_DEFAULTS: dict[str, Any] = {"on_inconclusive": "inconclusive", "format": "text", "batch_size": "8", "tolerance": 1e-4}


def add_parsers(commands: Any) -> None:
    """Add the three subcommands to ``adainfer``'s."""
    _add_compare(commands)
    _add_check(commands)
    _add_report(commands)


def _matching(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--metric",
        action="append",
        metavar="[TASK=]METRIC[:FILTER]",
        help="of all tasks, or of a task, group or glob; repeatable, or with commas (default, per task: acc, "
        "exact_match or its first)",
    )
    parser.add_argument("--filter", help="of lm-eval, where a task has several (default: the first)")
    parser.add_argument(
        "--exclude", action="append", metavar="NAMES", help="tasks or groups to leave out, separated by commas; * globs"
    )
    parser.add_argument(
        "--other-prompts", action="store_true", default=None, help="accept that the same documents had other prompts"
    )


def _tasks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tasks",
        "-t",
        action="append",
        metavar="NAMES",
        help="only these tasks or groups of the runs, separated by commas; * globs (default: all)",
    )


def _selection(arguments: argparse.Namespace) -> Any:
    from lm_eval_adainfer.comparison.selection import Selection

    return Selection.parse(arguments.tasks, arguments.exclude, arguments.metric, arguments.filter)


def _add_compare(commands: Any) -> None:
    parser = commands.add_parser(
        "compare",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        help="two or more runs, document by document",
        description="Compare runs of lm_eval with the first of them: accuracy, difference with a paired interval,\n"
        "exact p, agreement of answers, exit layers, cost. Runs that did not do the same thing are refused, with\n"
        "the reason. A legend stands under the table; docs/comparing.md explains every column.",
        epilog="example:\n  lm_eval --model hf ... --tasks sst2 --log_samples --output_path runs/dense\n"
        "  lm_eval --model adainfer ... --tasks sst2 --log_samples --output_path runs/early\n"
        "  adainfer compare dense=runs/dense early=runs/early --format markdown",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help=_RUN)
    parser.add_argument(
        "--format",
        default="table",
        choices=["table", "markdown", "latex", "csv", "json"],
        help="of the output (default: table, for the terminal; csv and json hold every number)",
    )
    parser.add_argument("--output", "-o", help="a file for it (default: the terminal)")
    parser.add_argument("--seed", type=int, default=0, help="of permutation tests (default: 0)")
    _tasks(parser)
    _matching(parser)
    parser.set_defaults(run=_compare)


def _add_check(commands: Any) -> None:
    parser = commands.add_parser(
        "check",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        help="a regression gate for CI: pass, fail or inconclusive",
        description="Did early exit lose more than --max-drop? Compares a candidate with a baseline, document by\n"
        "document. --tasks and --exclude keep to some tasks; with --run, --tasks is what is evaluated.\n\n"
        "exit status:\n"
        "  0  pass: the drop is established to be at most --max-drop (one-sided 95%)\n"
        "  1  fail: it is established to be larger, in all or in some task, or too little was pruned\n"
        "  3  inconclusive: these documents can't tell; how many could is printed\n"
        "  2  usage error",
        epilog="examples:\n"
        "  adainfer check --baseline runs/dense --candidate runs/early --max-drop 0.01 --min-pruning 0.15\n"
        "  adainfer check --run --model_args pretrained=adainfer-demo,stopper=svm --tasks adainfer_demo \\\n"
        "    --max-drop 0.01\n"
        "  adainfer check --baseline runs/hf --candidate runs/none --reproduces\n"
        "  adainfer check --config gate.yaml        (keys: these options; the command line goes before the file)",
    )
    gate = parser.add_argument_group("the gate")
    gate.add_argument("--baseline", metavar="RUN", help=_RUN)
    gate.add_argument("--candidate", metavar="RUN", help="likewise")
    gate.add_argument(
        "--max-drop",
        type=float,
        metavar="X",
        help="the largest drop allowed: 0.01 is one point; for perplexities it is in nats",
    )
    gate.add_argument("--min-pruning", type=float, metavar="X", help="the least mean pruning_ratio: 0.15 is 15%%")
    gate.add_argument("--group", help="the group or task whose documents are pooled (default: all)")
    gate.add_argument(
        "--on-inconclusive",
        choices=["inconclusive", "fail", "pass"],
        help="exit status where the documents can't tell: 3 (the default), 1 or 0",
    )
    gate.add_argument("--config", metavar="YAML", help="a file with any of these options")
    gate.add_argument(
        "--reproduces",
        action="store_true",
        default=None,
        help="check instead that the candidate, of stopper=none, gives the baseline's answers",
    )
    gate.add_argument("--tolerance", type=float, help="of log-probabilities, for --reproduces (default: 1e-4)")
    _matching(parser)
    out = parser.add_argument_group("what it writes")
    out.add_argument("--format", choices=["text", "json"], help="of the verdict on the terminal (default: text)")
    out.add_argument("--junit", metavar="FILE", help="JUnit XML")
    out.add_argument("--summary", metavar="FILE", help="Markdown, appended (default: $GITHUB_STEP_SUMMARY, if set)")
    run = parser.add_argument_group("run both sides here")
    run.add_argument(
        "--run",
        dest="run_both",
        action="store_true",
        default=None,
        help="evaluate the candidate, and stopper=none (with --reproduces: --model hf) unless --baseline is given",
    )
    asking.add_arguments(
        run,
        required=(),
        model_help="pretrained=...,stopper=... (the candidate's)",
        limit_help="documents per task",
        batch_size=None,
    )
    run.add_argument("--output", "-o", help="a folder that keeps the two runs (default: they are thrown away)")
    parser.set_defaults(run=_check)


def _add_report(commands: Any) -> None:
    parser = commands.add_parser(
        "report",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        help="an HTML page with tables and pictures",
        description="One self-contained page and its pictures as PNG and SVG: leaderboard, accuracy against compute,\n"
        "exit layers, and from traces accuracy and features per block. Needs: pip install 'lm-eval-adainfer[report]'",
        epilog="example:\n  adainfer report dense=runs/dense svm=runs/svm --traces traces/ -o report/",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help=_RUN + "; the first is the baseline")
    parser.add_argument("--traces", metavar="FOLDER", help="of adainfer trace, of the same model")
    parser.add_argument("--output", "-o", required=True, help="the folder for the page and the pictures")
    parser.add_argument("--title", default="Early exit, measured", help="of the page")
    _tasks(parser)
    _matching(parser)
    parser.set_defaults(run=_report)


def _compare(arguments: argparse.Namespace) -> int:
    from lm_eval_adainfer import container
    from lm_eval_adainfer.comparison import runs
    from lm_eval_adainfer.comparison.compare import compare
    from lm_eval_adainfer.output import comparisons

    if len(arguments.runs) < 2:
        raise AdaInferError("runs: one run has nothing to be compared with; give two or more")
    baseline, *others = runs.load_all(arguments.runs, "runs", selection=_selection(arguments))
    found = [compare(baseline, r, None, bool(arguments.other_prompts), arguments.seed) for r in others]
    text = comparisons.render(found, arguments.format)
    if arguments.output:
        container.write_atomically(Path(arguments.output), (text + "\n").encode("utf-8", "replace"))
    else:
        _show(text)
    return 0


def _check(arguments: argparse.Namespace) -> int:
    _from_config(arguments)
    if arguments.run_both:
        if not arguments.model_args or not arguments.tasks:
            raise AdaInferError("run: it needs --model_args and --tasks; see adainfer check --help")
        if arguments.candidate:
            raise AdaInferError("candidate: --run makes the candidate itself; leave out one of the two")
        if arguments.limit is not None and arguments.limit < 1:
            raise AdaInferError(f"limit: {arguments.limit} documents are none; give 1 or more")
    elif not arguments.baseline or not arguments.candidate:
        raise AdaInferError("check: it needs --baseline and --candidate, or --run; see adainfer check --help")
    if arguments.max_drop is None and not arguments.reproduces:
        raise AdaInferError("max-drop: it is missing; --max-drop 0.01 allows a drop of one point")
    selection = _selection(arguments)
    if not arguments.run_both:
        return _judge(arguments, selection)
    selection = _selection_to_run(arguments, selection)
    from lm_eval_adainfer.comparison import running

    asked = asking.Asking.of(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        arguments.baseline, arguments.candidate = running.run_both(
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
        return _judge(arguments, selection)


def _selection_to_run(arguments: argparse.Namespace, selection: Any) -> Any:
    """What is compared of the runs that ``--run`` makes of ``--tasks``: all of it, so names are lm-eval's, tags too.

    Raises:
        AdaInferError: On a name in the other options that lm-eval does not know, before anything runs.
    """
    from dataclasses import replace

    named = {*selection.exclude, *(w.tasks for w in selection.wanted if w.tasks)}
    if named:
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_path=arguments.include_path)
        for name in sorted(named):
            if not manager.match_tasks([name]):
                raise AdaInferError(f"check: {name!r} in --exclude or --metric is no task or group that lm-eval knows")
    return replace(selection, tasks=())


def _judge(arguments: argparse.Namespace, selection: Any) -> int:
    import json
    from dataclasses import replace

    from lm_eval_adainfer.comparison import check, gate, runs
    from lm_eval_adainfer.comparison.compare import POOLED, pool_of
    from lm_eval_adainfer.comparison.matching import match
    from lm_eval_adainfer.output import verdicts

    if arguments.run_both:  # of a baseline that was there before, the tasks that have just been run
        candidate = runs.load(arguments.candidate, "candidate", selection=selection)
        its_tasks = replace(selection, tasks=tuple(candidate.tasks))
        baseline = runs.load(arguments.baseline, "baseline", selection=its_tasks)
    else:
        baseline = runs.load(arguments.baseline, "baseline", selection=selection)
        candidate = runs.load(arguments.candidate, "candidate", selection=selection)
    runs.require_known(selection, [baseline, candidate])
    title = f"{candidate.label} against {baseline.label}"
    said = [f"{run.label}: {note}" for run in (baseline, candidate) for note in run.notes]
    reasons: list[str] = []
    other_prompts = bool(arguments.other_prompts)
    if arguments.reproduces:
        found = check.reproduces(baseline, candidate, arguments.tolerance, None, other_prompts)
        status = gate.FAIL if any(c.status == gate.FAIL for c in found) else gate.PASS
        as_json: dict[str, Any] = {"status": status, "checks": [vars(c) for c in found]}
        text = "\n".join([status.upper(), *(f"{c.name}: {c.status} ({c.message})" for c in found)])
    else:
        verdict = gate.judge(
            match(baseline, candidate, None, other_prompts, said),
            pool_of(baseline, arguments.group),
            arguments.max_drop,
            arguments.min_pruning,
            arguments.group or POOLED,
        )
        found, status, as_json = check.cases(verdict), verdict.status, verdict.as_dict()
        said += verdict.notes
        text, reasons = verdicts.text(verdict, baseline.label, candidate.label), verdict.reasons
    notes = [f"note: {note}" for note in said]
    code = check.EXIT[status]
    if status == gate.INCONCLUSIVE:
        code = check.EXIT[arguments.on_inconclusive]
    said_too = [*reasons, *notes]
    verdicts.write_reports(title, found, said_too, arguments.on_inconclusive, arguments.junit, arguments.summary)
    if arguments.format == "json":
        labels = {"baseline_run": baseline.label, "candidate_run": candidate.label}
        _show(json.dumps({**as_json, "notes": said, **labels}, indent=2))
    else:
        _show("\n".join([text, *notes]))
    return code


def _from_config(arguments: argparse.Namespace) -> None:
    """Fill in what the command line left open: from ``--config``, then the defaults."""
    if arguments.config:
        for key, value in _read_config(arguments).items():
            if getattr(arguments, key) is None:
                setattr(arguments, key, value)
    for key, value in _DEFAULTS.items():
        if getattr(arguments, key) is None:
            setattr(arguments, key, value)


def _read_config(arguments: argparse.Namespace) -> dict[str, Any]:
    import yaml

    file, found = arguments.config, {}
    try:
        values = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise AdaInferError(f"config: {file} can't be read: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise AdaInferError(f"config: {file} is no YAML ({' '.join(str(error).split())[:200]})") from None
    if not isinstance(values, dict):
        raise AdaInferError(f"config: {file} holds no options; write lines such as max_drop: 0.01")
    parser = argparse.ArgumentParser()
    _add_check(parser.add_subparsers())
    kinds = {a.dest: a for a in _options(parser) if a.dest not in ("help", "config")}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        name = "run_both" if name == "run" else name
        action = kinds.get(name)
        if action is None:
            raise AdaInferError(f"config: {file} has the unknown key {key!r}; keys are {', '.join(sorted(kinds))}")
        if name in asking.FROM_YAML:
            value, wanted = asking.from_yaml(name, given := value), asking.FROM_YAML[name]
            if value is None:
                raise AdaInferError(f"config: {file}: {key} is {given!r}; it takes {wanted}")
            found[name] = value
            continue
        if action.nargs == 0:
            right, wanted = isinstance(value, bool), "true or false"
        elif key in ("tasks", "exclude", "metric") and isinstance(value, list):
            right, wanted = all(isinstance(v, str) for v in value), "a text or a list of texts"
            value = ",".join(value) if right else value
        elif action.type is float:
            right, wanted = isinstance(value, (int, float)) and not isinstance(value, bool), "a number"
        elif action.type is int:
            right, wanted = isinstance(value, int) and not isinstance(value, bool), "a whole number"
        else:
            value = str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value
            right, wanted = isinstance(value, str), "a text"
        if action.choices and value not in action.choices:
            right, wanted = False, " or ".join(action.choices)
        if not right:
            raise AdaInferError(f"config: {file}: {key} is {value!r}; it takes {wanted}")
        found[name] = value or None if action.nargs == 0 else value
    return found


def _options(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return list(commands.choices["check"]._actions)


def _report(arguments: argparse.Namespace) -> int:
    from lm_eval_adainfer.comparison import runs
    from lm_eval_adainfer.output import report

    report.require()
    found = runs.load_all(arguments.runs, "runs", prompts=True, selection=_selection(arguments))
    page = report.write(
        found, arguments.output, arguments.traces, arguments.title, None, bool(arguments.other_prompts)
    )
    _show(str(page))
    return 0


def _show(text: str) -> None:
    """Print, also where the terminal can't show every character, or would obey it (names come from files)."""
    text = "".join(c if c.isprintable() or c == "\n" else " " for c in text)
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(text.encode(encoding, "replace").decode(encoding), flush=True)
    except BrokenPipeError:  # `| head` has seen enough; the exit status still counts
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
