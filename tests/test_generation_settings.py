"""Every setting of generation, from the checkpoint and from the request, against stock ``hf`` at batch size 1."""

from __future__ import annotations

import shutil
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from helpers.models import make_model
from helpers.tasks import instance
from lm_eval.models.huggingface import HFLM
from transformers import GenerationConfig
from transformers.generation import LogitsProcessor, LogitsProcessorList, stopping_criteria

from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.generation import loop
from lm_eval_adainfer.harness.model import AdaInferLM

PROMPTS = ["x", "Item 3:Item 3:", "Q: cat\nA: cats\n\nQ: ox\nA:", "1 and 2 and 3", "aa", "The Amazon is a forest. What is it?"]
OFTEN, SECOND, START = "often", "second", "start"  # tokens that the model writes, which a test puts in

# changes texts of PROMPTS, but may stand beside settings that do so by themselves
ACTS: dict[str, dict] = {
    "max_new_tokens": {"max_new_tokens": 4},
    "min_length": {"min_length": 18, "eos_token_id": [0, OFTEN]},
    "min_new_tokens": {"min_new_tokens": 5, "eos_token_id": [0, OFTEN]},
    "eos_token_id": {"eos_token_id": [0, OFTEN, SECOND]},
    "one eos_token_id": {"eos_token_id": SECOND},
    "repetition_penalty": {"repetition_penalty": 1.5},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 4.0},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "no_repeat_ngram_size of 2": {"no_repeat_ngram_size": 2},
    "bad_words_ids": {"bad_words_ids": [[OFTEN], [SECOND, SECOND]]},
    "forced_bos_token_id": {"forced_bos_token_id": SECOND},
    "forced_eos_token_id": {"forced_eos_token_id": SECOND},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": [2, 3.0]},
    "suppress_tokens": {"suppress_tokens": [OFTEN, SECOND]},
    "begin_suppress_tokens": {"begin_suppress_tokens": [START, SECOND]},
    "sequence_bias": {"sequence_bias": [[[OFTEN], -9.0], [[SECOND, OFTEN], -5.0]]},
    "watermarking_config": {"watermarking_config": {"bias": 9.0}},
    "renormalize_logits": {"renormalize_logits": True, "repetition_penalty": 1.5},
    "remove_invalid_values": {"remove_invalid_values": True, "repetition_penalty": 1.5},
}

# greedy texts without beams or assistants are the same with them, so early exit is free to ignore them
INERT: dict[str, dict] = {
    "max_time": {"max_time": 1e6},
    "a dynamic cache": {"cache_implementation": "dynamic", "cache_config": {"backend": "quanto"}, "prefill_chunk_size": 4},
    "a static cache": {"cache_implementation": "static", "max_cache_len": 800, "disable_compile": True},
    "beams' and samples' own": {"early_stopping": True, "length_penalty": 2.0, "diversity_penalty": 0.0, "top_k": 3,
                                "top_p": 0.5, "min_p": 0.1, "typical_p": 0.5, "epsilon_cutoff": 0.1, "eta_cutoff": 0.1},
    "more outputs": {"output_scores": True, "output_logits": True, "output_attentions": True,
                     "output_hidden_states": True},
    "others' own": {"bos_token_id": 5, "decoder_start_token_id": 5, "num_assistant_tokens": 3, "low_memory": True,
                    "num_assistant_tokens_schedule": "heuristic", "assistant_confidence_threshold": 0.2,
                    "max_matching_ngram_size": 2, "assistant_lookbehind": 3, "target_lookbehind": 3},
}  # fmt: skip

# only a checkpoint can bring these: lm-eval itself passes them on, or generate() does not know them
OVERRIDDEN: dict[str, dict] = {
    "use_cache": {"use_cache": False},
    "pad_token_id": {"pad_token_id": 7},
    "max_length": {"max_length": 3},
    "do_sample": {"do_sample": True, "temperature": 0.7, "top_k": 2},
    "custom entries": {"chat_format": "chatml", "temprature": 0.1},
}

