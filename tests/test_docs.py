"""The user guide and README: every marked command is run, in order, in one folder per page, with the demo model.

``<!-- runs -->`` (or ``runs, exit 1``) marks commands, ``<!-- file: NAME -->`` files, ``<!-- prints -->`` lines that the
commands above have printed. Where a command ran as it is printed, the figures are compared, too: they may differ from
the run's by 0.005 or by half a percent, whichever is more (``CLOSE``), which leaves room for what another processor
rounds otherwise, and for no flipped document among a hundred. Measured times and errors are compared by their format
alone (``MEASURED``). Where ``--limit`` is smaller here, to be quick, words alone are compared; the ``slow`` tests run
every command as it is printed.
"""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import yaml
from helpers.printed import CLOSE, as_printed, table_below
from helpers.processes import execute

pytest.importorskip("matplotlib")

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
MOST = {"README.md": 100, "quickstart.md": 10, "your-model.md": 4, "your-stopper.md": 20, "comparing.md": 30,
        "strategies.md": 10, "guarantee.md": 10, "extending.md": 1,
        "tune.md": 150, "demo-model.md": 30}  # --limit, --documents
PRETRAINED = "real-model.md"
GUIDE = sorted(p.name for p in DOCS.glob("*.md"))
_BLOCK = re.compile(r"(?:<!-- (?P<mark>[^>]*?) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)```", re.DOTALL)
_NUMBER = re.compile(r"[+-]?\d[\d,.]*(?:e[+-]\d+)?%?|N/A")
MEASURED = re.compile(r"(?<=largest error )\S+(?= of (\S+) allowed)|(?<= of )\S+(?= allowed)|(?<=measured).*")


def blocks_of(page: str):
    path = ROOT / page if page == "README.md" else DOCS / page.removeprefix("docs/")
    found = [m.groupdict() for m in _BLOCK.finditer(path.read_text())]
    return [{**b, "mark": b["mark"] or ""} for b in found]


def words(line: str) -> str:
    """A line without its numbers, and without spaces, rules and signs, whose widths depend on them."""
    return re.sub(r"[-\s#+]+", "", _NUMBER.sub("#", line))


def figures(line: str) -> list[str]:
    """The numbers of a line as they are printed, without those that are measured."""
    return [n.rstrip(".,") for n in _NUMBER.findall(MEASURED.sub("", line))]


def agree(said: str, seen: str) -> bool:
    """Whether two printed numbers are the same, as far as ``CLOSE`` asks."""
    if said == seen:
        return True
    if "N/A" in (said, seen) or said.endswith("%") != seen.endswith("%"):
        return False
    a, b = (float(n.rstrip("%").replace(",", "")) / (100 if n.endswith("%") else 1) for n in (said, seen))
    if "e" in said + seen:  # tiny probabilities, of two digits
        return abs(a - b) <= 0.05 * abs(a)
    return abs(a - b) <= max(CLOSE, CLOSE * abs(a)) + 1e-9


def printed_so(line: str, printed: str) -> bool:
    """Whether ``line``, or a part of ``printed`` with its words, has the figures that ``line`` says."""
    said, seen = figures(line), figures(printed)
    parts = (seen[i : i + len(said)] for i in range(len(seen) - len(said) + 1))
    return any(all(map(agree, said, part)) for part in parts)


def with_at_most(command: str, most: int) -> str:
    return re.sub(r"(--limit|--documents) (\d+)", lambda m: f"{m[1]} {min(int(m[2]), most)}", command)


def commands_of(block) -> list[str]:
    if block["mark"] == "demo-command":  # README: venv, pip, and then the evaluation
        return [block["text"].split("&&\n")[-1].strip().replace(".venv/bin/", "")]
    return block["text"].strip().splitlines() if block["language"] == "bash" else [block["text"]]


