"""The promise of a calibrated stopper, compared with the run that uses it: where they differ it does not hold.

``adainfer calibrate`` writes into the stopper's file what was promised, and how the calibration documents were asked
(``docs/guarantee.md``). Before an evaluation begins that is put beside the run; what differs is named in one warning,
and stands in the run's record.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from random import Random
from typing import Any

from lm_eval_adainfer.generation.policies import KV_POLICIES
from lm_eval_adainfer.harness.asking import Asking, generation_of

eval_logger = logging.getLogger(__name__)

_SHOWN = 4  # tasks that a sentence names


def check(lm: Any, tasks: Mapping[str, Any], how: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the record of a run says about the promise of its stopper; a difference is warned of, on rank 0.

    Args:
        lm: The ``AdaInferLM``.
        tasks: The evaluation's, by name, as they are when it begins.
        how: The arguments of lm-eval's ``evaluate``, by name.

    Returns:
        ``promise_applies`` and ``promise_differences``; None where the stopper's file holds no promise.
    """
    promise = lm.stopper.info.get("promise")
    if not isinstance(promise, dict):
        return None
    found = differences(promise, lm, tasks, how)
    if found and lm.rank == 0:
        eval_logger.warning(
            "stopper: what its file promises (%s) does not hold for this run: %s; calibrate on documents that are "
            "asked as this run asks them (adainfer trace, then adainfer calibrate), or run it as it was calibrated",
            _said(promise), "; ".join(found),
        )  # fmt: skip
    return {"promise_applies": not found, "promise_differences": found}


def differences(promise: Mapping[str, Any], lm: Any, tasks: Mapping[str, Any], how: Mapping[str, Any]) -> list[str]:
    """In what a run differs from the calibration documents, each in a few words; the file may say anything.

    Args:
        promise: The file's.
        lm: As :func:`check`'s.
        tasks: As :func:`check`'s.
        how: As :func:`check`'s.
    """
    if "checked_blocks" not in promise:
        return ["its file does not tell how the calibration documents were asked, as those of earlier releases"]
    found = [*_of_model(promise, lm), *_of_tasks(promise, tasks), *_of_blocks(promise, lm)]
    if promise.get("reader") != lm.reader.name:
        found.append(f"reader {lm.reader.name} instead of {promise.get('reader')!s:.40}")
    generated = any(task.OUTPUT_TYPE == "generate_until" for task in tasks.values())
    if generated and promise.get("generated") and lm.generation == "early":
        policy, theirs = lm.options.kv_policy, promise.get("kv_policy")  # older promises are about exact caches
        if policy != theirs and not (theirs is None and KV_POLICIES[policy].exact):
            found.append(f"kv_policy {policy} instead of {theirs or 'recompute'!s:.20}")
        settings = promise.get("generation_kwargs")
        if settings is not None and settings != generation_of(tasks):
            found.append("other generation_kwargs")
        for name in ("shortlist", "screen"):
            mine, theirs = getattr(lm.options, name), promise.get(name) or 0
            if mine != theirs:
                found.append(f"head_check {name if mine else 'exact'} instead of {name if theirs else 'exact'}")
    if promise.get("test_size") is not None and (how.get("limit") or how.get("samples")):
        found.append(f"a part of the {promise['test_size']!s:.20} documents that it is about")
    return found + _of_asking(promise, lm, how)


def _of_model(promise: Mapping[str, Any], lm: Any) -> list[str]:
    loosest = promise.get("thresholds")
    own = getattr(lm.stopper, "threshold", None)
    if isinstance(loosest, list) and loosest and isinstance(loosest[0], float) and own is not None and own < loosest[0]:
        return [f"threshold {own:.6g}, looser than {loosest[0]:.6g}"]
    if (promise.get("n_blocks"), promise.get("head_hash")) != (lm.n_blocks, lm.anatomy.head_hash()):
        return ["another model"]
    if promise.get("dtype") not in (None, str(lm._dtype())):
        return [f"dtype {lm._dtype()} instead of {promise['dtype']!s:.20}"]
    if promise.get("weights_hash") not in (None, lm.anatomy.weights_hash()):
        return ["other weights"]
    return []


