"""Commands, phases, causes and identity of a server: plans, recorded log lines, a stand-in HTTP server."""

from __future__ import annotations

import http.server
import json
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from disagglab.config.labs import load_lab
from disagglab.config.schema import Lab
from disagglab.errors import StartError
from disagglab.hosts.host import local_host
from disagglab.hosts.weights import Model
from disagglab.kv import attention, modelconfig
from disagglab.paths import LABS
from disagglab.progress import ProgressLine
from disagglab.serving import router
from disagglab.serving.boot import wait_ready
from disagglab.serving.causes import CAUSES, causes_of
from disagglab.serving.vllm import (
    ServerPlan,
    VllmServer,
    keeps_prefixes,
    phase_of,
    plan_server,
    post_mortem,
)

LOGS = Path(__file__).parent / "logs"
PYTHON = "/opt/vllm/bin/python"
MODEL = Model("M", Path("/models/m"), {"max_position_embeddings": 8192})


@pytest.fixture
def lab() -> Lab:
    """The embedded lab."""
    return load_lab("embedded")


def plan(lab: Lab, node: int, connector: bool = True) -> ServerPlan:
    """The plan of one of its servers."""
    return plan_server(lab, lab.nodes[node], MODEL, "M-1234", 21000, 21001 if connector else None, PYTHON)


def test_roles_and_settings_reach_the_command(lab: Lab) -> None:
    """Prefill is producer, decode consumer; the failure policy is explicit; lab settings become variables."""
    for node, role in ((0, "kv_producer"), (1, "kv_consumer")):
        made = plan(lab, node)
        transfer = json.loads(made.argv[made.argv.index("--kv-transfer-config") + 1])
        assert transfer["kv_role"] == role
        assert transfer["kv_load_failure_policy"] == "fail"
        assert made.env["DISAGGLAB_NODE_CPUS"] == str(node)
        assert made.env["DISAGGLAB_NIXL_PROGRESS_DELAY_US"] == "1000"
        assert made.env["UCX_TLS"] == "tcp,sm,self"
        assert made.env["VLLM_NIXL_SIDE_CHANNEL_HOST"] == lab.nodes[node].address
        assert "--enforce-eager" in made.argv
        assert "M-1234" in made.argv
        assert made.argv[0] == PYTHON


def test_kv_goes_over_the_data_link() -> None:
    """A node listens on its address and moves KV over its data link; the tokenizer may be another's."""
    lab = load_lab("two-hosts")
    lent = Model("M", Path("/models/m"), {}, other_tokenizer=Path("/models/words"))
    made = plan_server(lab, lab.nodes[1], lent, "M-1234", 21100, 21101, PYTHON)
    assert made.url == "http://198.18.2.2:21100"
    assert made.env["VLLM_NIXL_SIDE_CHANNEL_HOST"] == "198.18.9.2"
    assert (made.env["UCX_NET_DEVICES"], made.env["UCX_TLS"]) == ("data0", "tcp,self")
    assert made.argv[made.argv.index("--tokenizer") + 1] == "/models/words"
    assert "--tokenizer" not in plan(lab, 1).argv


def test_a_dedicated_server_has_no_connector(lab: Lab) -> None:
    """Without a side channel there is no trace of a connector in command or environment."""
    made = plan(lab, 0, connector=False)
    assert "--kv-transfer-config" not in made.argv
    assert not any(key.startswith(("UCX_", "VLLM_NIXL")) for key in made.env)


def test_the_shown_command_holds_the_environment(lab: Lab) -> None:
    """What the report shows can be pasted into a shell: settings first, quoted."""
    shown = plan(lab, 0).command
    assert shown.startswith("DISAGGLAB_NIXL_PROGRESS_DELAY_US=1000 ")
    assert '\'{"kv_connector"' in shown


def test_routers_never_retry(lab: Lab) -> None:
    """A retried request would hide a failure from the measurement; both modes switch retries off."""
    plain = router.router_argv(lab, PYTHON, 1, 2, ["http://a", "http://b"], [], [])
    split = router.router_argv(lab, PYTHON, 1, 2, [], ["http://a"], ["http://b"])
    assert "--disable-retries" in plain
    assert "--disable-retries" in split
    assert plain[-3:] == ["--worker-urls", "http://a", "http://b"]
    assert split[-4:] == ["--prefill", "http://a", "--decode", "http://b"]
    assert plain[0] == split[0] == "/opt/vllm/bin/vllm-router", "the one beside the suite's Python"


@pytest.mark.parametrize(
    ("line", "phase"),
    [
        ("", "import"),
        ("INFO [api_utils.py:286] non-default args: {'model_tag': '/m'}", "configure"),
        ("INFO [core.py:129] Initializing a V1 LLM engine (v0.31.0) with config", "start engine"),
        ("INFO Starting to load model /m...", "load weights"),
        ("INFO [kv_cache_utils.py:2464] CPU KV cache size: 46,592 tokens", "KV cache"),
        ("INFO:     Application startup complete.", "open HTTP"),
        ("WARNING Enforce eager set, disabling torch.compile, CUDAGraphs, and JIT kernel warmup.", "import"),
    ],
)
def test_phases_are_read_from_the_log(line: str, phase: str) -> None:
    """Lines that vLLM 0.31.0 wrote name the phase; a remark about compiling is not the phase."""
    assert phase_of([line]) == phase


