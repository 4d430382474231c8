"""Runs of earlier sessions, read back, so that a comparison goes on where they ended (--resume)."""

from __future__ import annotations

import json
import re
import shutil
import tomllib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from disagglab import jsonfile
from disagglab.config import way
from disagglab.config.arms import OWN
from disagglab.config.labs import parse_lab, with_release
from disagglab.config.schema import Lab
from disagglab.config.way_section import WaySection
from disagglab.errors import ConfigError, Problem
from disagglab.problems import problems_of
from disagglab.results import fingerprint
from disagglab.results.records import Reading, Run, Snapshot
from disagglab.results.run_folder import META, Store
from disagglab.stats.rule import ORDER_DRAWN

RUNS, METRICS = "runs", ".metrics.json.gz"
# Keys of a lab that no run depends on: what is judged, and by which limits, is computed from the runs anew.
JUDGEMENT = {"file", "label", "gates", "price", "slo", "speed", "tuning", "ways"}
WORDS = {"what", "expects"}  # of a [[way]]
LABEL = re.compile(r'(\w+)="(.*?)"(?=,\w+="|$)', re.DOTALL)
PER_REQUEST = ("ttft_s", "e2e_s", "itl_s", "prompt_tokens", "output_tokens", "start_s", "streams")
DELETE = "copy the file again, or delete it: its round is then left out"
LEAVE_OUT = "or leave this --resume out"


@dataclass(frozen=True)
class KeptRun:
    """A run on disk. ``session``: in whose folder; ``moment``: when it was stored, ns since the epoch."""

    run: Run
    path: Path
    session: str
    moment: int


@dataclass(frozen=True)
class Earlier:
    """What ``--resume`` named: ids of sessions, the runs of their folders by time, what to know of them.

    ``fingerprints``: by the ``run.json`` that holds it. ``order_drawn``: whether all of their rounds had an
    order that was drawn by lot.
    """

    sessions: tuple[str, ...] = ()
    runs: tuple[KeptRun, ...] = ()
    notes: tuple[str, ...] = ()
    fingerprints: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    order_drawn: bool = True


def read(
    folders: Sequence[Path],
    lab: Lab,
    ways: Sequence[str],
    machine: Mapping[str, Any],
    commit: str,
    arms: Sequence[str] = OWN,
) -> Earlier:
    """The runs of earlier sessions on the workloads of the lab's gates; a run in two folders counts once.

    Args:
        lab: of this session, as it will be served; ``ways``: names of those that it measures.
        machine: the fingerprint of this one; that of the lab is not known yet, and held against theirs by
            :func:`require_same_lab`. Another ``commit`` is noted, not refused.
        arms: of this session; those of ways may be others.

    Raises:
        ConfigError: if a file is missing or damaged, or a session measured something else: another lab,
            vLLM version, workload or machine, other arms, or does not tell on which hosts.
    """
    problems: list[Problem] = []
    sessions: list[str] = []
    drawn = True
    notes: list[str] = []
    fingerprints: dict[str, Mapping[str, Any]] = {}
    kept: dict[tuple[str, str, int], KeptRun] = {}
    for folder in sorted({folder.resolve() for folder in folders}, key=lambda path: path.name):
        try:
            meta = meta_of(folder)
            name = str(meta.get("run") or folder.name)
            found = list(runs_of(folder, name))
        except ConfigError as error:
            problems += error.problems
            continue
        problems += _differences(folder, meta, lab, ways, machine)
        problems += _other_arms(folder, meta, arms)
        fingerprints[str(folder / META)] = meta["fingerprint"]
        drawn = drawn and meta.get("rule") == ORDER_DRAWN
        problems += _other_workloads(found, lab)
        sessions += [*map(str, meta.get("resumed") or ()), name]
        if meta.get("commit") != commit:
            notes.append(f"{name}: code {meta.get('commit', 'not recorded')}; this session's is {commit}")
        for one in found:
            kept.setdefault((one.run.workload.name, one.run.topology, one.moment), one)
    if problems:
        raise ConfigError(problems)
    definitions = {workload.definition for workload in lab.gated_workloads}
    runs = sorted(kept.values(), key=lambda one: one.moment)
    counted = tuple(one for one in runs if one.run.workload.definition in definitions and one.run.round >= 0)
    return Earlier(tuple(dict.fromkeys(sessions)), counted, tuple(notes), fingerprints, drawn)


