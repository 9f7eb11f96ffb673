"""Every family of ``families.py``, tiny: what early exit answers against plain forwards, and what is refused.

``python tests/test_families.py > docs/families.md`` writes the page of what was found.
"""

from __future__ import annotations

import random
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import transformers
from helpers.families import REFUSED, SUPPORTED
from helpers.models import build, byte_tokenizer, lm_of, make_model
from helpers.reference import read_score
from helpers.stoppers import ScriptedByState
from helpers.tasks import instance
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.models.huggingface import HFLM

from lm_eval_adainfer.errors import AdaInferError, UnsupportedModelError
from lm_eval_adainfer.generation.probes import prepare
from lm_eval_adainfer.harness.model import AdaInferLM
from lm_eval_adainfer.prefill.reading import prepared
from lm_eval_adainfer.readers import specs as readers
from lm_eval_adainfer.structure.anatomy import Anatomy
from lm_eval_adainfer.structure.removal import drop
from lm_eval_adainfer.verification import FAILED, NOT_SUPPORTED, Finding, verify_model

PAGE = Path(__file__).resolve().parents[1] / "docs" / "families.md"
TESTED = "5.24.0"  # the transformers release of constraints.txt
STOCK_FAILS = {"xlstm"}  # its own cache does not fit what hf does; blocks without a cache run all the same


class Found(NamedTuple):
    """What one family came to; ``layout`` and ``shares`` are empty and False where it is refused.

    ``unread`` are the readers that it is refused under, and the sentences that say so.
    """

    kind: str
    model: str
    findings: dict[str, Finding]
    layout: str = ""
    shares: bool = False
    refusal: str = ""
    unread: dict[str, str] = {}


READERS = ("copy", "sim")
_RECURRENT = (
    "mamba", "mamba2", "falcon_mamba", "xlstm", "rwkv", "recurrent_gemma", "bamba", "jamba", "zamba2", "falcon_h1",
    "granitemoehybrid", "nemotron_h", "qwen3_next", "qwen3_5", "olmo_hybrid", "lfm2", "minimax",
)  # fmt: skip
# (family, reader) that are refused: no plain key-value cache; no position ids, or alibi, which does not follow them;
# blocks that read more of earlier ones
UNREAD = {
    *((family, "copy") for family in (*_RECURRENT, "longcat_flash", "deepseek_v32", "openai-gpt")),
    *((family, "sim") for family in (*_RECURRENT[:5], "bloom", "mpt", "trocr", "falcon-alibi")),
    *((family, reader) for family in ("gemma4-shared-kv", "glm_moe_dsa") for reader in READERS),
}


def refused_readers(anatomy: Anatomy) -> dict[str, str]:
    """Reader -> the sentence that refuses it; none where it works."""
    found = {}
    for reader in READERS:
        try:
            prepared(anatomy, readers.parse(reader))
        except AdaInferError as error:
            found[reader] = str(error)
    return found


@cache
def examine(family: str) -> Found:
    """Run a family's checks, once for all tests of this module."""
    model = make_model(family, vocab_size=257)
    kind, name = (SUPPORTED.get(family) or REFUSED[family])[0], type(model).__name__
    try:
        lm = AdaInferLM(pretrained=model, tokenizer=byte_tokenizer(), batch_size=4, max_length=64)
    except AdaInferError as error:
        return Found(kind, name, {}, refusal=str(error))
    findings = {f.check: f for f in verify_model(lm, disable_tqdm=True)}
    layout = prepare(lm.anatomy).layout if findings["generation"].status != NOT_SUPPORTED else ""
    shares = findings["prefix"].status != NOT_SUPPORTED
    return Found(kind, name, findings, layout, shares, unread=refused_readers(lm.anatomy))


def as_stock(model):
    """``stopper=none`` and ``--model hf`` give the same answers."""
    asked = [
        instance(context, continuation, doc, idx=n)
        for doc, context in enumerate(["a", "the quick brown fox", "hello", " to be or not to be, that is"])
        for n, continuation in enumerate([" x", " yes"])
    ]
    options = {"pretrained": model, "tokenizer": byte_tokenizer(), "batch_size": 4, "max_length": 64}
    ours = AdaInferLM(**options).loglikelihood(asked, True)
    for a, b in zip(HFLM(**options).loglikelihood(asked, True), ours, strict=True):
        assert b[0] == pytest.approx(a[0], rel=2e-6, abs=1e-4) and b[1] == a[1]


