"""KV pages go to the host and come back, every bit of them, on a mesh; prints how many moves were checked.

XLA_FLAGS=--xla_force_host_platform_device_count=8 python tests/support/offload_world.py
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from step_shapes import makers

from jaxlora.model.compile_cache import CompileCounter
from jaxlora.model.kv_cache import KVPages, page_format
from jaxlora.model.kv_offload import PAGES_A_CALL, HostPages, PageMover
from jaxlora.model.mesh import make_mesh, replicated

DTYPES = ("float32", "bfloat16")
COUNTS = (1, PAGES_A_CALL - 1, PAGES_A_CALL, PAGES_A_CALL + 1, 2 * PAGES_A_CALL + 1)
L, P, Z, F = 2, 80, 4, 8
MESH = (2, 2, 2)
INTEGER = {"float32": np.uint32, "bfloat16": np.uint16}
SPECIAL = {  # -0.0, the smallest number, a quiet and a signalling NaN with a payload and a sign, infinity
    "float32": (0x80000000, 1, 0x7FC12345, 0xFFA54321, 0x7F800000),
    "bfloat16": (0x8000, 1, 0x7FD3, 0xFFA5, 0x7F80),
}


def bits(x) -> np.ndarray:
    x = np.asarray(x)
    return x.view(INTEGER[x.dtype.name])


def random_bits(seed: int, dtype: str, *shape: int) -> np.ndarray:
    """Every pattern of bits may come, and the special ones do, on every page."""
    rng = np.random.default_rng(seed)
    found = rng.integers(0, np.iinfo(INTEGER[dtype]).max, shape, INTEGER[dtype], endpoint=True)
    found[..., : len(SPECIAL[dtype])] = SPECIAL[dtype]
    return found.view(jnp.dtype(dtype))


def on_mesh(mesh: Mesh, k: np.ndarray, v: np.ndarray) -> KVPages:
    return KVPages(k_LPZF=jax.device_put(k, page_format(mesh)), v_LPZF=jax.device_put(v, page_format(mesh)))


def check_moves(mesh: Mesh, dtype: str) -> int:
    """Saves and restores some pages at a time, into other places; how often."""
    k, v = (random_bits(seed, dtype, L, P, Z, F) for seed in (0, 1))
    mover, kv, rng = PageMover(mesh), on_mesh(mesh, k, v), np.random.default_rng(2)
    kept = kv.k_LPZF.format
    kv = mover.warm_up(kv)
    assert np.array_equal(bits(kv.k_LPZF), bits(k)), "warming up changed a page"
    assert np.array_equal(bits(kv.v_LPZF), bits(v)), "warming up changed a page"
    with CompileCounter() as counter:
        for count in COUNTS:
            source, target = np.split(rng.permutation(P)[: 2 * count], 2)
            saved = mover.save(kv, source.tolist())
            check_saved(saved, k[:, source], v[:, source])
            kv = mover.restore(kv, target.tolist(), saved)
            k[:, target], v[:, target] = k[:, source], v[:, source]
            for here, there in ((kv.k_LPZF, k), (kv.v_LPZF, v)):
                assert here.format == kept
                assert np.array_equal(bits(here), bits(there)), f"{count} pages of {dtype}"
    assert not counter.retraced, counter
    return len(COUNTS)


def check_saved(saved: HostPages, k: np.ndarray, v: np.ndarray) -> None:
    for here, there in ((saved.k_LCZF, k), (saved.v_LCZF, v)):
        assert here.dtype == there.dtype
        assert np.array_equal(bits(here), bits(there))
    assert (saved.count, saved.nbytes) == (k.shape[1], k.nbytes + v.nbytes)


def check_compiled(mesh: Mesh, dtype: str, pages: int = 1000) -> None:
    """Neither program makes a second cache: what is read stays where it lies, what is written is written there."""
    page = jax.ShapeDtypeStruct((L, pages, Z, F), dtype, sharding=page_format(mesh))
    kv = KVPages(k_LPZF=page, v_LPZF=page)
    read, write = compiled(mesh, kv)
    own = L * pages * Z * F * jnp.dtype(dtype).itemsize // mesh.shape["tensor"]  # of the keys, on one device
    for program, given_back in ((read, 0), (write, 2 * own)):
        assert [line for line in makers(kv, program) if "dynamic-update-slice" not in line] == []
        memory = program.memory_analysis()
        assert memory.alias_size_in_bytes == given_back
        assert memory.temp_size_in_bytes < own / 4


def compiled(mesh: Mesh, kv: KVPages) -> tuple[jax.stages.Compiled, jax.stages.Compiled]:
    """The two programs for pages of these shapes."""
    mover = PageMover(mesh)
    index = jax.ShapeDtypeStruct((PAGES_A_CALL,), jnp.int32, sharding=replicated(mesh))
    shape = (kv.k_LPZF.shape[0], PAGES_A_CALL, *kv.k_LPZF.shape[2:])
    moved = jax.tree.map(lambda x: jax.ShapeDtypeStruct(shape, x.dtype, sharding=mover._moved_sharding), kv)
    return mover._read.lower(kv, index).compile(), mover._write.lower(kv, index, moved).compile()


def main() -> None:
    mesh, checked = make_mesh(*MESH), 0
    for dtype in DTYPES:
        checked += check_moves(mesh, dtype)
        check_compiled(mesh, dtype)
    print(checked)


if __name__ == "__main__":
    main()
