"""What is wrong with the arguments of the model type, each in one sentence, before and after HFLM loads the model.

Nobody else would miss some: HFLM swallows misspelt ones, and those that a model object has no use for.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Mapping
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils_hf import get_dtype

from lm_eval_adainfer import paths
from lm_eval_adainfer.errors import AdaInferError, nearest
from lm_eval_adainfer.structure import unwrapping

DEMO = "adainfer-demo"
_logger = logging.getLogger(__name__)

# HFLM's arguments (lm-eval 0.4.13) that only act while a model is loaded by its name, and what to do instead
_LOADING = {
    "peft": "put the adapter on the model yourself, with peft.PeftModel.from_pretrained",
    "delta": "add the delta weights yourself",
    "autogptq": "load the quantised model yourself",
    "gptqmodel": "load the quantised model yourself",
    "gguf_file": "load the file yourself",
    "parallelize": "load the model yourself with device_map=auto",
    "max_memory_per_gpu": "load the model yourself with max_memory",
    "max_cpu_memory": "load the model yourself with max_memory",
    "offload_folder": "load the model yourself with offload_folder",
    "tp_plan": "load the model yourself",
}
_SURE = 0.85  # how alike a slip and what was meant are; max_memory and max_cpu_memory, two arguments, are less so


def known(*classes: type) -> list[str]:
    """The named arguments of these classes' constructors."""
    return [
        name
        for cls in classes
        for name, parameter in inspect.signature(cls).parameters.items()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]


def further(options: Mapping[str, Any], *classes: type) -> dict[str, str | None]:
    """The options that are no argument of these classes, each with the one that it is most like, if any is."""
    names = known(*classes)
    return {name: nearest(name, names) for name in options if name not in names}


def check_spelling(unknown: Mapping[str, str | None], config: Any) -> None:
    """Refuse what is nearly one of our arguments; all else is for transformers, as are the config's own names.

    Raises:
        AdaInferError: On a slip.
    """
    for name, meant in unknown.items():
        if meant and nearest(name, [meant], _SURE) and not hasattr(config, name):
            raise AdaInferError(f"{name}: there is no such argument; {meant} is probably meant")


def check_beside_object(model: Any, options: Mapping[str, Any], unknown: Mapping[str, str | None]) -> None:
    """Refuse what would do nothing beside a model object, which is taken as it is.

    Raises:
        AdaInferError: On an argument that nobody knows, or that only acts while a model is loaded.
    """
    for name, meant in unknown.items():
        instead = f"{meant} is probably meant" if meant else "set it on the model itself, or leave it out"
        raise AdaInferError(f"{name}: there is no such argument beside a model object; {instead}")
    for name, instead in _LOADING.items():
        if options.get(name) not in (None, False, "", "False") and options[name] != _default(name):
            raise AdaInferError(f"{name}: {options[name]!r} does nothing to a model object; {instead}")
    dtype = options.get("dtype")
    has = getattr(model, "dtype", None)
    if dtype not in (None, "auto") and has is not None and get_dtype(dtype) != has:
        raise AdaInferError(f"dtype: the model object is in {has}, not {dtype}; give another dtype with model.to(...)")
    asked, lies = options.get("device"), getattr(model, "device", None)
    if asked and isinstance(lies, torch.device) and torch.device(asked).type != lies.type != "meta":
        _logger.warning("device: %s does nothing; the model object stays on %s until you move it", asked, lies)
    for name in ("revision", "subfolder"):
        if options.get(name) not in (None, "", _default(name)):
            _logger.warning("%s: %r is the tokenizer's alone, the model object stays as it is", name, options[name])


def pretrained_of(pretrained: Any, options: Mapping[str, Any], *classes: type) -> tuple[Any, dict[str, str | None]]:
    """What HFLM is to load, and the options that are no argument of these classes (:func:`further`).

    Args:
        pretrained: As the model's argument.
        options: What is given beside it.
        *classes: Whose constructors take options.

    Raises:
        AdaInferError: On an option that does nothing to a model object, and where the demo model is missing.
    """
    if isinstance(pretrained, os.PathLike):  # which HFLM would take for a model object
        pretrained = os.fspath(pretrained)
    unknown = further(options, *classes)
    if not isinstance(pretrained, str):
        check_beside_object(pretrained, options, unknown)
    if pretrained == DEMO:
        if not paths.demo_model().is_dir():
            raise AdaInferError(f"pretrained: {DEMO} is not in this installation; install the package from its wheel")
        pretrained = str(paths.demo_model())
    return unwrapping.uncompiled(pretrained), unknown


def check_built(lm: Any) -> None:
    """Refuse what only shows in a model that HFLM has built: that it takes it for another kind, or can't begin a text.

    Raises:
        AdaInferError: On either.
    """
    if lm.backend == "seq2seq":  # a model object of a type that has an encoder, too
        raise AdaInferError(
            f"pretrained: lm-eval takes {type(lm.model).__name__} for an encoder-decoder model; if it is a "
            "decoder, pass backend=causal"
        )
    if lm.prefix_token_id is None:
        raise AdaInferError(
            "tokenizer: it has neither a BOS nor an EOS token to begin a text with; give prefix_token_id=0, say"
        )


def _default(name: str) -> Any:
    return inspect.signature(HFLM.__init__).parameters[name].default
