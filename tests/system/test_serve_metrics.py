"""What Prometheus reads of a real small server: the format, the promised names, what they count, and what they never say."""

from __future__ import annotations

import io
import json
import logging
import re
import threading

import httpx2
import pytest
from fake_backend import serving
from prometheus_client.parser import text_string_to_metric_families
from serve_world import BASE, ask, with_resident

from jaxlora.config.base import ModelSection
from jaxlora.config.serving import ServeConfig
from jaxlora.core.errors import Unauthorized
from serve.access.caller import Caller
from serve.observability.logs import logging_to
from serve.observability.metrics import HttpMetrics, MetricsRoutes
from serve.runtime.device_thread import DeviceThread
from serve.runtime.snapshot import TrainingView
from serve.server.app import create_app
from serve.server.build import observing
from serve.server.gate import AppConfig

pytest_plugins = ["serve_fixtures"]

ADMIN, TENANT = "sk-admin-canary-key", "sk-tenant-canary-key"
PROMISED = {
    "vllm:num_requests_running": "gauge",
    "vllm:num_requests_waiting": "gauge",
    "vllm:kv_cache_usage_perc": "gauge",
    "vllm:lora_requests_info": "gauge",
    "vllm:cache_config_info": "gauge",
    "vllm:prompt_tokens": "counter",
    "vllm:generation_tokens": "counter",
    "vllm:request_success": "counter",
    "vllm:prefix_cache_queries": "counter",
    "vllm:prefix_cache_hits": "counter",
    "vllm:num_preemptions": "counter",
    "vllm:time_to_first_token_seconds": "histogram",
    "vllm:inter_token_latency_seconds": "histogram",
    "vllm:e2e_request_latency_seconds": "histogram",
    "vllm:request_queue_time_seconds": "histogram",
    "jaxlora:slots": "gauge",
    "jaxlora:slots_pinned": "gauge",
    "jaxlora:adapters_waiting": "gauge",
    "jaxlora:adapter_wait_seconds": "histogram",
    "jaxlora:adapter_swaps": "counter",
    "jaxlora:slot_changes": "counter",
    "jaxlora:adapter_loads": "counter",
    "jaxlora:host_adapter_bytes": "gauge",
    "jaxlora:versions_unsaved": "gauge",
    "jaxlora:parked_kv_pages": "gauge",
    "jaxlora:freshness_seconds": "histogram",
    "jaxlora:device_seconds": "counter",
    "jaxlora:training_tokens": "counter",
    "jaxlora:training_steps": "counter",
    "jaxlora:jobs": "gauge",
    "jaxlora:http_requests": "counter",
    "jaxlora:refusals": "counter",
    "jaxlora:compiles": "counter",
    "jaxlora:healthy": "gauge",
}


def by_key(connection):
    """Two keys; no others."""
    key = connection.headers.get("authorization", "").removeprefix("Bearer ")
    if key not in (ADMIN, TENANT):
        raise Unauthorized("no valid key")
    return Caller(owner="acme", admin=key == ADMIN)


@pytest.fixture(scope="module")
def served(world):
    """(url, runner, what was logged as JSON lines)."""
    runner, log = DeviceThread(world.engine(), base_name=BASE), io.StringIO()
    runner.watch.training = lambda: TrainingView(tokens=70, steps=7, jobs={"running": 1, "failed": 0})
    config = ServeConfig(model=ModelSection(path="tiny"), metrics_adapters=True)
    with observing(runner, config) as observers, logging_to(log, as_json=True):
        runner.start()
        app = create_app(
            runner,
            AppConfig(
                default_max_tokens=8,
                caller_of=by_key,
                routers=observers.routers,
                listeners=observers.listeners,
                open_paths=observers.open_paths,
            ),
        )
        with observers.compiles, serving(app) as url:
            yield url, runner, log
        runner.stop()


@pytest.fixture
def http(served):
    with httpx2.Client(base_url=served[0], headers={"authorization": f"Bearer {ADMIN}"}, timeout=20) as client:
        yield client


def scrape(http):
    """{(sample, labels): value} and {family: kind}, as Prometheus' own parser reads them."""
    answer = http.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=")
    families = list(text_string_to_metric_families(answer.text))
    samples = {(s.name, tuple(sorted(s.labels.items()))): s.value for f in families for s in f.samples}
    assert len(samples) == sum(len(f.samples) for f in families), "a sample is told twice"
    return samples, {f.name: f.type for f in families}


def value(samples, name, **labels):
    (found,) = [v for (n, own), v in samples.items() if n == name and labels.items() <= dict(own).items()]
    return found


