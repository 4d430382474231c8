"""Finished sessions as files to commit: ``reports/reference/NAME/``, without paths of their hosts."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import socket
import statistics
import textwrap
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from disagglab import text
from disagglab.errors import ConfigError, Problem
from disagglab.paths import REPORTS
from disagglab.results import fingerprint, frontier_file, plot, report, search_record
from disagglab.results.records import Plot, VerdictRow
from disagglab.results.run_folder import META, TOKEN_PATTERN

REFERENCE = REPORTS / "reference"
NAME = re.compile(r"[a-z0-9][a-z0-9.-]*")
RUN_ID = re.compile(r"\b\d{8}-\d{6}-[0-9a-f]{4}\b")
PAGE = "report.html"
LISTS = ("figures", "verdicts", "records")  # .jsonl
TUNING = (
    frontier_file.NAME,
    search_record.FILE,
    "frontier-forecast.json",
    "forecast-score.json",
    "claims.json",
)
SESSION_LIMIT_BYTES = 4_000_000
MOST_SHOWN = 10  # problems of one refusal
FIGURES_TEST = "test_figures_of_every_run_are_recorded"  # its records repeat figures.jsonl

# Where a path may begin: not within another path, a word or a number. In JSON a letter may end an escape.
BEGIN = r"(?:(?<=\\[nrt])|(?<![\w.~$-]))(?:(?<=://)|(?<!/))"
END = r"(?![\w-])"
TOPS = (
    "work",
    "tmp",
    "root",
    "home",
    "mnt",
    "media",
    "srv",
    "scratch",
    "workspace",
    "data",
    "nfs",
    "storage",
)
PRIVATE = re.compile(rf"{BEGIN}/(?:{'|'.join(TOPS)}|Users|var/tmp){END}(?:/[\w.@%+=~-]+)*")
HOME = re.compile(rf"{BEGIN}(/root|/home/[\w.-]+|/Users/[\w.-]+){END}")
FOLDER = r"(/[^\s\"'<>;,()=\\]*?)"
ROOT_BEFORE = (
    r"/reports/\d{8}-\d{6}-[0-9a-f]{4}\b",
    r"/disagglab/results/templates/report\.css",
    r"/tests/\w+/test_\w+\.py",
)
ROUTER = r"/bin/vllm-router\b"
SERVER = r"/bin/python[\d.]* -m vllm\.entrypoints"
NO_NAMES = {"", "local", "localhost", "host", "node"}  # say nothing of a host
FACT = "host name"
DEAD_LINKS = '<a href="logs/">logs</a>, <a href="runs/">per-request results</a>'
NO_LINKS = "logs and per-request results are not kept here"


@dataclass(frozen=True)
class Finished:
    """A session's folder as it was read. ``texts``: file name → content, as it was written."""

    folder: Path
    run_id: str
    meta: Mapping[str, Any]
    texts: Mapping[str, str]
    plots: tuple[Plot, ...]

    @property
    def failed(self) -> list[str]:
        """Tests that failed, with their claim."""
        return [
            f"{claim.get('node')}: {claim.get('claim')}"
            for claims in (self.meta.get("modules") or {}).values()
            for claim in claims
            if claim.get("outcome") in ("failed", "error")
        ]


def make(
    folders: Sequence[Path],
    name: str,
    allow_failures: bool = False,
    replace: Mapping[str, str] | None = None,
    into: Path = REFERENCE,
    notes: Sequence[str] = (),
) -> Path:
    """Write ``NAME/`` and return it: one session lies in it directly, each of several in a folder named by
    its run id; README.md says what they are.

    Args:
        replace: further texts to replace, and by what.
        notes: what a reader has to know of the circumstances, a paragraph each.

    Raises:
        ConfigError: if a session is not finished, or failed without ``allow_failures``; if a path of the host
            or its name would be left; if a session is too large; if NAME exists. Then nothing is written.
    """
    target = into / name
    if not NAME.fullmatch(name):
        wrong = "no name of lower-case letters, digits, dots and hyphens"
        raise ConfigError([Problem(name, "NAME", wrong, "give a name after the folders: two-h200-nvlink")])
    if target.exists():
        raise ConfigError([Problem(str(target), "NAME", "exists", "remove it, or give another name")])
    sessions = sorted((read(folder, allow_failures) for folder in folders), key=lambda one: one.run_id)
    if len({one.run_id for one in sessions}) < len(sessions):
        raise ConfigError([Problem(name, "RUN_FOLDER", "the same session twice", "name it once")])
    made = into / f".{name}.{os.getpid()}"
    try:
        cleaned = []
        for one in sessions:
            folder = made / one.run_id if len(sessions) > 1 else made
            cleaned.append((one, folder, _write(one, folder, replace or {})))
        (made / "README.md").write_text("\n".join(_readme(name, notes, cleaned, made)) + "\n")
        hosts = {host for one in sessions for host in host_names(one.meta)} | {socket.gethostname()}
        problems = list(check(made, hosts - NO_NAMES))[:MOST_SHOWN]
        for one, folder, _ in cleaned:
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            if size > SESSION_LIMIT_BYTES:
                wrong = f"{size:,} B, more than {SESSION_LIMIT_BYTES:,} B"
                problems.append(
                    Problem(str(one.folder), "(all files)", wrong, "take a session of fewer tests")
                )
        if problems:
            raise ConfigError(problems)
        made.rename(target)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return target


