"""Which body each op has (`pallas_kernels.dispatch`), told to who starts a server or asks `jaxlora doctor`.

A server's are noted as its programs are traced.  Without one, ops are traced in the shapes of one layer and the head:
nothing is compiled, and no array made.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Generator, Iterator, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxlora.config.serving import SizedConfig
from jaxlora.config.training import LANE_BLOCK
from jaxlora.core.lora import HEAD_TARGET
from jaxlora.core.model_config import target_features
from jaxlora.model.lora_pool import LoraLayout
from jaxlora.model.memory_needs import BaseShape
from jaxlora.model.mesh import attention_placement
from jaxlora.model.serving_pool import PoolLora, ServingPool
from pallas_kernels.attention.op import packed_attention
from pallas_kernels.cross_entropy.op import target_logprob
from pallas_kernels.dispatch import TABLE, Choice, recorded, table_platform, usual
from pallas_kernels.gathered_lora.pool_rows import PoolRows
from pallas_kernels.gathered_lora.rank_classes import ROW_TILE, RankClasses, slot_ranks, tile_count
from pallas_kernels.paged_attention.op import paged_attention
from pallas_kernels.segmented_lora.op import segmented_lora

LOG = logging.getLogger("serve")

READS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",), (HEAD_TARGET,))
Shape = jax.ShapeDtypeStruct
Call = tuple[Callable[..., object], tuple]  # an op and the shapes of its arguments


@contextlib.contextmanager
def told(what: str, device_platform: str) -> Generator[None]:
    """Logs which bodies the programs traced inside have: one line, and a warning for each that is not the accelerator's."""
    with recorded(table_platform(device_platform)) as choices:
        yield
    if choices:
        LOG.info("bodies of %s: %s", what, listed(choices))
    for line in fallbacks(choices, device_platform):
        LOG.warning("%s: %s", what, line)


def listed(choices: Sequence[Choice]) -> str:
    """Returns the ops of each body in one line."""
    of: dict[str, list[str]] = {}
    for choice in choices:
        ops = of.setdefault(choice.body, [])
        if choice.op not in ops:
            ops.append(choice.op)
    return "; ".join(f"{body}: {', '.join(of[body])}" for body in sorted(of))


def fallbacks(choices: Sequence[Choice], device_platform: str) -> list[str]:
    """Returns a line for each op that has the general form in place of the accelerator's kernels; none on a CPU."""
    if device_platform == "cpu":
        return []
    return [f"{c.op} has the general form, {c.body}'s: {c.reason}" for c in choices if c.reason is not None]


def expected(base: BaseShape, config: SizedConfig, mesh: Mesh, device_platform: str) -> list[Choice]:
    """Returns the choices of a server of these sizes on such devices, and of its training; each op of the table has one."""
    platform = table_platform(device_platform)
    with recorded(platform) as choices:
        for op, shapes in [*_serving_calls(base, config, mesh), *_training_calls(base, config, mesh)]:
            jax.eval_shape(op, *shapes)
    noted = {c.op for c in choices}
    return choices + [usual(op, platform) for op in TABLE if op not in noted]


def _serving_calls(base: BaseShape, config: SizedConfig, mesh: Mesh) -> Iterator[Call]:
    """Yields what depends on shapes in steps of decode and of prompts."""
    c, layout = base.config, LoraLayout(config=base.config, mesh=mesh)
    lanes, tokens = config.prefill_lanes, config.prefill_tokens
    for targets in READS:
        sizes = [target_features(c, target) for target in targets]
        pool = {
            target: _pool_rows(config.rank_classes, x, y, base.dtype)
            for target, (x, y) in zip(targets, sizes, strict=True)
        }
        wanted = 1 if targets == (HEAD_TARGET,) else tokens  # of a prompt's logits
        for G, J, of_lane in ((config.rows, 1, 1), (lanes, tokens, wanted)):
            lora = functools.partial(_lora, targets, J, layout)
            yield lora, (pool, Shape((G,), jnp.int32), Shape((G * of_lane, sizes[0][0]), base.dtype))
    columns = -(-c.context // config.page_tokens)
    page = Shape((1, config.kv_pages, config.page_tokens, c.kv_heads * c.head_dim), base.kv_dtype)
    attend = functools.partial(paged_attention, window=c.window, placement=attention_placement(mesh))
    for G, J in ((config.rows, 1), (lanes, tokens)):
        ids = Shape((G, columns), jnp.int32), Shape((G, J), jnp.int32)
        yield attend, (Shape((G, J, c.heads, c.head_dim), base.dtype), page, page, Shape((), jnp.int32), *ids)


def _lora(
    targets: tuple[str, ...], tokens: int, layout: LoraLayout, pool: ServingPool, slot_G: jax.Array, x_TX: jax.Array
) -> tuple[jax.Array, ...]:
    """Returns what a step's linears add that share a read; tokens: of a lane of the step."""
    return PoolLora(pool, slot_G, tokens, 1, layout).product(jnp.int32(0), targets, x_TX)


def _training_calls(base: BaseShape, config: SizedConfig, mesh: Mesh) -> Iterator[Call]:
    """Yields the same for the steps of training, if there is any."""
    if (training := config.training) is None:
        return
    c, layout, G, J = base.config, LoraLayout(config=base.config, mesh=mesh), training.lanes, training.lane_tokens
    for targets in READS[:-1]:
        sizes = [target_features(c, target) for target in targets]
        rows = [_rows((G,), training.max_rank, x, y, "float32") for x, y in sizes]
        lora = functools.partial(segmented_lora, placement=layout.lanes(targets[0]))
        yield lora, (Shape((G, J, sizes[0][0]), base.dtype), rows)
    placement = attention_placement(mesh)
    attend = functools.partial(packed_attention, window=c.window, block=LANE_BLOCK, placement=placement)
    q, k = (Shape((G, J, heads, c.head_dim), base.dtype) for heads in (c.heads, c.kv_heads))
    yield attend, (q, k, k, Shape((G, J), jnp.int32))
    placement = layout.lanes(HEAD_TARGET)
    logprob = functools.partial(target_logprob, chunk=min(LANE_BLOCK, J), tied=c.tied, placement=placement)
    head = [Shape(sizes, base.dtype) for sizes in ((c.d_model, c.vocab), (c.vocab, c.d_model))]
    wanted = Shape((G, J, 1), jnp.int32), Shape((G, J), bool)
    lora = _rows((G,), training.max_rank, c.d_model, c.vocab, "float32")
    yield logprob, (Shape((G, J, c.d_model), base.dtype), *head, *wanted, lora)


def _pool_rows(classes: RankClasses, x: int, y: int, dtype: str) -> PoolRows:
    """Returns the shapes of a target's rows of all slots, of one layer."""
    slots, tiles = len(slot_ranks(classes)), (1, tile_count(classes), ROW_TILE)
    return PoolRows(
        a_LNRX=Shape((*tiles, x), dtype),  # ty: ignore[invalid-argument-type]
        b_LNRY=Shape((*tiles, y), dtype),  # ty: ignore[invalid-argument-type]
        scale_LS=Shape((1, slots), jnp.float32),  # ty: ignore[invalid-argument-type]
        rank_S=Shape((slots,), jnp.int32),  # ty: ignore[invalid-argument-type]
        classes=classes,
    )


def _rows(axes: tuple[int, ...], rank: int, x: int, y: int, dtype: str) -> tuple[Shape, ...]:
    """Returns the shapes of a target's A, B and scale."""
    return Shape((*axes, rank, x), dtype), Shape((*axes, rank, y), dtype), Shape(axes, jnp.float32)
