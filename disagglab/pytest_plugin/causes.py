"""One root cause, told once: what broke the session, and the tests that could not hold because of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from disagglab.errors import ConfigError, LabError
from disagglab.serving.death import Death, Died

BECAUSE = "because"  # pytest's category of the tests that failed of it


@dataclass
class Cause:
    """What broke a session.

    ``line``: in one line; ``text``: the whole story, several lines. ``process``: what died, or empty.
    ``seen_by``: node id of the test that met it first, or empty. ``because``: node ids of the tests that
    failed of it or were not run.
    """

    line: str
    text: str
    process: str = ""
    seen_by: str = ""
    because: list[str] = field(default_factory=list)

    def as_row(self) -> dict[str, Any]:
        """For ``run.json`` and the report."""
        return asdict(self)

    @classmethod
    def of(cls, error: LabError | Death) -> Cause:
        """From what was raised in a fixture, or from a death."""
        text = str(error)
        if isinstance(error, ConfigError):
            return cls(str(error.problems[0]).partition("\n")[0], text)
        if isinstance(error, Died):
            error = error.death
        if isinstance(error, Death):
            return cls(error.line, str(error), error.process)
        return cls(text.partition("\n")[0], text)


class Causes:
    """The root causes of a session, in the order in which they came up; mostly none, else one.

    Args:
        deaths: asks what has died by now that nobody ended, first death first.
    """

    def __init__(self, deaths: Callable[[], Sequence[Death]]) -> None:
        self.found: list[Cause] = []
        self._deaths = deaths
        # by id; the errors are kept beside their causes, so that no other error gets their id
        self._errors: dict[int, tuple[BaseException, Cause]] = {}

    def look(self, seen_by: str = "") -> None:
        """Note what has died since the last look, or which host cannot be asked any more."""
        try:
            found = [Cause.of(death) for death in self._deaths()]
        except LabError as error:
            found = [Cause.of(error)]
        for cause in found:
            if all(cause.line != known.line for known in self.found):
                cause.seen_by = seen_by
                self.found.append(cause)

    def blame(
        self, node: str, error: BaseException, shared: bool, uses: Callable[[Cause], bool]
    ) -> Cause | None:
        """The cause of a test's failure; None where it failed by itself.

        Args:
            shared: whether a fixture raised the error, so that other tests will meet the very same one.
            uses: whether the test uses the process that has died.
        """
        self.look(seen_by=node)
        cause = self._met(error) or self.stops(uses)
        if cause is None and shared and isinstance(error, LabError):
            cause = Cause.of(error)
            cause.seen_by = node
            self.found.append(cause)
        if cause is not None:
            self._errors[id(error)] = (error, cause)
            cause.because.append(node)
        return cause

    def _met(self, error: BaseException) -> Cause | None:
        """The cause that an error was put down to before, or that it or what it came from names."""
        for one in _chain(error):
            if id(one) in self._errors:
                return self._errors[id(one)][1]
            if isinstance(one, LabError):
                line = Cause.of(one).line
                if (cause := next((known for known in self.found if known.line == line), None)) is not None:
                    return cause
        return None

    def stops(self, uses: Callable[[Cause], bool]) -> Cause | None:
        """The cause for which a test need not be run, since it uses a process that has died."""
        return next((cause for cause in self.found if cause.process and uses(cause)), None)

    def as_rows(self) -> list[dict[str, Any]]:
        """For ``run.json`` and the report."""
        return [cause.as_row() for cause in self.found]

    def lines(self) -> list[str]:
        """For the end of the terminal."""
        found = []
        for cause in self.found:
            found += cause.text.splitlines()
            files = Counter(node.partition("::")[0] for node in cause.because)
            named = ", ".join(f"{file} ({count})" for file, count in files.items())
            if named:
                found.append(f"because of it {len(cause.because)} tests failed or were not run: {named}")
        return found


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what it was raised from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
