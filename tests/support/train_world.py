"""A small random model in float32, made-up examples, a trainer on them, and the slow, plain model it is checked against.

Trainers of one session with the same shapes share their compiled programs.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxlora.config.training import CROSS_ENTROPY, MomentsDtype
from jaxlora.core.lora import ALL_TARGETS, Adapter, AdapterRef, LoraSpec
from jaxlora.core.model_config import ModelConfig, layer_count, parameters, target_features
from jaxlora.model.decoder import Base, load_base
from jaxlora.model.lora_pool import PoolSpec, Rows, host_rows
from jaxlora.model.mesh import make_mesh
from train.data.examples import Example, Pair, Rollout, fill_lane
from train.step.batch import TrainBatch, idle_batch, put_lane
from train.step.optimizer import Optimizer
from train.step.state import Due
from train.step.step import make_programs
from train.trainer import Trainer

CONFIG = ModelConfig(
    family="llama",
    layers=2,
    d_model=64,
    d_ff=96,
    heads=8,
    kv_heads=4,
    head_dim=8,
    vocab=128,
    context=256,
    norm_eps=1e-5,
    rope_theta=1000.0,
    rope_scaling=None,
    window=None,
    qkv_bias=False,
    qk_norm=False,
    tied=True,
)
LANES, LANE_TOKENS = 10, 32
SPEC = PoolSpec(slots=9, rank=8, dtype="float32", targets=ALL_TARGETS)
BASE_HASH = "random"


class RandomSource:
    """A checkpoint of random weights: the same numbers for the same configuration, on every mesh."""

    def __init__(self, config: ModelConfig = CONFIG):
        self.config = config

    def read(self, name: str, layer: int | None) -> np.ndarray:
        p = parameters(self.config)[name]
        shape = p.shape if layer is None else p.shape[1:]
        noise = np.random.default_rng([zlib.crc32(name.encode()), layer or 0]).normal(size=shape)
        if name.endswith("norm"):
            return (1 + 0.3 * noise).astype(np.float32)
        return (noise * (0.3 if name == "embed" else shape[0] ** -0.5)).astype(np.float32)


@cache
def small_base() -> Base:
    """The model on one device."""
    return load_base(RandomSource(), make_mesh(), dtype="float32")


def make_trainer(base: Base | None = None, mesh: Mesh | None = None, moments: MomentsDtype = "float32") -> Trainer:
    """A trainer that nobody sits in."""
    return Trainer(
        small_base() if base is None else base,
        make_mesh() if mesh is None else mesh,
        [SPEC],
        lanes=LANES,
        lane_tokens=LANE_TOKENS,
        base_hash=BASE_HASH,
        moments=moments,
    )


class OneBucket:
    """The programs of a trainer whose slots are all in one bucket."""

    def __init__(self, state, mesh):
        self.all = make_programs((state,), mesh)

    def accumulate(self, base, state, batch):
        (state,), sums = self.all.accumulate(base, (state,), batch)
        return state, sums

    def apply(self, state, hyper, slot_U):
        (state,), (report,) = self.all.apply((state,), (Due(hyper=hyper, slot_U=slot_U),))
        return state, report

    def train_step(self, base, state, batch, hyper, slot_U):
        (state,), sums, (report,) = self.all.train_step(base, (state,), batch, (Due(hyper=hyper, slot_U=slot_U),))
        return state, sums, report

    def evaluate(self, base, pool, batch):
        return self.all.evaluate(base, (pool,), batch)

    def seat(self, state, slot, new):
        return self.all.seat((state,), 0, slot, new)[0]

    def unseat(self, state, slot):
        return self.all.unseat((state,), 0, slot)


def examples(seed: int, count: int, longest: int = 10, shortest: int = 4, vocab: int = CONFIG.vocab) -> list[Example]:
    """Random tokens; the first third of each is a prompt without weight, the rest weighs 1 or, for some tokens, 0.5."""
    rng, made = np.random.default_rng(seed), []
    for _ in range(count):
        n = int(rng.integers(shortest, longest + 1))
        weights = rng.choice(np.array([1, 1, 0.5], np.float32), n)
        weights[: max(n // 3, 1)] = 0
        made.append(Example(rng.integers(0, vocab, n).astype(np.int32), weights))
    return made


def pairs(seed: int, count: int, longest: int = 10) -> list[Pair]:
    """Two answers each, of random lengths, to prompts of three tokens; every answer token weighs 1."""
    rng, made = np.random.default_rng(seed), []
    for _ in range(count):
        tokens = [rng.integers(0, CONFIG.vocab, int(n)).astype(np.int32) for n in rng.integers(5, longest + 1, 2)]
        tokens[1][:3] = tokens[0][:3]
        made.append(Pair(*(Example(t, (np.arange(len(t)) >= 3).astype(np.float32)) for t in tokens)))
    return made


def rollouts(seed: int, count: int, longest: int = 10) -> list[Example]:
    """`examples` that were sampled, at log-probabilities near what the small model says, with signed advantages."""
    rng = np.random.default_rng(seed)

    def sampled(example: Example) -> Example:
        n = len(example)
        advantages, logprobs = rng.normal(size=n), -5 + 0.5 * rng.normal(size=n)
        rollout = Rollout(logprobs.astype(np.float32), advantages.astype(np.float32), rng.random(n) < 0.8)
        return dataclasses.replace(example, rollout=rollout)

    return [sampled(e) for e in examples(seed, count, longest)]


def lora(rank: int, targets: Sequence[str] = ALL_TARGETS) -> LoraSpec:
    return LoraSpec(rank=rank, alpha=2.0 * rank, targets=tuple(targets))


def optimizer(**changes) -> Optimizer:
    """A constant learning rate without decay, unless told otherwise."""
    return Optimizer(**{"lr": 0.01, "schedule": "constant", "total_steps": 100} | changes)


def strong_rows(spec: LoraSpec, seed: int, config: ModelConfig = CONFIG, pool: PoolSpec = SPEC) -> Rows:
    """One slot's rows of an adapter whose halves are both far from zero."""
    rng, weights = np.random.default_rng(seed), {}
    for target in spec.targets:
        L, (x, y) = layer_count(config, target), target_features(config, target)
        a, b = rng.normal(size=(L, spec.rank, x)), rng.normal(size=(L, spec.rank, y))
        weights[target] = (0.1 * a).astype(np.float32), (0.1 * b).astype(np.float32)
    adapter = Adapter(ref=AdapterRef("t", "t", 1), spec=spec, base_hash=BASE_HASH, weights=weights)
    return host_rows(config, pool, adapter)


