"""The whole decode step and the whole training step of SmolLM2-135M, compiled for a mesh of devices that are not here."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
from base_shapes import SMOLLM2
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from kernel_shapes import made_as_large_as

from jaxlora.core.model_config import layer_count, parameters, target_features
from jaxlora.model.decoder import Base
from jaxlora.model.kv_cache import KVPages, page_format
from jaxlora.model.lora_pool import LoraRows, PoolSpec, Rows, row_axes
from jaxlora.model.mesh import RULES, replicated, sharding
from jaxlora.model.serving_pool import ServingPool, pool_shapes
from serve.engine.logit_edits import LogitEdits
from serve.engine.step import Layout, StepBatch, step_program
from train.step.batch import idle_batch
from train.step.moments_8bit import Blocks, scale_shape
from train.step.optimizer import IDLE, Hyper, Moments
from train.step.state import Due, TrainState, apply, halves
from train.step.step import accumulate

ROWS, LANES, TOKENS, RANK = 32, 4, 256, 16
PAGES = (30, 200, 64, 192)  # a compiler that may choose would put 200 last: it pads to 256 as 192 does, and less


def placed(mesh: Mesh, axes, shape, dtype) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding(mesh, axes))


def base(mesh: Mesh) -> Base:
    arrays = {n: placed(mesh, p.axes, p.shape, jnp.bfloat16) for n, p in parameters(SMOLLM2).items()}
    return Base(arrays=arrays, config=SMOLLM2, precision="default", mesh=mesh)


def pool(mesh: Mesh, spec: PoolSpec) -> Rows:
    rows = {}
    for target in spec.targets:
        L, (x, y) = layer_count(SMOLLM2, target), target_features(SMOLLM2, target)
        a, b = row_axes(SMOLLM2, target)
        rows[target] = LoraRows(
            a_LSRX=placed(mesh, a, (L, spec.slots, spec.rank, x), spec.dtype),
            b_LSRY=placed(mesh, b, (L, spec.slots, spec.rank, y), spec.dtype),
            scale_LS=placed(mesh, (None, None), (L, spec.slots), jnp.float32),
        )
    return rows


def lanes(mesh: Mesh, batch):
    split = NamedSharding(mesh, PartitionSpec(RULES["lanes"]))
    return jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=split), batch)


def part(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """What one device holds of it."""
    return jax.ShapeDtypeStruct(x.sharding.shard_shape(x.shape), x.dtype)


def parts(rows: Rows | ServingPool) -> list[jax.ShapeDtypeStruct]:
    """What one device holds of each half of the pool."""
    return [part(half) for r in rows.values() for half in jax.tree.leaves(r)[:2]]


def makers(kv: KVPages, compiled: jax.stages.Compiled) -> list[str]:
    """Names of the instructions that make a device's part of the pages anew; a scatter writes where they lie."""
    made = made_as_large_as([part(kv.k_LPZF)], compiled.as_text())
    return [line for line in made if "scatter" not in line.split(" = ")[0]]


def decode(mesh: Mesh) -> tuple[jax.stages.Compiled, ServingPool, KVPages]:
    rows = pool_shapes(SMOLLM2, PoolSpec(slots=64, rank=RANK, dtype="bfloat16"), mesh)
    pages = jax.ShapeDtypeStruct(PAGES, jnp.bfloat16, sharding=page_format(mesh))
    kv = KVPages(k_LPZF=pages, v_LPZF=pages)
    batch = StepBatch.idle(ROWS, 1, 4)
    layout = Layout.of(batch)
    args = (lanes(mesh, layout.pack(batch)), lanes(mesh, LogitEdits.idle(ROWS, 512, SMOLLM2.vocab)), layout)
    return step_program(mesh).lower(base(mesh), rows, kv, *args).compile(), rows, kv


def train(mesh: Mesh) -> jax.stages.Compiled:
    rows = pool(mesh, PoolSpec(slots=8, rank=RANK, dtype="float32"))
    count = placed(mesh, (None,), (8,), jnp.int32)
    state = TrainState(pool=rows, grads=halves(rows), moments=Moments(mu=halves(rows), nu=halves(rows), count=count))
    states = (state,)
    out = (jax.tree.map(lambda v: v.sharding, states), replicated(mesh))
    step = jax.jit(functools.partial(accumulate, remat="products"), donate_argnums=1, out_shardings=out)
    return step.lower(base(mesh), states, lanes(mesh, idle_batch(LANES, TOKENS))).compile()


def update(mesh: Mesh, spec: PoolSpec, moments: str) -> tuple[jax.stages.Compiled, Rows]:
    """The update of up to four slots, with moments in float32 or uint8."""
    rows, whole = pool(mesh, spec), replicated(mesh)

    def kept(half: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct | Blocks:
        if moments == "float32":
            return half
        scales = jax.ShapeDtypeStruct(scale_shape(half.shape), jnp.float32, sharding=whole)
        return Blocks(jax.ShapeDtypeStruct(half.shape, jnp.uint8, sharding=half.sharding), scales)

    mu, nu = (jax.tree.map(kept, halves(rows)) for _ in range(2))
    count = placed(mesh, (None,), (spec.slots,), jnp.int32)
    states = (TrainState(pool=rows, grads=halves(rows), moments=Moments(mu=mu, nu=nu, count=count)),)
    due = Due(hyper=Hyper.stack([IDLE] * 4), slot_U=np.zeros(4, np.int32))
    out = (jax.tree.map(lambda v: v.sharding, states), whole)
    due = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=whole), due)
    return jax.jit(apply, donate_argnums=0, out_shardings=out).lower(states, (due,)).compile(), rows


def remade(rows: Rows, compiled: jax.stages.Compiled) -> list[str]:
    """Instructions of an update that make a device's part of all slots anew; what ends in updates of one writes in place."""
    text = compiled.as_text()
    writers = {
        name for name, body in re.findall(r"^%?(\S+) \(.*\{\n((?:  .*\n)*)\}", text, re.M) if _writes_slots(body)
    }
    found = []
    for line in made_as_large_as(parts(rows), text):
        called = re.search(r"calls=%?([^,\s]+)", line)
        if " dynamic-update-slice(" not in line and (called is None or called[1] not in writers):
            found.append(line)
    return found


def _writes_slots(body: str) -> bool:
    """Whether what a fused computation gives is slices put into arrays."""
    root = re.search(r"ROOT %?\S+ = .*? ([a-z-]+)\((.*?)\)", body)
    assert root is not None
    written = set(re.findall(r"(%?\S+) = \S+ dynamic-update-slice\(", body))
    given = re.findall(r"%[^\s,]+", root[2])
    return root[1] == "dynamic-update-slice" or (root[1] == "tuple" and set(given) <= written)
