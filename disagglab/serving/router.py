"""vllm-router in front of the servers: the same program for every topology."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import httpx

from disagglab.address import url_of
from disagglab.config.schema import Lab
from disagglab.hosts.host import Host, HostProcess
from disagglab.predict.strategies import Strategy
from disagglab.results.records import Snapshot
from disagglab.serving import http
from disagglab.serving.prometheus import scrape
from disagglab.serving.service import HTTP_TIMEOUT_S, Service
from disagglab.serving.vllm import EventSource, VllmServer

READY_DEADLINE_S = 90.0  # ready within 1 s where nothing else runs


@dataclass(frozen=True)
class Router(Service):
    """A running router. ``url`` is what clients talk to.

    ``metrics_url``: base URL of its own metrics, which prove nothing about servers; empty: it has none.
    ``serves``: the model that it has to list before it is ready.
    """

    name: str
    url: str
    argv: tuple[str, ...]
    process: HostProcess
    poll_s: ClassVar[float] = 0.05  # ready within a second, and a look costs 2 ms
    metrics_url: str = field(default="", kw_only=True)
    serves: str = field(default="", kw_only=True)

    @property
    def command(self) -> str:
        """The command as one would type it."""
        return shlex.join(self.argv)

    def is_ready(self) -> bool:
        """Whether it lists this run's model."""
        try:
            answer = http.get(f"{self.url}/v1/models", HTTP_TIMEOUT_S)
        except httpx.HTTPError:
            return False
        return answer.status_code == 200 and self.serves in [
            row["id"] for row in answer.json().get("data", [])
        ]

    def metrics(self) -> Snapshot:
        """Scrape its metrics now. vllm-router exposes a counter only when it has counted something.

        Raises:
            InvalidRun: if it does not answer.
        """
        return scrape(f"router {self.name}", self.metrics_url)


@dataclass(frozen=True)
class Hearing:
    """What a router that chooses by KV events has to be told of them.

    ``block_size``: tokens, equal on all servers; ``model``: the name that requests carry.
    """

    sources: tuple[EventSource, ...]
    block_size: int
    model: str


def router_argv(
    lab: Lab,
    suite_python: str,
    port: int,
    metrics_port: int,
    workers: Sequence[str],
    prefill: Sequence[str],
    decode: Sequence[str],
    strategy: Strategy | None = None,
    hearing: Hearing | None = None,
) -> list[str]:
    """The command of the router beside ``suite_python``: ``workers`` for equal servers, or ``prefill`` and
    ``decode`` URLs.

    Retries are off, because a retried request would hide a failure from the measurement.

    Args:
        strategy: how it chooses a server; by the lab's [router] policy if it is None.
        hearing: for a strategy that goes by KV events.
    """
    argv = [
        str(Path(suite_python).with_name("vllm-router")),
        "--host",
        lab.controller.address,
        "--port",
        str(port),
        "--prometheus-host",
        lab.controller.address,
        "--prometheus-port",
        str(metrics_port),
        "--worker-startup-check-interval",
        "1",
        "--worker-startup-timeout-secs",
        "60",
        "--policy",
        strategy.policy if strategy else lab.router.policy,
        "--disable-retries",
    ]
    argv += strategy.options if strategy else ()
    if hearing is not None:
        for source in hearing.sources:
            argv += ["--kv-event-source", f"{source.url}={source.events}"]
        argv += ["--kv-event-block-size", str(hearing.block_size), "--kv-event-model", hearing.model]
    if workers:
        return [*argv, "--worker-urls", *workers]
    argv += ["--vllm-pd-disaggregation", "--kv-connector", "nixl"]
    for url in prefill:
        argv += ["--prefill", url]
    for url in decode:
        argv += ["--decode", url]
    return argv


def launch_router(
    host: Host,
    lab: Lab,
    name: str,
    workers: Sequence[VllmServer] = (),
    prefill: Sequence[VllmServer] = (),
    decode: Sequence[VllmServer] = (),
    strategy: Strategy | None = None,
    hearing: Hearing | None = None,
    ports: tuple[int, int] | None = None,
) -> Router:
    """Start a router on allocated ports; it is not ready yet.

    Args:
        strategy, hearing: see :func:`router_argv`.
        ports: of HTTP and metrics, reserved before, whose last user has ended; new ones if it is None.

    Raises:
        StartError: if it cannot be executed.
    """
    address = lab.controller.address
    port, metrics_port = ports or (host.reserve_port(address), host.reserve_port(address))
    argv = router_argv(
        lab,
        host.suite_python,
        port,
        metrics_port,
        [s.url for s in workers],
        [s.url for s in prefill],
        [s.url for s in decode],
        strategy,
        hearing,
    )
    process = host.start(f"router-{name}", argv, {"NO_COLOR": "1"}, lab.controller.cpus, [port, metrics_port])
    base, metrics_url = (url_of(address, number) for number in (port, metrics_port))
    serves = (*workers, *prefill, *decode)[0].plan.served_name
    return Router(name, base, tuple(argv), process, metrics_url=metrics_url, serves=serves)
