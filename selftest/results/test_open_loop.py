"""Whether a topology keeps up: made-up runs that can be worked out by hand, and queues whose load is known.

Oracle of the queues: their load, arrivals x time of service. Below 1 they keep up in the long run, above it
they cannot. How often a run of so many arrivals is called what is held here and in docs/reference/metrics.md.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from disagglab.config.arrivals import MAIN, STEADY
from disagglab.config.workload import Workload
from disagglab.results import open_loop
from disagglab.results.open_loop import KeepsUp, OpenLoop, kept_rate, saturated
from disagglab.results.records import Run
from disagglab.results.resume import read_run
from disagglab.results.run_folder import Store
from disagglab.stats.steady import Balance

CLOSED = Workload(name="w", prompt_tokens=10, output_tokens=2, concurrency=1, requests=1)
RUNS = 200
OF_CHANCE = 1.96 * math.sqrt(0.05 * 0.95 / RUNS)  # what 200 runs may show above a rate of 5 %


def run(start_s: Sequence[float], e2e_s: Sequence[float], streams: Sequence[str] = ()) -> Run:
    """An open loop of these requests; the first token after half of the time."""
    n = len(start_s)
    return Run(
        "single", CLOSED.at_rate(1.0), 1, 0, "vllm bench serve", 100.0, None,
        ttft_s=tuple(time / 2 for time in e2e_s),
        e2e_s=tuple(e2e_s),
        itl_s=tuple((time / 2,) for time in e2e_s),
        prompt_tokens=(10,) * n,
        output_tokens=(2,) * n,
        start_s=tuple(start_s),
        streams=tuple(streams) or (MAIN,) * n,
    )  # fmt: skip


def queue(start_s: Sequence[float], e2e_s: Sequence[float]) -> OpenLoop:
    """What an open loop of these requests says."""
    found = open_loop.of(run(start_s, e2e_s))
    assert found is not None
    return found


def every_second(count: int) -> list[float]:
    return [float(i) for i in range(count)]


def test_the_kept_rate_by_hand() -> None:
    """Equally long answers keep the rate; a last one that comes 2.5 s after its kind does not."""
    assert kept_rate(run(every_second(4), [0.8] * 4)) == pytest.approx(1.0)
    late = run(every_second(4), [0.5, 0.5, 1.5, 3.5])
    assert kept_rate(late) == pytest.approx(3.0 / (6.5 - 1.0))
    closed = dataclasses.replace(late, workload=CLOSED)
    assert kept_rate(closed) is None, "a closed loop offers no rate"
    assert open_loop.of(closed) is None


def test_requests_of_a_burst_have_no_kept_rate() -> None:
    """They arrive for less than three answers' time; what counts is the first answers' where these are
    shorter, because a heavy overload makes all later ones long.
    """
    assert kept_rate(run(every_second(4), [1.01] * 4)) is None
    assert kept_rate(run(every_second(12), [0.5 + 2 * i for i in range(12)])) == pytest.approx(
        11 / (11 + 22.5 - 11.5)
    )


def test_a_queue_that_grows_is_saturation() -> None:
    """Every answer takes a second longer than the one before. Half as many requests show the same, a dozen
    are the least.
    """
    for count in (24, 12):
        found = queue(every_second(count), [1.0 + i for i in range(count)])
        assert found.keeps_up is KeepsUp.NO
        assert not found.in_steady_state
        assert saturated(run(every_second(count), [1.0 + i for i in range(count)]))
    found = queue(every_second(11), [1.0 + i for i in range(11)])
    assert found.keeps_up is KeepsUp.TOO_SHORT
    assert found.growth_p is None


def test_a_late_last_answer_is_no_growth() -> None:
    """One answer of 30 s behind equal ones: the kept rate falls, no queue grows, and L = lambda W holds."""
    found = queue(every_second(24), [0.8] * 23 + [30.0])
    assert found.kept_rate is not None
    assert found.kept_rate < 0.95
    assert found.growth_p == pytest.approx(1.0)
    assert found.in_steady_state
    assert found.keeps_up is KeepsUp.YES


def test_growth_at_the_kept_rate_is_too_short_to_tell() -> None:
    """More and more requests are under way, and all of them are answered together at the end: servers that
    share their steps do that in overload. No answer is late by the median, but L = lambda W does not hold.
    """
    found = queue(every_second(24), [5.0] * 6 + [40.0 - i for i in range(6, 24)])
    assert found.kept_rate is not None
    assert found.kept_rate >= 0.95
    assert found.growth_p is not None
    assert found.growth_p <= 0.01
    assert found.keeps_up is KeepsUp.TOO_SHORT


def test_two_signs_make_saturation_and_little_decides_on_one() -> None:
    """Every combination of what is seen."""

    def of(kept: float | None, p: float | None, ratio: float) -> KeepsUp:
        return OpenLoop(24, None, Balance(1.0, ratio, 1.0, 1.0), kept, p, None).keeps_up

    assert of(0.94, 0.01, 1.0) is KeepsUp.NO
    assert of(0.95, 0.011, 0.5) is KeepsUp.YES
    assert {of(0.94, 0.02, 0.91), of(0.96, 0.01, 1.09)} == {KeepsUp.YES}
    assert {of(0.94, 0.02, 0.89), of(0.96, 0.01, 1.11)} == {KeepsUp.TOO_SHORT}
    assert {of(None, 0.01, 1.0), of(0.5, None, 1.0)} == {KeepsUp.TOO_SHORT}


def test_steady_requests_are_no_arrivals() -> None:
    """They are all sent at the beginning; of the others alone the same is said as without them."""
    starts, times = [0.0, 0.0, *every_second(12)], [60.0, 60.0, *[0.5] * 12]
    mixed = open_loop.of(run(starts, times, [STEADY, STEADY, *[MAIN] * 12]))
    assert mixed == queue(every_second(12), [0.5] * 12)


def test_the_order_of_the_lists_does_not_matter() -> None:
    times = [0.5 + 0.1 * (i % 4) for i in range(60)]
    there = queue(every_second(60), times)
    assert there == queue(every_second(60)[::-1], times[::-1])


def test_a_warm_up_is_left_out_of_balance_and_ttft() -> None:
    """Ten slow answers, then fifty equal ones of 0.8 s."""
    found = queue(every_second(60), [3.0] * 10 + [0.8] * 50)
    assert found.left_out == 10
    assert found.ttft_p50_s == pytest.approx(0.4)
    assert found.balance is not None
    assert found.balance.window_s == pytest.approx(49.0)
    assert found.balance.e2e_s == pytest.approx(0.8)
    assert "warm-up 10 requests" in found.said
    short = queue(every_second(24), [3.0] * 10 + [0.8] * 14)
    assert (short.left_out, short.ttft_p50_s) == (None, None)
    assert "too short to find a warm-up" in short.said


def test_a_runs_file_says_what_its_queue_says(tmp_path: Path) -> None:
    """Requests left out, L, lambda W and their ratio; what is read back is the run."""
    store = Store.create(tmp_path, "run")
    kept = run(every_second(60), [3.0] * 10 + [0.8] * 50)
    store.add_run(kept)
    store.add_run(dataclasses.replace(kept, workload=CLOSED))
    first, second = (json.loads(path.read_text()) for path in sorted((store.folder / "runs").glob("*.json")))
    assert first["open_loop"]["left_out"] == 10
    assert first["open_loop"]["keeps_up"] == "keeps up"
    little = first["open_loop"]
    assert little["in_system"] / little["rate_x_e2e"] == pytest.approx(little["ratio"])
    assert little["ratio"] == pytest.approx(1.0, abs=0.1)
    assert "open_loop" not in second, "a closed loop has no queue of its own"
    (path,) = (p for p in (store.folder / "runs").glob("*.json") if "open_loop" in p.read_text())
    assert read_run(path) == kept


Service = Callable[[random.Random, list[float]], list[float]]


def one_by_one(times: Callable[[random.Random], float]) -> Service:
    """A server that takes one request after another; E2E of each."""

    def serve(source: random.Random, start_s: list[float]) -> list[float]:
        free, found = 0.0, []
        for start in start_s:
            free = max(free, start) + times(source)
            found.append(free - start)
        return found

    return serve


def together(_: random.Random, start_s: list[float]) -> list[float]:
    """An engine: 16 steps a request, each of (1/3 + sequences / 6) / 16 s; eight sequences at most."""
    wanted, ends, now, most = [16] * len(start_s), [0.0] * len(start_s), 0.0, 8
    while any(wanted):
        here = [i for i, start in enumerate(start_s) if wanted[i] and start <= now][:most]
        if not here:
            now = next(start for i, start in enumerate(start_s) if wanted[i])
            continue
        now += (1 / 3 + len(here) / 6) / 16
        for i in here:
            wanted[i] -= 1
            ends[i] = now
    return [end - start for end, start in zip(ends, start_s, strict=True)]


# service, and how many requests it serves in a second at most
EQUAL = (one_by_one(lambda _: 1.0), 1.0)
EXPONENTIAL = (one_by_one(lambda source: source.expovariate(1.0)), 1.0)
BATCHED = (together, 8 / (1 / 3 + 8 / 6))
KINDS = {"equal": EQUAL, "exponential": EXPONENTIAL, "batched": BATCHED}


def called(kind: str, count: int, load: float) -> Counter[KeepsUp]:
    """What RUNS runs of a queue are called; arrivals are drawn as the load draws them."""
    serve, most_per_s = KINDS[kind]
    source, found = random.Random(f"{kind} {count} {load}"), Counter[KeepsUp]()
    for _ in range(RUNS):
        window = count / (load * most_per_s)
        start_s = sorted(window * source.random() for _ in range(count))
        found[queue(start_s, serve(source, start_s)).keeps_up] += 1
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [24, 50])
@pytest.mark.parametrize("load", [0.5, 0.7])
def test_a_queue_below_its_capacity_is_rarely_called_saturated(kind: str, count: int, load: float) -> None:
    """At most one time in twenty."""
    found = called(kind, count, load)
    assert found[KeepsUp.NO] / RUNS <= 0.05 + OF_CHANCE, found
    assert found[KeepsUp.YES] / RUNS >= 0.7, found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("load", "most"), [(1.5, 0.15), (2.0, 0.05)])
def test_an_overload_is_rarely_said_to_keep_up(kind: str, load: float, most: float) -> None:
    """A run of 24 arrivals may be too short to tell."""
    found = called(kind, 24, load)
    assert found[KeepsUp.YES] / RUNS <= most, found


@pytest.mark.parametrize(("kind", "least"), [("equal", 0.95), ("exponential", 0.65), ("batched", 0.85)])
def test_an_overload_by_half_is_found(kind: str, least: float) -> None:
    """Of 50 arrivals; those that are not found are too short to tell."""
    found = called(kind, 50, 1.5)
    assert found[KeepsUp.NO] / RUNS >= least, found
