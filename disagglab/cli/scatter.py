"""``disagglab scatter``: NIXL reads of many shapes on a lab's nodes, without servers."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from disagglab.cli import command, words
from disagglab.errors import ConfigError, InvalidRun, LabError, Problem

if TYPE_CHECKING:
    from disagglab.config.schema import Lab
    from disagglab.measure.oracles.nixlprobe import Read
    from disagglab.predict.scattered_reads import ScatterFit

LIMIT_S = 540.0  # of all reads together
MEBIBYTES = {"DRAM": (4, 16), "VRAM": (256, 1024)}  # of a read, unless asked otherwise
PIECES = (1, 128, 512, 4096)
PREFIXES = ("UCX_", "NIXL_")


def add(commands: command.Commands) -> None:
    """Add the command."""
    asked = command.add(
        commands,
        "scatter",
        run,
        "NIXL reads of scattered memory on a lab, without servers",
        "Read memory between two nodes in pieces, and print what bytes and pieces cost.",
        [
            "disagglab scatter --lab embedded --mib 4 --pieces 1,128,512",
            "disagglab scatter --lab two-h200 --env UCX_TLS=tcp,cuda_copy --threads 0 --json plain.json",
        ],
    )
    lab = asked.add_argument("--lab", required=True, help="a lab by its name or path")
    command.complete(lab, words.labs)
    asked.add_argument(
        "--env", action="extend", nargs="+", default=[], metavar="UCX_X=1", help="beside the lab's own"
    )
    asked.add_argument("--threads", type=int, help="of NIXL's UCX backend (the connector's); 0: none")
    asked.add_argument("--mib", help="of a read, with commas between (256,1024 on GPUs, else 4,16)")
    asked.add_argument("--pieces", help="of a read, with commas between (1,128,512,4096)")
    asked.add_argument("--at-once", default="1", help="reads posted together (%(default)s)")
    asked.add_argument(
        "--repeats", type=int, default=9, help="of each, after one that does not count (%(default)s)"
    )
    asked.add_argument("--json", type=Path, metavar="FILE", help="also write every time to a file")


def run(arguments: argparse.Namespace) -> int:
    """Do the reads on the lab's hosts and print what they took."""
    from disagglab.config import labs
    from disagglab.measure.oracles import nixlprobe

    for key, least in (("threads", 0), ("repeats", 1)):
        given = getattr(arguments, key)
        if given is not None and given < least:
            wrong = f"{given} is too few"
            raise ConfigError([Problem("command line", f"--{key}", wrong, f"write --{key} {least} or more")])
    chosen = with_variables(labs.load_lab(arguments.lab), arguments.env)
    sizes = MEBIBYTES[nixlprobe.memory_of(chosen)]
    wanted = reads(
        sizes if arguments.mib is None else whole_numbers(arguments.mib, "mib"),
        PIECES if arguments.pieces is None else whole_numbers(arguments.pieces, "pieces"),
        whole_numbers(arguments.at_once, "at-once"),
    )
    if arguments.json:
        require_writable(arguments.json)
    try:
        found = screen(chosen, wanted, arguments.repeats, arguments.threads)
    except ConfigError:
        raise
    except LabError as error:
        print(error, file=sys.stderr)
        return command.MISSING
    except KeyboardInterrupt:
        print("interrupted; what was started on the hosts has ended", file=sys.stderr)
        return command.INTERRUPTED
    print("\n".join(found.lines()))
    if arguments.json:
        write(arguments.json, found)
    if found.wrong:
        print("\n".join(found.wrong), file=sys.stderr)
    return command.MISSING if found.wrong else 0


@dataclass(frozen=True)
class Screen:
    """What was read on which settings, and the fit where there were shapes enough for one."""

    lab: str
    environment: dict[str, str]
    command: str
    rows: list[dict[str, Any]]
    fit: ScatterFit | None

    @property
    def wrong(self) -> list[str]:
        """What refutes the measurement: bytes that differ, descriptors that were merged."""
        from disagglab.measure.oracles.nixlprobe import Read

        found = []
        for row in self.rows:
            read = Read(row["bytes"], row["pieces"], row["at_once"])
            if not row["equal"]:
                found.append(f"{read}: bytes arrived damaged")
            if set(row["descriptors"]) != {read.pieces * read.at_once}:
                found.append(f"{read}: NIXL used {sorted(set(row['descriptors']))} descriptors")
        return found

    def lines(self) -> list[str]:
        """For the terminal."""
        from disagglab.predict import scattered_reads

        settings = " ".join(f"{key}={value}" for key, value in sorted(self.environment.items()))
        first = self.rows[0]
        head = [f"{self.lab}: {first['memory']}, {first['threads']} threads, {settings or 'no variables'}"]
        tail = [str(self.fit)] if self.fit else []
        return [*head, *scattered_reads.lines(self.rows, self.fit), *tail]

    def as_dict(self) -> dict[str, Any]:
        """For a file; an infinite bandwidth is null."""
        fitted = None
        if self.fit is not None:
            fitted = dataclasses.asdict(self.fit)
            fitted["bytes_per_s"] = None if fitted["bytes_per_s"] == float("inf") else self.fit.bytes_per_s
        return {**dataclasses.asdict(self), "fit": fitted}


