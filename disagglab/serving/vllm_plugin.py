"""A vLLM general plugin: how a server's processes end, two corrections for a CPU lab, a trace of transfers.

An API server that has lost its engine says so, and not by which signal or status; the first part of the
plugin logs that, and is always there. The rest are settings of the lab file.

vLLM calls :func:`register` in each of its processes, before a connector is built. The settings arrive by
environment variable, do nothing when unset, and are recorded with every result, because they change a stock
component.

``DISAGGLAB_NIXL_PROGRESS_DELAY_US``
    NIXL's Python API hard-codes ``pthrDelay = 0``: the progress thread of an idle agent polls without pause
    and burns a whole core, here the one that the model computes on. Agents made with the variable set wait
    that many microseconds between two polls. The thread is never switched off: over TCP the prefill side has
    to make progress for a read to complete.

``DISAGGLAB_NODE_CPUS``
    On CPU, NixlConnector moves the worker's main thread to the last core of every NUMA node, whatever the
    server was bound to (``sched_setaffinity`` in
    vllm/distributed/kv_transfer/kv_connector/v1/nixl/base_worker.py). Two servers of one machine then compute
    on the same core. With the variable set (``0`` or ``0,2,3``) the connector sees only the cores that the
    lab gave to this node.

``DISAGGLAB_TRANSFER_TRACE``
    Every transfer is logged step by step (disagglab/serving/transfer_log.py).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from multiprocessing import popen_fork
from typing import Any

from disagglab.serving import transfer_log
from disagglab.serving.causes import CHILD_ENDED
from disagglab.variables import CPUS_VARIABLE, DELAY_VARIABLE, TRACE_VARIABLE

_NIXL_MODULES = ("nixl_cu13._api", "nixl_cu12._api")
_log = logging.getLogger("vllm.disagglab")


class _DelayedBindings:
    """Stands for NIXL's binding module; makes agents that pause ``delay_us`` between polls."""

    def __init__(self, bindings: Any, delay_us: int) -> None:
        self._bindings = bindings
        self._delay_us = delay_us

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bindings, name)

    def nixlAgent(self, name: str, config: Any) -> Any:
        """Build the agent with ``config.pthrDelay`` set (microseconds)."""
        config.pthrDelay = self._delay_us
        _log.info("NIXL agent %s: progress thread polls every %d us", name, self._delay_us)
        return self._bindings.nixlAgent(name, config)


def delay_progress_thread(delay_us: int) -> None:
    """Make every NIXL agent of this process pause ``delay_us`` microseconds between two polls.

    Raises:
        RuntimeError: if no NIXL Python API is installed.
    """
    patched = 0
    for module_name in _NIXL_MODULES:
        try:
            api: Any = importlib.import_module(module_name)
        except ModuleNotFoundError:
            continue
        if not isinstance(api.nixlBind, _DelayedBindings):
            api.nixlBind = _DelayedBindings(api.nixlBind, delay_us)
        patched += 1
    if patched == 0:
        raise RuntimeError(f"{DELAY_VARIABLE} is set but none of {', '.join(_NIXL_MODULES)} is installed")


def cores_of_node(topology: list[list[int]], cpus: frozenset[int]) -> list[list[int]]:
    """The part of a NUMA ``topology`` (core ids by NUMA node) that belongs to a node's ``cpus``; empty rows
    go.
    """
    return [kept for cores in topology if (kept := [core for core in cores if core in cpus])]


def keep_node_cpus(cpus: frozenset[int]) -> None:
    """Let vLLM's CPU platform see only ``cpus`` when a connector chooses the core for its transfers."""
    platform = importlib.import_module("vllm.platforms.cpu").CpuPlatform
    stock = platform.discover_numa_topology

    def discover_numa_topology(*args: Any, **kwargs: Any) -> list[list[int]]:
        return cores_of_node(stock(*args, **kwargs), cpus)

    platform.discover_numa_topology = staticmethod(discover_numa_topology)
    _log.info("connector keeps to the cores of this node: %s", sorted(cpus))


def trace_transfers() -> None:
    """Log every NIXL transfer of this process.

    Raises:
        RuntimeError: if no NIXL Python API is installed.
    """
    found = [name for name in _NIXL_MODULES if importlib.util.find_spec(name.partition(".")[0]) is not None]
    if not found:
        raise RuntimeError(f"{TRACE_VARIABLE} is set but none of {', '.join(_NIXL_MODULES)} is installed")
    for name in found:
        transfer_log.watch(importlib.import_module(name).nixl_agent)


def tell_ends() -> None:
    """Log how each process ends that this one started by multiprocessing, when its status is first seen."""
    stock = popen_fork.Popen.poll
    if getattr(stock, "tells", False):
        return

    @functools.wraps(stock)
    def poll(self: Any, flag: int = os.WNOHANG) -> int | None:
        known = self.returncode
        status: int | None = stock(self, flag)
        if known is None and status is not None:
            _log.info("%spid %d, status %d", CHILD_ENDED, self.pid, status)
        return status

    poll.tells = True  # type: ignore[attr-defined]
    popen_fork.Popen.poll = poll  # type: ignore[method-assign]


def register() -> None:
    """Entry point of the group ``vllm.general_plugins``; safe to call more than once.

    Raises:
        ValueError: if a variable does not parse; the message names it.
        RuntimeError: if a delay is asked for and no NIXL Python API is installed.
    """
    tell_ends()
    delay = os.environ.get(DELAY_VARIABLE, "0")
    if not delay.isdecimal():
        raise ValueError(f"{DELAY_VARIABLE}={delay!r} is not a whole number of microseconds")
    if int(delay):
        delay_progress_thread(int(delay))
    if os.environ.get(TRACE_VARIABLE):
        trace_transfers()
    cpus = os.environ.get(CPUS_VARIABLE, "")
    if cpus:
        if not all(part.isdecimal() for part in cpus.split(",")):
            raise ValueError(f"{CPUS_VARIABLE}={cpus!r} is not a comma-separated list of core numbers")
        keep_node_cpus(frozenset(int(part) for part in cpus.split(",")))
