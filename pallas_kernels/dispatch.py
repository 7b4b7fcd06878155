"""Selects which body of an op runs: ONE table, by the platform a program is lowered for.

An op is one definition (its reference) with several bodies.  The choice is made when the program is lowered, not when
traced: a process with a GPU may run programs on its CPU too.  Bodies are traced for the platforms of this process alone, as
tracing takes much of a start's time; `traced_for` names others, for whoever lowers for a TPU on a machine without one.
Lowering for a platform that was not traced for, or that the table lacks, raises an error.

    op               platform   body     why
    product          cpu        native   weights packed once, when they are loaded
                                xla      without the native bodies: no compiler, another CPU than x86 with AVX2
                     cuda       xla      weights are never packed there
                     tpu        xla      weights are never packed there
    product_back     cpu        native   few rows, with AMX any in bfloat16: weights are read packed
                                xla      other rows, whose products are worth unpacking for; without the native bodies
                     cuda       xla      weights are never packed there
                     tpu        xla      weights are never packed there
    gathered_lora    cpu        native   an adapter's rows are read once for eight of its tokens, base tokens cost nothing
                                xla      pairs of an adapter's tokens, lanes of prompts; for odd features, on several devices
                     cuda       triton   an adapter's rows are read once for 16 of its tokens, 32 of a prompt, base tokens cost nothing
                                xla      without the extra `triton`, for more tokens or rank than it takes, other dtypes
                     tpu        pallas   an adapter's rows are fetched once, base tokens cost nothing
                                xla      where one adapter's rows have no room on the chip, and for other dtypes
    segmented_lora   cpu        xla      products batched over lanes, measured best
                     cuda       triton   targets share one read of x, backward dy is read once
                                xla      without the extra `triton`, for more rank than it takes, other dtypes
                     tpu        pallas   targets share one read of x, h stays on the chip
                                xla      where no block has room on the chip, and for other dtypes
    packed_attention cpu        xla      a loop over blocks that skips foreign segments, measured best
                     cuda       triton   each lane skips its own foreign segments, no scores leave the chip
                                xla      without the extra `triton`, for heads above 256, for other or mixed dtypes
                     tpu        pallas   JAX's splash attention
                                xla      for other dtypes
    paged_attention  cpu        native   each sequence has its own loop over its own places
                                xla      without the native bodies, for other heads than they take, on several devices
                     cuda       triton   reads pages in place, once for all queries of a kv head, long sequences by several programs
                                xla      without the extra `triton`, for heads above 256, for other or mixed dtypes
                     tpu        pallas   copies the pages that a sequence attends to, the next while it computes
                                xla      where no run of tokens has room on the chip, and for other dtypes
    rms_norm         cpu        native   a row's sum has one order
                                xla      without the native bodies
                     cuda       xla      elementwise and one sum: XLA fuses them
                     tpu        xla      elementwise and one sum: XLA fuses them
    logsumexp        cpu        native   a row's sum has one order
                                xla      without the native bodies
                     cuda       xla      elementwise and one sum: XLA fuses them
                     tpu        xla      elementwise and one sum: XLA fuses them
    row_summary      cpu        native   reductions one by one, as XLA's CPU backend computes a joint one by elements
                                xla      the same, without the native bodies
                     cuda       xla      one joint reduction: the row is read once
                     tpu        xla      one joint reduction: the row is read once
    top_k            cpu        xla      XLA's own
                     cuda       xla      the largest of each block, then the best blocks alone: XLA's own sorts the row
                     tpu        xla      the largest of each block, then the best blocks alone: XLA's own sorts the row
    draw             cpu        native   a row's sums have one order, thresholds are found by three histograms
                                xla      as elsewhere, thresholds by more passes of fewer sums, without the native bodies
                     cuda       xla      sums of blocks, thresholds by a few passes that try several each
                     tpu        xla      sums of blocks, thresholds by a few passes that try several each
    adamw            cpu        xla      slot after slot, in place (`train.step.update`)
                     cuda       triton   weights, gradients and moments are read and written once
                                xla      without the extra `triton`, for moments in fewer bits
                     tpu        pallas   weights, gradients and moments are read and written once
                                xla      where no block has room on the chip, for moments in fewer bits
    target_logprob   cpu        xla      chunks of tokens, measured best
                     cuda       triton   logits stay on the chip, their gradient is in memory for some tokens at a time
                                xla      without the extra `triton`, for more rank than it takes, features split, other dtypes
                     tpu        pallas   logits stay on the chip, the head is read where it lies
                                xla      where no tile has room on the chip, where features are split, for other dtypes

The native bodies are compiled when the package is built, where there is a compiler (`native.library`); `cpu_body` reports on them.
The Triton bodies were compiled and interpreted, never run on a GPU: installing the extra enables them.  `cuda_body` and
`jaxlora doctor` report whether it is installed.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Collection, Generator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.extend.mlir import ir
from jax.interpreters import ad, batching, mlir

from pallas_kernels import tiling_cuda
from pallas_kernels.native import library

DTYPES = (jnp.bfloat16, jnp.float32)  # dtypes of activations and rows in the kernels


@dataclass(frozen=True, slots=True)
class Route:
    """The body of an op on a platform, and the fallback for what the first cannot do."""

    body: str  # xla, native, pallas or triton
    otherwise: str


XLA, NATIVE, PALLAS, TRITON = (Route(body, "xla") for body in ("xla", "native", "pallas", "triton"))
TABLE = {
    "product": {"cpu": NATIVE, "cuda": XLA, "tpu": XLA},
    "product_back": {"cpu": NATIVE, "cuda": XLA, "tpu": XLA},
    "gathered_lora": {"cpu": NATIVE, "cuda": TRITON, "tpu": PALLAS},
    "segmented_lora": {"cpu": XLA, "cuda": TRITON, "tpu": PALLAS},
    "packed_attention": {"cpu": XLA, "cuda": TRITON, "tpu": PALLAS},
    "paged_attention": {"cpu": NATIVE, "cuda": TRITON, "tpu": PALLAS},
    "rms_norm": {"cpu": NATIVE, "cuda": XLA, "tpu": XLA},
    "logsumexp": {"cpu": NATIVE, "cuda": XLA, "tpu": XLA},
    "row_summary": {"cpu": NATIVE, "cuda": XLA, "tpu": XLA},
    "top_k": {"cpu": XLA, "cuda": XLA, "tpu": XLA},
    "draw": {"cpu": NATIVE, "cuda": XLA, "tpu": XLA},
    "adamw": {"cpu": XLA, "cuda": TRITON, "tpu": PALLAS},
    "target_logprob": {"cpu": XLA, "cuda": TRITON, "tpu": PALLAS},
}

# Whether a row of the result has the same bits whatever the program's rows and lanes, by platform and body.  True:
# measured, and a test requires it.  False: measured to differ in the last bits.  None: not measured.  Callers that mix
# programs of several shapes may rely on equal bits only where all that runs is True.
# "product" is one with the base's frozen weights, packed or not.
_CUDA: dict[str, bool | None] = {"triton": None, "xla": None}
_TPU: dict[str, bool | None] = {"pallas": None, "xla": None}
SHAPE_INDEPENDENT: dict[str, dict[str, dict[str, bool | None]]] = {
    # With AVX-512 the products of few rows use other tiles than those of many.
    "product": {"cpu": {"native": True, "xla": False}, "cuda": {"xla": None}, "tpu": {"xla": None}},
    # More rows are XLA's, but with AMX.
    "product_back": {"cpu": {"native": False, "xla": None}, "cuda": {"xla": None}, "tpu": {"xla": None}},
    # One or two tokens at a time with the same bits, whatever their number; measured on an x86 CPU with code for SSE4.2, AVX2
    # and AVX-512 (`XLA_FLAGS=--xla_cpu_max_isa=...`), not on ARM.
    "gathered_lora": {"cpu": {"native": True, "xla": True}, "cuda": _CUDA, "tpu": _TPU},
    # Equal in all tests on one kind of CPU: too little for a promise.
    "segmented_lora": {"cpu": {"xla": None}, "cuda": _CUDA, "tpu": _TPU},
    # Differ in float32 with 64 features per head.
    "packed_attention": {"cpu": {"xla": False}, "cuda": _CUDA, "tpu": _TPU},
    "paged_attention": {"cpu": {"native": True, "xla": False}, "cuda": _CUDA, "tpu": _TPU},
    # Sums over few features, or of few rows, take another order.
    "rms_norm": {"cpu": {"native": True, "xla": False}, "cuda": {"xla": None}, "tpu": {"xla": None}},
    "logsumexp": {"cpu": {"native": True, "xla": False}, "cuda": {"xla": None}, "tpu": {"xla": None}},
    # Has the log of a sum.
    "row_summary": {"cpu": {"native": True, "xla": False}, "cuda": {"xla": None}, "tpu": {"xla": None}},
    "top_k": {"cpu": {"xla": True}, "cuda": {"xla": None}, "tpu": {"xla": None}},
    # Which of two tokens is drawn hangs on a sum.
    "draw": {"cpu": {"native": True, "xla": False}, "cuda": {"xla": None}, "tpu": {"xla": None}},
    "adamw": {"cpu": {"xla": None}, "cuda": _CUDA, "tpu": _TPU},  # a slot's bits do not depend on how many are due
    "target_logprob": {"cpu": {"xla": None}, "cuda": _CUDA, "tpu": _TPU},
}

_interpreted = jax.make_user_context(False)
_traced_for = jax.make_user_context(())  # platforms; none: those of this process


@dataclass(frozen=True, slots=True)
class Choice:
    """The body that a call of an op got on a platform."""

    op: str
    body: str
    reason: str | None  # why it is not the one that the table prefers; None where it is


_choices: contextvars.ContextVar[tuple[str, list[Choice]] | None] = contextvars.ContextVar("choices", default=None)


@contextlib.contextmanager
def interpreted() -> Generator[None]:
    """Runs the Pallas bodies of whatever is traced inside, interpreted, on any platform.  For tests: it is slow."""
    with _interpreted(True):
        yield


@contextlib.contextmanager
def traced_for(*platforms: str) -> Generator[None]:
    """Traces the bodies of these platforms of the table, in place of this process's, in whatever is traced inside."""
    with _traced_for(platforms):
        yield


