"""What tests with jax share: no silent broadcasting, compiled programs kept on disk, perturbed programs where asked for."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import pytest

from jaxlora.model import compile_cache

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
