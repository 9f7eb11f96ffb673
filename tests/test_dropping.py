"""ShortGPT: Block Influence by hand, and cut models against models that were built without the blocks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.models import FAMILIES, lm_of, make_model
from helpers.reference import states_after_blocks
from helpers.refusals import refused
from helpers.stoppers import fitted
from helpers.tasks import instance, make_task, requests
from lm_eval.models.huggingface import HFLM

from lm_eval_adainfer.fitting import influence
from lm_eval_adainfer.strategies import files, specs
from lm_eval_adainfer.strategies.base import Schedule
from lm_eval_adainfer.strategies.shortgpt import LastStopper, ShortGPTStopper
from lm_eval_adainfer.structure import removal
from lm_eval_adainfer.structure.anatomy import Anatomy
from lm_eval_adainfer.structure.unwrapping import with_same_weights
from lm_eval_adainfer.traces.splits import split_of

FEW = ["llama", "gpt2", "opt", "gemma3", "mistral"]
LIST_NAMES = ("layers", "h")


def dropping_stopper(*dropped, n_blocks=5):
    """A ShortGPT stopper whose influence makes it drop these blocks."""
    values = np.array([0.1 if k in dropped else 1.0 + k for k in range(1, n_blocks + 1)])
    return ShortGPTStopper({"influence": values}, len(dropped))


def built_without(family, dropped, **overrides):
    """The reference: a fresh model of fewer layers, with the weights of the layers that stay copied by name."""
    whole = make_model(family, vocab_size=257, **overrides)
    kept = [k for k in range(5) if k + 1 not in dropped]
    shorter = {"n_layer" if "n_layer" in FAMILIES[family][1] else "num_hidden_layers": len(kept)}
    if overrides.get("layer_types"):
        shorter["layer_types"] = [overrides["layer_types"][k] for k in kept]
    small = make_model(family, vocab_size=257, **{**overrides, **shorter})
    weights = {}
    for name, value in whole.state_dict().items():
        parts = name.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdecimal() and parts[i - 1] in LIST_NAMES), None)
        if at is None:
            weights[name] = value
        elif int(parts[at]) in kept:
            weights[".".join([*parts[:at], str(kept.index(int(parts[at]))), *parts[at + 1 :]])] = value
    small.load_state_dict(weights)
    return whole, small


MIXED = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention", "sliding_attention"]}
CASES = [(f, d, MIXED if f == "gemma3" else {}) for f in FEW for d in [(2,), (1, 4), (3, 4, 5)]]
ids = [f"{f}-{'.'.join(map(str, d))}" for f, d, _ in CASES]


# ------------------------------------------------------------------------------------------------ cut models


@pytest.mark.parametrize(("family", "dropped", "overrides"), CASES, ids=ids)
def test_answers_are_those_of_a_model_built_without_the_blocks(family, dropped, overrides, tokenizer):
    whole, small = built_without(family, dropped, **overrides)
    lm = lm_of(whole, tokenizer, stopper=dropping_stopper(*dropped))
    asked = requests()
    expected = HFLM(pretrained=small, tokenizer=tokenizer, batch_size=4, max_length=64).loglikelihood(asked, True)
    dense = lm_of(whole, tokenizer).loglikelihood(asked, True)
    for mine, theirs, before in zip(lm.loglikelihood(asked, True), expected, dense, strict=True):
        assert mine[0] == pytest.approx(theirs[0], rel=2e-6, abs=1e-4) and mine[1] == theirs[1]
        assert (mine.exit_record.exit_layer, mine.exit_record.n_blocks) == (5 - len(dropped), 5)
        assert mine.exit_record.pruning_ratio == pytest.approx(len(dropped) / 5)
        assert mine.exit_record.flops_dense == before.exit_record.flops_dense == before.exit_record.flops
    assert any(abs(mine[0] - before[0]) > 1e-3 for mine, before in zip(lm.loglikelihood(asked, True), dense, strict=True))


@pytest.mark.parametrize(("family", "dropped", "overrides"), CASES, ids=ids)
def test_texts_are_those_of_a_model_built_without_the_blocks(family, dropped, overrides, tokenizer):
    """Several steps with a cache, rows of different lengths in a batch, and prompts beyond the sliding window."""
    whole, small = built_without(family, dropped, **overrides)
    prompts = ["a cat", "deer fox goat hi", "x", "no way to be a goat"]
    options = {"until": ["\0"], "max_gen_toks": 8, "do_sample": False}
    asked = [instance(p, options, n, kind="generate_until") for n, p in enumerate(prompts)]
    lm = lm_of(whole, tokenizer, stopper=dropping_stopper(*dropped))
    texts = lm.generate_until(asked, True)
    assert texts == HFLM(pretrained=small, tokenizer=tokenizer, batch_size=4, max_length=64).generate_until(asked, True)
    for text, prompt in zip(texts, prompts, strict=True):
        run, new, count = 5 - len(dropped), len(lm.tok_encode(text)), Counts(whole)
        assert (text.exit_record.exit_layer, text.exit_record.layers_run, text.exit_record.n_blocks) == (run, run, 5)
        if new == 8:
            assert text.exit_record.flops_dense == count.of(range(5), len(prompt) + 7, 8)
            kept = [k for k in range(5) if k + 1 not in dropped]
            assert text.exit_record.flops == count.of(kept, len(prompt) + 7, 8)


class Counts:
    """docs/numbers.md by hand, for a text of ``positions`` tokens run through some blocks, ``heads`` head rows."""

    def __init__(self, model):
        self.anatomy = Anatomy(model)

    def of(self, blocks, positions, heads):
        a = self.anatomy
        weights = sum(a.block_weights[k] for k in blocks)
        width = sum(a.attention_width[k] for k in blocks)
        pairs = positions * (positions + 1) // 2
        return 2 * weights * positions + 4 * pairs * width + 2 * a.vocab_size * a.hidden_size * heads


@pytest.mark.parametrize("family", FEW)
def test_the_cache_gives_the_logits_of_the_whole_prefix(family):
    whole, small = built_without(family, (2, 4))
    cut = with_same_weights(whole)
    anatomy = Anatomy(cut)
    removal.drop(anatomy, (2, 4))
    texts, cache = torch.randint(1, 257, (2, 4), generator=torch.Generator().manual_seed(0)), None
    new = texts
    with torch.no_grad():
        for _ in range(8):
            step = cut(input_ids=new, **anatomy.with_cache(cache))
            cache, expected = step[anatomy.cache_argument], small(input_ids=texts, use_cache=False).logits[:, -1]
            torch.testing.assert_close(step.logits[:, -1], expected, atol=1e-4, rtol=1e-5)
            new = expected.argmax(-1, keepdim=True)
            texts = torch.cat([texts, new], dim=1)
    assert len(cache) == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_cut_or_refused_in_a_sentence(family, tokenizer):
    model = make_model(family, vocab_size=257)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    lm = lm_of(model, tokenizer, stopper=dropping_stopper(2, 4))
    assert lm.anatomy.n_blocks == 3 and lm.model is not model
    answers = lm.loglikelihood(requests(documents=3), True)
    expected = bypassed(model, (2, 4), lm, requests(documents=3))
    assert [a[0] for a in answers] == pytest.approx(expected, rel=2e-6, abs=1e-4)
    after = Anatomy(model)  # the caller's model is as it was, and the cut one has its weights, not copies of them
    assert after.n_blocks == 5 and all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert {id(p) for p in lm.model.parameters()} <= {id(p) for p in model.parameters()}


def bypassed(model, dropped, lm, asked):
    """Log-probabilities of a model in which some blocks' outputs are replaced by their inputs, request by request."""
    blocks, found = Anatomy(model).blocks, []
    handles = []
    for k in dropped:

        def give_back(m, args, kwargs, out):
            hidden = args[0] if args else kwargs["hidden_states"]
            return hidden if isinstance(out, torch.Tensor) else (hidden, *out[1:])

        handles.append(blocks[k - 1].register_forward_hook(give_back, with_kwargs=True))
    for request in asked:
        context, continuation = lm._encode_pair(*request.args)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([(context + continuation)[:-1]]), use_cache=False).logits[0]
        picked = logits[-len(continuation) :].log_softmax(-1).gather(1, torch.tensor(continuation)[:, None])
        found.append(picked.sum().item())
    for handle in handles:
        handle.remove()
    return found


