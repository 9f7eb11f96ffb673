"""The registry of strategies and the declarations of features: whatever lists them says the same, and nothing more.

``python tests/test_registry.py`` writes the table in docs/strategies.md.
"""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from helpers.refusals import refused

from lm_eval_adainfer.cli import main
from lm_eval_adainfer.errors import AdaInferError
from lm_eval_adainfer.fitting import fit
from lm_eval_adainfer.harness.model import AdaInferLM
from lm_eval_adainfer.strategies import features, files, registry, specs
from lm_eval_adainfer.strategies.base import Stopper
from lm_eval_adainfer.strategies.registry import STRATEGIES, Strategy
from lm_eval_adainfer.strategies.shortgpt import ShortGPTStopper

DOCS = Path(__file__).resolve().parents[1] / "docs"
BEGIN, END = "<!-- strategies: written by tests/test_registry.py -->\n", "<!-- end of strategies -->\n"


# ------------------------------------------------------------------------------------------------ the table
def row(strategy: Strategy) -> str:
    """A strategy's line of the table."""
    said = [f"`{spec}`" for spec in strategy.specs]
    said += [f"a file of `{strategy.command}`"] if strategy.command else []
    if strategy.fit is not None:
        stops = f"{strategy.stops} (`--threshold`, {strategy.fit.threshold:g})"
        names = strategy.fit.features
        reads = "all features, or `--features`" if names is None else f"{code(names)}, or `--features`"
    else:
        stops, reads = strategy.stops, code(strategy.features) or "nothing"
    return f"| {', '.join(said)} | {stops} | {reads} |"


def code(names) -> str:
    return ", ".join(f"`{name}`" for name in names)


def table() -> str:
    return "\n".join(["| `stopper=` | it stops | it reads |", "|---|---|---|", *map(row, STRATEGIES.values())]) + "\n"


def parts(page: str) -> tuple[str, str, str]:
    before, _, rest = page.partition(BEGIN)
    found, _, after = rest.partition(END)
    return before, found.strip("\n") + "\n", after


def test_the_documentation_lists_the_strategies_of_the_registry():
    _, found, _ = parts((DOCS / "strategies.md").read_text())
    assert found == table(), "docs/strategies.md is old: python tests/test_registry.py"


# ------------------------------------------------------------------------------------------------ strategies
@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=lambda s: s.name)
def test_a_declared_class_is_there_and_bears_the_name(strategy):
    found = strategy.stopper_class()
    assert issubclass(found, Stopper) and found.kind == strategy.name
    assert strategy.stops and "\n" not in strategy.stops
    assert strategy.specs or strategy.command, "nobody can get it"
    assert (strategy.read is None) == all(":" not in spec for spec in strategy.specs) and bool(strategy.wrong) == bool(strategy.read)


@pytest.mark.parametrize("spec", [spec for s in STRATEGIES.values() for spec in s.specs])
def test_every_declared_spec_is_parsed_and_what_it_makes_can_be_saved(spec, tmp_path):
    files.save(ShortGPTStopper({"influence": np.arange(12.0)}, info={"model": "m"}), tmp_path / "FILE")
    stopper = specs.parse(spec.replace("FILE", str(tmp_path / "FILE")))
    assert stopper.kind == spec.partition(":")[0]
    if stopper.kind in registry.savable():
        files.save(stopper, tmp_path / "s")
        assert files.load(tmp_path / "s").fingerprint == stopper.fingerprint


@pytest.mark.parametrize("strategy", [s for s in STRATEGIES.values() if s.name in s.specs and s.read], ids=lambda s: s.name)
def test_a_bare_name_means_the_first_example(strategy):
    assert specs.parse(strategy.name).fingerprint == specs.parse(strategy.specs[0]).fingerprint


@pytest.mark.parametrize("strategy", [s for s in STRATEGIES.values() if s.specs], ids=lambda s: s.name)
def test_a_wrong_value_is_refused_in_the_declared_words(strategy):
    if strategy.read:
        message = refused(lambda: specs.parse(f"{strategy.name}:what"), "stopper", f"{strategy.name}:what")
        assert message.endswith(strategy.wrong.format(name=strategy.name))


def test_every_help_names_every_strategy():
    for text in (AdaInferLM.__doc__, specs.parse.__doc__):
        for strategy in STRATEGIES.values():
            for spec in strategy.specs:
                assert f"``{spec}``" in text, spec


