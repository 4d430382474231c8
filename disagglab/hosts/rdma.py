"""RDMA devices of a host: ports, GID tables and PCIe links.

From the kernel's own files; no RDMA tool is needed. Readers take a testinfra host and run
one command each; what it printed is parsed by pure functions.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SYSFS = "/sys/class/infiniband"
ROCE_V2 = "RoCE v2"  # text of gid_attrs/types (Documentation/ABI/stable/sysfs-class-infiniband)
RAW_LINES = 20  # of a tool's output about one device: all that ibstat prints, and the port of ibv_devinfo

# Shell built-ins alone: a GID table has up to 256 rows, and most of them cannot be read.
READ_PROGRAM = r"""
take() {
    v=
    { IFS= read -r v < "$2"; } 2>/dev/null
    [ -z "$v" ] || printf '%s=%s\n' "$1" "$v"
}
for d in "$1"/*; do
    [ -d "$d/ports/1" ] || continue
    printf 'device=%s\n' "${d##*/}"
    for key in fw_ver sys_image_guid; do take "$key" "$d/$key"; done
    for key in state phys_state rate link_layer; do take "$key" "$d/ports/1/$key"; done
    pcie=$(cd -P "$d/device" 2>/dev/null && pwd) && printf 'pcie=%s\n' "${pcie##*/}"
    for key in current_link_speed current_link_width max_link_speed max_link_width numa_node; do
        take "$key" "$d/device/$key"
    done
    for n in "$d"/device/net/*; do
        take "mtu.${n##*/}" "$n/mtu"
        take "port_name.${n##*/}" "$n/phys_port_name"
    done
    for g in "$d"/ports/1/gids/*; do
        row=${g##*/}
        take "type.$row" "$d/ports/1/gid_attrs/types/$row"
        [ -z "$v" ] || { take "gid.$row" "$g"; take "ndev.$row" "$d/ports/1/gid_attrs/ndevs/$row"; }
    done
done
"""

TOOLS_PROGRAM = r"""
PATH=$PATH:/usr/sbin:/sbin
for device; do
    command -v ibstat >/dev/null && { printf 'tool=ibstat %s\n' "$device"; ibstat "$device" 2>&1; }
    command -v ibv_devinfo >/dev/null &&
        { printf 'tool=ibv_devinfo -d %s\n' "$device"; ibv_devinfo -d "$device" 2>&1; }
done
:
"""

# PCIe: bits of data in the bits on the wire, by signalling rate in GT/s (PCI Express Base Specification).
# Generation 6 packs fixed flits instead and is not computed.
PCIE_ENCODING = {2.5: 8 / 10, 5.0: 8 / 10, 8.0: 128 / 130, 16.0: 128 / 130, 32.0: 128 / 130}
PCIE_WIDTHS = (1, 2, 4, 8, 12, 16, 32)  # the kernel writes 0, 63 or 255 where it does not know

# Headers of a RoCE packet at most, bytes, as the kernel counts them (iboe_get_mtu in include/rdma/ib_addr.h):
# GRH, UDP, BTH, XRC, atomic, ICRC.
ROCE_HEADERS = 40 + 8 + 12 + 4 + 28 + 4
ROCE_MTUS = (4096, 2048, 1024, 512, 256)  # bytes; an RDMA packet's data has one of these sizes


@dataclass(frozen=True)
class Gid:
    """One row of a port's GID table: an address by which RDMA peers reach it."""

    index: int
    text: str
    type: str
    netdev: str

    @property
    def address(self) -> str:
        """The IP address that it stands for."""
        found = ipaddress.IPv6Address(self.text)
        return str(found.ipv4_mapped or found)

    def __str__(self) -> str:
        return f"index {self.index} {self.address} ({self.type}, {self.netdev or 'no interface'})"


@dataclass(frozen=True)
class Netdev:
    """The network interface of a device. ``mtu``: bytes. ``port_name``: the driver's name of the socket."""

    name: str
    mtu: int
    port_name: str = ""


