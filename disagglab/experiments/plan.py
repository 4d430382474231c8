"""The plan of a session, from what its command line asks for: ``pytest --plan`` and ``disagglab plan``."""

from __future__ import annotations

from disagglab.experiments import dry_run
from disagglab.experiments.asked import Asked, choose


def lines(asked: Asked) -> list[str]:
    """Every command, host by host; see :func:`disagglab.experiments.dry_run.lines`.

    Raises:
        ConfigError: if a session would be refused; whether its releases are installed is not looked at.
        StartError: if ~/.ssh/config cannot be read.
    """
    chosen = choose(asked)
    return dry_run.lines(chosen.lab, chosen.against, chosen.dedicated, chosen.ways, chosen.arms)
