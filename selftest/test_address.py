"""Addresses beside ports: IPv6 in brackets there and nowhere else.

The oracle is httpx's own parser, and a plain HTTP server at ``::1``; what is refused: config/test_labs.py.
"""

from __future__ import annotations

import asyncio
import http.server
import json
import socket
import threading
from collections.abc import Iterator

import httpx
import pytest

from disagglab import address
from disagglab.agent.port import PortPool, accepts
from disagglab.config.labs import load_lab
from disagglab.hosts.weights import Model
from disagglab.paths import ROOT
from disagglab.serving.openai import tokenize
from disagglab.serving.prometheus import scrape
from disagglab.serving.vllm import ServerPlan, plan_server
from tests.disagg import slowproxy

METRICS = "# TYPE things counter\nthings_total 3.0\n"


class Standin(http.server.BaseHTTPRequestHandler):
    """Answers as a vLLM server would, as far as it is asked here."""

    def do_GET(self) -> None:
        """Metrics."""
        self._say(METRICS.encode())

    def do_POST(self) -> None:
        """The port that it was addressed at, in place of tokens."""
        self.rfile.read(int(self.headers["Content-Length"]))
        self._say(json.dumps({"tokens": [address.parted(self.headers["Host"])[1]]}).encode())

    def _say(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing on the terminal."""


class Server6(http.server.ThreadingHTTPServer):
    """A server on IPv6."""

    address_family = socket.AF_INET6


@pytest.fixture
def loopback6() -> str:
    """``::1``, where this machine has it."""
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError as error:
        pytest.skip(f"NO-IPV6: this machine has no ::1 ({error})")
    return "::1"


@pytest.fixture
def port(loopback6: str) -> Iterator[int]:
    """The port of a server at ``::1``."""
    with Server6((loopback6, 0), Standin) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("host", "text"),
    [("::1", "[::1]:80"), ("fd00::1", "[fd00::1]:80"), ("192.0.2.1", "192.0.2.1:80"), ("a.b", "a.b:80")],
)
def test_an_address_beside_a_port(host: str, text: str) -> None:
    """Written, taken apart again, and read by httpx as what it was."""
    assert address.joined(host, 80) == text
    for written in (text, address.url_of(host, 80), address.url_of(host, 80, "tcp")):
        assert address.parted(written) == (host, 80)
    url = httpx.URL(address.url_of(host, 8080))
    assert (url.host, url.port) == (host, 8080)
    assert address.family(host) == (socket.AF_INET6 if ":" in host else socket.AF_INET)


def test_a_server_is_reached_and_scraped_over_ipv6(port: int, loopback6: str) -> None:
    """By the URL that a node's address makes; the metrics are those that it says."""
    node = load_lab("embedded-ipv6").nodes[0]
    assert node.address == loopback6
    url = ServerPlan(node, "m", (), {}, port, True).url
    assert url == f"http://[::1]:{port}"
    assert scrape("a", url).value("things_total") == 3.0
    assert tokenize(url, "m", "x") == [port]


def test_ports_are_held_on_ipv6(loopback6: str, port: int) -> None:
    """A reserved port is refused to others, and a server that listens is found."""
    pool = PortPool(loopback6, 1 + port % 2**15 + 2**14, 65535)
    try:
        held = pool.reserve()
        with socket.socket(socket.AF_INET6) as other, pytest.raises(OSError, match="in use"):
            other.bind((loopback6, held))
        assert not accepts(loopback6, held)
        assert accepts(loopback6, port)
    finally:
        pool.close()


def test_the_proxy_of_the_gates_control_passes_ipv6(port: int, loopback6: str) -> None:
    """It listens at ``::1`` and goes on to what a router's URL says."""

    async def through() -> bytes:
        with socket.socket(socket.AF_INET6) as free:
            free.bind((loopback6, 0))
            own = free.getsockname()[1]
        upstream = address.parted(address.url_of(loopback6, port))
        proxy = asyncio.create_task(slowproxy.serve(loopback6, own, upstream, 1.0))
        while not await asyncio.to_thread(accepts, loopback6, own):
            await asyncio.sleep(0)
        answer = await asyncio.to_thread(httpx.get, f"{address.url_of(loopback6, own)}/metrics")
        proxy.cancel()
        return answer.content

    assert asyncio.run(asyncio.wait_for(through(), 20)) == METRICS.encode()


def test_a_node_on_ipv6_has_brackets_in_urls_alone() -> None:
    """vLLM's --host and the side channel take the bare address (vllm.utils.network_utils adds brackets)."""
    lab = load_lab("embedded-ipv6")
    model = Model("m", ROOT / "m", {})
    plan = plan_server(lab, lab.nodes[0], model, "m", 21200, 21201, "python", events_port=21202)
    assert plan.argv[plan.argv.index("--host") + 1] == "::1"
    assert plan.env["VLLM_NIXL_SIDE_CHANNEL_HOST"] == "::1"
    assert plan.event_source is not None
    assert (plan.url, plan.event_source.events) == ("http://[::1]:21200", "tcp://[::1]:21202")
