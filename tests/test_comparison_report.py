"""The report: what the page and its pictures hold, and that a real browser opens it quietly."""

from __future__ import annotations

import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from helpers.synthetic_runs import flips, sample, write

from lm_eval_adainfer import container
from lm_eval_adainfer.cli.main import main
from lm_eval_adainfer.output import marks, per_block, report
from lm_eval_adainfer.traces import recording

to_hex = pytest.importorskip("matplotlib.colors").to_hex
pytest.importorskip("jinja2")

EVIL = "</pre><script>document.title='owned'</script><img src=http://tracker.invalid/x onerror=\"document.title='owned'\">"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def make_trace(folder: Path, task: str, n=40, n_blocks=12, n_choices=4, seed=0):
    """A trace whose blocks get better with depth; returns which instance is right after which block."""
    generator = np.random.default_rng(seed)
    gold = generator.integers(0, n_choices, n)
    right = generator.random((n, n_blocks)) < np.linspace(0.2, 0.95, n_blocks)
    scores = generator.uniform(-9, -5, (n, n_blocks, n_choices)).astype(np.float32)
    chosen = np.where(right, gold[:, None], (gold[:, None] + 1) % n_choices)
    np.put_along_axis(scores, chosen[:, :, None], -1.0, axis=2)
    meta = {
        "model": "m", "n_blocks": n_blocks, "head_hash": "0", "task": task, "num_fewshot": 0, "split": "test",
        "documents": n, "features": ["gap", "top_prob"], "output_type": "multiple_choice", "hidden_size": 8,
        "vocab_size": 16, "block_weights": [100] * n_blocks,
    }  # fmt: skip
    arrays = {
        "features": generator.random((n, n_blocks, 2)).astype(np.float32),
        "top_token": chosen.astype(np.int32),
        "gold_token": gold.astype(np.int32),
        "scores": scores,
        "request": np.tile(np.arange(n_choices, dtype=np.int16), (n, 1)),
        "gold": gold.astype(np.int16),
        "prompt_tokens": np.full(n, 20, dtype=np.int32),
        "position": np.zeros(n, dtype=np.int32),
        "doc_id": np.arange(n),
    }
    container.write(folder / f"{task}.trace", "trace", recording.VERSION, meta, arrays)
    return right


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Three runs of three tasks, one of them hostile in every name and prompt, and traces."""
    where = tmp_path_factory.mktemp("report")
    names = []
    for name, stopper, first in (("dense", "none", 12), ("svm", "svm", 1), ("gap", "gap:0.8", 4)):
        tasks = {}
        for t in ("demo_easy", "demo_hard", "x<b>y"):
            scores = flips(60, 3, 1)[name != "dense"]
            tasks[t] = [
                sample(t, i, x, exit_layer=min(12, first + (i % 9 if first < 12 else 0)), prompt=f"{EVIL} {t} {i}")
                for i, x in enumerate(scores)
            ]
        write(where / name, tasks, kind="adainfer", stopper=stopper, seconds={"dense": "10"}.get(name, "4"))
        names.append(f"{name}={where / name}")
    names[1] = f"<i>svm={where / 'svm'}"
    for i, task in enumerate(("demo_easy", "demo_hard")):
        make_trace(where / "traces", task, seed=i)
    assert main(["report", *names, "--traces", str(where / "traces"), "-o", str(where / "out"), "--title", f"T {EVIL}"]) == 0
    return where / "out" / "index.html"


def test_the_page_and_its_pictures_are_there(page):
    pictures = {"frontier", "exit_layers", "speed", "accuracy_per_block", "features_per_block"}
    files = {f.name for f in page.parent.iterdir()}
    assert files == {"index.html", *(f"{p}.{form}" for p in pictures for form in ("png", "svg"))}
    for picture in pictures:
        assert (page.parent / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
        ET.parse(page.parent / f"{picture}.svg")
    text = page.read_text()
    assert text.count("<svg") == len(pictures)
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text


def test_nothing_in_the_page_names_an_address_or_runs(page):
    text = page.read_text()
    assert "<script" not in text and not re.search(r"<[^>]*\son\w+=", text)
    addresses = set(re.findall(r'(?:src|href|url)\s*[=(]\s*["\']?([^"\')>\s]+)', text.replace(EVIL, "")))
    assert all(a.startswith(("#", "data:")) or "tracker.invalid" in a for a in addresses)
    assert "&lt;script&gt;" in text and "x&lt;b&gt;y" in text and "&lt;i&gt;svm" in text


def test_the_leaderboard_and_the_axes_say_what_the_runs_say(page):
    text = page.read_text()
    dense, early = flips(60, 3, 1)
    for share in (np.mean(dense), np.mean(early)):
        assert re.search(rf"<span[^>]*>{100 * share:.1f}%</span>", text)
    for unit in ("compute, counted FLOPs (% of the dense run)", "(%), with 95% interval", "exit block", "documents (%)",
                 "speed-up over the baseline (times", "accuracy (%)", "oracle, simulated"):  # fmt: skip
        assert unit in text, unit
    assert "block 1 of 12" in text and "block 12 of 12" in text  # the easiest and the deepest documents


def line_of(text: str, run: str) -> str:
    """A run's line in the leaderboard."""
    (found,) = re.findall(rf"<tr><td><span[^>]*>.</span>{run}</td>.*?</tr>", text, re.DOTALL)
    return found


