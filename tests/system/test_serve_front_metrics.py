"""What Prometheus reads through the front: all servers' samples, each with the server's name, and the front's own."""

from __future__ import annotations

import asyncio
import copy
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import httpx2
import pytest
from fake_backend import BASE as FAKE
from fake_backend import FakeBackend, serving
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families
from serve_world import BASE, with_resident

from jaxlora.config.base import ModelSection
from jaxlora.config.cluster import RouterSection
from jaxlora.config.serving import ServeConfig
from jaxlora.core.errors import Overloaded, Unauthorized
from serve.access.caller import Caller
from serve.cluster import metrics
from serve.cluster.answers import answered
from serve.cluster.metrics import ClusterMetrics
from serve.cluster.peer import PeerGone
from serve.cluster.relay import Peers, Relay
from serve.cluster.replica_view import Report
from serve.cluster.router import Router
from serve.http.errors import ErrorShapes
from serve.runtime.device_thread import DeviceThread
from serve.server.app import create_app
from serve.server.build import observing
from serve.server.gate import OPEN_PATHS, AppConfig, Gate

pytest_plugins = ["serve_fixtures"]
IDLE = Report(asked_s=0.0, slots=3, rows=4, running_rows=0, running_tokens=0, waiting_tokens=0, adapters={})
ADMIN, TENANT = "sk-admin", "sk-tenant"
FRONT, WHOLE = frozenset({("replica", "front")}), frozenset()  # labels of the front's samples, and of the totals


def by_key(connection):
    key = connection.headers.get("authorization", "").removeprefix("Bearer ")
    if key not in (ADMIN, TENANT):
        raise Unauthorized("no valid key")
    return Caller(owner="acme", admin=key == ADMIN)


class LocalPeer:
    """A server of this process.  `hangs`, `gone`: what becomes of a call; `asked`: how often it was."""

    def __init__(self, app):
        self.app, self.hangs, self.gone, self.asked = app, False, False, 0

    async def answer(self, scope, body):
        self.asked += 1
        if self.gone:
            raise PeerGone("its process has ended")
        if self.hangs:
            await asyncio.Event().wait()
        async for messages in answered(self.app, copy.deepcopy(scope), body):
            yield messages


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """A busy machine leaves nobody out."""
    monkeypatch.setattr(metrics, "SCRAPE_S", 60.0)


@pytest.fixture(scope="module")
def runners(world):
    """Three servers that have one adapter in a slot each, none of which runs."""
    return [DeviceThread(with_resident(world.engine(), adapter), base_name=BASE) for adapter in world.adapters[:3]]


def server(runner, *, is_open):
    config = ServeConfig(model=ModelSection(path="tiny"), metrics_open=is_open, metrics_adapters=True)
    with observing(runner, config) as observers:
        settings = AppConfig(
            default_max_tokens=8,
            caller_of=by_key,
            routers=observers.routers,
            listeners=observers.listeners,
            open_paths=observers.open_paths,
        )
        return LocalPeer(create_app(runner, settings))


def behind(replicas, keeper, *, is_open=False, adapters=True, base=BASE):
    """(the app of a front, its peers)"""
    peers = Peers(Router(RouterSection()))
    peers.known, peers.keeper = {f"replica-{n}" for n in range(len(replicas))}, keeper
    for n, peer in enumerate(replicas):
        peers.report(f"replica-{n}", peer, IDLE)

    async def keep(data):
        raise AssertionError("no body is large")

    async def find(model):
        return None

    relay = Relay(peers, base_name=base, default_max_tokens=8, keep=keep, find=find)
    open_paths = OPEN_PATHS | {"/metrics"} if is_open else OPEN_PATHS
    config = AppConfig(default_max_tokens=8, caller_of=by_key, open_paths=open_paths)
    app = ClusterMetrics(relay, peers, is_open=is_open, adapters=adapters)
    return Gate(app, config, ErrorShapes({})), peers


@pytest.fixture
def cluster(runners):
    """(URL, peers, replicas, keeper) of a front before two replicas and a keeper, all of which know two keys."""
    first, second, keeper = (server(runner, is_open=False) for runner in runners)
    app, peers = behind([first, second], keeper)
    with serving(app) as url:
        yield url, peers, (first, second), keeper


