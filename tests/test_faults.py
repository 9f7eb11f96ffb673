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
