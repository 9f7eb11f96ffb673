"""`adainfer verify`: what works passes, and what is broken behind the load-time probes' backs is found."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.models import cache_among, make_model
from transformers import T5Config, T5ForConditionalGeneration

from lm_eval_adainfer.cli.main import main
from lm_eval_adainfer.generation import prompts
from lm_eval_adainfer.harness.model import AdaInferLM
from lm_eval_adainfer.prefill import engine, reading
from lm_eval_adainfer.prefill.forward import Forward
from lm_eval_adainfer.prefill.prefixes import Prefix
from lm_eval_adainfer.readers import specs as readers
from lm_eval_adainfer.readers.base import Reader
from lm_eval_adainfer.readers.tuned import Maps
from lm_eval_adainfer.strategies import files, specs
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
        cache = cache_among(kwargs)
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


# ------------------------------------------------------------------------------------------------ readers
def tuned(blocks=5, width=32, rank=None):
    """A tuned reader with maps that matter."""
    rng = np.random.default_rng(0)

    def drawn(*shape):
        return (0.1 * rng.normal(size=(blocks - 1, *shape))).astype(np.float32)

    maps = {"weight": drawn(width, width)} if rank is None else {"down": drawn(rank, width), "up": drawn(width, rank)}
    return Reader("tuned", maps=Maps({"bias": drawn(width), **maps}))


UNDER_A_READER = [*CHECKS, "reader", "texts"]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("reader", ["copy:1", "copy:4", "sim:1", "sim:4"])
def test_a_reader_that_works_passes(family, reader, tokenizer):
    lm = lm_of(make_model(family, vocab_size=257), tokenizer, stopper="gap:0.3", reader=reader, check_layers="all")
    findings = verify_model(lm, True)
    assert statuses(findings) == {**dict.fromkeys(UNDER_A_READER, OK), "stopper": OK}, render(findings)
    by_name = {f.check: f for f in findings}
    assert by_name["reader"].comparisons >= 80 and by_name["reader"].tolerance < 1e-3
    assert by_name["reader"].detail.startswith(f"{reader} reads rows of one batch after blocks 1, 2, 3, 4, 5 as alone, ")
    assert "what prompts share read once" in by_name["reader"].detail
    assert by_name["texts"].detail.startswith(f"under {reader} texts whose prompts left after blocks 1, ")


@pytest.mark.parametrize("rank", [None, 3])
def test_a_tuned_reader_that_works_passes(rank, tokenizer):
    lm = lm_of(make_model("llama", vocab_size=257), tokenizer, stopper="gap:0.3", reader=tuned(rank=rank))
    findings = verify_model(lm, True)
    assert statuses(findings) == {**dict.fromkeys(UNDER_A_READER, OK), "stopper": OK}, render(findings)
    assert "texts whose tokens left after blocks 1, 2, 3, 4, 5 " in {f.check: f for f in findings}["texts"].detail


@pytest.mark.parametrize("reader", ["copy:2", "sim:2", "tuned"])
def test_a_reader_in_a_coarser_dtype(reader, tokenizer):
    model = make_model("llama", vocab_size=257).to(torch.bfloat16)
    findings = verify_model(lm_of(model, tokenizer, reader=tuned() if reader == "tuned" else reader), True)
    assert statuses(findings) == {**dict.fromkeys(UNDER_A_READER, OK), "rounding": OK}, render(findings)
    assert findings[-1].comparisons == 64  # half of them under the reader


@pytest.mark.parametrize("reader", ["copy:3", "sim:3", "copy:40"])
@pytest.mark.parametrize("max_length", [2, 5, 24])
def test_readers_in_short_windows(reader, max_length, tokenizer):
    model = make_model("llama", vocab_size=7, num_hidden_layers=2)
    findings = verify_model(lm_of(model, tokenizer, max_length=max_length, reader=reader, stopper="gap:0.2"), True)
    assert not failed(findings), render(findings)


@pytest.mark.parametrize("reader", ["head", "copy:2"])
def test_a_stopper_from_a_file_that_names_a_reader(reader, tokenizer, tmp_path):
    """The other checks read with head, whatever the file says."""
    stopper = specs.parse("svm")
    stopper.reader = readers.parse(reader)
    files.save(stopper, tmp_path / "a.stopper")
    lm = lm_of(make_model("llama", vocab_size=257), tokenizer, stopper=str(tmp_path / "a.stopper"), check_layers="all")
    assert lm.reader.name == reader
    findings = verify_model(lm, True)
    expected = CHECKS if reader == "head" else UNDER_A_READER
    assert statuses(findings) == {**dict.fromkeys(expected, OK), "stopper": OK}, render(findings)


LONG = 7  # tokens: more than any probe at loading has


def failed_under(reader, tokenizer, plant, **options):
    """The checks that fail once a fault is planted in a model that is loaded already."""
    lm = lm_of(make_model("llama", vocab_size=257), tokenizer, reader=reader, **options)
    plant()
    findings = verify_model(lm, True)
    assert not [f for f in findings if "ended with an error" in f.detail], render(findings)
    return failed(findings)


@pytest.mark.parametrize("reader", ["copy:2", "sim:2"])
def test_a_window_that_is_off_by_one(reader, tokenizer, monkeypatch):
    right = reading._tokens

    def longer(reader, spot):
        more = spot.row.decision >= LONG
        return right(replace(reader, window=reader.window + 1) if more else reader, spot)

    assert "reader" in failed_under(reader, tokenizer, lambda: monkeypatch.setattr(reading, "_tokens", longer))


def test_states_that_are_copied_from_another_block(tokenizer, monkeypatch):
    """Long rows' own tokens are copied as they were one block before."""
    right, before = Forward.advance, {}

    def advance(self):
        before[self.block + 1] = self.hidden
        return right(self)

    def read(self, k, hidden, continued, spots, store=None):
        used = before.get(k) if hidden.shape[1] > LONG and before[k].shape == hidden.shape else None
        return right_read(self, k, hidden if used is None else used, continued, spots, store)

    right_read = reading.Reading.read

    def plant():
        monkeypatch.setattr(Forward, "advance", advance)
        monkeypatch.setattr(reading.Reading, "read", read)

    assert failed_under("copy:2", tokenizer, plant) == {"reader", "texts"}


