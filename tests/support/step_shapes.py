"""The whole decode step and the whole training step of SmolLM2-135M, compiled for a mesh of devices that are not here."""

from __future__ import annotations

import functools
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
from base_shapes import SMOLLM2
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from kernel_shapes import HANDS_ON, made_as_large_as

from jaxlora.core.model_config import ModelConfig, layer_count, parameters, target_features
from jaxlora.model.base_form import Form, form_of, layer_arrays
from jaxlora.model.decoder import Base
from jaxlora.model.kv_cache import KVPages, page_format
from jaxlora.model.lora_pool import LoraRows, PoolSpec, Rows, row_axes
from jaxlora.model.mesh import RULES, replicated, sharding
from jaxlora.model.serving_pool import ServingPool, pool_shapes
from serve.engine.logit_edits import LogitEdits
from serve.engine.step import PackedBatch, StepBatch, StepPrograms
from train.step.batch import idle_batch
from train.step.lane_lora import lane_rows
from train.step.microsteps import _backward, _forward
from train.step.moments_8bit import Blocks, scale_shape
from train.step.optimizer import IDLE, Hyper, Moments
from train.step.state import Due, TrainState, apply, halves, splits_of
from train.step.step import accumulate

ROWS, LANES, TOKENS, RANK = 32, 4, 256, 16
PAGES = (30, 200, 64, 192)  # a compiler that may choose would put 200 last: it pads to 256 as 192 does, and less


def placed(mesh: Mesh, axes, shape, dtype) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding(mesh, axes))


def base(mesh: Mesh, config: ModelConfig = SMOLLM2) -> Base:
    """As `load_base` would make it for these devices, without native bodies."""
    ends, layers = {}, {}
    for n, p in parameters(config).items():
        (layers if p.axes[0] == "layers" else ends)[n] = placed(mesh, p.axes, p.shape, jnp.bfloat16)
    if form_of(mesh.devices.flat[0].platform, mesh.size, native=False, quantized=False) is Form.UNROLLED:
        one = {n: placed(mesh, a.axes, a.shape, jnp.bfloat16) for n, a in layer_arrays(config).items()}
        layers = (one,) * config.layers
    return Base(arrays=ends, layers=layers, config=config, precision="default", mesh=mesh)


def pool(mesh: Mesh, spec: PoolSpec, config: ModelConfig = SMOLLM2) -> Rows:
    rows = {}
    for target in spec.targets:
        L, (x, y) = layer_count(config, target), target_features(config, target)
        a, b = row_axes(config, target)
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


def decode(
    mesh: Mesh, config: ModelConfig = SMOLLM2, lanes_of_step: int = ROWS, options: dict | None = None
) -> tuple[jax.stages.Compiled, ServingPool, KVPages]:
    return serving(mesh, config, (lanes_of_step, 1), options=options)


def serving(
    mesh: Mesh, config: ModelConfig, *lanes_of: tuple[int, int], options: dict | None = None
) -> tuple[jax.stages.Compiled, ServingPool, KVPages]:
    """lanes_of: of each batch how many lanes, and of how many tokens each: one of decode rows, more of prompt chunks."""
    rows = pool_shapes(config, PoolSpec(slots=64, rank=RANK, dtype="bfloat16"), mesh)
    shape = (config.layers, *PAGES[1:3], config.kv_heads * config.head_dim)
    pages = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=page_format(mesh))
    kv, places = KVPages(k_LPZF=pages, v_LPZF=pages), lanes_of[-1][0]
    programs = StepPrograms(mesh)
    edits = lanes(mesh, LogitEdits.idle(places, 512, config.vocab)) if programs.one else None
    packed = tuple(lanes(mesh, PackedBatch.of(StepBatch.idle(G, J, 4))) for G, J in lanes_of)
    lowered = programs.step.lower(base(mesh, config), rows, kv, newest(mesh, places), packed, edits)
    return lowered.compile(options), rows, kv


def newest(mesh: Mesh, rows: int) -> jax.ShapeDtypeStruct:
    """The newest token of each place."""
    return jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=replicated(mesh))


def train(
    mesh: Mesh, config: ModelConfig = SMOLLM2, *, lanes_of: tuple[int, int] = (LANES, TOKENS), passes: int = 1
) -> jax.stages.Compiled:
    """lanes_of: how many lanes, and of how many tokens each."""
    rows = pool(mesh, PoolSpec(slots=8, rank=RANK, dtype="float32"), config)
    count = placed(mesh, (None,), (8,), jnp.int32)
    state = TrainState(pool=rows, grads=halves(rows), moments=Moments(mu=halves(rows), nu=halves(rows), count=count))
    states = (state,)
    out = (jax.tree.map(lambda v: v.sharding, states), replicated(mesh))
    step = jax.jit(functools.partial(accumulate, remat="products", passes=passes), donate_argnums=1, out_shardings=out)
    return step.lower(base(mesh, config), states, lanes(mesh, idle_batch(*lanes_of))).compile()


