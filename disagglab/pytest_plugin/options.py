"""The options that the suite adds to pytest."""

from __future__ import annotations

from typing import TYPE_CHECKING

from disagglab.config.arms import OWN
from disagglab.errors import ConfigError, Problem
from disagglab.units import seconds

if TYPE_CHECKING:
    import pytest

DEFAULT_ROUNDS = 3
SHORT_ROUNDS = 2
DEFAULT_BUDGET_S = 300.0
PATHS = ("--lab", "--resume")  # options whose value may be a path


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of the suite."""
    group = parser.getgroup("disagg-lab")
    group.addoption("--lab", default="embedded", help="name of a file in labs/, or a path")
    group.addoption(
        "--short", action="store_true", help=f"fewer repetitions ({SHORT_ROUNDS} rounds, and no more)"
    )
    group.addoption(
        "--budget",
        metavar="TIME",
        help="time of the comparison, as 90s, 10m, 1h; a plan of trials divides it, and verdicts hold at"
        f" every look (default {DEFAULT_BUDGET_S:g}s)",
    )
    group.addoption(
        "--rounds",
        type=int,
        default=None,
        help="in place of a budget: so many rounds of all arms, fixed beforehand; of other experiments"
        f" {DEFAULT_ROUNDS} by default",
    )
    group.addoption(
        "--max-rounds", type=int, default=0, help="go on to so many rounds while a gate is undecided"
    )
    group.addoption(
        "--resume",
        action="append",
        default=[],
        metavar="RUN_FOLDER",
        help="go on with the rounds of this earlier session; --rounds counts them too (several: repeat)",
    )
    group.addoption("--vllm", metavar="X.Y.Z", help="serve with this vLLM version instead of the lab's")
    group.addoption(
        "--against", metavar="X.Y.Z", help="also serve with this vLLM version, and compare the two"
    )
    group.addoption(
        "--endings", type=int, default=0, metavar="N", help="end N sessions in each hard way (lab two-hosts)"
    )
    group.addoption(
        "--workload",
        action="append",
        default=[],
        metavar="NAME",
        help="compare on this workload of the lab's gates alone (several: repeat)",
    )
    group.addoption(
        "--way",
        action="append",
        default=[],
        metavar="NAME",
        help="also measure this [[way]] of the lab file beside the lab's own settings (several: repeat)",
    )
    group.addoption(
        "--arm",
        action="append",
        default=[],
        metavar="NAME",
        help=f"compare these arms alone: {', '.join(OWN)}, KIND@WAY (several: repeat)",
    )
    group.addoption(
        "--without",
        action="append",
        default=[],
        metavar="NAME",
        help="compare all arms but this; without single its twin single-again goes, too (several: repeat)",
    )
    group.addoption(
        "--tune-workload",
        metavar="NAME",
        help="tuning compares settings on this file of workloads/ (default: [tuning] workload)",
    )
    group.addoption(
        "--settings",
        type=int,
        default=None,
        metavar="N",
        help="settings that tuning tries of each way, the lab's own included (default: [tuning] settings)",
    )
    group.addoption(
        "--dedicated", action="store_true", help="also measure on servers without any KV connector"
    )
    group.addoption("--no-skips", action="store_true", help="a test that lacks something has failed")
    group.addoption(
        "--plan", action="store_true", help="print what a session would run on every host; start nothing"
    )


def budget_s(config: pytest.Config) -> float | None:
    """Seconds of the comparison; None where rounds were asked for. ``--short`` ends after the pilot rounds.

    Raises:
        ConfigError: if the time cannot be read, or is given beside a number of rounds.
    """
    text = config.getoption("--budget")
    rounds = [name for name in ("--rounds", "--max-rounds") if config.getoption(name)]
    if text is None:
        if rounds:
            return None
        return 0.0 if config.getoption("--short") else DEFAULT_BUDGET_S
    found = seconds(text)
    if found is None:
        wrong = f"no time: {text!r}"
        raise ConfigError([Problem("command line", "--budget", wrong, "write 90s, 10m or 1h")])
    if rounds:
        wrong = f"given beside {rounds[0]}"
        raise ConfigError([Problem("command line", "--budget", wrong, "give a time or a number of rounds")])
    return found
