"""The dry run shows the commands of a session, and starts, connects to and writes nothing."""

from __future__ import annotations

import io
import json
import re
import shlex
import socket
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest

from disagglab.config import way
from disagglab.config.arms import Arms
from disagglab.config.checks import ports_needed
from disagglab.config.labs import load_lab
from disagglab.config.schema import HostSection, Lab
from disagglab.experiments import dry_run, routing
from disagglab.hosts import recording, shaping, ssh
from disagglab.hosts.namespaces import UNSHARE
from disagglab.hosts.recording import RecordingHosts
from disagglab.hosts.remote import bundle
from disagglab.paths import LABS
from disagglab.predict.strategies import STRATEGIES
from disagglab.progress import ProgressLine
from disagglab.serving.topology import TOPOLOGIES

NAMES = sorted(file.stem for file in LABS.glob("*.toml"))


@pytest.fixture(autouse=True)
def nothing_happens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Processes and connections are errors; the account's SSH configuration is empty."""

    def refuse(*args: Any, **_: Any) -> None:
        raise AssertionError(f"the dry run did something: {args}")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "bind", refuse)
    monkeypatch.setattr(ssh, "USER_CONFIG", str(tmp_path / "config"))


def sections(lab: Lab, **options: Any) -> dict[str, list[str]]:
    """The plan's lines by host, less what single lessons start, which has tests of its own below."""
    found: dict[str, list[str]] = {"": []}
    name, lesson = "", False
    for line in dry_run.lines(lab, **options):
        if line.startswith("# ===== "):
            name = line.removeprefix("# ===== ").partition(":")[0]
        if line.startswith(("# ===== ", "# --- ")):
            lesson = line.startswith("# --- tests/") and "link_rates" not in line
        if not lesson:
            found.setdefault(name, []).append(line)
    return found


def starts_router(line: str) -> bool:
    """Whether it is the command of a router."""
    return "/vllm-router" in line and not line.startswith("#")


def part(lab: Lab, heading: str) -> list[str]:
    """The commands below one heading, all hosts together."""
    found, inside = [], False
    for line in dry_run.lines(lab):
        if line.startswith(("# ===== ", "# --- ")):
            inside = line.startswith(f"# --- {heading}")
        elif inside and line and not line.startswith("#"):
            found.append(line)
    return found


def words(line: str) -> list[str]:
    """A command as a shell would take it apart, without its environment."""
    return [word for word in shlex.split(line) if not re.match(r"^[A-Z_]+=", word)]


def one(lines: list[str], part: str) -> str:
    """The one command that contains ``part``."""
    (found,) = [line for line in lines if part in line and not line.startswith("#")]
    return found


def option(line: str, name: str) -> str:
    found = words(line)
    return found[found.index(name) + 1]


@pytest.mark.parametrize("name", NAMES)
def test_every_lab_has_a_plan_with_all_servers_routers_and_loads(name: str) -> None:
    lab = load_lab(name)
    lines = [line for found in sections(lab).values() for line in found if not line.startswith("#")]
    assert sum(" serve " in line and "entrypoints" in line for line in lines) == len(lab.nodes)
    assert sum(starts_router(line) for line in lines) == len(TOPOLOGIES)
    workloads = {gate.workload for gate in lab.gates}
    assert sum("vllm bench serve" in line for line in lines) == len(TOPOLOGIES) * len(workloads)


def test_spark_needs_no_spark_and_says_what_runs_where() -> None:
    lab = load_lab("spark")
    found = sections(lab)
    assert list(found) == ["", "local", "spark-01", "spark-02"]
    server = one(found["spark-01"], "entrypoints")
    assert words(server)[0] == "disagg-lab/.venv/bin/python"
    assert "UCX_NET_DEVICES=rocep1s0f0:1,roceP2p1s0f0:1" in shlex.split(server)
    assert "VLLM_NIXL_SIDE_CHANNEL_HOST=192.168.100.10" in shlex.split(server)
    assert option(server, "--host") == "192.168.100.10"
    assert '"kv_buffer_device": "cpu"' in option(server, "--kv-transfer-config")
    assert lab.model.id in words(server)
    assert '"kv_consumer"' in one(found["spark-02"], "entrypoints")
    assert not any("entrypoints" in line for line in found["local"])
    assert not any("unshare" in line or line.startswith("tc ") for lines in found.values() for line in lines)


