"""Energy that GPUs have taken, by NVML's counter, read on the host that has them.

``nvmlDeviceGetTotalEnergyConsumption``: mJ since the driver was loaded, on GPUs of Volta and later; others
say NOT_SUPPORTED. It holds all that a GPU takes, busy or idle, and nothing of its host's CPUs and network.
``python -m disagglab.hosts.energy`` reads it here twice and prints the difference.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from disagglab.config.schema import NodeSection

if TYPE_CHECKING:
    from disagglab.hosts.host import Host  # the command above does without

Counters = tuple[float | None, ...]  # of every GPU of a host, J; None: its driver does not say
WINDOW_S = 2.0  # of the command: at 50 W and more a window of 2 s has 100 J, far more than the counter's step

# The library of the driver by itself, so that no package is needed. 3 is NVML_ERROR_NOT_SUPPORTED.
ENERGY_PROGRAM = """
import ctypes, json
found = {"joules": [], "error": ""}
try:
    nvml = ctypes.CDLL("libnvidia-ml.so.1")
    status, count = nvml.nvmlInit_v2(), ctypes.c_uint()
    status = status or nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
    found["error"] = "NVML error %d" % status if status else ""
    for gpu in range(count.value):
        device, used_mj = ctypes.c_void_p(), ctypes.c_ulonglong()
        status = nvml.nvmlDeviceGetHandleByIndex_v2(gpu, ctypes.byref(device))
        status = status or nvml.nvmlDeviceGetTotalEnergyConsumption(device, ctypes.byref(used_mj))
        found["joules"].append(None if status else used_mj.value / 1000)
        if status:
            found["error"] = "GPU %d: NVML error %d" % (gpu, status)
except (OSError, AttributeError) as error:
    found["error"] = str(error)
print(json.dumps(found))
"""


def parse(text: str) -> Counters:
    """What :data:`ENERGY_PROGRAM` printed, J by GPU; empty where there is no driver."""
    return tuple(json.loads(text)["joules"])


def read(host: Any, python: str) -> Counters:
    """The counter of every GPU of a testinfra host. ``python``: any Python 3 there. One command."""
    answer = host.run("%s -c %s", python, ENERGY_PROGRAM)
    return parse(answer.stdout) if answer.rc == 0 else ()


def of_nodes(nodes: Iterable[tuple[NodeSection, Host]]) -> Mapping[str, float]:
    """The counters of each node's GPUs together, J by node; nothing is asked of a host without any.

    A node one of whose GPUs does not say it is left out.
    """
    asked = [(node, host) for node, host in nodes if node.gpus]
    counters = {
        host.name: read(host.facts, host.suite_python) for host in {h.name: h for _, h in asked}.values()
    }
    found = {}
    for node, host in asked:
        used = [_at(counters[host.name], gpu) for gpu in node.gpus]
        known = [value for value in used if value is not None]
        if len(known) == len(used):
            found[node.name] = sum(known)
    return found


def _at(counters: Counters, gpu: int) -> float | None:
    return counters[gpu] if gpu < len(counters) else None


def between(before: Mapping[str, float], after: Mapping[str, float]) -> Mapping[str, float] | None:
    """What each node took between two readings, J; None if no node says it. A node whose counter fell, as
    after a reload of the driver, is left out.
    """
    spent = {name: after[name] - before[name] for name in before if name in after}
    return {name: joules for name, joules in spent.items() if joules >= 0} or None


def main() -> int:
    """Read the counters of this machine before and after a window; print energy, power and the time that a
    reading takes. Status 1 without a counter.
    """

    def ask() -> tuple[Counters, str, float]:
        begun = time.monotonic()
        told = subprocess.run(
            [sys.executable, "-c", ENERGY_PROGRAM], capture_output=True, text=True, check=True
        )
        return parse(told.stdout), json.loads(told.stdout)["error"], time.monotonic() - begun

    first, error, took_s = ask()
    begun = time.monotonic()
    time.sleep(WINDOW_S)
    second, _, _ = ask()
    window_s = time.monotonic() - begun
    for gpu, (low, high) in enumerate(zip(first, second, strict=True)):
        if low is None or high is None:
            print(f"GPU {gpu}: not said by its driver")
        else:
            print(f"GPU {gpu}: {high - low:.1f} J in {window_s:.2f} s, {(high - low) / window_s:.0f} W")
    print(f"a reading takes {took_s:.2f} s{f'; {error}' if error else ''}")
    return 0 if any(value is not None for value in first) else 1


if __name__ == "__main__":
    sys.exit(main())