def drawn(figures: dict) -> dict[str, dict[str, tuple]]:
    """Picture -> run -> what of colour, marker and dash its drawing shows."""
    found = {name: {} for name in figures}
    for handle, text in zip(*legend_of(figures["frontier"]), strict=True):
        if text != "frontier":
            (points, *_) = handle.lines
            found["frontier"][text.removesuffix(" (baseline)")] = (points.get_color(), points.get_marker())
    for handle, text in zip(*legend_of(figures["exit_layers"]), strict=True):
        found["exit_layers"][text] = (to_hex(handle.get_edgecolor()), handle.get_linestyle())
    (axes,) = figures["speed"].axes
    for y, tick in enumerate(axes.get_yticklabels()):
        hollow, filled = (line for line in axes.lines if line.get_marker() != "None" and line.get_ydata()[0] == y)
        assert hollow.get_color() == filled.get_color() and hollow.get_marker() == filled.get_marker()
        found["speed"][tick.get_text()] = (filled.get_color(), filled.get_marker())
    return found


def legend_of(figure) -> tuple[list, list[str]]:
    """What the first axes offer to the legend."""
    return figure.axes[0].get_legend_handles_labels()


def test_a_run_keeps_its_colour_and_mark_in_pictures_and_tables(tmp_path, monkeypatch):
    """Also where a picture leaves out runs before it: ``fixed`` always leaves at one block, ``none`` is dense."""
    first = {"dense": 12, "none": 12, "fixed": 5, **{f"r{i}": 1 + i for i in range(7)}}
    names = []
    for run, k in first.items():
        moving = run.startswith("r")
        tasks = {t: [sample(t, i, 1, exit_layer=k + (i % 3 if moving else 0)) for i in range(9)] for t in ("a", "b")}
        names.append(f"{run}={write(tmp_path / run, tasks, kind='adainfer', stopper='none' if k == 12 else 'svm')}")
    kept, save = {}, report.save_picture
    monkeypatch.setattr(report, "save_picture", lambda *a: (kept.update({a[1]: a[4]}), save(*a))[1])
    assert main(["report", *names, "-o", str(tmp_path / "out")]) == 0
    pictures = drawn(kept)
    assert set(pictures["frontier"]) == set(first) and set(pictures["speed"]) == set(first) - {"dense", "none"}
    assert set(pictures["exit_layers"]) == {run for run in first if run.startswith("r")}
    text = (tmp_path / "out" / "index.html").read_text()
    of_run = {}
    for run in first:
        colour, marker = pictures["frontier"][run]
        assert pictures["speed"].get(run, (colour, marker)) == (colour, marker)
        assert pictures["exit_layers"].get(run, (colour.lower(),))[0] == colour.lower()
        ((shown, sign),) = re.findall(r'<span class="sign" style="color: (.*?)"[^>]*>(.)</span>', line_of(text, run))
        assert shown == colour
        headings = re.findall(rf'<h2>(?:Easiest and deepest documents of )?<span[^>]*: (#.*?)"[^>]*>(.)</span>{run}\b', text)
        assert set(headings) <= {(colour, sign)} and (headings or run == "dense")
        of_run[run] = (colour, marker, sign)
    assert len({(colour, marker) for colour, marker, _ in of_run.values()}) == len(first)
    assert len({(marker, sign) for _, marker, sign in of_run.values()}) == len({m for _, m, _ in of_run.values()})


