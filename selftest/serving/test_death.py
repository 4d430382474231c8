"""A death is told with who ended what, the last error and the mend; an end that we wanted is none.

Real processes of this machine, ended by real signals; only the kernel's out-of-memory kill is made up.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from disagglab import waiting
from disagglab.errors import LabError
from disagglab.hosts.host import Host, HostProcess, local_host
from disagglab.serving import death
from disagglab.serving.causes import CHILD_ENDED, cause_of
from disagglab.serving.death import Died

PORTS = (20600, 20699)
LIMIT_S = 20.0
ENGINE_LOG = f"""
(EngineCore pid=77) INFO 11-28 09:00:00 [core.py:129] Initializing a V1 LLM engine (v0.31.0) with config
(EngineCore pid=77) ERROR 11-28 09:00:01 [core.py:900] EngineCore encountered a fatal error.
(EngineCore pid=77) ERROR 11-28 09:00:01 [core.py:900] Traceback (most recent call last):
(EngineCore pid=77) ERROR 11-28 09:00:01 [core.py:900] ValueError: 3 blocks do not fit into 2
(APIServer pid=76) INFO 11-28 09:00:01 [vllm_plugin.py:9] {CHILD_ENDED}pid 77, status 1
(APIServer pid=76) ERROR 11-28 09:00:01 [async_llm.py:700] AsyncLLM output_handler failed.
(APIServer pid=76) ERROR 11-28 09:00:01 [async_llm.py:700] vllm.v1.engine.exceptions.EngineDeadError: gone
"""


@pytest.fixture
def host(state: Path, tmp_path: Path) -> Iterator[Host]:
    """This machine; what the test started is ended with it."""
    found = local_host("run", PORTS, tmp_path, sys.executable)
    yield found
    found.close()


def await_end(process: HostProcess) -> None:
    """Return when a process has ended, whoever ended it."""
    waiting.until(lambda: not process.alive, LIMIT_S, lambda: LabError(f"{process.name} lives"))


Run = Callable[..., HostProcess]


@pytest.fixture
def run(host: Host) -> Run:
    """Starts a shell command that is then ended by a signal, or by itself, and waits until it is gone."""

    def start(script: str, number: int = 0) -> HostProcess:
        process = host.start("vllm-b", ["sh", "-c", script], {"PATH": os.environ["PATH"]})
        if number:
            os.kill(process.pid, number)
        await_end(process)
        return process

    return start


@pytest.mark.parametrize(
    ("number", "how", "cause"),
    [
        (signal.SIGKILL, "was ended by SIGKILL", "the kernel counted no out-of-memory kill"),
        (signal.SIGTERM, "was ended by SIGTERM", "asked it to end"),
        (signal.SIGSEGV, "was ended by SIGSEGV", "native code crashed"),
        (signal.SIGBUS, "was ended by SIGBUS", "/dev/shm"),
        (signal.SIGRTMIN, f"was ended by {signal.Signals(signal.SIGRTMIN).name}", "not recognised"),
    ],
)
def test_a_signal_from_outside_is_named(run: Run, number: int, how: str, cause: str) -> None:
    """Process, role, signal and time in one line; cause and mend with it."""
    process = run("exec sleep 300", number)
    found = death.of(process, "decode")
    assert found is not None
    assert found.line.startswith(f"vllm-b, decode (pid {process.pid}) died at ")
    assert found.line.endswith(how)
    assert cause in found.cause
    assert str(process.log) in str(found)
    with pytest.raises(Died, match=how):
        death.require_alive(process, "decode")


def test_an_exit_status_is_named(run: Run) -> None:
    """A command that gives up says why in its log; words of the log name the cause."""
    found = death.of(run("echo 'ValueError: bad'; echo 'OSError: [Errno 98] Address already in use'; exit 3"))
    assert found is not None
    assert found.line.endswith("ended with status 3")
    assert found.last_error == "OSError: [Errno 98] Address already in use"
    assert found.cause == "a port is taken"


def test_a_server_that_ended_well_has_died_all_the_same(run: Run) -> None:
    """Somebody stopped it politely; nobody here did."""
    found = death.of(run("exit 0"))
    assert found is not None
    assert found.line.endswith("ended with status 0")


def test_an_engine_that_took_its_server_along_is_named(run: Run, tmp_path: Path) -> None:
    """The engine's end and its own last error, not the errors of the requests that it took along."""
    (tmp_path / "engine").write_text(ENGINE_LOG)
    found = death.of(run(f"cat {tmp_path / 'engine'}; exit 0"))
    assert found is not None
    assert "its EngineCore (pid 77) ended with status 1; then it ended with status 0" in found.line
    assert found.last_error == "ValueError: 3 blocks do not fit into 2"