def test_rolling_counts_against_the_whole_model(tokenizer):
    whole, small = built_without("llama", (2, 3))
    asked = [instance("a deer and a goat", None, 0, kind="loglikelihood_rolling")]
    (mine,) = lm_of(whole, tokenizer, stopper=dropping_stopper(2, 3)).loglikelihood_rolling(asked, True)
    (theirs,) = HFLM(pretrained=small, tokenizer=tokenizer, max_length=64).loglikelihood_rolling(asked, True)
    (dense,) = lm_of(whole, tokenizer).loglikelihood_rolling(asked, True)
    assert mine == pytest.approx(theirs, rel=2e-6, abs=1e-4)
    assert (mine.exit_record.exit_layer, mine.exit_record.n_blocks, mine.exit_record.flops_dense) == (3, 5, dense.exit_record.flops_dense)


def test_the_record_and_the_fingerprint_name_the_dropped_blocks(tokenizer):
    model = make_model("llama", vocab_size=257)
    lms = [lm_of(model, tokenizer, stopper=s) for s in (dropping_stopper(2, 3), dropping_stopper(2, 4), "shortgpt:last2", "none")]
    assert [lm.record().get("dropped_blocks") for lm in lms] == [[2, 3], [2, 4], [4, 5], None]
    assert [lm.record()["n_blocks"] for lm in lms] == [5] * 4
    assert len({lm.fingerprint for lm in lms}) == len({lm.stopper.fingerprint for lm in lms}) == 4