# refused with early exit; dense generation follows them
NOT_EARLY: dict[str, dict] = {
    "num_beams": {"num_beams": 3},
    "prompt_lookup_num_tokens": {"prompt_lookup_num_tokens": 3},
    "guidance_scale": {"guidance_scale": 1.5},
}

# stock hf fails on these, so they are refused in both paths
REFUSED: dict[str, dict] = {
    "stop_strings": {"stop_strings": ["x"]},
    "token_healing": {"token_healing": True},
    "return_dict_in_generate": {"return_dict_in_generate": True},
    "is_assistant": {"is_assistant": True},
    "penalty_alpha": {"penalty_alpha": 0.6},
    "dola_layers": {"dola_layers": "low"},
    "constraints": {"constraints": [1]},
    "force_words_ids": {"force_words_ids": [[5]]},
    "repetition_penalty": {"repetition_penalty": -2.0},
    "repetition_penalty of a wrong type": {"repetition_penalty": 2},
}

# other tests here say what happens with these, or they have no effect without one that is refused
ELSEWHERE = {
    "num_return_sequences", "assistant_early_exit", "use_mtp", "num_beam_groups", "top_h", "compile_config",
    "assistant_ensemble_weight", "speculation_type", "continuous_batching_config", "transformers_version",
}  # fmt: skip


class Laboratory:
    """One model with a stock LM, an early and a dense one around it; its checkpoint's settings change test by test."""

    def __init__(self, tokenizer):
        self.model = make_model("llama", vocab_size=257, max_position_embeddings=1024, seed=3)
        self.original = self.model.generation_config
        options = {"pretrained": self.model, "tokenizer": tokenizer, "max_length": 700, "device": "cpu"}
        self.stock, self.early = HFLM(**options), AdaInferLM(stopper="gap:1", **options)
        self.dense = AdaInferLM(**options)
        self.free = self.stock.generate_until(asked(), True)

    def given(self, source, settings):
        """Requests that are generated with these settings, from the checkpoint or from the requests."""
        if source == "request":
            return asked(**settings)
        self.model.generation_config = GenerationConfig.from_dict({**self.original.to_dict(), **settings})
        return asked()

    def expected(self, requests):
        """Stock's texts at batch size 1."""
        return self.stock.generate_until(requests, True)

    def check(self, requests, expected):
        """Early and dense texts are these, whatever the batch size (at 1, dense is stock)."""
        for size in (1, 4):
            self.early.batch_size_per_gpu = size
            early = self.early.generate_until(requests, True)
            assert early == expected, f"early, batch size {size}"
            assert {t.exit_record.exit_layer for t in early} == {early[0].exit_record.n_blocks}
        self.dense.batch_size_per_gpu = 4
        assert self.dense.generate_until(requests, True) == expected, "dense, batch size 4"


@pytest.fixture(scope="module")
def everything(tokenizer):
    return Laboratory(tokenizer)


@pytest.fixture
def lab(everything):
    yield everything
    everything.model.generation_config = everything.original
    everything.early.think_end_token = everything.dense.think_end_token = everything.stock.think_end_token = None


@pytest.fixture(scope="module")
def tokens(everything):
    """What the model writes most, second most, and first."""
    prompts = [[1 + b for b in p.encode()] for p in PROMPTS]
    texts = [everything.model.generate(torch.tensor([p]), max_new_tokens=12)[0, len(p) :].tolist() for p in prompts]
    ranked = [token for token, _ in Counter(t for text in texts for t in text if t).most_common()]
    return {OFTEN: ranked[0], SECOND: ranked[1], START: texts[1][0]}


def filled(value, tokens):
    """Settings with token ids in place of their names."""
    if isinstance(value, dict):
        return {name: filled(v, tokens) for name, v in value.items()}
    if isinstance(value, list):
        return [filled(v, tokens) for v in value]
    return tokens.get(value, value) if isinstance(value, str) else value


def asked(prompts=PROMPTS, **settings):
    settings = {"until": [], "max_gen_toks": 12, **settings}
    return [instance(p, settings, n, kind="generate_until") for n, p in enumerate(prompts)]


