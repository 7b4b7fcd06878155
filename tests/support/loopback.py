"""This process reaches no other machine: its sockets connect to loopback and Unix addresses, and look up no other name."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable

HERE = {None, "", "localhost", socket.gethostname()}


def address(host: object) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """What a host is as a number; None for a name."""
    try:
        return ipaddress.ip_address(str(host).partition("%")[0])
    except ValueError:
        return None


def refuse(host: object) -> None:
    raise RuntimeError(f"a test may reach this machine only, not {host!r}")


def guard_connect[Result](connect: Callable[[socket.socket, object], Result]):
    """A method of sockets that connects, for addresses of this machine."""

    def connect_here(self: socket.socket, to: object) -> Result:
        if self.family in (socket.AF_INET, socket.AF_INET6) and isinstance(to, tuple) and to[0] not in HERE:
            number = address(to[0])
            if number is None or not (number.is_loopback or number.is_unspecified):
                refuse(to[0])
        return connect(self, to)

    return connect_here


def guard_lookup[**Args, Result](lookup: Callable[Args, Result]):
    """A look-up of names, for those of this machine; numbers ask nobody."""

    def lookup_here(*args: Args.args, **named: Args.kwargs) -> Result:
        host = args[0] if args else named.get("host")
        name = host.decode() if isinstance(host, bytes) else host
        if name not in HERE and address(name) is None:
            refuse(name)
        return lookup(*args, **named)

    return lookup_here


def stay_here() -> None:
    """From now on sockets and look-ups of this process raise RuntimeError for any other machine."""
    for name in ("connect", "connect_ex"):
        setattr(socket.socket, name, guard_connect(getattr(socket.socket, name)))
    for name in ("getaddrinfo", "gethostbyname", "gethostbyname_ex"):
        setattr(socket, name, guard_lookup(getattr(socket, name)))
