"""What a tenant may use, over the whole server as `jaxlora serve` joins it: the settings hold on every wire."""

from __future__ import annotations

import re
import time
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import httpx2
import pytest
from adapters_world import zip_of
from fake_backend import serving
from whole_world import bearer, joined, leaves, whole_config

from jaxlora.config.serving import LimitsSection, NamedLimits, ServeConfig
from jaxlora.config.toml import load
from jaxlora.core.adapter_size import adapter_size
from jaxlora.peft.folder import export_peft
from jaxlora.storage.adapter_store import AdapterStore
from serve.access.keys import create_key
from serve.db.database import Database
from serve.db.keys import StoredKeys

pytest_plugins = ["serve_fixtures"]

MAX_FILE_BYTES = 10_000
HI = [{"role": "user", "content": "hi"}]
FORM = {"data": {"purpose": "fine-tune"}, "files": {"file": ("a.jsonl", b'{"text": "abc"}\n')}}
# Requests that count, each whole enough to be counted: what generates, trains, makes an object or moves its bytes.
COUNTED = {
    ("POST", "/v1/chat/completions"): {"json": {"model": "tiny", "messages": HI, "max_tokens": 1}},
    ("POST", "/v1/completions"): {"json": {"model": "tiny", "prompt": "hi", "max_tokens": 1}},
    ("POST", "/v1/responses"): {"json": {"model": "tiny", "input": "hi", "store": False, "max_output_tokens": 1}},
    ("POST", "/v1/files"): FORM,
    ("GET", "/v1/files/{id}/content"): {},
    ("POST", "/v1/adapters"): {"data": {"name": "bot"}, "files": {"file": ("a.zip", b"x")}},
    ("GET", "/v1/adapters/{name:path}/download"): {},
    ("POST", "/v1/load_lora_adapter"): {"json": {"lora_name": "bot", "lora_path": "/x"}},
    ("POST", "/v1/fine_tuning/jobs"): {"json": {"model": "tiny", "training_file": "file-x"}},
    ("POST", "/api/models/{id}/fine-tune"): {"json": {"samples": [{"inputs": "hi"}]}},
    ("POST", "/api/models/{id}/complete"): {"json": {"query": "hi", "maxGeneratedTokenCount": 1}},
}


@dataclass(frozen=True)
class Whole:
    """A server whose device thread does not run: who is refused never gets that far."""

    url: str
    routes: list[tuple[str, str]]
    keys: dict[str, str]
    base_id: str  # Gradient's
    each: int  # bytes of a version of the adapters below
    adapter: bytes  # a zip

    def ask(self, who: str, method: str, path: str, **body) -> httpx2.Response:
        return httpx2.request(method, self.url + path, headers=bearer(self.keys[who]), timeout=20, **body)

    def create(self, who: str, name: str) -> httpx2.Response:
        """Gradient's creation of an adapter."""
        hyper = {"loraHyperparameters": {"rank": 2, "targetModules": ["q_proj"]}}
        model = {"baseModelId": self.base_id, "name": name}
        return self.ask(who, "POST", "/api/models", json={"model": model, "initialHyperparameters": hyper})


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    spec = replace(world.adapters[0].spec, targets=("q_proj",), rank=2, exceptions=())
    each = adapter_size(world.base.config, spec).nbytes
    limits = LimitsSection(
        max_file_bytes=MAX_FILE_BYTES,
        tenant=(
            NamedLimits(name="busy", requests_per_minute=1),
            NamedLimits(name="large", adapter_bytes=2 * each),
        ),
    )
    settings = replace(whole_config(folder), limits=limits)
    with closing(Database(settings.database_url)) as database:
        stored = StoredKeys(database)
        keys = {who: create_key(stored, who)[1] for who in ("large", "other")}
        keys["busy"] = create_key(stored, "busy", role="admin")[1]
    weights = {"q_proj": tuple(w[:, :2] for w in world.adapters[0].weights["q_proj"])}
    adapter = replace(world.adapters[0], spec=spec, weights=weights)
    export_peft(adapter, folder / "peft", world.base.config, base_name="tiny")
    archive = zip_of({p.name: p.read_bytes() for p in (folder / "peft").iterdir()})
    store = AdapterStore(settings.adapters, host_bytes=10**8)
    with joined(world, settings, store) as server, serving(server.app) as url:
        routes = sorted({(m, r.path) for r in leaves(server.app.routes) for m in r.methods or ()})
        models = httpx2.get(url + "/api/models", headers=bearer(keys["other"])).json()["models"]
        yield Whole(url, routes, keys, models[0]["id"], each, archive)
    store.close()


