"""A search for good settings as it is kept: every candidate, rung, seed and figure, and why one is out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from disagglab import jsonfile
from disagglab.config.schema import SloSection
from disagglab.config.setting import Candidate, Setting, start_key
from disagglab.errors import ConfigError, InvalidRun, Problem
from disagglab.problems import problems_of
from disagglab.results.objective import Score, Seen, ranked, score

FILE = "tuning.json"
FORMAT = 1  # of the file; one with another number is refused
RUNG, CONFIRM = "rung", "confirm"  # first words of a trial's rung
MEND = "name the folder of a session that tuned, or run disagglab tune again"


@dataclass(frozen=True)
class Trial:
    """One candidate in one rung. ``seed``: of the prompts, the same for all of the rung. ``seen``: None
    where it gave no valid run, and then ``why_out`` says why.
    """

    candidate: Candidate
    rung: str
    seed: int
    seen: Seen | None
    why_out: str = ""

    @property
    def confirms(self) -> bool:
        """Whether it belongs to the confirmation."""
        return self.rung.startswith(CONFIRM)


@dataclass(frozen=True)
class Gain:
    """The winner beside the lab's own setting: runs on the same prompts, pair by pair (own, winner)."""

    pairs: tuple[tuple[Seen, Seen], ...]

    @property
    def own(self) -> Score:
        """The lab's own setting."""
        return score([own for own, _winner in self.pairs])

    @property
    def winner(self) -> Score:
        """The winner of the search."""
        return score([winner for _own, winner in self.pairs])

    def behind(self, open_loop: bool) -> bool:
        """Whether the winner is worse than the lab's own setting; of equals it is not."""
        return ranked({"winner": self.winner, "own": self.own}, open_loop)[0] == "own"

    @property
    def good_per_s(self) -> float | None:
        """Good requests per second, ratio - 1; None where the own setting has none."""
        own = self.own.good_per_s
        return self.winner.good_per_s / own - 1 if own > 0 else None

    @property
    def itl_p99(self) -> float | None:
        """p99 ITL, ratio - 1; None where one of the two has none."""
        own, winner = self.own.itl_p99_s, self.winner.itl_p99_s
        return winner / own - 1 if own and winner else None

    @property
    def itl_pairs(self) -> list[tuple[float, float]]:
        """p99 ITL of the pairs that have both, s: (own, winner)."""
        return [
            (own.itl_p99_s, winner.itl_p99_s)
            for own, winner in self.pairs
            if own.itl_p99_s and winner.itl_p99_s
        ]


@dataclass(frozen=True)
class Outcome:
    """What the search found for one kind. ``winner``: the best of the last rung; None where no setting gave
    a valid run. ``pick``: what to use, the winner or the lab's own setting. ``found``: the winner's gain in
    the rungs that both ran in, which the search chose it by; ``confirmed``: on fresh prompts. Each is None
    where there is no pair of runs. ``why``: of the pick, in words.
    """

    kind: str
    winner: Setting | None
    pick: Setting | None
    found: Gain | None
    confirmed: Gain | None
    why: str


@dataclass(frozen=True)
class Effort:
    """What the search spent on one kind, without the confirmation. ``trials``: runs that were asked for;
    ``runs``: those that were valid. ``starts``: of servers that played it; one that plays several kinds
    counts for each. ``run_s``: of the valid runs with their proofs.
    """

    kind: str
    settings: int
    trials: int
    runs: int
    starts: int
    run_s: float


