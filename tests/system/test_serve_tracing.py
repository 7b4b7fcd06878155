"""A span for each request, with the usual names, under the client's own; and nothing of OpenTelemetry without them."""

from __future__ import annotations

import ast
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import httpx2
import pytest
from fake_backend import BASE, HI, FakeBackend, serving
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

import serve
from jaxlora.config.base import ModelSection
from jaxlora.config.serving import ServeConfig
from jaxlora.core.errors import ConfigInvalid
from serve.observability.tracing import Tracing
from serve.server.app import create_app
from serve.server.gate import AppConfig

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture(scope="module")
def running():
    backend, exporter = FakeBackend(), InMemorySpanExporter()
    tracing = Tracing(SimpleSpanProcessor(exporter))
    with serving(create_app(backend, AppConfig(default_max_tokens=64, listeners=[tracing.heard]))) as url:
        yield backend, url, exporter
    tracing.close()


def span_of(running, **fields):
    """(the span, the answer) of one chat."""
    _, url, exporter = running
    exporter.clear()
    headers = {"traceparent": fields.pop("traceparent", "")}
    body = {"model": BASE, "messages": HI, "max_tokens": 4} | fields
    answer = httpx2.post(url + "/v1/chat/completions", json=body, headers=headers)
    deadline = time.monotonic() + 5
    while not exporter.get_finished_spans() and time.monotonic() < deadline:
        time.sleep(0.005)  # a client has its answer a moment before
    (span,) = exporter.get_finished_spans()
    return span, answer


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_span_says_what_was_asked_and_given(running, stream):
    span, answer = span_of(running, stream=stream, n=2)
    assert (span.name, span.kind) == ("POST /v1/chat/completions", SpanKind.SERVER)
    assert dict(span.attributes) == {
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "http.route": "/v1/chat/completions",
        "jaxlora.request_id": answer.headers["x-request-id"],
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": BASE,
        "gen_ai.usage.input_tokens": 20,
        "gen_ai.usage.output_tokens": 8,
        "gen_ai.response.finish_reasons": ("length", "length"),
    }
    assert span.status.status_code is StatusCode.UNSET
    assert span.end_time > span.start_time
    assert span.parent is None


def test_a_span_lies_under_the_clients(running):
    span, _ = span_of(running, traceparent=f"00-{TRACE}-{PARENT}-01")
    assert f"{span.context.trace_id:032x}" == TRACE
    assert f"{span.parent.span_id:016x}" == PARENT


@pytest.mark.parametrize("header", ["nonsense", "00-0-0-01", "x" * 5000], ids=["word", "short", "long"])
def test_a_header_that_is_none_begins_a_trace(running, header, caplog):
    span, answer = span_of(running, traceparent=header)
    assert (span.parent, answer.status_code) == (None, 200)


def test_a_refusal_names_its_error(running):
    span, _ = span_of(running, model="nobody")
    assert (span.attributes["error.type"], span.attributes["http.response.status_code"]) == ("model_not_found", 404)
    assert span.status.status_code is StatusCode.UNSET  # the client's fault, not this server's
    assert "gen_ai.request.model" not in span.attributes


def test_a_failure_of_ours_is_an_error(running):
    running[0].fail_after, running[0].failure = 1, RuntimeError("of our own")
    try:
        span, answer = span_of(running, stream=True)
    finally:
        running[0].fail_after = running[0].failure = None
    assert answer.status_code == 200
    assert (span.attributes["error.type"], span.status.status_code) == ("internal_error", StatusCode.ERROR)


def test_nothing_of_it_is_imported_without_the_setting():
    files = [p for p in Path(serve.__path__[0]).rglob("*.py") if "serve.observability.tracing" in p.read_text()]
    assert [p.name for p in files] == ["build.py"]  # and tracing.py alone imports OpenTelemetry: test_house_floor
    at_once = [
        ast.unparse(n) for n in ast.parse(files[0].read_text()).body if isinstance(n, ast.Import | ast.ImportFrom)
    ]
    assert len(at_once) > 5
    assert not [line for line in at_once if "tracing" in line]


def test_without_the_extra_the_setting_is_refused(tmp_path, monkeypatch):
    from serve.server.build import observing

    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    config = ServeConfig(model=ModelSection(path="tiny"), otel_endpoint="http://127.0.0.1:4318")
    with pytest.raises(ConfigInvalid, match="extra `otel`"), observing(SimpleRunner(), config):
        pass


class SimpleRunner:
    """As much of a runner as a server that never starts is asked for."""

    base_name = BASE
    watch = SimpleNamespace(hang_s=0.0)
