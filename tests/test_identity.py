"""The fingerprint: whatever changes an answer changes it, and nothing else does."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from helpers.families import SUPPORTED
from helpers.models import byte_tokenizer, make_model
from helpers.tasks import instance, our_tasks, requests
from lm_eval import simple_evaluate
from lm_eval.api.model import CacheHook, CachingLM
from torch import nn

from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.harness import identity
from lm_eval_adainfer.harness.model import AdaInferLM
from lm_eval_adainfer.structure import hashes


def lm_of(model=None, tokenizer=None, **kwargs):
    model = make_model("llama", vocab_size=257) if model is None else model
    more = {"stopper": "gap:0.3", "batch_size": 4, "max_length": 64, **kwargs}
    return AdaInferLM(pretrained=model, tokenizer=tokenizer or byte_tokenizer(), **more)


def texts():
    return [instance(t, {"until": ["\n"], "max_gen_toks": 4}, n, kind="generate_until") for n, t in enumerate(["a cat", "xy"])]


def added_token(lm):
    lm.tokenizer.add_tokens(["cat"])


def merged(lm):
    """The same vocabulary, but two letters make one token."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    old = lm.tokenizer.backend_tokenizer
    core = Tokenizer(models.BPE(vocab=old.get_vocab(), merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    core.decoder = old.decoder
    lm.tokenizer._tokenizer = core


def trained(lm):
    """A few steps with an optimiser, as between two evaluations."""
    optimizer = torch.optim.SGD(lm.model.parameters(), lr=1e-4)
    lm.model(torch.ones(1, 3).long(), labels=torch.ones(1, 3).long()).loss.backward()
    optimizer.step()


def one_bit(lm):
    """The least change there is, past the counters of autograd, in the middle of a large weight."""
    weight = lm.model.model.layers[3].mlp.down_proj.weight.data
    weight.view(torch.int32).view(-1)[weight.numel() // 2 + 1] ^= 1


def mirrored(lm):
    """Many changes that a plain sum would not see."""
    lm.model.model.layers[2].self_attn.o_proj.weight.data.neg_()


def swapped(lm):
    weight = lm.model.model.layers[1].mlp.up_proj.weight.data
    weight[[0, 1]] = weight[[1, 0]]


def buffer(lm):
    lm.model.model.rotary_emb.inv_freq.mul_(0.5)


def steered(lm, strength=0.5):
    lm.model.model.layers[1].register_forward_hook(lambda module, args, output: output + strength)


def steered_further(lm):
    steered(lm, 0.75)


def attribute(name, value, of=lambda lm: lm):
    def change(lm):
        setattr(of(lm), name, value)

    return change


settings, config, tok = (lambda lm: lm.model.generation_config), (lambda lm: lm.model.config), (lambda lm: lm.tokenizer)
CHANGES = {
    "a new token": added_token,
    "another pre-tokenizer": merged,
    "eos": attribute("eos_token", "a", tok),
    "decoding": attribute("clean_up_tokenization_spaces", True, tok),
    "think_end_token": attribute("think_end_token", "e"),
    "think_end_token as a number": attribute("think_end_token", 7),
    "truncation": attribute("truncation", True),
    "add_bos_token": attribute("add_bos_token", True),
    "prefix_token_id": attribute("custom_prefix_token_id", 5),
    "max_length": attribute("_max_length", 63),
    "softmax_dtype": attribute("softmax_dtype", torch.float64),
    "mixed precision": attribute("mixed_precision_dtype", torch.bfloat16),
    "repetition_penalty": attribute("repetition_penalty", 3.0, settings),
    "max_new_tokens": attribute("max_new_tokens", 2, settings),
    "generation's eos": attribute("eos_token_id", [0, 9], settings),
    "config": attribute("rms_norm_eps", 0.1, config),
    "epsilon": attribute("variance_epsilon", 0.1, lambda lm: lm.model.model.norm),
    "dropout": lambda lm: lm.model.train(),
    "trained": trained,
    "one bit": one_bit,
    "mirrored": mirrored,
    "swapped": swapped,
    "buffer": buffer,
    "dtype": lambda lm: lm.model.bfloat16(),
    "hook": steered,
    "stronger hook": steered_further,
    "kv_policy": lambda lm: setattr(lm, "options", replace(lm.options, kv_policy="propagate")),
    "stopper": attribute("threshold", 0.31, lambda lm: lm.stopper),
}


def test_whatever_changes_an_answer_changes_the_fingerprint():
    """Each change is made to a model object that has been built already, as by a script between two runs."""
    found = {"": lm_of().fingerprint}
    for name, change in CHANGES.items():
        lm = lm_of()
        change(lm)
        found[name] = lm.fingerprint
        assert found[name] == lm.fingerprint
    same = {print_: [name for name in found if found[name] == print_] for print_ in found.values()}
    assert all(len(names) == 1 for names in same.values()), same


@pytest.mark.parametrize("options", [{"batch_size": 1}, {"prefix_cache": 0}, {"batch_size": "auto"}], ids=str)
def test_what_only_changes_batches_does_not(options):
    assert lm_of(**options).fingerprint == lm_of().fingerprint


class Counter:
    def __init__(self):
        self.calls = 0

    def __call__(self, *_):
        self.calls += 1

    def method(self, *_):
        self.calls += 1


class Steering:
    def __init__(self, by):
        self.by = torch.tensor(by)

    def __call__(self, module, args, output):
        return output + self.by


def test_hooks_are_known_by_what_they_do():
    seen = []
    watching = [Counter(), Counter().method, lambda *_: seen.append(1)]
    lm = lm_of()
    plain, block = lm.fingerprint, lm.model.model.layers[1]
    for hook in watching:
        block.register_forward_pre_hook(hook)
    lm.loglikelihood(requests(documents=2), True)
    assert lm.fingerprint == plain and seen and watching[0].calls

    def ablated(module, args, output):
        return args[0]

    acting = [Steering(0.5), Steering(0.25), lambda m, a, o: -o, ablated, lambda m, a, o: o * 0, partial(torch.add, 1.5)]
    found = set()
    for hook in acting:
        handle = block.register_forward_hook(hook)
        found.add(lm.fingerprint)
        handle.remove()
    again = lm_of()
    again.model.model.layers[1].register_forward_hook(Steering(0.5))
    assert len(found | {plain}) == len(acting) + 1 and again.fingerprint in found and lm.fingerprint == plain


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "gemma3", "qwen3_moe", "mamba"])
def test_running_a_model_does_not_change_it(family):
    """Equal models have equal fingerprints in every process, before and after they have answered."""
    lm, other = (lm_of(make_model(family, vocab_size=257)) for _ in range(2))
    before = lm.fingerprint
    lm.loglikelihood(requests(), True)
    lm.loglikelihood_rolling([instance("words " * 30, None, 0, kind="loglikelihood_rolling")], True)
    if family != "mamba":
        lm.generate_until(texts(), True)
    lm.model(torch.ones(2, 3).long(), output_hidden_states=True)
    assert lm.fingerprint == before == other.fingerprint


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_embeddings_that_follow_the_length_are_the_same_model(kind):
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 16}
    rope = {"rope_type": kind, "factor": 2.0, "rope_theta": 10000.0, **(factors if kind == "longrope" else {})}
    values = SUPPORTED["llama"][1]
    width = values["hidden_size"] // values["num_attention_heads"]
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * (width // 2), "long_factor": [2.0] * (width // 2)}
    model = make_model("llama", vocab_size=257, rope_parameters=rope, max_position_embeddings=16)
    lm = lm_of(model)
    before, inv_freq = lm.fingerprint, model.model.rotary_emb.inv_freq.clone()
    model(torch.ones(1, 40).long())
    assert not torch.equal(model.model.rotary_emb.inv_freq, inv_freq) and lm.fingerprint == before


def test_adapters_that_are_switched_off_are_another_model():
    import peft

    torch.manual_seed(1)
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(make_model("llama", vocab_size=257), config).eval()
    lm, seen = lm_of(model), set()
    seen.add(lm.fingerprint)
    with model.disable_adapter():
        seen.add(lm.fingerprint)
    model.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"] = 0.5
    seen.add(lm.fingerprint)
    model.merge_adapter()  # it changes weights behind autograd's counters
    seen.add(lm.fingerprint)
    assert len(seen) == 4


def test_a_script_that_makes_many_small_calls_can_have_the_weights_read_once(monkeypatch):
    lm, read = lm_of(), []
    monkeypatch.setattr(lm.anatomy, "weights_hash", lambda *given: read.append(1) or type(lm.anatomy).weights_hash(lm.anatomy, *given))
    with lm.identified():
        inside = [lm.generate_until([text], True)[0].exit_record.fingerprint for text in texts()]
    assert len(read) == 1
    trained(lm)
    outside = [lm.generate_until([text], True)[0].exit_record.fingerprint for text in texts()]
    assert len(read) == 3 and len(set(inside)) == len(set(outside)) == 1 and set(inside) != set(outside)


def test_a_hash_of_a_tensor_sees_every_bit_and_does_not_depend_on_memory():
    torch.manual_seed(0)
    whole = torch.randn(3 * 2**16 + 5)
    base = hashes.tensor_hash(whole)
    for at in (0, 1, 2**16 - 1, 2**16, len(whole) - 1):
        for bit in (0, 12, 31):
            other = whole.clone()
            other.view(torch.int32)[at] ^= torch.tensor(1 << bit if bit < 31 else -(2**31), dtype=torch.int32)
            assert hashes.tensor_hash(other) != base
    signs = whole.clone()
    signs[:1000].neg_()
    assert hashes.tensor_hash(signs) != base != hashes.tensor_hash(whole.flip(0))
    wide = torch.zeros(len(whole), 2)
    wide[:, 1] = whole
    assert hashes.tensor_hash(wide[:, 1]) == base  # strided
    assert hashes.tensor_hash(torch.cat([whole[:3], whole])[3:]) == base  # elsewhere in its storage
    half = torch.randn(7).bfloat16()
    assert hashes.tensor_hash(torch.cat([half[:1], half])[1:]) == hashes.tensor_hash(half)  # at an odd place there
    odd = torch.tensor([True, False, True])
    assert hashes.tensor_hash(odd) != hashes.tensor_hash(~odd)
    assert hashes.tensor_hash(torch.zeros(4)) != hashes.tensor_hash(torch.zeros(2, 2))
    assert hashes.tensor_hash(torch.zeros(0)) and hashes.tensor_hash(torch.tensor(1.0))


# ------------------------------------------------------------------------------------------------ caches
def test_an_answer_carries_the_model_as_it_was_when_it_was_given():
    lm = lm_of()
    asked = requests(documents=2)
    first = lm.loglikelihood(asked, True)[0].exit_record.fingerprint
    trained(lm)
    second = lm.loglikelihood(asked, True)[0].exit_record.fingerprint
    assert first != second == lm.fingerprint == lm.generate_until(texts(), True)[0].exit_record.fingerprint


@cache
def manager():
    return our_tasks()


def evaluated(lm, cache=None):
    return simple_evaluate(
        lm, tasks=["adainfer_demo_fact"], limit=4, bootstrap_iters=0, use_cache=cache, task_manager=manager()
    )["results"]["adainfer_demo_fact"]


@pytest.mark.parametrize("change", ["trained", "a new token", "think_end_token", "repetition_penalty", "truncation"])
def test_a_cache_of_what_the_model_was_is_refused_before_anything_runs(change, tmp_path):
    lm, cache = lm_of(max_length=1024), str(tmp_path / "cache")
    first = evaluated(lm, cache)
    assert evaluated(lm, cache) == first
    CHANGES[change](lm)
    tokens = lm.engine.tokens
    with pytest.raises(AdaInferError, match=r"^use_cache: its answers are those of fingerprint"):
        evaluated(lm, cache)
    assert lm.engine.tokens == tokens


def test_a_model_that_is_trained_behind_a_cache_is_refused(tmp_path):
    """The cache was accepted when it was opened; the model has changed since."""
    lm = lm_of()
    cached = CachingLM(lm, str(tmp_path / "cache.db"))
    asked = texts()
    cached.generate_until(asked)
    trained(lm)
    with pytest.raises(AdaInferError, match=r"^use_cache: "):
        cached.generate_until([*asked, instance("new", asked[0].args[1], 9, kind="generate_until")])
    assert len(cached.dbdict) == len(asked) + 1  # and the fingerprint
    lm.set_cache_hook(CacheHook(None))
    assert lm.generate_until(asked, True)[0].exit_record.fingerprint == lm.fingerprint


def test_a_run_without_a_cache_does_not_write_into_an_earlier_ones(tmp_path):
    lm, cache = lm_of(max_length=1024), str(tmp_path / "cache")
    evaluated(lm, cache)
    kept = (Path(f"{cache}_rank0.db")).read_bytes()
    trained(lm)
    evaluated(lm)
    assert Path(f"{cache}_rank0.db").read_bytes() == kept


def test_a_copied_tokenizer_is_the_same_one():
    tokenizer = byte_tokenizer()
    tokenizer(["a", "bcd"], padding="longest", truncation=True, max_length=2)  # which the backend remembers
    assert identity.tokenizer_hash(tokenizer) == identity.tokenizer_hash(copy.deepcopy(byte_tokenizer()))


def test_a_tokenizer_in_python_has_a_hash_of_its_vocabulary():
    class Slow:
        def __init__(self, vocabulary):
            self.vocabulary = vocabulary

        def get_vocab(self):
            return self.vocabulary

    hashes = {identity.tokenizer_hash(Slow(v)) for v in ({"a": 0, "b": 1}, {"b": 0, "a": 1}, {"a": 0})}
    assert len(hashes) == 3 and identity.tokenizer_hash(Slow({"b": 1, "a": 0})) in hashes


def test_a_module_without_weights_is_hashed_too():
    assert hashes.modules_hash(nn.Dropout(0.1)) != hashes.modules_hash(nn.Dropout(0.2))
