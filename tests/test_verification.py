"""`adainfer verify`: what works passes, and what is broken behind the load-time probes' backs is found."""

from __future__ import annotations

import json
import math

import pytest
import torch
from helpers.models import make_model
from transformers import T5Config, T5ForConditionalGeneration

from lm_eval_adainfer.cli.main import main
from lm_eval_adainfer.harness.model import AdaInferLM
from lm_eval_adainfer.strategies.files import built_in
from lm_eval_adainfer.strategies.rules import GapStopper
from lm_eval_adainfer.structure.anatomy import Anatomy
from lm_eval_adainfer.verification import (
    FAILED,
    NOT_SUPPORTED,
    OK,
    Finding,
    _Tally,
    as_json,
    render,
    spread,
    verify_model,
)

CHECKS = ["structure", "dense", "exits", "compaction", "prefix", "generation"]


def lm_of(model, tokenizer, **kwargs):
    return AdaInferLM(pretrained=model, tokenizer=tokenizer, **{"max_length": 64, **kwargs})


def statuses(findings):
    return {f.check: f.status for f in findings}


def failed(findings):
    return {f.check for f in findings if f.status == FAILED}


@pytest.mark.parametrize("family", ["llama", "opt-post-norm-projected", "bloom", "falcon", "gemma3", "mixtral"])
def test_a_model_that_works_passes_every_check(family, tokenizer):
    findings = verify_model(lm_of(make_model(family, vocab_size=257), tokenizer), True)
    assert statuses(findings) == dict.fromkeys(CHECKS, OK), render(findings)
    for finding in findings[1:]:
        assert finding.comparisons >= 20 and 0 <= finding.largest_error <= finding.tolerance < 1e-3
    assert "5 blocks" in findings[0].detail and "vocabulary 257, float32, on cpu" in findings[0].detail
    by_name = {f.check: f for f in findings}
    assert "each of the 5 blocks" in by_name["exits"].detail
    assert "left after blocks 1, 2, 3, 4, 5 " in by_name["generation"].detail
    assert "run once" in by_name["prefix"].detail


def test_a_model_without_a_plain_cache_passes_and_says_what_is_not_supported(tokenizer):
    findings = verify_model(lm_of(make_model("mamba", vocab_size=257), tokenizer), True)
    assert statuses(findings) == {**dict.fromkeys(CHECKS, OK), "prefix": NOT_SUPPORTED, "generation": NOT_SUPPORTED}
    by_name = {f.check: f for f in findings}
    assert by_name["prefix"].detail.startswith("not used, every prompt is run whole (blocks keep a recurrent state)")
    assert "pass generation=dense" in by_name["generation"].detail and by_name["generation"].comparisons == 0


@pytest.mark.parametrize(
    "stopper",
    ["gap:0.3", "saturation:0.9", "patience:2", "fixed:2", "shortgpt:last2", "svm", str(built_in()["best"])],
    ids=["gap", "saturation", "patience", "fixed", "shortgpt", "svm", "boosted"],
)
def test_a_stopper_is_asked_block_by_block(stopper, tokenizer):
    """Features from the head, cosines, memory, no question at all, blocks taken out, fitted ones."""
    findings = verify_model(lm_of(make_model("llama", vocab_size=257), tokenizer, stopper=stopper), True)
    assert statuses(findings) == {**dict.fromkeys(CHECKS, OK), "stopper": OK}, render(findings)


def test_check_layers_and_min_layer_are_followed(tokenizer):
    model = make_model("llama", vocab_size=257)
    findings = verify_model(lm_of(model, tokenizer, stopper="gap:0.1", min_layer=2, check_layers="1+3"), True)
    assert not failed(findings) and "leaves after blocks 3, 5 " in findings[-1].detail


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_coarser_dtype_is_checked_in_float32_and_then_against_its_own_rounding(dtype, tokenizer):
    findings = verify_model(lm_of(make_model("llama", vocab_size=257).to(dtype), tokenizer, stopper="gap:0.3"), True)
    assert statuses(findings) == {**dict.fromkeys(CHECKS, OK), "stopper": OK, "rounding": OK}, render(findings)
    *checks, own = findings[1:]
    assert all(f.tolerance < 1e-3 for f in checks) and 1e-3 < own.tolerance < 2
    name = str(dtype).removeprefix("torch.")
    assert f"{name}, on cpu" in findings[0].detail and own.detail.startswith(f"in {name} answers differ from plain")


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("max_length", [2, 5, 64])
def test_a_vocabulary_of_seven_few_blocks_and_short_windows(blocks, max_length, tokenizer):
    model = make_model("llama", vocab_size=7, num_hidden_layers=blocks)
    findings = verify_model(lm_of(model, tokenizer, max_length=max_length, stopper="gap:0.2"), True)
    assert not failed(findings), render(findings)
    assert statuses(findings)["prefix"] == (OK if max_length == 64 else NOT_SUPPORTED)