HEALTHY = sorted(LOGS.glob("healthy-*.log"))
FAILED = {
    "failed-option.log": "does not know an option",
    "failed-model-folder.log": "model is missing",
    "failed-model-empty.log": "model is missing",
    "failed-port.log": "a port is taken",
}
DIED = "(EngineCore pid=9) ERROR 11-28 09:41:10 [core.py:1330] "


@pytest.mark.parametrize("log", HEALTHY, ids=lambda log: log.name)
def test_a_healthy_log_names_no_cause(log: Path) -> None:
    """What servers logged and lived on after is no cause: warnings, import probes with their tracebacks, a
    transfer and a request that failed. The logs are of vLLM 0.31.0; healthy-handled-errors.log has a probe of
    nixl_ep without nixl_ep_cu13, and after "startup complete" two failures written in by hand.
    """
    assert len(log.read_text().splitlines()) > 60
    assert causes_of(log.read_text().splitlines()) == []


@pytest.mark.parametrize(("log", "cause"), FAILED.items())
def test_a_log_of_a_failed_start_names_one_cause(log: str, cause: str) -> None:
    """Whole logs of vLLM 0.31.0: an unknown option, a folder that is missing or empty, a taken port."""
    (found,) = causes_of((LOGS / log).read_text().splitlines())
    assert cause in found[0]


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory.", "out of memory"),
        ("Killed", "out of memory"),
        (f"{DIED}ValueError: No available memory for the cache blocks. Try", "out of memory"),
        (f"{DIED}ValueError: (0.5 GiB KV cache is needed, which is larger than the available KV cache memory",
         "out of memory"),
        (f"{DIED}is less than desired GPU memory utilization (0.9, 70 GiB).", "out of memory"),
        ("OSError: [Errno 98] Address already in use", "a port is taken"),
        (f"{DIED}zmq.error.ZMQError: Address already in use (addr='tcp://*:5557')", "a port is taken"),
        (f"{DIED}RuntimeError: NIXL is not available", "NIXL"),
        ("ModuleNotFoundError: No module named 'nixl_cu13'", "NIXL"),
        (f"{DIED}nixl_cu13._bindings.nixlBackendError: NIXL_ERR_BACKEND", "NIXL"),
        ("ImportError: detected CUDA 13 but nixl-cu13 is not installed", "NIXL"),
        ("OSError: /m does not appear to have a file named config.json", "model is missing"),
        (f"{DIED}RuntimeError: Cannot find any model weights with `/m`", "model is missing"),
        ("vllm serve: error: unrecognized arguments: --enforce-eagr", "does not know an option"),
        ("Fatal Python error: Illegal instruction", "this CPU lacks"),
        (
            "disagg-lab: ended by its supervisor: MemAvailable fell below 0.5 GiB ([memory] stop_gib)",
            "before the host stalled",
        ),
        ("something new", "not recognised"),
    ],
)  # fmt: skip
def test_a_dead_servers_log_names_the_likely_cause(tmp_path: Path, line: str, cause: str) -> None:
    """At the end of a healthy log one line decides, and fits one cause; the last 40 lines are shown, with
    cause and mend in front.
    """
    log = tmp_path / "vllm-a.log"
    lines = [*HEALTHY[0].read_text().splitlines(), line]
    log.write_text("\n".join(lines))
    assert len(causes_of(lines)) == (cause != "not recognised")
    text = post_mortem(log)
    assert cause in text.splitlines()[0]
    assert "mend: " in text
    assert "last 40 lines" in text
    assert text.rstrip().endswith(line)


def test_every_cause_is_shown_by_a_failure() -> None:
    """No entry of CAUSES is without a line above that only it fits; the test counts them."""
    shown = {cause for log in FAILED for cause, _ in causes_of((LOGS / log).read_text().splitlines())}
    by_line = test_a_dead_servers_log_names_the_likely_cause.pytestmark[0].args[1]  # type: ignore[attr-defined]
    shown |= {cause for line, _ in by_line for cause, _ in causes_of([line])}
    assert shown == {cause for _, cause, _ in CAUSES}