def test_a_declared_strategy_needs_nothing_else(monkeypatch, tmp_path):
    """One entry gives it a name, a value, a place in files and a suggestion."""
    mine = Strategy("mine", ".rules:FixedStopper", "never", ("mine:7",), lambda text: {"layer": int(text)}, "is wrong")
    monkeypatch.setitem(STRATEGIES, "mine", mine)
    assert specs.parse("mine:7").layer == 7
    refused(lambda: specs.parse("mine:x"), "stopper: 'mine:x' is wrong")
    refused(lambda: specs.parse("mein=7"), "mine:7 is probably meant", "gap:0.8, ")
    monkeypatch.setattr("lm_eval_adainfer.strategies.rules.FixedStopper.kind", "mine")
    files.save(specs.parse("mine:7"), tmp_path / "s")
    assert files.load(tmp_path / "s").layer == 7
    monkeypatch.setitem(STRATEGIES, "mine", Strategy("mine", mine.where, "never", mine.specs, mine.read, savable=False))
    refused(lambda: files.save(specs.parse("mine:7"), tmp_path / "s"), "files hold no mine")
    refused(lambda: files.load(tmp_path / "s"), "kind 'mine'")


# ------------------------------------------------------------------------------------------------ fitting
def test_whatever_is_declared_as_fitted_has_its_fitter():
    assert set(fit.FITTERS) == set(registry.fitted())
    for kind, how in registry.fitted().items():
        fit.check_kind(kind)
        assert set(how.labels) <= set(fit.LABELS) and how.title
    refused(lambda: fit.check_kind("gap"), "fit", ", ".join(registry.fitted()))


@pytest.mark.parametrize("kind", registry.fitted())
def test_the_commands_defaults_are_the_declared_ones(kind, capsys):
    with pytest.raises(SystemExit):
        main.main(["fit", kind, "--help"])
    told, how = re.sub(r"\s+", " ", capsys.readouterr().out), registry.fitted()[kind]
    shown = re.split(r" --(?=\w+ (?:[A-Z]{2}|\{))", told)  # an option, and not its name within a sentence
    options = {text.split()[0]: re.findall(r"\(default: ([^)]*)\)", text)[:1] for text in shown}
    assert float(*options["threshold"]) == how.threshold
    assert int(*options["max_instances" if kind == "crf" else "max_examples"]) == how.most
    assert options["features"] == ["all" if how.features is None else ",".join(how.features)]
    assert f"{{{','.join(how.labels)}}}" in told


@pytest.mark.parametrize("kind", registry.fitted())
def test_the_functions_defaults_are_the_declared_ones(kind, monkeypatch):
    how, fitter = registry.fitted()[kind], fit.FITTERS[kind]
    if not isinstance(fitter, partial):
        given = {name: p.default for name, p in inspect.signature(fitter).parameters.items()}
        assert (given["threshold"], given["features"]) == (how.threshold, how.features)
        assert how.most in (given.get("max_examples"), given.get("max_instances"))
        return
    with monkeypatch.context() as patch:  # the classifiers look theirs up
        patch.setitem(fit._HOW, kind, registry.Fit("x", fit.LABELS, None, 7.0, 2))
        refused(lambda: fitter([]), "threshold: 7")


# ------------------------------------------------------------------------------------------------ features
def test_the_features_are_those_that_documents_and_help_define(capsys):
    page = (DOCS / "numbers.md").read_text().partition("## Features")[2].partition("\n## ")[0]
    defined = [name for line in re.findall(r"^\| (`[^|]*) \|", page, re.MULTILINE) for name in re.findall(r"`(\w+)`", line)]
    assert sorted(defined) == sorted(features.FEATURES)
    assert all(feature.definition.endswith(".") for feature in features.FEATURES.values())
    with pytest.raises(SystemExit):
        main.main(["fit", "svm", "--help"])
    told = capsys.readouterr().out
    assert all(re.search(rf"\b{name}\b", told) for name in features.FEATURES)


def test_a_declared_feature_says_what_it_needs(monkeypatch):
    monkeypatch.setattr(features, "FEATURES", dict(features.FEATURES))

    @features.recorded(head=True, part="mlp")
    def mine(seen):
        """Mine."""

    features.check_names(["mine"], "features")
    assert features.needs_head(["mine"]) and features.needed_parts(["mine", "cos_mlp", "cos_attn"]) == ["attn", "mlp"]
    assert not features.needs_past(["mine"]) and features.needs_past(["mine", "agreement"])
    with pytest.raises(AdaInferError, match="mine"):
        features.check_names(["other"], "features")


def test_the_registry_is_read_without_torch():
    """Help texts are made from it."""
    code = "import sys; from lm_eval_adainfer.strategies import registry; registry.fitted(), registry.specs(); "
    subprocess.run([sys.executable, "-c", code + "assert not {'torch', 'numpy', 'lm_eval'} & set(sys.modules)"], check=True)


if __name__ == "__main__":
    path = DOCS / "strategies.md"
    before, _, after = parts(path.read_text())
    path.write_text(before + BEGIN + "\n" + table() + "\n" + END + after)
