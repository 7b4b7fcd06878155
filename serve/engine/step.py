"""The serving step: one function, jitted once a shape.  It computes lanes of known tokens and samples what follows.

A batch travels as one array (`Layout`): one transfer to the device in place of one for each field.

Shape letters: G lanes, J tokens of a lane, T = G * J, C pages per sequence, D model, V vocabulary, M = 20 best tokens,
W words of a packed lane.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from jaxlora.core.lora import HEAD_TARGET
from jaxlora.model.decoder import Base, TokenBatch, forward, head_logits
from jaxlora.model.kv_cache import KVPages, page_format, paged_attend
from jaxlora.model.lora_pool import LoraLayout
from jaxlora.model.mesh import attention_placement, replicated
from jaxlora.model.serving_pool import PoolLora, ServingPool
from pallas_kernels import NO_ADAPTER
from pallas_kernels.rows.op import logsumexp
from serve.engine.logit_edits import LogitEdits
from serve.engine.request import MAX_TOP_LOGPROBS
from serve.engine.sampling import PromptScores, SamplingBatch, StepOutput, sample

SCORED_BYTES = 2**26  # of logits at a time, of all lanes together


@dataclass(frozen=True, slots=True)
class Layout[T]:
    """Where the fields of a batch lie in a packed lane.  Hashable: it is a static argument of a program.

    All fields have lanes as their first axis and elements of four bytes, or bool.
    """

    tree: jax.tree_util.PyTreeDef
    fields: tuple[tuple[tuple[int, ...], str], ...]  # of each: shape without its first axis, character of its dtype

    @classmethod
    def of(cls, batch: T) -> Layout[T]:
        """Returns the layout of batches like this one, of any number of lanes."""
        leaves, tree = jax.tree.flatten(batch)
        assert all(x.dtype.itemsize == 4 or x.dtype == bool for x in leaves)
        return cls(tree, tuple((x.shape[1:], x.dtype.char) for x in leaves))

    def pack(self, batch: T) -> np.ndarray:
        """Packs a NumPy batch into int32 [G, W]."""
        leaves = self.tree.flatten_up_to(batch)
        words = [x.astype(np.int32) if x.dtype == bool else x.view(np.int32) for x in leaves]
        return np.concatenate([x.reshape(len(x), -1) for x in words], axis=1)

    def unpack(self, words_GW: jax.Array) -> T:
        """Unpacks the batch, bit for bit.  Within a program."""
        leaves, start = [], 0
        for shape, dtype in self.fields:
            end = start + math.prod(shape)
            x = words_GW[:, start:end].reshape(-1, *shape)
            leaves.append(x != 0 if dtype == "?" else lax.bitcast_convert_type(x, jnp.dtype(dtype)))
            start = end
        return self.tree.unflatten(leaves)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """The tokens of one program: lanes of prompt chunks, or one token per running sequence (J = 1)."""

    token_GJ: jax.Array  # int32
    position_GJ: jax.Array  # int32 place in the sequence; -1 is padding
    slot_G: jax.Array  # int32 serving slot; NO_ADAPTER is the base model
    page_GC: jax.Array  # int32 pages of the lane's sequence, in order
    last_G: jax.Array  # int32 the token of the lane whose successor is sampled
    target_GJ: jax.Array  # int32 the known token that follows, where its log-probability is wanted; else -1
    sampling: SamplingBatch

    @staticmethod
    def idle(lanes: int, tokens: int, pages: int) -> StepBatch:
        """Returns a NumPy batch of padding, with so many pages a lane, for the host to fill."""
        arrays = {
            "token_GJ": np.zeros((lanes, tokens), np.int32),
            "position_GJ": np.full((lanes, tokens), -1, np.int32),
            "slot_G": np.full(lanes, NO_ADAPTER, np.int32),
            "page_GC": np.zeros((lanes, pages), np.int32),
            "last_G": np.zeros(lanes, np.int32),
            "target_GJ": np.full((lanes, tokens), -1, np.int32),
        }
        return StepBatch(**arrays, sampling=SamplingBatch.idle(lanes))  # ty: ignore[invalid-argument-type]


def _serve_step(
    base: Base, pool: ServingPool, kv: KVPages, batch: StepBatch, edits: LogitEdits
) -> tuple[KVPages, StepOutput]:
    G, J = batch.token_GJ.shape
    layout = LoraLayout(config=base.config, mesh=base.mesh)
    lora = PoolLora(pool, batch.slot_G, J, base.config.layers, layout)
    tokens = TokenBatch(
        token_T=batch.token_GJ.reshape(-1),
        position_T=batch.position_GJ.reshape(-1),
        segment_T=(batch.position_GJ >= 0).astype(jnp.int32).reshape(-1),
        slot_T=jnp.repeat(batch.slot_G, J),
    )
    attend = paged_attend(batch.page_GC, batch.position_GJ, base.config.window, attention_placement(base.mesh))
    x_TD, kv = forward(base, tokens, lora, attend, kv)

    def logits(x_TD: jax.Array) -> jax.Array:
        """Returns float32 [T, V]."""
        with jax.default_matmul_precision(base.precision):
            logits_TV = head_logits(base, x_TD)
            if HEAD_TARGET in pool:
                (delta_TV,) = lora.product(jnp.int32(0), (HEAD_TARGET,), x_TD)
                logits_TV = logits_TV + delta_TV.astype(jnp.float32)
        return logits_TV

    x_GJD = x_TD.reshape(G, J, -1)
    x_GD = jnp.take_along_axis(x_GJD, batch.last_G[:, None, None], axis=1)[:, 0]
    out = sample(logits(x_GD), edits, batch.sampling)
    if J > 1:
        out = replace(out, scores=_scores(logits, x_GJD, batch.target_GJ, base.config.vocab))
    return kv, out


def _scores(
    logits: Callable[[jax.Array], jax.Array], x_GJD: jax.Array, target_GJ: jax.Array, vocab: int
) -> PromptScores:
    """Scores the targets, a few positions of all lanes at a time; a step without targets does not compute them."""
    G, J, D = x_GJD.shape
    count = min(MAX_TOP_LOGPROBS, vocab)
    wide = max(w for w in range(1, J + 1) if J % w == 0 and (w == 1 or G * w * vocab * 4 <= SCORED_BYTES))

    def some(_: None, of: tuple[jax.Array, jax.Array]) -> tuple[None, PromptScores]:
        x_GwD, target_Gw = of
        logits_TV = logits(x_GwD.reshape(G * wide, D))
        logits_GwV, total_Gw1 = logits_TV.reshape(G, wide, vocab), logsumexp(logits_TV).reshape(G, wide, 1)
        own_Gw1 = jnp.take_along_axis(logits_GwV, jnp.maximum(target_Gw, 0)[:, :, None], axis=-1)
        value_GwM, token_GwM = lax.top_k(logits_GwV, count)
        return None, PromptScores(
            logprob_GJ=(own_Gw1 - total_Gw1)[:, :, 0],
            rank_GJ=1 + (logits_GwV > own_Gw1).sum(-1, dtype=jnp.int32),
            top_token_GJM=token_GwM,
            top_logprob_GJM=value_GwM - total_Gw1,
        )

    def all_of_them(x_GJD: jax.Array) -> PromptScores:
        x, target = (a.reshape(G, J // wide, wide, *a.shape[2:]).swapaxes(0, 1) for a in (x_GJD, target_GJ))
        _, scores = lax.scan(some, None, (x, target))
        return jax.tree.map(lambda a: a.swapaxes(0, 1).reshape(G, J, *a.shape[3:]), scores)

    def none(x_GJD: jax.Array) -> PromptScores:
        return PromptScores(
            logprob_GJ=jnp.zeros((G, J), jnp.float32),
            rank_GJ=jnp.zeros((G, J), jnp.int32),
            top_token_GJM=jnp.zeros((G, J, count), jnp.int32),
            top_logprob_GJM=jnp.zeros((G, J, count), jnp.float32),
        )

    return lax.cond((target_GJ >= 0).any(), all_of_them, none, x_GJD)


def _packed_step(
    base: Base, pool: ServingPool, kv: KVPages, words_GW: jax.Array, edits: LogitEdits, layout: Layout[StepBatch]
) -> tuple[KVPages, StepOutput]:
    return _serve_step(base, pool, kv, layout.unpack(words_GW), edits)


def step_program(mesh: Mesh) -> jax.stages.Wrapped:
    """Returns the jitted step: (base, pool, pages, packed batch, edits, layout of the batch) → (pages, output).

    The pages are donated.
    """
    out = (page_format(mesh), replicated(mesh))
    return jax.jit(_packed_step, donate_argnums=2, static_argnums=5, out_shardings=out)
