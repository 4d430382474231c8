"""Figures of docs/explanation/sequential.md, by simulation: how often rules err, and how soon they decide.

    python docs/sequential.py            simulates (20 s), writes data, picture and page
    python docs/sequential.py --tables   the page alone, of its template and the data that are there

The data are docs/explanation/sequential.json; ``<!-- NAME -->`` in the template stands for a table or figure.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from disagglab.paths import ROOT
from disagglab.results import plot
from disagglab.results.records import Plot
from disagglab.stats import operating, sequential
from disagglab.stats.operating import Boundary, Looks
from disagglab.stats.rule import multiplier

FOLDER = ROOT / "docs" / "explanation"
DATA, TEMPLATE, PAGE = (FOLDER / f"sequential.{ending}" for ending in ("json", "md.in", "md"))
PICTURE = ROOT / "docs" / "images" / "sequential.svg"
COMMAND = "python docs/sequential.py"
MARKER = re.compile(r"<!-- ([a-z ]+) -->")

SEED = 20_260_101
SESSIONS = 20_000
CALIBRATING = 100_000  # sessions of which the spending boundary is made; its first looks lie far out
ALPHA = 0.05
FIRST_OF_FIVE = 0.01  # Holm's first step of five gates
CUT = 0.02  # level at which the spending rule with wider errors holds 5 % where rounds hang together
ROUNDS = 20  # of the false alarms; the spending rule has to fix it beforehand
SHOWN = (12, ROUNDS)
MOST_ROUNDS = 60  # looked ahead for a decision
EFFECTS = (0.75, 1.0, 1.5, 2.0, 3.0, 5.0)  # in standard deviations of a log-ratio
MARGINS = (1.0, 1.5, 2.0, 3.0)
SHARES = (0.5, 0.9)
WIDTHS = (3, 4, 5, 6, 8, 10, 12, 16, 20, 40)
TENTH = math.log(1.1) / (math.sqrt(2) * 0.03)  # +10 %, where each run has a noise of 3 %
TENTH_ROUNDS = 10
NOISES = {
    "normal": "normal",
    "heavy tails": "Student's t, 3 degrees of freedom",
    "rounds that hang together": "each round correlated 0.3 with the one before",
    "rounds that hang together, random order": "the same; a coin says who is first",
    "runs that hang together, mirrored": "each run correlated 0.3; two arms, mirrored order",
    "runs that hang together, four arms mirrored": "the same; first and last of four arms",
    "runs that hang together, random order": "the same; two arms, random order",
    "drift, mirrored": "drift of 10 deviations of a run, mirrored order",
    "drift, random order": "the same, random order",
    "random walk, mirrored": "random walk, steps of 0.5 deviations of a run, mirrored order",
    "random walk, random order": "the same, random order",
    "rounds that hang together more": "each round correlated 0.5 with the one before",
    "skewed": "exponential: skewed to one side",
}
RULES = {
    "one look": "t, one look",
    "t": "t after every round",
    "spending": "spending, cap 20",
    "spending cut": "spending, cap 20, cut",
    "any time": "any time",
    "drawn": "any time, order drawn",
}


def boundaries(alpha: float) -> dict[str, Boundary]:
    """The rules that are compared, for ``ROUNDS`` looks."""
    normal = operating.simulate("normal", CALIBRATING, ROUNDS, SEED)
    cut = operating.spending(ROUNDS, CUT / ALPHA * alpha, normal)
    return {
        "t": operating.repeated_t(ROUNDS, alpha),
        "spending": operating.spending(ROUNDS, alpha, normal),
        "spending cut": dataclasses.replace(cut, inflated=True),
        "any time": operating.any_time(ROUNDS, alpha),
        "drawn": operating.any_time(ROUNDS, alpha, order_drawn=True),
    }


def first_rounds(looks: Looks, rounds: int) -> Looks:
    """The looks of the first rounds."""
    return Looks(looks.mean[:, :rounds], looks.error[:, :rounds], looks.inflation[:, :rounds])


def one_look(looks: Looks, alpha: float, effect: float, margin: float | None = None) -> list[float]:
    """Share that is decided at each round, had the number of rounds been fixed at that."""
    found = []
    for rounds in range(1, looks.mean.shape[1] + 1):
        once = operating.repeated_t(rounds, alpha, first=rounds) if rounds > 1 else Boundary((math.inf,))
        seen = first_rounds(looks, rounds)
        by = (
            operating.excluded_by(seen, once, effect)
            if margin is None
            else operating.equivalent_by(seen, once, margin)
        )
        found.append(float(by[-1]))
    return found


def until(shares: Any) -> list[int | None]:
    """Rounds after which half, and nine tenths, have decided."""
    return [operating.rounds_until(np.asarray(shares), share) for share in SHARES]


def simulated() -> dict[str, Any]:
    """All figures, as the data file has them. Shares are shares of sessions."""
    rules = boundaries(ALPHA)
    alarms: dict[str, dict[str, list[float]]] = {}
    for number, noise in enumerate(NOISES):
        looks = operating.simulate(noise, SESSIONS, ROUNDS, SEED + 1 + number)
        alarms[noise] = {
            name: [round(float(share), 5) for share in operating.excluded_by(looks, rule)]
            for name, rule in rules.items()
        } | {"one look": [round(share, 5) for share in one_look(looks, ALPHA, 0.0)]}
    normal = operating.simulate("normal", SESSIONS, MOST_ROUNDS, SEED)
    ahead = {alpha: operating.any_time(MOST_ROUNDS, alpha) for alpha in (ALPHA, FIRST_OF_FIVE)}
    drawn = {
        alpha: operating.any_time(MOST_ROUNDS, alpha, order_drawn=True) for alpha in (ALPHA, FIRST_OF_FIVE)
    }
    widths = {
        str(n): {
            "t": multiplier(n, ALPHA, "fixed-n"),
            "any time": _finite(multiplier(n, ALPHA, "any time")),
            "first of five": _finite(multiplier(n, FIRST_OF_FIVE, "any time")),
            "inflation": round(float(normal.inflation[:, n - 1].mean()), 4),
        }
        for n in WIDTHS
    }
    capped = first_rounds(normal, ROUNDS)
    decided = {
        str(effect): {
            "fixed": until(one_look(normal, ALPHA, effect)),
            "any time": until(operating.excluded_by(normal, ahead[ALPHA], effect)),
            "drawn": until(operating.excluded_by(normal, drawn[ALPHA], effect)),
            "drawn, first of five": until(operating.excluded_by(normal, drawn[FIRST_OF_FIVE], effect)),
            "fixed, first of five": until(one_look(normal, FIRST_OF_FIVE, effect)),
            "any time, first of five": until(operating.excluded_by(normal, ahead[FIRST_OF_FIVE], effect)),
            "spending cut": until(operating.excluded_by(capped, rules["spending cut"], effect)),
        }
        for effect in EFFECTS
    }
    equivalent = {
        str(margin): {
            "fixed": until(one_look(normal, ALPHA, 0.0, margin)),
            "any time": until(operating.equivalent_by(normal, ahead[ALPHA], margin)),
            "drawn": until(operating.equivalent_by(normal, drawn[ALPHA], margin)),
        }
        for margin in MARGINS
    }
    tenth = operating.excluded_by(normal, drawn[ALPHA], TENTH)[TENTH_ROUNDS - 1]
    small = {
        name: round(float(operating.excluded_by(capped, rules[name], 1.0)[-1]), 4)
        for name in ("spending cut", "drawn", "any time")
    }
    return {
        "made_by": COMMAND,
        "seed": SEED,
        "sessions": SESSIONS,
        "g": sequential.G,
        "shortfall": sequential.SHORTFALL,
        "most_autocorrelation": sequential.MOST_AUTOCORRELATION,
        "alpha": ALPHA,
        "false_alarms_by_round": alarms,
        "multipliers": widths,
        "rounds_until_half_and_nine_tenths": decided,
        "rounds_until_equivalent": equivalent,
        "found_of_10_percent_in_10_rounds": round(float(tenth), 4),
        "found_of_one_deviation_in_20_rounds": small,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines of a table."""
    yield f"| {' | '.join(head)} |"
    yield f"| {' | '.join('---' for _ in head)} |"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def percent(share: float) -> str:
    """A share of sessions as the page says it."""
    return f"{100 * share:.1f} %"


