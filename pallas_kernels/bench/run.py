"""Times ops against the device's measured peak rates, their base product and their alternatives.

Every program is compiled and run before it is timed, then all forms of a case run in turn; the minimum over rounds
counts.  On a CPU the process's own CPU time counts (all its threads, no other processes), elsewhere wall time.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.bench.cases import MODELS, OPS, Case, Sizes
from pallas_kernels.native.library import instruction_set
from pallas_kernels.product.op import Packed, pack, packed_shape
from pallas_kernels.product.op import product as packed_product

SAMPLE_S = 0.02  # seconds of calls between two clock readings: a process's CPU time lags by milliseconds
MOST_CALLS = 64


@dataclass(frozen=True, slots=True)
class Timing:
    """Times of a call in each round, float64 [rounds]."""

    cpu_s: np.ndarray
    wall_s: np.ndarray

    @property
    def seconds(self) -> np.ndarray:
        """Returns the times of the clock that counts on this backend."""
        return self.cpu_s if jax.default_backend() == "cpu" else self.wall_s

    @property
    def best_s(self) -> float:
        """Returns the minimum."""
        return float(self.seconds.min())


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Peak rates of the device, measured by programs that do nothing else."""

    read_bytes_s: float  # of a sum of a large array, or a copy if that is faster
    flops_s: float  # of a square product, or with packed weights if that is faster


def device_name() -> str:
    """Returns the platform and kind of the device that is measured."""
    return f"{jax.default_backend()}: {jax.devices()[0].device_kind}"


def measure(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Timing]:
    """Times each run, all of them in turn in each round."""
    on_cpu = jax.default_backend() == "cpu"
    calls, samples = {}, {name: [] for name in runs}
    for name, run in runs.items():
        jax.block_until_ready(run())
        start_s = time.perf_counter()
        jax.block_until_ready(run())
        calls[name] = min(MOST_CALLS, math.ceil(SAMPLE_S / (time.perf_counter() - start_s)))
    for _ in range(rounds):
        for name, run in runs.items():
            cpu_s, wall_s = time.process_time(), time.perf_counter()
            out = None
            for _ in range(calls[name]):
                out = run()
                if on_cpu:  # calls in flight would share its cores
                    jax.block_until_ready(out)
            jax.block_until_ready(out)
            wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
            samples[name].append((cpu_s / calls[name], wall_s / calls[name]))
    return {name: Timing(*np.array(of).T) for name, of in samples.items()}


def ceilings(dtype: str, *, rounds: int, megabytes: int | None = None, side: int | None = None) -> Ceilings:
    """Measures the default device's peak rates.  The array must not fit its caches."""
    on_cpu = jax.default_backend() == "cpu"
    megabytes = megabytes or (256 if on_cpu else 1024)
    side = side or (1024 if on_cpu else 8192)
    large, square = jnp.ones(megabytes << 18, jnp.float32), jnp.ones((side, side), dtype)
    total, copy = jax.jit(jnp.sum), jax.jit(lambda x: x + 1)
    product = jax.jit(lambda x: jnp.dot(x, x, preferred_element_type=jnp.float32).astype(x.dtype))
    runs = {"read": lambda: total(large), "copy": lambda: copy(large), "gemm": lambda: product(square)}
    if on_cpu and instruction_set() is not None:
        runs["packed"] = _packed_product(square)
    took = {name: t.best_s for name, t in measure(runs, rounds).items()}
    product_s = min(took["gemm"], took.get("packed", math.inf))
    return Ceilings(max(large.nbytes / took["read"], 2 * large.nbytes / took["copy"]), 2 * side**3 / product_s)


def _packed_product(square: jax.Array) -> Callable[[], object]:
    """Returns a call of the native product of a square array with itself, packed."""
    side = len(square)
    blocks = np.zeros((1, *packed_shape(side, side, square.dtype)), square.dtype)
    pack(np.asarray(square), blocks[0])
    weight = Packed(blocks=jnp.asarray(blocks), features_in=side, features_out=side)
    return _bound(jax.jit(lambda x, w: packed_product(x, [w], jnp.int32(0))), (square, weight))


def time_case(case: Case, ceiling: Ceilings, rounds: int) -> dict:
    """Times one case and returns its row, as JSON; the op and the model are the caller's to name."""
    runs = {name: _bound(jax.jit(form), args) for name, (form, args) in case.forms.items()}
    timings = measure(runs, rounds)
    ours_s = timings["ours"].best_s
    return {
        "shape": case.shape,
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "seconds": ours_s,
        "bytes_s": case.bytes / ours_s,
        "flops_s": case.flops / ours_s,
        "bytes_share": case.bytes / ours_s / ceiling.read_bytes_s,
        "flops_share": case.flops / ours_s / ceiling.flops_s,
        "ratio": {name: ours_s / t.best_s for name, t in timings.items() if name != "ours"},
    }


def _bound(form: Callable[..., object], args: tuple) -> Callable[[], object]:
    args = jax.device_put(args)
    return lambda: form(*args)


def as_line(row: Mapping) -> str:
    """Formats a row as text."""
    ratios = "  ".join(f"{name} {ratio:.2f}" for name, ratio in row["ratio"].items())
    return (
        f"{row['op']:18} {row['shape']:34} {row['seconds'] * 1e3:9.3f} ms"
        f" {row['bytes_s'] / 1e9:8.1f} GB/s ({row['bytes_share']:4.0%})"
        f" {row['flops_s'] / 1e9:9.1f} GFLOP/s ({row['flops_share']:4.0%})   {ratios}"
    )


def main(
    *,
    ops: list[str],
    models: list[str],
    dtype: str,
    sizes: Sizes,
    rounds: int,
    as_json: bool,
    say: Callable[[str], None],
) -> None:
    """Times ops (all, if none is named) in one layer of each model.  Raises ValueError for an unknown name."""
    for names, known, what in ((ops, OPS, "op"), (models, MODELS, "model")):
        unknown = [n for n in names if n not in known]
        if unknown:
            raise ValueError(f"unknown {what} {', '.join(unknown)}; known: {', '.join(known)}")
    ceiling = ceilings(dtype, rounds=rounds)
    device, clock = jax.devices()[0], "CPU" if jax.default_backend() == "cpu" else "wall"
    if not as_json:
        say(f"{device.platform}: {device.device_kind}, jax {jax.__version__}, {dtype}, {clock} time, least of {rounds}")
        say(f"ceilings: {ceiling.read_bytes_s / 1e9:.1f} GB/s, {ceiling.flops_s / 1e9:.1f} GFLOP/s")
        say("columns: time, achieved bytes and FLOPs a second (share of the ceiling), then our time as a multiple of")
        say("the base product's and of each alternative's")
    for model in models or MODELS:
        if not as_json:
            say(f"-- {model}, one layer")
        for op in ops or OPS:
            for case in OPS[op](MODELS[model], dtype, sizes):
                row = {"op": op, "model": model} | time_case(case, ceiling, rounds)
                say(json.dumps(row) if as_json else as_line(row))
