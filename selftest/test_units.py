"""Times and shares as people write them."""

from __future__ import annotations

import pytest

from disagglab.units import seconds, share


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("50ms", 0.05),
        ("90", 90),
        ("90s", 90),
        ("10m", 600),
        ("10 min", 600),
        ("1.5h", 5400),
        (" 2m ", 120),
        ("0s", 0),
    ],
)
def test_times(text: str, value: float) -> None:
    assert seconds(text) == value


@pytest.mark.parametrize("text", ["", "m", "ten", "-5s", "5 d", "1e3s", "5m30s", "nan", "inf"])
def test_what_is_no_time(text: str) -> None:
    assert seconds(text) is None


@pytest.mark.parametrize(("text", "value"), [("5%", 0.05), ("5 %", 0.05), ("0.05", 0.05), ("12.5%", 0.125)])
def test_shares(text: str, value: float) -> None:
    assert share(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "%", "five", "5%%"])
def test_what_is_no_share(text: str) -> None:
    assert share(text) is None
