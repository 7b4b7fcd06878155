"""Copies KV pages of preempted sequences to host memory and back, bit for bit, by two programs of one shape each.

A call moves PAGES_A_CALL pages.  Where there are fewer left, the last is moved again, which changes nothing.  The pages are
copied one by one in a loop: a gather or scatter over the page axis may rearrange the whole cache first.

Shape letters: L layers, P pages, C pages that move, Z tokens per page, F features of all kv heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from jaxlora.model.kv_cache import KV_AXES, KVPages, page_format
from jaxlora.model.mesh import place, place_array, replicated, sharding

PAGES_A_CALL = 16


@dataclass(frozen=True, slots=True)
class HostPages:
    """Keys and values of some pages in host memory, in the dtype and with the bits they had on the device."""

    k_LCZF: np.ndarray
    v_LCZF: np.ndarray

    @property
    def count(self) -> int:
        """The number of pages."""
        return self.k_LCZF.shape[1]

    @property
    def nbytes(self) -> int:
        """The bytes of host memory."""
        return self.k_LCZF.nbytes + self.v_LCZF.nbytes


def _copy(source: jax.Array, source_C: jax.Array, target: jax.Array, target_C: jax.Array) -> jax.Array:
    """The target with its pages target_C replaced by pages source_C of the source."""

    def one(i: jax.Array, target: jax.Array) -> jax.Array:
        page = lax.dynamic_slice_in_dim(source, source_C[i], 1, axis=1)
        return lax.dynamic_update_slice_in_dim(target, page, target_C[i], axis=1)

    return lax.fori_loop(0, PAGES_A_CALL, one, target)


def _read(kv: KVPages, page_C: jax.Array) -> KVPages:
    """The pages page_C, in this order."""

    def pick(x_LPZF: jax.Array) -> jax.Array:
        L, _, Z, F = x_LPZF.shape
        return _copy(x_LPZF, page_C, jnp.zeros((L, PAGES_A_CALL, Z, F), x_LPZF.dtype), jnp.arange(PAGES_A_CALL))

    return jax.tree.map(pick, kv)


def _write(kv: KVPages, page_C: jax.Array, moved: KVPages) -> KVPages:
    """All pages, with those of page_C replaced."""
    return jax.tree.map(lambda x_LPZF, x_LCZF: _copy(x_LCZF, jnp.arange(PAGES_A_CALL), x_LPZF, page_C), kv, moved)


def page_bytes(kv: KVPages) -> int:
    """Bytes of one page, keys and values of all layers."""
    return sum(x.nbytes // x.shape[1] for x in (kv.k_LPZF, kv.v_LPZF))


class PageMover:
    """Moves pages of one KV cache.  Owned by the thread that owns the cache."""

    def __init__(self, mesh: Mesh):
        self._mesh = mesh
        self._moved_sharding = sharding(mesh, KV_AXES)
        self._read = jax.jit(_read, out_shardings=self._moved_sharding)
        self._write = jax.jit(_write, donate_argnums=0, out_shardings=page_format(mesh))

    def warm_up(self, kv: KVPages) -> KVPages:
        """The same pages, unchanged; both programs are compiled and have run.  `kv` is donated."""
        return self.restore(kv, [0], self.save(kv, [0]))

    def save(self, kv: KVPages, pages: list[int]) -> HostPages:
        """Copies of these pages on the host, when they are there."""
        L, _, Z, F = kv.k_LPZF.shape
        host = HostPages(*(np.empty((L, len(pages), Z, F), x.dtype) for x in (kv.k_LPZF, kv.v_LPZF)))
        for start in range(0, len(pages), PAGES_A_CALL):
            some = slice(start, start + PAGES_A_CALL)
            count = len(pages[some])
            moved = jax.device_get(self._read(kv, self._indices(pages[some])))
            host.k_LCZF[:, some], host.v_LCZF[:, some] = moved.k_LPZF[:, :count], moved.v_LPZF[:, :count]
        return host

    def restore(self, kv: KVPages, pages: list[int], host: HostPages) -> KVPages:
        """The cache with these pages as they were saved, in the same order but maybe in other places.  `kv` is donated."""
        assert len(pages) == host.count, f"{host.count} pages were saved, {len(pages)} are to take them"
        for start in range(0, len(pages), PAGES_A_CALL):
            some = slice(start, start + PAGES_A_CALL)
            moved = KVPages(k_LPZF=_filled(host.k_LCZF[:, some]), v_LPZF=_filled(host.v_LCZF[:, some]))  # ty: ignore[invalid-argument-type]
            kv = self._write(kv, self._indices(pages[some]), place(moved, self._moved_sharding))
        return kv

    def _indices(self, pages: list[int]) -> jax.Array:
        return place_array(_filled(np.array(pages, np.int32), axis=0), replicated(self._mesh))


def _filled(x: np.ndarray, axis: int = 1) -> np.ndarray:
    """The array with its last page repeated, up to as many as a call moves."""
    widths = [(0, PAGES_A_CALL - x.shape[axis] if a == axis else 0) for a in range(x.ndim)]
    return np.pad(x, widths, mode="edge")
