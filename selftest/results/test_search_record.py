"""A search is kept whole and read back as it was; what is damaged is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from disagglab.config.setting import Candidate
from disagglab.errors import ConfigError
from disagglab.results import search_record
from disagglab.results.objective import Seen
from disagglab.results.search_record import Gain, Search
from selftest.experiments.test_halving import number_of, ordered, searched

PAIRS = (
    (Seen(2, 6, 10.0, 0.2, 11.0), Seen(4, 6, 12.0, 0.1, 13.0)),
    (Seen(4, 6, 10.0, 0.4, 11.0), Seen(5, 6, 12.0, 0.2, 13.0)),
)


def mixed() -> Search:
    """A search with a gain, an own setting that won, and settings that failed."""

    def speed(candidate: Candidate, seed: int) -> float | str | None:
        if candidate.kind == "single":
            return {1: None, 2: "the client was late"}.get(number_of(candidate), 0.5)
        return ordered(candidate, seed)

    return searched(speed, 4)


def test_what_was_kept_is_read_back(tmp_path: Path) -> None:
    search = mixed()
    path = search_record.write(tmp_path, search)
    assert path == tmp_path / "tuning.json"
    assert search_record.read(tmp_path) == search
    raw = json.loads(path.read_text())
    assert raw["format"] == search_record.FORMAT
    assert [one["trials"] for one in raw["efforts"]] == [6, 6, 6]
    assert {one["why_out"] for one in raw["trials"]} == {
        "", "did not start: out of memory", "invalid run: the client was late",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": 2}, "format 2, and this version reads 1"),
        ({"trials": [{"rung": "rung 0"}]}, "trials[0].candidate"),
        ({"seed": "many"}, "seed"),
    ],
)
def test_another_file_is_refused(tmp_path: Path, change: dict[str, object], said: str) -> None:
    path = search_record.write(tmp_path, mixed())
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError) as caught:
        search_record.read(tmp_path)
    assert said in str(caught.value)


def test_a_folder_without_a_search_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="missing"):
        search_record.read(tmp_path)


def test_a_gain_by_hand() -> None:
    """Own 6 of 12 in 20 s, winner 9 of 12 in 24 s: 0.3 and 0.375 good a second, +25 %. p99 ITL pairs
    (0.2, 0.1) and (0.4, 0.2): half.
    """
    gain = Gain(PAIRS)
    assert gain.good_per_s == pytest.approx(0.25)
    assert gain.itl_p99 == pytest.approx(-0.5)
    assert gain.itl_pairs == [(0.2, 0.1), (0.4, 0.2)]
    assert not gain.behind(open_loop=True)
    assert Gain(tuple((winner, own) for own, winner in PAIRS)).behind(open_loop=True)
    assert not Gain(tuple((own, own) for own, _winner in PAIRS)).behind(open_loop=True)
