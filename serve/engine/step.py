"""The serving step: one function, jitted once a shape.  It computes lanes of known tokens and samples what follows.

On a CPU it is one program.  Elsewhere it ends with logits, and the host starts the programs that the step's rows need after it
(`StepPrograms`): so no program waits for the host to find out what comes next, and none reads logits for nobody.  There one
program may take two batches, lanes of prompt chunks and decode rows after them, which share each read of the base's weights.

A batch travels as one array (`PackedBatch`): one transfer to the device in place of one for each field.

Shape letters: G lanes of one batch, J tokens of a lane, T tokens of all batches, B lanes of all batches, C pages per sequence,
D model, V vocabulary, M = 20 best tokens, W words of a packed lane.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from jaxlora.core.lora import HEAD_TARGET
from jaxlora.model.decoder import Base, TokenBatch, forward, head_logits
from jaxlora.model.kv_cache import KVPages, PagedLanes, page_format, paged_attend
from jaxlora.model.lora_pool import LoraLayout
from jaxlora.model.mesh import attention_placement, place_array, replicated, sharding
from jaxlora.model.serving_pool import MixedLora, PoolLora, ServingPool
from pallas_kernels import NO_ADAPTER
from pallas_kernels.rows.op import logsumexp, top_k
from serve.engine.logit_edits import LogitEdits
from serve.engine.request import MAX_TOP_LOGPROBS
from serve.engine.sampling import (
    PromptScores,
    SamplingBatch,
    StepOutput,
    Work,
    best_alternatives,
    choose,
    sample,
)

SCORED_BYTES = 2**26  # of logits at a time, of all lanes together
NEWEST = -1  # a token that lies on the device only: the newest of the lane's place
NO_PLACE = -1  # of a lane whose token is not kept


@dataclass(frozen=True, slots=True)
class Layout[T]:
    """Where the fields of a batch lie in a packed lane.  Hashable: a program is compiled for it.

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

    def views(self, words_GW: np.ndarray) -> T:
        """Returns the fields of a packed NumPy batch as views of it; bool fields are int32.  Fields have two axes at most."""
        leaves, start = [], 0
        for shape, dtype in self.fields:
            end = start + math.prod(shape)
            x = words_GW[:, start:end] if shape else words_GW[:, start]
            leaves.append(x if dtype == "?" else x.view(dtype))
            start = end
        return self.tree.unflatten(leaves)

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

    token_GJ: jax.Array  # int32; NEWEST: the one that a program before has chosen for this place
    position_GJ: jax.Array  # int32 place in the sequence; -1 is padding
    slot_G: jax.Array  # int32 serving slot; NO_ADAPTER is the base model
    page_GC: jax.Array  # int32 pages of the lane's sequence, in order
    last_G: jax.Array  # int32 the token of the lane whose successor is sampled
    place_G: jax.Array  # int32 where what is sampled is kept on the device for the next program; NO_PLACE: nowhere
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
            "place_G": np.full(lanes, NO_PLACE, np.int32),
            "target_GJ": np.full((lanes, tokens), -1, np.int32),
        }
        return StepBatch(**arrays, sampling=SamplingBatch.idle(lanes))  # ty: ignore[invalid-argument-type]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """A batch as one array, in NumPy or on the device."""

    words_GW: np.ndarray | jax.Array  # int32
    tokens: int = jax.tree.static()  # J
    layout: Layout[StepBatch] = jax.tree.static()

    @staticmethod
    def of(batch: StepBatch) -> PackedBatch:
        """Packs a NumPy batch."""
        layout = Layout.of(batch)
        return PackedBatch(words_GW=layout.pack(batch), tokens=batch.token_GJ.shape[1], layout=layout)

    @property
    def lanes(self) -> int:
        """The number of lanes, G."""
        return len(self.words_GW)

    @property
    def fields(self) -> StepBatch:
        """Returns the fields in NumPy as views, to be written; bool fields are int32 of 0 and 1."""
        assert isinstance(self.words_GW, np.ndarray)
        return self.layout.views(self.words_GW)

    def unpack(self) -> StepBatch:
        """Unpacks the batch.  Within a program."""
        return self.layout.unpack(jnp.asarray(self.words_GW))


