"""Object storage behind a server: files, jobs and adapters outlive the machine; who asks gets them, or is told to retry."""

from __future__ import annotations

import contextlib
import shutil
import time
from dataclasses import replace

import openai
import pytest
from blobs_world import FAULTS, faulty
from files_world import GOOD, files_server, on_disk, opened
from jobs_api_world import Server
from test_serve_jobs_api import client_of, create, file_of, wait_for

from jaxlora.config.serving import LimitsSection
from jaxlora.core.errors import NotFound, StorageFailed, Unavailable
from jaxlora.storage import object_store as blobs_module
from jaxlora.storage.adapter_store import AdapterStore
from jaxlora.storage.disk_cache import DiskCopies, Remote
from jaxlora.storage.remote_adapters import RemoteVersions
from serve.db.database import Database

pytest_plugins = ["serve_fixtures"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(blobs_module, "FIRST_WAIT_S", 0.001)
    yield
    FAULTS.__init__()


@pytest.fixture
def database(tmp_path):
    it = Database(f"sqlite:///{tmp_path}/records.sqlite")
    yield it
    it.close()


@pytest.fixture
def remote(request):
    return Remote(blobs=faulty(request.node.name), copies=DiskCopies(None))


def store_of(database, root, remote):
    return opened(database, root, remote=remote)


def test_another_machine_has_every_file(database, remote, tmp_path):
    with store_of(database, tmp_path / "one", remote) as files:
        kept = [files.keep("acme", f"{i}.jsonl", "fine-tune", GOOD * (i + 1)) for i in range(3)]
        files.delete(kept[1].id, "acme")
    shutil.rmtree(tmp_path / "one")
    with store_of(database, tmp_path / "two", remote) as files:
        assert on_disk(tmp_path / "two") == []
        for i in (0, 2):
            path = files.find(kept[i].id, "acme")[1]
            assert len(files.load(path, "error").units) == 3 * (i + 1)
            with files.here(path):
                assert path.read_bytes() == GOOD * (i + 1)
        with pytest.raises(NotFound):
            files.find(kept[1].id, "acme")
    assert len(remote.blobs.list("files/")) == 2


def test_an_upload_that_object_storage_refuses_leaves_nothing(database, remote, tmp_path):
    with store_of(database, tmp_path / "one", remote) as files:
        FAULTS.down = True
        with pytest.raises(Unavailable):
            files.keep("acme", "a.jsonl", "fine-tune", GOOD)
        assert on_disk(tmp_path / "one") == []
        assert files.page("acme", after=None, limit=9, purpose=None, oldest_first=False).records == []
        FAULTS.down = False
        files.keep("acme", "a.jsonl", "fine-tune", GOOD)
    remote.blobs.put_bytes("files/acme/file-left", b"of a killed upload")
    with opened(database, tmp_path / "one", remote=remote, limits=LimitsSection(keep_days=0)):
        assert len(remote.blobs.list("files/")) == 1


def test_a_deletion_while_object_storage_is_away_is_made_up_for(database, remote, tmp_path):
    with store_of(database, tmp_path / "one", remote) as files:
        record = files.keep("acme", "a.jsonl", "fine-tune", GOOD)
        FAULTS.down = True
        files.delete(record.id, "acme")
        with pytest.raises(NotFound):
            files.get(record.id, "acme")
        files._sweeps.submit(lambda: None).result()
        FAULTS.down = False
        assert len(remote.blobs.list("files/")) == 1
        files.sweep()
        assert remote.blobs.list("files/") == {}


def test_files_of_before_are_sent_and_other_bytes_are_refused(database, remote, tmp_path):
    with store_of(database, tmp_path / "one", None) as files:
        record = files.keep("acme", "a.jsonl", "fine-tune", GOOD)
    with store_of(database, tmp_path / "one", remote) as files:
        assert remote.blobs.list("files/") == {f"files/acme/{record.id}": len(GOOD)}
    remote.blobs.put_bytes(f"files/acme/{record.id}", GOOD.replace(b"4", b"5"))
    with store_of(database, tmp_path / "two", remote) as files, pytest.raises(StorageFailed, match="sha256"):
        files.load(files.path(record), "error")


def test_copies_leave_and_downloads_bring_them_back(database, tmp_path):
    remote = Remote(blobs=faulty("downloads"), copies=DiskCopies(len(GOOD)))
    with files_server(database, tmp_path / "one", remote=remote) as (url, files), client_of(url, "acme") as client:
        kept = [client.files.create(file=("a.jsonl", GOOD), purpose="fine-tune") for _ in range(3)]
        for file in kept:
            client.files.wait_for_processing(file.id, poll_interval=0.02)
        assert len(on_disk(tmp_path / "one")) == 1
        for file in [*kept, *kept]:
            assert client.files.content(file.id).content == GOOD
        assert len(on_disk(tmp_path / "one")) == 1
        FAULTS.down = True
        here = next(f for f in kept if files.path(files.get(f.id, "acme")).exists())
        away = next(f for f in kept if f is not here)
        assert client.files.content(here.id).content == GOOD
        answer = client.with_options(max_retries=0).files.with_raw_response
        with pytest.raises(Exception, match="object storage does not answer") as caught:
            answer.content(away.id)
        assert caught.value.status_code == 503
        assert "retry-after" in caught.value.response.headers


def test_a_job_goes_on_on_another_machine_and_ends_as_an_undisturbed_one(world, tmp_path):
    results, lost = {}, {}
    for name in ("undisturbed", "lost"):
        blobs = faulty(f"job-{name}")
        database = tmp_path / name / "records.sqlite"
        for machine in ("first", "second"):
            folder = tmp_path / name / machine
            folder.mkdir(parents=True)
            remote = Remote(blobs=blobs, copies=DiskCopies(None))
            store = AdapterStore(folder / "adapters", host_bytes=10**8, remote=RemoteVersions(blobs, remote.copies))
            server = Server(replace(world, store=store), folder, remote=remote, database=f"sqlite:///{database}")
            with server.running(hard=True) as url, client_of(url, "acme") as client:
                if machine == "first":
                    how = {"max_steps": 40, "checkpoint_every": 6}
                    job = create((server, url), client, suffix="moved", extra=how)
                    if name == "lost":
                        while len(client.fine_tuning.jobs.checkpoints.list(job.id).data) < 2:
                            time.sleep(0.01)
                        early = client.fine_tuning.jobs.checkpoints.list(job.id).data[0]
                    else:
                        wait_for(client, job.id, "succeeded")
                done = wait_for(client, job.id, "succeeded") if machine == "second" or name != "lost" else None
                if done is not None:
                    results[name] = store.get(server.runner.resolve("acme", done.fine_tuned_model)).weights
                if machine == "second" and name == "lost":
                    for model in (done.fine_tuned_model, early.fine_tuned_model_checkpoint):
                        asked = client.chat.completions.create(
                            model=model, messages=[{"role": "user", "content": "hi"}], max_tokens=2
                        )
                        assert asked.choices
            if machine == "first":  # what it had not sent is lost with it
                FAULTS.down = True
                with contextlib.suppress(StorageFailed):
                    store.close()
                FAULTS.down = False
                shutil.rmtree(folder)
                lost[name] = blobs.list("jobs/")
            else:
                store.close()
        assert blobs.list("jobs/") == {}, "an ended job needs no checkpoints"
    assert lost["lost"], "the job had checkpoints to go on from"
    for target, pair in results["undisturbed"].items():
        for x, y in zip(pair, results["lost"][target], strict=True):
            assert x.tobytes() == y.tobytes()


def test_a_job_waits_for_object_storage_and_a_request_is_told_to_retry(world, tmp_path, monkeypatch):
    monkeypatch.setattr("serve.jobs.service.RETRY_S", 0.05)
    monkeypatch.setattr("train.jobs.inputs.RETRY_S", 0.05)
    blobs, copies = faulty("waits"), DiskCopies(1)
    store = AdapterStore(tmp_path / "adapters", host_bytes=0, remote=RemoteVersions(blobs, copies))
    server = Server(replace(world, store=store), tmp_path, remote=Remote(blobs=blobs, copies=copies))
    with server.running() as url, client_of(url, "acme") as client:
        asked = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
        first = create((server, url), client)
        model = wait_for(client, first.id, "succeeded").fine_tuned_model
        for name in "abcdefgh":  # its slot and its memory go to others
            store.add("acme", name, world.add(name, seed=1))
            store.flush()
            assert client.chat.completions.create(model=name, **asked).choices
        file = file_of((server, url), client)
        while server.files.get(file, "acme").status == "uploaded":
            time.sleep(0.01)
        FAULTS.down = True
        second = create((server, url), client, training_file=file)
        with pytest.raises(openai.InternalServerError, match="object storage does not answer") as caught:
            client.chat.completions.create(model=model, **asked)
        assert caught.value.status_code == 503
        assert caught.value.code == "storage_unavailable"
        assert "retry-after" in caught.value.response.headers
        assert client.fine_tuning.jobs.retrieve(second.id).status == "validating_files"
        assert client.chat.completions.create(model="h", **asked).choices, "who is on the device is served"
        FAULTS.down = False
        assert wait_for(client, second.id, "succeeded").fine_tuned_model
        patient = client.with_options(max_retries=9)  # what failed is not read again for a moment
        assert patient.chat.completions.create(model=model, **asked).choices
    store.close()