@dataclass(frozen=True)
class PcieLink:
    """How a device is attached; None where the kernel does not know. Speeds in GT/s, widths in lanes."""

    address: str = ""
    speed_gt_s: float | None = None
    width: int | None = None
    max_speed_gt_s: float | None = None
    max_width: int | None = None
    numa_node: int | None = None

    @property
    def gbit_s(self) -> float | None:
        """What the lanes carry, Gbit/s, before the headers of PCIe packets."""
        return pcie_gbit_s(self.speed_gt_s, self.width)

    def __str__(self) -> str:
        if self.gbit_s is None:
            return f"{self.address or 'no PCIe address'}, speed not known"
        able = (
            f" (able to do {self.max_speed_gt_s:g} GT/s x{self.max_width})"
            if self.max_width and self.max_speed_gt_s
            else ""
        )
        return f"{self.address}, {self.speed_gt_s:g} GT/s x{self.width} = {self.gbit_s:.1f} Gbit/s{able}"


@dataclass(frozen=True)
class Device:
    """An RDMA device with its first port, as sysfs shows it. ``card``: the same for all devices of a card."""

    name: str
    card: str
    firmware: str
    state: str
    phys_state: str
    rate: str
    link_layer: str
    pcie: PcieLink
    netdevs: tuple[Netdev, ...]
    gids: tuple[Gid, ...]

    @property
    def active(self) -> bool:
        """Whether its port carries data."""
        return self.state == "ACTIVE"

    @property
    def rate_gbit_s(self) -> float:
        """Rate of the cable, Gbit/s; of a port that is down it says what was never agreed on, hence 0."""
        found = re.match(r"[\d.]+", self.rate)
        return float(found[0]) if found and self.active else 0.0

    @property
    def is_roce(self) -> bool:
        """Whether it is RDMA over Ethernet."""
        return self.link_layer == "Ethernet"

    @property
    def port_name(self) -> str:
        """Where its cable is plugged in: p0, p1 … as the driver says, else its PCIe function."""
        named = [netdev.port_name for netdev in self.netdevs if netdev.port_name]
        return named[0] if named else self.pcie.address.rpartition(".")[2] or self.name

    def __str__(self) -> str:
        return f"{self.name} {self.state or 'no state'}/{self.phys_state or 'no physical state'}"


@dataclass(frozen=True)
class Port:
    """A socket with its cable, and the devices that share it: two where a card has two PCIe halves."""

    card: str
    name: str
    halves: tuple[Device, ...]

    @property
    def active(self) -> bool:
        """Whether all halves carry data."""
        return all(half.active for half in self.halves)

    @property
    def rate_gbit_s(self) -> float:
        """Rate of the one cable, Gbit/s: each half reports the whole of it, so it is not summed."""
        return max(half.rate_gbit_s for half in self.halves)

    @property
    def pcie_gbit_s(self) -> float | None:
        """What the PCIe links of its active halves carry together, Gbit/s; None if one is not known."""
        links = [half.pcie.gbit_s for half in self.halves if half.active]
        known = [link for link in links if link is not None]
        return sum(known) if len(known) == len(links) else None

    @property
    def ceiling_gbit_s(self) -> float:
        """The least of cable and PCIe, Gbit/s, before any protocol's headers."""
        return min(self.rate_gbit_s, self.pcie_gbit_s if self.pcie_gbit_s is not None else self.rate_gbit_s)

    def __str__(self) -> str:
        active = sum(half.active for half in self.halves)
        pcie = "not known" if self.pcie_gbit_s is None else f"{self.pcie_gbit_s:.1f} Gbit/s"
        return (
            f"{active} of {len(self.halves)} halves active ({', '.join(half.name for half in self.halves)}),"
            f" cable {self.rate_gbit_s:g} Gbit/s, PCIe {pcie}, so {self.ceiling_gbit_s:.1f} Gbit/s at most"
        )


