"""Moves one buffer in host memory between two processes with NIXL, checks its content, and tells how fast it
was.

Run as a program: ``python -m disagglab.nixlprobe BYTES[,BYTES…] REPEATS``; prints one JSON object a size. The
environment (UCX_TLS …) and the cores are those of the lab's servers, so that what works here works there.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shlex
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from disagglab import netns, vllm_plugin

if TYPE_CHECKING:
    from disagglab.host import LocalHost
    from disagglab.section import Lab

DEADLINE_S = 60.0
BACKEND = "UCX"


def between_nodes(
    host: LocalHost, lab: Lab, name: str, sizes: Sequence[int], repeats: int, limit_s: float
) -> tuple[list[dict[str, Any]], str]:
    """Run the program where the decode server runs, its second process where the prefill server does.

    Returns:
        what :func:`move` returns for each size, and the command.

    Raises:
        LabError: if the program fails or exceeds ``limit_s``.
    """
    prefill, decode = lab.prefill[0], lab.decode[0]
    argv = [sys.executable, "-m", "disagglab.nixlprobe", ",".join(map(str, sizes)), str(repeats)]
    if prefill.cpus:
        argv += ["--owner-cpus", ",".join(map(str, prefill.cpus))]
    namespace = host.namespace_pid(prefill)
    if namespace is not None:
        argv += ["--owner-namespace", str(namespace)]
    env = lab.transfer_variables(decode)
    lines = host.run(name, argv, env, limit_s, decode.address, decode.cpus)
    command = shlex.join([*(f"{key}={value}" for key, value in env.items()), *argv])
    return [json.loads(line) for line in lines if line.startswith("{")], command


def _agent(name: str) -> Any:
    vllm_plugin.register()  # the lab's pause of the progress thread, as in the servers
    from nixl_cu13._api import nixl_agent, nixl_agent_config

    return nixl_agent(name, nixl_agent_config(backends=[BACKEND]))


def _pattern(size: int, seed: int) -> Any:
    import numpy as np

    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


def _source(pipe: Connection, size: int, seed: int, namespace: int | None, cpus: Sequence[int]) -> None:
    """Register a patterned buffer, offer it, keep it until told to stop."""
    if namespace is not None:
        netns.enter_namespace(namespace)
    if cpus:
        os.sched_setaffinity(0, cpus)
    buffer = _pattern(size, seed)
    agent = _agent("source")
    registered = agent.register_memory([(buffer.ctypes.data, size, 0, "")], "DRAM")
    pipe.send((agent.get_agent_metadata(), buffer.ctypes.data))
    pipe.recv()
    agent.deregister_memory(registered)


def move(size: int, repeats: int, namespace: int | None = None, cpus: Sequence[int] = ()) -> dict[str, Any]:
    """Read ``size`` bytes from a second process ``repeats`` times.

    ``namespace``: a process in whose network namespace the second one runs; None: in ours. ``cpus``: its
    cores.

    Returns:
        ``bytes``, ``seconds`` (one per read), ``equal`` (whether every byte arrived as it was sent).

    Raises:
        TimeoutError: if a read does not finish.
    """
    import numpy as np

    seed = time.time_ns() % 2**32
    here, there = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=_source, args=(there, size, seed, namespace, cpus), daemon=True
    )
    process.start()
    agent = _agent("target")
    buffer = np.zeros(size, dtype=np.uint8)
    agent.register_memory([(buffer.ctypes.data, size, 0, "")], "DRAM")
    if not here.poll(DEADLINE_S):
        raise TimeoutError(f"the second process offered no buffer within {DEADLINE_S:g} s")
    metadata, address = here.recv()
    remote = agent.add_remote_agent(metadata)
    seconds = []
    for _ in range(repeats):
        buffer[:] = 0
        local_list = agent.get_xfer_descs([(buffer.ctypes.data, size, 0)], "DRAM")
        remote_list = agent.get_xfer_descs([(address, size, 0)], "DRAM")
        handle = agent.initialize_xfer("READ", local_list, remote_list, remote)
        start = time.perf_counter()
        state = agent.transfer(handle)
        while state == "PROC":
            if time.perf_counter() - start > DEADLINE_S:
                raise TimeoutError(f"{size} bytes did not arrive within {DEADLINE_S:g} s")
            state = agent.check_xfer_state(handle)
        if state != "DONE":
            raise RuntimeError(f"NIXL reports {state}")
        seconds.append(time.perf_counter() - start)
        agent.release_xfer_handle(handle)
    here.send("stop")
    process.join(DEADLINE_S)
    return {"bytes": size, "seconds": seconds, "equal": bool((buffer == _pattern(size, seed)).all())}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m disagglab.nixlprobe", description=__doc__)
    parser.add_argument("sizes", help="bytes of each buffer, with commas between")
    parser.add_argument("repeats", type=int, help="reads of each")
    parser.add_argument("--owner-cpus", default="", help="cores of the process that owns the memory")
    parser.add_argument("--owner-namespace", type=int, help="a process in whose network namespace it runs")
    given = parser.parse_args()
    cores = [int(cpu) for cpu in given.owner_cpus.split(",") if cpu]
    for one in given.sizes.split(","):
        print(json.dumps(move(int(one), given.repeats, given.owner_namespace, cores)), flush=True)
