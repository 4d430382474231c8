"""Workloads scaled to a lab, and the traces that are made of them."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from disagglab.config.arrivals import MAIN, STEADY, arrivals, write
from disagglab.config.labs import load_lab
from disagglab.config.workload import CHUNK, Steady, Workload, load_workload
from disagglab.paths import WORKLOADS

OPEN = Workload(name="w", prompt_tokens=200, output_tokens=3, requests=400, rate_per_s=4.0)
STEADY_REQUESTS = Steady(prompt_tokens=10, output_tokens=50, requests=2, lead_s=0.5)


@pytest.mark.parametrize("name", sorted(path.stem for path in WORKLOADS.glob("*.toml")))
@pytest.mark.parametrize("lab", ["embedded", "two-gpus", "spark"])
def test_every_workload_fits_every_lab(name: str, lab: str) -> None:
    """Scaled to a lab, a workload is still whole, and its longest request fits the lab's context."""
    settings = load_lab(lab)
    workload = settings.workload(name)
    assert workload.name == name
    assert workload.tokens <= settings.model.max_model_len
    assert Workload.model_validate(workload.model_dump()) == workload, "scaling keeps the rules of the file"
    full = load_workload(name)
    assert bool(workload.shared_prefix_tokens) == bool(full.shared_prefix_tokens)


def test_a_closed_loop_offers_all_at_once() -> None:
    """Its requests carry no times: the client holds them back by concurrency."""
    requests = arrivals(load_workload("chat"), 1)
    assert {one.arrival_s for one in requests} == {0.0}
    assert {one.stream for one in requests} == {MAIN}


def test_an_open_loop_keeps_its_rate() -> None:
    """400 arrivals in 100 s, irregular as Poisson arrivals are, the same for the same seed."""
    times = [one.arrival_s for one in arrivals(OPEN, 7)]
    assert times == sorted(times)
    assert times == [one.arrival_s for one in arrivals(OPEN, 7)]
    assert times != [one.arrival_s for one in arrivals(OPEN, 8)]
    assert 0 <= times[0] <= times[-1] <= 100
    gaps = [late - early for early, late in itertools.pairwise(times)]
    mean = sum(gaps) / len(gaps)
    spread = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert 0.8 < spread / mean < 1.2, "gaps of a Poisson process spread as much as their mean"


def test_steady_requests_come_first() -> None:
    """They are sent at once; the others arrive after the head start."""
    requests = arrivals(OPEN.model_copy(update={"steady": STEADY_REQUESTS, "requests": 6}), 3)
    assert [one.stream for one in requests] == [STEADY] * 2 + [MAIN] * 6
    assert all(one.arrival_s == 0 for one in requests[:2])
    assert all(0.5 <= one.arrival_s <= 0.5 + 6 / 4.0 for one in requests[2:])


def test_prompts_share_the_prefix_and_nothing_else() -> None:
    """The pieces of a shared prefix are the same in all prompts; all others occur once."""
    workload = OPEN.model_copy(update={"shared_prefix_tokens": 2 * CHUNK, "requests": 5})
    requests = arrivals(workload, 1)
    assert len({one.pieces[:2] for one in requests}) == 1
    rest = [piece for one in requests for piece in one.pieces[2:]]
    assert len(set(rest)) == len(rest) == 5 * 2, "200 tokens are four pieces of 64"


def test_the_file_is_what_the_load_engine_reads(tmp_path: Path) -> None:
    """One object a line with time, lengths and pieces enough for the prompt."""
    path = tmp_path / "traces" / "w.jsonl"
    write(path, arrivals(OPEN, 1))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == OPEN.requests
    assert set(rows[0]) == {"timestamp", "input_length", "output_length", "hash_ids"}
    assert all(len(row["hash_ids"]) * CHUNK >= row["input_length"] for row in rows)


@pytest.mark.parametrize(
    "changes",
    [
        {"concurrency": 2},
        {"rate_per_s": None},
        {"rate_per_s": None, "concurrency": 1, "steady": STEADY_REQUESTS.model_dump()},
        {"shared_prefix_tokens": 100},
        {"shared_prefix_tokens": 256},
        {"rate_shares": [0.5, 0.0]},
    ],
)
def test_contradictions_are_refused(changes: dict[str, object]) -> None:
    """Both loops or none, steady requests in a closed loop, a prefix as long as the prompt, a rate of 0."""
    with pytest.raises(ValidationError):
        Workload.model_validate({**OPEN.model_dump(), **changes})


def test_the_length_of_a_run_is_no_part_of_a_workload() -> None:
    """A plan of trials makes runs of a closed loop shorter; figures of both are of one definition."""
    chat = load_workload("chat")
    short = chat.of_length(16)
    assert len(arrivals(short, 1)) == short.total_requests == 16
    assert short.definition == chat.definition
    assert short.most_under_way == chat.most_under_way == 16
    assert chat.of_length(chat.requests) == chat
    assert chat.model_copy(update={"requests": 16}).definition != chat.definition
    with pytest.raises(ValidationError, match="closed loop"):
        Workload.model_validate(chat.at_rate(1.0).model_dump() | {"length": 3})
