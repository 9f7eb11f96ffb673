"""The ``adainfer`` command itself: its help is there at once, and no option is ignored in silence."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from lm_eval_adainfer.cli.main import main

COMMANDS = ["verify", "trace", "fit", "calibrate", "layers", "influence", "replay", "recipe", "compare", "check", "report"]


def refused(capsys, arguments, *words):
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("adainfer: error: ") and all(word in line for word in words), line


@pytest.mark.parametrize("command", [[], ["check"]])
def test_help_loads_neither_torch_nor_lm_eval(command):
    code = f"""
import sys
from lm_eval_adainfer.cli.main import main
try:
    main([*{command}, "--help"])
except SystemExit as ended:
    assert not ended.code
heavy = "torch", "lm_eval", "transformers", "numpy", "scipy", "sklearn"
sys.exit(f"loaded {{found}}" if (found := {{m.partition(".")[0] for m in sys.modules}} & {{*heavy}}) else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "usage: adainfer" in done.stdout


@pytest.mark.parametrize("module", ["lm_eval_adainfer.cli", "lm_eval_adainfer.cli.main"])
def test_the_command_runs_as_a_module_too(module):
    done = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.startswith("lm-eval-adainfer ")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0 and f"usage: adainfer {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("model_args", "pretrained=adainfer-demo"),
        ("device", "cpu"),
        ("num_fewshot", "0"),
        ("limit", "5"),
        ("batch_size", "4"),
        ("include_path", "."),
        ("apply_chat_template", "chat"),
        ("system_instruction", "Be brief."),
        ("fewshot_as_multiturn", "false"),
        ("gen_kwargs", "temperature=0.5"),
        ("metadata", "a=b"),
        ("output", "runs"),
    ],
)
def test_what_only_a_check_that_runs_models_uses_is_refused_by_one_that_reads_runs(option, value, tmp_path, capsys):
    check = ["check", "--baseline", "a", "--candidate", "b", "--max-drop", "0.1"]
    refused(capsys, [*check, f"--{option}", value], f"error: {option}: ", "--run")
    (tmp_path / "gate.yaml").write_text(f"{option}: {value}\n")
    refused(capsys, [*check, "--config", str(tmp_path / "gate.yaml")], f"error: {option}: ", "--run")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--max-drop", "0.1", "--reproduces"], ["max-drop", "--reproduces"]),
        (["--min-pruning", "0.1", "--reproduces"], ["min-pruning", "--reproduces"]),
        (["--group", "mmlu", "--reproduces"], ["group", "--reproduces"]),
        (["--on-inconclusive", "pass", "--reproduces"], ["on-inconclusive", "--reproduces"]),
        (["--max-drop", "0.1", "--tolerance", "0.1"], ["tolerance", "--reproduces"]),
    ],
)
def test_options_of_the_other_kind_of_check_are_refused(options, words, capsys):
    refused(capsys, ["check", "--baseline", "a", "--candidate", "b", *options], *words)


def test_the_keys_of_a_config_file_are_the_options_of_check(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["check", "--help"])
    found = re.findall(r"^  (?:-\w, )?--([\w-]+)", capsys.readouterr().out, re.MULTILINE)
    shown = {name.replace("-", "_") for name in found}
    (tmp_path / "gate.yaml").write_text("nonsense: 1\n")
    assert main(["check", "--config", str(tmp_path / "gate.yaml")]) == 2
    keys = set(capsys.readouterr().err.strip().partition("keys are ")[2].split(", "))
    assert keys == shown - {"help", "config"} and {"run", "max_drop", "limit", "output"} <= keys


def test_another_models_traces_are_refused_by_a_recipe_that_does_not_fit_on_them(tmp_path, capsys):
    recipe = ["-a", "pretrained=adainfer-demo", "--other_model", str(tmp_path), "-o", str(tmp_path / "out")]
    for name in ("table2", "figure1"):
        refused(capsys, ["recipe", name, *recipe], "other_model", name)