def test_routers_lead_to_the_ports_that_the_servers_listen_on() -> None:
    found = [line for lines in sections(load_lab("embedded")).values() for line in lines]
    a, b = (line for line in found if "entrypoints" in line)
    urls = [f"http://127.0.0.1:{option(server, '--port')}" for server in (a, b)]
    single, replicated, split = (line for line in found if starts_router(line))
    assert words(single)[-2:] == ["--worker-urls", urls[0]]
    assert words(replicated)[-3:] == ["--worker-urls", *urls]
    assert (option(split, "--prefill"), option(split, "--decode")) == (urls[0], urls[1])
    loads = [line for line in found if "vllm bench serve" in line and not line.startswith("#")]
    assert {option(load, "--base-url") for load in loads} == {
        f"http://127.0.0.1:{option(router, '--port')}" for router in (single, replicated, split)
    }


def test_no_port_of_an_address_is_given_twice() -> None:
    """Of the lab's own servers and routers and those of two releases, and as many as the lab check counts."""
    lab = load_lab("embedded")
    hosts = RecordingHosts(lab)
    hosts.open()
    workers = routing.workers(hosts, lab, dry_run.model_of(lab), routing.FULL)
    stages = dry_run.deploy(hosts, lab, "0.30.0", dedicated=True)
    workers.start(ProgressLine("workers", stream=io.StringIO()))
    with workers.routed(STRATEGIES["random"]) as routed:
        topologies = [topology for stage in stages for topology in stage.topologies] + [routed]
    ports = []
    for server in [*workers.servers, *(one for stage in stages for one in stage.deployment.servers)]:
        channel = server.plan.env.get("VLLM_NIXL_SIDE_CHANNEL_PORT")
        ports += [server.plan.port, *([int(channel)] if channel else [])]
        ports += [server.plan.events_port] if server.plan.events_port else []
    for topology in topologies:
        argv = topology.router.argv
        ports += [int(argv[argv.index(name) + 1]) for name in ("--port", "--prometheus-port")]
    assert len(ports) == len(set(ports)) == ports_needed(2, 2)
    assert min(ports) == lab.ports.first


def test_workers_publish_events_and_each_strategy_has_its_router() -> None:
    """The routers of the strategies follow one another, so they are shown with the same ports."""
    found = part(load_lab("embedded"), "tests/routing")
    servers = [line for line in found if "entrypoints" in line]
    routers = [line for line in found if starts_router(line)]
    sources = []
    for command in servers:
        assert option(command, "--num-gpu-blocks-override") == str(routing.FULL.blocks)
        assert "--enable-scale-out" in words(command)
        assert "--kv-transfer-config" not in words(command)
        events = json.loads(option(command, "--kv-events-config"))["endpoint"].removeprefix("tcp://*:")
        sources.append(f"http://127.0.0.1:{option(command, '--port')}=tcp://127.0.0.1:{events}")
    assert [option(line, "--policy") for line in routers] == [one.policy for one in STRATEGIES.values()]
    assert len({option(line, "--port") for line in routers}) == 1
    told = [words(line) for line in routers if "--kv-event-source" in line]
    assert len(told) == sum(strategy.events for strategy in STRATEGIES.values()) == 1
    assert all(told[0][told[0].index(source) - 1] == "--kv-event-source" for source in sources)


def test_dynamo_is_in_the_plan_with_its_stores_workers_and_frontends() -> None:
    """The parts find each other by etcd: all of them are told the address at which it is started."""
    lab = load_lab("embedded")
    stores, workers, pair = (
        part(lab, f"tests/dynamo: {name}") for name in ("etcd", "aggregated", "disaggregated")
    )
    url = option(stores[1], "--advertise-client-urls")
    assert " -js " in stores[2]
    for commands, transfer, frontends in ((workers, False, 2), (pair, True, 1)):
        started = [line for line in commands if "disagglab.serving.dynamo.worker" in line]
        assert ["--kv-transfer-config" in line for line in started] == [transfer] * 2
        assert sum("dynamo.frontend" in line for line in commands) == frontends
        assert len(commands) == 2 + frontends
        assert all(f"ETCD_ENDPOINTS={url}" in shlex.split(line) for line in commands)
    roles = [option(line, "--disaggregation-mode") for line in pair if "dynamo.worker" in line]
    assert roles == ["prefill", "decode"]


