"""``--budget``, ``--rounds`` and what the verdicts of a session then hold for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from disagglab.errors import ConfigError
from disagglab.pytest_plugin.options import DEFAULT_BUDGET_S, budget_s
from disagglab.pytest_plugin.session import Session


def asked(**options: Any) -> Any:
    """A configuration with these options of the command line."""
    named = {f"--{name.replace('_', '-')}": value for name, value in options.items()}
    return SimpleNamespace(getoption=named.get)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({}, DEFAULT_BUDGET_S),
        ({"budget": "10m"}, 600.0),
        ({"budget": "90"}, 90.0),
        ({"short": True}, 0.0),
        ({"short": True, "budget": "60s"}, 60.0),
        ({"rounds": 6}, None),
        ({"max_rounds": 12}, None),
        ({"rounds": 6, "short": True}, None),
    ],
)
def test_a_session_has_a_time_or_a_number_of_rounds(options: dict[str, Any], found: float | None) -> None:
    assert budget_s(asked(**options)) == found


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"budget": "soon"}, "write 90s, 10m or 1h"),
        ({"budget": "5m", "rounds": 3}, "given beside --rounds"),
        ({"budget": "5m", "max_rounds": 9}, "given beside --max-rounds"),
    ],
)
def test_a_budget_that_says_nothing_is_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        budget_s(asked(**options))


@pytest.mark.parametrize(
    ("budget", "max_rounds", "sessions", "rule"),
    [
        (None, 0, (), "fixed-n"),
        (300.0, 0, (), "any time, order drawn"),
        (0.0, 0, (), "any time, order drawn"),
        (300.0, 0, ("20260101-000000-aaaa",), "any time"),
        (None, 12, (), "any time"),
        (None, 0, ("20260101-000000-aaaa",), "any time"),
    ],
)
def test_only_a_number_that_was_fixed_beforehand_is_judged_once(
    budget: float | None, max_rounds: int, sessions: tuple[str, ...], rule: str
) -> None:
    """Rounds that are added to a session that was seen are a second look at it."""
    live: Any = SimpleNamespace(
        budget_s=budget,
        max_rounds=max_rounds,
        earlier=SimpleNamespace(sessions=sessions, order_drawn=not sessions),
    )
    assert Session.rule.fget(live) == rule  # type: ignore[attr-defined]
