"""Jobs on a server that ended, on the one that takes over its folder."""

from __future__ import annotations

import time

from jobs_api_world import Server, ask, client_of, create, lines, wait_for

from jaxlora.config.serving import LimitsSection

pytest_plugins = ["serve_fixtures"]


def test_a_job_that_saved_nothing_begins_at_its_adapter_again(world, tmp_path):
    """Interrupted before its first checkpoint, a job that goes on from an adapter ends where an undisturbed one ends."""
    results = []
    for interrupted in (False, True):
        folder = tmp_path / str(interrupted)
        folder.mkdir()
        tenant = f"again-{interrupted}"
        first = Server(world, folder)
        with first.running(hard=interrupted) as url, client_of(url, tenant) as client:
            start = wait_for(client, create((first, url), client).id, "succeeded").fine_tuned_model
            how = {"lora": None, "max_steps": 30, "checkpoint_every": 30}
            job = create((first, url), client, model=start, extra=how)
            if interrupted:
                while client.fine_tuning.jobs.retrieve(job.id).progress["step"] < 3:
                    time.sleep(0.005)
            else:
                wait_for(client, job.id, "succeeded")
        second = Server(world, folder)
        with second.running() as url, client_of(url, tenant) as client:
            done = wait_for(client, job.id, "succeeded")
            results.append(second.runner.engine.store.get(second.runner.resolve(tenant, done.fine_tuned_model)).weights)
    for target, pair in results[0].items():
        for x, y in zip(pair, results[1][target], strict=True):
            assert x.tobytes() == y.tobytes()


def test_jobs_go_on_after_a_restart(world, tmp_path):
    """What ran goes on and ends where an uninterrupted job ends; what was paused waits; names mean what they did."""
    results = []
    for interrupted in (False, True):
        folder = tmp_path / str(interrupted)
        folder.mkdir()
        tenant = f"restart-{interrupted}"
        first = Server(world, folder)
        with first.running() as url, client_of(url, tenant) as client:
            how = {"max_steps": 40, "checkpoint_every": 8}
            job = create((first, url), client, suffix="again", extra=how)
            if interrupted:
                while not client.fine_tuning.jobs.checkpoints.list(job.id).data:
                    time.sleep(0.01)
                resting = create((first, url), client, extra=how)
                wait_for(client, resting.id, "queued", "running")
                client.fine_tuning.jobs.pause(resting.id)
            else:
                wait_for(client, job.id, "succeeded")
        second = Server(world, folder)
        with second.running() as url, client_of(url, tenant) as client:
            done = wait_for(client, job.id, "succeeded")
            steps = [
                e.data["step"] for e in client.fine_tuning.jobs.list_events(job.id, limit=50) if e.type == "metrics"
            ]
            assert steps == list(range(40, 0, -1)), "no step is lost and none is done twice"
            assert ask(client, done.fine_tuned_model).choices
            assert ask(client, done.fine_tuned_model + ":ckpt-step-8").choices
            if interrupted:
                assert client.fine_tuning.jobs.retrieve(resting.id).status == "paused"
                client.fine_tuning.jobs.resume(resting.id)
                wait_for(client, resting.id, "succeeded")
            ref = second.runner.resolve(tenant, done.fine_tuned_model)
            results.append(second.runner.engine.store.get(ref).weights)
    for target, pair in results[0].items():
        for x, y in zip(pair, results[1][target], strict=True):
            assert x.tobytes() == y.tobytes()


def test_a_job_that_failed_keeps_its_checkpoints_for_days(world, tmp_path):
    """Its file reads as other examples after a restart, as it would with another chat template."""
    first = Server(world, tmp_path)
    with first.running() as url, client_of(url, "acme") as client:
        job = create((first, url), client, extra={"max_steps": 2000, "checkpoint_every": 2})
        while not client.fine_tuning.jobs.checkpoints.list(job.id).data:
            time.sleep(0.01)
    saved = first.config.data / "jobs/states" / job.id
    assert list(saved.iterdir())
    path = first.files.path(first.files.get(job.training_file, None))
    path.write_text(lines(5))
    for keep_days, is_there in ((7, True), (7, True), (0, False)):
        server = Server(world, tmp_path)
        server.host.service._limits = LimitsSection(keep_days=keep_days)
        with server.running() as url, client_of(url, "acme") as client:
            assert "another examples" in wait_for(client, job.id, "failed").error.message
            server.host.service.recorder.flush()
        assert saved.exists() == is_there
