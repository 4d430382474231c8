"""The sections of a lab file as frozen models.

docs/generate.py makes docs/reference/lab-file.md from them: docstrings, and the descriptions of fields.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, Field

from disagglab.address import checked
from disagglab.config.head import Section
from disagglab.config.inherit import file_of
from disagglab.config.price import PriceSection
from disagglab.config.search_space import TuningSection
from disagglab.config.way_section import WaySection
from disagglab.config.workload import NOT_FOR_FILES, Workload, load_workload
from disagglab.errors import ConfigError, Problem
from disagglab.stats.metric import GATED, of_stream
from disagglab.units import Gib, Microseconds, Seconds, Tokens, Unit, WholeSeconds
from disagglab.variables import DELAY_VARIABLE, TRACE_VARIABLE

Address = Annotated[str, AfterValidator(checked)]
SshAddress = Annotated[str, AfterValidator(lambda text: checked(text, scoped=True))]
GPU_BLOCK_SIZE, CPU_BLOCK_SIZE = 16, 128  # tokens (CacheConfig.DEFAULT_BLOCK_SIZE, vllm/platforms/cpu.py)

if TYPE_CHECKING:
    GatedMetric = str
else:  # the names, so that a refusal and docs/reference/lab-file.md list them
    GatedMetric = Literal[GATED]


class ModelSection(Section):
    """What the servers load."""

    id: str = Field(
        min_length=1, description="folder, Hugging Face id, or package:NAME for a model a package ships"
    )
    revision: str | None = Field(None, description="Hugging Face revision; absent: main")
    dtype: Literal["bfloat16", "float16", "float32"] = Field(
        "bfloat16", description="dtype of weights, and of the KV cache unless [vllm.args] has kv-cache-dtype"
    )
    max_model_len: Tokens = Field(ge=256, description="longest prompt plus output")
    tokenizer: str | None = Field(
        None, min_length=1, description="whose tokenizer is used, named as id is; absent: the model's own"
    )
    load_format: Literal["auto", "dummy"] = Field(
        "auto", description="dummy: random weights; speed and bytes are real, the text means nothing"
    )


class VllmSection(Section):
    """How `vllm serve` is started."""

    version: str = Field(
        pattern=r"^\d+\.\d+\.\d+$",
        description="the vLLM it is for; decides the block rule; servers must say it",
    )
    environments: dict[str, str] = Field(
        default={}, description="Python, or environment folder, by vLLM version, for --vllm and --against"
    )
    args: dict[str, str | int | float | bool] = Field(
        default={}, description="further options, without --; true is --key, false is --no-key"
    )
    env: dict[str, str] = Field(default={}, description="further environment of every server")
    stall_s: Seconds = Field(
        180, ge=10, description="a start without log output or CPU use for so long has failed"
    )
    start_limit_s: Seconds = Field(900, ge=30, description="a start that takes longer has failed")


class NodeSection(Section):
    """One server: where it runs and what it does when serving is disaggregated."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$", description="short name, used in reports and logs")
    host: str = Field("local", description="local, this machine, or the name of a [[host]]")
    address: Address = Field(description="address that its server listens on (HTTP)")
    data_address: Address | None = Field(
        None, description="of its data network, for KV transfers and their side channel; absent: address"
    )
    interface: str | None = Field(
        None, description="interface of its data network: UCX_NET_DEVICES, and the counters of the wire"
    )
    role: Literal["prefill", "decode"] = Field(description="its part in disaggregated serving")
    cpus: list[int] = Field(default=[], description="cores that the server is bound to")
    share_cpus: bool = Field(
        False, description="its cores may be another such node's too; then only the path counts, no figure"
    )
    gpus: list[int] = Field(default=[], description="GPUs that the server sees (CUDA_VISIBLE_DEVICES)")
    share_gpus: bool = Field(False, description="the same for its GPUs")
    rdma: list[str] = Field(
        default=[], description="RDMA devices of its data network (mlx5_0 …); their counters are the wire's"
    )
    env: dict[str, str] = Field(default={}, description="of this server alone; wins over [vllm.env]")
    args: dict[str, str | int | float | bool] = Field(
        default={},
        description="options of this server alone, from the role of a [[way]]; not for files",
        json_schema_extra=NOT_FOR_FILES,
    )

    @property
    def kv_address(self) -> str:
        """Where other nodes fetch KV blocks from it."""
        return self.data_address or self.address


