"""Adapters in host RAM under one byte budget, least recently used first.  Pure host code: no jax, no lock of its own.

    loading ──arrive──▶ held ──(room is needed)──▶ forgotten            aside: what others hold of adapters, always counted

Room is made before a load begins, so the sum stays within the limit, but for two things that nothing can put off: versions
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
    """What is held, and the room for what comes.  Its owner locks."""

    def __init__(self, limit_bytes: int):
        self._limit = limit_bytes
        self._held: OrderedDict[AdapterRef, Adapter] = OrderedDict()
        self._kept: set[AdapterRef] = set()  # must not be forgotten
        self._borrowed: Counter[AdapterRef] = Counter()
        self._orphans: dict[AdapterRef, Adapter] = {}  # of the borrowed ones those that are deleted
        self._held_bytes = self._loading = self._aside = self._peak = 0

    def __contains__(self, ref: AdapterRef) -> bool:
        return ref in self._held

    def refs(self) -> list[AdapterRef]:
        """The versions held, the one that was used longest ago first."""
        return list(self._held)

    def memory(self) -> HostMemory:
        """What it comes to."""
        return HostMemory(
            held=self._held_bytes, loading=self._loading, aside=self._aside, peak=self._peak, limit=self._limit
        )

    def find(self, ref: AdapterRef) -> Adapter | None:
        """The version, used now; None when it is not held."""
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

    def let_go(self, ref: AdapterRef) -> None:
        """The version may be forgotten from now on."""
        self._kept.discard(ref)
        self._make_room(0)

    def forget(self, ref: AdapterRef) -> None:
        """Holds the version no more."""
        self._kept.discard(ref)
        adapter = self._held.pop(ref, None)
        if adapter is not None:
            self._held_bytes -= adapter.nbytes

    def borrow(self, ref: AdapterRef) -> None:
        """Somebody needs the version until `give_back`, though it is deleted meanwhile."""
        self._borrowed[ref] += 1

    def is_borrowed(self, ref: AdapterRef) -> bool:
        """Whether somebody needs it."""
        return ref in self._borrowed

    def give_back(self, ref: AdapterRef) -> None:
        """One who borrowed the version needs it no more."""
        self._borrowed[ref] -= 1
        if not self._borrowed[ref]:
            del self._borrowed[ref]
            orphan = self._orphans.pop(ref, None)
            self._aside -= 0 if orphan is None else orphan.nbytes

    def orphan(self, ref: AdapterRef) -> Adapter | None:
        """A version that is deleted and borrowed."""
        return self._orphans.get(ref)

    def delete(self, ref: AdapterRef) -> None:
        """Holds the version no more, but for those who borrowed it."""
        held = self._held.get(ref)
        self.forget(ref)
        if held is not None and ref in self._borrowed:
            self._orphans[ref] = held
            self.set_aside(held.nbytes)

    def begin(self, nbytes: int) -> bool:
        """Makes room for a load; False when it must wait for other loads to end."""
        kept = sum(self._held[ref].nbytes for ref in self._kept)
        if self._loading and self._aside + self._loading + kept + nbytes > self._limit:
            return False
        self._make_room(nbytes)
        self._loading += nbytes
        self._note()
        return True

    def end(self, nbytes: int) -> None:
        """A load that began has ended."""
        self._loading -= nbytes

    def set_aside(self, nbytes: int) -> None:
        """Counts bytes that others hold; negative when they hold them no more."""
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
