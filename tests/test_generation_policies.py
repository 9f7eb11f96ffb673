"""How decoding fills caches and asks heads: layouts, forwards over long prompts, kv_policy, head_check."""

from __future__ import annotations

import pytest
import torch
from helpers.models import FAMILIES, PADDED, make_model
from helpers.reference import gap_after_block, logits_after_block
from helpers.replay import (
    assert_exact,
    decode_greedily,
    finishes_in_turn,
    logits_with_states_copied,
    prepared,
    prompts_of,
)
from helpers.stoppers import Dice, Listed
from helpers.tasks import instance

from lm_eval_adainfer.counting import FlopCounter
from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.generation import layouts
from lm_eval_adainfer.generation.decoded import record_of
from lm_eval_adainfer.generation.policies import KV_POLICIES, KVPolicy
from lm_eval_adainfer.generation.probes import prepare
from lm_eval_adainfer.generation.tokens import Tokens
from lm_eval_adainfer.harness.model import AdaInferLM
from lm_eval_adainfer.strategies.rules import NoStopper
from lm_eval_adainfer.strategies.specs import parse
from lm_eval_adainfer.structure.anatomy import Anatomy

WITH_CACHE = [family for family in FAMILIES if family != "mamba"]
PACKED = [family for family in WITH_CACHE if family not in PADDED]
STEPS = 9


def layouts_of(family):
    return ["padded"] if family in PADDED else ["packed", "padded"]


# ------------------------------------------------------------------------------------------------ layouts


def test_which_families_are_packed():
    found = {family: prepared(family)[2].layout for family in WITH_CACHE}
    assert found == {family: "padded" if family in PADDED else "packed" for family in WITH_CACHE}


@pytest.mark.parametrize("family", PACKED)
@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("rows", [1, 6])
def test_both_layouts_give_the_logits_of_the_whole_prefix(family, layout, rows):
    model, anatomy, windows = prepared(family)
    prompts = prompts_of(rows, seed=10 + rows)
    decoder, logits = decode_greedily(
        anatomy, windows, Dice(seed=rows), prompts, STEPS, finishes_in_turn, layout=layout
    )
    assert_exact(model, decoder, prompts, logits)
    assert len({layer for result in decoder.results for layer in result.layers}) >= 3


@pytest.mark.parametrize("copied", [0, 10**9])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_rows_that_adjoin_are_groups_of_their_own_or_picked_out(family, copied, monkeypatch):
    """Keys and values of rows in between are passed by, whether or not a call for every stretch takes less time."""
    calls, grouped = [], layouts.Packed._grouped
    monkeypatch.setattr(layouts, "_CALL_BYTES", copied)

    def counting(self, *args):
        found = grouped(self, *args)
        calls.extend(isinstance(rows, slice) for rows, _, _ in found)
        return found

    monkeypatch.setattr(layouts.Packed, "_grouped", counting)
    model, anatomy, windows = prepared(family)
    prompts = prompts_of(7, seed=5)
    decoder, logits = decode_greedily(anatomy, windows, Dice(seed=6), prompts, STEPS, finishes_in_turn)
    assert_exact(model, decoder, prompts, logits)
    assert calls and all(calls) == (not copied)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gemma3", "falcon", "bloom"])
@pytest.mark.parametrize("rows", [1, 4])
def test_prompts_of_one_token_and_rows_of_equal_length(family, rows):
    model, anatomy, windows = prepared(family)
    for length in (1, 6):
        prompts = prompts_of(rows, seed=length, shortest=length, longest=length)
        for layout in layouts_of(family):
            decoder, logits = decode_greedily(anatomy, windows, Dice(seed=3), prompts, 6, layout=layout)
            assert_exact(model, decoder, prompts, logits)


# ------------------------------------------------------------------------------------------------ long prompts

LONG = {"llama": {}, "gpt2": {}, "opt": {}, "mistral": {"sliding_window": 11}, "gemma3": {"sliding_window": 11}, "bloom": {}}


