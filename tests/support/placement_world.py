"""LoRA, attention and loss on a mesh of eight virtual CPU devices against one device, in one process of its own; prints how many cases agree.

XLA_FLAGS=--xla_force_host_platform_device_count=8 python tests/support/placement_world.py xla|interpreted
"""

from __future__ import annotations

import contextlib
import functools
import re
import sys

import compiled  # noqa: F401  # jax as in the tests
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from kernel_checks import F32, assert_close, floats, gathered

from jaxlora.model.decoder import sum_with_parts
from jaxlora.model.mesh import make_mesh
from pallas_kernels import dispatch
from pallas_kernels.attention.op import packed_attention
from pallas_kernels.cross_entropy.op import target_logprob
from pallas_kernels.paged_attention.op import paged_attention
from pallas_kernels.segmented_lora.op import segmented_lora
from pallas_kernels.sharding import Placement

L, S, R, X, T, G, J = 2, 4, 4, 16, 8, 4, 8
DECODE_X = 384  # and its half, in the blocks of decode on a CPU
WIDTHS = (8, 4)


def decode(placement: Placement | None, interpreted: bool):
    """What both targets add to eight tokens, two of them of the base model."""
    rng = np.random.default_rng(0)
    rows = [(floats(rng, L, S, R, DECODE_X) / 16, floats(rng, L, S, R, y), floats(rng, L, S)) for y in WIDTHS]
    slots = np.array([0, 2, -1, 1, 3, 2, 0, -1], np.int32)
    with dispatch.interpreted() if interpreted else contextlib.nullcontext():
        step = jax.jit(lambda *args: gathered(*args, placement=placement))
        if placement is not None and placement.apart:
            return tuple(y.sum(0) for y in step(floats(rng, T, DECODE_X), rows, jnp.int32(1), slots))
        return step(floats(rng, T, DECODE_X), rows, jnp.int32(1), slots)


def prompts(placement: Placement | None, interpreted: bool):
    """What both targets add to four lanes of eight tokens, one of them of the base model."""
    rng = np.random.default_rng(5)
    rows = [(floats(rng, L, S, R, X), floats(rng, L, S, R, y), floats(rng, L, S)) for y in WIDTHS]
    slots = np.array([2, -1, 0, 2], np.int32)
    with dispatch.interpreted() if interpreted else contextlib.nullcontext():
        step = jax.jit(lambda *args: gathered(*args, placement=placement))
        return step(floats(rng, G * J, X), rows, jnp.int32(1), slots)


def train(placement: Placement | None, interpreted: bool):
    """What both targets add to four lanes, and all gradients."""
    rng = np.random.default_rng(1)
    rows = [(floats(rng, G, R, X), floats(rng, G, R, y), floats(rng, G)) for y in WIDTHS]
    weights = [floats(rng, G, J, y) for y in WIDTHS]

    def loss(x, rows):
        return sum((y * w).sum() for y, w in zip(segmented_lora(x, rows, placement), weights, strict=True))

    with dispatch.interpreted() if interpreted else contextlib.nullcontext():
        step = jax.jit(lambda x, rows: (segmented_lora(x, rows, placement), jax.grad(loss, (0, 1))(x, rows)))
        return step(floats(rng, G, J, X), rows)


def lanes_attend(placement: Placement | None, interpreted: bool):
    """Four packed lanes, and all gradients."""
    rng = np.random.default_rng(2)
    q, k, v, w = (floats(rng, G, J, heads, 4) for heads in (4, 2, 2, 4))
    segments = np.array([[1] * 3 + [2] * 5, [1] * 8, [1] * 2 + [0] * 6, [0] * 8], np.int32)

    def loss(q, k, v):
        return (packed_attention(q, k, v, segments, window=None, placement=placement) * w).sum()

    with dispatch.interpreted() if interpreted else contextlib.nullcontext():
        return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(q, k, v)


def pages_attend(placement: Placement | None, interpreted: bool):
    """Four lanes of two tokens, one of them empty, on pages of four tokens."""
    rng = np.random.default_rng(3)
    q, k, v = floats(rng, G, 2, 4, 4), floats(rng, L, 9, 4, 2 * 4), floats(rng, L, 9, 4, 2 * 4)
    pages = np.array([[3, 5], [0, -1], [-1, -1], [8, 1]], np.int32)
    positions = np.array([[5, 6], [0, -1], [-1, -1], [3, 4]], np.int32)
    with dispatch.interpreted() if interpreted else contextlib.nullcontext():
        step = jax.jit(lambda *args: paged_attention(*args, window=None, placement=placement))
        return step(q, k, v, jnp.int32(1), pages, positions)


