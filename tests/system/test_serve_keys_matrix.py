"""Who may see what, over the whole server as `jaxlora serve` joins it: no route without a key, and nothing of another tenant's.

A row of MATRIX names an object of the tenant `owner` by a word such as FILE.  With the key of `other` the answer must be,
byte for byte, that to an id which nobody has.  A new route with an id in its path fails the test until it has a row.
"""

from __future__ import annotations

import re
from contextlib import closing
from dataclasses import dataclass, replace

import httpx2
import pytest
from database_world import checkpoint_record, event, gradient_record, job_record
from fake_backend import serving
from fastapi.routing import APIRoute
from starlette.routing import Route
from whole_world import WORKSPACE, bearer, joined, leaves, whole_config

from jaxlora.storage.adapter_store import AdapterStore
from serve.access.keys import create_key
from serve.db.database import Database
from serve.db.gradient import StoredGradient
from serve.db.job_spec import JobSpec, Resolved
from serve.db.jobs import StoredJobs
from serve.db.keys import StoredKeys
from serve.http.schema import DOCUMENT_PATH
from serve.http.strict_json import JsonRoute
from serve.server.gate import OPEN_PATHS

pytest_plugins = ["serve_fixtures"]

JOB_ID = "ftjob-" + "0123456789ab" + "c" * 20
# What `owner` has, and what nobody has, of the same form.
IDS = {
    "JOB": (JOB_ID, "ftjob-" + "f" * 32),
    "ADAPTER": ("secret", "nobody"),
    "GRADIENT": ("a" * 50, "b" * 50),
    "MODEL": ("ft:tiny:owner:bot:0123456789ab", "ft:tiny:owner:bot:ffffffffffff"),
    "CHECKPOINT": ("ft:tiny:owner:bot:0123456789ab:ckpt-step-10", "ft:tiny:owner:bot:ffffffffffff:ckpt-step-10"),
}
HI = [{"role": "user", "content": "hi"}]
# (method, path, JSON body).  The path of a route with an id is written as the route is, the id in the place of {…}.
MATRIX = [
    ("GET", "/v1/files/FILE", None),
    ("GET", "/v1/files/FILE/content", None),
    ("GET", "/v1/files?after=FILE", None),
    ("GET", "/v1/fine_tuning/jobs/JOB", None),
    ("GET", "/v1/fine_tuning/jobs/JOB/events", None),
    ("GET", "/v1/fine_tuning/jobs/JOB/events?stream=true", None),
    ("GET", "/v1/fine_tuning/jobs/JOB/checkpoints", None),
    ("GET", "/v1/fine_tuning/jobs?after=JOB", None),
    ("POST", "/v1/fine_tuning/jobs/JOB/cancel", None),
    ("POST", "/v1/fine_tuning/jobs/JOB/pause", None),
    ("POST", "/v1/fine_tuning/jobs/JOB/resume", None),
    ("POST", "/v1/fine_tuning/jobs", {"model": "tiny", "training_file": "FILE", "lora": {"r": 2}}),
    ("POST", "/v1/fine_tuning/jobs", {"model": "ADAPTER", "training_file": "FILE"}),
    ("GET", "/v1/models/ADAPTER", None),
    ("GET", "/v1/models/owner%2FADAPTER", None),
    ("GET", "/v1/models/ADAPTER@1", None),
    ("GET", "/v1/models/MODEL", None),
    ("GET", "/v1/models/CHECKPOINT", None),
    ("GET", "/v1/models?after=ADAPTER", None),
    ("POST", "/v1/chat/completions", {"model": "ADAPTER", "messages": HI}),
    ("POST", "/v1/completions", {"model": "MODEL", "prompt": "hi"}),
    ("POST", "/v1/responses", {"model": "CHECKPOINT", "input": "hi"}),
    ("POST", "/tokenize", {"model": "ADAPTER", "prompt": "hi"}),
    ("POST", "/detokenize", {"model": "owner/ADAPTER", "tokens": [1]}),
    ("GET", "/v1/adapters/ADAPTER", None),
    ("GET", "/v1/adapters/owner/ADAPTER", None),
    ("GET", "/v1/adapters/ADAPTER@1", None),
    ("GET", "/v1/adapters/ADAPTER/versions", None),
    ("GET", "/v1/adapters/ADAPTER/download", None),
    ("GET", "/v1/adapters?after=ADAPTER", None),
    ("POST", "/v1/adapters/ADAPTER/pin", None),
    ("POST", "/v1/adapters/ADAPTER/unpin", None),
    ("POST", "/v1/unload_lora_adapter", {"lora_name": "ADAPTER"}),
    ("GET", "/api/models/GRADIENT", None),
    ("POST", "/api/models/GRADIENT/fine-tune", {"samples": [{"inputs": "hi"}]}),
    ("POST", "/api/models/GRADIENT/complete", {"query": "hi"}),
    ("DELETE", "/api/models/GRADIENT", None),
    ("GET", "/v1/responses/JOB", None),
    ("DELETE", "/v1/responses/JOB", None),
    ("DELETE", "/v1/models/MODEL", None),
    ("DELETE", "/v1/adapters/ADAPTER", None),
    ("DELETE", "/v1/files/FILE", None),
]
LISTS = ("/v1/files", "/v1/fine_tuning/jobs", "/v1/models", "/v1/adapters", "/api/models")
# Rows whose objects their owner has no right to, or that nobody keeps: everyone is told the same.
NOBODYS = ("/pin", "/unpin", "/v1/unload_lora_adapter", "/v1/responses/")


