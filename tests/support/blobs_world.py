"""Object storage of a test: in memory, whose calls fail, hang or lie when they are told to; and a small S3 of its own."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Generator, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

from obstore.exceptions import GenericError
from obstore.store import MemoryStore

from jaxlora.storage.object_store import Blobs


class Faults:
    """What goes wrong with the next calls, of one URL or another."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.fail: list[Exception] = []  # raised by the next calls, one each
        self.down = False  # every call fails
        self.hang: threading.Event | None = None  # calls wait for it
        self.cut = 0  # of the next so many reads half arrives
        self.flip = 0  # in the next so many reads a byte is another

    def met(self, call: str) -> None:
        self.calls.append(call)
        if self.hang is not None:
            self.hang.wait(30)
        if self.down:
            raise GenericError("nobody there")
        if self.fail:
            raise self.fail.pop(0)


FAULTS = Faults()


class FaultyResult:
    """What a store gives, with FAULTS in its bytes."""

    def __init__(self, result):
        self.meta = result.meta
        self._data = bytes(result.bytes())

    def bytes(self) -> bytes:
        return self._data

    def stream(self) -> Iterator[bytes]:
        data = bytearray(self._data)
        if FAULTS.cut:
            FAULTS.cut -= 1
            data = data[: len(data) // 2]
        if FAULTS.flip:
            FAULTS.flip -= 1
            data[len(data) // 2] ^= 1
        yield bytes(data)


class FaultyStore(MemoryStore):
    """Memory with FAULTS.  Those of the network are raised as obstore does when it has given up."""

    def put(self, path, file, **kwargs):
        FAULTS.met("write")
        return super().put(path, file, **kwargs)

    def get(self, path, **kwargs):
        FAULTS.met("read")
        return FaultyResult(super().get(path, **kwargs))

    def list(self, prefix=None, **kwargs):
        FAULTS.met("list")
        return super().list(prefix, **kwargs)

    def delete(self, paths):
        FAULTS.met("remove")
        super().delete(paths)


STORES: dict[str, FaultyStore] = {}


def faulty(prefix: str, timeout_s: float = 20.0, *, reads: bool = False) -> Blobs:
    """What any machine sees under faulty://PREFIX; FAULTS begins anew."""
    FAULTS.__init__()
    store = STORES.setdefault(prefix, FaultyStore())
    found = Blobs(f"faulty://{prefix}", timeout_s=timeout_s, store=store, reads=reads)
    FAULTS.calls.clear()
    return found


class S3(ThreadingHTTPServer):
    """As much of S3's protocol as one bucket needs, on 127.0.0.1."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.lock = threading.Lock()
        self.objects: dict[str, bytes] = {}
        self.asked: list[str] = []  # methods, faults included
        self.fail: list[int] = []  # statuses of the next answers
        self.lost = 0  # so many answers to the next writes never arrive
        self.cut = 0  # the next so many reads end half-way
        self.hang: threading.Event | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: S3
    protocol_version = "HTTP/1.1"

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        server, url = self.server, urlsplit(self.path)
        server.asked.append(self.command)
        if server.hang is not None:
            server.hang.wait(30)
        if server.fail:
            return self._answer(server.fail.pop(0))
        key = unquote(url.path).removeprefix("/bucket").removeprefix("/")
        with server.lock:
            status, data = self._do(key, parse_qs(url.query, keep_blank_values=True), body)
        if self.command == "PUT" and server.lost:
            server.lost -= 1
            self.close_connection = True
            return None
        return self._answer(status, data, tag=_tag(server.objects.get(key, b"")))

    do_GET = do_PUT = do_DELETE = do_POST = _handle

    def _do(self, key: str, query: dict[str, list[str]], body: bytes) -> tuple[int, bytes]:
        objects = self.server.objects
        if self.command == "PUT":
            wanted = self.headers.get("if-match")
            if self.headers.get("if-none-match") == "*" and key in objects:
                return 412, b""
            if wanted is not None and (key not in objects or _tag(objects[key]) != wanted):
                return 412, b""
            objects[key] = body
            return 200, b""
        if self.command == "POST":  # removes several
            keys = [found.partition("<")[0] for found in body.decode().split("<Key>")[1:]]
            for found in keys:
                objects.pop(found, None)
            rows = "".join(f"<Deleted><Key>{found}</Key></Deleted>" for found in keys)
            return 200, f"<DeleteResult>{rows}</DeleteResult>".encode()
        if self.command == "DELETE":
            objects.pop(key, None)
            return 204, b""
        if "list-type" in query:
            rows = "".join(
                f"<Contents><Key>{k}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified><Size>{len(v)}</Size></Contents>"
                for k, v in sorted(objects.items())
                if k.startswith(query["prefix"][0])
            )
            return 200, f"<ListBucketResult><IsTruncated>false</IsTruncated>{rows}</ListBucketResult>".encode()
        if key in objects and self.headers.get("if-none-match") == _tag(objects[key]):
            return 304, b""
        return (200, objects[key]) if key in objects else (404, b"")

    def _answer(self, status: int, data: bytes = b"", *, tag: str = '"none"') -> None:
        whole = len(data)
        if found := self.headers.get("range"):
            status, data = 206, data[int(found.removeprefix("bytes=").partition("-")[0]) :]
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        if status == 206:
            self.send_header("content-range", f"bytes {whole - len(data)}-{whole - 1}/{whole}")
        self.send_header("etag", tag)
        self.send_header("last-modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        self.end_headers()
        if self.command == "GET" and len(data) > 1 and self.server.cut:
            self.server.cut -= 1
            data, self.close_connection = data[: len(data) // 2], True
        with contextlib.suppress(ConnectionError):
            self.wfile.write(data)

    def log_message(self, *_args) -> None:
        """Nothing."""


def _tag(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'


@contextlib.contextmanager
def s3(monkeypatch) -> Generator[S3]:
    """A server for `s3://bucket/...`, found through the environment as AWS's own."""
    server = S3()
    for name, value in {
        "AWS_ENDPOINT_URL": server.url,
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "any",
        "AWS_SECRET_ACCESS_KEY": "any",
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        if server.hang is not None:
            server.hang.set()
        server.shutdown()
        thread.join()
        server.server_close()
