"""Jobs placed at trainers end bit for bit as on one server, wherever they go and whoever dies or falls silent meanwhile."""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import openai
import pytest
from jobs_api_world import Server, client_of, create, wait_for
from training_world import Cluster, FarTrainer, far_trainer, states

from jaxlora.config.serving import TenantWeight
from jaxlora.core.errors import DataInvalid, StateInvalid, Unavailable
from jaxlora.storage.step_folders import steps_of
from serve.cluster.training import group as group_module
from serve.cluster.training import loop as loop_module
from serve.cluster.training.messages import Contact, Lease, Publication
from serve.jobs.recorder import DEATHS
from serve.jobs.service import MAX_DEATHS

pytest_plugins = ["serve_fixtures"]
STEPS = 30
HOW = {"max_steps": STEPS, "checkpoint_every": 6}
LONG = {"max_steps": 4000, "checkpoint_every": 6}


@pytest.fixture(scope="module")
def trainers(world, tmp_path_factory):
    """Two compiled trainers."""
    server = Server(world, tmp_path_factory.mktemp("sizes"))
    yield [far_trainer(world, server) for _ in range(2)]
    server.runner.start()
    server.stop()


def weights_of(server, tenant, job):
    ref = server.runner.resolve(tenant, job.fine_tuned_model)
    return {t: tuple(x.tobytes() for x in pair) for t, pair in server.runner.engine.store.get(ref).weights.items()}


@pytest.fixture(scope="module")
def alone(world, tmp_path_factory):
    """What the job of these tests makes on a server without trainers."""
    server = Server(world, tmp_path_factory.mktemp("alone"))
    with server.running() as url, client_of(url, "alone") as client:
        done = wait_for(client, create((server, url), client, extra=HOW).id, "succeeded")
        return weights_of(server, "alone", done)


@pytest.fixture
def cluster():
    """No keeper yet; whatever trainer is left at the end is killed."""
    it = Cluster()
    yield it
    for far in list(it.far):
        far.kill()


@contextlib.contextmanager
def keeping(world, folder, cluster, tenant, *, hard=False):
    """A keeper on this folder, and what asks it.  hard: it ends without a word."""
    server = Server(world, folder)
    group = cluster.keep(server)
    with server.running(hard=hard) as url, client_of(url, tenant) as client:
        cluster.group = group  # not before the server knows its unfinished jobs, as with a process
        try:
            yield SimpleNamespace(
                server=server,
                group=group,
                client=client,
                stored=server.host.service.stored,
                job=lambda **extra: create((server, url), client, extra=HOW | extra).id,
                bytes_of=lambda job: weights_of(server, tenant, job),
            )
        finally:
            cluster.group = None
            group.close()


def until(what, within_s=20):
    ends = time.monotonic() + within_s
    while not (found := what()):
        assert time.monotonic() < ends
        time.sleep(0.005)
    return found


def steps_told(it, id):
    """The steps of its events, oldest first."""
    events = it.client.fine_tuning.jobs.list_events(id, limit=100)
    return [event.data["step"] for event in reversed(list(events)) if event.type == "metrics"]


def runs_at(it, far, id, step=1):
    """Waits until a trainer runs a job, which has come so far."""

    def come() -> bool:
        job = it.group._jobs.get(id)
        runs = job is not None and job.place == far.name and job.state == "running"
        return runs and it.stored.get(id, None).progress.get("step", 0) >= step

    until(come)


