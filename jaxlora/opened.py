"""A base model ready to use: weights on the mesh, tokenizer, identity."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxlora.base_files import base_hash, find_model, open_model
from jaxlora.config_base import MeshSection, ModelSection
from jaxlora.mesh import make_mesh
from jaxlora.model import Base, load_base
from jaxlora.tokenizer import Tokenizer

CLEARLY = 0.75  # of float32's time, at most, for bfloat16


@dataclass(frozen=True, kw_only=True, slots=True)
class Opened:
    """What trainers and servers start from."""

    name: str  # what clients call the base
    path: Path
    base: Base
    base_hash: str
    mesh: Mesh
    tokenizer: Tokenizer


def open_base(model: ModelSection, mesh: MeshSection) -> Opened:
    """Loads a base onto a mesh.

    Raises ModelInvalid for a checkpoint we cannot read, ConfigInvalid when the mesh does not fit devices or model.
    """
    name, path = find_model(model.path)
    devices = make_mesh(mesh.data, mesh.fsdp, mesh.tensor)
    source, tokenizer = open_model(path)
    dtype = fastest_dtype() if model.dtype == "auto" else model.dtype
    return Opened(
        name=name,
        path=path,
        base=load_base(source, devices, dtype=dtype, precision=model.precision),
        base_hash=base_hash(path),
        mesh=devices,
        tokenizer=tokenizer,
    )


def fastest_dtype() -> str:
    """ "bfloat16" on an accelerator; on a CPU only where it is clearly faster than float32, by trying.

    CPUs with bfloat16 instructions take about half the time in it, those without rather more; a server that is started
    again must not decide anew by chance.  Several processes must agree without asking each other: float32.
    """
    if jax.default_backend() != "cpu":
        return "bfloat16"
    if jax.process_count() > 1:
        return "float32"
    return "bfloat16" if _product_s("bfloat16") < CLEARLY * _product_s("float32") else "float32"


def _product_s(dtype: str) -> float:
    """The least seconds of a few products in a prompt's shapes."""
    x, w = jnp.ones((256, 576), dtype), jnp.ones((576, 1536), dtype)
    product = jax.jit(jnp.matmul)
    product(x, w).block_until_ready()
    times_s = []
    for _ in range(9):
        start_s = time.perf_counter()
        product(x, w).block_until_ready()
        times_s.append(time.perf_counter() - start_s)
    return min(times_s)