def _of_tasks(promise: Mapping[str, Any], tasks: Mapping[str, Any]) -> list[str]:
    shots = promise.get("shots")
    if not isinstance(shots, dict):
        return ["its file does not tell the tasks"]
    found = []
    if others := sorted(set(tasks) - set(shots)):
        found.append(f"tasks that were not calibrated on ({_listed(others)})")
    if missing := sorted(set(shots) - set(tasks)):
        found.append(f"without tasks that were calibrated on ({_listed(missing)}), and it is about their pool")
    common = [name for name in tasks if name in shots]
    asked = {name: tasks[name].get_config("num_fewshot") or 0 for name in common}
    if different := [name for name in common if asked[name] != shots[name]]:
        first = different[0]
        more = f" in {_listed(different)}"
        found.append(f"{asked[first]} shots instead of {shots[first]!s:.10}{more}")
    seeds = promise.get("fewshot_seed")
    if isinstance(seeds, list) and seeds:
        states = [Random(seed).getstate() for seed in seeds if isinstance(seed, int)]
        drawn = [name for name in common if asked[name]]
        if any(_state(tasks[name]) not in states for name in drawn):
            found.append(f"another fewshot_seed than {', '.join(f'{seed!s:.20}' for seed in seeds[:_SHOWN])}")
    return found


def _state(task: Any) -> Any:
    """Of the generator with which a task draws shots, which tells the seed that it was given before the run."""
    generator = getattr(task, "fewshot_rnd", None)
    return None if generator is None else generator.getstate()


def _of_blocks(promise: Mapping[str, Any], lm: Any) -> list[str]:
    theirs, mine = promise["checked_blocks"], list(lm.schedule.blocks)
    if theirs == mine or not isinstance(theirs, list) or not all(isinstance(k, int) for k in theirs):
        return [] if theirs == mine else ["its file does not tell the checked blocks"]
    found, least = [], promise.get("min_layer")
    first = max(lm.schedule.min_layer, least) if isinstance(least, int) else 1
    if least != lm.schedule.min_layer:
        found.append(f"min_layer {lm.schedule.min_layer} instead of {least!s:.10}")
    if [k for k in theirs if k >= first] != [k for k in mine if k >= first]:
        blocks = f"{'+'.join(map(str, mine)):.60}"
        found.append(f"check_layers that leave {blocks} instead of {promise.get('check_layers')!s:.60}")
    return found


def _of_asking(promise: Mapping[str, Any], lm: Any, how: Mapping[str, Any]) -> list[str]:
    template = how.get("apply_chat_template") or False
    asked = Asking(
        apply_chat_template=template,
        system_instruction=how.get("system_instruction") or None,
        fewshot_as_multiturn=bool(how.get("fewshot_as_multiturn")) if template else None,
    )
    mine = asked.identity(lm, "multiple_choice")
    found = []
    if mine["chat_template"] != promise.get("chat_template"):
        found.append(
            "a chat template, without which the calibration documents were asked" if not promise.get("chat_template")
            else "another chat template" if mine["chat_template"] else "no chat template"
        )  # fmt: skip
    elif mine["fewshot_as_multiturn"] != promise.get("fewshot_as_multiturn"):
        found.append(f"fewshot_as_multiturn {mine['fewshot_as_multiturn']}")
    if mine["system_instruction"] != promise.get("system_instruction"):
        found.append("another system_instruction")
    return found


def _said(promise: Mapping[str, Any]) -> str:
    most, sure, loss = (promise.get(key) for key in ("max_drop", "confidence", "loss"))
    return f"{loss!s:.20}: at most {most!s:.10} lost at a confidence of {sure!s:.10}"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
