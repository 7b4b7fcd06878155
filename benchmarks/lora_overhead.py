"""What LoRA adds to whole steps of the demo model: decode against the bytes bound, prefill and training against the base.

    uv run python benchmarks/lora_overhead.py [decode|prefill|training ...] [--dtype bfloat16] [--rounds 9]

decode     32 tokens, one a sequence, over 16 and over 32 distinct adapters: LoRA may add 2.5 times the time in which the
           device reads their bytes once, at the bandwidth it is measured to have
prefill    8 lanes x 64 prompt tokens, each its own adapter: 1.2 times the step of the base
training   8 lanes x 128 tokens, forward and backward without the optimizer: 1.2 times the base, whose backward pass
           goes down to the first norm

Rank 16 on all seven projections.  Base and ours are run in turn, and compared round by round: the median counts, of the
process's CPU time (of wall time on an accelerator).  Decode runs more rounds, as it adds little to a step.  Beside it stand
the alternatives of `jaxlora bench kernels`.  Exit code 1 when a bound is missed.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora.checkpoints.load import open_base
from jaxlora.config.base import DEMO_MODEL, ONE_DEVICE, ModelSection
from jaxlora.model import compile_cache
from jaxlora.model.decoder import Base, Lora, TokenBatch, forward, head_logits
from jaxlora.model.kv_cache import KVPages, PagedLanes, empty_pages, paged_attend
from jaxlora.model.lora_pool import LoraRows, PoolSpec, Rows, empty_pool
from jaxlora.model.serving_pool import PoolLora
from pallas_kernels.bench import run as bench
from pallas_kernels.bench.cases import GATHERED_ALTERNATIVES
from pallas_kernels.gathered_lora.pool_rows import of_slots
from serve.engine.logit_edits import LogitEdits
from serve.engine.sampling import SamplingBatch, sample
from train.bench import TrainingSizes, base_pass, examples_of, full_lanes
from train.step.batch import LaneSums, TrainBatch
from train.step.state import States, empty_state
from train.step.step import accumulate

RANK, SLOTS, ROWS = 16, 40, 32
DECODE_ROUNDS = 8  # of decode in one of prefill and training
PREFILL, TRAIN = (8, 64), (8, 128)  # lanes, tokens
PAGE, PAGES_EACH, FILLED = 64, 2, 64  # KV tokens a page, pages a sequence, tokens already there in decode
STEPS = ("decode", "prefill", "training")
DECODE_LIMIT, LANES_LIMIT = 2.5, 1.2


class NoLora:
    """Lora of the base model alone."""

    per_layer: tuple[()] = ()

    def deltas(self, layer: object, targets: tuple[str, ...], x_TX: jax.Array) -> tuple[None, ...]:
        """Returns no deltas."""
        return (None,) * len(targets)


class Alternative:
    """An adapted linear of decode by another form than ours."""

    def __init__(self, pool: Rows, slot_T: jax.Array, layers: int, form: Callable[..., jax.Array]):
        self.pool, self.slot_T, self.form = pool, slot_T, form
        self.per_layer = jnp.arange(layers)

    def deltas(self, layer: jax.Array, targets: tuple[str, ...], x_TX: jax.Array) -> tuple[jax.Array, ...]:
        """[T, Y] per target."""
        rows = [self.pool[t] for t in targets]
        return tuple(
            self.form(x_TX, r.a_LSRX[layer], r.b_LSRY[layer], r.scale_LS[layer], self.slot_T).astype(x_TX.dtype)
            for r in rows
        )


def random_pool(base: Base, dtype: str) -> Rows:
    """Every slot filled with small numbers."""
    pool = empty_pool(base.config, PoolSpec(slots=SLOTS, rank=RANK, dtype=dtype), base.mesh)
    rng = np.random.default_rng(0)

    def small(x: jax.Array) -> jax.Array:
        return jnp.asarray(rng.standard_normal(x.shape, np.float32) * 0.01, x.dtype)

    return {
        t: LoraRows(a_LSRX=small(r.a_LSRX), b_LSRY=small(r.b_LSRY), scale_LS=jnp.full_like(r.scale_LS, 2.0))
        for t, r in pool.items()
    }


def of_lanes(tokens: int) -> Callable[[Rows, jax.Array, int], Lora]:
    """LoRA as a server computes it, of lanes of so many tokens."""

    def make(pool: Rows, slot_G: jax.Array, layers: int) -> Lora:
        serving = {t: of_slots(r.a_LSRX, r.b_LSRY, r.scale_LS) for t, r in pool.items()}
        return PoolLora(serving, slot_G, tokens, layers)

    return make


def serve_step(
    make_lora: Callable[[Rows, jax.Array, int], Lora],
    base: Base,
    pool: Rows,
    kv: KVPages,
    slot_G: jax.Array,
    tokens: int,
) -> tuple[KVPages, jax.Array]:
    """(KV, next token [G]): a serving step of G lanes with `tokens` each; one token stands after FILLED others."""
    G = slot_G.shape[0]
    place_GJ = jnp.broadcast_to(jnp.arange(tokens) + (FILLED if tokens == 1 else 0), (G, tokens)).astype(jnp.int32)
    page_GC = jnp.arange(G * PAGES_EACH, dtype=jnp.int32).reshape(G, PAGES_EACH)
    batch = TokenBatch(
        token_T=(jnp.arange(G * tokens, dtype=jnp.int32) * 37) % base.config.vocab,
        position_T=place_GJ.reshape(-1),
        segment_T=jnp.ones(G * tokens, jnp.int32),
        slot_T=jnp.repeat(slot_G, tokens),
    )
    lora = make_lora(pool, slot_G, base.config.layers)
    attend = paged_attend([PagedLanes(page_GC=page_GC, position_GJ=place_GJ)], base.config.window)
    x_TD, kv = forward(base, batch, lora, attend, kv)
    logits_GV = head_logits(base, x_TD.reshape(G, tokens, -1)[:, -1])
    edits = jax.tree.map(jnp.asarray, LogitEdits.idle(G, 1, base.config.vocab))
    return kv, sample(logits_GV, edits, jax.tree.map(jnp.asarray, SamplingBatch.idle(G))).token_B


def gradients(base: Base, pool: Rows, batch: TrainBatch) -> Callable[[], LaneSums]:
    """A call that adds the gradients of these lanes to their slots."""
    spec = PoolSpec(slots=SLOTS, rank=RANK, dtype="float32")
    states: list[States] = [(replace(empty_state(base, spec, base.mesh), pool=pool),)]
    step = jax.jit(accumulate, donate_argnums=1)

    def run() -> LaneSums:
        states[0], sums = step(base, states[0], batch)
        return sums

    return run


def none(pool: Rows, slot_G: jax.Array, layers: int) -> NoLora:
    """The base alone."""
    return NoLora()


def serving(base: Base, pool: Rows, form: Callable, slots: np.ndarray, tokens: int) -> Callable[[], jax.Array]:
    """A call of one step; KV is written in place."""
    kv = [empty_pages(base.config, base.mesh, pages=len(slots) * PAGES_EACH, page_tokens=PAGE, dtype=base.dtype)]
    step = jax.jit(functools.partial(serve_step, form, tokens=tokens), donate_argnums=2)
    slot_G = jax.device_put(slots.astype(np.int32))

    def run() -> jax.Array:
        kv[0], token_G = step(base, pool, kv[0], slot_G)
        return token_G

    return run


def main() -> int:
    """0 when every bound holds, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", default=STEPS, help="of " + ", ".join(STEPS) + "; default: all")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    args = parser.parse_args()
    compile_cache.enable(None)
    base = open_base(ModelSection(path=DEMO_MODEL, dtype=args.dtype), ONE_DEVICE).base
    served, trained = random_pool(base, args.dtype), random_pool(base, "float32")
    adapter_bytes = sum(h.nbytes for r in served.values() for h in (r.a_LSRX, r.b_LSRY)) / SLOTS
    bandwidth = bench.ceilings(args.dtype, rounds=args.rounds)
    failed = 0

    def show(name: str, timings: dict[str, bench.Timing], bound_s: float | None, limit: float) -> None:
        """bound_s: what LoRA may add is a multiple of it; without it ours is a multiple of the base."""
        nonlocal failed
        base_s, ours_s = timings["base"].seconds, timings["ours"].seconds
        added_s = float(np.median(ours_s - base_s))
        ratio = added_s / bound_s if bound_s else float(np.median(ours_s / base_s))
        failed += ratio > limit
        forms = {n: {"cpu_s": np.median(t.cpu_s), "wall_s": np.median(t.wall_s)} for n, t in timings.items()}
        if args.json:
            row = {"step": name, "bound": "bytes" if bound_s else "base", "bound_s": bound_s, "added_s": added_s}
            print(json.dumps(row | {"ratio": ratio, "limit": limit} | forms))
            return
        times = "  ".join(f"{form} {t['cpu_s'] * 1e3:.0f}/{t['wall_s'] * 1e3:.0f}" for form, t in forms.items())
        of = f"bytes {bound_s * 1e3:.1f} ms" if bound_s else "base"
        word = "ok" if ratio <= limit else "TOO SLOW"
        print(
            f"{name:20} LoRA +{added_s * 1e3:.1f} ms, {ratio:.2f} of {of} (limit {limit})  {word}   {times}", flush=True
        )

    if not args.json:
        print(f"{bandwidth.read_bytes_s / 1e9:.1f} GB/s read, {bandwidth.flops_s / 1e9:.0f} GFLOP/s; ms: CPU/wall")
    others = {n: functools.partial(Alternative, form=f) for n, f in GATHERED_ALTERNATIVES.items()}
    rng = np.random.default_rng(1)
    for distinct in (16, 32) if "decode" in args.steps else ():
        slots = rng.permutation(np.repeat(rng.choice(SLOTS, distinct, replace=False), ROWS // distinct))

        def timed(forms: dict[str, Callable], rounds: int, slots: np.ndarray = slots) -> dict[str, bench.Timing]:
            return bench.measure({n: serving(base, served, form, slots, 1) for n, form in forms.items()}, rounds)

        timings = timed({"base": none, "ours": of_lanes(1)}, DECODE_ROUNDS * args.rounds) | timed(others, args.rounds)
        bound_s = distinct * adapter_bytes / bandwidth.read_bytes_s
        show(f"decode, {distinct} adapters", timings, bound_s, DECODE_LIMIT)
    if "prefill" in args.steps:
        runs = {
            name: serving(base, served, form, np.arange(PREFILL[0]), PREFILL[1])
            for name, form in {"base": none, "ours": of_lanes(PREFILL[1])}.items()
        }
        show("prefill 8 x 64", bench.measure(runs, args.rounds), None, LANES_LIMIT)
    if "training" in args.steps:
        sizes = TrainingSizes(tenants=1, lanes=TRAIN[0], tokens=TRAIN[1], rank=RANK)
        batch = full_lanes(examples_of(0, sizes, base.config.vocab), range(TRAIN[0]))
        runs = {"base": base_pass(base, batch), "ours": gradients(base, trained, batch)}
        show("training 8 x 128", bench.measure(runs, args.rounds), None, LANES_LIMIT)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
