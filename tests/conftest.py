"""What every test shares: a CPU unless told otherwise, no network, no silent broadcasting, compiled programs kept, Ctrl-C.

The report begins with the kind of CPU; `--perturb-shapes` shows that no test depends on which kernels it gets.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # so in processes of pytest-xdist; ours and their children take Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import jax
import pytest
from cpu_kind import this_cpu

from jaxlora.model import compile_cache

jax.config.update("jax_numpy_rank_promotion", "raise")
compile_cache.enable(None)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--perturb-shapes",
        action="store_true",
        help="each shape of the serving program computes with other last bits, as on some CPUs (tests/perturbed.py)",
    )


def pytest_report_header(config: pytest.Config) -> str:
    perturbed = "; serving programs are perturbed" if config.getoption("--perturb-shapes") else ""
    return f"cpu: {this_cpu()}{perturbed}"


@pytest.fixture(scope="session", autouse=True)
def perturbed_shapes(request: pytest.FixtureRequest) -> Iterator[None]:
    """Perturbs every engine of the session when the option asks for it."""
    with pytest.MonkeyPatch.context() as patch:
        if request.config.getoption("--perturb-shapes"):
            from perturbed import perturbed_run

            from serve.engine.engine import Engine

            patch.setattr(Engine, "_run", perturbed_run)
        yield
