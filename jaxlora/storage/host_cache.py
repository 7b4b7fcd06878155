"""LRU cache of adapters in host RAM with a byte limit.  Pure host code: no jax, no lock of its own.

    loading ──arrive──▶ held ──(room is needed)──▶ forgotten            aside: bytes that others hold, always counted

Room is made before a load begins, so the sum stays within the limit, with two exceptions that cannot wait: versions
that are not on disk yet, and one load at a time, however large.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass

from jaxlora.core.lora import Adapter, AdapterRef


@dataclass(frozen=True, kw_only=True, slots=True)
class HostMemory:
    """Bytes of adapters in host memory."""

    held: int  # versions that `get` finds without a disk
    loading: int  # being read from disk
    aside: int  # set aside for adapters between the store and the device
    peak: int  # largest sum of the three so far
    limit: int


class HostTier:
    """Holds adapters and makes room for new ones.  Not thread-safe: its owner locks."""

    def __init__(self, limit_bytes: int):
        self._limit = limit_bytes
        self._held: OrderedDict[AdapterRef, Adapter] = OrderedDict()
        self._kept: set[AdapterRef] = set()  # must not be evicted
        self._borrowed: Counter[AdapterRef] = Counter()
        self._orphans: dict[AdapterRef, Adapter] = {}  # those borrowed versions that are deleted
        self._held_bytes = self._loading = self._aside = self._peak = 0

    def __contains__(self, ref: AdapterRef) -> bool:
        return ref in self._held

    def refs(self) -> list[AdapterRef]:
        """Returns the versions held, least recently used first."""
        return list(self._held)

    def memory(self) -> HostMemory:
        """Returns the bytes in use."""
        return HostMemory(
            held=self._held_bytes, loading=self._loading, aside=self._aside, peak=self._peak, limit=self._limit
        )

    def find(self, ref: AdapterRef) -> Adapter | None:
        """Returns the version and marks it as used now; None when it is not held."""
        if ref in self._held:
            self._held.move_to_end(ref)
        return self._held.get(ref)

    def hold(self, adapter: Adapter, *, keep: bool) -> None:
        """Holds a version until its room is needed; with `keep`, until `let_go` at least."""
        self.forget(adapter.ref)
        self._held[adapter.ref] = adapter
        self._held_bytes += adapter.nbytes
        if keep:
            self._kept.add(adapter.ref)
        self._make_room(0)

    def exchange(self, adapter: Adapter) -> None:
        """Holds this form of a version in place of the one held; does nothing where none is, or that must be kept."""
        if adapter.ref in self._held and adapter.ref not in self._kept:
            self.hold(adapter, keep=False)

    def let_go(self, ref: AdapterRef) -> None:
        """Allows the version to be evicted from now on."""
        self._kept.discard(ref)
        self._make_room(0)

    def forget(self, ref: AdapterRef) -> None:
        """Stops holding the version."""
        self._kept.discard(ref)
        adapter = self._held.pop(ref, None)
        if adapter is not None:
            self._held_bytes -= adapter.nbytes

    def borrow(self, ref: AdapterRef) -> None:
        """Keeps the version until `give_back`, even if it is deleted meanwhile."""
        self._borrowed[ref] += 1

    def is_borrowed(self, ref: AdapterRef) -> bool:
        """Returns whether the version is borrowed."""
        return ref in self._borrowed

    def give_back(self, ref: AdapterRef) -> None:
        """Ends one `borrow` of the version."""
        self._borrowed[ref] -= 1
        if not self._borrowed[ref]:
            del self._borrowed[ref]
            orphan = self._orphans.pop(ref, None)
            self._aside -= 0 if orphan is None else orphan.nbytes

    def orphan(self, ref: AdapterRef) -> Adapter | None:
        """Returns a version that is deleted and borrowed, or None."""
        return self._orphans.get(ref)

    def delete(self, ref: AdapterRef) -> None:
        """Stops holding the version, except for its borrowers."""
        held = self._held.get(ref)
        self.forget(ref)
        if held is not None and ref in self._borrowed:
            self._orphans[ref] = held
            self.set_aside(held.nbytes)

    def begin(self, nbytes: int) -> bool:
        """Makes room for a load; returns False when it must wait for other loads to end."""
        kept = sum(self._held[ref].nbytes for ref in self._kept)
        if self._loading and self._aside + self._loading + kept + nbytes > self._limit:
            return False
        self._make_room(nbytes)
        self._loading += nbytes
        self._note()
        return True

    def end(self, nbytes: int) -> None:
        """Ends a load that began."""
        self._loading -= nbytes

    def set_aside(self, nbytes: int) -> None:
        """Adds bytes that others hold to the count; negative to subtract them."""
        self._aside += nbytes
        self._make_room(0)

    def _make_room(self, nbytes: int) -> None:
        free = self._limit - self._aside - self._loading - nbytes
        for ref in list(self._held):
            if self._held_bytes <= free:
                break
            if ref not in self._kept:
                self.forget(ref)
        self._note()

    def _note(self) -> None:
        self._peak = max(self._peak, self._held_bytes + self._loading + self._aside)
