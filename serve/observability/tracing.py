"""A span for each request, told to OpenTelemetry.  Its libraries are an extra: this file is imported when spans are wanted."""

from __future__ import annotations

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from serve.http.request_log import Answered


class Tracing:
    """Spans of answered requests, under the client's own where it names one.  `heard` is a listener of the app."""

    def __init__(self, processor: SpanProcessor):
        """processor: what is done with the spans."""
        self._provider = TracerProvider(resource=Resource.create({"service.name": "jaxlora"}), shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("jaxlora")
        self._headers = TraceContextTextMapPropagator()

    def heard(self, answered: Answered) -> None:
        """The span of one request, from its first line to its last byte."""
        headers = {} if answered.traceparent is None else {"traceparent": answered.traceparent}
        span = self._tracer.start_span(
            " ".join(filter(None, (answered.method, answered.route))),
            context=self._headers.extract(headers),
            kind=SpanKind.SERVER,
            attributes=attributes_of(answered),
            start_time=int(answered.began_s * 1e9),
        )
        if answered.status >= 500 or (answered.code is not None and answered.status < 400):
            span.set_status(Status(StatusCode.ERROR))
        span.end(int((answered.began_s + answered.duration_s) * 1e9))

    def close(self) -> None:
        """Sends what is left."""
        self._provider.shutdown()


def attributes_of(answered: Answered) -> dict[str, AttributeValue]:
    """What the span says, by OpenTelemetry's names for HTTP servers and generative models."""
    attributes: dict[str, AttributeValue] = {
        "http.request.method": answered.method,
        "http.response.status_code": answered.status,
        "jaxlora.request_id": answered.request_id,
    }
    if answered.route is not None:
        attributes["http.route"] = answered.route
    if answered.code is not None:
        attributes["error.type"] = answered.code
    if (generated := answered.generated) is not None:
        attributes |= {
            "gen_ai.operation.name": generated.operation,
            "gen_ai.request.model": generated.model,
            "gen_ai.usage.input_tokens": generated.prompt_tokens,
            "gen_ai.usage.output_tokens": generated.completion_tokens,
            "gen_ai.response.finish_reasons": generated.finishes,
        }
    return attributes


def tracing_to(endpoint: str) -> Tracing:
    """Spans sent in the background to an OTLP collector, such as http://127.0.0.1:4318.  Raises ImportError without the extra."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # ty: ignore[import-not-found]

    return Tracing(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint.rstrip("/") + "/v1/traces")))
