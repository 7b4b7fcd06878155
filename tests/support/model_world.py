"""All logits of packed sequences through the one `forward`: what the tests compare with transformers and PEFT.

Shape letters: G lanes, J tokens of a lane, T = G * J, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora.checkpoints.gguf import GgufSource
from jaxlora.checkpoints.load import smollm2_path
from jaxlora.core.lora import ALL_TARGETS, Adapter
from jaxlora.model.decoder import Base, TokenBatch, WeightSource, forward, head_logits, load_base
from jaxlora.model.lora_pool import LaneLora, PoolSpec, Rows, host_rows
from jaxlora.model.mesh import make_mesh
from jaxlora.model.serving_pool import PoolLora
from pallas_kernels import NO_ADAPTER
from pallas_kernels.attention.op import packed_attention
from pallas_kernels.gathered_lora.pool_rows import of_slots
from pallas_kernels.segmented_lora.op import segmented_lora

FORMS = ("lanes", "tokens")  # LoRA as training and prefill compute it, and as decoding does


class NoLora:
    """Lora of the base model alone."""

    per_layer: tuple[()] = ()

    def deltas(self, layer: object, targets: tuple[str, ...], x_TX: jax.Array) -> tuple[None, ...]:
        """Returns no deltas."""
        return (None,) * len(targets)


def base_of(source: WeightSource, dtype: str = "float32") -> Base:
    """A checkpoint on one device."""
    return load_base(source, make_mesh(), dtype=dtype)


def smollm2_base(dtype: str) -> Base:
    """The demo model."""
    return base_of(GgufSource(smollm2_path()), dtype)


@dataclass
class Lane:
    """Sequences that stand one after another in a lane, all under one slot."""

    sequences: list[np.ndarray] = field(default_factory=list)
    slot: int = NO_ADAPTER

    def __len__(self) -> int:
        return sum(map(len, self.sequences))


def first_fit(sequences: Iterable[np.ndarray], length: int) -> list[Lane]:
    """Lanes without adapter that hold the sequences, the longest first."""
    lanes: list[Lane] = []
    for ids_T in sorted(sequences, key=len, reverse=True):
        lane = next((lane for lane in lanes if len(lane) + len(ids_T) <= length), None)
        if lane is None:
            lanes.append(lane := Lane())
        lane.sequences.append(ids_T)
    return lanes


def pool_of(base: Base, adapters: Sequence[Adapter], *, rank: int = 8, dtype: str = "float32") -> Rows:
    """A pool that holds each adapter in the slot of its place in the list."""
    spec = PoolSpec(slots=len(adapters), rank=rank, dtype=dtype, targets=ALL_TARGETS)
    slots = [host_rows(base.config, spec, adapter) for adapter in adapters]
    return jax.tree.map(lambda *x: jnp.stack(x, 1), *slots)


@functools.partial(jax.jit, static_argnames="form")
def _logits_GJV(base: Base, pool: Rows | None, tokens: TokenBatch, lane: jax.Array, *, form: str) -> jax.Array:
    G, J = lane.shape
    segment_GJ, slot_G = tokens.segment_T.reshape(G, J), tokens.slot_T.reshape(G, J)[:, 0]

    def attend(layer, q_TNH, k_TKH, v_TKH, cache):
        lanes = [x.reshape(G, J, *x.shape[1:]) for x in (q_TNH, k_TKH, v_TKH)]
        return packed_attention(*lanes, segment_GJ, window=base.config.window).reshape(q_TNH.shape), cache

    if pool is None:
        lora = NoLora()
    elif form == "lanes":
        lora = LaneLora(LaneLora.gather(pool, slot_G))
    else:
        serving = {t: of_slots(r.a_LSRX, r.b_LSRY, r.scale_LS) for t, r in pool.items()}
        lora = PoolLora(serving, tokens.slot_T, 1, base.config.layers)
    x_TD, _ = forward(base, tokens, lora, attend, ())
    with jax.default_matmul_precision(base.precision):
        logits_TV = head_logits(base, x_TD)
        if isinstance(lora, LaneLora):
            (delta,) = segmented_lora(x_TD.reshape(G, J, -1), [lora.head_rows()])
            logits_TV += delta.reshape(logits_TV.shape)
        elif isinstance(lora, PoolLora):
            logits_TV += lora.product(jnp.int32(0), ["lm_head"], x_TD)[0]
    return logits_TV.reshape(G, J, -1)


def logits_of(
    base: Base, lanes: Sequence[Lane], length: int, pool: Rows | None = None, form: str = "lanes"
) -> list[list[np.ndarray]]:
    """float32 [T, V] of every sequence, by lane, in its order.  Padding holds token 0."""
    G = len(lanes)
    token, position, segment = (np.zeros((G, length), np.int32) for _ in range(3))
    slot = np.array([[lane.slot] * length for lane in lanes], np.int32)
    for g, lane in enumerate(lanes):
        start = 0
        for number, ids_T in enumerate(lane.sequences, 1):
            part = slice(start, start + len(ids_T))
            token[g, part], position[g, part], segment[g, part] = ids_T, np.arange(len(ids_T)), number
            start += len(ids_T)
    token_T, position_T, segment_T, slot_T = (jnp.asarray(x.reshape(-1)) for x in (token, position, segment, slot))
    batch = TokenBatch(token_T=token_T, position_T=position_T, segment_T=segment_T, slot_T=slot_T)
    logits_GJV = np.asarray(_logits_GJV(base, pool, batch, jnp.zeros((G, length)), form=form))
    return [
        np.split(logits_GJV[g, : len(lane)], np.cumsum([len(s) for s in lane.sequences])[:-1])
        for g, lane in enumerate(lanes)
    ]


def logits_alone(base: Base, sequences: Sequence[np.ndarray], length: int) -> list[np.ndarray]:
    """float32 [T, V] of every sequence, each in a lane of its own."""
    return [found for (found,) in logits_of(base, [Lane([ids_T]) for ids_T in sequences], length)]
