"""A backend served over real HTTP, for tests of the OpenAI wire: `pytest_plugins = ["wire_fixtures"]`."""

import httpx2
import openai
import pytest
from fake_backend import FakeBackend, serving

from serve.server.app import create_app
from serve.server.gate import AppConfig


@pytest.fixture(scope="module")
def running():
    backend = FakeBackend()
    with serving(create_app(backend, AppConfig(default_max_tokens=64, ping_s=0.15, max_body_bytes=200_000))) as url:
        yield backend, url


@pytest.fixture
def backend(running):
    """The running backend with its behaviour as new."""
    it, fresh = running[0], FakeBackend()
    for name, value in vars(fresh).items():
        setattr(it, name, value)
    return it


@pytest.fixture
def http(running, backend):
    with httpx2.Client(base_url=running[1], timeout=10) as client:
        yield client


@pytest.fixture
def client(running, backend):
    with openai.OpenAI(base_url=running[1] + "/v1", api_key="none", max_retries=0, timeout=10) as it:
        yield it
