"""The parts of NVIDIA Dynamo: workers that announce themselves, frontends that find them and route to them.

A worker is vLLM in one process with Dynamo's runtime (``dynamo.vllm``); a frontend is HTTP server, tokenizer
and router in one (``dynamo.frontend``). Neither is told where the other is. A worker writes its address into
the registry, under a lease that it keeps alive; frontends watch the registry.

    client --HTTP--> frontend --TCP or NATS--> worker (vLLM)        request plane
                        ^ |                      |
                        | +------- etcd <--------+ address, model   discovery
                        +---------- ZMQ ---------+ blocks stored    event plane
"""

from __future__ import annotations

import functools
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import httpx

from disagglab.config.schema import Lab, NodeSection
from disagglab.errors import InvalidRun, StartError
from disagglab.hosts.host import Host
from disagglab.hosts.weights import Model
from disagglab.results.records import Snapshot
from disagglab.serving import http, openai
from disagglab.serving.prometheus import PROCESS_START, scrape
from disagglab.serving.router import Router
from disagglab.serving.service import HTTP_TIMEOUT_S
from disagglab.serving.topology import DISAGGREGATED
from disagglab.serving.vllm import GIB, ServerPlan, VllmServer, events_config, plan_engine

AGGREGATED = "aggregated"
KV, ROUND_ROBIN = "kv", "round-robin"  # of --router-mode
BACKEND, PREFILL = "backend", "prefill"  # components: who decodes (or does all), who only prefills
STOP_S = 20.0  # beyond the drain, for the engine to end: 5 s
DRAIN_S = 5.0  # Dynamo's own: what a worker that was asked to go leaves its requests
SERVER_OPTIONS = ("enable-prompt-tokens-details", "enable-scale-out")  # of vLLM's API server alone
ENGINE = "Initializing a V1 LLM engine (v"  # vLLM's core.py, in the log of every worker
LEASE_S = 10  # Dynamo's own: 30; shorter, so that a test sees a crash within seconds

# exposed as a counter without _total, which the parser adds (prometheus_client/parser.py)
EVENTS_APPLIED = "dynamo_component_kv_cache_events_applied_total"
EVENT_SOURCES = "dynamo_component_router_kv_zmq_ingress_sources"
HIT_RATE = "dynamo_component_router_kv_hit_rate_sum"
UPTIME = "dynamo_component_uptime_seconds"
COUNTERS_MADE = "vllm:prompt_tokens_created"
BLOCK_SIZE = "dynamo_frontend_model_kv_cache_block_size"


@dataclass(frozen=True)
class Planes:
    """What joins the parts. ``etcd``, ``nats``: URLs; without them, discovery is by files in ``folder`` and
    requests go over TCP. Events of KV blocks go over ZMQ in any case.

    ``lease_s``: how long a worker without a sign of life stays in etcd.
    """

    etcd: str = ""
    folder: str = ""
    nats: str = ""
    lease_s: int = LEASE_S

    @property
    def env(self) -> dict[str, str]:
        """The environment that says so to a frontend or worker."""
        if self.etcd:
            found = {"ETCD_ENDPOINTS": self.etcd, "ETCD_LEASE_TTL": str(self.lease_s)}
        else:
            found = {"DYN_FILE_KV": self.folder}
        nats = {"NATS_SERVER": self.nats} if self.nats else {}
        return {
            "DYN_DISCOVERY_BACKEND": "etcd" if self.etcd else "file",
            "DYN_REQUEST_PLANE": "nats" if self.nats else "tcp",
            "DYN_EVENT_PLANE": "zmq",
            **found,
            **nats,
        }


@dataclass(frozen=True)
class WorkerPorts:
    """Ports of one worker: HTTP of the runtime, requests, KV events of the engine, NIXL's side channel."""

    system: int
    requests: int
    events: int
    side_channel: int | None = None

    @property
    def all(self) -> list[int]:
        """Every one of them."""
        found = (self.system, self.requests, self.events, self.side_channel)
        return [port for port in found if port is not None]


@dataclass(frozen=True)
class WorkerPlan(ServerPlan):
    """The command of one worker. ``port`` is its runtime's: /health and /metrics, no API.

    ``drain_s``: what it leaves its requests when it is asked to go.
    """

    component: str = field(default=BACKEND, kw_only=True)
    drain_s: float = field(default=DRAIN_S, kw_only=True)

    @property
    def process_name(self) -> str:
        """Name of its process, lease and log."""
        return f"dynamo-{self.node.name}{self.tag}"


