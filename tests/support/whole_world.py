"""The whole server as `jaxlora serve` joins it, over the tiny model and on this process's event loop: no key, no socket yet."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from base_shapes import sized
from fastapi import FastAPI
from serve_world import MODEL
from small_world import tiny_path
from starlette.routing import BaseRoute, Route

from jaxlora.checkpoints.load import Opened
from jaxlora.config.base import ModelSection
from jaxlora.config.serving import ServeConfig, SizedConfig, TrainingSection
from jaxlora.storage.adapter_store import AdapterStore
from serve.db.database import Database
from serve.runtime.device_thread import DeviceThread
from serve.server.app import make_http
from serve.server.build import Services, make_runner, observing, read_head, services
from serve.server.uvicorn import bound

WORKSPACE = "lab"


@dataclass(frozen=True)
class Joined:
    """What a test needs of it."""

    app: FastAPI
    runner: DeviceThread
    own: Services


def whole_config(folder: Path) -> SizedConfig:
    """A small server whose files are in the folder."""
    return sized(
        ServeConfig(
            model=ModelSection(path="tiny"),
            adapters=folder / "store",
            data=folder / "data",
            port=0,
            max_rank=6,
            kv_pages=8,
            training=TrainingSection(slots=1, lanes=2, lane_tokens=32, max_rank=4),
        )
    )


@contextlib.contextmanager
def joined(world, settings: ServeConfig, store: AdapterStore) -> Iterator[Joined]:
    """The server, over a store that is closed by the caller; nothing is compiled and the device thread does not run."""
    opened = Opened(
        name="tiny",
        path=tiny_path(MODEL),
        base=world.base,
        base_hash=world.base_hash,
        weights_hash="",
        mesh=world.mesh,
        tokenizer=world.tokenizer,
    )
    runner = make_runner(opened, settings, store)
    with (
        observing(runner, settings) as observers,
        contextlib.closing(Database(settings.database_url)) as database,
        services(runner, opened, settings, database, observers, lambda: read_head(opened)) as own,
    ):
        http = make_http(runner, own.app, listening=bound(settings.host, settings.port), grace_s=settings.grace_s)
        http.listening.close()
        yield Joined(http.server.config.app, runner, own)


def bearer(key: str) -> dict[str, str]:
    """A caller's headers, with the workspace that Gradient's wire wants."""
    return {"authorization": f"Bearer {key}", "x-gradient-workspace-id": WORKSPACE}


def leaves(routes: Sequence[BaseRoute]) -> Iterator[Route]:
    """The routes of an app, those of its routers too.  Another kind of route, such as a mount, would be one to look into."""
    for route in routes:
        router = getattr(route, "original_router", None)
        if router is None:
            assert isinstance(route, Route), route
            yield route
        else:
            yield from leaves(router.routes)
