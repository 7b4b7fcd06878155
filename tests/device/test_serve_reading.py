"""A server that only reads: the database and the adapters are another's, who changes them meanwhile."""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace

import httpx2
import pytest
from fake_backend import serving
from whole_world import bearer, joined, whole_config

from jaxlora.checkpoints.load import Opened
from jaxlora.core.errors import StateInvalid
from jaxlora.core.lora import AdapterWeights
from jaxlora.storage.adapter_store import AdapterStore
from serve.access.keys import create_key
from serve.cluster.replica import report_of
from serve.db.database import Database
from serve.db.keys import StoredKeys
from serve.http.drain import Drain
from serve.server.app import create_app
from serve.server.build import assembled
from serve.server.instance import followed_base, followed_instance, opened_instance, same_base

pytest_plugins = ["serve_fixtures"]


@pytest.fixture
def opened(world) -> Opened:
    return world.opened("weights")


@pytest.fixture
def settings(tmp_path):
    return whole_config(tmp_path)


@pytest.fixture
def writer(world, opened, settings):
    """The store of a server that has the folder and the database, and the server."""
    with opened_instance(settings) as instance:
        same_base(instance.database, settings, opened)
        store = AdapterStore(settings.adapters, host_bytes=10**8)
        try:
            with joined(world, settings, store) as it:
                yield store, it
        finally:
            store.close()


@pytest.fixture
def reader(writer, opened, settings):
    """The server that reads.  Nothing is compiled and its device thread does not run."""
    with contextlib.ExitStack() as stack:
        instance = stack.enter_context(followed_instance(settings))
        base = followed_base(instance.database, opened)
        server = stack.enter_context(assembled(settings, instance, base, Drain()))
        server.runner.stop = lambda: None  # it was never started
        yield instance, server


@pytest.fixture
def client(reader):
    with serving(create_app(reader[1].runner, reader[1].own.app)) as url, httpx2.Client(base_url=url) as client:
        yield client


def add(world, store, name="bot"):
    adapter = world.adapters[0]
    ref = store.add(
        "local", name, AdapterWeights(spec=adapter.spec, base_hash=adapter.base_hash, weights=adapter.weights)
    )
    store.wait_saved(ref)
    return ref


def test_what_is_stored_is_listed_at_once_and_what_is_deleted_is_gone(world, writer, reader, client):
    store, _ = writer
    ref = add(world, store)
    assert client.get("/v1/models/bot").json()["version"] == 1
    assert reader[1].runner.resolve("local", "bot") == ref
    add(world, store)
    assert [card["version"] for card in client.get("/v1/models").json()["data"]] == [None, 2]
    store.delete("local", "bot")
    assert client.get("/v1/models/bot").status_code == 404


def test_a_key_that_is_made_shuts_out_all_others(writer, client, settings):
    with contextlib.closing(Database(settings.database_url)) as database:
        _, key = create_key(StoredKeys(database), "acme")
    ends = time.monotonic() + 5
    while client.get("/v1/models").status_code != 401 and time.monotonic() < ends:
        time.sleep(0.05)
    assert client.get("/v1/models").status_code == 401
    assert client.get("/v1/models", headers=bearer(key)).status_code == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/files"),
        ("POST", "/v1/adapters"),
        ("DELETE", "/v1/models/bot"),
        ("POST", "/v1/fine_tuning/jobs"),
        ("POST", "/v1/tuning"),
    ],
)
def test_it_has_no_route_that_changes_anything(client, method, path):
    assert client.request(method, path, json={}).status_code in (404, 405)


def test_gradients_wire_completes_and_does_not_train(client):
    headers = {"x-gradient-workspace-id": "lab"}
    (base,) = client.get("/api/models", headers=headers).json()["models"]
    assert base["capabilities"] == ["complete"]
    body = {"model": {"name": "mine", "baseModelId": base["id"]}}
    refused = client.post("/api/models", json=body, headers=headers)
    assert (refused.status_code, "does not train" in refused.text) == (400, True)


def test_the_database_refuses_what_would_change_it(reader):
    with pytest.raises(StateInvalid, match="only reads"):
        reader[0].database.write(lambda session: None)


def test_its_base_has_the_hash_that_the_adapters_name(writer, reader, opened):
    instance, _ = reader
    other = replace(opened, base_hash="of another template")
    assert followed_base(instance.database, other).base_hash == opened.base_hash
    with pytest.raises(StateInvalid, match="has not started with the base"):
        followed_base(instance.database, replace(opened, weights_hash="of another base"))


def test_the_other_one_must_have_started(settings, tmp_path):
    with pytest.raises(StateInvalid, match="must start first"), followed_instance(settings):
        pass
    other = whole_config(tmp_path / "other")
    with opened_instance(settings), opened_instance(other):
        pass
    (settings.adapters / "instance.json").write_bytes((other.adapters / "instance.json").read_bytes())
    with pytest.raises(StateInvalid, match="must start first"), followed_instance(settings):
        pass


def test_what_it_says_of_itself(world, reader):
    report = report_of(reader[1], 3.0)
    assert (report.asked_s, report.running_rows, report.waiting_tokens, report.adapters) == (3.0, 0, 0, {})
    assert (report.slots, report.rows) == (
        reader[1].runner.engine.pool_spec.slots,
        reader[1].runner.engine.config.rows,
    )
