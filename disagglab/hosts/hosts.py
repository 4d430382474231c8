"""The hosts of a lab: connected, cleared of what earlier sessions left, and cleared again at the end."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

from disagglab import waiting
from disagglab.agent import leftovers
from disagglab.config.labs import with_release
from disagglab.config.schema import HostSection, Lab, NodeSection
from disagglab.errors import ConfigError, Problem, StartError
from disagglab.hosts import facts, namespaces, preflight, release
from disagglab.hosts.host import Host, HostProcess, local_host
from disagglab.hosts.remote import RemoteHost
from disagglab.hosts.ssh import Connection, target
from disagglab.hosts.weights import Model
from disagglab.paths import ROOT

MODEL_LIMIT_S = 900.0  # a packaged model is converted once
MEMORY_DEADLINE_S = 30.0  # for the kernel to take back what killed servers held
MEMORY_SLACK = 0.1  # of what was available before, and at least
MEMORY_SLACK_BYTES = 2**30
POLL_S = 0.2


class Hosts:
    """The hosts that take part in a session, by name.

    Args:
        run_id: the run that everything started belongs to.
        logs: folder on this machine for every log.
    """

    def __init__(self, run_id: str, lab: Lab, logs: Path) -> None:
        self.lab = lab
        self._run_id = run_id
        self._logs = logs
        self._ports = (lab.ports.first, lab.ports.last)
        self._stack = contextlib.ExitStack()
        self._hosts: dict[str, Host] = {}
        self._connections: dict[str, Connection] = {}
        self._holders: list[str] = []
        self.sections: dict[str, HostSection] = {host.name: host for host in lab.hosts}
        self.reaped: list[dict[str, object]] = []
        self._models: dict[str, Model] = {}
        self.router_ports: list[tuple[int, int]] = []  # HTTP and metrics, of routers that have ended

    def open(self) -> Hosts:
        """Connect to every host that takes part; end what earlier sessions left there.

        Raises:
            StartError: if a host cannot be reached or made, or runs another session.
            ConfigError: if the lab file gives nodes cores that their hosts lack.
        """
        self._stack.enter_context(self._alone())
        self.local = self._here()
        self._hosts["local"] = self.local
        self._reap(self.local)
        made = [host for host in self.lab.hosts if host.namespace]
        if made:
            self._refuse(preflight.missing_cores_to_make_hosts(self.lab, self.local.about["cores"]))
            nodes = {host.name: self.lab.nodes_on(host.name)[0] for host in made}
            found, self._holders = self._make(made, nodes)
            self.sections.update(found)
        for name in self.lab.host_names:
            if name != "local":
                self._hosts[name] = self._connect(name)
                self._reap(self._hosts[name])
        cores = {name: host.about["cores"] for name, host in self._hosts.items()}
        self._refuse(preflight.missing_cores(self.lab, cores))
        return self

    def _refuse(self, problems: Iterable[Problem]) -> None:
        """Refuse to go on where hosts lack what the lab file asks of them.

        Raises:
            ConfigError: with every problem.
        """
        if found := list(problems):
            raise ConfigError(found)

    def _alone(self) -> contextlib.AbstractContextManager[object]:
        """What keeps a second session off this machine."""
        return leftovers.exclusive()

    def _here(self) -> Host:
        """This machine."""
        return local_host(self._run_id, self._ports, self._logs, sys.executable)

    def _make(
        self, made: Sequence[HostSection], nodes: Mapping[str, NodeSection]
    ) -> tuple[dict[str, HostSection], list[str]]:
        """Make the hosts that are made here; see :func:`namespaces.make`."""
        namespaces.require_programs()
        return namespaces.make(self.local, made, nodes)

    def _reap(self, host: Host) -> None:
        self.reaped += [{"host": host.name, **row} for row in host.reap()]

    def _connection(self, name: str) -> Connection:
        """A connection to a host, made when first asked for, through its jump hosts."""
        if name not in self._connections:
            section = self.sections[name]
            through = self._connection(section.jump) if section.jump else None
            self._connections[name] = Connection(target(section), through)
        return self._connections[name]

    def _connect(self, name: str) -> RemoteHost:
        section = self.sections[name]
        return self._sharing(
            RemoteHost(section, self._connection(name), self._run_id, self._ports, self._logs)
        )

    @staticmethod
    def _sharing(host: RemoteHost) -> RemoteHost:
        """A host; one that was made here has our files."""
        if host.section.namespace:
            host.folder, host.suite_python = str(ROOT), sys.executable
        return host

    @property
    def all(self) -> tuple[Host, ...]:
        """Every host that takes part, the controller's first."""
        return tuple(self._hosts[name] for name in self.lab.host_names)

    @property
    def controller(self) -> Host:
        """Where routers and the load engine run."""
        return self._hosts[self.lab.controller.host]

    def died(self) -> list[HostProcess]:
        """Processes of this session that ended though nobody here asked them to, the first to end first."""
        found = [process for host in self._hosts.values() for process in host.started if process.has_died()]
        return sorted(found, key=lambda process: float((process.ended or {}).get("ended_s", 0.0)))

    def of(self, node: NodeSection) -> Host:
        """The host of a node."""
        return self._hosts[node.host]

    def python_of(self, node: NodeSection, version: str) -> str:
        """The Python that serves vLLM ``version`` on a node; whether it does is seen when it is asked."""
        host = self.of(node)
        if not isinstance(host, RemoteHost) or host.section.namespace:
            return release.python_of(with_release(self.lab, version))
        return str(PurePosixPath(host.about["home"]) / release.python_there(host.section, version))

    def require_environments(self) -> None:
        """Refuse a remote node whose environment does not hold the lab's vLLM.

        Raises:
            StartError: with what is there instead, and the command that makes it.
        """
        version = self.lab.vllm.version
        for node in self.lab.nodes:
            python = self.python_of(node, version)
            answer = self.of(node).facts.run("%s -c %s", python, release.ASK)
            found = release.number(answer.stdout.strip()) if answer.rc == 0 else ""
            if found != version:
                holds = f"vLLM {found}" if found else "no vLLM"
                mend = f"python -m disagglab provision --lab {self.lab.file} --vllm {version}"
                raise StartError(
                    f"{node.name}: {python} on {node.host} holds {holds}, not {version}; make it: {mend}"
                )

    def survey(self) -> dict[str, dict[str, str]]:
        """Refuse wrong environments, then read the facts of every host and its nodes, by title.

        Raises:
            StartError: see :meth:`require_environments`.
        """
        self.require_environments()
        found: dict[str, dict[str, str]] = {}
        for host in self.all:
            nodes = self.lab.nodes_on(host.name)
            python = self.python_of(nodes[0], self.lab.vllm.version) if nodes else host.suite_python
            found.update(facts.collect(host.facts, host.name, nodes, python))
        return found

    def model_on(self, node: NodeSection, model: Model, python: str) -> Model:
        """The lab's model as it lies on a node's host, found there by ``python``.

        Raises:
            LabError: if it is not there; the message has the folder and the command that fetches it.
        """
        host = self.of(node)
        named = isinstance(host, RemoteHost) and host.section.environments
        return self._model(host, model, python if named else host.suite_python)

    def on_controller(self, model: Model) -> Model:
        """The lab's model as it lies on the controller's host; its tokenizer is enough there."""
        return self._model(self.controller, model, self.controller.suite_python)

    def _model(self, host: Host, model: Model, python: str) -> Model:
        if not isinstance(host, RemoteHost) or host.section.namespace:
            return model
        if host.name not in self._models:
            argv = [python, "-m", "disagglab.hosts.weights", self.lab.model.model_dump_json(), self.lab.file]
            lines = host.run(f"model-{host.name}", argv, {"HF_HUB_OFFLINE": "1"}, MODEL_LIMIT_S)
            found = json.loads(next(line for line in lines if line.startswith("{")))
            tokenizer = found["other_tokenizer"]
            self._models[host.name] = dataclasses.replace(
                model,
                folder=Path(found["folder"]),
                other_tokenizer=Path(tokenizer) if tokenizer else None,
            )
        return self._models[host.name]

    def close(self) -> None:
        """End everything of this run on every host; prove that nothing is left, and that memory came back.

        Raises:
            StartError: the first of the problems.
        """
        errors: list[StartError] = []

        @contextlib.contextmanager
        def kept() -> Iterator[None]:
            try:
                yield
            except StartError as error:  # the other hosts must be cleared too
                errors.append(error)

        remote = [host for host in self._hosts.values() if isinstance(host, RemoteHost)]
        for host in remote:
            with contextlib.suppress(StartError):  # said again by the call below
                host.call("ask_all_to_stop")
        for host in remote:
            with kept():
                host.close()
        for host in remote:  # made hosts share their memory
            if not host.line.lost:
                with kept():
                    require_memory_back(host)
            host.disconnect()
        for connection in reversed(self._connections.values()):
            connection.close()
        if "local" in self._hosts:
            with kept():
                self.local.call("close", self._holders)
        self._stack.close()
        self._hosts.clear()
        if errors:
            raise errors[0]


def require_memory_back(host: Host) -> None:
    """Wait until a host has about as much memory available as before the session.

    Raises:
        StartError: with both figures.
    """
    before = int(host.about["memory_available"])
    wanted = before - max(MEMORY_SLACK * before, MEMORY_SLACK_BYTES)
    now = 0

    def back() -> bool:
        nonlocal now
        now = host.memory_available()
        return now >= wanted

    waiting.until(
        back,
        MEMORY_DEADLINE_S,
        lambda: StartError(
            f"{host.name}: {now / 2**30:.1f} GiB available after the session,"
            f" {before / 2**30:.1f} before;"
            " see what took it: ps aux --sort -rss"
        ),
        POLL_S,
    )
