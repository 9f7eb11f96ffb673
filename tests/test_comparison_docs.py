"""Every command of docs/comparing.md and docs/ci.md, run in order, in one folder, with the demo model."""

from __future__ import annotations

import re
import shlex
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import yaml

from lm_eval_adainfer import paths
from lm_eval_adainfer.cli import main

pytest.importorskip("matplotlib")

DOCS = Path(__file__).resolve().parents[1] / "docs"
_BLOCK = re.compile(r"(?:<!-- (?P<mark>[^>]*?) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)```", re.DOTALL)


def blocks_of(page: str):
    return [m.groupdict() for m in _BLOCK.finditer((DOCS / page).read_text())]


@pytest.fixture(autouse=True)
def only_our_tasks(monkeypatch):
    """Looking through lm-eval's thousands of tasks takes five seconds per command; the demo's are ours."""
    import lm_eval.tasks

    manager = lm_eval.tasks.TaskManager(include_path=str(paths.task_configs()), include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda *args, **kwargs: manager)


def execute(command: str, monkeypatch) -> int:
    """As a shell would, but in this process: starting Python for every command takes most of the time."""
    program, *arguments = shlex.split(command)
    if program == "adainfer":
        return main(arguments)
    assert program == "lm_eval", command
    from lm_eval.__main__ import cli_evaluate

    monkeypatch.setattr(sys, "argv", [program, *arguments])
    cli_evaluate()
    return 0


@pytest.mark.parametrize("page", ["comparing.md", "ci.md"])
def test_every_block_of_commands_is_marked_to_run(page):
    found = blocks_of(page)
    assert found and all((b["mark"] or "").startswith("runs") for b in found if b["language"] == "bash")
    assert all((b["mark"] or "").startswith("file: ") for b in found if b["language"] == "yaml")


def test_comparing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for block in blocks_of("comparing.md"):
        if block["language"] == "yaml":
            Path(block["mark"].removeprefix("file: ")).write_text(block["text"])
            continue
        expected = int(re.search(r"\d", block["mark"] + " 0")[0])
        for command in block["text"].strip().splitlines():
            assert execute(command, monkeypatch) == expected, (command, capsys.readouterr())
    for made in ("comparison.md", "check.xml", "summary.md", "runs/gate/candidate", "traces", "report/index.html"):
        assert Path(made).exists(), made
    ET.parse("check.xml")


def test_the_workflow(tmp_path, monkeypatch, capsys):
    """Its commands, with fewer documents (and so a larger limit); pip and the actions are GitHub's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "step.md"))
    workflow, *commands = blocks_of("ci.md")
    job = yaml.safe_load(workflow["text"])["jobs"]["gate"]
    ran = [step["run"] for step in job["steps"] if step.get("run", "").startswith("adainfer")]
    assert len(ran) == 2 and "--limit 320" in ran[0] and "--max-drop 0.02" in ran[0]
    ran[0] = ran[0].replace("--limit 320", "--limit 40").replace("--max-drop 0.02", "--max-drop 0.06")
    for command in [*ran, *(c["text"].strip() for c in commands)]:
        assert execute(command, monkeypatch) == 0, (command, capsys.readouterr())
    upload = next(step for step in job["steps"] if "upload" in step.get("uses", ""))
    for path in upload["with"]["path"].split():
        assert Path(path).exists()
    assert "| drop of all documents | passed |" in (tmp_path / "step.md").read_text()
