"""Hostile names, places and moments (A6 to A8, T5, R9, C2, C12 of the fault table): nothing is read, written or left elsewhere."""

from __future__ import annotations

import http.client
import http.server
import json
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest
from adapters_world import (
    BASE,
    adapter_files,
    answer,
    as_,
    error_of,
    seeded,
    shelf_at,
    upload,
    write_files,
    zip_of,
)

from jaxlora.core.errors import StorageFailed
from serve.server.gate import FORM_BYTES

pytest_plugins = ["adapters_fixtures"]
MIB = 2**20


def exchange(url: str, method: str, path: str, headers: Mapping[str, str] | None = None) -> tuple[int, dict]:
    """(status, JSON) of a request without a body, of which nothing is normalised on the way."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=10)
    connection.request(method, path, headers=as_("root") | (headers or {}))
    response = connection.getresponse()
    status, body = response.status, response.read()
    connection.close()
    return status, json.loads(body)


# ---- A6: archives, over HTTP


@pytest.mark.fault("A6")
def test_an_archive_that_leads_out_of_its_folder_leaves_nothing(shelf, acme, unchanged, tmp_path):
    out = shelf.service._staging.parent
    status, code, message = error_of(upload(acme, "x", zip_of(adapter_files() | {"../../escaped": b"x"})))
    assert (status, code) == (400, "adapter_invalid")
    assert "paths must stay inside" in message
    assert [p.name for p in out.iterdir()] == ["staging"]


@pytest.mark.fault("A6")
def test_more_bytes_than_an_adapter_of_this_base_has_are_refused(shelf, acme, unchanged):
    limit = shelf.service.limits.total_bytes
    pieces = (bytes(MIB) for _ in range(limit // MIB + 2))  # no length is announced
    head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.zip"\r\n\r\n'
    headers = {"content-type": "multipart/form-data; boundary=x"}
    chunks = (c for part in ([head], pieces) for c in part)
    assert error_of(acme.post("/v1/adapters", content=chunks, headers=headers))[:2] == (413, "body_too_large")
    status, body = exchange(
        shelf.url, "POST", "/v1/adapters", headers | {"content-length": str(limit + FORM_BYTES + 1)}
    )
    assert (status, body["error"]["code"]) == (413, "body_too_large")  # before a byte of it
    assert f"at most {limit} bytes" in body["error"]["message"]
    # Other routes keep their own limit.
    assert error_of(acme.post("/v1/completions", content=bytes(300_000)))[:2] == (413, "body_too_large")


# ---- A7: names

HOSTILE_NAMES = {
    "parent": "../../etc/passwd",
    "parent encoded": "%2e%2e%2f%2e%2e%2fetc%2fpasswd",
    "parent encoded twice": "%252e%252e%252f",
    "parent of a tenant": "acme/../zoo/bot",
    "dots": "..",
    "dot": ".",
    "backslash": "..%5C..%5Cx",
    "NUL": "bot%00",
    "long": "a" * 300,
    "look-alike": "b%D0%BEt",
    "full-width": "%EF%BD%82ot",
    "space": "bot%20",
    "line break": "bot%0Ax",
    "absolute": "%2Fetc%2Fpasswd",
    "empty version": "bot@",
    "version zero": "bot@0",
    "version with a plus": "bot@+1",
    "version in other digits": "bot@%D9%A1",
    "version with zeros": "bot@01",
    "huge version": "bot@" + "9" * 50,
    "deep": "a/b/c/d",
    "colon": "bot:1",
    "dash": "-rf",
    "template": "{{7*7}}",
}
ID_ROUTES = [
    ("GET", "/v1/adapters/{}"),
    ("DELETE", "/v1/adapters/{}"),
    ("GET", "/v1/adapters/{}/versions"),
    ("GET", "/v1/adapters/{}/download"),
    ("POST", "/v1/adapters/{}/pin"),
    ("POST", "/v1/adapters/{}/unpin"),
    ("GET", "/v1/models/{}"),
    ("DELETE", "/v1/models/{}"),
]


@pytest.mark.fault("A7")
@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_a_strange_name_is_the_404_of_an_unknown_one_in_every_route(shelf, acme, name):
    """Sent as it stands: a client's own normalising would hide it."""
    upload(acme, "bot", zip_of(seeded(1)))
    files = set(shelf.store._files._root.parent.rglob("*"))
    for method, path in ID_ROUTES:
        raw = path.replace("{}", HOSTILE_NAMES[name])
        status, body = exchange(shelf.url, method, raw)
        assert status == 404, (method, raw, body)
        assert body["error"]["code"] in ("model_not_found", "not_found")
        assert "/tmp/" not in body["error"]["message"]
    assert set(shelf.store._files._root.parent.rglob("*")) - files == set()
    assert [r.name for r in shelf.store.list(None)] == ["bot"]


