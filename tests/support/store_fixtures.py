"""The store of a test: `pytest_plugins = ["store_fixtures"]`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
from store_world import LARGE

from jaxlora.core.errors import StorageFailed
from jaxlora.storage.adapter_store import AdapterStore


@pytest.fixture
def open_store(tmp_path) -> Iterator[Callable[..., AdapterStore]]:
    """A function that opens the store of this test, as a process does that starts again: the one before is closed."""
    opened: list[AdapterStore] = []

    def close_last() -> None:
        if opened:
            with contextlib.suppress(StorageFailed):  # some tests break the disk
                opened[-1].close()

    def open_(host_bytes: int = LARGE) -> AdapterStore:
        close_last()
        opened.append(AdapterStore(tmp_path, host_bytes=host_bytes))
        return opened[-1]

    yield open_
    close_last()
