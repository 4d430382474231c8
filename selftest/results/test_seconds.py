"""The account of a session's seconds: it adds up, whatever nests, fails or runs beside it.

Oracle: a clock that moves only when a test lets it, so that every figure is exact.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from disagglab.config.labs import load_lab
from disagglab.paths import ROOT
from disagglab.results import report, seconds
from disagglab.results.run_folder import Store
from disagglab.results.seconds import Account, Phase


class Clock:
    """s; it stands still but for :meth:`pass_s`."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s

    def pass_s(self, amount_s: float) -> None:
        self.now_s += amount_s


@pytest.fixture
def clock() -> Clock:
    """A clock of the test's own."""
    return Clock()


@pytest.fixture
def account(clock: Clock) -> Account:
    """An account of a process that began 2 s ago."""
    return Account(clock, before_s=2.0)


def test_every_second_counts_for_the_innermost_span(clock: Clock, account: Account) -> None:
    """Before, between and after spans it is other; a phase that is entered twice has both."""
    clock.pass_s(1.0)
    with account.spends(Phase.TESTS):
        clock.pass_s(10.0)
        for _ in range(2):
            with account.spends(Phase.ENGINE):
                clock.pass_s(3.0)
                with account.spends(Phase.COUNTERS):
                    clock.pass_s(0.5)
            clock.pass_s(20.0)
    clock.pass_s(4.0)
    spent = account.so_far()
    assert spent == {"start": 2.0, "load engine": 6.0, "counters": 1.0, "tests": 50.0, "other": 5.0}
    assert sum(spent.values()) == 2.0 + clock.now_s - 1000.0


def test_within_a_whole_span_nothing_counts_for_another_phase(clock: Clock, account: Account) -> None:
    """A warm-up's load, scrapes and waits are warm-up; afterwards spans count again."""
    with account.spends(Phase.WARM_UP, whole=True):
        with account.spends(Phase.ENGINE):
            clock.pass_s(3.0)
            account.counts(Phase.LOAD, 2.0)
        with account.spends(Phase.COUNTERS, whole=True):
            clock.pass_s(1.0)
        clock.pass_s(1.0)
        with account.spends(Phase.COUNTERS):
            clock.pass_s(1.0)
    with account.spends(Phase.COUNTERS):
        clock.pass_s(1.0)
    assert account.so_far() == {"start": 2.0, "warm-up": 6.0, "counters": 1.0}


def test_what_another_clock_measured_is_moved_to_its_phase(clock: Clock, account: Account) -> None:
    """Of 9 s of a job 7.5 were load; a figure that cannot be moves no more than there is; the sum stays."""
    with account.spends(Phase.ENGINE):
        clock.pass_s(9.0)
        account.counts(Phase.LOAD, 7.5)
        assert account.so_far() == {"start": 2.0, "load": 7.5, "load engine": 1.5}
        account.counts(Phase.LOAD, 100.0)
        account.counts(Phase.LOAD, -1.0)
    assert account.so_far() == {"start": 2.0, "load": 9.0}


def test_an_error_ends_the_spans_that_it_leaves(clock: Clock, account: Account) -> None:
    def break_off() -> None:
        with account.spends(Phase.TESTS), account.spends(Phase.WARM_UP, whole=True):
            clock.pass_s(1.0)
            raise KeyError

    with pytest.raises(KeyError):
        break_off()
    with account.spends(Phase.PROBE):
        clock.pass_s(2.0)
    clock.pass_s(4.0)
    assert account.so_far() == {"start": 2.0, "probe": 2.0, "warm-up": 1.0, "other": 4.0}


def test_other_threads_are_not_charged(clock: Clock, account: Account) -> None:
    """What they do happens within the seconds of the one that waits for them."""

    def scrape() -> None:
        with account.spends(Phase.COUNTERS):
            clock.pass_s(1.0)
            account.counts(Phase.LOAD, 1.0)

    with account.spends(Phase.TESTS):
        thread = threading.Thread(target=scrape)
        thread.start()
        thread.join()
    assert account.so_far() == {"start": 2.0, "tests": 1.0}


def test_without_an_account_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decorated function asks at each call, so it counts as soon as there is one."""
    monkeypatch.setattr(seconds, "_of_process", None)

    @seconds.spends(Phase.PROBE)
    def probe() -> str:
        time.sleep(0.002)
        return "probed"

    assert probe() == "probed"
    seconds.counts(Phase.LOAD, 1.0)
    assert seconds.so_far() == {}
    seconds.open_account()
    assert probe() == "probed"
    assert probe() == "probed"
    spent = seconds.so_far()
    assert spent["probe"] >= 0.004


def test_the_account_of_a_process_begins_with_it() -> None:
    """Its age grows as the clock does, and is no more than that of the machine."""
    first, before = seconds.age_s(), time.monotonic()
    time.sleep(0.03)
    grown = seconds.age_s() - first
    assert grown == pytest.approx(time.monotonic() - before, abs=0.01)
    assert 0 < first < time.clock_gettime(time.CLOCK_BOOTTIME)


@pytest.mark.parametrize(
    ("spent", "line"),
    [
        ({"servers": 34.4, "load": 200.4, "other": 0.4}, "time: servers 34 s, load 201 s, other 0 s = 235 s"),
        ({"start": 0.4, "probe": 0.4, "load": 9.6, "other": 0.4}, "time: load 10 s, other 1 s = 11 s"),
        ({"load": 7.0}, "time: load 7 s, other 0 s = 7 s"),
    ],
)
def test_the_line_of_the_terminal_adds_up(spent: dict[str, float], line: str) -> None:
    """Whole seconds whose sum is the one that is shown; phases of less than half a second are in other."""
    assert seconds.line(spent) == line
    parts, _, whole = line.removeprefix("time: ").removesuffix(" s").partition(" = ")
    assert sum(int(part.split()[-2]) for part in parts.split(", ")) == int(whole.split()[0])


def test_every_phase_is_explained_in_the_report_and_in_the_docs() -> None:
    """With the same words; the docs may say more behind them."""
    assert set(seconds.MEANING) == set(Phase)
    page = (ROOT / "docs" / "how-to" / "run.md").read_text()
    table = page.partition("## Where the time went")[2].partition("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][2:]
    assert len(rows) == len(seconds.MEANING)
    for row, (phase, what) in zip(rows, seconds.MEANING.items(), strict=True):
        assert row.startswith(f"| {phase} | {what}")


def test_the_report_shows_what_run_json_keeps(tmp_path: Path) -> None:
    """A row a phase with its share, and the sum; no table for sessions of earlier versions."""
    store = Store.create(tmp_path, "20261128-120000-abcd")
    meta: dict[str, Any] = {"command": "pytest", "model": "M", "fingerprint": {"key": "k"}, "speed": {}}
    store.write_meta(**meta)
    render: Callable[[], str] = lambda: report.render(load_lab("embedded"), store, [], [])  # noqa: E731
    assert "Where the time went" not in render()
    store.write_meta(seconds={"load": 30.0, "other": 10.0})
    page = render()
    assert "<h2>Where the time went</h2>" in page
    assert f"<td>load</td><td>30.0</td><td>75 %</td><td>{seconds.MEANING[Phase.LOAD]}</td>" in page
    assert "<td>sum</td><td>40.0</td>" in page