def run_page(page: str, most: int | None, monkeypatch, capsys) -> int:
    """Run a page's commands with at most that ``--limit`` (None: as they are printed); compare what it says they print.

    Returns:
        How many lines were compared by their words alone.
    """
    printed: list[tuple[str, str, bool]] = []  # words, the line, whether the command ran as it is printed
    by_words = 0
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
                run = command if most is None else with_at_most(command, most)
                run += " --limit 10" if mark == "demo-command" and most is not None else ""
                status = execute(run, monkeypatch)
                out = capsys.readouterr()
                printed += [(words(line), line, run == command) for line in (out.out + out.err).splitlines()]
                assert status == expected, (command, out)
        elif mark == "prints":
            for line in block["text"].strip().splitlines():
                same = [(whole, exact) for said, whole, exact in printed if words(line) in said]
                assert same, (page, line)
                exact = [whole for whole, exact in same if exact]
                by_words += not exact
                assert not exact or any(printed_so(line, whole) for whole in exact), (page, line, exact)
    return by_words


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{name}" for name in GUIDE)])
def test_every_block_of_commands_is_marked_to_run(page):
    for block in blocks_of(page):
        if block["language"] in ("bash", "python"):
            assert block["mark"].startswith("runs") or block["mark"] in (
                "demo-command", "test-command", "next-test-command",
            ), block["text"]  # fmt: skip
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


PAGES = sorted(
    str(p.relative_to(ROOT))
    for p in (*ROOT.glob("*.md"), *DOCS.glob("*.md"), ROOT / "task_configs/README.md", ROOT / "benchmarks/LOG.md")
)


@pytest.mark.parametrize("page", PAGES)
def test_prose_has_at_most_120_columns(page):
    """Tables and code apart, and words that can't be broken (addresses)."""
    code = False
    for line in (ROOT / page).read_text().splitlines():
        if line.lstrip().startswith("```"):
            code = not code
        elif not code and not line.lstrip().startswith("|") and not line.startswith("    "):
            assert len(line) <= 120 or " " not in line.strip(), line


# ---------------------------------------------------------------------- the rooms
PACKAGE = ROOT / "lm_eval_adainfer"
HOUSE = ["docs/how-it-works.md", "docs/extending.md", "CONTRIBUTING.md"]


@pytest.mark.parametrize("page", HOUSE)
def test_files_that_are_named_exist(page):
    text = (ROOT / page).read_text()
    named = set(re.findall(r"(?<![\w/.])(?:[a-z_]+/)+\w+\.(?:py|yaml|toml)", text))
    missing = {n for n in named if not any((base / n).exists() for base in (ROOT, PACKAGE, DOCS))}
    assert not missing


def test_the_drawing_shows_every_room_and_module_of_the_package():
    drawing = blocks_of("how-it-works.md")[0]["text"]
    drawn = {name.rstrip("/") for row in re.findall(r"^[├└]── (\S.*)$", drawing, re.MULTILINE)
             for name in re.findall(r"^(\w+(?:/|\.py)(?:  ?\w+(?:/|\.py))*)", row)[0].split()}  # fmt: skip
    rooms = {p.name for p in PACKAGE.iterdir() if (p / "__init__.py").exists()}
    modules = {p.name for p in PACKAGE.glob("*.py") if not p.name.startswith("_")}
    assert drawn == rooms | modules
    inside = {n for row in re.findall(r"\((\w+\.py)\)", drawing) for n in [row]}
    assert inside <= {p.name for p in PACKAGE.glob("*/*.py")}


def test_the_table_of_rooms_names_files_that_exist():
    for _, room, files in table_below(DOCS / "extending.md", "| you want to change |"):
        for name in re.findall(r"`([\w/]+\.py)`", files):
            assert any((base / name).exists() for base in (PACKAGE / room.strip("`"), PACKAGE)), (room, name)


# ---------------------------------------------------------------------- tables that are no output of a command
def evaluated(arguments: str, tasks: str, monkeypatch, capsys, limit: str = "") -> dict[str, dict[str, float]]:
    """Task to metric to value, of a run with these ``--model_args``."""
    command = (
        f"lm_eval --model adainfer --model_args pretrained=adainfer-demo,dtype=float32{arguments} --tasks {tasks} "
        f"--batch_size 16 --device cpu --output_path table{limit}"
    )
    assert execute(command, monkeypatch) == 0, capsys.readouterr()
    newest = max(Path().glob("table*/**/results_*.json"), key=lambda p: p.stat().st_mtime_ns)
    results = json.loads(newest.read_text())["results"]
    return {t: {name.split(",")[0]: value for name, value in r.items()} for t, r in results.items()}