def test_jobs_at_trainers_end_as_on_one_server(world, tmp_path, cluster, trainers, alone):
    with keeping(world, tmp_path, cluster, "spread") as it:
        far = [FarTrainer(f"trainer-{n}.1", cluster, one, it.server) for n, one in enumerate(trainers)]
        until(lambda: len(it.group.report().trainers) == 2)
        ids = [it.job() for _ in range(4)]
        until(lambda: it.group.report().trainers == {"trainer-0": 1, "trainer-1": 1})
        waiting = until(lambda: next((id for id, one in it.group._jobs.items() if one.is_told), None))
        report = it.group.report()
        assert report.waiting == 1
        assert 0 < report.longest_wait_s < 20
        until(lambda: it.client.fine_tuning.jobs.retrieve(waiting).status == "queued")
        events = list(it.client.fine_tuning.jobs.list_events(waiting, limit=100))
        assert "queued: it waits for a slot" in [event.message for event in events]
        for id in ids:
            done = wait_for(it.client, id, "succeeded")
            assert it.bytes_of(done) == alone
            assert steps_told(it, id) == list(range(1, STEPS + 1))
            assert sorted(c.step_number for c in it.client.fine_tuning.jobs.checkpoints.list(id)) == [6, 12, 18, 24, 30]
            until(lambda id=id: not states(it.server, id).exists())
        assert it.group.report() == group_module.TrainingReport(
            waiting=0, longest_wait_s=0.0, trainers={"trainer-0": 0, "trainer-1": 0}
        )
        for one in far:
            one.stop()
        assert [one.failures for one in far] == [[], []]
        until(lambda: it.group.report().trainers == {})


class Numbered:
    """Publishes; the first publication under a lease has the number of the last one under the lease before."""

    def __init__(self, group):
        self._publish, group.publish = group.publish, self
        self.refs, self._lease, self._number = [], None, 0

    def __call__(self, publication):
        self._number += self._lease in (None, publication.lease)
        self._lease = publication.lease
        self.refs.append(self._publish(replace(publication, number=self._number)))
        return self.refs[-1]


def test_a_drained_trainer_gives_its_job_away_between_two_steps(world, tmp_path, cluster, trainers, alone):
    with keeping(world, tmp_path, cluster, "drained") as it:
        first = FarTrainer("trainer-0.1", cluster, trainers[0], it.server)
        until(lambda: it.group.report().trainers)
        numbered = Numbered(it.group)
        id = it.job()
        runs_at(it, first, id, step=8)
        second = FarTrainer("trainer-1.1", cluster, trainers[1], it.server)
        until(lambda: len(it.group.report().trainers) == 2)
        it.group.drain("trainer-0")
        assert first.jobs() == set()
        runs_at(it, second, id)
        done = wait_for(it.client, id, "succeeded")
        assert it.bytes_of(done) == alone
        assert steps_told(it, id) == list(range(1, STEPS + 1)), "it goes on from the step at which it was released"
        versions = [ref.version for ref in numbered.refs]
        assert versions == list(range(1, len(versions) + 1)), "numbers count under one lease"
        other = it.job()
        runs_at(it, second, other)
        assert it.group.report().trainers == {"trainer-0": 0, "trainer-1": 1}, "it is given nothing more"
        it.group.drain("nobody")
        second.stop()  # no trainer is left that takes jobs: the keeper does
        assert it.bytes_of(wait_for(it.client, other, "succeeded")) == alone
        first.stop()


def test_jobs_that_wait_at_the_keeper_go_to_a_trainer_that_comes(world, tmp_path, cluster, trainers, alone):
    with keeping(world, tmp_path, cluster, "grows") as it:
        long = it.job(**LONG)
        until(lambda: it.stored.get(long, None).status == "running")
        id = it.job()
        report = until(lambda: (found := it.group.report()).waiting and found)
        assert (report.waiting, report.trainers) == (1, {}), "its time slices are shared, but it has no slot of its own"
        far = FarTrainer("trainer-0.1", cluster, trainers[0], it.server)
        assert it.bytes_of(wait_for(it.client, id, "succeeded")) == alone
        it.client.fine_tuning.jobs.cancel(long)
        assert it.client.fine_tuning.jobs.retrieve(long).status == "cancelled"
        far.stop()


def test_a_killed_trainers_job_goes_on_from_its_checkpoint_until_it_is_to_blame(
    world, tmp_path, cluster, trainers, alone
):
    with keeping(world, tmp_path, cluster, "killed") as it:
        far = FarTrainer("trainer-0.1", cluster, trainers[0], it.server)
        until(lambda: it.group.report().trainers)
        id = it.job()
        runs_at(it, far, id, step=14)
        far.kill()
        until(lambda: it.stored.get(id, None).progress.get(DEATHS) == 1)
        assert it.bytes_of(wait_for(it.client, id, "succeeded")) == alone
        far = FarTrainer("trainer-0.2", cluster, trainers[0], it.server)
        until(lambda: it.group.report().trainers)
        pill = it.job(checkpoint_every=STEPS)
        for number in range(1, 1 + MAX_DEATHS):
            runs_at(it, far, pill)
            dies, far = far, FarTrainer(f"trainer-{number}.1", cluster, trainers[number % 2], it.server)
            until(lambda: len(it.group.report().trainers) == 2)
            dies.kill()
        until(lambda: it.stored.get(pill, None).status == "paused")
        assert it.stored.get(pill, None).error["code"] == "server_died"
        it.client.fine_tuning.jobs.resume(pill)
        assert it.bytes_of(wait_for(it.client, pill, "succeeded")) == alone
        far.stop()