def test_samples_and_results_name_the_dropped_blocks(tmp_path):
    from lm_eval import simple_evaluate

    stopper = dropping_stopper(5, 7, 9, n_blocks=12)
    files.save(stopper, tmp_path / "bi.stopper")
    found = simple_evaluate(
        model="adainfer", model_args=f"pretrained=adainfer-demo,dtype=float32,stopper={tmp_path / 'bi.stopper'}",
        tasks=["adainfer_demo_fact"], limit=3, batch_size=4, device="cpu", bootstrap_iters=0,
    )  # fmt: skip
    assert found["config"]["adainfer"]["dropped_blocks"] == [5, 7, 9] and found["config"]["adainfer"]["n_blocks"] == 12
    row = found["results"]["adainfer_demo_fact"]
    assert (row["exit_layer,none"], row["pruning_ratio,none"]) == (9, 0.25)
    assert [s["dropped_blocks"] for s in found["samples"]["adainfer_demo_fact"]] == [[5, 7, 9]] * 3


def test_a_trace_cannot_tell_what_a_cut_model_would_do():
    from lm_eval_adainfer.traces.margins import margins

    meta = {"n_blocks": 5, "features": [], "task": "t"}
    arrays = {"features": np.zeros((2, 5, 0), dtype=np.float32), "top_token": np.zeros((2, 5), dtype=int)}
    refused(lambda: margins(dropping_stopper(2), meta, arrays), "stopper", "shortgpt", "trace")
    last = margins(LastStopper(2), meta, arrays)
    assert (np.nan_to_num(last, nan=-1) > 0).tolist() == [[False, False, True, False, False]] * 2


def test_the_commands_write_stopper_files_that_run(tmp_path, capsys):
    from lm_eval_adainfer.cli.main import main
    from lm_eval_adainfer.strategies.specs import parse

    model = ["--model_args", "pretrained=adainfer-demo,dtype=float32", "--tasks", "adainfer_demo_topic", "--limit", "12"]
    assert main(["influence", *model, "--drop", "2", "-o", str(tmp_path / "bi.stopper")]) == 0
    said = capsys.readouterr().out
    stopper = parse(str(tmp_path / "bi.stopper"))
    assert len(stopper.dropped_blocks) == 2 and said.count("<- dropped") == 2 and stopper.info["prompts"] == 12
    assert main(["influence", *model, "--drop", "12", "-o", str(tmp_path / "no")]) == 2
    assert "drop: 12" in capsys.readouterr().err and not (tmp_path / "no").exists()

    assert main(["trace", *model, "-o", str(tmp_path / "traces")]) == 0
    capsys.readouterr()
    assert main(["fit", "crf", str(tmp_path / "traces"), "--prefixes", "--threshold", "0.9", "-o", str(tmp_path / "crf.pkl")]) == 0
    assert "144 of 144 examples" in capsys.readouterr().out
    fitted = parse(str(tmp_path / "crf.pkl"))
    assert (fitted.kind, fitted.threshold, fitted.info["prefixes"]) == ("crf", 0.9, True)
    assert main(["fit", "crf", str(tmp_path / "traces"), "--threshold", "1.5", "-o", str(tmp_path / "no")]) == 2
    assert "threshold: 1.5" in capsys.readouterr().err and not (tmp_path / "no").exists()


