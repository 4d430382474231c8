"""What a vLLM release shows of itself, and how two releases differ: metrics, options, handshake."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from disagglab.errors import InvalidRun
from disagglab.serving import http, openai
from disagglab.serving.topology import Topology
from disagglab.serving.vllm import VllmServer

HTTP_TIMEOUT_S = 30.0
HELP_LIMIT_S = 180.0  # it imports vLLM
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]+")
OUTPUT_TOKENS = 2
METRIC_FAMILIES, OPTIONS, HANDSHAKE = (
    "metric families",
    "options of vllm serve",
    "fields of kv_transfer_params",
)
CREATED = "_created"  # a time stamp that the client library adds to every counter


@dataclass(frozen=True)
class Behaviour:
    """One release. ``metrics``: type by family name. ``handshake``: type of each of kv_transfer_params."""

    version: str
    metrics: Mapping[str, str]
    options: frozenset[str]
    handshake: Mapping[str, str]


@dataclass(frozen=True)
class Change:
    """What appeared, vanished, or is of another type in the newer of two releases; options have no type."""

    what: str
    appeared: tuple[str, ...]
    vanished: tuple[str, ...]
    altered: tuple[str, ...]


def metric_families(servers: Sequence[VllmServer]) -> dict[str, str]:
    """Type by name of every metric family that any of the servers exposes.

    Raises:
        InvalidRun: if one does not answer.
    """
    found: dict[str, str] = {}
    for server in servers:
        answer = http.get(f"{server.url}/metrics", HTTP_TIMEOUT_S)
        if answer.status_code != 200:
            raise InvalidRun(f"{server.name}: {server.url}/metrics answered {answer.status_code}")
        for family in text_string_to_metric_families(answer.text):
            if not family.name.endswith(CREATED):
                found[family.name] = family.type
    return found


def options_of(help_text: str) -> frozenset[str]:
    """The options that a help text names."""
    return frozenset(OPTION.findall(help_text))


def handshake(topology: Topology, prompt: list[int]) -> dict[str, str]:
    """Type of every field that prefill hands to decode; the request is finished, so no KV blocks stay behind.

    Raises:
        TransferError: if prefill offers no blocks.
        InvalidRun: if decode does not answer.
    """
    request = openai.body(topology.served_name, prompt, OUTPUT_TOKENS) | {"cache_salt": "behaviour"}
    offered = openai.prefill(topology.prefill[0].url, request)
    openai.decode(topology.decode[0].url, request, offered)
    return {key: type(value).__name__ for key, value in offered.kv_transfer_params.items()}


def compare(old: Behaviour, new: Behaviour) -> list[Change]:
    """What differs, part by part."""
    parts: list[tuple[str, Mapping[str, str], Mapping[str, str]]] = [
        (METRIC_FAMILIES, old.metrics, new.metrics),
        (OPTIONS, dict.fromkeys(old.options, ""), dict.fromkeys(new.options, "")),
        (HANDSHAKE, old.handshake, new.handshake),
    ]
    return [
        Change(
            what,
            tuple(sorted(set(after) - set(before))),
            tuple(sorted(set(before) - set(after))),
            tuple(sorted(n for n in set(before) & set(after) if before[n] != after[n])),
        )
        for what, before, after in parts
    ]


def require_metrics(behaviour: Behaviour, needed: Sequence[str]) -> None:
    """Refuse a release that does not expose what the ledger counts.

    Args:
        needed: names of samples, as the ledger uses them.

    Raises:
        InvalidRun: naming what is missing, and what it may be called now.
    """
    missing = [name for name in needed if not {name, family_of(name)} & set(behaviour.metrics)]
    if missing:
        close = {
            name: difflib.get_close_matches(family_of(name), behaviour.metrics, n=1) or ["nothing like it"]
            for name in missing
        }
        listed = ", ".join(f"{name} (there is {now[0]})" for name, now in close.items())
        raise InvalidRun(
            f"vLLM {behaviour.version} exposes no {listed}; METRICS in measure/ledger.py is what is needed"
        )


def family_of(sample: str) -> str:
    """Name of the family that a sample belongs to."""
    return re.sub(r"_(total|sum|count|bucket)$", "", sample)
