"""The tuned reader: what its maps recover, how it is fitted and refused, and what rolling and generation do with it."""

from __future__ import annotations

import logging
import pickle

import numpy as np
import pytest
import torch
from helpers.models import lm_of, make_model
from helpers.reference import states_after_blocks
from helpers.refusals import refused
from helpers.replay import decode_greedily, prepared, prompts_of
from helpers.stoppers import Dice
from helpers.tasks import instance
from helpers.traces import write_random

from lm_eval_adainfer import container
from lm_eval_adainfer.cli import main
from lm_eval_adainfer.fitting import reader, reader_examples
from lm_eval_adainfer.fitting.reader_maps import Training, block_map, least_squares
from lm_eval_adainfer.harness.model import AdaInferLM
from lm_eval_adainfer.readers import files
from lm_eval_adainfer.readers.base import HEAD, Reader
from lm_eval_adainfer.readers.tuned import Maps
from lm_eval_adainfer.strategies.rules import GapStopper
from lm_eval_adainfer.structure.hashes import signs_hash

L, H, V = 4, 32, 257
TEXT = "the quick brown fox jumps over the lazy dog while a deer and a goat look on; "


@pytest.fixture(scope="module")
def model():
    return make_model("llama", vocab_size=V, max_position_embeddings=256, num_hidden_layers=L, hidden_size=H)


@pytest.fixture(scope="module")
def lm(model, tokenizer):
    return lm_of(model, tokenizer)


def drawn(seed=0, rank=0, size=0.05, dtype=np.float32, info=None):
    """Maps of random numbers."""
    rng = np.random.default_rng(seed)
    shapes = {"bias": (L - 1, H)}
    shapes |= {"down": (L - 1, rank, H), "up": (L - 1, H, rank)} if rank else {"weight": (L - 1, H, H)}
    return Maps({name: (size * rng.normal(size=shape)).astype(dtype) for name, shape in shapes.items()}, info)


def nothing():
    return Maps({"bias": np.zeros((L - 1, H), np.float32), "weight": np.zeros((L - 1, H, H), np.float32)})


def tuned_logits(model, anatomy, maps, ids, k):
    """[S, V] of a plain forward: the map of block k by hand, then norm and head."""
    x = states_after_blocks(model, anatomy.blocks, ids)[k - 1]
    if k < anatomy.n_blocks:
        arrays = {name: torch.from_numpy(array[k - 1]) for name, array in maps.arrays.items()}
        matrix = arrays["weight"] if "weight" in arrays else arrays["up"] @ arrays["down"]
        x = x + x @ matrix.T + arrays["bias"]
    with torch.no_grad():
        return model.lm_head(model.model.norm(x))