def test_min_layer_and_check_layers_do_not_apply_and_that_is_said(tokenizer, caplog):
    model = make_model("llama", vocab_size=257)
    for stopper in (dropping_stopper(2), "shortgpt:last2"):
        caplog.clear()
        lm = lm_of(model, tokenizer, stopper=stopper, min_layer=4, check_layers="every:2")
        assert "min_layer" in caplog.text and "don't apply" in caplog.text
        plain = lm_of(model, tokenizer, stopper=stopper)
        assert lm.fingerprint == plain.fingerprint


def test_what_a_family_cannot_do_without_is_one_sentence(monkeypatch):
    model = make_model("llama")
    anatomy = Anatomy(model)
    original = type(model.model).forward

    def forward(self, *args, **kwargs):  # a family that needs its third layer
        self.layers[2].self_attn  # noqa: B018
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(model.model), "forward", forward)
    refused(lambda: removal.drop(anatomy, (1, 2, 3)), "stopper", "blocks 1, 2, 3", "shortgpt:lastN")


def test_a_model_that_is_another_one_without_its_blocks_is_refused(monkeypatch):
    model = make_model("llama")
    anatomy = Anatomy(model)
    original = type(model.model).forward

    def forward(self, *args, **kwargs):  # scales by the number of layers
        out = original(self, *args, **kwargs)
        out.last_hidden_state = out.last_hidden_state * len(self.layers)
        return out

    monkeypatch.setattr(type(model.model), "forward", forward)
    refused(lambda: removal.drop(anatomy, (3,)), "stopper", "blocks 3", "logits off by")


# ------------------------------------------------------------------------------------------------ the last blocks


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_shortgpt_last_is_an_exit_before_the_last_blocks(family, tokenizer):
    _, small = built_without(family, (4, 5))
    model, asked = make_model(family, vocab_size=257), requests()
    expected = HFLM(pretrained=small, tokenizer=tokenizer, max_length=64).loglikelihood(asked, True)
    for mine, theirs in zip(lm_of(model, tokenizer, stopper="shortgpt:last2").loglikelihood(asked, True), expected, strict=True):
        assert mine[0] == pytest.approx(theirs[0], rel=2e-6, abs=1e-4)
        assert (mine.exit_record.exit_layer, mine.exit_record.pruning_ratio) == (3, pytest.approx(0.4))
    texts = [instance(p, {"until": ["\0"], "max_gen_toks": 6}, n, kind="generate_until") for n, p in enumerate(["a", "deer hi"])]
    assert lm_of(model, tokenizer, stopper="shortgpt:last2").generate_until(texts, True) == HFLM(
        pretrained=small, tokenizer=tokenizer, batch_size=2, max_length=64
    ).generate_until(texts, True)


def test_a_block_must_be_left():
    for stopper, n in ((LastStopper(5), 5), (LastStopper(7), 5), (LastStopper(0), 5)):
        refused(lambda stopper=stopper, n=n: Schedule(n, stopper), "stopper", "shortgpt", "1 to 4")
    for drop in (0, 5, 9):
        refused(lambda drop=drop: ShortGPTStopper({"influence": np.ones(5)}, drop), "stopper", "shortgpt", "1 to 4")
    assert Schedule(5, LastStopper(4)).blocks == (1,)


