"""A search in words: picks with both gains, effort, and what fell out."""

from __future__ import annotations

from disagglab.results import search_words
from disagglab.results.search_record import Gain
from selftest.results.test_search_record import PAIRS, mixed


def test_a_gain_in_words() -> None:
    """9 of 12 good requests against 6, p99 ITL half in both pairs."""
    words = search_words.gain_words(Gain(PAIRS))
    assert words == "9 of 12 good requests against 6 of 12, p99 ITL -50.0 % [-50.0 %, -50.0 %], 2 runs"
    one = search_words.gain_words(Gain(PAIRS[:1]))
    assert one == "4 of 6 good requests against 2 of 6, p99 ITL -50.0 %, one run"


def test_words_tell_picks_effort_and_what_fell_out() -> None:
    lines = search_words.lines(mixed())
    text = "\n".join(lines)
    assert "TTFT <= 1 s, TPOT <= 10 s" in lines[0]
    assert lines[1] == "single: the lab's own (the lab's own setting won the search)"
    assert lines[2].startswith(
        "replicated: max-num-seqs 3 (the winner is not behind on fresh prompts); found: "
    )
    assert "; confirmed: 12 of 12 good requests against 12 of 12, p99 ITL -10.0 %" in lines[2]
    assert "out: single: max-num-seqs 1 (rung 0): did not start: out of memory" in lines
    assert "out: single: max-num-seqs 2 (rung 0): invalid run: the client was late" in lines
    assert "kind           settings  trials  valid runs  starts  s of runs" in text
