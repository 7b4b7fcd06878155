"""The serving step: one function, jitted once a shape.  It computes lanes of known tokens and samples what follows.

Shape letters: G lanes, J tokens of a lane, T = G * J, C pages per sequence, D model, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxlora.kvcache import KVPages, page_format, paged_attend
from jaxlora.lora import HEAD_TARGET
from jaxlora.mesh import attention_placement, replicated
from jaxlora.model import Base, TokenBatch, forward, head_weight
from jaxlora.pool import LoraLayout, PromptLora, Rows, TokenLora
from pallas_kernels import NO_ADAPTER
from serve.packed import Layout
from serve.sampling import SamplingBatch, StepOutput, sample


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """The tokens of one program: lanes of prompt chunks, or one token per running sequence (J = 1)."""

    token_GJ: jax.Array  # int32
    position_GJ: jax.Array  # int32 place in the sequence; -1 is padding
    slot_G: jax.Array  # int32 serving slot; NO_ADAPTER is the base model
    page_GC: jax.Array  # int32 pages of the lane's sequence, in order
    last_G: jax.Array  # int32 the token of the lane whose successor is sampled
    sampling: SamplingBatch

    @staticmethod
    def idle(lanes: int, tokens: int, pages: int) -> StepBatch:
        """A NumPy batch of padding, with so many pages a lane, for the host to fill."""
        arrays = {
            "token_GJ": np.zeros((lanes, tokens), np.int32),
            "position_GJ": np.full((lanes, tokens), -1, np.int32),
            "slot_G": np.full(lanes, NO_ADAPTER, np.int32),
            "page_GC": np.zeros((lanes, pages), np.int32),
            "last_G": np.zeros(lanes, np.int32),
        }
        return StepBatch(**arrays, sampling=SamplingBatch.idle(lanes))  # ty: ignore[invalid-argument-type]


def _serve_step(base: Base, pool: Rows, kv: KVPages, batch: StepBatch) -> tuple[KVPages, StepOutput]:
    G, J = batch.token_GJ.shape
    layout = LoraLayout(config=base.config, mesh=base.mesh)
    lora = (TokenLora if J == 1 else PromptLora)(pool, batch.slot_G, base.config.layers, layout)
    tokens = TokenBatch(
        token_T=batch.token_GJ.reshape(-1),
        position_T=batch.position_GJ.reshape(-1),
        segment_T=(batch.position_GJ >= 0).astype(jnp.int32).reshape(-1),
        slot_T=jnp.repeat(batch.slot_G, J),
    )
    attend = paged_attend(batch.page_GC, batch.position_GJ, base.config.window, attention_placement(base.mesh))
    x_TD, kv = forward(base, tokens, lora, attend, kv)
    x_GD = jnp.take_along_axis(x_TD.reshape(G, J, -1), batch.last_G[:, None, None], axis=1)[:, 0]
    with jax.default_matmul_precision(base.precision):
        logits_GV = jnp.dot(x_GD, head_weight(base)[0], preferred_element_type=jnp.float32)
        if HEAD_TARGET in pool:
            (delta_GV,) = lora.product(jnp.int32(0), (HEAD_TARGET,), x_GD)
            logits_GV = logits_GV + delta_GV.astype(jnp.float32)
    return kv, sample(logits_GV, batch.sampling)


def _packed_step(
    base: Base, pool: Rows, kv: KVPages, words_GW: jax.Array, layout: Layout[StepBatch]
) -> tuple[KVPages, StepOutput]:
    return _serve_step(base, pool, kv, layout.unpack(words_GW))


def step_program(mesh: Mesh) -> jax.stages.Wrapped:
    """The one jitted step: (base, pool, pages, packed batch, its layout) → (pages, output).  The pages are donated."""
    out = (page_format(mesh), replicated(mesh))
    return jax.jit(_packed_step, donate_argnums=2, static_argnums=4, out_shardings=out)