def complete(http, model, prompt="one two three", max_tokens=6, **fields):
    body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True} | fields
    return http.post("/v1/completions", json=body)


def test_every_promised_name_is_there_in_a_format_that_parses(http):
    complete(http, BASE)
    samples, kinds = scrape(http)
    assert {name: kinds.get(name) for name in PROMISED} == PROMISED
    ours = [dict(own) for (name, own) in samples if name.startswith("vllm:")]
    assert {own["model_name"] for own in ours} == {BASE}


@pytest.mark.parametrize(
    "accept",
    [
        "application/openmetrics-text; version=1.0.0",
        "application/openmetrics-text;version=1.0.0;q=0.5,application/openmetrics-text;version=0.0.1;q=0.4,*/*;q=0.2",
        "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,text/plain;version=0.0.4;q=0.3",
    ],
    ids=["bare", "Prometheus 2", "Prometheus 3"],
)
def test_openmetrics_is_told_to_who_asks_for_it_with_the_same_names(http, accept):
    answer = http.get("/metrics", headers={"accept": accept})
    assert answer.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    assert answer.text.endswith("# EOF\n")
    told = set(re.findall(r"^([a-zA-Z_:][\w:]*)", answer.text, re.M))
    plain = {name for name, _ in scrape(http)[0]}
    assert plain <= told


def test_counts_grow_by_what_was_asked(http, world, served):
    before, _ = scrape(http)
    names = [a.ref.name for a in world.adapters[:2]]
    prompt = list(range(4, 17))
    for name in names:
        for _ in range(2):  # the second finds the first one's pages
            assert complete(http, name, prompt).status_code == 200
    assert complete(http, names[0], prompt, stream=True).text.endswith("[DONE]\n\n")
    assert complete(http, "nobody").status_code == 404
    after, kinds = scrape(http)

    def grown(name, **labels):
        return value(after, name, **labels) - value(before, name, **labels)

    assert grown("vllm:prompt_tokens_total") == 5 * len(prompt)
    assert grown("vllm:generation_tokens_total") == 5 * 6
    assert grown("vllm:request_success_total", finished_reason="length") == 5
    assert grown("vllm:request_success_total", finished_reason="error") == 0
    assert grown("vllm:time_to_first_token_seconds_count") == 5
    assert grown("vllm:inter_token_latency_seconds_count") == 5 * 5
    assert grown("vllm:e2e_request_latency_seconds_count") == 5
    assert grown("vllm:request_queue_time_seconds_count") == 5
    assert grown("vllm:prefix_cache_queries_total") == 5 * len(prompt)
    assert grown("vllm:prefix_cache_hits_total") == 3 * 12  # three pages of four tokens
    assert value(after, "jaxlora:http_requests_total", route="/v1/completions", status="404", method="POST") == 1
    assert value(after, "jaxlora:refusals_total", code="model_not_found") == 1
    assert value(after, "jaxlora:training_steps_total") == 7
    assert value(after, "vllm:cache_config_info", block_size="4", num_gpu_blocks="64") == 1
    assert value(after, "jaxlora:jobs", state="running") == 1
    assert grown("jaxlora:compiles_total") == 0
    assert value(after, "vllm:num_requests_running") == value(after, "vllm:kv_cache_usage_perc") == 0
    growing = {f"{name}{end}" for name, kind in kinds.items() for end in ENDS.get(kind, ())}
    shrunk = {
        key: (old, after.get(key)) for key, old in before.items() if key[0] in growing and after.get(key, -1) < old
    }
    assert shrunk == {}


ENDS = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum")}


def test_histograms_are_cumulative_and_end_at_their_count(http):
    complete(http, BASE)
    samples, kinds = scrape(http)
    for name in [name for name, kind in kinds.items() if kind == "histogram"]:
        buckets = [(float(dict(own)["le"]), v) for (n, own), v in samples.items() if n == f"{name}_bucket"]
        counts = [v for _, v in sorted(buckets)]
        assert counts == sorted(counts)
        assert counts[-1] == value(samples, f"{name}_count")


