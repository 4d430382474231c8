"""What is asked of a session: its options, and what they come to, decided once for session and plan."""

from __future__ import annotations

from dataclasses import dataclass

from disagglab.config import arms, way
from disagglab.config.arms import Arms
from disagglab.config.labs import load_lab, on_workloads, with_release
from disagglab.config.schema import Lab
from disagglab.config.way_section import WaySection
from disagglab.errors import ConfigError, Problem
from disagglab.hosts import release


@dataclass(frozen=True)
class Asked:
    """The options of a session that decide what it starts. ``lab``: name or path; no ``vllm``: the lab's."""

    lab: str
    vllm: str = ""
    against: str = ""
    workloads: tuple[str, ...] = ()
    ways: tuple[str, ...] = ()
    arms: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    dedicated: bool = False


@dataclass(frozen=True)
class Chosen:
    """What a session starts. ``lab``: as it is served, beside the ways; with the gates asked for."""

    lab: Lab
    ways: tuple[WaySection, ...]
    arms: Arms
    against: str
    dedicated: bool


def choose(asked: Asked) -> Chosen:
    """Decide what is asked. The machine is not looked at; :func:`require_here` does.

    Raises:
        ConfigError: if lab file and options do not fit, or options do not fit each other.
    """
    lab = load_lab(asked.lab)
    if asked.vllm:
        lab = with_release(lab, asked.vllm)
        release.require_rule(lab, "--vllm")
    if asked.against:
        release.require_rule(with_release(lab, asked.against), "--against")
    lab = on_workloads(lab, asked.workloads)
    ways = way.chosen(lab, asked.ways)
    if ways and asked.against:
        wrong = "given beside --way; both want the memory and the ports that are left"
        raise ConfigError([Problem(lab.file, "--against", wrong, "ask for one of the two")])
    chosen_arms = arms.chosen(lab, asked.arms, asked.without, [one.arm for one in ways])
    if ways:
        starts = way.starts(lab, ways)
        release.require_ports(lab, 1 + starts)
        lab = way.beside(lab, starts)
    if asked.against:
        release.require_room(lab)
        if asked.against == lab.vllm.version:
            wrong = f"{asked.against} is what the lab serves already"
            raise ConfigError([Problem(lab.file, "--against", wrong, "name another version")])
    return Chosen(lab, ways, chosen_arms, asked.against, asked.dedicated)


def require_here(asked: Asked, chosen: Chosen) -> None:
    """Refuse, before anything starts, a release that was asked for and is not on this machine.

    Raises:
        ConfigError: see :func:`disagglab.hosts.release.require`.
    """
    if not chosen.lab.shares_our_files:
        return
    if asked.vllm:
        release.require(chosen.lab, "--vllm")
    if asked.against:
        release.require(with_release(chosen.lab, asked.against), "--against")
