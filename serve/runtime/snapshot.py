"""The state of the server at one moment: slots, queues, memory, jobs.  Pure: made on the device thread, read on any."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from jaxlora.core.lora import AdapterRef
from serve.engine.scheduler import Scheduler
from train.jobs.runner import Jobs
from train.jobs.status import ENDED, JobStatus

MOST_WAITING = 100  # queued adapters that are named; the rest are counted
MOST_JOBS = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class SlotView:
    """One slot."""

    rank: int  # largest that it holds
    adapter: AdapterRef | None  # None: it is empty
    active_s: float | None  # how long it has been active; None: it lies there without being so
    pinned: bool  # it never leaves
    rows: int  # its requests that run
    waiting: int  # its requests that do not


@dataclass(frozen=True, kw_only=True, slots=True)
class WaitView:
    """An adapter with work that is not active."""

    adapter: AdapterRef
    waited_s: float
    requests: int


@dataclass(frozen=True, kw_only=True, slots=True)
class JobView:
    """A job that has not ended."""

    id: str
    owner: str
    name: str  # of its adapter
    state: str
    step: int
    steps: int  # of the whole job
    loss: float | None  # of its last step


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingView:
    """Training so far."""

    tokens: int = 0  # trained since the start
    steps: int = 0  # updates of adapters since the start
    jobs: Mapping[str, int]  # by state
    open: tuple[JobView, ...] = ()  # some of those that have not ended


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """The server at one moment."""

    at_s: float  # of the monotonic clock
    running: int  # requests
    parked: int  # preempted requests
    waiting: int  # for their first step
    rows: int  # requests that can run at once
    pages: int
    free_pages: int
    host_pages: int  # of the KV of preempted requests
    host_pages_limit: int
    queried_tokens: int  # of prompts, looked for in the cache
    found_tokens: int  # of these
    parks: int  # times that a running request lost its row
    recomputed_tokens: int  # whose KV was dropped
    swaps: int  # exchanges of an adapter with work for another
    resizes: int  # changes of the number of slots and pages
    decoded_tokens: int
    prefilled_tokens: int
    slots: tuple[SlotView, ...]
    waits: tuple[WaitView, ...]  # longest first, MOST_WAITING at most
    waiting_adapters: int
    training: TrainingView | None  # None: this server does not train


def take(
    scheduler: Scheduler, now: float, *, decoded: int, prefilled: int, resizes: int, training: TrainingView | None
) -> Snapshot:
    """Takes a snapshot on the scheduler's thread.

    now: of its clock; decoded, prefilled: tokens since the start; resizes: changes of the number of slots.
    """
    active, pages = scheduler.active, scheduler.pages
    queues = scheduler.queues()
    sits = {slot: ref for ref, slot in active.slots.resident().items()}
    slots = []
    for slot in range(active.slots.count):
        ref = sits.get(slot)
        queue = None if ref is None else queues.get(ref)
        entered = None if ref is None else active.entered.get(ref)
        slots.append(
            SlotView(
                rank=active.slots.rank(slot),
                adapter=ref,
                active_s=None if entered is None else now - entered,
                pinned=ref in active.pinned,
                rows=0 if queue is None else queue.rows,
                waiting=0 if queue is None else queue.others,
            )
        )
    out = {ref: queue for ref, queue in queues.items() if ref not in active.entered}
    longest = heapq.nsmallest(MOST_WAITING, out.items(), key=lambda x: x[1].since)
    running, preempted, waiting = scheduler.counts()
    return Snapshot(
        at_s=now,
        running=running,
        parked=preempted,
        waiting=waiting,
        rows=scheduler.limits.rows,
        pages=pages.pages,
        free_pages=pages.free,
        host_pages=scheduler.host_pages,
        host_pages_limit=scheduler.limits.host_pages,
        queried_tokens=pages.lookups,
        found_tokens=pages.hits,
        parks=scheduler.preemptions,
        recomputed_tokens=scheduler.recomputed_tokens,
        swaps=active.swaps,
        resizes=resizes,
        decoded_tokens=decoded,
        prefilled_tokens=prefilled,
        slots=tuple(slots),
        waits=tuple(WaitView(adapter=r, waited_s=now - x.since, requests=x.rows + x.others) for r, x in longest),
        waiting_adapters=len(out),
        training=training,
    )


def training_view(jobs: Jobs) -> TrainingView:
    """Summarises the jobs of a trainer, with the newest that have not ended.  On its thread."""
    every = jobs.list(None)
    counts = Counter(job.state for job in every)
    views = []
    for job in [job for job in every if not job.final][:MOST_JOBS]:
        tenant = jobs.trainer.tenants.get(job.id)
        views.append(
            JobView(
                id=job.id,
                owner=job.request.owner,
                name=job.request.name,
                state=job.state,
                step=job.progress.step,
                steps=job.request.optimizer.total_steps,
                loss=tenant.losses[-1] if tenant is not None and tenant.losses else None,
            )
        )
    return TrainingView(
        tokens=jobs.trainer.trained_tokens,
        steps=jobs.trainer.updates,
        jobs={state: counts[state] for state in JobStatus if state not in ENDED},  # those at their end are forgotten
        open=tuple(views),
    )
