"""Traces of generated texts against a slow recomputation, stoppers fitted on them, and where asking pays."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from helpers.models import lm_of, make_model
from helpers.reference import logits_after_block, slow_features
from helpers.refusals import refused
from helpers.tasks import make_task
from helpers.traces import traced
from sklearn.svm import SVC

from lm_eval_adainfer import container, paths
from lm_eval_adainfer.cli import main
from lm_eval_adainfer.fitting import check_layers, fit
from lm_eval_adainfer.strategies import specs
from lm_eval_adainfer.strategies.features import RECORDED
from lm_eval_adainfer.strategies.files import save
from lm_eval_adainfer.traces import recording

L = 5


def generating(until=("\n",), max_gen_toks=6, **config):
    return make_task(
        output_type="generate_until",
        doc_to_choice=None,
        doc_to_target="{{choices[answer]}}",
        generation_kwargs={"until": list(until), "do_sample": False, "max_gen_toks": max_gen_toks},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        **config,
    )


@pytest.fixture(scope="module")
def model():
    return make_model("llama", vocab_size=257, max_position_embeddings=512)


@pytest.fixture(scope="module")
def lm(model, tokenizer):
    return lm_of(model, tokenizer, batch_size=4, max_length=400)


def slow_text(model, lm, prompt, until, most):
    """Greedy tokens, the whole prefix run for each, up to the one that ends the text."""
    tokens = []
    while len(tokens) < most:
        logits = logits_after_block(model, lm.anatomy.blocks, prompt + tokens, L)[-1]
        tokens.append(logits.argmax().item())
        if tokens[-1] == lm.tokenizer.eos_token_id or any(s in lm.tokenizer.decode(tokens) for s in until):
            break
    return tokens


@pytest.mark.parametrize("shots", [0, 2])
def test_every_new_token_is_an_instance_and_equals_the_slow_recomputation(shots, lm, model, tmp_path):
    """Texts are cut where a stop string ends them; one is taken from what the model says anyway."""
    task = generating(num_fewshot=shots)
    traced(lm, task, tmp_path / "free", split="test")
    first = lm.tok_encode(task.instances[0].args[0])
    said = slow_text(model, lm, first, [], 6)
    until = ["\n", lm.tokenizer.decode(said[2:3])]
    task = generating(until, num_fewshot=shots)
    _, meta, arrays = traced(lm, task, tmp_path / "cut", split="test")
    assert (meta["output_type"], meta["documents"], meta["features"]) == (
        "generate_until", 6, list(RECORDED),
    )  # fmt: skip
    n = 0
    for instance in task.instances:
        prompt = lm.tok_encode(instance.args[0])
        text = slow_text(model, lm, prompt, until, 6)
        for j in range(len(text)):
            ids = prompt + text[:j]
            assert (arrays["doc_id"][n], arrays["position"][n], arrays["prompt_tokens"][n]) == (
                instance.doc_id, j, len(ids),
            )  # fmt: skip
            slow = slow_features(model, "llama", ids)
            for f, name in enumerate(meta["features"]):
                np.testing.assert_allclose(arrays["features"][n, :, f], slow[name], atol=1e-4)
            tops = [logits_after_block(model, lm.anatomy.blocks, ids, k)[-1].argmax().item() for k in range(1, L + 1)]
            assert arrays["top_token"][n].tolist() == tops and tops[-1] == text[j]
            n += 1
    assert n == len(arrays["position"])
    assert n < 6 * len(task.instances)  # something was cut
    assert set(arrays["gold_token"].tolist()) == {-1} and arrays["scores"].shape == (n, L, 0)


def test_a_model_that_has_generated_early_traces_the_dense_texts_all_the_same(model, tokenizer, tmp_path):
    early = lm_of(model, tokenizer, batch_size=4, max_length=400, stopper="gap:0.1", check_layers="1")
    task = generating()
    _, _, expected = traced(early, task, tmp_path / "before")
    early.generate_until(task.instances, True)
    _, _, found = traced(early, generating(), tmp_path / "after")
    assert early.generation == "early"
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])


def test_documents_keep_their_number_in_the_split(lm, tmp_path):
    task = generating()
    _, _, everything = traced(lm, task, tmp_path / "all")
    _, meta, some = traced(lm, generating(), tmp_path / "some", limit=4, seed=3)
    chosen = sorted(set(some["doc_id"].tolist()))
    assert (meta["documents"], len(chosen)) == (4, 4) and chosen != [0, 1, 2, 3]
    keep = np.isin(everything["doc_id"], chosen)
    np.testing.assert_allclose(some["features"], everything["features"][keep], atol=1e-4)
    np.testing.assert_array_equal(some["top_token"], everything["top_token"][keep])


def test_a_stopper_is_fitted_on_generated_positions_as_on_others(lm, model, tokenizer, tmp_path):
    path, meta, arrays = traced(lm, generating(max_gen_toks=4), tmp_path)
    stopper = fit.fit_svm([path], label="final", features=["gap", "top_prob"], max_examples=10_000)
    columns = [meta["features"].index(name) for name in ("gap", "top_prob")]
    x = arrays["features"][:, :, columns].reshape(-1, 2)
    y = (arrays["top_token"] == arrays["top_token"][:, -1:]).reshape(-1)
    here = SVC().fit(x, y)
    save(stopper, tmp_path / "svm.pkl")
    loaded = specs.parse(str(tmp_path / "svm.pkl"))
    margins = loaded.margin(1, torch.tensor(x)).numpy()
    np.testing.assert_allclose(np.sort(margins), np.sort(here.decision_function(x)), atol=2e-3)
    early = lm_of(model, tokenizer, batch_size=4, max_length=400, stopper=str(tmp_path / "svm.pkl"))
    answers = early.generate_until(built(), True)
    assert all(1 <= layer <= L for a in answers for layer in a.exit_record.layers)


def built():
    task = generating()
    task.build_all_requests(limit=None, rank=0, world_size=1)
    return task.instances


# ------------------------------------------------------------------------------------------------ adainfer layers


def brute(files, features, stops, blocks):
    """(mean exit, mean checks, cost over dense, agreement) of asking after some blocks, one instance at a time."""
    exits, checks, costs, dense, agree = [], [], [], [], []
    for file in files:
        meta, arrays = recording.read(file)
        columns = [meta["features"].index(name) for name in features]
        head = meta["hidden_size"] * meta["vocab_size"]
        for values, tops, position, prompt in zip(
            arrays["features"], arrays["top_token"], arrays["position"], arrays["prompt_tokens"], strict=True
        ):
            asked, left = 0, meta["n_blocks"]
            for k in sorted(blocks):
                asked += 1
                if stops(k, [float(values[k - 1, c]) for c in columns]):
                    left = k
                    break
            tokens = 1 if position else int(prompt)
            reads_head = bool({"gap", "top_prob"} & set(features))
            cost = tokens * sum(meta["block_weights"][:left]) + asked * head * reads_head
            if left == meta["n_blocks"] or not reads_head:
                cost += head
            exits.append(left)
            checks.append(asked)
            costs.append(cost)
            dense.append(tokens * sum(meta["block_weights"]) + head)
            agree.append(tops[left - 1] == tops[-1])
    return np.mean(exits), np.mean(checks), np.sum(costs) / np.sum(dense), np.mean(agree), exits


@pytest.fixture(scope="module")
def files(lm, tmp_path_factory):
    """A trace of generated texts and one of multiple choice, of one model."""
    folder = tmp_path_factory.mktemp("traces")
    texts, choices = generating(name="texts"), make_task(name="choices")
    return [traced(lm, task, folder)[0] for task in (texts, choices)]


@pytest.fixture(scope="module")
def spread(files):
    """A gap that about a third of all (instance, block) pairs exceed."""
    gaps = np.concatenate([recording.read(file)[1]["features"][:, :-1, 0].ravel() for file in files])
    return round(float(np.quantile(gaps, 0.7)), 4)


def same(choice, blocks, expected):
    assert choice.blocks == tuple(blocks)
    found = (choice.exit_layer, choice.checks, choice.cost, choice.agreement)
    assert found == pytest.approx(expected[:4])


@pytest.mark.parametrize("which", [slice(0, 1), slice(1, 2), slice(0, 2)], ids=["texts", "choices", "both"])
def test_exits_costs_and_agreement_are_those_of_a_loop_over_instances(which, files, spread):
    some = files[which]
    shares, everywhere, chosen = check_layers.choose(some, specs.parse(f"gap:{spread}"))

    def stops(block, values):
        return values[0] > spread

    expected = brute(some, ["gap"], stops, range(1, L))
    same(everywhere, range(1, L), expected)
    assert shares == pytest.approx([np.mean([e == k for e in expected[4]]) for k in range(1, L + 1)])
    same(chosen, chosen.blocks, brute(some, ["gap"], stops, chosen.blocks))
    assert 1 < everywhere.exit_layer < L
    # what was chosen can't be improved by one block more, and costs no more than asking nowhere
    for k in set(range(1, L)) - set(chosen.blocks):
        assert brute(some, ["gap"], stops, [*chosen.blocks, k])[2] >= chosen.cost - 1e-9
    assert chosen.cost <= 1 + 1e-9


def test_one_block_is_the_best_one_and_counts_are_kept(files, spread):
    def stops(block, values):
        return values[0] > spread

    costs = {(k,): brute(files, ["gap"], stops, [k])[2] for k in range(1, L)} | {(): 1.0}
    _, _, one = check_layers.choose(files, specs.parse(f"gap:{spread}"), 1)
    assert one.blocks == min(costs, key=costs.get) and one.blocks
    assert one.cost == pytest.approx(costs[one.blocks])
    for count in (1, 2, 3, 4, 99):
        _, _, chosen = check_layers.choose(files, specs.parse(f"gap:{spread}"), count)
        assert len(chosen.blocks) <= count and set(one.blocks) <= set(chosen.blocks)
        best = min(
            brute(files, ["gap"], stops, blocks)[2] for n in range(L) for blocks in itertools.combinations(range(1, L), n)
        )
        assert chosen.cost >= best - 1e-9


def test_rules_that_read_no_head_cost_no_head(files):
    _, everywhere, chosen = check_layers.choose(files, specs.parse("fixed:2"))
    same(everywhere, [2], brute(files, [], lambda *_: True, [2]))
    assert chosen.blocks == (2,) and everywhere.exit_layer == 2
    shares, everywhere, chosen = check_layers.choose(files, specs.parse("none"))
    assert (everywhere.blocks, chosen.blocks, shares) == ((), (), [0, 0, 0, 0, 1])
    assert (chosen.exit_layer, chosen.cost, chosen.agreement) == (L, 1, 1)


def test_never_firing_rules_are_not_worth_a_check(files, capsys):
    assert main.main(["layers", *map(str, files), "--stopper", "gap:1"]) == 0
    assert "no check pays for itself" in capsys.readouterr().out


def test_the_command_prints_what_check_layers_takes(files, spread, capsys):
    _, _, chosen = check_layers.choose(files, specs.parse(f"gap:{spread}"), 2)
    assert main.main(["layers", str(files[0].parent), "-s", f"gap:{spread}", "-n", "2"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == f"check_layers={'+'.join(map(str, chosen.blocks))}"
    assert out.count("<- check") == len(chosen.blocks) and out.count("simulated") >= 3


def test_unusable_traces_and_counts_are_refused_in_one_sentence(files, lm, tokenizer, tmp_path, capsys):
    gap = specs.parse("gap")
    for count in (0, -3):
        refused(lambda count=count: check_layers.choose(files, gap, count), "count", str(count))
    other = lm_of(make_model("llama", vocab_size=257, seed=9), tokenizer)
    foreign = traced(other, make_task(), tmp_path / "other")[0]
    refused(lambda: check_layers.choose([*files, foreign], gap), "traces", foreign.name)
    meta, arrays = recording.read(files[0])
    arrays["features"] = arrays["features"][:, :, 1:]
    poor = tmp_path / "poor.trace"
    container.write(poor, "trace", recording.VERSION, {**meta, "features": meta["features"][1:]}, arrays)
    refused(lambda: check_layers.choose([poor], gap), "features", "gap", "top_prob")
    refused(lambda: check_layers.choose(files, specs.parse("fixed:6")), "fixed:6")
    capsys.readouterr()
    for wrong in (["layers", str(tmp_path / "nothing"), "-s", "gap"], ["layers", str(files[0]), "-s", "gap", "-n", "0"]):
        assert main.main(wrong) == 2
        said = capsys.readouterr().err.strip()
        assert said.startswith("adainfer: error: ") and "\n" not in said


# ------------------------------------------------------------------------------------------------ the demo


def test_trace_fit_and_layers_work_on_a_generation_task_of_the_demo(tmp_path, capsys):
    arguments = ["--tasks", "adainfer_demo_plural_generate", "--include_path", str(paths.task_configs())]
    model = ["--model_args", "pretrained=adainfer-demo,dtype=float32,batch_size=8", "--device", "cpu"]
    assert main.main(["trace", *model, *arguments, "--limit", "12", "-o", str(tmp_path / "traces")]) == 0
    (file,) = (tmp_path / "traces").glob("*.trace")
    meta, arrays = recording.read(file)
    counts = np.unique(arrays["doc_id"], return_counts=True)[1]
    assert (meta["documents"], len(counts), meta["output_type"]) == (12, 12, "generate_until")
    assert counts.max() < 16  # texts end at their newline
    assert arrays["top_token"][arrays["position"] > 0].shape[0] == sum(counts) - 12
    assert set(meta["features"]) == set(RECORDED)
    assert main.main(["fit", "svm", str(tmp_path / "traces"), "-o", str(tmp_path / "svm.pkl")]) == 0
    assert main.main(["layers", str(tmp_path / "traces"), "-s", str(tmp_path / "svm.pkl"), "-n", "3"]) == 0
    assert "exit_layer" in capsys.readouterr().out