@pytest.fixture
def short_leases(monkeypatch):
    monkeypatch.setattr(loop_module, "LEASE_S", 4.0)
    monkeypatch.setattr(group_module, "LEASE_S", 4.0)
    monkeypatch.setattr(group_module, "MARGIN_S", 1.0)
    monkeypatch.setattr(loop_module, "REACH_S", 0.05)


def test_a_silent_trainer_stops_and_its_job_goes_on_elsewhere_a_lease_later(
    world, tmp_path, cluster, trainers, alone, short_leases
):
    with keeping(world, tmp_path, cluster, "silent") as it:
        far = FarTrainer("trainer-0.1", cluster, trainers[0], it.server)
        until(lambda: it.group.report().trainers)
        id = it.job(**LONG)
        runs_at(it, far, id, step=8)
        lease = it.group._jobs[id].lease
        store = it.server.runner.engine.store
        far.wire.is_cut, cut_s = True, time.monotonic()
        until(lambda: far.jobs() == set())
        dropped_s = time.monotonic() - cut_s
        left = steps_of(states(it.server, id))
        assert id in it.group._jobs
        until(lambda: it.group._jobs[id].place == "keeper")
        assert 2.0 < dropped_s < time.monotonic() - cut_s
        assert left == steps_of(states(it.server, id))[: len(left)], "it wrote nothing when its lease was over"
        late = Publication(
            trainer=far.name, job=id, lease=lease, number=99, weights=None, keep=None, spare=(), age_s=0.0
        )
        newest = store.latest("silent", it.stored.get(id, None).adapter)
        with pytest.raises(StateInvalid, match="another trainer's"):
            it.group.publish(late)
        far.wire.is_cut = False
        until(lambda: "trainer-0" in it.group.report().trainers)
        assert store.latest("silent", newest.name).version >= newest.version
        it.client.fine_tuning.jobs.cancel(id)
        other = it.job()
        runs_at(it, far, other)
        far.wire.is_cut = True  # for less than a lease
        time.sleep(0.5)
        far.wire.is_cut = False
        assert it.bytes_of(wait_for(it.client, other, "succeeded")) == alone
        assert steps_told(it, other) == list(range(1, STEPS + 1)), "it stayed where it was"
        far.stop()


def test_a_keeper_that_starts_again_has_all_jobs_released_before_it_places_them(
    world, tmp_path, cluster, trainers, alone, short_leases
):
    with keeping(world, tmp_path, cluster, "again", hard=True) as it:
        far = [FarTrainer(f"trainer-{n}.1", cluster, one, it.server) for n, one in enumerate(trainers)]
        until(lambda: len(it.group.report().trainers) == 2)
        ids = [it.job() for _ in range(2)]
        for id in ids:
            until(lambda id=id: it.stored.get(id, None).progress.get("step", 0) >= 7)
        held = {one.name: one.jobs() for one in far}
        assert set().union(*held.values()) == set(ids)
    far[1].wire.is_cut = True  # it does not hear of the new keeper in time
    with keeping(world, tmp_path, cluster, "again") as it:
        cluster.names.add("trainer-2.1")  # one that is being started
        for id in ids:
            done = wait_for(it.client, id, "succeeded")
            assert it.bytes_of(done) == alone
            told = set(steps_told(it, id))
            assert max(told) == STEPS
            if id in held[far[0].name]:  # the other could not tell what it did last
                assert told == set(range(1, STEPS + 1))
        far[1].wire.is_cut = False
        until(lambda: len(it.group.report().trainers) == 2)
        for one in far:
            one.stop()
        assert [one.failures for one in far] == [[], []]