PackedBatches = tuple[PackedBatch, ...]  # of one program: prompt chunks, decode rows, or these after those


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Computed:
    """What a step without sampling leaves on the device."""

    logits_BV: jax.Array  # float32, of each lane's last token
    x_GJD: jax.Array | None  # what the head reads of each token of prompt chunks; None where there are none


def _head(base: Base, pool: ServingPool, lora: PoolLora | MixedLora) -> Callable[[jax.Array], jax.Array]:
    """Returns the function [T, D] → float32 [T, V] logits."""

    def logits(x_TD: jax.Array) -> jax.Array:
        with jax.default_matmul_precision(base.precision):
            logits_TV = head_logits(base, x_TD)
            if HEAD_TARGET in pool:
                (delta_TV,) = lora.product(jnp.int32(0), (HEAD_TARGET,), x_TD)
                logits_TV = logits_TV + delta_TV.astype(jnp.float32)
        return logits_TV

    return logits


def _lora(base: Base, pool: ServingPool, batch: StepBatch) -> PoolLora:
    layout = LoraLayout(config=base.config, mesh=base.mesh)
    return PoolLora(pool, batch.slot_G, batch.token_GJ.shape[1], base.config.layers, layout)


def _compute(
    base: Base, pool: ServingPool, kv: KVPages, batches: Sequence[StepBatch]
) -> tuple[KVPages, jax.Array, jax.Array, Callable[[jax.Array], jax.Array]]:
    """Returns (pages, [B, V] logits, [G, J, D] what the head reads of the first batch, the head)."""
    loras = [_lora(base, pool, batch) for batch in batches]
    lora = loras[0] if len(loras) == 1 else MixedLora(*loras)
    tokens = [
        TokenBatch(
            token_T=batch.token_GJ.reshape(-1),
            position_T=batch.position_GJ.reshape(-1),
            segment_T=(batch.position_GJ >= 0).astype(jnp.int32).reshape(-1),
            slot_T=jnp.repeat(batch.slot_G, batch.token_GJ.shape[1]),
        )
        for batch in batches
    ]
    lanes = [PagedLanes(page_GC=batch.page_GC, position_GJ=batch.position_GJ) for batch in batches]
    attend = paged_attend(lanes, base.config.window, attention_placement(base.mesh))
    x_TD, kv = forward(base, _joined(tokens), lora, attend, kv)
    ends = np.cumsum([batch.token_GJ.size for batch in batches]).tolist()
    x_GJDs = [
        x_TD[end - batch.token_GJ.size : end].reshape(*batch.token_GJ.shape, -1)
        for batch, end in zip(batches, ends, strict=True)
    ]
    last = [
        jnp.take_along_axis(x_GJD, batch.last_G[:, None, None], axis=1)[:, 0]
        for batch, x_GJD in zip(batches, x_GJDs, strict=True)
    ]
    logits = _head(base, pool, lora)
    return kv, logits(_joined(last)), x_GJDs[0], logits


def _joined[T](parts: Sequence[T]) -> T:
    """Returns the arrays of several batches, one batch's rows after the other's."""
    return parts[0] if len(parts) == 1 else jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *parts)