def test_a_deep_model_is_checked_at_a_spread_of_blocks(tokenizer):
    assert [spread(n) for n in (1, 2, 5, 8)] == [list(range(1, n + 1)) for n in (1, 2, 5, 8)]
    assert spread(80) == [1, 12, 24, 35, 46, 57, 69, 80]
    findings = verify_model(lm_of(make_model("llama", vocab_size=257, num_hidden_layers=11), tokenizer), True)
    assert not failed(findings) and "answers after blocks 1, 2, 4, 5, 7, 8, 10, 11 of 11" in findings[2].detail


# ------------------------------------------------------------------------------------------------ what has to be found
def test_rows_that_influence_each_other(tokenizer):
    """Only in batches of four and more, so that loading sees nothing."""
    model = make_model("llama", vocab_size=257)

    def mix(module, args, output):
        return output if len(output) < 4 else output + 0.1 * output.mean(0, keepdim=True)

    model.model.layers[1].mlp.register_forward_hook(mix)
    findings = verify_model(lm_of(model, tokenizer), True)
    assert {"dense", "compaction"} <= failed(findings)
    assert "is off by" in {f.check: f for f in findings}["compaction"].detail


def test_a_head_that_is_wrong_for_early_blocks(tokenizer, monkeypatch):
    """What is read from the last block stays right, so that loading sees nothing."""
    model, right = make_model("llama", vocab_size=257), Anatomy.logits
    last = []
    model.model.layers[-1].register_forward_hook(lambda m, a, output: last.append(output.reshape(-1, 32)))

    def logits(self, hidden, candidates=None):
        known = any((rows[:, None] == hidden[None]).all(-1).any(0).all() for rows in last)
        return right(self, hidden if known else 1.1 * hidden + 0.1, candidates)

    monkeypatch.setattr(Anatomy, "logits", logits)
    findings = verify_model(lm_of(model, tokenizer), True)
    assert {"exits", "compaction"} <= failed(findings) and statuses(findings)["dense"] == OK
    assert {f.check: f for f in findings}["exits"].detail.startswith("what norm and head read after block 1 is off by ")


def test_a_norm_that_reads_other_positions(tokenizer):
    """Only of more than eight, so that loading sees nothing; a position's logits alone are then others."""
    model = make_model("llama", vocab_size=257)

    def blur(module, args, output):
        return output if output.shape[1] <= 8 else output + 0.1 * output.mean(1, keepdim=True)

    model.model.norm.register_forward_hook(blur)
    assert {"dense", "exits", "compaction"} <= failed(verify_model(lm_of(model, tokenizer), True))


def test_a_cache_that_is_wrong_once_it_is_long(tokenizer):
    """Only behind ten tokens, so that loading sees nothing."""
    model = make_model("llama", vocab_size=257)

    def forget(module, args, kwargs):
        cache = kwargs.get("past_key_values")
        cached = 0 if cache is None else cache.get_seq_length()
        if cached > 10 and cached > kwargs["hidden_states"].shape[1]:  # a plain forward fills a cache, and reads none
            return args, {**kwargs, "hidden_states": 1.1 * kwargs["hidden_states"] + 0.1}
        return None

    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(forget, with_kwargs=True)
    assert failed(verify_model(lm_of(model, tokenizer), True)) == {"prefix", "generation"}


class _Herd(GapStopper):
    """Each decision looks at all decisions of the batch."""

    kind = "herd"

    def margin(self, block, values, memory=None):
        return super().margin(block, values.mean(0, keepdim=True).expand_as(values))


def test_a_stopper_whose_decisions_depend_on_the_batch(tokenizer):
    findings = verify_model(lm_of(make_model("llama", vocab_size=257), tokenizer, stopper=_Herd(0.3)), True)
    assert failed(findings) == {"stopper"}
    assert findings[-1].detail.startswith("the exit block of a context of ")