def require_same_lab(earlier: Earlier, whole: Mapping[str, Any]) -> None:
    """Hold the earlier sessions' fingerprints against this session's, now that its hosts are surveyed.

    Raises:
        ConfigError: with what differs, if a session ran on other nodes, GPUs, drivers or links.
    """
    problems = [
        Problem(file, "fingerprint", f"another lab: {differs}", f"resume on the same hardware, {LEAVE_OUT}")
        for file, there in earlier.fingerprints.items()
        if (differs := _unlike(there, whole))
    ]
    if problems:
        raise ConfigError(problems)


def complete(
    earlier: Earlier, needed: Callable[[str], Sequence[str]], also: Collection[str] = ()
) -> tuple[list[KeptRun], list[str]]:
    """The rounds that hold a run of every arm that a workload needs, numbered anew from 0 for each workload;
    then what was left out, and why.

    A round is what one session measured with one seed.

    Args:
        needed: the arms by the name of a workload.
        also: arms whose runs are taken along where a round has them; of others nothing is taken.
    """
    rounds: dict[tuple[str, str, int], dict[str, KeptRun]] = {}
    for one in earlier.runs:
        rounds.setdefault((one.session, one.run.workload.name, one.run.seed), {})[one.run.topology] = one
    taken: list[KeptRun] = []
    numbers: dict[str, int] = {}
    lacking: dict[tuple[str, str, str], int] = {}
    for (session, workload, _), found in rounds.items():
        arms = needed(workload)
        missing = [arm for arm in arms if arm not in found]
        if missing:
            left_out = (session, workload, ", ".join(missing))
            lacking[left_out] = lacking.get(left_out, 0) + 1
            continue
        number = numbers.get(workload, 0)
        numbers[workload] = number + 1
        kept = [*arms, *(arm for arm in found if arm in also and arm not in arms)]
        taken += [replace(found[arm], run=replace(found[arm].run, round=number)) for arm in kept]
    return taken, [
        f"{session}: {count} round{'s' if count > 1 else ''} of {workload} left out, no run of {absent}"
        for (session, workload, absent), count in lacking.items()
    ]


def begin(
    earlier: Earlier,
    needed: Callable[[str], Sequence[str]],
    store: Store,
    show: Callable[[str], None],
    also: Collection[str] = (),
) -> list[Run]:
    """Put the complete rounds of earlier sessions into this session's folder, and say in ``run.json`` whose.

    See :func:`complete`. So the folder holds every run that its verdicts are made of, and may itself be
    resumed alone.
    """
    if not earlier.sessions:
        return []
    taken, left_out = complete(earlier, needed, also)
    for one in taken:
        _copy(one, store.folder / RUNS)
    notes = [*earlier.notes, *left_out]
    store.write_meta(resumed=list(earlier.sessions), resumed_notes=notes)
    for note in notes:
        show(note)
    return [one.run for one in taken]


def _copy(kept: KeptRun, into: Path) -> None:
    run = kept.run
    raw = json.loads(kept.path.read_text())
    name = f"{run.workload.name}.{run.round:02d}.{run.topology}.{kept.moment}"
    (into / f"{name}.json").write_text(json.dumps({**raw, "round": run.round}))
    counters = kept.path.with_name(kept.path.name.removesuffix(".json") + METRICS)
    if counters.is_file():
        shutil.copyfile(counters, into / f"{name}{METRICS}")


def meta_of(folder: Path) -> Mapping[str, Any]:
    """``run.json`` of a session.

    Raises:
        ConfigError: if it is missing, or lacks what its runs cannot be told without.
    """
    mend = "name the folder of an earlier session, with its run.json and runs/*.json"
    if not folder.is_dir():
        raise ConfigError([Problem(str(folder), "--resume", "no such folder", mend)])
    meta = jsonfile.read(folder / META, mend)
    missing = [key for key in ("lab_file", "vllm") if not isinstance(meta.get(key), str)]
    if not isinstance(meta.get("fingerprint"), Mapping):
        missing.append("fingerprint")
    if missing:
        raise ConfigError([Problem(str(folder / META), key, "missing", mend) for key in missing])
    return meta