def _scores(
    logits: Callable[[jax.Array], jax.Array], x_GJD: jax.Array, target_GJ: jax.Array, vocab: int
) -> PromptScores:
    """Scores the targets, a few positions of all lanes at a time."""
    G, J, D = x_GJD.shape
    wide = max(w for w in range(1, J + 1) if J % w == 0 and (w == 1 or G * w * vocab * 4 <= SCORED_BYTES))

    def some(_: None, of: tuple[jax.Array, jax.Array]) -> tuple[None, PromptScores]:
        x_GwD, target_Gw = of
        logits_TV = logits(x_GwD.reshape(G * wide, D))
        logits_GwV, total_Gw1 = logits_TV.reshape(G, wide, vocab), logsumexp(logits_TV).reshape(G, wide, 1)
        own_Gw1 = jnp.take_along_axis(logits_GwV, jnp.maximum(target_Gw, 0)[:, :, None], axis=-1)
        value_TM, token_TM = top_k(logits_TV, min(MAX_TOP_LOGPROBS, vocab))
        return None, PromptScores(
            logprob_GJ=(own_Gw1 - total_Gw1)[:, :, 0],
            rank_GJ=1 + (logits_GwV > own_Gw1).sum(-1, dtype=jnp.int32),
            top_token_GJM=token_TM.reshape(G, wide, -1),
            top_logprob_GJM=value_TM.reshape(G, wide, -1) - total_Gw1,
        )

    x, target = (a.reshape(G, J // wide, wide, *a.shape[2:]).swapaxes(0, 1) for a in (x_GJD, target_GJ))
    _, scores = lax.scan(some, None, (x, target))
    return jax.tree.map(lambda a: a.swapaxes(0, 1).reshape(G, J, *a.shape[3:]), scores)


def _no_scores(G: int, J: int, vocab: int) -> PromptScores:
    count = min(MAX_TOP_LOGPROBS, vocab)
    return PromptScores(
        logprob_GJ=jnp.zeros((G, J), jnp.float32),
        rank_GJ=jnp.zeros((G, J), jnp.int32),
        top_token_GJM=jnp.zeros((G, J, count), jnp.int32),
        top_logprob_GJM=jnp.zeros((G, J, count), jnp.float32),
    )


def with_newest(batch: StepBatch, newest_B: jax.Array) -> StepBatch:
    """Returns the batch with its tokens that lie on the device only."""
    newest_G1 = newest_B[jnp.maximum(batch.place_G, 0)][:, None]
    return replace(batch, token_GJ=jnp.where(batch.token_GJ == NEWEST, newest_G1, batch.token_GJ))


def keep_newest(newest_B: jax.Array, place_B: jax.Array, token_B: jax.Array) -> jax.Array:
    """Returns the newest token of each place, int32 [rows], with those that these lanes have chosen."""
    place_B = jnp.where(place_B == NO_PLACE, len(newest_B), place_B)
    return newest_B.at[place_B].set(token_B, mode="drop")


def _packed_step(
    base: Base,
    pool: ServingPool,
    kv: KVPages,
    newest_B: jax.Array,
    packed: PackedBatches,
    edits: LogitEdits | None,
) -> tuple[KVPages, Computed | tuple[jax.Array, StepOutput]]:
    """Returns (pages, (newest tokens, output)); edits: of one batch.  None leaves the sampling to other programs."""
    batches = [with_newest(one.unpack(), newest_B) for one in packed]
    kv, logits_BV, x_GJD, head = _compute(base, pool, kv, batches)
    G, J = batches[0].token_GJ.shape
    if edits is None:
        return kv, Computed(logits_BV=logits_BV, x_GJD=x_GJD if J > 1 else None)
    (batch,) = batches
    out = sample(logits_BV, edits, batch.sampling)
    if J > 1:
        vocab = base.config.vocab
        scores = lax.cond(
            (batch.target_GJ >= 0).any(),
            lambda x_GJD: _scores(head, x_GJD, batch.target_GJ, vocab),
            lambda _: _no_scores(G, J, vocab),
            x_GJD,
        )
        out = replace(out, scores=scores)
    return kv, (keep_newest(newest_B, batch.place_G, out.token_B), out)


def _packed_choice(
    logits_BV: jax.Array, newest_B: jax.Array, packed: PackedBatches, edits: LogitEdits | None, work: Work
) -> tuple[jax.Array, StepOutput, jax.Array]:
    """Returns (newest tokens, output, `best_alternatives`' total)."""
    batches = [one.unpack() for one in packed]
    out, total_B = choose(logits_BV, edits, _joined([batch.sampling for batch in batches]), work)
    return keep_newest(newest_B, _joined([batch.place_G for batch in batches]), out.token_B), out, total_B


def _packed_scores(base: Base, pool: ServingPool, x_GJD: jax.Array, packed: PackedBatch) -> PromptScores:
    batch = packed.unpack()
    return _scores(_head(base, pool, _lora(base, pool, batch)), x_GJD, batch.target_GJ, base.config.vocab)


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """What a step's output must hold."""

    work: Work
    alternatives: bool  # the likeliest tokens of some row
    scores: bool  # of known tokens

    @staticmethod
    def of(*batches: StepBatch, edited: bool) -> Needs:
        """Returns what the rows of the NumPy batches of one program need."""
        return Needs(
            work=max(Work.of(batch.sampling, edited=edited) for batch in batches),
            alternatives=any(batch.sampling.logprobs_B.any() for batch in batches),
            scores=any(batch.token_GJ.shape[1] > 1 and (batch.target_GJ >= 0).any() for batch in batches),
        )

    def ask(self, batch: StepBatch) -> None:
        """Writes into an idle NumPy batch what needs this, but for edits."""
        batch.sampling.temperature_B[:] = self.work >= Work.DRAWN
        batch.sampling.top_k_B[:] = self.work >= Work.FILTERED
        batch.sampling.logprobs_B[:] = self.alternatives
        if self.scores:
            batch.target_GJ[:] = 0


class StepPrograms:
    """The programs of a step on a mesh: one on a CPU; elsewhere the step up to its logits, and what samples from them."""

    def __init__(self, mesh: Mesh, *, one: bool | None = None):
        """one: whether one program does all; None: as the mesh's devices want it."""
        self.one = mesh.devices.flat[0].platform == "cpu" if one is None else one
        whole = replicated(mesh)
        logits, x = sharding(mesh, ("lanes", "vocab")), sharding(mesh, ("lanes", None, None))
        left = whole if self.one else Computed(logits_BV=logits, x_GJD=x)  # ty: ignore[invalid-argument-type]
        self.step = jax.jit(_packed_step, donate_argnums=2, out_shardings=(page_format(mesh), left))
        self.choice = jax.jit(_packed_choice, static_argnums=4, out_shardings=whole)
        self.alternatives = jax.jit(best_alternatives, out_shardings=whole)
        self.scores = jax.jit(_packed_scores, out_shardings=whole)

    def needs(self, tokens: int) -> list[Needs]:
        """Returns needs that together start every program there is for batches, the first with lanes of so many tokens."""
        if self.one:
            return [Needs(work=Work.GREEDY, alternatives=False, scores=False)]
        first, *others = (Needs(work=work, alternatives=False, scores=False) for work in Work)
        return [replace(first, alternatives=True, scores=tokens > 1), *others]

    def launch(
        self,
        base: Base,
        pool: ServingPool,
        kv: KVPages,
        newest_B: jax.Array,
        packed: PackedBatches,
        edits: LogitEdits,
        needs: Needs,
    ) -> tuple[KVPages, jax.Array, StepOutput]:
        """Starts a step and what samples from it.  Returns (pages, newest tokens, output); the pages given are donated.

        newest_B: int32 [rows], one for each place of the decode batch.  packed: one batch where one program does all.
        edits: of the lanes of all batches, in order, as the output is.
        """
        if self.one:
            kv, (newest_B, out) = self.step(base, pool, kv, newest_B, packed, edits)
            return kv, newest_B, out
        kv, computed = self.step(base, pool, kv, newest_B, packed, None)
        asked = edits if needs.work is Work.EDITED else None
        newest_B, out, total_B = self.choice(computed.logits_BV, newest_B, packed, asked, needs.work)
        if needs.alternatives:
            top_token_BM, top_logprob_BM = self.alternatives(computed.logits_BV, total_B)
            out = replace(out, top_token_BM=top_token_BM, top_logprob_BM=top_logprob_BM)
        if needs.scores:
            out = replace(out, scores=self.scores(base, pool, computed.x_GJD, packed[0]))
        return kv, newest_B, out


def no_tokens(mesh: Mesh, rows: int) -> jax.Array:
    """Returns the newest tokens, int32 [rows], before the first program."""
    return place_array(np.zeros(rows, np.int32), replicated(mesh))
