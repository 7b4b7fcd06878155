"""What tests with jax share: no silent broadcasting, compiled programs kept on disk, perturbed programs where asked for.

A process of a long run forgets its programs before it has as many mappings of memory as Linux allows.
"""

from __future__ import annotations

import gc
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from cpu_kind import this_cpu

from jaxlora.model import compile_cache

MAPPINGS = (
    20_000  # of memory in one process; Linux allows 65,530, and a crash of the compiler is how the next one shows
)
LOCK = Path(__file__).parents[2] / "uv.lock"


def cache_folder() -> Path:
    """Where the tests keep compiled programs between runs, a folder for each pair of locked packages and kind of CPU.

    jax finds a program in it by what the program computes, so an edit of the code leaves all programs that it does not
    change; but it does not ask for which CPU the machine code was made, and a home directory may move to another one.
    """
    packages = LOCK if LOCK.exists() else LOCK.with_name("pyproject.toml")  # `uv run --isolated` writes no lock
    key = hashlib.sha256(packages.read_bytes() + this_cpu().encode()).hexdigest()[:16]
    return Path.home() / ".cache" / "jaxlora" / "tests" / key


os.environ.setdefault("JAXLORA_CACHE", str(cache_folder()))  # also of the processes that tests start
jax.config.update("jax_numpy_rank_promotion", "raise")
compile_cache.enable(None)


@pytest.fixture(scope="session", autouse=True)
def perturbed_shapes(request: pytest.FixtureRequest) -> Iterator[None]:
    """Perturbs every engine of the session when `--perturb-shapes` asks for it."""
    with pytest.MonkeyPatch.context() as patch:
        if request.config.getoption("--perturb-shapes"):
            from perturbed import perturbed_run

            from serve.engine.engine import Engine

            patch.setattr(Engine, "_run", perturbed_run)
        yield


@pytest.fixture(scope="module", autouse=True)
def forgotten_programs() -> Iterator[None]:
    """Forgets compiled programs after a module, when there are very many: each one maps its code, a few pages at a time."""
    yield
    if mappings() > MAPPINGS:
        jax.clear_caches()
        gc.collect()


def mappings() -> int:
    """Returns how many mappings of memory this process has; 0 where the system does not say."""
    maps = Path("/proc/self/maps")
    return maps.read_bytes().count(b"\n") if maps.exists() else 0