def read(folder: Path, allow_failures: bool) -> Finished:
    """A finished session.

    Raises:
        ConfigError: if a file is missing or damaged, the session did not end, or it failed without
            ``allow_failures``.
    """
    folder = folder.resolve()
    mend = "name the folder of a session that ended"
    texts: dict[str, str] = {}
    for name in (META, PAGE, *(f"{each}.jsonl" for each in LISTS), *TUNING, "plots.jsonl"):
        path = folder / name
        if path.is_file():
            texts[name] = path.read_text(encoding="utf-8")
        elif name in (META, PAGE):
            raise ConfigError([Problem(str(path), "(whole file)", "missing", mend)])
    size = len(texts[PAGE].encode())
    if size > report.SIZE_LIMIT_BYTES:
        wrong = f"{size:,} B, more than {report.SIZE_LIMIT_BYTES:,} B"
        raise ConfigError(
            [Problem(str(folder / PAGE), "(whole file)", wrong, "take a session of fewer tests")]
        )
    try:
        meta = json.loads(texts[META])
        for name in LISTS:
            _rows(texts.get(f"{name}.jsonl", ""))
        for row in _rows(texts.get("verdicts.jsonl", "")):
            VerdictRow.from_json(row)
        plots = tuple(Plot(**row) for row in _rows(texts.pop("plots.jsonl", "")))
    except (ValueError, TypeError) as error:
        raise ConfigError([Problem(str(folder), "*.json, *.jsonl", f"damaged: {error}", mend)]) from error
    run_id = str(meta.get("run") or "")
    for place in (folder.name, *texts.values()):
        run_id = run_id or (found[0] if (found := RUN_ID.search(place)) else "")
    if not run_id:
        raise ConfigError([Problem(str(folder), "(name)", "no run id", "give the folder its run id as name")])
    status = meta.get("exitstatus")
    session = Finished(folder, run_id, meta, texts, plots)
    if status is None:
        raise ConfigError([Problem(str(folder / META), "exitstatus", "missing: it did not end", mend)])
    if (status != 0 or meta.get("nothing_proved")) and not allow_failures:
        wrong = f"{status}; failed: {'; '.join(session.failed) or 'no test by itself'}"
        allow = "take a session that passed, or pass --allow-failures: the README then names the failures"
        raise ConfigError([Problem(str(folder / META), "exitstatus", wrong, allow)])
    return session


def host_names(meta: Mapping[str, Any]) -> set[str]:
    """What the hosts of a session call themselves; names that its lab file gives its hosts are left out."""
    facts = (meta.get("facts") or {}).values()
    text = meta.get("lab_file")
    hosts = tomllib.loads(text).get("host", []) if isinstance(text, str) else []
    own = {str(each.get(FACT, "")) for each in facts if isinstance(each, Mapping)}
    return own - NO_NAMES - {str(host.get("name")) for host in hosts}


def places(texts: Iterable[str]) -> dict[str, str]:
    """Folders of the host that stand in a session's files, and what to write in their place: repository,
    environment, home, temporary files. They are found by what is known to lie in them.
    """
    whole = "\n".join(texts)

    def before(*patterns: str) -> set[str]:
        found = {match for each in patterns for match in re.findall(FOLDER + each, whole)}
        return {f"/{match.strip('/')}" for match in found if match.strip("/")}

    roots = {root for root in before(*ROOT_BEFORE) if not re.search(r"/(tests|reports)(/|$)", root)}
    servers = {each for each in before(SERVER) if not any(each.startswith(f"{root}/") for root in roots)}
    found = {"/tmp": "$TMP", "/var/tmp": "$TMP"}
    found |= dict.fromkeys(HOME.findall(whole), "~")
    found |= dict.fromkeys(roots, ".")
    return found | dict.fromkeys(before(ROUTER) | servers, "$VENV")


