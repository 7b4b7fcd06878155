"""No test of this process reaches another machine (tests/support/loopback.py, which conftest puts in force)."""

from __future__ import annotations

import asyncio
import socket
import urllib.request

import pytest

ELSEWHERE = ["192.0.2.1", "2001:db8::1", "api.example", "0x7f.1.example"]


@pytest.mark.parametrize("host", ELSEWHERE)
def test_nothing_connects_elsewhere(host):
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as one:
        one.settimeout(1)
        for connect in (one.connect, one.connect_ex):
            with pytest.raises(RuntimeError, match="this machine only"):
                connect((host, 80))


def test_no_other_name_is_looked_up():
    for lookup in (
        lambda: socket.getaddrinfo("api.example", 443),
        lambda: socket.getaddrinfo(host=b"api.example", port=443),
        lambda: socket.gethostbyname("api.example"),
        lambda: socket.create_connection(("api.example", 443), timeout=1),
        lambda: urllib.request.urlopen("http://api.example/", timeout=1),
        lambda: asyncio.run(asyncio.open_connection("api.example", 443)),
    ):
        with pytest.raises(RuntimeError, match=r"this machine only, not 'api\.example'"):
            lookup()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_this_machine_is_reached(host):
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection((host, server.getsockname()[1]), timeout=5).close()
        server.accept()[0].close()


def test_unix_sockets_are_reached(tmp_path):
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind(str(tmp_path / "s"))
        server.listen()
        client.connect(str(tmp_path / "s"))
