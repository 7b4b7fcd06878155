"""What Prometheus reads of a cluster: all servers' metrics in one answer, the front's own, and totals for another router.

    GET /metrics ─▶ every server at once, for a second and a half ─▶ parsed, each sample with `replica` ─▶ one exposition

`replica` is `replica-0` and so on, `keeper`, or `front`.  A server that does not answer in time is left out, and
`jaxlora:server_up` says so.  The totals (`jaxlora:cluster_…`) are what a model server tells an endpoint picker of
Kubernetes' Gateway API, which reads one series of a name and sums none up.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Collection, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from serve.cluster.peer import KEEPER, Peer, PeerGone
from serve.cluster.relay import Peers, relayed
from serve.http.request_log import METRICS_PATH
from serve.observability.metrics import check_may_read, exposition

LOG = logging.getLogger("serve")
SCRAPE_S = 1.5  # for all servers together, well below what Prometheus waits
LABEL, FRONT = "replica", "front"
HOTTEST = 16  # adapters of which the copies are told

type Told = Mapping[str, Sequence[Metric]]  # server → its families


class ClusterMetrics:
    """ASGI application between the gate and the relay, which answers GET /metrics itself.  Of one event loop."""

    def __init__(self, app: ASGIApp, peers: Peers, *, is_open: bool, adapters: bool):
        """is_open: whether no key is needed; adapters: whether names of adapters are told, as each server's settings say."""
        self._app, self._peers, self._is_open, self._adapters = app, peers, is_open, adapters
        self._asking: asyncio.Task[dict[str, list[Metric]]] | None = None
        self._process = CollectorRegistry()
        ProcessCollector(registry=self._process)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request, or passes it on."""
        if (scope["method"], scope["path"]) != ("GET", METRICS_PATH):
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        check_may_read(request, is_open=self._is_open)
        if self._asking is None or self._asking.done():  # whoever comes meanwhile reads the same
            self._asking = asyncio.create_task(self._scraped(scope))
        told = await asyncio.shield(self._asking)
        own = [*self._process.collect(), *front_metrics(self._peers, told, adapters=self._adapters)]
        answer = await exposition(Exposition({**told, FRONT: own}, adapters=self._adapters), request)
        await answer(scope, receive, send)

    async def _scraped(self, scope: Scope) -> dict[str, list[Metric]]:
        """Returns what each server tells; those are missing that fail, refuse or take too long."""
        peers: dict[str, Peer] = dict(self._peers.replicas)
        if self._peers.keeper is not None:
            peers[KEEPER] = self._peers.keeper
        plain = [(name, value) for name, value in scope["headers"] if name != b"accept"]
        asked = relayed({**scope, "headers": plain})
        asking = {asyncio.create_task(_scrape(peer, asked)): server for server, peer in peers.items()}
        done = (await asyncio.wait(asking, timeout=SCRAPE_S))[0] if asking else set()
        told: dict[str, list[Metric]] = {}
        for task, server in asking.items():
            if task not in done:
                task.cancel()
                LOG.warning("the metrics of %s take too long", server)
            elif (error := task.exception()) is not None:
                LOG.warning("the metrics of %s cannot be had: %s", server, error)
            else:
                told[server] = task.result()
        return told


def front_metrics(peers: Peers, told: Collection[str], *, adapters: bool) -> Iterator[Metric]:
    """Yields the front's families; counts are since it started.  told: the servers whose metrics are there."""
    traffic = peers.traffic
    up = GaugeMetricFamily(
        "jaxlora:server_up", "1: the server's metrics are here; 0: it starts, hangs or is gone", labels=[LABEL]
    )
    for server in sorted({KEEPER, *peers.known, *peers.replicas}):
        up.add_metric([server], float(server in told))
    yield up
    yield _counted("jaxlora:front_sent", "Requests sent to a replica", traffic.sent)
    yield _counted("jaxlora:front_left", "Times that a replica was found gone or hanging", traffic.left)
    yield CounterMetricFamily(
        "jaxlora:front_rerouted", "Requests sent again, as a replica failed or refused", traffic.rerouted
    )
    yield CounterMetricFamily("jaxlora:front_unplaced", "Requests that no replica was left for", traffic.unplaced)
    hottest = peers.router.hottest(HOTTEST, peers.clock())
    yield GaugeMetricFamily(
        "jaxlora:front_copies_most",
        "Replicas that are the own ones of the hot adapter with the most",
        max((copies for _, copies in hottest), default=0),
    )
    if adapters:
        family = GaugeMetricFamily(
            "jaxlora:front_copies", "Replicas that are a hot adapter's own", labels=["tenant", "adapter"]
        )
        for (tenant, adapter), copies in hottest:
            family.add_metric([tenant, adapter], copies)
        yield family


