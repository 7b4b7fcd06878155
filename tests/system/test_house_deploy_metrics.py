"""The dashboards and the alert rules ask for what the server exports: names, labels, their values and units."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from prometheus_client import CollectorRegistry, ProcessCollector
from serve_world import BASE, with_resident

from jaxlora.config.cluster import RouterSection
from serve.cluster.metrics import FRONT, KEEPER, Exposition, front_metrics
from serve.cluster.relay import Peers
from serve.cluster.router import Router
from serve.http.request_log import Answered
from serve.observability.metrics import HttpMetrics, ServerMetrics
from serve.runtime.device_thread import DeviceThread
from serve.runtime.snapshot import TrainingView
from train.jobs.status import ENDED, JobStatus

pytest_plugins = ["serve_fixtures"]
DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
DASHBOARDS = [json.loads(path.read_text()) for path in sorted((DEPLOY / "grafana/dashboards").iterdir())]
PANELS = [panel for board in DASHBOARDS for panel in board["panels"] if panel["type"] != "row"]
(GROUP,) = yaml.safe_load((DEPLOY / "prometheus/alerts.yml").read_text())["groups"]
SCRAPED = {"instance", "job"}  # labels that Prometheus adds
WORDS = {"and", "or", "unless"}  # of PromQL, between series
GROUPING = r"\b(?:by|without|on|ignoring)\s*\(([^)]*)\)"
type Series = dict[str, dict[str, set[str]]]  # sample → label → its values


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A series that an expression asks for."""

    name: str
    matchers: tuple[tuple[str, str, str], ...]  # label, operator, value


