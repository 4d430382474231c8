"""Reads a buffer in host memory of another process with NIXL, checks its content, and tells how fast it was.

Two programs: ``python -m disagglab.nixlprobe own BYTES SEED`` holds a patterned buffer and prints one JSON
object that says where; ``python -m disagglab.nixlprobe read OFFER BYTES[,BYTES…] REPEATS SEED`` reads it,
with that object in the file OFFER, and prints one JSON object a size. The environment (UCX_TLS …) and the
cores are those of the lab's servers, so that what works here works there.
"""

from __future__ import annotations

import argparse
import json
import secrets
import shlex
import signal
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from disagglab import vllm_plugin
from disagglab.errors import StartError

if TYPE_CHECKING:
    from disagglab.host import HostProcess
    from disagglab.hosts import Hosts
    from disagglab.section import Lab

DEADLINE_S = 60.0
POLL_S = 0.1
BACKEND = "UCX"
PROGRAM = ("-m", "disagglab.nixlprobe")


def between_nodes(
    hosts: Hosts, lab: Lab, name: str, sizes: Sequence[int], repeats: int, limit_s: float
) -> tuple[list[dict[str, Any]], str]:
    """Read on the first decode node what the first prefill node holds, as KV transfers do.

    Returns:
        for each size ``bytes``, ``seconds`` (one per read), ``equal`` (whether every byte arrived as it was
        held); and the reader's command.

    Raises:
        LabError: if a program fails or exceeds ``limit_s``.
    """
    prefill, decode = lab.prefill[0], lab.decode[0]
    source, reader = hosts.of(prefill), hosts.of(decode)
    seed = str(secrets.randbelow(2**31))
    argv = [source.suite_python, *PROGRAM, "own", str(max(sizes)), seed]
    owner = source.start(f"{name}-owner", argv, lab.transfer_variables(prefill), prefill.cpus)
    try:
        offer = f"{reader.about['logs']}/{name}-offer.json"
        reader.write_text(offer, _offer(owner))
        argv = [reader.suite_python, *PROGRAM, "read", offer, ",".join(map(str, sizes)), str(repeats), seed]
        env = lab.transfer_variables(decode)
        lines = reader.run(name, argv, env, limit_s, decode.cpus)
    finally:
        owner.stop()
    command = shlex.join([*(f"{key}={value}" for key, value in env.items()), *argv])
    return [json.loads(line) for line in lines if line.startswith("{")], command


def _offer(owner: HostProcess) -> str:
    """What the owner printed about its buffer, once it has."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        lines = owner.lines_so_far()
        found = [line for line in lines if line.startswith('{"metadata"') and line.endswith("}")]
        if found:
            return found[0]
        if not owner.alive or time.monotonic() > deadline:
            raise StartError(f"{owner.name} offers no buffer; last lines of {owner.log}: {lines[-5:]}")
        time.sleep(POLL_S)


def _agent(name: str) -> Any:
    vllm_plugin.register()  # the lab's pause of the progress thread, as in the servers
    from nixl_cu13._api import nixl_agent, nixl_agent_config

    return nixl_agent(name, nixl_agent_config(backends=[BACKEND]))


def _pattern(size: int, seed: int) -> Any:
    import numpy as np

    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


def own(size: int, seed: int) -> None:
    """Register a patterned buffer, say where it is, keep it until ended from outside."""
    buffer = _pattern(size, seed)
    agent = _agent("source")
    agent.register_memory([(buffer.ctypes.data, size, 0, "")], "DRAM")
    metadata = agent.get_agent_metadata().hex()
    print(json.dumps({"metadata": metadata, "address": buffer.ctypes.data}), flush=True)
    signal.pause()


def read(offer: str, sizes: Sequence[int], repeats: int, seed: int) -> None:
    """Read the first bytes of the offered buffer, each size ``repeats`` times; print a row a size.

    Raises:
        TimeoutError: if a read does not finish.
        RuntimeError: if NIXL reports a failure.
    """
    import numpy as np

    with open(offer) as file:
        offered = json.load(file)
    largest = max(sizes)
    held = _pattern(largest, seed)
    agent = _agent("target")
    buffer = np.zeros(largest, dtype=np.uint8)
    agent.register_memory([(buffer.ctypes.data, largest, 0, "")], "DRAM")
    remote = agent.add_remote_agent(bytes.fromhex(offered["metadata"]))
    for size in sizes:
        seconds = []
        for _ in range(repeats):
            buffer[:size] = 0
            mine = agent.get_xfer_descs([(buffer.ctypes.data, size, 0)], "DRAM")
            theirs = agent.get_xfer_descs([(offered["address"], size, 0)], "DRAM")
            handle = agent.initialize_xfer("READ", mine, theirs, remote)
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
        equal = bool((buffer[:size] == held[:size]).all())
        print(json.dumps({"bytes": size, "seconds": seconds, "equal": equal}), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m disagglab.nixlprobe", description=__doc__)
    parts = parser.add_subparsers(dest="part", required=True)
    owner_parser = parts.add_parser("own", help="hold a buffer until ended")
    owner_parser.add_argument("bytes", type=int)
    owner_parser.add_argument("seed", type=int)
    reader_parser = parts.add_parser("read", help="read it")
    reader_parser.add_argument("offer", help="file with what the owner printed")
    reader_parser.add_argument("sizes", help="bytes of each read, with commas between")
    reader_parser.add_argument("repeats", type=int, help="reads of each")
    reader_parser.add_argument("seed", type=int)
    given = parser.parse_args()
    if given.part == "own":
        own(given.bytes, given.seed)
    else:
        read(given.offer, [int(one) for one in given.sizes.split(",")], given.repeats, given.seed)