@dataclass(frozen=True)
class Whole:
    """A server with something of a tenant's in it, and keys."""

    url: str
    routes: list[Route]
    owner: str
    other: str
    ids: dict[str, tuple[str, str]]


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """Nothing is compiled and the device thread does not run: who is refused never gets that far."""
    folder = tmp_path_factory.mktemp("whole")
    settings = whole_config(folder)
    with closing(Database(settings.database_url)) as database:
        keys = [create_key(StoredKeys(database), tenant)[1] for tenant in ("owner", "other")]
        done = replace(
            job_record(JOB_ID, "owner", created_s=1.0, status="succeeded"),
            adapter="ft-0123456789ab",
            request=JobSpec(model="tiny", training_file="file-x", suffix="bot"),
            resolved=Resolved(seed=7),
            progress={"final_version": 1},
        )
        StoredJobs(database).insert(done, events=[event("made")])
        StoredJobs(database).save(done, checkpoints=[checkpoint_record(1, job=JOB_ID)])
        gradient = replace(
            gradient_record(IDS["GRADIENT"][0], "owner"),
            adapter="secret",
            workspace=WORKSPACE,
            settings={"name": "bot"},
        )
        StoredGradient(database).insert(gradient)
    store = AdapterStore(settings.adapters, host_bytes=10**8)
    for name in ("secret", "ft-0123456789ab"):
        store.add("owner", name, world.adapters[0])
    with joined(world, settings, store) as server, serving(server.app) as url:
        form = {"data": {"purpose": "fine-tune"}, "files": {"file": ("a.jsonl", b'{"text": "abc"}\n')}}
        file = httpx2.post(url + "/v1/files", headers=bearer(keys[0]), **form).json()["id"]
        yield Whole(url, list(leaves(server.app.routes)), *keys, IDS | {"FILE": (file, "file-" + "f" * 32)})
    store.close()


def written(whole, value, which):
    """The path or body with ids in the place of their words: the owner's, or nobody's."""
    if isinstance(value, dict):
        return {k: written(whole, v, which) for k, v in value.items()}
    if not isinstance(value, str):
        return value
    return re.sub("|".join(whole.ids), lambda m: whole.ids[m[0]][which], value)


def ask(whole, key, row, which):
    method, path, body = row
    url = whole.url + written(whole, path, which)
    return httpx2.request(method, url, json=written(whole, body, which), headers=bearer(key), timeout=20)


def told(whole, answer):
    """Status and body, with every id of either sort made one."""
    text = answer.text
    for word, ids in whole.ids.items():
        for id in ids:
            text = text.replace(id, word)
    return answer.status_code, text


