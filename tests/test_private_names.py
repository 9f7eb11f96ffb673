"""Private names of other libraries: each is there as it was in the release that the package was written for.

After an upgrade this file is the first to look at. It tells which names are gone or have changed; what the package
does with them is in ``structure/private.py`` and ``harness/private.py``, and no other module touches such names.
"""

from __future__ import annotations

import ast
import inspect
import re
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module
from lm_eval import evaluator_utils
from lm_eval._cli import utils as cli_utils
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from peft.tuners.tuners_utils import BaseTunerLayer
from sklearn.svm import SVC
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel, masking_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lm_eval_adainfer.harness import private as of_lm_eval
from lm_eval_adainfer.harness.model import AdaInferLM

PACKAGE = Path(of_lm_eval.__file__).resolve().parents[1]
PRIVATE = [PACKAGE / "structure" / "private.py", PACKAGE / "harness" / "private.py"]
STANDARD_LIBRARY = {"_fields", "_actions", "_SubParsersAction"}  # of named tuples (documented) and argparse

WRITTEN_FOR = {
    "torch": "2.13.0", "transformers": "5.24.0", "accelerate": "1.15.0", "peft": "0.21.2", "scikit-learn": "1.9.1",
    "lm_eval": "0.4.13",
}  # fmt: skip


def takes(function, *arguments, **named) -> bool:
    """Whether a function can be called so."""
    try:
        inspect.signature(function).bind(*arguments, **named)
    except TypeError:
        return False
    return True


def linear() -> torch.nn.Module:
    return torch.nn.Linear(2, 2)


def compiled(what):
    return torch.compile(what, backend="eager")


def compiled_in_place() -> torch.nn.Module:
    module = linear()
    module.compile(backend="eager")
    return module


def hooked() -> torch.nn.Module:
    module = linear()
    add_hook_to_module(module, ModelHook())
    return module


def saved() -> dict:
    stored = {}
    linear()._save_to_state_dict(stored, "", True)
    return stored


def attention_of_a_cpu() -> tuple:
    x = torch.ones(1, 1, 2, 4)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(x, x, x, is_causal=True, scale=None)


def fitted_svc() -> SVC:
    return SVC().fit([[0.0], [1.0]], [0, 1])


