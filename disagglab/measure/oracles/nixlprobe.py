"""Reads memory of another process with NIXL, as one piece or scattered, checks it, and tells how fast it was.

Two programs, each after ``python -m disagglab.measure.oracles.nixlprobe``. ``own POOL_BYTES SEED`` holds a
patterned pool in host memory (``--memory DRAM``) or on the first GPU that it sees (``VRAM``) and prints one
JSON object that says where. ``read OFFER POOL_BYTES SEED READS REPEATS`` reads parts of it, with that object
in the file OFFER, into scattered slots of a pool of its own, and prints one JSON object a read. Calls, agent
and order of steps are those of vLLM's NixlConnector (base_worker.py, pull_worker.py): descriptors of the
whole pool are prepared once, a read names the numbers of those it wants. The environment (UCX_TLS …) and the
cores are those of the lab's servers, so that what works here works there.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shlex
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from disagglab.errors import StartError
from disagglab.serving import vllm_plugin
from disagglab.variables import TRACE_VARIABLE

if TYPE_CHECKING:
    from disagglab.config.schema import Lab, NodeSection
    from disagglab.hosts.host import HostProcess
    from disagglab.hosts.hosts import Hosts

DEADLINE_S = 60.0
POLL_S = 0.1
BACKEND = "UCX"
PROGRAM = ("-m", "disagglab.measure.oracles.nixlprobe")
WORD_BYTES = 8  # the pattern's unit: each word is a function of its place in the pool
MULTIPLIER = -7046029254386353131  # odd, so that no two places have one word (2**64 / golden ratio, signed)
CHUNK_WORDS = 2**23  # filled or compared at once: 64 MiB
CONNECTOR_THREADS = 4  # vLLM's, unless kv_connector_extra_config has num_threads

Memory = Literal["DRAM", "VRAM"]


@dataclass(frozen=True)
class Read:
    """What is read between two looks at the clock.

    Attributes:
        bytes: of each read.
        pieces: descriptors of each read, all of one size; they touch each other on neither side.
        at_once: reads that are posted together, of slots of their own.

    Raises:
        ValueError: if the bytes do not divide into so many pieces of whole words.
    """

    bytes: int
    pieces: int = 1
    at_once: int = 1

    def __post_init__(self) -> None:
        if min(self.bytes, self.pieces, self.at_once) < 1 or self.bytes % (self.pieces * WORD_BYTES):
            raise ValueError(
                f"{self}: {self.bytes} B do not divide into {self.pieces} pieces of whole {WORD_BYTES} B"
            )

    def __str__(self) -> str:
        return f"{self.bytes}/{self.pieces}x{self.at_once}"

    @classmethod
    def parse(cls, text: str) -> Read:
        """The read that ``BYTES/PIECESxAT_ONCE`` names."""
        size, _, rest = text.partition("/")
        pieces, _, at_once = rest.partition("x")
        return cls(int(size), int(pieces), int(at_once))

    @property
    def piece_bytes(self) -> int:
        """Bytes of one descriptor."""
        return self.bytes // self.pieces

    @property
    def pool_bytes(self) -> int:
        """The smallest pool in which every second slot is enough."""
        return 2 * self.bytes * self.at_once


def between_nodes(
    hosts: Hosts,
    lab: Lab,
    name: str,
    reads: Sequence[Read],
    repeats: int,
    limit_s: float,
    threads: int | None = None,
    seed: int | None = None,
) -> tuple[list[dict[str, Any]], str]:
    """Read on the first decode node what the first prefill node holds, as KV transfers do.

    The memory is what ``kv_buffer_device`` says: the host's, or that of each node's first GPU.

    Args:
        lab: decides nodes, memory and environment; a lab with another ``[transport]`` probes that.
        repeats: of each read; the first one of a read also connects, or maps memory.
        threads: of NIXL's UCX backend; 0 is its progress thread alone; None takes the connector's.
        seed: of the pattern in the memory and of the places; None draws one.

    Returns:
        for each read ``bytes``, ``pieces``, ``at_once``, ``threads``, ``memory``; per repeat ``seconds``
        (until all have arrived), ``post_s`` (thereof until all were posted) and ``descriptors`` (of all
        reads, as NIXL counted them after merging); ``equal``, whether every byte of every repeat arrived as
        it was held; and the reader's command.

    Raises:
        LabError: if a program fails or exceeds ``limit_s``.
    """
    prefill, decode = lab.prefill[0], lab.decode[0]
    source, reader = hosts.of(prefill), hosts.of(decode)
    pool = [
        str(max(read.pool_bytes for read in reads)),
        str(secrets.randbelow(2**31) if seed is None else seed),
    ]
    chosen = connector_threads(lab) if threads is None else threads
    options = ["--memory", memory_of(lab), "--threads", str(chosen)]
    argv = [source.suite_python, *PROGRAM, "own", *pool, *options]
    owner = source.start(f"{name}-owner", argv, environment(lab, prefill), prefill.cpus)
    try:
        offer = f"{reader.about['logs']}/{name}-offer.json"
        reader.write_text(offer, _offer(owner))
        wanted = ",".join(map(str, reads))
        argv = [reader.suite_python, *PROGRAM, "read", offer, *pool, wanted, str(repeats), *options]
        env = environment(lab, decode)
        lines = reader.run(name, argv, env, limit_s, decode.cpus)
    finally:
        owner.stop()
    command = shlex.join([*(f"{key}={value}" for key, value in env.items()), *argv])
    return [json.loads(line) for line in lines if line.startswith('{"bytes"')], command


def memory_of(lab: Lab) -> Memory:
    """What NIXL calls the memory that the lab's transfers read and write."""
    return "VRAM" if lab.transport.kv_buffer_device == "cuda" else "DRAM"


