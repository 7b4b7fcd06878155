# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy"]
# ///
"""Products of tokens with all linears of the demo model and its head: our packed ones beside oneDNN's, and XLA's on plain weights.

    UV_FIND_LINKS=path/to/cpu/wheels uv run python benchmarks/onednn.py [--rows 1 8 32] [--python 3.11]

Each is one pass over random weights of SmolLM2-135M's shapes in bfloat16.  oneDNN's weights are reordered once, by the function
that PyTorch's compiler uses for frozen ones, in an environment of its own (this file, run as a script).  Said: CPU and wall
milliseconds, the least of so many passes; both sides take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

LAYERS, D, F, KV, VOCAB = 30, 576, 1536, 192, 49152
READS = ((D, (D, KV, KV)), (D, (D,)), (D, (F, F)), (F, (D,)))  # features in, and out of those that share a read
PASSES, TURNS = 12, 3


def least(run: Callable[[], object]) -> tuple[float, float]:
    """(CPU, wall) ms."""
    run()
    took = []
    for _ in range(PASSES):
        cpu_s, wall_s = time.process_time(), time.perf_counter()
        run()
        took.append((time.process_time() - cpu_s, time.perf_counter() - wall_s))
    return min(c for c, _ in took) * 1e3, min(w for _, w in took) * 1e3


def theirs(rows: Sequence[int]) -> dict[int, tuple[float, float]]:
    """oneDNN's, of each number of rows."""
    import torch  # ty: ignore[unresolved-import]

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    table = [(x, y) for _ in range(LAYERS) for x, ys in READS for y in ys] + [(D, VOCAB)]
    plain = [torch.randn(y, x).bfloat16() for x, y in table]
    found = {}
    with torch.inference_mode():
        for M in rows:
            packed = [torch.ops.mkldnn._reorder_linear_weight(w, M) for w in plain]
            inputs = {x: torch.randn(M, x).bfloat16() for x in (D, F)}

            def one(packed: list = packed, inputs: dict = inputs) -> None:
                for (x, _), w in zip(table, packed, strict=True):
                    torch.ops.mkldnn._linear_pointwise(inputs[x], w, None, "none", [], "")

            found[M] = least(one)
    return found


def ours(rows: Sequence[int]) -> dict[str, dict[int, tuple[float, float]]]:
    """The native body's, and XLA's on plain weights."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax import lax

    from pallas_kernels.product.op import Packed, pack, packed_shape, product

    rng = np.random.default_rng(0)

    def packed(layers: int, x: int, y: int) -> Packed:
        host = np.empty((layers, *packed_shape(x, y, jnp.bfloat16)), jnp.bfloat16)
        pack(rng.standard_normal((x, y), np.float32), host[0])
        host[1:] = host[0]
        return Packed(blocks=jnp.asarray(host), features_in=x, features_out=y)

    linears = [[packed(LAYERS, x, y) for y in ys] for x, ys in READS]
    head = packed(1, D, VOCAB)
    plain = [[jnp.ones((LAYERS, x, y), jnp.bfloat16) for y in ys] for x, ys in READS]
    plain_head = jnp.ones((D, VOCAB), jnp.bfloat16)

    @jax.jit
    def native(x_MD: jax.Array, linears: list[list[Packed]], head: Packed) -> jax.Array:
        qkv, o, gate_up, down = linears

        def layer(x_MD: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
            out_MD = product(product(x_MD, qkv, i)[0], o, i)[0]
            return product(product(out_MD, gate_up, i)[0], down, i)[0], None

        x_MD, _ = lax.scan(layer, x_MD, jnp.arange(LAYERS))
        return product(x_MD, [head], jnp.int32(0))[0]

    @jax.jit
    def xla(x_MD: jax.Array, linears: list[list[jax.Array]], head: jax.Array) -> jax.Array:
        def layer(x_MD: jax.Array, weights: list[list[jax.Array]]) -> tuple[jax.Array, list[jax.Array]]:
            qkv, (o,), gate_up, (down,) = weights
            q, k, v = (x_MD @ w for w in qkv)
            out_MD = q @ o
            gate, up = (out_MD @ w for w in gate_up)
            return gate @ down, [k, v, up]  # so that no product is left out

        x_MD, kept = lax.scan(layer, x_MD, linears)
        return x_MD @ head + sum(x.sum() for x in kept)

    found: dict[str, dict[int, tuple[float, float]]] = {"native": {}, "XLA": {}}
    for M in rows:
        x_MD = jnp.ones((M, D), jnp.bfloat16)
        found["native"][M] = least(lambda x=x_MD: native(x, linears, head).block_until_ready())
        found["XLA"][M] = least(lambda x=x_MD: xla(x, plain, plain_head).block_until_ready())
    return found


def main() -> int:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--python", default="3.11", help="version or path of PyTorch's Python")
    parser.add_argument("--theirs", action="store_true", help="oneDNN's as JSON, within the script's environment")
    args = parser.parse_args()
    if args.theirs:
        print(json.dumps(theirs(args.rows)))
        return 0
    best: dict[str, dict[int, tuple[float, float]]] = {}
    command = ["uv", "run", "--python", args.python, "--script", __file__, "--theirs", "--rows", *map(str, args.rows)]
    for _ in range(TURNS):
        done = subprocess.run(command, cwd=Path.home(), capture_output=True, text=True, check=False)
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            return 1
        turn = {"oneDNN": {int(M): tuple(v) for M, v in json.loads(done.stdout.splitlines()[-1]).items()}}
        for name, of in (turn | ours(args.rows)).items():
            old = best.setdefault(name, of)
            best[name] = {M: (min(old[M][0], cpu), min(old[M][1], wall)) for M, (cpu, wall) in of.items()}
    print(f"| rows, CPU / wall ms | {' | '.join(map(str, args.rows))} |\n| --- {'| --: ' * len(args.rows)}|")
    for name, of in best.items():
        print(f"| {name} | {' | '.join(f'{of[M][0]:.1f} / {of[M][1]:.1f}' for M in args.rows)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
