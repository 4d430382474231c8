"""A frontier as text: columns by what was measured, the assumption of the bands, what was left out."""

from __future__ import annotations

from dataclasses import replace

from disagglab.results.footprint import Footprint
from disagglab.results.frontier import Frontier
from disagglab.results.frontier_text import COLUMNS, lines, table, twin_lines, variance_lines
from disagglab.results.price import Price
from disagglab.results.standing import Terms
from selftest.results.rated import FOOTPRINTS, MANY, frontier, rated

MADE = frontier(
    {
        "replicated": {1.0: [10, 11, 12], 2.0: [10, 11, 12]},
        "disaggregated": {1.0: [5, 5.6, 6], 2.0: [10, 11.2, 12]},
    },
    MANY,
)


def row(found: Frontier, arm: str) -> dict[str, str]:
    head, *rows = table(found)
    return next(dict(zip(head, cells, strict=True)) for cells in rows if cells[0] == arm)


def test_a_row_by_hand() -> None:
    """220 tokens in 10 s, on two GPUs of which one decodes; no 99th percentile of twenty requests."""
    found = row(replace(MADE, runs=(rated("disaggregated", good=15),)), "disaggregated")
    assert found == dict(
        zip(
            COLUMNS,
            ("disaggregated", "1", "1", "22", "11", "11", "22", "200", "20", "0.5", "-", "0.05", "0 %", "1.5",
             "75 %", "1 of 1", "yes"),
            strict=True,
        )
    )  # fmt: skip


def test_columns_of_cost_and_energy_stand_where_they_are_known() -> None:
    """2 GPUs at 3.6 EUR: 90.9 EUR for a million tokens, 1 EUR for a thousand good requests."""
    run = rated("disaggregated", energy_j={"a": 110.0, "b": 330.0})
    found = row(replace(MADE, runs=(run,), price=Price(3.6, "gpu", "EUR")), "disaggregated")
    assert (found["per 1M tokens"], found["per 1k good requests"]) == ("90.91", "1")
    assert (found["J/token"], found["prefill J/token"], found["decode J/token"]) == ("2", "0.5", "1.5")
    assert table(MADE)[0] == COLUMNS


def test_per_gpu_on_cpus_is_a_dash() -> None:
    cpus = Footprint(2, 0, 0, 0, ("a",), ("b",))
    found = row(Frontier("w", {"disaggregated": cpus}, (rated("disaggregated"),)), "disaggregated")
    assert (found["/GPU"], found["/decode GPU"], found["/node"]) == ("-", "-", "11")


def test_a_column_of_dashes_is_not_printed() -> None:
    cpus = dict.fromkeys(FOOTPRINTS, Footprint(2, 0, 0, 0, ("a",), ("b",)))
    with_gpus, without = ("\n".join(lines(replace(MADE, footprints=one))) for one in (FOOTPRINTS, cpus))
    assert "/decode GPU  prompt" in with_gpus
    assert "/decode GPU  prompt" not in without
    assert "tokens/s  /node  /user" in without
    assert "/GPU: over all" in with_gpus
    assert "/GPU: over all" not in without


def test_all_that_is_said() -> None:
    """The promise, the winner, the notes, the map, and the runs that do not count."""
    said = "\n".join(lines(replace(MADE, left_out=("single at 1/s, round 0: no proof",))))
    assert "good is a request with TTFT <= 1 s, TPOT <= 100 ms" in said
    assert "at 1 requests/s at TTFT <= 1 s, TPOT <= 100 ms: disaggregated, 1.99 times the goodput" in said
    assert "p99 ITL of all requests:\nbetween 1 and 2 requests/s (2 rates): level" in said
    assert "gaps late: share of gaps longer than 100 ms" in said
    assert "energy: not read" in said
    assert "who is ahead, by promise" in said
    assert said.endswith("left out: single at 1/s, round 0: no proof")
    assert "who is ahead, by promise" not in "\n".join(lines(MADE, whole_map=False))


COUNTED = {
    "replicated": {1.0: (18, 16, 17), 2.0: (12, 10, 14)},
    "disaggregated": {1.0: (19, 18, 20), 2.0: (15, 16, 13)},
}


def test_the_assumption_of_the_bands_is_shown() -> None:
    """A pair stands once, with its spread and whether that of all rates is taken. Where all requests are
    good nothing tells of it.
    """
    runs = tuple(
        rated(arm, rate, number, good=good)
        for arm, rates in COUNTED.items()
        for rate, rounds in rates.items()
        for number, good in enumerate(rounds)
    )
    head, columns, only = variance_lines(replace(MADE, runs=runs))
    assert "Bartlett" in head
    assert columns.split("  ")[0] == "way"
    assert only.startswith("replicated  disaggregated")
    assert only.endswith("of all rates together")
    assert variance_lines(MADE)[2].endswith("of each rate alone")
    assert variance_lines(MADE, Terms(own_spread=True))[0].endswith("as asked for")
    once = replace(MADE, runs=tuple(run for run in MADE.runs if run.round == 0))
    assert variance_lines(once)[2].endswith("none: one round")


def with_twin(scale: float) -> Frontier:
    """The replicas and their twin, which takes ``scale`` times as long, give or take 1 %."""
    own = [run for run in MADE.runs if run.arm == "replicated"]
    noise = {0: 1.01, 1: 1.0, 2: 0.99}
    twin = [
        replace(run, arm="replicated-again", duration_s=run.duration_s * scale * noise[run.round])
        for run in own
    ]
    places = {**FOOTPRINTS, "replicated-again": FOOTPRINTS["replicated"]}
    return replace(MADE, footprints=places, runs=(*own, *twin))


def test_twins_tell_whether_turns_are_fair() -> None:
    """Six pairs at two rates; a twin that is a tenth slower is the negative control."""
    (fair,) = twin_lines(with_twin(1.0))
    assert fair.startswith("replicated-again against replicated, goodput of 6 pairs: 1.000 times [0.99")
    assert fair.endswith("no difference is seen")
    (unfair,) = twin_lines(with_twin(1.1))
    assert "0.909 times" in unfair
    assert unfair.endswith("turns do not treat them alike")
    assert twin_lines(MADE) == []
