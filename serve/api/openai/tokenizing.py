"""Texts to ids and back, off the event loop: only for a tenant that may ask for more, and only what can fit the context."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jaxlora.core.errors import ContextLengthExceeded
from serve.access.rate_limit import Limiter
from serve.access.worker_pool import WorkerPool
from serve.runtime.backend import Backend

THREADS = 2
WAITING = 256  # texts of one tenant at once
TIMEOUT_S = 60.0


class Tokenizing:
    """Tokenizes for all tenants, a text of each at a time."""

    def __init__(self, backend: Backend, limiter: Limiter | None):
        """limiter: of each tenant's requests and tokens; None: no limit."""
        self._backend, self._limiter = backend, limiter
        self._pool = WorkerPool("tokenizer", threads=THREADS, waiting=WAITING, timeout_s=TIMEOUT_S)

    async def run[Result](
        self,
        tenant: str,
        work: Callable[[], Result],
        *,
        field: str,
        chars: Sequence[int],
        most: int | None = None,
        generates: bool = True,
    ) -> Result:
        """What `work` makes of texts of so many characters each, on a thread.

        field: of the texts, for messages.  most: tokens of a text; None: of the context.  generates: whether the caller
        counts it afterwards, by its tokens; else it is counted here, as a request.
        Raises ContextLengthExceeded for a text that cannot fit, RateLimited and QuotaExceeded for a tenant at its limit,
        all before a text is read; and as `WorkerPool.run`.
        """
        least = [-(-n // self._backend.tokenizer.max_token_bytes) for n in chars]
        for n in least:
            self.check_length(n, field, most)
        limiter, tokens = self._limiter, max(sum(least), 1) if generates else 0
        if limiter is None:
            return await self._pool.run(tenant, work)
        limiter.check(tenant, tokens=tokens)
        admit = limiter.check if generates else limiter.admit
        return await self._pool.run(tenant, work, admit=lambda: admit(tenant, tokens=tokens))

    def check_length(self, tokens: int, field: str, most: int | None = None) -> None:
        """Raises ContextLengthExceeded for more tokens than the context has, or than `most`."""
        limit = self._backend.context if most is None else most
        if tokens > limit:
            raise ContextLengthExceeded(
                f"{field} has at least {tokens} tokens, at most {limit} fit; shorten it", param=field
            )