def scrape(url, key=ADMIN, **headers):
    """{(sample, labels): value} as Prometheus' own parser reads them; none is told twice."""
    answer = httpx2.get(url + "/metrics", headers={"authorization": f"Bearer {key}"} | headers, timeout=20)
    assert answer.status_code == 200
    parse = openmetrics_families if "openmetrics" in answer.headers["content-type"] else text_string_to_metric_families
    families = list(parse(answer.text))
    assert len({family.name for family in families}) == len(families), "a family is told twice"
    samples = {(s.name, frozenset(s.labels.items())): s.value for f in families for s in f.samples}
    assert len(samples) == sum(len(f.samples) for f in families), "a sample is told twice"
    return samples


def by_server(samples, name):
    return {dict(labels).get("replica"): value for (own, labels), value in samples.items() if own == name}


@pytest.mark.parametrize("accept", ["text/plain", "application/openmetrics-text; version=1.0.0"])
def test_every_server_is_there_under_its_own_name(cluster, accept):
    samples = scrape(cluster[0], accept=accept)
    for name in ("vllm:num_requests_running", "jaxlora:healthy", "vllm:time_to_first_token_seconds_count"):
        assert set(by_server(samples, name)) == {"replica-0", "replica-1", "keeper"}
    servers = {"replica-0", "replica-1", "keeper"}
    assert by_server(samples, "jaxlora:server_up") == dict.fromkeys(servers, 1)
    assert set(by_server(samples, "process_resident_memory_bytes")) == servers | {"front"}


def test_samples_are_those_that_a_server_tells_itself(cluster, runners):
    """Nothing is lost or changed but for the label, the time and the process."""
    url, _, _, _ = cluster
    with serving(server(runners[0], is_open=True).app) as direct:
        alone = scrape(direct)
    through = {
        (name, labels - {("replica", "replica-0")}): value
        for (name, labels), value in scrape(url).items()
        if ("replica", "replica-0") in labels
    }
    moves = ("process_", "jaxlora:http_requests", "vllm:lora_requests_info", "python_")
    stays = {key: value for key, value in alone.items() if not key[0].startswith(moves)}
    assert len(stays) > 100
    assert {key: through[key] for key in stays} == stays


@pytest.mark.parametrize("fails", ["hangs", "gone"])
def test_one_that_does_not_answer_is_left_out_in_time_and_told(cluster, fails, monkeypatch):
    url, _, (first, _), _ = cluster
    setattr(first, fails, True)
    monkeypatch.setattr(metrics, "SCRAPE_S", 4.0)
    began = time.monotonic()
    samples = scrape(url)
    assert time.monotonic() - began < 10
    assert by_server(samples, "jaxlora:server_up") == {"replica-0": 0, "replica-1": 1, "keeper": 1}
    assert set(by_server(samples, "jaxlora:healthy")) == {"replica-1", "keeper"}


def test_one_that_starts_or_left_is_told_and_one_that_nobody_wants_is_not(cluster):
    url, peers, (first, _), keeper = cluster
    peers.known = {"replica-0", "replica-7"}
    peers.leave("replica-0", first)
    peers.leave("replica-0", first)  # is heard of twice
    peers.leave("keeper", keeper)
    samples = scrape(url)
    up = {"replica-0": 0, "replica-1": 1, "replica-7": 0, "keeper": 0}
    assert by_server(samples, "jaxlora:server_up") == up
    assert by_server(samples, "jaxlora:front_left_total") == {"replica-0": 1}