def runs_of(folder: Path, session: str) -> Iterator[KeptRun]:
    """Every run of a folder.

    Raises:
        ConfigError: with every file that is damaged, or if there is none at all.
    """
    paths = sorted((folder / RUNS).glob("*.json"))
    if not paths:
        mend = "name a session that measured something, and bring its runs/*.json along"
        raise ConfigError([Problem(str(folder / RUNS), "*.json", "no run is there", mend)])
    problems: list[Problem] = []
    for path in paths:
        moment = path.name.split(".")[-2]
        try:
            if not moment.isdigit():
                mend = "give it back the name that its session gave it: WORKLOAD.ROUND.TOPOLOGY.TIME.json"
                raise ConfigError([Problem(str(path), "(file name)", "no time in it", mend)])
            yield KeptRun(read_run(path), path, session, int(moment))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)


def read_run(path: Path) -> Run:
    """A run as :meth:`.run_folder.Store.add_run` wrote it; with its counters if they lie beside it.

    Who answered (``Reading.processes``) and at which address is not kept.

    Raises:
        ConfigError: if a file is damaged.
    """
    raw = jsonfile.read(path, DELETE)
    try:
        run = TypeAdapter(Run).validate_python(dict(raw))
    except ValidationError as error:
        raise ConfigError(problems_of(error, str(path), mend=DELETE)) from error
    lengths = {key: len(getattr(run, key)) for key in PER_REQUEST}
    if len(set(lengths.values())) > 1:
        wrong = "as many values as requests are wanted; " + ", ".join(f"{k}: {n}" for k, n in lengths.items())
        raise ConfigError([Problem(str(path), PER_REQUEST[0], wrong, DELETE)])
    counters = path.with_name(path.name.removesuffix(".json") + METRICS)
    return replace(run, readings=_readings(counters)) if counters.is_file() else run


def _readings(path: Path) -> tuple[Reading, Reading]:
    mend = f"copy the file again, or delete it: figures of a run do without ({METRICS})"
    raw = jsonfile.read(path, mend)

    def snapshot(server: str, samples: Mapping[str, float]) -> Snapshot:
        found = []
        for name, value in samples.items():
            metric, _, inside = name.partition("{")
            found.append((metric, frozenset(LABEL.findall(inside.removesuffix("}"))), float(value)))
        return Snapshot(server, "", tuple(found))

    def reading(moment: str) -> Reading:
        return Reading({server: snapshot(server, samples) for server, samples in raw[moment].items()}, {})

    try:
        return reading("before"), reading("after")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError([Problem(str(path), "before, after", f"no counters: {error!r}", mend)]) from error


def _differences(
    folder: Path, meta: Mapping[str, Any], lab: Lab, ways: Sequence[str], machine: Mapping[str, Any]
) -> list[Problem]:
    """What of a session makes its runs another measurement than this session's."""
    file = str(folder / META)
    problems = []
    if meta["vllm"] != lab.vllm.version:
        wrong = f"{meta['vllm']} there, {lab.vllm.version} here"
        problems.append(Problem(file, "vllm", wrong, f"pass --vllm {meta['vllm']}, {LEAVE_OUT}"))
    recorded = meta["fingerprint"]
    if not fingerprint.complete(recorded):
        wrong = (
            f"{fingerprint.label(recorded)}: it tells of the machine that ran pytest alone, not of hosts,"
            " GPUs and links, so these runs may be of other hardware"
        )
        problems.append(Problem(file, "fingerprint", wrong, "measure anew: leave this --resume out"))
    differs = _unlike(fingerprint.machine_of(recorded), fingerprint.machine_of(machine))
    if differs:
        wrong = f"another machine or other versions: {differs}"
        mend = f"resume on the same kind of machine and versions, {LEAVE_OUT}"
        problems.append(Problem(file, "fingerprint", wrong, mend))
    try:
        earlier = parse_lab(tomllib.loads(meta["lab_file"]), file)
        there = way.chosen(earlier, list(map(str, meta.get("ways") or ())))
        earlier = way.beside(earlier, way.starts(earlier, there))
        pairs = {"": (_lab(earlier), _lab(lab))}
        for one in there:
            if one.arm in ways:
                pairs[f"way {one.arm}."] = (_way(one), _way(*way.chosen(lab, [one.arm])))
    except (ConfigError, tomllib.TOMLDecodeError) as error:
        wrong = f"this version of the suite does not take it: {error}"
        return [
            *problems,
            Problem(file, "lab_file", wrong, "resume with the code that made it, " + LEAVE_OUT),
        ]
    mend = f"use the lab file of that session (key lab_file of its run.json) and its --way, {LEAVE_OUT}"
    for prefix, (theirs, ours) in pairs.items():
        problems += [
            Problem(
                file,
                f"lab_file: {prefix}{key}",
                f"{theirs.get(key)} there, {ours.get(key)} in {lab.file}",
                mend,
            )
            for key in sorted(theirs.keys() | ours.keys())
            if theirs.get(key) != ours.get(key)
        ]
    return problems