def test_a_far_job_is_paused_resumed_and_cancelled(world, tmp_path, cluster, trainers, alone):
    with keeping(world, tmp_path, cluster, "moved") as it:
        far = FarTrainer("trainer-0.1", cluster, trainers[0], it.server)
        until(lambda: it.group.report().trainers)
        jobs = it.client.fine_tuning.jobs
        id = it.job()
        runs_at(it, far, id, step=8)
        assert jobs.pause(id).status == "paused"
        record = it.stored.get(id, None)
        assert record.error["code"] == "paused_by_owner"
        reached = record.progress["step"]
        assert it.server.runner.resolve("moved", record.adapter).version == record.progress["version"]
        until(lambda: far.jobs() == set())
        assert jobs.pause(id).status == "paused"
        jobs.resume(id)
        assert jobs.resume(id).status != "paused"
        assert it.bytes_of(wait_for(it.client, id, "succeeded")) == alone
        assert steps_told(it, id) == list(range(1, STEPS + 1))
        assert reached < STEPS
        with pytest.raises(openai.ConflictError):
            jobs.pause(id)
        # in line: the trainer and the keeper are taken
        long = [it.job(**LONG) for _ in range(2)]
        until(lambda: all(it.stored.get(one, None).status == "running" for one in long))
        inline = [it.job() for _ in range(2)]
        until(lambda: it.group.report().waiting == 2)
        assert jobs.cancel(inline[0]).status == "cancelled"
        assert jobs.pause(inline[1]).status == "paused"
        assert it.group.report().waiting == 0
        version = it.stored.get(long[0], None).progress.get("version", 0)
        for one in long:
            assert jobs.cancel(one).status == "cancelled"
        record = it.stored.get(long[0], None)
        assert record.progress["version"] > version, "what it had learned is its result"
        jobs.resume(inline[1])
        assert it.bytes_of(wait_for(it.client, inline[1], "succeeded")) == alone
        far.stop()


def test_a_job_that_fails_at_a_trainer_fails_and_the_next_one_runs(world, tmp_path, cluster, trainers, alone):
    with keeping(world, tmp_path, cluster, "failing") as it:
        broken = threading.Event()

        def load(path, too_long):
            if broken.is_set():
                raise DataInvalid("line 3 is no example")
            return it.server.files.load(path, too_long)

        far = FarTrainer("trainer-0.1", cluster, trainers[0], it.server, load=load)
        until(lambda: it.group.report().trainers)
        broken.set()
        id = it.job()
        until(lambda: it.client.fine_tuning.jobs.retrieve(id).status == "failed")
        assert it.client.fine_tuning.jobs.retrieve(id).error.message == "line 3 is no example"
        broken.clear()
        refused = it.server.host.live.jobs.trainer  # an order that a trainer refuses
        create_there, far.loop.live.create = far.loop.live.create, refuse
        second = it.job()
        until(lambda: it.client.fine_tuning.jobs.retrieve(second).status == "failed")
        far.loop.live.create = create_there
        assert refused.tenants == {}
        done = wait_for(it.client, it.job(), "succeeded")
        assert it.bytes_of(done) == alone
        assert far.failures == []
        far.stop()


def refuse(id, request, *, publish, kept):
    raise DataInvalid("not that one")


def test_a_trainer_whose_loop_fails_says_so(world, tmp_path, cluster, trainers, alone):
    with keeping(world, tmp_path, cluster, "loop") as it:
        far = FarTrainer("trainer-0.1", cluster, trainers[0], it.server)
        until(lambda: it.group.report().trainers)
        id = it.job()
        runs_at(it, far, id, step=7)

        def fail():
            raise MemoryError("the device is lost")

        far.loop.live.advance = fail
        until(lambda: far.failures)
        assert isinstance(far.failures[0], MemoryError)
        far.kill()
        assert it.bytes_of(wait_for(it.client, id, "succeeded")) == alone