def layer_steps(
    mesh: Mesh, config: ModelConfig, lanes_of: tuple[int, int]
) -> tuple[jax.stages.Compiled, jax.stages.Compiled]:
    """One layer forward, and back, of a base with an array for each: the two programs that a step runs for every layer."""
    rows, G, J, one = pool(mesh, PoolSpec(slots=8, rank=RANK, dtype="float32"), config), *lanes_of, replicated(mesh)

    def here(tree, of):
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, of)

    batch = lanes(mesh, idle_batch(G, J))
    of_lanes = jax.eval_shape(lambda rows, slot_G: lane_rows((rows,), slot_G), rows, batch.slot_G)
    layer, first = base(mesh, config).only(0, 1), jax.ShapeDtypeStruct((), jnp.int32, sharding=one)
    x_TD = jax.ShapeDtypeStruct((G * J, config.d_model), jnp.bfloat16, sharding=one)
    forward = jax.jit(functools.partial(_forward, layers=1, remat="products"), out_shardings=one)
    lowered = forward.lower(layer, jax.tree.map(lambda x: here(x, one), of_lanes), batch, x_TD, first)
    _, waiting = jax.tree.map(lambda x: here(x, one), lowered.out_info)
    grads = (halves(rows),)
    back = jax.jit(_backward, donate_argnums=(4, 5), out_shardings=(jax.tree.map(lambda x: x.sharding, grads), one))
    backward = back.lower(layer, waiting, first, batch.slot_G, grads, x_TD)
    return lowered.compile(), backward.compile()


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
    step = functools.partial(apply, splits=splits_of(states, mesh))
    return jax.jit(step, donate_argnums=0, out_shardings=out).lower(states, (due,)).compile(), rows


def moved(rows: Rows | ServingPool, compiled: jax.stages.Compiled) -> Counter:
    """How many arrays of all slots each kind of instruction reads and writes, those that an update's kernels alias too.

    A fusion reads what it is given, in which it takes one slot's part; what it computes inside is not counted.
    """
    kinds = {"float32": "f32", "bfloat16": "bf16"}
    sizes = {f"{kinds[x.dtype.name]}[{','.join(map(str, x.shape))}]" for x in parts(rows)}
    hands_on = {"parameter", "get-tuple-element", "tuple", "while", "bitcast", "call", "conditional", "opt-barrier"}
    text, found = compiled.as_text(), Counter()
    fused = set(re.findall(r"calls=%?([^,\s]+)", text)) | set(re.findall(r"to_apply=%?([^,\s]+)", text))
    for name, body in re.findall(r"^(?:ENTRY )?%?(\S+) \(.*\{\n((?:  .*\n)*)\}", text, re.M):
        if name in fused:
            continue
        made = dict(re.findall(r"^ +(?:ROOT )?(%\S+) = (\w+\[[\d,]*\])", body, re.M))
        for line in body.splitlines():
            match = re.match(r" +(?:ROOT )?%([a-z_]+)\S* = (.*?) ([a-z-]+)\((.*?)\)(?:,|$)", line)
            if match is None or match[3] in hands_on:
                continue
            kind = match[1] if match[3] == "custom-call" else "other"
            read = sum(made.get(operand) in sizes for operand in re.findall(r"%[^\s,)]+", match[4]))
            written = sum(size in sizes for size in re.findall(r"\w+\[[\d,]*\]", match[2]))
            found += Counter({f"{kind} reads": read, f"{kind} writes": written})
    return found


def reads(arrays: list[jax.ShapeDtypeStruct], compiled: jax.stages.Compiled) -> int:
    """How often instructions read parameters that are as one of these, in whatever shape a bitcast gives them."""
    kinds = {"float32": "f32", "bfloat16": "bf16"}
    sizes = {f"{kinds[x.dtype.name]}[{','.join(map(str, x.shape))}]" for x in arrays}
    text, found = compiled.as_text(), 0
    fused = set(re.findall(r"calls=%?([^,\s]+)", text))
    for name, body in re.findall(r"^(?:ENTRY )?%?(\S+) \(.*\{\n((?:  .*\n)*)\}", text, re.M):
        given: set[str] = set()
        for line in [] if name in fused else body.splitlines():
            match = re.match(r" +(?:ROOT )?(%\S+) = (\(.*?\)|\w+\[[\d,]*\])\S* ([a-z-]+)\((.*?)\)(?:,|$)", line)
            if match is None:
                continue
            made, size, kind, operands = match.groups()
            read = given.intersection(re.findall(r"%[^\s,)]+", operands))
            if (kind in ("parameter", "get-tuple-element") and size in sizes) or (kind == "bitcast" and read):
                given.add(made)
            elif kind not in HANDS_ON:
                found += len(read)
    return found


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
