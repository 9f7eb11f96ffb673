"""What traces say per block and per document means one thing everywhere: in the report, in recipes, in fits, in replay."""

from __future__ import annotations

import csv
import subprocess
import sys

import numpy as np
import pytest
from helpers.traces import add_reader, write

from lm_eval_adainfer import container
from lm_eval_adainfer.fitting import fit
from lm_eval_adainfer.output import per_block
from lm_eval_adainfer.studies import figures
from lm_eval_adainfer.traces import documents, recording


@pytest.fixture
def contexts(tmp_path):
    """Three documents of two contexts each, as in Winogrande: a choice per context, the same continuation."""
    scores = np.array(
        [
            [-1, -2, -1], [-2, -1, -2],  # answers 0, 1, 0; gold 0
            [-3, -1, -1], [-1, -2, -2],  # answers 1, 0, 0; gold 0
            [-1, -1, -5], [-2, -2, -1],  # answers 0, 0, 1; gold 1
        ],
        dtype=float,
    )  # fmt: skip
    write(
        tmp_path / "w.trace", np.ones((6, 3, 2)), np.zeros((6, 3)), document=[0, 0, 1, 1, 2, 2], scores=scores[:, :, None],
        request=[[0], [1]] * 3, gold=[0, 0, 0, 0, 1, 1],
    )  # fmt: skip
    return tmp_path


def test_the_report_and_figure_1_draw_the_accuracy_of_whole_documents(contexts):
    traces = per_block.load(str(contexts))
    (line,) = per_block.accuracy_lines(traces)
    assert line.values == pytest.approx([100 / 3, 100 / 3, 100])
    csv_file, *_ = figures.write("accuracy", "figure1", "Figure 1", traces, contexts / "out")
    rows = list(csv.DictReader(csv_file.read_text().splitlines()))
    assert [100 * float(row["acc"]) for row in rows] == pytest.approx(line.values.tolist())
    assert {row["documents"] for row in rows} == {"3"}
    assert per_block.oracle(traces)[:2] == pytest.approx(((1 + 2 + 3) / 3 / 3, 1))


def test_one_continuation_counts_as_acc_does_and_as_its_first_token_where_no_more_is_known(tmp_path):
    path = write(tmp_path / "a.trace", np.ones((2, 3, 2)), np.ones((2, 3)), scores=np.zeros((2, 3, 1)),
                 output_type="loglikelihood")  # fmt: skip
    (line,) = per_block.accuracy_lines(per_block.load(str(path)))
    assert line.values.tolist() == [100, 100, 100] and line.dashed and "first token" in line.label
    meta, arrays = recording.read(path)
    greedy = np.array([[0, 1, 1], [0, 0, 1]], dtype=np.uint8)[:, :, None]
    container.write(path, "trace", recording.VERSION, meta, {**arrays, "greedy": greedy})
    (line,) = per_block.accuracy_lines(per_block.load(str(path)))
    assert line.values.tolist() == [0, 50, 100] and not line.dashed


def test_the_label_stable_is_where_the_oracle_of_that_name_stops(contexts):
    """The first token is right after every block; the whole answer only after the last, and before it for a while."""
    path = write(contexts / "one.trace", np.ones((2, 4, 2)), np.ones((2, 4)), scores=np.zeros((2, 4, 1)),
                 output_type="loglikelihood", task="one")  # fmt: skip
    meta, arrays = recording.read(path)
    greedy = np.array([[1, 0, 1, 1], [0, 0, 0, 1]], dtype=np.uint8)[:, :, None]
    container.write(path, "trace", recording.VERSION, meta, {**arrays, "greedy": greedy})
    _, labels, _ = fit.examples([path], ["gap"], "stable")
    assert labels.reshape(2, 4).tolist() == [[0, 0, 1, 1], [0, 0, 0, 1]]
    for file in (path, contexts / "w.trace"):
        (trace,) = documents.read([file])
        _, labels, _ = fit.examples([file], ["gap"], "stable")
        stops = trace.oracle("oracle:stable")[trace.owner] > 0
        assert labels.reshape(stops.shape).astype(bool).tolist() == stops.tolist()


WITHOUT_MATPLOTLIB = """
import sys
sys.modules["matplotlib"] = None
from lm_eval_adainfer.output import per_block
traces = per_block.load(sys.argv[1])
print(len(per_block.accuracy_lines(traces)), len(per_block.feature_lines(traces)), per_block.oracle(traces)[1])
print(len(per_block.accuracy_rows(traces)), len(per_block.feature_rows(traces)))
"""


def test_the_data_of_figures_needs_no_matplotlib(contexts):
    done = subprocess.run([sys.executable, "-c", WITHOUT_MATPLOTLIB, str(contexts)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["1 2 1.0", "3 6"]


def test_features_of_every_reader_are_told_after_the_blocks_where_it_reads(tmp_path):
    """Three documents, four blocks; ``copy:1`` reads after block 2. A cosine depends on no reader."""
    random = np.random.default_rng(0)
    features, copied = random.uniform(size=(3, 4, 2)), random.uniform(size=(3, 1, 1)).astype(np.float32)
    path = write(tmp_path / "a.trace", features, np.ones((3, 4)), names=("gap", "cos_mlp"))
    add_reader(path, "copy:1", [2], copied)
    traces = per_block.load(str(path))
    rows = {(row["reader"], row["feature"], row["block"]): row for row in per_block.feature_rows(traces)}
    assert {key for key in rows if key[0] == "copy:1"} == {("copy:1", "gap", 2), ("copy:1", "gap", 4)}
    assert {key[1:] for key in rows if key[0] == "head"} == {(f, k) for f in ("gap", "cos_mlp") for k in (1, 2, 3, 4)}
    assert rows["copy:1", "gap", 2]["mean"] == pytest.approx(copied.mean())
    assert rows["copy:1", "gap", 4]["median"] == pytest.approx(np.median(features[:, 3, 0]))
    assert rows["head", "gap", 2]["mean"] == pytest.approx(features[:, 1, 0].mean())
    lines = per_block.feature_lines(traces)
    assert set(lines) == {"gap", "cos_mlp", "gap, copy:1"}
    assert lines["gap, copy:1"][0].values == pytest.approx(
        [np.nan, copied.mean(), np.nan, features[:, 3, 0].mean()], nan_ok=True
    )
