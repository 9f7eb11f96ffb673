"""A dense pass over documents that records what every block would have said: the data that stoppers are fitted on.

One instance of a trace (``file.py`` describes what it holds) is one decision: a document's distinct context, or a
token of a generated text.

While a file is being made, its finished documents lie in parts beside it (a folder, removed at the end), so a killed
run goes on from there.
"""

from __future__ import annotations

import logging
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from lm_eval_adainfer import container
from lm_eval_adainfer._version import __version__
from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.harness.asking import Asking
from lm_eval_adainfer.harness.identity import generation_settings, tokenizer_hash
from lm_eval_adainfer.readers.base import HEAD
from lm_eval_adainfer.tasks.qa import stable_hash
from lm_eval_adainfer.traces import clustering
from lm_eval_adainfer.traces.file import OUTPUT_TYPES, VERSION, not_finite, read
from lm_eval_adainfer.traces.plan import Plan, estimate
from lm_eval_adainfer.traces.recorders import Recorder, TextRecorder, arrays_of, text_arrays_of
from lm_eval_adainfer.traces.splits import SPLITS, documents_of
from lm_eval_adainfer.traces.views import readers_of

if TYPE_CHECKING:
    from lm_eval_adainfer.harness.model import AdaInferLM

PART_DOCUMENTS = 128  # a killed run loses at most so many finished ones
_logger = logging.getLogger(__name__)


def trace(
    lm: AdaInferLM,
    tasks: dict[str, Any],
    output: str | Path,
    num_fewshot: int | Sequence[int] | None = None,
    split: str = "train",
    limit: int | Mapping[str, int] | None = None,
    seed: int = 0,
    fewshot_seed: int = 1234,
    asked: Asking | None = None,
    plan: Plan | None = None,
    cluster: clustering.Wanted = (),
) -> list[Path]:
    """Trace tasks, a file for each and each number of shots; what an earlier, equal call finished is kept.

    Args:
        lm: The model; its stopper does not matter.
        tasks: Name to lm-eval task, as ``TaskManager.load(...)["tasks"]``.
        output: The folder.
        num_fewshot: Shots per document, or several such numbers; None takes the task's own.
        split: Of ``splits.SPLITS``. A fixed hash divides the task's training documents into ``train`` and
            ``calibrate``, and ``test`` are its evaluation documents; where it has no training split, the hash divides
            these into all three.
        limit: At most so many documents of each task, or of a task by its name, drawn with ``seed``.
        seed: Of that draw.
        fewshot_seed: Of the shots, as ``lm_eval``'s.
        asked: Chat template, system instruction and the like; by default none.
        plan: Which readers are recorded, after which blocks; by default the head alone.
        cluster: Tasks and the fields (``clusters.parse``) that say which of their documents belong together.

    Returns:
        The files.

    Raises:
        AdaInferError: On a task that can't be traced, or a file there that an unequal call made.
    """
    limits: Mapping[str, int | None] = limit if isinstance(limit, Mapping) else dict.fromkeys(tasks, limit)
    check_arguments(split, min((n for n in limits.values() if n is not None), default=None), num_fewshot)
    for name, task in tasks.items():
        if task.OUTPUT_TYPE not in OUTPUT_TYPES:
            raise AdaInferError(f"tasks: {name} is a {task.OUTPUT_TYPE} task; traced are {', '.join(OUTPUT_TYPES)}")
    clustering.require_known(cluster, tasks)
    asked, plan = asked or Asking(), plan or Plan.of(lm.anatomy)
    for name, task in tasks.items():
        if task.OUTPUT_TYPE == "generate_until":
            plan.require_texts(name)
    plan = plan.ready(lm)
    files: list[Path] = []
    model = model_identity(lm)
    numbers = list(num_fewshot) if isinstance(num_fewshot, Sequence) else [num_fewshot]
    for number in numbers:
        for name, task in tasks.items():
            shots = number if number is not None else task.get_config("num_fewshot") or 0
            path = Path(output) / f"{name}_{shots}shot_{split}.trace"
            files.append(path)
            if len(numbers) > 1:
                _logger.info("%s: file %d of %d", path, len(files), len(numbers) * len(tasks))
            with documents_of(task, name, split, limits[name], seed, shots) as doc_ids:
                task.set_fewshot_seed(seed=fewshot_seed)
                asked.build_requests(lm, task)
                instances = _traced_instances(task, name)
                docs = task.test_docs()
                field, belongs = clustering.numbers(docs, name, cluster)
                identity = {
                    **model,
                    "task": name,
                    "output_type": task.OUTPUT_TYPE,
                    "task_version": str(task.VERSION),
                    "num_fewshot": shots,
                    "split": split,
                    "limit": limits[name],
                    "seed": seed,
                    "fewshot_seed": fewshot_seed,
                    **asked.identity(lm, task.OUTPUT_TYPE),
                    "readers": plan.names,
                    "hidden": plan.hidden,
                    "cluster": field,
                    "requests": f"{stable_hash(*(text for i in instances for text in i.args)):x}"[:16],
                }
                if path.exists():
                    # older files do not tell clusters, which is asked for only where a field is named
                    unnamed = None if clustering.field_of(cluster, name) else field
                    found = {"hidden": False, "cluster": unnamed, **read(path)[0]}
                    found["readers"] = readers_of(found)
                    different = [key for key, value in identity.items() if found.get(key) != value]
                    if different:
                        raise AdaInferError(
                            f"output: {path} was made with other settings ({different[0]} was "
                            f"{found.get(different[0])!r}, not {identity[different[0]]!r}); give another folder"
                        )
                    _logger.info("%s is there already, made with the same settings", path)
                    shutil.rmtree(_parts_folder(path), ignore_errors=True)
                    continue
                _say_estimate(lm, plan, instances, path)
                arrays = _in_parts(lm, task, name, instances, path, identity, doc_ids, plan)
                if field is not None:
                    of = dict(zip(doc_ids, belongs, strict=True))
                    arrays["cluster"] = np.array([of[i] for i in arrays["doc_id"].tolist()], dtype=np.int64)
            meta = {
                **identity,
                **plan.extra_meta(),
                "features": list(plan.features),
                "documents": len(doc_ids),
                "block_hidden_size": lm.anatomy.block_hidden_size,
                "version": __version__,
            }
            whole = _parts_folder(path) / "whole"  # there, what a kill leaves half written is removed with the parts
            container.write(whole, "trace", VERSION, meta, arrays)
            whole.replace(path)
            shutil.rmtree(_parts_folder(path), ignore_errors=True)
    return files