def test_slots_add_up_and_residents_are_named_for_routers(http, world, served):
    runner = served[1]
    refs = [a.ref for a in world.adapters[:4]]  # the pool has three slots
    for ref in refs:
        assert complete(http, ref.name, max_tokens=2).status_code == 200
    samples, _ = scrape(http)
    states = [value(samples, "jaxlora:slots", state=state) for state in ("active", "idle", "free")]
    assert sum(states) == 3
    assert value(samples, "jaxlora:adapter_loads_total") >= 4
    resident = ",".join(sorted(ref.name for ref in runner.engine.slots.resident()))
    (info,) = [dict(own) for (name, own) in samples if name == "vllm:lora_requests_info"]
    assert (info["running_lora_adapters"], info["waiting_lora_adapters"], info["max_lora"]) == (resident, "", "3")
    assert refs[0].name not in resident  # it had to leave, and no sample of it stays


def test_a_scrape_works_while_the_device_thread_is_busy(http, served):
    runner, gate = served[1], threading.Event()
    runner._send(gate.wait)
    try:
        samples, _ = scrape(http)
        assert value(samples, "jaxlora:healthy") == 1
        assert http.get("/v1/stats").status_code == 200
    finally:
        gate.set()


def test_metrics_and_stats_need_an_admin(served):
    url = served[0]
    for path in ("/metrics", "/v1/stats"):
        assert httpx2.get(url + path).status_code == 401
        answer = httpx2.get(url + path, headers={"authorization": f"Bearer {TENANT}"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "insufficient_scope")


def test_open_metrics_need_no_key(world):
    wire = MetricsRoutes(HttpMetrics(), is_open=True)
    app = create_app(
        DeviceThread(world.engine(), base_name=BASE),
        AppConfig(
            default_max_tokens=8,
            caller_of=by_key,
            routers=[wire.router()],
            open_paths={"/metrics"},
        ),
    )
    with serving(app) as url:
        assert httpx2.get(url + "/metrics").status_code == 200
        assert httpx2.get(url + "/v1/models").status_code == 401


def test_adapters_are_named_only_where_the_operator_says_so(world):
    runner = DeviceThread(with_resident(world.engine(), world.adapters[0]), base_name=BASE)
    with observing(runner, ServeConfig(model=ModelSection(path="tiny"))) as observers:
        app = create_app(
            runner, AppConfig(default_max_tokens=8, routers=observers.routers, listeners=observers.listeners)
        )
        with serving(app) as url:
            text = httpx2.get(url + "/metrics").text
    assert "lora_requests_info" not in text
    assert world.adapters[0].ref.name not in text
    assert "acme" not in text


def test_what_a_client_invents_makes_no_series(http):
    http.request("BREW", "/v1/models")
    http.get("/no-such-canary-path")
    text = http.get("/metrics").text
    assert "BREW" not in text
    assert "canary-path" not in text
    assert 'route="none"' in text
    assert 'method="other"' in text


@pytest.mark.fault("T8")
def test_no_prompt_and_no_key_is_ever_logged_or_counted(http, served, world):
    """Canaries in every place that a client can fill, in answers that end well and badly."""
    _, _, log = served
    canary = "canary-prompt-7f3a"
    name = world.adapters[0].ref.name
    complete(http, name, canary)
    complete(http, name, canary, stream=True)
    complete(http, canary, canary)  # a model that is none
    complete(http, name, canary, temperature=canary)
    complete(http, name, canary * 40)  # over the context
    http.post("/v1/completions", content=f'{{"model": "{canary}'.encode())
    http.get(f"/v1/models/{canary}", params={"q": canary}, headers={"user-agent": canary, "traceparent": canary})
    http.post(f"/{canary}", headers={"authorization": f"Bearer {canary}"})
    body = {"model": name, "messages": [{"role": "user", "content": canary}], "max_tokens": 2}
    http.post("/v1/chat/completions", json=body)
    logging.getLogger("serve").error("a failure of our own")
    told = log.getvalue()
    lines = [json.loads(line) for line in told.splitlines()]
    assert {line["route"] for line in lines if "route" in line} >= {"/v1/completions", "/v1/models/{model}"}
    assert any(line["event"] == "a failure of our own" for line in lines)
    metrics = http.get("/metrics").text + http.get("/v1/stats").text
    for secret in (canary, ADMIN, TENANT):
        assert secret not in told
        assert secret not in metrics


def test_requests_that_end_otherwise_are_told_apart(world):
    engine = world.engine()
    engine.submit(ask("gone"))
    engine.step()
    engine.cancel("gone")
    engine.submit(ask("scored", prompt=6, max_tokens=0, prompt_logprobs=0))
    while engine.has_work:
        engine.step()
    assert engine.telemetry.ended == {"abort": 1, "length": 1}
    assert engine.telemetry.prompt_tokens == 11
    assert engine.telemetry.first_token_s.total == 1  # the one that was to score had no token
    assert engine.telemetry.whole_s.total == 1
