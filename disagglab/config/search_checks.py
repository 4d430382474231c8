"""What is wrong with ``[tuning]`` of a lab file, and what of it a session asks for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from disagglab.config import reserved, search_space, transports, ways_check
from disagglab.config.arms import KINDS
from disagglab.config.schema import (
    Lab,
    ModelSection,
    NodeSection,
    ScaleSection,
    TransportSection,
    VllmSection,
)
from disagglab.config.search_space import TuningSection, Value
from disagglab.config.setting import nested
from disagglab.config.way import DISAGGREGATED, RANKS_KEY, SHARDED
from disagglab.config.way_section import WaySection
from disagglab.config.workload import Workload, load_workload
from disagglab.errors import ConfigError, Problem
from disagglab.paths import WORKLOADS
from disagglab.problems import problems_of
from disagglab.stats.metric import PERCENTILE_SAMPLES

RANKS = {
    RANKS_KEY: "the nodes of a sharded way",
    "pipeline-parallel-size": "[vllm.args], as it decides on how many GPUs a server runs",
}
AGREED = "both roles have to agree on it: [tuning.space]"
NO_SECTION = "add [tuning] with workload and [tuning.space]; docs/how-to/tune.md has one to copy"


def problems(parts: Mapping[str, Any], file: str) -> Iterator[Problem]:
    """What no single key shows.

    Args:
        parts: the sections of a lab file that are valid in themselves.
    """
    tuning: TuningSection | None = parts.get("tuning")
    if tuning is None:
        return
    nodes: Sequence[NodeSection] = parts.get("nodes", ())
    if "slo" not in parts:
        wrong = "without [slo], and what is compared are the requests that meet it"
        yield Problem(file, "tuning", wrong, "add [slo] ttft_s, tpot_s")
    if any(node.share_cpus or node.share_gpus for node in nodes):
        wrong = "nodes share cores or GPUs, so servers measure each other"
        yield Problem(file, "tuning", wrong, "remove [tuning], or share_cpus and share_gpus from every node")
    yield from _kind_problems(tuning.kinds, nodes, file)
    yield from _list_problems(tuning, file)
    yield from _option_problems(tuning, file)
    yield from _transport_problems(tuning, parts.get("transport"), nodes, file)
    yield from _ratio_problems(tuning, nodes, file)
    vllm: VllmSection | None = parts.get("vllm")
    yield from _size_problems(tuning, vllm.args if vllm else {}, file)
    yield from _workload_problems(tuning.workload, parts.get("scale"), parts.get("model"), file)


def _kind_problems(kinds: Sequence[str], nodes: Sequence[NodeSection], file: str) -> Iterator[Problem]:
    for kind in dict.fromkeys(kinds):
        if kind not in KINDS:
            yield Problem(file, "tuning.kinds", f"no such way: {kind}", f"use {', '.join(KINDS)}")
    for kind in search_space.repeated(kinds):
        yield Problem(file, "tuning.kinds", f"{kind} stands there twice", "name it once")
    if SHARDED in kinds:
        way = WaySection(kind="sharded", what="tuned", expects="tuned")
        for one in ways_check.problems([way], None, nodes, file):
            yield Problem(file, "tuning.kinds", one.wrong, one.mend)


def _list_problems(tuning: TuningSection, file: str) -> Iterator[Problem]:
    """Lists without a value, or with one twice."""
    lists: dict[str, Sequence[object]] = {
        f"{where}.{name}": values
        for where, table in tuning.option_tables.items()
        for name, values in table.items()
    }
    for where, values in lists.items():
        if not values:
            yield Problem(file, where, "no value", "write the values to try, or remove the option")
    lists["tuning.rates"] = tuning.rates
    lists["tuning.disaggregated.ratios"] = tuning.disaggregated.ratios if tuning.disaggregated else ()
    for where, values in lists.items():
        for value in dict.fromkeys(search_space.repeated(values)):
            yield Problem(file, where, f"{value!r} stands there twice", "name each value once")


def _option_problems(tuning: TuningSection, file: str) -> Iterator[Problem]:
    """Options that the suite sets, and options of one role on which both have to agree."""
    agreed = dict.fromkeys(reserved.ROLE_ARGS, AGREED)
    taken: dict[str, dict[str, str]] = {
        "tuning.space": {},
        "tuning.disaggregated.prefill": agreed,
        "tuning.disaggregated.decode": agreed,
    }
    for where, table in tuning.option_tables.items():
        if where in taken:
            also = {**reserved.BESIDE_ARGS, **taken[where], **RANKS}
            yield from reserved.problems(table, where, file, also)
    if tuning.disaggregated and DISAGGREGATED not in tuning.kinds:
        wrong = "dimensions of a way that is not tuned"
        yield Problem(file, "tuning.disaggregated", wrong, f'remove it, or add "{DISAGGREGATED}" to kinds')


def _transport_problems(
    tuning: TuningSection, transport: TransportSection | None, nodes: Sequence[NodeSection], file: str
) -> Iterator[Problem]:
    """Keys and values that [transport] cannot have."""
    if transport is None or tuning.disaggregated is None:
        return
    for key, values in tuning.disaggregated.transport.items():
        where = f"tuning.disaggregated.transport.{key}"
        found: dict[str, Problem] = {}
        for value in values:
            own = transport.model_dump()
            try:
                changed = TransportSection.model_validate(merged(own, nested({key: value})))
            except ValidationError as error:
                for one in problems_of(error, file, TransportSection, "transport"):
                    found.setdefault(one.wrong, Problem(file, where, one.wrong, one.mend))
                continue
            before = list(transports.problems(transport, nodes, "transport", file))
            for one in transports.problems(changed, nodes, "transport", file):
                if one not in before:
                    found.setdefault(one.wrong, Problem(file, where, one.wrong, one.mend))
        yield from found.values()


def merged(own: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A table with changes laid over it, tables inside key by key."""
    found = dict(own)
    for key, value in changes.items():
        both = isinstance(found.get(key), dict) and isinstance(value, dict)
        found[key] = {**found[key], **value} if both else value
    return found


