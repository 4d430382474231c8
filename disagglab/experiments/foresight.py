"""How many rounds a difference takes, told from the runs of an earlier session: ``disagglab plan-trials``."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from disagglab import text
from disagglab.config.labs import parse_lab
from disagglab.config.schema import GateSection, Lab
from disagglab.errors import ConfigError, Problem
from disagglab.experiments import trials
from disagglab.experiments.comparison import Comparison
from disagglab.experiments.match import match_of
from disagglab.experiments.pair_spread import cost_of_a_run, pair_spread
from disagglab.results import resume
from disagglab.stats.rule import FIXED, MOST_ROUNDS, ORDER_DRAWN, Rule

RULES: tuple[Rule, ...] = (ORDER_DRAWN, FIXED)
MEND = "name the folder of a session with a comparison, as reports/latest"


@dataclass(frozen=True)
class Foresight:
    """What is known of one gate. ``pair_sd``: of the log-ratio of a pair; ``round_s``: of a round, s."""

    gate: GateSection
    rounds: int
    pair_sd: float
    round_s: float

    def needed(self, difference: float, rule: Rule) -> int | None:
        """Rounds that find a difference (ratio - 1) with 80 % power; None above ``MOST_ROUNDS``."""
        found = trials.Outlook(self.gate, rule, self.rounds, self.pair_sd, True, None)
        return next(
            (
                total
                for total in range(2, MOST_ROUNDS + 1)
                if (least := found.detectable(total)) is not None and least <= difference
            ),
            None,
        )


def read(folder: Path) -> tuple[Lab, Comparison]:
    """The lab and the comparison of a session.

    Raises:
        ConfigError: if a file of it is missing or damaged, or its lab file is none for this version.
    """
    meta = resume.meta_of(folder)
    file = str(folder / "run.json")
    try:
        lab = parse_lab(tomllib.loads(meta["lab_file"]), file)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError([Problem(file, "lab_file", f"not TOML: {error}", MEND)]) from error
    definitions = {workload.definition for workload in lab.gated_workloads}
    found = [one.run for one in resume.runs_of(folder, folder.name)]
    return lab, Comparison([run for run in found if run.workload.definition in definitions], lab.slo)


def gates(lab: Lab, comparison: Comparison) -> Iterator[Foresight]:
    """What is known of each gate that was measured in two rounds at least."""
    for gate in lab.gates:
        own = [run for run in comparison.runs if run.workload.name == gate.workload and run.round >= 0]
        arms = trials.arms_needed([gate], arms=comparison.arms(gate.workload, counted=False))
        match = match_of(comparison, gate)
        if any(not comparison.valid(gate.workload, arm) for arm in arms):
            continue
        if not match.whole:
            continue
        seen = list(dict.fromkeys(run.topology for run in own))
        found = pair_spread(comparison, match, match.judge(ORDER_DRAWN).baseline, seen)
        if found is not None:
            length = own[-1].workload.run_requests
            cost = (cost_of_a_run(comparison, gate.workload, arm).of(length) for arm in arms)
            yield Foresight(gate, match.rounds, found.sd, sum(cost))


def lines(folder: Path, difference: float, budget_s: float | None = None) -> list[str]:
    """A table for people: rounds and minutes for a difference, by both rules; with a budget what it would
    tell of each gate if it were spent on that gate alone.

    Raises:
        ConfigError: see :func:`read`; if the session measured no gate in two rounds.
    """
    lab, comparison = read(folder)
    found = list(gates(lab, comparison))
    if not found:
        wrong = "no gate was measured in two rounds"
        raise ConfigError([Problem(str(folder), "(whole folder)", wrong, MEND)])
    of = text.percent(difference).lstrip("+")
    head = ["gate", "rounds", "sd of a pair", "s a round", f"rounds for {of}", "time", "fixed beforehand"]
    if budget_s is not None:
        head += [f"rounds in {budget_s:g} s", "interval then", "smallest detectable then"]
    return [
        f"{lab.name}: rounds that find a difference of {of} four times out of five; looks after every round",
        *text.table([head, *(_row(one, difference, budget_s) for one in found)], right={1, 2, 3, 4, 5, 6}),
    ]


def _row(one: Foresight, difference: float, budget_s: float | None) -> list[str]:
    looks, fixed = (one.needed(difference, rule) for rule in RULES)
    row = [
        f"{one.gate.workload} {one.gate.figure}",
        str(one.rounds),
        f"{100 * one.pair_sd:.1f} %",
        f"{one.round_s:.1f}",
        str(looks) if looks else f"over {MOST_ROUNDS}",
        f"{looks * one.round_s / 60:.0f} min" if looks else "-",
        str(fixed) if fixed else f"over {MOST_ROUNDS}",
    ]
    if budget_s is not None:
        rounds = int(budget_s / one.round_s)
        outlook = trials.Outlook(one.gate, ORDER_DRAWN, one.rounds, one.pair_sd, True, None)
        reached = (outlook.half_width(rounds), outlook.detectable(rounds)) if rounds > 1 else (None, None)
        row += [str(rounds), *("not known" if value is None else text.margin(value) for value in reached)]
    return row