def reads(mebibytes: Sequence[int], pieces: Sequence[int], at_once: Sequence[int]) -> list[Read]:
    """Every combination.

    Raises:
        ConfigError: naming those that do not divide.
    """
    from disagglab.measure.oracles.nixlprobe import Read

    found, problems = [], []
    for together, size, count in itertools.product(at_once, mebibytes, pieces):
        try:
            found.append(Read(size * 2**20, count, together))
        except ValueError as error:
            problems.append(
                Problem("command line", "--pieces", str(error), "take powers of two, and whole MiB")
            )
    if problems:
        raise ConfigError(problems)
    return found


def with_variables(lab: Lab, given: Sequence[str]) -> Lab:
    """The lab with further ``NAME=VALUE`` in ``[transport] env``; UCX_TLS among them replaces ``ucx_tls``.

    Raises:
        ConfigError: for what is no variable of UCX or NIXL.
    """
    problems, found = [], {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name.startswith(PREFIXES):
            wrong = f"{text!r:.60} is no variable of UCX or NIXL"
            mend = "write UCX_NAME=VALUE or NIXL_NAME=VALUE"
            problems.append(Problem("command line", "--env", wrong, mend))
        found[name] = value
    if problems:
        raise ConfigError(problems)
    transport = lab.transport.model_copy(update={"env": {**lab.transport.env, **found}})
    return lab.model_copy(update={"transport": transport})


def whole_numbers(text: str, key: str) -> list[int]:
    """``1,16`` as numbers. ``key``: the option without its dashes.

    Raises:
        ConfigError: if it is something else.
    """
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) for part in parts):
        wrong = f"{text!r:.60} is no list of whole numbers above 0"
        raise ConfigError([Problem("command line", f"--{key}", wrong, f"write --{key} 1,16")])
    return [int(part) for part in parts]


def screen(lab: Lab, wanted: Sequence[Read], repeats: int, threads: int | None) -> Screen:
    """Do the reads on the lab's hosts; end and clear everything that was started there.

    Raises:
        LabError: if a host cannot be had, a probe fails, or it takes more than 9 minutes.
    """
    from disagglab.hosts.hosts import Hosts
    from disagglab.measure.oracles import nixlprobe
    from disagglab.predict import scattered_reads
    from disagglab.results.run_folder import new_run_id

    with tempfile.TemporaryDirectory(prefix="disagglab-scatter-") as folder:
        hosts = Hosts(new_run_id(), lab, Path(folder))
        try:
            hosts.open()
            rows, command = nixlprobe.between_nodes(
                hosts, lab, "scatter", wanted, repeats + 1, LIMIT_S, threads
            )
        finally:
            hosts.close()
    if len(rows) != len(wanted):
        raise LabError(f"{len(wanted)} kinds of reads were asked for, {len(rows)} reported; run it again")
    try:
        fitted = scattered_reads.fit(scattered_reads.points(rows))
    except InvalidRun:  # too few shapes were asked for
        fitted = None
    return Screen(lab.name, nixlprobe.environment(lab, lab.decode[0]), command, rows, fitted)


def require_writable(path: Path) -> None:
    """Find out whether :func:`write` will be able to; a file that was not there is not left behind.

    Raises:
        ConfigError: if the file cannot be written.
    """
    there = os.path.lexists(path)
    try:
        path.open("a").close()
    except OSError as error:
        raise _unwritable(error) from error
    if not there:
        path.unlink()


def write(path: Path, found: Screen) -> None:
    """Write a screen as JSON.

    Raises:
        ConfigError: if the file cannot be written.
    """
    try:
        path.write_text(json.dumps(found.as_dict(), indent=1) + "\n")
    except OSError as error:
        raise _unwritable(error) from error


def _unwritable(error: OSError) -> ConfigError:
    mend = "name a file that can be written, in a folder that is there"
    return ConfigError([Problem("command line", "--json", str(error), mend)])