def asked(expression: str) -> list[Asked]:
    """The series of an expression of PromQL, in order."""
    text = re.sub(GROUPING + r"|\[[^\]]*\]", " ", expression)
    found = re.findall(r"([a-zA-Z_:][\w:]*)\s*(\(|\{[^}]*\})?", text)
    return [
        Asked(name=name, matchers=tuple(re.findall(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"', rest)))
        for name, rest in found
        if rest != "(" and name not in WORDS
    ]


def grouped(expression: str) -> set[str]:
    """The labels that an expression sums or joins by."""
    return {label.strip() for labels in re.findall(GROUPING, expression) for label in labels.split(",")}


@pytest.fixture(scope="module")
def series(world) -> Series:
    """What a front tells of two small servers: they have answered, refused and trained, and nothing is compiled for them."""
    runner = DeviceThread(with_resident(world.engine(), world.adapters[0]), base_name=BASE)
    jobs = {state: 1 for state in JobStatus if state not in ENDED}
    runner.watch.training = lambda: TrainingView(tokens=1, steps=1, jobs=jobs)
    runner.watch.rest()
    http = HttpMetrics()
    for status, code in ((200, None), (503, "overloaded")):
        http.heard(
            Answered(
                request_id="one",
                method="GET",
                route="/health",
                status=status,
                tenant=None,
                began_s=0.0,
                duration_s=0.1,
                code=code,
                generated=None,
                traceparent=None,
            )
        )
    registry = CollectorRegistry()
    for collector in (ServerMetrics(runner, adapters=True, compiles=lambda: 0), http):
        registry.register(collector)
    ProcessCollector(registry=registry)
    told = {server: list(registry.collect()) for server in ("replica-0", KEEPER)}
    peers = Peers(Router(RouterSection()))
    for counts in (peers.traffic.sent, peers.traffic.left):
        counts["replica-0"] += 1
    peers.known = {"replica-0"}
    told[FRONT] = list(front_metrics(peers, told, adapters=True))
    found: Series = {"up": {"job": {"jaxlora"}}}  # which Prometheus makes
    for family in Exposition(told, adapters=True).collect():
        for sample in family.samples:
            labels = found.setdefault(sample.name, defaultdict(set))
            for label, value in sample.labels.items():
                labels[label].add(value)
    return found


def mistakes(expression: str, series: Series) -> list[str]:
    """What an expression asks for that the server does not tell."""
    wrong, known = [], set(SCRAPED)
    for one in asked(expression):
        if one.name not in series:
            wrong.append(f"no {one.name}")
            continue
        labels = series[one.name]
        known |= set(labels)
        for label, operator, value in one.matchers:
            if label in SCRAPED:
                continue
            values = labels.get(label, set())
            matched = [v for v in values if (v == value if operator in "!=" else re.fullmatch(value, v))]
            if not matched:
                wrong.append(f"no {one.name}{{{label}{operator}{value!r}}} among {sorted(values)}")
    return wrong + [f"no label {label}" for label in sorted(grouped(expression) - known)]


@pytest.mark.parametrize(
    ("expression", "wrong"),
    [
        ("sum by (state) (rate(jaxlora:slots{state='idle'}[5m]))", []),
        ('rate(vllm:tokens_total{instance="a"}[5m]) > 0 and on (instance) up == 1', ["no vllm:tokens_total"]),
        ('jaxlora:jobs{state="runing"}', ["no jaxlora:jobs{state='runing'}"]),
        ("sum by (tenant) (jaxlora:slots)", ["no label tenant"]),
    ],
)
def test_a_wrong_expression_would_be_found(series, expression, wrong):
    found = mistakes(expression, series)
    assert len(found) == len(wrong)
    assert all(a.startswith(b[:-1]) for a, b in zip(found, wrong, strict=True)), found


@pytest.mark.parametrize("rule", GROUP["rules"], ids=lambda rule: rule["alert"])
def test_each_rule_asks_for_what_is_exported(series, rule):
    assert asked(rule["expr"])
    assert mistakes(rule["expr"], series) == []
    told = set(re.findall(r"\$labels\.(\w+)", json.dumps(rule["annotations"])))
    kept = set() if grouped(rule["expr"]) else set(series[asked(rule["expr"])[0].name])
    assert told <= SCRAPED | kept


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_each_panel_asks_for_what_is_exported(series, panel):
    for target in panel["targets"]:
        expression = target["expr"].replace("$__rate_interval", "5m")
        expression = re.sub(r"\$(instance|replica)", ".*", expression)
        assert asked(expression)
        assert mistakes(expression, series) == []
        shown = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
        assert shown <= grouped(expression) | SCRAPED
        assert all(("instance", "=~", ".*") in one.matchers for one in asked(expression))


def unit(expression: str) -> set[str]:
    """The units that fit the value of an expression, by the suffixes of Prometheus' names."""
    names = [one.name for one in asked(expression)]
    counter = names[0].removesuffix("_total")
    if "histogram_quantile" in expression:
        assert names[0].endswith("_seconds_bucket")
        return {"s"}
    if " / " in expression or counter.endswith("_perc"):
        return {"percentunit"}
    if "rate(" not in expression:
        return {"bytes"} if counter.endswith("_bytes") else {"short", "none"}
    assert names[0].endswith("_total"), "a rate is of a counter"
    if counter.endswith("_seconds"):
        return {"percentunit", "suffix: cores"}  # seconds of a second
    return {"suffix: tokens/s"} if counter.endswith("tokens") else {"reqps", "ops"}


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_each_panel_has_the_unit_of_its_metric(panel):
    for target in panel["targets"]:
        assert panel["fieldConfig"]["defaults"]["unit"] in unit(target["expr"])


@pytest.mark.parametrize("board", DASHBOARDS, ids=lambda board: board["uid"])
def test_a_dashboard_is_one_that_grafana_takes(board):
    """The fields that its schema requires; ids are distinct, and no panel lies over another or outside the 24 columns."""
    assert {"uid", "title", "schemaVersion", "templating", "time", "panels"} <= set(board)
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken
        assert max(x for x, _ in cells) < 24
        taken |= cells
    for panel in (panel for panel in board["panels"] if panel["type"] != "row"):
        assert panel["type"] in ("timeseries", "stat")
        assert panel["description"].endswith(".")
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    variables = {variable["name"] for variable in board["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(board))) - {"__rate_interval", "__all"}
    assert used == variables
    assert len({board["uid"] for board in DASHBOARDS}) == len(DASHBOARDS)


def test_each_replica_has_a_row_of_its_own(series):
    """The row is repeated for each value of the label, and nothing in it or below it shows another server."""
    (board,) = [board for board in DASHBOARDS if board["uid"] == "jaxlora-cluster"]
    (repeated,) = [panel for panel in board["panels"] if "repeat" in panel]
    assert (repeated["type"], repeated["repeat"], repeated["title"]) == ("row", "replica", "$replica")
    (variable,) = [variable for variable in board["templating"]["list"] if variable["name"] == "replica"]
    name, label = re.fullmatch(r"label_values\(([\w:]+)\{.*\}, (\w+)\)", variable["definition"]).groups()
    assert series[name][label] == {"replica-0", "keeper"}
    below = [panel for panel in board["panels"] if panel["gridPos"]["y"] > repeated["gridPos"]["y"]]
    for one in (one for panel in below for target in panel["targets"] for one in asked(target["expr"])):
        assert ("replica", "=~", "$replica") in one.matchers
        assert series[one.name]["replica"] >= {"replica-0"}
    wanted = {"vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:generation_tokens_total",
              "vllm:kv_cache_usage_perc", "jaxlora:slots", "jaxlora:adapter_swaps_total", "jaxlora:refusals_total"}  # fmt: skip
    assert wanted <= {one.name for panel in below for target in panel["targets"] for one in asked(target["expr"])}


def test_the_dashboards_show_whatever_the_rules_look_at():
    shown = {one.name for panel in PANELS for target in panel["targets"] for one in asked(target["expr"])}
    watched = {one.name for rule in GROUP["rules"] for one in asked(rule["expr"])} - {"up"}
    assert watched <= shown


def test_a_picker_of_endpoints_asks_for_what_is_exported(series):
    """One series of each name, as the picker takes the first; adapters by the labels that it knows."""
    (text,) = [
        one["data"]["picker.yaml"]
        for one in yaml.safe_load_all((DEPLOY / "kuberay/gateway.yaml").read_text())
        if one["kind"] == "ConfigMap"
    ]
    (engine,) = next(
        plugin["parameters"]["engineConfigs"] for plugin in yaml.safe_load(text)["plugins"] if "parameters" in plugin
    )
    specs = {key: name for key, name in engine.items() if key.endswith("Spec")}
    assert set(specs) == {"queuedRequestsSpec", "runningRequestsSpec", "kvUsageSpec", "loraSpec"}
    assert all("replica" not in series[name] for name in specs.values())
    assert set(series[specs["loraSpec"]]) == {"max_lora", "running_lora_adapters", "waiting_lora_adapters"}