def pcie_gbit_s(speed_gt_s: float | None, width: int | None) -> float | None:
    """Data rate of a PCIe link, Gbit/s; None where speed or width is not known or not computed."""
    if speed_gt_s not in PCIE_ENCODING or width is None:
        return None
    assert speed_gt_s is not None
    return speed_gt_s * width * PCIE_ENCODING[speed_gt_s]


def roce_mtu(mtu: int) -> int:
    """Data of an RDMA packet on an Ethernet interface of this MTU, as the kernel chooses it; bytes."""
    return next((size for size in ROCE_MTUS if size <= mtu - ROCE_HEADERS), 0)


def parse_devices(text: str) -> dict[str, Device]:
    """What :data:`READ_PROGRAM` printed, by device name."""
    blocks: list[dict[str, str]] = []
    for line in text.splitlines():
        key, _, value = line.partition("=")
        if key == "device":
            blocks.append({})
        if blocks:
            blocks[-1][key] = value.strip()
    return {block["device"]: _device(block) for block in blocks}


def _device(block: Mapping[str, str]) -> Device:
    def rows(kind: str) -> dict[str, str]:
        return {key.partition(".")[2]: value for key, value in block.items() if key.startswith(f"{kind}.")}

    types, texts, ndevs, port_names = rows("type"), rows("gid"), rows("ndev"), rows("port_name")
    return Device(
        name=block["device"],
        card=block.get("sys_image_guid", ""),
        firmware=block.get("fw_ver", ""),
        state=_word(block.get("state", "")),
        phys_state=_word(block.get("phys_state", "")),
        rate=block.get("rate", ""),
        link_layer=block.get("link_layer", ""),
        pcie=PcieLink(
            address=block.get("pcie", ""),
            speed_gt_s=_speed(block.get("current_link_speed", "")),
            width=_width(block.get("current_link_width", "")),
            max_speed_gt_s=_speed(block.get("max_link_speed", "")),
            max_width=_width(block.get("max_link_width", "")),
            numa_node=_numa(block.get("numa_node", "")),
        ),
        netdevs=tuple(
            Netdev(name, int(mtu), port_names.get(name, "")) for name, mtu in sorted(rows("mtu").items())
        ),
        gids=tuple(
            Gid(int(row), texts[row], types[row], ndevs.get(row, ""))
            for row in sorted(types, key=int)
            if row in texts
        ),
    )


def _word(value: str) -> str:
    """``4: ACTIVE`` without its number."""
    return value.rpartition(":")[2].strip()


def _speed(value: str) -> float | None:
    """``32.0 GT/s PCIe`` as 32.0."""
    found = re.match(r"([\d.]+) GT/s", value)
    return float(found[1]) if found else None


def _width(value: str) -> int | None:
    return int(value) if value.isdigit() and int(value) in PCIE_WIDTHS else None


def _numa(value: str) -> int | None:
    """The NUMA node; the kernel writes -1 on a machine that has only one."""
    return int(value) if value.isdigit() else None


def named(found: Mapping[str, Device], names: Sequence[str]) -> tuple[Device, ...]:
    """The devices with these names, in this order.

    Raises:
        LookupError: naming those that are missing, and those that there are.
    """
    missing = [name for name in names if name not in found]
    if missing:
        there = ", ".join(sorted(found)) or "none"
        raise LookupError(f"no RDMA device {', '.join(missing)} with a port 1; there is: {there}")
    return tuple(found[name] for name in names)


def ports(devices: Iterable[Device]) -> tuple[Port, ...]:
    """The sockets of these devices: devices of one card and socket are the halves of one."""
    groups: dict[tuple[str, str], list[Device]] = {}
    for device in devices:
        # without the card's number nothing tells that two devices belong together
        key = (device.card, device.port_name) if device.card else ("", device.name)
        groups.setdefault(key, []).append(device)
    return tuple(
        Port(card, name, tuple(sorted(halves, key=lambda half: (half.pcie.address, half.name))))
        for (card, name), halves in groups.items()
    )


