"""Models that are named by an id, as the front finds them in the database: what a job makes, and Gradient's adapters."""

from __future__ import annotations

from collections import OrderedDict

from jaxlora.core.errors import NotFound
from serve.cluster.relay import Alias
from serve.db.gradient import StoredGradient
from serve.db.jobs import StoredJobs
from serve.jobs.names import job_name
from serve.runtime.job_names import FT_NAME

KNOWN = 10_000  # ids that are kept in memory


class Aliases:
    """Finds them, and keeps in memory what does not change any more.  Of one event loop."""

    def __init__(self, jobs: StoredJobs, gradient: StoredGradient):
        self._jobs, self._gradient = jobs, gradient
        self._known: OrderedDict[str, Alias] = OrderedDict()

    async def find(self, model: str) -> Alias | None:
        """Returns the adapter of a name that a job's model or a Gradient adapter may have, or None.  Raises Unavailable."""
        match = FT_NAME.fullmatch(model)
        key = model if match is None else match[4]
        if (alias := self._known.get(key)) is not None:
            self._known.move_to_end(key)
            return alias
        try:
            alias = await (self._of_gradient(key) if match is None else self._of_job(key))
        except NotFound:
            return None
        if alias.job is None or alias.job.ended:
            self._known[key] = alias
            if len(self._known) > KNOWN:
                self._known.popitem(last=False)
        return alias

    async def _of_job(self, id: str) -> Alias:
        job = job_name(*await self._jobs.database.ask(self._jobs.named, id))
        return Alias(tenant=job.tenant, adapter=job.adapter, job=job)

    async def _of_gradient(self, id: str) -> Alias:
        record = await self._gradient.database.ask(self._gradient.get, id, None)
        return Alias(tenant=record.tenant, adapter=record.adapter, job=None)