def test_a_shared_prefix_whose_copies_serve_another_block(tokenizer, monkeypatch):
    right, first = Prefix.copies, {}

    def copies(self, k, storing):
        return first.setdefault(id(self), (self, right(self, k, storing)))[1]

    assert failed_under("copy:2", tokenizer, lambda: monkeypatch.setattr(Prefix, "copies", copies)) == {"reader"}


def test_states_of_a_shared_prefix_that_are_kept_from_another_block(tokenizer, monkeypatch):
    right = Prefix.require

    def require(self, k):
        right(self, k)
        for block in set(self.after) & {k}:
            self.after[block] = self.after.get(block - 1, self.after[block])

    for reader in ("copy:4", "sim:4"):
        assert failed_under(reader, tokenizer, lambda: monkeypatch.setattr(Prefix, "require", require)) == {"reader"}


@pytest.mark.parametrize("reader", ["copy:2", "sim:2"])
def test_position_ids_that_are_off_by_one(reader, tokenizer, monkeypatch):
    class Shifted(Forward):
        def __init__(self, *args, given=None, **kwargs):
            places = (given or {}).get("position_ids")
            if places is not None and places.shape[1] <= LONG < int(places.max()):
                given = {**given, "position_ids": torch.where(places > 0, places + 1, places)}
            super().__init__(*args, given=given, **kwargs)

    found = failed_under(reader, tokenizer, lambda: monkeypatch.setattr(reading, "Forward", Shifted))
    assert found == {"reader", "texts"}


def test_maps_of_another_block(tokenizer, monkeypatch):
    right = Maps.apply
    plant = lambda: monkeypatch.setattr(Maps, "apply", lambda self, k, hidden: right(self, max(1, k - 1), hidden))  # noqa: E731
    assert failed_under(tuned(), tokenizer, plant, stopper="gap:0.3") == {"reader", "texts", "stopper"}


@pytest.mark.parametrize("reader", ["copy:2", "sim:2"])
def test_a_cache_that_has_a_prompts_copies_one_slot_too_early(reader, tokenizer, monkeypatch):
    right = prompts._Run._write

    def write(self, stored, rows, places, tokens, starts):
        right(self, stored, rows, places, tokens, [max(0, start - 1) for start in starts])

    plant = lambda: monkeypatch.setattr(prompts._Run, "_write", write)  # noqa: E731
    assert failed_under(reader, tokenizer, plant) == {"texts"}


def test_a_stopper_that_is_asked_about_what_head_reads(tokenizer, monkeypatch):
    """Scores are the reader's, decisions are not."""
    right = engine.ask

    def ask(*args, read=None, **kwargs):
        return right(*args, **kwargs)

    options = {"stopper": "gap:0.3", "check_layers": "all"}
    plant = lambda: monkeypatch.setattr(engine, "ask", ask)  # noqa: E731
    assert "stopper" in failed_under("copy:2", tokenizer, plant, **options)


def test_a_model_whose_texts_cannot_leave_early_says_so_under_a_reader(tokenizer):
    lm = lm_of(make_model("mamba", vocab_size=257), tokenizer, reader=tuned())
    found = statuses(verify_model(lm, True))
    assert (found["reader"], found["texts"]) == (OK, NOT_SUPPORTED)


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


def test_the_command_takes_a_reader_and_refuses_a_second_one(capsys, folder):
    model = f"pretrained={folder},dtype=float32"
    assert main(["verify", "--model_args", model, "--device", "cpu", "--reader", "copy:2"]) == 0
    checks = [line.split()[0] for line in capsys.readouterr().out.split("\n\n")[0].splitlines()[1:]]
    assert checks == UNDER_A_READER
    assert main(["verify", "--model_args", f"{model},reader=sim", "--device", "cpu", "--reader", "copy:2"]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said == "adainfer: error: reader: --reader says copy:2, and model_args sim; give one of the two"
