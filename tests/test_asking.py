"""Chat templates, system instructions, generation arguments and metadata: as ``lm_eval`` itself would ask."""

from __future__ import annotations

import json

import numpy as np
import pytest
from helpers.models import byte_tokenizer, make_model
from helpers.refusals import refused
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval._cli import utils as cli_utils

from lm_eval_adainfer.cli import main, options
from lm_eval_adainfer.fitting import fit
from lm_eval_adainfer.harness.model import AdaInferLM
from lm_eval_adainfer.strategies import files
from lm_eval_adainfer.traces import recording
from lm_eval_adainfer.traces.file import ASKED

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}</{{ message['role'] }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TASK = "adainfer_demo_topic"
CHAT = ["--apply_chat_template", "--system_instruction", "Be brief.", "--metadata", "shots=per_task"]


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    """A tiny model on disk whose tokenizer has a chat template, and the same without one."""
    where = tmp_path_factory.mktemp("models")
    for name in ("chat", "plain"):
        make_model("llama", vocab_size=257, max_position_embeddings=2048).save_pretrained(where / name)
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = TEMPLATE if name == "chat" else None
        tokenizer.save_pretrained(where / name)
    return where


@pytest.fixture
def asked(monkeypatch):
    """The (context, continuation) pairs that models are asked."""
    seen = []
    stock = AdaInferLM.loglikelihood

    def spy(self, requests, *rest, **options):
        seen.extend(r.args for r in requests)
        return stock(self, requests, *rest, **options)

    monkeypatch.setattr(AdaInferLM, "loglikelihood", spy)
    return seen


def trace(model, output, *more, task=TASK, shots="2", limit="6"):
    arguments = ["-a", f"pretrained={model},dtype=float32,max_length=2000", "--device", "cpu", "-t", task, "-f", shots]
    return main.main(["trace", *arguments, "-L", limit, "--split", "test", "-o", str(output), *more])


# ------------------------------------------------------------------------------------------------ lm_eval's reading


def stock_reading(options):
    """What lm_eval's own command makes of these options; a wrong combination is its ValueError."""
    from lm_eval._cli.harness import HarnessCLI
    from lm_eval.config.evaluate_config import EvaluatorConfig

    parsed = HarnessCLI()._parser.parse_args(["run", "--tasks", "t", *options])
    found = EvaluatorConfig.from_cli(parsed)
    return (found.apply_chat_template, found.system_instruction or None, found.fewshot_as_multiturn,
            found.gen_kwargs or None, found.metadata or None)  # fmt: skip


def our_reading(given):
    found = options.asking(options.documents(required=()).parse_args(given))
    return (found.apply_chat_template, found.system_instruction or None, found.fewshot_as_multiturn, found.gen_kwargs,
            found.metadata)  # fmt: skip


OF_0_4 = hasattr(cli_utils, "split_top_level")  # 0.5.0.dev1 splits lists at their commas, and reads metadata as JSON
PAIRS = st.lists(
    st.sampled_from(["temperature=0.8", "do_sample=true", "max_gen_toks=5", "x=None", "y=1e-3", "a=1,b=two", "s='7'",
                     *(["until=['a,b','c']"] if OF_0_4 else [])]), min_size=1, max_size=3,
)  # fmt: skip


@given(
    template=st.sampled_from([[], ["--apply_chat_template"], ["--apply_chat_template", "rag"]]),
    system=st.sampled_from([[], ["--system_instruction", "Be brief."], ["--system_instruction", ""]]),
    turns=st.sampled_from([[]] + [["--fewshot_as_multiturn", *v] for v in ([], ["true"], ["false"], ["No"], ["1"])]),
    gen_kwargs=st.one_of(st.just([]), PAIRS, st.just(['{"until": ["x"], "temperature": 1}'])),
    metadata=st.one_of(st.just([]), *([PAIRS] if OF_0_4 else []), st.just(['{"sizes": [1, 2]}'])),
)
@settings(max_examples=120, deadline=None)
def test_the_options_are_read_as_lm_eval_reads_them(template, system, turns, gen_kwargs, metadata):
    options = [*template, *system, *turns]
    options += ["--gen_kwargs", *gen_kwargs] if gen_kwargs else []
    options += ["--metadata", *metadata] if metadata else []
    try:
        expected = stock_reading(options)
    except ValueError:
        refused(lambda: our_reading(options), "fewshot_as_multiturn", "--apply_chat_template")
        return
    assert our_reading(options) == expected


def test_the_same_prompts_as_lm_evals_own_evaluation(chatty, asked, only_our_tasks, tmp_path):
    """The reference: ``simple_evaluate`` with the same settings, whose prompts are a superset (all documents)."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    model = {"pretrained": str(chatty / "chat"), "dtype": "float32", "max_length": 2000, "device": "cpu"}
    for more, settings_ in (
        (CHAT, {"apply_chat_template": True, "system_instruction": "Be brief.", "fewshot_as_multiturn": True}),
        ([*CHAT, "--fewshot_as_multiturn", "false"],
         {"apply_chat_template": True, "system_instruction": "Be brief.", "fewshot_as_multiturn": False}),
        (CHAT[1:], {"system_instruction": "Be brief."}),
        (CHAT[3:], {}),
    ):  # fmt: skip
        asked.clear()
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        assert trace(chatty / "chat", folder, *more) == 0
        ours = list(asked)
        asked.clear()
        manager = TaskManager(metadata={**model, "shots": "per_task"})
        lm_eval.simple_evaluate("adainfer", model_args={**model, "stopper": "fixed:1"}, tasks=[TASK], num_fewshot=2,
                                task_manager=manager, bootstrap_iters=0, batch_size=16, **settings_)  # fmt: skip
        assert len(ours) == 24 and set(ours) <= set(asked)
        context = ours[0][0]
        assert ("<assistant>" in context) == ("apply_chat_template" in settings_)
        assert ("Be brief." in context) == bool(settings_)
        assert (context.count("<user>") == 3) == bool(settings_.get("fewshot_as_multiturn"))


# ------------------------------------------------------------------------------------------------ traces


def test_the_settings_are_in_the_trace_and_another_call_neither_keeps_nor_pools_it(
    chatty, only_our_tasks, tmp_path, capsys
):
    assert trace(chatty / "chat", tmp_path / "chat", *CHAT) == 0
    assert trace(chatty / "chat", tmp_path / "plain") == 0
    (file,), (plain,) = ((tmp_path / name).glob("*.trace") for name in ("chat", "plain"))
    meta = recording.read(file)[0]
    assert meta["system_instruction"] == "Be brief." and meta["fewshot_as_multiturn"] is True
    assert meta["metadata"] == {"shots": "per_task"} and meta["gen_kwargs"] is None and len(meta["chat_template"]) == 16
    none = {key: recording.read(plain)[0][key] for key in ("chat_template", "system_instruction", "metadata")}
    assert set(none.values()) == {None}
    before = file.read_bytes()
    assert trace(chatty / "chat", tmp_path / "chat", *CHAT) == 0 and file.read_bytes() == before
    for more, key in (([], "chat_template"), ([*CHAT, "--fewshot_as_multiturn", "no"], "fewshot_as_multiturn"),
                      ([*CHAT[:2], "Be long.", *CHAT[3:]], "system_instruction"), (CHAT[:3], "metadata")):  # fmt: skip
        assert trace(chatty / "chat", tmp_path / "chat", *more) == 2
        assert f"other settings ({key} was" in capsys.readouterr().err
    other = plain.rename(plain.with_name("another_2shot_test.trace"))
    refused(lambda: fit.fit_svm([file, other]), "traces", "chat_template", "asked in one way")
    assert file.read_bytes() == before


def test_a_killed_trace_is_not_gone_on_with_by_a_call_that_asks_otherwise(
    chatty, asked, only_our_tasks, tmp_path, monkeypatch
):
    monkeypatch.setattr(recording, "PART_DOCUMENTS", 4)
    record, calls = recording._record, []

    def killed(*arguments):
        calls.append(len(arguments[3]))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return record(*arguments)

    monkeypatch.setattr(recording, "_record", killed)
    assert trace(chatty / "chat", tmp_path, limit="8") == 130
    monkeypatch.setattr(recording, "_record", record)
    asked.clear()
    assert trace(chatty / "chat", tmp_path, *CHAT, limit="8") == 0
    assert len(asked) == 8 * 4 and all("<assistant>" in context for context, _ in asked)


def test_gen_kwargs_go_before_a_tasks_own(chatty, only_our_tasks, tmp_path, capsys):
    task = "adainfer_demo_fact_generate"
    options = ["--gen_kwargs", "max_gen_toks=2", "until=['§']"]
    assert trace(chatty / "plain", tmp_path, *options, task=task) == 0
    (file,) = tmp_path.glob("*.trace")
    meta, arrays = recording.read(file)
    assert np.bincount(np.unique(arrays["doc_id"], return_inverse=True)[1]).tolist() == [2] * 6
    assert meta["gen_kwargs"] == {"max_gen_toks": 2, "until": ["§"]}
    assert trace(chatty / "plain", tmp_path, task=task) == 2
    assert "gen_kwargs was" in capsys.readouterr().err


def test_what_was_traced_before_the_settings_were_recorded_is_kept_by_a_plain_call(chatty, only_our_tasks, tmp_path):
    from lm_eval_adainfer import container

    assert trace(chatty / "chat", tmp_path) == 0
    (file,) = tmp_path.glob("*.trace")
    meta, arrays = recording.read(file)
    old = {k: v for k, v in meta.items() if k not in (*ASKED, "gen_kwargs", "metadata")}
    container.write(file, "trace", recording.VERSION, old, arrays)
    before = file.read_bytes()
    assert trace(chatty / "chat", tmp_path) == 0 and file.read_bytes() == before


# ------------------------------------------------------------------------------------------------ other commands


def test_influence_and_recipes_ask_the_same_way(chatty, asked, only_our_tasks, tmp_path, monkeypatch):
    model = ["-a", f"pretrained={chatty / 'chat'},dtype=float32,max_length=2000", "--device", "cpu", "-t", TASK, "-L", "4"]
    texts = []
    encode = AdaInferLM.tok_encode
    monkeypatch.setattr(AdaInferLM, "tok_encode", lambda self, text, *a, **k: texts.append(text) or encode(self, text, *a, **k))
    assert main.main(["influence", *model, *CHAT, "-o", str(tmp_path / "bi")]) == 0
    prompts = [text for text in texts if isinstance(text, str) and "Be brief." in text]
    assert len(prompts) == 4 and all("<assistant>" in text for text in prompts)
    assert files.load(tmp_path / "bi").info["system_instruction"] == "Be brief."
    (tmp_path / "mine.yaml").write_text("study: accuracy\nshots: [0]\n")
    assert main.main(["recipe", str(tmp_path / "mine.yaml"), *model, *CHAT, "-o", str(tmp_path / "out")]) == 0
    assert asked and all("<system>Be brief." in context for context, _ in asked)


def test_both_sides_of_a_check_are_asked_the_same_way_also_from_a_file(chatty, only_our_tasks, tmp_path, capsys):
    (tmp_path / "gate.yaml").write_text(
        f"run: true\nmodel_args: pretrained={chatty / 'chat'},dtype=float32,max_length=2000,stopper=none,prefix_cache=8\n"
        f"tasks: {TASK}\nlimit: 5\ndevice: cpu\nnum_fewshot: 2\napply_chat_template: true\n"
        "fewshot_as_multiturn: false\nsystem_instruction: Be brief.\nmetadata: {shots: per_task}\n"
        "gen_kwargs: temperature=0.5,do_sample=true\n"
    )
    assert main.main(["check", "--config", str(tmp_path / "gate.yaml"), "--reproduces", "-o", str(tmp_path / "runs")]) == 0
    for side, kind in (("baseline", "hf"), ("candidate", "adainfer")):
        (results,) = (tmp_path / "runs" / side).rglob("results_*.json")
        found = json.loads(results.read_text())
        assert found["config"]["model"] == kind and found["chat_template"] == TEMPLATE
        assert found["system_instruction"] == "Be brief." and found["fewshot_as_multiturn"] is False
        assert found["config"]["gen_kwargs"] == {"temperature": 0.5, "do_sample": True}
        (samples,) = (tmp_path / "runs" / side).rglob("samples_*.jsonl")
        contexts = [json.loads(line)["arguments"]["gen_args_0"]["arg_0"] for line in samples.read_text().splitlines()]
        assert len(contexts) == 5 and all(c.startswith("<system>Be brief.") and c.count("<user>") == 1 for c in contexts)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("apply_chat_template: 3", "a template"),
        ("fewshot_as_multiturn: maybe", "true or false"),
        ("gen_kwargs: [1]", "a mapping"),
        ("gen_kwargs: hot", "a mapping"),
        ("metadata: 7", "a mapping"),
        ("system_instruction: [a]", "a text"),
        ("fewshot_as_multiturn: true", "--apply_chat_template"),
    ],
)
def test_wrong_values_in_a_file_are_one_sentence(line, words, tmp_path, capsys):
    start = "run: true\nmodel_args: pretrained=adainfer-demo\ntasks: x\nmax_drop: 0.1\n"
    (tmp_path / "gate.yaml").write_text(start + line + "\n")
    assert main.main(["check", "--config", str(tmp_path / "gate.yaml")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and line.split(":")[0] in err and words in err


def test_wrong_options_are_told_before_the_work(chatty, only_our_tasks, tmp_path, capsys):
    assert trace(chatty / "plain", tmp_path / "o", "--apply_chat_template") == 2
    assert "has no chat template" in capsys.readouterr().err.splitlines()[-1]
    assert trace(tmp_path / "no model", tmp_path / "o", "--fewshot_as_multiturn") == 2
    assert "--apply_chat_template" in capsys.readouterr().err
    for wrong in ("hot", "{bad"):
        with pytest.raises(SystemExit) as ended:
            trace(tmp_path / "no model", tmp_path / "o", "--gen_kwargs", wrong)
        assert ended.value.code == 2 and "--gen_kwargs" in capsys.readouterr().err
    assert main.main(["verify", "-a", "no pairs"]) == 2
    assert "model_args: 'no pairs' is not like key=value" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
