"""Arms of a comparison: which take turns, which are left out, and which gates can then be judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from disagglab.config.schema import GateSection, Lab
from disagglab.errors import ConfigError, Problem

SINGLE, REPLICATED, DISAGGREGATED = "single", "replicated", "disaggregated"
SINGLE_AGAIN = "single-again"  # the same servers and router as SINGLE: what differs between the two is noise
OWN = (SINGLE, REPLICATED, DISAGGREGATED, SINGLE_AGAIN)  # of the lab's own settings, in the order of a round
AGAIN = "-again"
CODE = "ARM-LEFT-OUT"  # of skipped tests
LEAST = 2  # arms of a comparison


@dataclass(frozen=True)
class Arms:
    """``kept``: in the order of a round; ``left_out``: by ``--arm`` and ``--without``."""

    kept: tuple[str, ...] = OWN
    left_out: tuple[str, ...] = ()

    def judges(self, gate: GateSection) -> bool:
        """Whether both sides of a gate are measured."""
        return {DISAGGREGATED, gate.baseline or DISAGGREGATED} <= set(self.kept)

    def judged(self, lab: Lab) -> Lab:
        """The lab with the gates that can be judged alone."""
        return lab.model_copy(update={"gates": tuple(gate for gate in lab.gates if self.judges(gate))})

    def not_judged(self, lab: Lab) -> tuple[GateSection, ...]:
        """The gates of a lab that lack an arm."""
        return tuple(gate for gate in lab.gates if not self.judges(gate))

    def skip_reason(self, *wanted: str) -> str | None:
        """Why a test that wants these arms is skipped; None if all of them are measured."""
        lacking = [arm for arm in wanted if arm not in self.kept]
        return f"{CODE}: {', '.join(lacking)} by --arm or --without" if lacking else None


def twin_of(arm: str) -> str:
    """The arm that is the same servers and router a second time."""
    return f"{arm}{AGAIN}"


def chosen(lab: Lab, only: Sequence[str], without: Sequence[str], ways: Sequence[str]) -> Arms:
    """The arms of a session: those that ``--arm`` names, or all, but those that ``--without`` names.

    Args:
        ways: arms of those that are measured.

    Raises:
        ConfigError: if a name is not known or stands in both, if a twin or a way is left alone, if
            ``disaggregated`` is left out, which is the candidate of every gate, or if one arm remains.
    """
    known = (*OWN, *ways)
    problems = [
        Problem(lab.file, f"{option} {name}", "no such arm in this session", f"use one of {', '.join(known)}")
        for option, names in (("--arm", only), ("--without", without))
        for name in names
        if name not in known
    ]
    problems += [
        Problem(lab.file, f"--without {name}", "kept by --arm", "name it in one of the two")
        for name in dict.fromkeys(without)
        if name in only
    ]
    if problems:
        raise ConfigError(problems)
    out = {name for name in known if name in without or (only and name not in only)}
    if SINGLE in out:
        if SINGLE_AGAIN in only:
            wrong = f"the twin of {SINGLE}, which is left out"
            raise ConfigError([Problem(lab.file, f"--arm {SINGLE_AGAIN}", wrong, f"add --arm {SINGLE}")])
        out.add(SINGLE_AGAIN)
    if DISAGGREGATED in out:
        wrong = "left out, and it is the candidate of every gate"
        mend = f"keep it; for the baselines alone: pytest -m baseline, pytest -m {REPLICATED}"
        problems.append(Problem(lab.file, f"arm {DISAGGREGATED}", wrong, mend))
    problems += [
        Problem(lab.file, f"--way {arm}", "asked for, and its arm is left out", f"add --arm {arm}")
        for arm in ways
        if arm in out
    ]
    kept = tuple(name for name in known if name not in out)
    if not problems and len(kept) < LEAST:
        wrong = f"{kept[0]} alone, and a comparison takes {LEAST}"
        problems.append(Problem(lab.file, "arms", wrong, f"keep one more of {', '.join(known)}"))
    if problems:
        raise ConfigError(problems)
    return Arms(kept, tuple(name for name in known if name in out))