# ------------------------------------------------------------------------------------------------ Block Influence


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "gemma2"])
def test_block_influence_is_its_definition_by_hand(family, tokenizer):
    model = make_model(family, vocab_size=257)
    lm = lm_of(model, tokenizer)
    texts = [[5, 6, 7, 8], [9, 1], [30, 31, 32, 33, 34, 35, 36], [2]]
    found = influence.measure(lm, texts, batch_size=3)
    inputs, sums, tokens = [], np.zeros(5), 0
    handle = lm.anatomy.blocks[0].register_forward_pre_hook(
        lambda m, args, kwargs: inputs.append((args[0] if args else kwargs["hidden_states"])[0].clone()), with_kwargs=True
    )
    for text in texts:
        states = states_after_blocks(model, lm.anatomy.blocks, text)
        for k, (x, y) in enumerate(zip([inputs[-1], *states[:-1]], states, strict=True)):
            for t in range(len(text)):
                a, b = x[t].numpy().astype(np.float64), y[t].numpy().astype(np.float64)
                sums[k] += a @ b / np.sqrt((a @ a) * (b @ b))
        tokens += len(text)
    handle.remove()
    np.testing.assert_allclose(found, 1 - sums / tokens, rtol=0, atol=1e-6)
    assert len(set(found.round(4).tolist())) > 1


def test_the_least_influential_blocks_are_dropped():
    stopper = ShortGPTStopper({"influence": np.array([0.9, 0.2, 0.5, 0.2, 0.1, 0.8, 0.7, 0.6])})
    assert stopper.dropped_blocks == (2, 5) and stopper.drop == 2  # a quarter
    assert ShortGPTStopper(stopper.arrays, 3).dropped_blocks == (2, 4, 5)


def test_influence_is_measured_on_training_prompts_and_its_file_is_a_stopper(tokenizer, tmp_path):
    model = make_model("llama", vocab_size=257, max_position_embeddings=512)
    lm, task = lm_of(model, tokenizer, max_length=400), make_task()
    stopper = influence.of_tasks(lm, {"toy": task}, limit=4)
    docs = [doc for doc in task.training_docs() if split_of(doc, has_training=True) == "train"]
    questions = {doc["question"] for doc in docs}
    assert stopper.info["prompts"] == 4 and stopper.info["tasks"] == ["toy"]
    whole = influence.of_tasks(lm, {"toy": task}, drop=3)
    texts = [lm.tok_encode(q) for q in questions]
    np.testing.assert_allclose(whole.arrays["influence"], influence.measure(lm, texts), atol=1e-6)
    assert whole.drop == 3 and whole.info["tokens"] == sum(map(len, texts))

    files.save(whole, tmp_path / "bi.stopper")
    again = specs.parse(str(tmp_path / "bi.stopper"))
    assert again.fingerprint == whole.fingerprint and again.dropped_blocks == whole.dropped_blocks
    one = specs.parse(f"shortgpt:bi:1:{tmp_path / 'bi.stopper'}")
    assert one.dropped_blocks == (int(whole.arrays["influence"].argmin()) + 1,)
    assert lm_of(model, tokenizer, stopper=one).anatomy.n_blocks == 4
    refused(lambda: influence.of_tasks(lm, {"toy": task}, drop=5), "drop", "1 to 4")
    refused(lambda: influence.of_tasks(lm, {"toy": task}, limit=0), "limit")


@pytest.mark.parametrize("spec", ["shortgpt", "shortgpt:", "shortgpt:last", "shortgpt:lastx", "shortgpt:bi", "shortgpt:bi:2", "shortgpt:bi:x:f"])
def test_wrong_specs_tell_the_right_ones(spec):
    refused(lambda: specs.parse(spec), "stopper", spec, "shortgpt:last5", "adainfer influence")


def test_files_that_do_not_fit_are_refused(tokenizer, tmp_path):
    files.save(fitted()[1], tmp_path / "svm.stopper")
    refused(lambda: specs.parse(f"shortgpt:bi:1:{tmp_path / 'svm.stopper'}"), "stopper", "svm", "adainfer influence")
    refused(lambda: specs.parse(f"shortgpt:bi:1:{tmp_path / 'no'}"), "stopper", "does not exist")
    model = make_model("llama", vocab_size=257)
    refused(lambda: lm_of(model, tokenizer, stopper=dropping_stopper(2, n_blocks=7)), "stopper", "7 blocks", "5")
    for bad in ({}, {"influence": np.ones((2, 2))}, {"influence": np.array([1.0, np.nan, 2.0])}):
        refused(lambda bad=bad: ShortGPTStopper(bad, 1), "stopper", "shortgpt")