@pytest.mark.parametrize("family", LONG)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("policy", ["recompute", "propagate"])
def test_a_prompt_that_nobody_took_deep_gets_a_forward_of_its_own_when_somebody_does(family, rows, policy):
    """All rows leave the prompt early, so that deep blocks miss more than 64 slots when one of them goes on."""
    model, anatomy, windows = prepared(family, **LONG[family])
    prompts = prompts_of(rows, seed=rows, shortest=70, longest=95)
    deep = [2, 5, 3, 1, 5]
    exits = [[1] * rows, [1] * rows, *([e, *[min(e, 2)] * (rows - 1)] for e in deep), [5] * rows]
    for layout in layouts_of(family):
        widths = []

        def count(module, args, kwargs, widths=widths):
            ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
            widths.append(ids.shape[1])

        handle = model.register_forward_pre_hook(count, with_kwargs=True)
        decoder, logits = decode_greedily(
            anatomy, windows, Listed(exits), prompts, len(exits), layout=layout, kv_policy=policy
        )
        handle.remove()
        # heads run with one token; the prompt is as wide as it is, and so are blocks 2.. when the first row goes to
        # block 2, and blocks 3.. when it goes to 5
        wide = [width for width in widths if width > 64]
        assert len(wide) == 3 if rows == 1 else len(wide) > 3
        assert [result.layers for result in decoder.results] == [list(row) for row in zip(*exits, strict=True)]
        if policy == "recompute":
            assert_exact(model, decoder, prompts, logits)
        else:
            assert_copied(model, decoder, prompts, logits)


# ------------------------------------------------------------------------------------------------ kv_policy


def exits_by_position(prompt, layers, n):
    """Decision position -> block, of the tokens before the n-th new one."""
    return {len(prompt) - 1 + m: layer for m, layer in enumerate(layers[:n])}


def assert_copied(model, decoder, prompts, logits):
    for prompt, result, row in zip(prompts, decoder.results, logits, strict=True):
        for n, (layer, found) in enumerate(zip(result.layers, row, strict=True)):
            ids, copied = [*prompt, *result.tokens[:n]], exits_by_position(prompt, result.layers, n)
            expected = logits_with_states_copied(model, decoder.anatomy.blocks, ids, copied, layer)
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
            assert result.tokens[n] == expected.argmax().item()


def counts_by_hand(prompt, layers, n_blocks, policy):
    """(block_tokens, stored_tokens, pairs), going through the new tokens block by block."""
    run, stored, pairs = [0] * n_blocks, [0] * n_blocks, [0] * n_blocks
    for j in range(1, n_blocks + 1):
        has = set()  # positions whose keys and values block j has
        for n, layer in enumerate(layers):
            position = len(prompt) - 1 + n
            if layer < j:
                continue
            for p in range(position + 1):
                if p in has:
                    continue
                has.add(p)
                if policy == "propagate" and len(prompt) - 1 <= p < position:
                    stored[j - 1] += 1
                else:
                    run[j - 1] += 1
                    pairs[j - 1] += p + 1
    return run, stored, pairs


PROPAGATED = ["llama", "opt", "gptj", "mistral", "gemma3", "phi3", "bloom", "falcon"]


@pytest.mark.parametrize("family", PROPAGATED)
@pytest.mark.parametrize("rows", [1, 6])
def test_propagate_gives_the_logits_of_a_forward_in_which_states_are_copied(family, rows):
    model, anatomy, windows = prepared(family)
    prompts = prompts_of(rows, seed=20 + rows)
    for layout in layouts_of(family):
        decoder, logits = decode_greedily(
            anatomy, windows, Dice(seed=5), prompts, STEPS, finishes_in_turn, layout=layout, kv_policy="propagate"
        )
        assert_copied(model, decoder, prompts, logits)
        far = 0.0
        for prompt, result, row in zip(prompts, decoder.results, logits, strict=True):
            found = counts_by_hand(prompt, result.layers, anatomy.n_blocks, "propagate")
            assert (result.block_tokens, result.stored_tokens, result.pairs) == found
            for n, layer in enumerate(result.layers):
                exact = logits_after_block(model, anatomy.blocks, [*prompt, *result.tokens[:n]], layer)[-1]
                far = max(far, (row[n] - exact).abs().max().item())
        assert sum(sum(result.stored_tokens) for result in decoder.results) > 0
        assert far > 1e-3  # it is approximate: this reference is another one than recompute's


