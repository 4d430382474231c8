"""One real ``vllm serve``: its command, its environment, its start watched phase by phase, its identity
proved.
"""

from __future__ import annotations

import json
import re
import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from disagglab.address import url_of
from disagglab.config import way
from disagglab.config.schema import Lab, NodeSection
from disagglab.errors import StartError
from disagglab.hosts import release
from disagglab.hosts.host import Host, HostProcess
from disagglab.hosts.weights import Model
from disagglab.kv.shape import KvShape
from disagglab.results.records import Snapshot
from disagglab.serving import death, http
from disagglab.serving.causes import cause_of
from disagglab.serving.prometheus import scrape
from disagglab.serving.service import HTTP_TIMEOUT_S, Service, read_tail
from disagglab.variables import CPUS_VARIABLE

LOG_TAIL_LINES = 40
GIB = 2**30

# What the log says when a phase begins, in order. The last entry that matched is the present phase.
PHASES = (
    ("configure", re.compile(r"non-default args|version \d+\.\d+")),
    ("start engine", re.compile(r"Initializing a V1 LLM engine")),
    ("load weights", re.compile(r"Starting to load model|Loading (model )?weights")),
    (
        "compile",
        re.compile(r"Dynamo bytecode transform|Compiling a graph|torch\.compile takes|Capturing CUDA graphs"),
    ),
    ("KV cache", re.compile(r"KV cache size|Registering KV_Caches")),
    ("open HTTP", re.compile(r"Starting vLLM server|Application startup complete")),
)


@dataclass(frozen=True)
class EventSource:
    """Where one may hear which KV blocks a server stores and drops.

    ``url``: the server's; ``events``: the ZeroMQ endpoint on which it publishes.
    """

    url: str
    events: str


@dataclass(frozen=True)
class ServerPlan:
    """The exact command and environment of one server, known before it starts.

    ``events_port``: of its KV events; None where it publishes none.
    """

    node: NodeSection
    served_name: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    port: int
    connector: bool
    tag: str = ""
    events_port: int | None = field(default=None, kw_only=True)

    @property
    def url(self) -> str:
        """Base URL, without ``/v1``."""
        return url_of(self.node.address, self.port)

    @property
    def process_name(self) -> str:
        """Name of its process, lease and log."""
        return f"vllm-{self.node.name}" + ("" if self.connector or self.tag else "-dedicated") + self.tag

    @property
    def event_source(self) -> EventSource | None:
        """Where a router hears of its KV blocks; None where it publishes no events."""
        if self.events_port is None:
            return None
        return EventSource(self.url, url_of(self.node.address, self.events_port, "tcp"))

    @property
    def command(self) -> str:
        """The command as one would type it, environment first."""
        settings = [f"{key}={shlex.quote(value)}" for key, value in sorted(self.env.items())]
        return " ".join([*settings, *map(shlex.quote, self.argv)])


def plan_server(
    lab: Lab,
    node: NodeSection,
    model: Model,
    served_name: str,
    port: int,
    side_channel_port: int | None,
    python: str,
    tag: str = "",
    events_port: int | None = None,
) -> ServerPlan:
    """Work out one server's command.

    Args:
        model: with folders as they are on the node's host.
        side_channel_port: None for a server without any connector.
        python: Python on the node's host that holds the lab's vLLM version.
        tag: tells its process from another deployment's.
        events_port: for its KV events; None for a server that publishes none.
    """
    argv = [
        python,
        "-m",
        "vllm.entrypoints.cli.main",
        "serve",
        str(model.folder),
        "--served-model-name",
        served_name,
        "--host",
        node.address,
        "--port",
        str(port),
    ]
    options, env = plan_engine(lab, node, model, side_channel_port)
    if events_port is not None:
        options += ["--kv-events-config", json.dumps(events_config(events_port, topic=""))]
    connector = side_channel_port is not None
    return ServerPlan(
        node, served_name, (*argv, *options), env, port, connector, tag, events_port=events_port
    )


def events_config(port: int, host: str = "*", topic: str = "kv-events") -> dict[str, object]:
    """The ``--kv-events-config`` of a server that publishes on a port.

    Two settings fail without a word. The endpoint has to be ``tcp://*:PORT``: vLLM binds one with an asterisk
    and connects to any other, so that nobody hears anything. And for vllm-router 0.1.17 the topic has to be
    empty: it subscribes to all topics, and leaves events of a named one out of its index.
    """
    return {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "topic": topic,
        "endpoint": url_of(host, port, "tcp"),
    }


