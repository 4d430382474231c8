"""What one pytest session on a lab holds: the lab, the run's folder, the claims made."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from disagglab.config.schema import Lab
from disagglab.experiments.comparison import Comparison
from disagglab.progress import ProgressLine
from disagglab.results.report import Claim, Module, lesson_html
from disagglab.results.resume import Earlier
from disagglab.results.run_folder import Store


@dataclass
class Session:
    """The live part of a pytest session. ``terminal``: the real standard error, whatever pytest captures."""

    lab: Lab
    store: Store
    run_id: str
    short: bool
    rounds: int
    max_rounds: int
    dedicated: bool
    against: str
    endings: int
    variants: tuple[str, ...]
    terminal: TextIO
    uncaptured: Callable[[], contextlib.AbstractContextManager[None]]
    modules: dict[str, Module] = field(default_factory=dict)
    comparison: Comparison | None = None
    earlier: Earlier = field(default_factory=Earlier)

    def progress(self, what: str, usual_s: float | None = None) -> ProgressLine:
        """A progress line on the terminal; ``usual_s``: how long that takes mostly, shown beside the time."""
        return ProgressLine(what, usual_s, self.terminal)

    def add_claim(self, module: str, readme: Path, claim: Claim) -> None:
        """Note how a test ended, under its learning module."""
        if module not in self.modules:
            self.modules[module] = Module(module, lesson_html(readme) if readme.is_file() else "")
        self.modules[module].tests.append(claim)
