"""What Prometheus reads: vLLM's names where they mean the same, `jaxlora:` for the rest.  One registry for each server.

A scrape reads numbers that others have left: it waits for no step, and works while the device thread is busy or gone.
No label holds what a tenant chose, unless `adapters` says so.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial

from fastapi import APIRouter, Request
from fastapi.responses import Response
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.openmetrics.exposition import ALLOWUTF8
from prometheus_client.registry import Collector
from starlette.requests import HTTPConnection

from serve.access.caller import caller_of
from serve.engine.telemetry import Histogram
from serve.http.errors import ERRORS
from serve.http.request_log import METRICS_PATH, Answered
from serve.http.schema import ok_as
from serve.runtime.device_thread import DeviceThread
from serve.runtime.snapshot import Snapshot

OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"
METHODS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"})  # others are a client's invention


class HttpMetrics(Collector):
    """Requests by route and status, and refusals by code.  `heard` is a listener of the app."""

    def __init__(self) -> None:
        self._requests: Counter[tuple[str, str, str]] = Counter()
        self._refusals: Counter[str] = Counter()

    def heard(self, answered: Answered) -> None:
        """One more request."""
        method = answered.method if answered.method in METHODS else "other"
        self._requests[method, answered.route or "none", str(answered.status)] += 1
        if answered.code is not None:
            self._refusals[answered.code] += 1

    def collect(self) -> Iterator[Metric]:
        """The families, as they are now."""
        yield _counted(
            "jaxlora:http_requests",
            "HTTP requests answered",
            ("method", "route", "status"),
            dict(self._requests).items(),
        )
        refusals = {(code,): count for code, count in dict(self._refusals).items()}
        yield _counted(
            "jaxlora:refusals", "Requests that ended with an error, by its code", ("code",), refusals.items()
        )


class ServerMetrics(Collector):
    """The engine, the slots, the training."""

    def __init__(self, runner: DeviceThread, *, adapters: bool, compiles: Callable[[], int]):
        """adapters: whether names of adapters are told; compiles: programs compiled since the warm-up."""
        self._runner, self._adapters, self._compiles = runner, adapters, compiles
        self._model = {"model_name": runner.base_name}

    def collect(self) -> Iterator[Metric]:
        """The families, as the device thread last left them."""
        snapshot = self._runner.watch.snapshot
        yield from self._vllm(snapshot)
        if self._adapters:
            yield self._lora_requests(snapshot)
        yield from self._ours(snapshot)
        yield from self._training(snapshot)

    def _vllm(self, now: Snapshot) -> Iterator[Metric]:
        telemetry = self._runner.engine.telemetry
        used = 1 - now.free_pages / now.pages
        yield self._gauge("vllm:num_requests_running", "Requests that have a row", now.running)
        yield self._gauge(
            "vllm:num_requests_waiting", "Requests in line, parked ones included", now.waiting + now.parked
        )
        yield self._gauge("vllm:kv_cache_usage_perc", "Share of the KV pages that requests hold, 1 is all", used)
        yield self._counter(
            "vllm:prompt_tokens", "Prompt tokens of requests that began to answer", telemetry.prompt_tokens
        )
        yield self._counter("vllm:generation_tokens", "Tokens generated", self._runner.engine.decoded_tokens)
        info = GaugeMetricFamily(
            "vllm:cache_config_info",
            "KV pages and the tokens of one",
            labels=("model_name", "block_size", "num_gpu_blocks"),
        )
        info.add_metric([self._runner.base_name, str(self._runner.engine.config.page_tokens), str(now.pages)], 1)
        yield info
        ended = dict.fromkeys(("stop", "length", "abort", "error"), 0) | dict(telemetry.ended)
        yield self._counters("vllm:request_success", "Requests that have ended, by how", "finished_reason", ended)
        yield self._counter("vllm:prefix_cache_queries", "Prompt tokens looked for in the cache", now.queried_tokens)
        yield self._counter("vllm:prefix_cache_hits", "Prompt tokens found in the cache", now.found_tokens)
        yield self._counter("vllm:num_preemptions", "Times that a running request lost its row", now.parks)
        for name, what, histogram in (
            ("vllm:time_to_first_token_seconds", "From arrival to the first token", telemetry.first_token_s),
            ("vllm:inter_token_latency_seconds", "Between two tokens of a request", telemetry.next_token_s),
            ("vllm:e2e_request_latency_seconds", "From arrival to the end", telemetry.whole_s),
            ("vllm:request_queue_time_seconds", "From arrival to the first step", telemetry.queued_s),
        ):
            yield self._histogram(name, what, histogram)

    def _lora_requests(self, now: Snapshot) -> Metric:
        """What a router reads to send a request where its adapter lies already; of resident adapters only."""
        resident = [slot for slot in now.slots if slot.adapter is not None]
        waiting = [slot for slot in resident if slot.waiting]
        family = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters that lie in slots, and those of them with requests in line; the value is the time",
            labels=("model_name", "max_lora", "running_lora_adapters", "waiting_lora_adapters"),
        )
        names = [",".join(sorted({s.adapter.name for s in slots if s.adapter})) for slots in (resident, waiting)]
        family.add_metric([self._runner.base_name, str(len(now.slots)), *names], time.time())
        return family

    def _ours(self, now: Snapshot) -> Iterator[Metric]:
        runner, slots = self._runner, now.slots
        filled = [slot for slot in slots if slot.adapter is not None]
        active = sum(slot.active_s is not None for slot in filled)
        states = {"active": active, "idle": len(filled) - active, "free": len(slots) - len(filled)}
        yield self._gauges(
            "jaxlora:slots", "Adapter slots by state; idle ones hold an adapter without work", "state", states
        )
        yield self._gauge("jaxlora:slots_pinned", "Slots whose adapter never leaves", sum(s.pinned for s in slots))
        yield self._gauge("jaxlora:adapters_waiting", "Adapters with work and no slot", now.waiting_adapters)
        waited_s = runner.engine.scheduler.active.waited_s
        yield self._histogram("jaxlora:adapter_wait_seconds", "How long adapters with work waited for a slot", waited_s)
        yield self._counter("jaxlora:adapter_swaps", "Exchanges of an adapter with work for another", now.swaps)
        yield self._counter("jaxlora:slot_changes", "Changes of the number of slots and KV pages", now.resizes)
        yield self._counter("jaxlora:adapter_loads", "Adapters copied into a slot", runner.engine.telemetry.loads)
        memory = runner.engine.store.host_memory()
        kinds = {"held": memory.held, "loading": memory.loading, "aside": memory.aside}
        yield self._gauges("jaxlora:host_adapter_bytes", "Host memory that adapters take", "kind", kinds)
        yield self._gauge("jaxlora:host_adapter_limit_bytes", "Host memory that adapters may take", memory.limit)
        yield self._gauge(
            "jaxlora:versions_unsaved",
            "Versions in memory alone, as their last save failed",
            runner.engine.store.unsaved(),
        )
        yield self._gauge("jaxlora:requests_parked", "Requests that have begun and have no row", now.parked)
        yield self._gauge("jaxlora:parked_kv_pages", "KV pages of parked requests on the host", now.host_pages)
        yield self._gauge("jaxlora:parked_kv_limit_pages", "KV pages that may lie on the host", now.host_pages_limit)
        yield self._counter("jaxlora:recomputed_tokens", "Tokens whose KV was dropped", now.recomputed_tokens)
        yield self._histogram(
            "jaxlora:freshness_seconds",
            "From an update of an adapter to the first token under it",
            runner.publisher.freshness,
        )
        yield self._counter("jaxlora:compiles", "Programs compiled since the warm-up", self._compiles())
        yield self._gauge("jaxlora:healthy", "1 while the device thread turns", float(runner.health() == "ok"))

    def _training(self, now: Snapshot) -> Iterator[Metric]:
        budget, training = self._runner.budget, now.training
        sides = {"serving": budget.serving_s, "training": budget.training_s}
        yield self._counters("jaxlora:device_seconds", "Time that serving and training have had", "side", sides)
        if training is None:
            return
        yield self._counter("jaxlora:training_tokens", "Tokens trained", training.tokens)
        yield self._counter("jaxlora:training_steps", "Updates of adapters", training.steps)
        parts = dict(budget.parts_done)
        yield self._counters("jaxlora:training_parts", "Microsteps of training steps", "part", parts)
        yield self._gauges("jaxlora:jobs", "Fine-tuning jobs by state", "state", training.jobs)

    def _gauge(self, name: str, what: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, what, labels=tuple(self._model))
        family.add_metric(list(self._model.values()), value)
        return family

    def _gauges(self, name: str, what: str, label: str, values: Mapping[str, float]) -> Metric:
        family = GaugeMetricFamily(name, what, labels=(*self._model, label))
        for key, value in values.items():
            family.add_metric([*self._model.values(), key], value)
        return family

    def _counter(self, name: str, what: str, value: float) -> Metric:
        return _counted(name, what, tuple(self._model), [(list(self._model.values()), value)])

    def _counters(self, name: str, what: str, label: str, counts: Mapping[str, float]) -> Metric:
        named = [([*self._model.values(), key], count) for key, count in counts.items()]
        return _counted(name, what, (*self._model, label), named)

    def _histogram(self, name: str, what: str, histogram: Histogram) -> Metric:
        family = HistogramMetricFamily(name, what, labels=tuple(self._model))
        total, buckets = 0, []
        for bound, count in zip((*map(str, histogram.bounds), "+Inf"), list(histogram.counts), strict=True):
            total += count
            buckets.append((bound, total))
        family.add_metric(list(self._model.values()), buckets, histogram.sum)
        return family


def _counted(
    name: str, what: str, labels: tuple[str, ...], counts: Iterable[tuple[Sequence[str], float]]
) -> CounterMetricFamily:
    family = CounterMetricFamily(name, what, labels=labels)
    for values, count in counts:
        family.add_metric(values, count)
    return family


class MetricsRoutes:
    """GET /metrics."""

    def __init__(self, *collectors: Collector, is_open: bool):
        """is_open: whether it is read without a key; else a key of the role admin is needed."""
        self._open = is_open
        self._registry = CollectorRegistry()
        for collector in collectors:
            self._registry.register(collector)
        ProcessCollector(registry=self._registry)

    def router(self) -> APIRouter:
        """The one route."""
        router = APIRouter(responses=ERRORS)
        text = ok_as({kind: {"schema": {"type": "string"}} for kind in ("text/plain", "application/openmetrics-text")})
        router.add_api_route(METRICS_PATH, self.read, methods=["GET"], response_class=Response, responses=text)
        return router

    async def read(self, request: Request) -> Response:
        """All families in Prometheus' text format, or OpenMetrics' where that is asked for."""
        check_may_read(request, is_open=self._open)
        return await exposition(self._registry, request)


def check_may_read(request: HTTPConnection, *, is_open: bool) -> None:
    """Raises Forbidden for a caller that may not read metrics."""
    if not is_open:
        caller_of(request).need_admin("reading metrics")


async def exposition(collector: Collector, request: HTTPConnection) -> Response:
    """Returns the collector's families in the format that the request accepts."""
    encode, kind = choose_encoder(request.headers.get("accept", ""))
    if kind.startswith(OPENMETRICS):
        # Our names need no escape; the library's default one, which Prometheus asks for, writes _ for their colons.
        encode, kind = partial(openmetrics.generate_latest, escaping=ALLOWUTF8), OPENMETRICS
    return Response(await asyncio.to_thread(encode, collector), headers={"content-type": kind})