def words(tied: bool, lora: bool, placement: Placement | None, interpreted: bool):
    """Log-probabilities of two targets of some tokens of four lanes over 10 words, and all gradients."""
    rng = np.random.default_rng(4)
    x, head, halves, scale = (
        floats(rng, G, J, X),
        floats(rng, X, 10),
        (floats(rng, G, R, X), floats(rng, G, R, 10)),
        floats(rng, G),
    )
    target, wanted = rng.integers(0, 10, (G, J, 2), dtype=np.int32), rng.random((G, J)) < 0.7
    weights = floats(rng, G, J, 2)

    def loss(x, halves, scale, head):
        rows, options = (*halves, scale) if lora else None, {"chunk": 4, "tied": tied, "placement": placement}
        logprob, hit = target_logprob(x, head, head.T, target, wanted, rows, **options)
        return (logprob * weights).sum(), (logprob, hit)

    with dispatch.interpreted() if interpreted else contextlib.nullcontext():
        return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(x, halves, scale, head)


def attention_collectives(mesh: Mesh) -> set[str]:
    """The collectives of attention and its gradients as compiled: XLA must find a device's own bounds on that device.

    A bound over all devices inside a loop can wait for ever: XLA's CPU devices do not keep one order of collectives.
    """
    lanes, heads = NamedSharding(mesh, P(("data", "fsdp"))), NamedSharding(mesh, P(("data", "fsdp"), None, "tensor"))
    placement = Placement(mesh=mesh, rows=("data", "fsdp"), heads="tensor")

    def attend(q, k, v, segments, w):
        out, back = jax.vjp(lambda *a: packed_attention(*a, segments, window=None, placement=placement), q, k, v)
        return out, back(w)

    def floats_of(count):
        return jax.ShapeDtypeStruct((G, J, count, 4), jnp.float32, sharding=heads)

    segments = jax.ShapeDtypeStruct((G, J), jnp.int32, sharding=lanes)
    args = floats_of(4), floats_of(2), floats_of(2), segments, floats_of(4)
    return set(re.findall(r"all-reduce|all-gather|all-to-all", jax.jit(attend).lower(*args).compile().as_text()))


def linear_collectives(mesh: Mesh) -> list[str]:
    """The collectives of a row-parallel linear with its adapters as compiled."""
    placement = Placement(mesh=mesh, x="tensor", apart=True)
    split = NamedSharding(mesh, P(None, "tensor"))

    def linear(x, w, rows, slots):
        return sum_with_parts(x, w, gathered(x, [rows], jnp.int32(1), slots, placement=placement)[0])

    x = jax.ShapeDtypeStruct((T, DECODE_X), jnp.float32, sharding=split)
    w = jax.ShapeDtypeStruct((DECODE_X, 8), jnp.float32, sharding=NamedSharding(mesh, P("tensor")))
    a = jax.ShapeDtypeStruct(
        (L, S, R, DECODE_X), jnp.float32, sharding=NamedSharding(mesh, P(None, None, None, "tensor"))
    )
    b, scale = (jax.ShapeDtypeStruct(sizes, jnp.float32) for sizes in ((L, S, R, 8), (L, S)))
    text = jax.jit(linear).lower(x, w, (a, b, scale), jax.ShapeDtypeStruct((T,), jnp.int32)).compile().as_text()
    return re.findall(r" (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?\(", text)


def main(interpreted: bool) -> None:
    assert linear_collectives(make_mesh(tensor=8)) == ["all-reduce"]
    mesh = make_mesh(2, 2, 2)
    assert attention_collectives(mesh) == set()
    attention = [{"rows": ("data", "fsdp"), "heads": "tensor"}]
    splits = {
        decode: [
            {"rows": ("data",), "x": "fsdp", "y": "tensor"},
            {"rows": ("data", "fsdp"), "y": "tensor"},
            {"rows": ("data", "fsdp"), "x": "tensor"},
            {"rows": ("data", "fsdp"), "x": "tensor", "apart": True},
            {},
        ],
        prompts: [
            {"rows": ("data", "fsdp"), "y": "tensor"},
            {"rows": ("data", "fsdp"), "x": "tensor"},
            {},
        ],
        train: [
            {"rows": ("data", "fsdp"), "y": "tensor"},
            {"rows": ("data", "fsdp"), "x": "tensor"},
            {"rows": ("data",)},
        ],
        lanes_attend: attention,
        pages_attend: attention,
        functools.partial(words, True, True): [{"rows": ("data", "fsdp"), "y": "tensor"}, {"rows": ("data",)}],
        functools.partial(words, False, False): [{"rows": ("data", "fsdp"), "y": "tensor"}],
    }
    agreed = 0
    for run, ways in splits.items():
        want = run(None, False)
        for way in ways:
            got = run(Placement(mesh=mesh, **way), interpreted)
            # Sums of up to 128 products of size 10; split over devices they are summed in another order.
            assert_close(got, want, F32 | {"atol": 1e-4})
            agreed += 1
    print(agreed)


if __name__ == "__main__":
    main(sys.argv[1] == "interpreted")
