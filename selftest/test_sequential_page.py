"""docs/explanation/sequential.md: its tables are those of its data, and the data are of the rule in the code.

The oracle is the code: constants and multipliers of the data file are computed again. Its rates take 20 s to
simulate; selftest/stats/test_operating.py holds them on fewer sessions.
"""

from __future__ import annotations

import json
import math

import pytest

from disagglab.paths import ROOT
from disagglab.stats import operating, sequential
from disagglab.stats.rule import multiplier
from selftest.docs_program import loaded

PROGRAM = ROOT / "docs" / "sequential.py"


program = loaded(PROGRAM)
DATA = json.loads(program.DATA.read_text())


def test_the_page_is_what_its_template_and_data_make() -> None:
    """Whoever edits the page instead of its template, or neither after new data, is told."""
    made = program.page(DATA, program.TEMPLATE.read_text())
    assert program.PAGE.read_text() == made, f"mend: {program.COMMAND} --tables"


def test_the_data_are_of_this_rule() -> None:
    """Constants and multipliers are those of the code; else the simulation has to be run again."""
    stale = f"mend: {program.COMMAND}"
    assert (DATA["g"], DATA["shortfall"]) == (sequential.G, sequential.SHORTFALL), stale
    assert DATA["most_autocorrelation"] == sequential.MOST_AUTOCORRELATION, stale
    for n, one in DATA["multipliers"].items():
        found = multiplier(int(n), program.ALPHA, "any time")
        assert one["any time"] == (pytest.approx(found) if math.isfinite(found) else None), stale
    assert set(DATA["false_alarms_by_round"]) == set(operating.NOISES), stale


def test_the_rates_of_the_page_keep_the_level_where_it_says_so() -> None:
    """At most 5 % of 20,000 sessions on every kind of noise of which that is said; as a control, the t test
    after every round, which passes 15 % on normal noise.
    """
    alarms = DATA["false_alarms_by_round"]
    promised = set(alarms) - {"rounds that hang together more", "skewed"}
    assert len(promised) == 11
    assert max(alarms[noise]["any time"][-1] for noise in promised) <= 0.05
    drawn = {"normal", "heavy tails", *(noise for noise in alarms if noise.endswith("random order"))}
    assert len(drawn) == 6
    assert max(alarms[noise]["drawn"][-1] for noise in drawn) <= 0.05
    assert alarms["normal"]["t"][-1] > 0.15
    assert DATA["found_of_10_percent_in_10_rounds"] >= 0.9