@pytest.mark.parametrize("name", ["two-hosts", "spark"])
def test_dynamo_runs_on_one_host_alone(name: str) -> None:
    lab = load_lab(name)
    assert part(lab, "tests/dynamo") == []
    assert any("nothing: Dynamo runs on one host alone" in line for line in dry_run.lines(lab))


def test_over_ipv6_every_url_has_brackets_and_what_needs_ipv4_is_left_out() -> None:
    """No word of a command is a URL that httpx refuses; KV events and Dynamo are said to be left out."""
    lab = load_lab("embedded-ipv6")
    found = [line for lines in sections(lab).values() for line in lines]
    urls = [word for line in found if line[:1] != "#" for word in shlex.split(line) if "http://" in word]
    assert len(urls) > len(lab.nodes)
    assert {httpx.URL(url).host for url in urls} == {"::1"}
    assert not any("--kv-events-config" in line for line in found)
    assert part(lab, "tests/routing") == part(lab, "tests/dynamo") == []
    assert sum(line.startswith("# nothing: ::1 is IPv6") for line in dry_run.lines(lab)) == 2


def test_what_servers_beside_each_other_take_of_a_gpu_is_said() -> None:
    """Where the lab file gives the size of their caches: as soon as a way is asked for."""
    lab = load_lab("two-h200")
    chosen = way.chosen(lab, ["stock", "tcp"])
    lines = dry_run.lines(way.beside(lab, 2), ways=chosen)
    first = lines.index("# GPU 0: 115.4 GiB")
    assert lines[first + 2].split() == ["#", "gpu0", "15.0", "20.5", "3.0", "38.5"]
    assert lines[first + 4].split()[1] == "gpu0@tcp"
    assert "# GPU 1: 115.4 GiB" in lines
    assert not any(line.startswith("# GPU 0: ") for line in dry_run.lines(lab))


def test_probes_of_nodes_and_link_are_in_the_plan() -> None:
    """The reading end of the NIXL probe waits for the other's answer, so its command is the last."""
    spark = load_lab("spark")
    assert "kvprobe" in part(spark, "tests/kvcache")[0]
    owner, reader = sorted(part(spark, "tests/environment: NIXL"), key=lambda line: " read " in line)
    assert "nixlprobe own" in owner
    assert "nixlprobe read" in reader
    assert [words(line)[0] for line in part(spark, "tests/environment: TCP")] == ["iperf3", "iperf3"]
    assert part(load_lab("embedded"), "tests/environment: TCP") == [], "nothing lies between its nodes"


def test_made_hosts_come_with_the_commands_that_make_them_and_their_link() -> None:
    lab = load_lab("two-hosts")
    found = sections(lab)
    assert sum(shlex.join(UNSHARE) in line for line in found["local"]) == 2
    link = "#     link add data0 netns PID-alpha type veth peer name data0 netns PID-beta"
    batch = found["local"].index(link)
    assert any(line.startswith("ip -batch ") for line in found["local"][batch:])
    assert shlex.join(shaping.command(lab.nodes[0], dry_run.SHAPED_BIT_S)) in found["alpha"]
    assert one(found["alpha"], "exec python3").startswith("ssh -p 22 -i SCRATCH/client_key ")


def test_a_remote_host_is_told_first_to_end_what_earlier_sessions_left() -> None:
    lines = sections(load_lab("spark"))["spark-01"]
    deputy = lines.index(one(lines, "exec python3"))
    assert bundle()[0] in lines[deputy]
    reaping = next(number for number, line in enumerate(lines) if '"method": "reap"' in line)
    server = lines.index(one(lines, "entrypoints"))
    assert deputy < reaping < server


