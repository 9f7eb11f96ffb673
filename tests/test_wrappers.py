"""What stands around a model: it acts as in stock ``hf``, or the model is refused in one sentence."""

from __future__ import annotations

import peft
import pytest
import torch
from helpers.models import lm_of, make_model
from helpers.tasks import instance, requests
from lm_eval.models.huggingface import HFLM
from torch import nn

from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.verification import FAILED, OK, render, verify_model


def as_stock(model, tokenizer):
    """``stopper=none`` gives the answers of ``--model hf``."""
    asked = requests(documents=3)
    stock = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, max_length=64).loglikelihood(asked, True)
    for a, b in zip(stock, lm_of(model, tokenizer).loglikelihood(asked, True), strict=True):
        assert b[0] == pytest.approx(a[0], rel=2e-6, abs=1e-4) and b[1] == a[1]


def refused(model, tokenizer, argument, *words):
    """One sentence with these words."""
    with pytest.raises(AdaInferError) as found:
        lm_of(model, tokenizer)
    said = str(found.value)
    assert said.startswith(f"{argument}: ") and "\n" not in said
    for word in words:
        assert word in said, said


def adapted(config=None, seed=1, **lora):
    """A tiny model with an adapter whose weights matter."""
    torch.manual_seed(seed)
    config = config or peft.LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], **lora)
    model = peft.get_peft_model(make_model("llama", vocab_size=257), config).eval()
    disturb(model)
    return model


@torch.no_grad()
def disturb(model):
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter) * 0.5)


class Around(nn.Module):
    """A user's wrapper, which hands everything on."""

    def __init__(self, inner, finds_base=True):
        super().__init__()
        self.inner = inner
        if finds_base:
            self.get_base_model = lambda: getattr(inner, "get_base_model", lambda: inner)()

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, input_ids, **kwargs):
        return self.inner(input_ids, **kwargs)


# ---------------------------------------------------------------------- adapters
def test_an_activated_lora_is_refused_also_where_no_text_invokes_it(tokenizer):
    refused(adapted(alora_invocation_tokens=[255, 3]), tokenizer, "peft", "changes the hooks of ", "merged")


def test_an_activated_lora_that_is_not_active_does_no_harm(tokenizer):
    model = adapted(alora_invocation_tokens=[255, 3])
    model.add_adapter("plain", peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    model.set_adapter("plain")
    disturb(model)
    as_stock(model, tokenizer)
    model.set_adapter("default")
    refused(model, tokenizer, "peft", "changes the hooks of ")
    refused(Around(model, finds_base=False), tokenizer, "pretrained", "Around changes the hooks of ")


@pytest.mark.parametrize(
    "config",
    [
        peft.IA3Config(
            task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
        ),
        peft.LoHaConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]),
        peft.VeraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=4),
        peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], use_dora=True),
        peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=3, adapter_layers=2),
        peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=["norm"]),
    ],
    ids=lambda config: type(config).__name__,
)
def test_adapters_that_change_layers_alone_work(config, tokenizer):
    as_stock(adapted(config), tokenizer)


@pytest.mark.parametrize(
    "config",
    [
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
    ],
    ids=lambda config: type(config).__name__,
)
def test_prompt_learning_is_refused(config, tokenizer):
    refused(adapted(config), tokenizer, "peft", "prompt learning")


def test_of_several_adapters_the_active_one_acts(tokenizer):
    model = adapted()
    model.add_adapter("second", peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["k_proj"]))
    model.set_adapter("second")
    disturb(model)
    as_stock(model, tokenizer)


# ---------------------------------------------------------------------- wrappers of one's own
@pytest.mark.parametrize("finds_base", [True, False])
def test_a_wrapper_that_hands_everything_on_works(finds_base, tokenizer):
    as_stock(Around(make_model("llama", vocab_size=257), finds_base), tokenizer)
    as_stock(Around(adapted(), finds_base), tokenizer)


class Names(Around):
    def forward(self, input_ids, **kwargs):
        return self.inner(input_ids, adapter_names=["default"] * len(input_ids), **kwargs)


class Warmer(Around):
    def forward(self, input_ids, **kwargs):
        found = self.inner(input_ids, **kwargs)
        found.logits = found.logits / 2
        return found


class Biased(Around):
    """Acts on one token alone, which no probe has."""

    def forward(self, input_ids, **kwargs):
        found = self.inner(input_ids, **kwargs)
        if bool((input_ids == 201).any()):
            found.logits = found.logits + torch.linspace(0, 1, found.logits.shape[-1])
        return found