def alarm_table(data: dict[str, Any]) -> Iterator[str]:
    """False alarms of every rule on every kind of noise, by 12 and by 20 rounds."""
    alarms = data["false_alarms_by_round"]
    rows = [
        [what, *(" / ".join(percent(alarms[noise][rule][n - 1]) for n in SHOWN) for rule in RULES)]
        for noise, what in NOISES.items()
    ]
    return table(["noise", *RULES.values()], rows)


def width_table(data: dict[str, Any]) -> Iterator[str]:
    """Half widths in standard errors, and how much wider the interval is."""

    def shown(value: float | None) -> str:
        return "none" if value is None else f"{value:.2f}"

    rows = []
    for n, one in data["multipliers"].items():
        wider = one["any time"] and one["any time"] / one["t"]
        with_errors = wider and wider * one["inflation"]
        values = (one["t"], one["any time"], wider, with_errors, one["first of five"])
        rows.append([n, *map(shown, values)])
    head = ["rounds", "t(0.975, n-1)", "b(n), 5 %", "wider", "with the wider errors", "b(n), 1 %"]
    return table(head, rows)


def _rounds(found: Sequence[int | None], most: int = MOST_ROUNDS) -> str:
    return " / ".join(f"> {most}" if one is None else str(one) for one in found)