def batch_of(
    lanes: Sequence[tuple[int, Sequence[Example]]], count: int = LANES, length: int = LANE_TOKENS
) -> TrainBatch:
    """(slot, examples packed in this order) of each lane, in NumPy; the other lanes stay idle."""
    batch = idle_batch(count, length)
    for g, (slot, inside) in enumerate(lanes):
        lane = fill_lane(inside, length)
        put_lane(batch, g, lane, slot, CROSS_ENTROPY, lane.reference_J)
    return batch


def assert_same_bits(got: object, expected: object) -> None:
    """Two pytrees are equal bit for bit, NaN and the sign of zero included."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape) == (b.dtype, b.shape), path
        assert a.tobytes() == b.tobytes(), f"{jax.tree_util.keystr(path)} differs by up to {np.abs(a - b).max()}"


def host(tree: object) -> object:
    """A copy in NumPy that no later step touches."""
    return jax.tree.map(np.array, jax.device_get(tree))


# The plain model: dense weights with the adapter merged in, one unpacked sequence, all scores and logits at once.

Weights = Mapping[str, tuple[jax.Array, jax.Array]]  # target → (a_LRX, b_LRY)


def plain_loss(
    halves: Weights,
    scale: Mapping[str, jax.Array],
    tokens: np.ndarray,
    weights: jax.Array,
    config: ModelConfig = CONFIG,
) -> jax.Array:
    """Weighted sum of -log p over the tokens of one example; `scale` is [L] by target."""
    source = RandomSource(config)

    def dense(target: str, layer: int) -> jax.Array:
        w = source.read("embed", None).T if target == "lm_head" else source.read(target, layer)
        if target not in halves:
            return jnp.asarray(w)
        a, b = halves[target]
        return w + scale[target][layer] * a[layer].T @ b[layer]

    def norm(x: jax.Array, name: str, layer: int | None) -> jax.Array:
        return x / jnp.sqrt((x**2).mean(-1)[:, None] + config.norm_eps) * source.read(name, layer)[None]

    T, H = len(tokens) - 1, config.head_dim
    angle = np.arange(T)[:, None] * config.rope_theta ** (-np.arange(0, H, 2) / H)[None]
    turn = np.exp(1j * angle)[:, None].astype(np.complex64)

    def rotate(x: jax.Array) -> jax.Array:
        z = (x[..., : H // 2] + 1j * x[..., H // 2 :]) * turn
        return jnp.concatenate([z.real, z.imag], -1)

    x = jnp.asarray(source.read("embed", None))[tokens[:-1]]
    for i in range(config.layers):
        h = norm(x, "attn_norm", i)
        q = rotate((h @ dense("q_proj", i)).reshape(T, config.heads, H))
        k = rotate((h @ dense("k_proj", i)).reshape(T, config.kv_heads, H))
        v = (h @ dense("v_proj", i)).reshape(T, config.kv_heads, H)
        heads = []
        for n in range(config.heads):
            kv = n * config.kv_heads // config.heads
            score = jnp.where(np.tri(T, dtype=bool), q[:, n] @ k[:, kv].T / np.float32(H) ** 0.5, -jnp.inf)
            heads.append(jax.nn.softmax(score) @ v[:, kv])
        x = x + jnp.concatenate(heads, -1) @ dense("o_proj", i)
        h = norm(x, "mlp_norm", i)
        x = x + (jax.nn.silu(h @ dense("gate_proj", i)) * (h @ dense("up_proj", i))) @ dense("down_proj", i)
    logprob = jax.nn.log_softmax(norm(x, "norm", None) @ dense("lm_head", 0))
    return -(logprob[np.arange(T), tokens[1:]] * weights[1:]).sum()