def _say_estimate(lm: AdaInferLM, plan: Plan, instances: Sequence[Any], path: Path) -> None:
    if not instances:
        return
    found = estimate(lm, plan, instances)
    kind = "at most" if instances[0].request_type == "generate_until" else "about"
    size = f"{found.size / 1e6:,.1f} MB" if found.size >= 1e5 else f"{found.size / 1e3:,.1f} KB"
    _logger.info(
        "%s: recording is %s %.2f times the work of a dense pass (counted), and a file of %s %s",
        path, kind, found.work, kind, size,
    )  # fmt: skip


def _traced_instances(task: Any, name: str) -> list[Any]:
    """The requests that a task's file holds: where documents mix kinds, those of the task's own output type.

    Raises:
        AdaInferError: Where it has none of these.
    """
    kind = "generate_until" if task.OUTPUT_TYPE == "generate_until" else "loglikelihood"
    chosen = [i for i in task.instances if i.request_type == kind]
    others = ", ".join(sorted({i.request_type for i in task.instances} - {kind}))
    if others and not chosen:
        raise AdaInferError(
            f"tasks: {name} is a {task.OUTPUT_TYPE} task, but its documents make {others} requests alone, so there is "
            "nothing of its kind to trace"
        )
    if others:
        _logger.warning("tasks: documents of %s also make %s requests; only those of %s are traced", name, others, kind)
    return chosen


def _parts_folder(path: Path) -> Path:
    return path.with_name(f"{path.name}.parts")