def test_the_settings_of_the_example_are_those_that_there_are(tmp_path):
    """Its section of limits, which stands there as comments."""
    text = (Path(__file__).parents[2] / "configs/serve_smollm2.toml").read_text()
    section = re.search(r"^# \[limits\]\n(# .*\n|#\n)+", text, re.MULTILINE)[0]
    (tmp_path / "server.toml").write_text(text.replace(section, re.sub("^# ?", "", section, flags=re.MULTILINE)))
    limits = load(tmp_path / "server.toml", ServeConfig).limits
    assert None not in (limits.requests_per_minute, limits.adapter_bytes, limits.file_bytes, limits.jobs)
    assert limits.max_file_bytes == LimitsSection().max_file_bytes == 512 * 2**20
    assert limits.of("acme").jobs == 100


def test_the_cap_on_a_file_is_a_setting_and_a_refusal_says_it(whole):
    for nbytes in (MAX_FILE_BYTES + 1, 10 * MAX_FILE_BYTES):
        answer = whole.ask("other", "POST", "/v1/files", **{**FORM, "files": {"file": ("a", b"x" * nbytes)}})
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
        assert f"at most {MAX_FILE_BYTES} bytes" in answer.json()["error"]["message"]
    assert whole.ask("other", "POST", "/v1/files", **FORM).status_code == 200


def test_bytes_of_adapters_are_of_all_wires_together(whole):
    made = [whole.create("large", f"bot{i}") for i in range(3)]
    assert [m.status_code for m in made] == [200, 200, 429]
    assert made[2].json()["type"] == "failed"
    upload = whole.ask("large", "POST", "/v1/adapters", data={"name": "bot"}, files={"file": ("a.zip", whole.adapter)})
    file = whole.ask("large", "POST", "/v1/files", **FORM).json()["id"]
    body = {"model": "tiny", "training_file": file, "lora": {"r": 2, "target_modules": ["q_proj"]}}
    job = whole.ask("large", "POST", "/v1/fine_tuning/jobs", json=body)
    for refused in (made[2], upload, job):
        assert refused.status_code == 429
        assert refused.headers["x-should-retry"] == "false"
        assert f"{2 * whole.each} bytes together; 0 are left, and this one has {whole.each}" in refused.text
    for refused in (upload, job):
        assert refused.json()["error"]["code"] == "insufficient_quota"
    listed = whole.ask("large", "GET", "/v1/adapters").json()["data"]
    assert {a["id"] for a in listed} == {"bot0", "bot1"}


def test_what_makes_something_or_moves_bytes_counts_as_a_request_and_nothing_else_does(whole, monkeypatch):
    """The one request of the minute, which does not end, is Gradient's creation."""
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    created = whole.create("busy", "bot")
    assert created.status_code == 200
    assert whole.create("busy", "another").status_code == 429
    assert COUNTED.keys() <= set(whole.routes)
    for method, path in whole.routes:
        if method in ("HEAD", "DELETE") or (method, path) == ("POST", "/api/models"):
            continue
        id = created.json()["id"] if path.startswith("/api") else "x"
        answer = whole.ask("busy", method, re.sub(r"\{[^}]*\}", id, path), **COUNTED.get((method, path), {}))
        assert (answer.status_code == 429) is ((method, path) in COUNTED), (method, path, answer.text)
        if answer.status_code == 429:
            assert 1 <= int(answer.headers["retry-after"]) <= 120
            shape = {"type", "message"} if path.startswith("/api") else {"error"}
            assert set(answer.json()) == shape
            assert "x-should-retry" not in answer.headers
    for path in ("/v1/files/x", "/v1/adapters/x", "/v1/models/x"):
        assert whole.ask("busy", "DELETE", path).status_code == 404
