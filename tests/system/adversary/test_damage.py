"""Random edits of every kind of file that a server keeps: refused or repaired, and never the end of anybody else.

By default one edit a file; `-m slow` makes ten.
"""

from __future__ import annotations

import contextlib
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from blobs_world import faulty
from jobs_world import kinds, make_jobs, no_files, request, trainer_of, weights
from store_world import put, same
from train_world import examples

from jaxlora.core.errors import AdapterNotFound, JaxLoraError, StorageFailed
from jaxlora.core.lora import AdapterRef
from jaxlora.storage.adapter_store import AdapterStore
from jaxlora.storage.remote_states import StateCopies
from train.jobs.inputs import JobFiles
from train.jobs.job import Progress
from train.jobs.runner import Jobs

ONE_OR_TEN = [pytest.param(1, id="one edit"), pytest.param(10, id="ten edits", marks=pytest.mark.slow)]


def edits(folder: Path, count: int) -> Iterator[tuple[str, bytes]]:
    """(path, other bytes) of every file below a folder, so many times: a byte is another, or it is cut, longer or empty."""
    draw = random.Random(count)
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        data = path.read_bytes()
        for i in range(count):
            at = draw.randrange(max(len(data), 1))
            if i % 4 < 2 and data:
                changed = data[:at] + bytes([data[at] ^ draw.randrange(1, 256)]) + data[at + 1 :]
            else:
                changed = (data[:at], data + draw.randbytes(9))[i % 2]
            yield str(path.relative_to(folder)), changed


@contextlib.contextmanager
def edited(folder: Path, path: str, data: bytes) -> Iterator[None]:
    """The file is so inside the block, and whatever the block does to the folder is undone."""
    kept = folder.with_name(folder.name + ".kept")
    shutil.copytree(folder, kept)
    (folder / path).write_bytes(data)
    try:
        yield
    finally:
        shutil.rmtree(folder)
        kept.rename(folder)


ASKED = request(1, steps=6, checkpoint_every=2)


@pytest.fixture(scope="module")
def trainer():
    return trainer_of(2, lanes=2, lane_tokens=32)


@pytest.fixture
def states(trainer, tmp_path_factory) -> Path:
    """A folder with the checkpoints of steps 2 and 4 of `job`."""
    folder = tmp_path_factory.mktemp("states")
    jobs, _ = make_jobs(folder, trainer, states=folder / "states")
    jobs.create(ASKED, id="job")
    for _ in range(4):
        jobs.step()
        jobs._writer.flush()
    jobs.close()
    trainer.remove("job")
    return folder / "states"


@pytest.fixture(scope="module")
def result(trainer, tmp_path_factory) -> dict[str, bytes]:
    """What an undisturbed job comes to."""
    jobs, shelf = make_jobs(tmp_path_factory.mktemp("undisturbed"), trainer)
    job = jobs.create(ASKED, id="job")
    jobs.run()
    return weights(shelf.adapters[job.result])


def opened(trainer, folder: Path) -> tuple[int, bytes]:
    """(step, state) from which the job would go on."""
    files = JobFiles(trainer=trainer, load=no_files, states=folder)
    material = files.open("job", ASKED, files.examine("job", ASKED), parked=False, progress=Progress())
    return material.progress.step, b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(material.state))


def without(folder: Path, step: int, work: Callable[[], tuple[int, bytes]]) -> tuple[int, bytes]:
    (folder / "job" / str(step)).rename(folder / "away")
    try:
        return work()
    finally:
        (folder / "away").rename(folder / "job" / str(step))


@pytest.mark.fault("C12")
@pytest.mark.parametrize("count", ONE_OR_TEN)
def test_a_damaged_checkpoint_gives_way_to_the_one_before_bit_for_bit(trainer, states, count):
    newest = opened(trainer, states)
    before = without(states, 4, lambda: opened(trainer, states))
    assert (newest[0], before[0]) == (4, 2)
    found = []
    for path, data in edits(states / "job" / "4", count):
        with edited(states / "job", f"4/{path}", data):
            found.append(opened(trainer, states))
            assert found[-1] in (newest, before), path
            assert (found[-1] == before) == (states / "job" / ".damaged-4").is_dir()
    assert before in found


