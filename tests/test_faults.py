"""What happens when something goes wrong: killed processes, full disks, NaN, odd requests, damaged files.

Each fault is told in one sentence, and what was finished is neither lost nor changed (docs/faults.md).
"""

from __future__ import annotations

import random
import shutil
import sqlite3
from collections import Counter

import killed
import pytest
from lm_eval.api.model import CachingLM
from reference import instance
from sqlitedict import SqliteMultithread


def same(found, expected):
    """Equal but for float noise (other batches); block numbers exactly."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            if str(key).startswith("exit_layer"):
                assert found[key] == expected[key], key
            else:
                same(found[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            same(a, b)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-4, nan_ok=True)
    else:
        assert found == expected


# ------------------------------------------------------------------------------------------------ killed evaluations


@pytest.fixture(scope="module")
def whole():
    return killed.evaluate(None)


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """How many forwards and SQL steps an uninterrupted run with a cache makes."""
    seen: Counter = Counter()
    killed.evaluate(str(tmp_path_factory.mktemp("steps") / "c.db"), lambda what: seen.update([what]))
    return seen


def kept(cache):
    """How many answers a cache holds (whatever was being written is rolled back when it is opened)."""
    with sqlite3.connect(cache) as database:
        rows = dict(database.execute("select key, value from unnamed"))
    rows.pop("adainfer_fingerprint", None)
    return len(rows)


def killed_and_finished(cache, moments, whole):
    """Kill a run again and again, then let it end: the results are those of a run that nobody killed."""
    before = 0
    for what, number in moments:
        if killed.child(killed.run_evaluation, cache, what, number) == 0:
            break  # it had less to do than that
        assert kept(cache) >= before
        before = kept(cache)
    results, samples, tokens = killed.evaluate(cache)
    same(samples, whole[1])
    same(results, whole[0])
    assert (tokens < whole[2]) == (before > 0)
    return before


def test_a_run_that_is_killed_between_batches_loses_nothing_that_was_finished(tmp_path, whole, steps):
    rng = random.Random(1)
    moments = [("forward", rng.randint(2, steps["forward"] // 3)) for _ in range(3)]
    assert killed_and_finished(str(tmp_path / "c.db"), moments, whole) > 20


def test_a_documents_answers_are_written_all_or_none(tmp_path):
    """What lies on the disk after every step of SQLite's is what a kill at that moment leaves behind."""
    lm, cache, left = killed.make_lm(), tmp_path / "c.db", []
    connect = SqliteMultithread._connect

    def watched(self):
        connection, cursor = connect(self)
        connection.set_progress_handler(snapshot, 1)
        return connection, cursor

    def snapshot():
        folder = tmp_path / str(len(left))
        folder.mkdir()
        for file in tmp_path.glob("c.db*"):
            shutil.copy(file, folder)
        left.append(folder / "c.db")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SqliteMultithread, "_connect", watched)
        model = CachingLM(lm, str(cache))
    model.dbdict.commit()
    start = len(left)
    asked = [instance(f"{'the fox ' * n}?", " x", 0, idx=n) for n in range(1, 9)]
    lm.loglikelihood(asked, True)
    model.dbdict.close()
    assert {kept(file) for file in left[start:]} == {0, 8} and kept(cache) == 8
    assert len(left) - start > 50


def test_a_run_that_is_killed_while_the_cache_is_written_keeps_whole_documents(tmp_path, whole, steps):
    rng = random.Random(2)
    moments = [("sql", rng.randint(steps["sql"] // 8, steps["sql"] // 3)) for _ in range(3)]
    assert killed_and_finished(str(tmp_path / "c.db"), moments, whole) > 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_a_run_that_is_killed_at_any_moment_loses_nothing(seed, tmp_path, whole):
    """Moments are drawn, not counted: a kill lands wherever the process happens to be."""
    rng, cache = random.Random(seed), str(tmp_path / "c.db")
    for _ in range(8):
        killed.child(killed.evaluate, cache, kill_after=rng.uniform(0.5, 2.5))
    results, samples, _ = killed.evaluate(cache)
    same(samples, whole[1])
    same(results, whole[0])


# ------------------------------------------------------------------------------------------------ killed traces


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    """The files of an uninterrupted trace, and how often each kind of moment came."""
    seen: Counter = Counter()
    files = killed.trace(str(tmp_path_factory.mktemp("whole")), lambda what: seen.update([what]))
    return files, seen


def test_a_killed_trace_goes_on_and_comes_to_the_same_file(tmp_path, traces):
    """Killed between forwards, in the middle of a file, before a rename and before the parts are removed."""
    files, seen = traces
    assert set(seen) == {"forward", "write", "replace", "rmtree"}
    rng, parts = random.Random(3), 0
    for what, number in [
        ("forward", rng.randint(2, seen["forward"] // 4)),
        ("write", 2),
        ("replace", 2),
        ("write", 3),  # the first file's last step
        ("rmtree", 1),
        ("write", 4),  # of the second file
    ]:
        assert killed.child(killed.run_trace, str(tmp_path), what, number) == -9
        for file in tmp_path.glob("*.trace"):
            assert file.read_bytes() == files[file.name], "a file that is there is whole"
        assert len(list(tmp_path.rglob("*.part"))) >= parts or list(tmp_path.glob("*.trace"))
        parts = len(list(tmp_path.rglob("*.part")))
    again: Counter = Counter()
    assert killed.trace(str(tmp_path), lambda what: again.update([what])) == files
    assert 0 < again["forward"] < seen["forward"] // 2, "what was finished is not run again"
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(files), "nothing else is left"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_trace_that_is_killed_at_any_moment_comes_to_the_same_file(seed, tmp_path, traces):
    rng = random.Random(seed)
    for _ in range(8):
        killed.child(killed.trace, str(tmp_path), kill_after=rng.uniform(0.3, 1.2))
    assert killed.trace(str(tmp_path)) == traces[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(traces[0])
