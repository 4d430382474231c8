"""The vLLM plugin changes what the lab asks for and nothing else.

Neither vLLM nor NIXL is imported: modules with the attributes that the plugin touches stand for them, and
what reaches them is the oracle. That the real ones still have these attributes is for experiments to show.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import multiprocessing
import signal
import sys
import time
from multiprocessing import popen_fork
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from disagglab.serving.causes import CHILD_ENDED
from disagglab.serving.vllm_plugin import cores_of_node, register
from disagglab.variables import CPUS_VARIABLE, DELAY_VARIABLE

NIXL = "nixl_cu13._api"
OTHER_NIXL = "nixl_cu12._api"
VLLM_CPU = "vllm.platforms.cpu"


@pytest.fixture(autouse=True)
def _unset(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting comes in from the shell that runs the selftests; no patch of multiprocessing stays."""
    monkeypatch.delenv(DELAY_VARIABLE, raising=False)
    monkeypatch.delenv(CPUS_VARIABLE, raising=False)
    monkeypatch.setattr(popen_fork.Popen, "poll", popen_fork.Popen.poll)  # put back afterwards


@pytest.fixture
def nixl(monkeypatch: pytest.MonkeyPatch) -> Any:
    """NIXL's Python API, whose agents are pairs of their name and their configuration."""
    api: Any = ModuleType(NIXL)
    api.nixlBind = SimpleNamespace(
        nixlAgent=lambda name, config: (name, config),
        nixlAgentConfig=lambda: SimpleNamespace(pthrDelay=0, useProgThread=True),
    )
    monkeypatch.setitem(sys.modules, NIXL, api)
    monkeypatch.setitem(sys.modules, OTHER_NIXL, None)  # not installed
    return api


@pytest.fixture
def cpu_platform(monkeypatch: pytest.MonkeyPatch) -> Any:
    """vLLM's CPU platform on a machine with two NUMA nodes."""

    class CpuPlatform:
        @classmethod
        def discover_numa_topology(cls) -> list[list[int]]:
            return [[0, 1, 2], [3, 4, 5]]

    module: Any = ModuleType(VLLM_CPU)
    module.CpuPlatform = CpuPlatform
    monkeypatch.setitem(sys.modules, VLLM_CPU, module)
    return CpuPlatform


@pytest.mark.parametrize(
    ("topology", "cpus", "seen"),
    [
        ([[0, 1]], {1}, [[1]]),
        ([[0, 1], [2, 3]], {0, 2, 3}, [[0], [2, 3]]),
        ([[0, 1], [2, 3]], {3}, [[3]]),
        ([[0, 1], [2, 3]], {0, 1, 2, 3}, [[0, 1], [2, 3]]),
        ([[1, 0]], {0, 1}, [[1, 0]]),
        ([[0, 1]], {7}, []),
        ([], {0}, []),
    ],
)
def test_cores_of_node_keeps_rows_and_order(
    topology: list[list[int]], cpus: set[int], seen: list[list[int]]
) -> None:
    """The connector takes the last core of each row, so the order stays and an empty row goes."""
    assert cores_of_node(topology, frozenset(cpus)) == seen


@pytest.mark.parametrize("settings", [{}, {DELAY_VARIABLE: "0", CPUS_VARIABLE: ""}])
def test_without_settings_nothing_is_imported(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, str]
) -> None:
    """The plugin is loaded by every vLLM of this environment, also by those that serve no lab."""
    for variable, value in settings.items():
        monkeypatch.setenv(variable, value)

    def refuse(name: str) -> ModuleType:
        raise AssertionError(f"{name} was imported")

    monkeypatch.setattr(importlib, "import_module", refuse)
    before = set(sys.modules)
    register()
    assert set(sys.modules) == before


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        (DELAY_VARIABLE, "1 ms"),
        (DELAY_VARIABLE, "-1"),
        (DELAY_VARIABLE, "1.5"),
        (DELAY_VARIABLE, ""),
        (CPUS_VARIABLE, "0-3"),
        (CPUS_VARIABLE, "0,"),
        (CPUS_VARIABLE, "all"),
    ],
)
def test_a_value_that_does_not_parse_is_named(
    monkeypatch: pytest.MonkeyPatch, nixl: Any, cpu_platform: Any, variable: str, value: str
) -> None:
    """vLLM shows the error in the log of a server that did not start; it names the variable and its value."""
    bindings, topology = nixl.nixlBind, cpu_platform.discover_numa_topology()
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=f"^{variable}='{value}' is not"):
        register()
    assert nixl.nixlBind is bindings
    assert cpu_platform.discover_numa_topology() == topology


def test_agents_pause_as_long_as_the_lab_says(monkeypatch: pytest.MonkeyPatch, nixl: Any) -> None:
    """The delay reaches the configuration that an agent is made with; the progress thread stays on."""
    monkeypatch.setenv(DELAY_VARIABLE, "1000")
    register()
    name, config = nixl.nixlBind.nixlAgent("prefill", nixl.nixlBind.nixlAgentConfig())
    assert name == "prefill"
    assert config.pthrDelay == 1000
    assert config.useProgThread


def test_the_rest_of_nixl_is_the_stock_one(monkeypatch: pytest.MonkeyPatch, nixl: Any) -> None:
    """Whatever else is asked of the bindings comes from NIXL itself, and what it lacks stays lacking."""
    bindings = nixl.nixlBind
    monkeypatch.setenv(DELAY_VARIABLE, "1000")
    register()
    assert nixl.nixlBind.nixlAgentConfig is bindings.nixlAgentConfig
    with pytest.raises(AttributeError):
        _ = nixl.nixlBind.no_such_name


def test_register_twice_wraps_nixl_once(monkeypatch: pytest.MonkeyPatch, nixl: Any) -> None:
    """vLLM may load a plugin more than once in a process."""
    monkeypatch.setenv(DELAY_VARIABLE, "1000")
    register()
    wrapped = nixl.nixlBind
    register()
    assert nixl.nixlBind is wrapped


def test_a_delay_without_nixl_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A setting that cannot be applied is never passed over: results would claim it."""
    monkeypatch.setitem(sys.modules, NIXL, None)
    monkeypatch.setitem(sys.modules, OTHER_NIXL, None)
    monkeypatch.setenv(DELAY_VARIABLE, "1000")
    with pytest.raises(RuntimeError, match=rf"{DELAY_VARIABLE} is set but none of .*{NIXL}.* is installed"):
        register()


def test_the_connector_sees_only_the_cores_of_its_node(
    monkeypatch: pytest.MonkeyPatch, cpu_platform: Any
) -> None:
    """The answer of vLLM's platform is cut to the node's cores, also after a second load of the plugin."""
    monkeypatch.setenv(CPUS_VARIABLE, "0,1,4")
    register()
    assert cpu_platform().discover_numa_topology() == [[0, 1], [4]]
    register()
    assert cpu_platform.discover_numa_topology() == [[0, 1], [4]]


def test_the_entry_point_that_vllm_loads_is_register() -> None:
    """The package announces the plugin in vLLM's group for every process."""
    (entry,) = importlib.metadata.entry_points(group="vllm.general_plugins", name="disagglab")
    assert entry.load() is register


def test_how_a_child_ended_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """A real child, killed by SIGKILL: pid and signal, once, in the words that a death is read from."""
    register()
    register()
    child = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(300,))
    child.start()
    with caplog.at_level(logging.INFO, logger="vllm.disagglab"):
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL
    assert caplog.messages == [f"{CHILD_ENDED}pid {child.pid}, status -9"]
