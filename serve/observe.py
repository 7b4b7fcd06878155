"""What looks at a server, joined: metrics, the log, traces, /v1/stats."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass

from fastapi import APIRouter

from jaxlora.config.serving import ServeConfig
from jaxlora.core.errors import ConfigInvalid
from jaxlora.model.compile_cache import CompileCounter
from serve.answered import Listener
from serve.app import OPEN_PATHS
from serve.logs import log_answered, logging_to
from serve.metrics import METRICS_PATH, HttpMetrics, MetricsWire, ServerMetrics
from serve.runner import Runner
from serve.stats_api import StatsWire


@dataclass(frozen=True, kw_only=True, slots=True)
class Observers:
    """What the app is given of it."""

    routers: Sequence[APIRouter]
    listeners: Sequence[Listener]
    open_paths: Collection[str]
    compiles: CompileCounter  # to be entered when all is compiled: whatever still compiles is told


@contextlib.contextmanager
def observing(runner: Runner, config: ServeConfig) -> Generator[Observers]:
    """The log goes to stderr from now on, and what the app needs for the rest.

    Raises ConfigInvalid for traces without the extra `otel`.
    """
    runner.watch.hang_s = config.hang_s
    http, compiles = HttpMetrics(), CompileCounter()
    server = ServerMetrics(runner, adapters=config.metrics_adapters, compiles=lambda: compiles.compiles)
    metrics = MetricsWire(server, http, is_open=config.metrics_open)
    listeners: list[Listener] = [http.heard, log_answered]
    with contextlib.ExitStack() as stack:
        if config.otel_endpoint is not None:
            try:
                from serve.tracing import tracing_to

                tracing = tracing_to(config.otel_endpoint)
            except ImportError as error:
                raise ConfigInvalid("otel_endpoint needs the extra `otel`; install jaxlora[otel]") from error
            stack.callback(tracing.close)
            listeners.append(tracing.heard)
        stack.enter_context(logging_to(as_json=config.log == "json"))
        yield Observers(
            routers=[metrics.router(), StatsWire(runner, runner.watch).router()],
            listeners=listeners,
            open_paths=OPEN_PATHS | {METRICS_PATH} if config.metrics_open else OPEN_PATHS,
            compiles=compiles,
        )