class ListedParts(Listed):
    """Exits by a list; what it was shown of the blocks' parts is kept."""

    features = ("cos_attn", "cos_mlp", "cos_hidden")

    def __init__(self, exits):
        super().__init__(exits)
        self.seen = []

    def margin(self, block, values, memory=None):
        self.seen.append((block, values.clone()))
        return super().margin(block, values)


@pytest.mark.parametrize("family", ["llama", "opt", "gptj"])
@pytest.mark.parametrize("policy", ["recompute", "propagate"])
def test_parts_of_blocks_are_seen_beside_tokens_that_are_only_stored(family, policy):
    """In a batch, row by row, what is seen of a row that is decoded alone."""
    _, anatomy, windows = prepared(family)
    prompts = prompts_of(3, seed=9)
    exits = [[5, 5, 5], [1, 2, 3], [2, 1, 1], [1, 3, 2], [5, 1, 4], [3, 5, 5], [5, 5, 5]]
    for layout in layouts_of(family):
        together = ListedParts(exits)
        decode_greedily(anatomy, windows, together, prompts, len(exits), layout=layout, kv_policy=policy)
        alone = []
        for row, prompt in enumerate(prompts):
            alone.append(ListedParts([[step[row]] for step in exits]))
            decode_greedily(anatomy, windows, alone[-1], [prompt], len(exits), layout=layout, kv_policy=policy)
        seen = iter(together.seen)
        of_row = [iter(one.seen) for one in alone]
        for step in exits:
            for k in range(1, 5):
                rows = [row for row, exit_block in enumerate(step) if exit_block >= k]
                if not rows:
                    continue
                block, values = next(seen)
                for n, row in enumerate(rows):
                    expected_block, expected = next(of_row[row])
                    assert block == expected_block == k
                    torch.testing.assert_close(values[n], expected[0], atol=1e-4, rtol=0)
        assert next(seen, None) is None and all(next(one, None) is None for one in of_row)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_recompute_runs_every_token_once_in_every_block_that_somebody_needed(layout):
    _, anatomy, windows = prepared("llama")
    prompts = prompts_of(6, seed=8)
    decoder, _ = decode_greedily(anatomy, windows, Dice(seed=8), prompts, STEPS, finishes_in_turn, layout=layout)
    for prompt, result in zip(prompts, decoder.results, strict=True):
        found = counts_by_hand(prompt, result.layers, 5, "recompute")
        assert (result.block_tokens, result.stored_tokens, result.pairs) == found


