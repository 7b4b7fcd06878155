"""Ray in the process of a test: it reads who may join, and a token, once in a process, so all tests of one have the same."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator

import pytest

from serve.cluster.ray_environment import AUTH_MODE, AUTH_TOKEN, DEDUPLICATES, JOINS, USAGE_STATS, UV, set_environment

NAMES = (AUTH_MODE, AUTH_TOKEN, DEDUPLICATES, JOINS, USAGE_STATS, UV)


@contextlib.contextmanager
def ray_environment() -> Iterator[None]:
    """The environment that a cluster of our own has, as it was in this process before."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in _of_this_process().items():
            patch.setenv(name, value)
        yield


@functools.cache
def _of_this_process() -> dict[str, str]:
    with pytest.MonkeyPatch.context() as patch:
        for name in NAMES:
            patch.setenv(name, "")  # as it was at the end
            del os.environ[name]
        set_environment(None)
        return {name: os.environ[name] for name in NAMES}
