"""Running both sides of a check in one job, through lm-eval's own ``simple_evaluate``."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lm_eval_adainfer import paths
from lm_eval_adainfer.comparison.selection import listing
from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.harness.asking import Asking, key_values

_SCORED = ("loglikelihood", "multiple_choice")  # the output types whose requests a pass answers for both sides


@dataclass
class Made:
    """Two runs that were made.

    Attributes:
        baseline: Where it lies.
        candidate: Where it lies.
        said: How they were made, a sentence each.
        places: Task and document to its place in the order in which documents came; None where all were run.
    """

    baseline: str
    candidate: str
    said: list[str] = field(default_factory=list)
    places: dict[tuple[str, int], int] | None = None


@dataclass
class Sides:
    """The models of both sides.

    Attributes:
        baseline: The dense one.
        candidate: The one that exits early.
        passes: What hands the dense answers of the candidate's passes to the baseline; None where each runs by itself.
        said: How they are run, in a sentence.
    """

    baseline: Any
    candidate: Any
    passes: Any
    said: str


def run_both(
    model_args: str,
    tasks: str,
    output: Path,
    stock_baseline: bool = False,
    include_path: str | None = None,
    baseline: str | None = None,
    asked: Asking | None = None,
    **options: Any,
) -> Made:
    """Evaluate the candidate, and the baseline in the same pass where that is the same model dense.

    Args:
        model_args: Of the candidate.
        tasks: Names, separated by commas.
        output: The folder; the runs go into ``baseline`` and ``candidate``.
        stock_baseline: Whether the baseline is ``--model hf`` instead of ``stopper=none``.
        include_path: A folder of further task YAMLs.
        baseline: A run that is there already, to use instead.
        asked: Chat template, system instruction and the like; by default none.
        **options: Of ``simple_evaluate``: num_fewshot, limit, batch_size, device.

    Raises:
        AdaInferError: On unknown tasks, and on arguments with which no model can be made.
    """
    from lm_eval_adainfer.harness.loading import load_tasks, task_manager
    from lm_eval_adainfer.harness.one_pass import dense_args

    names = [name for name in tasks.split(",") if name]
    asked, candidate_args = asked or Asking(), key_values(model_args)
    manager = task_manager(candidate_args, include_path, asked.metadata, names)
    loaded = load_tasks(manager, names)  # names what is unknown before a model is loaded
    options |= settings_of(asked)
    made = Made(str(output / "baseline") if baseline is None else baseline, str(output / "candidate"))
    dense = stock_args(candidate_args) if stock_baseline else dense_args(candidate_args)
    why = not_in_one_pass(candidate_args, loaded, stock_baseline, baseline is not None)
    made.said.append(why or one_pass_said(loaded))
    if why:
        if baseline is None:
            _evaluate("hf" if stock_baseline else "adainfer", dense, names, made.baseline, manager, options)
        _evaluate("adainfer", candidate_args, names, made.candidate, manager, options)
        return made
    sides = load_sides(candidate_args, loaded, options.get("device"), options.get("batch_size"))
    _evaluate(sides.candidate, candidate_args, names, made.candidate, manager, options)
    _evaluate(sides.baseline, dense, names, made.baseline, manager, options)
    return made


def load_sides(
    candidate_args: Mapping[str, Any], tasks: Mapping[str, Any], device: str | None, batch_size: str | int | None
) -> Sides:
    """The models of both sides: one whose passes answer for both where that can be, else two.

    Args:
        candidate_args: The candidate's arguments.
        tasks: By name.
        device: As lm-eval's.
        batch_size: As lm-eval's.

    Raises:
        AdaInferError: On arguments with which no model can be made.
    """
    from lm_eval_adainfer.harness.loading import load_model
    from lm_eval_adainfer.harness.one_pass import OnePass, dense_args

    more = {} if batch_size is None else {"batch_size": batch_size}
    # all documents are answered dense, too, so that there is nothing for a pilot to find out
    candidate = load_model(json.dumps({"pilot": 0, **candidate_args}), device, **more)
    if why := not_in_one_pass(candidate_args, tasks):
        return Sides(load_model(json.dumps(dense_args(candidate_args)), device, **more), candidate, None, why)
    passes = OnePass(candidate)
    return Sides(passes.dense, candidate, passes, one_pass_said(tasks))


def not_in_one_pass(
    candidate_args: Mapping[str, Any], tasks: Mapping[str, Any], stock: bool = False, there: bool = False
) -> str:
    """Why one pass can't answer for both sides, in a sentence; empty where it can.

    Args:
        candidate_args: The candidate's arguments.
        tasks: By name.
        stock: Whether the baseline is ``--model hf``.
        there: Whether it is a run that is there already.

    Raises:
        AdaInferError: On a stopper that makes no sense.
    """
    from lm_eval_adainfer.harness.one_pass import hindered

    if there:
        return "the candidate alone was run, since the baseline was there already"
    if stock:
        return "each side was run by itself, since the baseline is another model type (hf)"
    if why := hindered(candidate_args):
        return f"each side was run by itself, since {why}"
    if not any(task.OUTPUT_TYPE in _SCORED for task in tasks.values()):
        return "each side was run by itself, since one pass answers for both in loglikelihood tasks alone"
    return ""


def one_pass_said(tasks: Mapping[str, Any]) -> str:
    """That one pass answered for both sides, and for which tasks it did not."""
    said = "one pass gave both sides' answers, so that neither side has seconds of its own"
    if apart := [name for name, task in tasks.items() if task.OUTPUT_TYPE not in _SCORED]:
        said += f"; the texts of {listing(apart)} were run for each side by itself"
    return said


def settings_of(asked: Asking) -> dict[str, Any]:
    """How documents are asked, as ``simple_evaluate`` takes it."""
    return {
        "apply_chat_template": asked.apply_chat_template,
        "system_instruction": asked.system_instruction,
        "fewshot_as_multiturn": asked.fewshot_as_multiturn,
        "gen_kwargs": dict(asked.gen_kwargs) if asked.gen_kwargs else None,
    }


def stock_args(candidate_args: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with which ``--model hf`` is the same model."""
    from lm_eval_adainfer.harness.model import DEMO

    dense = {key: value for key, value in candidate_args.items() if key not in _ours()}
    if dense.get("pretrained", DEMO) == DEMO:
        dense["pretrained"] = str(paths.demo_model())
    return dense