class Exposition(Collector):
    """The families of several servers as one."""

    def __init__(self, told: Told, *, adapters: bool):
        self._told, self._adapters = told, adapters

    def collect(self) -> Iterator[Metric]:
        """Yields each family once, with the samples of all servers, and then the totals."""
        merged: dict[str, Metric] = {}
        for server, families in self._told.items():
            for family in families:
                whole = merged.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                whole.samples += [sample._replace(labels={LABEL: server, **sample.labels}) for sample in family.samples]
        yield from merged.values()
        yield from totals(self._told, adapters=self._adapters)


def totals(told: Told, *, adapters: bool) -> Iterator[Metric]:
    """Yields what an endpoint picker asks of one model server, of all replicas together."""
    samples: dict[str, list[Sample]] = {}
    for server, families in told.items():
        if server not in (KEEPER, FRONT):
            for family in families:
                samples.setdefault(family.name, []).extend(family.samples)
    waiting, running, used = (
        [sample.value for sample in samples.get(f"vllm:{name}", ())]
        for name in ("num_requests_waiting", "num_requests_running", "kv_cache_usage_perc")
    )
    for name, what, value in (
        ("requests_waiting", "Requests in line at all replicas", sum(waiting)),
        ("requests_running", "Requests that have a row at some replica", sum(running)),
        # A cluster without replicas has room for nothing.
        ("kv_cache_usage_perc", "Share of all replicas' KV pages that is held", sum(used) / len(used) if used else 1.0),
    ):
        yield GaugeMetricFamily(f"jaxlora:cluster_{name}", what, value)
    if adapters:
        info = [sample.labels for sample in samples.get("vllm:lora_requests_info", ())]
        slots = sum(int(labels["max_lora"]) for labels in info)
        named = [
            ",".join(sorted({name for labels in info for name in labels[label].split(",") if name}))
            for label in ("running_lora_adapters", "waiting_lora_adapters")
        ]
        family = GaugeMetricFamily(
            "jaxlora:cluster_lora_requests_info",
            "Adapters that lie in slots of replicas, and those of them with requests in line; the value is the time",
            labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
        )
        family.add_metric([str(slots), *named], time.time())
        yield family


async def _scrape(peer: Peer, scope: Scope) -> list[Metric]:
    """Returns the families that a server tells.  Raises PeerGone, also where it refuses."""
    told, status = b"", 0
    async with contextlib.aclosing(peer.answer(scope, [b""])) as answer:
        async for messages in answer:
            for message in messages:
                status = message.get("status", status)
                told += message.get("body", b"")
    if status != 200:
        raise PeerGone(f"it answers with status {status}")
    return await asyncio.to_thread(_parsed, told)


def _parsed(text: bytes) -> list[Metric]:
    return list(text_string_to_metric_families(text.decode()))


def _counted(name: str, what: str, counts: Mapping[str, int]) -> Metric:
    family = CounterMetricFamily(name, what, labels=[LABEL])
    for server, count in sorted(counts.items()):
        family.add_metric([server], count)
    return family
