"""A trainer's threads: one that trains what the keeper has placed here, and one that keeps in contact with it.

    contact ─Orders─▶ inbox ─▶ LiveJobs ─versions─▶ keeper        LiveJobs ─news─▶ outbox ─▶ contact

The leases hold for as long as the keeper was reached within LEASE_S; past that everything here is dropped, not saved.  What a
job has left behind is told before the job is no longer held, and its end is told after its last checkpoint is on disk.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from jaxlora.core.errors import JaxLoraError, NotFound, StateInvalid, Unavailable
from jaxlora.core.lora import AdapterRef, AdapterWeights, LoraSpec
from jaxlora.model.lora_pool import Rows, adapter_of_rows, read_finite
from serve.cluster.training.messages import (
    LEASE_S,
    Answer,
    Contact,
    JobSaid,
    KeeperGone,
    KeeperPeer,
    Lease,
    MoveJob,
    Order,
    Orders,
    PlaceJob,
    Publication,
    Said,
    clock_s,
)
from serve.cluster.training.placement import Slots
from serve.jobs.live_jobs import JobNews, LiveJobs, Published
from serve.server.build_jobs import Hooks
from train.jobs.job import said
from train.jobs.status import ENDED, JobStatus
from train.tenant import is_device_loss

LOG = logging.getLogger("serve")
CONTACT_S = 0.25  # between two contacts, when nothing happens
NEWS_S = 0.05  # before the next one, when something has
REACH_S = 0.5  # before the keeper is tried again


@dataclass(slots=True)
class _Held:
    """A job of which something is here."""

    owner: str
    name: str
    lease: Lease
    is_valid: bool = True  # it may be trained


class TrainerLoop:
    """A trainer.  Its state belongs to its loop's thread, but for what the contact's thread reads under the lock."""

    def __init__(
        self,
        name: str,
        make_live: Callable[[Hooks], LiveJobs],
        reach: Callable[[], KeeperPeer],
        failed: Callable[[BaseException], None],
        *,
        hang_s: float,
        clock: Callable[[], float] = clock_s,
    ):
        """name: of this process.  reach: the keeper; it raises KeeperGone.  failed: called when the loop ends by an error.

        hang_s: a loop that has done nothing for so long hangs, and its jobs go to others.
        """
        self._name, self._reach, self._failed, self._clock = name, reach, failed, clock
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._held: dict[str, _Held] = {}
        self._pending: list[Answer | JobSaid] = []  # told, but not to be heard yet
        self._seq, self._publications = itertools.count(1), itertools.count(1)
        self._epoch, self._ordered = 0, 0  # whose orders, and the number of the newest
        self._weights: Mapping[str, float] = {}
        self._full: frozenset[tuple[str, str]] = frozenset()
        self._lock = threading.Lock()
        self._outbox: deque[Said] = deque()
        self._holds: Mapping[str, Lease] = {}
        self._reached_s, self._is_late = clock(), False  # when the newest contact that succeeded began
        self._hang_s, self._turned_s = hang_s, clock()  # when the loop last went on
        self._leaves, self._stopping = False, False
        self._keeper: KeeperPeer | None = None  # the one that answered last
        self._news, self._empty = threading.Event(), threading.Event()
        self.live = make_live(
            Hooks(
                shelf=FarShelf(self),
                listener=self,
                wake=lambda: self._inbox.put(lambda: None),
                had_room=lambda owner, name: (owner, name) not in self._full,
                owner_weight=lambda owner: self._weights.get(owner, 1.0),
                may_save=self._may_save,
            )
        )
        self._slots = tuple(Slots(count=b.slots, rank=b.rank) for b in self.live.jobs.trainer.seats.buckets)
        self._threads = [
            threading.Thread(target=self._run, name="jaxlora-trainer", daemon=True),
            threading.Thread(target=self._keep_contact, name="keeper-contact", daemon=True),
        ]

    def start(self) -> None:
        """Starts both threads."""
        self._reached_s = self._turned_s = self._clock()
        for thread in self._threads:
            thread.start()

    def stop(self, within_s: float) -> None:
        """Saves and releases all jobs, tells the keeper, and ends; after so many seconds in any case."""
        self._inbox.put(self._leave)
        self._empty.wait(within_s)
        self._stopping = True
        self._news.set()
        for thread in self._threads:
            self._inbox.put(lambda: None)
            thread.join(within_s)
        with contextlib.suppress(Unavailable):
            self.meet()
        self.live.close()

    # ---- leases ---------------------------------------------------------------------------------------------------

    @property
    def _is_lapsed(self) -> bool:
        """Whether the keeper may have given the jobs to others."""
        return self._is_late or self._clock() - self._reached_s > LEASE_S

    def _may_save(self, job_id: str) -> bool:
        """Whether a checkpoint may be written.  Of any thread."""
        held = self._held.get(job_id)
        return held is not None and held.is_valid and not self._is_lapsed

    def _drop(self, ids: Iterable[str]) -> None:
        """Stops the work for jobs without saving it, and tells nothing of them but steps."""
        for id in ids:
            held = self._held.get(id)
            if held is None or not held.is_valid:
                continue
            held.is_valid = False
            LOG.warning("job %s: this trainer has no lease of it any more", id)
            with contextlib.suppress(NotFound, StateInvalid):  # it has ended
                self.live.release(held.owner, id, save=False)
        self._pending = [
            what
            for what in self._pending
            if isinstance(what, Answer) or self._is_valid(what.id) or _is_of_running(what.what)
        ]

    def _is_valid(self, id: str) -> bool:
        return id in self._held and self._held[id].is_valid

    # ---- the loop -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopping:
                self.turn()
        except BaseException as error:
            LOG.exception("the trainer has ended")
            self._stopping = True
            self._failed(error)

    def turn(self) -> None:
        """Does what is to be done now, or waits for it for a moment."""
        self._turned_s = self._clock()
        if not self.live.has_work:
            with contextlib.suppress(queue.Empty):
                self._inbox.get(timeout=NEWS_S if self._held else CONTACT_S)()
        with contextlib.suppress(queue.Empty):
            while True:
                self._inbox.get_nowait()()
        if self._is_lapsed:
            self._drop(list(self._held))
            self._is_late, self._reached_s = False, self._clock()
        elif self.live.has_work:
            self.live.advance()
        for job in self.live.jobs.list(None):
            if not self._is_valid(job.id):  # refused while it was published
                self.live.release(job.request.owner, job.id, save=False)
            elif job.state is JobStatus.PAUSED:  # whoever resumes it places it anew
                self.live.release(job.request.owner, job.id)
        self._hand_over()

    def _hand_over(self) -> None:
        """Gives the contact's thread what may be heard, and says of which jobs there is something here."""
        live = {job.id for job in self.live.jobs.list(None)}
        is_writing, ready = self.live.jobs.states.is_writing, 0
        while ready < len(self._pending) and not ((id := _ended(self._pending[ready])) and is_writing(id)):
            ready += 1
        told, self._pending = self._pending[:ready], self._pending[ready:]
        waiting = {what.id for what in self._pending if isinstance(what, JobSaid)}
        for id in list(self._held):
            if id not in live and id not in waiting and not is_writing(id):
                del self._held[id]
        holds = {id: held.lease for id, held in self._held.items()}
        with self._lock:
            self._outbox += [Said(seq=next(self._seq), what=what) for what in told]
            changed, self._holds = bool(told) or holds != self._holds, holds
        if changed:
            self._news.set()
        if self._leaves and not holds:
            self._empty.set()

    def _leave(self) -> None:
        self._leaves = True
        self._release_all()

    def _release_all(self) -> None:
        for job in self.live.jobs.list(None):
            self.live.release(job.request.owner, job.id)

    # ---- orders ---------------------------------------------------------------------------------------------------

    def _obey(self, orders: Orders) -> None:
        """Does what the keeper says."""
        if orders.epoch < self._epoch:
            return  # of a keeper that is no more
        self._drop(orders.drop)
        if orders.epoch > self._epoch:
            self._release_all()
            self._hand_over()
            if not self._held and not self._outbox:
                self._epoch, self._ordered = orders.epoch, 0
            return
        self._weights, self._full = orders.weights, orders.full
        for order in orders.orders:
            if order.number > self._ordered:
                self._ordered = order.number
                self._pending.append(Answer(number=order.number, error=self._carry_out(order)))

    def _carry_out(self, order: Order) -> JaxLoraError | None:
        """Returns what is wrong with an order."""
        try:
            if isinstance(order, PlaceJob):
                self._place(order)
            elif isinstance(order, MoveJob):
                move = self.live.pause if order.to is JobStatus.PAUSED else self.live.cancel
                move(order.owner, order.id)
            else:
                self.live.release(order.owner, order.id)
        except JaxLoraError as error:
            return error
        except Exception as error:
            if is_device_loss(error):
                raise
            LOG.exception("order %d is not carried out", order.number)
            return JaxLoraError(said(error))
        return None

    def _place(self, order: PlaceJob) -> None:
        request = order.request
        if self._leaves:
            raise Unavailable("this trainer ends")
        self._held[order.id] = _Held(owner=request.owner, name=request.name, lease=order.lease)
        try:
            self.live.create(order.id, request, publish=order.publish, kept=order.kept)
        except BaseException:
            del self._held[order.id]
            raise

    # ---- what LiveJobs tells --------------------------------------------------------------------------------------

    def job_changed(self, news: JobNews) -> None:
        """Takes note of it; of a job that is another's by now only of steps."""
        self._tell(news.job.id, news)

    def job_published(self, published: Published) -> None:
        """Takes note of it, unless the job is another's by now."""
        self._tell(published.job_id, published)

    def _tell(self, id: str, what: JobNews | Published) -> None:
        if (held := self._held.get(id)) is None:
            return
        if not held.is_valid:  # its steps are all that may be told of it
            if not isinstance(what, JobNews):
                return
            job = replace(what.job, state=JobStatus.RUNNING, code=None, reason=None, finished_s=None)
            what = JobNews(job=job, events=tuple(event for event in what.events if event.kind == "step"))
        self._pending.append(JobSaid(lease=held.lease, id=id, what=what))

    def publish(
        self,
        owner: str,
        name: str,
        weights: AdapterWeights,
        *,
        keep: int | None = None,
        spare: Collection[int] = (),
        learned_s: float | None = None,
    ) -> AdapterRef:
        """Has the keeper make a version, waiting for a keeper that is away for as long as the lease holds.

        Raises StateInvalid without a lease of the job, Unavailable, and what the keeper raises.
        """
        valid = {(held.owner, held.name): id for id, held in self._held.items() if held.is_valid}
        id = valid.get((owner, name))
        if id is None:
            raise StateInvalid(f"this trainer has no lease of the job that makes {name}")
        number, learned_s = next(self._publications), time.monotonic() if learned_s is None else learned_s
        held = self._held[id]

        def publish(keeper: KeeperPeer) -> AdapterRef:
            return keeper.publish(
                Publication(
                    trainer=self._name,
                    job=id,
                    lease=held.lease,
                    number=number,
                    weights=weights,
                    keep=keep,
                    spare=tuple(spare),
                    age_s=time.monotonic() - learned_s,
                )
            )

        while True:
            self._turned_s = self._clock()
            try:
                return self._call(publish)
            except StateInvalid:
                held.is_valid = False
                raise
            except KeeperGone:
                if self._is_lapsed or self._stopping:
                    held.is_valid = False
                    raise
                time.sleep(REACH_S)

    # ---- contact --------------------------------------------------------------------------------------------------

    def _keep_contact(self) -> None:
        is_away = False
        while not self._stopping:
            began = time.monotonic()
            self._news.clear()
            try:
                self.meet()
                if is_away:
                    LOG.info("the keeper is reached again")
                is_away = False
            except Unavailable as error:
                if not is_away:
                    LOG.warning("no contact with the keeper: %s", error.message)
                is_away = True
                time.sleep(REACH_S)
            except Exception:
                LOG.exception("a contact with the keeper fails")
                time.sleep(REACH_S)
            self._news.wait(max(0.0, CONTACT_S + began - time.monotonic()))
            time.sleep(NEWS_S)

    def meet(self) -> None:
        """Has contact with the keeper once, whose orders go to the loop.  Raises KeeperGone, Unavailable."""
        if self._clock() - self._turned_s > self._hang_s:
            raise Unavailable("the trainer hangs")
        epoch = self._epoch
        with self._lock:
            told, holds = tuple(self._outbox), self._holds
        began_s = self._clock()
        if began_s - self._reached_s > LEASE_S:
            self._is_late = True
        contact = Contact(
            trainer=self._name,
            epoch=epoch,
            slots=self._slots,
            holds=holds,
            said=told,
            leaves=self._leaves,
        )
        orders = self._call(lambda keeper: keeper.contact(contact))
        with self._lock:
            while self._outbox and self._outbox[0].seq <= orders.heard:
                self._outbox.popleft()
            if orders.epoch >= self._epoch:
                self._reached_s = max(self._reached_s, began_s)
        self._inbox.put(lambda: self._obey(orders))

    def _call[R](self, ask: Callable[[KeeperPeer], R]) -> R:
        """Returns what the keeper answers.  Raises what it raises; after KeeperGone it is looked for anew."""
        keeper = self._keeper or self._reach()
        try:
            answer = ask(keeper)
        except KeeperGone:
            self._keeper = None
            raise
        self._keeper = keeper
        return answer