def _in_parts(
    lm: AdaInferLM,
    task: Any,
    name: str,
    asked: Sequence[Any],
    path: Path,
    identity: dict[str, Any],
    doc_ids: Sequence[int],
    plan: Plan,
) -> dict[str, np.ndarray]:
    """Arrays of a task's documents, made and kept so many at a time; parts that an equal call left are taken over."""
    by_document: dict[int, list[Any]] = defaultdict(list)
    for instance in asked:
        by_document[instance.doc_id].append(instance)
    order = list(by_document)
    parts: list[dict[str, np.ndarray]] = []
    warned = False
    bar = tqdm(total=len(order), desc=f"Tracing {path.stem}", unit="doc", disable=lm.rank != 0)
    with bar as progress, lm.identified():  # the weights are read once, and not for every part
        for start in range(0, len(order), PART_DOCUMENTS):
            chosen = order[start : start + PART_DOCUMENTS]
            file = _parts_folder(path) / f"{start:08d}.part"
            mine = {**identity, "documents": chosen}
            found = read_part(file, mine)
            if found is None:
                instances = [i for doc in chosen for i in by_document[doc]]
                found = _record(lm, task, instances, doc_ids, plan, progress)
                container.write(file, "part", VERSION, mine, found)
            else:
                progress.update(len(chosen))
            if len(found["top_token"]):
                parts.append(found)
                if not warned and (odd := _first_odd(found, plan)):
                    warned = True
                    _logger.warning(
                        "traces: %s will hold NaN or infinite %s (from block %d on), and fit, calibrate and "
                        "replay refuse such a trace; trace in a dtype that does not overflow",
                        path, *odd,
                    )  # fmt: skip
    if not parts:
        why = "generated no token" if task.OUTPUT_TYPE == "generate_until" else "has no document with a context"
        raise AdaInferError(f"tasks: {name} {why}, so there is no decision to trace")
    width = max(part["request"].shape[1] for part in parts)
    for part in parts:  # documents of one part may have fewer requests than those of another
        more = width - part["request"].shape[1]
        nothing = {"request": -1, "right": 0, "scores": np.nan, "greedy": 0}
        for key in [key for key in part if key.rpartition("/")[2] in nothing]:
            space = [(0, 0)] * (part[key].ndim - 1) + [(0, more)]
            part[key] = np.pad(part[key], space, constant_values=nothing[key.rpartition("/")[2]])
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def _first_odd(found: dict[str, np.ndarray], plan: Plan) -> tuple[str, int] | None:
    """What of a part is NaN or infinite, and after which block for the first time; None where nothing is."""
    for reader, blocks in plan.readers:
        is_head = reader.same(HEAD)
        values = found["features" if is_head else f"{reader.name}/features"]
        odd = not_finite(values, plan.features if is_head else plan.reader_features).any(axis=(0, 2))
        if odd.any():
            return "features", blocks[odd.argmax()]
    if plan.hidden and (odd := ~np.isfinite(found["hidden"]).all(axis=(0, 2))).any():
        return "float16 states", int(odd.argmax()) + 1
    return None


def read_part(file: Path, identity: dict[str, Any]) -> dict[str, np.ndarray] | None:
    """The arrays of a part that an equal call finished; None where there is none, or another call's."""
    if not file.exists():
        return None
    try:
        found, arrays = container.read(file, "part", VERSION, "output")
    except AdaInferError:
        return None
    return arrays if found == identity else None


def _record(
    lm: AdaInferLM, task: Any, instances: Sequence[Any], doc_ids: Sequence[int], plan: Plan, progress: Any
) -> dict[str, np.ndarray]:
    """Arrays of some documents' instances."""
    if task.OUTPUT_TYPE == "generate_until":
        texts = TextRecorder(lm, plan)
        with lm.observed_texts(texts):
            lm.generate_until(list(instances), disable_tqdm=True)
        records = texts.records(instances)
        progress.update(len({i.doc_id for i in instances}))
        return text_arrays_of(records, doc_ids, plan)
    recorder = Recorder(lm, plan, progress)
    with lm.engine.observed(recorder):
        lm.loglikelihood(list(instances), disable_tqdm=True)
    return arrays_of(task, recorder, instances, doc_ids, plan)


def check_arguments(split: str, limit: int | None, num_fewshot: int | Sequence[int] | None) -> None:
    """Raise AdaInferError where these make no sense; no model is needed for that."""
    if split not in SPLITS:
        raise AdaInferError(f"split: {split!r} is none of {', '.join(SPLITS)}")
    if limit is not None and limit < 1:
        raise AdaInferError(f"limit: {limit} documents are none; give 1 or more")
    shots = [num_fewshot] if isinstance(num_fewshot, int) else num_fewshot or []
    if num_fewshot is not None and not shots:
        raise AdaInferError("num_fewshot: no number is given; give 5, say, or 0,5,10")
    for number in shots:
        if number < 0:
            raise AdaInferError(f"num_fewshot: {number} is negative; give 0 or more")
    if len(set(shots)) < len(shots):
        raise AdaInferError(f"num_fewshot: {','.join(map(str, shots))} names a number twice; give each once")


def model_identity(lm: AdaInferLM) -> dict[str, Any]:
    """What a trace or a stopper says about its model."""
    return {
        "model": lm._model_name(),
        "n_blocks": lm.anatomy.n_blocks,
        "head_hash": lm.anatomy.head_hash(),
        "weights_hash": lm.anatomy.weights_hash(),
        "tokenizer_hash": tokenizer_hash(lm.tokenizer),
        "generation_config": generation_settings(lm.model),
        "max_length": lm.max_length,
        "dtype": str(lm._dtype()),
        "autocast": str(lm.mixed_precision_dtype),
        "add_bos_token": str(lm.add_bos_token),
        "hidden_size": lm.anatomy.hidden_size,
        "vocab_size": lm.anatomy.vocab_size,
        "block_weights": lm.anatomy.block_weights,
    }