def test_the_end_of_a_job_is_told_after_its_last_checkpoint(world, tmp_path, cluster, trainers, monkeypatch):
    """Else the keeper would remove a folder in which the trainer still writes."""
    from jaxlora.storage import checkpoint_writer

    save, slow = checkpoint_writer.save_state, threading.Event()

    def saved(folder, step, *rest, **how):
        if step == STEPS:
            slow.wait(20)
        return save(folder, step, *rest, **how)

    monkeypatch.setattr(checkpoint_writer, "save_state", saved)
    with keeping(world, tmp_path, cluster, "last") as it:
        far = FarTrainer("trainer-0.1", cluster, trainers[0], it.server)
        until(lambda: it.group.report().trainers)
        id = it.job()
        until(lambda: it.stored.get(id, None).progress.get("final_version"))
        time.sleep(0.5)
        assert it.stored.get(id, None).status == "running"
        assert far.jobs() == {id}
        slow.set()
        wait_for(it.client, id, "succeeded")
        until(lambda: not states(it.server, id).exists())
        far.stop()


def test_a_publication_that_is_told_twice_is_made_once_and_news_of_others_are_not_believed(
    world, tmp_path, cluster, trainers
):
    with keeping(world, tmp_path, cluster, "twice") as it:
        far = FarTrainer("trainer-0.1", cluster, trainers[0], it.server)
        until(lambda: it.group.report().trainers)
        told: list[Publication] = []
        publish = it.group.publish

        def twice(publication):
            told.append(publication)
            ref = publish(publication)
            assert publish(publication) == ref
            return ref

        it.group.publish = twice
        id = it.job()
        done = wait_for(it.client, id, "succeeded")
        numbers = [publication.number for publication in told]
        assert numbers == sorted(set(numbers))
        versions = [c.fine_tuned_model_checkpoint for c in it.client.fine_tuning.jobs.checkpoints.list(id)]
        assert len(versions) == 5
        assert it.server.runner.resolve("twice", done.fine_tuned_model).version == len(told)
        stale = Contact(
            trainer="trainer-9.1",
            epoch=cluster.epoch,
            slots=far.loop._slots,
            holds={"ftjob-else": Lease(epoch=cluster.epoch, number=1)},
            said=(),
            leaves=False,
        )
        assert it.group.contact(stale).drop == {"ftjob-else"}
        far.stop()
        it.group.close()
        with pytest.raises(Unavailable):
            it.group.contact(stale)


def test_what_the_keeper_knows_of_owners_reaches_their_trainer(world, tmp_path, cluster, trainers, alone):
    with keeping(world, tmp_path, cluster, "told") as it:
        runner = it.server.runner
        heavy = TenantWeight(name="told", weight=3.0)
        runner.call(lambda: runner.tune(replace(runner.tuning, tenant=(heavy,))))
        it.server.host.live.had_room = lambda owner, name: owner != "told"
        far = FarTrainer("trainer-0.1", cluster, trainers[0], it.server)
        until(lambda: it.group.report().trainers)
        id = it.job()
        runs_at(it, far, id)
        assert far.loop.live.jobs._owner_weight("told") == 3.0
        assert it.bytes_of(wait_for(it.client, id, "succeeded")) == alone
        events = [event.message for event in it.client.fine_tuning.jobs.list_events(id, limit=100)]
        assert sum("is no checkpoint" in message for message in events) == STEPS // 6 - 1
        assert [c.step_number for c in it.client.fine_tuning.jobs.checkpoints.list(id)] == [STEPS]
        far.stop()


def test_a_trainer_that_hangs_loses_its_job_and_drops_it_when_it_comes_back(
    world, tmp_path, cluster, trainers, alone, short_leases
):
    with keeping(world, tmp_path, cluster, "hangs") as it:
        far = FarTrainer("trainer-0.1", cluster, trainers[0], it.server, hang_s=0.5)
        until(lambda: it.group.report().trainers)
        id = it.job()
        runs_at(it, far, id, step=7)
        over, advance = threading.Event(), far.loop.live.advance

        def hang() -> None:
            over.wait(20)
            advance()

        far.loop.live.advance = hang
        assert it.bytes_of(wait_for(it.client, id, "succeeded")) == alone
        assert far.jobs() == {id}
        far.loop.live.advance = advance
        over.set()
        until(lambda: far.jobs() == set())
        until(lambda: it.group.report().trainers == {"trainer-0": 0})
        far.stop()
        until(lambda: not states(it.server, id).exists())
