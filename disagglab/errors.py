"""The errors that users of the suite meet. Each message says what is wrong and what mends it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class LabError(Exception):
    """Base of every error that the suite raises on purpose."""


@dataclass(frozen=True)
class Problem:
    """One mistake in an input file: where it is, what is wrong, what mends it."""

    file: str
    key: str
    wrong: str
    mend: str

    def __str__(self) -> str:
        return f"{self.file}: {self.key}: {self.wrong}\n    mend: {self.mend}"


class ConfigError(LabError):
    """Bad input, found before anything started. Carries every problem of the file, not only the first."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        count = len(self.problems)
        head = f"{count} problem{'s' if count != 1 else ''} found; nothing was started"
        super().__init__(
            "\n".join([head, *(f"  {number}. {p}" for number, p in enumerate(self.problems, 1))])
        )


class StartError(LabError):
    """A process did not come up, or is not the one that was started."""


class TransferError(LabError):
    """A KV transfer failed, or moved something else than computed."""


class InvalidRun(LabError):
    """A measurement broke one of its preconditions; it is kept and shown, never aggregated."""
