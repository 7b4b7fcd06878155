"""How much a tenant may ask for: requests and tokens a minute.  Pure.

A minute is any sixty seconds, reckoned as the share of the last whole minute that still counts and all of this one.
Bytes of files and jobs are counted where they are kept, in one transaction with the one that comes (stored_files,
stored_jobs), adapters in adapter_quota.
"""

from __future__ import annotations

from collections.abc import Sequence

from limits import RateLimitItem, RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import SlidingWindowCounterRateLimiter

from jaxlora.config.serving import LimitsSection, TenantLimits
from jaxlora.core.errors import QuotaExceeded, RateLimited
from serve.access.body_rate import BodyRate
from serve.engine.request import Request

LEAST_WAIT_S = 0.01


class Limiter:
    """Counts what each tenant asks for.  From any thread."""

    def __init__(self, limits: LimitsSection):
        self._limits = limits
        self.bodies = BodyRate(limits.json_bytes_per_second)  # of one event loop
        self._storage = MemoryStorage()
        self._window = SlidingWindowCounterRateLimiter(self._storage)

    def check(self, tenant: str, *, tokens: int) -> None:
        """Raises as `admit` does, and counts nothing: before work is done for a request that would be refused."""
        self._asked(tenant, tokens)

    def admit(self, tenant: str, *, tokens: int) -> None:
        """Lets one request in, which may come to so many tokens, and counts it; one that is refused counts nothing.

        One that is let in has counted, also when the server then has no room for it (503): the attempt is what costs.
        Raises RateLimited, which says when to come again, or QuotaExceeded for more tokens than any minute has.
        """
        for item, cost, what in self._asked(tenant, tokens):
            self._window.hit(item, tenant, what, cost=cost)

    def _asked(self, tenant: str, tokens: int) -> list[tuple[RateLimitItem, int, str]]:
        """What a request is counted as.  Raises as `admit`."""
        own = self._limits.of(tenant)
        asked: list[tuple[RateLimitItem, int, str]] = [
            (RateLimitItemPerMinute(most), cost, what)
            for most, cost, what in (
                (own.requests_per_minute, 1, "requests"),
                (own.tokens_per_minute, tokens, "tokens"),
            )
            if most is not None and cost
        ]
        for item, cost, what in asked:
            if cost > item.amount:
                raise QuotaExceeded(
                    f"the prompts and max_tokens of this request come to {cost} {what}, and you may have {item.amount} "
                    "a minute; ask for fewer"
                )
            if not self._window.test(item, tenant, what, cost=cost):
                wait_s = self._wait_s(item, tenant, what, cost)
                raise RateLimited(
                    f"you may have {item.amount} {what} a minute, and this request needs {cost} more than are left; "
                    f"try again in {wait_s:.1f} s"
                    if what == "tokens"
                    else f"you may send {item.amount} requests a minute; try again in {wait_s:.1f} s",
                    retry_after_s=wait_s,
                )
        return asked

    def of(self, tenant: str) -> TenantLimits:
        """The limits of one tenant."""
        return self._limits.of(tenant)

    def _wait_s(self, item: RateLimitItem, tenant: str, what: str, cost: int) -> float:
        """Seconds until this cost fits, if nothing else comes."""
        minute_s = item.get_expiry()
        before, _, now, expires_s = self._storage.get_sliding_window(item.key_for(tenant, what), minute_s)
        left_s = expires_s - minute_s  # of this whole minute
        room = item.amount - cost
        if now <= room and before:
            return max(left_s - (room - now) * minute_s / before, LEAST_WAIT_S)
        # What counts now is the last minute's then, and fades.
        return left_s + (max(minute_s * (1 - room / now), LEAST_WAIT_S) if now else LEAST_WAIT_S)


def cost(requests: Sequence[Request]) -> int:
    """Tokens that the requests of one HTTP request may come to: each prompt once, and what every choice may add."""
    prompts = sum(len(r.prompt) for r in requests if r.params.choice == 0)
    return prompts + sum(r.params.max_tokens for r in requests)
