"""``disagglab tune``: good settings of every way to use the nodes, each searched for with equal effort."""

from __future__ import annotations

import argparse
from pathlib import Path

from disagglab.cli import command, words


def add(commands: command.Commands) -> None:
    """Add the command."""
    asked = command.add(
        commands,
        "tune",
        run,
        "good settings of every way to use the nodes",
        "Search good settings for every way to use the nodes of a lab, with the same options, equally many"
        " trials and the same objective for each. It runs pytest -m tuning, so servers, report and cleaning"
        " up are those of a session; the exit status is pytest's. What was found is a lab file, tuned.toml in"
        " the folder of the run.",
        [
            "disagglab tune --lab embedded-ways --plan",
            "disagglab tune --lab embedded-ways --workload documents --settings 4",
            "disagglab tune --lab embedded-ways --budget 30m",
        ],
    )
    lab = asked.add_argument("--lab", default="embedded-ways", help="a lab by its name or path (%(default)s)")
    command.complete(lab, words.labs)
    workload = asked.add_argument(
        "--workload", metavar="NAME", help="settings are compared on this one, not on that of [tuning]"
    )
    command.complete(workload, words.every_workload)
    asked.add_argument(
        "--settings", type=int, metavar="N", help="that each way tries (default: [tuning] settings)"
    )
    asked.add_argument(
        "--budget", metavar="TIME", help="as many settings as this is enough for by the plan: 30m, 2h"
    )
    asked.add_argument(
        "--rounds", type=int, metavar="N", help="of the frontier and the gates (default: [tuning] rounds)"
    )
    asked.add_argument("--vllm", metavar="X.Y.Z", help="serve with this vLLM version instead of the lab's")
    asked.add_argument(
        "--plan", action="store_true", help="print settings, starts and estimated minutes; start nothing"
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the plan, or run the session."""
    from disagglab.config.labs import load_lab
    from disagglab.config.search_checks import asked
    from disagglab.experiments import tuning_plan

    lab = load_lab(arguments.lab)
    settings = _settings(arguments)
    tuning = asked(lab, arguments.workload or "", settings)
    if arguments.plan:
        print("\n".join(tuning_plan.plan(lab, tuning).lines()))
        return 0
    return _session(pytest_argv(arguments, settings))


def _settings(arguments: argparse.Namespace) -> int | None:
    """What ``--settings`` or ``--budget`` comes to; None where neither is given."""
    from disagglab.config.labs import load_lab
    from disagglab.errors import ConfigError, Problem
    from disagglab.experiments import tuning_plan
    from disagglab.units import seconds

    number: int | None = arguments.settings
    if arguments.budget is None:
        return number
    budget_s = seconds(arguments.budget)
    if not budget_s:
        wrong = f"no time: {arguments.budget!r}"
        raise ConfigError([Problem("command line", "--budget", wrong, "write 90s, 10m or 1h")])
    if number is not None:
        wrong = "given beside --settings"
        raise ConfigError([Problem("command line", "--budget", wrong, "give a time or a number of settings")])
    return tuning_plan.fitting(load_lab(arguments.lab), arguments.workload or "", budget_s)


def pytest_argv(arguments: argparse.Namespace, settings: int | None) -> list[str]:
    """The options of pytest that this command stands for."""
    from disagglab.paths import ROOT

    argv = [str(ROOT / "tests" / "tuning"), "-m", "tuning", "--lab", arguments.lab]
    if arguments.workload:
        argv += ["--tune-workload", arguments.workload]
    if settings is not None:
        argv += ["--settings", str(settings)]
    if arguments.rounds is not None:
        argv += ["--rounds", str(arguments.rounds)]
    if arguments.vllm:
        argv += ["--vllm", arguments.vllm]
    return argv


def _session(argv: list[str]) -> int:
    """Run pytest in this process; its exit status. Says where the tuned lab is, if the session wrote one."""
    import pytest

    before = _latest()
    status = int(pytest.main(argv))
    found = _latest()
    if found is not None and found != before:
        print(f"tuned lab: {found}; measure it with: pytest -m disagg --lab {found} --way tuned")
    else:
        print("no tuned lab was written; the report of the session says why")
    return status


def _latest() -> Path | None:
    """``tuned.toml`` of the latest session; None where it has none."""
    from disagglab.paths import REPORTS
    from disagglab.results.tuned_lab import FILE

    path = (REPORTS / "latest").resolve() / FILE
    return path if path.is_file() else None
