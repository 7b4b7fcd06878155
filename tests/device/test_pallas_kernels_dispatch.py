"""Which body runs: chosen by the platform a program is lowered for, under every transformation the callers use."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P
from kernel_checks import assert_same_bits, floats, gathered

from pallas_kernels import dispatch
from pallas_kernels.cross_entropy.op import target_logprob
from pallas_kernels.dispatch import TABLE, by_platform, traced_for
from pallas_kernels.segmented_lora.op import segmented_lora

F32, BF16 = jnp.float32, jnp.bfloat16


def shape(*sizes, dtype=BF16):
    return jax.ShapeDtypeStruct(sizes, dtype)


def kernels(function, *args, platform="tpu"):
    """Names of the Mosaic kernels in the program lowered for that platform."""
    with traced_for(platform):
        text = jax.jit(function).trace(*args).lower(lowering_platforms=(platform,)).as_text()
    return [line.split('kernel_name = "')[1].split('"')[0] for line in text.splitlines() if "tpu_custom_call" in line]


def decode(dtype=BF16, rank=16, features=256, out=384):
    rows = [(shape(2, 4, rank, features, dtype=dtype), shape(2, 4, rank, out, dtype=dtype), shape(2, 4, dtype=F32))]
    return shape(8, features, dtype=dtype), rows, shape(dtype=jnp.int32), shape(8, dtype=jnp.int32)


def train(dtype=BF16, rank=16, features=256, out=384):
    rows = [(shape(2, rank, features, dtype=F32), shape(2, rank, out, dtype=F32), shape(2, dtype=F32))]
    return shape(2, 32, features, dtype=dtype), rows


def loss(x, rows):
    return sum(y.astype(F32).sum() for y in segmented_lora(x, rows))


def words(dtype=BF16, features=256):
    x, head = shape(2, 32, features, dtype=dtype), shape(features, 1000, dtype=dtype)
    return x, head, shape(1000, features, dtype=dtype), shape(2, 32, 1, dtype=jnp.int32), shape(2, 32, dtype=bool)


def logprob(x, head, back, target, wanted):
    return target_logprob(x, head, back, target, wanted, None, chunk=32, tied=False)


def test_the_platform_lowered_for_decides():
    for platform in ("cpu", "cuda"):
        assert kernels(gathered, *decode(), platform=platform) == []
        assert kernels(segmented_lora, *train(), platform=platform) == []
        assert kernels(logprob, *words(), platform=platform) == []
    assert kernels(logprob, *words()) == ["target_logprob"]
    assert kernels(gathered, *decode()) == ["gathered_lora"]
    assert kernels(segmented_lora, *train()) == ["segmented_lora"]


@pytest.mark.parametrize(
    ("pallas", "triton", "want"),
    [(True, True, (1, 3, 2)), (True, False, (1, 1, 2)), (False, True, (1, 3, 1)), (False, False, (1, 1, 1))],
    ids=["both", "no Triton", "no Pallas", "neither"],
)
def test_each_platform_takes_its_body_or_what_the_table_says_otherwise(pallas, triton, want):
    """Each body multiplies by a number of its own."""

    def op(x):
        bodies = {
            "pallas": (lambda interpret: lambda x: x * 2) if pallas else None,
            "triton": (lambda: lambda x: x * 3) if triton else None,
        }
        return by_platform("gathered_lora", x, xla=lambda x: x * 1, **bodies)

    found = []
    for platform in ("cpu", "cuda", "tpu"):
        with traced_for("cpu", "cuda", "tpu"):
            text = jax.jit(op).trace(shape(4, dtype=F32)).lower(lowering_platforms=(platform,)).as_text()
        found.append(int(float(re.search(r"dense<([0-9.e+]+)> : tensor<f32>", text)[1])))
    assert tuple(found) == want


@pytest.mark.parametrize(
    ("route", "flags", "wanted"),
    [
        ("cubin", "", "JAXLORA_TRITON must be one of jax-triton, xla, got 'cubin'"),
        ("xla", "--xla_gpu_enable_pdl=true", "JAXLORA_TRITON=xla needs --xla_gpu_enable_pdl=false in XLA_FLAGS"),
    ],
)
def test_a_route_of_triton_kernels_that_cannot_work_is_refused(route, flags, wanted, monkeypatch):
    monkeypatch.setenv("JAXLORA_TRITON", route)
    monkeypatch.setenv("XLA_FLAGS", flags)
    with pytest.raises(ValueError, match=re.escape(wanted)):
        dispatch.cuda_body()


def test_bodies_are_traced_for_this_process_or_for_whom_is_named():
    traced = []

    def op(x):
        def body(name):
            return lambda x: traced.append(name) or x

        return by_platform("gathered_lora", x, xla=body("xla"), pallas=lambda interpret: body("pallas"))

    def trace(*platforms):
        traced.clear()
        with traced_for(*platforms):
            return jax.jit(op).trace(shape(4))

    here = jax.default_backend()
    found = trace()
    assert "pallas" not in traced or here == "tpu"
    with pytest.raises(NotImplementedError):
        found.lower(lowering_platforms=("tpu" if here != "tpu" else "cuda",))
    trace("tpu").lower(lowering_platforms=("tpu",))
    assert traced == ["pallas"]


def test_gradients_have_their_own_bodies():
    back = ["segmented_lora", "segmented_lora_expand_back", "segmented_lora_shrink_back"]
    assert kernels(jax.grad(loss, argnums=(0, 1)), *train()) == back
    assert kernels(jax.grad(loss, argnums=(0, 1)), *train(), platform="cpu") == []


def test_under_scan_and_checkpoint():
    def model(x, rows):
        @jax.checkpoint
        def layer(x, _):
            return x + segmented_lora(x, rows)[0], None

        return jax.lax.scan(layer, x, None, length=3)[0].astype(F32).sum()

    found = kernels(jax.grad(model, argnums=1), *train(out=256))
    assert sorted(set(found)) == ["segmented_lora", "segmented_lora_expand_back", "segmented_lora_shrink_back"]


def test_what_is_traced_is_recorded_once_with_the_reason_of_a_fall_back():
    with dispatch.recorded("tpu") as choices:
        jax.eval_shape(gathered, *decode())
        jax.eval_shape(lambda *args: gathered(*args), *decode())
        jax.eval_shape(gathered, *decode(rank=4096, out=2**16))
        jax.eval_shape(segmented_lora, *train(dtype=jnp.float16))
    room, dtype = "no kernel takes bfloat16[8, 256], ", "its kernels take bfloat16 and float32, not float16"
    assert [(c.op, c.body) for c in choices] == [
        ("gathered_lora", "pallas"),
        ("gathered_lora", "xla"),
        ("segmented_lora", "xla"),
    ]
    assert choices[0].reason is None
    assert choices[1].reason.startswith(room)
    assert choices[2].reason == dtype
    jax.eval_shape(segmented_lora, *train(rank=4))
    assert len(choices) == 3
    with dispatch.recorded("rocm") as choices:
        jax.eval_shape(segmented_lora, *train(rank=4))
    assert choices == []


def test_under_shard_map():
    x, rows, layer, slots = decode()
    mesh = AbstractMesh((4,), ("tensor",), axis_types=(AxisType.Auto,))
    split = P(None, None, None, "tensor")
    specs = (P(), [(P(), split, P())], P(), P())
    sharded = jax.shard_map(gathered, mesh=mesh, in_specs=specs, out_specs=(P(None, "tensor"),), check_vma=False)
    assert kernels(sharded, x, rows, layer, slots) == ["gathered_lora"]


@pytest.mark.parametrize(
    ("function", "args"),
    [
        (gathered, decode(dtype=jnp.float16)),
        (gathered, decode(rank=4096, out=2**16)),
        (segmented_lora, train(dtype=jnp.float16)),
        (segmented_lora, train(rank=4096, out=2**16 + 1)),
        (logprob, words(dtype=jnp.float16)),
        (logprob, words(features=2**16)),
    ],
    ids=[
        "decode in float16",
        "rows beyond the chip",
        "lanes in float16",
        "no block has room",
        "words in float16",
        "no tile has room",
    ],
)
def test_the_table_routes_what_the_kernel_cannot_do(function, args):
    assert kernels(function, *args) == []


@pytest.mark.parametrize("platform", ["rocm", "oneapi"])
def test_a_platform_that_the_table_lacks_is_refused(platform):
    with pytest.raises(NotImplementedError, match=platform):
        kernels(gathered, *decode(), platform=platform)
    with pytest.raises(NotImplementedError, match=platform):
        kernels(segmented_lora, *train(), platform=platform)
    with pytest.raises(NotImplementedError, match=platform):
        kernels(logprob, *words(), platform=platform)


def test_the_docstring_shows_the_table():
    shown, op = {}, ""
    for line in dispatch.__doc__.split("why\n")[1].split("\n\n")[0].splitlines():
        words = line.split()
        if words[0] in TABLE:
            op, words = words[0], words[1:]
        if words[0] in ("cpu", "cuda", "tpu"):
            shown.setdefault(op, {})[words[0]] = [words[1]]
            last = shown[op][words[0]]
        else:
            last.append(words[0])
    assert shown == {
        op: {p: [r.body] if r.body == r.otherwise else [r.body, r.otherwise] for p, r in routes.items()}
        for op, routes in TABLE.items()
    }


def test_interpreted_bodies_are_a_configuration_that_jit_sees():
    def op(x):
        return by_platform("gathered_lora", x, xla=lambda x: x, pallas=lambda interpret: lambda x: x + 1, triton=None)

    step = jax.jit(op)
    assert step(0.0) == 0
    with dispatch.interpreted():
        assert step(0.0) == 1
    assert step(0.0) == 0


def test_a_name_inside_a_body_is_kept_under_checkpoint():
    """What the XLA body of segmented_lora relies on: h is kept and not computed again."""
    rng = np.random.default_rng(0)
    x, w = floats(rng, 4, 8), floats(rng, 8, 8)

    def body(x, w):
        return jnp.sin(checkpoint_name(x @ w, "kept"))

    def gradient(f):
        policy = jax.checkpoint_policies.save_only_these_names("kept")
        return jax.grad(lambda x, w: jax.checkpoint(f, policy=policy)(x, w).sum(), argnums=(0, 1))

    def op(x, w):
        return by_platform("segmented_lora", x, w, xla=body, pallas=lambda interpret: body, triton=None)

    compiled = [jax.jit(gradient(f)).lower(x, w).compile() for f in (op, body)]
    assert compiled[0].as_text().count(" dot(") == compiled[1].as_text().count(" dot(") == 3
    assert_same_bits(compiled[0](x, w), compiled[1](x, w))
