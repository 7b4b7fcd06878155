"""Jobs placed at trainers end bit for bit as on one server, wherever they go and whoever dies meanwhile."""

from __future__ import annotations

import time

import pytest
from jobs_api_world import Server, client_of, create, wait_for
from training_world import Cluster, FarTrainer, far_trainer

pytest_plugins = ["serve_fixtures"]
HOW = {"max_steps": 30, "checkpoint_every": 6}


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


def until(what, within_s=20):
    ends = time.monotonic() + within_s
    while not (found := what()):
        assert time.monotonic() < ends
        time.sleep(0.005)
    return found


def test_jobs_at_trainers_end_as_on_one_server(world, tmp_path, trainers, alone):
    cluster, server = Cluster(), Server(world, tmp_path)
    group = cluster.keep(server)
    far = [FarTrainer(f"trainer-{n}.1", cluster, trainer, server) for n, trainer in enumerate(trainers)]
    with server.running() as url, client_of(url, "spread") as client:
        until(lambda: len(group.report().trainers) == 2)
        jobs = [create((server, url), client, extra=HOW) for _ in range(3)]
        until(lambda: group.report().trainers == {"trainer-0": 1, "trainer-1": 1})
        for job in jobs:
            done = wait_for(client, job.id, "succeeded")
            assert weights_of(server, "spread", done) == alone
        assert not any(one.jobs() for one in far)
        for one in far:
            one.stop()
        assert [one.failures for one in far] == [[], []]
    group.close()
