"""The gate and the framework's own errors: shape, headers, limits, hosts, keys."""

import json
import socket
import time

import httpx2
import openai
import pytest
from fake_backend import BASE, FakeBackend, serving

from jaxlora.config.serving import HttpSection, LimitsSection, NamedLimits
from jaxlora.core.errors import Unauthorized
from serve.access.caller import Caller
from serve.server.app import create_app
from serve.server.gate import LOOPBACK_HOSTS, AppConfig, hosts_for

CHAT = {"model": BASE, "messages": [{"role": "user", "content": "hi"}]}


def by_header(connection):
    """A tenant for each key; refuses a missing one."""
    key = connection.headers.get("authorization", "").removeprefix("Bearer ")
    if not key:
        raise Unauthorized("give a key: Authorization: Bearer KEY")
    return Caller(owner=key, admin=False)


@pytest.fixture(scope="module")
def running():
    backend = FakeBackend()
    app = create_app(
        backend, AppConfig(default_max_tokens=64, caller_of=by_header, max_body_bytes=2000, body_timeout_s=0.3)
    )
    with serving(app) as url:
        yield backend, url


@pytest.fixture
def http(running):
    running[0].state, running[0].submit_error = "ok", None
    with httpx2.Client(base_url=running[1], headers={"authorization": "Bearer acme"}) as client:
        yield client


def error_of(answer):
    """The error, after checking what every error has."""
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert answer.headers["x-request-id"].startswith("req_")
    return error


def test_health_and_version(http, running):
    answer = httpx2.get(running[1] + "/health")  # without a key
    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})
    assert http.get("/version").json() == {"version": "0.1.0"}
    running[0].state = "the device thread has stopped"
    answer = http.get("/health")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert error_of(answer)["message"] == "the device thread has stopped"


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        pytest.param("GET", "/nowhere", 404, "not_found", id="route"),
        pytest.param("GET", "/v1/models/", 404, "model_not_found", id="empty_id"),
        pytest.param("DELETE", "/v1/chat/completions", 405, "method_not_allowed", id="method"),
    ],
)
def test_the_frameworks_errors_have_our_shape(http, method, path, status, code):
    answer = http.request(method, path)
    assert (answer.status_code, error_of(answer)["code"]) == (status, code)


@pytest.mark.parametrize(
    ("content", "kind", "words"),
    [
        pytest.param(b"{", "application/json", "not JSON", id="broken"),
        pytest.param(b"", "application/json", "no body", id="empty"),
        pytest.param(b"[1]", "application/json", "JSON object", id="list"),
        pytest.param(b"{}", "text/plain", "application/json", id="content_type"),
        pytest.param(b"\xff\xfe{}", "application/json", "body", id="not_utf8"),
        pytest.param(b'{"model": ' + b"[" * 1900, "application/json", "", id="deep"),
        pytest.param(b'{"model": "m", "messages": [], "temperature": NaN}', "application/json", "", id="nan"),
        pytest.param(b'{"seed": ' + b"9" * 1900 + b"}", "application/json", "", id="huge_number"),
    ],
)
def test_bad_bodies_are_400(http, content, kind, words):
    answer = http.post("/v1/chat/completions", content=content, headers={"content-type": kind})
    assert answer.status_code == 400
    assert words in error_of(answer)["message"]
    assert len(answer.text) < 600


@pytest.mark.fault("T8")
def test_an_unexpected_error_is_500_without_details(http, running, caplog):
    running[0].submit_error = RuntimeError("/secret/path")
    answer = http.post("/v1/chat/completions", json=CHAT)
    assert (answer.status_code, error_of(answer)["code"]) == (500, "internal_error")
    assert "secret" not in answer.text
    assert "/secret/path" in caplog.text
    assert answer.headers["x-request-id"] in caplog.text


@pytest.mark.fault("R1")
def test_a_body_over_the_limit_is_413(http, running):
    at = json.dumps(CHAT | {"user": ""}).encode()
    at = at.replace(b'"user": ""', b'"user": "' + b"x" * (2000 - len(at)) + b'"')
    json_type = {"content-type": "application/json"}
    assert len(at) == 2000
    assert http.post("/v1/chat/completions", content=at, headers=json_type).status_code == 200
    over = at + b" "
    for content in (over, iter([over[:1000], over[1000:]])):  # with its length, and in chunks without
        answer = http.post("/v1/chat/completions", content=content, headers=json_type)
        assert answer.status_code == 413
        error = error_of(answer)
        assert (error["code"], error["type"]) == ("body_too_large", "invalid_request_error")
        assert "2000" in error["message"]
    with openai.OpenAI(base_url=running[1] + "/v1", api_key="k", max_retries=0) as client:
        with pytest.raises(openai.APIStatusError) as caught:
            client.completions.create(model=BASE, prompt="x" * 2000)
        assert caught.value.code == "body_too_large"


@pytest.mark.fault("R1")
def test_a_slow_body_times_out(running):
    port = int(running[1].rsplit(":", 1)[1])
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer k\r\n"
    head += b"Content-Type: application/json\r\nContent-Length: 50\r\n\r\n{"
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.settimeout(5)
        connection.sendall(head)
        first = connection.recv(4000)
    assert first.startswith(b"HTTP/1.1 408")
    assert time.monotonic() - began < 4


