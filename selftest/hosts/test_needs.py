"""What a lab needs of a machine. Oracle: machines written here, each short of one thing."""

from __future__ import annotations

import dataclasses

import psutil
import pytest

from disagglab.config.labs import load_lab
from disagglab.hosts import needs, release
from disagglab.hosts.needs import GIB, Machine

RICH = Machine(cores=64, gpus=8, available_gib=512.0, root=True, lacks=())


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every environment and model is here, unless a test says otherwise."""
    monkeypatch.setattr(needs, "_environment_lacks", lambda _: [])
    monkeypatch.setattr(needs, "_model_lacks", lambda _: [])


SHORT = {
    "no GPU": ("two-h200", {"gpus": 0}, "needs 2 GPUs, none here"),
    "a GPU too few": ("two-h200", {"gpus": 1}, "needs 2 GPUs, 1 here"),
    "cores": ("embedded", {"cores": 1}, "needs core 1, and here the last is 0"),
    "memory": ("embedded", {"available_gib": 5.9}, "needs 6 GiB available, 5.9 here"),
    "root": ("two-hosts", {"root": False}, "needs root, to make its hosts"),
    "a program": ("two-hosts", {"lacks": ("iproute2",)}, "needs iproute2: apt-get install iproute2"),
}


@pytest.mark.parametrize("case", SHORT)
def test_what_is_short_is_the_reason(case: str) -> None:
    """One reason for one thing; with all of it, the lab is here."""
    name, change, reason = SHORT[case]
    lab = load_lab(name)
    assert needs.standing(lab, RICH).here is True
    found = needs.standing(lab, dataclasses.replace(RICH, **change))  # type: ignore[arg-type]
    assert (found.here, found.lacking) == (False, (reason,))


def test_a_gpu_by_its_number() -> None:
    """Two GPUs are enough in number and not those that the lab names."""
    lab = load_lab("two-h200")
    nodes = (lab.nodes[0], lab.nodes[1].model_copy(update={"gpus": [3]}))
    found = needs.standing(lab.model_copy(update={"nodes": nodes}), dataclasses.replace(RICH, gpus=2))
    assert found.lacking == ("needs GPU 3, and here the last is 1",)


def test_hosts_over_ssh_need_nothing_here() -> None:
    """They are named and not looked at, so whether the lab runs is not known."""
    bare = Machine(cores=1, gpus=0, available_gib=0.1, root=False, lacks=("sshd",))
    found = needs.standing(load_lab("spark"), bare)
    assert (found.here, found.lacking) == (None, ())
    assert str(found.needs) == "SSH to spark-01 and spark-02, vLLM 0.31.0"


def test_made_hosts_are_on_this_machine() -> None:
    """Their cores and memory are this machine's."""
    found = needs.of(load_lab("two-hosts"))
    assert (found.cores, found.memory_gib, found.made_hosts) == ((0, 1), 6.0, ("alpha", "beta"))
    assert str(found) == "2 cores, 6 GiB, root to make 2 hosts, vLLM 0.31.0"


def test_an_environment_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A release that neither this environment nor another one here holds."""
    monkeypatch.undo()
    lab = load_lab("embedded")
    monkeypatch.setattr(release, "installed", lambda: "0.31.0")
    assert list(needs._environment_lacks(lab)) == []
    monkeypatch.setattr(release, "installed", lambda: "0.1.2")
    assert list(needs._environment_lacks(lab)) == ["no environment of vLLM 0.31.0: make setup VLLM=0.31.0"]


def test_a_model_is_looked_for_and_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """By package, folder or cache; nothing is converted."""
    monkeypatch.undo()
    monkeypatch.setattr(needs.weights, "_convert", lambda *_: pytest.fail("a model was made"))
    lab = load_lab("embedded")
    for model in ("package:no-such-package-here", "./no/such/folder", "nobody/No-Such-Model"):
        other = lab.model_copy(update={"model": lab.model.model_copy(update={"id": model})})
        assert list(needs._model_lacks(other)) == [f"model {model} is not here"]
    assert list(needs._model_lacks(load_lab("latent"))) == []


def test_this_machine_is_asked() -> None:
    """Its cores and its memory, by another way."""
    found = Machine.here()
    assert found.cores == psutil.cpu_count()
    assert 0 < found.available_gib <= psutil.virtual_memory().total / GIB