def evaluated(**options: Any) -> dict[str, Any]:
    """lm-eval's ``simple_evaluate``, of this process alone, with samples; its errors are one sentence.

    Raises:
        AdaInferError: On what transformers or lm-eval can't do, and in a process that is not the main one.
    """
    from lm_eval import simple_evaluate

    with _one_sentence():
        found: dict[str, Any] | None = simple_evaluate(log_samples=True, bootstrap_iters=0, **options)
    if found is None:
        raise AdaInferError("run: this process is not the main one; run adainfer check --run in a single process")
    return found


@contextmanager
def _one_sentence() -> Iterator[None]:
    """Transformers' and lm-eval's words for what went wrong, in one sentence."""
    try:
        yield
    except (AttributeError, OSError, TypeError, ValueError) as error:
        if isinstance(error, AdaInferError):
            raise
        raise AdaInferError(f"run: {str(error).splitlines()[0] if str(error) else repr(error)}") from error


def _ours() -> set[str]:
    """The model's arguments that stock ``hf`` does not have."""
    from lm_eval.models.huggingface import HFLM

    from lm_eval_adainfer.harness.model import AdaInferLM

    ours, stock = (inspect.signature(cls.__init__).parameters for cls in (AdaInferLM, HFLM))
    return set(ours) - set(stock)


def _evaluate(
    model: Any, model_args: dict[str, Any], tasks: Sequence[str], output: str, manager: Any, options: dict[str, Any]
) -> None:
    """Evaluate a model, or a model type with these arguments, and write the run as ``lm_eval`` does."""
    from lm_eval.loggers import EvaluationTracker

    tracker = EvaluationTracker(output_path=output)
    results = evaluated(
        model=model, model_args=model_args, tasks=list(tasks), task_manager=manager, evaluation_tracker=tracker,
        **options,
    )  # fmt: skip
    if not isinstance(model, str):
        results["config"]["model"] = tracker.general_config_tracker.model_source = "adainfer"
    samples = results.pop("samples")
    tracker.save_results_aggregated(results=results, samples=samples)
    for task, found in samples.items():
        tracker.save_results_samples(task_name=task, samples=found)