def test_an_engine_killed_by_a_signal_is_named(run: Run, tmp_path: Path) -> None:
    """The signal decides, although the log has errors in it."""
    (tmp_path / "engine").write_text(ENGINE_LOG.replace("status 1", "status -9"))
    found = death.of(run(f"cat {tmp_path / 'engine'}; exit 0"))
    assert found is not None
    assert "its EngineCore (pid 77) was ended by SIGKILL" in found.line
    assert "somebody else killed it" in found.cause


def test_an_engine_that_does_not_start_says_why() -> None:
    """Lines of vLLM 0.26.0 on a GPU: the API server's own error points at the engine's, which is told."""
    lines = [
        "(EngineCore pid=1191) ERROR 11-28 11:03:21 [core.py:1330] EngineCore failed to start.",
        "(EngineCore pid=1191) ERROR 11-28 11:03:21 [core.py:1330] Traceback (most recent call last):",
        "(EngineCore pid=1191) ERROR 11-28 11:03:21 [core.py:1330] ValueError: No available memory",
        "(EngineCore pid=1191) Process EngineCore:",
        "(EngineCore pid=1191) ValueError: No available memory for the cache blocks.",
        "(APIServer pid=910)     raise RuntimeError(",
        "(APIServer pid=910) RuntimeError: Engine core initialization failed. See root cause above.",
    ]
    assert death.last_error(lines) == "ValueError: No available memory for the cache blocks."
    assert cause_of(lines)[0] == "out of memory"


def test_what_a_killed_engine_brings_is_not_its_error() -> None:
    """Lines of vLLM 0.31.0 after SIGKILL: all of them follow, so there is no last error to show."""
    mark = "(APIServer pid=439) ERROR 11-28 09:49:14 [async_llm.py:871] "
    lines = [
        "(APIServer pid=439) WARNING 11-28 09:49:14 [core_client.py:809] engine core exited unexpectedly",
        f"{mark}AsyncLLM output_handler failed.",
        f"{mark}Traceback (most recent call last):",
        f'{mark}  File "async_llm.py", line 817, in output_handler',
        f"{mark}    outputs = await engine_core.get_output_async()",
        f"{mark}              ^^^^^^^^^^^^",
        f"{mark}    raise self._format_exception(outputs) from None",
        f"{mark}vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue. See stack trace.",
        "INFO:     Shutting down",
    ]
    assert death.last_error(lines) == ""
    assert death.last_error([f"{mark}no room for 3 blocks", *lines]) == "no room for 3 blocks"


def test_the_kernels_out_of_memory_kill_is_recognised(run: Run) -> None:
    """SIGKILL, and the kernel's counter has grown meanwhile."""
    process = run("exec sleep 300", signal.SIGKILL)
    assert process.has_died()
    assert process.ended is not None
    process.ended["oom_kills"] = 1
    found = death.of(process)
    assert found is not None
    assert found.cause == "the kernel killed it: out of memory"
    assert "VLLM_CPU_KVCACHE_SPACE" in found.mend


def test_our_own_memory_guard_is_recognised(host: Host) -> None:
    """The supervisor's line in the log says more than the signal."""
    process = host.start("vllm-b", ["sleep", "300"], {"PATH": os.environ["PATH"]}, memory_stop_bytes=2**60)
    await_end(process)
    found = death.of(process)
    assert found is not None
    assert "before the host stalled" in found.cause


def test_what_we_end_or_await_has_not_died(host: Host) -> None:
    """Stopped, killed as a test does it, asked to stop, or run to its end."""
    environment = {"PATH": os.environ["PATH"]}
    stopped = host.start("stopped", ["sleep", "300"], environment)
    stopped.stop()
    killed = host.start("killed", ["sleep", "300"], environment)
    killed.kill()
    asked = host.start("asked", ["sleep", "300"], environment)
    asked.ask_to_stop()
    host.run("short", ["true"], environment, LIMIT_S)
    living = host.start("living", ["sleep", "300"], environment)
    for process in (killed, asked):
        process.stop()
    assert [process.name for process in host.started if process.has_died()] == []
    assert [death.of(process) for process in (stopped, killed, asked, living)] == [None] * 4


def test_a_server_that_lost_its_engine_is_waited_for(host: Host, tmp_path: Path) -> None:
    """It still runs when a request has failed of it; the root cause is told all the same."""
    (tmp_path / "engine").write_text(ENGINE_LOG)
    script = f"cat {tmp_path / 'engine'}; sleep 0.5; exit 1"
    process = host.start("vllm-b", ["sh", "-c", script], {"PATH": os.environ["PATH"]})
    waiting.until(lambda: death.is_dying(process), LIMIT_S, lambda: LabError("nothing was said"))
    assert process.alive
    found = death.of(process)
    assert found is not None
    assert "its EngineCore (pid 77)" in found.line
