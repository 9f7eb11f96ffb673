"""Generation settings: what a checkpoint and a request ask for, followed as stock ``hf`` follows them at batch size 1.

Settings come from the checkpoint's ``generation_config.json`` and from the request's ``gen_kwargs``, which go first.
One rule holds for dense and for early generation: a text is the one that ``--model hf`` generates at batch size 1.
What can't be followed so is refused before the first text is generated.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import GenerationMode, LogitsProcessorList

from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.structure import private

_REQUEST, _CHECKPOINT = "generation_kwargs", "generation_config.json"

# lm-eval passes these to generate() itself, which raises a TypeError if they come twice
_TAKEN = ("input_ids", "attention_mask", "stopping_criteria", "pad_token_id", "use_cache", "context", "stop")

# generate() takes these apart from its signature
_POPPED = ("tokenizer", "assistant_tokenizer", "trust_remote_code")

# what stock hf fails on: the setting, for which values, and why
_STOCK_FAILS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("stop_strings", bool, "needs a tokenizer, which lm-eval does not pass to generate(); give until instead"),
    ("token_healing", bool, "needs a tokenizer, which lm-eval does not pass to generate(); leave it out"),
    ("num_return_sequences", lambda n: n != 1, "asks for several texts, but lm-eval takes one; give repeats instead"),
    ("return_dict_in_generate", bool, "returns an object, but lm-eval takes token ids; leave it out"),
    ("is_assistant", bool, "makes the model an assistant of another one; leave it out"),
)

# what makes the generation mode another one than greedy search or sampling, and the value that does not
_MODES = {"num_beams": 1, "constraints": None, "force_words_ids": None, "penalty_alpha": 0, "dola_layers": None,
          "use_mtp": False, "prompt_lookup_num_tokens": None, "assistant_early_exit": None}  # fmt: skip

# These read a row's scores and the number of its new tokens, but neither a batch's padding nor its other rows.
_FREE_OF_THE_BATCH = frozenset({
    "SuppressTokensLogitsProcessor", "SuppressTokensAtBeginLogitsProcessor", "MinNewTokensLengthLogitsProcessor",
    "ExponentialDecayLengthPenalty", "ForcedEOSTokenLogitsProcessor", "InfNanRemoveLogitsProcessor",
    "LogitNormalization", "TemperatureLogitsWarper", "TopHLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper",
    "MinPLogitsWarper", "TypicalLogitsWarper", "EpsilonLogitsWarper", "EtaLogitsWarper",
})  # fmt: skip


class Settings:
    """The settings of one kind of request.

    Args:
        model: The causal LM, whose ``generation_config`` is the checkpoint's.
        options: What lm-eval would hand to ``model.generate`` from ``gen_kwargs``, without lengths and stop strings.
        early: Whether tokens are to exit early; else ``model.generate`` runs.

    Attributes:
        config: Both sources together, as ``model.generate`` puts them together.

    Raises:
        AdaInferError: On a setting that stock ``hf`` fails on, and with ``early`` on one that can't be followed; the
            sentence begins with ``generation_kwargs`` or ``generation_config.json``, wherever the setting is from.
    """

    def __init__(self, model: Any, options: Mapping[str, Any], early: bool):
        self.model, self.early = model, early
        self.options = dict(options)
        self._refuse_what_stock_refuses()
        if self.options.get("temperature", 0.0) == 0.0:  # as HFLM: a temperature of 0 means greedy
            self.options.pop("temperature", None)
            if self.options.setdefault("do_sample", False):
                raise AdaInferError(
                    f"{_REQUEST}: do_sample=True needs a temperature above 0; give one, or leave do_sample out"
                )
        arguments = {*inspect.signature(model.generate).parameters, *_POPPED} - {"kwargs"}
        given = {name: value for name, value in self.options.items() if name not in arguments}
        for name in self.options.keys() - given.keys():
            if early and self.options[name] is not None:
                raise _unknown(name, self.options[name])
        self.config, unused = self._checked(lambda: self._together(given))
        self.mode = self.config.get_generation_mode(self.options.get("assistant_model"))
        if early:
            self._refuse_what_cannot_exit(unused)
        else:
            self._checked(lambda: private.check_model_arguments(model, unused))
            trusted, custom = (self.options.get(name) for name in ("trust_remote_code", "custom_generate"))
            self._checked(lambda: private.check_moved_mode(model, self.mode, trusted, custom))
        # a value that a processor does not take fails here, and not after other requests have been generated
        self._checked(lambda: self.processors(torch.zeros(1, 1, dtype=torch.long)))

    def value(self, name: str) -> Any:
        """What a setting is, wherever it comes from; None where nobody gives it."""
        return self.options[name] if name in self.options else getattr(self.model.generation_config, name, None)

    def _from(self, name: str) -> str:
        """The beginning of a sentence about a setting: where it comes from, and what it is there."""
        if name in self.options:
            return f"{_REQUEST}: {name}={self.options[name]!r}"
        return f"{_CHECKPOINT}: the checkpoint's {name}={self.value(name)!r}"

    def _refuse_what_stock_refuses(self) -> None:
        for name in _TAKEN:
            if name in self.options:
                raise AdaInferError(f"{self._from(name)} is set by lm-eval itself; leave it out")
        for name, fails, why in _STOCK_FAILS:
            value = self.value(name)
            if value is not None and fails(value) and "tokenizer" not in self.options:
                raise AdaInferError(f"{self._from(name)} {why}")
        if self.options.get("cache_implementation") == "paged":
            raise AdaInferError(f"{self._from('cache_implementation')} takes no stop strings; leave it out")

    def _refuse_what_cannot_exit(self, unused: Mapping[str, Any]) -> None:
        for name, value in unused.items():
            if name not in ("output_attentions", "output_hidden_states"):  # which leave the text as it is
                raise _unknown(name, value)
        if self.mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            name = next((n for n, off in _MODES.items() if self.value(n) not in (None, off)), "num_beams")
            where = _REQUEST if name in self.options else _CHECKPOINT
            raise AdaInferError(
                f"{where}: {self.mode.value} can't exit early, and {name}={self.value(name)!r} asks for it; use greedy "
                "decoding or sampling, or pass generation=dense"
            )
        if self.value("guidance_scale") not in (None, 1):
            raise AdaInferError(
                f"{self._from('guidance_scale')} runs the whole model a second time for every token, which no exit "
                "makes shorter; leave it out, or pass generation=dense"
            )
        if self.value("cache_implementation") == "quantized":
            raise AdaInferError(
                f"{self._from('cache_implementation')} rounds keys and values, which the cache of early exit does not; "
                "leave it out, or pass generation=dense"
            )

    def _together(self, given: Mapping[str, Any]) -> tuple[GenerationConfig, dict[str, Any]]:
        """Both sources, and what is no setting; lm-eval passes ``use_cache=True``, whatever the checkpoint says."""
        config, unused = private.generation_config_of(self.model, {"use_cache": True, **given})
        private.put_special_tokens(self.model, config, torch.device("cpu"))
        return config, {name: value for name, value in unused.items() if value is not None}

    def _checked(self, what: Callable[[], Any]) -> Any:
        """Run a step of transformers that may refuse a setting, and say so in one sentence."""
        try:
            return what()
        except (AttributeError, NotImplementedError, OverflowError, RuntimeError, TypeError, ValueError) as error:
            raise _refused(self._blamed(), error) from error

    def _blamed(self) -> str:
        """Where a setting is from that transformers refuses: the checkpoint, if its own settings fail alone."""
        if self.options.keys() <= {"do_sample"}:
            return _CHECKPOINT
        try:
            Settings(self.model, {}, self.early)
        except AdaInferError:
            return _CHECKPOINT
        return _REQUEST

    def new_tokens(self, prompt: int, max_new: int, max_length: int | None) -> int:
        """How many tokens a row may get.

        Args:
            prompt: Tokens of its prompt.
            max_new: lm-eval's ``max_gen_toks``.
            max_length: Of prompt and text together, where the request says so; it goes before ``max_new``.
        """
        if self.config.max_new_tokens is not None:  # the checkpoint's; the request's is max_gen_toks
            return self.config.max_new_tokens
        return max_new if max_length is None else max_length - prompt

    def processors(self, prompts: Tensor, new: int = 1, attention_mask: Tensor | None = None) -> LogitsProcessorList:
        """New logits processors for these prompts alone.

        Args:
            prompts: [B, S] token ids.
            new: Tokens that each may get.
            attention_mask: [B, S], where some are padded.
        """
        config, length = copy.copy(self.config), prompts.shape[1]
        config.max_length = length + new
        if config.min_new_tokens is not None:
            config.min_length = length + config.min_new_tokens
        private.put_special_tokens(self.model, config, prompts.device)
        return private.logits_processors(
            self.model,
            config,
            input_ids_seq_length=length,
            encoder_input_ids=prompts,
            logits_processor=LogitsProcessorList(),
            device=prompts.device,
            model_kwargs={} if attention_mask is None else {"attention_mask": attention_mask},
        )

    def end_tokens(self) -> list[int]:
        """Tokens that end a text."""
        ends = private.end_tokens_of(self.config)
        return [] if ends is None else ends.flatten().tolist()

    def needs_rows_alone(self, context: Tensor, attention_mask: Tensor) -> bool:
        """Whether a row would depend on the batch around it in ``model.generate``, so that it has to be alone there.

        A clock is such a thing; processors are made for the padded batch, and where it searches beams or assists,
        there are criteria for a single row.
        """
        if self.value("max_time") is not None:
            return True
        if self.mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE) or "custom_generate" in self.options:
            return True
        for one in self.processors(context, attention_mask=attention_mask):
            name = type(one).__name__
            if name == "MinLengthLogitsProcessor" and self.config.min_new_tokens is not None:
                continue
            if isinstance(getattr(one, "prompt_ignore_length", None), Tensor):  # it knows where a row's padding ends
                continue
            if name not in _FREE_OF_THE_BATCH:
                return True
        return False


def check_checkpoint(pretrained: str, revision: str | None = None, subfolder: str | None = None) -> None:
    """Refuse a ``generation_config.json`` that transformers can't read, which would fail when the weights are loaded.

    Args:
        pretrained: A model's folder, or its name on the hub.
        revision: Of the hub's repository.
        subfolder: Where in it the model lies.

    Raises:
        AdaInferError: Where the file is there and its settings contradict each other.
    """
    try:
        GenerationConfig.from_pretrained(pretrained, revision=revision or "main", subfolder=subfolder or "")
    except OSError:  # there is none, and the model's config says what there is to say
        return
    except (TypeError, ValueError) as error:
        raise _refused(_CHECKPOINT, error) from error


def _refused(where: str, error: Exception) -> AdaInferError:
    found = " ".join(str(error).split()) or type(error).__name__
    return AdaInferError(f"{where}: transformers refuses its settings ({found:.300}); leave out the one that is named")


def _unknown(name: str, value: Any) -> AdaInferError:
    return AdaInferError(
        f"{_REQUEST}: {name}={value!r} is unknown to early-exit generation; leave it out, or pass generation=dense"
    )