# library -> private name -> whether it is what the package takes it for
NAMES = {
    "torch": {
        "_forward_pre_hooks": lambda: vars(linear())["_forward_pre_hooks"] == {},
        "_forward_hooks": lambda: vars(linear())["_forward_hooks"] == {},
        "_parameters": lambda: set(vars(linear())["_parameters"]) == {"weight", "bias"},
        "_buffers": lambda: vars(linear())["_buffers"] == {},
        "_save_to_state_dict": lambda: set(saved()) == {"weight", "bias"},
        "_version": lambda: (torch.ones(1).add_(1)._version, torch.ones(1)._version) == (1, 0),
        "_dynamo": lambda: isinstance(compiled(linear()), torch._dynamo.OptimizedModule),
        "_orig_mod": lambda: isinstance(compiled(linear())._orig_mod, torch.nn.Linear),
        "_compiled_call_impl": lambda: (
            linear()._compiled_call_impl is None and compiled_in_place()._compiled_call_impl is not None
        ),
        "_torchdynamo_orig_callable": lambda: compiled(linear)._torchdynamo_orig_callable is linear,
        "_scaled_dot_product_flash_attention_for_cpu": lambda: [x.shape for x in attention_of_a_cpu()] == [
            (1, 1, 2, 4), (1, 1, 2),
        ],
    },
    "transformers": {
        "_ignore_causal_mask_sdpa": lambda: callable(masking_utils._ignore_causal_mask_sdpa),
        "_local_mapping": lambda: isinstance(ALL_ATTENTION_FUNCTIONS._local_mapping, dict),
        "_name_or_path": lambda: "_name_or_path" in transformers.LlamaConfig(name_or_path="x").to_dict(),
        "_attn_implementation": lambda: isinstance(
            inspect.getattr_static(PretrainedConfig, "_attn_implementation"), property
        ),
        "_from_config": lambda: takes(PreTrainedModel._from_config, None, attn_implementation="eager"),
        "_prepare_generation_config": lambda: takes(
            GenerationMixin._prepare_generation_config, None, None, use_cache=True, temperature=1
        ),
        "_prepare_special_tokens": lambda: takes(
            GenerationMixin._prepare_special_tokens, None, None, True, device="cpu"
        ),
        "_eos_token_tensor": lambda: "._eos_token_tensor = " in inspect.getsource(
            GenerationMixin._prepare_special_tokens
        ),
        "_get_logits_processor": lambda: takes(
            GenerationMixin._get_logits_processor, None, None, input_ids_seq_length=1, encoder_input_ids=None,
            logits_processor=None, device="cpu", model_kwargs={},
        ),
        "_validate_model_kwargs": lambda: takes(GenerationMixin._validate_model_kwargs, None, {}),
        # A release may forget it, and then nothing is checked.
        "_get_deprecated_gen_repo": lambda: not hasattr(GenerationMixin, "_get_deprecated_gen_repo") or takes(
            GenerationMixin._get_deprecated_gen_repo, None, None, None, None
        ),
    },
    "accelerate": {"_hf_hook": lambda: isinstance(hooked()._hf_hook, ModelHook)},
    "peft": {
        "_active_adapter": lambda: hasattr(BaseTunerLayer, "_active_adapter"),
        "_disable_adapters": lambda: hasattr(BaseTunerLayer, "_disable_adapters"),
    },
    "scikit-learn": {"_gamma": lambda: fitted_svc()._gamma == 4.0},
    "lm_eval": {
        "_handle_back_comp": lambda: evaluator_utils._handle_back_comp({}) == ({}, {}),
        "_instances": lambda: bool(  # 0.5.0.dev1: apply_filter
            re.search(r"\.apply(_filter)?\(self\._instances\)", inspect.getsource(ConfigurableTask.apply_filters))
        ),
        "_cli": lambda: (
            cli_utils.key_val_to_dict("a=1") == {"a": 1} and takes(cli_utils.MergeDictAction, ["-x"], "x", nargs="+")
        ),
        "_batch_scheduler": lambda: takes(HFLM._batch_scheduler, None, 0, []),
        "_detect_batch_size": lambda: takes(HFLM._detect_batch_size, None) and takes(
            HFLM._detect_batch_size, None, [], 0
        ),
        "_get_config": lambda: takes(HFLM._get_config, None, "model"),
        "_loglikelihood_tokens": lambda: takes(
            HFLM._loglikelihood_tokens, None, [], disable_tqdm=True, override_bs=None
        ),
        "_model_generate": lambda: takes(HFLM._model_generate, None, None, 9, ["x"], attention_mask=None),
        **{
            name: lambda name=name: bool(re.search(rf"\bself\.{name}\b[^(]", inspect.getsource(HFLM)))
            for name in of_lm_eval.ATTRIBUTES
        },
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("library", "name"), [(library, name) for library, names in NAMES.items() for name in names], ids=str
)
def test_a_private_name_is_what_the_package_takes_it_for(library, name):
    written_for, installed = WRITTEN_FOR[library], version(library)
    try:
        found = NAMES[library][name]()
        why = ""
    except (AttributeError, ImportError, KeyError, TypeError, ValueError) as error:
        found, why = False, f" ({error})"
    assert found, (
        f"{library}'s private {name} is gone or another one in {installed}{why}; the package was written for "
        f"{written_for}, and {' and '.join(str(p.relative_to(PACKAGE)) for p in PRIVATE)} use such names"
    )


def private_names(path: Path, known: set[str]) -> dict[str, int]:
    """Names with one underscore in front to the line where a file uses them: as attributes, in imports, as texts.

    Texts count only where they are ``known`` names.
    """
    found: dict[str, int] = {}
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("lm_eval_adainfer"):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.Constant) and node.value in known:
            names = [str(node.value)]
        found |= {name: node.lineno for name in names if re.match(r"_[^_]", name)}
    return found


def defined_names(path: Path) -> set[str]:
    """What a file defines: functions, classes, variables and attributes of ``self`` and ``cls``."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name):
            found |= {node.attr} if node.value.id in ("self", "cls") else set()
    return found


def test_no_other_module_touches_private_names_of_other_libraries():
    known = {name for names in NAMES.values() for name in names}
    of_hflm = {*of_lm_eval.OVERRIDDEN, *of_lm_eval.ATTRIBUTES}
    files = [path for path in PACKAGE.rglob("*.py") if path not in PRIVATE]
    ours = set().union(*map(defined_names, files)) - (known - of_hflm) | STANDARD_LIBRARY | of_hflm
    touched = [
        f"{path.relative_to(PACKAGE)}:{line} {name}"
        for path in files
        for name, line in private_names(path, known - of_hflm).items()
        if name not in ours
    ]
    assert not touched, f"{touched}: private names belong in structure/private.py or harness/private.py"


def test_every_private_name_that_is_touched_is_named_here():
    known = {name for names in NAMES.values() for name in names}
    touched = set().union(*(private_names(path, known) for path in PRIVATE))
    assert touched == known


def test_the_model_type_takes_from_hflm_what_is_listed():
    """Its class body overrides and sets HFLM's private names where they are used, in ``harness/model.py``."""
    ours = PACKAGE / "harness" / "model.py"
    of_hflm = {name for name in dir(HFLM) if re.match(r"_[^_]", name)} - {"_abc_impl"}
    of_hflm |= set(re.findall(r"\bself\.(_[a-z]\w*)\b", inspect.getsource(HFLM)))
    overridden = {name for name in vars(AdaInferLM) if name in of_hflm}
    assert overridden == set(of_lm_eval.OVERRIDDEN)
    used = set(private_names(ours, set())) & of_hflm - overridden
    assert used == set(of_lm_eval.ATTRIBUTES)