class Models(http.server.BaseHTTPRequestHandler):
    """Answers /v1/models with the name that the test sets."""

    name = "M-1234"

    def do_GET(self) -> None:
        """One model."""
        answer = json.dumps({"data": [{"id": self.name}]}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on the screen."""


@pytest.fixture
def standin() -> Iterator[int]:
    """A stand-in server's port."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Models) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield httpd.server_address[1]
        httpd.shutdown()
        thread.join()


def server_at(
    lab: Lab, port: int, strangers: tuple[int, ...] = (), log: Path = Path("/nonexistent")
) -> VllmServer:
    """A server whose process is made up. ``strangers``: ports that others listen on."""
    made = plan_server(lab, lab.nodes[0], MODEL, "M-1234", port, None, PYTHON)
    process: Any = SimpleNamespace(
        is_anothers_port=lambda asked: asked in strangers,
        cpu_s=lambda: 0.0,
        alive=True,
        asked=False,
        died=False,
        has_died=lambda: False,
        host=SimpleNamespace(follow=lambda _: None),
        name="vllm-a",
        log=log,
        recorded=False,
    )
    return VllmServer(made, process)


def test_a_strangers_server_is_not_ready(lab: Lab, standin: int) -> None:
    """An open port with another model's name, or with the right name in a foreign process, is an error."""
    with pytest.raises(StartError, match="which this run did not start"):
        server_at(lab, standin, strangers=(standin,)).is_ready()
    Models.name = "other"
    try:
        with pytest.raises(StartError, match=r"answers as \['other'\]"):
            server_at(lab, standin).is_ready()
    finally:
        Models.name = "M-1234"


def test_our_own_server_is_ready(lab: Lab, standin: int) -> None:
    """The right name, and nobody else listens there; whether that is so is tested in test_deputy.py."""
    assert server_at(lab, standin).is_ready()


def test_a_server_that_dies_is_reported_at_once(lab: Lab, state: Path, tmp_path: Path) -> None:
    """A dead process ends the wait with how it ended and its last error, not with the deadline."""
    host = local_host("run", (20700, 20799), tmp_path, sys.executable)
    made = plan_server(lab, lab.nodes[0], MODEL, "M-1234", 1, None, PYTHON)
    script = "echo 'ValueError: the reason'; exit 3"
    dead = VllmServer(made, host.start("vllm-a", ["sh", "-c", script], {"PATH": os.environ["PATH"]}))
    told = r"while starting, vllm-a, prefill \(pid \d+\) died .*ended with status 3\nlast error: .*the reason"
    with pytest.raises(StartError, match=told):
        wait_ready([dead], lab, ProgressLine("servers"))
    host.close()


def test_a_follower_that_dies_is_reported_at_once(lab: Lab, state: Path, tmp_path: Path) -> None:
    """The leader lives and would wait for it until its own deadline."""
    host = local_host("run", (20700, 20799), tmp_path, sys.executable)
    made = plan_server(lab, lab.nodes[1], MODEL, "M-1234", 1, None, PYTHON)
    script = "echo 'ValueError: the reason'; exit 3"
    dead = VllmServer(made, host.start("vllm-b", ["sh", "-c", script], {"PATH": os.environ["PATH"]}))
    leader = server_at(lab, 1)
    with pytest.raises(StartError, match=r"while starting, vllm-b, decode \(pid \d+\) died"):
        wait_ready([leader], lab, ProgressLine("servers"), [dead])
    host.close()


def test_a_server_without_a_sign_of_life_has_failed(lab: Lab, tmp_path: Path) -> None:
    """No log growth and no CPU time for stall_s ends the wait; slowness alone does not."""
    log = tmp_path / "vllm-a.log"
    log.write_text("")
    vllm = lab.vllm.model_copy(update={"stall_s": 0.6})
    hurried = lab.model_copy(update={"vllm": vllm})
    with pytest.raises(StartError, match="no CPU use"):
        wait_ready([server_at(lab, 1, log=log)], hurried, ProgressLine("servers"))


@pytest.mark.parametrize(("stop_gib", "stop_bytes"), [(0.5, 2**29), (0, 0)])
def test_the_memory_limit_reaches_the_supervisor(lab: Lab, stop_gib: float, stop_bytes: int) -> None:
    """[memory] stop_gib, in bytes; what the supervisor does with it is tested in test_deputy.py."""
    started: list[tuple[Any, ...]] = []
    host: Any = SimpleNamespace(start=lambda *args, **options: started.append((args, options)))
    limited = lab.model_copy(update={"memory": lab.memory.model_copy(update={"stop_gib": stop_gib})})
    made = plan(lab, 1)
    VllmServer.start(host, limited, made, [21000, 21001])
    assert started == [
        (("vllm-b", made.argv, made.env, [1], [21000, 21001]), {"memory_stop_bytes": stop_bytes})
    ]


def test_prefix_caching_is_off_for_latent_attention_on_a_cpu(lab: Lab) -> None:
    """vLLM 0.31.0 says so in its log; a lab file may switch it off, and GPUs keep it."""
    latent = attention.shape(modelconfig.read(LABS / "models" / "deepseek-tiny"), "bfloat16", "deepseek-tiny")
    plain = attention.shape(modelconfig.read(LABS / "models" / "gemma3-tiny"), "bfloat16", "gemma3-tiny")
    gpus = load_lab("two-h200")
    assert not keeps_prefixes(load_lab("latent"), latent)
    assert keeps_prefixes(lab, plain)
    assert keeps_prefixes(gpus, latent)
    off = lab.model_copy(
        update={"vllm": lab.vllm.model_copy(update={"args": {"enable-prefix-caching": False}})}
    )
    assert not keeps_prefixes(off, plain)
