"""The Gradient wire over a house and a tuner without a model, behind real HTTP: `pytest_plugins = ["gradient_fixtures"]`."""

from __future__ import annotations

from types import SimpleNamespace

import httpx2
import pytest
from fake_house import FakeHouse, serving
from fake_tuner import FakeTuner
from gradient_world import API, LONGEST, MOST, by_key, gradientai

from jaxlora.errors import QuotaExceeded
from serve.app import create_app
from serve.database import Database
from serve.gradient_api import GradientWire
from serve.gradient_errors import gradient_response
from serve.gradient_house import GradientConfig
from serve.stored_answers import StoredAnswers
from serve.stored_gradient import StoredGradient


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(house, tuner, wire, url)."""
    house = FakeHouse()
    tuner = FakeTuner(house)
    database = Database(f"sqlite:///{tmp_path_factory.mktemp('gradient') / 'db.sqlite'}")
    records = StoredGradient(database)

    def check_quota(tenant):
        if tenant == "poor" and len(records.page(tenant, after=None, limit=9).records) >= MOST:
            raise QuotaExceeded(f"you may have {MOST} adapters")

    wire = GradientWire(
        house,
        GradientConfig(default_lr=3e-4, longest=LONGEST),
        records=records,
        answers=StoredAnswers(database),
        tuner=tuner,
        check_quota=check_quota,
        draw=lambda: 0.5,
    )
    app = create_app(
        house,
        default_max_tokens=64,
        caller_of=by_key,
        routers=[wire.router()],
        error_shapes={API: gradient_response},
        max_body_bytes=100_000,
    )
    with serving(app) as url:
        yield SimpleNamespace(house=house, tuner=tuner, wire=wire, url=url, app=app)
    database.close()


@pytest.fixture
def house(world):
    """The house with its behaviour as new, but for the adapters that were made."""
    fresh = FakeHouse()
    for name, value in vars(fresh).items():
        if name != "adapters":
            setattr(world.house, name, value)
    return world.house


@pytest.fixture
def tuner(world):
    """The tuner with its behaviour as new."""
    world.tuner.failure = world.tuner.hold = None
    world.tuner.created.clear()
    world.tuner.calls.clear()
    return world.tuner


@pytest.fixture
def http(world, house, tuner):
    headers = {"authorization": "Bearer acme", "x-gradient-workspace-id": "lab"}
    with httpx2.Client(base_url=world.url + API, headers=headers, timeout=10) as client:
        yield client


@pytest.fixture
def sdk(world, house, tuner):
    with gradientai.Gradient(access_token="acme", workspace_id="lab", host=world.url + API) as client:
        yield client


@pytest.fixture
def adapter(http, world):
    """The id of a new adapter."""
    body = {"model": {"baseModelId": world.wire.base_id, "name": "fixture"}}
    answer = http.post("/models", json=body)
    assert answer.status_code == 200, answer.text
    yield answer.json()["id"]
    http.delete(f"/models/{answer.json()['id']}")
