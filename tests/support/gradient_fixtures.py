"""The Gradient wire over a backend and a tuner without a model, behind real HTTP: `pytest_plugins = ["gradient_fixtures"]`."""

from __future__ import annotations

from types import SimpleNamespace

import httpx2
import pytest
from fake_backend import FakeBackend, serving
from fake_tuner import FakeTuner, gradient_over
from gradient_world import API, LONGEST, MOST, by_key, gradientai

from serve.api.gradient.errors import gradient_response
from serve.server.app import create_app
from serve.server.gate import AppConfig


@pytest.fixture(scope="module")
def gradient(tmp_path_factory):
    """(backend, tuner, wire, url)."""
    backend = FakeBackend(context=200)
    backend.tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
    tuner = FakeTuner(backend, most={"poor": MOST})
    how = {"longest": LONGEST, "tuner": tuner, "draw": lambda: 0.5}
    with gradient_over(backend, tmp_path_factory.mktemp("gradient"), **how) as wire:
        app = create_app(
            backend,
            AppConfig(
                default_max_tokens=64,
                caller_of=by_key,
                routers=[wire.router()],
                error_shapes={API: gradient_response},
                max_body_bytes=100_000,
            ),
        )
        with serving(app) as url:
            yield SimpleNamespace(backend=backend, tuner=tuner, wire=wire, url=url, app=app)


@pytest.fixture
def gradient_house(gradient):
    """The backend with its behaviour as new, but for the adapters that were made."""
    fresh = FakeBackend(context=200)
    for name, value in vars(fresh).items():
        if name not in ("adapters", "tokenizer"):
            setattr(gradient.backend, name, value)
    return gradient.backend


@pytest.fixture
def gradient_tuner(gradient):
    """The tuner with its behaviour as new."""
    gradient.tuner.failure = gradient.tuner.hold = None
    gradient.tuner.created.clear()
    gradient.tuner.calls.clear()
    return gradient.tuner


@pytest.fixture
def gradient_http(gradient, gradient_house, gradient_tuner):
    headers = {"authorization": "Bearer acme", "x-gradient-workspace-id": "lab"}
    with httpx2.Client(base_url=gradient.url + API, headers=headers, timeout=10) as client:
        yield client


@pytest.fixture
def gradient_sdk(gradient, gradient_house, gradient_tuner):
    with gradientai.Gradient(access_token="acme", workspace_id="lab", host=gradient.url + API) as client:
        yield client


@pytest.fixture
def gradient_adapter(gradient_http, gradient):
    """The id of a new adapter."""
    body = {"model": {"baseModelId": gradient.wire.base_id, "name": "fixture"}}
    answer = gradient_http.post("/models", json=body)
    assert answer.status_code == 200, answer.text
    yield answer.json()["id"]
    gradient_http.delete(f"/models/{answer.json()['id']}")