def test_a_jump_host_and_a_key_are_in_the_command() -> None:
    lab = load_lab("spark")
    hosts = (
        HostSection(name="spark-01", address="10.0.0.1", user="u", key_file="/k", jump="gate"),
        HostSection(name="spark-02", address="10.0.0.2", user="u"),
        HostSection(name="gate", address="gate.example", port=2222, user="g"),
    )
    lab = lab.model_copy(update={"hosts": hosts})
    command = shlex.split(recording.ssh_command(lab, hosts[0]))
    assert command[:5] == ["ssh", "-p", "22", "-i", "/k"]
    assert command[-3:] == ["-J", "g@gate.example:2222", "u@10.0.0.1"]
    gate = hosts[2].model_copy(update={"address": "fd00::9"})
    over_ipv6 = lab.model_copy(update={"hosts": (*hosts[:2], gate)})
    assert shlex.split(recording.ssh_command(over_ipv6, hosts[0]))[-2] == "g@[fd00::9]:2222"


def test_a_controller_of_its_own_runs_routers_and_load() -> None:
    lab = load_lab("spark")
    controller = lab.controller.model_copy(update={"host": "controller", "address": "192.168.100.12"})
    hosts = (*lab.hosts, HostSection(name="controller"))
    found = sections(lab.model_copy(update={"hosts": hosts, "controller": controller}))
    assert list(found) == ["", "local", "controller", "spark-01", "spark-02"]
    assert not any("vllm-router" in line for line in found["local"] if not line.startswith("#"))
    router = next(line for line in found["controller"] if starts_router(line))
    assert words(router)[0] == "disagg-lab/.venv/bin/vllm-router"
    assert option(router, "--host") == "192.168.100.12"


def test_an_environment_that_the_lab_file_names_serves() -> None:
    lab = load_lab("spark")
    named = lab.hosts[0].model_copy(update={"environments": {"0.31.0": "~/vllm", "0.30.0": "/opt/v/python3"}})
    lab = lab.model_copy(update={"hosts": (named, lab.hosts[1])})
    servers = [line for line in sections(lab, against="0.30.0")["spark-01"] if "entrypoints" in line]
    assert [words(server)[0] for server in servers] == ["vllm/bin/python", "/opt/v/python3"]
    other = [line for line in sections(lab, against="0.30.0")["spark-02"] if "entrypoints" in line]
    assert words(other[1])[0] == "disagg-lab/.venvs/vllm-0.30.0/bin/python"


def test_the_option_prints_the_plan_and_runs_no_session(
    pytestconfig: pytest.Config, capsys: pytest.CaptureFixture[str]
) -> None:
    from disagglab.pytest_plugin import plugin

    class Config:
        """A command line with --plan, and nothing that a session would need."""

        @staticmethod
        def getoption(name: str) -> Any:
            return {"--plan": True, "--lab": "spark"}.get(name)

    status: Any = plugin.pytest_cmdline_main(Config())  # type: ignore[arg-type]
    assert status == 0
    assert "# ===== spark-02: decode node spark-02" in capsys.readouterr().out
    assert pytestconfig.stash.get(plugin.SESSION, None) is None


def test_without_the_option_pytest_goes_on() -> None:
    from disagglab.pytest_plugin import plugin

    class Config:
        @staticmethod
        def getoption(_: str) -> bool:
            return False

    assert plugin.pytest_cmdline_main(Config()) is None  # type: ignore[arg-type]


def test_a_lab_that_is_not_there_is_a_usage_error() -> None:
    from disagglab.pytest_plugin import plugin

    class Config:
        @staticmethod
        def getoption(name: str) -> Any:
            return {"--plan": True, "--lab": "nope"}.get(name)

    with pytest.raises(pytest.UsageError, match="no such lab file"):
        plugin.pytest_cmdline_main(Config())  # type: ignore[arg-type]


def test_an_arm_that_is_left_out_has_no_router_and_no_load_in_the_plan() -> None:
    lab = load_lab("embedded")
    arms = Arms(("replicated", "disaggregated"), ("single", "single-again"))
    lines = dry_run.lines(lab, arms=arms)
    commands = [line for line in lines if not line.startswith("#")]
    workloads = {gate.workload for gate in lab.gates}
    assert any("Left out of the comparison: single, single-again" in line for line in lines)
    assert not any(line.endswith(" on single") for line in lines)
    assert sum("vllm bench serve" in line for line in commands) == 2 * len(workloads)
    everything = [line for line in dry_run.lines(lab) if not line.startswith("#")]
    assert sum(map(starts_router, commands)) == sum(map(starts_router, everything)) - 1
