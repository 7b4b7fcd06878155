"""The keeper's side of the training group: who holds the lease of which job, what is to be done, and what is believed of whom.

    JobService ─create, pause, …─▶ jobs in line ─decide─▶ orders ─▶ trainers        trainers ─news─▶ JobRecorder
                                                     └──▶ the keeper's own LiveJobs

A job is given to another only when nothing of it is left where it was: its trainer says so, its process has ended, or it has
not been heard for longer than a lease holds.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace

from jaxlora.core.errors import AlreadyExists, JaxLoraError, NotFound, StateInvalid, Unavailable
from jaxlora.core.lora import AdapterRef
from serve.cluster.training.messages import (
    LEASE_S,
    MARGIN_S,
    TRAINER,
    Answer,
    Contact,
    JobSaid,
    Lease,
    MoveJob,
    Order,
    Orders,
    PlaceJob,
    Publication,
    ReleaseJob,
    Terms,
    clock_s,
)
from serve.cluster.training.placement import Place, PlacedJob, Slots, decide
from serve.cluster.training.report import TrainingReport
from serve.db.models import JsonObject, NewEvent
from serve.jobs.live_jobs import JobNews, Published
from serve.jobs.places import OwnPlace
from serve.server.build_jobs import JobHost
from train.jobs.job import JobRequest
from train.jobs.status import ENDED, JobStatus

LOG = logging.getLogger("serve")
KEEPER = "keeper"  # as a place
LOOK_S = 0.25  # between two looks at what is to be done
NAMES_S = 0.5  # between two looks at which processes there are
GONE_S = 1.0  # without a word from a trainer that is no process any more, until that is believed
ANSWER_S = LEASE_S + MARGIN_S  # for a trainer to carry out an order; until then it has answered or is given up


@dataclass(slots=True, eq=False)
class _Job:
    """A job that has not ended, as far as the keeper knows."""

    id: str
    request: JobRequest
    publish: bool
    kept: set[int]  # versions of its checkpoints
    since_s: float  # it waits for a slot since then, unless it runs
    place: str | None = None  # None: in line
    lease: Lease | None = None  # of the trainer that is its place
    state: JobStatus = JobStatus.QUEUED  # as its place has said
    arrives: bool = False  # its place has not taken it yet
    leaves: bool = False  # its place is to let it go
    is_blamed: bool = False  # it is being asked whether it killed its trainer
    is_told: bool = False  # its record says that it is in line
    made: tuple[int, AdapterRef] | None = None  # the newest publication under this lease


@dataclass(slots=True, eq=False)
class _Trainer:
    """A trainer in contact."""

    name: str
    heard_s: float
    slots: tuple[Slots, ...] = ()
    seq: int = 0  # of the newest thing that it said
    orders: list[Order] = field(default_factory=list)  # not answered yet
    drains: bool = False


class TrainingGroup:
    """The jobs of a cluster, as `JobPlaces` and as `KeeperPeer` in the keeper's process.  From any thread."""

    def __init__(
        self,
        host: JobHost,
        terms: Terms,
        epoch: int,
        processes: Callable[[], Collection[str]],
        *,
        clock: Callable[[], float] = clock_s,
    ):
        """host: the keeper's own jobs.  terms: those of its trainer.  epoch: start of this keeper, greater than those before.

        processes: returns the names of those that are there; raises Unavailable where that is not known.
        """
        self._runner, self._live, self._service = host.runner, host.live, host.service
        self._recorder, self._own = host.service.recorder, OwnPlace(host.runner, host.live)
        self._terms, self.epoch, self._processes, self._clock = terms, epoch, processes, clock
        buckets = host.live.jobs.trainer.seats.buckets
        self._own_slots = tuple(Slots(count=bucket.slots, rank=bucket.rank) for bucket in buckets)
        self._jobs: dict[str, _Job] = {}
        self._trainers: dict[str, _Trainer] = {}
        # Trainers of an earlier keeper → when they were last heard, and the newest thing that they said.
        self._strangers: dict[str, tuple[float, int]] = {}
        self._awaited: set[int] = set()  # orders of which somebody waits for the answer
        self._answers: dict[int, JaxLoraError | None] = {}  # to these
        self._failed: list[tuple[str, Exception]] = []  # to be stored
        self._numbers = itertools.count(1)
        self._began_s, self._is_settled = clock(), False
        self._names: Collection[str] | None = None  # None: not known
        self._named_s = -NAMES_S  # when that was asked
        self._changed = threading.Condition()
        self._closed = self._due = False
        self._thread = threading.Thread(target=self._run, name="training-group", daemon=True)

    def start(self) -> None:
        """Begins to place jobs: all that the service takes in from now on.  Trainers may call once the server has begun."""
        self._service.places = self
        self._thread.start()

    def close(self) -> None:
        """Places no more jobs and answers nobody."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    # ---- JobPlaces ------------------------------------------------------------------------------------------------

    def create(self, id: str, request: JobRequest, *, publish: bool, kept: Sequence[int]) -> None:
        """Puts a job in line.  Raises AlreadyExists; AdapterInvalid for one that fits no slot; Unavailable."""
        self._live.jobs.trainer.seats.check(request.spec)
        with self._changed:
            self._check_open()
            if id in self._jobs:
                raise AlreadyExists(f"job {id} exists", param="id")
            self._jobs[id] = _Job(id=id, request=request, publish=publish, kept=set(kept), since_s=self._clock())
            self._look_soon()

    def pause(self, owner: str, id: str) -> None:
        """Pauses a job, which then is nowhere.  See `JobPlaces`."""
        self._move(owner, id, JobStatus.PAUSED)

    def cancel(self, owner: str, id: str) -> None:
        """Ends a job.  See `JobPlaces`."""
        self._move(owner, id, JobStatus.CANCELLED)

    def resume(self, owner: str, id: str) -> None:
        """Puts a job of the keeper's own in line again; one that was paused elsewhere is nowhere.  See `JobPlaces`."""
        with self._changed:
            job = self._standing(owner, id)
            if job.place != KEEPER:
                return  # it waits or runs
        self._own.resume(owner, id)

    def _move(self, owner: str, id: str, to: JobStatus) -> None:
        """Pauses or cancels a job, wherever it is, and again where it has left that place meanwhile."""
        move = self._own.pause if to is JobStatus.PAUSED else self._own.cancel
        while True:
            with self._changed:
                job = self._standing(owner, id)
                if job.place is None:
                    self._move_in_line(job, to)
                    return
                if job.place != KEEPER:
                    if self._order(job, to):
                        return
                    continue
            try:
                move(owner, id)
                return
            except NotFound:
                with self._changed:
                    if self._jobs.get(id) is not job or (job.place == KEEPER and not job.leaves):
                        raise  # it has ended

    def _move_in_line(self, job: _Job, to: JobStatus) -> None:
        del self._jobs[job.id]
        if to is JobStatus.CANCELLED:
            raise NotFound(f"job {job.id} is nowhere", param="id")  # whoever asks stores that it has ended
        why = "its owner asked for it"
        self._post(job.id, to, why, error={"code": "paused_by_owner", "message": why, "param": None})

    def _standing(self, owner: str, id: str) -> _Job:
        """Returns a job that is in line or at a place, once it is.  Raises NotFound, Unavailable."""

        def found() -> _Job | None:
            self._check_open()
            job = self._jobs.get(id)
            if job is None or job.request.owner != owner:
                raise NotFound(f"no job {id[:80]!r}", param="id")
            ends = job.place not in (None, KEEPER) and (job.state in ENDED or job.state is JobStatus.PAUSED)
            return None if job.arrives or job.leaves or job.is_blamed or ends else job

        ends_s = time.monotonic() + ANSWER_S
        while (job := found()) is None:
            if not self._changed.wait(ends_s - time.monotonic()):
                raise Unavailable(f"job {id} is on its way to another trainer; ask again in some seconds")
        return job

    def _order(self, job: _Job, to: JobStatus) -> bool:
        """Has a job's trainer move it; returns whether the trainer has answered.  Raises what it answers, Unavailable."""
        assert job.place is not None, "a trainer has it"
        trainer, number = self._trainers[job.place], next(self._numbers)
        trainer.orders.append(MoveJob(number=number, id=job.id, owner=job.request.owner, to=to))
        place, ends_s = job.place, time.monotonic() + ANSWER_S
        self._awaited.add(number)
        try:
            while number not in self._answers and job.place == place and job.id in self._jobs:
                self._check_open()
                if not self._changed.wait(ends_s - time.monotonic()):
                    raise Unavailable(f"the trainer of job {job.id} does not answer; ask again in some seconds")
            if number not in self._answers:
                return False
            if (error := self._answers[number]) is not None:
                raise error
            return True
        finally:
            self._awaited.discard(number)
            self._answers.pop(number, None)

    def _check_open(self) -> None:
        if self._closed:
            raise Unavailable("the server is stopping; retry when it is up again")

    # ---- KeeperPeer -----------------------------------------------------------------------------------------------

    def terms(self) -> Terms:
        """Returns the terms."""
        return self._terms

    def contact(self, contact: Contact) -> Orders:
        """Hears a trainer, and returns what it is to do.  Raises Unavailable at the end."""
        with self._changed:
            self._check_open()
            now_s = self._clock()
            if contact.epoch != self.epoch:
                return self._estranged(contact, now_s)
            self._strangers.pop(contact.trainer, None)
            trainer = self._trainers.setdefault(contact.trainer, _Trainer(contact.trainer, now_s))
            trainer.heard_s, trainer.slots = now_s, contact.slots
            trainer.drains |= contact.leaves
            for told in contact.said:
                if told.seq > trainer.seq:
                    trainer.seq = told.seq
                    self._hear(trainer, told.what)
            mine = self._at(trainer.name)
            for job in mine:
                if not job.arrives and job.id not in contact.holds:
                    self._left(job)
            self._look_soon()
            owners = {job.request.owner for job in mine}
            made = {(job.request.owner, job.request.name) for job in mine}
            return Orders(
                epoch=self.epoch,
                heard=trainer.seq,
                orders=tuple(trainer.orders),
                drop=frozenset(id for id, lease in contact.holds.items() if not self._has(trainer.name, id, lease)),
                weights={owner: self._weight_of(owner) for owner in owners},
                full=frozenset(adapter for adapter in made if not self._live.had_room(*adapter)),
            )

    def _estranged(self, contact: Contact, now_s: float) -> Orders:
        """Answers a trainer of an earlier keeper, or a new one: it is to let go of all."""
        _, heard = self._strangers.get(contact.trainer, (now_s, 0))
        for told in contact.said:
            if told.seq > heard:
                heard = told.seq
                self._hear_of_the_past(told.what)
        self._strangers[contact.trainer] = now_s, heard
        return Orders(
            epoch=self.epoch,
            heard=heard,
            orders=(),
            drop=frozenset(contact.holds if self._is_settled else ()),
            weights={},
            full=frozenset(),
        )

    def publish(self, publication: Publication) -> AdapterRef:
        """Makes a version.  Raises StateInvalid without a lease; Unavailable; and as `Publisher.publish_weights` does."""

        def work() -> AdapterRef:
            with self._changed:
                self._check_open()
                if not self._has(publication.trainer, publication.job, publication.lease):
                    raise StateInvalid(f"job {publication.job} is another trainer's by now")
                job = self._jobs[publication.job]
                if job.made is not None and job.made[0] == publication.number:
                    return job.made[1]  # the trainer did not hear of it
            ref = self._runner.publisher.publish_weights(
                job.request.owner,
                job.request.name,
                publication.weights,
                keep=publication.keep,
                spare=publication.spare,
                learned_s=time.monotonic() - publication.age_s,
            )
            job.made = publication.number, ref
            return ref

        return self._runner.call(work)

    def _hear(self, trainer: _Trainer, what: Answer | JobSaid) -> None:
        """Believes a trainer what it says of its orders, and of jobs that are its own."""
        if isinstance(what, Answer):
            order = next((order for order in trainer.orders if order.number == what.number), None)
            if order is None:
                return
            trainer.orders.remove(order)
            job = self._jobs.get(order.id)
            if order.number in self._awaited:
                self._answers[order.number] = what.error
            elif isinstance(order, PlaceJob) and job is not None and job.lease == order.lease:
                job.arrives = False
                if what.error is not None and not isinstance(what.error, Unavailable):
                    del self._jobs[job.id]
                    self._failed.append((job.id, what.error))
            return
        job = self._jobs.get(what.id)
        if job is None or not self._has(trainer.name, what.id, what.lease):
            self._hear_of_the_past(what)
        elif isinstance(what.what, Published):
            if what.what.checkpoint:
                job.kept.add(what.what.ref.version)
            self._recorder.job_published(what.what)
        else:
            news = what.what
            self._note(job, news.job.state)
            if news.job.state is JobStatus.VALIDATING_FILES:  # the keeper has read its files before: it waits
                news = replace(news, job=replace(news.job, state=JobStatus.QUEUED))
            self._recorder.job_changed(news)

    def _hear_of_the_past(self, what: Answer | JobSaid) -> None:
        """Keeps the steps of what a trainer says of a job that is not its own any more; its checkpoint may hold them."""
        if isinstance(what, JobSaid) and isinstance(what.what, JobNews):
            self._recorder.add_steps(what.what)

    def _has(self, trainer: str, id: str, lease: Lease) -> bool:
        """Whether a lease is the present one of a job, and this trainer's."""
        job = self._jobs.get(id)
        return job is not None and job.place == trainer and job.lease == lease

    # ---- whoever scales -------------------------------------------------------------------------------------------

    def report(self) -> TrainingReport:
        """Returns what the group has to do."""
        with self._changed:
            now_s = self._clock()
            waits_s = [now_s - job.since_s for job in self._jobs.values() if self._waits(job)]
            held = Counter({_server(name): 0 for name in self._trainers})
            held.update(_server(name) for name in self._trainers for _ in self._at(name))
            return TrainingReport(waiting=len(waits_s), longest_wait_s=max(waits_s, default=0.0), trainers=dict(held))

    def _waits(self, job: _Job) -> bool:
        """Whether a job is in line, or waits for a slot of the keeper's."""
        return job.place is None or (job.place == KEEPER and job.state not in (JobStatus.RUNNING, JobStatus.PAUSED))

    def drain(self, server: str) -> None:
        """Gives a trainer no more jobs, moves those that it has, and returns when it holds none."""
        with self._changed:
            while not self._closed:
                trainers = [trainer for trainer in self._trainers.values() if _server(trainer.name) == server]
                for trainer in trainers:
                    trainer.drains = True
                if not any(self._at(trainer.name) for trainer in trainers):
                    return
                self._look_soon()
                self._changed.wait(LOOK_S)

    # ---- what is to be done ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._due, LOOK_S)
                if self._closed:
                    return
                self._due = False
            try:
                self.look()
            except Unavailable as error:
                LOG.warning("jobs are not placed just now: %s", error.message)
                time.sleep(LOOK_S)
            except Exception:
                LOG.exception("jobs are not placed just now")
                time.sleep(LOOK_S)

    def look(self) -> None:
        """Takes note of what has changed, and moves jobs.  May wait for the device thread, the database and the network."""
        self._look_at_processes()
        self._look_at_own()
        for id in self._forsaken():
            try:
                goes_on = self._service.died(id)
            except NotFound:
                goes_on = False
            except Unavailable as error:  # the death is not counted
                LOG.error("job %s: its trainer's death is not stored: %s", id, error.message)
                goes_on = True
            with self._changed:
                job = self._jobs[id]
                job.is_blamed = False
                if not goes_on:
                    del self._jobs[id]
                self._changed.notify_all()
        with self._changed:
            failed, self._failed = self._failed, []
            comes, goes = self._decide() if self._settled() else ([], [])
        for id, error in failed:
            self._service.fail(id, error)
        for job in goes:
            self._release_own(job)
        for job in comes:
            self._create_own(job)

    def _look_at_processes(self) -> None:
        now_s = self._clock()
        if now_s - self._named_s < NAMES_S:
            return
        try:
            names = self._processes()
        except Unavailable as error:
            LOG.warning("which trainers there are is not known: %s", error.message)
            names = None
        with self._changed:
            self._names, self._named_s = names, now_s

    def _look_at_own(self) -> None:
        """Takes note of how the keeper's own jobs stand."""
        with self._changed:
            if not self._at(KEEPER):
                return
        states = self._runner.call(lambda: {job.id: job.state for job in self._live.jobs.list(None)})
        with self._changed:
            for job in self._at(KEEPER):
                if job.id in states:
                    self._note(job, states[job.id])
                elif not job.leaves:
                    del self._jobs[job.id]  # it has ended
                elif not self._live.jobs.states.is_writing(job.id):
                    self._left(job)
            self._changed.notify_all()

    def _forsaken(self) -> list[str]:
        """Takes the jobs from trainers that have ended, or hold no lease any more; returns those that ran there."""
        with self._changed:
            ran: list[str] = []
            for trainer in list(self._trainers.values()):
                silent_s = self._clock() - trainer.heard_s
                has_ended = self._names is not None and trainer.name not in self._names and silent_s > GONE_S
                if not has_ended and silent_s <= LEASE_S + MARGIN_S:
                    continue
                LOG.error("%s %s; its jobs go on elsewhere", trainer.name, "has ended" if has_ended else "is silent")
                del self._trainers[trainer.name]
                for job in self._at(trainer.name):
                    blamed = job.state is JobStatus.RUNNING
                    self._left(job)
                    if blamed and job.id in self._jobs:
                        job.is_blamed = True
                        ran.append(job.id)
            return ran

    def _settled(self) -> bool:
        """Whether no trainer of an earlier keeper can hold a job any more."""
        if not self._is_settled:
            names, heard_s = self._names, max([self._began_s, *(heard_s for heard_s, _ in self._strangers.values())])
            joined = names is not None and all(n in self._trainers for n in names if n.startswith(TRAINER))
            self._is_settled = joined or self._clock() - heard_s > LEASE_S + MARGIN_S
        return self._is_settled

    def _decide(self) -> tuple[list[_Job], list[_Job]]:
        """Gives trainers their orders; returns the jobs that come to the keeper's own trainer, and those that leave it."""
        places = [Place(name=KEEPER, slots=self._own_slots, is_keeper=True)]
        places += [Place(name=t.name, slots=t.slots, drains=t.drains) for t in self._trainers.values()]
        jobs = [_placed(job) for job in self._jobs.values() if job.state is not JobStatus.PAUSED and not job.is_blamed]
        decision = decide(places, jobs, self._weight_of, self._clock())
        comes: list[_Job] = []
        for id, place in decision.placed.items():
            job = self._jobs[id]
            job.place, job.arrives, job.is_told = place, True, False
            if place == KEEPER:
                comes.append(job)
                continue
            number = next(self._numbers)
            job.lease, job.made = Lease(epoch=self.epoch, number=number), None
            self._trainers[place].orders.append(
                PlaceJob(
                    number=number,
                    lease=job.lease,
                    id=id,
                    request=job.request,
                    publish=job.publish,
                    kept=tuple(sorted(job.kept)),
                )
            )
        goes: list[_Job] = []
        for job in map(self._jobs.__getitem__, decision.released):
            assert job.place is not None, "it is released from there"
            job.leaves = True
            if job.place == KEEPER:
                goes.append(job)
            else:
                order = ReleaseJob(number=next(self._numbers), id=job.id, owner=job.request.owner)
                self._trainers[job.place].orders.append(order)
        for job in self._jobs.values():
            if job.place is None and not job.is_told and not job.is_blamed:
                job.is_told = True
                self._post(job.id, JobStatus.QUEUED, "it waits for a slot")
        return comes, goes

    def _create_own(self, job: _Job) -> None:
        try:
            self._own.create(job.id, job.request, publish=job.publish, kept=sorted(job.kept))
        except Unavailable:
            raise  # the server ends
        except Exception as error:
            with self._changed:
                del self._jobs[job.id]
                self._failed.append((job.id, error))
                self._look_soon()
        with self._changed:
            job.arrives = False
            self._changed.notify_all()

    def _release_own(self, job: _Job) -> None:
        try:
            self._runner.call(lambda: self._live.release(job.request.owner, job.id))
        except (NotFound, StateInvalid):  # it has ended meanwhile
            with self._changed:
                job.leaves = False

    # ---- how jobs stand; under the lock ---------------------------------------------------------------------------

    def _at(self, place: str) -> list[_Job]:
        return [job for job in self._jobs.values() if job.place == place]

    def _weight_of(self, owner: str) -> float:
        return self._runner.tuning.weights.get(owner, 1.0)

    def _note(self, job: _Job, state: JobStatus) -> None:
        if job.state is JobStatus.RUNNING and state is not JobStatus.RUNNING:
            job.since_s = self._clock()
        job.state = state

    def _left(self, job: _Job) -> None:
        """A job is nowhere any more: it is in line again, unless it has ended or is paused."""
        if job.state in ENDED or job.state is JobStatus.PAUSED:
            del self._jobs[job.id]
            return
        self._note(job, JobStatus.QUEUED)
        job.place = job.lease = None
        job.arrives = job.leaves = False

    def _look_soon(self) -> None:
        self._due = True
        self._changed.notify_all()

    def _post(self, id: str, status: JobStatus, why: str, *, error: JsonObject | None = None) -> None:
        """Has the record say where a job stands."""
        event = NewEvent(time_s=time.time(), level="info", kind="message", message=f"{status}: {why}")
        self._recorder.post(id, lambda now: replace(now, status=status, error=error), event)


def _placed(job: _Job) -> PlacedJob:
    return PlacedJob(
        id=job.id,
        owner=job.request.owner,
        rank=job.request.spec.max_rank,
        since_s=job.since_s,
        place=job.place,
        runs=job.state is JobStatus.RUNNING,
        arrives=job.arrives,
        leaves=job.leaves,
    )


def _server(process: str) -> str:
    """Returns the server whose process this is: trainer-0 of trainer-0.1."""
    return process.partition(".")[0]