def test_marks_start_again_only_after_36():
    found = [marks.of(place) for place in range(36)]
    assert len({(mark.colour, mark.marker) for mark in found}) == len({(mark.colour, mark.sign) for mark in found}) == 36
    assert len({(mark.colour, mark.dash) for mark in found[:24]}) == 24
    assert marks.DENSE.colour not in marks.COLOURS


def test_the_leaderboard_judges_a_drop_as_check_does(tmp_path):
    """A run that lost 12 points is no winner because others lost more, and one that seems fine need not be."""
    sides = {"fine": (0, 0, 1200), "lost": (150, 6, 1200), "worse": (300, 6, 1200), "unclear": (12, 6, 1200)}
    pairs = {name: flips(n, lost, won, 900) for name, (lost, won, n) in sides.items()}
    for name, (before, after) in pairs.items():
        runs = [write(tmp_path / name / side, {"t": scores}) for side, scores in (("a", before), ("b", after))]
        statuses = {}
        for limit in ("0.01", "0.2"):
            status = main(["check", "--baseline", str(runs[0]), "--candidate", str(runs[1]), "--max-drop", limit])
            word = {0: "within", 1: "beyond", 3: "inconclusive"}[statuses.setdefault(limit, status)]
            given = [] if limit == "0.01" else ["--max-drop", limit]
            assert main(["report", f"a={runs[0]}", f"b={runs[1]}", "-o", str(tmp_path / "out"), *given]) == 0
            line = line_of((tmp_path / "out" / "index.html").read_text(), "b")
            assert re.findall(r"<td><span(?: class=\"\w+\")?>(\w+)</span>", line)[0] == word
        wanted = {"fine": [0, 0], "lost": [1, 0], "worse": [1, 1], "unclear": [3, 0]}[name]
        assert list(statuses.values()) == wanted


def test_the_leaderboard_names_the_task_that_dropped(tmp_path):
    fine, bad = flips(2000, 0, 0, 1900), flips(100, 14, 0, 80)
    runs = [write(tmp_path / "ab"[i], {"fine": fine[i], "bad": bad[i]}) for i in range(2)]
    assert main(["report", f"a={runs[0]}", f"b={runs[1]}", "-o", str(tmp_path / "out"), "--max-drop", "0.02"]) == 0
    text = (tmp_path / "out" / "index.html").read_text()
    names = re.findall(r'<th scope="col">(.*?)</th>', text[: text.index("</thead>")])
    beyond = {name for name, cell in zip(names, line_of(text, "b").split("<td>")[1:], strict=True) if "beyond" in cell}
    assert beyond == {"drop of at most 0.02", "bad"}
    assert "beyond" not in line_of(text, "a")


def test_accuracy_per_block_and_oracle_are_those_of_the_trace(tmp_path):
    right = make_trace(tmp_path, "a", n=200)
    (line,) = per_block.accuracy_lines(per_block.load(str(tmp_path)))
    assert line.values == pytest.approx(100 * right.mean(axis=0))
    assert np.all(line.lower < line.values) and np.all(line.values <= line.upper)
    depth, accuracy, _, _ = per_block.oracle(per_block.load(str(tmp_path)))
    first = [next((k + 1 for k in range(12) if row[k]), 12) for row in right]
    assert depth == pytest.approx(np.mean(first) / 12) and accuracy == pytest.approx(right.any(axis=1).mean())