@pytest.mark.slow
def test_the_table_of_what_fills_cost(tmp_path, monkeypatch, capsys, only_our_tasks):
    monkeypatch.chdir(tmp_path)
    gap = ",stopper=gap:0.8"
    runs = ["", gap, f"{gap},check_layers=4+8", f"{gap},kv_policy=propagate"]
    rows = table_below(DOCS / "limits.md", "| `adainfer_demo_plural_generate` |")
    assert len(rows) == len(runs)
    for row, arguments in zip(rows, runs, strict=True):
        assert row[0].strip("`. ").endswith(arguments.split(",")[-1].strip() or "none"), row
        found = evaluated(arguments, "adainfer_demo_plural_generate", monkeypatch, capsys, " --limit 80")
        found = found["adainfer_demo_plural_generate"]
        names = ("exact_match", "exit_layer", "layers_run", "flops_ratio_total")
        assert all(as_printed(cell, found[name]) for cell, name in zip(row[1:], names, strict=True)), (row, found)
    facts = evaluated(gap, "adainfer_demo_fact_generate", monkeypatch, capsys, " --limit 80")
    said = " ".join((DOCS / "limits.md").read_text().split())
    layers, work = re.search(r"comes to `layers_run` ([\d.]+) and `flops_ratio_total` ([\d.]+) with `gap:0.8`", said).groups()
    facts = facts["adainfer_demo_fact_generate"]
    assert as_printed(layers, facts["layers_run"]) and as_printed(work, facts["flops_ratio_total"]), facts


def test_the_table_of_how_many_documents_a_promise_needs():
    (needed,) = table_below(DOCS / "guarantee.md", "| `--max-drop` |")
    drops = re.findall(r"([\d.]+)%", next(li for li in (DOCS / "guarantee.md").read_text().splitlines() if "0.5%" in li))
    assert [math.ceil(math.log(0.05) / math.log(1 - float(d) / 100)) for d in drops] == list(map(int, needed[1:]))


@pytest.mark.parametrize("page", MOST)
def test_the_commands_of_a_page(page, tmp_path, monkeypatch, capsys, only_our_tasks):
    monkeypatch.chdir(tmp_path)
    by_words = run_page(page, MOST[page], monkeypatch, capsys)
    if page not in ("README.md", "quickstart.md"):  # of the unlimited run, and the head of a table
        assert by_words == 0
    if page == "comparing.md":
        for made in ("comparison.md", "check.xml", "summary.md", "runs/gate/candidate", "traces", "report/index.html"):
            assert Path(made).exists(), made
        ET.parse("check.xml")


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in MOST if any(b["mark"] == "prints" for b in blocks_of(p))])
def test_the_figures_of_a_page_whose_commands_run_as_they_are_printed(
    page, tmp_path, monkeypatch, capsys, only_our_tasks
):
    monkeypatch.chdir(tmp_path)
    assert run_page(page, None, monkeypatch, capsys) == 0


@pytest.mark.parametrize(
    ("said", "seen"),
    [("|acc |0.7094|", "|acc |0.7184|"), ("19/0", "18/0"), ("81.0%", "82.0%"), ("7.07", "7.12"), ("3.8e-06", "4.8e-06"),
     ("by at least 0.1275 (96%)", "by at least 0.1175 (96%)"), ("1643 vectors", "1700 vectors"), ("| N/A|", "|0.1|")],
)  # fmt: skip
def test_a_wrong_figure_is_noticed(said, seen):
    assert words(said) == words(seen) and not printed_so(said, seen)
    assert printed_so(said, said) and printed_so(seen, f"1 {seen}")


def test_measured_errors_are_compared_by_their_format():
    line = "24 comparisons, largest error {} of 0.00024 allowed"
    assert printed_so(line.format("1.9e-05"), line.format("2.6e-06"))
    assert not printed_so(line.format("1.9e-05"), line.format("2.6e-06").replace("24", "23"))


@pytest.mark.slow
def test_the_commands_and_figures_of_the_page_on_a_pretrained_model(
    shared, tmp_path, monkeypatch, capsys, only_our_tasks
):
    """A quarter of an hour on two cores; without the file, which the page downloads, there is nothing to run."""
    folder = shared / "models" / "smollm2-135m-instruct"
    if not folder.is_dir():
        pytest.skip("no SmolLM2 here")
    pytest.importorskip("gguf")
    (tmp_path / "smollm2").symlink_to(folder)
    monkeypatch.setenv("ADAINFER_DATA", str(shared / "hf" / "function_vectors"))
    monkeypatch.chdir(tmp_path)
    assert run_page(PRETRAINED, None, monkeypatch, capsys) == 0


def test_no_page_with_commands_is_left_out():
    with_commands = {p for p in ["README.md", *GUIDE] if any(b["mark"].startswith("runs") for b in blocks_of(p))}
    assert with_commands == {*MOST, "ci.md", PRETRAINED}


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