@pytest.mark.parametrize("family", SUPPORTED)
def test_family(family):
    if SUPPORTED[family][0] not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} does not know it")
    found = examine(family)
    assert not found.refusal
    assert [f for f in found.findings.values() if f.status == FAILED] == []
    for check in ("dense", "exits", "compaction"):
        assert found.findings[check].status == "ok" and found.findings[check].comparisons > 0
    generation = found.findings["generation"]
    if not found.layout:
        assert generation.detail.startswith("generation: ") and "pass generation=dense" in generation.detail
        assert "\n" not in generation.detail
    if family in STOCK_FAILS:
        with pytest.raises((RuntimeError, ValueError)):
            as_stock(make_model(family, vocab_size=257))
    else:
        as_stock(make_model(family, vocab_size=257))


# ---------------------------------------------------------------------- readers
def asked_under_a_reader(window):
    """Documents that begin alike, with own parts of 1, W - 1, W, W + 1 tokens and more; and some that don't."""
    rng, shots = random.Random(1), "a few shots that all documents of a task begin with. "
    own = sorted({n for n in (1, window - 1, window, window + 1, window + 8, window + 9) if n > 0})
    texts = [shots + "".join(rng.choices("abcdef", k=n)) for n in own]
    texts += ["".join(rng.choices("abcdef", k=n)) + "q" for n in (0, 6, 13)]
    return [instance(t, c, n, idx=i) for n, t in enumerate(texts) for i, c in enumerate((" x", " yz", " abcde"))]


def check_reader(family, reader, batch_size):
    """Mixed exits in batches, shared prefixes, several-token continuations, against one row at a time."""
    if SUPPORTED[family][0] not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} does not know it")
    options = {"stopper": ScriptedByState(), "reader": reader, "check_layers": "all", "max_length": 128}
    model = make_model(family, vocab_size=257)
    try:
        lm = lm_of(model, byte_tokenizer(), batch_size=batch_size, **options)
    except AdaInferError as error:
        said = str(error)
        assert re.match(rf"reader: {type(model).__name__} can't be read by \w+ \(.*\); use head or tuned$", said), said
        assert "\n" not in said and (family, reader.partition(":")[0]) in UNREAD, said
        return
    assert (family, reader.partition(":")[0]) not in UNREAD
    asked, exits = asked_under_a_reader(int(reader.partition(":")[2])), set()
    for request, answer in zip(asked, lm.loglikelihood(asked, True), strict=True):
        k = int(answer.exit_record.exit_layer)
        exits.add(k)
        slow = read_score(model, lm.anatomy.blocks, reader, *lm._encode_pair(*request.args), k, lm.max_length)
        assert answer[0] == pytest.approx(slow[0], abs=1e-4 * max(1, abs(slow[0])))
        assert (answer[1], answer.top1) == slow[1:]
    assert len(exits) > 1 and min(exits) < lm.n_blocks


def test_sim_is_refused_where_alibi_takes_no_notice_of_position_ids():
    found = refused_readers(Anatomy(make_model("falcon-alibi", vocab_size=257)))
    assert list(found) == ["sim"] and "their order there, not from position ids" in found["sim"]


@pytest.mark.parametrize("reader", ["copy:2", "sim:2"])
@pytest.mark.parametrize("family", SUPPORTED)
def test_a_family_under_readers_that_let_tokens_go_on(family, reader):
    check_reader(family, reader, batch_size=7)


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 7])
@pytest.mark.parametrize("reader", ["copy:1", "copy:5", "sim:1", "sim:5"])
@pytest.mark.parametrize("family", SUPPORTED)
def test_a_family_under_other_windows_and_batch_sizes(family, reader, batch_size):
    check_reader(family, reader, batch_size)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "reader"), [(f, f"{r}:3") for f in SUPPORTED for r in READERS if (f, r) not in UNREAD]
)
def test_verify_finds_nothing_wrong_under_a_reader(family, reader):
    """Scores and texts."""
    if SUPPORTED[family][0] not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} does not know it")
    findings = verify_model(lm_of(make_model(family, vocab_size=257), byte_tokenizer(), reader=reader), True)
    assert [f for f in findings if f.status == FAILED] == []
    assert {"reader", "texts"} <= {f.check for f in findings}


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_is_refused_in_one_sentence(family):
    if REFUSED[family][0] not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} does not know it")
    found = examine(family)
    assert found.refusal.startswith(f"pretrained: {found.model} ") or found.model in found.refusal
    assert REFUSED[family][2] in found.refusal and "\n" not in found.refusal


def test_no_block_is_taken_out_of_a_model_with_blocks_that_text_passes_by():
    anatomy = Anatomy(make_model("mllama"))
    assert anatomy.n_blocks == 5 and anatomy.config.num_hidden_layers == 6
    with pytest.raises(UnsupportedModelError, match="more blocks than a text runs"):
        drop(anatomy, [2])


# ---------------------------------------------------------------------- odd shapes
ODD = ["llama", "gpt2", "bloom", "gemma3", "qwen3_moe", "mamba"]
_LAYERS = {"gpt2": "n_layer", "bloom": "n_layer"}


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("family", ODD)
def test_few_blocks_and_a_vocabulary_of_7(family, blocks):
    sizes = {_LAYERS.get(family, "num_hidden_layers"): blocks}
    check_shape(make_model(family, vocab_size=7, **sizes))