@pytest.mark.parametrize("count", ONE_OR_TEN)
def test_a_damaged_only_checkpoint_is_refused_and_stays(trainer, states, count):
    shutil.rmtree(states / "job" / "2")
    newest, refused = opened(trainer, states), 0
    for path, data in edits(states / "job" / "4", count):
        with edited(states / "job", f"4/{path}", data):
            try:
                assert opened(trainer, states) == newest, path
            except StorageFailed:
                refused += 1
            assert (states / "job" / "4" / path).read_bytes() == data
    assert refused


@pytest.mark.parametrize("key", ["cursor", "base", "step", "sha256", "leaves"])
@pytest.mark.parametrize("old", [False, True], ids=["", "of the first releases"])
def test_a_key_that_is_another_harms_its_job_alone(trainer, states, result, key, old, tmp_path):
    """The newest checkpoint lacks a key, in a form with or without a checksum: its job ends with the same bits, the other too."""
    meta = next((states / "job" / "4" / "meta").rglob("metadata"))
    text = meta.read_text()
    assert f'"{key}"' in text
    changed = text.replace(f'"{key}"', f'"{key[:-1]}_"')
    meta.write_text(changed.replace('"sha256"', '"of"') if old else changed)
    jobs, shelf = make_jobs(tmp_path, trainer, states=states)
    job, other = jobs.create(ASKED, id="job"), jobs.create(request(2, owner="other", steps=3), id="other")
    jobs.run()
    assert (job.state, other.state) == ("succeeded", "succeeded"), job.reason
    assert weights(shelf.adapters[job.result]) == result
    gave_way = [e.message for e in jobs.events("acme", "job") if "the job goes on from step 2" in e.message]
    assert len(gave_way) == (key != "sha256"), "what lost its checksum is as it was"


def test_a_job_without_a_good_checkpoint_is_paused_keeps_its_files_and_goes_on_when_they_are_back(
    trainer, states, result, tmp_path
):
    metas = [next((states / "job" / str(step) / "meta").rglob("metadata")) for step in (2, 4)]
    texts = [meta.read_bytes() for meta in metas]
    for meta in metas:
        meta.write_bytes(b"{}")
    jobs, shelf = make_jobs(tmp_path, trainer, states=states)
    job, other = jobs.create(ASKED, id="job"), jobs.create(request(2, owner="other", steps=3), id="other")
    jobs.run()
    assert (job.state, job.code, other.state) == ("paused", "storage_failed", "succeeded")
    assert "resume it to try again" in job.reason
    for meta, text in zip(metas, texts, strict=True):
        assert meta.read_bytes() == b"{}"
        meta.write_bytes(text)
    jobs.resume("acme", "job")
    jobs.run()
    assert weights(shelf.adapters[job.result]) == result


def test_a_damaged_checkpoint_is_replaced_by_its_copy(trainer, states):
    copies = StateCopies(faulty("states"), states, "jobs")
    copies.send((states / "job").absolute())
    wanted = opened(trainer, states)
    next((states / "job" / "4" / "meta").rglob("metadata")).write_bytes(b"{}")
    files = JobFiles(trainer=trainer, load=no_files, states=states, copies=copies)
    material = files.open("job", ASKED, files.examine("job", ASKED), parked=False, progress=Progress())
    assert material.progress.step == 4
    assert list(material.damaged) == []
    assert opened(trainer, states) == wanted