def _other_arms(folder: Path, meta: Mapping[str, Any], arms: Sequence[str]) -> Iterator[Problem]:
    """Arms of the lab's own settings that one session has and the other has not: a round is what all of them
    did with one set of prompts. A session of an earlier version of the suite had all.
    """
    there = [arm for arm in OWN if arm in (meta.get("arms") or OWN)]
    here = [arm for arm in OWN if arm in arms]
    if there != here:
        wrong = f"{', '.join(there)} there, {', '.join(here)} here"
        given = "".join(f" --arm {arm}" for arm in there if len(there) < len(OWN))
        mend = f"pass{given or ' neither --arm nor --without'}, {LEAVE_OUT}"
        yield Problem(str(folder / META), "arms", wrong, mend)


def _lab(lab: Lab) -> dict[str, str]:
    """What decides a measurement; the version is compared by itself, because ``--vllm`` overrides it."""
    return _flat(with_release(lab, "").model_dump(exclude=JUDGEMENT))


def _way(one: WaySection) -> dict[str, str]:
    return _flat(one.model_dump(exclude=WORDS))


def _other_workloads(found: Sequence[KeptRun], lab: Lab) -> list[Problem]:
    """Gated workloads of which a session has runs, all of them of another definition.

    Other tests of a session may have run a workload changed, at another rate say; those are passed over.
    """
    problems = []
    for workload in lab.gated_workloads:
        name = workload.name
        own = [one for one in found if one.run.workload.name == name and one.run.round >= 0]
        if not own or any(one.run.workload.definition == workload.definition for one in own):
            continue
        there, here = _flat(own[0].run.workload.model_dump()), _flat(workload.model_dump())
        differs = "; ".join(
            f"{key} {there.get(key, 'none')} there, {here.get(key, 'none')} here"
            for key in sorted(there.keys() | here.keys())
            if there.get(key) != here.get(key)
        )
        mend = f"give workloads/{name}.toml the values of that session, {LEAVE_OUT}"
        problems.append(Problem(str(own[0].path), "workload", f"another {name}: {differs}", mend))
    return problems


def _unlike(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """What differs between two fingerprints, whatever their keys."""
    theirs, ours = (
        _flat({key: value for key, value in one.items() if key != fingerprint.KEY}) for one in (there, here)
    )
    return "; ".join(
        f"{key} {theirs.get(key, 'none')} there, {ours.get(key, 'none')} here"
        for key in sorted(theirs.keys() | ours.keys())
        if theirs.get(key) != ours.get(key)
    )


def _flat(value: Any, name: str = "") -> dict[str, str]:
    """Dotted keys and values as text, of nested mappings and lists."""
    if isinstance(value, Mapping):
        items = [(f"{name}.{key}" if name else str(key), inner) for key, inner in value.items()]
    elif isinstance(value, list | tuple) and any(isinstance(inner, Mapping) for inner in value):
        items = [(f"{name}[{place}]", inner) for place, inner in enumerate(value)]
    else:
        return {name: str(list(value) if isinstance(value, tuple) else value)}
    return {key: text for inner_name, inner in items for key, text in _flat(inner, inner_name).items()}
