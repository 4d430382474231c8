"""``disagglab propose`` and ``disagglab score``: another program's answer, stored and held against figures.

Oracle: a stand-in for aiconfigurator that hands out what the real one wrote (selftest/predict/aiconfigurator)
and notes how it was started; figures of a session worked out by hand.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from disagglab.cli.main import main
from disagglab.config.labs import load_lab

RECORDED = Path(__file__).parents[1] / "predict" / "aiconfigurator"
STAND_IN = """#!/bin/sh
'''exec' "{python}" "$0" "$@" # as pip writes it where a path holds a space
' '''
import json, os, pathlib, shutil, sys
with open({log!r}, "a") as log:
    own = {{key: os.environ.get(key) for key in ("HF_HUB_OFFLINE", "PYTHONPATH")}}
    config = json.load(open("model/config.json")) if sys.argv[1] == "cli" else {{}}
    print(json.dumps([sys.argv[1:], own, config.get("torch_dtype"), "_origin" in config]), file=log)
recorded = pathlib.Path({recorded!r})
if "gb10" in sys.argv:
    sys.exit((recorded / "refused-system.txt").read_text())
if sys.argv[1] == "version":
    print("aiconfigurator 0.12.0")
elif sys.argv[2] == "default":
    shutil.copytree(recorded, sys.argv[sys.argv.index("--save-dir") + 1] + "/of-a-model")
else:
    print((recorded / ("estimate-disagg.txt" if "disagg" in sys.argv else "estimate-agg.txt")).read_text())
"""

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def tool(tmp_path: Path) -> Path:
    """An environment folder with the stand-in; it notes its starts in ``log`` there."""
    program = tmp_path / "env" / "bin" / "aiconfigurator"
    program.parent.mkdir(parents=True)
    log = str(tmp_path / "env" / "log")
    program.write_text(STAND_IN.format(python=sys.executable, log=log, recorded=str(RECORDED)))
    program.chmod(0o755)
    return tmp_path / "env"


def propose(tool: Path, *further: str, system: str = "h200_sxm", lab: str = "two-h200") -> int:
    """The command's exit status."""
    given = ["--lab", lab, "--workload", "chat", "--system", system, "--aiconfigurator", str(tool)]
    return main(["propose", *given, *further])


def starts(tool: Path) -> list[list[Any]]:
    """What the stand-in noted."""
    return [json.loads(line) for line in (tool / "log").read_text().splitlines()]


@pytest.mark.parametrize("named", ["", "bin/python", "bin/aiconfigurator"])
def test_it_is_found_by_its_folder_its_python_or_its_command(tool: Path, named: str, capsys: Capture) -> None:
    """All three are the same environment."""
    assert propose(tool / named, "--json") == 0
    assert json.loads(capsys.readouterr().out)["tool"] == "0.12.0"


def test_it_is_asked_alone_and_each_question_once(
    tool: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own packages, no internet, the model's config in the lab's dtype; five arms of proposals and four
    of the lab are six questions: a chunk that holds the whole prompt makes no other one.
    """
    monkeypatch.setenv("PYTHONPATH", "/of/ours")
    assert propose(tool) == 0
    assert "replicated@aiconfigurator-step" in capsys.readouterr().out
    version, search, *estimates = starts(tool)
    assert version[0] == ["version"]
    assert search[0][:2] == ["cli", "default"]
    assert [one[0][1] for one in estimates] == ["estimate"] * 6
    assert {json.dumps(one[1:]) for one in [search, *estimates]} == {
        json.dumps([{"HF_HUB_OFFLINE": "1", "PYTHONPATH": None}, "bfloat16", False])
    }


def test_the_record_has_two_servers_together(tool: Path, tmp_path: Path, capsys: Capture) -> None:
    """7.275 requests/s x 128 tokens a server: 931.2 of one, 1,862.4 of two; the lab file is read."""
    assert propose(tool, "--out", str(tmp_path / "out")) == 0
    record = json.loads((tmp_path / "out" / "aiconfigurator.json").read_text())
    single, replicated = (record["forecasts"][arm] for arm in ("single", "replicated"))
    assert single["output_tokens_per_s"] == pytest.approx(931.2)
    assert replicated["output_tokens_per_s"] == pytest.approx(1862.4)
    lab = load_lab(str(tmp_path / "out" / "aiconfigurator.toml"))
    assert len(lab.ways) == 5
    assert capsys.readouterr().err == ""


def test_a_system_without_times_is_refused_in_one_line(tool: Path, capsys: Capture) -> None:
    """What it says, and a mend; nothing on stdout."""
    assert propose(tool, system="gb10") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "Backend vllm is not supported for system gb10" in err
    assert "mend: name a --system" in err


def test_a_lab_of_cpus_is_refused_before_it_is_asked(tool: Path, capsys: Capture) -> None:
    """It is not started at all."""
    assert propose(tool, lab="embedded") == 2
    assert "NVIDIA GPUs only" in capsys.readouterr().err
    assert not (tool / "log").exists()


def test_a_missing_tool_is_told_how_to_get_it(tmp_path: Path, capsys: Capture) -> None:
    """With a command that makes an environment of its own."""
    assert propose(tmp_path) == 2
    assert "pip install aiconfigurator==0.12.0" in capsys.readouterr().err


def session(folder: Path, arms: dict[str, Sequence[float]]) -> None:
    """A run folder with tokens/s, TTFT and TPOT of arms on chat."""
    folder.mkdir()
    meta = {"lab": "two-h200", "model": "m", "fingerprint": {"key": "k"}, "run": folder.name}
    (folder / "run.json").write_text(json.dumps(meta))
    of = {"workload": "chat", "definition": load_lab("two-h200").workload("chat").definition, "unit": "u"}
    names = (("output_tokens_per_s", "higher"), ("ttft_p50", "lower"), ("tpot_p50", "lower"))
    rows = [
        {**of, "arm": arm, "metric": name, "better": better, "values": [value]}
        for arm, values in arms.items()
        for (name, better), value in zip(names, values, strict=True)
    ]
    (folder / "figures.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_stored_forecast_is_scored(tool: Path, tmp_path: Path, capsys: Capture) -> None:
    """931.2 / 1,862.4 - 1 = -50 %; two servers, forecast to have more tokens/s, had fewer."""
    propose(tool, "--out", str(tmp_path / "out"))
    run_folder = tmp_path / "20261128-120000-abcd"
    session(run_folder, {"single": (1862.4, 0.095059, 0.00791), "replicated": (931.2, 0.190118, 0.003955)})
    capsys.readouterr()
    record = str(tmp_path / "out" / "aiconfigurator.json")
    assert main(["score", record, str(run_folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[-1].strip() for line in lines[1:3]] == ["+0.0 %", "+100.0 %"]
    assert "-50.0 %" in lines[1]
    assert lines[3] == "best output_tokens_per_s: single, forecast was replicated"
    assert main(["score", record, str(run_folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["errors"]["replicated"]["ttft_p50"] == pytest.approx(-0.5)
    assert found["winners"]["output_tokens_per_s"] == ["replicated", "single"]


def test_a_folder_without_figures_is_refused(tool: Path, tmp_path: Path, capsys: Capture) -> None:
    """No session, no score."""
    propose(tool, "--out", str(tmp_path / "out"))
    capsys.readouterr()
    assert main(["score", str(tmp_path / "out" / "aiconfigurator.json"), str(tmp_path / "out")]) == 2
    assert "no figures of a session" in capsys.readouterr().err