def applies(settings):
    """Whether this release of transformers knows them."""
    return all(hasattr(GenerationConfig(), name) for name in settings)


@pytest.mark.parametrize("source", ["checkpoint", "request"])
@pytest.mark.parametrize("name", [*ACTS, *INERT])
def test_settings_mean_what_they_mean_to_stock_at_batch_size_1(name, source, lab, tokens):
    settings = filled({**ACTS, **INERT}[name], tokens)
    if not applies(settings):
        pytest.skip("this transformers has no such setting")
    if name == "max_new_tokens" and source == "request":  # which lm-eval reads as max_gen_toks
        settings = {"max_gen_toks": settings["max_new_tokens"]}
    requests = lab.given(source, settings)
    expected = lab.expected(requests)
    assert (expected != lab.free) == (name in ACTS)
    lab.check(requests, expected)


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_what_a_checkpoint_says_and_lm_eval_overrides_is_nobodys_fault(name, lab):
    requests = lab.given("checkpoint", OVERRIDDEN[name])
    assert lab.expected(requests) == lab.free
    lab.check(requests, lab.free)


def refusal(lm, requests):
    """The sentence, after which nothing has been generated; harmless requests come first."""
    before = lm.generated_tokens
    with pytest.raises(AdaInferError) as found:
        lm.generate_until([*asked(PROMPTS[:1]), *requests], True)
    assert lm.generated_tokens == before and "\n" not in str(found.value)
    return str(found.value)


@pytest.mark.parametrize("source", ["checkpoint", "request"])
@pytest.mark.parametrize("name", [*NOT_EARLY, *REFUSED])
def test_refusals_name_the_setting_and_where_it_is_from(name, source, lab):
    requests = lab.given(source, {**NOT_EARLY, **REFUSED}[name])
    sentence = refusal(lab.early, requests)
    assert sentence.startswith("generation_config.json: " if source == "checkpoint" else "generation_kwargs: ")
    if "repetition_penalty" not in name:  # of which transformers says "`penalty` has to be a strictly positive float"
        assert name in sentence
    if name in REFUSED:
        with pytest.raises(Exception):  # noqa: B017 - any of stock's
            lab.expected(requests)
        assert "generation=dense" not in refusal(lab.dense, requests)
    else:
        assert "generation=dense" in sentence
        lab.dense.batch_size_per_gpu = 4
        assert lab.dense.generate_until(requests, True) == lab.expected(requests)


@pytest.mark.parametrize("settings", [
    {"use_cache": True}, {"pad_token_id": 0}, {"attention_mask": 1}, {"num_return_sequences": 2}, {"temprature": 0.5},
    {"do_sample": True}, {"cache_implementation": "paged"}, {"compile_config": {}}, {"max_length": 20},
    {"watermarking_config": {"nonsense": 1}}, {"max_length": "many"},
], ids=str)  # fmt: skip
def test_requests_that_stock_fails_on_are_refused_before_anything_is_generated(settings, lab):
    requests = asked(**settings)
    with pytest.raises(Exception):  # noqa: B017 - any of stock's
        lab.expected(requests)
    for lm in (lab.early, lab.dense):
        sentence = refusal(lm, requests)
        assert sentence.startswith("generation_kwargs: ")
        assert next(iter(settings)).split("_")[0] in sentence.lower()


def test_every_setting_of_transformers_is_tried_or_said_to_be_elsewhere():
    """A setting that a release adds has to be put into one of the lists."""
    cases = [case for some in (ACTS, INERT, OVERRIDDEN, NOT_EARLY, REFUSED) for case in some.values()]
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert fields - {name for case in cases for name in case} - ELSEWHERE == set()


def test_max_length_of_a_request_counts_each_rows_own_prompt(lab):
    """Also where other requests of the same call say something else."""
    requests = [r for some in zip(asked(max_length=42), asked(), strict=True) for r in some]
    lab.check(requests, lab.expected(requests))