def decision_table(data: dict[str, Any]) -> Iterator[str]:
    """Rounds until a difference is found."""
    rows = [
        [
            f"{float(effect):g}",
            _rounds(one["fixed"]),
            _rounds(one["drawn"]),
            _rounds(one["any time"]),
            _rounds(one["spending cut"], ROUNDS),
            _rounds(one["fixed, first of five"]),
            _rounds(one["drawn, first of five"]),
            _rounds(one["any time, first of five"]),
        ]
        for effect, one in data["rounds_until_half_and_nine_tenths"].items()
    ]
    head = ["effect", "fixed n", "order drawn", "any time", "spending, cap 20, cut"]
    head += ["fixed n, 1 %", "order drawn, 1 %", "any time, 1 %"]
    return table(head, rows)


def equivalence_table(data: dict[str, Any]) -> Iterator[str]:
    """Rounds until two equal arms are found equivalent."""
    rows = [
        [f"{float(margin):g}", *(_rounds(one[rule]) for rule in ("fixed", "drawn", "any time"))]
        for margin, one in data["rounds_until_equivalent"].items()
    ]
    return table(["margin", "fixed n", "order drawn", "any time"], rows)


def tenth_figure(data: dict[str, Any]) -> Iterator[str]:
    """Share of sessions that find +10 % within 10 rounds."""
    yield f"{100 * data['found_of_10_percent_in_10_rounds']:.0f} %"


def small_figures(data: dict[str, Any]) -> Iterator[str]:
    """Shares of sessions that find one deviation within 20 rounds, by two rules."""
    found = data["found_of_one_deviation_in_20_rounds"]
    shares = (found[name] for name in ("spending cut", "drawn", "any time"))
    yield "{:.0f} %, {:.0f} % and {:.0f} %".format(*(100 * share for share in shares))


PARTS = {
    "false alarms": alarm_table,
    "widths": width_table,
    "decisions": decision_table,
    "equivalence": equivalence_table,
    "tenth": tenth_figure,
    "one deviation": small_figures,
}


def page(data: dict[str, Any], template: str) -> str:
    """The page of its template and the data.

    Raises:
        KeyError: if the template names a part that there is not.
    """
    note = f"<!-- Made by {COMMAND} from {TEMPLATE.name} and {DATA.name}; edit the first. -->\n\n"
    return note + MARKER.sub(lambda match: "\n".join(PARTS[match[1]](data)), template)


def picture(data: dict[str, Any]) -> str:
    """False alarms by the number of rounds, as SVG."""
    alarms = data["false_alarms_by_round"]
    rounds = tuple(range(2, ROUNDS + 1))
    places = tuple(float(place) for place in range(len(rounds)))
    together = "rounds that hang together"
    lines = [
        ("t after every round", "normal", "t"),
        ("t, rounds correlated 0.3", together, "t"),
        ("spending, rounds correlated 0.3", together, "spending"),
        ("any time", "normal", "any time"),
        ("any time, rounds correlated 0.3", together, "any time"),
    ]
    series = {
        label: (places, tuple(100 * share for share in alarms[noise][rule][1:]))
        for label, noise, rule in lines
    }
    title = "False alarms of identical arms, looked at after every round"
    axes = ("rounds so far", "sessions with a false alarm, %")
    level = {"5 %": ((places[0], places[-1]), (5.0, 5.0))}
    return plot.render(Plot("", title, *axes, series | level, "line", ticks=tuple(map(str, rounds))))


def main(argv: Sequence[str] | None = None) -> int:
    """Simulate, and write data, picture and page."""
    asked = argparse.ArgumentParser(prog=COMMAND, description="Figures of docs/explanation/sequential.md.")
    asked.add_argument("--tables", action="store_true", help="simulate nothing; write the page alone")
    if not asked.parse_args(argv).tables:
        data = simulated()
        DATA.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        PICTURE.write_text(picture(data), encoding="utf-8")
    text = page(json.loads(DATA.read_text(encoding="utf-8")), TEMPLATE.read_text(encoding="utf-8"))
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
