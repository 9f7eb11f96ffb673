"""``stopper=auto``: the stopper that was tuned for this model, these tasks and these shots, among files in a folder.

``adainfer tune`` writes into a stopper's file what it was tuned for (:func:`described`). When an evaluation begins, and
before its fingerprint is derived, the one file that says the same is taken.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.harness.asking import Asking, generation_of
from lm_eval_adainfer.harness.identity import tokenizer_hash
from lm_eval_adainfer.harness.options import Options
from lm_eval_adainfer.readers import specs as readers
from lm_eval_adainfer.readers.base import Reader
from lm_eval_adainfer.strategies import files
from lm_eval_adainfer.strategies.base import Stopper

eval_logger = logging.getLogger(__name__)
NAME = "auto"
_KV_POLICY, _READER = 2, 6  # their places among ``Auto.others``


def described(
    lm: Any, asked: Asking, shots: Mapping[str, int], reader: Reader, blocks: Sequence[int]
) -> dict[str, Any]:
    """What a tuned stopper's file says about what it was tuned for, JSON-serialisable.

    Args:
        lm: The ``AdaInferLM``.
        asked: How documents are asked.
        shots: Task to number of shots.
        reader: Under which it is asked.
        blocks: After which it is asked.
    """
    return {**_model(lm), **_how(lm, asked), "shots": dict(shots), "reader": reader.name, "check_layers": list(blocks)}


@dataclass(frozen=True)
class Auto:
    """What ``stopper=auto`` knows before the tasks are.

    Attributes:
        folders: In which files are looked for, and whether what lies there came with the model.
        min_layer: As the model's argument.
        check_layers: As the model's argument; None takes what the file says.
        others: The further arguments of ``Options.read``.
    """

    folders: tuple[tuple[Path, bool], ...]
    min_layer: Any
    check_layers: Any
    others: tuple[Any, ...]

    @classmethod
    def of(
        cls, stopper: Any, stopper_dir: Any, pretrained: Any, min_layer: Any, check_layers: Any, others: tuple[Any, ...]
    ) -> Auto | None:
        """None where the stopper is another.

        Raises:
            AdaInferError: On a folder that does not exist, or is given with another stopper.
        """
        if not isinstance(stopper, str) or stopper.strip() != NAME:
            if stopper_dir is not None:
                raise AdaInferError("stopper_dir: it goes with stopper=auto; give that, or leave it out")
            return None
        if stopper_dir is None:
            return cls(_usual_folders(pretrained), min_layer, check_layers, others)
        folder = Path(str(stopper_dir))
        if not folder.is_dir():
            raise AdaInferError(f"stopper_dir: {folder} is no folder; give the one that adainfer tune -o wrote")
        own = any(came and folder.resolve() == place.resolve() for place, came in _usual_folders(pretrained))
        return cls(((folder, own),), min_layer, check_layers, others)

    def waiting(self) -> tuple[Any, ...]:
        """Arguments of ``Options.read`` until the stopper is known."""
        return "none", *self.others

    def options(self, path: Path, stopper: Stopper) -> Options:
        """The options with a file's stopper, and with the KV policy for which it was tuned unless another is given."""
        others, policy = list(self.others), stopper.info["tuned"].get("kv_policy")
        if others[_KV_POLICY] is None and policy is not None:
            others[_KV_POLICY] = policy
        return Options.read(str(path), *others)

    def find(self, lm: Any, tasks: Mapping[str, Any], how: Mapping[str, Any]) -> tuple[Path, Stopper, list[int]]:
        """The file that was tuned for what an evaluation asks, its stopper, and after which blocks that is asked.

        Args:
            lm: The ``AdaInferLM``.
            tasks: The evaluation's, by name.
            how: The arguments of lm-eval's ``evaluate``, by name.

        Raises:
            AdaInferError: Where there is none, or more than one.
        """
        template = how.get("apply_chat_template") or False
        turns = bool(how.get("fewshot_as_multiturn")) if template else None
        asked = Asking(template, how.get("system_instruction") or None, turns)
        shots = {name: int(task.get_config("num_fewshot") or 0) for name, task in tasks.items()}
        wanted = {**_model(lm), **_how(lm, asked), "shots": shots}
        if generation := generation_of(tasks):
            wanted["generation_kwargs"] = generation
        if self.others[_READER] is not None:
            wanted["reader"] = readers.parse(self.others[_READER]).name
        found = [
            (path, stopper, came)
            for folder, came in self.folders
            for path, stopper in _tuned(folder)
            if all(stopper.info["tuned"].get(key) == value for key, value in wanted.items())
        ]
        what = ", ".join(f"{name} at {number} shots" for name, number in shots.items())
        if not found:
            places = ", ".join(str(folder) for folder, _ in self.folders)
            raise AdaInferError(
                f"stopper: auto finds none in {places} that was tuned for this model and exactly {what:.300}; make one "
                "with adainfer tune ... -o FOLDER and give stopper_dir=FOLDER"
            )
        if len(found) > 1:
            raise AdaInferError(
                f"stopper: auto finds {len(found)} that were tuned for {what:.300}: "
                f"{', '.join(str(path) for path, *_ in found)}; give one of them as stopper="
            )
        path, stopper, came = found[0]
        if came:
            eval_logger.warning(f"stopper: auto takes {path}, which lies in the model's own folder and came with it")
        else:
            eval_logger.info(f"stopper: auto takes {path}")
        return path, stopper, [int(k) for k in stopper.info["tuned"]["check_layers"]]


def cache_folder() -> Path:
    """Where a user keeps tuned stoppers."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lm_eval_adainfer"


def _usual_folders(pretrained: Any) -> tuple[tuple[Path, bool], ...]:
    """The model's own folder, where it has one on this machine, and the user's cache."""
    own: list[tuple[Path, bool]] = []
    if isinstance(pretrained, (str, os.PathLike)):
        place = Path(pretrained)
        if place.is_dir():
            own = [(place, True)]
        elif (snapshot := _snapshot(str(pretrained))) is not None:
            own = [(snapshot, True)]
    return *own, (cache_folder(), False)


def _snapshot(name: str) -> Path | None:
    """The folder of a model that the hub gave."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def _tuned(folder: Path) -> list[tuple[Path, Stopper]]:
    """The tuned stoppers of a folder; what can't be read is passed over with a word."""
    found = []
    for path in sorted(folder.glob("*.stopper")):
        try:
            stopper = files.load(path)
        except AdaInferError as error:
            eval_logger.warning(f"stopper: auto passes {path} over ({error})")
            continue
        about = stopper.info.get("tuned")
        if isinstance(about, dict) and isinstance(about.get("shots"), dict) and _are_blocks(about.get("check_layers")):
            found.append((path, stopper))
    return found


def _are_blocks(given: Any) -> bool:
    return isinstance(given, list) and bool(given) and all(type(k) is int for k in given)


def _model(lm: Any) -> dict[str, Any]:
    """What has to be the same of the model."""
    return {
        "n_blocks": lm.anatomy.n_blocks,
        "head_hash": lm.anatomy.head_hash(),
        "weights_hash": lm.anatomy.weights_hash(),
        "tokenizer_hash": tokenizer_hash(lm.tokenizer),
    }


def _how(lm: Any, asked: Asking) -> dict[str, Any]:
    """What has to be the same of how documents are asked, besides their shots."""
    found = asked.identity(lm, "multiple_choice")
    return {key: found[key] for key in ("chat_template", "system_instruction", "fewshot_as_multiturn")}
