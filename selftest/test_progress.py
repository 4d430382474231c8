"""The line of progress: what it says beside the time that has passed."""

from __future__ import annotations

import io

import pytest

from disagglab.progress import ProgressLine


@pytest.mark.parametrize(
    ("usual_s", "passed_s", "said"),
    [(60.0, 12.3, "[12 s, usually 60 s]"), (60.0, 138.0, "[138 s, usually 60 s]"), (None, 138.0, "[138 s]")],
)
def test_what_is_usual_does_not_read_as_a_bound(
    monkeypatch: pytest.MonkeyPatch, usual_s: float | None, passed_s: float, said: str
) -> None:
    """Also when a start takes longer than most: both figures with their meaning."""
    screen = io.StringIO()
    line = ProgressLine("servers", usual_s, screen)
    monkeypatch.setattr(ProgressLine, "elapsed_s", passed_s)
    line.show("a load weights")
    assert screen.getvalue() == f"servers: a load weights {said}\n"
