"""A search for good settings in words and tables, for terminal, report and lab file."""

from __future__ import annotations

from collections.abc import Iterator

from disagglab import text
from disagglab.results.objective import Score
from disagglab.results.search_record import Gain, Outcome, Search
from disagglab.stats.verdict import judge

MARGIN = 0.05  # of the interval of p99 ITL; no verdict hangs on it
NO_FIGURE = "-"


def lines(search: Search) -> list[str]:
    """The whole result: what was picked, what each kind was given, who fell out and why."""
    found = [
        f"tuning on {search.workload}: TTFT <= {search.slo_ttft_s:g} s, TPOT <= {search.slo_tpot_s:g} s;"
        f" {search.starts} starts of servers in all",
        *outcome_lines(search),
        *effort_lines(search),
        *(f"fewer trials: {one}" for one in search.shortfalls()),
    ]
    return found + [f"out: {one}" for one in outs(search)]


def outcome_lines(search: Search) -> list[str]:
    """What each kind came to, one line each."""
    return [outcome_line(one) for one in search.outcomes]


def outcome_line(one: Outcome) -> str:
    """One kind: the pick, the gain that the search found, the one that was confirmed."""
    if one.pick is None:
        return f"{one.kind}: {one.why}"
    parts = [f"{one.kind}: {one.pick.words} ({one.why})"]
    if one.winner is not None and one.winner != one.pick:
        parts.append(f"winner of the search: {one.winner.words}")
    for name, gain in (("found", one.found), ("confirmed", one.confirmed)):
        if gain is not None:
            parts.append(f"{name}: {gain_words(gain)}")
    return "; ".join(parts)


def gain_words(gain: Gain) -> str:
    """The winner against the lab's own setting: good requests, and p99 ITL with its 95 % interval."""
    own, winner = gain.own, gain.winner
    words = [f"{_good(winner)} good requests against {_good(own)}"]
    pairs = gain.itl_pairs
    if len(pairs) > 1:
        verdict = judge(pairs, "lower", MARGIN)
        words.append(f"p99 ITL {text.interval(verdict.effect, verdict.low, verdict.high)}, {len(pairs)} runs")
    elif gain.itl_p99 is not None:
        words.append(f"p99 ITL {text.percent(gain.itl_p99)}, one run")
    return ", ".join(words)


def expects(one: Outcome) -> str:
    """What a tuned way is expected to do, before it is measured in a comparison."""
    if one.confirmed is None:
        return f"not known: {one.why}"
    return f"as on fresh prompts, against the lab's own setting: {gain_words(one.confirmed)}"


def effort_lines(search: Search) -> list[str]:
    """What each kind was given, without the confirmation."""
    head = ("kind", "settings", "trials", "valid runs", "starts", "s of runs")
    rows = [
        (one.kind, str(one.settings), str(one.trials), str(one.runs), str(one.starts), f"{one.run_s:.0f}")
        for one in search.efforts
    ]
    return text.table([head, *rows], right={1, 2, 3, 4, 5})


def outs(search: Search) -> Iterator[str]:
    """Candidates that gave no valid run, and why."""
    for trial in search.trials:
        if trial.seen is None:
            yield f"{trial.candidate.words} ({trial.rung}): {trial.why_out}"


def _good(one: Score) -> str:
    return f"{one.good} of {one.sent}"