def check_shape(model):
    lm = AdaInferLM(pretrained=model, tokenizer=byte_tokenizer(), batch_size=4, max_length=24)
    findings = verify_model(lm, disable_tqdm=True)
    assert [f for f in findings if f.status == FAILED] == []


@settings(max_examples=8, deadline=None, derandomize=False)
@given(
    kind=st.sampled_from(["llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3"]),
    blocks=st.integers(1, 6),
    kv_heads=st.integers(1, 3),
    repeats=st.integers(1, 3),
    head_dim=st.sampled_from([2, 4, 6, 10]),
    wide=st.integers(1, 2),
    vocabulary=st.integers(2, 300),
    window=st.sampled_from([None, 1, 3, 8]),
    tied=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape_of_llama_and_its_kin(
    kind, blocks, kv_heads, repeats, head_dim, wide, vocabulary, window, tied, seed
):
    heads = kv_heads * repeats
    values = {
        "hidden_size": heads * head_dim * (1 if kind == "phi3" else wide),
        "intermediate_size": 24,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
        **({"sliding_window": window} if kind in ("mistral", "gemma2") and window else {}),
        **({"pad_token_id": 0} if kind == "phi3" else {}),
    }
    check_shape(build(kind, values, vocabulary, seed))


# ---------------------------------------------------------------------- the page
def page() -> str:
    """docs/families.md, from what the matrix finds."""
    works, refused = {n: examine(n) for n in SUPPORTED}, {n: examine(n) for n in REFUSED}
    lines = [
        "# Families",
        "",
        f"Written by `python tests/test_families.py > docs/families.md`, from tiny random models of every family: {len(works)}",
        f"configurations of {len({f.kind for f in works.values()})} model types of transformers {TESTED}. A test fails when "
        "this page differs from what it finds.",
        "Nothing is known by name, so other families may work as well; whatever does not is refused when it is loaded.",
        "",
        "*Choices*: `loglikelihood` leaves early, in batches. *Shared prefix*: what documents have in common is run once.",
        "*Generation*: `generate_until` leaves early; *packed* or *padded* is how rows are laid out",
        "([how-it-works.md](how-it-works.md#layouts)); *no*: only with `generation=dense`, for the reason below. *copy*, *sim*:",
        "these readers of prompts work, `reader=copy:W` and `sim:W` (`head` and `tuned` do everywhere). Every *yes* was",
        "compared with plain forwards of the whole model, row by row, and with `--model hf` (but for "
        f"{', '.join(STOCK_FAILS)}, which fails there).",
        "",
        "| family | model type | class | choices | shared prefix | generation | `copy` | `sim` |",
        "|---|---|---|---|---|---|---|---|",
    ]
    reasons: dict[str, list[str]] = {}
    unread: dict[str, list[str]] = {}
    for name, found in sorted(works.items()):
        shares, layout = "yes" if found.shares else "no", found.layout or "no"
        reads = " | ".join("no" if reader in found.unread else "yes" for reader in READERS)
        lines.append(f"| {name} | `{found.kind}` | {found.model} | yes | {shares} | {layout} | {reads} |")
        for said in found.unread.values():
            said = re.sub(r"are off by [^;)]* allowed", "differ", said.replace(found.model, "MODEL"))
            unread.setdefault(said, []).append(name)
        if not found.layout:
            said = found.findings["generation"].detail.replace(found.model, "MODEL")
            said = re.sub(r"logits are off by [^;)]* allowed", "logits differ", said)  # by how much, depends on the machine
            reasons.setdefault(said, []).append(name)
    lines += ["", "Why some can't leave early while generating:", "", "| families | the sentence |", "|---|---|"]
    lines += [f"| {', '.join(names)} | {said} |" for said, names in sorted(reasons.items())]
    lines += ["", "Why some can't be read by `copy` or `sim`:", "", "| families | the sentence |", "|---|---|"]
    lines += [f"| {', '.join(names)} | {said} |" for said, names in sorted(unread.items())]
    lines += ["", "## Refused", "", "| family | model type | the sentence |", "|---|---|---|"]
    lines += [f"| {name} | `{found.kind}` | {found.refusal} |" for name, found in sorted(refused.items())]
    return "\n".join(lines) + "\n"


@pytest.mark.skipif(transformers.__version__ != TESTED, reason=f"the page is about transformers {TESTED}")
def test_the_page_says_what_was_found():
    assert PAGE.read_text() == page(), "docs/families.md is old: python tests/test_families.py > docs/families.md"


if __name__ == "__main__":
    print(page(), end="")