@pytest.mark.fault("A7")
@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "a/b/c",
        "",
        ".",
        "..",
        ".hidden",
        "-x",
        "a b",
        "a\\b",
        "bоt",  # a Cyrillic o
        "a" * 65,
        "x@1",
        "ft:x",
        "acme/",
        "/x",
        "versions",
        "download",
        "pin",
        BASE,
    ],
)
def test_no_adapter_gets_a_name_that_is_a_path_or_a_word_of_the_api(shelf, root, name):
    for response in (
        upload(root, name, zip_of(seeded(1))),
        root.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(shelf.root)}),
    ):
        assert error_of(response)[:2] == (400, "invalid_value"), response.text
    assert shelf.store.list(None) == []


# ---- A8: locations


@pytest.fixture
def spy():
    """(the address of a server on this machine, the requests that it got)."""
    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append(self.path)
            self.send_response(404)
            self.end_headers()

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", seen
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.fault("A8")
def test_nothing_is_fetched_that_a_path_names(shelf, root, acme, spy):
    url, seen = spy
    paths = [
        f"{url}/adapter",
        f"{url}/adapter.zip",
        "s3://bucket/adapter",
        "hf://org/adapter",
        "org/adapter",
        "file:///etc",
        "x",
    ]
    for path in paths:
        response = root.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": path})
        assert error_of(response)[:2] == (400, "invalid_value"), path
    hub = adapter_files(base_model_name_or_path=f"{url}/base", revision="main")
    assert upload(acme, "x", hub).json()["ignored"] == ["revision"]
    assert upload(acme, "x", {"adapter_model.safetensors": url.encode()}).status_code == 400
    assert seen == []


@pytest.mark.fault("A8")
@pytest.mark.parametrize(
    "path", ["outside", "link to outside", "file link to outside", "parent", "file", "NUL", "long"]
)
def test_a_server_folder_lies_inside_a_root_with_every_link_followed(shelf, root, tmp_path, path):
    outside = write_files(tmp_path / "outside", seeded(1))
    inside = write_files(shelf.root / f"in-{path.replace(' ', '-')}", seeded(1))
    made = {
        "outside": lambda: str(outside),
        "link to outside": lambda: str(_link(shelf.root / "way-out", outside)),
        "file link to outside": lambda: str(_link_file(inside, outside)),
        "parent": lambda: f"{shelf.root}/../../{outside.relative_to(outside.parents[1])}",
        "file": lambda: str(inside / "adapter_model.safetensors"),
        "NUL": lambda: f"{inside}\0",
        "long": lambda: f"{shelf.root}/{'a' * 5000}",
    }[path]()
    wanted = {"file": (404, "not_found"), "long": (404, "not_found"), "NUL": (400, "invalid_value")}
    response = root.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": made})
    assert error_of(response)[:2] == wanted.get(path, (403, "insufficient_scope"))
    assert shelf.store.list(None) == []


def _link(place, target):
    place.unlink(missing_ok=True)
    place.symlink_to(target)
    return place


def _link_file(inside, outside):
    weights = inside / "adapter_model.safetensors"
    weights.unlink()
    weights.symlink_to(outside / "adapter_model.safetensors")
    return inside


@pytest.mark.fault("A8")
def test_a_link_that_stays_inside_is_followed_and_without_roots_nothing_loads(shelf, root, bot, monkeypatch):
    folder = write_files(shelf.root / "real", seeded(1))
    link = _link(shelf.root / "alias", folder)
    body = {"lora_name": bot, "lora_path": str(link)}
    assert root.post("/v1/load_lora_adapter", json=body).status_code == 200
    monkeypatch.setattr(shelf.service, "_roots", [])
    status, code, message = error_of(root.post("/v1/load_lora_adapter", json=body | {"load_inplace": True}))
    assert (status, code) == (403, "insufficient_scope")
    assert "lora_roots" in message


# ---- T5: slots in use