@pytest.mark.fault("R1")
def test_a_body_that_comes_too_slowly_is_cut_long_before_its_time_is_over_and_a_steady_one_is_not():
    config = AppConfig(default_max_tokens=5, http=HttpSection(least_body_bytes_s=1000, body_patience_s=0.3))
    body = json.dumps({"model": BASE, "prompt": "x" * 1500, "max_tokens": 1}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n".encode()

    def first_line(port, size, pause_s):
        """Of the answer to a body that comes in pieces."""
        with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
            connection.sendall(head)
            connection.setblocking(False)
            for i in range(0, len(body), size):
                try:
                    return connection.recv(4000)
                except BlockingIOError:
                    connection.send(body[i : i + size])
                    time.sleep(pause_s)
            connection.settimeout(30)
            return connection.recv(4000)

    with serving(create_app(FakeBackend(context=4000), config)) as url:
        port = int(url.rsplit(":", 1)[1])
        slow, steady = first_line(port, 1, 0.02), first_line(port, 100, 0.02)
    assert slow.startswith(b"HTTP/1.1 408")
    assert b"1000 bytes/s" in slow
    assert steady.startswith(b"HTTP/1.1 200")


def test_an_address_and_a_tenant_have_their_own_limits_of_open_requests_and_health_has_none():
    limits = LimitsSection(tenant=(NamedLimits(name="few", open_requests=1),))
    settings = {"caller_of": by_header, "limits": limits, "default_max_tokens": 64}
    for own, who, code in (({}, "few", 429), ({"http": HttpSection(requests_per_address=1)}, "acme", 429)):
        with serving(create_app(FakeBackend(hang_after=1), AppConfig(**settings, **own))) as url:
            asked = {"url": url + "/v1/chat/completions", "json": CHAT | {"stream": True}}
            with httpx2.stream("POST", **asked, headers={"authorization": f"Bearer {who}"}) as first:
                assert first.status_code == 200
                answer = httpx2.post(**asked, headers={"authorization": f"Bearer {who}"})
                assert (answer.status_code, answer.headers["retry-after"]) == (code, "1")
                assert error_of(answer)["code"] == "rate_limit_exceeded"
                assert httpx2.get(url + "/health").status_code == 200
                if not own:
                    with httpx2.stream("POST", **asked, headers={"authorization": "Bearer acme"}) as other:
                        assert other.status_code == 200


def test_no_key_is_401_before_the_body_is_read(running):
    for path in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"):
        answer = httpx2.post(running[1] + path, content=b"{")
        assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
        error = error_of(answer)
        assert (error["code"], error["type"]) == ("invalid_api_key", "authentication_error")
    for path in ("/v1/models", "/v1/models/x", "/version", "/nowhere"):
        assert httpx2.get(running[1] + path).status_code == 401


def test_the_tenant_of_the_key_is_the_one_who_asks(running):
    backend, url = running
    backend.requests.clear()
    with openai.OpenAI(base_url=url + "/v1", api_key="acme", max_retries=0) as client:
        client.chat.completions.create(**CHAT)
        assert len(list(client.models.list())) == 3
    assert backend.requests[0].tenant == "acme"
    with openai.OpenAI(base_url=url + "/v1", api_key="stranger", max_retries=0) as client:
        assert [m.id for m in client.models.list()] == [BASE]
        bodies = []
        for name in ("support", "unknown"):
            with pytest.raises(openai.NotFoundError) as caught:
                client.models.retrieve(name)
            bodies.append(caught.value.response.text.replace(name, "NAME"))
        assert bodies[0] == bodies[1]


@pytest.mark.fault("T11")
@pytest.mark.parametrize(
    ("headers", "status"),
    [
        pytest.param({"host": "localhost:80"}, 200, id="localhost"),
        pytest.param({"host": "[::1]:8000"}, 200, id="ipv6"),
        pytest.param({"host": "evil.example"}, 403, id="rebinding"),
        pytest.param({"host": "localhost.evil.example"}, 403, id="prefix"),
        pytest.param({"host": "localhost@evil.example"}, 403, id="userinfo"),
        pytest.param({"origin": "http://localhost:3000"}, 200, id="own_origin"),
        pytest.param({"origin": "https://evil.example"}, 403, id="foreign_origin"),
        pytest.param({"origin": "null"}, 403, id="null_origin"),
    ],
)
def test_only_our_own_names_are_answered(http, headers, status):
    answer = http.get("/v1/models", headers=headers)
    assert answer.status_code == status
    assert "access-control-allow-origin" not in answer.headers
    if status == 403:
        assert error_of(answer)["code"] == "host_refused"


def test_the_bind_address_decides_the_names():
    assert [hosts_for(b) for b in ("127.0.0.1", "::1", "localhost")] == [LOOPBACK_HOSTS] * 3
    assert [hosts_for(b) for b in ("0.0.0.0", "::", "10.0.0.5", "my.host")] == [None] * 4


def test_with_any_host_allowed_none_is_refused():
    with serving(create_app(FakeBackend(), AppConfig(default_max_tokens=5, hosts=None))) as url:
        headers = {"host": "models.example", "origin": "https://page.example"}
        assert httpx2.get(url + "/health", headers=headers).status_code == 200


def test_impossible_limits_are_refused_at_start():
    for name in ("default_max_tokens", "ping_s", "max_body_bytes", "body_timeout_s", "max_request_s"):
        with pytest.raises(ValueError, match=name):
            AppConfig(**({"default_max_tokens": 5} | {name: 0}))


def test_the_api_document_names_every_route_and_its_errors():
    paths = create_app(FakeBackend(), AppConfig(default_max_tokens=5)).openapi()["paths"]
    assert set(paths) >= {"/v1/models", "/v1/models/{model}", "/v1/chat/completions", "/v1/completions", "/tokenize"}
    for path, methods in paths.items():
        for operation in methods.values():
            if path not in ("/health", "/ready", "/version"):
                assert {"400", "401", "404", "413", "429", "503", "504"} <= set(operation["responses"])
                assert ("200" in operation["responses"]) is (path != "/v1/responses/{id}")  # none is kept
                assert "422" not in operation["responses"]