def test_no_oracle_is_marked_for_traces_of_other_tasks(tmp_path):
    run = write(tmp_path / "a", {"t": [1, 0]})
    for task, marked in (("other", False), ("t", True)):
        make_trace(tmp_path / task, task)
        assert main(["report", str(run), "--traces", str(tmp_path / task), "-o", str(tmp_path / "out")]) == 0
        text = (tmp_path / "out" / "index.html").read_text()
        assert ("oracle, simulated" in text) == marked and "Accuracy per block" in text


@pytest.mark.parametrize("many", [8, 9, 57])
def test_every_trace_is_drawn_however_many_there_are(tmp_path, many):
    for i in range(many):
        make_trace(tmp_path / "traces", f"mmlu_s{i:02}", seed=i)
    run = write(tmp_path / "a", {"mmlu_s00": [1, 0]})
    assert main(["report", str(run), "--traces", str(tmp_path / "traces"), "-o", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "accuracy_per_block.svg").read_text()
    assert all(f"{'' if many > 10 else 's'}{i:02}, 0 shots" in text or f"s0{i}, 0 shots" in text for i in range(many))
    lines = per_block.feature_lines(per_block.load(str(tmp_path / "traces")))["gap"]
    *each, mean = per_block.with_mean(lines)
    assert len(each) == len(lines) == many and all(line.faint for line in each)
    assert mean.values == pytest.approx(np.mean([line.values for line in lines], axis=0))
    assert ("mean over traces" in (tmp_path / "out" / "features_per_block.svg").read_text()) == (many > 8)


def test_real_traces_are_read(tmp_path, capsys, only_our_tasks):
    arguments = ["--model_args", "pretrained=adainfer-demo,dtype=float32", "--tasks", "adainfer_demo_topic,adainfer_demo_fact"]
    assert main(["trace", *arguments, "--limit", "6", "--device", "cpu", "-o", str(tmp_path / "t")]) == 0
    traces = per_block.load(str(tmp_path / "t"))
    assert per_block.labels(traces) == ["fact, 3 shots", "topic, 3 shots"]
    for trace in traces:
        assert trace.right.shape == trace.top1.shape == (6, 12) and "cos_mlp" in trace.meta["features"]
    assert not any(line.dashed for line in per_block.accuracy_lines(traces)), "acc is known of both"
    capsys.readouterr()


@pytest.mark.parametrize("many", [False, True])
def test_pages_of_one_run_and_of_57_subjects(tmp_path, many):
    tasks = {f"s{i}": [1, 0, 1] for i in range(57 if many else 1)}
    run = write(tmp_path / "a", tasks, groups={"mmlu": list(tasks), "stem": list(tasks)[:20]} if many else {})
    early = {t: [sample(t, i, x, exit_layer=1 + i) for i, x in enumerate(v)] for t, v in tasks.items()}
    runs = [str(run), *([str(write(tmp_path / "b", early, kind="adainfer", stopper="svm"))] if many else [])]
    assert main(["report", *runs, "-o", str(tmp_path / "out")]) == 0
    header = re.search(r"<thead>.*?</thead>", (tmp_path / "out/index.html").read_text(), re.DOTALL)[0]
    assert re.findall(r'<th scope="col">(.*?)</th>', header) == (
        ["run", "drop of at most 0.01", "FLOPs", "all documents", "stem"] if many else ["run", "s0"]
    )


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--traces", "nowhere"], "holds no .trace files"),
        (["--traces", "BAD"], "traces: "),
        (["--traces", "ODD"], "is no trace that adainfer wrote"),
        (["--traces", "DEEP"], "is of a model of 7 blocks, but adainfer svm has 12"),
        (["--metric", "f1"], "have no number 'f1'"),
        (["-o", "FILE/x"], "can't be written"),
    ],
)
def test_report_errors_are_one_sentence(tmp_path, capsys, extra, words):
    run = write(tmp_path / "a", {"t": [1, 0]}, kind="adainfer", stopper="svm")
    make_trace(tmp_path / "deep", "t", n_blocks=7)
    (tmp_path / "bad.trace").write_bytes(b"no trace at all")
    (tmp_path / "file").write_text("")
    make_trace(tmp_path, "odd")
    meta, arrays = recording.read(tmp_path / "odd.trace")
    odd = {**arrays, "gold_token": arrays["gold_token"][:7]}
    container.write(tmp_path / "odd.trace", "trace", recording.VERSION, meta, odd)
    extra = [e.replace("BAD", str(tmp_path / "bad.trace")).replace("DEEP", str(tmp_path / "deep")).replace("ODD", str(tmp_path / "odd.trace")).replace("FILE", str(tmp_path / "file")) for e in extra]
    assert main(["report", str(run), "-o", str(tmp_path / "out"), *extra]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out" / "index.html").exists()


def test_without_matplotlib_the_extra_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report, "find_spec", lambda name: None if name == "matplotlib" else name)
    assert main(["report", str(write(tmp_path / "a", {"t": [1]})), "-o", str(tmp_path / "out")]) == 2
    assert "pip install 'lm-eval-adainfer[report]'" in capsys.readouterr().err


