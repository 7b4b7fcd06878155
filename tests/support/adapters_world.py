"""A server over the base of the PEFT fixtures, with callers of several tenants, and the uploads that strangers send.

with httpx2.Client(base_url=url, headers=as_("acme")): ...          as_("root") is an admin
"""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
import numpy as np
import peft_world
from fake_backend import serving
from safetensors.numpy import save

from jaxlora.checkpoints.hf import HfSource
from jaxlora.checkpoints.load import base_hash
from jaxlora.config.serving import LimitsSection
from jaxlora.core.errors import Unauthorized
from jaxlora.core.lora import ALL_TARGETS
from jaxlora.model.decoder import load_base
from jaxlora.model.lora_pool import PoolSpec
from jaxlora.model.mesh import make_mesh
from jaxlora.storage.adapter_store import AdapterStore
from serve.access.adapter_quota import AdapterQuota
from serve.access.caller import Caller
from serve.access.rate_limit import Limiter
from serve.api.adapters.routes import AdaptersRoutes
from serve.api.adapters.service import AdapterService
from serve.api.tuning import TuningRoutes
from serve.engine.engine import Engine, EngineConfig
from serve.runtime.device_thread import DeviceThread
from serve.server.app import create_app
from serve.server.gate import AppConfig

BASE = "owner/tiny"
BASE_FOLDER = peft_world.base_folder("llama")
SLOTS, RANK = 3, 8
MEMBERS = ("adapter_config.json", "adapter_model.safetensors")
CONFIG = EngineConfig(
    rows=4,
    prefill_lanes=4,
    prefill_tokens=16,
    pages=64,
    page_tokens=4,
    max_tokens=64,
    max_waiting=64,
    max_waiting_tokens=4096,
    host_bytes=10**6,
    quantum_s=1000.0,
)


class Letters:
    """Ids 0 to 127 are ASCII; the last one ends an answer."""

    vocab_size = 128
    eos_ids = frozenset({127})
    special_ids = frozenset({127})

    def encode(self, text, *, add_special_tokens=True):
        return [min(b, 126) for b in text.encode()]

    def decode(self, ids):
        return bytes(i for i in ids if i != 127).decode()

    def token_text(self, id):
        return chr(id)

    def token_bytes(self, id):
        return bytes([id])

    def detokenizer(self):
        return self

    def push(self, token):
        return self.decode([token])

    def flush(self):
        return ""


@dataclass
class Shelf:
    """A running server and what tests look into."""

    url: str
    runner: DeviceThread
    service: AdapterService
    store: AdapterStore
    root: Path  # the one folder that admins may load from
    quota: AdapterQuota
    deleted: list[tuple[str, str]]  # adapters of which nothing was left

    def client(self, who: str) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, headers=as_(who), timeout=30)


def as_(who: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {who}"}


def caller_of(connection) -> Caller:
    who = connection.headers.get("authorization", "").removeprefix("Bearer ")
    if not who:
        raise Unauthorized("no key")
    return Caller(owner="root", admin=True, key_id=who) if who == "root" else Caller(owner=who, admin=False, key_id=who)


@contextmanager
def shelf_at(folder: Path) -> Iterator[Shelf]:
    """A server with its store and its staging in `folder`."""
    mesh = make_mesh()
    base = load_base(HfSource(BASE_FOLDER), mesh, dtype="float32")
    store = AdapterStore(folder / "store", host_bytes=10**8)
    spec = PoolSpec(slots=SLOTS, rank=RANK, dtype="float32", targets=ALL_TARGETS)
    runner = DeviceThread(Engine(base, mesh, CONFIG, spec, store, Letters(), base_hash(BASE_FOLDER)), base_name=BASE)
    root = folder / "root"
    root.mkdir()
    quota, deleted = AdapterQuota(LimitsSection(), store), []
    service = AdapterService(
        runner,
        config=base.config,
        read_head=lambda: peft_world.base_head("llama"),
        staging=folder / "data" / "staging",
        roots=[root],
        quota=quota,
        deleted=lambda tenant, name: deleted.append((tenant, name)),
    )
    wire = AdaptersRoutes(service, Limiter(LimitsSection()))
    app = create_app(
        runner,
        AppConfig(
            default_max_tokens=16,
            caller_of=caller_of,
            max_body_bytes=200_000,
            body_limits=wire.body_limits,
            routers=[wire.router(), TuningRoutes(runner).router()],
        ),
    )
    runner.start()
    try:
        with serving(app) as url:
            yield Shelf(url, runner, service, store, root, quota, deleted)
    finally:
        runner.stop()
        store.close()


# ---- what is uploaded


def adapter_files(
    config: Mapping | None = None, tensors: Mapping[str, np.ndarray] | None = None, **changes
) -> dict[str, bytes]:
    """The two files of a small adapter; `changes` are of its config."""
    config = dict(peft_world.PLAIN if config is None else config) | changes
    tensors = peft_world.plain_tensors() if tensors is None else tensors
    return {"adapter_config.json": json.dumps(config).encode(), "adapter_model.safetensors": save(dict(tensors))}


def seeded(seed: int, rank: int = 2) -> dict[str, bytes]:
    """An adapter that says something of its own."""
    random = np.random.default_rng(seed)
    tensors = {
        k: random.normal(size=v.shape).astype(np.float32) for k, v in peft_world.plain_tensors(rank=rank).items()
    }
    return adapter_files(tensors=tensors, r=rank)


def fixture_files(name: str) -> dict[str, bytes]:
    """The two files of an accepted fixture."""
    return {m: (peft_world.FIXTURES / "accepted" / name / m).read_bytes() for m in MEMBERS}


def write_files(folder: Path, files: Mapping[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def zip_of(files: Mapping[str, bytes] | list[tuple[str, bytes]], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    """A zip of these members, in order; a list may name one twice."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, data in files.items() if isinstance(files, Mapping) else files:
            archive.writestr(zipfile.ZipInfo(name), data, compression)
    return out.getvalue()


def tar_of(files: Mapping[str, bytes], mode: str = "w", **special: bytes) -> bytes:
    """A tar of these members, then of one `special` member: name=, type=, linkname=."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        if special:
            info = tarfile.TarInfo(special["name"])
            info.type, info.linkname = special["type"], special.get("linkname", "")
            archive.addfile(info)
    return out.getvalue()


def upload(
    client: httpx2.Client, name: str, data: bytes | Mapping[str, bytes], filename: str = "adapter.zip", **fields: str
) -> httpx2.Response:
    """POST /v1/adapters with an archive, or with files one by one."""
    parts = {filename: data} if isinstance(data, bytes) else data
    return client.post("/v1/adapters", data={"name": name} | fields, files=[("file", (n, d)) for n, d in parts.items()])


def answer(client: httpx2.Client, model: str, tokens: int = 8, prompt: tuple[int, ...] = (5, 9, 20)) -> str:
    """What a model says, greedily."""
    body = {"model": model, "prompt": list(prompt), "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["text"]


def error_of(response: httpx2.Response) -> tuple[int, str, str]:
    """(status, code, message) of a refusal in the shape that all errors have; with details, the message and these."""
    assert set(response.json()) == {"error"}, response.text
    error = response.json()["error"]
    details = error.pop("details", [])
    assert set(error) == {"message", "type", "param", "code"}
    return response.status_code, error["code"], "\n".join([error["message"], *details])
