"""The gate: what every request passes before its body is read, and after it has been answered.

A request gets an id, its Host and Origin are checked, its caller is identified and its body is bounded.  The gate answers
what nothing else answered, in the error shape of the path's wire.
"""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from fastapi import APIRouter
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxlora.config.base import Checks
from jaxlora.config.serving import HttpSection, LimitsSection
from jaxlora.core.errors import InvalidRequest, JaxLoraError
from serve.access.caller import Caller, anyone, is_loopback
from serve.access.places import Places
from serve.access.rate_limit import Limiter
from serve.http.drain import Drain
from serve.http.errors import LOG, ErrorShapes, Shape
from serve.http.request_log import GENERATED, HEALTH_PATH, READY_PATH, REFUSED, Answered, Listener
from serve.http.schema import DOCUMENT_PATH
from serve.observability.logs import naming
from serve.server.pages import DOCS_PATH, ROOT_PATH

# Answered without a key, also before the server is ready and while it ends.  They show nothing that is anybody's.
OPEN_PATHS = frozenset({HEALTH_PATH, READY_PATH, ROOT_PATH, DOCS_PATH, DOCUMENT_PATH})
LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "[::1]"})
FORM_BYTES = 64 * 1024  # of the form around an uploaded file
SLOWEST_UPLOAD_BYTES_S = 500_000  # an upload may take as long as its largest body at this rate, beside body_timeout_s
REQUEST_ID = "request_id"  # in a request's state; there already where a front has let the request in
GONE = 499  # status of a request whose client left before it had one
TIMEOUT_HEADER = "x-request-timeout-s"
SECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")
AUTHORITY = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^:/@\[\]]+)(?::\d+)?")


class HostRefused(JaxLoraError):
    """The Host or Origin header names another machine: a web page is talking to a server on this one."""

    status, code = 403, "host_refused"


@dataclass(frozen=True, kw_only=True, slots=True)
class AppConfig:
    """Settings of the HTTP application.  Raises ConfigInvalid for an impossible limit."""

    default_max_tokens: int  # of a chat answer whose request names no max_tokens
    ping_s: float = 15.0  # seconds of silence after which a stream gets a comment line
    hosts: Collection[str] | None = LOOPBACK_HOSTS  # names allowed in Host and Origin; None: any (see `hosts_for`)
    caller_of: Callable[[HTTPConnection], Caller] = anyone  # by the headers; raises to refuse a caller
    limiter: Limiter | None = None  # refuses a tenant that exceeds its rate
    limits: LimitsSection = field(default_factory=LimitsSection)  # the gate's: each tenant's open requests
    http: HttpSection = field(default_factory=HttpSection)  # of each address, and of bodies that come slowly
    most_requests: int | None = None  # answered at once; None: any number
    max_body_bytes: int = 4 * 2**20
    body_limits: Mapping[str, int] = field(default_factory=dict)  # path -> bytes uploaded there, form excluded
    body_timeout_s: float = 60.0  # for the whole body to arrive; more where files are uploaded
    max_request_s: float = 3600.0  # for the whole answer, from the request's first line
    drain: Drain = field(default_factory=Drain)  # closed when the server ends
    routers: Sequence[APIRouter] = ()  # the wires beside OpenAI's completions and responses
    error_shapes: Mapping[str, Shape] = field(default_factory=dict)  # path -> how the wire there writes errors
    listeners: Sequence[Listener] = ()  # called with each request that has been answered
    open_paths: Collection[str] = OPEN_PATHS  # that need no key

    def __post_init__(self) -> None:
        with Checks() as check:
            check.counts(self, "default_max_tokens")
            check.positive(self, "ping_s", "max_body_bytes", "body_timeout_s")
            check.need(self.max_request_s > 0, "max_request_s", "positive", self.max_request_s)

    def limit_bytes(self, path: str) -> int:
        """Bytes that the body of a request for this path may have."""
        most = self.body_limits.get(path)
        return self.max_body_bytes if most is None else most + FORM_BYTES

    def too_large(self, path: str) -> HTTPException:
        """The error of a longer one: it names the bytes that the client counts."""
        most = self.body_limits.get(path)
        return HTTPException(
            413,
            f"the body may have at most {self.max_body_bytes} bytes"
            if most is None
            else f"what is uploaded here may have at most {most} bytes",
        )


def hosts_for(bind: str) -> Collection[str] | None:
    """Host names to allow for a bind address: the loopback names for a loopback address, else None, which is any."""
    return LOOPBACK_HOSTS if is_loopback(bind) else None


def answered_of(scope: Scope, request_id: str, status: int, began_s: float, duration_s: float) -> Answered:
    """Returns the record of a request for the listeners."""
    state, traceparent = scope.get("state", {}), Headers(scope=scope).get("traceparent")
    caller = state.get("caller")
    return Answered(
        request_id=request_id,
        method=scope["method"],
        route=getattr(scope.get("route"), "path_format", None),
        status=status,
        tenant=None if caller is None else caller.owner,
        began_s=began_s,
        duration_s=duration_s,
        code=state.get(REFUSED),
        generated=state.get(GENERATED),
        traceparent=traceparent,
    )


