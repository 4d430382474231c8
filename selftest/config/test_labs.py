"""Lab files: every mistake is found before anything starts, all at once, each with file, key and mend.

The oracle is a table of broken files: what is broken, the key that has to be named, a word of the mend.
"""

from __future__ import annotations

import copy
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from disagglab.config import inherit
from disagglab.config.labs import check_against_model, find_lab, load_lab, parse_lab
from disagglab.errors import ConfigError
from disagglab.paths import LABS

GOOD = tomllib.loads((LABS / "embedded.toml").read_text())
MADE = inherit.read(LABS / "two-hosts.toml").table
ROOT = LABS.parent


def broken(good: dict[str, Any] = GOOD, /, **changes: Any) -> dict[str, Any]:
    """The embedded lab with values set by path: ``node__1__cpus=[0]``; the value ``...`` deletes."""
    raw: dict[str, Any] = copy.deepcopy(good)
    for path, value in changes.items():
        *way, last = (int(part) if part.isdigit() else part for part in path.split("__"))
        place: Any = raw
        for part in way:
            place = place[part]
        if value is ...:
            del place[last]
        else:
            place[last] = value
    return raw


BROKEN = {
    "unknown key": (broken(transport__progres_delay_us=5), "transport.progres_delay_us", "progress_delay_us"),
    "unknown section": (broken(modle={}), "modle", "model"),
    "missing section": (broken(transport=...), "[transport]", "add a [transport]"),
    "missing key": (broken(model__max_model_len=...), "model.max_model_len", "add max_model_len"),
    "two nodes on one core": (broken(node__1__cpus=[0]), "node[1].cpus", "its own"),
    "role that no node has": (broken(node__1__role="prefill"), "node.role", 'role = "decode"'),
    "no such role": (broken(node__1__role="router"), "node[1].role", "correct the value of role"),
    "node without cores": (broken(node__0__cpus=[]), "node[0]", "cpus = [0]"),
    "one name twice": (broken(node__1__name="a"), "node[1].name", "its own name"),
    "port range too small": (broken(ports__last=21003), "ports", "set last to"),
    "port range backwards": (broken(ports__last=20000), "ports", "set last to"),
    "wrong type": (broken(model__max_model_len="long"), "model.max_model_len", "correct the value"),
    "reserved argument": (broken(vllm__args={"port": 8000}), "vllm.args.port", "[ports]"),
    "reserved argument, underscores": (
        broken(vllm__args={"kv_transfer_config": "{}"}), "vllm.args.kv_transfer_config", "[transport]",
    ),
    "argument with dashes": (
        broken(vllm__args={"--enforce-eager": True}), "vllm.args.--enforce-eager", "enforce-eager =",
    ),
    "a vLLM whose block rule nobody knows": (
        broken(vllm__version="9.9.9"), "vllm.version", "add a line",
    ),
    "tokenizer in the wrong place": (
        broken(vllm__args={"tokenizer": "x"}), "vllm.args.tokenizer", "[model] tokenizer",
    ),
    "cuda without GPUs": (
        broken(transport__kv_buffer_device="cuda"), "transport.kv_buffer_device", '"cpu"',
    ),
    "shared memory without tcp": (broken(transport__ucx_tls=["sm", "self"]), "transport.ucx_tls", "tcp"),
    "gate on a missing workload": (
        broken(gate__0__workload="nothing"), "gate[0].workload", "workload that exists",
    ),
    "gate on an unknown metric": (
        broken(gate__0__metric="mean"), "gate[0].metric", "correct the value of metric",
    ),
    "gate without a baseline": (broken(gate__0__baseline=...), "gate[0]", "limit = 0.1"),
    "gate with baseline and limit": (broken(gate__0__limit=0.5), "gate[0]", "limit = 0.1"),
    "gate of an arm that nobody knows": (
        broken(gate__0__candidate="disagregated"), "gate[0].candidate", "did you mean disaggregated?",
    ),
    "gate against a way that nobody knows": (
        broken(gate__0__baseline="sharded"), "gate[0].baseline", "or add its [[way]]",
    ),
    "gate against a misspelt way": (
        broken(gate__0__baseline="disaggregated@pusch"), "gate[0].baseline", "did you mean disaggregated@",
    ),
    "gate of the best": (broken(gate__0__candidate="best"), "gate[0].candidate", "name one of single"),
    "gate against a twin": (
        broken(gate__0__baseline="single-again"), "gate[0].baseline", "did you mean single?",
    ),
    "gate of an arm against itself": (
        broken(gate__0__candidate="replicated"), "gate[0].baseline", 'write "best"',
    ),
    "a transfer of replicas": (
        broken(gate__4__candidate="replicated"), "gate[4].candidate", "name a disaggregated arm",
    ),
    "a transfer against the best": (
        broken(gate__4__baseline="best", gate__4__limit=...), "gate[4].baseline", "write limit",
    ),
    "one gate twice": (
        broken(gate__1__metric="itl_p99", gate__1__stream="steady", gate__1__baseline="replicated",
               gate__1__workload="long-prompts-into-steady-decode"), "gate[1]", "remove one",
    ),
    "transfer share against a baseline": (
        broken(gate__4__baseline="single", gate__4__limit=...), "gate[4].baseline", "limit",
    ),
    "a stream of a workload that has none": (broken(gate__1__stream="steady"), "gate[1].stream", "remove it"),
    "goodput of a stream": (broken(gate__3__stream="steady"), "gate[3].stream", "remove it"),
    "goodput without an objective": (broken(slo=...), "gate[3].metric", "add [slo]"),
    "a list in place of a table": (broken(scale=[{}]), "scale", "write a table"),
    "objective of half a request": (broken(slo={"ttft_s": 1.0}), "slo.tpot_s", "add tpot_s"),
    "scale of nothing": (broken(scale__prompt=0), "scale.prompt", "correct the value of prompt"),
    "workload that does not fit": (broken(scale__prompt=1.0), "gate[0].workload", "lower [scale]"),
    "one bracket for two": (broken(node={"name": "a"}), "[node]", "[[node]]"),
    "no name": (broken(name=...), "name", "at the top"),
    "no nodes": (broken(node=[]), "[[node]]", "add a [[node]]"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_lab_file_names_file_key_and_mend(case: str) -> None:
    """One mistake gives one problem that names the file, the key and what mends it."""
    raw, key, mend = BROKEN[case]
    with pytest.raises(ConfigError) as caught:
        parse_lab(raw, "my.toml")
    found = [problem for problem in caught.value.problems if problem.key == key]
    assert found, f"no problem names {key}: {caught.value}"
    assert mend in found[0].mend
    assert found[0].file == "my.toml"


def test_all_mistakes_come_at_once() -> None:
    """Mistakes of different sections, and contradictions between sections, are reported together."""
    raw = broken(
        model__dtype="int3", node__1__cpus=[0], ports__last=21001, transport__ucx_tls=["sm"], extra=1
    )
    with pytest.raises(ConfigError) as caught:
        parse_lab(raw, "my.toml")
    keys = {problem.key for problem in caught.value.problems}
    assert keys == {"model.dtype", "node[1].cpus", "ports", "transport.ucx_tls", "extra"}
    assert "5 problems found; nothing was started" in str(caught.value)


def reached(*hosts: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The embedded lab with its second node on ``far``, which is reached over SSH."""
    return broken(**{"host": list(hosts), "node__1__host": "far", "node__1__address": "192.0.2.2", **changes})


FAR, GATE = {"name": "far", "jump": "gate"}, {"name": "gate"}
MADE_TWICE = broken(MADE, node__1__host="alpha", node__1__cpus=[1])
HOSTS = {
    "node on a host that is not there": (
        broken(node__1__host="far"), ["node[1].host"], 'add [[host]] with name = "far"',
    ),
    "node on a host with a slip of the pen": (
        reached({"name": "far"}, node__1__host="fer"), ["node[1].host"], "did you mean far?",
    ),
    "node on local, misspelt": (broken(node__1__host="locale"), ["node[1].host"], "did you mean local?"),
    "controller on a host that is not there": (
        broken(controller={"host": "far", "address": "192.0.2.9"}), ["controller.host"],
        'add [[host]] with name = "far"',
    ),
    "host called local": (
        broken(host=[{"name": "local"}]), ["host[0].name"], "another name",
    ),
    "two hosts of one name": (reached({"name": "far"}, {"name": "far"}), ["host[1].name"], "its own name"),
    "jump through nobody": (reached(FAR), ["host[0].jump"], 'add [[host]] with name = "gate"'),
    "jump through itself": (
        reached({"name": "far", "jump": "far"}), ["host[0].jump"], "remove one jump",
    ),
    "jump around in a ring": (
        reached(FAR, {"name": "gate", "jump": "far"}), ["host[0].jump", "host[1].jump"], "remove one jump",
    ),
    "remote controller at a loopback address": (
        reached({"name": "far"}, controller={"host": "far"}), ["controller.address"], "address of that host",
    ),
    "made host with an IPv6 control link": (
        broken(MADE, node__0__address="fd00::1:2"), ["node[0].address", "node[0].address"], "IPv4 address",
    ),
    "made host with an IPv6 data link": (
        broken(MADE, node__0__data_address="fd00::9:1"), ["node[0].data_address"], "IPv4 address",
    ),
    "local controller at an address without a use": (
        broken(controller={"address": "192.0.2.1"}), ["controller.address"], "127.0.0.1",
    ),
    "name that no host can have": (
        reached({"name": "far"}, {"name": "a/b"}), ["host[1].name"], "correct the value of name",
    ),
    "heartbeat of no time": (
        reached({"name": "far", "heartbeat_s": 0}), ["host[0].heartbeat_s"], "correct",
    ),
    "one made host": (
        broken(MADE, host__1__namespace=False), ["host[0].namespace"], "on two hosts, or on none",
    ),
    "two nodes on a made host": (MADE_TWICE, ["host[0].namespace"], "on two hosts, or on none"),
    "made host with an address": (
        broken(MADE, host__1__address="192.0.2.1"), ["host[1].address"], "remove it",
    ),
    "made host with a key": (broken(MADE, host__0__key_file="~/k"), ["host[0].key_file"], "remove it"),
    "made host behind another": (broken(MADE, host__0__jump="beta"), ["host[0].jump"], "remove it"),
    "made host without a data link": (
        broken(MADE, node__0__interface=...), ["node[0].interface"], "add interface",
    ),
    "made host without a data address": (
        broken(MADE, node__1__data_address=...), ["node[1].data_address"], "add data_address",
    ),
    "made host at an address that no host can have": (
        broken(MADE, node__0__address="198.18.1.0"), ["node[0].address"], "198.18.1.2",
    ),
    "made host with a data address that is a name": (
        broken(MADE, node__0__data_address="data0"), ["node[0].data_address"], "write an IPv4 address",
    ),
    "made hosts beside this machine": (
        broken(MADE, node=[*MADE["node"], {**GOOD["node"][0], "name": "c", "cpus": [], "gpus": [0]}]),
        ["node[2].host"], "every node on a made host",
    ),
    "controller on a made host": (
        broken(MADE, controller={"host": "alpha", "address": "198.18.1.2"}), ["controller.host"], '"local"',
    ),
    "one /30 for both control links": (
        broken(MADE, node__0__address="198.18.2.1"), ["node[0].address"], "a network of its own",
    ),
    "two networks for the data link": (
        broken(MADE, node__0__data_address="198.18.8.1"), ["node[0].data_address"], "into one",
    ),
    "a way around the wire": (
        broken(MADE, transport__ucx_tls=["tcp", "sm", "self"]), ["transport.ucx_tls"], '["tcp", "self"]',
    ),
    "any way around the wire": (
        broken(MADE, transport__ucx_tls=[]), ["transport.ucx_tls"], '["tcp", "self"]',
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTS)
def test_hosts_that_cannot_be_are_refused(case: str) -> None:
    """One mistake gives the problems that it is, and no others; the first says what mends it."""
    raw, keys, mend = HOSTS[case]
    with pytest.raises(ConfigError) as caught:
        parse_lab(raw, "my.toml")
    assert [problem.key for problem in caught.value.problems] == keys
    assert mend in caught.value.problems[0].mend


def test_hosts_that_can_be_are_accepted() -> None:
    """A way through two gates, a remote controller, cores of the same number on two hosts."""
    gates = [GATE, {"name": "inner", "jump": "gate"}]
    lab = parse_lab(
        reached(
            {"name": "far", "jump": "inner"},
            *gates,
            node__1__cpus=[0],
            controller={"host": "gate", "address": "192.0.2.9"},
        ),
        "my.toml",
    )
    assert lab.host_names == ("gate", "local", "far"), "the controller's first; a gate alone takes no part"
    assert [node.name for node in lab.nodes_on("far")] == ["b"]


def test_a_remote_controller_may_have_a_name() -> None:
    """Only an address of the loopback interface is known to be wrong before anybody is asked."""
    lab = parse_lab(reached({"name": "far"}, controller={"host": "far", "address": "far.example"}), "my.toml")
    assert lab.controller.address == "far.example"


ADDRESSES = {
    "no hexadecimal": ("::g", "write one, such as ::1"),
    "link-local, of which link": ("fe80::1", "such as fd00::1"),
    "link-local, and URLs have no scope": ("fe80::1%eth0", "such as fd00::1"),
    "brackets": ("[::1]", 'write "::1"'),
    "brackets and port": ("[fd00::1]:80", 'write "fd00::1"'),
    "a port": ("127.0.0.1:80", 'write "127.0.0.1"; ports come from [ports]'),
    "too few numbers": ("1.2.3", "four numbers"),
    "too large a number": ("192.0.2.256", "four numbers"),
    "a number alone": ("1", "four numbers"),
    "every address": ("0.0.0.0", "the one address"),
    "every address, IPv6": ("::", "the one address"),
    "many hosts": ("ff02::1", "the one address"),
    "nothing": ("", "or a name"),
    "a URL": ("http://a.example", "such as ::1"),
    "two words": ("a b", "or a name"),
}


@pytest.mark.parametrize("key", ["node[1].address", "node[1].data_address", "controller.address"])
@pytest.mark.parametrize("case", ADDRESSES)
def test_an_address_of_no_use_is_refused(case: str, key: str) -> None:
    """Before anything starts, with file, key and what to write."""
    address, mend = ADDRESSES[case]
    change = {"controller": {"address": address}} if key[0] == "c" else {f"node__1__{key[8:]}": address}
    with pytest.raises(ConfigError) as caught:
        parse_lab(broken(**change), "my.toml")
    (problem,) = caught.value.problems
    assert (problem.file, problem.key) == ("my.toml", key)
    assert mend in problem.mend
    assert address in problem.wrong


@pytest.mark.parametrize("address", ["::1", "fd00::1", "127.0.0.2", "a", "node-1.example", "spark_1.local"])
def test_an_address_or_a_name_is_taken(address: str) -> None:
    """IPv6 as well as IPv4, and names."""
    lab = parse_lab(broken(node__1__address=address, controller={"address": "::1"}), "my.toml")
    assert (lab.nodes[1].address, lab.controller.address) == (address, "::1")


def test_an_address_is_known_by_its_shortest_form() -> None:
    """As the kernel lists it, so that what is found by address is found."""
    lab = parse_lab(broken(node__1__address="FD00:0:0:0:0:0:0:01"), "my.toml")
    assert lab.nodes[1].address == "fd00::1"


def test_ssh_reaches_a_link_local_address_that_names_its_interface() -> None:
    """Two machines on one cable have no other; SSH has no URL. Without the interface it is refused."""
    lab = parse_lab(reached({"name": "far", "address": "fe80::1%eth0"}), "my.toml")
    assert lab.hosts[0].address == "fe80::1%eth0"
    with pytest.raises(ConfigError, match="link-local") as caught:
        parse_lab(reached({"name": "far", "address": "fe80::1"}), "my.toml")
    (problem,) = caught.value.problems
    assert (problem.key, problem.mend.endswith("fe80::1%eth0")) == ("host[0].address", True)


def test_gates_between_ways_are_taken() -> None:
    """A way against the best, and a transfer of one setting against another's; of a lab whose way is broken
    in itself only that is said.
    """
    gates = GOOD["gate"]
    best = {**gates[0], "candidate": "disaggregated@push", "baseline": "best"}
    moved = {key: value for key, value in gates[4].items() if key != "limit"}
    transfer = {**moved, "candidate": "disaggregated@push", "baseline": "disaggregated"}
    lab = parse_lab(broken(gate=[best, transfer]), "lab.toml")
    assert [(gate.candidate, gate.baseline) for gate in lab.gates] == [
        ("disaggregated@push", "best"),
        ("disaggregated@push", "disaggregated"),
    ]
    assert parse_lab(GOOD, "lab.toml").gates[0].candidate == "disaggregated"
    with pytest.raises(ConfigError) as caught:
        parse_lab(broken(gate=[best], way=[{"name": "push", "what": "w"}]), "lab.toml")
    assert [problem.key for problem in caught.value.problems] == ["way[0].expects"]


@pytest.mark.parametrize("name", sorted(path.stem for path in LABS.glob("*.toml")))
def test_every_shipped_lab_is_valid(name: str) -> None:
    """The lab files in labs/ are accepted, and carry the name of their file."""
    assert load_lab(name).name == name


def test_the_caches_dtype_is_vllms_own_option() -> None:
    """Without --kv-cache-dtype, or with auto, the cache has the model's dtype; else what the option says."""
    for args, dtype in (
        ({}, "bfloat16"),
        ({"kv-cache-dtype": "auto"}, "bfloat16"),
        ({"kv-cache-dtype": "fp8"}, "fp8"),
    ):
        assert parse_lab(broken(vllm__args=args), "my.toml").kv_dtype == dtype


def test_context_length_past_the_models_is_refused() -> None:
    """A lab that asks for more positions than the model has is refused with both numbers."""
    with pytest.raises(ConfigError, match="4096 tokens, but the model has 2048"):
        check_against_model(load_lab("embedded"), 2048)
    check_against_model(load_lab("embedded"), 4096)


def test_unknown_lab_lists_the_known() -> None:
    """A lab name without a file is answered with the names that exist."""
    with pytest.raises(ConfigError, match=r"use one of .*embedded.*spark"):
        find_lab("embeded")


@pytest.mark.parametrize("content", [b"name = ", b"\xff\xfe\x00"])
def test_a_file_that_is_not_toml_is_named(tmp_path: Path, content: bytes) -> None:
    """Syntax errors and binary files end in the same kind of error."""
    path = tmp_path / "my.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="not "):
        load_lab(str(path))


def test_a_broken_file_starts_nothing(tmp_path: Path) -> None:
    """pytest, given a broken lab file: exit status 4, every problem on the screen, no run folder."""
    path = tmp_path / "broken.toml"
    text = (LABS / "embedded.toml").read_text()
    path.write_text(
        text.replace('role = "decode"', 'role = "prefill"')
        .replace("cpus = [1]", "cpus = [0]")
        .replace("21199", "21001")
        + "\n[transprot]\n"
    )
    before = set((ROOT / "reports").glob("2*"))
    answer = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "disagg", f"--lab={path}"],
        capture_output=True, text=True, cwd=ROOT, timeout=60,
    )  # fmt: skip
    said = answer.stdout + answer.stderr
    assert answer.returncode == 4, said
    for key in ("transprot", "node.role", "node[1].cpus", "ports"):
        assert key in said
    assert set((ROOT / "reports").glob("2*")) == before