def settings(planes: Planes, namespace: str, address: str) -> dict[str, str]:
    """The environment of every part of a deployment. ``address``: where the others reach this one.

    What is not set here, Dynamo would derive from the name of the host.
    """
    return {
        **planes.env,
        "DYN_NAMESPACE": namespace,
        "DYN_EVENT_PLANE_HOST": address,
        "DYN_TCP_RPC_HOST": address,
        "DYN_TCP_RESPONSE_STREAM_HOST": address,
        "DYN_SDK_DISABLE_ANSI_LOGGING": "1",
        "DYN_LOG": "info,tower_http=off",  # else each look at /health is a line that seems a sign of life
        "NO_COLOR": "1",
        "HF_HUB_OFFLINE": "1",
    }


def engine_lab(lab: Lab) -> Lab:
    """The lab without options of vLLM's API server, which no worker has."""
    args = {key: value for key, value in lab.vllm.args.items() if key not in SERVER_OPTIONS}
    return lab.model_copy(update={"vllm": lab.vllm.model_copy(update={"args": args})})


def plan_worker(
    lab: Lab,
    node: NodeSection,
    model: Model,
    served_name: str,
    ports: WorkerPorts,
    python: str,
    env: Mapping[str, str],
    *,
    mode: str = AGGREGATED,
    events_host: str = "*",
    drain_s: float = DRAIN_S,
    tag: str = "",
) -> WorkerPlan:
    """Work out one worker's command.

    Args:
        model: with folders as they are on the node's host.
        python: Python on that host that has Dynamo.
        env: of :func:`settings`.
        mode: AGGREGATED, or DISAGGREGATED, where the node's role decides what it does.
        events_host: where the engine publishes its KV events; any but ``*`` silences it, see
            :func:`disagglab.serving.vllm.events_config`.
    """
    options, engine_env = plan_engine(engine_lab(lab), node, model, ports.side_channel)
    events = events_config(ports.events, host=events_host)
    argv = [
        *(python, "-m", "disagglab.serving.dynamo.worker", "--model", str(model.folder)),
        *("--served-model-name", served_name, *options, "--kv-events-config", json.dumps(events)),
    ]
    if mode == DISAGGREGATED:
        argv += ["--disaggregation-mode", node.role]
    own = {
        "DYN_SYSTEM_HOST": node.address,
        "DYN_SYSTEM_PORT": str(ports.system),
        "DYN_TCP_RPC_PORT": str(ports.requests),
        "DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS": f"{drain_s:g}",
        "VLLM_HOST_IP": node.address,
    }
    return WorkerPlan(
        node,
        served_name,
        tuple(argv),
        {**env, **own, **engine_env},
        ports.system,
        ports.side_channel is not None,
        tag,
        component=PREFILL if mode == DISAGGREGATED and node.role == "prefill" else BACKEND,
        drain_s=drain_s,
    )


def frontend_argv(python: str, address: str, port: int, router_mode: str, migration_limit: int) -> list[str]:
    """The command of a frontend.

    Args:
        migration_limit: how often a request may go on on another worker when its own is lost.
    """
    return [
        *(python, "-m", "dynamo.frontend", "--http-host", address, "--http-port", str(port)),
        *("--router-mode", router_mode, "--migration-limit", str(migration_limit)),
    ]


def frontend_env(env: Mapping[str, str], answers_port: int) -> dict[str, str]:
    """The environment of a frontend. ``answers_port``: where workers connect to with their answers."""
    return {**env, "DYN_TCP_RESPONSE_STREAM_PORT": str(answers_port)}


