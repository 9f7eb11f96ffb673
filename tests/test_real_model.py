"""What README and the guide say of SmolLM2 is what was measured and is kept in ``benchmarks/results/smollm2``."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from helpers.printed import table_below

from benchmarks import tuned
from lm_eval_adainfer.statistics import tango_interval

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "smollm2"


@pytest.mark.parametrize("page", ["README.md", "docs/real-model.md"])
def test_the_table_of_a_page_is_the_measured_one(page):
    rows = table_below(ROOT / page, "| task | documents | dense | early |")
    made = table_below(RESULTS / "words.md", "| task | documents | dense | early |")
    named = [["all" if name == "pooled" else f"`{name.removeprefix('adainfer_word_')}`", *rest] for name, *rest in made]
    assert rows == named and len(rows) == 4


def test_the_table_is_of_the_numbers_beside_it():
    told = json.loads((RESULTS / "words.json").read_text())
    assert tuned.page(told) == (RESULTS / "words.md").read_text()
    *tasks, pooled = told["rows"]
    assert pooled["documents"] == sum(row["documents"] for row in tasks)
    for row in told["rows"]:
        interval = tango_interval(row["lost"], row["won"], row["documents"])
        assert (row["change_low"], row["change_high"]) == pytest.approx((-interval.upper, -interval.lower))
        assert row["early"] - row["dense"] == pytest.approx((row["won"] - row["lost"]) / row["documents"])
    assert pooled["change"] >= -0.03, "which is what was promised"


def test_what_readme_says_of_the_picture():
    drawn, text = json.loads((RESULTS / "frontier.json").read_text()), (ROOT / "README.md").read_text()
    assert f"{drawn['documents']} documents" in re.sub(r"\s+", " ", text)
    head = [point for point in drawn["lines"]["head"] if point["work"] < 0.9]
    assert head and max(point["acc"] for point in head) < drawn["dense"]["acc"] / 2, "answers are gone before work is"
    copied = [point for point in drawn["lines"]["copy:1"] if point["work"] < 0.85]
    assert max(point["acc"] for point in copied) > drawn["dense"]["acc"] - 0.03
    assert drawn["recommended"]["work"] < 0.8 and drawn["recommended"]["acc"] > drawn["dense"]["acc"] - 0.03