@pytest.mark.parametrize("count", ONE_OR_TEN)
def test_a_damaged_parked_state_begins_at_its_checkpoint_again_bit_for_bit(trainer, result, tmp_path, count):
    """The state of a job that was paused is in a file, which is then edited."""
    for i in range(count):
        folder, draw = tmp_path / str(i), random.Random(i)
        jobs, shelf = make_jobs(folder, trainer, states=folder / "states", host_bytes=0)
        job = jobs.create(ASKED, id="job")
        for _ in range(3):
            jobs.step()
        jobs.pause("acme", "job")
        jobs._writer.flush()
        (parked,) = (folder / "parked").glob("*.parked")
        data = bytearray(parked.read_bytes())
        data[draw.randrange(len(data))] ^= draw.randrange(1, 256)
        parked.write_bytes(data[: draw.randrange(len(data))] if i % 2 else data)
        other = jobs.create(request(2, owner="other", steps=2), id="other")
        jobs.resume("acme", "job")
        jobs.run()
        assert (job.state, other.state) == ("succeeded", "succeeded"), job.reason
        assert weights(shelf.adapters[job.result]) == result
        assert "problem" in kinds(jobs, "job")


def test_a_damaged_best_state_pauses_its_job_which_then_delivers_it_from_the_checkpoint(trainer, tmp_path):
    asked = request(
        1, steps=6, checkpoint_every=1, heldout=examples(2, 2), evaluate_every=1, keep_best=True, min_delta=0.02
    )

    def run(folder: Path, damage: bool) -> tuple[Jobs, dict[str, bytes]]:
        jobs, shelf = make_jobs(folder, trainer, states=folder / "states", host_bytes=0)
        job = jobs.create(asked, id="job")
        while job.progress.step < 5:
            jobs.step()
            jobs._writer.flush()
        if damage:
            (parked,) = (folder / "parked").glob("*.best.parked")
            parked.write_bytes(b"nothing")
        jobs.run()
        if damage:
            assert (job.state, job.code) == ("paused", "storage_failed"), job.reason
            jobs.resume("acme", "job")
            jobs.run()
        assert job.state == "succeeded"
        return jobs, weights(shelf.adapters[job.result])

    assert run(tmp_path / "whole", damage=False)[1] == run(tmp_path / "damaged", damage=True)[1]


@pytest.mark.fault("C12")
@pytest.mark.parametrize("count", ONE_OR_TEN)
def test_a_damaged_version_is_refused_or_right_and_others_are_served(tmp_path, count):
    store = AdapterStore(tmp_path / "store", host_bytes=0)
    one, other = put(store), put(store, name="other")
    store.close()
    refused = 0
    for path, data in edits(tmp_path / "store" / "adapters" / "acme" / "bot", count):
        with edited(tmp_path / "store", f"adapters/acme/bot/{path}", data):
            store = AdapterStore(tmp_path / "store", host_bytes=0)
            for ask in (store.get, store.created, store.rank, store.nbytes):
                try:
                    got = ask(one.ref)
                    assert ask != store.get or same(got, one), path
                except StorageFailed:
                    refused += 1
            assert same(store.get(other.ref), other)
            assert put(store).ref.version == 2
            store.delete("acme", "bot")
            store.close()
    assert refused


@pytest.mark.parametrize("count", ONE_OR_TEN)
def test_a_damaged_counter_gives_no_number_twice_and_harms_no_other_name(tmp_path, count):
    store = AdapterStore(tmp_path / "store", host_bytes=0)
    for _ in range(17):
        gone = put(store)
    other = put(store, name="other")
    store.delete("acme", "bot")
    store.close()
    for path, data in edits(tmp_path / "store" / "counters" / "acme", 6 * count):
        with edited(tmp_path / "store", f"counters/acme/{path}", data):
            store = AdapterStore(tmp_path / "store", host_bytes=0)
            assert same(store.get(other.ref), other)
            for name, least in (("bot", gone.ref.version), ("other", 1), ("third", 0)):
                with contextlib.suppress(StorageFailed):
                    assert store.mint("acme", name).version > least, path
            with pytest.raises(AdapterNotFound):
                store.get(AdapterRef("acme", "bot", 17))
            with contextlib.suppress(JaxLoraError):
                store.close()