class HostSection(Section):
    """A host that is reached over SSH. What is absent comes from ~/.ssh/config."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="what nodes, controller, jump call it; not local"
    )
    address: SshAddress | None = Field(
        None, description="host name or address of its SSH server; absent: HostName, else name"
    )
    port: int | None = Field(
        None, ge=1, le=65535, description="port of its SSH server; absent: Port, else 22"
    )
    user: str | None = Field(None, min_length=1, description="account; absent: User, else our own")
    key_file: str | None = Field(
        None, min_length=1, description="private key; absent: IdentityFile, the agent, ~/.ssh/id_*"
    )
    known_hosts: str | None = Field(
        None,
        min_length=1,
        description="file with its host key; absent: UserKnownHostsFile, else OpenSSH's two",
    )
    jump: str | None = Field(None, description="another [[host]], through which it is reached")
    python: str = Field("python3", min_length=1, description="Python 3.10 or later for the suite's own part")
    folder: str = Field(
        "disagg-lab", min_length=1, description="where provision puts the suite; relative: from the home"
    )
    environments: dict[str, str] = Field(
        default={}, description="Python, or environment folder, by vLLM version; absent: those in folder"
    )
    connect_s: Seconds = Field(15, gt=0, le=300, description="longest time to connect")
    heartbeat_s: Seconds = Field(
        20, ge=3, le=600, description="silence after which it ends everything of the run"
    )
    namespace: bool = Field(
        False, description="made on this machine for the session, in network namespaces (two hosts, root)"
    )
    cpus: list[int] = Field(default=[], description="cores of a made host")


class ControllerSection(Section):
    """Where routers and load generator run."""

    host: str = Field("local", description="local, or the name of a [[host]]")
    address: Address = Field(
        "127.0.0.1", description="that routers listen on; on a [[host]] one that this machine reaches"
    )
    cpus: list[int] = Field(default=[], description="cores of routers and load generator; empty: any")


class TransportSection(Section):
    """How NixlConnector moves KV blocks."""

    kv_buffer_device: Literal["cpu", "cuda"] = Field(
        description="memory that transfers read from and write to"
    )
    ucx_tls: list[str] = Field(default=[], description="UCX_TLS; empty leaves the choice to UCX")
    env: dict[str, str] = Field(default={}, description="further UCX_* and NIXL_* variables")
    lease_s: WholeSeconds = Field(30, ge=6, description="how long prefill keeps unclaimed blocks")
    load_failure_policy: Literal["fail", "recompute"] = Field(
        "fail", description="recompute hides a broken link behind a slow success"
    )
    progress_delay_us: Microseconds = Field(
        0, ge=0, le=1_000_000, description="pause of NIXL's progress thread; 0: stock"
    )
    keep_node_cpus: bool = Field(
        False, description="keep the CPU connector on the node's own cores; false: stock"
    )
    link_gbit_s: Annotated[float, Unit("Gbit/s")] | None = Field(
        None, gt=0, description="nominal rate of the link, for predictions only"
    )
    connector: Literal["NixlConnector", "NixlPushConnector"] = Field(
        "NixlConnector", description="NixlConnector: decode reads; NixlPushConnector: prefill writes"
    )
    extra: dict[str, str | int | float | bool] = Field(
        default={}, description="further keys of kv_connector_extra_config, such as num_threads"
    )
    trace: bool = Field(False, description="log when each transfer was posted, looked at and found done")

    @property
    def variables(self) -> dict[str, str]:
        """The environment that decides how NIXL and UCX move data."""
        tls = {"UCX_TLS": ",".join(self.ucx_tls)} if self.ucx_tls else {}
        return {**tls, **self.env}


class RouterSection(Section):
    """The router, vllm-router."""

    version: str = Field(
        "0.1.17", pattern=r"^\d+\.\d+\.\d+$", description="its version, checked by module environment"
    )
    policy: Literal["round_robin"] = Field("round_robin", description="routing between equal workers")


class PortsSection(Section):
    """The range that every TCP port of a run is taken from, on every host."""

    first: int = Field(ge=1024, le=65535, description="first port")
    last: int = Field(ge=1024, le=65535, description="last port, included")


class MemorySection(Section):
    """When not to start."""

    floor_gib: Gib = Field(ge=0, description="MemAvailable needed for each server of a host to start")
    stop_gib: Gib = Field(0.5, ge=0, description="MemAvailable below which a server is killed; 0: never")
    kv_beside_gib: Gib | None = Field(
        None, gt=0, description="KV cache of each server beside those of ways; needed on GPUs"
    )


class ScaleSection(Section):
    """What the full-size figures of the workloads are multiplied by on this lab."""

    prompt: float = Field(
        1, gt=0, description="factor of prompt lengths, steady ones too; a shared prefix: to a multiple of 64"
    )
    output: float = Field(1, gt=0, description="factor of answer lengths, without steady ones")
    requests: float = Field(1, gt=0, description="factor of requests, steady ones too, and of concurrency")
    rate: float = Field(1, gt=0, description="factor of arrival rates")
    steady: float = Field(1, gt=0, description="factor of the answer lengths of steady requests")


class SloSection(Section):
    """The service level objective: a request is good if it meets both limits."""

    ttft_s: Seconds = Field(gt=0, description="longest time to first token")
    tpot_s: Seconds = Field(gt=0, description="longest time per output token")


class SpeedSection(Section):
    """Nominal figures of one node, all of its GPUs together, for predictions only."""

    peak_tflop_s: Annotated[float, Unit("TFLOP/s")] = Field(
        gt=0, description="dense arithmetic, without sparsity, in the dtype of [model], of one node"
    )
    memory_gb_s: Annotated[float, Unit("GB/s")] = Field(gt=0, description="memory bandwidth, 1e9 B/s")


class GateSection(Section):
    """A verdict that this lab asks for: an arm, the candidate, against another, against the best of all other
    ways, or against a limit.
    """

    metric: GatedMetric = Field(description="run-level figure that is compared")
    stream: Literal["", "main", "steady"] = Field(
        "", description="whose requests, in a workload with steady ones; empty: all"
    )
    workload: str = Field(description="name of a file in workloads/")
    candidate: str = Field(
        "disaggregated",
        description="the arm that is judged: single, replicated, disaggregated or a [[way]]'s",
    )
    baseline: str | None = Field(
        None,
        description='the arm that the candidate is compared with; or "best": the best of all arms of other'
        " kinds in the session",
    )
    limit: float | None = Field(
        None, gt=0, description="in place of a baseline: a value that is compared with"
    )
    want: Literal["better", "not worse"] = Field(description="what the interval must show")
    margin: float = Field(gt=0, lt=1, description="differences below this share count as equivalent")
    enforce: bool = Field(True, description="false: shown, never a failure")

    @property
    def figure(self) -> str:
        """The figure as reports name it."""
        return of_stream(self.metric, self.stream)


class Lab(Section):
    """A whole lab file, and what it extends. ``origins``: the file of each key that stands in another."""

    name: str
    label: str
    file: str
    origins: dict[str, str] = Field(default={}, exclude=True, repr=False)
    model: ModelSection
    vllm: VllmSection
    nodes: tuple[NodeSection, ...]
    controller: ControllerSection
    transport: TransportSection
    router: RouterSection
    ports: PortsSection
    memory: MemorySection
    scale: ScaleSection = ScaleSection()
    slo: SloSection | None = None
    speed: SpeedSection | None = None
    tuning: TuningSection | None = None
    price: PriceSection | None = None
    gates: tuple[GateSection, ...]
    hosts: tuple[HostSection, ...] = ()
    ways: tuple[WaySection, ...] = ()

    def where(self, key: str) -> str:
        """The file in which a key stands, such as ``node[1].cpus``."""
        return file_of(key, self.origins, self.file)

    @property
    def prefill(self) -> tuple[NodeSection, ...]:
        """The nodes that prefill when serving is disaggregated."""
        return tuple(node for node in self.nodes if node.role == "prefill")

    @property
    def decode(self) -> tuple[NodeSection, ...]:
        """The nodes that decode when serving is disaggregated."""
        return tuple(node for node in self.nodes if node.role == "decode")

    @property
    def shared(self) -> str:
        """What servers share, ``cores`` or ``GPUs``: they measure each other, so that no figure of this lab
        means anything. Empty where each has its own.
        """
        kinds = {"cores": "share_cpus", "GPUs": "share_gpus"}
        found = (kind for kind, key in kinds.items() if any(getattr(node, key) for node in self.nodes))
        return " and ".join(found)

    @property
    def ratio(self) -> str:
        """How many nodes prefill and how many decode, as in ``1P2D``."""
        return f"{len(self.prefill)}P{len(self.decode)}D"

    @property
    def block_size(self) -> int:
        """Tokens per KV cache block that its servers will use, as vLLM chooses; they report the real one."""
        by_platform = GPU_BLOCK_SIZE if any(node.gpus for node in self.nodes) else CPU_BLOCK_SIZE
        return int(self.vllm.args.get("block-size", by_platform))

    def workload(self, name: str) -> Workload:
        """A file of workloads/, scaled to this lab.

        Raises:
            ConfigError: with every problem of the file; if its longest request does not fit max_model_len.
        """
        found = load_workload(name).scaled(**self.scale.model_dump())
        if found.tokens > self.model.max_model_len:
            wrong = f"{name} takes {found.tokens} tokens here, max_model_len is {self.model.max_model_len}"
            mend = "lower prompt, output or steady"
            raise ConfigError([Problem(self.where("scale"), "scale", wrong, mend)])
        return found

    @property
    def gated_workloads(self) -> list[Workload]:
        """What the gates are about, each workload once, scaled to this lab.

        Raises:
            ConfigError: see :meth:`workload`.
        """
        return [self.workload(name) for name in dict.fromkeys(gate.workload for gate in self.gates)]

    def transfer_variables(self, node: NodeSection) -> dict[str, str]:
        """The environment that decides how NIXL and UCX move data to and from a node."""
        device = {"UCX_NET_DEVICES": node.interface} if node.interface else {}
        delay_us = self.transport.progress_delay_us
        delay = {DELAY_VARIABLE: str(delay_us)} if delay_us else {}
        trace = {TRACE_VARIABLE: "1"} if self.transport.trace else {}
        return {**device, **delay, **trace, **self.transport.variables}

    @property
    def kv_dtype(self) -> str:
        """dtype of the KV cache: vLLM's own option where the lab file gives it, else the model's."""
        asked = str(self.vllm.args.get("kv-cache-dtype", "auto"))
        return self.model.dtype if asked == "auto" else asked

    @property
    def host_names(self) -> tuple[str, ...]:
        """Every host that takes part: the controller's first, then the nodes' in their order."""
        return tuple(dict.fromkeys([self.controller.host, *(node.host for node in self.nodes)]))

    @property
    def host_names_of_nodes(self) -> tuple[str, ...]:
        """Every host that has a node, in the order of the nodes."""
        return tuple(dict.fromkeys(node.host for node in self.nodes))

    @property
    def shares_our_files(self) -> bool:
        """Whether every node runs on this machine, so that its environment is seen before the start."""
        made = {"local", *(host.name for host in self.hosts if host.namespace)}
        return all(node.host in made for node in self.nodes)

    def nodes_on(self, host: str) -> tuple[NodeSection, ...]:
        """The nodes of a host."""
        return tuple(node for node in self.nodes if node.host == host)
