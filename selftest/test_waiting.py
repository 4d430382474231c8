"""The one waiting loop. Oracle: a clock that moves only while the loop sleeps, so that each case is exact."""

from __future__ import annotations

import itertools

import pytest

from disagglab import waiting


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clock's reading, s, as the only item."""
    now = [1000.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr("disagglab.waiting.time.monotonic", lambda: now[0])
    monkeypatch.setattr("disagglab.waiting.time.sleep", sleep)
    return now


def test_what_holds_at_once_costs_no_time(clock: list[float]) -> None:
    assert waiting.until(lambda: "there", 0.0, AssertionError) == "there"
    assert clock == [1000.0]


def test_the_answer_that_counts_is_returned_when_it_comes(clock: list[float]) -> None:
    answers = iter([None, "", 0, "there"])
    assert waiting.until(lambda: next(answers), 60.0, AssertionError, poll_s=0.5) == "there"
    assert clock == [1001.5]


def test_pauses_grow_from_the_first_to_the_usual_one(clock: list[float]) -> None:
    """Asked after 0, 1, 3, 7, 12 and 17 s, with a first pause of 1 s and a usual one of 5 s."""
    asked_s: list[float] = []

    def there() -> bool:
        asked_s.append(clock[0] - 1000.0)
        return len(asked_s) == 6

    assert waiting.last_answer(there, 60.0, poll_s=5.0, first_s=1.0)
    assert asked_s == [0.0, 1.0, 3.0, 7.0, 12.0, 17.0]


def test_a_first_pause_is_never_longer_than_the_usual_one(clock: list[float]) -> None:
    answers = iter([False, True])
    assert waiting.last_answer(lambda: next(answers), 60.0, poll_s=0.5, first_s=9.0)
    assert clock == [1000.5]


def test_at_the_limit_it_is_asked_once_more_and_then_the_error_is_made() -> None:
    """With a poll of 1 s and a limit of 2 s: at 0, 1, 2 s, and at 3 s, when the limit has passed."""
    asked = itertools.count(1)
    seen: list[int] = []
    with pytest.raises(LookupError, match="asked 4 times"):
        waiting.until(
            lambda: seen.append(next(asked)),
            2.0,
            lambda: LookupError(f"asked {len(seen)} times"),
            poll_s=1.0,
        )


def test_without_an_error_the_last_answer_tells() -> None:
    assert waiting.last_answer(list, 1.0) == []


def test_an_error_of_the_question_ends_the_wait(clock: list[float]) -> None:
    def broken() -> bool:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        waiting.until(broken, 60.0, AssertionError)
    assert clock == [1000.0]
