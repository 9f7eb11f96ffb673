"""Running both sides of a check in one job, through lm-eval's own ``simple_evaluate``."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from lm_eval_adainfer import paths
from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.harness.asking import Asking, key_values


def run_both(
    model_args: str,
    tasks: str,
    output: Path,
    stock_baseline: bool = False,
    include_path: str | None = None,
    baseline: str | None = None,
    asked: Asking | None = None,
    **options: Any,
) -> tuple[str, str]:
    """Evaluate the baseline and the candidate.

    Args:
        model_args: Of the candidate.
        tasks: Names, separated by commas.
        output: The folder; the runs go into ``baseline`` and ``candidate``.
        stock_baseline: Whether the baseline is ``--model hf`` instead of ``stopper=none``.
        include_path: A folder of further task YAMLs.
        baseline: A run that is there already, to use instead.
        asked: Chat template, system instruction and the like; by default none.
        **options: Of ``simple_evaluate``: num_fewshot, limit, batch_size, device.

    Returns:
        Where the two runs lie.

    Raises:
        AdaInferError: On unknown tasks, and on arguments with which no model can be made.
    """
    from lm_eval_adainfer.harness.loading import load_tasks, task_manager
    from lm_eval_adainfer.harness.model import DEMO

    names = [name for name in tasks.split(",") if name]
    asked = asked or Asking()
    candidate_args = key_values(model_args)
    manager = task_manager(candidate_args, include_path, asked.metadata)
    load_tasks(manager, names)  # names what is unknown before a model is loaded
    options |= {
        "apply_chat_template": asked.apply_chat_template,
        "system_instruction": asked.system_instruction,
        "fewshot_as_multiturn": asked.fewshot_as_multiturn,
        "gen_kwargs": dict(asked.gen_kwargs) if asked.gen_kwargs else None,
    }
    if stock_baseline:
        dense = {key: value for key, value in candidate_args.items() if key not in _ours()}
        if dense.get("pretrained", DEMO) == DEMO:
            dense["pretrained"] = str(paths.demo_model())
    else:
        dense = {**candidate_args, "stopper": "none"}
    if baseline is None:
        baseline = str(output / "baseline")
        _evaluate("hf" if stock_baseline else "adainfer", dense, names, baseline, manager, options)
    _evaluate("adainfer", candidate_args, names, str(output / "candidate"), manager, options)
    return baseline, str(output / "candidate")


def _ours() -> set[str]:
    """The model's arguments that stock ``hf`` does not have."""
    from lm_eval.models.huggingface import HFLM

    from lm_eval_adainfer.harness.model import AdaInferLM

    ours, stock = (inspect.signature(cls.__init__).parameters for cls in (AdaInferLM, HFLM))
    return set(ours) - set(stock)


def _evaluate(
    model: str, model_args: dict[str, Any], tasks: list[str], output: str, manager: Any, options: dict[str, Any]
) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.loggers import EvaluationTracker

    tracker = EvaluationTracker(output_path=output)
    try:
        results = simple_evaluate(
            model=model,
            model_args=model_args,
            tasks=tasks,
            task_manager=manager,
            log_samples=True,
            evaluation_tracker=tracker,
            bootstrap_iters=0,
            **options,
        )
    except (AttributeError, OSError, TypeError, ValueError) as error:  # transformers' and lm-eval's words
        if isinstance(error, AdaInferError):
            raise
        raise AdaInferError(f"run: {str(error).splitlines()[0] if str(error) else repr(error)}") from error
    if results is None:
        raise AdaInferError("run: this process is not the main one; run adainfer check --run in a single process")
    samples = results.pop("samples")
    tracker.save_results_aggregated(results=results, samples=samples)
    for task, found in samples.items():
        tracker.save_results_samples(task_name=task, samples=found)
