"""Commands and environment of Dynamo's parts, requests in its own way, and the stand-in for torchvision."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from disagglab.config.labs import load_lab
from disagglab.config.schema import Lab
from disagglab.errors import InvalidRun
from disagglab.hosts.host import HostProcess
from disagglab.hosts.weights import Model
from disagglab.serving.dynamo import deployment, parts
from disagglab.serving.dynamo.deployment import require_events
from disagglab.serving.dynamo.parts import (
    AGGREGATED,
    BACKEND,
    PREFILL,
    Frontend,
    Planes,
    Worker,
    WorkerPlan,
    WorkerPorts,
    body,
    frontend_argv,
    frontend_env,
    on_worker,
    plan_worker,
    settings,
)
from disagglab.serving.dynamo.worker import STOOD_IN
from disagglab.serving.prometheus import PROCESS_START, parse
from disagglab.serving.topology import DISAGGREGATED, ROUTED, Topology

PYTHON = "/opt/dynamo/bin/python"
MODEL = Model("M", Path("/models/m"), {"max_position_embeddings": 8192})
PORTS = WorkerPorts(system=21000, requests=21001, events=21002)
PLANES = Planes(etcd="http://127.0.0.1:2379", lease_s=7)
LIMIT_S = 120.0


@pytest.fixture
def lab() -> Lab:
    """The embedded lab, with options that only vLLM's API server has."""
    lab = load_lab("embedded")
    args = {**lab.vllm.args, "enable-prompt-tokens-details": True, "enable-scale-out": True, "block-size": 32}
    return lab.model_copy(update={"vllm": lab.vllm.model_copy(update={"args": args})})


def plan(lab: Lab, node: int = 0, mode: str = AGGREGATED, **more: Any) -> WorkerPlan:
    """The plan of one worker."""
    ports = WorkerPorts(21000, 21001, 21002, 21003 if mode == DISAGGREGATED else None)
    env = settings(PLANES, "ns", lab.nodes[node].address)
    return plan_worker(lab, lab.nodes[node], MODEL, "M-12", ports, PYTHON, env, mode=mode, **more)


def after(argv: tuple[str, ...], option: str) -> str:
    """The value of an option."""
    return argv[argv.index(option) + 1]


def test_a_worker_runs_the_labs_engine(lab: Lab) -> None:
    """Options and environment of the engine are a server's, without what only its API takes."""
    made = plan(lab)
    assert made.argv[:5] == (PYTHON, "-m", "disagglab.serving.dynamo.worker", "--model", "/models/m")
    assert after(made.argv, "--block-size") == "32"
    assert "--enforce-eager" in made.argv
    assert not {"--enable-prompt-tokens-details", "--enable-scale-out", "--host", "--port"} & set(made.argv)
    assert json.loads(after(made.argv, "--kv-events-config"))["endpoint"] == "tcp://*:21002"
    assert "--kv-transfer-config" not in made.argv
    assert "--disaggregation-mode" not in made.argv
    assert made.env["VLLM_CPU_OMP_THREADS_BIND"] == "0"
    assert (made.env["DYN_SYSTEM_PORT"], made.env["DYN_TCP_RPC_PORT"]) == ("21000", "21001")
    assert made.url == "http://127.0.0.1:21000"
    assert made.component == BACKEND
    assert "DYN_SYSTEM_PORT=21000" in made.command


@pytest.mark.parametrize(
    ("node", "role", "kv_role", "component"),
    [(0, "prefill", "kv_producer", PREFILL), (1, "decode", "kv_consumer", BACKEND)],
)
def test_roles_reach_the_command(lab: Lab, node: int, role: str, kv_role: str, component: str) -> None:
    """A worker of a pair has its role, its connector and its side channel; who decodes is the backend."""
    made = plan(lab, node, DISAGGREGATED)
    assert after(made.argv, "--disaggregation-mode") == role
    assert json.loads(after(made.argv, "--kv-transfer-config"))["kv_role"] == kv_role
    assert made.env["VLLM_NIXL_SIDE_CHANNEL_PORT"] == "21003"
    assert made.component == component
    assert made.connector
    assert WorkerPorts(1, 2, 3, 4).all == [1, 2, 3, 4]
    assert PORTS.all == [21000, 21001, 21002]


def test_planes_are_settings() -> None:
    """etcd or files for discovery, TCP or NATS for requests; nothing is set that the other needs."""
    by_etcd = PLANES.env
    assert by_etcd["DYN_DISCOVERY_BACKEND"] == "etcd"
    assert (by_etcd["ETCD_ENDPOINTS"], by_etcd["ETCD_LEASE_TTL"]) == ("http://127.0.0.1:2379", "7")
    assert by_etcd["DYN_REQUEST_PLANE"] == "tcp"
    assert not {"DYN_FILE_KV", "NATS_SERVER"} & set(by_etcd)
    other = Planes(folder="/shared", nats="nats://127.0.0.1:4222").env
    assert (other["DYN_DISCOVERY_BACKEND"], other["DYN_FILE_KV"]) == ("file", "/shared")
    assert (other["DYN_REQUEST_PLANE"], other["NATS_SERVER"]) == ("nats", "nats://127.0.0.1:4222")
    assert "ETCD_ENDPOINTS" not in other