class FarShelf:
    """Where the jobs of a trainer put their versions: the keeper makes them.  Of the loop's thread."""

    def __init__(self, loop: TrainerLoop):
        self._loop = loop

    def add(self, tenant: str, name: str, weights: AdapterWeights) -> AdapterRef:
        """Adds a version; see `TrainerLoop.publish`.  Raises AdapterNotFinite too."""
        weights.check_finite()
        return self._loop.publish(tenant, name, weights)

    def publish(
        self,
        tenant: str,
        name: str,
        spec: LoraSpec,
        rows: Rows,
        *,
        keep: int | None,
        spare: Collection[int],
        learned_s: float,
    ) -> AdapterRef:
        """Adds a version of device rows; see `TrainerLoop.publish`.  Raises AdapterNotFinite too."""
        read_finite(rows)
        weights = adapter_of_rows(rows, spec, self._loop.live.jobs.trainer.base_hash)
        return self._loop.publish(tenant, name, weights, keep=keep, spare=spare, learned_s=learned_s)


def _is_of_running(what: JobNews | Published) -> bool:
    return isinstance(what, JobNews) and what.job.state is JobStatus.RUNNING


def _ended(what: Answer | JobSaid) -> str | None:
    """Returns the job that has ended with it."""
    ends = isinstance(what, JobSaid) and isinstance(what.what, JobNews) and what.what.job.state in ENDED
    return what.id if ends else None
