"""Arms of a comparison: which take turns, which are left out, and which gates can then be judged."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import get_args

from disagglab.config.schema import GateSection, Lab
from disagglab.config.way_section import WaySection
from disagglab.errors import ConfigError, Problem

SINGLE, REPLICATED, DISAGGREGATED = "single", "replicated", "disaggregated"
SINGLE_AGAIN = "single-again"  # the same servers and router as SINGLE: what differs between the two is noise
OWN = (SINGLE, REPLICATED, DISAGGREGATED, SINGLE_AGAIN)  # of the lab's own settings, in the order of a round
AGAIN = "-again"
KINDS: tuple[str, ...] = get_args(WaySection.model_fields["kind"].annotation)  # before the @ of an arm
BEST = "best"  # in the place of a baseline: the best of all other ways
CODE = "ARM-LEFT-OUT"  # of skipped tests
LEAST = 2  # arms of a comparison


@dataclass(frozen=True)
class Arms:
    """``kept``: in the order of a round; ``left_out``: by ``--arm`` and ``--without``."""

    kept: tuple[str, ...] = OWN
    left_out: tuple[str, ...] = ()

    def lacking(self, gate: GateSection) -> tuple[str, ...]:
        """The arms that a gate is not judged for lack of. Against the best any one other way is enough."""
        wanted = baselines(gate, self.kept)
        if gate.baseline == BEST and not wanted:
            wanted = baselines(gate, self.left_out)
        return tuple(arm for arm in (gate.candidate, *wanted) if arm not in self.kept)

    def judges(self, gate: GateSection) -> bool:
        """Whether both sides of a gate are measured."""
        return not self.lacking(gate)

    def judged(self, lab: Lab) -> Lab:
        """The lab with the gates that can be judged alone."""
        return lab.model_copy(update={"gates": tuple(gate for gate in lab.gates if self.judges(gate))})

    def not_judged(self, lab: Lab) -> tuple[GateSection, ...]:
        """The gates of a lab that lack an arm."""
        return tuple(gate for gate in lab.gates if not self.judges(gate))

    def skip_reason(self, *wanted: str) -> str | None:
        """Why a test that wants these arms is skipped; None if all of them are measured."""
        lacking = [arm for arm in wanted if arm not in self.kept]
        left_out = [arm for arm in lacking if arm in OWN or arm in self.left_out]
        why = [f"{', '.join(left_out)} by --arm or --without"] if left_out else []
        why += [f"{arm} without its --way" for arm in lacking if arm not in left_out]
        return f"{CODE}: {', '.join(why)}" if why else None


def kind_of(arm: str) -> str:
    """How an arm uses the nodes: ``replicated`` of ``replicated@tuned``."""
    return arm.partition("@")[0]


def baselines(gate: GateSection, measured: Iterable[str]) -> tuple[str, ...]:
    """The arms that a gate compares its candidate with: the one that it names; against the best those of
    the measured ones that use the nodes in another way than the candidate, twins left out; none where it has
    a limit.
    """
    if gate.baseline != BEST:
        return (gate.baseline,) if gate.baseline else ()
    return rivals(gate.candidate, measured)


def rivals(candidate: str, measured: Iterable[str]) -> tuple[str, ...]:
    """The arms among which the best is, for a candidate; see :func:`baselines`."""
    others = {*KINDS} - {kind_of(candidate)}
    return tuple(arm for arm in measured if kind_of(arm) in others and not arm.endswith(AGAIN))


def twinned(gate: GateSection, measured: Iterable[str]) -> str | None:
    """The baseline of a gate whose twin tells its noise: of several the replicas of the lab's own settings,
    or else the first; None where it has a limit.
    """
    found = baselines(gate, measured)
    return REPLICATED if REPLICATED in found else next(iter(found), None)


def twin_of(arm: str) -> str:
    """The arm that is the same servers and router a second time."""
    return f"{arm}{AGAIN}"


def chosen(lab: Lab, only: Sequence[str], without: Sequence[str], ways: Sequence[str]) -> Arms:
    """The arms of a session: those that ``--arm`` names, or all, but those that ``--without`` names.

    Args:
        ways: arms of those that are measured.

    Raises:
        ConfigError: if a name is not known or stands in both, if a twin or a way is left alone, if
            ``disaggregated`` is left out and is the candidate of a gate whose baseline is kept, or if one
            arm remains.
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
    kept = tuple(name for name in known if name not in out)
    remaining = [gate for gate in lab.gates if gate.limit or set(baselines(gate, kept)) & set(kept)]
    lost = [gate for gate in remaining if gate.candidate == DISAGGREGATED]
    if DISAGGREGATED in out and lost:
        many = "every gate" if len(lost) == len(remaining) else f"{len(lost)} of {len(remaining)} gates"
        wrong = f"left out, and it is the candidate of {many}"
        mend = f"keep it; for the baselines alone: pytest -m baseline, pytest -m {REPLICATED}"
        problems.append(Problem(lab.file, f"arm {DISAGGREGATED}", wrong, mend))
    problems += [
        Problem(lab.file, f"--way {arm}", "asked for, and its arm is left out", f"add --arm {arm}")
        for arm in ways
        if arm in out
    ]
    if not problems and len(kept) < LEAST:
        wrong = f"{kept[0]} alone, and a comparison takes {LEAST}"
        problems.append(Problem(lab.file, "arms", wrong, f"keep one more of {', '.join(known)}"))
    if problems:
        raise ConfigError(problems)
    return Arms(kept, tuple(name for name in known if name in out))