def test_an_engine_that_says_another_block_than_it_read(tokenizer, monkeypatch):
    lm = lm_of(make_model("llama", vocab_size=257), tokenizer)
    whole = AdaInferLM._loglikelihood_tokens

    def shifted(self, *args, **kwargs):
        answers = whole(self, *args, **kwargs)
        for answer in answers:
            object.__setattr__(answer.exit_record, "exit_layer", max(1, answer.exit_record.exit_layer - 1))
        return answers

    monkeypatch.setattr(AdaInferLM, "_loglikelihood_tokens", shifted)
    assert {"dense", "exits", "compaction"} <= failed(verify_model(lm, True))


def test_dropout_numbers_that_are_not_finite_and_errors_are_findings(tokenizer):
    """After loading: a model in training mode, a block that gives NaN, a block that raises."""
    model = make_model("gpt2", vocab_size=257)
    lm = lm_of(model, tokenizer)
    model.train()
    assert "dense" in failed(verify_model(lm, True))
    model.eval()
    handle = model.transformer.h[3].register_forward_hook(lambda m, a, output: output * torch.nan)
    findings = verify_model(lm, True)
    assert {"dense", "exits", "compaction", "prefix"} <= failed(findings)
    json.loads(as_json(findings), parse_constant=pytest.fail)
    handle.remove()

    def fail(module, args):
        raise RuntimeError("no such kernel\nand much more")

    model.transformer.h[3].register_forward_pre_hook(fail)
    findings = verify_model(lm, True)
    assert failed(findings) == {"dense", "exits", "compaction", "prefix"}  # and generation is refused
    assert findings[1].detail == "it ended with an error (RuntimeError: no such kernel)"


def test_a_tally_by_hand():
    tally = _Tally()
    tally.number(1.0, 1.5, 1.0, "a")
    tally.number(torch.tensor([-torch.inf, 2.0]), torch.tensor([-torch.inf, 2.1]), 1.0, "b")
    tally.same(True, None, "c")
    assert tally.finding("x", "y") == Finding(
        "x", OK, "y: 2 comparisons, largest error 0.5 of 1 allowed; 1 too near to a tie to compare", 2, 1, 0.5, 1.0
    )
    tally.number(torch.nan, 1.0, 1.0, "d")
    tally.number(1.0, 1.0, 1.0, "after it")
    tally.same(3, 2, "e")
    finding = tally.finding("x", "y")
    assert (
        math.isnan(finding.largest_error)
        and finding.status == FAILED
        and finding.detail.startswith("d is off by nan, with a tolerance of 1 (2 of 5 ")
    )


# ------------------------------------------------------------------------------------------------ the command
def test_the_command_prints_a_table_and_a_verdict(tmp_path, capsys):
    target = tmp_path / "found.json"
    model = "pretrained=adainfer-demo,dtype=float32,stopper=svm"
    assert main(["verify", "--model_args", model, "--device", "cpu", "--json", str(target)]) == 0
    out, err = capsys.readouterr()
    table, verdict = out.strip().split("\n\n")
    assert [line.split()[:2] for line in table.splitlines()] == [
        ["check", "result"], *([name, "ok"] for name in [*CHECKS, "stopper"])
    ]  # fmt: skip
    assert verdict.startswith("ok: ") and verdict.endswith(" comparisons with plain forwards, none differs")
    assert "Verifying: 100%" in err
    found = json.loads(target.read_text())
    assert [row["check"] for row in found] == [*CHECKS, "stopper"] and all(row["status"] == "ok" for row in found)


def test_the_command_fails_where_a_check_does(monkeypatch, capsys, folder):
    monkeypatch.setattr(
        "lm_eval_adainfer.verification._Tally.same", lambda self, *args: self.wrong.append("all is wrong")
    )
    assert main(["verify", "--model_args", f"pretrained={folder}", "--device", "cpu"]) == 1
    assert capsys.readouterr().out.strip().splitlines()[-1] == (
        "FAILED: dense, exits, compaction, prefix, generation: early exit gives other answers than this model"
    )


def test_a_model_that_is_refused_and_wrong_arguments_are_one_sentence(tmp_path, capsys, tokenizer, folder):
    T5ForConditionalGeneration(
        T5Config(vocab_size=257, d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
    ).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for model, said in (
        (f"pretrained={tmp_path}", f"pretrained: {tmp_path} is an encoder-decoder model (t5), but adainfer needs a"),
        (f"pretrained={folder},stopper=gpa", "stopper: "),
        (f"pretrained={folder},no_such=1", "model_args: "),
    ):
        assert main(["verify", "--model_args", model, "--device", "cpu"]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.strip().splitlines()[-1].startswith(f"adainfer: error: {said}")
