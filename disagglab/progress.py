"""One line of progress that is rewritten on a terminal, and printed now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TextIO

PLAIN_INTERVAL_S = 15.0  # between two lines when the output is a file or a CI log


class ProgressLine:
    """Shows ``what: detail [12 s]``; with ``usual_s``, how long it takes mostly, ``[12 s, usually 60 s]``."""

    def __init__(self, what: str, usual_s: float | None = None, stream: TextIO | None = None) -> None:
        self.what = what
        self.usual_s = usual_s
        self._stream = stream or sys.__stderr__ or sys.stderr
        self._tty = self._stream.isatty()
        self._start = time.monotonic()
        self._last_shown = float("-inf")
        self._last_detail = ""

    @property
    def elapsed_s(self) -> float:
        """Seconds since the line began."""
        return time.monotonic() - self._start

    def show(self, detail: str) -> None:
        """Show the present state; a log gets a line when the state changes or the interval has passed."""
        now = time.monotonic()
        usual = f", usually {self.usual_s:.0f} s" if self.usual_s else ""
        text = f"{self.what}: {detail} [{self.elapsed_s:.0f} s{usual}]"
        if self._tty:
            self._stream.write(f"\r\x1b[2K{text}")
        elif detail != self._last_detail or now - self._last_shown >= PLAIN_INTERVAL_S:
            self._stream.write(text + "\n")
        else:
            return
        self._last_detail, self._last_shown = detail, now
        self._stream.flush()

    def tell(self, lines: Sequence[str]) -> None:
        """Lines that stay, above the one that is rewritten."""
        if self._tty:
            self._stream.write("\r\x1b[2K")
        self._stream.writelines(f"{line}\n" for line in lines)
        self._last_detail = ""
        self._stream.flush()

    def done(self, detail: str) -> None:
        """Show the final state and end the line."""
        self._last_detail = ""
        self.show(detail)
        if self._tty:
            self._stream.write("\n")
            self._stream.flush()