class Without(Around):
    """Turns the adapter off where one token occurs."""

    def forward(self, input_ids, **kwargs):
        if not bool((input_ids == 201).any()):
            return self.inner(input_ids, **kwargs)
        with self.inner.disable_adapter():
            return self.inner(input_ids, **kwargs)


class Masked(Around):
    def forward(self, input_ids, **kwargs):
        return self.inner(input_ids, **{"attention_mask": (input_ids != 7).long(), **kwargs})


class Shifted(Around):
    def forward(self, input_ids, **kwargs):
        return self.inner(input_ids.roll(1, 0), **kwargs)


class Guided(Around):
    def forward(self, input_ids, **kwargs):
        found = self.inner(input_ids, **kwargs)
        found.logits = found.logits - 0.5 * self.inner(input_ids[:, -1:], **kwargs).logits
        return found


class Embedded(Around):
    def forward(self, input_ids, **kwargs):
        return self.inner(inputs_embeds=self.inner.get_input_embeddings()(input_ids) * 1.1, **kwargs)


@pytest.mark.parametrize("finds_base", [True, False])
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Names, "changes the hooks of "), (Warmer, "changes the logits of "), (Biased, "changes the logits of "),
        (Without, "changes the state of "), (Masked, "inside attention_mask as well as token ids"),
        (Shifted, "other token ids"), (Guided, "2 times"), (Embedded, "other token ids"),
    ],
)  # fmt: skip
def test_a_wrapper_that_does_more_is_refused_for_what_it_does(kind, words, finds_base, tokenizer):
    refused(kind(adapted(), finds_base), tokenizer, "pretrained", kind.__name__, words)


@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_on_a_wrapper_are_refused_where_they_change_something(when, tokenizer):
    model = adapted()
    seen = []
    model.register_forward_hook(lambda m, args, output: seen.append(1))
    as_stock(model, tokenizer)
    assert seen
    if when == "before":
        model.register_forward_pre_hook(lambda m, args: (args[0].flip(1),))
        refused(model, tokenizer, "peft", "gives the LlamaForCausalLM inside other token ids")
    else:

        def warmer(m, args, output):
            output.logits = output.logits / 2

        model.register_forward_hook(warmer)
        refused(model, tokenizer, "peft", "changes the logits of the LlamaForCausalLM inside")


class Writes(Around):
    def generate(self, input_ids, **kwargs):
        return self.inner.generate(input_ids=input_ids.flip(1), **kwargs)


def test_a_wrapper_with_a_generate_of_its_own_is_refused_when_it_generates_early(tokenizer):
    model = Writes(make_model("llama", vocab_size=257))
    as_stock(model, tokenizer)
    asked = [instance("abc", {"until": ["\n"], "max_gen_toks": 4}, 0, kind="generate_until")]
    with pytest.raises(AdaInferError, match=r"^generation: Writes has a generate of its own .*; pass generation=dense"):
        lm_of(model, tokenizer, stopper="gap:0.3").generate_until(asked, True)
    stock = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, max_length=64).generate_until(asked, True)
    assert list(map(str, lm_of(model, tokenizer, generation="dense").generate_until(asked, True))) == stock


def test_adapters_generate_early_as_stock_does(tokenizer):
    for model in (adapted(), Around(adapted())):
        asked = [
            instance(t, {"until": ["\n"], "max_gen_toks": 4}, i, kind="generate_until") for i, t in enumerate("ab")
        ]
        stock = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, max_length=64).generate_until(asked, True)
        lm = lm_of(model, tokenizer, stopper="softmax:0.999999")
        assert list(map(str, lm.generate_until(asked, True))) == stock


@pytest.mark.parametrize("reader", ["copy:2", "sim:2"])
@pytest.mark.parametrize("dora", [False, True])
def test_readers_that_let_tokens_go_on_run_adapters(dora, reader, tokenizer):
    """Among them those of the maps that copied keys and values are made by."""
    maps = ["q_proj", "k_proj", "v_proj"]
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=maps, lora_alpha=2, use_dora=dora)
    findings = verify_model(lm_of(adapted(config), tokenizer, reader=reader), True)
    assert {f.status for f in findings} == {OK}, render(findings)
    assert {"reader", "texts"} <= {f.check for f in findings}


def test_verify_compares_with_the_wrapper_too(tokenizer):
    model = adapted()
    lm = lm_of(model, tokenizer)

    def warmer(m, args, output):
        output.logits = output.logits / 2

    model.register_forward_hook(warmer)  # after the model was loaded, so that loading sees nothing
    failed = {f.check for f in verify_model(lm, True) if f.status == FAILED}
    assert {"dense", "exits", "compaction", "generation"} <= failed
