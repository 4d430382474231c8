"""The part of the HTML report that is ours: verdicts, facts, lessons, numbers and plots, as one block of
HTML.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from markdown_it import MarkdownIt

from disagglab.config.schema import Lab
from disagglab.results import plot
from disagglab.results.records import Record, Run, VerdictRow
from disagglab.results.run_folder import Store

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


def number(value: float) -> str:
    """A figure with four significant digits, large ones with separators and no exponent."""
    if value != 0 and abs(value) < 0.001:
        return f"{value:.3g}"
    if abs(value) >= 10_000 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.4g}"


def percent(value: float) -> str:
    """A relative difference as signed percent; an interval without limit reads ``unbounded``."""
    return "unbounded" if value > 1e4 else f"{100 * value:+.1f} %"


def lesson_html(readme: Path) -> str:
    """A module's README as HTML; raw HTML in it is escaped."""
    html: str = MarkdownIt("commonmark", {"html": False}).enable("table").render(readme.read_text())
    return html


def template(name: str) -> jinja2.Template:
    """A template of ours, with the filters ``number`` and ``percent``."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True
    )
    environment.filters.update(number=number, percent=percent)
    return environment.get_template(name)


def render(lab: Lab, store: Store, modules: Sequence[Module], invalid: Sequence[Run]) -> str:
    """The block of HTML that opens the report."""
    return template("summary.html").render(
        lab=lab,
        meta=store.meta,
        meta_facts=store.facts,
        commands=store.commands,
        verdicts=store.verdicts,
        modules=[_module(module, store) for module in modules],
        invalid=invalid,
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


def verdict_cells(v: VerdictRow) -> dict[str, str]:
    """A verdict as text, by column."""
    return {
        "workload": v.workload,
        "metric": v.metric,
        "candidate": f"{v.candidate} {number(v.candidate_value)} {v.unit}",
        "baseline": f"{v.baseline} {number(v.baseline_value)} {v.unit}",
        "verdict": v.outcome + (f" ({v.saturated} runs saturated)" if v.saturated else ""),
        "effect [95 % CI]": f"{percent(v.effect)} [{percent(v.low)}, {percent(v.high)}]",
        "noise floor": "none" if v.noise_floor is None else percent(v.noise_floor).replace("+", "±"),
        "rounds": str(v.rounds),
        "gate": str(v.gate),
    }


VERDICT_COLUMNS = (
    *("workload", "metric", "candidate", "baseline", "verdict", "effect [95 % CI]", "noise floor"),
    *("rounds", "gate"),
)


def verdict_lines(store: Store) -> list[str]:
    """The verdicts as a plain text table for the terminal."""
    cells = [verdict_cells(row) for row in store.verdicts]
    return table_lines([VERDICT_COLUMNS, *([row[name] for name in VERDICT_COLUMNS] for row in cells)])


def table_lines(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of equal length as lines with aligned columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