def test_modes_that_the_model_has_no_layers_for_are_refused_by_name(lab):
    for name, value in (("use_mtp", True), ("assistant_early_exit", 1)):
        if hasattr(lab.original, name):
            assert f"assisted_generation can't exit early, and {name}={value}" in refusal(lab.early, asked(**{name: value}))


class Memory(LogitsProcessor):
    """Holds a number per row and token, as a processor made for a whole batch does: what was chosen gets unlikely."""

    def __init__(self, prompts):
        self.length, self.seen = prompts.shape[1], torch.zeros(len(prompts), 257)

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] > self.length:
            self.seen.scatter_add_(1, input_ids[:, -1:], torch.full_like(self.seen, 3.0))
        return scores - self.seen - 0.001 * input_ids.shape[1] * torch.arange(257)


def test_processors_that_remember_are_made_for_each_row(lab, tokens, monkeypatch):
    """Rows finish at different times, and what a processor holds of the others has to stay with them."""
    original = lab.model._get_logits_processor

    def with_memory(*args, encoder_input_ids, **kwargs):
        stock = original(*args, encoder_input_ids=encoder_input_ids, **kwargs)
        return LogitsProcessorList([*stock, Memory(encoder_input_ids)])

    monkeypatch.setattr(lab.model, "_get_logits_processor", with_memory)
    requests = asked(eos_token_id=[0, tokens[OFTEN]])
    expected = lab.expected(requests)
    assert len({len(t) for t in expected}) > 1
    lab.check(requests, expected)


@pytest.mark.parametrize("source", ["checkpoint", "request"])
def test_the_clock_of_max_time_starts_with_each_text(source, lab, monkeypatch):
    """A clock that goes on by a second whenever it is read: once at the beginning, and once per token."""
    now = iter(range(10**6))
    clock = SimpleNamespace(time=lambda: float(next(now)))
    monkeypatch.setattr(stopping_criteria, "time", clock)
    monkeypatch.setattr(loop, "time", clock)
    requests = lab.given(source, {"max_time": 4.5})
    lab.check(requests, lab.expected(requests))
    assert {len(t.exit_record.layers) for t in lab.early.generate_until(requests, True)} == {5}


def test_a_stop_string_inside_the_reasoning_ends_it_at_every_batch_size(lab):
    """Alone, a row ends there; in a batch, stock goes on until all rows have ended, and thoughts may end in between."""
    assert lab.free[5].startswith("=lzl")
    lab.stock.think_end_token = lab.early.think_end_token = lab.dense.think_end_token = "z"
    requests = asked(until=["l"])
    expected = lab.expected(requests)
    assert expected[5] == "="
    lab.check(requests, expected)


def test_the_checkpoints_max_new_tokens_is_said_to_go_first(lab, caplog):
    lab.early.generate_until(lab.given("checkpoint", {"max_new_tokens": 3}), True)
    assert "generation_config.json: the checkpoint's max_new_tokens=3 goes before max_gen_toks" in caplog.text


def test_not_finite_logits_can_be_drawn_from_where_the_settings_replace_them(lab):
    settings = {"do_sample": True, "temperature": 1.0}
    lab.early.generate_until(asked(**settings), True)
    broken = torch.where(torch.arange(257) == 9, torch.nan, 1.0)
    hook = lab.model.lm_head.register_forward_hook(lambda m, a, out: out * broken)
    try:
        with pytest.raises(AdaInferError, match="so no token can be drawn"):
            lab.early.generate_until(asked(**settings), True)
        assert len(lab.early.generate_until(asked(**settings, remove_invalid_values=True), True)) == len(PROMPTS)
    finally:
        hook.remove()


def test_a_checkpoint_that_transformers_cannot_read_is_refused_in_one_sentence(folder, tmp_path):
    copied = tmp_path / "model"
    shutil.copytree(folder, copied)
    (copied / "generation_config.json").write_text('{"num_return_sequences": 2, "eos_token_id": 0}')
    with pytest.raises(AdaInferError, match=r"^generation_config.json: .*num_return_sequences"):
        AdaInferLM(pretrained=str(copied), device="cpu")