def replaced(text: str, by: Mapping[str, str]) -> str:
    """The text with every one of the folders replaced, the longest first."""
    for path in sorted(by, key=len, reverse=True):
        begin = BEGIN if path.startswith("/") else r"(?<![\w-])"
        text = re.sub(begin + re.escape(path) + END, lambda _, new=by[path]: new, text)  # type: ignore[misc]
    return text


def left(text: str, hosts: Iterable[str]) -> Iterator[tuple[int, str]]:
    """(line, what) of every private path, host name and token in a text."""
    names = [re.compile(rf"(?<![\w.-]){re.escape(host)}(?![\w-])", re.IGNORECASE) for host in hosts]
    for number, line in enumerate(text.split("\n"), 1):
        for form in dict.fromkeys((line, html.unescape(html.unescape(line)))):
            for pattern in (PRIVATE, *names):
                yield from ((number, found[0]) for found in pattern.finditer(form))
            if TOKEN_PATTERN.search(form):
                yield number, "a token"


def check(folder: Path, hosts: Iterable[str]) -> Iterator[Problem]:
    """What must not be committed, by file and line; each text once a file."""
    names = set(hosts)
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        seen: set[str] = set()
        for number, what in left(path.read_text(encoding="utf-8"), names):
            if what not in seen:
                seen.add(what)
                mend = f"pass --replace '{what}=$NAME'" if what != "a token" else "revoke it; measure again"
                where = str(path.relative_to(folder))
                yield Problem(where, f"line {number}", f"{what} is of the host that it ran on", mend)


def _write(one: Finished, folder: Path, further: Mapping[str, str]) -> Mapping[str, Any]:
    """Files of a session, cleaned; its ``run.json`` as it is written."""
    (folder / "plots").mkdir(parents=True)
    by = {**places(one.texts.values()), **further}
    for name, content in one.texts.items():
        for host in host_names(one.meta):
            content = content.replace(f'"{FACT}": "{host}"', f'"{FACT}": "$HOST"')
            content = content.replace(f"<td>{FACT}</td><td>{host}</td>", f"<td>{FACT}</td><td>$HOST</td>")
        (folder / name).write_text(replaced(content.replace(DEAD_LINKS, NO_LINKS), by))
    meta: dict[str, Any] = {"run": one.run_id, **json.loads((folder / META).read_text())}
    (folder / META).write_text(json.dumps(meta, indent=1))
    for number, figure in enumerate(one.plots, 1):
        slug = re.sub(r"[^a-z0-9]+", "-", figure.title.lower()).strip("-")[:60]
        svg = replaced(plot.render(figure), by)
        (folder / "plots" / f"{number:02d}-{figure.module}-{slug}.svg").write_text(svg)
    if not one.plots:
        (folder / "plots").rmdir()
    return meta


def _rows(text: str) -> list[dict[str, Any]]:
    return [dict(json.loads(line)) for line in text.split("\n") if line.strip()]


def _readme(
    name: str,
    notes: Sequence[str],
    sessions: Sequence[tuple[Finished, Path, Mapping[str, Any]]],
    top: Path,
) -> Iterator[str]:
    yield f"# Reference: {name}"
    yield ""
    yield "Made by `python -m disagglab reference`. Folders of the host are written as `.` (the repository),"
    yield "`$VENV`, `~` and `$TMP`."
    for note in notes:
        yield from ("", *textwrap.wrap(note, 120))
    if len(sessions) > 1:
        yield from ("", "| session | date | lab | command |", "| --- | --- | --- | --- |")
        for one, _, meta in sessions:
            command = _cell(f"`{meta.get('command')}`")
            link = f"[{one.run_id}]({one.run_id}/{PAGE})"
            yield f"| {link} | {_date(one.run_id)} | {meta.get('lab')} | {command} |"
    for one, folder, meta in sessions:
        yield from _section(one, folder, meta, "" if folder == top else f"{folder.name}/")