def ports_of(found: Mapping[str, Device], names: Sequence[str]) -> tuple[Port, ...]:
    """The sockets that the named devices belong to, with all of their halves, named or not.

    Raises:
        LookupError: see :func:`named`.
    """
    wanted = set(named(found, names))
    return tuple(port for port in ports(found.values()) if wanted & set(port.halves))


def roce_v2_gid(devices: Sequence[Device], address: str) -> tuple[Device, Gid]:
    """The RoCE v2 GID for an IP address, and its device. Its index is found, never assumed.

    Raises:
        LookupError: naming the GIDs that there are.
    """
    for device in devices:
        for gid in device.gids:
            if gid.type == ROCE_V2 and gid.address == address:
                return device, gid
    there = "; ".join(f"{device.name}: {', '.join(map(str, device.gids)) or 'none'}" for device in devices)
    raise LookupError(f"no {ROCE_V2} GID for {address}; there is: {there or 'no device'}")


def roce_v2_addresses(device: Device) -> tuple[Gid, ...]:
    """Its RoCE v2 GIDs for addresses that somebody has set; link-local ones come by themselves."""
    return tuple(
        gid
        for gid in device.gids
        if gid.type == ROCE_V2 and not ipaddress.ip_address(gid.address).is_link_local
    )


def parse_tools(text: str) -> dict[str, str]:
    """What :data:`TOOLS_PROGRAM` printed: by command, its first lines in one."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if line.startswith("tool="):
            lines = found.setdefault(line.removeprefix("tool="), [])
        elif line.strip():
            lines.append(" ".join(line.split()))
    return {command: "; ".join(said[:RAW_LINES]) for command, said in found.items()}


def read(host: Any, sysfs: str = SYSFS) -> dict[str, Device]:
    """Every RDMA device of a host, by name; empty where there is none. One command."""
    return parse_devices(host.check_output("sh -c %s sh %s", READ_PROGRAM, sysfs))


def read_tools(host: Any, names: Sequence[str]) -> dict[str, str]:
    """What ibstat and ibv_devinfo say of these devices, where they are installed. One command."""
    asked = " ".join(["%s"] * len(names))
    return parse_tools(host.run(f"sh -c %s sh {asked}", TOOLS_PROGRAM, *names).stdout)


def facts_of(found: Mapping[str, Device], names: Sequence[str], address: str) -> dict[str, str]:
    """What a report shows of a node's RDMA devices; what is missing is said and is no error here."""
    facts: dict[str, str] = {}
    for name in names:
        device = found.get(name)
        if device is None:
            facts[name] = f"absent; there is: {', '.join(sorted(found)) or 'none'}"
            continue
        interfaces = ", ".join(f"{netdev.name} MTU {netdev.mtu}" for netdev in device.netdevs)
        facts[name] = f"{device.state}, {device.phys_state}, {device.link_layer}, firmware {device.firmware}"
        facts[f"{name} rate"] = device.rate
        facts[f"{name} PCIe"] = str(device.pcie)
        facts[f"{name} interface"] = interfaces or "none"
        facts[f"{name} {ROCE_V2} GIDs"] = ", ".join(map(str, roce_v2_addresses(device))) or "none set"
    present = [name for name in names if name in found]
    for port in ports_of(found, present):
        unused = [half.name for half in port.halves if half.name not in names]
        left = f"; not named in the lab file: {', '.join(unused)}" if unused else ""
        facts[f"port {port.name} of {port.halves[0].name}"] = f"{port}{left}"
    if any(found[name].is_roce for name in present):
        try:
            device, gid = roce_v2_gid(named(found, present), address)
            facts["GID of the data address"] = f"{device.name} {gid}"
        except LookupError as error:
            facts["GID of the data address"] = str(error)
    return facts


def node_facts(host: Any, names: Sequence[str], address: str) -> dict[str, str]:
    """All that a report shows of a node's RDMA devices, tools' words included; empty without names."""
    if not names:
        return {}
    return {**facts_of(read(host), names, address), **read_tools(host, names)}