@pytest.mark.parametrize("family", ["llama", "gptj"])
def test_stored_tokens_are_counted_with_the_weights_that_lead_to_keys_and_values(family):
    """Llama computes keys and values of 2 of 4 heads after the queries; whatever comes later is not counted."""
    _, anatomy, windows = prepared(family)
    by_hand = 32 * 32 + 2 * 32 * 16 if family == "llama" else 3 * 32 * 32
    assert windows.stored_weights == [by_hand] * 5
    stopper, prompt = Listed([[1], [1], [5]]), prompts_of(1)[0]
    decoder, _ = decode_greedily(anatomy, windows, stopper, [prompt], 3, kv_policy="propagate")
    counter = FlopCounter(anatomy, stopper)
    counter.stored_weights = windows.stored_weights
    (result,), s = decoder.results, len(prompt)
    weights = anatomy.block_weights[0]
    first = 2 * weights * (s + 2) + 4 * 32 * ((s + 2) * (s + 3) // 2)
    deep = 2 * weights * s + 4 * 32 * (s * (s - 1) // 2 + s + 2) + 2 * by_hand * 2
    checks = 1 + 1 + 4
    expected = first + 4 * deep + 2 * 32 * 101 * 3 + checks * stopper.flops
    assert record_of(result, s, counter, "").flops == expected


# ------------------------------------------------------------------------------------------------ head_check

THRESHOLD = 0.15


def middling_gap(model, anatomy, prompts):
    """A threshold that some tokens exceed after early blocks, and some nowhere."""
    gaps = sorted(gap_after_block(model, anatomy.blocks, p, k) for p in prompts for k in range(1, anatomy.n_blocks))
    return sum(gaps[-(len(gaps) // 4) - 2 :][:2]) / 2



def assert_confirmed(model, anatomy, prompts, decoder, logits, threshold, checked):
    """Exits are where the full vocabulary confirms one, and nowhere before the first such block; returns how late."""
    late = 0
    for prompt, result in zip(prompts, decoder.results, strict=True):
        for n, layer in enumerate(result.layers):
            ids = [*prompt, *result.tokens[:n]]
            gaps = {k: gap_after_block(model, anatomy.blocks, ids, k) for k in checked}
            assert all(abs(gap - threshold) > 1e-6 for gap in gaps.values())
            exact = next((k for k in checked if gaps[k] > threshold), anatomy.n_blocks)
            assert layer >= exact
            assert layer == anatomy.n_blocks or gaps[layer] > threshold
            late += layer > exact
    assert_exact(model, decoder, prompts, logits)
    return late


@pytest.mark.parametrize("family", ["llama", "gptj", "gemma2", "cohere", "granite", "opt"])
@pytest.mark.parametrize("rows", [1, 6])
def test_a_shortlist_leaves_never_sooner_than_the_full_vocabulary_and_never_without_it(family, rows):
    """With a bias in the head (GPT-J), soft-caps (Gemma 2) or scaled logits (Cohere, Granite) too."""
    model, anatomy, windows = prepared(family)
    prompts = prompts_of(rows, seed=30 + rows)
    threshold = middling_gap(model, anatomy, prompts_of(6, seed=30))
    layers = {}
    for size in (0, 2, 8, 5000):
        decoder, logits = decode_greedily(
            anatomy, windows, parse(f"gap:{threshold}"), prompts, STEPS, finishes_in_turn, shortlist=size
        )
        late = assert_confirmed(model, anatomy, prompts, decoder, logits, threshold, [1, 2, 3, 4])
        layers[size] = [result.layers for result in decoder.results]
        if size in (0, 5000):
            assert late == 0
        if size:
            assert all(result.screened for result in decoder.results if max(result.layers) > 1)
    assert layers[0] == layers[5000]
    assert rows == 1 or len({layer for row in layers[0] for layer in row}) >= 2


class Record:
    """Rows that the head, and lists of candidates, were asked for."""

    def __init__(self, anatomy):
        self.full, self.some, self.logits = [], [], anatomy.logits

    def __call__(self, hidden, candidates=None):
        if candidates is None:
            self.full.append(len(hidden))
        else:
            self.some.append(tuple(candidates.shape))
        return self.logits(hidden, candidates)


@pytest.mark.parametrize("rows", [1, 4])
def test_shortlist_is_counted_by_what_was_really_computed(rows, monkeypatch):
    """Full rows and candidates' logits as the head was asked for them; one row's share follows from its exits."""
    _, anatomy, windows = prepared("llama")
    record = Record(anatomy)
    monkeypatch.setattr(anatomy, "logits", record)
    prompts, stopper = prompts_of(rows, seed=2), parse(f"gap:{THRESHOLD}")
    decoder, _ = decode_greedily(anatomy, windows, stopper, prompts, STEPS, shortlist=8)
    assert sum(r.head_rows for r in decoder.results) == sum(record.full)
    assert sum(r.screened for r in decoder.results) == sum(n * c for n, c in record.some)
    for prompt, result in zip(prompts, decoder.results, strict=True):
        # block 1 is asked in full, every later checked block of the token with 8 candidates
        screens = sum(min(layer, 4) - 1 for layer in result.layers)
        assert result.screened == 8 * screens
        confirmations = result.decisions - STEPS - screens
        final = sum(layer == 5 for layer in result.layers)
        assert result.head_rows == STEPS + confirmations + final
        counter = FlopCounter(anatomy, stopper)
        counter.stored_weights = windows.stored_weights
        expected = (
            sum(2 * w * t + 4 * 32 * p for w, t, p in zip(anatomy.block_weights, result.block_tokens, result.pairs, strict=True))
            + 2 * 32 * 101 * result.head_rows
            + 2 * 32 * result.screened
            + result.decisions
        )
        assert record_of(result, len(prompt), counter, "").flops == expected


def test_a_shortlist_computes_less_than_the_exact_check_and_exact_screens_nothing():
    _, anatomy, windows = prepared("llama")
    prompts = prompts_of(6, seed=4)
    never = parse("gap:1")
    exact, short = (decode_greedily(anatomy, windows, never, prompts, STEPS, shortlist=n)[0] for n in (0, 8))
    for a, b in zip(exact.results, short.results, strict=True):
        assert a.tokens == b.tokens and (a.head_rows, a.screened) == (5 * STEPS, 0)
        assert (b.head_rows, b.screened) == (2 * STEPS, 3 * 8 * STEPS)


@pytest.mark.parametrize(
    ("value", "found"),
    [("short", "'short'"), ("shortlist:1", "'shortlist:1'"), ("shortlist:x", "'shortlist:x'"), ("exact:3", "'exact:3'"),
     ("shortlist:", "'shortlist:'"), ("screen:1", "'screen:1'"), ("screen:", "'screen:'"), ("", "''"), (3, "3")],
)  # fmt: skip
def test_wrong_head_checks_are_refused_in_one_sentence(value, found, tokenizer):
    with pytest.raises(AdaInferError) as caught:
        AdaInferLM(pretrained=make_model("llama", vocab_size=257), tokenizer=tokenizer, head_check=value)
    assert str(caught.value) == (
        f"head_check: {found} is none of exact, shortlist, shortlist:N with N candidates, screen, and screen:N with the "
        "N first token ids, 2 or more"
    )


class RecomputeRecent(KVPolicy):
    """The last ``n`` tokens that left are run along, and older ones are propagated."""

    exact, n = False, 2

    def split(self, rows, missing, first_exits, newest):
        begins = [
            slot if slot < first else max(slot, newest - self.n)
            for slot, first in zip(missing, first_exits, strict=True)
        ]
        stored = Tokens(rows, missing, begins, newest, with_newest=False)
        return Tokens(rows, begins, [newest] * len(rows), newest), stored if stored.n else None


@pytest.mark.parametrize("family", ["llama", "falcon"])
def test_a_policy_of_ones_own_is_a_class_and_a_name(family, monkeypatch):
    """It recomputes everything, nothing or some of it; the prompt has gone through all blocks before."""
    _, anatomy, windows = prepared(family)
    exits = [[5, 5], [1, 2], [2, 1], [1, 1], [3, 1], [5, 1], [1, 3], [5, 5]]
    found = {}
    for n in (0, 2, 99):
        monkeypatch.setitem(KV_POLICIES, f"recent:{n}", type("Some", (RecomputeRecent,), {"n": n}))
    for policy in KV_POLICIES:
        decoder, logits = decode_greedily(anatomy, windows, Listed(exits), prompts_of(2, 40), len(exits), kv_policy=policy)
        found[policy] = (
            [r.tokens for r in decoder.results], [r.stored_tokens for r in decoder.results],
            torch.stack([x for row in logits for x in row]),
        )  # fmt: skip
    for ours, known in (("recent:0", "propagate"), ("recent:99", "recompute")):
        assert found[ours][:2] == found[known][:2]
        torch.testing.assert_close(found[ours][2], found[known][2], atol=1e-5, rtol=0)
    stored = [sum(map(sum, found[name][1])) for name in ("recompute", "recent:2", "propagate")]
    assert 0 == stored[0] < stored[1] < stored[2]


def test_wrong_kv_policies_are_refused_in_one_sentence(tokenizer):
    with pytest.raises(AdaInferError, match=r"^kv_policy: 'copy' is neither recompute nor propagate$"):
        AdaInferLM(pretrained=make_model("llama", vocab_size=257), tokenizer=tokenizer, kv_policy="copy")


def test_a_head_that_is_no_plain_linear_map_is_refused_for_few_tokens_alone(tokenizer):
    """A head of another kind of module, whose weights can't be read for some tokens."""

    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    model = make_model("llama", vocab_size=257, tie_word_embeddings=False)
    head = Doubled(32, 257, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head
    AdaInferLM(pretrained=model, tokenizer=tokenizer, stopper="gap")
    for check in ("shortlist", "screen"):
        with pytest.raises(AdaInferError, match=r"^head_check: .*use head_check=exact$"):
            AdaInferLM(pretrained=model, tokenizer=tokenizer, stopper="gap", head_check=check)


# ------------------------------------------------------------------------------------------------ neighbours


@pytest.mark.parametrize("options", [{"kv_policy": "propagate"}, {"head_check": "shortlist:8"},
                                     {"kv_policy": "propagate", "head_check": "screen:50"}], ids=str)  # fmt: skip
@pytest.mark.parametrize("family", ["llama", "falcon"])
def test_a_text_does_not_depend_on_its_neighbours_under_any_policy(options, family, tokenizer):
    model = make_model(family, vocab_size=257)
    threshold = middling_gap(model, Anatomy(model), prompts_of(6, seed=30))
    texts = ["ab", "cde f", "the quick brown", "x", "hello world again", "q q q q", "zz"]
    for sampling in ({}, {"do_sample": True, "temperature": 0.8, "top_p": 0.9}):
        settings = {"until": ["\n", "zq"], "max_gen_toks": 8, **sampling}
        asked = [instance(t, settings, i, kind="generate_until") for i, t in enumerate(texts)]
        found = []
        for size in (1, 3, 7):
            torch.manual_seed(7)
            lm = AdaInferLM(
                pretrained=model, tokenizer=tokenizer, batch_size=size, max_length=64, stopper=f"gap:{threshold}", **options
            )
            answers = lm.generate_until(asked, True)
            found.append([(a, a.exit_record.layers) for a in answers])
        assert found[0] == found[1] == found[2]
        assert len({layer for _, layers in found[0] for layer in layers}) >= 2


@pytest.mark.parametrize("family", ["llama", "bloom"])
@pytest.mark.parametrize("stopper", [NoStopper(), parse("fixed:1"), parse("fixed:3")], ids=["none", "fixed:1", "fixed:3"])
def test_policies_agree_where_no_token_goes_deeper_than_those_before_it(family, stopper):
    _, anatomy, windows = prepared(family)
    prompts = prompts_of(4, seed=6)
    exact, copied = (
        decode_greedily(anatomy, windows, stopper, prompts, STEPS, kv_policy=p) for p in ("recompute", "propagate")
    )
    for a, b in zip(exact[1], copied[1], strict=True):
        torch.testing.assert_close(torch.stack(a), torch.stack(b), atol=1e-5, rtol=0)
    assert all(sum(r.stored_tokens) == 0 for r in copied[0].results)


def test_one_new_token_and_two_blocks(tokenizer):
    """The smallest there is, at both ends."""
    model = make_model("llama", num_hidden_layers=2)
    anatomy = Anatomy(model)
    windows = prepare(anatomy)
    prompts = prompts_of(5, seed=1)
    for steps in (1, 7):
        decoder, logits = decode_greedily(anatomy, windows, Dice(0.5), prompts, steps)
        assert_exact(model, decoder, prompts, logits)
        assert {layer for r in decoder.results for layer in r.layers} == {1, 2}