def test_every_part_is_reached_at_the_address_given() -> None:
    """No part advertises an address that Dynamo worked out from the host's name."""
    env = settings(PLANES, "ns", "10.0.0.7")
    hosts = [value for key, value in env.items() if key.endswith("_HOST")]
    assert len(hosts) == 3
    assert set(hosts) == {"10.0.0.7"}
    assert frontend_env(env, 21009)["DYN_TCP_RESPONSE_STREAM_PORT"] == "21009"


def test_a_frontend_is_told_how_to_choose_and_how_often_to_migrate() -> None:
    """Its command names mode and limit, and no worker."""
    argv = frontend_argv(PYTHON, "127.0.0.1", 21008, "kv", 3)
    assert argv[1:3] == ["-m", "dynamo.frontend"]
    assert argv[-4:] == ["--router-mode", "kv", "--migration-limit", "3"]


def test_requests_say_what_a_frontend_understands() -> None:
    """vLLM's names for token ids are left out, Dynamo's is there; a worker is addressed by its lease's
    number.
    """
    worker = Worker(plan(load_lab("embedded")), cast(HostProcess, None))
    worker.instance = "1f"
    asked = on_worker(body("M", [1, 2], 3), worker)
    assert not {"return_token_ids", "logprobs"} & set(asked)
    assert asked["ignore_eos"] is True
    assert asked["nvext"] == {"extra_fields": ["completion_token_ids"], "backend_instance_id": 31}


METRICS = """
vllm:prompt_tokens_total{worker_id="1f"} 5.0
vllm:prompt_tokens_created{worker_id="1f"} 1.5e+09
dynamo_component_uptime_seconds{worker_id="1f"} 3.5
"""


def test_a_worker_without_a_start_time_is_told_by_its_counters(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When its counters were made stands for its start; its number is a label of its metrics."""
    monkeypatch.setattr(parts, "scrape", lambda name, url: parse(name, url, METRICS))
    worker = Worker(plan(lab), cast(HostProcess, SimpleNamespace(recorded=False)))
    assert worker.metrics().value(PROCESS_START) == 1.5e9
    assert worker.metrics().value("vllm:prompt_tokens_total") == 5
    assert worker.instance == "1f"


class Listener:
    """Stands for a frontend's metrics: events are counted only if it hears."""

    def __init__(self, hears: bool) -> None:
        self.hears = hears
        self.asked = 0

    def scrape(self, name: str, url: str) -> Any:
        """What its /metrics would say."""
        counter = "dynamo_component_kv_cache_events_applied"
        stored = f'{counter}{{event_type="stored",status="ok"}} {self.asked * self.hears}\n'
        failed = f'{counter}{{event_type="stored",status="invalid_block"}} {self.asked}\n'
        events = f"# TYPE {counter} counter\n{stored}{failed}" if self.asked else ""
        return parse(name, url, f"{parts.BLOCK_SIZE} 32\n{events}")

    def complete(self, url: str, request: dict[str, Any]) -> None:
        """A request that a worker answers."""
        assert len(request["prompt"]) == 65
        self.asked += 1


@pytest.fixture
def behind(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], tuple[Topology, Listener]]:
    """Two workers behind a frontend that hears of their blocks, or does not."""

    def made(hears: bool) -> tuple[Topology, Listener]:
        listener = Listener(hears)
        monkeypatch.setattr("disagglab.serving.router.scrape", listener.scrape)
        monkeypatch.setattr("disagglab.serving.openai.complete", listener.complete)
        monkeypatch.setattr(deployment, "EVENT_WAIT_S", 0.1)
        process = cast(HostProcess, SimpleNamespace())
        workers = tuple(Worker(plan(lab, node), process) for node in (0, 1))
        for number, worker in enumerate(workers):
            worker.instance = f"{number}"
        frontend = Frontend("f", "http://f", (), process, metrics_url="http://f", env={})
        return Topology("dynamo-kv", ROUTED, "0.31.0", frontend, workers), listener

    return made


def test_a_frontend_that_hears_every_worker_is_accepted(
    behind: Callable[[bool], tuple[Topology, Listener]],
) -> None:
    """Each worker is asked once, and its event is seen."""
    topology, listener = behind(True)
    require_events(topology)
    assert listener.asked == len(topology.servers)


def test_a_frontend_that_hears_nothing_is_refused(
    behind: Callable[[bool], tuple[Topology, Listener]],
) -> None:
    """The message names the worker, and what mends it."""
    topology, _ = behind(False)
    with pytest.raises(InvalidRun, match=r"a stored 10 blocks.*tcp://\*:PORT"):
        require_events(topology)


WORKER = """
import sys
from torchvision.transforms.v2 import functional
from transformers.utils import import_utils
print(sys.argv[1:], import_utils.is_torchvision_available(), functional.__doc__)
"""


def test_torchvision_is_stood_in_for_where_there_is_none(tmp_path: Path) -> None:
    """Dynamo's worker imports it, gets its arguments, and transformers still knows that there is none."""
    package = tmp_path / "dynamo" / "vllm"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(WORKER)
    answer = subprocess.run(
        [sys.executable, "-m", "disagglab.serving.dynamo.worker", "--model", "M"],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin"},
        check=False,
    )
    assert answer.stdout.strip() == "['--model', 'M'] False Stands in for a package that is not installed."
    assert STOOD_IN[-1] == "torchvision.transforms.v2.functional"