def _platforms() -> tuple[str, ...]:
    """Returns the platforms whose bodies are traced."""
    if _traced_for.value:
        return _traced_for.value
    here = jax.default_backend()
    return ("cpu",) if here == "cpu" else ("cpu", table_platform(here))


def table_platform(device_platform: str) -> str:
    """Returns the name in the table of a platform of devices."""
    return "cuda" if device_platform == "gpu" else device_platform


@contextlib.contextmanager
def recorded(platform: str) -> Generator[list[Choice]]:
    """Notes the choices of whatever is traced inside by this thread, for the platform: each once, in their order.

    What was traced before is not traced again, and not noted.
    """
    choices: list[Choice] = []
    token = _choices.set((platform, choices))
    try:
        yield choices
    finally:
        _choices.reset(token)


def _note(op: str, bodies: Collection[str], args: tuple) -> None:
    if (recording := _choices.get()) is None:
        return
    platform, choices = recording
    if (route := TABLE[op].get(platform)) is None:  # refused when it is lowered
        return
    choice = Choice(op, route.body, None)
    if route.body not in bodies:
        choice = Choice(op, route.otherwise, _why_not(route.body, args))
    if choice not in choices:
        choices.append(choice)


def _why_not(body: str, args: tuple) -> str:
    """Returns why a body cannot run with these arguments here."""
    if body == "native" and library.instruction_set() is None:
        return "the native bodies are not built"
    if body == "triton" and not tiling_cuda.installed():
        return "the extra `triton` is not installed"
    arrays = [x for x in jax.tree.leaves(args) if jnp.issubdtype(x.dtype, jnp.floating)]
    other = sorted({str(x.dtype) for x in arrays if x.dtype not in DTYPES})
    if other:
        return f"its kernels take bfloat16 and float32, not {', '.join(other)}"
    return f"no kernel takes {', '.join(f'{x.dtype}{list(x.shape)}' for x in arrays)}"