def _section(one: Finished, folder: Path, meta: Mapping[str, Any], link: str) -> Iterator[str]:
    text = meta.get("lab_file")
    label = tomllib.loads(text).get("label") if isinstance(text, str) else None
    facts = meta.get("fingerprint") or {}
    versions = facts.get("versions") or {}
    lab = facts.get(fingerprint.LAB) or {}
    hardware = {k: v for k, v in fingerprint.machine_of(facts).items() if k != "versions"}
    yield from ("", f"## {one.run_id}", "")
    yield f"- Lab `{meta.get('lab')}`" + (f" ({label})" if label else "")
    yield f"- Date: {_date(one.run_id)}"
    yield f"- vLLM {meta.get('vllm')}; model {meta.get('model')}; code {meta.get('commit')}"
    yield f"- Fingerprint `{fingerprint.label(facts)}`: " + ", ".join(f"{k} {v}" for k, v in hardware.items())
    yield "- Versions: " + ", ".join(f"{key} {value}" for key, value in versions.items())
    yield from (
        f"- {title}: " + ", ".join(f"{name} {value}" for name, value in known.items())
        for title, known in lab.items()
    )
    if meta.get("resumed"):
        yield f"- Rounds of earlier sessions come first: {', '.join(meta['resumed'])}"
    yield f"- [Report]({link}{PAGE}), [run.json]({link}{META})" + "".join(
        f", [{each}]({link}{each})"
        for each in (*(f"{one}.jsonl" for one in LISTS), *TUNING)
        if (folder / each).is_file()
    )
    if one.failed or meta.get("exitstatus") != 0 or meta.get("nothing_proved"):
        yield from (
            "",
            f"**This session failed** (exit status {meta.get('exitstatus')}). Tests that failed:",
            "",
        )
        failed = [" ".join(each.split()) for each in one.failed]
        yield from (
            f"- {each}" for each in failed or ["none by itself; every test was skipped, or it was ended"]
        )
    yield from ("", "### Commands", "", "```", str(meta.get("command")), "```")
    for what, command in (meta.get("commands") or {}).items():
        yield from ("", f"{what}:", "", "```", str(command), "```")
    yield from _verdicts(_kept(folder, "verdicts"))
    figures = _kept(folder, "figures")
    yield from _values(
        "Figures", figures, ("workload", "arm", "metric"), "one value a valid round"
    )  # fmt: skip
    others = [row for row in _kept(folder, "records") if row.get("test") != FIGURES_TEST]
    yield from _values(
        "Records of tests", others, ("test", "name", "arm"), "replicates, or as the report says"
    )
    drawn = sorted((folder / "plots").glob("*.svg"))
    if drawn:
        yield from ("", "### Plots", "")
        titles = [figure.title for figure in one.plots]
        yield from (
            f"- [{_cell(title)}]({link}plots/{each.name})" for title, each in zip(titles, drawn, strict=True)
        )


def _kept(folder: Path, name: str) -> list[dict[str, Any]]:
    path = folder / f"{name}.jsonl"
    return _rows(path.read_text()) if path.is_file() else []


def _verdicts(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if not rows:
        return
    yield from ("", "### Verdicts", "")
    head = (
        *("workload", "metric", "candidate", "baseline", "verdict", "effect [95 % CI]"),
        *("rounds", "noise floor", "gate"),
    )
    yield _line(*("against" if name == "baseline" else name for name in head))
    yield "|" + " --- |" * len(head)
    for row in rows:
        cells = report.verdict_cells(VerdictRow.from_json(row))
        yield _line(*(cells[name] for name in head))


def _values(title: str, rows: Sequence[Mapping[str, Any]], keys: Sequence[str], what: str) -> Iterator[str]:
    if not rows:
        return
    yield from ("", f"### {title}", "", f"n: {what}.", "")
    yield _line(*keys, "unit", "n", "median", "min to max")
    yield "|" + " --- |" * (len(keys) + 4)
    for row in rows:
        values = row["values"]
        spread = f"{text.number(min(values))} to {text.number(max(values))}"
        median = text.number(statistics.median(values))
        yield _line(*(row.get(key, "") for key in keys), row["unit"], len(values), median, spread)


def _line(*cells: Any) -> str:
    return "| " + " | ".join(_cell(str(cell)) for cell in cells) + " |"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _date(run_id: str) -> str:
    day, clock = run_id.split("-")[:2]
    return f"{day[:4]}-{day[4:6]}-{day[6:]} {clock[:2]}:{clock[2:4]}:{clock[4:]} UTC"