def connector_threads(lab: Lab) -> int:
    """``num_threads`` of NIXL's agent in the lab's servers."""
    return int(lab.transport.extra.get("num_threads", CONNECTOR_THREADS))


def environment(lab: Lab, node: NodeSection) -> dict[str, str]:
    """What a probe on a node gets: the transfer's variables, and of GPUs those that its server sees.

    Not the trace of transfers, which would cost time at each look.
    """
    gpus = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, node.gpus))} if node.gpus else {}
    variables = lab.transfer_variables(node)
    variables.pop(TRACE_VARIABLE, None)
    return {**gpus, **variables}


def slots(pool_bytes: int, read: Read, seed: int) -> Any:
    """The slots of a pool that each of the reads takes, in the order in which it names them.

    No two of them touch, so NIXL has nothing to merge whatever the order.

    Returns:
        int64 array of shape (at_once, pieces); slot ``n`` begins at byte ``n * read.piece_bytes``.

    Raises:
        ValueError: if the pool is too small for that.
    """
    import numpy as np

    there, taken = pool_bytes // read.piece_bytes, read.pieces * read.at_once
    if there < 2 * taken - 1:
        raise ValueError(f"{read} takes every second of {2 * taken - 1} slots, and the pool has {there}")
    generator = np.random.default_rng(seed)
    # any choice from there - taken + 1 places becomes one without neighbours when the n-th moves n further
    chosen = np.sort(generator.choice(there - taken + 1, taken, replace=False)) + np.arange(taken)
    return generator.permutation(chosen).reshape(read.at_once, read.pieces)


def words(places: Any, seed: int) -> Any:
    """What the owner's pool holds at int64 ``places``, counted in words."""
    return places * MULTIPLIER ^ seed


def _offer(owner: HostProcess) -> str:
    """What the owner printed about its pool, once it has."""

    def offers() -> list[str]:
        lines = owner.lines_so_far()
        return [line for line in lines if line.startswith('{"metadata"') and line.endswith("}")]

    def without(_: bool) -> StartError:
        last = owner.lines_so_far()[-5:]
        return StartError(f"{owner.name} offers no memory; last lines of {owner.log}: {last}")

    owner.await_that(lambda: bool(offers()), DEADLINE_S, without, POLL_S)
    return offers()[0]