class Gate:
    """ASGI middleware around the whole app."""

    def __init__(self, app: ASGIApp, config: AppConfig, shapes: ErrorShapes):
        self._app, self._config, self._shapes = app, config, shapes
        self._of_addresses = Places("requests open", config.most_requests)
        self._of_tenants = Places("requests open", None)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        request_id = scope.setdefault("state", {}).get(REQUEST_ID) or "req_" + uuid.uuid4().hex
        scope["state"][REQUEST_ID] = request_id
        status: int | None = None
        began_s, began = time.time(), time.monotonic()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            with naming(request_id):
                await self._enter(scope, receive, send_with_id)
        except Exception as error:
            if not isinstance(error, JaxLoraError | HTTPException):
                LOG.exception("request %s failed", request_id)
            if status is not None:
                raise  # the server cuts the connection, which no client takes for a whole answer
            await self._shapes.response(scope, error)(scope, receive, send_with_id)
        finally:
            answered = answered_of(scope, request_id, status or GONE, began_s, time.monotonic() - began)
            for hear in self._config.listeners:
                hear(answered)

    async def _enter(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request that may enter on to the app.  Raises for all others."""
        headers, path = Headers(scope=scope), scope["path"]
        self._check_hosts(headers)
        self._check_length(headers, path)
        state = scope["state"]
        state["deadline"] = asyncio.get_running_loop().time() + self._limit_s(headers)
        if path in self._config.open_paths:
            await self._app(scope, self._bounded(receive, path), send)
        else:
            address = (scope.get("client") or ("",))[0]
            with self._config.drain.entered(), self._of_addresses.held(address, self._most_of_address(address)):
                state["caller"] = caller = self._config.caller_of(HTTPConnection(scope))
                with self._of_tenants.held(caller.owner, self._most_of_tenant(caller)):
                    async with self._config.drain.staying(caller.key_id, send) as send_while_valid:
                        await self._app(scope, self._bounded(receive, path), send_while_valid)

    def _most_of_address(self, address: str) -> int | None:
        """Requests that one address may have open; None: any number."""
        most = self._config.http.requests_per_address
        return self._half if most is None and not is_loopback(address) else most

    def _most_of_tenant(self, caller: Caller) -> int | None:
        """Requests that a tenant may have open; None: any number."""
        most = self._config.limits.of(caller.owner).open_requests
        return self._half if most is None and caller.key_id is not None else most

    @property
    def _half(self) -> int | None:
        """Half of the requests that may be open, so that nobody has them all."""
        return None if self._config.most_requests is None else max(self._config.most_requests // 2, 1)

    def _check_hosts(self, headers: Headers) -> None:
        """Raises HostRefused for a name that is not ours: DNS rebinding, or another site's script."""
        if self._config.hosts is None:
            return
        origin = headers.get("origin")
        named = [("Host", headers.get("host", ""))]
        if origin is not None:
            named.append(("Origin", origin.partition("://")[2]))
        for header, authority in named:
            match = AUTHORITY.fullmatch(authority)
            if match is None or match[1].lower() not in self._config.hosts:
                raise HostRefused(
                    f"the {header} header must name one of {', '.join(sorted(self._config.hosts))}; "
                    "to serve others, bind the server to another address"
                )

    def _check_length(self, headers: Headers, path: str) -> None:
        """Raises 413 for an announced length over the limit, before a byte is read."""
        length = headers.get("content-length", "")
        if length.isdecimal() and (len(length) > 18 or int(length) > self._config.limit_bytes(path)):
            raise self._config.too_large(path)

    def _limit_s(self, headers: Headers) -> float:
        """Seconds this request may take.  Raises InvalidRequest for a header that is no such number."""
        value = headers.get(TIMEOUT_HEADER)
        if value is None:
            return self._config.max_request_s
        if not SECONDS.fullmatch(value) or float(value) <= 0:
            raise InvalidRequest(
                f"{TIMEOUT_HEADER} must be a positive number of seconds, such as 2.5, got {value[:40]!a}",
                param=TIMEOUT_HEADER,
            )
        return min(float(value), self._config.max_request_s)

    def _bounded(self, receive: Receive, path: str) -> Receive:
        """`receive`, with the limits of size, time and pace on the body, and none after it.

        Only the time counts for which the server waits.  Patience is used up by it, and comes back with each byte.
        """
        http, clock = self._config.http, asyncio.get_running_loop().time
        limit_s, limit_bytes = self._config.body_timeout_s, self._config.limit_bytes(path)
        if limit_bytes > self._config.max_body_bytes:
            limit_s += limit_bytes / SLOWEST_UPLOAD_BYTES_S
        seen_bytes, deadline, patience_s, whole = 0, clock() + limit_s, http.body_patience_s, False

        async def bounded() -> Message:
            nonlocal seen_bytes, patience_s, whole
            if whole:
                return await receive()
            began = clock()
            try:
                async with asyncio.timeout_at(min(deadline, began + patience_s)):
                    message = await receive()
            except TimeoutError:
                if clock() < deadline:
                    raise HTTPException(
                        408, f"the body came at less than {http.least_body_bytes_s} bytes/s; send it faster"
                    ) from None
                raise HTTPException(408, f"the body took over {limit_s:g} s to arrive") from None
            came_bytes = len(message.get("body", b""))
            seen_bytes += came_bytes
            waited_s = clock() - began
            patience_s = min(patience_s - waited_s + came_bytes / http.least_body_bytes_s, http.body_patience_s)
            whole = not message.get("more_body", False)
            if seen_bytes > limit_bytes:
                raise self._config.too_large(path)
            return message

        return bounded