def _ratio_problems(tuning: TuningSection, nodes: Sequence[NodeSection], file: str) -> Iterator[Problem]:
    """Ratios that the nodes cannot have. Each way gets every node, or the comparison is of unequal means."""
    possible = ", ".join(f"{p}P{len(nodes) - p}D" for p in range(1, len(nodes)))
    for ratio in tuning.disaggregated.ratios if tuning.disaggregated else ():
        try:
            count = sum(search_space.parts_of(ratio))
        except ValueError as error:
            yield Problem(
                file, "tuning.disaggregated.ratios", str(error), f"write one of {possible or '1P1D'}"
            )
            continue
        if nodes and count != len(nodes):
            wrong = f"{ratio} takes {count} nodes, this lab has {len(nodes)}"
            yield Problem(file, "tuning.disaggregated.ratios", wrong, f"use {possible}")


def _size_problems(tuning: TuningSection, own: Mapping[str, Value], file: str) -> Iterator[Problem]:
    have = search_space.size(tuning.space, own)
    if all(tuning.space.values()) and have < tuning.settings:
        wrong = f"{tuning.settings}, and [tuning.space] has {have} with the lab's own"
        yield Problem(file, "tuning.settings", wrong, f"set it to {have} or less, or add values to the space")


def _workload_problems(
    name: str, scale: ScaleSection | None, model: ModelSection | None, file: str, key: str = "tuning.workload"
) -> Iterator[Problem]:
    if not (WORKLOADS / f"{name}.toml").is_file():
        yield Problem(file, key, f"no file workloads/{name}.toml", "name a workload that exists")
        return
    try:
        full = load_workload(name)
    except ConfigError as error:
        yield from error.problems
        return
    if scale is None:
        return
    here = full.scaled(**scale.model_dump())
    if model is not None and here.tokens > model.max_model_len:
        wrong = f"{name} takes {here.tokens} tokens here, max_model_len is {model.max_model_len}"
        yield Problem(file, key, wrong, "lower [scale] prompt, output or steady")
    compared = here.steady or here
    gaps, least = compared.requests * (compared.output_tokens - 1), PERCENTILE_SAMPLES[99]
    if gaps < least and here.concurrency is None:
        wrong = f"{name} has {gaps} gaps between tokens here, and a p99 ITL takes {least}"
        yield Problem(file, key, wrong, "raise [scale] requests, output or steady")


def workload_of(lab: Lab, tuning: TuningSection) -> Workload:
    """What settings are compared on: the workload as the lab has it, a closed loop with so many requests more
    that a run has the 100 gaps between tokens that a p99 takes.

    Raises:
        ConfigError: see :meth:`disagglab.config.schema.Lab.workload`.
    """
    here = lab.workload(tuning.workload)
    if here.concurrency is None:
        return here
    least = -(-PERCENTILE_SAMPLES[99] // (here.output_tokens - 1))
    return here.of_length(max(here.requests, least))


def asked(lab: Lab, workload: str = "", settings: int | None = None) -> TuningSection:
    """The lab's [tuning] with what a command line has in its place.

    Args:
        workload: that settings are compared on; empty: the section's.
        settings: that each way tries; None: the section's.

    Raises:
        ConfigError: if the lab has no such section, the workload is unknown or too long, or the space has
            fewer settings.
    """
    if lab.tuning is None:
        raise ConfigError([Problem(lab.file, "[tuning]", "section is missing", NO_SECTION)])
    found: list[Problem] = []
    changes: dict[str, Any] = {}
    if workload:
        changes["workload"] = workload
        found += _workload_problems(workload, lab.scale, lab.model, lab.file, f"--workload {workload}")
    if settings is not None:
        changes["settings"] = settings
        least, most = 2, min(search_space.MOST_SETTINGS, search_space.size(lab.tuning.space, lab.vllm.args))
        if not least <= settings <= most:
            wrong = f"{settings}, and this lab's [tuning.space] can give {least} to {most}"
            found.append(Problem(lab.file, "--settings", wrong, "name a number in between, or add values"))
    if found:
        raise ConfigError(found)
    return lab.tuning.model_copy(update=changes)
