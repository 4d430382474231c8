"""Moves one buffer in host memory between two processes with NIXL, checks its content, and tells how fast it
was.

Run as a program: ``python -m disagglab.nixlprobe BYTES[,BYTES…] REPEATS [PID]``; prints one JSON object a
size. With PID the owner of the memory runs in that process's network namespace. The environment (UCX_TLS …)
is that of the lab's servers, so that what works here works there.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from multiprocessing.connection import Connection
from typing import Any

from disagglab.netns import enter_namespace

DEADLINE_S = 60.0
BACKEND = "UCX"


def _agent(name: str) -> Any:
    from nixl_cu13._api import nixl_agent, nixl_agent_config

    return nixl_agent(name, nixl_agent_config(backends=[BACKEND]))


def _pattern(size: int, seed: int) -> Any:
    import numpy as np

    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


def _source(pipe: Connection, size: int, seed: int, namespace: int | None) -> None:
    """Register a patterned buffer, offer it, keep it until told to stop."""
    if namespace is not None:
        enter_namespace(namespace)
    buffer = _pattern(size, seed)
    agent = _agent("source")
    registered = agent.register_memory([(buffer.ctypes.data, size, 0, "")], "DRAM")
    pipe.send((agent.get_agent_metadata(), buffer.ctypes.data))
    pipe.recv()
    agent.deregister_memory(registered)


def move(size: int, repeats: int, namespace: int | None = None) -> dict[str, Any]:
    """Read ``size`` bytes from a second process ``repeats`` times.

    ``namespace``: a process in whose network namespace the second one runs; None: in ours.

    Returns:
        ``bytes``, ``seconds`` (one per read), ``equal`` (whether every byte arrived as it was sent).

    Raises:
        TimeoutError: if a read does not finish.
    """
    import numpy as np

    seed = time.time_ns() % 2**32
    here, there = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=_source, args=(there, size, seed, namespace), daemon=True
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
    source_namespace = int(sys.argv[3]) if len(sys.argv) > 3 else None
    for one in sys.argv[1].split(","):
        print(json.dumps(move(int(one), int(sys.argv[2]), source_namespace)), flush=True)
