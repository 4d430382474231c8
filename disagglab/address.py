"""An address as others want it written, beside a port and in a URL; what is wrong with one of no use.

IPv6 stands in brackets wherever a port follows, and nowhere else.
"""

from __future__ import annotations

import ipaddress
import re
import socket

LABEL = r"[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?"
NAME = re.compile(rf"{LABEL}(\.{LABEL})*\.?")
NUMERIC = re.compile(r"\d+|0[xX][0-9a-fA-F]*")  # as the last label it makes a host an IPv4 address (RFC 3696)


class BadAddress(ValueError):
    """An address that cannot be used. ``mend``: what to write in its place."""

    def __init__(self, wrong: str, mend: str) -> None:
        super().__init__(wrong)
        self.mend = mend


def is_ipv6(address: str) -> bool:
    """Whether an address is IPv6; a name is not."""
    return ":" in address


def is_loopback(address: str) -> bool:
    """Whether an address, or the name localhost, stays on its host."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def family(address: str) -> socket.AddressFamily:
    """The family of the sockets that an address takes."""
    return socket.AF_INET6 if is_ipv6(address) else socket.AF_INET


def joined(address: str, port: int | str) -> str:
    """``127.0.0.1:80``, ``[::1]:80``."""
    return f"[{address}]:{port}" if is_ipv6(address) else f"{address}:{port}"


def parted(text: str) -> tuple[str, int]:
    """Address and port of what :func:`joined` made, or of a URL without path.

    Raises:
        ValueError: if there is no port.
    """
    address, _, port = text.rpartition("//")[2].rpartition(":")
    return address.removeprefix("[").removesuffix("]"), int(port)


def url_of(address: str, port: int | str, scheme: str = "http") -> str:
    """``http://[::1]:80``."""
    return f"{scheme}://{joined(address, port)}"


def checked(text: str, scoped: bool = False) -> str:
    """An address or a name, as every part of a session can use it; IPv6 in its shortest form.

    ``scoped``: whether a link-local one may stand with the interface that it is on (``fe80::1%eth0``).

    Raises:
        BadAddress: if nobody can listen on it and be reached there.
    """
    if text.startswith("["):
        bare = text.partition("]")[0].removeprefix("[")
        raise BadAddress(f"{text} has brackets, which belong to URLs", f'write "{bare}"')
    if not is_ipv6(text):
        return _checked_ipv4_or_name(text)
    try:
        found = ipaddress.IPv6Address(text)
    except ValueError as error:
        bare, _, port = text.partition(":")
        if port.isdigit():
            raise BadAddress(f"{text} has a port", f'write "{bare}"; ports come from [ports]') from error
        wrong = f"{text} is no IPv6 address: {error}"
        raise BadAddress(wrong, "write one, such as ::1 or fd00::1") from error
    if found.is_link_local and not (scoped and found.scope_id):
        wrong = f"{text} is link-local: it means another host on every link, and URLs do not say which"
        mend = "give the host a unique local address, such as fd00::1, and write that"
        other = f"; or write the interface with it: {text.partition('%')[0]}%eth0" if scoped else ""
        raise BadAddress(wrong, mend + other)
    return _used(str(found), found)


def _checked_ipv4_or_name(text: str) -> str:
    try:
        return _used(text, ipaddress.IPv4Address(text))
    except ipaddress.AddressValueError as error:
        if not NAME.fullmatch(text):
            wrong = f"{text!r} is neither an address nor a name"
            raise BadAddress(wrong, "write an address, such as 192.0.2.1 or fd00::1, or a name") from error
        if NUMERIC.fullmatch(text.rstrip(".").rpartition(".")[2]):
            wrong = f"{text} is no IPv4 address: {error}"
            raise BadAddress(wrong, "write four numbers of 0 to 255, such as 192.0.2.1") from error
        return text


def _used(text: str, found: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str:
    if found.is_unspecified or found.is_multicast:
        wrong = f"{text} is {'every address of a host' if found.is_unspecified else 'of a group of hosts'}"
        raise BadAddress(wrong, "write the one address at which others reach it (ip -brief address)")
    return text