def routes(whole):
    """(method, path as the route is written) of the whole server."""
    found = [(m, r.path) for r in whole.routes for m in r.methods or ()]
    return sorted(set(found))


def test_every_body_is_read_as_strict_json(whole):
    """Else NaN, lone surrogates and bottomless nesting reach what is behind the route."""
    reading = [route for route in whole.routes if isinstance(route, APIRoute) and route.body_field is not None]
    assert len(reading) > 8
    assert [route.path for route in reading if not isinstance(route, JsonRoute)] == []


@pytest.mark.fault("T10")
def test_every_route_needs_a_key_but_health(whole):
    assert len(routes(whole)) > 25
    open_ones = set()
    with httpx2.Client(base_url=whole.url, timeout=20) as client:
        for method, path in routes(whole):
            concrete = re.sub(r"\{[^}]*\}", "x", path)
            for headers in ({}, bearer("jl-" + "x" * 43)):
                if client.request(method, concrete, headers=headers).status_code != 401:
                    open_ones.add(path)
    assert open_ones == OPEN_PATHS == {"/health", "/ready", "/", "/docs", "/openapi.json"}
    assert httpx2.get(whole.url + "/no/such/route").status_code == 401


@pytest.mark.fault("T1")
@pytest.mark.parametrize(
    "row", MATRIX, ids=lambda r: f"{r[0]} {r[1]} {'' if r[2] is None else next(iter(r[2].values()))}"
)
def test_anothers_object_is_told_like_one_that_is_not_there(whole, row):
    foreign, unknown = ask(whole, whole.other, row, 0), ask(whole, whole.other, row, 1)
    assert told(whole, foreign) == told(whole, unknown)
    assert ("error" in foreign.json()) is not row[1].startswith("/api/")  # in the shape of its wire
    expected = {400, 404} if "after=" in row[1] else {403, 404} if row[1].endswith(NOBODYS[:3]) else {404}
    assert foreign.status_code in expected
    drop = {"x-request-id", "date", "content-length"}
    assert [h for h in foreign.headers.items() if h[0] not in drop] == [
        h for h in unknown.headers.items() if h[0] not in drop
    ]


def test_the_document_types_every_answer(whole):
    document = httpx2.get(whole.url + DOCUMENT_PATH, headers=bearer(whole.owner)).json()
    answers = {
        (method, path, media): content.get("schema", content.get("itemSchema"))
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
        for media, content in operation["responses"].get("200", {"content": {}})["content"].items()
    }
    assert len(answers) > 30
    assert [k for k, schema in answers.items() if not schema or not schema.keys() & {"$ref", "type"}] == []
    assert [k for k, schema in answers.items() if k[2] == "application/json" and "$ref" not in schema] == []


@pytest.mark.fault("T1")
def test_lists_have_nothing_of_another_tenants(whole):
    secrets = [ids[0] for ids in whole.ids.values()]
    for path in LISTS:
        owners, others = (httpx2.get(whole.url + path, headers=bearer(k)).text for k in (whole.owner, whole.other))
        assert [s for s in secrets if s in others] == []
        assert [s for s in secrets if s in owners] != []


@pytest.mark.fault("T1")
def test_every_route_with_an_id_has_a_row(whole):
    rows = set()
    for method, path, _ in MATRIX:
        words = written(whole, path.partition("?")[0], 0).replace("%2F", "/")
        for route in whole.routes:
            if method in (route.methods or ()) and route.path_regex.match(words):
                rows.add((method, route.path))
                break
    assert {r for r in routes(whole) if "{" in r[1]} - rows == set()


@pytest.mark.parametrize(
    "row", [r for r in MATRIX if r[0] == "GET" and not any(n in r[1] for n in NOBODYS)], ids=lambda r: r[1]
)
def test_the_owner_sees_all_of_it(whole, row):
    """The rows above name what is really there."""
    answer = ask(whole, whole.owner, row, 0)
    assert answer.status_code == 200, answer.text
