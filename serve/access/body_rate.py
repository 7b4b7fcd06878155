"""How fast a tenant may send JSON: what parsing it costs the event loop, that all tenants share.  Pure."""

from __future__ import annotations

import time
from collections.abc import Callable

from jaxlora.core.errors import RateLimited

VALUE_BYTES = 16  # parsing a value of a list or an object costs as much as so many bytes, at the least
BURST_S = 4.0  # of sending at the rate, that may come at once
KNOWN = 1000  # tenants, before those that owe nothing are forgotten


class BodyRate:
    """What each tenant owes, in bytes, which time pays back.  Of one event loop."""

    def __init__(self, bytes_per_s: int, *, clock: Callable[[], float] = time.monotonic):
        self._rate, self._clock = bytes_per_s, clock
        self._free_at: dict[str, float] = {}  # when a tenant owes nothing any more

    def charge(self, tenant: str, size_bytes: int) -> None:
        """Charges a body before it is read.  Raises RateLimited for a tenant that owes too much."""
        self._check(self._owed_s(tenant))
        self._add(tenant, size_bytes)

    def settle(self, tenant: str, *, charged: int, size_bytes: int, values: int) -> None:
        """Charges what a body has come to.  Raises RateLimited, before it is parsed, if others of the tenant came first."""
        owed_s = self._owed_s(tenant) - charged / self._rate
        self._add(tenant, max(size_bytes - charged, 0) + VALUE_BYTES * values)
        self._check(owed_s)

    def _owed_s(self, tenant: str) -> float:
        return max(self._free_at.get(tenant, 0.0) - self._clock(), 0.0)

    def _add(self, tenant: str, size_bytes: int) -> None:
        now = self._clock()
        if len(self._free_at) > KNOWN:
            self._free_at = {tenant: at for tenant, at in self._free_at.items() if at > now}
        self._free_at[tenant] = now + self._owed_s(tenant) + size_bytes / self._rate

    def _check(self, owed_s: float) -> None:
        if (wait_s := owed_s - BURST_S) > 0:
            raise RateLimited(
                f"you have sent more JSON than {self._rate} bytes a second, where a value of a list or an object counts "
                f"{VALUE_BYTES}; try again in {wait_s:.1f} s",
                retry_after_s=wait_s,
            )
