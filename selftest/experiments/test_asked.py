"""What a session refuses, its plan refuses with the same words, by ``pytest --plan`` and ``disagglab plan``.

The oracle is one door against the others.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from disagglab.cli.main import main
from disagglab.config.arms import Arms
from disagglab.experiments.asked import Asked, choose
from disagglab.paths import LABS, ROOT
from disagglab.pytest_plugin import plugin

NARROW = """name = "narrow"
extends = "{labs}/embedded.toml"

[ports]
first = 21000
last = 21021
"""
FULL = """name = "full"
extends = "{labs}/two-gpus.toml"

[memory]
kv_beside_gib = []
"""
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown lab": ({"--lab": "nope"}, "no such lab file"),
    "unknown way": ({"--way": ["x"]}, "no such [[way]]"),
    "way twice": ({"--way": ["push", "push"]}, "asked for twice"),
    "unknown workload": ({"--workload": ["x"]}, "no gate names it"),
    "way and another release": ({"--way": ["push"], "--against": "0.30.0"}, "ask for one of the two"),
    "the same release": ({"--against": "0.31.0"}, "is what the lab serves already"),
    "the same release, asked for": (
        {"--vllm": "0.30.0", "--against": "0.30.0"},
        "is what the lab serves already",
    ),
    "a release without a rule": ({"--vllm": "9.9.9"}, "which KV blocks vLLM 9.9.9 moves is not known"),
    "another without a rule": ({"--against": "9.9.9"}, "which KV blocks vLLM 9.9.9 moves is not known"),
    "too few ports for ways": (
        {"--lab": "narrow", "--way": ["push", "blocks-32"]},
        "releases or ways need",
    ),
    "too few ports for two releases": (
        {"--lab": "narrow", "--against": "0.30.0"},
        "releases or ways need",
    ),
    "too little GPU memory": ({"--lab": "two-gpus", "--against": "0.30.0"}, "for each of two servers"),
    "no room for ways": ({"--lab": "full", "--way": ["tcp"]}, "ways share the GPUs' memory"),
    "unknown arm": ({"--arm": ["x"]}, "no such arm in this session"),
    "unknown arm left out": ({"--without": ["x"]}, "no such arm in this session"),
    "without the candidate": ({"--without": ["disaggregated"]}, "it is the candidate of every gate"),
    "one arm": ({"--arm": ["disaggregated"]}, "disaggregated alone"),
}


@pytest.fixture
def labs(tmp_path: Path) -> dict[str, str]:
    """Paths of labs that are made for the test."""
    found = {}
    for name, text in (("narrow", NARROW), ("full", FULL)):
        path = tmp_path / f"{name}.toml"
        path.write_text(text.format(labs=LABS))
        found[name] = str(path)
    return found


def config(options: dict[str, Any]) -> Any:
    """A pytest of tests/ with these options, as far as its hooks look before anything is made."""
    return SimpleNamespace(
        args=["tests"],
        invocation_params=SimpleNamespace(dir=ROOT, args=()),
        option=SimpleNamespace(),
        addinivalue_line=lambda *_: None,
        getoption=lambda name: options.get(name, [] if name == "--resume" else None),
    )


def argv(options: dict[str, Any]) -> list[str]:
    """Options as one types them."""
    pairs = [
        (name, one)
        for name, value in options.items()
        for one in (value if isinstance(value, list) else [value])
    ]
    return [word for pair in pairs for word in pair]


def in_lines(message: str) -> list[str]:
    """The problems of a message, as the command line prints them: one a line."""
    found = re.findall(r"^  \d+\. (.*)\n    mend: (.*)$", message, re.MULTILINE)
    assert found, message
    return [f"{problem} (mend: {mend})" for problem, mend in found]


@pytest.mark.parametrize("case", REFUSED)
def test_all_doors_refuse_the_same(
    case: str, labs: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Word for word, before a run folder is made."""
    options, told = REFUSED[case]
    options = {"--lab": "embedded", **options}
    options["--lab"] = labs.get(options["--lab"], options["--lab"])
    monkeypatch.setattr(plugin, "_open_session", lambda *_: pytest.fail("a session was opened"))
    with pytest.raises(pytest.UsageError) as by_session:
        plugin.pytest_configure(config(options))
    with pytest.raises(pytest.UsageError) as by_plan:
        plugin.pytest_cmdline_main(config({"--plan": True, **options}))
    assert main(["plan", *argv(options)]) == 2
    by_command = capsys.readouterr().err
    assert told in str(by_session.value)
    assert str(by_session.value) == str(by_plan.value)
    assert by_command.splitlines() == in_lines(str(by_session.value))


def test_what_is_chosen_is_as_it_is_served() -> None:
    """The lab beside its ways, on the workloads asked for, with the arms that are kept."""
    chosen = choose(Asked("two-h200", workloads=("chat",), ways=("tcp",), without=("single",)))
    assert {gate.workload for gate in chosen.lab.gates} == {"chat"}
    assert "kv-cache-memory-bytes" in chosen.lab.vllm.args
    assert [one.name for one in chosen.ways] == ["tcp"]
    kept = ("replicated", "disaggregated", "disaggregated@tcp")
    assert chosen.arms == Arms(kept, ("single", "single-again"))
