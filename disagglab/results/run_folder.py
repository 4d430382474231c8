"""One folder a run: every record is on disk before the next one is made, so a crash loses nothing."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import re
import secrets
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from disagglab.errors import LabError
from disagglab.results import open_loop
from disagglab.results.records import FigureRow, Plot, Reading, Record, Run, Snapshot, VerdictRow

META = "run.json"
TOKEN_PATTERN = re.compile(r"\bhf_[A-Za-z0-9]{20,}\b")
SCANNED_SUFFIXES = {".gz", ".html", ".json", ".jsonl", ".log", ".toml", ".txt", ".svg"}
SCANNED_BYTES = 64 * 2**20


def new_run_id() -> str:
    """An id that sorts by time (UTC) and that no other run has."""
    return f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(2)}"


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
        row = item.as_json() if isinstance(item, VerdictRow) else asdict(item)
        with open(self.folder / f"{name}.jsonl", "a") as stream:
            stream.write(json.dumps(row) + "\n")

    def add_run(self, run: Run) -> None:
        """Keep every request of a run, valid or not, and every counter of its servers before and after. Of an
        open loop also what its queue says (``open_loop``), which is not read back.

        The file gets its name when it is whole, so a session that is killed leaves none that is cut off.
        """
        name = f"{run.workload.name}.{run.round:02d}.{run.topology}.{time.time_ns()}"
        raw = dataclasses.asdict(dataclasses.replace(run, readings=None))
        raw["workload"] = run.workload.model_dump()
        del raw["readings"]
        queue = open_loop.of(run)
        if queue is not None:
            raw["open_loop"] = queue.as_json()
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
