"""The user guide and README: every marked command is run, in order, in one folder per page, with the demo model.

``<!-- runs -->`` (or ``runs, exit 1``) marks commands, ``<!-- file: NAME -->`` files, ``<!-- prints -->`` lines that the
commands above have printed: the same words with other numbers, because here ``--limit`` is smaller.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import yaml
from helpers.processes import execute

pytest.importorskip("matplotlib")

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
MOST = {"README.md": 20, "quickstart.md": 10, "your-model.md": 4, "your-stopper.md": 20, "comparing.md": 30,
        "strategies.md": 10, "guarantee.md": 10, "extending.md": 1}  # --limit
GUIDE = sorted(p.name for p in DOCS.glob("*.md"))
_BLOCK = re.compile(r"(?:<!-- (?P<mark>[^>]*?) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)```", re.DOTALL)
_NUMBER = re.compile(r"[+-]?\d[\d,.]*(e[+-]\d+)?%?|N/A")


def blocks_of(page: str):
    path = ROOT / page if page == "README.md" else DOCS / page.removeprefix("docs/")
    found = [m.groupdict() for m in _BLOCK.finditer(path.read_text())]
    return [{**b, "mark": b["mark"] or ""} for b in found]


def words(line: str) -> str:
    """A line without its numbers, and without spaces, rules and signs, whose widths depend on them."""
    return re.sub(r"[-\s#+]+", "", _NUMBER.sub("#", line))


def with_at_most(command: str, most: int) -> str:
    return re.sub(r"--limit (\d+)", lambda m: f"--limit {min(int(m[1]), most)}", command)


def commands_of(block) -> list[str]:
    if block["mark"] == "demo-command":  # README: venv, pip, and then the evaluation
        return [block["text"].split("&&\n")[-1].strip().replace(".venv/bin/", "") + " --limit 10"]
    return block["text"].strip().splitlines() if block["language"] == "bash" else [block["text"]]


def run_page(page: str, most: int, monkeypatch, capsys) -> None:
    printed: list[str] = []
    for block in blocks_of(page):
        mark = block["mark"]
        if mark.startswith("file: "):
            Path(mark.removeprefix("file: ")).write_text(block["text"])
        elif mark.startswith("runs") or mark == "demo-command":
            expected = int(re.search(r"\d", mark + " 0")[0])
            for command in commands_of(block):
                if block["language"] == "python":
                    exec(compile(command, page, "exec"), {})
                    continue
                status = execute(with_at_most(command, most), monkeypatch)
                out = capsys.readouterr()
                printed += [words(line) for line in (out.out + out.err).splitlines()]
                assert status == expected, (command, out)
        elif mark == "prints":
            for line in block["text"].strip().splitlines():
                assert any(words(line) in p for p in printed), (page, line)


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{name}" for name in GUIDE)])
def test_every_block_of_commands_is_marked_to_run(page):
    for block in blocks_of(page):
        if block["language"] in ("bash", "python"):
            assert block["mark"].startswith("runs") or block["mark"] in ("demo-command", "test-command"), block["text"]
        if block["language"] == "yaml":
            assert block["mark"].startswith("file: ")
    text = (ROOT / page).read_text()
    for line in re.findall(r"^    ((?:lm_eval|adainfer|python) .*)$", text, re.MULTILINE):
        assert "..." in line or "meta-llama" in line, f"{line}: a command outside a block is a pattern, with dots"


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{name}" for name in GUIDE), "CHANGELOG.md"])
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", (ROOT / page).read_text()):
        file, _, anchor = target.partition("#")
        found = ((ROOT / page).parent / file).resolve() if file else ROOT / page
        assert found.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", found.read_text(), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings]
            assert anchor in slugs, target


@pytest.mark.parametrize("page", MOST)
def test_the_commands_of_a_page(page, tmp_path, monkeypatch, capsys, only_our_tasks):
    monkeypatch.chdir(tmp_path)
    run_page(page, MOST[page], monkeypatch, capsys)
    if page == "comparing.md":
        for made in ("comparison.md", "check.xml", "summary.md", "runs/gate/candidate", "traces", "report/index.html"):
            assert Path(made).exists(), made
        ET.parse("check.xml")


def test_no_page_with_commands_is_left_out():
    with_commands = {p for p in ["README.md", *GUIDE] if any(b["mark"].startswith("runs") for b in blocks_of(p))}
    assert with_commands == {*MOST, "ci.md"}


def test_the_workflow(tmp_path, monkeypatch, capsys, only_our_tasks):
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