def test_access_is_that_of_one_server(cluster, runners):
    url = cluster[0]
    assert httpx2.get(url + "/metrics").status_code == 401
    refused = httpx2.get(url + "/metrics", headers={"authorization": f"Bearer {TENANT}"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "insufficient_scope")
    app, _ = behind([server(runners[0], is_open=True)], None, is_open=True)
    with serving(app) as open_url:
        assert set(by_server(scrape(open_url, key="none"), "jaxlora:healthy")) == {"replica-0"}
        assert httpx2.get(open_url + "/v1/models").status_code == 401


def test_a_server_that_refuses_is_not_up(runners):
    app, _ = behind([server(runners[0], is_open=False)], None, is_open=True)
    with serving(app) as url:
        assert by_server(scrape(url, key="none"), "jaxlora:server_up") == {"replica-0": 0, "keeper": 0}


def test_many_who_read_at_once_ask_the_servers_once(cluster, monkeypatch):
    url, _, (first, second), _ = cluster
    first.hangs = True
    monkeypatch.setattr(metrics, "SCRAPE_S", 4.0)
    with ThreadPoolExecutor(8) as threads:
        told = list(threads.map(lambda _: by_server(scrape(url), "jaxlora:server_up"), range(8)))
    assert told == [{"replica-0": 0, "replica-1": 1, "keeper": 1}] * 8
    assert second.asked == 1
    scrape(url)
    assert second.asked == 2


def test_other_requests_go_their_way(cluster):
    url = cluster[0]
    models = httpx2.get(url + "/v1/models", headers={"authorization": f"Bearer {ADMIN}"})
    assert models.json()["data"][0]["id"] == BASE
    assert httpx2.post(url + "/metrics", headers={"authorization": f"Bearer {ADMIN}"}).status_code == 405


def chat(url, said="hi"):
    body = {"model": FAKE, "messages": [{"role": "user", "content": said}]}
    return httpx2.post(url + "/v1/chat/completions", json=body, headers={"authorization": f"Bearer {ADMIN}"})


def test_what_the_front_did_is_counted():
    """A full replica's request goes to the other one; both gone, there is none for the next."""
    config = AppConfig(default_max_tokens=8, caller_of=by_key)
    full = FakeBackend(submit_error=Overloaded("the queue is full; retry later"), admit=0)
    first, second = LocalPeer(create_app(full, config)), LocalPeer(create_app(FakeBackend(), config))
    app, _ = behind([first, second], None, base=FAKE)
    with serving(app) as url:
        for n in range(8):  # the prompt draws which one is asked first
            assert chat(url, f"hi {n}").status_code == 200
        samples = scrape(url)
        sent, again = (
            by_server(samples, "jaxlora:front_sent_total"),
            samples["jaxlora:front_rerouted_total", FRONT],
        )
        assert sent["replica-1"] == 8
        assert 0 < sent["replica-0"] == again < 8
        first.gone = second.gone = True
        assert chat(url).status_code == 503
        assert chat(url).status_code == 503
        samples = scrape(url)
    assert by_server(samples, "jaxlora:front_left_total") == {"replica-0": 1, "replica-1": 1}
    assert samples["jaxlora:front_unplaced_total", FRONT] == 1


def test_a_picker_of_endpoints_reads_the_whole_cluster_as_one(cluster, runners, world, monkeypatch):
    """The keeper is not among what answers; names of adapters are told where the settings say so."""
    url, peers, (first, _), _ = cluster
    idle = runners[0].watch.snapshot
    monkeypatch.setattr(runners[0].watch, "snapshot", replace(idle, waiting=3, running=2, free_pages=idle.pages // 2))
    samples = scrape(url)
    assert samples["jaxlora:cluster_requests_waiting", WHOLE] == 3
    assert samples["jaxlora:cluster_requests_running", WHOLE] == 2
    assert samples["jaxlora:cluster_kv_cache_usage_perc", WHOLE] == 0.25
    (info,) = [dict(labels) for name, labels in samples if name == "jaxlora:cluster_lora_requests_info"]
    names = [adapter.ref.name for adapter in world.adapters[:2]]
    assert info == {"max_lora": "6", "running_lora_adapters": ",".join(sorted(names)), "waiting_lora_adapters": ""}
    peers.leave("replica-0", first)
    peers.leave("replica-1", peers.replicas["replica-1"])
    samples = scrape(url)
    assert samples["jaxlora:cluster_kv_cache_usage_perc", WHOLE] == 1


@pytest.mark.parametrize("adapters", [True, False])
def test_hot_adapters_and_how_many_replicas_they_have(runners, adapters):
    app, peers = behind([server(runner, is_open=True) for runner in runners], None, is_open=True, adapters=adapters)
    now = [0.0]
    peers.clock = lambda: now[0]
    busy = {("acme", "hot"): 10_000, ("acme", "mild"): 10}
    for n, name in enumerate(sorted(peers.replicas)):
        peers.router.report(name, replace(IDLE, asked_s=1.0, adapters=busy if n == 0 else {}), now[0])
    now[0] = 10.0
    with serving(app) as url:
        samples = scrape(url, key="none")
    copies = {
        dict(labels)["adapter"]: value for (name, labels), value in samples.items() if name == "jaxlora:front_copies"
    }
    most = samples["jaxlora:front_copies_most", FRONT]
    assert most > 3
    assert copies == ({"hot": most, "mild": 1} if adapters else {})