@dataclass(frozen=True)
class Search:
    """A whole search. ``settings``: by kind, as they were drawn. ``rungs``: how many of a kind's settings
    the plan has in each. ``outcomes``: in the order of kinds.
    """

    workload: str
    open_loop: bool
    slo_ttft_s: float
    slo_tpot_s: float
    seed: int
    settings: dict[str, tuple[Setting, ...]]
    rungs: tuple[int, ...]
    trials: tuple[Trial, ...]
    outcomes: tuple[Outcome, ...]

    @property
    def slo(self) -> SloSection:
        """The objective that requests had to meet."""
        return SloSection(ttft_s=self.slo_ttft_s, tpot_s=self.slo_tpot_s)

    @property
    def rung_names(self) -> list[str]:
        """Rungs and confirmations, in the order of time."""
        return list(dict.fromkeys(trial.rung for trial in self.trials))

    def outcome(self, kind: str) -> Outcome:
        """Of a kind.

        Raises:
            KeyError: if it was not tuned.
        """
        return {one.kind: one for one in self.outcomes}[kind]

    def searched(self, kind: str = "") -> list[Trial]:
        """Trials of the search without the confirmation; of one kind where it is named."""
        return [one for one in self.trials if not one.confirms and (not kind or one.candidate.kind == kind)]

    @property
    def efforts(self) -> tuple[Effort, ...]:
        """By kind."""
        return tuple(self._effort(kind) for kind in self.settings)

    def _effort(self, kind: str) -> Effort:
        trials = self.searched(kind)
        valid = [trial.seen for trial in trials if trial.seen is not None]
        return Effort(
            kind=kind,
            settings=len(self.settings[kind]),
            trials=len(trials),
            runs=len(valid),
            starts=len({(trial.rung, start_key(trial.candidate)) for trial in trials}),
            run_s=sum(one.took_s for one in valid),
        )

    @property
    def starts(self) -> int:
        """Starts of all kinds together, confirmation included; one that several played counts once."""
        return len({(trial.rung, start_key(trial.candidate)) for trial in self.trials})

    def require_equal_effort(self) -> None:
        """Refuse a search in which one kind was given more or fewer trials than another.

        A kind whose settings failed has fewer to go on with; that it was given all that were left is what is
        asked then.

        Raises:
            InvalidRun: naming kind, rung and both numbers.
        """
        for kind in self.settings:
            for name, asked, left in self._asked(kind):
                if asked != left:
                    raise InvalidRun(
                        f"unequal effort: {kind} had {asked} trials in {name}, and {left} are due;"
                        " the caller of the search left some out, or repeated some"
                    )

    def shortfalls(self) -> list[str]:
        """Where a kind had fewer trials than planned, because its settings failed; in words."""
        found = []
        for kind in self.settings:
            for (name, asked, _left), planned in zip(self._asked(kind), self.rungs, strict=True):
                if asked < planned:
                    found.append(
                        f"{kind}, {name}: {asked} of {planned} planned; the others gave no valid run"
                    )
        return found

    def _asked(self, kind: str) -> Iterator[tuple[str, int, int]]:
        """Of each rung: its name, trials of the kind, and how many were due after what failed before."""
        left = self.rungs[0]
        for index, planned in enumerate(self.rungs):
            name = f"{RUNG} {index}"
            trials = [trial for trial in self.searched(kind) if trial.rung == name]
            due = min(planned, left)
            yield name, len(trials), due if due > 1 or index == 0 else 0
            if trials:
                left = sum(trial.seen is not None for trial in trials)


def write(folder: Path, search: Search) -> Path:
    """Keep a search as ``tuning.json`` in the folder of its run."""
    path = folder / FILE
    table = {"format": FORMAT, **_ADAPTER.dump_python(search, mode="json"), "efforts": _efforts(search)}
    path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    return path


def read(folder: Path) -> Search:
    """The search of a run.

    Raises:
        ConfigError: if the folder has none, or the file is damaged or of another format.
    """
    path = folder / FILE
    table = jsonfile.read(path, MEND)
    if table.get("format") != FORMAT:
        wrong = f"format {table.get('format')!r}, and this version reads {FORMAT}"
        raise ConfigError([Problem(str(path), "format", wrong, MEND)])
    try:
        return _ADAPTER.validate_json(json.dumps(_without(table, "format", "efforts")))
    except ValidationError as error:
        raise ConfigError(problems_of(error, str(path), mend=MEND)) from error


def _efforts(search: Search) -> list[dict[str, Any]]:
    """For those who read the file; it follows from the trials and is not read back."""
    return [vars(one) for one in search.efforts]


def _without(table: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in table.items() if key not in keys}


_ADAPTER = TypeAdapter(Search)