class _Pool:
    """Memory of this process that NIXL knows, as 64-bit words."""

    def __init__(self, name: str, pool_bytes: int, memory: Memory, threads: int) -> None:
        import torch

        self._torch = torch
        self.memory = memory
        self.device = torch.device("cuda:0" if memory == "VRAM" else "cpu")
        if memory == "VRAM":
            torch.cuda.set_device(self.device)
        self.words = torch.empty(pool_bytes // WORD_BYTES, dtype=torch.int64, device=self.device)
        self.words.zero_()
        self.settle()  # a CUDA context has to be there before UCX looks for devices
        self.agent = _agent(name, threads)
        self.address = self.words.data_ptr()
        self.agent.register_memory([(self.address, pool_bytes, 0, "")], memory)

    def settle(self) -> None:
        """Wait until the device has done what it was told; NIXL does not know of torch's streams."""
        if self.memory == "VRAM":
            self._torch.cuda.synchronize()

    def fill(self, seed: int) -> None:
        """Write the pattern."""
        for start in range(0, len(self.words), CHUNK_WORDS):
            end = min(start + CHUNK_WORDS, len(self.words))
            places = self._torch.arange(start, end, dtype=self._torch.int64, device=self.device)
            self.words[start:end] = words(places, seed)
        self.settle()

    def clear(self) -> None:
        """Write zeros."""
        self.words.zero_()
        self.settle()

    def holds(self, mine: Any, theirs: Any, read: Read, seed: int) -> bool:
        """Whether slots ``mine`` hold what the owner has in slots ``theirs``."""
        torch, step = self._torch, read.piece_bytes // WORD_BYTES
        count = len(self.words) // step
        table = self.words[: count * step].view(count, step)
        here, there = (torch.from_numpy(part.reshape(-1)).to(self.device) for part in (mine, theirs))
        within = torch.arange(step, dtype=torch.int64, device=self.device)
        pieces = max(1, CHUNK_WORDS // step)
        for start in range(0, len(here), pieces):
            part = slice(start, start + pieces)
            held = words(there[part, None] * step + within[None, :], seed)
            if not torch.equal(table[here[part]], held):
                return False
        return True


def _agent(name: str, threads: int) -> Any:
    os.environ.setdefault("UCX_RCACHE_MAX_UNRELEASED", "1024")  # as vllm/distributed/nixl_utils.py does
    vllm_plugin.register()  # the lab's pause of the progress thread, as in the servers
    from nixl_cu13._api import nixl_agent, nixl_agent_config

    config = nixl_agent_config(backends=[BACKEND], num_threads=threads, capture_telemetry=True)
    return nixl_agent(name, config)


def _descriptors(agent: Any, address: int, pool_bytes: int, read: Read, memory: Memory) -> Any:
    """Every slot of a pool as NIXL's transfer descriptors (address, bytes, device)."""
    import numpy as np

    count = pool_bytes // read.piece_bytes
    table = np.zeros((count, 3), dtype=np.uint64)
    table[:, 0] = address + np.arange(count, dtype=np.uint64) * np.uint64(read.piece_bytes)
    table[:, 1] = read.piece_bytes
    return agent.get_xfer_descs(table, memory)


def own(pool_bytes: int, seed: int, memory: Memory, threads: int) -> None:
    """Register a patterned pool, say where it is, keep it until ended from outside."""
    pool = _Pool("source", pool_bytes, memory, threads)
    pool.fill(seed)
    metadata = pool.agent.get_agent_metadata().hex()
    print(json.dumps({"metadata": metadata, "address": pool.address}), flush=True)
    signal.pause()


def read_all(
    offer: str, pool_bytes: int, seed: int, reads: Sequence[Read], repeats: int, memory: Memory, threads: int
) -> None:
    """Do each of the reads ``repeats`` times; print a row a read.

    Raises:
        TimeoutError: if a read does not finish.
        RuntimeError: if NIXL reports a failure.
    """
    with open(offer) as file:
        offered = json.load(file)
    pool = _Pool("target", pool_bytes, memory, threads)
    agent = pool.agent
    remote = agent.add_remote_agent(bytes.fromhex(offered["metadata"]))
    prepared: dict[int, tuple[Any, Any]] = {}
    for read in reads:
        mine, theirs = slots(pool_bytes, read, seed + 1), slots(pool_bytes, read, seed + 2)
        if read.piece_bytes not in prepared:
            here = _descriptors(agent, pool.address, pool_bytes, read, memory)
            there = _descriptors(agent, offered["address"], pool_bytes, read, memory)
            prepared[read.piece_bytes] = (
                agent.prep_xfer_dlist("NIXL_INIT_AGENT", here),
                agent.prep_xfer_dlist(remote, there),
            )
        seconds, post_s, descriptors, equal = [], [], [], True
        for _ in range(repeats):
            pool.clear()
            took, posted, counted = _timed(agent, prepared[read.piece_bytes], mine, theirs)
            seconds.append(took)
            post_s.append(posted)
            descriptors.append(counted)
            equal = equal and pool.holds(mine, theirs, read, seed)
        row = {**asdict(read), "threads": threads, "memory": memory, "seconds": seconds, "post_s": post_s}
        print(json.dumps({**row, "descriptors": descriptors, "equal": equal}), flush=True)


def _timed(agent: Any, sides: tuple[Any, Any], mine: Any, theirs: Any) -> tuple[float, float, int]:
    """Post the reads and wait for all: seconds until done, thereof until posted, and descriptors."""
    handles, pending = [], []
    start = time.perf_counter()
    for local, remote in zip(mine, theirs, strict=True):
        handle = agent.make_prepped_xfer("READ", sides[0], local, sides[1], remote, b"")
        handles.append(handle)
        pending.append((handle, agent.transfer(handle)))
    posted = time.perf_counter() - start
    while pending := [(handle, state) for handle, state in pending if state != "DONE"]:
        if any(state != "PROC" for _, state in pending):
            raise RuntimeError(f"NIXL reports {[state for _, state in pending]}")
        if time.perf_counter() - start > DEADLINE_S:
            raise TimeoutError(f"{len(pending)} of {len(handles)} reads did not end within {DEADLINE_S:g} s")
        pending = [(handle, agent.check_xfer_state(handle)) for handle, _ in pending]
    took = time.perf_counter() - start
    counted = sum(agent.get_xfer_telemetry(handle).descCount for handle in handles)
    for handle in handles:
        agent.release_xfer_handle(handle)
    return took, posted, counted


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m disagglab.measure.oracles.nixlprobe", description=__doc__
    )
    parts = parser.add_subparsers(dest="part", required=True)
    owner_parser = parts.add_parser("own", help="hold a pool until ended")
    reader_parser = parts.add_parser("read", help="read parts of it")
    reader_parser.add_argument("offer", help="file with what the owner printed")
    for one in (owner_parser, reader_parser):
        one.add_argument("pool_bytes", type=int, help="of the pool, the same on both sides")
        one.add_argument("seed", type=int, help="of the pattern and the slots, the same on both sides")
        one.add_argument("--memory", choices=["DRAM", "VRAM"], default="DRAM", help="(%(default)s)")
        one.add_argument("--threads", type=int, default=0, help="of NIXL's UCX backend (%(default)s)")
    reader_parser.add_argument("reads", help="BYTES/PIECESxAT_ONCE of each, with commas between")
    reader_parser.add_argument("repeats", type=int, help="of each read")
    given = parser.parse_args()
    if given.part == "own":
        own(given.pool_bytes, given.seed, given.memory, given.threads)
    else:
        asked = [Read.parse(text) for text in given.reads.split(",")]
        read_all(given.offer, given.pool_bytes, given.seed, asked, given.repeats, given.memory, given.threads)