def usual(op: str, platform: str) -> Choice:
    """Returns the choice of a call whose arrays fit."""
    route = TABLE[op][platform]
    if route.body == "native" and library.instruction_set() is None:
        return Choice(op, route.otherwise, _why_not(route.body, ()))
    return Choice(op, route.body, None)


def by_platform[*Args, Out](
    op: str,
    *args: *Args,
    xla: Callable[[*Args], Out],
    xla_on_cpu: Callable[[*Args], Out] | None = None,
    native: Callable[[*Args], Out] | None = None,
    pallas: Callable[[bool], Callable[[*Args], Out]] | None = None,
    triton: Callable[[], Callable[[*Args], Out]] | None = None,
) -> Out:
    """Returns the result of the op's body for the platform on these arrays.

    xla_on_cpu: takes xla's place on a CPU.  native: the C++ body; used where it is built.  pallas, triton: make the body; Pallas' takes `interpret`.  One is None where
    these shapes do not fit, where it does not support their dtypes, or where it is not installed.  Raises NotImplementedError when lowered for a platform that the
    table lacks or that was not traced for.
    """
    if _interpreted.value and pallas is not None:
        return pallas(True)(*args)
    if _interpreted.value and TABLE[op]["tpu"] is XLA:
        return xla(*args)

    body: dict[str, Callable[..., Out]] = {"xla": xla}
    if native is not None and library.instruction_set() is not None:
        body["native"] = native
    if pallas is not None:
        body["pallas"] = lambda *args: pallas(False)(*args)
    if triton is not None:
        body["triton"] = lambda *args: triton()(*args)
    _note(op, body, args)
    routes = {platform: TABLE[op][platform] for platform in _platforms() if platform in TABLE[op]}
    if not routes:
        raise NotImplementedError(f"{op} has no body for {', '.join(_platforms())}; it has for {', '.join(TABLE[op])}")
    chosen = {platform: body.get(route.body, body[route.otherwise]) for platform, route in routes.items()}
    if xla_on_cpu is not None and chosen.get("cpu") is xla:
        chosen["cpu"] = xla_on_cpu
    if len(bodies := set(chosen.values())) == 1:  # which JAX would take on any platform
        (only,), ((first, *rest), tree) = bodies, jax.tree.flatten(jax.tree.map(jnp.asarray, args))
        return only(*tree.unflatten([_lowered_only_for.bind(first, platforms=tuple(chosen)), *rest]))
    return lax.platform_dependent(*args, **chosen)


