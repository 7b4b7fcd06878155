"""One server for all tests of adapters, and clients of it: `pytest_plugins = ["adapters_fixtures"]`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import httpx2
import pytest
from adapters_world import Shelf, answer, seeded, shelf_at, upload, zip_of
from serve_world import check_idle, settle

from jaxlora.config.serving import LimitsSection

NUMBERS = itertools.count()


@pytest.fixture(scope="session")
def adapters_server(tmp_path_factory) -> Iterator[Shelf]:
    with shelf_at(tmp_path_factory.mktemp("shelf")) as it:
        yield it
        settle(it.runner)
        check_idle(it.runner.engine)


@pytest.fixture
def shelf(adapters_server) -> Iterator[Shelf]:
    """The server without adapters; nothing under way is left over."""
    yield adapters_server
    for ref in adapters_server.store.list(None):
        adapters_server.service.delete(None, f"{ref.tenant}/{ref.name}")
    adapters_server.quota.limits = LimitsSection()
    assert list((adapters_server.service._staging).iterdir()) == []


@pytest.fixture
def bot(shelf) -> str:
    """A name that nobody has had: the numbers of its versions begin at 1."""
    return f"bot{next(NUMBERS)}"


@pytest.fixture
def root(shelf) -> Iterator[httpx2.Client]:
    """An admin."""
    with shelf.client("root") as client:
        yield client


@pytest.fixture
def acme(shelf) -> Iterator[httpx2.Client]:
    """A tenant."""
    with shelf.client("acme") as client:
        yield client


@pytest.fixture
def zoo(shelf) -> Iterator[httpx2.Client]:
    """Another tenant."""
    with shelf.client("zoo") as client:
        yield client


@pytest.fixture
def unchanged(shelf, acme, bot):
    """An adapter that answers the same after the test, alone in the store."""
    upload(acme, bot, zip_of(seeded(1)))
    before = answer(acme, bot)
    yield
    assert [str(r) for r in shelf.store.list(None)] == [f"acme/{bot}@1"]
    assert answer(acme, bot) == before