@pytest.mark.fault("T5")
def test_adapters_come_and_go_under_requests_that_are_cancelled(shelf, acme, bot):
    """Three slots, twelve adapters, clients that leave in the middle, versions that come and go: every answer is its own."""
    names = [f"{bot}-{i}" for i in range(12)]
    for i, name in enumerate(names):
        upload(acme, name, zip_of(seeded(i)))
    alone = {n: answer(acme, n, 16) for n in names}
    random = np.random.default_rng(5)
    plan = [(names[int(i)], float(t)) for i, t in zip(random.integers(0, 12, 24), random.random(24), strict=True)]

    def ask(step: tuple[str, float]) -> None:
        name, luck = step
        with shelf.client("acme") as client:
            if luck < 0.3:
                body = {"model": name, "prompt": [5, 9, 20], "max_tokens": 40, "stream": True}
                with client.stream("POST", "/v1/completions", json=body) as response:
                    next(response.iter_bytes(), None)  # and leaves
            elif luck < 0.4:
                upload(client, f"{name}-new", zip_of(seeded(1)))
                client.delete(f"/v1/adapters/{name}-new")
            else:
                assert answer(client, name, 16) == alone[name], name

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(ask, plan))


# ---- R9, C2: the disk


@pytest.mark.fault("R9")
def test_a_full_disk_is_told_and_leaves_nothing(shelf, acme, unchanged, monkeypatch):
    def full(*_args, **_named):
        raise OSError(28, "No space left on device")

    for place in ("serve.http.multipart._FormReader.feed", "jaxlora.storage.version_files.save_version"):
        with monkeypatch.context() as patch:
            patch.setattr(place, full)
            response = upload(acme, "x", zip_of(seeded(1)))
            assert error_of(response)[:2] == (507, "storage_full"), place
            assert response.headers["x-should-retry"] == "false"


def test_a_client_that_leaves_in_the_middle_of_an_upload_leaves_nothing(shelf, unchanged):
    head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.zip"\r\n\r\n'

    def pieces():
        yield head + bytes(100_000)
        time.sleep(0.2)
        raise ConnectionAbortedError

    headers = {"content-type": "multipart/form-data; boundary=x"}
    with shelf.client("acme") as client, pytest.raises(ConnectionAbortedError):
        client.post("/v1/adapters", content=pieces(), headers=headers)
    deadline = time.monotonic() + 5
    while list(shelf.service._staging.iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.fault("C2")
@pytest.mark.slow
def test_what_a_killed_upload_left_is_gone_at_the_next_start(tmp_path):
    staging = tmp_path / "data" / "staging"
    write_files(staging / "0123", {"0": b"half an archive"})
    with shelf_at(tmp_path) as shelf:
        assert list(staging.iterdir()) == []
        assert shelf.store.list(None) == []


DAMAGE = {
    "a weight": ("weights/q_proj.a/0.0.0", lambda data: data[:40] + bytes([data[40] ^ 1]) + data[41:]),
    "its sum": ("meta/metadata", lambda data: data.replace(b'"sha256": "', b'"sha256": "0')),
    "not JSON": ("meta/metadata", lambda data: data[:-20]),
    "cut": ("weights/v_proj.b/0.0.0", lambda data: data[:-4]),
    "empty": ("meta/metadata", lambda data: b""),
}


@pytest.mark.fault("C12")
@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_version_leaves_its_name_to_the_one_before_and_the_operator_is_told(shelf, acme, bot, caplog, kind):
    """Its first asker gets an error to retry on; a client that retries does not even notice."""
    for i in (1, 2):
        upload(acme, bot, zip_of(seeded(i)))
    first, newest = shelf.store.versions("acme", bot)
    place, change = DAMAGE[kind]
    path = shelf.store._files._root / f"adapters/acme/{bot}/2" / place
    data = path.read_bytes()
    assert change(data) != data
    path.write_bytes(change(data))
    shelf.store._ram.forget(newest)
    with openai.OpenAI(base_url=shelf.url + "/v1", api_key="acme", max_retries=2, timeout=30) as client:
        text = client.completions.create(
            model=bot, prompt=[5, 9, 20], max_tokens=8, temperature=0, extra_body={"ignore_eos": True}
        )
    assert text.choices[0].text == answer(acme, f"{bot}@1")
    assert shelf.store.versions("acme", bot) == [first]
    assert f"acme/{bot}@2" in caplog.text
    assert "version 1 takes its place until the next start" in caplog.text
    assert path.exists()  # for who can repair it
    assert upload(acme, bot, zip_of(seeded(3))).json()["version"] == 3


@pytest.mark.fault("C12")
def test_what_the_system_will_not_read_now_is_no_damage(shelf, acme, bot, monkeypatch):
    for i in (1, 2):
        upload(acme, bot, zip_of(seeded(i)))
    newest = shelf.store.latest("acme", bot)
    shelf.store._ram.forget(newest)

    def busy(*_args):
        raise StorageFailed("later") from OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr("jaxlora.storage.version_files.load_version", busy)
        with pytest.raises(StorageFailed):
            shelf.store.get(newest)
    assert shelf.store.latest("acme", bot) == newest
    assert shelf.store.get(newest).ref == newest