def browse(file: Path, scratch: Path, *flags) -> tuple[str, list[str], list[str]]:
    """Open a page in a headless browser: its DOM afterwards, its console, and the addresses it asked for."""
    log = scratch / "net.json"
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update", "--host-resolver-rules=MAP * ~NOTFOUND",
         "--enable-logging=stderr", f"--log-net-log={log}", f"--user-data-dir={scratch / 'profile'}", *flags,
         "--dump-dom", file.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    asked = set(re.findall(r'"url":"((?:https?|wss?|ftp)://[^"]*)"', log.read_text()))
    own = re.compile(r"https?://([\w-]+\.)*(google|googleapis|gstatic)\.com/")  # the browser's, not the page's
    return done.stdout, console, sorted(a for a in asked if not own.match(a))


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here (apt-get install chromium)")
def test_the_browser_check_sees_scripts_console_and_requests(tmp_path):
    """Otherwise the next test could not fail."""
    file = tmp_path / "bad.html"
    file.write_text(f"<title>T</title><body><pre>{EVIL}</pre><script>console.error('boom')</script>")
    dom, console, asked = browse(file, tmp_path)
    assert "<title>owned</title>" in dom and "boom" in console[0] and asked == ["http://tracker.invalid/x"]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here (apt-get install chromium)")
@pytest.mark.parametrize("policy", ["kept", "taken away"])
def test_a_real_browser_opens_the_page_quietly(page, tmp_path, policy):
    """Also without the page's own content-security policy: nothing relies on that being honoured."""
    text = page.read_text()
    copy = tmp_path / "index.html"
    copy.write_text(text if policy == "kept" else re.sub(r"<meta http-equiv[^>]*>", "", text))
    dom, console, asked = browse(copy, tmp_path)
    assert console == [] and asked == []
    assert "<script" not in dom and "<title>T &lt;/pre&gt;&lt;script&gt;" in dom
    assert dom.count("<svg") == 5 and "&lt;img src=http" in dom


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here (apt-get install chromium)")
def test_on_a_narrow_screen_the_page_does_not_scroll_sideways(page, tmp_path):
    """Tables and pictures scroll inside themselves."""
    inner = page.read_text().replace("<meta http-equiv", "<meta name=was")
    probe = "<script>document.title = document.documentElement.scrollWidth + ' of ' + innerWidth</script></body>"
    (tmp_path / "inner.html").write_text(inner.replace("</body>", probe))
    frame = tmp_path / "frame.html"  # headless windows are at least 500 wide; a frame can be as narrow as a phone
    frame.write_text(
        '<iframe id=f width=390 height=800 src="inner.html" style="border:0"></iframe>'
        "<script>f.onload = () => { document.title = f.contentDocument.title }</script>"
    )
    dom, _, _ = browse(frame, tmp_path, "--allow-file-access-from-files", "--virtual-time-budget=5000")
    wide, narrow = re.search(r"<title>(\d+) of (\d+)</title>", dom).groups()
    assert int(narrow) == 390 and int(wide) <= 390