def plan_engine(
    lab: Lab, node: NodeSection, model: Model, side_channel_port: int | None
) -> tuple[list[str], dict[str, str]]:
    """Options and environment of a node's vLLM engine, whichever program runs it; see :func:`plan_server`."""
    argv = ["--dtype", lab.model.dtype, "--max-model-len", str(lab.model.max_model_len)]
    if model.other_tokenizer is not None:
        argv += ["--tokenizer", str(model.other_tokenizer)]
    if lab.model.load_format != "auto":
        argv += ["--load-format", lab.model.load_format]
    for key, value in {**lab.vllm.args, **node.args}.items():
        if value is True:
            argv.append(f"--{key}")
        elif value is False:
            argv.append(f"--no-{key}")
        else:
            argv += [f"--{key}", str(value)]
    env = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_COLOR": "0"}
    if node.cpus:
        env[way.BIND_VARIABLE] = way.bound(node.cpus, way.ranks(lab))
        if lab.transport.keep_node_cpus:
            env[CPUS_VARIABLE] = ",".join(map(str, node.cpus))
    if node.gpus:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, node.gpus))
    if side_channel_port is not None:
        transfer = {
            "kv_connector": lab.transport.connector,
            "kv_role": "kv_producer" if node.role == "prefill" else "kv_consumer",
            "kv_buffer_device": lab.transport.kv_buffer_device,
            "kv_load_failure_policy": lab.transport.load_failure_policy,
            "kv_connector_extra_config": {"kv_lease_duration": lab.transport.lease_s, **lab.transport.extra},
        }
        argv += ["--kv-transfer-config", json.dumps(transfer)]
        env["VLLM_NIXL_SIDE_CHANNEL_HOST"] = node.kv_address
        env["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(side_channel_port)
        env.update(lab.transfer_variables(node))
    env.update(lab.vllm.env)
    env.update(node.env)
    return argv, env


@dataclass
class VllmServer(Service):
    """A running server. Build it with :meth:`start`, wait with :func:`serving.boot.wait_ready`."""

    plan: ServerPlan
    process: HostProcess
    started: float = field(default_factory=time.monotonic)
    ready_s: float | None = None

    @classmethod
    def start(cls, host: Host, lab: Lab, plan: ServerPlan, ports: list[int]) -> VllmServer:
        """Start the process; it is not ready yet.

        Raises:
            StartError: if the command cannot be executed.
        """
        stop_bytes = round(lab.memory.stop_gib * GIB)
        process = host.start(
            plan.process_name, plan.argv, plan.env, plan.node.cpus, ports, memory_stop_bytes=stop_bytes
        )
        return cls(plan, process)

    @property
    def name(self) -> str:
        """The node's name."""
        return self.plan.node.name

    @property
    def url(self) -> str:
        """Base URL, without ``/v1``."""
        return self.plan.url

    @property
    def command(self) -> str:
        """The command as one would type it, environment first."""
        return self.plan.command

    def metrics(self) -> Snapshot:
        """Scrape the server now."""
        return scrape(self.name, self.url)

    def is_ready(self) -> bool:
        """Whether this very process answers on the port with this run's model name.

        Raises:
            StartError: if somebody else answers there.
        """
        try:
            answer = http.get(f"{self.url}/v1/models", HTTP_TIMEOUT_S)
        except httpx.HTTPError:
            return False
        names = [row["id"] for row in answer.json().get("data", [])] if answer.status_code == 200 else []
        if self.plan.served_name not in names:
            raise StartError(
                f"{self.name}: {self.url} answers as {names or answer.status_code},"
                f" not as {self.plan.served_name};"
                f" another server has the port: ss -tlnp 'sport = :{self.plan.port}'"
            )
        if self.process.is_anothers_port(self.plan.port):
            raise StartError(
                f"{self.name}: port {self.plan.port} belongs to a process which this run did not start;"
                f" see: ss -tlnp 'sport = :{self.plan.port}'"
            )
        return True

    def require_release(self, version: str) -> None:
        """Let the server itself say which vLLM release it is.

        Raises:
            StartError: if it is another one.
        """
        if not self.process.recorded:
            release.require_served(self.name, self.url, version)

    def phase(self) -> str:
        """What the start is doing now, read from the log."""
        return phase_of(read_tail(self.process.log, 400))

    def cpu_s(self) -> float:
        """CPU time used by the server's living processes so far, s."""
        return self.process.cpu_s()

    def require_alive(self) -> None:
        """Refuse to go on with a dead server.

        Raises:
            Died: with how it died.
        """
        death.require_alive(self.process, self.plan.node.role)


def keeps_prefixes(lab: Lab, shape: KvShape) -> bool:
    """Whether the lab's servers find KV blocks of earlier prompts again (prefix caching).

    The lab file may switch that off. vLLM does where latent attention (MLA) runs on a CPU: ``vllm/platforms/
    cpu.py``, "MLA is enabled on a non-GPU platform".
    """
    if lab.vllm.args.get("enable-prefix-caching") is False:
        return False
    latent = any(layer.value_dim == 0 for layer in shape.layers)
    return not latent or all(node.gpus for node in lab.nodes)


def phase_of(lines: list[str]) -> str:
    """The last phase of PHASES that the log lines show; ``import`` before the first."""
    phase = "import"
    for name, pattern in PHASES:
        if any(pattern.search(line) for line in lines):
            phase = name
    return phase


def post_mortem(log: Path) -> str:
    """Likely cause, mend and the last lines of a server's log that does not come up."""
    lines = read_tail(log, LOG_TAIL_LINES)
    cause, mend = cause_of(read_tail(log, 400))
    return f"likely cause: {cause}\nmend: {mend}\nlast {len(lines)} lines of {log}:\n" + "\n".join(lines)