# Gives its operand.  Raises NotImplementedError when lowered for another platform than these.
_lowered_only_for = Primitive("lowered_only_for")
_lowered_only_for.def_impl(lambda x, *, platforms: x)
_lowered_only_for.def_abstract_eval(lambda x, *, platforms: x)
ad.deflinear2(_lowered_only_for, lambda ct, x, *, platforms: [ct])
batching.defvectorized(_lowered_only_for)


def _lower_only_for(ctx: mlir.LoweringRuleContext, x: ir.Value, *, platforms: tuple[str, ...]) -> list[ir.Value]:
    if other := sorted(set(ctx.module_context.platforms) - set(platforms)):
        raise NotImplementedError(
            f"traced for {', '.join(platforms)}, lowered for {', '.join(other)}; trace it inside of `traced_for`"
        )
    return [x]


mlir.register_lowering(_lowered_only_for, _lower_only_for)


def known_dtypes(*arrays: jax.Array) -> bool:
    """Returns whether the kernels support these dtypes."""
    return all(x.dtype in DTYPES for x in arrays)


def cpu_body() -> str:
    """Returns what runs the table's ops on this CPU, for a reader."""
    chosen = library.instruction_set()
    return (
        "XLA's, as none were built (no C++ compiler, another CPU, or off)"
        if chosen is None
        else f"native, with {chosen}"
    )


def cuda_body() -> str:
    """Returns which body runs the table's ops on an NVIDIA GPU with what is installed."""
    return "triton" if tiling_cuda.installed() else "xla"
