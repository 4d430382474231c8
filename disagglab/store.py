"""One folder a run: every record is on disk before the next one is made, so a crash loses nothing."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import re
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from disagglab.errors import LabError
from disagglab.ledger import Reading
from disagglab.load import Run
from disagglab.metrics import Snapshot
from disagglab.verdict import Direction, Verdict

REPORTS_FOLDER = Path(__file__).resolve().parent.parent / "reports"
META = "run.json"
TOKEN_PATTERN = re.compile(r"\bhf_[A-Za-z0-9]{20,}\b")
SCANNED_SUFFIXES = {".gz", ".html", ".json", ".jsonl", ".log", ".toml", ".txt", ".svg"}
SCANNED_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Record:
    """Numbers that a test measured: ``values`` are the replicates, all in ``unit``."""

    module: str
    test: str
    name: str
    unit: str
    values: tuple[float, ...]
    arm: str = ""
    what: str = "runs"
    command: str = ""
    note: str = ""


@dataclass(frozen=True)
class Plot:
    """A figure for the report. ``series``: label → (x values, y values). ``style``: points, line or bars.

    ``ticks`` name the x positions 0, 1, … where these are no numbers.
    """

    module: str
    title: str
    x_label: str
    y_label: str
    series: dict[str, tuple[tuple[float, ...], tuple[float, ...]]]
    style: str = "line"
    caption: str = ""
    ticks: tuple[str, ...] = ()


@dataclass(frozen=True)
class VerdictRow:
    """One verdict as the report shows it. ``gate``: pass, fail, or what keeps it from being either.
    ``saturated``: runs of the two arms that fell behind their arrivals.

    ``noise_floor``: half width of the interval between two identical arms, ratio - 1. ``p_adjusted``: of
    the gate's hypothesis, after Holm; None for a pair that no gate asks for.
    """

    workload: str
    metric: str
    unit: str
    candidate: str
    baseline: str
    candidate_value: float
    baseline_value: float
    outcome: str
    effect: float
    low: float
    high: float
    rounds: int
    smallest_detectable: float | None
    gate: str
    reason: str
    noise_floor: float | None = None
    saturated: int = 0
    p_adjusted: float | None = None
    p_sign_flip: float | None = None

    @classmethod
    def of(
        cls,
        verdict: Verdict,
        *,
        workload: str,
        metric: str,
        unit: str,
        candidate: str,
        baseline: str,
        candidate_value: float,
        baseline_value: float,
        gate: str,
        p_adjusted: float | None = None,
        noise_floor: float | None = None,
        saturated: int = 0,
        reason: str | None = None,
    ) -> VerdictRow:
        """The row of a verdict. ``candidate_value``, ``baseline_value``: means of what was compared, in
        ``unit``; ``reason``: the verdict's own if it is None.
        """
        return cls(
            workload=workload,
            metric=metric,
            unit=unit,
            candidate=candidate,
            baseline=baseline,
            candidate_value=candidate_value,
            baseline_value=baseline_value,
            outcome=verdict.outcome,
            effect=verdict.effect,
            low=verdict.low,
            high=verdict.high,
            rounds=verdict.rounds,
            smallest_detectable=verdict.smallest_detectable,
            gate=gate,
            reason=verdict.reason if reason is None else reason,
            noise_floor=noise_floor,
            saturated=saturated,
            p_adjusted=p_adjusted,
            p_sign_flip=verdict.p_sign_flip,
        )


@dataclass(frozen=True)
class FigureRow:
    """One run-level figure of one arm, a value a valid round; what trends over sessions are made of.

    ``definition``: of the workload as it was scaled; figures of two definitions are not compared.
    """

    workload: str
    arm: str
    metric: str
    unit: str
    better: Direction
    values: tuple[float, ...]
    definition: str = ""


def _counters(readings: tuple[Reading, Reading]) -> dict[str, dict[str, dict[str, float]]]:
    """Every sample by moment, server and name, as Prometheus writes it."""

    def named(snapshot: Snapshot) -> dict[str, float]:
        found = {}
        for name, labels, value in snapshot.samples:
            inside = ",".join(f'{key}="{text}"' for key, text in sorted(labels))
            found[f"{name}{{{inside}}}" if inside else name] = value
        return found

    return {
        moment: {server: named(snapshot) for server, snapshot in reading.snapshots.items()}
        for moment, reading in zip(("before", "after"), readings, strict=True)
    }


@dataclass
class Store:
    """The folder of one run.

    ``records.jsonl``, ``plots.jsonl``, ``verdicts.jsonl``, ``figures.jsonl``: appended as they are made.
    ``runs/``: raw per-request results. ``traces/``: what the load engine replayed. ``logs/``: of every
    process. ``run.json``: lab, commands, versions, fingerprint.
    """

    folder: Path
    records: list[Record] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    verdicts: list[VerdictRow] = field(default_factory=list)
    facts: dict[str, dict[str, str]] = field(default_factory=dict)
    commands: dict[str, str] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def create(cls, reports: Path, run_id: str) -> Store:
        """Make the run's folder."""
        folder = reports / run_id
        (folder / "logs").mkdir(parents=True)
        (folder / "runs").mkdir()
        return cls(folder)

    @property
    def logs(self) -> Path:
        """Folder for the logs of started processes."""
        return self.folder / "logs"

    def add(self, item: Record | Plot | VerdictRow | FigureRow) -> None:
        """Keep a record, plot, verdict or figure, on disk at once."""
        match item:
            case Record():
                self.records.append(item)
                name = "records"
            case Plot():
                self.plots.append(item)
                name = "plots"
            case VerdictRow():
                self.verdicts.append(item)
                name = "verdicts"
            case FigureRow():
                name = "figures"
        with open(self.folder / f"{name}.jsonl", "a") as stream:
            stream.write(json.dumps(asdict(item)) + "\n")

    def add_run(self, run: Run) -> None:
        """Keep every request of a run, valid or not, and every counter of its servers before and after.

        The file gets its name when it is whole, so a session that is killed leaves none that is cut off.
        """
        name = f"{run.workload.name}.{run.round:02d}.{run.topology}.{time.time_ns()}"
        raw = dataclasses.asdict(dataclasses.replace(run, readings=None))
        raw["workload"] = run.workload.model_dump()
        del raw["readings"]
        unfinished = self.folder / "runs" / f"{name}.part"
        unfinished.write_text(json.dumps(raw))
        os.replace(unfinished, unfinished.with_name(f"{name}.json"))
        if run.readings is not None:
            path = self.folder / "runs" / f"{name}.metrics.json.gz"
            path.write_bytes(gzip.compress(json.dumps(_counters(run.readings)).encode()))

    def write_meta(self, **values: Any) -> None:
        """Add to ``run.json``."""
        self.meta.update(values)
        text = json.dumps(
            {**self.meta, "facts": self.facts, "commands": self.commands}, indent=1, default=str
        )
        (self.folder / META).write_text(text)

    def point_latest(self) -> None:
        """Let ``reports/latest`` point at this run."""
        link = self.folder.parent / "latest"
        temporary = self.folder.parent / f".latest.{os.getpid()}"
        temporary.symlink_to(self.folder.name)
        if link.is_dir() and not link.is_symlink():
            shutil.rmtree(link)
        os.replace(temporary, link)

    def require_no_secret(self) -> None:
        """Look for tokens in everything the run wrote.

        Raises:
            LabError: naming the files (never the token).
        """
        token = os.environ.get("HF_TOKEN", "")
        leaked = []
        for path in sorted(self.folder.rglob("*")):
            if (
                path.suffix not in SCANNED_SUFFIXES
                or not path.is_file()
                or path.stat().st_size > SCANNED_BYTES
            ):
                continue
            content = path.read_bytes()
            text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode(errors="replace")
            if TOKEN_PATTERN.search(text) or (len(token) >= 8 and token in text):
                leaked.append(str(path))
        if leaked:
            raise LabError(f"a token stands in {', '.join(leaked)}; delete the files and revoke the token")
