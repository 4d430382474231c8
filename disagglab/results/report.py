"""The part of the HTML report that is ours: verdicts, facts, lessons, numbers and plots, as one block of
HTML.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from markdown_it import MarkdownIt

from disagglab import text
from disagglab.config.arms import CODE, SINGLE, SINGLE_AGAIN, Arms
from disagglab.config.schema import Lab
from disagglab.results import fingerprint, plot, seconds, speed
from disagglab.results.gate import NOT_ENFORCED
from disagglab.results.records import Record, Run, VerdictRow
from disagglab.results.run_folder import Store
from disagglab.stats.verdict import NO_SPREAD

TEMPLATES = Path(__file__).parent / "templates"
CSS = TEMPLATES / "report.css"
SIZE_LIMIT_BYTES = 3_000_000


@dataclass
class Claim:
    """One test as the report shows it. ``outcome``: passed, failed, error or skipped; ``duration`` in s."""

    node: str
    claim: str
    outcome: str
    duration: float
    reason: str = ""


@dataclass
class Module:
    """One learning module of a run."""

    name: str
    lesson: str
    tests: list[Claim] = field(default_factory=list)


def lesson_html(readme: Path) -> str:
    """A module's README as HTML; raw HTML in it is escaped."""
    html: str = MarkdownIt("commonmark", {"html": False}).enable("table").render(readme.read_text())
    return html


def template(name: str) -> jinja2.Template:
    """A template of ours, with filters for figures, verdicts, probes and fingerprints."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True
    )
    environment.filters.update(
        number=text.number,
        percent=text.percent,
        floor=floor_text,
        effect=effect_text,
        fixed=fixed_text,
        reach=reach_text,
        speed=speed.text,
        fingerprint=fingerprint.label,
    )
    return environment.get_template(name)


def render(lab: Lab, store: Store, modules: Sequence[Module], invalid: Sequence[Run]) -> str:
    """The block of HTML that opens the report."""
    return template("summary.html").render(
        lab=lab,
        meta=store.meta,
        meta_facts=store.facts,
        commands=store.commands,
        verdicts=store.verdicts,
        not_judged=store.meta.get("not_judged") or [],
        left_out=left_out_lines(store),
        modules=[_module(module, store) for module in modules],
        invalid=invalid,
        seconds=seconds.rows(store.meta.get("seconds") or {}),
    )


def _module(module: Module, store: Store) -> Mapping[str, Any]:
    outcomes = [claim.outcome for claim in module.tests]
    return {
        "name": module.name,
        "lesson": module.lesson,
        "tests": module.tests,
        "passed": outcomes.count("passed"),
        "failed": outcomes.count("failed") + outcomes.count("error"),
        "skipped": outcomes.count("skipped"),
        "records": [_record(record) for record in store.records if record.module == module.name],
        "plots": [
            {"svg": plot.render(figure), "caption": figure.caption}
            for figure in store.plots
            if figure.module == module.name
        ],
    }


def _record(record: Record) -> Mapping[str, Any]:
    return {
        "name": record.name,
        "arm": record.arm,
        "unit": record.unit,
        "what": record.what,
        "command": record.command,
        "note": record.note,
        "n": len(record.values),
        "median": statistics.median(record.values),
        "low": min(record.values),
        "high": max(record.values),
    }


def floor_text(v: VerdictRow) -> str:
    """A noise floor with its note. Files of earlier versions say 0 where no pair showed a spread."""
    if v.noise_floor == 0:
        return f"none: {NO_SPREAD}"
    said = text.margin(v.noise_floor)
    if not v.floor_note:
        return said
    return f"{said}: {v.floor_note}" if v.noise_floor is None else f"{said} ({v.floor_note})"


def effect_text(v: VerdictRow) -> str:
    """The effect and its interval; where so few rounds give none, that."""
    if math.isinf(v.high):
        low = f"{text.percent(v.low)}, no upper limit yet" if v.low > -1 else "no limits yet"
        return f"{text.percent(v.effect)} [{low}]"
    return text.interval(v.effect, v.low, v.high)


def fixed_text(v: VerdictRow) -> str:
    """The interval of a number of rounds that is fixed beforehand."""
    if v.fixed_low is None or v.fixed_high is None or math.isinf(v.fixed_high):
        return "none"
    return f"[{text.percent(v.fixed_low)}, {text.percent(v.fixed_high)}]"


def reach_text(half_width: float | None) -> str:
    """What a plan expects of a gate."""
    return "not known" if half_width is None else text.margin(half_width)


def verdict_cells(v: VerdictRow) -> dict[str, str]:
    """A verdict as text, by column."""
    return {
        "workload": v.workload,
        "metric": v.metric,
        "candidate": f"{v.candidate} {text.number(v.candidate_value)} {v.unit}",
        "baseline": f"{v.baseline} {text.number(v.baseline_value)} {v.unit}",
        "verdict": v.outcome + (f" ({v.saturated} runs saturated)" if v.saturated else ""),
        "effect [95 % CI]": effect_text(v),
        "noise floor": floor_text(v),
        "rounds": str(v.rounds),
        "gate": v.standing,
    }


def not_judged(lab: Lab, arms: Arms) -> list[dict[str, str]]:
    """The gates that lack an arm, as a row of the verdicts each, by column; ``run.json`` keeps them."""
    return [
        {
            "workload": gate.workload,
            "metric": gate.figure,
            "candidate": gate.candidate,
            "baseline": gate.baseline or "",
            "verdict": "not judged",
            "gate": f"{CODE}: {', '.join(arms.lacking(gate))}{'' if gate.enforce else NOT_ENFORCED}",
        }
        for gate in arms.not_judged(lab)
    ]


def left_out_lines(store: Store) -> list[str]:
    """What the verdicts lack because arms were left out; nothing where none was."""
    left_out = store.meta.get("arms_left_out") or []
    lines = [f"left out by --arm or --without: {', '.join(left_out)}"] if left_out else []
    if store.meta.get("not_judged"):
        lines.append(f"gates that were not judged for lack of an arm: {len(store.meta['not_judged'])}")
    if SINGLE_AGAIN in left_out:
        lines.append(f"the A/A floor of this session is not known: it is {SINGLE} against {SINGLE_AGAIN}")
    return lines


VERDICT_COLUMNS = (
    *("workload", "metric", "candidate", "baseline", "verdict", "effect [95 % CI]", "noise floor"),
    *("rounds", "gate"),
)


def verdict_lines(store: Store) -> list[str]:
    """The verdicts as a plain text table for the terminal."""
    cells = [*map(verdict_cells, store.verdicts), *(store.meta.get("not_judged") or [])]
    rows = [[row.get(name, "-") for name in VERDICT_COLUMNS] for row in cells]
    return [*text.table([VERDICT_COLUMNS, *rows]), *left_out_lines(store)]