@dataclass
class Worker(VllmServer):
    """A running worker."""

    plan: WorkerPlan

    @classmethod
    def launch(cls, host: Host, lab: Lab, plan: WorkerPlan, ports: Sequence[int]) -> Worker:
        """Start the process; it is not ready yet.

        Raises:
            StartError: if the command cannot be executed.
        """
        process = host.start(
            plan.process_name,
            plan.argv,
            plan.env,
            plan.node.cpus,
            ports,
            grace_s=plan.drain_s + STOP_S,
            memory_stop_bytes=round(lab.memory.stop_gib * GIB),
        )
        return cls(plan, process)

    @functools.cached_property
    def instance(self) -> str:
        """The number of its lease, hexadecimal: its name in the registry, and a label of its metrics."""
        if self.process.recorded:
            return f"LEASE-{self.name}"
        return next(
            dict(labels)["worker_id"]
            for name, labels, _ in scrape(self.name, self.url).samples
            if name == UPTIME
        )

    def metrics(self) -> Snapshot:
        """Scrape the worker now.

        It exposes no start of its process. When the process made its counters serves as well: it is as
        constant, and no other process has the same.
        """
        found = scrape(self.name, self.url)
        start = (PROCESS_START, frozenset[tuple[str, str]](), found.value(COUNTERS_MADE))
        return replace(found, samples=(*found.samples, start))

    def endpoints(self) -> dict[str, str]:
        """What it takes requests for, and whether it is ready for that; empty while the worker is not."""
        answer = _answer(f"{self.url}/health") or {}
        found: dict[str, str] = answer.get("endpoints", {})
        return found

    def is_ready(self) -> bool:
        """Whether this very process says that it takes requests.

        Raises:
            StartError: if somebody else answers on its port.
        """
        ready = self.endpoints().get("generate") == "ready"
        if ready and self.process.is_anothers_port(self.plan.port):
            raise StartError(
                f"{self.name}: port {self.plan.port} belongs to a process which this run did not start;"
                f" see: ss -tlnp 'sport = :{self.plan.port}'"
            )
        return ready

    def require_release(self, version: str) -> None:
        """Let the worker's log say which vLLM release it runs; it has no API that would.

        Raises:
            StartError: if it is another one.
        """
        wanted = f"{ENGINE}{version}"
        if self.process.recorded:
            return
        if not any(wanted in text for text in self.process.lines_so_far()):
            raise StartError(
                f"{self.name}: {self.process.log} does not say {wanted}); Dynamo runs the vLLM of .venv,"
                " whatever --vllm says; set [vllm] version to that"
            )


@dataclass(frozen=True)
class Frontend(Router):
    """A running frontend: it stands where a topology has its router.

    ``wanted``: the workers that it has to know before it is ready; ``hears``: from how many of them it has
    to hear KV events.
    """

    env: Mapping[str, str] = field(kw_only=True)
    wanted: frozenset[str] = field(default=frozenset(), kw_only=True)
    hears: int = field(default=0, kw_only=True)

    def is_ready(self) -> bool:
        """Whether it serves the model, has found the workers, and hears their events."""
        return (
            self.serves in self.models()
            and self.wanted <= self.instances()
            and self.listens_to() >= self.hears
        )

    def lacks(self) -> str:
        """What it has of that."""
        return (
            f"it has models {self.models()} and workers {self.instances()} of {set(self.wanted)}, and"
            f" listens to {self.listens_to()} of {self.hears}"
        )

    @property
    def command(self) -> str:
        """The command as one would type it, environment first."""
        values = [f"{key}={shlex.quote(value)}" for key, value in sorted(self.env.items())]
        return " ".join([*values, shlex.join(self.argv)])

    def models(self) -> list[str]:
        """The models that it serves; empty while it does not answer."""
        answer = _answer(f"{self.url}/v1/models") or {}
        return [row["id"] for row in answer.get("data", [])]

    def instances(self) -> set[str]:
        """The workers that it knows, by their number in the registry."""
        answer = _answer(f"{self.url}/health") or {}
        rows = answer.get("instances", [])
        return {f"{row['instance_id']:x}" for row in rows if row["endpoint"] == "generate"}

    def listens_to(self) -> int:
        """How many workers' events it is connected to."""
        try:
            return round(self.metrics().value(EVENT_SOURCES, state="active"))
        except InvalidRun:  # no model, no metric
            return 0


def body(model: str, prompt: str | list[int], output_tokens: int) -> dict[str, Any]:
    """A greedy completion request of exactly ``output_tokens`` tokens, as a frontend takes it.

    It refuses what it does not know, vLLM's ``return_token_ids`` too, and has another name for that.
    """
    asked = openai.body(model, prompt, output_tokens)
    for unknown in ("return_token_ids", "logprobs"):
        del asked[unknown]
    return asked | {"nvext": {"extra_fields": ["completion_token_ids"]}}


def on_worker(request: Mapping[str, Any], worker: Worker) -> dict[str, Any]:
    """A request that a frontend in mode ``kv`` sends to this worker, whatever its cache holds."""
    extension = {**request.get("nvext", {}), "backend_instance_id": int(worker.instance, 16)}
    return {**request, "nvext": extension}


def _answer(url: str) -> dict[str, Any] | None:
    """What an address answers with 200; None without that."""
    try:
        answer = http.get(url, HTTP_TIMEOUT_S)
    except httpx.HTTPError:
        return None
    if answer.status_code != httpx.codes.OK:
        return None
    found: dict[str, Any] = answer.json()
    return found
