"""What every test shares: no other machine, Ctrl-C, bytecode, hypothesis, the kind of CPU in the report.

What compiles is in `compiled` (tests/support).
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Iterator

import hypothesis
import pytest
from cpu_kind import this_cpu
from loopback import stay_here

if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # so in processes of pytest-xdist; ours and their children take Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault("JAX_PLATFORMS", "cpu")
stay_here()
os.environ["HF_HUB_OFFLINE"] = "1"  # also in processes that a test starts
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

# Tests start dozens of Python processes, and each would spend seconds on compiling the sources of jax again.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# The same examples in every run, whatever is chosen by `-m`; a test says how many of them, where 100 are too many.
hypothesis.settings.register_profile("jaxlora", derandomize=True, database=None, deadline=None)
hypothesis.settings.load_profile("jaxlora")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--perturb-shapes",
        action="store_true",
        help="each shape of the serving program computes with other last bits, as on some CPUs (tests/support/perturbed.py)",
    )
    parser.addoption(
        "--through-front",
        action="store_true",
        help="what tests serve in their own process is behind the front of a cluster (tests/support/through_front.py)",
    )


@pytest.hookimpl(trylast=True)  # over pytest's own hook
def pytest_configure() -> None:
    """A read of tensorstore that fails leaves sibling reads a closed event loop to report to, in its test or in the next one."""
    counted = sys.unraisablehook

    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        if unraisable.object is not None or str(unraisable.exc_value) != "Event loop is closed":
            counted(unraisable)

    sys.unraisablehook = hook


def pytest_report_header(config: pytest.Config) -> str:
    perturbed = "; serving programs are perturbed" if config.getoption("--perturb-shapes") else ""
    fronted = "; apps are behind a front" if config.getoption("--through-front") else ""
    return f"cpu: {this_cpu()}{perturbed}{fronted}"


@pytest.fixture(scope="session", autouse=True)
def through_front(request: pytest.FixtureRequest) -> Iterator[None]:
    """Puts the front of a cluster before every app of the session when `--through-front` asks for it."""
    with pytest.MonkeyPatch.context() as patch:
        if request.config.getoption("--through-front"):
            import fake_backend
            from through_front import in_front

            patch.setattr(fake_backend.Before, "put", staticmethod(in_front))
        yield


def pytest_collection_finish() -> None:
    """Leaves what is imported out of garbage collection: a worker's heap grows to gigabytes, and each pass visits it all."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