def affine_states(seed, rank=H, n=400):
    """States, final states that are an affine map of them, and the map."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(n, H, generator=rng) * (0.5 + torch.rand(H, generator=rng)) + torch.randn(H, generator=rng)
    matrix = torch.randn(H, rank, generator=rng) @ torch.randn(rank, H, generator=rng) / (rank * H) ** 0.5
    bias = torch.randn(H, generator=rng)
    return x, x + x @ matrix.T + bias, matrix, bias


# ------------------------------------------------------------------ one block's map
def test_least_squares_recovers_a_known_map():
    x, last, matrix, bias = affine_states(0)
    found = least_squares(x, last, shrink=1e-6)
    torch.testing.assert_close(torch.from_numpy(found["weight"]), matrix, atol=1e-3, rtol=0)
    torch.testing.assert_close(torch.from_numpy(found["bias"]), bias, atol=1e-3, rtol=0)
    stiff = least_squares(x, last, shrink=1e9)["weight"]  # shrunk to the identity
    assert np.abs(stiff).max() < 1e-3


def test_kl_falls_to_nothing_where_a_map_is_all_that_is_missing(lm):
    x, last, _, _ = affine_states(1)
    arrays, figures = block_map(lm, x, last, 40, 1, Training(epochs=3))
    assert figures["kl_before"] > 0.5 > figures["agreement_before"]
    assert figures["kl_after"] < 0.01 and figures["agreement_after"] > 0.95
    assert set(arrays) == {"bias", "weight"}


def test_kl_refines_what_least_squares_leaves(lm):
    """Final states of random size, which the norm takes away, but which least squares weighs by."""
    x, last, _, _ = affine_states(2)
    last = last * torch.randn(len(x), 1, generator=torch.Generator().manual_seed(5)).exp()
    squares = block_map(lm, x, last, 100, 1, Training(epochs=0))[1]
    refined = block_map(lm, x, last, 100, 1, Training(epochs=10))[1]
    assert squares["kept"] == "least squares" and refined["kept"] == "kl"
    assert refined["kl_after"] < squares["kl_after"] < squares["kl_before"]


def test_the_identity_stays_where_maps_read_worse(lm):
    """Held-out examples that follow another rule than the others."""
    x, last, _, _ = affine_states(3)
    last[-50:] = x[-50:]
    arrays, figures = block_map(lm, x, last, 50, 1, Training())
    assert figures["kept"] == "identity" and figures["kl_after"] == figures["kl_before"]
    assert not any(array.any() for array in arrays.values())


@pytest.mark.parametrize("epochs", [0, 2])
def test_narrow_matrices_do_as_well_where_rank_suffices(lm, epochs):
    x, last, matrix, _ = affine_states(4, rank=3)
    kl = {
        rank: block_map(lm, x, last, 60, 1, Training(rank=rank, epochs=epochs))[1]["kl_after"] for rank in (0, 1, 3)
    }
    assert kl[3] < 0.02 and kl[0] < 0.02 < kl[1]
    narrow = least_squares(x, last, 3, shrink=1e-6)
    assert narrow["down"].shape == (3, H) and narrow["up"].shape == (H, 3)
    torch.testing.assert_close(torch.from_numpy(narrow["up"] @ narrow["down"]), matrix, atol=1e-3, rtol=0)


def test_nothing_of_the_model_changes(lm):
    before = {name: p.clone() for name, p in lm.model.named_parameters()}
    block_map(lm, *affine_states(6)[:2], 40, 1, Training(epochs=1))
    for name, parameter in lm.model.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.grad is None


# ------------------------------------------------------------------ files and models
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_file_gives_back_its_maps(tmp_path, rank, dtype):
    maps = drawn(rank=rank, dtype=dtype, info={"model": "m"})
    files.save(maps, tmp_path / "r")
    again = files.load(tmp_path / "r")
    assert again.fingerprint == maps.fingerprint and again.info == maps.info
    assert all(again.arrays[name].dtype == dtype for name in again.arrays)


def _written(path, **arrays):
    container.write(path, "reader", files.VERSION, {"kind": "tuned", "info": {}}, arrays)


def _hostile(path, how):
    good = {"bias": np.zeros((L - 1, H), np.float32), "weight": np.zeros((L - 1, H, H), np.float32)}
    if how == "pickle":
        path.write_bytes(pickle.dumps(good))
    elif how == "truncated":
        _written(path, **good)
        path.write_bytes(path.read_bytes()[:-100])
    elif how == "shapes":
        _written(path, **{**good, "weight": good["weight"][:, :, 1:]})
    elif how == "blocks":
        _written(path, **{**good, "weight": good["weight"][1:]})
    elif how == "nan":
        _written(path, **{**good, "bias": good["bias"] * np.nan})
    elif how == "integers":
        _written(path, **{**good, "bias": good["bias"].astype(np.int32)})
    elif how == "lacks":
        _written(path, weight=good["weight"])
    elif how == "stopper":
        container.write(path, "stopper", 1, {}, good)
    elif how == "kind":
        container.write(path, "reader", files.VERSION, {"kind": "copy", "info": {}}, good)
    else:
        path.write_text("not a reader")


@pytest.mark.parametrize(
    ("how", "word"),
    [
        ("pickle", "pickle"), ("truncated", "truncated"), ("shapes", "weight"), ("blocks", "weight"), ("nan", "NaN"),
        ("integers", "bias"), ("lacks", "bias"), ("stopper", "stopper"), ("kind", "damaged"), ("text", "no reader"),
    ],
)  # fmt: skip
def test_a_hostile_file_is_refused(tmp_path, how, word):
    _hostile(tmp_path / "r", how)
    refused(lambda: files.load(tmp_path / "r"), "reader", word)


def info_of(lm):
    return {"model": "m", "head_hash": lm.anatomy.head_hash(), "signs_hash": signs_hash(lm.anatomy.model)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_model_in_another_dtype_takes_it(lm, tokenizer, dtype):
    same = make_model("llama", vocab_size=V, max_position_embeddings=256, num_hidden_layers=L, hidden_size=H).to(dtype)
    assert lm_of(same, tokenizer, reader=Reader("tuned", maps=drawn(info=info_of(lm)))).reader.maps is not None


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda m: m.lm_head.weight.data.neg_(), "output head"),
        (lambda m: m.model.layers[2].mlp.down_proj.weight.data[0].neg_(), "other weights"),
    ],
)
def test_another_model_is_refused(lm, tokenizer, change, word):
    other = make_model("llama", vocab_size=V, max_position_embeddings=256, num_hidden_layers=L, hidden_size=H)
    change(other)
    tuned = Reader("tuned", maps=drawn(info=info_of(lm)))
    refused(lambda: lm_of(other, tokenizer, reader=tuned), "reader", word)
    if word == "output head":  # which is all that some files know
        tuned = Reader("tuned", maps=drawn(info={"head_hash": lm.anatomy.head_hash()}))
        refused(lambda: lm_of(other, tokenizer, reader=tuned), "reader", word)
    shorter = make_model("llama", vocab_size=V, max_position_embeddings=256, num_hidden_layers=3, hidden_size=H)
    refused(lambda: lm_of(shorter, tokenizer, reader=tuned), "reader", "4 blocks", "3")


# ------------------------------------------------------------------ rolling texts and generation
def rolling(texts):
    return [instance(text, None, n, kind="loglikelihood_rolling") for n, text in enumerate(texts)]


@pytest.mark.parametrize("stopper", ["gap:0.1", "fixed:2", "saturation:0.9", "none"])
@pytest.mark.parametrize("rank", [0, 3])
def test_rolling_texts_are_asked_and_scored_under_the_reader(model, tokenizer, stopper, rank):
    maps = drawn(rank=rank)
    ours = lm_of(model, tokenizer, stopper=stopper, reader=Reader("tuned", maps=maps))
    texts = [TEXT[:40], TEXT[10:23], "a"]
    found = ours.loglikelihood_rolling(rolling(texts), True)
    for text, answer in zip(texts, found, strict=True):
        new = ours.tok_encode(text)
        ids = [ours.prefix_token_id, *new][:-1]
        states = states_after_blocks(model, ours.anatomy.blocks, ids)
        logits = {k: tuned_logits(model, ours.anatomy, maps, ids, k) for k in range(1, L + 1)}
        total, layers, flops = 0.0, [], 0.0
        for j, token in enumerate(new):
            for k in range(1, L):
                first, second = logits[k][j].softmax(-1).topk(2).values.tolist()
                inside = states[k - 2][j] if k > 1 else model.model.embed_tokens(torch.tensor(ids))[j]
                cosine = torch.cosine_similarity(states[k - 1][j], inside, dim=0).item()
                if {"gap:0.1": first - second > 0.1, "fixed:2": k == 2, "saturation:0.9": cosine > 0.9}.get(stopper):
                    break
            else:
                k = L
            layers.append(k)
            translated = range(1, min(k, L - 1) + 1) if stopper == "gap:0.1" else [k] if k < L else []
            flops += len(translated) * maps.flops(1)
            total += logits[k][j].log_softmax(-1)[token].item()
        assert float(answer) == pytest.approx(total, abs=1e-3)
        assert answer.exit_record.exit_layer == pytest.approx(np.mean(layers))
        plain = lm_of(model, tokenizer, stopper=f"fixed:{layers[0]}" if len(set(layers)) == 1 else "none")
        if stopper == "fixed:2":
            (headed,) = plain.loglikelihood_rolling(rolling([text]), True)
            assert answer.exit_record.flops - headed.exit_record.flops == flops


def test_identity_maps_are_the_head(model, tokenizer):
    texts = rolling([TEXT[:50], TEXT[20:31]])
    prompts = [instance("the quick", {"until": ["\n"], "max_gen_toks": 6}, 0, kind="generate_until")]
    said = []
    for one in (HEAD, Reader("tuned", maps=nothing())):
        ours = lm_of(model, tokenizer, stopper="gap:0.1", reader=one)
        scored = ours.loglikelihood_rolling(texts, True)
        texts_ = ours.generate_until(prompts, True)
        said.append(([(float(a), a.exit_record.exit_layer) for a in scored], [str(t) for t in texts_]))
    assert said[0] == said[1]


@pytest.mark.parametrize("one", ["copy", "sim:4"])
def test_readers_of_prompts_read_no_rolling_text(model, tokenizer, one):
    ours = lm_of(model, tokenizer, stopper="gap:0.1", reader=one)
    refused(lambda: ours.loglikelihood_rolling(rolling(["a"]), True), "reader", one, "loglikelihood_rolling")


class ByFeature(Dice):
    """Leaves at random, and reads no head for it."""

    features = ("cos_hidden",)


@pytest.mark.parametrize("stopper", [Dice, ByFeature, lambda: GapStopper(0.15)])
@pytest.mark.parametrize("options", [{}, {"shortlist": 5}, {"layout": "padded"}])
def test_generated_tokens_are_asked_and_chosen_under_the_reader(stopper, options):
    model, anatomy, windows = prepared("llama", num_hidden_layers=L, hidden_size=H)
    maps = drawn(rank=3)
    prompts = prompts_of(4, seed=3)
    tuned = Reader("tuned", maps=maps)
    asks = stopper()
    decoder, logits = decode_greedily(anatomy, windows, asks, prompts, 7, reader=tuned, **options)
    layers = [layer for result in decoder.results for layer in result.layers]
    assert len(set(layers)) > 1
    for prompt, result, row in zip(prompts, decoder.results, logits, strict=True):
        for n, (layer, found) in enumerate(zip(result.layers, row, strict=True)):
            ids = [*prompt, *result.tokens[:n]]
            expected = tuned_logits(model, anatomy, maps, ids, layer)[-1]
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
            assert result.tokens[n] == expected.argmax().item()
            if isinstance(asks, GapStopper) and not options.get("shortlist"):
                gaps = [
                    tuned_logits(model, anatomy, maps, ids, k)[-1].softmax(-1).topk(2).values
                    for k in range(1, layer + 1)
                ]
                stops = [(top[0] - top[1]).item() > 0.15 for top in gaps]
                assert not any(stops[:-1]) and (layer == L or stops[-1])
        if isinstance(asks, ByFeature):  # translated once, where a token left
            assert result.reading == sum(maps.flops(layer) for layer in result.layers)
        else:
            assert result.reading == sum(maps.flops(k) for layer in result.layers for k in range(1, layer + 1))


def test_the_maps_of_generated_tokens_are_counted(model, tokenizer):
    """Identity maps generate what the head does, so that the operations of the maps are all that is added."""
    prompts = [instance(TEXT[:n], {"until": [], "max_gen_toks": 6}, n, kind="generate_until") for n in (9, 14)]
    found = []
    for one in (HEAD, Reader("tuned", maps=nothing())):
        ours = lm_of(model, tokenizer, stopper="fixed:2", reader=one)
        texts = ours.generate_until(prompts, True)
        found.append([t.exit_record.flops for t in texts])
        new = ours.generated_tokens
    assert sum(found[1]) - sum(found[0]) == new * nothing().flops(2)


# ------------------------------------------------------------------ fitting
def text_file(path, words=400, seed=0):
    rng = np.random.default_rng(seed)
    path.write_text(" ".join(rng.choice(TEXT.split(), words)))
    return path


def a_fit(lm, folder, output, how=None, examples=200, seed=0):
    found = reader_examples.of_texts(lm, [text_file(folder / "t.txt")], examples, seed, batch_size=3)
    return reader.fit(lm, found, output, how or Training(epochs=1, seed=seed))


def test_states_of_texts_are_those_of_plain_forwards(lm, model, tmp_path):
    lines = [TEXT[:30], TEXT[5:70] * 3, "ab"]
    file = tmp_path / "t.jsonl"
    file.write_text("\n".join(f'{{"text": "{line}"}}' for line in lines) + "\n\n")
    found = reader_examples.of_texts(lm, [file], 10_000, 0, batch_size=2)
    windows = [ids[i : i + 64] for ids in map(lm.tok_encode, lines) for i in range(0, len(ids), 64)]
    assert found.n == sum(map(len, windows)) and found.described["windows"] == len(windows)
    states = reader_examples.stored(found, tmp_path / "s", L, H)
    mine = torch.stack([states(k) for k in range(1, L + 1)], dim=1).flatten(1)
    plain = [torch.stack(states_after_blocks(model, lm.anatomy.blocks, w), dim=1).flatten(1) for w in windows]
    distance = (mine[:, None] - torch.cat(plain)[None]).norm(dim=-1)
    assert distance.min(1).values.max() < 1e-3 and distance.min(0).values.max() < 1e-3
    held = distance[-found.n_held_out :].argmin(1).numpy()
    owner = np.repeat(np.arange(len(windows)), [len(w) for w in windows])[held]
    assert len(set(owner)) == 1 and len(held) == len(windows[owner[0]])  # a whole one: nothing of it is trained on


def test_a_fit_says_what_its_maps_are_worth(lm, tmp_path):
    maps = a_fit(lm, tmp_path, tmp_path / "r", Training(epochs=2))
    assert (maps.n_blocks, maps.hidden_size, maps.rank) == (L, H, 0)
    figures = maps.info["held_out"]
    assert [row["block"] for row in figures] == [1, 2, 3]
    assert all(row["kl_after"] <= row["kl_before"] for row in figures)
    assert figures[-1]["kl_after"] < figures[-1]["kl_before"]
    assert maps.info["head_hash"] == lm.anatomy.head_hash() and maps.info["texts"] == ["t.txt"]
    maps.require_model(L, H, lm.anatomy.head_hash(), signs_hash(lm.anatomy.model))


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "opt-post-norm-projected", "qwen3_moe", "bloom"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_maps_are_fitted_by_structure(tokenizer, tmp_path, family, dtype):
    lm = lm_of(make_model(family, vocab_size=V, max_position_embeddings=256).to(dtype), tokenizer)
    maps = a_fit(lm, tmp_path, tmp_path / "r", Training(epochs=1, rank=2))
    figures = maps.info["held_out"]
    assert len(figures) == lm.n_blocks - 1 == maps.n_blocks - 1
    assert maps.hidden_size == lm.anatomy.block_hidden_size
    assert any(row["kl_after"] < row["kl_before"] for row in figures)


def test_a_killed_fit_goes_on_to_what_a_whole_one_makes(lm, tmp_path, monkeypatch):
    how = Training(rank=2, epochs=1)
    whole = a_fit(lm, tmp_path, tmp_path / "whole", how)
    output, write, made = tmp_path / "r", container.write, []

    def dies(path, *rest):
        write(path, *rest)
        made.append(path)
        if len(made) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(container, "write", dies)
    with pytest.raises(KeyboardInterrupt):
        a_fit(lm, tmp_path, output, how)
    made.clear()
    monkeypatch.setattr(container, "write", lambda path, *rest: (made.append(path), write(path, *rest)))
    again = a_fit(lm, tmp_path, output, how)
    assert len(made) == 1  # the third block alone
    assert again.fingerprint == whole.fingerprint and again.info == whole.info
    reader.forget_parts(output)
    assert not reader.parts_folder(output).exists()


def test_what_another_command_left_is_not_taken_over(lm, tmp_path, caplog):
    a_fit(lm, tmp_path, tmp_path / "r", Training(epochs=0))
    with caplog.at_level(logging.WARNING):
        found = a_fit(lm, tmp_path, tmp_path / "r", Training(epochs=1))
    assert "begins anew" in caplog.text
    assert found.fingerprint == a_fit(lm, tmp_path, tmp_path / "other", Training(epochs=1)).fingerprint


def test_a_damaged_checkpoint_is_made_again(lm, tmp_path):
    whole = a_fit(lm, tmp_path, tmp_path / "r")
    for part in reader.parts_folder(tmp_path / "r").glob("*.part"):
        part.write_bytes(part.read_bytes()[:50])
    assert a_fit(lm, tmp_path, tmp_path / "r").fingerprint == whole.fingerprint


def test_a_large_file_is_float16_and_reads_the_same(lm, tmp_path, monkeypatch):
    exact = a_fit(lm, tmp_path, tmp_path / "a")
    monkeypatch.setattr(reader, "MOST_BYTES", 1000)
    coarse = a_fit(lm, tmp_path, tmp_path / "b")
    assert {array.dtype for array in coarse.arrays.values()} == {np.dtype(np.float16)}
    x = torch.randn(50, H, generator=torch.Generator().manual_seed(0))
    for k in range(1, L):
        one, other = (lm.anatomy.logits(maps.apply(k, x)) for maps in (exact, coarse))
        assert (one - other).abs().max() < 0.01 * one.abs().max()


def hidden_trace(path, lm, n=60, **arrays):
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(n, L, H)).astype(np.float16)
    hidden[:, -1] = hidden[:, 1] + 1
    meta = {"head_hash": lm.anatomy.head_hash(), "dtype": "torch.float32", "weights_hash": lm.anatomy.weights_hash()}
    write_random(path, n=n, arrays={"hidden": hidden, **arrays}, **meta)
    return hidden


def test_traced_states_serve_as_well(lm, tmp_path):
    hidden = hidden_trace(tmp_path / "a.trace", lm, doc_id=np.arange(60) // 3)
    found = reader_examples.of_traces(lm, [tmp_path], 1000, 0)
    assert (found.n, found.n_held_out, found.described["documents"]) == (60, 6, 20)
    states = reader_examples.stored(found, tmp_path / "s", L, H)
    mine = torch.stack([states(k) for k in range(1, L + 1)], dim=1)
    assert sorted(mine.flatten(1).tolist()) == sorted(hidden.reshape(60, -1).astype(float).tolist())
    maps = reader.fit(lm, found, tmp_path / "r", Training(epochs=0))
    assert maps.info["tasks"] == ["t"]
    assert maps.info["held_out"][1]["kl_after"] < 0.05  # block 2 needs no more than a bias
    torch.testing.assert_close(torch.from_numpy(maps.arrays["bias"][1]), torch.ones(H), atol=0.05, rtol=0)


def test_traces_that_do_not_serve_are_refused(lm, tokenizer, tmp_path):
    def of(name):
        return lambda: reader_examples.of_traces(lm, [tmp_path / name], 100, 0)

    write_random(tmp_path / "none.trace", n=30, head_hash=lm.anatomy.head_hash())
    refused(of("none.trace"), "traces", "--hidden")
    hidden = hidden_trace(tmp_path / "good.trace", lm)
    hidden_trace(tmp_path / "shape.trace", lm, hidden=hidden[:, :, 1:])
    refused(of("shape.trace"), "traces", "hidden", "shape")
    hidden_trace(tmp_path / "inf.trace", lm, hidden=np.where(hidden > 3, np.inf, hidden).astype(np.float16))
    refused(of("inf.trace"), "traces", "float16", "--text")
    hidden_trace(tmp_path / "one.trace", lm, doc_id=np.zeros(60, dtype=np.int64))
    refused(of("one.trace"), "traces", "fewer than 2 documents")
    other = lm_of(make_model("llama", vocab_size=V, num_hidden_layers=L, hidden_size=H, seed=3), tokenizer)
    refused(lambda: reader_examples.of_traces(other, [tmp_path / "good.trace"], 100, 0), "model_args", "another model")


def test_a_full_disk_is_told_before_anything_runs(lm, tmp_path, monkeypatch):
    usage = reader_examples.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(reader_examples.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    refused(lambda: a_fit(lm, tmp_path, tmp_path / "r"), "output", "no room")


# ------------------------------------------------------------------ the command
def test_an_interrupted_command_says_that_it_goes_on(folder, tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(reader, "block_map", interrupted)
    text, model = str(text_file(tmp_path / "t.txt")), f"pretrained={folder},dtype=float32,max_length=64"
    arguments = ["-a", model, "--device", "cpu", "--text", text, "--examples", "100", "-o", str(tmp_path / "r")]
    assert main.main(["fit", "reader", *arguments]) == 130
    assert "finished blocks are kept, and the same command goes on" in capsys.readouterr().err
    assert reader.parts_folder(tmp_path / "r").is_dir()


def test_the_command_writes_a_reader_that_runs_read_with(folder, tmp_path, capsys):
    text = text_file(tmp_path / "t.txt")
    arguments = ["-a", f"pretrained={folder},dtype=float32,max_length=64", "--device", "cpu", "--text", str(text)]
    output = tmp_path / "m.reader"
    assert main.main(["fit", "reader", *arguments, "--examples", "150", "--rank", "4", "-o", str(output)]) == 0
    shown = capsys.readouterr().out
    assert "held-out examples (measured)" in shown and "maps of rank 4" in shown and f"tuned:{output}" in shown
    assert not reader.parts_folder(output).exists()
    lm = AdaInferLM(pretrained=str(folder), dtype="float32", device="cpu", reader=f"tuned:{output}", stopper="fixed:2")
    assert lm.reader.name == f"tuned:{files.load(output).fingerprint}"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ([], ["traces", "--text"]),
        (["a.trace", "--text", "TEXT"], ["traces", "one of the two"]),
        (["--text", "TEXT", "--rank", "-1"], ["rank", "negative"]),
        (["--text", "TEXT", "--rank", "4000"], ["rank", "width"]),
        (["--text", "TEXT", "--epochs", "-1"], ["epochs", "negative"]),
        (["--text", "TEXT", "--learning-rate", "0"], ["learning_rate", "above 0"]),
        (["--text", "TEXT", "--examples", "3"], ["examples", "20"]),
        (["--text", "SHORT"], ["text", "held out"]),
        (["--text", "nowhere.txt"], ["text", "nowhere.txt"]),
        (["--text", "a.pdf"], ["text", ".jsonl"]),
        (["--text", "LINES"], ["text", "line 2", '"text"']),
        (["--text", "BYTES"], ["text", "UTF-8"]),
    ],
)
def test_what_can_not_be_fitted_is_refused(folder, tmp_path, capsys, more, words):
    (tmp_path / "lines.jsonl").write_text('{"text": "a"}\n{"txet": "b"}\n')
    (tmp_path / "short.txt").write_text("a few words")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xfa")
    named = {"TEXT": text_file(tmp_path / "t.txt"), "SHORT": tmp_path / "short.txt", "LINES": tmp_path / "lines.jsonl",
             "BYTES": tmp_path / "bytes.txt"}  # fmt: skip
    arguments = [str(named.get(word, word)) for word in more]
    output = tmp_path / "r"
    status = main.main(
        ["fit", "reader", "-a", f"pretrained={folder},dtype=float32", "--device", "cpu", "-o", str(output), *arguments]
    )
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert status == 2 and all(word in error for word in words), error
    assert not output.exists()
