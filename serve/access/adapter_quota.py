"""How many adapters a tenant may have, and bytes of all their versions.  Pure.

    upload, load, create, job ─check─▶ refused where there is no room
    a job under way ─had_room─▶ where there is none, its new versions take the place of older ones: it goes on

Bytes are those of the weights, in float32, of every version that can be loaded.  They are counted when somebody is checked,
for a tenant whose bytes are limited: the first time each version's description is read, later nothing is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from jaxlora.config.serving import LimitsSection
from jaxlora.core.errors import AdapterNotFound, QuotaExceeded, StorageFailed
from jaxlora.core.lora import AdapterRef


class Shelf(Protocol):
    """The adapters that there are: a store."""

    def list(self, tenant: str | None) -> Sequence[AdapterRef]: ...
    def versions(self, tenant: str, name: str) -> Sequence[AdapterRef]: ...
    def nbytes(self, ref: AdapterRef) -> int: ...


class AdapterQuota:
    """The limits over one store.  From any thread; all but `had_room` may wait for the disk."""

    def __init__(self, limits: LimitsSection, shelf: Shelf):
        self.limits, self._shelf = limits, shelf
        self._full: set[tuple[str, str]] = set()  # adapters whose next version had no room when it was last asked

    def check(self, tenant: str, nbytes: int, *, another: bool) -> None:
        """Raises QuotaExceeded where a version of so many bytes has no room.  another: it is a new adapter's."""
        own = self.limits.of(tenant)
        if another and own.adapters is not None and len(self._shelf.list(tenant)) >= own.adapters:
            raise QuotaExceeded(f"you may have {own.adapters} adapters; delete one")
        left = self.left_bytes(tenant)
        if left is not None and nbytes > left:
            raise QuotaExceeded(
                f"all versions of your adapters may have {own.adapter_bytes} bytes together; {max(left, 0)} are left, and "
                f"this one has {nbytes}: delete adapters, or versions of them"
            )

    def has_room(self, ref: AdapterRef) -> bool:
        """Whether another version like this one has room.  `had_room` says so until it is asked again."""
        left, key = self.left_bytes(ref.tenant), (ref.tenant, ref.name)
        if left is None or self._nbytes(ref) <= left:
            self._full.discard(key)
            return True
        self._full.add(key)
        return False

    def had_room(self, tenant: str, name: str) -> bool:
        """What `has_room` last found of an adapter; True before.  Waits for nothing."""
        return (tenant, name) not in self._full

    def left_bytes(self, tenant: str) -> int | None:
        """Bytes that more versions may have, below 0 where jobs under way have made more; None: any number."""
        most = self.limits.of(tenant).adapter_bytes
        if most is None:
            return None
        refs = [v for ref in self._shelf.list(tenant) for v in self._shelf.versions(tenant, ref.name)]
        return most - sum(map(self._nbytes, refs))

    def _nbytes(self, ref: AdapterRef) -> int:
        try:
            return self._shelf.nbytes(ref)
        except (AdapterNotFound, StorageFailed):  # deleted meanwhile, or nobody can have it
            return 0
